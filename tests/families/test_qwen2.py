import pytest

from trueline.data.conversation import Conversation, Message
from trueline.errors import UserError
from trueline.families.qwen2 import QWEN2, SYSTEM, SYSTEM_2_5, render

U, A, S = Message("user", "u"), Message("assistant", "ab"), Message("system", "s")
CALLS = (Message("assistant", '{"x": 1}', tool="f"), Message("assistant", "{}", tool="g"))
SEEN = (Message("observation", "o"), Message("observation", "p"))
HEAD = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer(letters):
    return letters("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def trained_text(tokenizer, sample):
    return tokenizer.show([t for t, flag in zip(sample.tokens, sample.trained, strict=True) if flag])


def test_trained_is_the_answer_and_its_end(tokenizer):
    sample = render(Conversation((S, U, A, U, A)), tokenizer)
    turn = "\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nab<|im_end|>"
    assert tokenizer.show(sample.tokens) == HEAD + "ab<|im_end|>" + turn
    assert trained_text(tokenizer, sample) == "ab<|im_end|>ab<|im_end|>"


def test_last_only_trains_the_last_turn(tokenizer):
    talk = Conversation((S, U, A, U, *CALLS))
    calls = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert trained_text(tokenizer, render(talk, tokenizer, last_only=True)) == calls + "<|im_end|>"
    assert render(talk, tokenizer, last_only=True).tokens == render(talk, tokenizer).tokens


def test_a_prompt_ends_with_the_header_and_trains_nothing(tokenizer):
    prompt = render(Conversation((S, U)), tokenizer, open=True)
    assert tokenizer.show(prompt.tokens) == HEAD
    assert not any(prompt.trained)
    assert not any(render(Conversation((S, U, A, U)), tokenizer, open=True).trained)


def test_answers_to_calls_in_a_row_are_one_user_turn(tokenizer):
    text = tokenizer.show(render(Conversation((S, U, *CALLS, *SEEN)), tokenizer, open=True).tokens)
    response = "<tool_response>\n{}\n</tool_response>"
    assert text.endswith(
        f"</tool_call><|im_end|>\n<|im_start|>user\n{response.format('o')}\n{response.format('p')}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_default_system_text_is_the_tokenizers_generation(letters, tokenizer):
    assert SYSTEM in tokenizer.show(render(Conversation((U,)), tokenizer, open=True).tokens)
    newer = letters("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    assert SYSTEM_2_5 in newer.show(render(Conversation((U,)), newer, open=True).tokens)


def test_tool_markup_is_tokens_where_the_tokenizer_has_them(letters):
    newer = letters("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    tokens = render(Conversation((S, U, CALLS[0])), newer).tokens
    assert tokens.count(newer.specials["<tool_call>"]) == 1
    spoofed = render(Conversation((S, Message("user", "<tool_call>"))), newer, open=True).tokens
    assert newer.specials["<tool_call>"] not in spoofed


def test_sizes_and_defaults():
    config = QWEN2.read_config({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6})
    assert (config.head_dim, config.rope_theta, config.qkv_bias, config.o_bias) == (16, 1e6, True, False)
    assert (config.vocab_size, config.mlp_size, config.tied_embeddings, config.norm_eps) == (151936, 22016, False, 1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types: expected"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(changes, named):
    with pytest.raises(UserError, match=named):
        QWEN2.read_config({"num_hidden_layers": 4} | changes)


def test_a_window_that_no_layer_uses_is_none():
    for slides, first, windows in ((True, 4, ()), (False, 0, ()), (True, 3, (None, None, None, 8)), (True, 0, (8,) * 4)):
        config = {"num_hidden_layers": 4, "use_sliding_window": slides, "sliding_window": 8, "max_window_layers": first}
        assert QWEN2.read_config(config).windows == windows
