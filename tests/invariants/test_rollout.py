"""What must not matter in generation: who else is being answered, in which order, how many at a time; and whether a log-probability comes
from the rollout or from training."""

import pytest
import torch

from trueline.config.schema import AdapterConfig
from trueline.data.sample import Blocks, answered
from trueline.model.adapters import adapter_parameters, add_adapter, merge_adapter
from trueline.model.batch import pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Rollout, Sampling

QWEN2 = DecoderConfig(vocab_size=300, hidden_size=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, mlp_size=40, init_std=0.3)
GLM4 = DecoderConfig(
    vocab_size=300, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_size=40, rope="interleaved", rope_dim=4,
    tied_embeddings=True, init_std=0.3,
)  # fmt: skip
CHATGLM = DecoderConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_size=40, o_bias=True, mlp_bias=True,
    rope_rows=True, norm="layer", gated=False, residual_scale=56**0.5, blocks=Blocks(7, (5, 6)), prefix_shifts=False, init_std=0.3,
)  # fmt: skip
ADAPTERS = {
    "base": None,
    "lora": AdapterConfig(kind="lora", rank=3, alpha=6.0, dropout=0.3, targets=("q", "k", "v", "o", "gate", "up", "down")),
    "ptuning": AdapterConfig(kind="ptuning", tokens=5),
}
STOP = frozenset(range(0, 300, 13))
SAMPLINGS = {
    "plain": Sampling(14, stop=STOP),
    "temperature": Sampling(14, temperature=0.6, stop=STOP),
    "top_p": Sampling(14, temperature=1.2, top_p=0.7, stop=STOP),
    "top_k": Sampling(14, top_k=5, stop=STOP),
    "greedy": Sampling(14, temperature=0, stop=STOP),
}


@pytest.fixture(autouse=True)
def pack_for_short_answers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trueline.rollout.engine.PAYS", 1)



def make(config: DecoderConfig, adapter: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    decoder = Decoder(config)
    init_weights(decoder, torch.Generator().manual_seed(0))
    chosen = ADAPTERS[adapter]
    if chosen is not None:
        for role in ("policy", "critic"):
            add_adapter(decoder, role, chosen, 0)
            draw = torch.Generator().manual_seed(ord(role[0]))
            for parameter in adapter_parameters(decoder, role).values():
                parameter.data.normal_(0, 0.2, generator=draw)
    return LanguageModel(decoder.to(dtype), "policy" if chosen else None)


def prompts(config: DecoderConfig = QWEN2) -> list[list[int]]:
    """Mixed lengths, some equal; as many as make a small engine queue. Where the model has contexts, all but the first two have one."""
    draw = torch.Generator().manual_seed(1)
    lengths = [1, 9, 4, 17, 2, 4, 30, 6]
    drawn = [torch.randint(0, 300, (n,), generator=draw).tolist() for n in lengths]
    if config.blocks is not None:
        places = [[5, 7], [6, 7], [5, 20, 7], [6, 30, 31, 7, 40, 41], [7], [7, 50, 5]]  # two masks, apart from the start, after it, none
        drawn = [*drawn[:2], *(prompt + place for prompt, place in zip(drawn[2:], places, strict=True))]
    return [*drawn, drawn[1], drawn[1], drawn[6], drawn[0]]


def generate(model: LanguageModel, asked: list[list[int]], sampling: Sampling, seeds: list[int], running: int = 64) -> list[Rollout]:
    engine = Engine(model, running)
    with engine.hold():
        return engine.generate(asked, sampling, seeds)


@torch.no_grad()
def gap(model: LanguageModel, answers: list[Rollout], temperature: float) -> float:
    """Largest difference between the rollout's log-probabilities and training's."""
    model.eval()
    batch = pack([answered(r.prompt, r.tokens, model.decoder.config.blocks) for r in answers])
    expected = model(batch, temperature or 1.0)[batch.trained]
    return float((torch.tensor([p for r in answers for p in r.logprobs], dtype=expected.dtype) - expected).abs().max())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("config", [QWEN2, GLM4, CHATGLM], ids=["qwen2", "glm4", "chatglm"])
def test_log_probabilities_are_those_of_training(config: DecoderConfig, sampling: str, adapter: str) -> None:
    asked, settings = prompts(config), SAMPLINGS[sampling]
    seeds = list(range(len(asked)))
    for dtype, running, limit in ((torch.float64, 3, 1e-12), (torch.float32, 64, 5e-5)):  # rounding alone, which differs from CPU to CPU
        model = make(config, adapter, dtype)
        answers = generate(model, asked, settings, seeds, running)
        assert gap(model, answers, settings.temperature) < limit
    assert {r.finish for r in answers} == {"stop", "length"}, "the test wants both endings"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("config", [QWEN2, CHATGLM], ids=["qwen2", "chatglm"])
def test_answers_do_not_depend_on_company(config: DecoderConfig, sampling: str, adapter: str) -> None:
    """One at a time, a few, all at once, in another order, or alone: the same tokens."""
    model, asked, settings = make(config, adapter), prompts(config), SAMPLINGS[sampling]
    seeds = [7 * i for i in range(len(asked))]
    expected = [r.tokens for r in generate(model, asked, settings, seeds)]
    for running in (1, 5):
        assert [r.tokens for r in generate(model, asked, settings, seeds, running)] == expected
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(2)).tolist()
    mixed = generate(model, [asked[i] for i in order], settings, [seeds[i] for i in order], running=5)
    assert [r.tokens for r in mixed] == [expected[i] for i in order]
    for i in (0, 8, 11):
        assert [r.tokens for r in generate(model, [asked[i]], settings, [seeds[i]])] == [expected[i]]


def test_several_answers_to_one_prompt_are_reproducible_and_differ() -> None:
    model, asked = make(QWEN2, "lora"), prompts()[3]
    first = generate(model, [asked] * 8, SAMPLINGS["plain"], list(range(8)))
    again = generate(model, [asked] * 8, SAMPLINGS["plain"], list(range(8)), running=3)
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert len({tuple(r.tokens) for r in first}) == 8
    others = generate(model, [asked] * 8, SAMPLINGS["plain"], list(range(100, 108)))
    assert [r.tokens for r in first] != [r.tokens for r in others]


def test_the_first_token_has_the_models_probabilities() -> None:
    """2,000 seeds, one prompt: frequencies within five standard deviations of exp(log-probability)."""
    model, n = make(QWEN2, "ptuning"), 2000
    answers = generate(model, [[3, 1, 4]] * n, Sampling(1), list(range(n)), running=n)
    chance = {r.tokens[0]: 2.718281828459045 ** r.logprobs[0] for r in answers}
    assert 0.5 < sum(chance.values()) <= 1 + 1e-9
    for token, p in chance.items():
        seen = sum(r.tokens[0] == token for r in answers)
        assert abs(seen - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1


def test_merged_or_apart_the_answers_are_the_same() -> None:
    model, asked, settings = make(QWEN2, "lora"), prompts(), SAMPLINGS["temperature"]
    seeds = list(range(len(asked)))
    apart = generate(model, asked, settings, seeds)
    merge_adapter(model.decoder, "policy")
    merged = generate(model, asked, settings, seeds)
    assert [r.tokens for r in merged] == [r.tokens for r in apart]
    assert gap(model, apart, 0.6) < 1e-12


def test_another_roles_adapter_is_not_used() -> None:
    model, asked, settings = make(QWEN2, "lora"), prompts(), SAMPLINGS["greedy"]
    bare = generate(LanguageModel(model.decoder), asked, settings, [0] * len(asked))
    critic = generate(LanguageModel(model.decoder, "critic"), asked, settings, [0] * len(asked))
    assert [r.tokens for r in bare] == [r.tokens for r in generate(make(QWEN2, "base"), asked, settings, [0] * len(asked))]
    assert [r.tokens for r in critic] != [r.tokens for r in bare]
    assert [r.tokens for r in critic] != [r.tokens for r in generate(model, asked, settings, [0] * len(asked))]


@torch.no_grad()
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_context_is_read_whole_and_answers_follow_it(adapter: str) -> None:
    """Greedy ChatGLM-6B, each token from a forward over everything before it, in both dtypes."""
    for dtype in (torch.float64, torch.float32):
        model, asked = make(CHATGLM, adapter, dtype), prompts(CHATGLM)
        found = generate(model, asked, Sampling(8, temperature=0), [0] * len(asked), running=3)
        model.eval()
        for prompt, rollout in zip(asked, found, strict=True):
            made: list[int] = []
            for _ in range(8):
                batch = pack([answered(prompt, made, CHATGLM.blocks)])
                made.append(int(model.decoder.head(model.decoder(batch.tokens, batch.layout, model.role)[-1]).argmax()))  # type: ignore[misc]
            assert rollout.tokens == made
        plain = [[t if t != 7 else 8 for t in prompt] for prompt in asked]  # no <sop>
        causal = [r.tokens for r in generate(model, plain, Sampling(8, temperature=0), [0] * len(asked))]
        assert causal != [r.tokens for r in found]
