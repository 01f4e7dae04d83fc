"""Appraisal against plain NumPy over one answer at a time, and the places in which rewards have gone wrong elsewhere."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trueline.config.schema import PpoConfig
from trueline.data.sample import answered
from trueline.errors import RunError
from trueline.model.batch import Batch
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel, Scorer
from trueline.model.layout import Packed
from trueline.parallel.world import World
from trueline.recipes.judges import score_samples
from trueline.rollout.sampling import Rollout
from trueline.train.budget import Budget
from trueline.train.experience import Experience, ModelScores, appraise, pack_experience, rollout_suffices

SIZES = DecoderConfig(vocab_size=17, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=12, init_std=0.7)
COLUMNS = ("rollout_logprobs", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
TEMPERATURE, KL = 0.7, 0.3
PPO = PpoConfig(gamma=0.9, lam=0.8, no_stop_penalty=2.0)


def decoder(seed: int, dtype: torch.dtype = torch.float64) -> Decoder:
    made = Decoder(SIZES)
    init_weights(made, torch.Generator().manual_seed(seed))
    return made.to(dtype)


def critic(dtype: torch.dtype = torch.float64) -> Scorer:
    scorer = Scorer(decoder(3, dtype))
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(4))
    return scorer


def row_logprobs(model: Decoder, tokens: list[int]) -> np.ndarray:
    """log p of each token given those before it, the first one's is 0."""
    with torch.no_grad():
        assert model.head is not None
        logits = model.head(model(torch.tensor(tokens), Packed.of([len(tokens)]))).double().numpy() / TEMPERATURE
    top = logits.max(-1, keepdims=True)
    normalised = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return np.array([0.0] + [normalised[t - 1, tokens[t]] for t in range(1, len(tokens))])


def rollouts(noise: float = 0.01) -> list[Rollout]:
    draw, found, policy = random.Random(1), [], decoder(1)
    for i in range(5):
        prompt, answer = ([draw.randrange(17) for _ in range(draw.randint(1, 6))] for _ in range(2))
        exact = row_logprobs(policy, prompt + answer)[len(prompt) :]
        found.append(Rollout(prompt, answer, [x + noise * (i - 2) for x in exact.tolist()], "length" if i == 3 else "stop"))
    return found


SCORES = [1.0, -2.0, 0.5, 3.0, 0.0]


def judge(
    items: list[Rollout], ppo: PpoConfig = PPO, max_tokens: int = 64, scores: list[float] = SCORES, dtype: torch.dtype = torch.float64
):  # type: ignore[no-untyped-def]
    policy, reference = LanguageModel(decoder(1, dtype)), LanguageModel(decoder(2, dtype))
    return appraise(
        items,
        scores,
        policy,
        reference,
        critic(dtype),
        ppo=ppo,
        kl_coefficient=KL,
        temperature=TEMPERATURE,
        max_tokens=max_tokens,
        world=World(),
    )


def oracle(item: Rollout, score: float) -> dict[str, np.ndarray]:
    """One answer, token by token; advantages before whitening."""
    tokens, start, last = item.prompt + item.tokens, len(item.prompt), len(item.prompt) + len(item.tokens) - 1
    policy, reference = row_logprobs(decoder(1), tokens), row_logprobs(decoder(2), tokens)
    scorer = critic()
    with torch.no_grad():
        states = scorer.decoder(torch.tensor(tokens), Packed.of([len(tokens)])).numpy() @ scorer.score.weight[0].numpy()
    columns = {name: np.zeros(len(tokens)) for name in COLUMNS}
    following, running = 0.0, 0.0
    for t in range(last, start - 1, -1):
        value = states[t - 1]
        reward = -KL * (policy[t] - reference[t]) + (score if t == last else 0.0)
        running = reward + 0.9 * following - value + 0.9 * 0.8 * running
        following = value
        numbers = item.logprobs[t - start], policy[t], reference[t], value, reward, running, running + value
        for name, number in zip(COLUMNS, numbers, strict=True):
            columns[name][t] = number
    return columns


@pytest.mark.parametrize("whitened", [False, True])
def test_appraisal_against_the_oracle(whitened: bool) -> None:
    items = rollouts()
    expected = [oracle(item, score - (2.0 if item.finish == "length" else 0.0)) for item, score in zip(items, SCORES, strict=True)]
    if whitened:
        answers = np.concatenate([row["advantages"][len(item.prompt) :] for row, item in zip(expected, items, strict=True)])
        for row, item in zip(expected, items, strict=True):
            row["advantages"][len(item.prompt) :] -= answers.mean()
            row["advantages"] /= np.sqrt(answers.var() + 1e-8)
    found, _ = judge(items, PPO.model_copy(update={"whiten": whitened}))
    for experience, row, item, score in zip(found, expected, items, SCORES, strict=True):
        assert experience.sample == answered(item.prompt, item.tokens, None)
        assert experience.score == score and experience.stopped == (item.finish == "stop")
        for name in COLUMNS:
            np.testing.assert_allclose(getattr(experience, name).numpy(), row[name], rtol=0, atol=1e-10, err_msg=name)


def test_rollouts_own_log_probabilities_in_place_of_a_pass() -> None:
    """The policy is not run; all else is as if it had said what the rollouts say."""
    items = rollouts(noise=0.0)
    expected, told = judge(items)

    class Silent(LanguageModel):
        def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
            raise AssertionError("the policy was run")

    settings = {"ppo": PPO, "kl_coefficient": KL, "temperature": TEMPERATURE, "max_tokens": 64, "world": World()}
    silent, reference = Silent(decoder(1)), LanguageModel(decoder(2))
    found, metrics = appraise(items, SCORES, silent, reference, critic(), rollout_logprobs_suffice=True, **settings)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        for name in COLUMNS:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-12)
    assert told.keys() - metrics.keys() == {"logprob_gap", "logprob_gap_max"}
    assert metrics == pytest.approx({name: told[name] for name in metrics}, abs=1e-12)
    shifted, _ = appraise(rollouts(0.1), SCORES, silent, reference, critic(), rollout_logprobs_suffice=True, **settings)  # type: ignore[arg-type]
    assert all(torch.equal(e.logprobs, e.rollout_logprobs) for e in shifted)


@pytest.mark.parametrize(
    ("step", "gap", "suffices"),
    [(1, None, False), (2, None, False), (2, 1e-6, True), (10, 1e-4, True), (11, 1e-6, False), (12, 1.1e-4, False), (12, math.nan, False)],
)
def test_when_the_rollout_suffices(step: int, gap: float | None, suffices: bool) -> None:
    assert rollout_suffices(step, gap, 1e-4, 10) == suffices
    assert not rollout_suffices(step, gap, 1e-4, 1)


def test_micro_batches_do_not_matter() -> None:
    items = rollouts()
    (whole, metrics), (split, others) = judge(items, max_tokens=64), judge(items, max_tokens=13)
    assert others == pytest.approx(metrics, abs=1e-12)
    for a, b in zip(whole, split, strict=True):
        for name in COLUMNS:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-12)


def test_the_score_is_paid_at_the_last_token_stop_or_not() -> None:
    """Against the same rollouts scored with zeros, rewards differ there and nowhere else."""
    items = rollouts()
    (found, _), (plain, _) = judge(items), judge(items, scores=[0.0] * 5, ppo=PPO.model_copy(update={"no_stop_penalty": 0.0}))
    for a, b, item, score in zip(found, plain, items, SCORES, strict=True):
        difference = a.rewards - b.rewards
        paid = score - (2.0 if item.finish == "length" else 0.0)
        assert difference[-1].item() == pytest.approx(paid, abs=1e-12) and not difference[:-1].any()


def test_prompt_tokens_hold_zero() -> None:
    found, _ = judge(rollouts())
    for e in found:
        prompt = e.sample.trained.index(True)
        assert all(not getattr(e, name)[:prompt].any() for name in COLUMNS)


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_columns_are_never_16_bit(dtype: torch.dtype, kept: torch.dtype) -> None:
    found, _ = judge(rollouts(), dtype=dtype)
    assert {getattr(e, name).dtype for e in found for name in COLUMNS} == {kept}


def test_metrics_by_hand() -> None:
    items = rollouts()
    found, metrics = judge(items)
    tokens = sum(len(r.tokens) for r in items)
    drift = sum(float((e.logprobs - e.ref_logprobs).sum()) for e in found)
    error, returns = (torch.cat([getattr(e, n)[len(r.prompt) :] for e, r in zip(found, items, strict=True)]) for n in ("values", "returns"))
    expected = {
        "score": sum(SCORES) / 5,
        "score_deviation": np.std(SCORES),
        "reward": sum(float(e.rewards.sum()) for e in found) / 5,
        "kl": drift / 5,
        "kl_per_token": drift / tokens,
        "logprob_gap": sum(0.01 * abs(i - 2) * len(r.tokens) for i, r in enumerate(items)) / tokens,
        "logprob_gap_max": 0.02,
        "entropy": -sum(float(e.logprobs.sum()) for e in found) / tokens,
        "value": sum(float(e.values.sum()) for e in found) / tokens,
        "response_length": tokens / 5,
        "stopped": 0.8,
        "explained_variance": 1 - float((returns - error).var(correction=0) / returns.var(correction=0)),
    }
    assert metrics == pytest.approx(expected, abs=1e-9)


def test_a_policy_that_is_its_reference_has_no_kl() -> None:
    policy = LanguageModel(decoder(1))
    _, metrics = appraise(
        rollouts(0.0), SCORES, policy, policy, critic(), ppo=PPO, kl_coefficient=KL, temperature=TEMPERATURE, max_tokens=64, world=World()
    )
    assert metrics["kl"] == 0.0 and metrics["logprob_gap_max"] < 1e-12


def test_any_function_can_be_the_reference() -> None:
    seen = []

    def uniform(batch: Batch, temperature: float) -> Tensor:
        seen.append(temperature)
        return -math.log(17) * batch.trained.double()

    found, _ = appraise(
        rollouts(),
        SCORES,
        LanguageModel(decoder(1)),
        uniform,
        critic(),
        ppo=PPO,
        kl_coefficient=KL,
        temperature=0.5,
        max_tokens=64,
        world=World(),
    )
    assert seen == [0.5] and found[0].ref_logprobs[-1] == -math.log(17)


def test_repacking_keeps_every_token_with_its_numbers() -> None:
    found, _ = judge(rollouts())
    packed = pack_experience([found[3], found[0]])
    assert packed.batch.tokens.tolist() == found[3].sample.tokens + found[0].sample.tokens
    assert packed.batch.lengths == (len(found[3]), len(found[0]))
    for name in ("logprobs", "values", "advantages", "returns"):
        assert torch.equal(getattr(packed.to("cpu"), name), torch.cat((getattr(found[3], name), getattr(found[0], name))))


def test_experiences_are_records() -> None:
    found, _ = judge(rollouts())
    with pytest.raises(AttributeError):
        found[0].score = 1.0  # type: ignore[misc]
    assert isinstance(replace(found[0], score=1.0), Experience)


def test_bad_scores_are_refused() -> None:
    with pytest.raises(RunError, match="the reward of answer 2 of 5 is nan"):
        judge(rollouts(), scores=[1.0, math.nan, 0, 0, 0])
    with pytest.raises(RunError, match="gave 4 scores for 5 answers"):
        judge(rollouts(), scores=[1.0] * 4)


def test_bad_weights_are_noticed_with_their_place() -> None:
    items, scorer = rollouts(), critic()
    with torch.no_grad():
        scorer.score.weight[0, 0] = math.inf
    with pytest.raises(RunError, match=r"value of token \d+ of answer 1 is -?(inf|nan)"):
        appraise(
            items,
            SCORES,
            LanguageModel(decoder(1)),
            LanguageModel(decoder(2)),
            scorer,
            ppo=PPO,
            kl_coefficient=KL,
            temperature=TEMPERATURE,
            max_tokens=64,
            world=World(),
        )


@pytest.mark.parametrize("own_trunk", [False, True])
@pytest.mark.parametrize("max_tokens", [13, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reward_model_shares_the_pass(own_trunk: bool, max_tokens: int, dtype: torch.dtype) -> None:
    """One packing, one embedding of the tokens for all roles of a trunk; the same bits as passes of their own."""
    items, trunk = rollouts(), decoder(1, dtype)
    policy, reference, values, scorer = LanguageModel(trunk), LanguageModel(trunk), critic(dtype), Scorer(decoder(5, dtype))
    values.decoder = trunk
    scorer.decoder = scorer.decoder if own_trunk else trunk
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(6))
    settings = {"ppo": PPO, "kl_coefficient": KL, "temperature": TEMPERATURE, "max_tokens": max_tokens, "world": World()}
    alone = [2 * x for x in score_samples(scorer, [answered(r.prompt, r.tokens, None) for r in items], Budget(max_tokens, print))]
    expected, _ = appraise(items, alone, policy, lambda batch, temperature: reference(batch, temperature), values, **settings)
    embedded: list[int] = []
    hook = trunk.embed.register_forward_hook(lambda module, args, out: embedded.append(len(args[0])))
    shared = ModelScores(scorer, lambda scores: [2 * x for x in scores])
    found, _ = appraise(items, shared, policy, reference, values, **settings)
    hook.remove()
    assert sum(embedded) == sum(len(e) for e in found)  # each token once
    for a, b in zip(found, expected, strict=True):
        assert a.score == b.score and a.sample == b.sample
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


def test_a_models_bad_scores_are_refused() -> None:
    with pytest.raises(RunError, match="the reward of answer 1 of 5 is nan"):
        judge(rollouts(), scores=ModelScores(critic(), lambda scores: [math.nan] * 5))  # type: ignore[arg-type]
