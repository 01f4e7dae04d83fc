import pytest

from trueline.data.conversation import Message
from trueline.errors import UserError
from trueline.families.transcript import Tag, Transcript, marked, turns

CALL, OTHER = Message("assistant", "{}", tool="f"), Message("assistant", "{}", tool="g")
SEEN, ASK, SAY = Message("observation", "o"), Message("user", "u"), Message("assistant", "a")


def test_text_is_encoded_in_one_piece_around_the_tags_the_tokenizer_has(letters):
    pieces = []
    tokenizer = letters("<t>")
    tokenizer.encode = lambda text: pieces.append(text) or [0]
    out = Transcript(tokenizer)
    out.text("a", Tag("<x>"), "b", Tag("<t>"), "<t>", "c", trained=True)
    assert pieces == ["a<x>b", "<t>c"]  # a text that looks like a tag stays text
    assert out.tokens == [0, 2_000_000, 0] and out.trained == [True] * 3


def test_empty_text_is_no_token(letters):
    out = Transcript(letters())
    out.text("", trained=True)
    assert out.sample().tokens == []


def test_a_missing_control_token_is_named(letters):
    with pytest.raises(UserError, match=r"no control token <x>.*model.tokenizer"):
        Transcript(letters("<y>")).control("<x>")


def test_calls_in_a_row_are_one_turn_and_so_are_their_observations():
    talk = (ASK, CALL, OTHER, SEEN, SEEN, SAY, ASK, SAY)
    assert turns(talk) == [(ASK,), (CALL, OTHER), (SEEN, SEEN), (SAY,), (ASK,), (SAY,)]
    assert turns((ASK, CALL, SAY)) == [(ASK,), (CALL,), (SAY,)]
    assert turns(()) == []


@pytest.mark.parametrize(
    ("open", "last_only", "wanted"), [(False, False, [1, 3, 5]), (False, True, [5]), (True, False, []), (True, True, [])]
)
def test_which_turns_are_trained(open, last_only, wanted):
    found = list(marked((ASK, CALL, SEEN, SAY, ASK, SAY), open, last_only))
    assert [i for i, (_, trained) in enumerate(found) if trained] == wanted
