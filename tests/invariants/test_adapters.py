"""What must not change with adapters: recompute, packing, the order of roles, merging; and what step 0 of a preference run must be."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trueline.config.schema import AdapterConfig
from trueline.data.sample import Pair, Sample
from trueline.model.adapters import adapter_parameters, add_adapter, copy_adapter, merge_adapter, trainable
from trueline.model.batch import pack, pack_pairs
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel, Scorer

CONFIG = DecoderConfig(vocab_size=29, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=24, init_std=0.3)
LORA = AdapterConfig(kind="lora", rank=3, alpha=6.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
DORA = LORA.model_copy(update={"dora": True, "rslora": True})
PTUNING = AdapterConfig(kind="ptuning", tokens=4)
SAMPLES = [
    Sample([3, 1, 4, 1, 5, 9], [False, False, True, True, True, True]),
    Sample([2, 6, 5], [False, True, True]),
    Sample([3, 5, 8, 9, 7], [False, False, False, True, True]),
]
PAIRS = [Pair(Sample([3, 1, 4, 1], [False, False, True, True]), Sample([3, 1, 5, 9, 2], [False, False, True, True, True]))] * 2


def make(*roles: tuple[str, AdapterConfig], dtype: torch.dtype = torch.float64, trained: bool = True) -> Decoder:
    decoder = Decoder(CONFIG)
    init_weights(decoder, torch.Generator().manual_seed(1))
    decoder.to(dtype)
    generator = torch.Generator().manual_seed(2)
    for role, config in roles:
        add_adapter(decoder, role, config, 0)
        if trained:
            for parameter in adapter_parameters(decoder, role).values():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(any(f".{role}." in name for role, _ in roles))
    return decoder


def gradients(decoder: Decoder, loss: Callable[[], Tensor], recompute: int) -> dict[str, Tensor]:
    decoder.recompute = recompute
    decoder.zero_grad()
    torch.manual_seed(3)
    loss().backward()
    return {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


def same_gradients(decoder: Decoder, loss: Callable[[], Tensor], count: int) -> None:
    kept, some, all_layers = (gradients(decoder, loss, recompute) for recompute in (0, 2, 3))
    assert len(kept) == count and kept.keys() == some.keys() == all_layers.keys()
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, some[name]) and torch.equal(gradient, all_layers[name]), name


@pytest.mark.parametrize("config", [LORA, DORA, PTUNING, *(c.model_copy(update={"dropout": 0.4}) for c in (LORA, DORA))])
@pytest.mark.parametrize("other", ["critic", None])
def test_recompute_with_two_roles_run_before_backward(config: AdapterConfig, other: str | None) -> None:
    """The trap: the backward pass of the first role's layers happens after the second role has run."""
    roles = [("policy", config), ("critic", LORA)]
    decoder = make(*roles)
    batch = pack(SAMPLES)
    weights = torch.linspace(-1, 1, len(batch.tokens), dtype=torch.float64)

    def loss() -> Tensor:
        mine = LanguageModel(decoder, "policy")(batch)
        theirs = LanguageModel(decoder, other)(batch)  # None: the reference of a preference run, in the same graph
        return (mine * weights).sum() + (theirs * weights.flip(0)).sum() + (mine * theirs).sum()

    policy, critic = (len(adapter_parameters(decoder, role)) for role in ("policy", "critic"))
    same_gradients(decoder, loss, policy + (critic if other else 0))


def test_recompute_with_policy_and_critic_heads_on_one_trunk() -> None:
    decoder = make(("policy", PTUNING), ("critic", LORA))
    batch = pack(SAMPLES)
    scorer = Scorer(decoder, "critic")
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(4))

    def loss() -> Tensor:
        return LanguageModel(decoder, "policy")(batch).square().sum() + scorer(batch).square().sum()

    same_gradients(decoder, loss, 2 + len(adapter_parameters(decoder, "critic")))


@pytest.mark.parametrize("config", [LORA, DORA, PTUNING])
def test_packed_is_alone(config: AdapterConfig) -> None:
    decoder = make(("policy", config))
    model = LanguageModel(decoder, "policy")
    together = model(pack(SAMPLES)).split([len(s) for s in SAMPLES])
    for sample, packed in zip(SAMPLES, together, strict=True):
        torch.testing.assert_close(model(pack([sample])), packed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [LORA, DORA, PTUNING])
def test_any_split_gives_the_same_gradient(config: AdapterConfig) -> None:
    decoder = make(("policy", config))
    model = LanguageModel(decoder, "policy")
    whole = gradients(decoder, lambda: model(pack(SAMPLES)).sum(), False)
    parts = gradients(decoder, lambda: sum(model(pack([s])).sum() for s in SAMPLES), True)  # type: ignore[arg-type,return-value]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [LORA, DORA])
def test_merged_is_unmerged(config: AdapterConfig) -> None:
    decoder = make(("policy", config))
    batch = pack(SAMPLES)
    before = LanguageModel(decoder, "policy")(batch)
    merge_adapter(decoder, "policy")
    torch.testing.assert_close(LanguageModel(decoder)(batch), before, rtol=0, atol=1e-12)


def test_other_roles_do_not_show() -> None:
    alone, crowded = make(("policy", LORA)), make(("policy", LORA), ("critic", PTUNING), ("other", LORA))
    batch = pack(SAMPLES)
    assert torch.equal(LanguageModel(alone, "policy")(batch), LanguageModel(crowded, "policy")(batch))
    assert torch.equal(LanguageModel(alone)(batch), LanguageModel(crowded)(batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LORA, DORA, PTUNING])
def test_a_preference_run_starts_at_exactly_ln_2(config: AdapterConfig, dtype: torch.dtype) -> None:
    """LoRA against the bare model, P-tuning against a frozen copy of its initial prefix (arXiv:2305.18290 eq. 7 at equal policies)."""
    decoder = make(("policy", config), dtype=dtype, trained=False)
    reference = None
    if config.kind == "ptuning":
        copy_adapter(decoder, "policy", "reference")
        reference = "reference"
    trainable(decoder, "policy", config.kind)
    decoder.recompute = len(decoder.layers)
    batch = pack_pairs(PAIRS)
    policy = LanguageModel(decoder, "policy")(batch)
    with torch.no_grad():
        held = LanguageModel(decoder, reference)(batch)
    gain = batch.per_sequence(policy - held)
    loss = -F.logsigmoid(0.1 * (gain[0::2] - gain[1::2]))
    assert torch.equal(loss, torch.full_like(loss, 2.0).log())
    loss.sum().backward()
    grads = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    assert grads.keys() == adapter_parameters(decoder, "policy").keys()
    assert any(g.abs().max() > 0 for g in grads.values())
