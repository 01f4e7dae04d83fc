"""One record of a data file and the place it stands at; and everything that is wrong with the records, with the same places."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trueline.errors import UserError


@dataclass(slots=True)
class Record:
    """One object of a data file. `line` and `column` are where it starts, from 1 (Parquet: its row); `text` is how it is written there.

    `locate` finds a field in `text`.
    """

    file: str
    line: int
    value: dict[str, Any]
    text: str = ""
    column: int = 1
    locate: Callable[[str, str], int] | None = None

    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"

    def place(self, field: str) -> str:
        """`file:line:column` of the field's value; of what should hold it when it is missing. Without text `file:line`."""
        if self.locate is None or not self.text:
            return self.where()
        at = self.locate(self.text, field)
        return place_of(self.file, self.line, self.column, self.text, at)


class Problems:
    """What is wrong with the data, collected over all files; memory stays flat because only the first `keep` sentences are held.

    `told` is given every sentence as it comes; `records` holds file, line and column of the records that are bad.
    """

    def __init__(self, keep: int | None = 50):
        self.keep = keep
        self.count = 0
        self.lines: list[str] = []
        self.told: Callable[[str], None] | None = None
        self.records: set[tuple[str, int, int]] = set()

    def add(self, where: str, what: str, field: str = "", record: tuple[str, int, int] | None = None) -> None:
        """`where` is "file" or "file:line[:column]"; `what` says what was found and what was expected; `record`: where it starts."""
        self.count += 1
        sentence = f"{where}: {field}: {what}" if field else f"{where}: {what}"
        if self.keep is None or len(self.lines) < self.keep:
            self.lines.append(sentence)
        if self.told is not None:
            self.told(sentence)
            if record is not None:
                self.records.add(record)

    def mark(self, record: tuple[str, int, int]) -> None:
        """One more record that is bad for a reason already told."""
        if self.told is not None:
            self.records.add(record)

    def listed(self) -> list[str]:
        """The sentences held, and how many more there are."""
        more = self.count - len(self.lines)
        return self.lines + ([f"... and {more} more"] if more else [])

    def stop(self) -> None:
        """Raises one UserError with everything that was added; does nothing when nothing was."""
        if self.count:
            what = "1 problem" if self.count == 1 else f"{self.count} problems"
            raise UserError(f"{what} in the data; correct the records named here:", self.listed())


def place_of(path: str, line: int, column: int, text: str, at: int) -> str:
    """`file:line:column` of character `at` of a text that starts at `line` and `column`."""
    breaks = text.count("\n", 0, at)
    return f"{path}:{line + breaks}:{at - text.rfind(chr(10), 0, at) if breaks else column + at}"


def kind(value: Any) -> str:
    """A JSON value's type in words, for messages."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for known, name in names.items() if isinstance(value, known)), type(value).__name__)
