import pytest
import torch

from trueline.data.conversation import Conversation, Message
from trueline.errors import UserError
from trueline.families.glm4 import GLM4, join_gate_up, render, split_gate_up
from trueline.model.decoder import DecoderConfig

U = Message("user", "u")
TOOL = {"type": "function", "function": {"name": "f", "description": "说"}}


@pytest.fixture
def tokenizer(letters):
    return letters("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def trained_text(tokenizer, sample):
    return tokenizer.show([t for t, flag in zip(sample.tokens, sample.trained, strict=True) if flag])


def test_the_seeds_fixture_of_trained_labels(tokenizer):
    """user, assistant (a0 a1), observation, assistant (b0 b1) -> newline a0 a1 <|observation|> newline b0 b1 end."""
    talk = Conversation((U, Message("assistant", "ab"), Message("observation", "o"), Message("assistant", "cd")))
    sample = render(talk, tokenizer)
    assert tokenizer.show(sample.tokens) == "[gMASK]<sop><|user|>\nu<|assistant|>\nab<|observation|>\no<|assistant|>\ncd<|user|>"
    assert trained_text(tokenizer, sample) == "\nab<|observation|>\ncd<|user|>"


def test_last_only_trains_the_last_turn_and_its_end(tokenizer):
    talk = Conversation((U, Message("assistant", "ab"), U, Message("assistant", "cd")))
    sample = render(talk, tokenizer, last_only=True)
    assert trained_text(tokenizer, sample) == "\ncd<|user|>"
    assert sample.tokens == render(talk, tokenizer).tokens


def test_a_call_names_its_tool_and_ends_where_the_observation_begins(tokenizer):
    sample = render(Conversation((U, Message("assistant", "{}", tool="f"))), tokenizer)
    assert tokenizer.show(sample.tokens) == "[gMASK]<sop><|user|>\nu<|assistant|>f\n{}<|observation|>"
    assert trained_text(tokenizer, sample) == "f\n{}<|observation|>"


def test_calls_in_a_row_end_in_each_others_marker(tokenizer):
    calls = (Message("assistant", "{}", tool="f"), Message("assistant", "{}", tool="g"))
    assert trained_text(tokenizer, render(Conversation((U, *calls)), tokenizer, last_only=True)) == "f\n{}<|assistant|>g\n{}<|observation|>"


def test_a_prompt_ends_with_the_marker_and_trains_nothing(tokenizer):
    prompt = render(Conversation((U, Message("assistant", "ab"), U)), tokenizer, open=True)
    assert tokenizer.show(prompt.tokens).endswith("<|user|>\nu<|assistant|>")
    assert not any(prompt.trained)


def test_tools_are_a_system_message_before_the_conversations_own(tokenizer):
    text = tokenizer.show(render(Conversation((Message("system", "s"), U), (TOOL,)), tokenizer, open=True).tokens)
    assert text.count("<|system|>") == 2
    assert text.index('## f\n\n{\n    "name": "f",\n    "description": "说"\n}\n在调用') < text.index("<|system|>\ns<|user|>")
    empty = tokenizer.show(render(Conversation((Message("system", ""), U)), tokenizer, open=True).tokens)
    assert "<|system|>" not in empty


@pytest.mark.parametrize("tool", [{"type": "python"}, {"name": "f"}, {"type": "function", "function": {}}])
def test_other_kinds_of_tools_are_refused(tokenizer, tool):
    with pytest.raises(UserError, match="GLM-4 tools must be"):
        render(Conversation((U,), (tool,)), tokenizer, open=True)


def test_gate_and_up_split_and_join_back():
    config = DecoderConfig(8, 4, 1, 2, 1, 2, 3)
    whole = torch.arange(24.0).reshape(6, 4)
    gate, up = split_gate_up(whole, config)
    assert torch.equal(gate, whole[:3]) and torch.equal(up, whole[3:])
    assert torch.equal(join_gate_up([gate, up], config), whole)


def test_sizes_and_defaults_of_glm_4_9b_chat():
    config = GLM4.read_config({"rope_theta": 5e6})
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (151552, 4096, 40, 32, 2)
    assert (config.head_dim, config.rope_dim, config.rope, config.rope_theta) == (128, 64, "interleaved", 5e6)
    assert (config.norm_eps, config.qkv_bias, config.o_bias, config.tied_embeddings) == (1.5625e-7, True, False, False)


@pytest.mark.parametrize("share", [0.3, 1.5, 0.01])
def test_a_rotated_part_that_does_not_fit_is_refused(share):
    with pytest.raises(UserError, match="partial_rotary_factor"):
        GLM4.read_config({"head_dim": 30, "partial_rotary_factor": share})
