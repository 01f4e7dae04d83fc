"""`trueline export`: whole, merged and adapter folders, read back before they get their name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.reading import PROBES
from tests.recipes.toys import KINDS, Toys


@pytest.fixture(scope="module")
def runs(trueline: Commands, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    for stage, kind in (("sft", "full"), ("sft", "lora"), ("sft", "ptuning"), ("reward", "full"), ("reward", "lora")):
        where = [f"run.output={home / stage}-{kind}", f"model.path={toys.model('glm')}"]
        trueline(stage, toys.config(stage), *where, *KINDS[kind]).ok()
    return {path.name: path for path in home.iterdir()}


def answers(folder: Path) -> torch.Tensor:
    model = api.load(str(folder))
    return torch.tensor(model.score(PROBES)) if model.opened.score is not None else torch.cat(model.logprobs(PROBES))


@pytest.mark.parametrize(
    ("name", "flag", "what"),
    [
        ("sft-full", [], "model"),
        ("sft-lora", [], "adapter"),
        ("sft-lora", ["--adapter"], "adapter"),
        ("sft-lora", ["--merge"], "merged model"),
        ("sft-ptuning", [], "adapter"),
        ("reward-full", [], "model"),
        ("reward-lora", ["--merge"], "merged model"),
        ("reward-lora", ["--adapter"], "adapter"),
    ],
)
def test_every_kind(trueline: Commands, runs: dict[str, Path], tmp_path: Path, name: str, flag: list[str], what: str) -> None:
    source, out = runs[name] if flag else runs[name] / "model", tmp_path / "out"
    assert f"{out}: {what}, read back and equal" in trueline("export", source, out, *flag).ok().out
    assert (out / "adapter_config.json").exists() == (what == "adapter") and (out / "tokenizer.json").exists()
    torch.testing.assert_close(answers(out), answers(runs[name] / "model"), rtol=0, atol=1e-5 if what != "merged model" else 1e-4)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    if what == "merged model":
        architectures = {"sft": ["GlmForCausalLM"], "reward": ["GlmForSequenceClassification"]}
        assert json.loads((out / "config.json").read_text())["architectures"] == architectures[name.partition("-")[0]]


def test_a_plain_model_folder(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # empty, so it may be written to
    trueline("export", toys.model("llama"), tmp_path / "out").ok()
    assert torch.equal(answers(tmp_path / "out"), answers(toys.model("llama")))


@pytest.mark.parametrize("name", ["bfloat16", "float64"])
def test_the_stored_number_format_is_kept(toys: Toys, trueline: Commands, tmp_path: Path, name: str) -> None:
    """Of a whole model and of a merged one; an adapter stays as exact as it was trained."""
    base, run, dtype = tmp_path / "base", tmp_path / "run", getattr(torch, name)
    shutil.copytree(toys.model(), base)
    save_file({n: t.to(dtype) for n, t in load_file(base / "model.safetensors").items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"torch_dtype": name}))
    trueline("export", base, tmp_path / "copy").ok()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "copy"))
    assert all(torch.equal(before[n], after[n]) and after[n].dtype == dtype for n in before)
    trueline("sft", toys.config("sft"), f"run.output={run}", f"model.path={base}", *KINDS["lora"]).ok()
    trueline("export", run, tmp_path / "merged", "--merge").ok()
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}
    trueline("export", run, tmp_path / "alone").ok()
    trained, kept = (load_file(folder / "adapter_model.safetensors") for folder in (run / "model", tmp_path / "alone"))
    assert all(torch.equal(trained[n].to(kept[n].dtype), kept[n]) for n in trained)


def test_mistakes(toys: Toys, trueline: Commands, runs: dict[str, Path], tmp_path: Path) -> None:
    def refused(*arguments: str | Path) -> str:
        return trueline("export", *arguments).refused()

    out = tmp_path / "out"
    assert "is a whole model, so there is no adapter to write alone; leave --adapter out" in refused(runs["sft-full"], out, "--adapter")
    assert "is a whole model already, so there is nothing to merge; leave --merge out" in refused(runs["sft-full"], out, "--merge")
    assert "a P-tuning adapter cannot be merged" in refused(runs["sft-ptuning"], out, "--merge")
    assert "--merge and --adapter exclude each other" in refused(runs["sft-lora"], out, "--merge", "--adapter")
    assert "no such folder" in refused(tmp_path / "none", out)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs["sft-full"], unfinished)
    shutil.rmtree(unfinished / "model")
    assert "is a run without a finished model; let it finish" in refused(unfinished, out)
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == ["unfinished"]
    assert "is already there and not empty; name a new folder" in refused(runs["sft-full"], toys.model())
    (tmp_path / "file").write_text("")
    assert "is already there and not empty" in refused(runs["sft-full"], tmp_path / "file")


def test_a_full_disk(trueline: Commands, runs: dict[str, Path], tmp_path: Path) -> None:
    message = trueline("export", runs["sft-full"], tmp_path / "out", file_limit=50_000).refused(1)
    assert "the disk is full" in message and list(tmp_path.iterdir()) == []


def test_what_the_gate_found_stays_in_the_folder(trueline: Commands, runs: dict[str, Path], tmp_path: Path) -> None:
    told = trueline("export", runs["sft-lora"], tmp_path / "merged", "--merge").ok()
    assert "Built with glm-4" in told.err
    proof = json.loads((tmp_path / "merged" / "export.json").read_text("utf-8"))
    assert proof["probes"] == 12 and proof["largest difference"] < 1e-4 and proof["others"]["versions"]
    layers, targeted = 2, 4  # q, v and the fused gate and up, down
    assert len(proof["changed"]) == layers * targeted
    card = (tmp_path / "merged" / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "glm" and "| stage | sft |" in card


def test_an_export_that_is_the_base_is_refused(trueline: Commands, runs: dict[str, Path], toys: Toys, tmp_path: Path) -> None:
    """A run whose folder holds the base again, as a merge that was forgotten would leave it."""
    run = tmp_path / "run"
    shutil.copytree(runs["sft-full"], run)
    shutil.copyfile(toys.model("glm") / "model.safetensors", run / "model" / "model.safetensors")
    assert "it equals its base" in trueline("export", run, tmp_path / "out").refused(1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
