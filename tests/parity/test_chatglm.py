"""ChatGLM-6B against what its authors' own code returned: logits and loss of a small random model, and their tokenizer's ids."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import trueline as api
from tests.reference_chatglm import Reference, read_reference
from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Blocks, sample_of
from trueline.data.tokenizer import load_tokenizer
from trueline.families.export import save_folder
from trueline.families.folder import load_decoder, open_folder
from trueline.model.batch import pack


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


def test_a_folder_keeps_its_names(golden: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = golden
    opened = open_folder(folder)
    save_folder(tmp_path / "out", load_decoder(opened, torch.float32), opened)
    with safe_open(folder / "model.safetensors", "pt") as before, safe_open(tmp_path / "out" / "model.safetensors", "pt") as after:
        assert set(after.keys()) == {name for name in before.keys() if not name.endswith("inv_freq")}
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in after.keys())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "chatglm"


@torch.no_grad()
def test_our_own_oracle_is_the_authors_too(golden: tuple[Path, dict[str, Tensor]]) -> None:
    folder, theirs = golden
    for row, logits in zip(theirs["gmask::input_ids"].tolist(), theirs["gmask::logits"], strict=True):
        torch.testing.assert_close(read_reference(folder)(row), logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(24, 40, 2, 3), (32, 128, 4, 1), (64, 96, 2, 2)])
def test_other_sizes_and_other_places_of_the_mask(tmp_path: Path, sizes: tuple[int, int, int, int]) -> None:
    """[MASK] for [gMASK], both, a mask in the middle of the context or behind <sop>, <sop> first, no <sop>; a tied head."""
    hidden, inner, heads, layers = sizes
    config = {"hidden_size": hidden, "inner_hidden_size": inner, "num_attention_heads": heads, "num_layers": layers, "vocab_size": 50}
    config |= {"model_type": "chatglm", "bos_token_id": 7, "gmask_token_id": 5, "mask_token_id": 6, "position_encoding_2d": True}
    reference, draw = Reference(config), torch.Generator().manual_seed(hidden)
    for name, parameter in reference.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3 + ("norm" in name and "weight" in name))
    reference.lm_head.weight = reference.transformer["word_embeddings"].weight
    save_file({n: t for n, t in reference.state_dict().items() if n != "lm_head.weight"}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_folder(tmp_path)
    assert opened.decoder_config.tied_embeddings
    decoder = load_decoder(opened, torch.float64)
    rows = [
        [20, 21, 22, 5, 7, 30, 31], [20, 6, 21, 22, 7, 30, 31, 32], [20, 6, 21, 5, 22, 7, 30], [6, 20, 7, 30, 5, 31], [20, 21, 7, 6, 30],
        [7, 5, 20], [20, 21, 22], [20, 5, 7],
    ]  # fmt: skip
    batch = pack([sample_of(row, [True] * len(row), opened.decoder_config.blocks) for row in rows])
    assert decoder.head is not None
    for row, found in zip(rows, decoder.head(decoder(batch.tokens, batch.layout)).split(batch.lengths), strict=True):
        torch.testing.assert_close(found, reference.double()(row), rtol=0, atol=1e-9)


def test_the_place_of_an_answer() -> None:
    blocks = Blocks(7, (5, 6))
    assert blocks.place([20, 6, 5, 7, 8]) == (3, 2) and blocks.place([20, 6, 21, 7]) == (3, 1) and blocks.place([6, 7, 5]) == (1, 2)
    assert blocks.place([20, 21]) == (0, None)  # an ordinary causal sequence
    assert blocks.place([20, 21, 7]) == (2, 1) and blocks.place([7, 21]) == (0, 0)  # no mask token


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


def test_the_tokenizer_of_chatglm3(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data/tokenizers/chatglm3-6b")
    names = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    assert [tokenizer.specials[name] for name in names] == list(range(64789, 64798)) and tokenizer.vocab_size == 64798
    text = "你好，世界\n  <|user|> sop </s>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.specials.values()) and tokenizer.decode(tokenizer.encode(text)) == text
