"""Our templates against our renderers, the real tokenizers and transformers' own engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from trueline.data.conversation import Conversation, Message
from trueline.data.tokenizer import Tokenizer, load_tokenizer
from trueline.families.chat_template import Template, agrees, fill, openai, ours, template_of, tokens_of, writable
from trueline.families.chatglm2 import GLM4_ORIGINAL
from trueline.families.family import Family
from trueline.families.glm4 import GLM4, GLM4_0414
from trueline.families.qwen2 import QWEN2
from trueline.families.qwen3 import QWEN3
from trueline.families.table import FAMILIES, with_template
from trueline.recipes.gate import PROMPTS, WEATHER

CASES = {
    "qwen2": ("qwen2", QWEN2),
    "qwen3": ("qwen2", QWEN3),
    "qwen3, no thoughts": ("qwen2", with_template(QWEN3, "qwen3_no_thinking")),
    "chatml": ("qwen2", with_template(QWEN2, "chatml")),
    "glm": ("glm4", GLM4),
    "glm4": ("glm4", GLM4_0414),
    "chatglm4": ("glm4", GLM4_ORIGINAL),
    "chatglm3": ("chatglm3-6b", FAMILIES["chatglm3"]),
    "chatglm2": ("chatglm3-6b", FAMILIES["chatglm2"]),
    "chatglm": ("chatglm-6b", FAMILIES["chatglm"]),
}
TOOLS = ("qwen2", "qwen3", "qwen3, no thoughts", "chatml", "glm", "glm4", "chatglm4", "chatglm3")
MARKS = {
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "qwen, tools": ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    "qwen, marked": ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"),
    "glm": ("[gMASK]", "<sop>", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "</s>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama 3.1": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "chatglm": ("[gMASK]", "<sop>", "<eop>"),
}
DRAWN: dict[str, tuple[str, Family, bool]] = {
    "qwen2": ("qwen", QWEN2, True),
    "qwen2.5": ("qwen, tools", QWEN2, True),
    "qwen3": ("qwen, marked", QWEN3, True),
    "qwen3, no thoughts": ("qwen", with_template(QWEN3, "qwen3_no_thinking"), True),
    "chatml": ("qwen", with_template(QWEN2, "chatml"), True),
    "glm": ("glm", GLM4, True),
    "glm4": ("glm", GLM4_0414, True),
    "chatglm3": ("glm", FAMILIES["chatglm3"], True),
    "chatglm2": ("glm", FAMILIES["chatglm2"], False),
    "chatglm": ("chatglm", FAMILIES["chatglm"], False),
    "llama": ("llama", FAMILIES["llama"], False),
    "llama 3.1": ("llama 3.1", FAMILIES["llama"], True),
    "mistral": ("mistral", FAMILIES["mistral"], False),
}
PIECES = ["a", "b ", " ", "\n", "{{1}}", "{%", "'", '"', "\\", "<b>", "说", "</think>", "<think>\n"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "名"]), TEXT | st.integers() | st.none() | st.lists(TEXT, max_size=2), max_size=2)


@pytest.fixture(scope="session")
def tokenizers(shared: Path) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(shared / "data" / "tokenizers" / name) for name in ("qwen2", "glm4", "chatglm3-6b", "chatglm-6b")}


def wrapped(template: Template, text: str, tokenizer: Any) -> list[int]:
    before, after = ([tokenizer.specials[name] for name in names] for names in (template.before, template.after))
    return [*before, *tokens_of(text, tokenizer), *after]


@pytest.mark.parametrize("case", CASES)
def test_our_template_gives_our_prompts(tokenizers: dict[str, Tokenizer], case: str) -> None:
    name, family = CASES[case]
    tokenizer = tokenizers[name]
    prompts = writable(PROMPTS, family, tokenizer)
    assert len(prompts) == (8 if case in TOOLS else 4)
    template = template_of(family, tokenizer, {}, prompts)
    assert template is not None
    for prompt in prompts:
        tools = list(prompt.tools) or None
        (theirs,), _ = render_jinja_template([openai(prompt)], tools=tools, chat_template=template.text, add_generation_prompt=True)
        assert theirs == fill(template.text, prompt, {})
        assert wrapped(template, theirs, tokenizer) == family.render(prompt, tokenizer, open=True).tokens
    if case not in TOOLS:
        with pytest.raises(Exception, match="no form for tools"):
            render_jinja_template([openai(PROMPTS[0])], tools=[WEATHER], chat_template=template.text)


@pytest.fixture(scope="module")
def found() -> dict[str, Template]:
    """The templates of DRAWN, as far as they were needed."""
    return {}


@st.composite
def prompts(draw: st.DrawFn, tools: bool, several: bool) -> Conversation:
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for left in range(draw(st.integers(0, 2)), -1, -1):
        messages.append(Message("user", draw(TEXT)))
        for calls in draw(st.lists(st.integers(1, 2 if several else 1), max_size=2)) if tools else []:
            called = [json.dumps(draw(ARGUMENTS), ensure_ascii=False) for _ in range(calls)]
            messages += [Message("assistant", arguments, draw(st.sampled_from("fg"))) for arguments in called]
            messages += [Message("observation", draw(TEXT)) for _ in range(calls)]
        messages += [Message("assistant", draw(TEXT))] if left else []
    return Conversation(tuple(messages), (WEATHER,) * draw(st.integers(0, 2)) if tools else ())


@pytest.mark.parametrize("name", DRAWN)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_drawn_prompts(letters, found: dict[str, Template], name: str, data: st.DataObject) -> None:
    """Whatever is said, the template's text in transformers' engine is the renderer's."""
    marks, family, tools = DRAWN[name]
    tokenizer = letters(*MARKS[marks])
    if name not in found:
        template = template_of(family, tokenizer, {}, writable(PROMPTS, family, tokenizer))
        assert template is not None
        found[name] = template
    template, prompt = found[name], data.draw(prompts(tools, several=name != "llama 3.1"))
    wanted = tokenizer.show(family.render(prompt, tokenizer, open=True).tokens)
    tools_given = list(prompt.tools) or None
    (text,), _ = render_jinja_template([openai(prompt)], tools=tools_given, chat_template=template.text, add_generation_prompt=True)
    assert "".join((*template.before, text, *template.after)) == wanted


def test_qwen3s_template_knows_enable_thinking(letters) -> None:
    tokenizer = letters(*MARKS["qwen"])
    template = template_of(QWEN3, tokenizer, {}, PROMPTS)
    plain = with_template(QWEN3, "qwen3_no_thinking")
    assert template is not None
    for prompt in PROMPTS:
        wanted = tokenizer.show(plain.render(prompt, tokenizer, open=True).tokens)
        assert fill(template.text, prompt, {"enable_thinking": False}) == wanted
        assert fill(template.text, prompt, {"enable_thinking": True}) == fill(template.text, prompt, {})


def test_whole_conversations_and_arguments_as_text(letters) -> None:
    """What others train on with our template: the renderer's text too, up to the stop token that the next turn brings."""
    said = ("a", "b", "c", "<think>\nt\n</think>\n\nd")
    talk = Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)))
    for family, marks, end in ((QWEN3, "qwen", "\n"), (GLM4_0414, "glm", "")):
        tokenizer = letters(*MARKS[marks])
        template = template_of(family, tokenizer, {}, PROMPTS)
        assert template is not None
        (text,), _ = render_jinja_template([openai(talk)], chat_template=template.text)
        assert text.removesuffix(end) == tokenizer.show(family.render(talk, tokenizer).tokens).removesuffix("<|user|>")
        called = openai(PROMPTS[4])
        (whole,), _ = render_jinja_template([called], chat_template=template.text)
        called[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "北京"}'
        assert render_jinja_template([called], chat_template=template.text)[0] == [whole]


def test_mistral_before_its_brackets_were_tokens(tokenizers: dict[str, Tokenizer], shared: Path, tmp_path: Path) -> None:
    """A SentencePiece model puts a blank before every piece; as one text the blank is written."""
    shutil.copyfile(shared / "data/tokenizers/chatglm3-6b/tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer, family = load_tokenizer(tmp_path), FAMILIES["mistral"]
    assert "[INST]" not in tokenizer.specials and {"<s>", "</s>"} <= tokenizer.specials.keys()
    template = template_of(family, tokenizer, {}, PROMPTS[:3])
    assert template is not None and fill(template.text, PROMPTS[2], {}) == "<s>[INST] One [/INST] 1</s>[INST] Two,\nthree [/INST]"


@pytest.mark.parametrize("name", ["qwen2", "glm4"])
def test_the_templates_of_those_folders(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Right for prompts that end with the user, or replaced: never kept where it is not."""
    family: Family = {"qwen2": QWEN2, "glm4": GLM4}[name]
    theirs = str(tokenizers[name].config["chat_template"])
    (same,) = {agrees(Template(theirs), family, tokenizers[name], {}, PROMPTS[:3])}
    wanted = [family.render(prompt, tokenizers[name], open=True).tokens for prompt in PROMPTS[:3]]
    assert same == ([tokens_of(fill(theirs, prompt, {}), tokenizers[name]) for prompt in PROMPTS[:3]] == wanted)
    assert not agrees(Template(theirs), family, tokenizers[name], {}, PROMPTS)  # neither has tools as servers pass them
    assert not agrees(Template("{{ messages[0].content }}"), family, tokenizers[name], {}, PROMPTS)


def test_a_template_that_writes_todays_date_is_another(letters) -> None:
    tokenizer, family = letters(*MARKS["llama 3.1"]), FAMILIES["llama"]
    prompts = writable(PROMPTS, family, tokenizer)
    template = template_of(family, tokenizer, {}, prompts)
    assert template is not None and "26 Jul 2024" in template.text and len(prompts) == 7
    dated = template.text.replace("{{- (dates or '')", "{{- dates.replace('26 Jul 2024', strftime_now('%d %b %Y'))")
    assert dated != template.text and not agrees(Template(dated), family, tokenizer, {}, prompts)


def test_the_templates_are_whole() -> None:
    assert len({template.text for template in ours()}) == len(ours()) and not any("@" in template.text for template in ours())
