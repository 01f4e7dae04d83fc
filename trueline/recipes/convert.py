"""`trueline convert`: MindSpore's checkpoints and data sets to open formats and back; what SRC is and how DST is called tell the direction.

Left out: every other system's formats, and MindRLHF's pairs in the direction of MindRecord.
"""

import json
import os
from pathlib import Path

from trueline.data.files import SUFFIXES
from trueline.data.formats import load_conversations
from trueline.data.reader import Problems
from trueline.data.tokenizer import load_tokenizer
from trueline.errors import RunError, UserError, disk_full
from trueline.families.folder import open_folder
from trueline.interchange.mindrecord import is_mindrecord, read_mindrecord, write_mindrecord
from trueline.interchange.mindrecord_text import PROMPTS, prompt_row, texts
from trueline.interchange.mindspore_model import Done, Plan, export_model, find_model, import_model, reshard
from trueline.interchange.mindspore_ranks import RANK, Pieces

Ranks = tuple[int, int]
"""Tensor-parallel and data-parallel."""


def run(
    source: str,
    out: str,
    model: str | None = None,
    strategy: str | None = None,
    tensor_parallel: int | None = None,
    data_parallel: int | None = None,
    lengths: tuple[int, int] = (2048, 4096),
    checkpoint: str | None = None,
    out_strategy: str | None = None,
) -> None:
    """Converts `source` to `out`, which must not be there yet.

    `strategy` says how rank files are cut: those of `source`, else those of `out`; with both, `out_strategy` is for `out`. `checkpoint` is
    a pattern for the names in rank folders. `lengths`: tokens of a prompt and of a whole record, for MindRecord.
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
    try:
        if is_mindrecord(start):
            print(f"{target}: {_to_text(start, target, named):,} records")
        elif start.suffix in SUFFIXES:
            print(f"{target}: {_to_mindrecord(start, target, named, lengths):,} records of MindRLHF's columns {', '.join(PROMPTS)}")
        elif start.suffix == ".ckpt" or (start.is_dir() and any(RANK.fullmatch(path.name) for path in start.iterdir())):
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
            for record in texts(read_mindrecord(source), load_tokenizer(model), str(source)):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _to_mindrecord(source: Path, target: Path, model: Path | None, lengths: tuple[int, int]) -> int:
    """The model's template, of several turns the last one trained: MindRLHF's columns have one answer."""
    if not is_mindrecord(target) or model is None:
        raise UserError(f"{source}: a data file becomes OUT.mindrecord, with --model naming the model's folder")
    tokenizer, render = load_tokenizer(model), open_folder(model).family.render
    pad = tokenizer.specials.get(str(tokenizer.config.get("pad_token")), tokenizer.specials.get("<|endoftext|>", 0))
    problems, rows = Problems(), []
    for located in load_conversations([str(source)]):
        sample = render(located.value, tokenizer, last_only=True)
        prompt = sample.tokens[: sample.trained.index(True)]
        try:
            rows.append(prompt_row(prompt, sample.tokens, sample.trained, *lengths, pad))
        except ValueError as problem:
            problems.add(located.where, f"{problem} (--prompt-length, --length)")
    problems.stop()
    return write_mindrecord(target, PROMPTS, rows)
