"""Work on answers while others are still generated, in a thread. One rule: what the work gives does not depend on when it was done."""

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """Hands `count` numbered items to `work` as they come in, whole groups of `group` neighbours only, and as many groups as are there.

    `work` is called with ascending indices and returns one result for each. With `group` = `count` it is called once, with all of them.

    >>> with Beside(lambda indices: [i * i for i in indices], 4, 2) as beside:
    ...     for i in (3, 0, 2, 1):
    ...         beside.done(i)
    ...     beside.results()
    [0, 1, 4, 9]
    """

    def __init__(self, work: Callable[[list[int]], list[T]], count: int, group: int):
        self.work, self.count, self.group = work, count, group
        self.seconds = 0.0  # spent in `work`
        self._missing = [min(group, count - start) for start in range(0, count, group)]
        self._ready: SimpleQueue[int | None] = SimpleQueue()  # complete groups; None: no more will come
        self._found: dict[int, T] = {}
        self._error: BaseException | None = None
        # a daemon: work that never returns must not hold up the end of the run
        self._thread = threading.Thread(target=self._run, name="beside", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def done(self, index: int) -> None:
        """Item `index` is there. Raises what the work has raised so far: there is no point in generating the rest."""
        if self._error is not None:
            raise self._error
        group = index // self.group
        self._missing[group] -= 1
        if not self._missing[group]:
            self._ready.put(group)

    def results(self) -> list[T]:
        """Waits for what is still to do -> one result for each item, in order. Raises what the work has raised."""
        self._ready.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return [self._found[i] for i in range(self.count)]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ready.put(None)

    def _run(self) -> None:
        groups: list[int | None] = []
        try:
            while None not in groups:
                groups = self._take()
                starts = sorted(g * self.group for g in groups if g is not None)
                indices = [i for start in starts for i in range(start, min(start + self.group, self.count))]
                if indices:
                    began = time.perf_counter()
                    self._found |= zip(indices, self.work(indices), strict=True)
                    self.seconds += time.perf_counter() - began
        except BaseException as error:  # raised again where the results are wanted
            self._error = error

    def _take(self) -> list[int | None]:
        """Waits for a group, and takes those that are there by then."""
        taken = [self._ready.get()]
        try:
            while True:
                taken.append(self._ready.get_nowait())
        except Empty:
            return taken
