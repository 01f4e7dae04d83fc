"""A conversation written down as tokens, each with whether it is trained. One rule: text never becomes a control token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.errors import UserError
from trueline.families.family import Encoder, Family


@dataclass(frozen=True)
class Tag:
    """Markup of a template: one token where the tokenizer has it as such, plain text where it has not."""

    text: str


class Transcript:
    def __init__(self, tokenizer: Encoder):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.trained: list[bool] = []

    def control(self, name: str, trained: bool = False) -> None:
        """One control token by its text; a tokenizer without it is the wrong one."""
        token = self.tokenizer.specials.get(name)
        if token is None:
            raise UserError(
                f"the tokenizer has no control token {name}, which conversations with this model need; set model.tokenizer to its own"
            )
        self.tokens.append(token)
        self.trained.append(trained)

    def text(self, *parts: str | Tag, trained: bool = False) -> None:
        """Plain text and markup, encoded in one piece between markup tokens (where a token begins and ends depends on its neighbours)."""
        plain = ""
        for part in parts:
            if isinstance(part, str):
                plain += part
            elif part.text in self.tokenizer.specials:
                self._add(self.tokenizer.encode(plain), trained)
                self._add([self.tokenizer.specials[part.text]], trained)
                plain = ""
            else:
                plain += part.text
        if plain:
            self._add(self.tokenizer.encode(plain), trained)

    def sample(self) -> Sample:
        return Sample(self.tokens, self.trained)

    def _add(self, tokens: list[int], trained: bool) -> None:
        self.tokens += tokens
        self.trained += [trained] * len(tokens)


def turns(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Messages by turn: tool calls in a row are one turn, and so are their observations."""
    found: list[tuple[Message, ...]] = []
    for message in messages:
        last = found[-1][-1] if found else None
        goes_on = last is not None and last.role == message.role and (message.role == "observation" or bool(last.tool and message.tool))
        if goes_on:
            found[-1] = (*found[-1], message)
        else:
            found.append((message,))
    return found


def marked(messages: Sequence[Message], open: bool, last_only: bool) -> Iterator[tuple[tuple[Message, ...], bool]]:
    """Turns, and whether each is trained: the assistant's, or its last one only; none in a prompt (`open`), nor one that says so itself."""
    found = turns(messages)
    spoken = [i for i, turn in enumerate(found) if turn[0].role == "assistant"]
    trained = set() if open else set(spoken[-1:] if last_only else spoken)
    for i, turn in enumerate(found):
        yield turn, i in trained and all(message.trained for message in turn)


def training_samples(family: Family, conversation: Conversation, tokenizer: Encoder, last_only: bool = False) -> list[Sample]:
    """What is trained of a conversation: one sample, or where `answers_apart` one for each trained turn, which ends with that turn.

    Each answer then stands behind the very prompt it would be generated from. Never empty: without a trained turn it is the whole.
    """
    found = []
    if family.answers_apart and not last_only:
        end = 0
        for turn in turns(conversation.messages):
            end += len(turn)
            if turn[0].role == "assistant" and all(message.trained for message in turn):
                found.append(family.render(replace(conversation, messages=conversation.messages[:end]), tokenizer, last_only=True))
    return found or [family.render(conversation, tokenizer, last_only=last_only)]
