import numpy as np
import pytest
import torch

from trueline.model.attention import packed_attention


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
