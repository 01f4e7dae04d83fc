import pytest
import torch

from trueline.model.layout import Packed, Prefixed


def test_positions_count_from_zero_in_each_sequence():
    layout = Packed.of([3, 1, 2])
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert layout.lengths == (3, 1, 2) and layout.contexts == ()
    assert Packed.of([2, 2], [0, 1]).contexts == (0, 1)
    assert Packed.of([2, 2], [0, 0]).contexts == ()


def test_a_prefix_takes_the_positions_before():
    inner = Packed.of([2, 3])
    keys, values = torch.randn(4, 5, 2, 8), torch.randn(4, 5, 2, 8)
    layout = Prefixed(inner, keys, values)
    assert layout.positions.tolist() == [5, 6, 5, 6, 7]
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    assert torch.equal(layout.attend(3, q, k, v), inner.attend_prefixed(3, q, k, v, keys[3], values[3]))
    with pytest.raises(TypeError, match="one prefix"):
        layout.attend_prefixed(0, q, k, v, keys[0], values[0])
