"""What is in data, counted while it streams by, and what looks wrong with it although it can be read.

One rule: memory does not grow with the text. Lengths are counted by value, texts are remembered as eight bytes each.
"""

import json
import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from trueline.data.conversation import Conversation, Message, Preference, Prompt

Value = Conversation | Preference | Prompt
CONTROL = re.compile(
    r"<\|[A-Za-z_▁0-9]+\|>|\[(?:g|s)?MASK\]|<(?:sop|eop|pad|unk|s|/s|bos|eos)>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
"""Control tokens as published models write them."""
SCRIPTS = {
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "Han": re.compile(r"[\u3400-\u9fff]"),
    "kana": re.compile(r"[\u3040-\u30ff]"),
    "Hangul": re.compile(r"[\uac00-\ud7af]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
}
_LETTERS = re.compile(r"[A-Za-z]")
LOOKED_AT = 200
"""Characters of a text that its script is told from."""
FEWEST_LETTERS = 8


class Lengths:
    """Numbers counted by value, so that quantiles are exact in little memory."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        """One more."""
        self.counts[length] += 1

    def quantile(self, share: float) -> int:
        """The smallest value that occurs and has at least that share of the others at or below it."""
        rank, passed = math.ceil(share * (self.counts.total() - 1)), 0
        for value in sorted(self.counts):
            passed += self.counts[value]
            if passed > rank:
                return value
        return 0

    def total(self) -> int:
        """The sum."""
        return sum(value * count for value, count in self.counts.items())


@dataclass
class Places:
    """In how many records something occurs, and in which first."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    last: int = 0


class Findings:
    """What one file holds. `control` finds text that looks like a control token, `markup` what a tokenizer reads as markup."""

    def __init__(self, path: str, control: re.Pattern[str] = CONTROL, markup: re.Pattern[str] | None = None):
        self.path, self.control, self.markup = path, control, markup
        self.values = 0
        self.turns: Counter[str] = Counter()
        self.characters: dict[str, Lengths] = {}
        self.calls = self.with_tools = 0
        self.warnings: dict[str, Places] = {}
        self.longer_chosen = self.longer_rejected = 0
        self.prompts, self.records, self.lines = array("q"), array("q"), array("q")

    def add(self, value: Value, line: int) -> None:
        """Counts one value of the record at `line`."""
        self.values += 1
        prompt, answers = parts(value)
        for message in (*prompt.messages, *answers):
            role = message.role
            self.turns[role] += 1
            self.calls += message.tool is not None
            lengths = self.characters.get(role)
            if lengths is None:
                lengths = self.characters[role] = Lengths()
            lengths.counts[len(message.content)] += 1
            self._look_for_markup(message.content, line)
        if prompt.tools:
            self.with_tools += 1
            self._look_for_markup(json.dumps(prompt.tools, ensure_ascii=False), line)
        if not self.lines or self.lines[-1] != line:  # several pairs of one record are no repetition
            texts = tuple([m.content for m in prompt.messages])
            self.prompts.append(hash(texts))
            self.records.append(hash((texts, tuple([m.content for m in answers]))))
            self.lines.append(line)
        self._look_at_answers(prompt, answers, line)
        if isinstance(value, Preference):
            chosen, rejected = len(value.chosen.content), len(value.rejected.content)
            self.longer_chosen += chosen > rejected
            self.longer_rejected += rejected > chosen
            for name, length in (("chosen", chosen), ("rejected", rejected)):
                self.characters.setdefault(name, Lengths()).add(length)

    def _look_for_markup(self, text: str, line: int) -> None:
        if self.control is CONTROL and "<" not in text and "[" not in text:
            return  # most texts, and faster
        for name, pattern in (("control", self.control), ("markup", self.markup)):
            if pattern and (found := pattern.search(text)):
                self._warn(name, line, " " + found.group())

    def _look_at_answers(self, prompt: Conversation, answers: tuple[Message, ...], line: int) -> None:
        asked = ""
        for answer in answers:
            if answer.tool is not None:
                continue
            text = answer.content
            if len(text) < 16 and (len(text.strip()) < 2 or not any(c.isalnum() for c in text)):
                self._warn("short", line, "")
            elif len(text) >= FEWEST_LETTERS:
                asked = asked or script(prompt.messages[-1].content) or "?"
                answered = script(text)
                if answered and asked != "?" and answered != asked and {asked, answered} != {"Han", "kana"}:
                    self._warn("script", line, f" ({asked} and {answered})")

    def _warn(self, kind: str, line: int, what: str) -> None:
        places = self.warnings.setdefault(kind, Places())
        if places.last != line:
            places.count, places.last = places.count + 1, line
            places.first += [f"{self.path}:{line}{what}"] if len(places.first) < 3 else []


def parts(value: Value) -> tuple[Conversation, tuple[Message, ...]]:
    """The prompt, and what answers it: the last turns of a conversation, both sides of a preference."""
    if isinstance(value, Preference):
        return value.prompt, (value.chosen, value.rejected)
    if isinstance(value, Prompt):
        return value.conversation, ()
    messages = value.messages
    count = len(messages)
    while count and messages[count - 1].role == "assistant":
        count -= 1
    return Conversation(messages[:count], value.tools), messages[count:]


def script(text: str) -> str:
    """The script most letters at the head of a text are of; "" when there are too few to tell."""
    head = text[:LOOKED_AT]
    if head.isascii():
        return "Latin" if len(_LETTERS.findall(head, 0, 40)) >= FEWEST_LETTERS else ""
    if not SCRIPTS["kana"].search(head):
        chinese = len(SCRIPTS["Han"].findall(head))
        if chinese >= max(FEWEST_LETTERS, len(head) / 2):
            return "Han"
    counts = {name: len(letters.findall(head)) for name, letters in SCRIPTS.items()}
    name = max(counts, key=lambda name: counts[name])
    return name if counts[name] >= FEWEST_LETTERS and counts[name] > 0.6 * sum(counts.values()) else ""


@dataclass(frozen=True)
class Repeats:
    """How many texts of `file` were in `first_file` before (the same one, or an earlier), and where the first was and is."""

    first_file: str
    file: str
    count: int
    places: tuple[str, str]


def find_repeats(found: list[Findings], what: str) -> list[Repeats]:
    """Repeated `prompts` or `records`, within and between files; by 64-bit hashes, so a false one is next to impossible."""
    hashes = np.concatenate([np.frombuffer(getattr(f, what), dtype=np.int64) for f in found] or [np.zeros(0, np.int64)])
    lines = np.concatenate([np.frombuffer(f.lines, dtype=np.int64) for f in found] or [np.zeros(0, np.int64)])
    files = np.repeat(np.arange(len(found)), [len(f.lines) for f in found])
    order = np.argsort(hashes, kind="stable")
    new = np.ones(len(order), dtype=bool)
    new[1:] = hashes[order[1:]] != hashes[order[:-1]]
    start = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    first, later = order[start[~new]], order[~new]
    repeats = []
    for one in range(len(found)):
        for other in range(one, len(found)):
            here = (files[first] == one) & (files[later] == other)
            if here.any():
                at = int(np.flatnonzero(here)[np.argmin(later[here])])
                places = (f"{found[one].path}:{lines[first[at]]}", f"{found[other].path}:{lines[later[at]]}")
                repeats.append(Repeats(found[one].path, found[other].path, int(here.sum()), places))
    return repeats
