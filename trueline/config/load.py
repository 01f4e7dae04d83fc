"""Files and settings to a schema, and back to a file. The rule: one UserError lists all problems, each with the place it was written at."""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from trueline.config.describe import Key, describe
from trueline.config.schema import STAGES, Config
from trueline.config.source import Written, found, from_python, merge, read_file, read_override, write
from trueline.errors import UserError

C = TypeVar("C", bound=Config)
Location = tuple[str | int, ...]


def load_config(schema: type[C], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> C:
    """YAML files from left to right, then `key.path=value` settings in order, the later over the earlier.

    Relative paths in values are left as they are and so start at the current directory.

    Raises:
        UserError: lists every problem as `file:line:column: dotted.key: what, expected` (or `override key=value: ...`).
    """
    problems: list[str] = []
    unreadable: list[str] = []
    tree = Written({}, str(files[0]) if files else "configuration")
    readers = [partial(read_file, file) for file in files] + [partial(read_override, text) for text in overrides]
    for read in readers:
        try:
            tree = merge(tree, read(problems))
        except UserError as error:
            unreadable.append(str(error))
    if unreadable:  # what is missing elsewhere cannot be told
        raise _error(unreadable + problems)
    return _validate(schema, tree, problems)


def told_stage(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> str:
    """The one training stage whose sections the configuration has; UserError when they tell of none, or of several."""
    problems: list[str] = []
    named: set[str] = set()
    for read in [partial(read_file, file) for file in files] + [partial(read_override, text) for text in overrides]:
        tree = read(problems).value
        named |= set(tree) if isinstance(tree, dict) else set()
    own = {"reward": {"ranking"}, "dpo": {"dpo"}, "ppo": {"ppo", "critic", "reward", "rollout", "sampling"}}
    told = [stage for stage, sections in own.items() if sections & named]
    if len(told) == 1:
        return told[0]
    if told == [] and "reference" in named:
        return "dpo"
    found = f"has sections of {' and '.join(told)}" if told else "has no section of one stage alone"
    raise UserError(f"the configuration {found}, so it cannot be told what to prepare it for; add --stage sft, reward, dpo or ppo")


def from_any(schema: type[C], config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> C:
    """The Python interface's configuration: a YAML file's path, a dictionary, or the schema's own instance. Errors as `load_config`'s."""
    if isinstance(config, schema):
        return config
    if isinstance(config, str | os.PathLike):
        return load_config(schema, [Path(config)])
    if isinstance(config, Mapping):
        return _validate(schema, from_python(config, "config"), [])
    raise UserError(f"expected a YAML file, a dictionary or a {schema.__name__}, found a {type(config).__name__}")


def to_yaml(config: Config) -> str:
    """Every key with its value, in the schema's order, as text that loads to an equal object."""
    return write(config.model_dump(mode="json"))


def save_config(config: Config, path: str | Path) -> None:
    """Every key with its value, in the schema's order, so that loading the file gives an equal object. Written beside and renamed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(to_yaml(config))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _validate(schema: type[C], tree: Written, problems: list[str]) -> C:
    """Checks again without what was refused and with what is missing filled in, so that one mistake does not hide another."""
    problems = list(problems)
    refused: set[str] = set()
    tree = _known_part(schema, schema, tree, "", problems, refused)
    config: C | None = None
    for _ in range(3):
        try:
            config = schema.model_validate(tree.plain())
            break
        except ValidationError as error:
            repaired = tree
            for item in error.errors(include_url=False, include_input=False):
                repaired = _explain(schema, tree, repaired, item, problems, refused)
            tree = repaired
    if config is None or problems:
        raise _error(problems)
    return config


def _error(problems: list[str]) -> UserError:
    unique = list(dict.fromkeys(problems))
    return UserError(unique[0]) if len(unique) == 1 else UserError(f"{len(unique)} problems in the configuration:", unique)


def _known_part(
    root: type[Config], schema: type[Config], tree: Written, prefix: str, problems: list[str], refused: set[str]
) -> Written:
    """The tree without unknown keys and without true or false where a number belongs (Python would count them as 1 and 0)."""
    if not isinstance(tree.value, dict):
        return tree
    keys, kept = describe(root), {}
    for name, item in tree.value.items():
        key = keys.get(prefix + name) if "." not in name else None
        if key is None:
            advice, meant = _nearest(root, prefix + name)
            refused.add(meant or prefix + name)
            problems.append(_problem(item.origin, prefix + name, f"unknown key{advice}"))
        elif key.section:
            kept[name] = _known_part(root, key.section, item, f"{prefix}{name}.", problems, refused)
        elif any(isinstance(value, bool) for value in _flat(item)) and not key.truth:
            refused.add(key.name)
            problems.append(_problem(item.origin, key.name, _expectation(key, item)))
        else:
            kept[name] = item
    return Written(kept, tree.origin)


def _flat(item: Written) -> list[Any]:
    return [entry.value for entry in item.value] if isinstance(item.value, list) else [item.value]


def _nearest(schema: type[Config], name: str) -> tuple[str, str | None]:
    """Advice for an unknown key, and the key that was meant: one letter off, the same name in another section, a similar one."""
    keys = describe(schema)
    section, _, last = name.rpartition(".")
    if name in keys:
        return f"; write it as a section: {section.replace('.', ': {')}: {{{last}: ...}}" + "}" * section.count("."), name
    elsewhere = sorted((key for key in keys if key.rpartition(".")[2] == last), key=lambda key: (key.count("."), len(key)))
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    meant = [siblings[match] for match in get_close_matches(last, siblings, 1, 0.85)] or elsewhere[:1]
    stages = [stage for stage, other in STAGES.items() if name in describe(other)]
    if stages and not meant:
        return f" here; it belongs to `trueline {'`, `trueline '.join(stages)}`", None
    meant = meant or [siblings[match] for match in get_close_matches(last, siblings, 1)]
    meant = meant or get_close_matches(name, [key for key in keys if not name.startswith(key + ".")], 1, 0.75)
    meant = meant or [key for key in keys for match in get_close_matches(last, [key.rpartition(".")[2]], 1, 0.8)]
    if meant:
        return f" (did you mean {meant[0]}?)", meant[0]
    return f"; known here: {', '.join(siblings)}" if siblings else "", None


def _explain(schema: type[Config], tree: Written, repaired: Written, item: Any, problems: list[str], refused: set[str]) -> Written:
    """Adds one of pydantic's errors about `tree` in our words; returns `repaired` without the cause."""
    location, keys = _known_location(item["loc"], tree), describe(schema)
    at, wanted = _at(tree, location), _dotted(item["loc"])
    if item["type"] == "value_error":
        for sentence in str(item["ctx"]["error"]).splitlines():
            mentioned = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", sentence)
            if not any(_within(name, refused) for name in mentioned):
                problems.append(_problem(_origin_of_any(tree, mentioned, location), "", sentence))
        return repaired
    if item["type"] == "missing" and wanted in keys:
        for key in _required(keys, wanted):
            if not _within(key.name, refused):
                problems.append(_problem(at.origin, key.name, f"missing; expected {key.expected}: {key.sentence}"))
            refused.add(key.name)
            repaired = _with(repaired, key.name.split("."), "?")
        return repaired
    owner = ".".join(part for part in location if isinstance(part, str))
    key = keys[owner]
    if location and isinstance(location[-1], int):
        key = replace(key, expected=key.expected.partition("each ")[2])
    problems.append(_problem(at.origin, _dotted(location), _expectation(key, at)))
    refused.add(owner)
    return _without(repaired, owner.split("."))


def _known_location(location: Location, tree: Written) -> Location:
    """The part of pydantic's location that was really written: it also names the branch of a union, or an item that is missing."""
    for depth, part in enumerate(location):
        inside = isinstance(tree.value, dict) and part in tree.value
        inside = inside or (isinstance(tree.value, list) and isinstance(part, int) and part < len(tree.value))
        if not inside:
            return location[:depth]
        tree = tree.value[part]
    return location


def _expectation(key: Key, item: Written) -> str:
    value = item.plain()
    near = get_close_matches(value.lower(), key.choices, 1, 0.5) if isinstance(value, str) else []
    hint = f" (did you mean {near[0]}?)" if near else ""
    if key.expected.startswith(("text", "a path")) and isinstance(value, int | float):
        hint = f" (put text in quotes: \"{str(value).lower() if isinstance(value, bool) else value}\")"
    return f"found {found(value)}, expected {key.expected}{hint}"


def _required(keys: dict[str, Key], name: str) -> list[Key]:
    """The required keys at or below a missing one."""
    return [key for key in keys.values() if _within(key.name, {name}) and key.required and not key.section]


def _within(name: str, sections: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{section}.") for section in sections)


def _at(tree: Written, location: Location) -> Written:
    for part in location:
        tree = tree.value[part]
    return tree


def _without(tree: Written, path: list[str]) -> Written:
    if not isinstance(tree.value, dict) or path[0] not in tree.value:
        return tree
    rest = {key: item for key, item in tree.value.items() if key != path[0]}
    if len(path) > 1:
        rest[path[0]] = _without(tree.value[path[0]], path[1:])
    return Written(rest, tree.origin)


def _with(tree: Written, path: list[str], value: Any) -> Written:
    if not path:
        return Written(value, tree.origin)
    values = tree.value if isinstance(tree.value, dict) else {}
    return Written(values | {path[0]: _with(values.get(path[0], Written(None, tree.origin)), path[1:], value)}, tree.origin)


def _origin_of_any(tree: Written, names: list[str], location: Location) -> str:
    """Where the first of `names` that was given stands; else the section the sentence is about."""
    for name in names:
        path = tuple(name.split("."))
        if _known_location(path, tree) == path:
            return _at(tree, path).origin
    return _at(tree, location).origin


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _problem(origin: str, name: str, what: str) -> str:
    """`origin: key: what`, the key left out where an override's origin already names it."""
    return f"{origin}: {what}" if not name or origin.startswith(f"override {name}=") else f"{origin}: {name}: {what}"
