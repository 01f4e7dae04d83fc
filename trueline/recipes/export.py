"""From a run to a folder other tools load, and the proof that it is the model that was trained.

The written folder is read back and its log-probabilities (a reward model: its scores) compared with the source's on fixed probes before it
gets its final name. Left out: quantised formats, other tools' layouts.
"""

import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trueline.config.schema import ModelConfig
from trueline.data.sample import sample_of
from trueline.data.stream import key
from trueline.errors import RunError, UserError
from trueline.families.export import save_folder
from trueline.families.folder import open_folder, resolve
from trueline.families.peft import adapter_base, is_adapter
from trueline.model.adapters import merge_adapter
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel
from trueline.recipes.assemble import FOUND, Opened, make_scorer, open_model, publish

Dtype = Literal["float32", "bfloat16", "float64"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.25}  # nats, or units of score; merging rounds once


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
    before = probe(opened)
    temporary = target.with_name(f".{target.name}.unproven")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(opened, temporary, merge=kind == "merge")
        worst = difference(before, probe(open_model(ModelConfig(path=str(temporary), dtype=dtype), 0)))
        limit = TOLERANCE[opened.decoder.embed.weight.dtype]
        if not worst <= limit:
            raise RunError(f"the export differs from {folder} by {worst:.3g} on probes, more than {limit:g}; nothing was left at {target}")
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    what = "merged model" if kind == "merge" else "adapter" if adapted else "model"
    print(f"{target}: {what}, read back and equal (largest difference {worst:.2g})")


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


@torch.no_grad()
def probe(opened: Opened) -> Tensor:
    """Log-probabilities (a reward model: scores) of eight fixed pseudo-random token sequences, as far as float64."""
    vocabulary = opened.folder.decoder_config.vocab_size
    rows = [[key(0, "probe", i, t) % vocabulary for t in range(24)] for i in range(8)]
    blocks = opened.folder.decoder_config.blocks
    batch = pack([sample_of(row, [True] * len(row), blocks) for row in rows]).to(opened.decoder.embed.weight.device)
    if opened.score is not None:
        return make_scorer(opened.decoder, opened.role, opened.score).eval()(batch).double().cpu()
    return LanguageModel(opened.decoder, opened.role).eval()(batch).double().cpu()


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; nan counts as a difference."""
    return float((one - other).abs().max())
