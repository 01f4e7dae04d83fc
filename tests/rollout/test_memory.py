"""Key/value memory and its layouts, against attention over whole sequences."""

import pytest
import torch

from trueline.errors import RunError
from trueline.model.decoder import DecoderConfig
from trueline.model.layout import Packed
from trueline.rollout.memory import PAGE, Decode, Memory, Mixed, Pages, Prefill, Slots, bytes_per_token, make_memory, needs_pages

CONFIG = DecoderConfig(vocab_size=9, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=3, mlp_size=8)
CPU = torch.device("cpu")


def slots(dtype: torch.dtype = torch.float64, beside: bool = False) -> Slots:
    return Slots(CONFIG, dtype, CPU, beside)


def pages(count: int, dtype: torch.dtype = torch.float64) -> Pages:
    return Pages(CONFIG, dtype, CPU, count * PAGE * bytes_per_token(CONFIG, dtype))


def heads(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, n, 3, generator=draw, dtype=torch.float64) for n in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("beside", [False, True])
def test_growing_keeps_what_is_stored(beside: bool) -> None:
    held = slots(beside=beside)
    assert held.keys.numel() == 0
    held.reserve(2, [5, 3], limit=5)
    assert held.keys.shape == held.values.shape == (2, 2, 2, PAGE, 3)
    q, k, v = heads(2, 0)
    held.write(1, torch.tensor([1, 0]), torch.tensor([4, 2]), k, v)
    held.reserve(3, [2, PAGE + 1], limit=1000)
    assert held.keys.shape == (2, 3, 2, PAGE + 64 + PAGE, 3)  # room ahead, not one column, and no part of a page
    held.reserve(3, [200], limit=1000)
    assert held.keys.shape == (2, 3, 2, 304, 3)  # by half again once that is more
    assert torch.equal(held.keys[1, 1, :, 4], k[0]) and torch.equal(held.values[1, 0, :, 2], v[1])
    assert held.keys.count_nonzero() == held.values.count_nonzero() == 2 * 2 * 3
    for rows, length in ((1, 400), (3, 200), (2, 400)):
        held.reserve(rows, [length], limit=400)
        assert held.keys.shape == (2, 3, 2, 400, 3)  # never a page beyond the limit, never smaller


def test_the_choice_counted_by_hand() -> None:
    """Two numbers per layer, key head and channel, 2 bytes each; half of 139 GiB."""
    sizes = {"vocab_size": 1, "hidden_size": 4096, "num_heads": 32, "head_dim": 128, "mlp_size": 1}
    glm4 = DecoderConfig(num_layers=40, num_kv_heads=2, **sizes)  # type: ignore[arg-type]
    qwen2 = DecoderConfig(num_layers=28, num_kv_heads=4, **sizes)  # type: ignore[arg-type]
    chatglm = DecoderConfig(num_layers=28, num_kv_heads=32, **sizes)  # type: ignore[arg-type]
    each = {name: bytes_per_token(c, torch.bfloat16) for name, c in (("glm4", glm4), ("qwen2", qwen2), ("chatglm", chatglm))}
    assert each == {"glm4": 40_960, "qwen2": 57_344, "chatglm": 458_752}
    budget = 139 * 2**30 // 2
    # 256 requests of 1,024 tokens: 10, 14 and 112 GiB
    assert [needs_pages(n, budget, [1024] * 256, 256) for n in each.values()] == [False, False, True]
    assert not needs_pages(458_752, budget, [1024] * 256, 128) and needs_pages(458_752, budget, [1024] * 256, 160)
    assert needs_pages(458_752, budget, [10] * 255 + [4096], 256)  # one long one makes every slot long
    assert not needs_pages(458_752, 1024 * 458_752, [1024], 64) and needs_pages(458_752, 1024 * 458_752 - 1, [1024], 64)
    assert not needs_pages(1, 0, [], 64)


def test_memory_is_made_by_the_choice() -> None:
    each = bytes_per_token(CONFIG, torch.float32)
    assert each == 2 * 2 * 2 * 3 * 4
    made = make_memory(CONFIG, torch.float32, CPU, [40, 20, 10], 2, 2 * 48 * each)
    assert isinstance(made, Slots) and made.beside
    made.reserve(2, [40, 20], 40)
    assert made.keys.nbytes + made.values.nbytes == 2 * 48 * each and made.keys.stride()[-2:] == (1, 48)
    paged = make_memory(CONFIG, torch.float32, CPU, [40, 20, 10], 2, 2 * 48 * each - 1)
    assert isinstance(paged, Pages) and paged.total == 5  # 95 tokens hold five pages of 16
    assert paged.keys.nbytes + paged.values.nbytes == 5 * PAGE * each
    few = make_memory(CONFIG, torch.float32, CPU, [40, 1, 1, 1], 4, 150 * each)
    assert isinstance(few, Pages) and few.total == 3 + 3  # more could never be filled
    with pytest.raises(RunError, match=r"40 tokens take .* rollout\.memory"):
        make_memory(CONFIG, torch.float32, CPU, [40], 1, 39 * each)
    assert isinstance(make_memory(CONFIG, torch.float32, CPU, [40, 40], 2, 48 * each), Pages)


def test_pages_are_taken_shared_and_given_back() -> None:
    held = pages(8)
    held.reserve(2, [PAGE, PAGE + 1], 0)
    assert [len(h) for h in held.held] == [1, 2] and held.free == 5  # no more than one page is not full
    assert held.missing([PAGE + 1, 2 * PAGE]) == 1
    q, k, v = heads(PAGE + 1, 0)
    for layer in range(2):
        held.write(layer, torch.full((PAGE + 1,), 1), torch.arange(PAGE + 1), k, v)
    held.share([1], [2], [PAGE + 1])
    assert held.held[2][0] == held.held[1][0] and held.held[2][1] != held.held[1][1] and held.free == 4
    held.reserve(3, [PAGE, PAGE + 1, PAGE + 2], 0)
    held.write(0, torch.tensor([2]), torch.tensor([PAGE + 1]), k[:1], v[:1])
    for row in (1, 2):
        keys, values = (x[row].transpose(0, 1) for x in held.past(3, PAGE + 1, 0))
        assert torch.equal(keys, k) and torch.equal(values, v)
    held.remove([0, 1], [2], [0], PAGE + 2)
    held.reserve(3, [PAGE + 2], 0)
    assert held.free == 6 and held.table.tolist() == held.held and torch.equal(held.past(1, PAGE + 1, 1)[0][0].transpose(0, 1), k)
    held.remove([0], [], [], 0)
    assert held.free == held.total == len(set(held.free_pages)) == 8 and not any(held.users)


@pytest.mark.parametrize("kind", ["slots", "slots beside", "pages"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_prompts_then_tokens_equal_whole_sequences(prefix: int, kind: str) -> None:
    """Two sequences read in rows 0 and 1, one more beside a decoding step, all decoded on: as if each had been read at once."""
    lengths, read = [5, 3, 4], [3, 2, 4]
    q, k, v = heads(12, 1)
    keys, values = heads(prefix, 2)[1:]
    sequences = [tuple(x[sum(lengths[:i]) : sum(lengths[: i + 1])] for x in (q, k, v)) for i in range(3)]
    whole = Packed.of(lengths)
    expected = (whole.attend_prefixed(0, q, k, v, keys, values) if prefix else whole.attend(0, q, k, v)).split(lengths)
    held: Memory = pages(3) if kind == "pages" else slots(beside=kind == "slots beside")
    held.reserve(3, [6, 6, 6], limit=6)

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
        (Mixed.of(Decode.of(torch.tensor([2, 3]), 4, held, {None}, prefix), Prefill.of([read[2]], [2], held)), second),
    ]
    for layout, parts in steps:
        for (s, _, _), out in zip(parts, attend(layout, parts), strict=True):
            got[s].append(out)
    # sequences 1 and 2 are over: 0 moves into the first row
    held.remove([0, 2], [1], [0], 4)
    held.reserve(3, [5], limit=6)
    (last,) = attend(Decode.of(torch.tensor([4]), 5, held, {None}, prefix), [(0, 4, 5)])
    got[0].append(last)
    for mine, theirs in zip(got, expected, strict=True):
        assert (torch.cat(mine) - theirs).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_pages_are_slots_to_the_bit(dtype: torch.dtype, window: int | None) -> None:
    """With keys beside each other, whose products add in another order, to rounding."""
    lengths = [40, 3, PAGE, 2 * PAGE + 1]
    q, k, v = (x.to(dtype) for x in heads(sum(lengths) + 4, 5))
    found = []
    for held in (slots(dtype), pages(9, dtype), slots(dtype, beside=True)):
        held.reserve(4, [n + 1 for n in lengths], limit=60)
        Prefill.of(lengths, [0, 1, 2, 3], held).attend(1, q[4:], k[4:], v[4:], window)
        found.append(Decode.of(torch.tensor(lengths), 41, held, {window}).attend(1, q[:4], k[:4], v[:4], window))
    assert torch.equal(*found[:2])
    within = 0.01 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(*found[1:], rtol=within, atol=within)


def test_positions_of_a_mixed_step() -> None:
    held = slots()
    held.reserve(3, [6], limit=6)
    mixed = Mixed.of(Decode.of(torch.tensor([4, 2]), 5, held, {None}), Prefill.of([3], [2], held))
    assert mixed.positions.tolist() == [4, 2, 0, 1, 2]


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernel_and_products_agree(dtype: torch.dtype, prefix: int) -> None:
    """bfloat16 takes the fused kernel, float32 two products: the same attention."""
    held, exact = slots(dtype), slots()
    layouts = []
    for part in (held, exact):
        part.reserve(4, [5], limit=5)
        draw = torch.Generator().manual_seed(3)
        for tensor in (part.keys, part.values):
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
        layouts.append(Decode.of(torch.tensor([0, 3, 2, 4]), 5, part, {None}, prefix))
    q, k, v = heads(4, 4)
    front = heads(prefix, 6)[1:]

    def attend(layout: Decode, *parts: torch.Tensor) -> torch.Tensor:
        return layout.attend_prefixed(1, *parts, *front) if prefix else layout.attend(1, *parts)

    got = attend(layouts[0], *(x.to(dtype) for x in (q, k, v)))
    assert got.dtype == dtype
    assert (got.double() - attend(layouts[1], q, k, v)).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5)
