"""Our renderers as Jinja templates, for the tools that read a folder's. One rule: a template is in a folder only if it gives our prompts.

Left out: families whose text cannot be one string, because their tokenizer is given it in pieces (ChatGLM, ChatGLM2, ChatGLM3, Mistral's
early versions, models without turns).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trueline.data.conversation import Conversation
from trueline.families.family import Encoder, Family

_NO_TOOLS = """{% if tools %}{{ raise_exception('this template has no form for tools') }}{% endif %}"""
_SYSTEM = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}\
{% else %}{% set system = DEFAULT %}{% set rest = messages %}{% endif %}"""
_TURN = """{% for m in rest %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_CHATML = _NO_TOOLS + _SYSTEM + "{% if system is not none %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}" + _TURN
_GLM4 = (
    _NO_TOOLS
    + """[gMASK]<sop>{% for m in messages %}{% if m.content %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
)
_LLAMA3 = (
    _NO_TOOLS
    + """<|begin_of_text|>{% for m in messages %}\
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content.strip() + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
)
_LLAMA3_1 = (
    _NO_TOOLS
    + _SYSTEM.replace("DEFAULT", "''")
    + """{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\nDATES' + system.strip() + '<|eot_id|>' }}{% for m in rest %}\
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content.strip() + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
).replace("DATES", "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n")
_MISTRAL = (
    _NO_TOOLS
    + _SYSTEM.replace("DEFAULT", "none")
    + """<s>{% for m in rest %}{% if m.role == 'user' %}\
{{ '[INST]' + (system + '\\n\\n' if loop.first and system else '') + m.content + '[/INST]' }}\
{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"""
)
OURS = (
    *(_CHATML.replace("DEFAULT", json.dumps(default)) for default in ("You are a helpful assistant.",)),
    _CHATML.replace("DEFAULT", json.dumps("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
    _CHATML.replace("DEFAULT", "none"),
    _CHATML.replace("DEFAULT", "none").replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"),
    _GLM4,
    _LLAMA3,
    _LLAMA3_1,
    _MISTRAL,
)
"""Tried in turn; the first that gives a renderer's own prompts is its template."""


def fill(template: str, conversation: Conversation, names: dict[str, Any]) -> str:
    """The prompt of the next answer as `template` writes it. Run in Jinja's sandbox, with the functions transformers gives a template."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    engine = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    engine.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    engine.globals["raise_exception"] = refuse
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    return engine.from_string(template).render(messages=messages, tools=None, add_generation_prompt=True, **names)


def tokens_of(text: str, tokenizer: Encoder) -> list[int]:
    """Text in which the names of control tokens are those tokens, as serving tools read a filled template."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    found: list[int] = []
    for piece in pieces:
        found += [tokenizer.specials[piece]] if piece in tokenizer.specials else tokenizer.encode(piece) if piece else []
    return found


def agrees(template: str, family: Family, tokenizer: Encoder, names: dict[str, Any], prompts: Sequence[Conversation]) -> bool:
    """Whether `template` gives the tokens our renderer gives for every prompt."""
    try:
        return all(
            tokens_of(fill(template, prompt, names), tokenizer) == family.render(prompt, tokenizer, open=True).tokens for prompt in prompts
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        return False  # a template that cannot be filled gives nobody's prompts


def template_of(family: Family, tokenizer: Encoder, names: dict[str, Any], prompts: Sequence[Conversation]) -> str | None:
    """Our renderer's own template; None where its text cannot be one string."""
    return next((template for template in OURS if agrees(template, family, tokenizer, names, prompts)), None)
