"""JSON text to values, and what is wrong with it in words. One rule: whatever is refused is refused at a character.

Values are read by the standard library's scanner. It cannot tell a key given twice, so keys are counted afterwards; only text in which the
count is suspicious is read again, slowly.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how such a file begins
LONGEST_RECORD = 1 << 24
"""Bytes of one record at most. A file without line ends must not be read whole before it is refused."""
TOO_LONG = f"a record longer than {LONGEST_RECORD >> 20} MiB, expected shorter ones (are the line ends missing?)"
_SPACE = re.compile(r"[ \t\n\r]*")
_SPACE_BEFORE_COLON = re.compile(r'"[ \t\n\r]+:')
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|NaN|-?Infinity')
_STEPS = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


class Broken(Exception):
    """Text that is not what a record must be, at a character of the text."""

    def __init__(self, position: int, what: str):
        super().__init__(what)
        self.position = position
        self.what = what


class _Doubled(Exception):
    pass


class _NotJson(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Doubled
    return value


def _constant(name: str) -> NoReturn:
    raise _NotJson(name)


_fast: Any = vars(json.JSONDecoder(parse_constant=_constant))["scan_once"]
_CAREFUL = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def skip(text: str, position: int) -> int:
    """The first position from `position` on that holds no white space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def parse(text: str, position: int) -> tuple[Any, int]:
    """`(value, end)` of the JSON value at `position`; `Broken` where it is none, holds a key twice, or is no valid text."""
    try:
        value, end = _fast(text, position)
    except (StopIteration, ValueError, RecursionError, _NotJson):
        return _parse_carefully(text, position)
    if text.count('":', position, end) != _keys(value) or _SPACE_BEFORE_COLON.search(text, position, end):
        return _parse_carefully(text, position)
    if text.find("\\ud", position, end) >= 0 or text.find("\\uD", position, end) >= 0:
        _refuse_lone_surrogates(text, position, end, value)
    return value, end


def _keys(value: Any) -> int:
    count = len(value) if isinstance(value, dict) else 0
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (dict, list)):
                count += _keys(item)
    return count


def _parse_carefully(text: str, position: int) -> tuple[Any, int]:
    try:
        value, end = _CAREFUL.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _explained(text, error) from None
    except _Doubled:
        raise _doubled_key(text, position) from None
    except _NotJson as error:
        at = next(token.start() for token in _TOKENS.finditer(text, position) if token.group() == str(error))
        raise Broken(at, f"{error}, expected a number or null") from None
    except RecursionError:
        raise Broken(position, "nested too deeply, expected a flat record") from None
    except ValueError:
        raise Broken(position, "a number of thousands of digits, expected a shorter one or text") from None
    _refuse_lone_surrogates(text, position, end, value)
    return value, end


def _refuse_lone_surrogates(text: str, position: int, end: int, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        found = _LONE_SURROGATE.search(text, position, end)
        raise Broken(found.start() if found else position, "half of a surrogate pair, expected a whole character") from None


def _doubled_key(text: str, position: int) -> Broken:
    open_objects: list[set[str]] = []
    for token in _TOKENS.finditer(text, position):
        found = token.group()
        if found == "{":
            open_objects.append(set())
        elif found == "}":
            open_objects.pop()
        elif found[0] == '"' and _at(text, token.end()) == ":":
            name = json.loads(found, strict=False)
            if name in open_objects[-1]:
                return Broken(token.start(), f'key "{name}" a second time, expected each key once')
            open_objects[-1].add(name)
    return Broken(position, "a key twice in one object, expected each key once")


def _at(text: str, position: int) -> str:
    """The first character from `position` on that is no white space; "" at the end."""
    start = skip(text, position)
    return text[start : start + 1]


def _explained(text: str, error: json.JSONDecodeError) -> Broken:
    """The decoder's complaint in terms of what to change; the same for every Python version."""
    at = skip(text, error.pos)
    here = text[at : at + 1]
    last = error.pos - 1
    while last >= 0 and text[last] in " \t\r\n":
        last -= 1
    comma = at if here == "," and _at(text, at + 1) in ("}", "]") else last if text[last] == "," and here in ("}", "]") else None
    if comma is not None:
        return Broken(comma, "trailing comma, expected nothing between the last value and the closing bracket")
    if here == "\x00":
        return Broken(at, "NUL byte, expected text")
    if error.msg.startswith("Invalid control character"):
        code = ord(text[error.pos])
        return Broken(error.pos, f"control character 0x{code:02X} inside a string, expected it escaped (a line break as \\n)")
    if error.msg.startswith("Unterminated string"):
        return Broken(error.pos, 'a string that never ends, expected a closing "')
    if here in ("'", "‘", "’", "“", "”"):
        quotes = "single quotes" if here == "'" else f"typographic quotes ({here})"
        return Broken(at, f"{quotes}, expected JSON's double quotes")
    for wrong, right in (("None", "null"), ("True", "true"), ("False", "false")):
        if text.startswith(wrong, at):
            return Broken(at, f"{wrong}, expected JSON's {right}")
    if text.startswith(("//", "/*", "#"), at):
        return Broken(at, "a comment, expected none; JSON has no comments")
    if not here:
        return Broken(last + 1, "the record ends too early, expected its closing bracket")
    if re.match(r"[A-Za-z_]\w*\s*:", text[at : at + 200]):
        return Broken(at, "a key without quotes, expected it in double quotes")
    return Broken(at, f"not JSON: {error.msg[0].lower()}{error.msg[1:]}, found {here!r}")


def offset(text: str, start: int, field: str) -> int:
    """Where the value of a field such as `messages[1].content` starts in the object at `start`; of one that is missing, its container."""
    at = skip(text, start)
    for step in _STEPS.finditer(field):
        found = next((place for name, place in _members(text, at) if name == (step[2] or int(step[1]))), None)
        if found is None:
            return at
        at = found
    return at


def _members(text: str, at: int) -> Iterator[tuple[str | int, int]]:
    """`(key or index, where its value starts)` of the object or list at `at`."""
    opening, number = text[at : at + 1], 0
    at = skip(text, at + 1)
    while opening in ("{", "[") and at < len(text) and text[at] not in "}]":
        name: str | int = number
        if opening == "{":
            name, at = _CAREFUL.raw_decode(text, at)
            at = skip(text, skip(text, at) + 1)
        yield name, at
        at = skip(text, _CAREFUL.raw_decode(text, at)[1])
        at, number = skip(text, at + (text[at : at + 1] == ",")), number + 1


def decode_line(raw: bytes) -> str:
    """UTF-8 text without its line end, or `Broken` at the first character that is not."""
    if len(raw) >= LONGEST_RECORD:
        raise Broken(0, TOO_LONG)
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise not_utf8(raw, error) from None
    if text.startswith("\ufeff"):
        raise Broken(0, "byte-order mark, expected UTF-8 without one; save the file as UTF-8 without BOM")
    return text


def not_utf8(raw: bytes, error: UnicodeDecodeError) -> Broken:
    """What to say about the first byte that is not UTF-8."""
    if raw[:2] in UTF_16:
        return Broken(0, "UTF-16 text, expected UTF-8; save the file as UTF-8")
    position = len(raw[: error.start].decode("utf-8"))
    return Broken(position, f"byte 0x{raw[error.start]:02X} is not UTF-8, expected UTF-8 text (GBK? iconv -f GBK -t UTF-8)")
