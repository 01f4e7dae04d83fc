"""`trueline import`: another program's configuration becomes ours, checked like any other, with an account of every key.

Left out: weights (`trueline convert` and `export`), data files (`trueline check` reads them as they are), DeepSpeed's settings.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trueline.config.describe import describe
from trueline.config.load import from_any
from trueline.config.schema import STAGES
from trueline.config.source import write
from trueline.errors import UserError
from trueline.interchange import legacy_chatglm, legacy_glm4, legacy_mindrlhf
from trueline.interchange.legacy import Conversion, Old, read_old, written
from trueline.interchange.legacy_launch import MODEL_FILES
from trueline.interchange.legacy_trainer import DEEPSPEED
from trueline.train.run import write_whole

LOOKED_FOR = (
    "none of the configurations known here: looked for training_args or data_config (GLM-4 finetune_demo), model.model_config or kl_coef "
    "and its like (MindRLHF), and --model_name_or_path, --dataset or --finetuning_type (ChatGLM-Efficient-Tuning)"
)


def run(files: Sequence[str], out: str | None, model: str | None, devices: int) -> None:
    """Prints the account and the new command; writes the configuration to `out`, or prints it."""
    if out and Path(out).exists():
        raise UserError(f"--out {out} is already there; name another file")
    notes: list[str] = []
    given, scripts = read_old(files, notes)
    it = convert(given, scripts, ", ".join(files), devices, model)
    it.warnings = [*(note for note in notes if "aliases" not in note), *it.warnings]  # an alias repeats what was read where it was defined
    text = f"# From {', '.join(files)} ({it.title}), by `trueline import`.\n" + write(nested(it))
    from_any(STAGES[it.stage], nested(it))
    name = out or f"{it.stage}.yaml"
    print("\n".join(account(it, name)))
    if out:
        write_whole(Path(out), text)
    else:
        print(f"\n{name} (--out {name} writes it):\n\n{text}", end="")


def convert(given: dict[str, list[Old]], scripts: str, files: str, devices: int, model: str | None = None) -> Conversion:
    """Tells the program the keys belong to, and converts them."""
    beside = {name: olds for name, olds in given.items() if _is_deepspeed(olds, given)}
    rest = {name: olds for name, olds in given.items() if name not in beside}
    if any(name.startswith(("training_args.", "data_config.")) for name in rest):
        it = _conversion(legacy_glm4.TITLE, "sft", rest, model)
        legacy_glm4.convert(it, devices)
    elif any(name.startswith("model.model_config.") for name in rest) or any(
        name in rest for name in (*legacy_mindrlhf.PPO_KEYS, *MODEL_FILES, "train_dataset")
    ):
        stage = legacy_mindrlhf.stage_of(rest, scripts)
        it = _conversion(legacy_mindrlhf.TITLES[stage], stage, rest, model)
        legacy_mindrlhf.convert(it, devices, rest, scripts)
    elif {"model_name_or_path", "dataset", "finetuning_type"} & set(rest):
        stage = legacy_chatglm.stage_of(rest, scripts)
        it = _conversion(legacy_chatglm.TITLE, stage, rest, model)
        legacy_chatglm.convert(it, devices)
    elif beside:
        raise UserError(
            f"{files}: a DeepSpeed configuration alone; {DEEPSPEED}. Give it beside the training configuration, or leave it out"
        )
    elif legacy_chatglm.registered(rest):
        raise UserError(f"{files}: a registry of data sets alone; give it beside the command or the JSON file that names one of them")
    else:
        raise UserError(f"{files}: {LOOKED_FOR}")
    it.dropped += [(old, DEEPSPEED) for olds in beside.values() for old in olds]
    return it


def _is_deepspeed(olds: list[Old], given: dict[str, list[Old]]) -> bool:
    """Whether the key comes from a DeepSpeed file: one that has `zero_optimization`."""
    files = {old.where.rpartition(":")[0] for name, found in given.items() if name.startswith("zero_optimization") for old in found}
    return all(old.where.rpartition(":")[0] in files for old in olds)


def _conversion(title: str, stage: str, given: Mapping[str, list[Old]], model: str | None) -> Conversion:
    it = Conversion(title, stage, frozenset(describe(STAGES[stage])), {name: olds[-1] for name, olds in given.items()})
    for olds in given.values():
        it.dropped += [(old, f"{olds[-1].where} goes before it") for old in olds[:-1]]
    if model:
        it.add("model.path", model, "--model")
    return it


def nested(it: Conversion) -> dict[str, Any]:
    """The settings as sections, in the schema's order."""
    order = list(describe(STAGES[it.stage]))
    tree: dict[str, Any] = {}
    for name in sorted(it.settings, key=order.index):
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = it.settings[name]
    return tree


def account(it: Conversion, name: str) -> list[str]:
    """Every old key with what became of it, what is new, and what to know."""
    lines = [f"{it.title} -> trueline {it.stage}", ""]
    width = max((len(f"{old.where} {old.name} = {written(old.value)}") for old, *_ in it.moved), default=0)
    for old, new, value, remark in it.moved:
        source = f"{old.where} {old.name} = {written(old.value)}"
        lines.append(f"  {source:<{min(width, 70)}} -> {new} = {written(value)}{f'  ({remark})' if remark else ''}")
    lines += ["", "Not in the old files, but so in the old program or needed here:"]
    lines += [f"  {new} = {written(it.settings[new])}  ({why})" for new, _, why in it.added]
    lines += _dropped(it)
    if it.unknown:
        lines += ["", "Unknown, and so without effect:", *(f"  {old.where} {old.name} = {written(old.value)}" for old in it.unknown)]
    if it.warnings:
        lines += [
            "",
            "Where the old program did something else than it said, or than is done here:",
            *(f"  * {text}" for text in it.warnings),
        ]
    lines += ["", "Now:", f"  trueline {it.stage} {name}"]
    if it.evaluate and (it.evaluate.get("data.eval") or it.settings.get("data.eval")):
        settings = " ".join(f"{key}={written(value)}" for key, value in {"data.eval": it.settings.get("data.eval"), **it.evaluate}.items())
        folder = it.settings.get("run.output", "RUN")
        lines.append(f"  trueline evaluate model.path={folder}/model run.output={folder}-evaluate {settings}")
    return lines


def _dropped(it: Conversion) -> list[str]:
    """By reason, so that thirty keys of one kind are one line."""
    reasons: dict[str, list[Old]] = defaultdict(list)
    for old, why in it.dropped:
        reasons[why].append(old)
    lines = ["", "Dropped:"] if reasons else []
    for why, olds in reasons.items():
        names = ", ".join(f"{old.name}{f' ({old.where})' if len(olds) == 1 else ''}" for old in olds)
        place = "" if len(olds) == 1 else f" ({olds[0].where} and on)"
        lines.append(f"  {names}{place}: {why}")
    return lines
