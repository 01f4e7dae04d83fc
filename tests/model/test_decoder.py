from dataclasses import replace

import numpy as np
import pytest
import torch

from trueline.data.sample import Sample
from trueline.model.batch import pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights, rotate, rotation

CONFIG = DecoderConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=20)


def make(config=CONFIG, seed=0, **options):
    decoder = Decoder(config, **options).double()
    init_weights(decoder, torch.Generator().manual_seed(seed))
    return decoder


def rows(*lengths):
    draw = torch.Generator().manual_seed(1)
    return [Sample(torch.randint(0, 30, (n,), generator=draw).tolist(), [True] * n) for n in lengths]


@pytest.mark.parametrize("rope", ["half", "interleaved"])
@pytest.mark.parametrize("rope_dim", [None, 4])
def test_rotation_turns_pairs_of_channels_by_the_position(rope, rope_dim):
    """Channel pair i of position t turns by t * theta^(-2 i / size) (arXiv:2104.09864 eq. 15); other channels stay."""
    config = replace(CONFIG, head_dim=8, rope=rope, rope_dim=rope_dim, rope_theta=100.0)
    size = rope_dim or 8
    positions = torch.tensor([0, 1, 5])
    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = rotate(x, *rotation(positions, config), config).numpy()
    wanted = x.numpy().copy()
    for t, position in enumerate(positions.tolist()):
        for i in range(size // 2):
            a, b = (2 * i, 2 * i + 1) if rope == "interleaved" else (i, i + size // 2)
            angle = position * 100.0 ** (-2 * i / size)
            pair = x[t, :, a].numpy() + 1j * x[t, :, b].numpy()
            pair = pair * np.exp(1j * angle)
            wanted[t, :, a], wanted[t, :, b] = pair.real, pair.imag
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # angles are float32


@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_only_distances_matter(rope):
    config = replace(CONFIG, head_dim=8, rope=rope)
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        turned = [rotate(x, *rotation(torch.tensor([p]), config), config) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-3)


def test_packed_is_alone():
    decoder, samples = make(), rows(5, 1, 8, 3)
    batch = pack(samples)
    together = decoder(batch.tokens, batch.layout).split(batch.lengths)
    for sample, found in zip(samples, together, strict=True):
        alone = pack([sample])
        torch.testing.assert_close(found, decoder(alone.tokens, alone.layout), rtol=0, atol=1e-13)


def test_the_future_is_not_seen():
    decoder, sample = make(), rows(8)[0]
    batch = pack([sample])
    changed = batch.tokens.clone()
    changed[5] = (changed[5] + 1) % 30
    before, after = decoder(batch.tokens, batch.layout), decoder(changed, batch.layout)
    assert torch.equal(before[:5], after[:5]) and not torch.equal(before[5:], after[5:])


def test_recomputing_some_or_all_layers_gives_the_same_gradients():
    grads = []
    for recompute in (0, 1, 2):
        decoder = make()
        decoder.recompute = recompute
        batch = pack(rows(4, 6))
        decoder(batch.tokens, batch.layout).square().sum().backward()
        grads.append([p.grad for p in decoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_biases_are_where_the_config_says():
    names = {name for name, _ in Decoder(replace(CONFIG, qkv_bias=False, o_bias=True, mlp_bias=True)).named_parameters() if "bias" in name}
    assert {name.removeprefix("layers.0.") for name in names if "layers.0" in name} == {
        "attention.o.bias",
        "mlp.gate.bias",
        "mlp.up.bias",
        "mlp.down.bias",
    }


def test_a_tied_head_is_the_embedding():
    tied = make(replace(CONFIG, tied_embeddings=True))
    assert tied.head.weight is tied.embed.weight and "head.weight" not in dict(tied.named_parameters())
    assert make(with_head=False).head is None


def test_random_weights_have_the_deviation_that_was_asked_for():
    decoder = make(replace(CONFIG, vocab_size=2000, hidden_size=64, init_std=0.05))
    assert float(decoder.embed.weight.detach().std()) == pytest.approx(0.05, rel=0.02)
    assert float(decoder.layers[0].mlp.down.weight.detach().std()) == pytest.approx(0.05 / 2, rel=0.1)  # 2 layers, 4 residual sums
    assert float(decoder.norm.weight.detach().sum()) == 64 and not decoder.layers[1].attention.q.bias.any()
