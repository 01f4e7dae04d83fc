"""The final answer in a text, and whether two of them are the same. Standard library only, so that reward functions may import it.

A final answer is what stands in the last `\\boxed{}`, else behind the last `####`, else behind the last "answer is", "answer:" or 答案,
else the last number. Numbers are compared by value.
"""

import re
import unicodedata
from fractions import Fraction

_MARK = re.compile(r"(?:final answer|answer|答案|答)\s*(?:is|are|[:=]|是|为|应为|应该是)\s*[:]?|therefore,?\s*(?=[-\d$])", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,40})(?:\.\d{1,40})?"
_NUMBER = re.compile(
    rf"(?P<minus>(?<![\w)])[-−](?=[\d.(]))?(?:(?P<whole>\d{{1,40}})\s*\(\s*(?P<top>\d{{1,40}})\s*/\s*(?P<bottom>\d{{1,40}})\s*\)"
    rf"|\(?(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})\)?|(?P<plain>{_DIGITS}|\.\d{{1,40}}))\s*(?P<percent>%)?"
)
_NUMERALS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE = r"[零〇一二两三四五六七八九十百千万亿点]+"
TOLERANCE = Fraction(1, 10**6)  # of the reference: decimals that were rounded late


def final_answer(text: str) -> tuple[str, bool]:
    """The final answer, and whether a mark names it (else it is the whole text, in which the last number counts).

    >>> final_answer("3 + 4 = 7\\n#### 7"), final_answer("The answer is $18.00."), final_answer("so \\\\boxed{\\\\frac{3}{4}}")
    (('7', True), ('18.00.', True), ('(3/4)', True))
    """
    boxed = _boxed(text)
    if boxed is not None:
        return _plain(boxed), True
    text = _plain(text)
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip(), True
    marks = list(_MARK.finditer(text))
    for mark in reversed(marks):
        rest = text[mark.end() :].strip().partition("\n")[0].strip(" *:")
        if rest:
            return rest, True
    return text.strip(), False


def number_in(text: str) -> tuple[Fraction, bool] | None:
    """The value of a response's final answer, and whether it was given in percent; None where there is no number.

    >>> number_in("1,234"), number_in("答案是三分之二"), number_in("It is 12.5%"), number_in("1(5/6)")
    ((Fraction(1234, 1), False), (Fraction(2, 3), False), (Fraction(1, 8), True), (Fraction(11, 6), False))
    """
    answer, marked = final_answer(text)
    found = list(_NUMBER.finditer(answer))
    if found:
        return _value(found[0 if marked else -1])
    whole = re.fullmatch(_numerals(), answer.strip("。."))
    numerals = re.findall(_numerals(), answer) if marked else [whole[0]] if whole else []
    return _chinese(max(numerals, key=len)) if numerals else None  # the longest: a word like 一共 holds a numeral too


def same_answer(response: str, reference: str) -> bool:
    """Whether both end in the same answer.

    A reference that is a number (or ends in a marked one) is compared by value, within a millionth; where only one side has a percent sign,
    20% is both 20 and 0.2. Any other reference has to be equal as text, without spaces, dollar signs, a final full stop, and case.
    """
    answer, marked = final_answer(reference)
    whole = _NUMBER.fullmatch(answer.rstrip(" .。")) or (marked and _NUMBER.match(answer))
    wanted = _value(whole) if whole else number_in(reference) if re.fullmatch(_numerals(), answer) else None
    if wanted is None:
        return bool(_folded(answer)) and _folded(answer) in (_folded(final_answer(response)[0]), _folded(_plain(response)))
    given = number_in(response)
    if given is None:
        return False
    factors = {Fraction(1)} if given[1] == wanted[1] else {Fraction(1), Fraction(100), Fraction(1, 100)}
    return any(abs(given[0] * factor - wanted[0]) <= TOLERANCE * abs(wanted[0]) for factor in factors)


def _boxed(text: str) -> str | None:
    """What the last `\\boxed{}` holds, its own braces included."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def _plain(text: str) -> str:
    """Without full-width forms and LaTeX's dress."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1/\2)", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,!;: ])", "", text)
    return re.sub(r"\\?[$¥]|\\[()\[\]]", "", text).replace("\\%", "%")


def _folded(text: str) -> str:
    return re.sub(r"\s+", "", text).rstrip(".。").casefold()


def _value(found: re.Match[str]) -> tuple[Fraction, bool] | None:
    parts = {name: Fraction(text.replace(",", "")) for name, text in found.groupdict().items() if text and name not in ("minus", "percent")}
    over, under = (parts.get("over"), parts.get("under")) if "over" in parts else (parts.get("top"), parts.get("bottom"))
    if under == 0:
        return None
    value = parts.get("whole", Fraction(0)) + parts.get("plain", Fraction(0))
    if over is not None and under is not None:
        value += over / under
    value = -value if found["minus"] else value
    return (value / 100, True) if found["percent"] else (value, False)


def _numerals() -> str:
    return rf"百分之{_CHINESE}|{_CHINESE}分之{_CHINESE}|负?{_CHINESE}"


def _chinese(text: str) -> tuple[Fraction, bool] | None:
    if text.startswith("百分之"):
        return _read(text[3:]) / 100, True
    under, fraction, over = text.partition("分之")
    if fraction:
        return (_read(over) / _read(under), False) if _read(under) else None
    return (-_read(text[1:]) if text[0] == "负" else _read(text)), False


def _read(text: str) -> Fraction:
    """三百零五 is 305, 一万二千 12,000, 十二点五 12.5, 二零二四 2024."""
    text, _, decimals = text.partition("点")
    digits = "".join(str(_NUMERALS[c]) for c in decimals if c in _NUMERALS)
    value = Fraction(f"0.{digits or 0}")
    if len(text) > 1 and all(c in _NUMERALS for c in text):
        return value + int("".join(str(_NUMERALS[c]) for c in text))
    total = section = digit = 0
    for c in text:
        if c in _UNITS:
            section += (digit or 1) * _UNITS[c]
            digit = 0
        elif c in "万亿":
            total = (total + section + digit) * (10**4 if c == "万" else 10**8)
            section = digit = 0
        else:
            digit = _NUMERALS[c]
    return value + total + section + digit
