"""The export's gate: whatever goes wrong between the model and the written folder, there is no folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.recipes.commands import Commands
from tests.recipes.toys import FAMILIES, KINDS, Toys
from trueline.errors import RunError
from trueline.families.chat_template import ours
from trueline.model.adapters import remove_adapter
from trueline.recipes import export

Tamper = Callable[[Path], object]


@pytest.fixture(scope="module")
def runs(trueline: Commands, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    for stage, kind in (("sft", "full"), ("sft", "lora"), ("sft", "ptuning"), ("reward", "lora")):
        trueline(stage, toys.config(stage), f"run.output={home / stage}-{kind}", "run.steps=1", *KINDS[kind]).ok()
    return {path.name: path for path in home.iterdir()}


def edit(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None], name: str = "model.safetensors") -> Tamper:
    def tamper(folder: Path) -> None:
        tensors = load_file(folder / name)
        save_file(change(tensors) or tensors, folder / name, metadata={"format": "pt"})

    return tamper


def one(value: float) -> Tamper:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return edit(change)


def settings(name: str, **values: object) -> Tamper:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def swap_two_tokens(folder: Path) -> None:
    layout = json.loads((folder / "tokenizer.json").read_text())
    words = layout["model"]["vocab"]
    words["4"], words["5"], words["W"], words["X"] = words["5"], words["4"], words["X"], words["W"]
    (folder / "tokenizer.json").write_text(json.dumps(layout))


def swap_controls(folder: Path) -> None:
    layout = json.loads((folder / "tokenizer.json").read_text())
    for token in layout["added_tokens"]:
        token["id"] = {1: 2, 2: 1}.get(token["id"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(layout))


CASES: dict[str, tuple[str, str | None, Tamper, str]] = {
    "a number": ("sft-full", None, one(0.123), "1 tensors are not as they were written, model.layers.1.mlp.up_proj.weight first"),
    "not a number": ("sft-full", None, one(float("nan")), "the folder's probes differ from the source's by inf"),
    "wrong dtype": ("sft-full", None, edit(lambda t: {n: x.bfloat16() for n, x in t.items()}), "is bfloat16, not float32"),
    "a setting": ("sft-full", None, settings("config.json", rms_norm_eps=0.5), "the folder's probes differ from the source's"),
    "another tokenizer": ("sft-full", None, swap_two_tokens, "writes the probe conversations with other tokens"),
    "another template": (
        "sft-full",
        None,
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        "its chat template gives other prompts in transformers",
    ),
    "swapped control tokens": ("sft-full", None, swap_controls, "writes the probe conversations with other tokens"),
    "a shape": (
        "sft-full",
        None,
        edit(lambda t: t | {"model.norm.weight": t["model.norm.weight"][:-1].clone()}),
        "could not be loaded in a process of its own",
    ),
    "half a config": (
        "sft-full",
        None,
        lambda folder: (folder / "config.json").write_text("{"),
        "could not be loaded in a process of its own",
    ),
    "no weights": ("sft-full", None, lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded in a process of its own"),
    "a merged number": ("sft-lora", "merge", one(0.123), "the tensors that changed are not those of the adapter"),
    "an adapter's number": (
        "sft-lora",
        None,
        edit(lambda t: {n: x + 0.1 for n, x in t.items()}, "adapter_model.safetensors"),
        "the folder's probes differ from the source's",
    ),
    "a prefix's number": (
        "sft-ptuning",
        None,
        edit(lambda t: {n: x + 0.1 for n, x in t.items()}, "adapter_model.safetensors"),
        "the folder's probes differ from the source's",
    ),
    "a score head": (
        "reward-lora",
        "merge",
        edit(lambda t: t | {"score.weight": t["score.weight"] * 1.5}),
        "the folder's probes differ from the source's",
    ),
}


def refused(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, kind: str | None, tamper: Tamper | None = None) -> str:
    """The sentence of an export that fails, of which nothing is left."""
    if tamper is not None:
        finish = export.finish_folder

        def finish_and_tamper(place: Path, *rest: object) -> list[str]:
            notes = finish(place, *rest)  # type: ignore[arg-type]
            tamper(place)
            return notes

        monkeypatch.setattr(export, "finish_folder", finish_and_tamper)
    before = sorted(out.parent.iterdir())
    with pytest.raises(RunError) as caught:
        export.run(str(source), str(out), kind)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tampering_is_caught(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str) -> None:
    run, kind, tamper, sentence = CASES[case]
    assert sentence in refused(monkeypatch, runs[run], tmp_path / "out", kind, tamper)


def test_a_merge_that_did_not_happen(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "merge_adapter", remove_adapter)
    message = refused(monkeypatch, runs["sft-lora"], tmp_path / "out", "merge")
    assert "it equals its base: the adapter is not in it" in message and "merging changed the probes" in message


@pytest.mark.parametrize("kind", [None, "merge"])
def test_an_adapter_without_effect(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str | None) -> None:
    shutil.copytree(runs["sft-lora"], tmp_path / "run")
    file = tmp_path / "run" / "model" / "adapter_model.safetensors"
    save_file({n: x * ("lora_B" not in n) for n, x in load_file(file).items()}, file)
    message = refused(monkeypatch, tmp_path / "run", tmp_path / "out", kind)
    assert "the adapter changes nothing, so the export would equal the base" in message


def test_a_trained_model_that_equals_its_base(
    runs: dict[str, Path], toys: Toys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(runs["sft-full"], tmp_path / "run")
    shutil.copyfile(toys.model() / "model.safetensors", tmp_path / "run" / "model" / "model.safetensors")
    message = refused(monkeypatch, tmp_path / "run", tmp_path / "out", None)
    assert f"it equals its base {toys.model()}, although it was trained" in message


def test_the_report(runs: dict[str, Path], toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.run(str(runs["sft-lora"]), str(tmp_path / "merged"), "merge")
    found = json.loads((tmp_path / "merged" / "export.json").read_text())
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(toys.model() / "model.safetensors")
    assert found["changed"] == sorted(n for n in base if not torch.equal(base[n], tensors[n])) and len(found["changed"]) == 8
    assert found["tensors"].keys() == tensors.keys() and found["probes"] == 12 and found["largest difference"] < 1e-4
    assert set(found["others"]["versions"]) == {"transformers"}
    export.run(str(runs["sft-ptuning"]), str(tmp_path / "alone"))
    found = json.loads((tmp_path / "alone" / "export.json").read_text())
    assert found["changed"] == "the base is untouched" and set(found["others"]["versions"]) == {"transformers", "peft"}
    assert "read back and equal in trueline, transformers, peft" in capsys.readouterr().out


@pytest.mark.slow
def test_a_base_that_is_gone_is_said(
    toys: Toys, trueline: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toys.model(), tmp_path / "base")
    trueline("sft", toys.config("sft"), f"run.output={tmp_path / 'run'}", f"model.path={tmp_path / 'base'}", "run.steps=1").ok()
    shutil.rmtree(tmp_path / "base")
    export.run(str(tmp_path / "run"), str(tmp_path / "out"))
    assert "is not here any more, so the changes could not be compared with it" in capsys.readouterr().err
    assert "not here any more" in json.loads((tmp_path / "out" / "export.json").read_text())["changed"]


# --------------------------------------------------------------------------------------------------------- what is in the folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported(toys: Toys, tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The template is in the folder, and transformers agrees with it where it has the class."""
    export.run(str(toys.model(family)), str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "export.json").read_text())
    assert ("versions" in found["others"]) == (not family.startswith("chatglm")), found["others"]
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    added = {"chatglm": "[gMASK] <sop>", "chatglm2": "[gMASK] sop"}.get(family)
    assert added is None or f"chat_template.jinja leaves out {added}, which" in capsys.readouterr().err


@pytest.mark.slow
def test_the_card_and_the_licence(
    runs: dict[str, Path], toys: Toys, trueline: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(toys.model("glm"), base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: glm-4\nlicense_link: LICENSE\n---\n# GLM-4\n")
    (base / "LICENSE").write_text("The glm-4-9b License\n")
    trueline("sft", toys.config("sft"), f"run.output={tmp_path / 'run'}", f"model.path={base}", "run.steps=1").ok()
    export.run(str(tmp_path / "run"), str(tmp_path / "out"))
    assert 'say "Built with glm-4"' in capsys.readouterr().err
    assert (tmp_path / "out" / "LICENSE").read_text() == "The glm-4-9b License\n"
    card = (tmp_path / "out" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers", "base_model": "base", "license": "other", "license_name": "glm-4", "license_link": "LICENSE",
    }  # fmt: skip
    assert "Built with glm-4" in body and "| stage | sft |" in body and "messages.jsonl" in body and "kind: full" in body
    export.run(str(runs["sft-lora"]), str(tmp_path / "adapter"))
    assert yaml.safe_load((tmp_path / "adapter" / "README.md").read_text().split("---\n")[1])["library_name"] == "peft"


@pytest.mark.slow
def test_code_is_named_by_hub_id_only(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(toys.model("chatglm4"), base)
    for name, kept in (("THUDM/glm-4-9b-chat", {"AutoModel": "THUDM/glm-4-9b-chat--modeling_chatglm.X"}), ("glm-4-9b-chat", None)):
        settings("config.json", auto_map={"AutoModel": "modeling_chatglm.X"}, _name_or_path=name)(base)
        export.run(str(base), str(tmp_path / str(kept is None)))
        assert json.loads((tmp_path / str(kept is None) / "config.json").read_text()).get("auto_map") == kept
        assert ("auto_map was left out" in capsys.readouterr().err) == (kept is None)


PLAIN = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRONG = {
    "no default": PLAIN.replace("You are a helpful assistant.", "You are helpful."),
    "broken": "{% for m in messages %}",
    "reaching out": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "too long": "{% for i in range(999999) %}x{% endfor %}",
}


def test_a_template_that_gives_our_prompts_is_kept(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(toys.model(), tmp_path / "base")
    same = ours()[0].text + "{# the same #}"
    (tmp_path / "base" / "chat_template.jinja").write_text(same)
    export.run(str(tmp_path / "base"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == same and "note" not in capsys.readouterr().err


def test_a_template_that_loses_the_tools_is_replaced(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(toys.model(), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(PLAIN)
    export.run(str(tmp_path / "base"), str(tmp_path / "out"))
    assert "does not give the prompts with tools the model was trained with; it was replaced" in capsys.readouterr().err
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == ours()[0].text


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_template_that_does_not_is_replaced(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    shutil.copytree(toys.model(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"chat_template": WRONG[wrong]}))
    export.run(str(tmp_path / "base"), str(tmp_path / "out"))
    assert "does not give the prompts the model was trained with; it was replaced by one that does" in capsys.readouterr().err
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "im_start" in (tmp_path / "out" / "chat_template.jinja").read_text()
