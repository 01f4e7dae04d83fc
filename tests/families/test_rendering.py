"""What every family's renderer keeps, on drawn conversations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.conversation import Conversation, Message, role_problems
from trueline.families.table import FAMILIES, with_template

TOKENS = {
    "qwen2": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "qwen3_thinks": ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    "glm4": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "chatglm3": ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "</s>"),
    "chatglm4": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "mistral": ("<s>", "</s>"),
    "mistral_v3": ("<s>", "</s>", "[INST]", "[/INST]"),
    "llama_3_1": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "glm": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": ("<s>", "</s>"),
}
FAMILY = {
    "plain": FAMILIES["llama"],
    "llama_3_1": FAMILIES["llama"],
    "qwen3_thinks": FAMILIES["qwen3"],
    "mistral_v3": FAMILIES["mistral"],
    "chatml": with_template(FAMILIES["llama"], "chatml"),
}
TEXT = st.text(st.sampled_from("ab \n<|im_end>说"), min_size=1, max_size=4)


@st.composite
def conversations(draw: st.DrawFn, tools: bool) -> tuple[Message, ...]:
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXT)))
        for calls in draw(st.lists(st.integers(1, 2), max_size=2)) if tools else []:
            messages += [Message("assistant", "{}", tool=draw(st.sampled_from("fg"))) for _ in range(calls)]
            messages += [Message("observation", draw(TEXT)) for _ in range(calls)]
        messages.append(Message("assistant", draw(TEXT)))
    assert not role_problems(tuple(messages), waiting=False)
    return tuple(messages)


@pytest.mark.parametrize("name", TOKENS)
@given(data=st.data())
def test_each_answer_follows_the_prompt_it_would_be_generated_from(name, letters, data):
    family, tokenizer = FAMILY.get(name) or FAMILIES[name], letters(*TOKENS[name])
    messages = data.draw(conversations(tools=name not in ("llama", "plain", "llama_3_1", "mistral", "mistral_v3")))
    whole = family.render(Conversation(messages), tokenizer)
    last = family.render(Conversation(messages), tokenizer, last_only=True)
    stops = {tokenizer.specials[text] for text in family.stop if text in tokenizer.specials}
    spoken = 0
    for i, message in enumerate(messages):
        if message.role != "assistant" or messages[i - 1].role == "assistant":
            continue
        prompt = family.render(Conversation(messages[:i]), tokenizer, open=True)
        start = len(prompt)
        assert whole.tokens[:start] == prompt.tokens and not any(prompt.trained)
        end = start + whole.trained[start:].index(False) if False in whole.trained[start:] else len(whole)
        assert end > start and whole.tokens[end - 1] in stops
        spoken += end - start
        # the one turn `last_only` trains, and all of it
        assert last.trained[start:end] == [i > max(k for k, m in enumerate(messages) if m.role != "assistant")] * (end - start)
    assert sum(whole.trained) == spoken
    assert last.tokens == whole.tokens and whole.tokens[-1] in stops and last.trained[-1]


@pytest.mark.parametrize("name", [name for name in TOKENS if name != "qwen3_thinks"])
def test_a_turn_that_is_not_to_be_trained_is_only_read(name, letters):
    family, tokenizer = FAMILY.get(name) or FAMILIES[name], letters(*TOKENS[name])
    talk = [Message("user", "a"), Message("assistant", "XX"), Message("user", "b"), Message("assistant", "YY")]
    whole = family.render(Conversation(tuple(talk)), tokenizer)
    talk[1] = Message("assistant", "XX", trained=False)
    partly = family.render(Conversation(tuple(talk)), tokenizer)
    last = family.render(Conversation(tuple(talk)), tokenizer, last_only=True)
    assert partly.tokens == whole.tokens and partly.trained == last.trained and sum(partly.trained) < sum(whole.trained)
    talk[3] = Message("assistant", "YY", trained=False)
    assert not any(family.render(Conversation(tuple(talk)), tokenizer).trained)


def test_a_model_that_only_trains_its_last_answer_can_leave_it_out(letters):
    tokenizer = letters("[gMASK]", "sop", "</s>", "<sop>", "<eop>")
    for name in ("chatglm", "chatglm2"):
        talk = (Message("user", "a"), Message("assistant", "XX", trained=False))
        assert not any(FAMILIES[name].render(Conversation(talk), tokenizer).trained)
        answered = FAMILIES[name].render(Conversation((talk[0], Message("assistant", "XX"))), tokenizer)
        prompt = FAMILIES[name].render(Conversation(talk[:1]), tokenizer, open=True)
        assert answered.tokens[: len(prompt)] == prompt.tokens and answered.trained == [False] * len(prompt) + [True] * 3
