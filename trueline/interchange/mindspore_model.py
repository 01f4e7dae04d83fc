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
from trueline.interchange.mindspore_names import (
    BUFFERS,
    FINAL_NORMS,
    Group,
    beside_weights,
    config_from_yaml,
    groups_of,
    join,
    read_yaml,
    turn,
    weight_of,
)
from trueline.interchange.mindspore_ranks import Layout, Pieces, even_layout, read_strategies, write_ranks
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
        if config.get("model_type") == "chatglm" and (sizes.tied_embeddings or not config.get("multi_query_attention")):
            raise UserError("MindFormers has only models of this type with multi_query_attention and a vocabulary head of their own")
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


def import_model(pieces: Pieces, out: Path, plan: Plan) -> Done:
    """A `.ckpt` file, or those of ranks, to a new Hugging Face folder."""
    left_out: Counter[str] = Counter()
    tensors = _from_mindspore(pieces, plan, left_out)
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
                raise UserError(f"{pieces.where}: the vocabulary head is not the embedding, but the configuration ties them")

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
    there = {name: shape for name, shape in read_shapes(source).items() if not name.endswith(BUFFERS)}
    wanted = dict(plan.shapes)
    if plan.decoder.tied_embeddings and "lm_head.weight" not in there:
        del wanted["lm_head.weight"]
    if wrong := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
        shown = [f"{name}: {list(there[name]) if name in there else 'missing'}, expected {_expected(wanted, name)}" for name in wrong[:20]]
        raise UserError(f"{source}: {len(wrong)} tensors do not fit its config.json:", shown)
    dtypes: set[torch.dtype] = set()
    _write(out, _to_mindspore(source, plan, dtypes), plan, ranks, strategy)
    return Done(len(plan.shapes), dtypes)


def reshard(pieces: Pieces, out: Path, plan: Plan, ranks: tuple[int, int] | None, strategy: Path | None) -> Done:
    """A `.ckpt` file, or those of ranks, to one `.ckpt` file or, with `ranks` (tensor, data), to a folder of `rank_N`.

    Every tensor keeps its name. An optimizer's states are cut as their weights are; what else is beside the weights is the same on all.
    """
    prefix, chosen, beside = _match(pieces, plan)
    shapes = {prefix + name: (shape, group) for group, form in chosen for name, shape in _form_shapes(group, form, plan).items()}
    tensor_parallel = pieces.tensor_parallel({name: shape for name, (shape, _) in shapes.items()})
    uncut = Group((), (), None)
    dtypes: set[torch.dtype] = set()
    there = pieces.first()

    def tensors() -> Iterator[tuple[str, Tensor, Group]]:
        for name, stored in there.items():
            shape, group = shapes.get(weight_of(name)) or (pieces.whole(name, stored.shape), uncut)
            if stored.dtype is not None:
                tensor = pieces.read(name, shape, tensor_parallel, group.axis, weight=name not in beside)
                dtypes.update([] if name in beside else [tensor.dtype])
                yield name, tensor, group

    _write(out, tensors(), plan, ranks, strategy)
    texts = sum(stored.dtype is None for stored in there.values())
    return Done(len(there) - texts, dtypes, Counter({"text": texts} if texts else {}))


def _write(
    out: Path, tensors: Iterator[tuple[str, Tensor, Group]], plan: Plan, ranks: tuple[int, int] | None, strategy: Path | None
) -> None:
    if ranks is None:
        write_checkpoint(out, ((name, tensor) for name, tensor, _ in tensors))
    else:
        layouts = read_strategies(strategy) if strategy else {}
        placed = ((name, tensor, _layout(name, tensor, group, plan, ranks, layouts)) for name, tensor, group in tensors)
        write_ranks(out, placed, ranks[0] * ranks[1])


def _expected(wanted: dict[str, Shape], name: str) -> str:
    return str(list(wanted[name])) if name in wanted else "no such tensor"


def _match(pieces: Pieces, plan: Plan) -> tuple[str, list[tuple[Group, tuple[str, ...]]], dict[str, str]]:
    """What stands before every weight's name, the groups in the form they are there, and what is beside them by its kind.

    What is missing or unknown is one UserError.
    """
    anchor = next(group.forms[0][0] for group in plan.groups if group.forms[0][0] in FINAL_NORMS)
    prefixes = [name[: -len(anchor)] for name in pieces.first() if name.endswith(anchor) and beside_weights(name) is None]
    if len(prefixes) != 1:
        found = "no" if not prefixes else f"{len(prefixes)}"
        raise UserError(f"{pieces.where}: {found} tensors called ...{anchor}, expected one; is it this model's checkpoint, and whole?")
    there = dict.fromkeys(name.removeprefix(prefixes[0]) if name.startswith(prefixes[0]) else f"\0{name}" for name in pieces.first())
    chosen: list[tuple[Group, tuple[str, ...]]] = []
    problems = []
    for group in plan.groups:
        form = next((form for form in group.forms if all(name in there for name in form)), None)
        tied = group.theirs == ("lm_head.weight",) and plan.decoder.tied_embeddings
        if form is not None:
            chosen.append((group, form))
        elif not tied:
            problems.append(f"{group.forms[0][0]}: missing" + (f" (nor {group.forms[1][0]})" if len(group.forms) > 1 else ""))
    used = {prefixes[0] + name for _, form in chosen for name in form}
    beside = {name: beside_weights(name) for name in pieces.first() if name not in used}
    problems += [f"{name.removeprefix(prefixes[0])}: not a tensor of this model" for name, kind in beside.items() if kind is None]
    if problems:
        shown = sorted(problems)[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError(f"{pieces.where}: does not fit the {plan.config.get('model_type')} model that was named:", shown)
    return prefixes[0], chosen, {name: kind for name, kind in beside.items() if kind}


def _from_mindspore(pieces: Pieces, plan: Plan, left_out: Counter[str]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by Hugging Face's names, one group at a time."""
    prefix, chosen, beside = _match(pieces, plan)
    left_out.update(beside.values())
    sizes = {prefix + name: size for group, form in chosen for name, size in _form_shapes(group, form, plan).items()}
    tensor = pieces.tensor_parallel(sizes)
    for group, form in chosen:
        whole = join([pieces.read(prefix + name, sizes[prefix + name], tensor, group.axis) for name in form])
        yield from zip(group.theirs, _turned(group, whole, plan, True).split([plan.shapes[name][0] for name in group.theirs]), strict=True)


def _to_mindspore(source: Path, plan: Plan, dtypes: set[torch.dtype]) -> Iterator[tuple[str, Tensor, Group]]:
    """Their tensors in the order of the file, each group as soon as its last member was read."""
    homes = {name: group for group in plan.groups for name in group.theirs}
    waiting: dict[str, Tensor] = {}
    alone = plan.decoder.tied_embeddings and "lm_head.weight" not in read_shapes(source)
    for name, tensor in read_tensors(source):
        if name.endswith(BUFFERS):
            continue
        if not tensor.is_floating_point():
            raise UserError(f"{source}: {name} holds {tensor.dtype}, expected floating point; quantised weights are not supported")
        dtypes.add(tensor.dtype)
        waiting[name] = tensor
        group = homes[name]
        if all(member in waiting for member in group.theirs):
            form = group.forms[0]
            whole = _turned(group, join([waiting.pop(member) for member in group.theirs]), plan, False)
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
    if len(form) == 3:  # queries, keys and values of one matrix
        heads = (plan.decoder.num_heads, plan.decoder.num_kv_heads, plan.decoder.num_kv_heads)
        return {name: (count * plan.decoder.head_dim, *shapes[0][1:]) for name, count in zip(form, heads, strict=True)}
    return {name: (rows // len(form), *shapes[0][1:]) for name in form}


def _turned(group: Group, whole: Tensor, plan: Plan, back: bool) -> Tensor:
    """Rows of queries, keys and values: the first two are turned, where the model's are."""
    if not (group.turned and plan.rearranged):
        return whole
    turned = (plan.decoder.num_heads + plan.decoder.num_kv_heads) * plan.decoder.head_dim
    return torch.cat([turn(whole[:turned], plan.decoder.head_dim, back), whole[turned:]])


def _layout(name: str, tensor: Tensor, group: Group, plan: Plan, ranks: tuple[int, int], layouts: dict[str, Layout]) -> Layout:
    """The strategy's layout where there is one, else MindFormers' own: rows of what opens a block, columns of what closes it.

    What is no weight may be missing in a strategy; it is not cut.
    """
    total = ranks[0] * ranks[1]
    if layouts:
        layout = layouts.get(name) or layouts.get(weight_of(name))
        layout = layout if layout or group.theirs else even_layout(tensor.dim(), None, 1, *ranks)
        if layout is None or len(layout.places) != total or len(layout.parts) != tensor.dim():
            raise UserError(f"the strategy for what is written: {name} is not in it, or not on {total} ranks")
        parts = layout.parts
    else:
        key_value = ".wk." in name or ".wv." in name
        count = min(ranks[0], plan.decoder.num_kv_heads) if key_value else ranks[0] if group.axis is not None else 1
        layout = even_layout(tensor.dim(), group.axis, count, *ranks)
        parts = layout.parts
    if any(size % part for size, part in zip(tensor.shape, parts, strict=True)) or ranks[0] % max(parts, default=1) and not layouts:
        raise UserError(f"{name}: {list(tensor.shape)} cannot be cut into {list(parts)} equal parts; choose another --tensor-parallel")
    return layout
