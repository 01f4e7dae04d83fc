"""Text to token ids and back, for every kind of tokenizer files. One rule: no text ever becomes a control token."""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trueline.data.bytepairs import QuickEncoder
from trueline.data.sentencepiece_tokenizer import Pieces, is_sentencepiece, read_chatglm_pieces, read_pieces
from trueline.errors import UserError

# how each family cuts text before merging; published with the models, not in their files
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GLM4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("ice_text.model",))
_SHORT, _SHORT_KEPT = 64, 1024  # characters; texts
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class Tokenizer:
    """Encodes and decodes plain text; control tokens are known by name in `specials` and are only ever placed by a renderer."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        known: set[int],
        specials: dict[str, int],
        files: dict[str, Path],
        config: dict[str, Any],
    ):
        """`known`: ids that stand for text, `decode` accepts nothing else."""
        self._encode = encode
        self._decode = decode
        self._short: dict[str, list[int]] = {}  # pieces of templates come again with every record
        self._known = known - set(specials.values())
        self.specials = specials
        """Control tokens by their text."""
        self.markup: tuple[str, ...] = ()
        """Added tokens that the tokenizer itself does not call special (Qwen's <tool_call>): whoever types them has typed the token."""
        self.vocab_size = max(known | set(specials.values())) + 1
        """One more than the highest id; a model's embedding may have more rows."""
        self.files = files
        """The files to copy when the model is exported, by name."""
        self.config = config
        """tokenizer_config.json, {} when there is none."""
        self.fingerprint = _fingerprint(files, specials)
        """sha256 over the vocabulary files and the control tokens: equal fingerprints encode alike."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without a beginning token. "<|im_end|>" in it is encoded as the ten characters it is."""
        if len(text) > _SHORT:
            return self._encode(text)
        ids = self._short.get(text)
        if ids is None:
            ids = self._encode(text)
            if len(self._short) < _SHORT_KEPT:
                self._short[text] = ids
        return ids.copy()

    def expect(self, size: int) -> None:
        """So many bytes of text are to be encoded soon: an engine that starts slowly and then is faster may start now."""
        if isinstance(self._encode, QuickEncoder):
            self._encode.expect(size)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens and ids without a text are left out, bytes that are no whole character become U+FFFD."""
        return self._decode([i for i in ids if i in self._known])


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds tokenizer files of a kind `load_tokenizer` looks for."""
    return any(all((Path(folder) / name).is_file() for name in names) for names in _VOCABULARIES)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder: tokenizer.json, else vocab.json + merges.txt (Qwen2), else tokenizer.model, else ice_text.model.

    A tokenizer.model is a sentencepiece model or tiktoken-style (GLM-4), as its content says; ice_text.model is ChatGLM-6B's.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"{place}: no such folder, expected one with tokenizer files")
    found = next((names for names in _VOCABULARIES if all((place / name).is_file() for name in names)), None)
    if found is None:
        looked = ", ".join(" + ".join(names) for names in _VOCABULARIES)
        raise UserError(f"{place} has no tokenizer; looked for {looked}; point model.tokenizer at a folder that has one of them")
    files = {name: place / name for name in (*found, *_COMPANIONS) if (place / name).is_file()}
    config = _json_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    if found[0] == "ice_text.model":
        return _from_pieces(read_chatglm_pieces(files[found[0]], config), files, config)
    if found[0] == "tokenizer.model" and is_sentencepiece(files[found[0]]):
        return _from_pieces(read_pieces(files[found[0]], config, _declared(config)), files, config)
    return {"tokenizer.json": _from_json, "vocab.json": _from_merges, "tokenizer.model": _from_ranks}[found[0]](files, config)


def _from_pieces(pieces: Pieces, files: dict[str, Path], config: dict[str, Any]) -> Tokenizer:
    return Tokenizer(pieces.encode, pieces.decode, pieces.known, pieces.specials, files, config)


def _from_json(files: dict[str, Path], config: dict[str, Any]) -> Tokenizer:
    """The `tokenizers` library's own format. Control tokens are taken out of its tables, so that text cannot reach them.

    Added tokens that the file does not call special are ordinary vocabulary and stay. The token for unknown characters can come of an
    unknown character, not of its name.
    """
    path = files["tokenizer.json"]
    layout = _json_object(path)
    model = layout.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UserError(f"{path}: model type {(model or {}).get('type')}, expected BPE; other kinds of tokenizer.json are not supported")
    added = layout.get("added_tokens") or []
    unknown = model.get("unk_token")
    specials = {t["content"]: t["id"] for t in added if t.get("special") and t["content"] != unknown}
    specials |= {text: i for text, i in _declared(config).items() if text != unknown}
    kept = [t for t in added if t["content"] not in specials and t["content"] != unknown]
    layout |= {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
    unknown_id = model["vocab"].get(unknown)
    # an added token that the vocabulary lacks would be numbered anew, by how many there are
    plain = {text: i for text, i in model["vocab"].items() if text not in specials}
    model["vocab"] = plain | {t["content"]: t["id"] for t in kept}
    try:
        engine = tokenizers.Tokenizer.from_str(json.dumps(layout))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json that can be used ({error})") from None
    found = _from_engine(engine, specials, files, config, {unknown_id} - {None})
    found.markup = tuple(t["content"] for t in kept if t["content"].startswith(("<", "[")))
    if _is_qwen2(layout):
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        found._encode = QuickEncoder(found._encode, plain, merges, _QWEN2_SPLIT, [t["content"] for t in kept])  # type: ignore[arg-type]
    return found


def _is_qwen2(layout: dict[str, Any]) -> bool:
    """Whether a tokenizer.json cuts and merges text as Qwen2's does, by nothing but merges of bytes."""
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    steps = layout.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers") or []
    model = layout["model"]
    more = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    alone = not any(model.get(name) for name in more)
    levels = [part for part in parts if part.get("type") == "ByteLevel" and not part.get("use_regex") and not part.get("add_prefix_space")]
    return alone and (layout.get("normalizer") or {}).get("type") == "NFC" and len(parts) == 2 and parts[0] == split and parts[1:] == levels


def _from_merges(files: dict[str, Path], config: dict[str, Any]) -> Tokenizer:
    """Qwen2's byte-level pair encoding as it was published, before tokenizer.json."""
    declared = config.get("tokenizer_class", "Qwen2Tokenizer")
    if declared not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise UserError(f"{files['vocab.json']}: made for a {declared}, expected Qwen2Tokenizer's; save that tokenizer as tokenizer.json")
    vocabulary = _json_object(files["vocab.json"])
    lines = files["merges.txt"].read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    specials = _required(config, files["vocab.json"])
    plain = {text: i for text, i in vocabulary.items() if text not in specials}
    try:
        engine = tokenizers.Tokenizer(models.BPE(vocab=plain, merges=merges))  # type: ignore[arg-type]
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{files['merges.txt']}: does not fit vocab.json ({error})") from None
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    found = _from_engine(engine, specials, files, config, set())
    found._encode = QuickEncoder(found._encode, plain, merges, _QWEN2_SPLIT)  # type: ignore[arg-type]
    return found


def _from_engine(
    engine: tokenizers.Tokenizer, specials: dict[str, int], files: dict[str, Path], config: dict[str, Any], silent: set[int]
) -> Tokenizer:
    known = set(engine.get_vocab(with_added_tokens=True).values()) - silent

    def encode(text: str) -> list[int]:
        ids: list[int] = engine.encode(text, add_special_tokens=False).ids
        return ids

    def decode(ids: list[int]) -> str:
        text: str = engine.decode(ids, skip_special_tokens=False)
        return text

    return Tokenizer(encode, decode, known, specials, files, config)


def _from_ranks(files: dict[str, Path], config: dict[str, Any]) -> Tokenizer:
    """GLM-4's tokenizer.model: a line for each token, its bytes in base64 and its rank."""
    path = files["tokenizer.model"]
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: not `<base64> <rank>`, expected a tiktoken-style file or a sentencepiece model") from None
    if not ranks:
        raise UserError(f"{path}: empty file, expected lines of `<base64> <rank>`")
    specials = _required(config, path)
    engine = tiktoken.Encoding("glm4", pat_str=_GLM4_SPLIT, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(engine.encode_ordinary, engine.decode, set(ranks.values()), specials, files, config)


def _declared(config: dict[str, Any]) -> dict[str, int]:
    """Control tokens that tokenizer_config.json names, with their ids."""
    table = config.get("added_tokens_decoder") or {}
    return {token["content"]: int(i) for i, token in table.items() if token.get("special")}


def _required(config: dict[str, Any], vocabulary: Path) -> dict[str, int]:
    specials = _declared(config)
    if not specials:
        raise UserError(
            f"{vocabulary}: no control tokens known, expected added_tokens_decoder in the tokenizer_config.json beside it; "
            "copy that file from the published model"
        )
    return specials


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _fingerprint(files: dict[str, Path], specials: dict[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(specials, sort_keys=True).encode())
    for name in sorted(set(files) - set(_COMPANIONS)):
        digest.update(name.encode() + b"\0" + files[name].read_bytes())
    return digest.hexdigest()
