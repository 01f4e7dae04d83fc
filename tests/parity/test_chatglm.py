"""ChatGLM-6B against what its authors' own code returned: logits and loss of a small random model, and their tokenizer's ids."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

import trueline as api
from tests.parity.cases import CHATGLM as CASE
from tests.parity.cases import Made, our_logits, samples
from tests.reference_chatglm import Reference, read_reference
from trueline.config.schema import AdapterConfig
from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Blocks, sample_of
from trueline.data.tokenizer import Tokenizer, load_tokenizer
from trueline.families.chatglm import CHATGLM
from trueline.families.export import save_folder
from trueline.families.folder import load_decoder, open_folder
from trueline.families.peft import Base, load_adapter, save_adapter
from trueline.model.batch import pack
from trueline.model.decoder import Decoder


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with the model, its weights named as they were, and the recorded tensors."""
    folder = tmp_path_factory.mktemp("golden")
    with safe_open(shared / "golden" / "chatglm-6b.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file({n.removeprefix("weight::"): t for n, t in tensors.items() if n.startswith("weight::")}, folder / "model.safetensors")
    config = json.loads((shared / "golden" / "chatglm-6b.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm"} | config))
    return folder, {n: t for n, t in tensors.items() if not n.startswith("weight::")}


@torch.no_grad()
@pytest.mark.parity("logits", "chatglm")
def test_logits_and_loss_are_the_authors(golden: tuple[Path, dict[str, Tensor]]) -> None:
    folder, theirs = golden
    opened = open_folder(folder)
    decoder = load_decoder(opened, torch.float32)
    for case in ("gmask", "labels"):
        rows = theirs[f"{case}::input_ids"].tolist()
        samples = [sample_of(row, [True] * len(row), opened.decoder_config.blocks) for row in rows]
        for group in (samples, samples[::-1], *([s] for s in samples)):  # packed and alone
            batch = pack(group)
            logits = decoder.head(decoder(batch.tokens, batch.layout)).split(batch.lengths)
            for sample, found in zip(group, logits, strict=True):
                torch.testing.assert_close(found, theirs[f"{case}::logits"][rows.index(sample.tokens)], rtol=0, atol=1e-5)
    labels = theirs["labels::labels"]
    logprobs = torch.stack(api.load(str(folder), dtype="float32").logprobs(rows))
    torch.testing.assert_close(-logprobs[labels >= 0].mean(), theirs["labels::loss"][0], rtol=0, atol=1e-5)


@pytest.mark.parity("export", "chatglm")
def test_a_folder_keeps_its_names(golden: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = golden
    opened = open_folder(folder)
    save_folder(tmp_path / "out", load_decoder(opened, torch.float32), opened)
    with safe_open(folder / "model.safetensors", "pt") as before, safe_open(tmp_path / "out" / "model.safetensors", "pt") as after:
        assert set(after.keys()) == {name for name in before.keys() if not name.endswith("inv_freq")}
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in after.keys())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "chatglm"


@torch.no_grad()
@pytest.mark.parity("logits", "chatglm")
def test_our_own_oracle_is_the_authors_too(golden: tuple[Path, dict[str, Tensor]]) -> None:
    folder, theirs = golden
    for row, logits in zip(theirs["gmask::input_ids"].tolist(), theirs["gmask::logits"], strict=True):
        torch.testing.assert_close(read_reference(folder)(row), logits, rtol=0, atol=1e-5)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """What the authors' configuration can say, in small; the three control tokens anywhere in the vocabulary."""
    heads, vocabulary = draw(st.integers(1, 4)), draw(st.integers(12, 60))
    start, gmask, mask = draw(st.lists(st.integers(0, vocabulary - 1), min_size=3, max_size=3, unique=True))
    return {
        "model_type": "chatglm", "position_encoding_2d": True, "vocab_size": vocabulary, "num_attention_heads": heads,
        "hidden_size": heads * draw(st.sampled_from([4, 8, 16])), "inner_hidden_size": draw(st.integers(3, 64)),
        "num_layers": draw(st.integers(1, 3)), "layernorm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "bos_token_id": start, "gmask_token_id": gmask, "mask_token_id": mask,
    }  # fmt: skip


@given(config=configurations(), lengths=st.lists(st.integers(1, 16), min_size=1, max_size=5), seed=st.integers(0, 999), tied=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parity("logits", "chatglm")
def test_any_configuration_and_any_place_of_the_mask(
    tmp_path: Path, config: dict[str, Any], lengths: list[int], seed: int, tied: bool
) -> None:
    """Other sizes than those recorded; [MASK] for [gMASK], both, either behind <sop>, <sop> first or missing; rows packed; the loss."""
    reference, draw = Reference(config), torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3 + ("norm" in name and "weight" in name))
    if tied:
        reference.lm_head.weight = reference.transformer["word_embeddings"].weight
    save_file({n: t for n, t in reference.state_dict().items() if not tied or n != "lm_head.weight"}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_folder(tmp_path)
    assert opened.decoder_config.tied_embeddings == tied
    controls = [config[f"{name}_token_id"] for name in ("bos", "gmask", "mask")]
    rows = []
    for n in lengths:
        row = torch.randint(0, config["vocab_size"], (n,), generator=draw).tolist()
        for control in controls:
            if torch.rand((), generator=draw) < 0.7:
                row[int(torch.randint(0, n, (), generator=draw))] = control
        rows.append(row)
    expected = [reference.double()(row).detach() for row in rows]
    for row, wanted, found in zip(rows, expected, our_logits(load_decoder(opened, torch.float64), rows), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, msg=lambda said, row=row: f"{row}: {said}")
    for row, wanted, logprobs in zip(rows, expected, api.load(str(tmp_path), dtype="float64").logprobs(rows), strict=True):
        table = wanted.log_softmax(-1)
        for t, token in enumerate(row[1:], start=1):
            torch.testing.assert_close(logprobs[t], table[t - 1, token].to(logprobs.dtype), rtol=0, atol=1e-6)


ROWS = [[20, 21, 22, 5, 7, 30, 31], [20, 6, 21, 22, 7, 30, 31, 32], [5, 7, 40], [20, 21, 22, 23], [9, 5, 7, 8, 8, 8, 8]]


@torch.no_grad()
@pytest.mark.parity("adapters", "chatglm")
@pytest.mark.parametrize("targets", [["query_key_value", "dense", "dense_4h_to_h"], ["query_key_value"], ["dense_h_to_4h"]])
def test_loras_of_peft_and_back(made: Callable[[str], Made], tmp_path: Path, targets: list[str]) -> None:
    """PEFT's own in the tests' network, read here, and written again: the same logits."""
    case = made("chatglm")
    reference, draw = read_reference(case.folder).double(), torch.Generator().manual_seed(0)
    options = LoraConfig(r=3, lora_alpha=7, target_modules=targets, base_model_name_or_path=str(case.folder))
    theirs = inject_adapter_in_model(options, reference).double()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    options.save_pretrained(str(tmp_path / "theirs"))
    plain = {f"base_model.model.{name}": t.contiguous() for name, t in get_peft_model_state_dict(theirs).items()}
    save_file(plain, tmp_path / "theirs/adapter_model.safetensors")
    wanted = torch.cat([theirs(row) for row in ROWS])
    place = tmp_path / "theirs"
    for again in ("once", "twice"):
        found, config, decoder = adapted(case, place)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        place = tmp_path / again
        save_adapter(place, decoder, "policy", config, Base(CHATGLM, str(case.folder)))


@torch.no_grad()
@pytest.mark.parity("adapters", "chatglm")
def test_a_prefix_of_peft_and_back(made: Callable[[str], Made], tmp_path: Path) -> None:
    """prompt_embeddings as keys and values that every token sees, as the authors' pre_seq_len has them: positions stay."""
    case = made("chatglm")
    reference, heads, width = read_reference(case.folder).double(), CASE["num_attention_heads"], CASE["hidden_size"]
    reference.prefix = torch.randn(4, CASE["num_layers"] * 2 * width, generator=torch.Generator().manual_seed(0)) * 0.3
    (tmp_path / "theirs").mkdir()
    save_file({"prompt_embeddings": reference.prefix}, tmp_path / "theirs/adapter_model.safetensors")
    options = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=CASE["num_layers"], num_attention_heads=heads, token_dim=width,
        num_transformer_submodules=1, base_model_name_or_path=str(case.folder),
    )  # fmt: skip
    options.save_pretrained(str(tmp_path / "theirs"))
    place = tmp_path / "theirs"
    for again in ("once", "twice"):
        found, config, decoder = adapted(case, place)
        torch.testing.assert_close(found, torch.cat([reference(row) for row in ROWS]), rtol=0, atol=1e-6)
        place = tmp_path / again
        save_adapter(place, decoder, "policy", config, Base(CHATGLM, str(case.folder)))


def adapted(case: Made, adapter: Path) -> tuple[Tensor, AdapterConfig, Decoder]:
    """The logits of ROWS, packed, with this adapter."""
    decoder = load_decoder(open_folder(case.folder), torch.float64)
    config = load_adapter(adapter, decoder, "policy", Base(CHATGLM, str(case.folder)))
    batch = pack(samples(decoder, ROWS))
    assert decoder.head is not None
    return decoder.head(decoder(batch.tokens, batch.layout, "policy")), config, decoder


def test_the_place_of_an_answer() -> None:
    blocks = Blocks(7, (5, 6))
    assert blocks.place([20, 6, 5, 7, 8]) == (3, 2) and blocks.place([20, 6, 21, 7]) == (3, 1) and blocks.place([6, 7, 5]) == (1, 2)
    assert blocks.place([20, 21]) == (0, None)  # an ordinary causal sequence
    assert blocks.place([20, 21, 7]) == (2, 1) and blocks.place([7, 21]) == (0, 0)  # no mask token


@pytest.mark.parity("rendering", "chatglm")
def test_the_tokenizer_is_the_authors(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data/tokenizers/chatglm-6b")
    theirs = json.loads((shared / "golden/chatglm-6b_tokenizer.json").read_text())
    wanted = {"[MASK]": 130000, "[gMASK]": 130001, "<sop>": 130004, "<eop>": 130005, "<pad>": 3}
    assert wanted.items() <= tokenizer.specials.items()
    assert [[*tokenizer.encode(t), 130001, 130004] for t in theirs["texts"]] == theirs["single"]
    assert [tokenizer.encode(t) for t in theirs["resp"]] == theirs["resp_no_special"]
    family = open_folder(shared / "data/tokenizers/chatglm-6b").family
    for text, answer, pair in zip(theirs["texts"], theirs["resp"], theirs["pair"], strict=True):
        sample = family.render(Conversation((Message("user", text), Message("assistant", answer))), tokenizer)
        assert sample.tokens == pair and sample == sample_of(pair, sample.trained, Blocks(130004, (130001, 130000)))


@cache
def load_once(folder: Path) -> tuple[Tokenizer, SentencePieceProcessor]:
    return load_tokenizer(folder), SentencePieceProcessor(model_file=str(folder / "ice_text.model"))


PIECES = ["你好", "，", "世界", "!", "hello", " world", " ", "  ", "\n", "\t", "\u3000", "１２", "3.14", "🙂", "é"]
PIECES += ["“", "…", "<", "Ⅳ", "x" * 9, " " * 85, "㍿"]


def published(pieces: SentencePieceProcessor, text: str) -> list[int]:
    """The authors' tokenizer, written down from its description: line breaks, tabs and runs of up to 80 blanks become marks first."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return [pieces.piece_to_id(piece) for piece in pieces.encode(text, out_type=str)]


@given(texts=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(str.strip), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parity("rendering", "chatglm")
def test_any_rounds_are_what_the_published_code_builds(shared: Path, texts: list[str]) -> None:
    """`chat` of the published code: one question as it is, several as numbered rounds; two control tokens, the answer, `<eop>`."""
    tokenizer, pieces = load_once(shared / "data/tokenizers/chatglm-6b")
    *history, question = texts if len(texts) % 2 else [*texts, "?"]
    rounds = list(zip(history[::2], history[1::2], strict=True))
    prompt = "".join(f"[Round {i}]\n问：{asked}\n答：{answer}\n" for i, (asked, answer) in enumerate(rounds))
    prompt = f"{prompt}[Round {len(rounds)}]\n问：{question}\n答：" if rounds else question
    wanted = [*published(pieces, prompt), 130001, 130004]
    talk = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate([*history, question]))
    assert CHATGLM.render(Conversation(talk), tokenizer, open=True).tokens == wanted
    whole = CHATGLM.render(Conversation((*talk, Message("assistant", texts[0]))), tokenizer)
    assert whole.tokens == [*wanted, *published(pieces, texts[0]), 130005]
    assert whole == sample_of(whole.tokens, [t >= len(wanted) for t in range(len(whole))], Blocks(130004, (130001, 130000)))


@pytest.mark.parity("rendering", "chatglm3")
def test_the_tokenizer_of_chatglm3(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data/tokenizers/chatglm3-6b")
    names = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    assert [tokenizer.specials[name] for name in names] == list(range(64789, 64798)) and tokenizer.vocab_size == 64798
    text = "你好，世界\n  <|user|> sop </s>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.specials.values()) and tokenizer.decode(tokenizer.encode(text)) == text
