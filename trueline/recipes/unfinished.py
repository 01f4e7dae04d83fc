"""Answers on their way to a file. One rule: the file appears whole, and what was answered before a command ended early lies beside it."""

import json
import os
from pathlib import Path
from typing import Any, Self

from trueline.errors import UserError
from trueline.train.run import write_whole


class Unfinished:
    """Lines by number, kept beside `target` as they come. Only the same `work` finds them again: the name of all they are made from.

    UserError when nothing can be written there, before there is anything to lose.
    """

    def __init__(self, target: Path, work: str):
        if target.is_dir():
            raise UserError(f"--out {target} is a folder; name a file")
        self.target, self.place = target, target.with_name(f".{target.name}.{work}.unfinished")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.place.open("ab")
        except OSError as error:
            raise UserError(f"--out {target} cannot be written: {error.strerror}; name another place") from error
        self.lines: dict[int, Any] = {}
        read = 0
        for line in self.place.read_bytes().splitlines(keepends=True):
            try:
                number, found = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self.lines[number] = found
            read += len(line)
        os.truncate(self.place, read)  # a killed process leaves part of a line, a machine that lost its power worse

    def __enter__(self) -> Self:
        return self

    def add(self, number: int, line: Any) -> None:
        self.lines[number] = line
        self.file.write(json.dumps([number, line], ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def finish(self) -> None:
        """Puts all lines in their order into `target`, in place of what may be there."""
        write_whole(self.target, (json.dumps(self.lines[number], ensure_ascii=False) + "\n" for number in sorted(self.lines)))
        self.place.unlink(missing_ok=True)  # the same command may have run twice at once

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if not self.lines:
            self.place.unlink(missing_ok=True)
