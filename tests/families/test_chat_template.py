"""Our templates against the real tokenizers and transformers' own engine."""

from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from trueline.data.conversation import Conversation, Message
from trueline.data.tokenizer import Tokenizer, load_tokenizer
from trueline.families.chat_template import agrees, fill, template_of, tokens_of
from trueline.families.chatglm2 import GLM4_ORIGINAL
from trueline.families.family import Family
from trueline.families.glm4 import GLM4, GLM4_0414
from trueline.families.qwen2 import QWEN2
from trueline.families.qwen3 import QWEN3
from trueline.families.table import with_template

PROMPTS = [
    Conversation((Message("user", "北京天气 <b> & \"x\" 'y'"),)),
    Conversation((Message("system", "Be brief.\nVery."), Message("user", "Hi"), Message("assistant", "Ho {{1}}"), Message("user", "再来"))),
]
CASES = {
    "qwen2": ("qwen2", QWEN2),
    "qwen3": ("qwen2", QWEN3),
    "qwen3, no thoughts": ("qwen2", with_template(QWEN3, "qwen3_no_thinking")),
    "chatml": ("qwen2", with_template(QWEN2, "chatml")),
    "glm": ("glm4", GLM4),
    "glm4": ("glm4", GLM4_0414),
    "chatglm4": ("glm4", GLM4_ORIGINAL),
}


@pytest.fixture
def tokenizers(shared: Path) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(shared / "data" / "tokenizers" / name) for name in ("qwen2", "glm4")}


@pytest.mark.parametrize("case", CASES)
def test_our_template_gives_our_prompts(tokenizers: dict[str, Tokenizer], case: str) -> None:
    name, family = CASES[case]
    tokenizer = tokenizers[name]
    template = template_of(family, tokenizer, {}, PROMPTS)
    assert template is not None
    for prompt in PROMPTS:
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        (theirs,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        assert theirs == fill(template, prompt, {})
        assert tokens_of(theirs, tokenizer) == family.render(prompt, tokenizer, open=True).tokens
    with pytest.raises(Exception, match="no form for tools"):
        render_jinja_template([messages], tools=[{"type": "function", "function": {"name": "x"}}], chat_template=template)


@pytest.mark.parametrize("name", ["qwen2", "glm4"])
def test_the_templates_of_those_folders(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Right for prompts that end with the user, or replaced: never kept where it is not."""
    family: Family = {"qwen2": QWEN2, "glm4": GLM4}[name]
    theirs = str(tokenizers[name].config["chat_template"])
    (same,) = {agrees(theirs, family, tokenizers[name], {}, PROMPTS)}
    wanted = [family.render(prompt, tokenizers[name], open=True).tokens for prompt in PROMPTS]
    assert same == ([tokens_of(fill(theirs, prompt, {}), tokenizers[name]) for prompt in PROMPTS] == wanted)
    assert not agrees("{{ messages[0].content }}", family, tokenizers[name], {}, PROMPTS)
