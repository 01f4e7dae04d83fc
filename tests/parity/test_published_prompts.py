"""What the published templates of Qwen3, GLM-4-0414 and Llama 3.1 write, case by case: their texts filled in once, not copied here.

docs/models.md says which files they were. A last `<|im_end|>` has no newline here, and GLM-4's last stop token is written.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.parity.test_rendering import Letters
from trueline.data.conversation import Conversation, Message
from trueline.data.tokenizer import load_tokenizer
from trueline.errors import UserError
from trueline.families.chat_template import tokens_of
from trueline.families.family import Family
from trueline.families.glm4 import GLM4_0414
from trueline.families.llama import LLAMA
from trueline.families.qwen3 import QWEN3, render_no_thinking

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "查", "parameters": {"type": "object"}}}
CALLED = (Message("user", "u"), Message("assistant", '{"a": "京"}', "查"), Message("observation", '{"t": 3}'))
TWICE = (
    Message("system", "s"),
    Message("user", "u"),
    Message("assistant", "{}", "f"),
    Message("assistant", '{"a": [1]}', "查"),
    Message("observation", "3"),
    Message("observation", " 7\n"),
)


def said(*texts: str, system: str | None = None) -> tuple[Message, ...]:
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return (*([] if system is None else [Message("system", system)]), *turns)


TALKS: dict[str, tuple[tuple[Message, ...], int]] = {
    "rounds": (said("u ", " a\n", "\nv", system=" s\n"), 0),
    "empty system": (said("u", system=""), 0),
    "tool": (said(" u "), 1),
    "tools and system": (said("u", system="s"), 2),
    "call": (CALLED, 1),
    "calls in a row": (TWICE, 0),
    "thought in history": (said("u", "<think>\n\nt\n</think>\n\na", "v"), 0),
    "last answer": (said("u", "<think>\nt\n\n</think>\n\n\na\n"), 0),
    "last answer, no thought": (said("u", "\na"), 0),
    "last call": (CALLED[:2], 0),
}
Q, A, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
QWEN_TOOL = '\n{"type": "function", "function": {"name": "查", "parameters": {"type": "object"}}}'
QWEN_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
QWEN_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' + END
)
QWEN_CALL = '<tool_call>\n{"name": "查", "arguments": {"a": "京"}}\n</tool_call>'
SYSTEM = "<|im_start|>system\n"
QWEN = {
    "rounds": f"{SYSTEM} s\n{END}{Q}u {END}{A} a\n{END}{Q}\nv{END}{A}",
    "empty system": f"{SYSTEM}{END}{Q}u{END}{A}",
    "tool": f"{SYSTEM}{QWEN_BEFORE}{QWEN_TOOL}{QWEN_AFTER}{Q} u {END}{A}",
    "tools and system": f"{SYSTEM}s\n\n{QWEN_BEFORE}{QWEN_TOOL * 2}{QWEN_AFTER}{Q}u{END}{A}",
    "call": f"{SYSTEM}{QWEN_BEFORE}{QWEN_TOOL}{QWEN_AFTER}{Q}u{END}{A}{QWEN_CALL}{END}"
    f'{Q}<tool_response>\n{{"t": 3}}\n</tool_response>{END}{A}',
    "calls in a row": f'{SYSTEM}s{END}{Q}u{END}{A}<tool_call>\n{{"name": "f", "arguments": {{}}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "查", "arguments": {{"a": [1]}}}}\n</tool_call>{END}'
    f"{Q}<tool_response>\n3\n</tool_response>\n<tool_response>\n 7\n\n</tool_response>{END}{A}",
    "thought in history": f"{Q}u{END}{A}a{END}{Q}v{END}{A}",
    "last answer": f"{Q}u{END}{A}<think>\nt\n</think>\n\na\n<|im_end|>",
    "last answer, no thought": f"{Q}u{END}{A}<think>\n\n</think>\n\na<|im_end|>",
    "last call": f"{Q}u{END}{A}<think>\n\n</think>\n\n{QWEN_CALL}<|im_end|>",
}
GLM_TOOL = (
    '\n## 查\n\n{\n    "name": "查",\n    "parameters": {\n        "type": "object"\n    }\n}\n'
    "在调用上述函数时，请使用 Json 格式表示调用的参数。"
)
GLM = {  # the marker behind a last answer is the stop token it is trained to write
    "rounds": "<|system|>\n s\n<|user|>\nu <|assistant|>\n a\n<|user|>\n\nv<|assistant|>",
    "empty system": "<|system|>\n<|user|>\nu<|assistant|>",
    "tool": f"<|system|>\n# 可用工具\n{GLM_TOOL}<|user|>\n u <|assistant|>",
    "tools and system": f"<|system|>\n# 可用工具\n{GLM_TOOL * 2}<|system|>\ns<|user|>\nu<|assistant|>",
    "call": f'<|system|>\n# 可用工具\n{GLM_TOOL}<|user|>\nu<|assistant|>查\n{{"a": "京"}}<|observation|>\n{{"t": 3}}<|assistant|>',
    "calls in a row": '<|system|>\ns<|user|>\nu<|assistant|>f\n{}<|assistant|>查\n{"a": [1]}'
    "<|observation|>\n3<|observation|>\n 7\n<|assistant|>",
    "thought in history": "<|user|>\nu<|assistant|>\n<think>\n\nt\n</think>\n\na<|user|>\nv<|assistant|>",
    "last answer": "<|user|>\nu<|assistant|>\n<think>\nt\n\n</think>\n\n\na\n<|user|>",
    "last answer, no thought": "<|user|>\nu<|assistant|>\n\na<|user|>",
    "last call": '<|user|>\nu<|assistant|>查\n{"a": "京"}<|observation|>',
}
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
DATES, EOT = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", "<|eot_id|>"
LS, LU, LA, LT = (HEAD.format(role) for role in ("system", "user", "assistant", "ipython"))
LLAMA_TOOL = (
    '{\n    "type": "function",\n    "function": {\n        "name": "查",\n'
    '        "parameters": {\n            "type": "object"\n        }\n    }\n}\n\n'
)
LLAMA_BEFORE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best answers the given "
    'prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
LLAMA_CALL = '{"name": "查", "parameters": {"a": "京"}}'
LLAMA_3_1 = {
    "rounds": f"{LS}{DATES}s{EOT}{LU}u{EOT}{LA}a{EOT}{LU}v{EOT}{LA}",
    "empty system": f"{LS}{DATES}{EOT}{LU}u{EOT}{LA}",
    "tool": f"{LS}Environment: ipython\n{DATES}{EOT}{LU}{LLAMA_BEFORE}{LLAMA_TOOL}u{EOT}{LA}",
    "tools and system": f"{LS}Environment: ipython\n{DATES}s{EOT}{LU}{LLAMA_BEFORE}{LLAMA_TOOL * 2}u{EOT}{LA}",
    "call": f"{LS}Environment: ipython\n{DATES}{EOT}{LU}{LLAMA_BEFORE}{LLAMA_TOOL}u{EOT}{LA}{LLAMA_CALL}{EOT}"
    f'{LT}"{{\\"t\\": 3}}"{EOT}{LA}',
    "thought in history": f"{LS}{DATES}{EOT}{LU}u{EOT}{LA}<think>\n\nt\n</think>\n\na{EOT}{LU}v{EOT}{LA}",
    "last answer": f"{LS}{DATES}{EOT}{LU}u{EOT}{LA}<think>\nt\n\n</think>\n\n\na{EOT}",
    "last answer, no thought": f"{LS}{DATES}{EOT}{LU}u{EOT}{LA}a{EOT}",
    "last call": f"{LS}{DATES}{EOT}{LU}u{EOT}{LA}{LLAMA_CALL}{EOT}",
}
FAMILIES: dict[str, tuple[Family, dict[str, str], tuple[str, ...]]] = {
    "qwen3": (QWEN3, QWEN, ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")),
    "glm4": (
        GLM4_0414,
        {name: f"[gMASK]<sop>{text}" for name, text in GLM.items()},
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
    "llama": (
        LLAMA,
        {name: f"<|begin_of_text|>{text}" for name, text in LLAMA_3_1.items()},
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT, "<|eom_id|>"),
    ),
}


@pytest.mark.parity("rendering")
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_text(name: str, talk: str) -> None:
    family, wanted, marks = FAMILIES[name]
    messages, tools = TALKS[talk]
    conversation, letters = Conversation(messages, (TOOL,) * tools), Letters(*marks)
    if talk not in wanted:
        with pytest.raises(UserError, match="no format for several tool calls in a row"):
            family.render(conversation, letters)
        return
    assert letters.show(family.render(conversation, letters, open=messages[-1].role != "assistant").tokens) == wanted[talk]
    if name == "qwen3" and messages[-1].role != "assistant":
        silent = letters.show(render_no_thinking(conversation, letters, open=True).tokens)
        assert silent == wanted[talk] + "<think>\n\n</think>\n\n"


APART = {name for name, (messages, _) in TALKS.items() if any(message.content[:1].isspace() for message in messages)}
"""GLM-4's contents are cut apart from the newline before them, so its text is no oracle where one begins with a blank."""


@pytest.mark.parity("rendering")
@pytest.mark.parametrize(("name", "talk"), [*(("qwen3", talk) for talk in TALKS), *(("glm4", talk) for talk in TALKS if talk not in APART)])
def test_the_published_tokens(shared: Path, name: str, talk: str) -> None:
    """The same text cut by the real tokenizer."""
    family, wanted, _ = FAMILIES[name]
    messages, tools = TALKS[talk]
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / {"qwen3": "qwen2"}.get(name, name))
    found = family.render(Conversation(messages, (TOOL,) * tools), tokenizer, open=messages[-1].role != "assistant")
    assert found.tokens == tokens_of(wanted[talk], tokenizer)
