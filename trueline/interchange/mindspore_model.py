"""MindFormers models to Hugging Face folders and back. One rule: every tensor is used exactly once or named as left out, none is guessed.

Left out: quantised weights, reward models' heads, MindFormers' own LoRA tensors.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueline.errors import UserError
from trueline.families.folder import weight_slots
from trueline.families.table import family_of
from trueline.interchange.mindspore_checkpoint import write_checkpoint
from trueline.interchange.mindspore_names import Group, beside_weights, config_from_yaml, groups_of, join, read_yaml, turn
from trueline.interchange.mindspore_ranks import Axis, Layout, Pieces, even_layout, read_strategies, write_ranks
from trueline.model.decoder import Decoder, DecoderConfig
from trueline.model.weights import read_shapes, read_tensors, write_tensors

COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A model's sizes, its tensors in Hugging Face's names with their shapes, and how they are grouped with MindFormers' names."""

    config: dict[str, Any]
    decoder: DecoderConfig
    shapes: dict[str, Shape]
    groups: tuple[Group, ...]
    folder: Path | None
    """Where tokenizer and generation settings are copied from."""
    rearranged: bool
    """Queries and keys are in `use_rearrange_rope`'s order."""


@dataclass(frozen=True)
class Done:
    """What was converted: the number of weights, their dtypes, and what was left out, by kind."""

    tensors: int
    dtypes: set[torch.dtype]
    left_out: Counter[str] = field(default_factory=Counter)


def find_model(source: Path, named: Path | None) -> Plan:
    """The model's sizes: `named` (a Hugging Face folder or a MindFormers YAML), else config.json or the only YAML beside `source`."""
    if named is not None:
        return _plan(named)
    for place in dict.fromkeys((source if source.is_dir() else source.parent, source.parent)):
        if (place / "config.json").is_file():
            return _plan(place)
        models = [path for path in sorted((*place.glob("*.yaml"), *place.glob("*.yml"))) if read_yaml(path)]
        if len(models) == 1:
            return _plan(models[0])
    raise UserError(f"{source}: no config.json or single MindFormers YAML beside it; name the model's folder or YAML with --model")


def _plan(path: Path) -> Plan:
    rearranged = False
    if path.is_dir() and (path / "config.json").is_file():
        folder: Path | None = path
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except ValueError as problem:
            raise UserError(f"{path / 'config.json'}: not JSON ({problem})") from None
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        folder, settings = None, read_yaml(path)
        if settings is None:
            raise UserError(f"{path}: no model.model_config in it, expected a MindFormers model file")
        config, rearranged = config_from_yaml(settings, str(path)), settings.get("use_rearrange_rope") is True
    else:
        raise UserError(f"{path}: expected a Hugging Face folder with config.json, or a MindFormers YAML")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'}: expected an object")
    try:
        family = family_of(config)
        if any("SequenceClassification" in str(name) for name in config.get("architectures") or []):
            raise UserError("a reward model, whose head MindFormers has no one place for; convert the language model")
        sizes = family.read_config(config)
        groups = groups_of(family.name, sizes.num_layers)
        with torch.device("meta"):
            slots = weight_slots(Decoder(sizes, True), family)
        shapes: dict[str, Shape] = {}
        for name, (weight, parts) in slots.items():
            shapes[name] = tuple((weight.join([part.detach() for part in parts], sizes) if weight.join else parts[0]).shape)
        if sizes.tied_embeddings:  # MindFormers' files have it a second time
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        there = tuple(group for group in groups if group.theirs[0] in shapes)
        if unnamed := shapes.keys() - {name for group in there for name in group.theirs}:
            raise UserError(f"MindFormers has no place for {sorted(unnamed)[0]}")
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None
    return Plan(config, sizes, shapes, there, folder, rearranged)


def import_model(source: Path, out: Path, plan: Plan, tensor_parallel: int | None, strategy: Path | None) -> Done:
    """A `.ckpt` file, or a folder of `rank_N`, to a new Hugging Face folder."""
    left_out: Counter[str] = Counter()
    tensors = _from_mindspore(Pieces.open(source, strategy), plan, tensor_parallel, left_out)
    first = next(tensors)  # names are checked before anything is written
    dtypes: set[torch.dtype] = set()

    def counted() -> Iterator[tuple[str, Tensor]]:
        yield first
        yield from tensors

    def noted() -> Iterator[tuple[str, Tensor]]:
        embedding = None
        for name, tensor in counted():
            dtypes.add(tensor.dtype)
            if plan.decoder.tied_embeddings and name == "model.embed_tokens.weight":
                embedding = tensor
            if not (plan.decoder.tied_embeddings and name == "lm_head.weight"):
                yield name, tensor
            elif embedding is None or not torch.equal(tensor, embedding):
                raise UserError(f"{source}: the vocabulary head is not the embedding, but the configuration ties them")

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary, noted(), shard_bytes=1e9)  # a shard is held until it is whole
        for name in COMPANIONS if plan.folder else ():
            if plan.folder and (plan.folder / name).is_file():
                shutil.copyfile(plan.folder / name, temporary / name)
        config = {key: value for key, value in plan.config.items() if key not in ("dtype", "torch_dtype")}
        if len(dtypes) == 1:
            config["torch_dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
        (temporary / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Done(len(plan.shapes), dtypes, left_out)


def export_model(source: Path, out: Path, plan: Plan, ranks: tuple[int, int] | None, strategy: Path | None) -> Done:
    """A Hugging Face folder to a `.ckpt` file or, with `ranks` (tensor, data), to a folder of `rank_N`."""
    there = read_shapes(source)
    wanted = dict(plan.shapes)
    if plan.decoder.tied_embeddings and "lm_head.weight" not in there:
        del wanted["lm_head.weight"]
    if wrong := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
        shown = [f"{name}: {list(there[name]) if name in there else 'missing'}, expected {_expected(wanted, name)}" for name in wrong[:20]]
        raise UserError(f"{source}: {len(wrong)} tensors do not fit its config.json:", shown)
    dtypes: set[torch.dtype] = set()
    tensors = _to_mindspore(source, plan, dtypes)
    if ranks is None:
        write_checkpoint(out, ((name, tensor) for name, tensor, _ in tensors))
    else:
        layouts = read_strategies(strategy) if strategy else {}
        placed = ((name, tensor, _layout(name, tensor, group, plan, ranks, layouts)) for name, tensor, group in tensors)
        write_ranks(out, placed, ranks[0] * ranks[1])
    return Done(len(plan.shapes), dtypes)


def _expected(wanted: dict[str, Shape], name: str) -> str:
    return str(list(wanted[name])) if name in wanted else "no such tensor"


def _from_mindspore(pieces: Pieces, plan: Plan, tensor_parallel: int | None, left_out: Counter[str]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by Hugging Face's names, one group at a time. What is missing or unknown is one UserError before the first."""
    anchor = next(group for group in plan.groups if group.theirs == ("model.norm.weight",)).forms[0][0]
    prefixes = [name[: -len(anchor)] for name in pieces.names() if name.endswith(anchor) and beside_weights(name) is None]
    if len(prefixes) != 1:
        found = "no" if not prefixes else f"{len(prefixes)}"
        raise UserError(f"{pieces.where}: {found} tensors called ...{anchor}, expected one; is it this model's checkpoint, and whole?")
    there = dict.fromkeys(name.removeprefix(prefixes[0]) if name.startswith(prefixes[0]) else f"\0{name}" for name in pieces.names())
    chosen: list[tuple[Group, tuple[str, ...]]] = []
    problems = []
    for group in plan.groups:
        form = next((form for form in group.forms if all(name in there for name in form)), None)
        tied = group.theirs == ("lm_head.weight",) and plan.decoder.tied_embeddings
        if form is not None:
            chosen.append((group, form))
        elif not tied:
            problems.append(f"{group.forms[0][0]}: missing" + (f" (nor {group.forms[1][0]})" if len(group.forms) > 1 else ""))
    used = {name for _, form in chosen for name in form}
    for name in there.keys() - used:
        kind = beside_weights(name.removeprefix("\0"))
        problems += [f"{name.removeprefix(chr(0))}: not a tensor of this model"] if kind is None else []
        left_out.update([kind] if kind else [])
    if problems:
        shown = sorted(problems)[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError(f"{pieces.where}: does not fit the {plan.config.get('model_type')} model that was named:", shown)
    sizes = {prefixes[0] + name: size for group, form in chosen for name, size in _form_shapes(group, form, plan).items()}
    tensor = tensor_parallel or pieces.tensor_parallel(sizes)
    for group, form in chosen:
        axis: Axis = group.axis if tensor_parallel is None else "any"
        whole = join([pieces.read(prefixes[0] + name, sizes[prefixes[0] + name], tensor, axis) for name in form])
        yield from zip(group.theirs, _turned(group, list(whole.split([plan.shapes[n][0] for n in group.theirs])), plan, True), strict=True)


def _to_mindspore(source: Path, plan: Plan, dtypes: set[torch.dtype]) -> Iterator[tuple[str, Tensor, Group]]:
    """Their tensors in the order of the file, each group as soon as its last member was read."""
    homes = {name: group for group in plan.groups for name in group.theirs}
    waiting: dict[str, Tensor] = {}
    alone = plan.decoder.tied_embeddings and "lm_head.weight" not in read_shapes(source)
    for name, tensor in read_tensors(source):
        if not tensor.is_floating_point():
            raise UserError(f"{source}: {name} holds {tensor.dtype}, expected floating point; quantised weights are not supported")
        dtypes.add(tensor.dtype)
        waiting[name] = tensor
        group = homes[name]
        if all(member in waiting for member in group.theirs):
            form = group.forms[0]
            whole = join(_turned(group, [waiting.pop(member) for member in group.theirs], plan, False))
            for theirs, part in zip(form, whole.split([size[0] for size in _form_shapes(group, form, plan).values()]), strict=True):
                yield theirs, part, group
            if alone and name == "model.embed_tokens.weight":
                head = homes["lm_head.weight"]
                yield head.forms[0][0], tensor, head


def _form_shapes(group: Group, form: tuple[str, ...], plan: Plan) -> dict[str, Shape]:
    """The whole shapes of one form of a group: as many rows as there are, in the same parts, in one, or in equal parts."""
    shapes = [plan.shapes[name] for name in group.theirs]
    rows = sum(shape[0] for shape in shapes)
    if len(form) == len(shapes):
        return dict(zip(form, shapes, strict=True))
    return {name: (rows // len(form), *shapes[0][1:]) for name in form}


def _turned(group: Group, parts: list[Tensor], plan: Plan, back: bool) -> list[Tensor]:
    if not (group.turned and plan.rearranged):
        return parts
    return [turn(part, plan.decoder.head_dim, back) if i < 2 else part for i, part in enumerate(parts)]


def _layout(name: str, tensor: Tensor, group: Group, plan: Plan, ranks: tuple[int, int], layouts: dict[str, Layout]) -> Layout:
    """The strategy's layout where there is one, else MindFormers' own: rows of what opens a block, columns of what closes it."""
    total = ranks[0] * ranks[1]
    if layouts:
        layout = layouts.get(name)
        if layout is None or len(layout.places) != total or len(layout.parts) != tensor.dim():
            raise UserError(f"--strategy: {name} is not in it, or not on {total} ranks")
        parts = layout.parts
    else:
        key_value = ".wk." in name or ".wv." in name
        count = min(ranks[0], plan.decoder.num_kv_heads) if key_value else ranks[0] if group.axis is not None else 1
        layout = even_layout(tensor.dim(), group.axis, count, *ranks)
        parts = layout.parts
    if any(size % part for size, part in zip(tensor.shape, parts, strict=True)) or ranks[0] % max(parts, default=1) and not layouts:
        raise UserError(f"{name}: {list(tensor.shape)} cannot be cut into {list(parts)} equal parts; choose another --tensor-parallel")
    return layout
