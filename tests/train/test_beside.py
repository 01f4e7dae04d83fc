"""Work beside generation: whole groups, each item once, the same results whatever came in when, and errors where they are wanted."""

import random
import threading
import time

import pytest

from trueline.train.beside import Beside


@pytest.mark.parametrize(("count", "group"), [(1, 1), (12, 3), (7, 3), (5, 5), (4, 9)])
def test_each_item_once_in_whole_groups(count: int, group: int) -> None:
    for seed in range(5):
        calls: list[list[int]] = []

        def work(indices: list[int], calls: list[list[int]] = calls) -> list[str]:
            calls.append(indices)
            return [f"item {i}" for i in indices]

        order = list(range(count))
        random.Random(seed).shuffle(order)
        with Beside(work, count, group) as beside:
            for i in order:
                beside.done(i)
            assert beside.results() == [f"item {i}" for i in range(count)]
        assert sorted(i for call in calls for i in call) == list(range(count))
        for call in calls:
            assert call == sorted(call) and {i // group for i in call if i % group == 0} == {i // group for i in call}
            assert all(j in call for i in call for j in range(i // group * group, min((i // group + 1) * group, count)))
        if group >= count:
            assert calls == [list(range(count))]


def test_it_works_while_others_are_still_to_come() -> None:
    began, threads = threading.Event(), set()

    def work(indices: list[int]) -> list[int]:
        threads.add(threading.current_thread())
        began.set()
        return indices

    with Beside(work, 4, 2) as beside:
        beside.done(1)
        assert not began.wait(0.05)  # half a group
        beside.done(0)
        assert began.wait(10)
        beside.done(2)
        beside.done(3)
        assert beside.results() == [0, 1, 2, 3]
    assert threads.isdisjoint({threading.current_thread()}) and not any(t.is_alive() for t in threads)


def test_what_the_work_raises_is_raised_at_the_next_item_and_at_the_end() -> None:
    def work(indices: list[int]) -> list[int]:
        raise ValueError("no score")

    with Beside(work, 2, 1) as beside:
        beside.done(0)
        with pytest.raises(ValueError, match="no score"):
            for _ in range(1000):
                time.sleep(0.01)
                beside.done(1)
                beside._missing[1] += 1  # not there yet
        with pytest.raises(ValueError, match="no score"):
            beside.results()


def test_too_few_results_are_an_error() -> None:
    with Beside(lambda indices: indices[1:], 3, 3) as beside:
        for i in range(3):
            beside.done(i)
        with pytest.raises(ValueError, match="shorter"):
            beside.results()


def test_the_thread_ends_when_generation_fails() -> None:
    with pytest.raises(RuntimeError, match="engine"), Beside(lambda indices: indices, 2, 1) as beside:
        raise RuntimeError("engine")
    beside._thread.join(10)
    assert not beside._thread.is_alive()
