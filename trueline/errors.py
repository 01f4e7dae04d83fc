"""The two ways a command ends badly, each with one sentence for the person who typed it.

`UserError` is a mistake in usage, configuration or data (exit code 2); `RunError` is a run that could not go on (exit code 1).
Neither is ever shown with a traceback.
"""

from collections.abc import Iterable


class UserError(Exception):
    """Wrong usage, configuration or data: what, where, what was expected, what to do. `problems` lists all of one kind."""

    exit_code = 2

    def __init__(self, message: str, problems: Iterable[str] = ()):
        self.problems = list(problems)
        super().__init__("\n".join([message, *(f"  {p}" for p in self.problems)]))


class RunError(Exception):
    """The run failed although it was asked for correctly: a full disk, a non-finite loss, a reward function that died."""

    exit_code = 1
