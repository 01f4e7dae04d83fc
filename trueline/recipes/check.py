"""`trueline check`: what is in data files, everything that is wrong with them, and one record as the model will see it.

Left out: judging the quality of answers.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trueline.data.conversation import ROLES
from trueline.data.files import MINDRECORD, PACKED, find_files, suffix
from trueline.data.formats import FileValues, Located, equal_note
from trueline.data.lint import CONTROL, Findings, Lengths, Value, find_repeats
from trueline.data.record import Problems
from trueline.data.repair import repair
from trueline.data.schemas import Use
from trueline.errors import UserError
from trueline.recipes.show import Renderer, open_renderer, print_record, visible, write_page

USES: dict[Use, str] = {"answer": "conversation", "pair": "pair", "prompt": "prompt"}
LISTED = 10_000
"""Problems that are shown; more are counted."""
LONGER_WINS = 0.65
"""Share of pairs whose chosen answer is the longer one, from which on that is said in yellow."""
WARNINGS = {
    "control": "text that looks like a control token; it is encoded as plain text",
    "markup": "text that this model's tokenizer reads as markup, whoever typed it",
    "short": "an answer that says next to nothing",
    "script": "an answer in another script than its prompt",
}


class Shown:
    """The record that `--show` asked for, caught while the values pass by."""

    def __init__(self, number: int | None):
        self.number = number
        self.passed = 0
        self.located: Located[Value] | None = None

    def look_at(self, located: Located[Value]) -> None:
        """Keeps the value if it is the one."""
        self.passed += 1
        if self.passed == self.number:
            self.located = located


def check(
    files: list[str],
    model: str | None,
    show: int | None,
    format: str = "auto",
    fix: str | None = None,
    quarantine: str | None = None,
    html: str | None = None,
    template: str = "auto",
) -> int:
    """Prints what the files hold; with `model` (a folder with config.json and tokenizer files) also how long that is in tokens.

    `show` prints the record of that number (from 1, over all files), `html` also writes it as a page. `quarantine` is a folder for copies
    of the bad records; `fix` a folder (or one .jsonl file) for corrected copies, which are then what is checked.
    Raises a UserError with every problem of every file, else returns 0.
    """
    console = Console(highlight=False)
    if html is not None and show is None:
        raise UserError("--html needs --show N, the record to write")
    renderer = open_renderer(model, template) if model is not None else None
    paths = [file for found in find_files(files) for file in found]
    if fix is not None:
        paths = _repair_all(console, paths, format, fix, quarantine)
    problems, shown = Problems(keep=LISTED), Shown(show)
    found = [_check_file(console, path, format, renderer, problems, shown) for path in paths]
    _print_repeats(console, found)
    if quarantine is not None and fix is None and problems.count:
        _set_aside(console, paths, format, quarantine)
    if show is not None:
        if shown.located is None:
            raise UserError(f"--show {show}: the files hold {shown.passed} sound records; give a number from 1 to {shown.passed}")
        title = f"record {show} of {shown.passed:,}, {shown.located.where}"
        _say(console, f"\n{title}", "bold")
        print_record(console, shown.located, renderer)
        if html is not None:
            write_page(html, title, shown.located, renderer)
    problems.stop()
    return 0


def _check_file(console: Console, path: str, format: str, renderer: Renderer | None, problems: Problems, shown: Shown) -> Findings:
    before, equal = problems.count, list[str]()
    values = FileValues[Any](path, format, problems, equal, renderer.tokenizer if renderer else None)
    control, markup = (_any_of(renderer.tokenizer.specials), _any_of(renderer.tokenizer.markup)) if renderer else (None, None)
    findings, lengths = Findings(path, control or CONTROL, markup), dict[str, Lengths]()
    for located in values:
        findings.add(located.value, located.line)
        shown.look_at(located)
        if renderer is not None:
            _measure(located, renderer, lengths, problems)
    if not findings.values and not equal and problems.count == before:
        problems.add(path, "no records, expected at least one")
    _print_contents(console, findings, values.schema, values.use, problems.count - before, equal)
    if lengths:
        _print_lengths(console, lengths)
    return findings


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, names))) if names else None


def _measure(located: Located[Any], renderer: Renderer, lengths: dict[str, Lengths], problems: Problems) -> None:
    """Tokens of each part of a value."""
    try:
        samples = renderer.samples(located.value)
    except UserError as error:
        problems.add(located.where, str(error))
        return
    for name, sample in samples:
        lengths.setdefault(name, Lengths()).add(len(sample))
        if any(sample.trained):
            lengths.setdefault(f"{name}, trained", Lengths()).add(sum(sample.trained))


def _print_contents(console: Console, findings: Findings, schema: str, use: Use, broken: int, equal: list[str]) -> None:
    _say(console, f"{findings.path}: schema {schema}, {counted(findings.values, USES[use])}", "bold")
    for note in ([f"{counted(broken, 'problem')}, listed at the end"] if broken else []) + ([equal_note(equal)] if equal else []):
        _say(console, f"  {note}", "yellow")
    if not findings.values:
        return
    table = _table("role", "turns", "per record", "median chars", "95 %", "longest", "total")
    for role in (role for role in ROLES if findings.turns[role]):
        turns = findings.turns[role]
        table.add_row(role, f"{turns:,}", f"{turns / findings.values:.2f}", *_spread(findings.characters[role]))
    console.print(table)
    if findings.with_tools or findings.calls:
        _say(console, f"  {counted(findings.with_tools, 'record')} with tools, {counted(findings.calls, 'tool call')}")
    if use == "pair":
        _print_length_bias(console, findings)
    for name, sentence in WARNINGS.items():
        if name in findings.warnings:
            places = findings.warnings[name]
            _say(console, f"  {counted(places.count, 'record')} with {sentence}: {', '.join(places.first)}", "yellow")


def _print_length_bias(console: Console, findings: Findings) -> None:
    longer, shorter = findings.longer_chosen, findings.longer_rejected
    share, ties = longer / findings.values, findings.values - longer - shorter
    medians = [findings.characters[name].quantile(0.5) for name in ("chosen", "rejected")]
    rule = (longer + ties / 2) / findings.values
    sentence = (
        f"chosen is the longer answer in {share:.0%} of the pairs (median {medians[0]:,} and {medians[1]:,} characters); "
        f'"the longer one wins" would be right in {rule:.0%}'
    )
    _say(console, f"  {sentence}", "yellow" if share >= LONGER_WINS else "")


def _print_lengths(console: Console, lengths: dict[str, Lengths]) -> None:
    table = _table("tokens", "records", "median", "95 %", "longest", "total")
    for name, row in lengths.items():
        table.add_row(name, f"{row.counts.total():,}", *_spread(row))
    console.print(table)
    longest = max(max(row.counts) for row in lengths.values())
    _say(console, f"  data.max_length of at least {longest:,} keeps every record whole")


def _print_repeats(console: Console, found: list[Findings]) -> None:
    """Prompts and records that occur more than once, in one file or in two (training and held-out data should share none)."""
    for what, name in (("prompts", "prompt"), ("records", "record")):
        for repeat in find_repeats(found, what):
            within = repeat.first_file == repeat.file
            where = f"in {repeat.file}" if within else f"of {repeat.file} also in {repeat.first_file}"
            places = f"first {repeat.places[0]} and {repeat.places[1]}"
            _say(console, f"{counted(repeat.count, name)} {where}{' more than once' if within else ''}: {places}", "yellow")


def _repair_all(console: Console, paths: list[str], format: str, fix: str, quarantine: str | None) -> list[str]:
    """Writes corrected copies, and returns their paths."""
    single = Path(fix).suffix == ".jsonl"
    if single and len(paths) != 1:
        raise UserError(f"--fix {fix}: one file for {len(paths)} files; name a folder")
    copies, left = [], list[str]()
    for path, name in zip(paths, _names(paths), strict=True):
        if suffix(path) in ("", MINDRECORD) or not Path(path).is_file():
            left.append(f"{path}: expected a data file of text")
            continue
        out = Path(fix) if single else Path(fix) / name
        if out.exists() and out.samefile(path):
            raise UserError(f"--fix {fix}: {out} is the file itself; name another folder")
        done = repair(path, format, out, Path(quarantine) / name if quarantine is not None else None)
        if done.aside and quarantine is None:
            left += done.reasons
            continue
        _say(console, f"{path}: {counted(done.copied, 'record')} copied to {out}", "bold")
        for kind, count in sorted((+done.fixes).items()):
            _say(console, f"  fixed {count:,} x {kind}")
        if done.aside:
            _say(console, f"  {counted(done.aside, 'record')} set aside in {quarantine}", "yellow")
        copies.append(str(out))
    if left:
        advice = "correct them, or add --quarantine DIR to leave them out of the copy"
        raise UserError(f"{counted(len(left), 'problem')} cannot be fixed without a choice; {advice}:", left[:LISTED])
    return copies


def _set_aside(console: Console, paths: list[str], format: str, quarantine: str) -> None:
    for path, name in zip(paths, _names(paths), strict=True):
        if suffix(path) not in ("", MINDRECORD) and Path(path).is_file():
            done = repair(path, format, None, Path(quarantine) / name)
            if done.aside:
                _say(console, f"{path}: {counted(done.aside, 'bad record')} copied to {Path(quarantine) / name}", "yellow")


def _names(paths: list[str]) -> list[str]:
    """A file name for each path's copy; two of one name would overwrite each other."""
    names = [f"{Path(Path(path).name.removesuffix(PACKED)).stem}.jsonl" for path in paths]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UserError(f"several files would be written as {doubled}; check them one by one")
    return names


def counted(number: int, name: str) -> str:
    """`1 pair`, `2,000 pairs`."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _say(console: Console, line: str, style: str = "") -> None:
    """One line as it is: paths are not broken, and brackets in them mean nothing."""
    console.print(Text(visible(line), style=style), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _spread(row: Lengths) -> tuple[str, str, str, str]:
    """Median, 95th percentile (both of values that occur), maximum and sum."""
    return f"{row.quantile(0.5):,}", f"{row.quantile(0.95):,}", f"{max(row.counts):,}", f"{row.total():,}"
