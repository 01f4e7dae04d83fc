"""From a run to a folder other tools load, and the proof that it is the model that was trained.

A process of its own loads the written folder (`gate`). It gets its final name only if its numbers, its tensors and its prompts are those
of the source, and the tensors that differ from the base are those that were trained. Left out: quantised formats, other tools' layouts.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import trueline
from trueline.config.schema import ModelConfig
from trueline.errors import RunError, UserError
from trueline.families.export import save_folder
from trueline.families.folder import SCORE, open_folder, resolve
from trueline.families.peft import adapter_base, is_adapter
from trueline.families.places import half_of, places
from trueline.model.adapters import low_ranks, merge_adapter, merged_weight
from trueline.recipes.assemble import FOUND, Opened, files_fingerprint, open_model, publish
from trueline.recipes.card import Lineage, check_run, finish_folder, lineage
from trueline.recipes.gate import PROMPTS, probes, values

Dtype = Literal["float32", "bfloat16", "float64"]
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.25}  # nats, or units of score; merging rounds once
OTHERS = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 1.0}  # against other code: another order of sums; PEFT's adapters are float32
Values = list[list[float]]


@dataclass(frozen=True)
class Written:
    """What was meant to be written, for comparison with what is there."""

    kind: Literal["model", "merged model", "adapter"]
    dtype: str
    values: Values
    rendered: list[list[int]]
    hashes: dict[str, str]  # of a whole model's tensors
    base: Path  # the folder of the weights below an adapter, or of the source
    base_fingerprint: str | None
    touched: frozenset[str]  # weights that merging the adapter changes, by their name
    scored: bool
    architecture: str
    has_template: bool
    worst: float  # between the source and what was written


def run(source: str, out: str, kind: str | None = None, base: str | None = None) -> None:
    """Writes `source` (a run folder, a model or an adapter folder) to the new folder `out`.

    `kind` merge folds an adapter into its base, adapter writes it alone; None keeps what it is. `base` is under an adapter.
    """
    folder, target = finished_model(source), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is already there and not empty; name a new folder")
    adapted = is_adapter(folder)
    if kind == "adapter" and not adapted:
        raise UserError(f"{folder} is a whole model, so there is no adapter to write alone; leave --adapter out")
    if kind == "merge" and not adapted:
        raise UserError(f"{folder} is a whole model already, so there is nothing to merge; leave --merge out")
    made = lineage(folder)
    temporary = target.with_name(f".{target.name}.unproven")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        settings = ModelConfig(path=str(folder), base=base, dtype=_dtype(folder, base, alone=adapted and kind != "merge"))
        written, notes = write(settings, temporary, kind == "merge", made)
        found = inspect(temporary, written, made)
        problems = compare(written, found, made)
        if problems:
            raise RunError(f"the export of {folder} failed its check, and nothing was left at {target}: " + "; ".join(problems))
        report(temporary, written, found, made)
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for note in notes:
        print(note, file=sys.stderr)
    if written.kind == "model" and made.stage and made.reason:
        print(f"note: {made.reason}", file=sys.stderr)
    others = found["others"]
    by = ", ".join(("trueline", *others.get("versions", ())))
    print(f"{target}: {written.kind}, read back and equal in {by} (largest difference {worst_of(written, found):.2g})")


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
            check_run(lineage(path), path)
            raise UserError(f"{path} is a run without a finished model; let it finish (the same command goes on), then export")
        return path / "model"
    return resolve(source)


def write(settings: ModelConfig, out: Path, merge: bool, made: Lineage) -> tuple[Written, list[str]]:
    """Opens the source, writes it, and lets go of it: while the folder is checked, no other copy of the model is in memory."""
    opened = open_model(settings, 0)
    before = values(opened, samples := probes(opened))
    alone = opened.adapter is not None and not merge
    touched = touched_weights(opened) if opened.adapter is not None and opened.adapter.kind == "lora" else frozenset()
    if opened.adapter is not None and opened.adapter.kind == "lora" and not touched and opened.score is None and (merge or made.stage):
        raise RunError(f"{opened.path}: the adapter changes nothing, so the export would equal the base {opened.name}; train it first")
    hashes: dict[str, str] = {}
    if alone:
        assert opened.adapter is not None
        publish(out, opened, FOUND, opened.adapter, opened.score)
        now = before
    else:
        if merge:
            merge_adapter(opened.decoder, FOUND)
            opened = replace(opened, adapter=None)
        now = values(opened, samples)
        save_folder(out, opened.decoder, opened.folder, opened.tokenizer, opened.score, hashes=hashes)
    notes = finish_folder(out, opened, made, PROMPTS)
    family = opened.folder.family
    has_template = (out / "chat_template.jinja").is_file()
    if opened.tokenizer and (out / "tokenizer_config.json").is_file():
        has_template |= "chat_template" in json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    written = Written(
        kind="adapter" if alone else "merged model" if merge else "model",
        dtype=str(opened.decoder.embed.weight.dtype).removeprefix("torch."),
        values=now,
        rendered=[sample.tokens for sample in samples[8:]],
        hashes=hashes,
        base=opened.folder.path,
        base_fingerprint=files_fingerprint(opened.folder.path),
        touched=touched | ({SCORE} if opened.score is not None else set()),
        scored=opened.score is not None,
        architecture=family.architecture if opened.score is None else family.scorer_architecture,
        has_template=has_template,
        worst=difference(before, now),
    )
    return written, notes


@torch.no_grad()
def touched_weights(opened: Opened) -> frozenset[str]:
    """Their names of the weights that the adapter changes when it is merged; one matrix at a time."""
    found = set()
    for path, place in places(opened.folder.family, opened.folder.decoder_config).items():
        half = half_of(opened.decoder, place)
        for name, adapter in low_ranks(half, FOUND).items():
            if name in place.names and not torch.equal(merged_weight(half, name, adapter), getattr(half, name).weight):
                found.add(f"{path}.weight")
    return frozenset(found)


def inspect(folder: Path, written: Written, made: Lineage) -> dict[str, Any]:
    """The gate's findings on a written folder; RunError if it could not even be loaded."""
    compared = {"adapter": written.base, "merged model": written.base, "model": made.base if made.stage else written.base}[written.kind]
    findings = folder.with_name(f"{folder.name}.findings")
    request = {
        "folder": str(folder.resolve()),
        "findings": str(findings.resolve()),
        "base": str(compared.resolve()) if compared else None,
        "dtype": written.dtype,
        "scored": written.scored,
        "architecture": written.architecture,
        "template": written.has_template,
    }
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "trueline.recipes.gate"]
    try:
        done = subprocess.run(command, input=json.dumps(request), env=os.environ | offline, capture_output=True, text=True)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(findings.read_text(encoding="utf-8"))
            return found
    finally:
        findings.unlink(missing_ok=True)
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == -9:
        last = "it was killed; checking needs memory for one copy of the model"
    raise RunError(f"the written folder could not be loaded in a process of its own ({last}), so nothing was left at its place")


def compare(written: Written, found: dict[str, Any], made: Lineage) -> list[str]:
    """Everything that is not as it was meant to be."""
    problems = []
    limit = TOLERANCE[written.dtype]
    for what, worst, most in (
        ("merging changed the probes", written.worst, limit),
        ("the folder's probes differ from the source's", difference(written.values, found["values"]), limit),
    ):
        if not worst <= most:
            problems.append(f"{what} by {worst:.3g}, more than {most:g}")
    if found["rendered"] != written.rendered:
        problems.append("the folder's tokenizer writes the probe conversations with other tokens")
    if written.kind == "adapter":
        if found["base"] != written.base_fingerprint:
            problems.append(f"the base {written.base} is not what it was before")
    else:
        problems += _weight_problems(written, found, made)
    return problems + _others_problems(written, found)


def _weight_problems(written: Written, found: dict[str, Any], made: Lineage) -> list[str]:
    problems = [f"tensor {name} is {dtype}, not {written.dtype}" for name, dtype in found["dtypes"].items() if dtype != written.dtype][:1]
    damaged = sorted(name for name in written.hashes.keys() | found["hashes"] if written.hashes.get(name) != found["hashes"].get(name))
    if damaged:
        problems.append(f"{len(damaged)} tensors are not as they were written, {damaged[0]} first")
    changed = set(found["changed"])
    if written.kind == "merged model":
        changed |= {SCORE} & set(found["added"])
        if not changed:
            problems.append("it equals its base: the adapter is not in it")
        elif wrong := sorted(changed ^ written.touched):
            problems.append(f"the tensors that changed are not those of the adapter: {wrong[0]} first of {len(wrong)}")
    elif made.stage is None and changed:
        problems.append(f"{len(changed)} tensors are not the source's, {sorted(changed)[0]} first")
    elif made.stage and made.base and not changed | ({SCORE} & set(found["added"])):
        problems.append(f"it equals its base {made.base}, although it was trained")
    return problems


def _others_problems(written: Written, found: dict[str, Any]) -> list[str]:
    others = found["others"]
    if "versions" not in others:
        return []
    by = " and ".join(f"{name} {number}" for name, number in others["versions"].items())
    ours = [row[-1:] for row in written.values] if written.scored else written.values
    worst = difference(ours, others["values"])
    problems = []
    if not worst <= OTHERS[written.dtype]:
        problems.append(f"{by} reads another model from it: the probes differ by {worst:.3g}, more than {OTHERS[written.dtype]:g}")
    if "prompts" in others and others["prompts"] != found["prompts"]:
        problems.append(f"its chat template gives other prompts in {by} than in trueline")
    return problems


def report(folder: Path, written: Written, found: dict[str, Any], made: Lineage) -> None:
    """export.json: what was compared, and how close it was."""
    others = found["others"]
    compared = written.kind != "model" or made.stage is None or made.base is not None
    value = {
        "trueline": trueline.__version__,
        "kind": written.kind,
        "dtype": written.dtype,
        "probes": len(written.values),
        "largest difference": worst_of(written, found),
        "conversations": len(written.rendered),
        "chat template": "in the folder, and gives the same prompts" if written.has_template else "none",
        "others": {name: x for name, x in others.items() if name in ("versions", "skipped", "no tokenizer")},
        "base": str(written.base if written.kind != "model" else made.base or written.base),
        "changed": (sorted(found["changed"]) if compared else made.reason) if "changed" in found else "the base is untouched",
        "tensors": dict(sorted(found.get("hashes", {}).items())),
    }
    (folder / "export.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def worst_of(written: Written, found: dict[str, Any]) -> float:
    """Largest difference between the source's probes and the folder's, as trueline reads it."""
    return max(written.worst, difference(written.values, found["values"]))


def difference(one: Values, other: Values) -> float:
    """Largest absolute difference; a value that is not a number, or rows of other lengths, count as infinite."""
    if [len(row) for row in one] != [len(row) for row in other]:
        return float("inf")
    gaps = [abs(a - b) for rows in zip(one, other, strict=True) for a, b in zip(*rows, strict=True)]
    return max((gap if gap == gap else float("inf") for gap in gaps), default=0.0)
