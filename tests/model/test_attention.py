import numpy as np
import pytest
import torch

from trueline.model.attention import _varlen, packed_attention


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


SEEN = [((5, 2), (5, 6)), ((3, 3, 1), (7, 7, 1)), ((4, 4, 2, 2), (4, 4, 2, 9))]  # queries and keys of each sequence


def whole(q, lengths, seen):
    """Queries in front, so that every sequence has as many as keys; and which rows of the result are the real ones."""
    parts, kept = [], []
    for part, n, m in zip(np.split(q, np.cumsum(lengths)[:-1]), lengths, seen, strict=True):
        parts.append(np.concatenate([np.random.default_rng(n).normal(size=(m - n, *q.shape[1:])), part]))
        kept += [False] * (m - n) + [True] * n
    return np.concatenate(parts), kept


def fake_varlen(q, k, v, ends, key_ends, longest, longest_key, window_size=(-1, -1), enable_gqa=False):
    """torch's signature, and flash attention's rule: the causal mask is aligned where queries and keys end."""
    assert longest == (ends[1:] - ends[:-1]).max() and longest_key == (key_ends[1:] - key_ends[:-1]).max() and window_size[1] == 0
    out = []
    for a, b, c, d in zip(ends[:-1], ends[1:], key_ends[:-1], key_ends[1:], strict=True):
        back = (d - c) - (b - a) + torch.arange(b - a)[:, None] - torch.arange(d - c)
        mask = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        q4, k4, v4 = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        out.append(torch.nn.functional.scaled_dot_product_attention(q4, k4, v4, attn_mask=mask, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(out)


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
    """The kernel itself needs a GPU; here stands one with its rules in its place."""
    (q, *_), (_, k, v) = (map(torch.from_numpy, draw(n)) for n in (sum(lengths), sum(seen)))
    expected = packed_attention(q, k, v, lengths, window=window, seen=seen)
    torch.testing.assert_close(_varlen(fake_varlen, q, k, v, lengths, seen, window), expected, rtol=0, atol=1e-12)
