"""A run's folder, log, cadence and signals. One rule: one process writes a folder at a time, and its status there is always true."""

import contextlib
import fcntl
import json
import math
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

import trueline
from trueline.config.schema import RunConfig
from trueline.data.files import sync
from trueline.errors import Interrupted, RunError, UserError, disk_full
from trueline.model.batch import Batch
from trueline.parallel.world import World, all_max
from trueline.train import checkpoint
from trueline.train.step import NonFinite

LOCK, CONFIG, STATUS, METRICS, SAMPLES = ".lock", "config.yaml", "run.json", "metrics.jsonl", "samples.jsonl"
OURS = (CONFIG, METRICS, SAMPLES, "model", "checkpoints")  # in a folder without run.json, somebody else's
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers")


class Tracker(Protocol):
    """Takes every line of the log somewhere else."""

    def add(self, split: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def add(self, split: str, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Scalars `split/name` under `folder`; lines after `step` of an earlier, killed part of the run are hidden."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("run.tracker: tensorboard is not installed; pip install tensorboard, or set run.tracker=none") from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, split: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class Run:
    """The run in `config.output`, held while the `with` block lasts; only the first rank of `world` writes.

    with Run("sft", config.run, text, world) as run:
        found, notes = checkpoint.choose(run.folder, config.run.resume)
        run.begin(found.step if found else 0, total, parents)
        for step in range(run.step + 1, total + 1):
            run.log(step, train_step(...))
            if run.due(config.run.save_every, step) or run.stopping:
                run.save(step, tensors, state)
            if run.stopping: raise run.interrupted(step)

    Evaluate and log before saving: after a resume the log is cut behind the checkpoint's step. Until `begin` nothing in the folder changes.
    UserError when another run holds the folder. At the end run.json says finished, interrupted or failed.
    """

    def __init__(self, stage: str, config: RunConfig, text: str, world: World | None = None, console: Console | None = None):
        self.stage, self.config, self.text = stage, config, text
        self.world = world or World()
        self.folder = Path(config.output)
        self.console = console or Console(soft_wrap=True)
        self.step = self.total = 0
        self._signal = 0
        self._changed: list[str] = []
        self._before: dict[str, Any] = {}  # what run.json said when this run was opened
        self._status: dict[str, Any] = {}
        self._handlers: dict[int, Any] = {}
        self._closing = contextlib.ExitStack()
        self._tracker: Tracker = NoTracker()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started = 0.0

    def __enter__(self) -> Self:
        self._before = read_status(self.folder)
        self._changed = changed_settings(self.folder / CONFIG, self.text)
        self._refuse_what_is_not_ours()
        if self.world.first:
            self._closing.enter_context(lock(self.folder))
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def _refuse_what_is_not_ours(self) -> None:
        stage = self._before.get("stage")
        if stage is not None and stage != self.stage:
            raise UserError(f"run.output: {self.folder} holds another stage's run ({stage}); choose another folder")
        strange = [name for name in OURS if (self.folder / name).exists()]
        if stage is None and strange:
            raise UserError(f"run.output: {self.folder} has a {strange[0]} that no run left there; choose another folder")

    def finished(self, step: int, total: int) -> bool:
        """Whether an earlier start of this run came to its end at `step`, which is as far as it is to go; if so, says so.

        UserError when other settings are asked for than the finished run had: its model is not what they would make.
        """
        ended = (self._before.get("status"), self._before.get("step")) == ("finished", step)
        if step < total or not ended or not (self.folder / "model").is_dir():
            return False
        if self._changed:
            raise UserError(
                f"run.output: the run in {self.folder} is finished, with other settings than these ({', '.join(self._changed)}); "
                "choose another run.output for a new run"
            )
        self.say(f"this run is finished already, after {step} of {total} steps; its model is in {self.folder / 'model'}")
        return True

    def begin(self, step: int, total: int, parents: Mapping[str, str] | None = None) -> None:
        """The run goes on after `step` (0: from the start) of `total`; `parents`: what it was made from -> fingerprint."""
        self.step, self.total, self._started = step, total, time.monotonic()
        if not self.world.first:
            return
        with _writing(self.folder):
            if self.config.tracker == "tensorboard":
                self._tracker = TensorBoard(self.folder / "tensorboard", step)
            self._status = self._describe(parents or {})
            self._write_status("running")
            write_whole(self.folder / CONFIG, self.text)
            for name in (METRICS, SAMPLES):
                cut_log(self.folder / name, step)
        before, now = self._before.get("threads"), torch.get_num_threads()
        if step and before not in (None, now):
            self.say(f"{before} threads before, {now} now: sums are taken in another order, so the last bits will not be the same")
        if step and self._changed:
            self.say(f"settings changed since the run began: {', '.join(self._changed)}")
        self.say(f"{self.stage}: {total} steps, {self.folder}" if not step else f"{self.stage}: from step {step} of {total}, {self.folder}")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
            self._progress = self._closing.enter_context(Progress(*columns, TimeRemainingColumn(), console=self.console))
            self._task = self._progress.add_task(self.stage, total=total, completed=step, shown="")

    def due(self, every: int, step: int) -> bool:
        """Whether something done `every` so many steps is due after `step`."""
        return due(every, step, self.total)

    def log(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
        """One line in metrics.jsonl (train: every `run.log_every` steps) and with the tracker; numbers that are not finite become null."""
        self.step = step
        if self.world.first and (split != "train" or self.due(self.config.log_every, step)):
            numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._append(METRICS, [{"step": step, "split": split} | numbers])
            self._tracker.add(split, step, values)
        self._show(step, values, split)

    def samples(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """What the model said at `step`, one line of samples.jsonl each."""
        if self.world.first:
            self._append(SAMPLES, [{"step": step} | dict(record) for record in records])

    def say(self, text: str) -> None:
        """A line for the person, above the live progress."""
        if self.world.first:
            self.console.print(text, markup=False, highlight=False)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """A checkpoint after `step`; earlier ones beyond `run.keep` go."""
        if self.world.first:
            with _writing(self.folder):
                for path in filter(Path.exists, (self.folder / METRICS, self.folder / SAMPLES)):
                    sync(path)
            checkpoint.save(self.folder, step, tensors, state, self.config.keep)

    @property
    def stopping(self) -> bool:
        """Whether a signal (on any rank) asked the run to save and stop."""
        return bool(all_max(self.world, torch.tensor(self._signal)))

    def interrupted(self, step: int) -> Interrupted:
        """What to raise once the state after `step` is saved."""
        number = int(all_max(self.world, torch.tensor(self._signal))) or signal.SIGINT
        what = f"stopped by {signal.Signals(number).name} after step {step} and saved in {self.folder}"
        return Interrupted(f"{what}; the same command goes on from there", 128 + number)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        with self._closing:  # progress and lock, last opened first
            if self._status:
                with contextlib.ExitStack() as quiet:
                    if error is not None:
                        quiet.enter_context(contextlib.suppress(OSError, RunError))  # a full disk must not hide what went wrong first
                    self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        status = "finished" if error is None else "interrupted" if stopped else "failed"
        if isinstance(error, NonFinite):
            write_whole(self.folder / "bad-batch.json", json.dumps(describe_batches(error)))
        self._tracker.close()
        with _writing(self.folder):
            self._write_status(status, error)
        if error is None:
            self.say(f"{self.stage}: finished after {self.step} steps, {time.monotonic() - self._started:.1f} s, {self.folder}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise Interrupted(f"stopped at once by a second signal during step {self.step + 1}; nothing newer was saved", 128 + number)
        self._signal = number
        with contextlib.suppress(RuntimeError):  # the signal came while a line was being written
            self.say(f"{signal.Signals(number).name}: saving after this step; once more stops at once")

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        with _writing(self.folder / name), (self.folder / name).open("a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def _show(self, step: int, values: Mapping[str, float], split: str) -> None:
        if split != "train":
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.say(f"step {step}, {split}: {numbers}")
        elif self._progress is not None:
            main = next((f"{name} {values[name]:.4g}" for name in ("score", "loss") if name in values), "")
            speed = f", {values['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in values else ""
            self._progress.update(self._task, completed=step, shown=main + speed)

    def _describe(self, parents: Mapping[str, str]) -> dict[str, Any]:
        versions = {"trueline": trueline.__version__, "python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
        return {
            "stage": self.stage,
            "status": "",
            "step": self.step,
            "total": self.total,
            "resumed_from": self.step or None,
            "seed": self.config.seed,
            "device": str(self.world.device),
            "threads": torch.get_num_threads(),
            "ranks": self.world.size,
            "versions": versions,
            "parents": dict(parents),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _write_status(self, status: str, error: BaseException | None = None) -> None:
        self._status |= {"status": status, "step": self.step, "seconds": round(time.monotonic() - self._started, 3)}
        if error is not None:
            self._status["error"] = str(error) or type(error).__name__
        write_whole(self.folder / STATUS, json.dumps(self._status, ensure_ascii=False, indent=1) + "\n")


def due(every: int, step: int, total: int) -> bool:
    """Whether something done `every` so many steps (0: at the end only) is due after `step` of `total`; always after the last.

    >>> [step for step in range(1, 8) if due(3, step, 7)], [step for step in range(1, 8) if due(0, step, 7)]
    ([3, 6, 7], [7])
    """
    return step == total or (every > 0 and step % every == 0)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder` (made if missing) for this process; UserError when another one does.

    The kernel lets go of the lock when its holder dies, however it dies, so a lock is never stale; the file says who holds it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"run.output: {folder} cannot be used as a folder to write in: {error.strerror}; choose another") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 1000).decode("utf-8", "replace").strip() or "another process"
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise UserError(f"run.output: {folder} cannot be locked: {error.strerror}; choose a folder on another disk") from error
        raise UserError(f"run.output: {folder} is in use by {holder}; wait for it to end, or choose another folder") from None
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.ftruncate(handle, 0)
        if made and folder.is_dir() and {p.name for p in folder.iterdir()} == {LOCK}:  # a mistake came before anything was written
            (folder / LOCK).unlink()
            folder.rmdir()
        os.close(handle)


def read_status(folder: Path) -> dict[str, Any]:
    """run.json, {} where there is none that can be read."""
    try:
        found = json.loads((folder / STATUS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def changed_settings(path: Path, text: str) -> list[str]:
    """Dotted keys whose values in the config `text` differ from those saved at `path`; the `run` section does not count."""
    before, now = saved_settings(path), flat(yaml.safe_load(text))
    if not before:
        return []
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name) and not name.startswith("run."))


def saved_settings(path: Path) -> dict[str, Any]:
    """The config saved at `path` by dotted key; {} where there is none that can be read."""
    try:
        return flat(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted key.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {name: value for key, branch in tree.items() for name, value in flat(branch, f"{prefix}{key}.").items()}


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Replaces `path` by `text`, or pieces of it, at once: whoever reads it sees the old text or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines((text,) if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def cut_log(path: Path, step: int) -> None:
    """Leaves out of a JSON-lines log what came after `step`, and a line that was cut short; with step 0 all of it."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8", "replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step and step > 0:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    write_whole(path, "".join(kept))


def describe_batches(error: NonFinite) -> dict[str, Any]:
    """The micro-batches of a step that was stopped, as token lists."""
    batches = [getattr(item, "batch", item) for item in error.batches]
    sequences = [
        {"tokens": tokens.tolist(), "trained": trained.tolist()}
        for batch in batches
        if isinstance(batch, Batch)
        for tokens, trained in zip(batch.tokens.split(batch.lengths), batch.trained.split(batch.lengths), strict=True)
    ]
    return {"step": error.step, "tensor": error.tensor, "sequences": sequences}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise RunError(f"disk full: {path} cannot be written; free some space and start the same command again") from error
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
