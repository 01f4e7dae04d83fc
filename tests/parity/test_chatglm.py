"""ChatGLM-6B against what its authors' own code returned: logits and loss of a small random model, and their tokenizer's ids."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import trueline as api
from trueline.data.sample import sample_of
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
