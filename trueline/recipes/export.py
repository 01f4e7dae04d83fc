"""From a run to a folder other tools load, and the proof that it is the model that was trained.

The written folder is read back by a process of its own (`gate.py`), its log-probabilities (a reward model: its scores) and the tokens of a
conversation are compared with the source's, and its tensors with the base's, before it gets its final name. Left out: quantised formats.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trueline.config.schema import ModelConfig
from trueline.errors import RunError, UserError
from trueline.families.export import save_folder
from trueline.families.folder import open_folder, resolve
from trueline.families.peft import adapter_base, is_adapter
from trueline.families.places import export_lora
from trueline.model.adapters import merge_adapter
from trueline.model.weights import tensor_places
from trueline.recipes.assemble import FOUND, Opened, open_model, publish
from trueline.recipes.card import copy_licences, licence_rule, write_card
from trueline.recipes.gate import LENGTH, PROBES, probe, rendered

Dtype = Literal["float32", "bfloat16", "float64"]
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.25}  # nats, or units of score; merging rounds once
THEIRS = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.5}  # transformers rounds through float32 whatever the model


def run(source: str, out: str, kind: str | None = None, base: str | None = None) -> None:
    """Writes `source` (a run folder, a model or an adapter folder) to the new folder `out`.

    `kind` merge folds an adapter into its base, adapter writes it alone; None keeps what it is.
    """
    folder, target = finished_model(source), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is already there and not empty; name a new folder")
    adapted = is_adapter(folder)
    if kind == "adapter" and not adapted:
        raise UserError(f"{folder} is a whole model, so there is no adapter to write alone; leave --adapter out")
    if kind == "merge" and not adapted:
        raise UserError(f"{folder} is a whole model already, so there is nothing to merge; leave --merge out")
    dtype = _dtype(folder, base, alone=adapted and kind != "merge")
    opened = open_model(ModelConfig(path=str(folder), base=base, dtype=dtype), 0)
    family, history = opened.folder.family, _history(Path(source))
    merged = kind == "merge" and opened.adapter is not None and opened.adapter.kind == "lora"
    targeted = {f"{module}.weight" for module in export_lora(opened.decoder, FOUND, family).sizes} if merged else None
    origin = opened.folder.path if adapted else _origin(history)
    before, talk = probe(opened), rendered(opened)
    what = "merged model" if kind == "merge" else "adapter" if adapted else "model"
    temporary = target.with_name(f".{target.name}.unproven")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(opened, temporary, merge=kind == "merge")
        proof = prove(temporary, dtype, before, talk)
        if what != "adapter" and origin is not None:
            proof["tensors"] = compare_with_base(temporary, origin, targeted, trained=adapted or history is not None)
        write_card(temporary, target.name, family.name, opened.name, what, history, proof, copy_licences(opened.folder.path, temporary))
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{target}: {what}, read back and equal (largest difference {proof['largest difference']:.2g})")
    if rule := licence_rule(family.name):
        print(rule, file=sys.stderr)


def prove(folder: Path, dtype: Dtype, before: Tensor, talk: list[int] | None) -> dict[str, Any]:
    """What a fresh process finds in `folder`, held against what was meant to be there; RunError where the two differ.

    Compared are the probes by our loader and, where it has the class, by transformers, and the tokens of a rendered conversation.
    """
    command = [sys.executable, "-m", "trueline.recipes.gate", str(folder.resolve()), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise RunError(f"the export does not load in a process of its own ({reason}); nothing was left there")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    limit = TOLERANCE[dtype]
    worst = difference(before, torch.tensor(found["probes"], dtype=torch.float64))
    if not worst <= limit:
        raise RunError(f"the export differs by {worst:.3g} on probes, more than {limit:g}; nothing was left there")
    if found["template"] != talk:
        raise RunError("the export writes a conversation as other tokens than the model it was made from; nothing was left there")
    proof: dict[str, Any] = {"probes": len(found["probes"]), "largest difference": worst, "template": "equal" if talk else "no tokenizer"}
    if (theirs := found["transformers"]) is not None:
        rows = before.view(PROBES, LENGTH)
        mine = rows[:, -1] if "last" in theirs else rows
        apart = difference(mine.flatten(), torch.tensor(theirs.get("last", theirs.get("probes")), dtype=torch.float64))
        if not apart <= THEIRS[dtype]:
            raise RunError(f"transformers {theirs['version']} reads the export as another model: {apart:.3g} apart; nothing was left there")
        proof["transformers"] = {"version": theirs["version"], "largest difference": apart}
    return proof


def compare_with_base(folder: Path, base: Path, targeted: set[str] | None, trained: bool) -> dict[str, int]:
    """How many tensors of `folder` differ from the base's; RunError when none does, or when one does that is not among the `targeted`.

    Tensors are read one at a time. The base is rounded to the export's number format, so that only training counts as a change.
    """
    mine, theirs = tensor_places(folder), tensor_places(base)
    changed = []
    for name in sorted(mine.keys() & theirs.keys()):
        one, other = mine[name](), theirs[name]()
        if one.shape != other.shape or not torch.equal(one, other.to(one.dtype)):
            changed.append(name)
    if trained and not changed:
        raise RunError(f"the export equals its base {base} in every tensor: nothing of the training is in it; nothing was left there")
    if targeted is not None and (strangers := sorted(set(changed) - targeted)):
        raise RunError(f"the export changed {len(strangers)} tensors that were not trained, first {strangers[0]}; nothing was left there")
    return {"compared": len(mine.keys() & theirs.keys()), "changed": len(changed), "new": len(mine.keys() - theirs.keys())}


def _history(source: Path) -> dict[str, Any] | None:
    """run.json, when the source is a run."""
    place = source / "run.json"
    return dict(json.loads(place.read_text(encoding="utf-8"))) if place.is_file() else None


def _origin(history: dict[str, Any] | None) -> Path | None:
    """The folder a run trained all weights of, if it is still there and has weights."""
    first = next((Path(name) for name in (history or {}).get("parents", {})), None)
    return first if first is not None and any(first.glob("*.safetensors")) and not is_adapter(first) else None


def _dtype(folder: Path, base: str | None, alone: bool) -> Dtype:
    """The stored number format, whatever this machine would compute in; an adapter `alone` is kept in float32 at least."""
    config = open_folder(resolve(base or adapter_base(folder)[0]) if is_adapter(folder) else folder).config
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored == "float64":
        return "float64"
    return "bfloat16" if stored == "bfloat16" and not alone else "float32"


def finished_model(source: str) -> Path:
    """The model folder of a run, or the folder (or hub id) itself."""
    path = Path(source)
    if (path / "run.json").is_file():
        if not (path / "model").is_dir():
            raise UserError(f"{path} is a run without a finished model; let it finish (the same command goes on), then export")
        return path / "model"
    return resolve(source)


def write(opened: Opened, out: Path, merge: bool) -> None:
    """The opened model as a folder."""
    if opened.adapter is None:
        save_folder(out, opened.decoder, opened.folder, opened.tokenizer, opened.score)
    elif merge:
        merge_adapter(opened.decoder, FOUND)
        save_folder(out, opened.decoder, opened.folder, opened.tokenizer, opened.score)
    else:
        publish(out, opened, FOUND, opened.adapter, opened.score)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; nan counts as a difference."""
    return float((one - other).abs().max())
