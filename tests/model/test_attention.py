import inspect

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from trueline.model.attention import packed_attention, runs, sequence_ends, varlen_attention, varlen_kernel, varlen_kernel_for


def oracle(q, k, v, lengths, contexts=(), prefix=None):
    """One score after the other, in NumPy: token t of a sequence sees the prefix, the context and what is not after it."""
    out, start = np.zeros_like(q), 0
    share = q.shape[1] // k.shape[1]
    for i, n in enumerate(lengths):
        context = contexts[i] if contexts else 0
        for t in range(n):
            for head in range(q.shape[1]):
                seen = [start + s for s in range(n) if s <= t or s < context]
                keys, values = k[seen, head // share], v[seen, head // share]
                if prefix is not None:
                    keys = np.concatenate([prefix[0][:, head // share], keys])
                    values = np.concatenate([prefix[1][:, head // share], values])
                scores = keys @ q[start + t, head] / np.sqrt(q.shape[2])
                weights = np.exp(scores - scores.max())
                out[start + t, head] = weights @ values / weights.sum()
        start += n
    return out


def draw(tokens, heads=4, groups=2, size=8):
    random = np.random.default_rng(tokens)
    return [random.normal(size=(tokens, n, size)) for n in (heads, groups, groups)]


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("lengths", [(5,), (3, 1, 6), (4, 4, 4)])
@pytest.mark.parametrize("with_contexts", [False, True])
@pytest.mark.parametrize("prefix_size", [0, 3])
def test_each_sequence_sees_what_it_may(heads, lengths, with_contexts, prefix_size):
    q, k, v = draw(sum(lengths), *heads)
    contexts = tuple(n // 2 for n in lengths) if with_contexts else ()
    prefix = draw(prefix_size, *heads)[1:] if prefix_size else None
    found = packed_attention(
        *map(torch.from_numpy, (q, k, v)), lengths, contexts, *(map(torch.from_numpy, prefix) if prefix is not None else (None, None))
    )
    np.testing.assert_allclose(found.numpy(), oracle(q, k, v, lengths, contexts, prefix), atol=1e-12)


def test_gradients_reach_the_prefix():
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in draw(5))
    keys, values = (torch.from_numpy(x).requires_grad_() for x in draw(3)[1:])
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x[:3], (2, 3), (), *x[3:]), (q, k, v, keys, values))


class Flash:
    """torch's `varlen_attn` in NumPy: what it demands of its arguments, and what it makes of them.

    `word`: torch 2.12's and later ones' `enable_gqa`, without which they refuse shared heads. `grouped`: 2.11 as it may be either way.
    """

    def __init__(self, word, grouped=True):
        self.grouped, self.calls = grouped, []
        known = inspect.signature(lambda q, k, v, ends, key_ends, longest, key_longest, *, window_size, enable_gqa=False: 0)
        self.__signature__ = known if word else known.replace(parameters=list(known.parameters.values())[:-1])
        self.word = word

    def __call__(self, q, k, v, ends, key_ends, longest, key_longest, **options):
        self.__signature__.bind(q, k, v, ends, key_ends, longest, key_longest, **options)
        self.calls.append((k.shape[1], options))
        if q.shape[1] != k.shape[1]:
            if self.word and not options.get("enable_gqa"):
                raise ValueError("Try setting enable_gqa=True for GQA.")
            if not self.word and not self.grouped:
                raise RuntimeError("number of heads in key/value must be that of the query")
        for cuts, rows, most in ((ends, q, longest), (key_ends, k, key_longest)):
            assert cuts.dtype == torch.int32 and cuts[0] == 0 and cuts[-1] == len(rows)
            assert type(most) is int and most == int(cuts.diff().max())
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and type(options["window_size"]) is tuple
        return Emulated.apply(q, k, v, ends.tolist(), key_ends.tolist(), *options["window_size"])


class Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ends, key_ends, left, right):
        out = np.zeros(q.shape)
        weights = np.zeros((q.shape[1], len(q), len(k)))
        share = q.shape[1] // k.shape[1]
        for a, b, c, d in zip(ends, ends[1:], key_ends, key_ends[1:], strict=False):
            for t in range(a, b):
                place = c + (t - a) + (d - c) - (b - a)  # aligned at the ends
                first = c if left < 0 else max(c, place - left)
                last = d if right < 0 else min(d, place + right + 1)
                for head in range(q.shape[1]):
                    scores = k[first:last, head // share].double().numpy() @ q[t, head].double().numpy() / np.sqrt(q.shape[2])
                    weights[head, t, first:last] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                    out[t, head] = weights[head, t] @ v[:, head // share].double().numpy()
        ctx.weights, ctx.share = torch.from_numpy(weights), share
        return torch.from_numpy(out).to(q.dtype)

    @staticmethod
    def backward(ctx, grad):  # of v alone: enough for the trial
        each = torch.einsum("hts,thd->shd", ctx.weights, grad.double())
        return None, None, each.unflatten(1, (-1, ctx.share)).sum(2).to(grad.dtype), None, None, None, None


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("word", "grouped"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("lengths", [(5,), (6, 1, 3, 3)])
def test_varlen_attention_is_handed_what_it_means(lengths, word, grouped, heads, window):
    q, k, v = map(torch.from_numpy, draw(sum(lengths), *heads))
    kernel = Flash(word, grouped)
    found = varlen_attention(kernel, q, k, v, lengths, lengths, window)
    torch.testing.assert_close(found, packed_attention(q, k, v, lengths, window=window), rtol=0, atol=1e-12)
    groups, options = kernel.calls[-1]
    # keys are repeated only where the kernel refuses shared heads
    assert groups == (heads[1] if word or grouped else heads[0])
    assert ("enable_gqa" in options) == (word and heads[0] != heads[1])


@pytest.mark.parametrize("window", [None, 1, 4])
def test_varlen_attention_takes_a_learned_prefix(monkeypatch, window):
    lengths = (6, 1, 3)
    q, k, v = map(torch.from_numpy, draw(sum(lengths)))
    prefix = [torch.from_numpy(x).float() for x in draw(2)[1:]]
    expected = packed_attention(q, k, v, lengths, (), *prefix, window=window)
    kernel = Flash(word=False)
    monkeypatch.setattr("trueline.model.attention.varlen_kernel_for", lambda q: kernel)
    torch.testing.assert_close(packed_attention(q, k, v, lengths, (), *prefix, window=window), expected, rtol=0, atol=1e-12)
    assert kernel.calls
    seen = len(kernel.calls)
    packed_attention(q, k, v, lengths, (2, 0, 0), *prefix, window=window)
    assert len(kernel.calls) == seen  # what is seen both ways is no causal mask


def test_a_kernel_that_reads_wrong_heads_is_not_used():
    right = Flash(word=False)

    def wrong(q, k, v, *rest, window_size):
        return right(q, k.flip(1), v.flip(1), *rest, window_size=window_size)

    def broken(q, k, v, *rest, window_size):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    device = torch.device("cpu")
    assert runs(right, device, 1) and runs(right, device, 16)
    assert not runs(wrong, device, 1) and not runs(broken, device, 1)


def test_a_trial_leaves_no_trace_in_a_recomputed_layer():
    """There it is asked for in the first pass only; what the second keeps would else be fewer tensors."""
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in draw(7, 4, 2))

    def kernel(q, k, v, ends, key_ends, longest, key_longest, *, window_size):  # keeps tensors for its backward pass
        return packed_attention(q, k, v, tuple(ends.diff().tolist()))

    def layer(q, k, v):
        assert runs(kernel, torch.device("cpu"), 2)
        return packed_attention(q, k, v, (4, 3)) * 2

    checkpoint(layer, q, k, v, use_reentrant=False).sum().backward()
    expected = torch.autograd.grad((packed_attention(q, k, v, (4, 3)) * 2).sum(), (q, k, v))
    for x, y in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, y)


def test_a_trial_has_numbers_where_tensors_have_none():
    with FakeTensorMode():
        assert runs(Flash(word=False), torch.device("cpu"), 2)


def test_sequence_ends_are_made_once_and_can_be_kept_for_backward():
    with torch.inference_mode():
        ends = sequence_ends((3, 4), torch.device("cpu"))
    assert not ends.is_inference() and ends.tolist() == [0, 3, 7]
    assert sequence_ends((3, 4), torch.device("cpu")) is ends


def test_no_varlen_attention_off_cuda():
    assert varlen_kernel_for(torch.zeros(1, 1, 8, dtype=torch.bfloat16)) is None
    assert "window_size" in inspect.signature(varlen_kernel()).parameters  # this torch's own


SEEN = [((5, 2), (5, 6)), ((3, 3, 1), (7, 7, 1)), ((4, 4, 2, 2), (4, 4, 2, 9))]  # queries and keys of each sequence


def whole(q, lengths, seen):
    """Queries in front, so that every sequence has as many as keys; and which rows of the result are the real ones."""
    parts, kept = [], []
    for part, n, m in zip(np.split(q, np.cumsum(lengths)[:-1]), lengths, seen, strict=True):
        parts.append(np.concatenate([np.random.default_rng(n).normal(size=(m - n, *q.shape[1:])), part]))
        kept += [False] * (m - n) + [True] * n
    return np.concatenate(parts), kept


@pytest.mark.parametrize(("lengths", "seen"), SEEN)
@pytest.mark.parametrize("prefix_size", [0, 3])
def test_fewer_queries_than_keys_are_the_last_of_their_sequence(lengths, seen, prefix_size):
    (q, *_), (_, k, v) = draw(sum(lengths)), draw(sum(seen))
    prefix = draw(prefix_size)[1:] if prefix_size else None
    more, kept = whole(q, lengths, seen)
    given = map(torch.from_numpy, prefix) if prefix is not None else (None, None)
    found = packed_attention(*map(torch.from_numpy, (q, k, v)), lengths, (), *given, seen=seen)
    np.testing.assert_allclose(found.numpy(), oracle(more, k, v, seen, (), prefix)[kept], atol=1e-12)


@pytest.mark.parametrize(("lengths", "seen"), SEEN)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_what_the_accelerators_kernel_is_given(lengths, seen, window):
    (q, *_), (_, k, v) = (map(torch.from_numpy, draw(n)) for n in (sum(lengths), sum(seen)))
    expected = packed_attention(q, k, v, lengths, window=window, seen=seen)
    torch.testing.assert_close(varlen_attention(Flash(word=True), q, k, v, lengths, seen, window), expected, rtol=0, atol=1e-12)
