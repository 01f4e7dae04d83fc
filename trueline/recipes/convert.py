"""`trueline convert`: MindSpore's checkpoints and data sets to open formats and back; what SRC is and how DST is called tell the direction.

Left out: every other system's formats.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trueline.config.schema import ModelConfig
from trueline.data.files import MINDRECORD, SUFFIXES, suffix
from trueline.data.formats import Located, equal_note, iter_conversations, iter_preferences
from trueline.data.mindrecord import write_mindrecord
from trueline.data.mindrecord_text import DPO, PROMPTS, REWARD, Row, dpo_row, prompt_row, reference_columns, reward_row
from trueline.data.reader import Problems, read_records
from trueline.data.sample import Pair
from trueline.data.tokenizer import load_tokenizer
from trueline.errors import RunError, UserError, disk_full
from trueline.interchange.mindspore_model import Done, Plan, export_model, find_model, import_model, reshard
from trueline.interchange.mindspore_ranks import RANK, Pieces
from trueline.recipes.assemble import open_model
from trueline.recipes.generate import language_model_of
from trueline.recipes.reference import pair_logprobs
from trueline.recipes.show import open_renderer

Ranks = tuple[int, int]
"""Tensor-parallel and data-parallel."""
COLUMNS = {"ppo": PROMPTS, "dpo": DPO, "reward": REWARD}
MAX_TOKENS = 8192  # of one packed forward of the reference


def run(
    source: str,
    out: str,
    model: str | None = None,
    strategy: str | None = None,
    tensor_parallel: int | None = None,
    data_parallel: int | None = None,
    lengths: tuple[int, int] = (2048, 4096),
    kind: str = "ppo",
    checkpoint: str | None = None,
    out_strategy: str | None = None,
) -> None:
    """Converts `source` to `out`, which must not be there yet.

    `strategy` says how rank files are cut: those of `source`, else those of `out`; with both, `out_strategy` is for `out`. `checkpoint` is
    a pattern for the names in rank folders. For MindRecord, `lengths` are tokens of a prompt and of a whole record.
    """
    start, target = Path(source), Path(out)
    if not start.exists() and not start.with_name(start.name + "0").exists():
        raise UserError(f"{start}: no such file or folder")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is already there; name a new one, or remove this one first")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    named, placed, cut = (Path(given) if given else None for given in (model, strategy, out_strategy))
    ranks = None if tensor_parallel is None and data_parallel is None else (tensor_parallel or 1, data_parallel or 1)
    from_ranks = start.is_dir() and any(RANK.fullmatch(path.name) for path in start.iterdir())
    if (checkpoint and not from_ranks) or (cut and not ranks):
        raise UserError("--checkpoint is for a folder of rank_N as SRC, and --out-strategy for one as DST; leave it out")
    try:
        if suffix(start.name) == MINDRECORD:
            print(f"{target}: {_to_text(start, target, named):,} records")
        elif start.suffix in SUFFIXES:
            count = _to_mindrecord(start, target, named, lengths, kind)
            print(f"{target}: {count:,} records of MindRLHF's columns {', '.join(COLUMNS[kind])}")
        elif start.suffix == ".ckpt" or from_ranks:
            plan, pieces = find_model(start, named), Pieces.open(start, placed, checkpoint or "*.ckpt")
            if target.suffix == ".ckpt" or ranks:
                form = _form(target, ranks)
                _report(target, reshard(pieces, target, plan, ranks, cut), form, plan)
            else:
                _report(target, import_model(pieces, target, plan), "Hugging Face folder", plan)
            if start.is_dir():
                print(f"  from {pieces.files[0].relative_to(start)} and its like on {len(pieces.files)} ranks")
        elif start.is_dir():
            form, plan = _form(target, ranks), find_model(start, named or start)
            _report(target, export_model(start, target, plan, ranks, cut or placed), form, plan)
        else:
            raise UserError(f"{start}: expected a model folder, a .ckpt, a folder of rank_0, rank_1, ..., a .mindrecord or a data file")
    except OSError as problem:
        if disk_full(problem):
            raise RunError(f"{target}: the disk is full; free some space and start the same command again") from None
        raise


def _form(target: Path, ranks: Ranks | None) -> str:
    """What is written, in words."""
    if (target.suffix == ".ckpt") == (ranks is not None):
        raise UserError(f"{target}: name one file (OUT.ckpt), or a folder with --tensor-parallel or --data-parallel for rank files")
    return f"{ranks[0] * ranks[1]} rank files" if ranks else "one MindSpore file"


def _report(target: Path, done: Done, form: str, plan: Plan) -> None:
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in done.dtypes))
    print(f"{target}: {form}, {plan.config['model_type']}, {done.tensors} tensors, {kinds}")
    if done.left_out:
        print("  left out: " + ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in sorted(done.left_out.items())))


def _to_text(source: Path, target: Path, model: Path | None) -> int:
    if target.suffix != ".jsonl" or model is None:
        raise UserError(f"{source}: MindRecord becomes OUT.jsonl, with --model naming a folder with the tokenizer its ids are of")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for record in read_records([_whole(source)], tokenizer=load_tokenizer(model)):
                file.write(json.dumps(record.value, ensure_ascii=False) + "\n")
                count += 1
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _whole(source: Path) -> str:
    """The name of all shards, of which `source` is one or already names all."""
    name = source.name.rstrip("0123456789")
    return str(source if source.exists() and source.name == name else source.with_name(name))


def _to_mindrecord(source: Path, target: Path, model: Path | None, lengths: tuple[int, int], kind: str) -> int:
    """The model's template, of several turns the last one trained: MindRLHF's columns have one answer."""
    if suffix(target.name) != MINDRECORD or model is None:
        raise UserError(f"{source}: a data file becomes OUT.mindrecord, with --model naming the model's folder")
    if kind not in COLUMNS:
        raise UserError(f"--kind {kind}: expected one of {', '.join(COLUMNS)}")
    renderer, problems, equal = open_renderer(str(model)), Problems(), list[str]()
    specials = renderer.tokenizer.specials
    pad = specials.get(str(renderer.tokenizer.config.get("pad_token")), specials.get("<|endoftext|>", 0))
    pairs, rows = list[Pair](), list[Row]()
    files = [str(source)]
    values: Iterable[Located[Any]] = iter_conversations(files, problems=problems)
    for located in values if kind == "ppo" else iter_preferences(files, problems=problems, equal=equal):
        try:
            if kind == "ppo":
                sample = renderer.family.render(located.value, renderer.tokenizer, last_only=True)
                prompt = sample.tokens[: sample.trained.index(True)]
                rows.append(prompt_row(prompt, sample.tokens, sample.trained, *lengths, pad))
            else:
                (_, chosen), (_, rejected) = renderer.samples(located.value)
                pairs.append(Pair(chosen, rejected))
                rows.append((dpo_row if kind == "dpo" else reward_row)(pairs[-1], lengths[1], pad))
        except (ValueError, UserError) as problem:
            problems.add(located.where, f"{problem}{'' if isinstance(problem, UserError) else ' (--prompt-length, --length)'}")
    problems.stop()
    if not rows:
        raise UserError(f"no pairs in {source}: in every record both answers are equal")
    if equal:
        print(equal_note(equal))
    if kind == "dpo":
        reference = language_model_of(open_model(ModelConfig(path=str(model)), seed=0))
        for row, sums in zip(rows, pair_logprobs(reference, pairs, max(MAX_TOKENS, *map(len, pairs))), strict=True):
            row |= reference_columns(*sums.tolist())
    return write_mindrecord(target, COLUMNS[kind], rows)
