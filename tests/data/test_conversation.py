"""Who may speak when."""

import pytest

from trueline.data.conversation import Message, role_problems

ROLES = {"s": "system", "u": "user", "a": "assistant", "o": "observation"}


def turns(letters: str) -> tuple[Message, ...]:
    """`c` is an assistant's tool call."""
    return tuple(Message("assistant", "{}", "tool") if c == "c" else Message(ROLES[c], "text") for c in letters)  # type: ignore[arg-type]


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "ucoa", "uccooa", "ucoaua", "uaoa", "uc"])
def test_sound_conversations(letters: str) -> None:
    assert role_problems(turns(letters), waiting=False) == []


@pytest.mark.parametrize("letters", ["u", "su", "uau", "uco", "uccoo"])
def test_sound_prompts(letters: str) -> None:
    assert role_problems(turns(letters), waiting=True) == []


@pytest.mark.parametrize(
    ("letters", "waiting", "index", "sentence"),
    [
        ("", False, 0, "no turns"),
        ("s", False, 0, "no turns"),
        ("usa", False, 1, "system message must be the first"),
        ("ssua", False, 1, "system message must be the first"),
        ("aua", False, 0, "first turn must be the user's, found assistant"),
        ("soa", False, 1, "first turn must be the user's, found observation"),
        ("uua", False, 1, "two user turns in a row"),
        ("uaa", False, 2, "two assistant turns in a row"),
        ("uca", False, 2, "two assistant turns in a row"),
        ("uoa", False, 1, "observation must follow the assistant's tool call"),
        ("ucua", False, 2, "a tool call must be answered by an observation"),
        ("ucoua", False, 3, "an observation must be answered by the assistant"),
        ("uau", False, 2, "conversation ends with user, expected the assistant's answer"),
        ("ua", True, 1, "prompt ends with the assistant's turn"),
    ],
)
def test_breaches_are_named_at_their_turn(letters: str, waiting: bool, index: int, sentence: str) -> None:
    found = role_problems(turns(letters), waiting)
    assert [i for i, text in found if sentence in text] == [index]
