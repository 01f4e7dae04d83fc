"""The engine: what it answers, when it ends, what it refuses, and how little it computes."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from trueline.config.schema import AdapterConfig
from trueline.data.sample import Sample
from trueline.errors import RunError
from trueline.model.adapters import adapter_parameters, add_adapter
from trueline.model.batch import pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.rollout.engine import Engine
from trueline.rollout.memory import PAGE, Pages, Slots, bytes_per_token
from trueline.rollout.sampling import Rollout, Sampling

CONFIG = DecoderConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=24, init_std=0.4)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2]]
STOP = frozenset({0, 11, 17})


@pytest.fixture(autouse=True)
def pack_for_short_answers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trueline.rollout.engine.PAYS", 1)



def make(role: str | None = None, dtype: torch.dtype = torch.float64) -> LanguageModel:
    decoder = Decoder(CONFIG).to(dtype)
    init_weights(decoder, torch.Generator().manual_seed(0))
    return LanguageModel(decoder, role)


def generate(model: LanguageModel, prompts: list[list[int]], sampling: Sampling, running: int = 64) -> list[Rollout]:
    engine = Engine(model, running)
    with engine.hold():
        return engine.generate(prompts, sampling, list(range(len(prompts))))


@torch.no_grad()
def recomputed(model: LanguageModel, prompt: list[int], sampling: Sampling) -> list[int]:
    """Greedy, each token from a forward over everything before it."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_new_tokens and (len(tokens) == len(prompt) or tokens[-1] not in sampling.stop):
        batch = pack([Sample(tokens, [False] * len(tokens))])
        tokens.append(int(model.decoder.head(model.decoder(batch.tokens, batch.layout, model.role)[-1]).argmax()))  # type: ignore[misc]
    return tokens[len(prompt) :]


def work(model: LanguageModel, run: Callable[[], object]) -> list[int]:
    """Tokens of each forward that `run` makes."""
    seen: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("running", [1, 2, 64])
def test_greedy_is_a_full_recompute(running: int) -> None:
    model, sampling = make(), Sampling(12, temperature=0, stop=STOP)
    answers = generate(model, PROMPTS, sampling, running)
    assert [r.prompt for r in answers] == PROMPTS
    assert [r.tokens for r in answers] == [recomputed(model, p, sampling) for p in PROMPTS]
    assert {r.finish for r in answers} == {"stop", "length"}
    for r in answers:
        assert len(r.logprobs) == len(r.tokens) and r.text is None
        assert r.finish == ("stop" if r.tokens[-1] in STOP else "length")
        assert not STOP.intersection(r.tokens[:-1]) and (r.finish == "stop" or len(r.tokens) == 12)


def test_one_token_and_nothing_to_do() -> None:
    model = make()
    assert generate(model, [], Sampling(5)) == []
    sampling = Sampling(1, temperature=0, stop=STOP)
    for r in generate(model, PROMPTS, sampling, running=2):
        assert len(r.tokens) == len(r.logprobs) == 1
        assert r.tokens == recomputed(model, r.prompt, sampling)
        assert r.finish == ("stop" if r.tokens[0] in STOP else "length")


def test_a_stop_token_as_the_last_allowed_token_is_a_stop() -> None:
    model = make()
    endless = generate(model, PROMPTS, Sampling(9, temperature=0))
    for r in endless:
        first = r.tokens.index(r.tokens[4]) + 1
        (cut,) = generate(model, [r.prompt], Sampling(first, temperature=0, stop=frozenset({r.tokens[4], 10**6, -1})))
        assert cut.tokens == r.tokens[:first] and cut.finish == "stop" and r.finish == "length"


def test_long_prompt_beside_short_ones() -> None:
    model, sampling = make(), Sampling(4, temperature=0)
    long = torch.randint(0, 40, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    for running in (1, 64):
        answers = generate(model, [[2], long, [3, 4]], sampling, running)
        assert answers[1].tokens == recomputed(model, long, sampling)
        assert answers[0].tokens == recomputed(model, [2], sampling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["packed", "shared"])
@pytest.mark.parametrize("kind", ["full", "lora", "ptuning"])
def test_rollouts_come_from_the_weights_of_now(kind: Literal["full", "lora", "ptuning"], dtype: torch.dtype) -> None:
    """The worst bug there is: answers of weights that are no longer there. Changed between holds they are seen, within one refused."""
    model = make("policy", dtype)
    add_adapter(model.decoder, "policy", AdapterConfig(kind=kind, tokens=2, targets=("q", "down")), 0)
    trained = list(adapter_parameters(model.decoder, "policy").values()) or list(model.decoder.parameters())
    engine, sampling, seen = Engine(model), Sampling(8, temperature=0), []
    for turn in range(3):
        update(trained, seed=turn)
        with engine.hold():
            answers = [r.tokens for r in engine.generate(PROMPTS, sampling, [0] * len(PROMPTS))]
            assert answers == [r.tokens for r in engine.generate(PROMPTS, sampling, [0] * len(PROMPTS))]
            assert answers == [recomputed(model, p, sampling) for p in PROMPTS]
            seen.append(answers)
            update(trained[-1:], seed=10 + turn)
            with pytest.raises(RuntimeError, match="weights changed"):
                engine.generate(PROMPTS, sampling, [0] * len(PROMPTS))
    assert seen[0] != seen[1] != seen[2] != seen[0]


@torch.no_grad()
def update(parameters: list[torch.nn.Parameter], seed: int) -> None:
    """As an optimizer does: in place."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.5)


def test_memory_lives_inside_hold() -> None:
    engine = Engine(make())
    with pytest.raises(RuntimeError, match="hold"):
        engine.generate(PROMPTS, Sampling(3), list(range(5)))
    with engine.hold():
        engine.generate(PROMPTS, Sampling(3), list(range(5)))
        assert engine.memory is not None and engine.memory.keys.shape[1] == 5
        with pytest.raises(RuntimeError, match="already"), engine.hold():
            pass
    assert engine.memory is None and engine.decoder is None
    with pytest.raises(KeyError), engine.hold():
        raise KeyError
    assert engine.memory is None


def test_dropout_is_off_and_modes_come_back() -> None:
    model = make("policy")
    add_adapter(model.decoder, "policy", AdapterConfig(kind="lora", dropout=0.5, targets=("q", "v")), 0)
    for name, parameter in model.decoder.named_parameters():
        if ".up.weight" in name:
            parameter.data.normal_(0, 0.5)
    model.train()
    model.decoder.layers[0].eval()
    before = [m.training for m in model.modules()]
    answers = [[r.tokens for r in generate(model, PROMPTS, Sampling(8, temperature=0))] for _ in range(2)]
    assert [m.training for m in model.modules()] == before
    model.eval()
    assert answers[0] == answers[1] == [recomputed(model, p, Sampling(8, temperature=0)) for p in PROMPTS]


def test_training_goes_on_after_generating() -> None:
    model = make()
    (answer, *_) = generate(model, PROMPTS, Sampling(4))
    batch = pack([Sample(answer.prompt + answer.tokens, [False] * len(answer.prompt) + [True] * len(answer.tokens))])
    model(batch).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "attention.q" in n)


def test_equal_prompts_are_read_once() -> None:
    """Four answers to one prompt, not even adjacent: its tokens pass through the network once, and the answers differ by their seeds."""
    model = make()
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[2], PROMPTS[2]]
    answers: list[Rollout] = []
    seen = work(model, lambda: answers.extend(generate(model, prompts, Sampling(6))))
    assert seen == [7 + 3, 1 + 1 + 3, 5, 5, 5, 5, 3]  # the three others join a step later, with one token
    assert len({tuple(answers[i].tokens) for i in (0, 2, 3, 4)}) == 4
    for i, answer in enumerate(answers):
        engine = Engine(model)
        with engine.hold():
            assert engine.generate([prompts[i]], Sampling(6), [i])[0].tokens == answer.tokens


def test_freed_rows_are_used_at_once_and_the_batch_stays_compact() -> None:
    """The work is the tokens there are: every prompt token and every answer token but the last, no padding, no row of the finished."""
    model, sampling = make(), Sampling(30, stop=STOP)
    prompts = [[5, i] for i in range(12)]
    answers: list[Rollout] = []
    seen = work(model, lambda: answers.extend(generate(model, prompts, sampling, running=4)))
    lengths = [len(r.tokens) for r in answers]
    assert len(set(lengths)) > 4
    assert sum(seen) == sum(map(len, prompts)) + sum(lengths) - len(lengths)
    # no row is idle while someone waits: steps are at most the even share, and the longest that begins last
    assert len(seen) <= sum(lengths) / 4 + max(lengths)


def test_prompts_of_one_forward_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = make(), Sampling(3, temperature=0)
    monkeypatch.setattr("trueline.rollout.engine.PROMPT_TOKENS", 8)
    answers: list[Rollout] = []
    seen = work(model, lambda: answers.extend(generate(model, PROMPTS, sampling)))
    assert seen[0] == 7 and seen[1] == 1 + 7 and max(seen) <= 10
    assert [r.tokens for r in answers] == [recomputed(model, p, sampling) for p in PROMPTS]


def test_what_cannot_be_answered_is_refused() -> None:
    engine = Engine(make())
    with engine.hold():
        for prompts, seeds, words in (
            ([[1], []], [0, 1], "prompt 1 is empty"),
            ([[1], [2, 40]], [0, 1], "prompt 1 .* vocabulary"),
            ([[-1]], [0], "prompt 0 .* vocabulary"),
            ([[1], [2]], [0], "2 prompts need as many seeds, not 1"),
        ):
            with pytest.raises(ValueError, match=words):
                engine.generate(prompts, Sampling(2), seeds)
    with pytest.raises(ValueError, match="head"):
        Engine(LanguageModel(Decoder(CONFIG, with_head=False)))
    with pytest.raises(ValueError, match="running"):
        Engine(make(), running=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(3), Sampling(3, temperature=0), Sampling(3, top_p=0.9), Sampling(3, top_k=2)])
def test_numbers_that_are_not_finite_end_the_run(bad: float, sampling: Sampling) -> None:
    model = make()
    with torch.no_grad():
        model.decoder.norm.weight[0] = bad
    with pytest.raises(RunError, match="not finite"):
        generate(model, PROMPTS, sampling)


def fill(
    model: LanguageModel, prompts: list[list[int]], sampling: Sampling, running: int, pages: int | None
) -> tuple[list[Rollout], Engine]:
    """Answers with so many pages of memory, or with slots."""
    each = PAGE * bytes_per_token(CONFIG, model.decoder.embed.weight.dtype)
    engine = Engine(model, running, budget=None if pages is None else pages * each)
    with engine.hold():
        found = engine.generate(prompts, sampling, list(range(len(prompts))))
        memory = engine.memory
        assert isinstance(memory, Slots if pages is None else Pages)
        if isinstance(memory, Pages):
            assert memory.total == memory.free == pages and not any(memory.users)  # all given back
    return found, engine


@pytest.mark.parametrize("adapter", ["base", "ptuning"])
@pytest.mark.parametrize("pages", [3, 4, 7, 11])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["shared", "packed"])
def test_pages_answer_as_slots_do(dtype: torch.dtype, pages: int, adapter: str) -> None:
    """Down to what a single request needs: the others wait, or begin again, and nobody's answer changes."""
    model, sampling = make("policy" if adapter == "ptuning" else None, dtype), Sampling(26, stop=STOP)
    if adapter == "ptuning":
        add_adapter(model.decoder, "policy", AdapterConfig(kind="ptuning", tokens=3), 0)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 40, (n,), generator=draw).tolist() for n in (3, 17, 16, 1, 9, 5)]
    prompts += [prompts[1]] * 3 + [prompts[0]] * 2
    expected, _ = fill(model, prompts, sampling, 6, None)
    found, engine = fill(model, prompts, sampling, 6, pages)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tokens == theirs.tokens and mine.finish == theirs.finish
        limit = 1e-12 if dtype == torch.float64 else 1e-5
        assert max(abs(a - b) for a, b in zip(mine.logprobs, theirs.logprobs, strict=True)) < limit


def test_who_runs_out_of_pages_begins_again() -> None:
    """Short answers make the engine admit many; the long ones then need more than there is, and the youngest gives way."""
    model = make()
    prompts = [[5, i] for i in range(24)]
    sampling = Sampling(60, stop=frozenset({0, 11}))
    expected, _ = fill(model, prompts, sampling, 8, None)
    found, engine = fill(model, prompts, sampling, 8, 9)
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    assert engine.preempted > 0


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(RunError, match="MiB are there"):
        fill(make(), [[1] * 33], Sampling(16), 4, 3)


def test_a_prompt_is_read_once_while_one_of_its_answers_runs() -> None:
    """Eight answers each to five prompts in twelve rows: each prompt's tokens once, and one more token for each other answer."""
    model, sampling = make(), Sampling(9)
    prompts = [[7 + i] * (20 + i) for i in range(5) for _ in range(8)]
    answers: list[Rollout] = []
    seen = work(model, lambda: answers.extend(generate(model, prompts, sampling, running=12)))
    assert sum(seen) == sum(20 + i for i in range(5)) + 5 * 7 + sum(len(r.tokens) - 1 for r in answers)
    for i in (0, 11, 39):
        engine = Engine(model)
        with engine.hold():
            assert engine.generate([prompts[i]], sampling, [i])[0].tokens == answers[i].tokens


@pytest.mark.parametrize("pages", [None, 60])
def test_a_learned_prefix_is_stored_once(pages: int | None) -> None:
    """Key and value memory does not grow with the prefix: 48 tokens of it would be twice what 8 requests of 24 tokens have."""
    model = make("policy")
    prompts = [[i + 1] * 12 for i in range(8)]
    bare, _ = _stored(model, prompts, pages)
    add_adapter(model.decoder, "policy", AdapterConfig(kind="ptuning", tokens=48), 0)
    assert _stored(model, prompts, pages)[0] == bare


def _stored(model: LanguageModel, prompts: list[list[int]], pages: int | None) -> tuple[int, list[Rollout]]:
    engine = Engine(model)
    with engine.hold():
        found = engine.generate(prompts, Sampling(12), list(range(len(prompts))))
        assert engine.memory is not None
        return engine.memory.keys.nbytes + engine.memory.values.nbytes, found
