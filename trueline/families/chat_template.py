"""Our renderers as Jinja templates, for the tools that read a folder's. One rule: a template is in a folder only if it gives our prompts.

Messages and tools come as transformers and its servers pass them: OpenAI's, a call's arguments as an object or as its JSON text. Left out:
models without turns, whose contents are encoded one by one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trueline.data.conversation import Conversation
from trueline.data.messages import parsed
from trueline.errors import UserError
from trueline.families import chatglm2, glm4, llama, qwen2
from trueline.families.family import Encoder, Family
from trueline.families.transcript import turns


@dataclass(frozen=True)
class Template:
    """A template, and the control tokens that the model's tokenizer puts before and after a text by itself."""

    text: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def _template(name: str, before: Sequence[str] = (), after: Sequence[str] = (), **facts: str | int | bool | None) -> Template:
    """The file of that name with `@facts@` as Jinja's literals; its last line break is nobody's."""
    text = Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    for key, fact in facts.items():
        text = text.replace(f"@{key}@", "none" if fact is None else json.dumps(fact, ensure_ascii=False))
    return Template(text.replace("@added@", " ".join((*before, *after))), tuple(before), tuple(after))


def _chatml(default: str | None, thoughts: bool | None = None) -> Template:
    before, after = ("".join(p if isinstance(p, str) else p.text for p in parts) for parts in (qwen2.TOOLS_BEFORE, qwen2.TOOLS_AFTER))
    return _template("chatml", default=default, thoughts=thoughts, tools_before=before.lstrip("\n"), tools_after=after)


@lru_cache(maxsize=1)
def ours() -> tuple[Template, ...]:
    """Our templates; the first that gives a renderer's own prompts is its template."""
    return (
        _chatml(qwen2.SYSTEM),
        _chatml(qwen2.SYSTEM_2_5),
        _chatml(None, thoughts=True),
        _chatml(None, thoughts=False),
        _chatml(None),
        _template("glm4", heading=glm4.IDENTITY + glm4.TOOLS_HEADING, request=glm4.CALL_REQUEST, empty=False),
        _template("glm4", heading=glm4.TOOLS_HEADING.strip() + "\n", request=glm4.CALL_REQUEST, empty=True),
        *(_template("chatglm3", blank=blank, tools_system=chatglm2.TOOLS_SYSTEM) for blank in (" ", "")),
        *(_template("llama3", dates=dates, tools_before=llama.TOOLS_BEFORE) for dates in (None, llama.DATES)),
        *(_template("mistral", blank=blank) for blank in ("", " ")),
        _template("rounds", before=("[gMASK]", "sop"), gap="\n\n", first=1, bare=False),
        _template("rounds", after=("[gMASK]", "<sop>"), gap="\n", first=0, bare=True),
    )


def openai(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as OpenAI writes them: calls in a row in one message, arguments as an object, their results from `tool`."""
    found: list[dict[str, Any]] = []
    for turn in turns(conversation.messages):
        if turn[0].tool:
            calls = [{"type": "function", "function": {"name": m.tool, "arguments": parsed(m.content)}} for m in turn]
            found.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            found += [{"role": "tool" if m.role == "observation" else m.role, "content": m.content} for m in turn]
    return found


def fill(template: str, conversation: Conversation, names: dict[str, Any]) -> str:
    """The prompt of the next answer as `template` writes it. Run in Jinja's sandbox, with the functions transformers gives a template."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    engine = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    engine.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    engine.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    tools = list(conversation.tools) or None
    return engine.from_string(template).render(messages=openai(conversation), tools=tools, add_generation_prompt=True, **names)


def tokens_of(text: str, tokenizer: Encoder) -> list[int]:
    """Text in which the names of control tokens are those tokens, as serving tools read a filled template."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    found: list[int] = []
    for piece in pieces:
        found += [tokenizer.specials[piece]] if piece in tokenizer.specials else tokenizer.encode(piece) if piece else []
    return found


def writable(prompts: Sequence[Conversation], family: Family, tokenizer: Encoder) -> list[Conversation]:
    """Those of `prompts` that a family can write down: not all have tools, or several calls in a row."""
    found = []
    for prompt in prompts:
        try:
            family.render(prompt, tokenizer, open=True)
        except UserError:
            continue
        found.append(prompt)
    return found


def agrees(template: Template, family: Family, tokenizer: Encoder, names: dict[str, Any], prompts: Sequence[Conversation]) -> bool:
    """Whether `template` gives the tokens our renderer gives for every prompt."""
    try:
        before, after = ([tokenizer.specials[name] for name in added] for added in (template.before, template.after))
        for prompt in prompts:
            filled = tokens_of(fill(template.text, prompt, names), tokenizer)
            if [*before, *filled, *after] != family.render(prompt, tokenizer, open=True).tokens:
                return False
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        return False  # a template that cannot be filled gives nobody's prompts
    return True


def template_of(family: Family, tokenizer: Encoder, names: dict[str, Any], prompts: Sequence[Conversation]) -> Template | None:
    """Our renderer's own template; None where its text cannot be one string."""
    return next((template for template in ours() if agrees(template, family, tokenizer, names, prompts)), None)
