"""A run's folder as other programs read it: status, log, lock, signals; and what a person sees."""

import io
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from trueline.config.schema import RunConfig
from trueline.data.sample import Sample
from trueline.errors import Interrupted, RunError, UserError
from trueline.model.batch import pack
from trueline.parallel.world import World
from trueline.train import checkpoint
from trueline.train.run import Run, changed_settings, cut_log, due, lock, write_whole
from trueline.train.step import NonFinite

ROOT = Path(__file__).resolve().parents[2]


def opened(folder: Path, console: Console | None = None, **settings: Any) -> Run:
    config = RunConfig(output=folder, **({"steps": 10} | settings))
    return Run("sft", config, "run:\n  seed: 0\n", console=console or Console(file=io.StringIO()))


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_due() -> None:
    assert [s for s in range(1, 8) if due(3, s, 7)] == [3, 6, 7]
    assert [s for s in range(1, 8) if due(0, s, 7)] == [7]
    assert [s for s in range(1, 4) if due(1, s, 3)] == [1, 2, 3]


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    with opened(folder, seed=11) as run:
        run.begin(0, 2, {"models/base": "abc"})
        assert status(folder)["status"] == "running"
        run.log(1, {"loss": 2.5, "tokens": 7})
        run.log(2, {"loss": float("nan")})
        run.log(2, {"loss": 2.0, "accuracy": 0.5}, "eval")
        run.samples(2, [{"prompt": "你好", "response": "hi"}])
    found = status(folder)
    assert found["status"] == "finished" and found["step"] == found["total"] == 2 and found["seed"] == 11
    assert found["parents"] == {"models/base": "abc"} and found["device"] == "cpu" and found["resumed_from"] is None
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"] == platform.python_version()
    assert lines(folder) == [
        {"step": 1, "split": "train", "loss": 2.5, "tokens": 7},
        {"step": 2, "split": "train", "loss": None},
        {"step": 2, "split": "eval", "loss": 2.0, "accuracy": 0.5},
    ]
    assert lines(folder, "samples.jsonl") == [{"step": 2, "prompt": "你好", "response": "hi"}]
    assert "你好" in (folder / "samples.jsonl").read_text("utf-8")
    assert (folder / "config.yaml").read_text() == "run:\n  seed: 0\n"


def test_log_every_thins_the_training_lines_only(tmp_path: Path) -> None:
    with opened(tmp_path, log_every=4) as run:
        run.begin(0, 10)
        for step in range(1, 11):
            run.log(step, {"loss": 1.0})
            run.log(step, {"loss": 1.0}, "eval")
    assert [line["step"] for line in lines(tmp_path) if line["split"] == "train"] == [4, 8, 10]
    assert len(lines(tmp_path)) == 13


def test_after_a_resume_each_step_is_in_the_log_once(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.begin(0, 10)
        for step in range(1, 8):
            run.log(step, {"loss": 1.0})
            run.samples(step, [{"response": "a"}, {"response": "b"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "tr')  # killed in mid-line
    with opened(tmp_path) as run:
        run.begin(5, 10)
        assert run.step == 5
        run.log(6, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2)]
    assert [line["step"] for line in lines(tmp_path, "samples.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert status(tmp_path)["resumed_from"] == 5


def test_another_number_of_threads_is_told(tmp_path: Path) -> None:
    for changed in (0, 1):
        with opened(tmp_path) as run:
            run.begin(0, 10)
            run.log(3, {"loss": 1.0})
        found = status(tmp_path)
        (tmp_path / "run.json").write_text(json.dumps(found | {"threads": found["threads"] + changed}))
        screen = io.StringIO()
        with opened(tmp_path, Console(file=screen, soft_wrap=True)) as run:
            run.begin(3, 10)
        assert ("sums are taken in another order" in screen.getvalue()) == bool(changed)


def test_a_fresh_start_empties_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0, "split": "eval"}\n{"step": 1}\n')
    cut_log(log, 0)
    assert log.read_text() == ""
    cut_log(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("broken"), "failed"),
        (RunError("disk full"), "failed"),
        (Interrupted("stopped"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_the_status_says_how_it_ended(tmp_path: Path, error: BaseException, expected: str) -> None:
    with pytest.raises(type(error)), opened(tmp_path) as run:
        run.begin(0, 10)
        run.log(3, {"loss": 1.0})
        raise error
    assert status(tmp_path)["status"] == expected and status(tmp_path)["step"] == 3
    assert status(tmp_path)["error"] == (str(error) or "KeyboardInterrupt")


def test_the_batch_that_spoiled_a_step_is_kept(tmp_path: Path) -> None:
    batch = pack([Sample([1, 2, 3], [False, True, True]), Sample([4, 5], [False, True])])
    with pytest.raises(NonFinite), opened(tmp_path) as run:
        run.begin(0, 10)
        raise NonFinite(4, "loss of micro-batch 1 of 1", [batch])
    kept = json.loads((tmp_path / "bad-batch.json").read_text())
    assert kept["step"] == 4 and kept["sequences"][1] == {"tokens": [4, 5], "trained": [False, True]}
    assert "loss of micro-batch 1 of 1 is not finite" in status(tmp_path)["error"]


def test_a_mistake_before_the_start_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), opened(tmp_path / "new"):
        raise UserError("data.train: no such file")
    assert not (tmp_path / "new").exists()


def test_a_mistake_before_the_start_leaves_an_older_run_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.begin(0, 1)
        run.log(1, {"loss": 1.0})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError), opened(tmp_path):
        raise UserError("data.train: no such file")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


HOLD = """
import sys
from pathlib import Path
from trueline.train.run import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=rf"is in use by process {holder.pid} on {platform.node()}; wait for it to end, or choose another"
        ):
            opened(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".lock").read_text().startswith(f"process {holder.pid}")  # it could not clean up
    with opened(tmp_path) as run:  # yet its lock is not stale
        run.begin(0, 1)


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "a"):
            (tmp_path / "a" / "file").touch()
            assert f"process {os.getpid()} " in (tmp_path / "a" / ".lock").read_text()
    assert (tmp_path / "a" / ".lock").read_text() == ""


def test_an_output_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.output: .*file cannot be used as a folder to write in"):
        opened(tmp_path / "file").__enter__()


SIGNALLED = """
import os, sys, time
from pathlib import Path
import torch
from trueline.config.schema import RunConfig
from trueline.errors import Interrupted
from trueline.train.run import Run

folder, patient = Path(sys.argv[1]), sys.argv[2] == "patient"
try:
    with Run("sft", RunConfig(output=folder, steps=1000, keep=1), "") as run:
        run.begin(0, 1000)
        for step in range(1, 1001):
            run.log(step, {"loss": 1.0})
            print(step, flush=True)
            time.sleep(0.02)
            if run.stopping and patient:
                run.save(step, {"model": {"w": torch.ones(2)}}, {"step": step})
                raise run.interrupted(step)
except Interrupted as stop:
    print(stop, file=sys.stderr)
    raise SystemExit(stop.exit_code)
"""


def signalled(folder: Path, manner: str, *signals: signal.Signals) -> tuple[int, str]:
    child = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, str(folder), manner], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    while "3\n" != child.stdout.readline():
        pass
    for number in signals:
        child.send_signal(number)
        while "saving after this step" not in (text := child.stdout.readline()) and text and number is signals[0]:
            pass
    said = child.communicate(timeout=30)[1]
    return child.returncode, said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first(tmp_path: Path, number: signal.Signals, code: int) -> None:
    returned, said = signalled(tmp_path, "patient", number)
    found, _ = checkpoint.newest(tmp_path)
    assert returned == code and found is not None
    assert said == f"stopped by {number.name} after step {found.step} and saved in {tmp_path}; the same command goes on from there\n"
    assert status(tmp_path)["status"] == "interrupted" and status(tmp_path)["step"] == found.step
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, found.step + 1))


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    returned, said = signalled(tmp_path, "impatient", signal.SIGTERM, signal.SIGINT)
    assert returned == 130 and said.startswith("stopped at once by a second signal during step ")
    assert status(tmp_path)["status"] == "interrupted" and checkpoint.steps(tmp_path) == []


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with opened(tmp_path) as run:
        run.begin(0, 1)
        assert signal.getsignal(signal.SIGINT) not in before and not run.stopping
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def shown(folder: Path, terminal: bool) -> str:
    screen = io.StringIO()
    with opened(folder, Console(file=screen, force_terminal=terminal, width=200, soft_wrap=True)) as run:
        run.begin(4, 6)
        for step in (5, 6):
            run.log(step, {"loss": 1.25, "tokens_per_second": 12345.6})
        run.log(6, {"loss": 1.5, "accuracy": 0.75}, "eval")
    return screen.getvalue()


def test_without_a_terminal_only_start_evaluation_and_end_are_told(tmp_path: Path) -> None:
    told = shown(tmp_path, False).splitlines()
    assert told[0] == f"sft: from step 4 of 6, {tmp_path}"
    assert told[1] == "step 6, eval: loss 1.5, accuracy 0.75"
    assert told[2].startswith("sft: finished after 6 steps, ") and len(told) == 3


def test_on_a_terminal_there_is_live_progress(tmp_path: Path) -> None:
    told = shown(tmp_path, True)
    assert "6/6" in told and "loss 1.25, 12,346 tokens/s" in told and "step 6, eval: loss 1.5" in told
    assert told.count("\x1b[?25l") == told.count("\x1b[?25h")  # the cursor comes back


def test_other_ranks_write_and_say_nothing(tmp_path: Path) -> None:
    screen = io.StringIO()
    config = RunConfig(output=tmp_path / "run", steps=1)
    with Run("sft", config, "", World(rank=1, size=1), Console(file=screen)) as run:
        run.begin(0, 1)
        run.log(1, {"loss": 1.0})
        run.samples(1, [{}])
        run.save(1, {"model": {"w": torch.ones(1)}}, {})
    assert not (tmp_path / "run").exists() and screen.getvalue() == ""


def test_a_missing_tracker_is_the_persons_to_install(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with (
            pytest.raises(UserError, match="tensorboard is not installed; pip install tensorboard"),
            opened(tmp_path, tracker="tensorboard") as run,
        ):
            run.begin(0, 1)
    else:
        with opened(tmp_path, tracker="tensorboard") as run:
            run.begin(0, 1)
            run.log(1, {"loss": 1.0})
        assert list((tmp_path / "tensorboard").iterdir())


def test_write_whole_replaces_at_once(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "old")
    write_whole(tmp_path / "a.json", "新")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text("utf-8") == "新"


def test_a_log_that_cannot_be_written_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"metrics.jsonl cannot be written: Is a directory"),
        opened(tmp_path) as run,
    ):
        run.begin(0, 1)
        (tmp_path / "metrics.jsonl").mkdir()
        run.log(1, {"loss": 1.0})


def test_changed_settings_are_named(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    assert changed_settings(saved, "optimizer: {lr: 1}") == []  # nothing saved yet
    saved.write_text("optimizer: {lr: 1, eps: 2}\nrun: {steps: 3}\n")
    assert changed_settings(saved, "optimizer: {lr: 1, eps: 2}\nrun: {steps: 9}") == []
    assert changed_settings(saved, "optimizer: {lr: 5}\nrun: {steps: 3}") == ["optimizer.eps", "optimizer.lr"]
