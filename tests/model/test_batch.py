import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.sample import Pair, Sample
from trueline.model import batch as module
from trueline.model.batch import pack, pack_pairs

SAMPLES = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5)


def test_the_examples_hold():
    assert doctest.testmod(module).failed == 0


@given(SAMPLES)
def test_a_pack_is_its_samples_end_to_end(rows):
    samples = [Sample([t for t, _ in row], [f for _, f in row]) for row in rows]
    found = pack(samples)
    assert found.tokens.tolist() == [t for s in samples for t in s.tokens]
    assert found.lengths == tuple(map(len, samples)) and found.num_sequences == len(samples)
    # nothing predicts a first token
    assert found.trained.tolist() == [f and i > 0 for s in samples for i, f in enumerate(s.trained)]
    values = torch.arange(len(found.tokens), dtype=torch.float64)
    pieces = [(v * t).sum() for v, t in zip(values.split(found.lengths), found.trained.split(found.lengths), strict=True)]
    assert torch.equal(found.per_sequence(values), torch.stack(pieces))
    assert found.sequence().tolist() == [i for i, s in enumerate(samples) for _ in s.tokens]
    assert [found.tokens[e] for e in found.ends()] == [s.tokens[-1] for s in samples]


def test_pairs_alternate_chosen_and_rejected():
    a, b, c = (Sample([n] * n, [True] * n) for n in (1, 2, 3))
    found = pack_pairs([Pair(a, b), Pair(c, a)])
    assert found.lengths == (1, 2, 3, 1)
    assert found.tokens[found.ends()].tolist() == [1, 2, 3, 1]


def test_contexts_travel_along():
    assert pack([Sample([1, 2], [False, True], context=1), Sample([3], [False])]).layout.contexts == (1, 0)


def test_nothing_cannot_be_packed():
    with pytest.raises(ValueError, match="nothing"):
        pack([])


def test_moving_keeps_everything():
    moved = pack([Sample([1, 2], [False, True])]).to("meta")
    assert {moved.tokens.device.type, moved.trained.device.type, moved.layout.positions.device.type} == {"meta"}
