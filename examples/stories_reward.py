"""A reward for short English stories: in how many sentences a word of the family "friend" occurs, each sentence counted once at most.

Any function of this form will do: answers in, one finite number each out. It may also ask for `prompts` and `records`.
"""

import re
from collections.abc import Sequence

FAMILY = re.compile(r"\bfriend(s|ly|ship)?\b", re.IGNORECASE)
SENTENCE = re.compile(r"[^.!?]+")


def friends(answers: Sequence[str]) -> list[float]:
    """Sentences that speak of friends, per answer. Saying it ten times in one sentence counts once."""
    return [float(sum(bool(FAMILY.search(sentence)) for sentence in SENTENCE.findall(answer))) for answer in answers]
