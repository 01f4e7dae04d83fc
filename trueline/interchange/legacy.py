"""Other programs' configurations, one key at a time. The rule: every key that was written ends in exactly one place: moved, dropped with
its reason, or unknown. Nothing here knows any program; `legacy_glm4`, `legacy_mindrlhf` and `legacy_chatglm` do."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.config.source import OVERRIDE, Written, read_file, read_override
from trueline.errors import UserError
from trueline.interchange.legacy_launch import ARGUMENTS, NAMED, name_arguments

TARGETS: dict[str, tuple[str, ...]] = {
    "query_key_value": ("q", "k", "v"),
    "dense": ("o",),
    "dense_h_to_4h": ("gate", "up"),
    "gate_up_proj": ("gate", "up"),
    "dense_4h_to_h": ("down",),
    **{f"{name}_proj": (name,) for name in ("q", "k", "v", "o", "gate", "up", "down")},
    "all-linear": ("q", "k", "v", "o", "gate", "up", "down"),
}


@dataclass(frozen=True)
class Old:
    """One key as it was written: `training_args.max_steps`, its value, `lora.yaml:12`."""

    name: str
    value: Any
    where: str


@dataclass
class Conversion:
    """What became of the old keys, and what there is instead. `known` are our keys for this stage; `title` names the old program."""

    title: str
    stage: str
    known: frozenset[str]
    olds: dict[str, Old]
    settings: dict[str, Any] = field(default_factory=dict)
    moved: list[tuple[Old, str, Any, str]] = field(default_factory=list)  # old, new key, its value, a remark
    dropped: list[tuple[Old, str]] = field(default_factory=list)  # old, why
    added: list[tuple[str, Any, str]] = field(default_factory=list)  # new key, value, why
    warnings: list[str] = field(default_factory=list)
    evaluate: dict[str, Any] = field(default_factory=dict)  # settings of the `trueline evaluate` that follows

    def get(self, name: str, default: Any = None) -> Any:
        """The value that was written; the key is not used up by this."""
        old = self.olds.get(name)
        return default if old is None or old.value is None else old.value

    def number(self, name: str, default: float) -> float:
        """As `get`, for a key that has to be a number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.olds[name].where}: {name}: found {value!r}, expected a number")
        return value

    def move(self, name: str, new: str, convert: Callable[[Any], Any] = lambda value: value, remark: str = "") -> None:
        """`name` becomes `new`; dropped where it says nothing, or where this stage has no such key."""
        old = self.olds.get(name)
        if old is None:
            return
        if old.value is None or old.value == "":
            self.drop(name, "says nothing")
        elif new not in self.known:
            self.drop(name, f"not used by `trueline {self.stage}`")
        else:
            self._spend(name)
            self.settings[new] = convert(old.value)
            self.moved.append((old, new, self.settings[new], remark))

    def part(self, name: str, new: str, remark: str) -> None:
        """`name` went, with others, into the value `new` already has."""
        if name in self.olds:
            self.moved.append((self._spend(name), new, self.settings[new], remark))

    def drop(self, name: str, why: str) -> None:
        if name in self.olds:
            self.dropped.append((self._spend(name), why))

    def follow(self, name: str, new: str) -> None:
        """`name` becomes a setting of the `trueline evaluate` that follows the training."""
        if name in self.olds:
            old = self._spend(name)
            self.evaluate[new] = old.value
            self.dropped.append((old, f"for the evaluation afterwards: {new}={written(old.value)}"))

    def add(self, new: str, value: Any, why: str) -> None:
        """A setting that the old file does not hold but the old program had; what was moved there stays."""
        if new in self.known and new not in self.settings:
            self.settings[new] = value
            self.added.append((new, value, why))

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)

    def drop_all(self, reasons: Mapping[str, str]) -> None:
        """Drops what is left of each named key or section; of several that fit, the longest name says why."""
        for name in list(self.olds):
            fitting = [key for key in reasons if name == key or name.startswith((key + ".", key + "["))]
            if fitting:
                self.drop(name, reasons[max(fitting, key=len)])

    @property
    def unknown(self) -> list[Old]:
        """The keys that nothing has used."""
        return list(self.olds.values())

    def _spend(self, name: str) -> Old:
        return self.olds.pop(name)


def by_reason(reasons: Mapping[str, str]) -> dict[str, str]:
    """Why each key is dropped, from the keys (with spaces between) of each reason."""
    return {name: why for why, names in reasons.items() for name in names.split()}


def written(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(written(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def projections(value: Any) -> list[str]:
    """Old names of the matrices that carry a LoRA (a list, or text with commas) as ours, in the order q k v o gate up down."""
    names = value if isinstance(value, list) else str(value).split(",")
    strange = [str(name) for name in names if str(name).strip() not in TARGETS]
    if strange:
        raise UserError(f"LoRA on {', '.join(strange)}: no such projection, known are {', '.join(TARGETS)}")
    wanted = {target for name in names for target in TARGETS[str(name).strip()]}
    return [target for target in TARGETS["all-linear"] if target in wanted]


def read_old(files: Sequence[str], notes: list[str]) -> tuple[dict[str, list[Old]], str]:
    """Every key of the files and of the `key=value` arguments among them, in order, by name; and the scripts' names in one text.

    Files that these name (`NAMED`) are read too, where they are: beside the working folder, or beside the file that names them.
    """
    found: dict[str, list[Old]] = {}
    scripts = []
    for given in files:
        if OVERRIDE.fullmatch(given) and not Path(given).exists():
            items = _leaves(read_override(given, notes), "")
        elif Path(given).suffix in (".yaml", ".yml", ".json"):
            items = _leaves(read_file(given, notes), "")
        else:
            items, names = _read_text(given, notes)
            scripts += names
        for item in items:
            found.setdefault(item.name, []).append(item)
    known = {Path(file).resolve() for file in files}
    for naming in [old for key in NAMED for old in found.get(key, []) if old.value]:
        path = _named_file(naming)
        if path is None and not NAMED[naming.name]:
            notes.append(f"{naming.where}: {naming.name} {naming.value} is not here, so its keys are not in this; give it too")
        elif path is not None and path.resolve() not in known:
            known.add(path.resolve())
            for item in _leaves(read_file(path, notes), ""):
                found.setdefault(item.name, []).append(item)
    return found, " ".join(scripts)


def _named_file(old: Old) -> Path | None:
    """The file that a key names, if it is there."""
    paths = [place / str(old.value) / NAMED[old.name] for place in (Path(), Path(old.where.rpartition(":")[0]).parent)]
    return next((path for path in paths if path.is_file()), None)


def _leaves(tree: Written, name: str) -> list[Old]:
    value = tree.value
    if isinstance(value, dict) and value:
        return [old for key, item in value.items() for old in _leaves(item, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and any(isinstance(item.value, dict) for item in value):
        return [old for i, item in enumerate(value) for old in _leaves(item, f"{name}[{i}]")]
    place = tree.origin if tree.origin.startswith("override ") else tree.origin.rpartition(":")[0]  # the line, without the column
    return [Old(name, _plain(tree.plain()), place)]


def _plain(value: Any) -> Any:
    """The words of older YAML and of Python that are no text."""
    return {"None": None, "yes": True, "no": False, "on": True, "off": False}.get(value, value) if isinstance(value, str) else value


def _scalar(text: str) -> Any:
    """A value as Python or a shell writes it; None for a shell's variable that nothing sets."""
    if re.fullmatch(r"\$\{?\w+\}?", text):
        return None
    try:
        return _plain(read_override(f"value={text}", []).value["value"].plain())
    except UserError:
        return text


def _read_text(path: str, notes: list[str]) -> tuple[list[Old], list[str]]:
    """A command with `--flag value` arguments or a known script's, or lines like `kl_coef: float = 0.02`; the Python files it calls."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    variables: dict[str, str] = {}
    found: list[Old] = []
    scripts: list[str] = []
    flag: Old | None = None
    called: str | None = None  # a script whose arguments follow
    arguments: list[tuple[str, str]] = []
    held = ""  # lines inside a quote
    for number, line in enumerate(text.splitlines(), 1):
        line, held = held + line, ""
        setting = re.match(r"\s*(?:export\s+)?(\w+)\s*(?::\s*[\w\[\], .|]+?)?\s*=\s*([^=\s].*?)\s*(?:#.*)?$", line)
        if setting and "--" not in line and ".py" not in line:
            default = re.fullmatch(r"['\"]?\$\{\w+:-(.*)\}['\"]?", setting[2])
            variables[setting[1]] = (default[1] if default else setting[2]).strip("'\"")
            shell = path.endswith(".sh") or setting[1].isupper() or line.lstrip().startswith("export ")
            if not shell:  # a shell's variable is no key
                found.append(Old(setting[1], _scalar(setting[2]), f"{path}:{number}"))
            continue
        words = _words(line, f"{path}:{number}")
        if words is None:
            held = line.rstrip().removesuffix("\\") + " "
            continue
        for word in words:
            value = re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name[1], name[0]), word)
            if called:
                arguments.append((value, f"{path}:{number}"))
            elif Path(word).name in ARGUMENTS:
                called = Path(word).name
            elif word.startswith("--"):
                found += [flag] if flag else []
                name, joined, given = value[2:].partition("=")
                flag = Old(name, _scalar(given) if joined else True, f"{path}:{number}")
                if joined:  # what follows is no value of it
                    found, flag = [*found, flag], None
            elif flag:
                found.append(Old(flag.name, _scalar(value), flag.where))
                flag = None
            elif word.endswith(".py"):
                scripts.append(Path(word).name)
        if called and not line.rstrip().endswith("\\"):
            names = name_arguments(called, [value for value, _ in arguments], notes, f"{path}:{number}")
            found += [Old(name, _scalar(value), where) for name, (value, where) in zip(names, arguments, strict=True)]
            called, arguments = None, []
    return found + ([flag] if flag else []), scripts


def _words(line: str, where: str) -> list[str] | None:
    """A line's words, those of a command in quotes too; None inside such a quote."""
    try:
        words = [word for word in shlex.split(line.rstrip().removesuffix("\\"), comments=True) if word]
        return [part for word in words for part in (shlex.split(word) if " --" in word else [word])]
    except ValueError:
        if line.rstrip().endswith("\\"):
            return None
        raise UserError(f"{where}: a quote that does not end on its line") from None
