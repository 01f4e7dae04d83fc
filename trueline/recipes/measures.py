"""What answers are worth beside references and beside other answers. The rule: one number per answer first, then their mean."""

import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from trueline.data.answers import same_answer
from trueline.data.cache import TokenPrompt
from trueline.data.formats import SCHEMAS
from trueline.errors import UserError

TextMeasure = Callable[[Sequence[str], Sequence[str]], tuple[dict[str, float], list[dict[str, float]]]]
"""Answers and references -> the means, and each answer's own numbers; all 0 to 100."""
ROUGES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
Z = 1.959963984540054  # of a 95 % interval


def references(prompts: Sequence[TokenPrompt], field: str | None, format: str) -> list[str | None]:
    """Each prompt's reference: the record's `field`, or by its schema its own last answer; None where it has none.

    Raises:
        UserError: no record has one, or one lacks the field that was named.
    """
    found = [_reference(prompt.prompt.record, field, format) for prompt in prompts]
    missing = sum(reference is None for reference in found)
    if field and missing:
        fields = ", ".join(next(p.prompt.record for p, r in zip(prompts, found, strict=True) if r is None)) or "none"
        lacking = f"{missing} of {len(found)} records have no text or number in {field}"
        raise UserError(f"metrics.reference: {lacking}; one has the fields {fields}")
    if missing == len(found):
        raise UserError("no record has an answer of its own to compare with; metrics.reference names the field that holds it")
    return found


def _reference(record: dict[str, Any], field: str | None, format: str) -> str | None:
    if field:
        value = record.get(field)
        return str(value) if isinstance(value, str | int | float) and str(value).strip() else None
    schema = SCHEMAS.get(format) or next((schema for schema in SCHEMAS.values() if schema.recognises(record)), None)
    if schema is None:
        return None
    noted: list[str] = []
    example = schema.read(record, schema.uses[0], lambda field, what: noted.append(field))
    if not noted and example.answers:
        return example.answers[0].content
    last = example.turns.messages[-1:]
    return last[0].content if not noted and last and last[0].role == "assistant" else None


def matches(answers: Sequence[str], wanted: Sequence[str | None]) -> list[float | None]:
    """1 where the final answer is the reference's, 0 where not, None where there is no reference."""
    return [None if reference is None else float(same_answer(answer, reference)) for answer, reference in zip(answers, wanted, strict=True)]


def open_text_measure(split: str) -> TextMeasure:
    """BLEU-4 (sacrebleu; single answers smoothed as in finetune_demo) and ROUGE-1, 2 and L (F, rouge-score).

    `split`: "words" cuts with jieba, "characters" between all characters; white space never counts. UserError where the extra is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise missing_extra(error) from error
    cut = word_cutter() if split == "words" else (lambda text: [c for c in text if not c.isspace()])
    single = BLEU(tokenize="none", smooth_method="exp", effective_order=True)
    corpus = BLEU(tokenize="none", force=True)
    scorer = RougeScorer(list(ROUGES.values()), tokenizer=_Spaces())

    def measure(answers: Sequence[str], wanted: Sequence[str]) -> tuple[dict[str, float], list[dict[str, float]]]:
        pairs = [(" ".join(cut(a)), " ".join(cut(r))) for a, r in zip(answers, wanted, strict=True)]
        rows = []
        for answer, reference in pairs:
            rouge = scorer.score(reference, answer)
            bleu = single.sentence_score(answer, [reference]).score if answer and reference else 0.0
            rows.append({"bleu_4": bleu} | {ours: 100 * rouge[theirs].fmeasure for ours, theirs in ROUGES.items()})
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return means | {"bleu_4_corpus": corpus.corpus_score([a for a, _ in pairs], [[r for _, r in pairs]]).score}, rows

    return measure


def word_cutter() -> Callable[[str], list[str]]:
    """jieba's words, without white space. Its dictionary's cache is read from no folder that others can write."""
    try:
        import jieba
    except ImportError as error:
        raise missing_extra(error) from error
    jieba.setLogLevel("WARNING")
    tokenizer = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return lambda text: [word for word in tokenizer.cut(text) if not word.isspace()]


def missing_extra(error: ImportError) -> UserError:
    return UserError(f"metrics.text needs {error.name}, which is not installed: pip install 'trueline[evaluate]'")


class _Spaces:
    """A tokenizer for text that is cut already."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def win_rate(ours: Sequence[float], theirs: Sequence[float], alike: Sequence[bool]) -> dict[str, float]:
    """Wins, ties and losses; the rate counts a tie as half, and has Wilson's 95 % interval. Equal answers tie whatever their scores.

    >>> win_rate([1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [False] * 4)["win_rate"]
    0.625
    """
    wins = sum(a > b and not same for a, b, same in zip(ours, theirs, alike, strict=True))
    losses = sum(a < b and not same for a, b, same in zip(ours, theirs, alike, strict=True))
    count = len(ours)
    ties = count - wins - losses
    rate = (wins + ties / 2) / count
    centre = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return {"wins": wins, "ties": ties, "losses": losses, "win_rate": rate, "win_rate_low": centre - half, "win_rate_high": centre + half}
