"""What every family's renderer keeps, on drawn conversations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.conversation import Conversation, Message, role_problems
from trueline.families.table import FAMILIES

TOKENS = {
    "qwen2": ("<|im_start|>", "<|im_end|>"),
    "glm": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": ("<s>", "</s>"),
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
    family, tokenizer = FAMILIES["llama" if name == "plain" else name], letters(*TOKENS[name])
    messages = data.draw(conversations(tools=family.name != "llama"))
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
