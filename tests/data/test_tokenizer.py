"""Ids are the published ones, decoding gives the text back, and no text ever becomes a control token."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from trueline.data.reader import read_records
from trueline.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from trueline.errors import UserError

CONTROLS = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
HARD = [
    "",
    " ",
    "  two",
    "\n\n x\r\n",
    "你好，世界！",
    "👩‍👩‍👧 ok",
    "e\u0301 é",
    "ﬁ ①",
    "don't I'LL 1234567",
    "\t\x00\x7f",
    "<|user|>",
    "<|<|user|>|>",
    " <|user|> ",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json with controls in its vocabulary and one ordinary added token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=CONTROLS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    engine.train_from_iterator(["the cat 你好 sat on the mat <|user|>"] * 50, trainer)
    engine.add_tokens(["<think>"])
    engine.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def qwen2(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data/tokenizers/qwen2")


@pytest.fixture(scope="module")
def glm4(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data/tokenizers/glm4")


def real_texts(shared: Path) -> Iterator[str]:
    """Chinese and English, prose, code-like, many turns."""
    for name in ("llamafactory_demos/alpaca_zh_demo.json", "llamafactory_demos/alpaca_en_demo.json", "oasst_zh/oaast_sft_zh.json"):
        for record in islice(read_records([str(shared / "data" / name)]), 300):
            yield record.value["instruction"] + "\n" + record.value["output"]
    yield from HARD


def test_qwen2_ids(qwen2: Tokenizer) -> None:
    assert qwen2.encode("你好，世界！") == [108386, 3837, 99489, 6313]
    assert qwen2.specials == {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    assert qwen2.vocab_size == 151646
    assert sorted(qwen2.files) == ["merges.txt", "tokenizer_config.json", "vocab.json"]


def test_qwen2_equals_transformers_on_real_text(qwen2: Tokenizer, shared: Path) -> None:
    oracle = Qwen2Tokenizer.from_pretrained(shared / "data/tokenizers/qwen2")
    controls = set(oracle.all_special_ids)
    compared = 0
    for text in real_texts(shared):
        expected = oracle(text, add_special_tokens=False).input_ids
        if controls.isdisjoint(expected):
            assert qwen2.encode(text) == expected, text
            compared += 1
    assert compared > 900


def test_glm4_ids(glm4: Tokenizer) -> None:
    assert glm4.encode("你好，世界！") == [109377, 3837, 99011, 6313]
    assert glm4.encode("\n") == [198] and glm4.encode("你好") == [109377]
    assert glm4.specials["[gMASK]"] == 151331 and glm4.specials["<|observation|>"] == 151338
    assert sorted(glm4.specials.values()) == list(range(151329, 151343)) and glm4.vocab_size == 151343


@pytest.mark.parametrize("name", ["qwen2", "glm4"])
def test_real_text_comes_back(name: str, shared: Path, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in real_texts(shared):
        back = tokenizer.decode(tokenizer.encode(text))
        assert back == text or (name == "qwen2" and text == "e\u0301 é" and back == "é é"), text  # Qwen2 composes characters (NFC)


@pytest.mark.parametrize("name", ["qwen2", "glm4"])
def test_control_names_in_text_stay_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "a" + "".join(tokenizer.specials) + " ".join(tokenizer.specials)
    ids = tokenizer.encode(text)
    assert set(tokenizer.specials.values()).isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_stories_tokenizer(shared: Path) -> None:
    folder = shared / "models/stories260K/hf-llama"
    tokenizer = load_tokenizer(folder)
    oracle = Engine.from_file(str(folder / "tokenizer.json"))
    for text in ["Once upon a time, there was a girl.", "你好 ok", "  two\n\n spaces", "日本 <unk>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if "<" not in text:
            assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert tokenizer.specials == {"<s>": 1, "</s>": 2} and tokenizer.vocab_size == 512
    assert {0, 1, 2}.isdisjoint(tokenizer.encode("<s></s><unk> <s>"))
    assert tokenizer.decode([1, *tokenizer.encode("Once"), 2, 0]) == "Once"


def test_a_json_tokenizer_equals_its_library_and_transformers_on_plain_text(small: Path) -> None:
    ours, engine = load_tokenizer(small), Engine.from_file(str(small / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(small)
    for text in HARD:
        if "<|" not in text:
            assert ours.encode(text) == engine.encode(text).ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.specials == {"<|endoftext|>": 0, "<|user|>": 1, "<|assistant|>": 2}
    last = engine.get_vocab_size() - 1
    assert ours.encode("<think>") == [last]  # the file does not call it special: ordinary vocabulary
    assert ours.decode([last]) == "<think>" and ours.vocab_size == last + 1


@given(st.lists(st.text(max_size=6) | st.sampled_from([*CONTROLS, "<|", "|>", "user", " "]), max_size=8))
@settings(max_examples=200)
def test_no_text_becomes_a_control_token(small: Path, pieces: list[str]) -> None:
    tokenizer = load_tokenizer_once(small)
    text = "".join(pieces).encode("utf-8", "replace").decode()
    ids = tokenizer.encode(text)
    assert {0, 1, 2}.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


_loaded: dict[Path, Tokenizer] = {}


def load_tokenizer_once(folder: Path) -> Tokenizer:
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    return _loaded[folder]


def test_decode_leaves_out_controls_and_unknown_ids_and_survives_half_a_character(small: Path) -> None:
    tokenizer = load_tokenizer(small)
    ids = tokenizer.encode("cat 鑫")
    assert tokenizer.decode([0, *ids[:3], 1, 10**9, *ids[3:], 2, -1]) == "cat 鑫"
    assert tokenizer.decode(ids[:-1]) == "cat \ufffd" and tokenizer.decode([]) == ""


def test_half_a_character_in_the_published_tokenizers(qwen2: Tokenizer, glm4: Tokenizer) -> None:
    for tokenizer in (qwen2, glm4):
        ids = tokenizer.encode("\U00030edd")
        assert len(ids) > 1 and "\ufffd" in tokenizer.decode(ids[:-1])
        assert tokenizer.decode([151700, *ids]) == "\U00030edd"  # a row of the padded embedding that is no token


def test_the_fingerprint_follows_what_encodes(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    original = load_tokenizer(small)
    assert load_tokenizer(copy).fingerprint == original.fingerprint
    (copy / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    changed = load_tokenizer(copy)
    assert changed.fingerprint == original.fingerprint and changed.config == {"padding_side": "left"}
    assert set(changed.files) == {"tokenizer.json", "tokenizer_config.json"} and changed.files["tokenizer.json"] == copy / "tokenizer.json"
    layout = json.loads((copy / "tokenizer.json").read_text())
    layout["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(layout))
    assert load_tokenizer(copy).fingerprint != original.fingerprint


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    names = r"tokenizer.json, vocab.json \+ merges.txt, tokenizer.model, ice_text.model"
    with pytest.raises(UserError, match=f"looked for {names}; point model.tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "vocab.json").write_text("{}")
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer.json": "{"}, "cannot be read as JSON"),
        ({"tokenizer.json": "[]"}, "expected a JSON object"),
        ({"tokenizer.json": '{"model": {"type": "Unigram", "vocab": []}}'}, "model type Unigram, expected BPE"),
        (
            {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'},
            "not a tokenizer.json that can be used",
        ),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "no control tokens known, expected added_tokens_decoder"),
        (
            {"vocab.json": '{"a": 0}', "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},
            "made for a GPT2Tokenizer",
        ),
        (
            {
                "vocab.json": '{"a": 0}',
                "merges.txt": "a b\n",
                "tokenizer_config.json": '{"added_tokens_decoder": {"1": {"content": "<s>", "special": true}}}',
            },
            "does not fit vocab.json",
        ),
        ({"tokenizer.model": "\n\x0e\n\x05<unk>"}, "not a whole sentencepiece model (cut short); copy it again"),
        ({"tokenizer.model": "<unk>"}, "expected a tiktoken-style file or a sentencepiece model"),
        ({"tokenizer.model": ""}, "empty file"),
        ({"tokenizer.model": "YQ== 0\n"}, "no control tokens known"),
    ],
)
def test_broken_tokenizer_files(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and sentence in str(caught.value) and "\n" not in str(caught.value)
