import pytest

from trueline.data.conversation import Conversation, Message
from trueline.data.tokenizer import load_tokenizer
from trueline.errors import UserError
from trueline.families.family import stop_ids
from trueline.families.llama import LLAMA, render
from trueline.model.rotary import RopeScaling

U, A = Message("user", " u "), Message("assistant", "ab")


@pytest.fixture
def headers(letters):
    return letters("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.fixture
def plain(letters):
    return letters("<s>", "</s>")


def trained_text(tokenizer, sample):
    return tokenizer.show([t for t, flag in zip(sample.tokens, sample.trained, strict=True) if flag])


def test_llama_3_headers(headers):
    sample = render(Conversation((Message("system", "s"), U, A)), headers)
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    wanted = "<|begin_of_text|>" + turn.format("system", "s") + turn.format("user", "u") + turn.format("assistant", "ab")
    assert headers.show(sample.tokens) == wanted
    assert trained_text(headers, sample) == "ab<|eot_id|>"
    prompt = render(Conversation((U,)), headers, open=True)
    assert headers.show(prompt.tokens).endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert not any(prompt.trained)


def test_plain_text_is_joined_as_it_is(plain):
    sample = render(Conversation((U, A, U, A)), plain)
    assert plain.show(sample.tokens) == "<s> u ab</s> u ab</s>"
    assert trained_text(plain, sample) == "ab</s>ab</s>"
    assert trained_text(plain, render(Conversation((U, A, U, A)), plain, last_only=True)) == "ab</s>"


def test_an_empty_plain_prompt_is_the_start_token_alone(plain):
    assert plain.show(render(Conversation((Message("user", ""),)), plain, open=True).tokens) == "<s>"


def test_a_plain_tokenizer_without_an_end_is_refused_when_an_answer_must_end(letters):
    with pytest.raises(UserError, match="</s>"):
        render(Conversation((U, A)), letters("<s>"))


@pytest.mark.parametrize(
    "talk",
    [
        Conversation((U, A), ({"type": "function", "function": {"name": "f"}},)),
        Conversation((U, Message("assistant", "{}", tool="f"))),
        Conversation((U, A, Message("observation", "o"), A)),
    ],
)
def test_tools_are_refused(plain, headers, talk):
    for tokenizer in (plain, headers):
        with pytest.raises(UserError, match="no format for tools"):
            render(talk, tokenizer)


def test_a_story_goes_on_with_one_blank(shared):
    """A SentencePiece tokenizer writes a blank before every text; the answer's own blank must not come on top of it."""
    tokenizer = load_tokenizer(shared / "models" / "stories260K" / "hf-llama")
    sample = render(Conversation((Message("user", "Once upon"), Message("assistant", " a time"))), tokenizer)
    start, end = tokenizer.specials["<s>"], tokenizer.specials["</s>"]
    assert sample.tokens == [start, *tokenizer.encode("Once upon a time"), end]
    assert stop_ids(LLAMA, tokenizer) == {start, end}


def test_sizes_and_defaults():
    config = LLAMA.read_config({})
    assert (config.vocab_size, config.num_kv_heads, config.head_dim, config.norm_eps) == (32000, 32, 128, 1e-6)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    biased = LLAMA.read_config({"attention_bias": True, "mlp_bias": False})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)


def test_llama_3_1s_scaled_angles():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LLAMA.read_config({"rope_scaling": scaling | {"original_max_position_embeddings": 8192}})
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    with pytest.raises(UserError) as caught:
        LLAMA.read_config({"rope_scaling": {"rope_type": "llama3"}})
    missing = [f"rope_scaling.{key}" for key in ("factor", "low_freq_factor", "high_freq_factor")]
    assert [p.split(":")[0] for p in caught.value.problems] == missing
