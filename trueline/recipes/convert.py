"""`trueline convert`: MindSpore's checkpoints and data sets to open formats and back; what SRC is and how DST is called tell the direction.

Left out: training on the way, and every other system's format.
"""

from pathlib import Path

from trueline.errors import RunError, UserError, disk_full
from trueline.interchange.mindspore_model import Done, Plan, export_model, find_model, import_model
from trueline.interchange.mindspore_ranks import RANK


def run(source: str, out: str, model: str | None, strategy: str | None, tensor_parallel: int | None, data_parallel: int | None) -> None:
    """Converts `source` to `out`, which must not be there yet."""
    start, target = Path(source), Path(out)
    if not start.exists():
        raise UserError(f"{start}: no such file or folder")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is already there; name a new one, or remove this one first")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    plan_path, strategy_path = Path(model) if model else None, Path(strategy) if strategy else None
    try:
        if start.suffix == ".ckpt" or (start.is_dir() and any(RANK.fullmatch(path.name) for path in start.iterdir())):
            if target.suffix == ".ckpt" or data_parallel is not None:
                raise UserError("a MindSpore checkpoint becomes a Hugging Face folder; convert that again for other ranks or one file")
            plan = find_model(start, plan_path)
            _report(target, import_model(start, target, plan, tensor_parallel, strategy_path), "Hugging Face folder", plan)
        elif start.is_dir():
            ranks = None if tensor_parallel is None and data_parallel is None else (tensor_parallel or 1, data_parallel or 1)
            if (target.suffix == ".ckpt") == (ranks is not None):
                raise UserError(f"{target}: name one file (OUT.ckpt), or a folder with --tensor-parallel or --data-parallel for rank files")
            plan = find_model(start, plan_path or start)
            form = f"{ranks[0] * ranks[1]} rank files" if ranks else "one MindSpore file"
            _report(target, export_model(start, target, plan, ranks, strategy_path), form, plan)
        else:
            raise UserError(f"{start}: expected a Hugging Face folder, a .ckpt file, or a folder of rank_0, rank_1, ...")
    except OSError as problem:
        if disk_full(problem):
            raise RunError(f"{target}: the disk is full; free some space and start the same command again") from None
        raise


def _report(target: Path, done: Done, form: str, plan: Plan) -> None:
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in done.dtypes))
    print(f"{target}: {form}, {plan.config['model_type']}, {done.tensors} tensors, {kinds}")
    if done.left_out:
        print("  left out: " + ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in sorted(done.left_out.items())))
