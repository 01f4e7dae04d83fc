import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trueline.data.sample import Sample
from trueline.model import heads
from trueline.model.batch import pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel, LinearLogProbability, LinearLoss, Scorer, accumulation_dtype, likelihood, values_before
from trueline.train.losses import ppo_policy_loss

CONFIG = DecoderConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=20, init_std=0.3)


@pytest.fixture
def decoder():
    made = Decoder(CONFIG).double()
    init_weights(made, torch.Generator().manual_seed(0))
    return made


def batch_of(*flags):
    draw = torch.Generator().manual_seed(1)
    return pack([Sample(torch.randint(0, 30, (len(f),), generator=draw).tolist(), [c == "x" for c in f]) for f in flags])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_index_t_is_the_log_probability_of_token_t_given_those_before(decoder, temperature):
    batch = batch_of("xxx.x", "x", "..x")
    found = LanguageModel(decoder)(batch, temperature).detach().numpy()
    hidden = decoder(batch.tokens, batch.layout)
    logits = (hidden @ decoder.head.weight.T).detach().numpy() / temperature
    for t, trained in enumerate(batch.trained.tolist()):
        row = logits[t - 1]
        wanted = row[batch.tokens[t]] - row.max() - np.log(np.exp(row - row.max()).sum()) if trained else 0.0
        assert found[t] == pytest.approx(wanted, abs=1e-12)
    assert batch.trained.tolist() == [False, True, True, False, True, False, False, False, True]


def test_a_batch_without_a_trained_token_is_all_zero(decoder):
    out = LanguageModel(decoder)(batch_of("...", "."))
    assert out.tolist() == [0.0] * 4
    out.sum().backward()


def test_gradients_are_finite_differences():
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 7))
    target = torch.tensor([0, 6, 3, 3])
    assert torch.autograd.gradcheck(lambda h, w: LinearLogProbability.apply(h, w, target, 0.7), (hidden, weight))


def test_chunks_do_not_matter(decoder, monkeypatch):
    results = []
    for chunk in (2048, 3):
        monkeypatch.setattr(heads, "CHUNK", chunk)
        decoder.zero_grad()
        out = LanguageModel(decoder)(batch_of("xxxxxxx", "xxxx"))
        out.sum().backward()
        results.append((out.detach(), decoder.head.weight.grad.clone(), decoder.embed.weight.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"CPU_CHUNK": 3, "NARROW": 3}, {"CACHED": 60}, {"CHUNK": 4, "CACHED": 1}])
def test_the_total_is_the_sum_and_has_its_gradients(decoder, monkeypatch, sizes, frozen):
    for name, value in sizes.items():
        monkeypatch.setattr(heads, name, value)
    decoder.head.weight.requires_grad_(not frozen)
    model, batch, found = LanguageModel(decoder), batch_of("xxxxxxx", "x.xx", "."), []
    for total in (lambda: model(batch).sum(), lambda: model.total(batch)):
        decoder.zero_grad()
        value = total()
        (value * -0.3).backward()
        found.append({n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None} | {"": value.detach()})
    assert found[0].keys() == found[1].keys() and ("head.weight" in found[0]) is not frozen
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(model.total(batch), model(batch).sum(), rtol=1e-14, atol=0)


SMALL_CHUNKS = {"CPU_CHUNK": 3, "NARROW": 3, "CACHED": 60}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("frozen", [False, True])
def test_losses_of_single_tokens_are_what_they_are_on_all_log_probabilities(decoder, monkeypatch, frozen, temperature):
    for name, value in SMALL_CHUNKS.items():
        monkeypatch.setattr(heads, name, value)
    decoder.head.weight.requires_grad_(not frozen)
    model, batch = LanguageModel(decoder), batch_of("xxxxxxx", "x.xx", ".")
    old, advantages = torch.randn(2, len(batch.tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        old = model(batch, temperature) + 0.3 * old  # ratios on both sides of what is clipped

    def plain():
        logprobs = model(batch, temperature)
        return (ppo_policy_loss(logprobs, old, advantages, 0.2) * batch.trained).sum(), logprobs

    def apart():
        return model.losses(batch, lambda found, at: ppo_policy_loss(found, old[at], advantages[at], 0.2), temperature)

    found = []
    for way in (plain, apart):
        decoder.zero_grad()
        total, logprobs = way()
        (total * 0.7).backward()
        gradients = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
        found.append(gradients | {"total": total.detach(), "logprobs": logprobs.detach()})
    assert not logprobs.requires_grad and ("head.weight" in found[0]) is not frozen
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(apart()[0], found[0]["total"], rtol=1e-14, atol=0)
        assert apart()[1].equal(found[0]["logprobs"])


def test_losses_have_the_gradients_of_the_softmax_written_out():
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 7))
    target, factors = torch.tensor([0, 6, 3, 3]), torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)

    def loss(logprobs, at):
        return factors[at] * logprobs.exp()

    total, _ = LinearLoss.apply(hidden, weight, target, 0.7, loss)
    written = loss((hidden @ weight.T / 0.7).log_softmax(-1)[range(4), target], torch.arange(4)).sum()
    torch.testing.assert_close(total, written, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, (hidden, weight)) for x in (total, written)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


class Products(TorchDispatchMode):
    """Counts matrix products with the vocabulary, of `vocabulary` tokens."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.count += any(self.vocabulary in x.shape for x in args if isinstance(x, torch.Tensor))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("frozen", "apart", "rows", "wanted"),
    [(False, False, 256, 3), (False, False, 4, 11), (True, False, 256, 2), (True, False, 4, 6), (False, True, 256, 3), (False, True, 4, 9)],
)
def test_logits_are_made_again_only_if_the_gradient_of_the_head_waits_for_the_loss(decoder, monkeypatch, frozen, apart, rows, wanted):
    """9 rows are three chunks of at most 4: of the head's gradient's three, the last one's logits are kept."""
    monkeypatch.setattr(heads, "CHUNK", rows)
    for name in ("CPU_CHUNK", "NARROW"):
        monkeypatch.setattr(heads, name, rows)
    decoder.head.weight.requires_grad_(not frozen)
    model, batch = LanguageModel(decoder), batch_of("xxxxxxx", "x.xx", ".x")
    with Products(CONFIG.vocab_size) as products:
        total = model.losses(batch, likelihood)[0] if apart else model(batch).sum()
        total.backward()
    assert products.count == wanted


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [2, 4, 9, 2048])
def test_tokens_that_weigh_differently_have_the_gradients_of_the_softmax_written_out(decoder, monkeypatch, rows, frozen):
    monkeypatch.setattr(heads, "CHUNK", rows)
    for name in ("CPU_CHUNK", "NARROW"):
        monkeypatch.setattr(heads, name, rows)
    monkeypatch.setattr(heads, "CACHED", 60)  # two rows
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, generator=draw).requires_grad_() for n in (9, 30))
    target, factors = torch.randint(0, 30, (9,), generator=draw), torch.randn(9, dtype=torch.float64, generator=draw)
    weight.requires_grad_(not frozen)
    ours = LinearLogProbability.apply(hidden, weight, target, 0.7)
    theirs = (hidden @ weight.T / 0.7).log_softmax(-1)[range(9), target]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(theirs @ factors, [hidden] if frozen else [hidden, weight])
    for _ in range(2):  # the second time nothing is kept
        found = torch.autograd.grad(ours @ factors, [hidden] if frozen else [hidden, weight], retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_total_is_differentiated_once(decoder):
    total = LanguageModel(decoder).total(batch_of("xxx"))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        total.backward()


def test_in_bfloat16_both_losses_are_as_near_to_the_truth():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=draw).bfloat16().requires_grad_() for n in (700, 90))
    target = torch.randint(0, 90, (700,), generator=draw)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    LinearLogProbability.apply(*exact, target, 1.0).sum().backward()
    apart, together = LinearLogProbability.apply, LinearLoss.apply
    for loss in (lambda: apart(hidden, weight, target, 1.0).sum(), lambda: together(hidden, weight, target, 1.0, likelihood)[0]):
        hidden.grad = weight.grad = None
        loss().backward()
        for ours, true in zip((hidden, weight), exact, strict=True):
            assert ours.grad.dtype == torch.bfloat16
            assert (ours.grad - true.grad).norm() / true.grad.norm() < 0.01


def test_a_frozen_head_gets_no_gradient(decoder):
    decoder.head.weight.requires_grad_(False)
    LanguageModel(decoder)(batch_of("xxx")).sum().backward()
    assert decoder.head.weight.grad is None and decoder.embed.weight.grad is not None


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_log_probabilities_and_scores_are_never_16_bit(decoder, dtype, wanted):
    decoder.to(dtype)
    assert accumulation_dtype(dtype) == wanted
    batch = batch_of("xxx")
    assert LanguageModel(decoder)(batch).dtype == wanted
    assert Scorer(decoder)(batch).dtype == wanted


def test_scores_start_at_zero_and_are_one_per_token(decoder):
    batch = batch_of("..x", "x.")
    scorer = Scorer(decoder)
    assert scorer(batch).tolist() == [0.0] * 5
    with torch.no_grad():
        scorer.score.weight.fill_(1.0)
    torch.testing.assert_close(scorer(batch), decoder(batch.tokens, batch.layout).sum(-1))
    scorer(batch).sum().backward()
    assert scorer.score.weight.grad is not None


def test_a_value_stands_before_its_token():
    batch = batch_of(".xx", "x.x")
    found = values_before(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), batch)
    assert found.tolist() == [0.0, 1.0, 2.0, 0.0, 0.0, 5.0]


def test_rows_of_logits_at_once_follow_the_memory_they_take() -> None:
    def rows(vocabulary: int, width: int, dtype: torch.dtype) -> int:
        return heads.chunk_rows(torch.empty(vocabulary, width, dtype=dtype))

    assert [rows(v, 512, torch.bfloat16) for v in (100, 8192, 20_000, 151_936)] == [2048, 2048, 838, 512]
    assert [rows(v, 512, torch.float32) for v in (100, 151_936)] == [256, 256]
    assert [rows(8192, 64, dtype) for dtype in (torch.float32, torch.bfloat16)] == [128, 256]
