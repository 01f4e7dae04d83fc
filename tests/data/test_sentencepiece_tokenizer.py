"""SentencePiece models trained here: what text becomes, what it can never become, and files that are broken."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.tokenizer import Tokenizer, load_tokenizer
from trueline.errors import UserError

CORPUS = ["say red blue green one two three", "the red one and the blue two", "a green tree; an old red house", "红 蓝 绿 一 二"] * 5
BLANKS = ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
CONTROLS = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]


def train(**options: Any) -> bytes:
    written = io.BytesIO()
    usual = {"vocab_size": 400, "byte_fallback": True, "character_coverage": 1.0, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=written, **usual | options)
    return written.getvalue()


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatglm")
    pieces = train(model_type="unigram", user_defined_symbols=BLANKS, control_symbols=CONTROLS, pad_id=3)
    (folder / "ice_text.model").write_bytes(pieces)
    (folder / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": 0}))
    return folder


def special_free(tokenizer: Tokenizer, text: str) -> bool:
    return not set(tokenizer.encode(text)) & set(tokenizer.specials.values())


def test_chatglm_6b_has_its_controls_and_its_blanks(chatglm: Path) -> None:
    tokenizer = load_tokenizer(chatglm)
    assert {*CONTROLS, "<pad>", "<s>", "</s>"} == set(tokenizer.specials)
    assert list(tokenizer.files) == ["ice_text.model", "tokenizer_config.json"]
    for text in ("red\n\n\tone   two" + " " * 85 + "three", "a\n", "red  ", "[gMASK]<sop>red<eop><pad>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text and special_free(tokenizer, text)
    assert tokenizer.encode("a\nb") == tokenizer.encode("a<n>b")  # as the authors have it: typed marks are blanks
    assert tokenizer.decode(tokenizer.encode("a<|blank_3|>b<n>")) == "a   b\n"
    assert tokenizer.decode([*tokenizer.encode("red"), tokenizer.specials["<eop>"], 10**6]) == "red"


load_once = cache(load_tokenizer)
PARTS = [*CONTROLS, "<pad>", "</s>", "<n>", " ", "\n", "红", "a", "<", "s", "op>", "\u3000", "🙂"]


@given(text=st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_no_text_becomes_a_control_token(chatglm: Path, text: str) -> None:
    assert special_free(load_once(chatglm), text)


def test_images_come_first_before_version_1_1(chatglm: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(chatglm)
    (tmp_path / "ice_text.model").write_bytes((chatglm / "ice_text.model").read_bytes())
    shifted = load_tokenizer(tmp_path)
    assert shifted.encode("red one") == [i + 20000 for i in plain.encode("red one")]
    assert shifted.specials["<eop>"] == plain.specials["<eop>"] + 20000
    assert shifted.decode([5, *shifted.encode("red\none")]) == "red\none"
    (tmp_path / "tokenizer_config.json").write_text('{"num_image_tokens": "many"}')
    with pytest.raises(UserError, match="num_image_tokens: 'many', expected a whole number"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_llamas_declared_tokens_are_out_of_reach(kind: str, tmp_path: Path) -> None:
    """Control pieces by their type; what is declared beside, though the model would match it in a text or lacks it, by its name."""
    (tmp_path / "tokenizer.model").write_bytes(train(model_type=kind, user_defined_symbols=["[INST]", "<tool>"]))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    inst, size = model.piece_to_id("[INST]"), len(model)
    assert inst in model.encode("a [INST] b")
    table = {0: "<unk>", 1: "<s>", 2: "</s>", inst: "[INST]", size: "<|im_end|>"}
    declared = {str(i): {"content": name, "special": True} for i, name in table.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.specials == {"<s>": 1, "</s>": 2, "[INST]": inst, "<|im_end|>": size} and tokenizer.vocab_size == size + 1
    text = "say [INST] red </s><|im_end|> 🙂 <tool>"
    assert special_free(tokenizer, text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert model.piece_to_id("<tool>") in tokenizer.encode(text)  # not declared special: vocabulary
    assert tokenizer.encode("red one two") == model.encode("red one two")
    declared[str(inst)]["content"] = "[OTHER]"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    with pytest.raises(UserError, match=r"does not belong to it: \[OTHER\] is \d+ there, here '\[INST\]'"):
        load_tokenizer(tmp_path)


def test_a_model_that_was_cut_anywhere_is_refused_in_one_sentence(chatglm: Path, tmp_path: Path) -> None:
    whole = (chatglm / "ice_text.model").read_bytes()
    for name in ("tokenizer.model", "ice_text.model"):
        for size in {2, 9, 100, 1000, len(whole) // 2, len(whole) - 1}:
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match="not a whole sentencepiece model") as caught:
                load_tokenizer(tmp_path)
            assert "\n" not in str(caught.value) and name in str(caught.value)
        (tmp_path / name).unlink()
    (tmp_path / "ice_text.model").write_bytes(train(model_type="unigram"))
    with pytest.raises(UserError, match=r"has no control piece \[gMASK\], <sop>, <eop>"):
        load_tokenizer(tmp_path)
