"""Prompts run once for both answers: losses, scores and every gradient as without, whatever the family, the adapter and the lengths."""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from trueline.config.schema import AdapterConfig, DpoConfig, RankingConfig
from trueline.data.cache import Items, in_memory, items_fingerprint, lengths
from trueline.data.sample import Blocks, Pair, Sample, sample_of
from trueline.data.shared import bound, shared_pairs
from trueline.model.adapters import adapter_parameters, add_adapter
from trueline.model.batch import pack_pairs
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel, Scorer
from trueline.recipes.dpo import Judged, dpo_objective, pack_judged
from trueline.recipes.reference import pair_logprobs
from trueline.recipes.reward import ranking_objective

PLAIN = DecoderConfig(vocab_size=50, hidden_size=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, mlp_size=40, init_std=0.3)
BLOCKS = Blocks(7, (5, 6))
FAMILIES = {
    "qwen2": PLAIN,
    "llama": dataclasses.replace(PLAIN, qkv_bias=False, tied_embeddings=True),
    "qwen3": dataclasses.replace(PLAIN, qkv_bias=False, qk_norm=True),
    "mistral": dataclasses.replace(PLAIN, qkv_bias=False, windows=(4, None, 9)),
    "glm4": dataclasses.replace(PLAIN, rope="interleaved", rope_dim=2),
    "glm4_0414": dataclasses.replace(PLAIN, rope="interleaved", rope_dim=2, post_norms=True),
    "chatglm": dataclasses.replace(
        PLAIN, num_heads=3, num_kv_heads=3, head_dim=8, o_bias=True, mlp_bias=True, rope_rows=True, norm="layer", gated=False,
        residual_scale=6**0.5, blocks=BLOCKS, prefix_shifts=False,
    ),
}  # fmt: skip
ADAPTERS = {
    "full": None,
    "lora": AdapterConfig(kind="lora", rank=3, alpha=6.0, targets=("q", "k", "v", "o", "gate", "up", "down")),
    "ptuning": AdapterConfig(kind="ptuning", tokens=5),
}


def drawn_pairs(blocks: Blocks | None = None) -> list[Pair]:
    """Prompts from nothing in common to long ones, answers that begin alike, equal neighbours; where there are contexts, around them."""
    draw = random.Random(4)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(8, 50) for _ in range(n)]

    found = []
    for prompt, chosen, rejected in ((12, 3, 5), (1, 4, 1), (7, 1, 2), (7, 1, 2), (0, 3, 4), (20, 9, 2)):
        begin = tokens(prompt) if blocks is None else [*tokens(prompt), 5, 7]
        alike = tokens(1)  # trained on both sides, so not shared
        sides = [begin + alike + tokens(n) for n in (chosen, rejected)]
        found.append(Pair(*(sample_of(ids, [i >= len(begin) for i in range(len(ids))], blocks) for ids in sides)))
    if blocks is not None:  # an answer inside the context: nothing can be shared
        sides = [[9, 8, 5, last, 7, 11, 12] for last in (20, 21)]
        found.append(Pair(*(sample_of(ids, [i > 4 for i in range(7)], blocks) for ids in sides)))
    return found


def make(config: DecoderConfig, adapter: AdapterConfig | None, dtype: torch.dtype = torch.float64) -> tuple[Decoder, str | None]:
    decoder = Decoder(config)
    init_weights(decoder, torch.Generator().manual_seed(0))
    if adapter is None:
        return decoder.to(dtype), None
    add_adapter(decoder, "policy", adapter, 0)
    draw = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(decoder, "policy").values():
        parameter.data.normal_(0, 0.2, generator=draw)
    return decoder.to(dtype), "policy"


def dpo_gradients(model: LanguageModel, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    batch = pack_judged([Judged(pair, torch.tensor([-9.0, -8.0])) for pair in pairs])
    loss = torch.stack(list(dpo_objective(model, DpoConfig(beta=0.7, sft_weight=0.3))(batch)[0].values())).sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], share: float = 1e-12) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= share * gradient.abs().max(), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_is_the_same(family: str, adapter: str, recompute: bool) -> None:
    decoder, role = make(FAMILIES[family], ADAPTERS[adapter])
    decoder.recompute = recompute
    pairs = drawn_pairs(FAMILIES[family].blocks)
    shared = shared_pairs(pairs)
    assert len(pack_pairs(shared).inputs) == lengths(shared).sum() < lengths(pairs).sum()
    expected = dpo_gradients(LanguageModel(decoder, role), pairs)
    expected = (expected[0], {n: g.clone() for n, g in expected[1].items()})
    found = dpo_gradients(LanguageModel(decoder, role), shared)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0)
    assert_same(found[1], expected[1])


@pytest.mark.parametrize("loss", ["last", "tokenwise"])
def test_reward_models_are_the_same(loss: str) -> None:
    scorer = Scorer(make(PLAIN, None)[0])
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(3))
    found = []
    for pairs in (drawn_pairs(), shared_pairs(drawn_pairs())):
        scorer.zero_grad()
        sums, _ = ranking_objective(scorer, RankingConfig(loss=loss))(pack_pairs(pairs))
        sums["pairs"].backward()
        found.append({n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None} | {"loss": sums["pairs"].detach()})
    assert_same(found[1], found[0])


def test_reference_is_the_same() -> None:
    model = LanguageModel(make(PLAIN, None)[0])
    pairs = drawn_pairs()
    torch.testing.assert_close(pair_logprobs(model, shared_pairs(pairs), 60), pair_logprobs(model, pairs, 60), rtol=1e-12, atol=0)


def test_bfloat16_is_as_near_as_bfloat16_is() -> None:
    decoder, role = make(PLAIN, None, torch.bfloat16)
    kept = {n: g.float().clone() for n, g in dpo_gradients(LanguageModel(decoder, role), drawn_pairs())[1].items()}
    shared = {n: g.float().clone() for n, g in dpo_gradients(LanguageModel(decoder, role), shared_pairs(drawn_pairs()))[1].items()}
    exact = dpo_gradients(LanguageModel(decoder.double(), role), drawn_pairs())[1]
    for name, gradient in exact.items():
        errors = [(side[name] - gradient).norm() / gradient.norm() for side in (kept, shared)]
        assert errors[1] < max(1.5 * errors[0], 0.01), (name, errors)


def common(pair: Pair) -> int:
    """One pair at a time: equal tokens before anything is trained, of contexts that end among them; both sides keep a token."""
    sides = (pair.chosen, pair.rejected)
    most = min(n for side in sides for n in (len(side) - 1, *(i for i, trained in enumerate(side.trained) if trained)))
    same = next((i for i in range(most) if pair.chosen.tokens[i] != pair.rejected.tokens[i]), most)
    alike = (sides[0].context, sides[0].anchor) == (sides[1].context, sides[1].anchor)
    return same if alike and same >= pair.chosen.context else 0


def test_what_is_shared() -> None:
    pairs = drawn_pairs()
    shared = shared_pairs(pairs)
    assert shared.shared.tolist() == [12, 1, 7, 7, 0, 20]  # not the answers' first tokens, though equal
    assert shared_pairs(drawn_pairs(BLOCKS)).shared.tolist() == [14, 3, 9, 9, 2, 22, 0]
    bare = sample_of([1, 2, 3], [False] * 3, None)
    assert shared_pairs([Pair(bare, bare)])[0].shared == 2  # both keep a token of their own
    assert [len(pair) for pair in shared] == lengths(shared).tolist() == [len(p) - common(p) for p in pairs]
    assert bound(shared) == lengths(pairs).sum() / (lengths(pairs).sum() - 47)
    assert shared[1:3][0] == shared[1]
    assert items_fingerprint([*shared]) == items_fingerprint(pairs)


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["causal", "prefix"])
def test_what_is_shared_is_told_from_the_arrays(blocks: Blocks | None) -> None:
    """Of stored pairs in any order, over chunks, as of each pair by itself."""
    draw = random.Random(5)

    def side(prompt: list[int]) -> Sample:
        tokens = prompt[: draw.randrange(len(prompt) + 1)] + [draw.randrange(5, 9) for _ in range(draw.randrange(1, 6))]
        first = draw.randrange(len(tokens) + 1)
        return sample_of(tokens, [i >= first and draw.random() < 0.7 for i in range(len(tokens))], blocks)

    pairs = []
    for _ in range(400):
        prompt = [draw.randrange(5, 9) for _ in range(draw.randrange(9))]
        pairs.append(Pair(side(prompt), side(prompt)))
    chunks = [block for part in (pairs[:150], pairs[150:]) for block in in_memory("pair", lambda _, part=part: iter([part])).blocks]
    order = np.array(draw.sample(range(400), 300))
    items: Items[Pair] = Items(chunks, order)
    assert list(items) == [pairs[i] for i in order]
    expected = [common(pair) for pair in items]
    assert shared_pairs(items).shared.tolist() == expected == shared_pairs(list(items)).shared.tolist()
    assert len(set(expected)) > 4 and shared_pairs(Items([])).shared.tolist() == []
