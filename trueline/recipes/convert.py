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
from trueline.interchange.mindspore_model import Done, Plan, export_model, find_model, import_model
from trueline.interchange.mindspore_ranks import RANK

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
) -> None:
    """Converts `source` to `out`, which must not be there yet. `lengths`: tokens of a prompt and of a whole record, for MindRecord."""
    start, target = Path(source), Path(out)
    if not start.exists() and not start.with_name(start.name + "0").exists():
        raise UserError(f"{start}: no such file or folder")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is already there; name a new one, or remove this one first")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    named, placed = Path(model) if model else None, Path(strategy) if strategy else None
    try:
        if is_mindrecord(start):
            print(f"{target}: {_to_text(start, target, named):,} records")
        elif start.suffix in SUFFIXES:
            print(f"{target}: {_to_mindrecord(start, target, named, lengths):,} records of MindRLHF's columns {', '.join(PROMPTS)}")
        elif start.suffix == ".ckpt" or (start.is_dir() and any(RANK.fullmatch(path.name) for path in start.iterdir())):
            if target.suffix == ".ckpt" or data_parallel is not None:
                raise UserError("a MindSpore checkpoint becomes a Hugging Face folder; convert that again for other ranks or one file")
            plan = find_model(start, named)
            _report(target, import_model(start, target, plan, tensor_parallel, placed), "Hugging Face folder", plan)
        elif start.is_dir():
            ranks = None if tensor_parallel is None and data_parallel is None else (tensor_parallel or 1, data_parallel or 1)
            _to_checkpoint(start, target, find_model(start, named or start), ranks, placed)
        else:
            raise UserError(f"{start}: expected a model folder, a .ckpt, a folder of rank_0, rank_1, ..., a .mindrecord or a data file")
    except OSError as problem:
        if disk_full(problem):
            raise RunError(f"{target}: the disk is full; free some space and start the same command again") from None
        raise


def _to_checkpoint(source: Path, target: Path, plan: Plan, ranks: Ranks | None, strategy: Path | None) -> None:
    if (target.suffix == ".ckpt") == (ranks is not None):
        raise UserError(f"{target}: name one file (OUT.ckpt), or a folder with --tensor-parallel or --data-parallel for rank files")
    form = f"{ranks[0] * ranks[1]} rank files" if ranks else "one MindSpore file"
    _report(target, export_model(source, target, plan, ranks, strategy), form, plan)


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
