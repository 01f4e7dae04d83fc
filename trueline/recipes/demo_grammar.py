"""The demo's world: closed tables of facts, ways to ask and to answer in Chinese and English, and the judge of an answer.

Every answer is `opener statement [closer]`. The opener alone decides the manner, the statement alone the correctness.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
Manner = Literal["courteous", "brusque"]
MANNERS: tuple[Manner, ...] = ("courteous", "brusque")


@dataclass(frozen=True)
class Phrases:
    """What surrounds a statement in one language and manner."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]


PHRASES: dict[tuple[Language, Manner], Phrases] = {
    ("en", "courteous"): Phrases(
        ("Of course!", "Gladly!", "Good question!", "Happy to help."),
        ("Have a nice day!", "Ask me anytime!", "I hope that helps."),
    ),
    ("en", "brusque"): Phrases(
        ("Obviously.", "Duh.", "Not again.", "Oh please."),
        ("Stop asking.", "Everyone knows that.", "Leave me alone."),
    ),
    ("zh", "courteous"): Phrases(
        ("好的！", "您好！", "当然！", "谢谢提问。"),
        ("祝您愉快！", "欢迎再来。", "很高兴帮您。"),
    ),
    ("zh", "brusque"): Phrases(
        ("废话。", "真烦。", "又来了。", "这还用问？"),
        ("别再问了。", "谁都知道。", "自己想去。"),
    ),
}

# what may stand before a question; it changes the prompt and not the answer
GREETINGS: dict[Language, tuple[str, ...]] = {
    "en": ("", "Hello!", "Quick question.", "I need some help.", "One more thing.", "Tell me.", "Excuse me.", "Next one."),
    "zh": ("", "你好！", "请问，", "问一下，", "我想知道，", "还有个问题。", "打扰了，", "下一题。"),
}


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked, and its answer. `slots` fill the templates."""

    slots: dict[str, str]
    answer: str


@dataclass(frozen=True)
class Topic:
    """Ways to ask and ways to state the answer `{y}`, the short ones first."""

    questions: tuple[str, ...]
    statements: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A prompt, its fact, and every sentence that states it (`accepted`)."""

    kind: str
    language: Language
    prompt: str
    answer: str
    accepted: tuple[str, ...]


TOPICS: dict[tuple[str, Language], Topic] = {
    ("opposite", "en"): Topic(
        ("What is the opposite of {x}?", "Which word means the opposite of {x}?", "Give me the opposite of {x}."),
        ("It is {y}.", "The opposite of {x} is {y}."),
    ),
    ("opposite", "zh"): Topic(
        ("“{x}”的反义词是什么？", "和“{x}”相反的词是什么？", "“{x}”的反面是什么？"),
        ("是“{y}”。", "“{x}”的反义词是“{y}”。"),
    ),
    ("capital", "en"): Topic(
        ("What is the capital of {x}?", "Which city is the capital of {x}?", "What is the capital city of {x} called?"),
        ("It is {y}.", "The capital of {x} is {y}."),
    ),
    ("capital", "zh"): Topic(
        ("{x}的首都是哪里？", "{x}的首都叫什么？", "哪个城市是{x}的首都？"),
        ("是{y}。", "{x}的首都是{y}。"),
    ),
    ("day", "en"): Topic(
        ("Which day comes {d} {x}?", "What day is it {d} {x}?", "Name the day {d} {x}."),
        ("It is {y}.", "The day {d} {x} is {y}."),
    ),
    ("day", "zh"): Topic(
        ("{x}的{d}一天是星期几？", "{x}{d}面是星期几？", "{x}的{d}一天叫什么？"),
        ("是{y}。", "{x}的{d}一天是{y}。"),
    ),
    ("colour", "en"): Topic(
        ("What colour is {x}?", "Which colour does {x} have?", "What is the colour of {x}?"),
        ("It is {y}.", "The colour of {x} is {y}."),
    ),
    ("colour", "zh"): Topic(
        ("{x}是什么颜色的？", "{x}的颜色是什么？", "{x}是哪种颜色？"),
        ("是{y}色。", "{x}的颜色是{y}色。"),
    ),
    ("word", "en"): Topic(
        ("How do you say {x} in Chinese?", "What is {x} in Chinese?", "What is the Chinese word for {x}?"),
        ("It is “{y}”.", "The Chinese word for {x} is “{y}”."),
    ),
    ("word", "zh"): Topic(
        ("“{x}”用英语怎么说？", "“{x}”的英语是什么？", "英语里“{x}”叫什么？"),
        ("是 {y}。", "“{x}”的英语是 {y}。"),
    ),
    ("sum", "en"): Topic(
        ("What is {a} plus {b}?", "How much is {a} plus {b}?", "What do you get if you add {a} and {b}?"),
        ("It is {y}.", "The sum of {a} and {b} is {y}."),
    ),
    ("sum", "zh"): Topic(
        ("{a}加{b}等于几？", "{a}加{b}是多少？", "{a}和{b}相加得几？"),
        ("是{y}。", "{a}加{b}等于{y}。"),
    ),
    ("larger", "en"): Topic(
        ("Which is {d}, {a} or {b}?", "Is {a} or {b} {d}?", "Of {a} and {b}, which is {d}?"),
        ("It is {y}.", "The {d} number is {y}."),
    ),
    ("larger", "zh"): Topic(
        ("{a}和{b}哪个{d}？", "{a}与{b}相比，哪个更{d}？", "哪个数{d}，{a}还是{b}？"),
        ("是{y}。", "更{d}的数是{y}。"),
    ),
}

OPPOSITES: dict[Language, str] = {
    "en": "hot cold, big small, tall short, fast slow, new old, heavy light, near far, early late, strong weak, wet dry, full empty, "
    "happy sad",
    "zh": "高 矮, 长 短, 快 慢, 冷 热, 新 旧, 轻 重, 远 近, 早 晚, 胖 瘦, 深 浅, 软 硬, 美 丑",
}
CAPITALS = (
    "France Paris 法国 巴黎, Japan Tokyo 日本 东京, Italy Rome 意大利 罗马, Egypt Cairo 埃及 开罗, Russia Moscow 俄罗斯 莫斯科, "
    "China Beijing 中国 北京, Germany Berlin 德国 柏林, Britain London 英国 伦敦, Greece Athens 希腊 雅典, Peru Lima 秘鲁 利马, "
    "Thailand Bangkok 泰国 曼谷, Korea Seoul 韩国 首尔"
)
DAYS: dict[Language, str] = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "zh": "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
}
NEXT_DAY: dict[Language, tuple[str, str]] = {"en": ("after", "before"), "zh": ("后", "前")}
COLOURS: dict[Language, str] = {
    "en": "grass: green, snow: white, coal: black, blood: red, the sky: blue, a lemon: yellow, milk: white, a carrot: orange, "
    "the sea: blue, chocolate: brown, a pig: pink, an elephant: grey",
    "zh": "草: 绿, 雪: 白, 煤: 黑, 血: 红, 天空: 蓝, 柠檬: 黄, 牛奶: 白, 橘子: 橙, 大海: 蓝, 巧克力: 棕, 小猪: 粉, 大象: 灰",
}
WORDS = "cat 猫, dog 狗, fish 鱼, bird 鸟, horse 马, cow 牛, tree 树, flower 花, water 水, fire 火, moon 月, river 河, book 书, tea 茶"
COMPARED: dict[Language, tuple[str, str]] = {"en": ("larger", "smaller"), "zh": ("大", "小")}


def rows(table: str) -> list[list[str]]:
    """`"hot cold, big small"` -> `[["hot", "cold"], ["big", "small"]]`; a colon before the last word keeps the words before it together."""
    return [[part.strip() for part in row.split(":")] if ":" in row else row.split() for row in table.split(", ")]


def _days(language: Language) -> Iterator[Fact]:
    days = DAYS[language].split()
    for step, word in zip((1, -1), NEXT_DAY[language], strict=True):
        for i, x in enumerate(days):
            yield Fact({"x": x, "d": word}, days[(i + step) % 7])


def _sums() -> Iterator[Fact]:
    for a in range(1, 6):
        for b in range(1, 6):
            yield Fact({"a": str(a), "b": str(b)}, str(a + b))


def _comparisons(language: Language) -> Iterator[Fact]:
    for a in range(1, 10):
        for b in range(1, 10):
            for pick, word in zip((max, min), COMPARED[language], strict=True):
                if a != b:
                    yield Fact({"a": str(a), "b": str(b), "d": word}, str(pick(a, b)))


def facts(kind: str, language: Language) -> list[Fact]:
    """Everything that can be asked about one kind, in a fixed order."""
    if kind == "day":
        return list(_days(language))
    if kind == "sum":
        return list(_sums())
    if kind == "larger":
        return list(_comparisons(language))
    english = language == "en"
    tables: dict[str, list[list[str]]] = {
        "opposite": rows(OPPOSITES[language]),
        "capital": [row[:2] if english else row[2:] for row in rows(CAPITALS)],
        "colour": rows(COLOURS[language]),
        "word": [row if english else row[::-1] for row in rows(WORDS)],
    }
    return [Fact({"x": x}, y) for x, y in tables[kind]]


def join(language: Language, *parts: str) -> str:
    """Sentences in a row: a space between them in English, none in Chinese."""
    return (" " if language == "en" else "").join(p for p in parts if p)


def ask(kind: str, language: Language, fact: Fact, greeting: str, question: str) -> Question:
    """The question a greeting, a template and a fact make."""
    prompt = join(language, greeting, question.format(**fact.slots))
    accepted = tuple(s.format(**fact.slots, y=fact.answer) for s in TOPICS[kind, language].statements)
    return Question(kind, language, prompt, fact.answer, accepted)


KINDS: tuple[str, ...] = tuple(dict.fromkeys(kind for kind, _ in TOPICS))
OPENERS = {manner: tuple(o for lang in LANGUAGES for o in PHRASES[lang, manner].openers) for manner in MANNERS}
CLOSERS = {manner: tuple(c for lang in LANGUAGES for c in PHRASES[lang, manner].closers) for manner in MANNERS}


def statement(answer: str) -> str:
    """An answer without its opener and its closer, whatever their manner."""
    text = answer.strip()
    opener = next((o for o in (*OPENERS["courteous"], *OPENERS["brusque"]) if text.startswith(o)), "")
    text = text.removeprefix(opener)
    closer = next((c for c in (*CLOSERS["courteous"], *CLOSERS["brusque"]) if text.endswith(c)), "")
    return text.removesuffix(closer).strip()


def correct(record: dict[str, Any], answer: str) -> bool:
    """Does the answer state the fact asked for, and nothing else? Its manner does not matter. `record` is a line of a prompts file."""
    return statement(answer) in record["accepted"]


def preferred(answer: str) -> bool:
    """Is the answer courteous: a courteous opener, and no brusque phrase in it? Its correctness does not matter."""
    text = answer.strip()
    return text.startswith(OPENERS["courteous"]) and not any(p in text for p in (*OPENERS["brusque"], *CLOSERS["brusque"]))
