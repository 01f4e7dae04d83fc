"""SentencePiece models: Llama's and Mistral's tokenizer.model, that of ChatGLM2 and 3, and ChatGLM-6B's ice_text.model.

One rule: control pieces are found by name, and text cannot reach them. SentencePiece never matches those of its type CONTROL in a text;
any other piece that a tokenizer calls special is made UNUSED before the model is loaded.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from trueline.errors import UserError

# published in ChatGLM2's and 3's own code, not in their files; they follow the vocabulary in this order
CHATGLM = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHATGLM_6B = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<s>", "</s>")
TEXT_PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of sentencepiece's ModelProto
UNUSED = 5  # of its types of piece
LONGEST_BLANK = 80  # ChatGLM-6B: <|blank_2|> to <|blank_80|>


@dataclass(frozen=True)
class Pieces:
    """What a tokenizer is made of: `known` are the ids that stand for text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    known: set[int]
    specials: dict[str, int]


def is_sentencepiece(path: Path) -> bool:
    """Whether a tokenizer.model is one: its first byte opens a piece, where a tiktoken-style file has base64."""
    with path.open("rb") as file:
        return file.read(1) == b"\n" and file.read(1) != b"\n"


def read_pieces(path: Path, config: dict[str, Any], declared: dict[str, int]) -> Pieces:
    """A tokenizer.model. `declared`: the control tokens of tokenizer_config.json, beside the model's own control pieces."""
    data = path.read_bytes()
    plain = _load(path, data)
    specials = {plain.id_to_piece(i): i for i in range(len(plain)) if plain.is_control(i)}
    if config.get("tokenizer_class") == "ChatGLMTokenizer":
        specials |= {name: len(plain) + i for i, name in enumerate(CHATGLM)}
    unknown = plain.id_to_piece(plain.unk_id())
    specials |= {name: i for name, i in declared.items() if name != unknown}
    for name, i in declared.items():
        if i < len(plain) and plain.id_to_piece(i) != name:
            raise UserError(f"{path}: tokenizer_config.json does not belong to it: {name} is {i} there, here {plain.id_to_piece(i)!r}")
    reachable = {i for i in specials.values() if i < len(plain) and not plain.is_control(i)}
    engine = _load(path, _without(data, reachable)) if reachable else plain
    known = {i for i in range(len(plain)) if not plain.is_control(i) and i != plain.unk_id()}
    return Pieces(engine.encode, engine.decode, known, specials)


def read_chatglm_pieces(path: Path, config: dict[str, Any]) -> Pieces:
    """ChatGLM-6B's ice_text.model. Its ids follow those of `num_image_tokens` images (20,000 before v1.1).

    Line breaks, tabs and runs of blanks have pieces of their own, written <n>, <|tab|> and <|blank_k|>. These are text, not control
    tokens: as in the authors' tokenizer, who types them has typed a line break, a tab or blanks.
    """
    first = config.get("num_image_tokens", 20000)
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first <= 1_000_000:
        place = path.with_name("tokenizer_config.json")
        raise UserError(f"{place}: num_image_tokens: {first!r}, expected a whole number from 0 to 1,000,000")
    model = _load(path, path.read_bytes())
    specials = {name: i + first for name in CHATGLM_6B if model.is_control(i := model.piece_to_id(name))}
    if missing := [name for name in ("[gMASK]", "<sop>", "<eop>") if name not in specials]:
        raise UserError(f"{path}: has no control piece {', '.join(missing)}, expected ChatGLM-6B's own file")

    def encode(text: str) -> list[int]:
        return [i + first for i in model.encode(_mark_blanks(text))]

    def decode(ids: list[int]) -> str:
        return _unmark_blanks(model.decode([i - first for i in ids]))

    known = {i + first for i in range(len(model)) if not model.is_control(i) and i != model.unk_id()}
    return Pieces(encode, decode, known, specials)


def _mark_blanks(text: str) -> str:
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    # the longest first, as the authors replace them: 81 blanks are 80 and one
    return re.sub(f" {{2,{LONGEST_BLANK}}}", lambda run: f"<|blank_{len(run[0])}|>", text)


def _unmark_blanks(text: str) -> str:
    def blanks(found: re.Match[str]) -> str:
        length = int(found[1])
        return " " * length if 2 <= length <= LONGEST_BLANK else found[0]

    return re.sub(r"<\|blank_(\d{1,2})\|>", blanks, text.replace("<n>", "\n").replace("<|tab|>", "\t"))


def _load(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece reads a file that was cut between two fields without a word, so the fields are counted first."""
    try:
        fields = {number for number, *_ in _fields(data, 0, len(data))}
        if not {TEXT_PIECES, TRAINER, NORMALIZER} <= fields:
            raise ValueError("its end is missing")
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: not a whole sentencepiece model ({str(error).splitlines()[0]}); copy it again") from None
    return model


def _without(data: bytes, pieces: set[int]) -> bytes:
    """The model with these pieces of type UNUSED: no text is cut into them, and ids stay."""
    parts, end, index = [], 0, 0
    for number, start, first, last in _fields(data, 0, len(data)):
        if number != TEXT_PIECES:
            continue
        if index in pieces:
            body = data[first:last] + bytes([3 << 3, UNUSED])  # of a field that stands twice the last one counts
            parts += [data[end:start], bytes([TEXT_PIECES << 3 | 2]), _varint(len(body)), body]
            end = last
        index += 1
    return b"".join([*parts, data[end:]])


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Protocol buffer fields: number, where its tag, its content and the next field begin."""
    while at < end:
        start = at
        tag, at = _read_varint(data, at)
        if tag & 7 == 2:
            size, at = _read_varint(data, at)
        elif tag & 7 == 0:
            size = _read_varint(data, at)[1] - at
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
        else:
            raise ValueError("no protocol buffer")
        if at + size > end:
            raise ValueError("cut short")
        yield tag >> 3, start, at, at + size
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("cut short")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
