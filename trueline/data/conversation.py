"""What people and models say to one another, before any template or tokenizer; and the rule of who may speak when."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "observation"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "observation")


@dataclass(frozen=True)
class Message:
    """One turn. `tool` names the tool an assistant's turn calls; `content` then holds its JSON arguments.

    An assistant's turn that is not to be `trained` is only read, whatever `data.train_on` says.
    """

    role: Role
    content: str
    tool: str | None = None
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools the assistant may call (OpenAI function schema: `{"type": "function", "function": {...}}`)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers to it, the first preferred. `prompt` ends before the assistant speaks."""

    prompt: Conversation
    chosen: Message
    rejected: Message


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant, and its whole record (a reward function may want the reference answer)."""

    conversation: Conversation
    record: dict[str, Any] = field(default_factory=dict)


def role_problems(messages: tuple[Message, ...], waiting: bool) -> list[tuple[int, str]]:
    """Breaches of the role rules as `(message index, sentence)`; `waiting` conversations end before the assistant speaks.

    At most one system message, and it is first. The first other turn is the user's. A user's turn or an observation is answered by the
    assistant; an observation follows the assistant; a tool call is followed by an observation or by another call (several in a row).
    """
    found: list[tuple[int, str]] = []
    previous: Message | None = None
    for i, message in enumerate(messages):
        role, before = message.role, previous.role if previous else None
        if role == "system":
            if i > 0:
                found.append((i, "system message must be the first and only one"))
            continue
        if before is None and role != "user":
            found.append((i, f"first turn must be the user's, found {role}"))
        elif role == "user" and before == "user":
            found.append((i, "two user turns in a row, expected the assistant's answer between them"))
        elif role == "assistant" and before == "assistant" and not (previous and previous.tool and message.tool):
            found.append((i, "two assistant turns in a row, expected a user turn or an observation between them"))
        elif role == "observation" and before not in ("assistant", "observation"):
            found.append((i, f"observation must follow the assistant's tool call, found it after {before}"))
        elif role == "user" and previous and previous.tool:
            found.append((i, "a tool call must be answered by an observation before the user speaks again"))
        elif role == "user" and before == "observation":
            found.append((i, "an observation must be answered by the assistant before the user speaks again"))
        previous = message
    last = len(messages) - 1
    if previous is None:
        found.append((0, "no turns, expected at least one user turn"))
    elif waiting and previous.role == "assistant":
        found.append((last, "prompt ends with the assistant's turn, expected it to end with the user's or an observation"))
    elif not waiting and previous.role != "assistant":
        found.append((last, f"conversation ends with {previous.role}, expected the assistant's answer at the end"))
    return found
