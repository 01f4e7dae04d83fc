"""The second engine gives the first one's ids, or is not used."""

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueline.data.bytepairs import LONGEST, QuickEncoder, byte_table
from trueline.data.reader import read_records
from trueline.data.tokenizer import load_tokenizer

PATTERN = r"\p{L}+|[^\p{L}]+"


@pytest.fixture(scope="module")
def quick(shared: Path) -> QuickEncoder:
    encoder = load_tokenizer(shared / "data/tokenizers/qwen2")._encode
    assert isinstance(encoder, QuickEncoder)
    encoder.expect(10**7)
    assert encoder.second is not None and encoder.second is not encoder.first
    return encoder


@settings(max_examples=500, deadline=None)
@given(text=st.text(max_size=40) | st.text("abst'SLRVEMdT \n\r\t12ſK.,!?’你好，。éÉ\u0301ａ①ﬁẗŉ\u3000\u00a0👍ก็한ㄱ<|>", max_size=40))
def test_any_text_gives_the_first_engines_ids(quick: QuickEncoder, text: str) -> None:
    assert quick(text) == quick.first(text)


def test_every_pair_of_ascii_characters(quick: QuickEncoder) -> None:
    texts = ["x" + a + b + "'1" for a, b in product(map(chr, range(128)), repeat=2)]
    assert [quick(text) for text in texts] == [quick.first(text) for text in texts]


def test_every_letter_of_the_basic_plane(quick: QuickEncoder) -> None:
    texts = [f"a{chr(c)}b {chr(c)}1'{chr(c)}" for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    assert [quick(text) for text in texts] == [quick.first(text) for text in texts]


def test_real_records(quick: QuickEncoder, shared: Path) -> None:
    files = [shared / f"data/llamafactory_demos/{name}.json" for name in ("alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_zh_demo")]
    for record in read_records([str(file) for file in files]):
        assert quick(str(record.value)) == quick.first(str(record.value))


def test_long_texts_and_unknown_characters_go_to_the_first(quick: QuickEncoder) -> None:
    def refuse(text: str) -> list[int]:
        raise AssertionError(text[:20])

    whole, quick.second = quick.second, refuse
    try:
        for text in ("é" * (LONGEST + 1), "\u0378", "a\u200db", "\ue000"):
            assert quick(text) == quick.first(text)
        with pytest.raises(AssertionError):
            quick("é")
    finally:
        quick.second = whole


def made(merges: list[tuple[str, str]], ids: dict[str, int]) -> QuickEncoder:
    vocabulary = {character: i for i, character in enumerate(byte_table())} | ids
    return QuickEncoder(lambda text: [0], vocabulary, merges, PATTERN)


def test_merges_out_of_order_keep_the_first_engine() -> None:
    encoder = made([("a", "b"), ("b", "c")], {"ab": 257, "bc": 256})
    encoder.expect(10**7)
    assert encoder.second is encoder.first


def test_a_token_no_merge_makes_is_never_given() -> None:
    encoder = made([("a", "b"), ("b", "c"), ("ab", "c")], {"ab": 256, "bc": 257, "abc": 258, "xyz": 259})
    encoder.expect(10**7)
    assert encoder.second is not None and encoder.second is not encoder.first
    assert encoder("abc xyz abcab") == [258, *(encoder.vocabulary[c] for c in "Ġxyz"), encoder.vocabulary["Ġ"], 258, 256]


def test_too_few_bytes_keep_the_first_engine() -> None:
    encoder = QuickEncoder(lambda text: [0], {"a": 0, "b": 1, "ab": 2}, [("a", "b")], PATTERN)
    encoder.expect(10**7)
    assert encoder.second is encoder.first
