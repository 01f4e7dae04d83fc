"""What every family's renderer keeps, on drawn conversations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.conversation import Conversation, Message, role_problems
from trueline.families.table import FAMILIES, with_template
from trueline.families.transcript import training_samples

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


APART = {
    "chatglm": (("[gMASK]", "<sop>", "<eop>"), FAMILIES["chatglm"], "<eop>"),
    "chatglm2": (("[gMASK]", "sop", "</s>"), FAMILIES["chatglm2"], "</s>"),
    "qwen3": (("<|im_start|>", "<|im_end|>"), FAMILIES["qwen3"], "<|im_end|>"),
    "qwen3_no_thinking": (("<|im_start|>", "<|im_end|>"), with_template(FAMILIES["qwen3"], "qwen3_no_thinking"), "<|im_end|>"),
}
SHOWN = {
    "chatglm": ["Q1[gMASK]<sop>⟦A1<eop>⟧", "[Round 0]\n问：Q1\n答：A1\n[Round 1]\n问：Q2\n答：[gMASK]<sop>⟦A2<eop>⟧"],
    "chatglm2": [
        "[gMASK]sop[Round 1]\n\n问：Q1\n\n答：⟦A1</s>⟧",
        "[gMASK]sop[Round 1]\n\n问：Q1\n\n答：A1\n\n[Round 2]\n\n问：Q2\n\n答：⟦A2</s>⟧",
    ],
    "qwen3": [
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦<think>\nT1\n</think>\n\nA1<|im_end|>⟧",
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nA2<|im_end|>⟧",
    ],
    "qwen3_no_thinking": [
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦A1<|im_end|>⟧",
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦A2<|im_end|>⟧",
    ],
}


@pytest.mark.parametrize("name", APART)
def test_every_answer_is_trained_as_it_would_be_generated(name, letters):
    marks, family, _ = APART[name]
    tokenizer = letters(*marks)
    thought = "<think>\nT1\n</think>\n\n" if name.startswith("qwen3") else ""
    talk = [Message("user", "Q1"), Message("assistant", f"{thought}A1"), Message("user", "Q2"), Message("assistant", "A2")]

    def shown(*messages: Message, last_only: bool = False) -> list[str]:
        found = []
        for sample in training_samples(family, Conversation(messages), tokenizer, last_only):
            start = sample.trained.index(True) if any(sample.trained) else len(sample)
            assert all(sample.trained[start:])
            trained = tokenizer.show(sample.tokens[start:])
            found.append(tokenizer.show(sample.tokens[:start]) + (f"⟦{trained}⟧" if trained else ""))
        return found

    assert shown(*talk) == SHOWN[name] and shown(*talk, last_only=True) == SHOWN[name][1:]
    untrained = [Message("user", "Q1"), Message("assistant", talk[1].content, trained=False), *talk[2:]]
    assert shown(*untrained) == SHOWN[name][1:]
    assert shown(*talk[:3], Message("assistant", "A2", trained=False)) == SHOWN[name][:1]
    (nothing,) = shown(*untrained[:3], Message("assistant", "A2", trained=False))
    assert "⟦" not in nothing


@pytest.mark.parametrize("name", APART)
@given(data=st.data())
def test_samples_of_one_answer_each(name, letters, data):
    marks, family, stop = APART[name]
    tokenizer = letters(*marks)
    messages = data.draw(conversations(tools=name.startswith("qwen3")))
    samples = iter(training_samples(family, Conversation(messages), tokenizer))
    for i, message in enumerate(messages):
        follower = messages[i + 1] if i + 1 < len(messages) else None
        if message.role != "assistant" or (message.tool and follower and follower.role == "assistant"):
            continue
        begin = next(k for k in range(i, -1, -1) if messages[k - 1].role != "assistant")
        prompt = family.render(Conversation(messages[:begin]), tokenizer, open=True)
        sample = next(samples)
        assert sample.tokens[: len(prompt)] == prompt.tokens and (sample.context, sample.anchor) == (prompt.context, prompt.anchor)
        assert sample.trained == [k >= len(prompt) for k in range(len(sample))] and sample.tokens[-1] == tokenizer.specials[stop]
        assert message.content.strip("\n") in tokenizer.show(sample.tokens[len(prompt) :])
    assert next(samples, None) is None


@pytest.mark.parametrize("name", [name for name in TOKENS if not name.startswith("qwen3")])
def test_other_families_train_every_answer_in_one_sample(name, letters):
    family, tokenizer = FAMILY.get(name) or FAMILIES[name], letters(*TOKENS[name])
    talk = Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")))
    assert training_samples(family, talk, tokenizer) == [family.render(talk, tokenizer)]
