"""The order is a pure function: every record exactly once an epoch, whatever the step size and wherever a run was taken up."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.stream import key, plan, step_indices, total_samples, total_steps
from trueline.errors import UserError


@given(st.integers(0, 10), st.integers(1, 40), st.integers(1, 50), st.integers(1, 4))
def test_every_record_exactly_once_an_epoch(seed: int, count: int, per_step: int, epochs: int) -> None:
    samples = total_samples(count, epochs)
    steps = total_steps(count, per_step, None, epochs)
    sequence = list(itertools.chain(*(step_indices(seed, step, count, per_step, samples) for step in range(steps))))
    assert len(sequence) == count * epochs
    assert step_indices(seed, steps, count, per_step, samples) == []
    for start in range(0, len(sequence), count):
        assert sorted(sequence[start : start + count]) == list(range(count))


def test_the_step_size_does_not_change_the_order() -> None:
    by_one = [step_indices(3, step, 11, 1)[0] for step in range(33)]
    assert by_one == list(itertools.chain(*(step_indices(3, step, 11, 7) for step in range(5))))[:33]


def test_orders_of_seeds_and_epochs_differ() -> None:
    orders = [tuple(step_indices(seed, epoch, 50, 50)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_the_order_never_changes_between_versions() -> None:
    assert step_indices(0, 0, 8, 8) == [4, 1, 5, 2, 0, 6, 7, 3]
    assert key(0, "order", 0) == 6759659632403048684


def test_places_are_uniform() -> None:
    first = Counter(step_indices(seed, 0, 5, 5)[0] for seed in range(2000))
    assert all(330 < first[i] < 470 for i in range(5))  # 400 expected, deviation 18


def test_keys_are_63_bits_and_tell_everything_apart() -> None:
    keys = {key(seed, purpose, a, b) for seed in range(5) for purpose in ("a", "b", "a1") for a in range(10) for b in range(10)}
    keys |= {key(1, "a"), key(1, "a", 1), key(1, "a1"), key(11, "a"), key(1, "a", 11), key(1, "a", 1, 1)}
    assert len(keys) == 5 * 3 * 100 + 5  # key(1, "a", 1, 1) is in both
    assert all(0 <= k < 2**63 for k in keys)


@pytest.mark.parametrize(
    ("count", "per_step", "steps", "epochs", "expected"),
    [
        (10, 4, 7, None, 7),
        (10, 4, None, 1, 3),
        (8, 4, None, 1, 2),
        (10, 4, None, 0.5, 2),
        (10, 4, None, 2.0, 5),
        (3, 8, None, 1, 1),
        (1, 1, None, 0.01, 1),
    ],
)
def test_total_steps(count: int, per_step: int, steps: int | None, epochs: float | None, expected: int) -> None:
    assert total_steps(count, per_step, steps, epochs) == expected


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(60, 200), st.integers(1, 4))
def test_plan_places_each_item_once_within_the_limit_and_ranks_alike(lengths: list[int], max_tokens: int, ranks: int) -> None:
    planned = plan(lengths, max_tokens, ranks)
    assert len(planned) == ranks
    assert len({len(micro) for micro in planned}) == 1
    placed = [i for micro in planned for batch in micro for i in batch]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= max_tokens for micro in planned for batch in micro)
    # no two batches of one rank-less plan would fit into one
    if ranks == 1:
        sums = sorted(sum(lengths[i] for i in batch) for batch in planned[0])
        assert len(sums) < 2 or sums[0] + sums[1] > max_tokens


def test_plan_is_best_fit() -> None:
    # 60 and 55 open two batches; 40 goes where it fits exactly, 30 to the other
    assert plan([40, 55, 30, 60], 100) == [[[3, 0], [1, 2]]]


def test_an_item_beyond_the_limit_is_refused() -> None:
    with pytest.raises(UserError, match="101 tokens does not fit .* batch.max_tokens to at least 101"):
        plan([5, 101], 100)


def test_fewer_items_than_ranks_leaves_empty_batches() -> None:
    assert plan([5], 10, ranks=2) == [[[0]], [[]]]
    assert plan([], 10) == [[[]]]
