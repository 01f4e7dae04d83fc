"""Key/value memory and its layouts, against attention over whole sequences."""

import pytest
import torch

from trueline.model.decoder import DecoderConfig
from trueline.model.layout import Packed
from trueline.rollout.memory import Decode, Memory, Mixed, Prefill

CONFIG = DecoderConfig(vocab_size=9, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=3, mlp_size=8)


def memory(front: int = 0, dtype: torch.dtype = torch.float64) -> Memory:
    return Memory(CONFIG, dtype, torch.device("cpu"), front)


def heads(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, n, 3, generator=draw, dtype=torch.float64) for n in (4, 2, 2))  # type: ignore[return-value]


def test_growing_keeps_what_is_stored() -> None:
    held = memory(front=2)
    assert held.keys.numel() == 0
    held.reserve(2, 3, limit=3)
    assert held.keys.shape == held.values.shape == (2, 2, 2, 5, 3)
    q, k, v = heads(2, 0)
    held.write(1, torch.tensor([1, 0]), torch.tensor([4, 2]), k, v)
    held.reserve(3, 4, limit=1000)
    assert held.keys.shape == (2, 3, 2, 6 + 64, 3)  # room ahead, not one column
    held.reserve(3, 198, limit=1000)
    assert held.keys.shape == (2, 3, 2, 300, 3)  # by half again once that is more
    assert torch.equal(held.keys[1, 1, :, 4], k[0]) and torch.equal(held.values[1, 0, :, 2], v[1])
    assert held.keys.count_nonzero() == held.values.count_nonzero() == 2 * 2 * 3
    for rows, length in ((1, 398), (3, 200), (2, 398)):
        held.reserve(rows, length, limit=398)
        assert held.keys.shape == (2, 3, 2, 400, 3)  # never beyond the limit, never smaller


@pytest.mark.parametrize("prefix", [0, 3])
def test_prompts_then_tokens_equal_whole_sequences(prefix: int) -> None:
    """Two sequences read in rows 1 and 0, one more beside a decoding step, all decoded on: as if each had been read at once."""
    lengths, read = [5, 3, 4], [3, 2, 4]
    q, k, v = heads(12, 1)
    keys, values = heads(prefix, 2)[1:]
    sequences = [tuple(x[sum(lengths[:i]) : sum(lengths[: i + 1])] for x in (q, k, v)) for i in range(3)]
    whole = Packed.of(lengths)
    expected = (whole.attend_prefixed(0, q, k, v, keys, values) if prefix else whole.attend(0, q, k, v)).split(lengths)
    held = memory(prefix)
    held.reserve(3, 6, limit=6)

    def attend(layout: Prefill | Decode | Mixed, parts: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """`parts`: (sequence, from, to) in the layout's order."""
        packed = [torch.cat([sequences[s][x][a:b] for s, a, b in parts]) for x in range(3)]
        out = layout.attend_prefixed(0, *packed, keys, values) if prefix else layout.attend(0, *packed)
        return list(out.split([b - a for _, a, b in parts]))

    got: list[list[torch.Tensor]] = [[], [], []]
    first = [(1, 0, read[1]), (0, 0, read[0])]
    second = [(1, 2, 3), (0, 3, 4), (2, 0, read[2])]
    steps = [
        (Prefill.of([read[1], read[0]], [0, 1], held), first),
        (Mixed.of(Decode.of(torch.tensor([2, 3]), 4, held), Prefill.of([read[2]], [2], held)), second),
    ]
    for layout, parts in steps:
        for (s, _, _), out in zip(parts, attend(layout, parts), strict=True):
            got[s].append(out)
    # sequence 1 is over: 0 moves into its row
    held.copy(torch.tensor([1]), torch.tensor([0]), 4)
    (last,) = attend(Decode.of(torch.tensor([4]), 5, held), [(0, 4, 5)])
    got[0].append(last)
    for mine, theirs in zip(got, expected, strict=True):
        assert (torch.cat(mine) - theirs).abs().max() < 1e-14


def test_positions_of_a_mixed_step() -> None:
    held = memory()
    held.reserve(3, 6, limit=6)
    mixed = Mixed.of(Decode.of(torch.tensor([4, 2]), 5, held), Prefill.of([3], [2], held))
    assert mixed.positions.tolist() == [4, 2, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernel_and_products_agree(dtype: torch.dtype) -> None:
    """bfloat16 takes the fused kernel, float32 two products: the same attention."""
    held, exact = memory(dtype=dtype), memory()
    layouts = []
    for part in (held, exact):
        part.reserve(4, 5, limit=5)
        draw = torch.Generator().manual_seed(3)
        for tensor in (part.keys, part.values):
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
        layouts.append(Decode.of(torch.tensor([0, 3, 2, 4]), 5, part))
    q, k, v = heads(4, 4)
    got = layouts[0].attend(1, *(x.to(dtype) for x in (q, k, v)))
    assert got.dtype == dtype
    assert (got.double() - layouts[1].attend(1, q, k, v)).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5)
