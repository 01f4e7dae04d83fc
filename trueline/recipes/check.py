"""`trueline check`: what is in data files, everything that is wrong with them, and one record as the model will see it.

Left out: repairing files, judging the quality of answers.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trueline.data.conversation import ROLES, Conversation, Message, Preference, Prompt
from trueline.data.formats import Located, equal_note, load_file
from trueline.data.record import Problems
from trueline.data.sample import Sample
from trueline.data.schemas import Use
from trueline.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from trueline.errors import UserError
from trueline.families.family import Family
from trueline.families.folder import open_folder, resolve
from trueline.families.peft import adapter_base, is_adapter

USES: dict[Use, str] = {"answer": "conversation", "pair": "pair", "prompt": "prompt"}
COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "observation": "yellow"}


@dataclass(frozen=True)
class Contents:
    """What one file holds."""

    path: str
    schema: str
    use: Use
    values: list[Located[Any]]


@dataclass(frozen=True)
class Renderer:
    """How a model writes conversations down."""

    family: Family
    tokenizer: Tokenizer

    def samples(self, value: Conversation | Preference | Prompt) -> dict[str, Sample]:
        """A value as training sees it, by the name of its part."""
        if isinstance(value, Conversation):
            return {"conversation": self.family.render(value, self.tokenizer)}
        if isinstance(value, Prompt):
            return {"prompt": self.family.render(value.conversation, self.tokenizer, open=True)}
        whole = {name: replace(value.prompt, messages=(*value.prompt.messages, getattr(value, name))) for name in ("chosen", "rejected")}
        return {name: self.family.render(conversation, self.tokenizer, last_only=True) for name, conversation in whole.items()}

    def serving(self, value: Conversation | Preference | Prompt) -> Sample:
        """The prompt of the last answer as generation sees it."""
        return self.family.render(_prompt_of(value), self.tokenizer, open=True)


def check(files: list[str], model: str | None, show: int | None, format: str = "auto") -> int:
    """Prints what the files hold; with `model` (a folder with config.json and tokenizer files) also how long that is in tokens.

    `show` prints the record of that number (from 1, over all files). Raises a UserError with every problem of every file, else returns 0.
    """
    console = Console(highlight=False)
    problems = Problems(keep=None)
    renderer = _renderer(model) if model is not None else None
    found = []
    for path in files:
        before, equal = problems.count, list[str]()
        schema, use, values = load_file(path, format, problems, equal)
        if not values and not equal and problems.count == before:
            problems.add(path, "no records, expected at least one")
        found.append(Contents(path, schema, use, values))
        _print_contents(console, found[-1], problems.count - before, equal)
        if renderer:
            _print_lengths(console, found[-1], renderer, problems)
    _print_repeats(console, found)
    if show is not None:
        _show(console, [located for contents in found for located in contents.values], show, renderer)
    problems.stop()
    return 0


def _renderer(model: str) -> Renderer:
    path = resolve(model)
    base = resolve(adapter_base(path)[0]) if is_adapter(path) else path
    return Renderer(open_folder(base).family, load_tokenizer(path if has_tokenizer(path) else base))


def _prompt_of(value: Conversation | Preference | Prompt) -> Conversation:
    """What stands before the last answer."""
    if isinstance(value, Conversation):
        last = max(i for i, m in enumerate(value.messages) if m.role != "assistant")
        return replace(value, messages=value.messages[: last + 1])
    return value.prompt if isinstance(value, Preference) else value.conversation


def _messages(value: Conversation | Preference | Prompt) -> tuple[Message, ...]:
    if isinstance(value, Preference):
        return (*value.prompt.messages, value.chosen, value.rejected)
    return value.messages if isinstance(value, Conversation) else value.conversation.messages


def _print_contents(console: Console, contents: Contents, broken: int, equal: list[str]) -> None:
    _say(console, f"{contents.path}: schema {contents.schema}, {counted(len(contents.values), USES[contents.use])}", "bold")
    for note in ([f"{counted(broken, 'problem')}, listed at the end"] if broken else []) + ([equal_note(equal)] if equal else []):
        _say(console, f"  {note}", "yellow")
    if not contents.values:
        return
    turns = Counter[str]()
    characters: dict[str, list[int]] = {role: [] for role in ROLES}
    for located in contents.values:
        for message in _messages(located.value):
            turns[message.role] += 1
            turns["tool call"] += message.tool is not None
            characters[message.role].append(len(message.content))
    table = _table("role", "turns", "per record", "median chars", "95 %", "longest", "total")
    for role in (role for role in ROLES if turns[role]):
        row = np.array(characters[role])
        share = f"{turns[role] / len(contents.values):.2f}"
        table.add_row(role, f"{turns[role]:,}", share, *_spread(row), f"{row.sum():,}")
    console.print(table)
    with_tools = sum(bool(_prompt_of(located.value).tools) for located in contents.values)
    if with_tools or turns["tool call"]:
        _say(console, f"  {counted(with_tools, 'record')} with tools, {counted(turns['tool call'], 'tool call')}")


def _print_lengths(console: Console, contents: Contents, renderer: Renderer, problems: Problems) -> None:
    """Tokens of each part, and texts that only look like control tokens."""
    lengths: dict[str, list[int]] = {}
    lookalikes: list[str] = []
    for located in contents.values:
        try:
            samples = renderer.samples(located.value)
        except UserError as error:
            problems.add(located.where, str(error))
            continue
        for name, sample in samples.items():
            lengths.setdefault(name, []).append(len(sample))
            if any(sample.trained):
                lengths.setdefault(f"{name}, trained", []).append(sum(sample.trained))
        text = "\n".join(message.content for message in _messages(located.value))
        lookalikes += [f"{located.where} {name}" for name in renderer.tokenizer.specials if name in text][:1]
    if lengths:
        table = _table("tokens", "records", "median", "95 %", "longest", "total")
        for name, row in lengths.items():
            table.add_row(name, f"{len(row):,}", *_spread(np.array(row)), f"{sum(row):,}")
        console.print(table)
        _say(console, f"  data.max_length of at least {max(max(row) for row in lengths.values()):,} keeps every record whole")
    if lookalikes:
        note = f"{counted(len(lookalikes), 'record')} with text that looks like a control token; it is encoded as plain text"
        _say(console, f"  {note}: {', '.join(lookalikes[:3])}", "yellow")


def _print_repeats(console: Console, found: list[Contents]) -> None:
    """Prompts that occur in more than one record: of one file, or of two (training and held-out data should share none)."""
    first: dict[tuple[Message, ...], Located[Any]] = {}
    repeats: dict[tuple[str, str], list[str]] = {}
    for contents in found:
        within = set[str]()  # several pairs of one record are no repetition
        for located in contents.values:
            if located.where in within:
                continue
            within.add(located.where)
            seen = first.setdefault(_prompt_of(located.value).messages, located)
            if seen is not located:
                files = (seen.where.rpartition(":")[0], contents.path)
                repeats.setdefault(files, []).append(f"{seen.where} and {located.where}")
    for (one, other), places in repeats.items():
        where = f"in {one}" if one == other else f"of {other} also in {one}"
        _say(console, f"{counted(len(places), 'prompt')} {where}{' more than once' if one == other else ''}: first {places[0]}", "yellow")


def _show(console: Console, values: list[Located[Any]], number: int, renderer: Renderer | None) -> None:
    if number > len(values):
        raise UserError(f"--show {number}: the files hold {len(values)} sound records; give a number from 1 to {len(values)}")
    located = values[number - 1]
    _say(console, f"\nrecord {number} of {len(values):,}, {located.where}", "bold")
    if renderer is None:
        for message in _messages(located.value):
            label = f"{message.role} calls {message.tool}" if message.tool else message.role
            console.print(Text.assemble((f"{label}: ", f"bold {COLOURS[message.role]}"), visible(message.content)), soft_wrap=True)
        return
    plain = console.color_system is None
    for name, sample in renderer.samples(located.value).items():
        _say(
            console, f"{name}: {len(sample)} tokens, {sum(sample.trained)} of them trained ({'in ⟦ ⟧' if plain else 'underlined'})", "bold"
        )
        console.print(coloured(sample, renderer.tokenizer, plain), soft_wrap=True)
    if not isinstance(located.value, Prompt):
        serving = renderer.serving(located.value)
        _say(console, f"when serving: {len(serving)} tokens", "bold")
        console.print(coloured(serving, renderer.tokenizer, plain), soft_wrap=True)


def coloured(sample: Sample, tokenizer: Tokenizer, plain: bool) -> Text:
    """Tokens in their role's colour, every second one dim so that their borders show; trained ones underlined, or `plain`, in ⟦ ⟧."""
    text, dim, inside = Text(), False, False
    names = {i: name for name, i in tokenizer.specials.items()}
    starts = [i for i, token in enumerate(sample.tokens) if i == 0 or token in names]
    for start, end in zip(starts, [*starts[1:], len(sample)], strict=True):
        ids, trained = sample.tokens[start:end], sample.trained[start:end]
        name = names.get(ids[0], "")
        opening = tokenizer.decode(ids)
        role = next((r for r in ROLES if r in name or opening.startswith(r)), "")  # <|user|>, or <|im_start|> and then user
        pieces = [(name, trained[0], "bold red")] if name else []
        pieces += [(visible(piece), on, COLOURS.get(role, "default")) for piece, on in _pieces(ids, trained, tokenizer)]
        for piece, on, colour in pieces:
            if plain and on != inside:
                text.append("⟦" if on else "⟧")
                inside = on
            text.append(piece, colour + " dim" * dim + " underline" * on)
            dim = not dim
    return text.append("⟧") if inside else text


def _pieces(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """`(text, trained)` token by token; several together where only together they are whole characters."""
    last, start = 0, 0  # where the last piece and this one begin: how a token reads may depend on the one before
    for i, on in enumerate(trained):
        before, whole = tokenizer.decode(ids[last:start]), tokenizer.decode(ids[last : i + 1])
        halved = whole.endswith("\ufffd") and trained[i + 1 : i + 2] == [on]
        if len(whole) > len(before) and not halved:
            yield whole[len(before) :], on
            last, start = start, i + 1


def counted(number: int, name: str) -> str:
    """`1 pair`, `2,000 pairs`."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def visible(text: str) -> str:
    """Text that cannot command the terminal: control characters and direction marks by their number, all but line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t\u3000\u00a0" else f"\\x{ord(c):02x}" for c in text)


def _say(console: Console, line: str, style: str = "") -> None:
    """One line as it is: paths are not broken, and brackets in them mean nothing."""
    console.print(Text(visible(line), style=style), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _spread(row: "np.ndarray[Any, Any]") -> tuple[str, str, str]:
    """Median, 95th percentile (both of values that occur) and maximum."""
    middle, high = np.percentile(row, [50, 95], method="higher")
    return f"{middle:,}", f"{high:,}", f"{row.max():,}"
