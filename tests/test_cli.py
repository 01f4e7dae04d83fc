"""The command line as its user meets it: exit codes, and messages on standard error without a traceback."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trueline import cli
from trueline.errors import Interrupted, RunError, UserError

GOOD = "model: {path: nowhere}\ndata: {train: [a.jsonl]}\nrun: {output: out, steps: 1}\n"
VERBS = ("sft", "reward", "dpo", "ppo", "prepare", "evaluate", "generate", "chat", "export", "check", "demo")


def trueline(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trueline", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(*arguments: str, cwd: Path | None = None) -> str:
    """Standard error of a command that must end with exit code 2, without a traceback and with nothing on standard output."""
    done = trueline(*arguments, cwd=cwd)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr and not done.stdout
    return done.stderr


def test_help_is_fast_and_names_every_verb() -> None:
    """The best of a few tries: another test may hold both cores."""
    times: list[float] = []
    while not times or (min(times) >= 0.5 and len(times) < 8):
        start = time.perf_counter()
        done = trueline("--help")
        times.append(time.perf_counter() - start)
    assert done.returncode == 0 and all(f"  {verb} " in done.stdout for verb in VERBS)
    assert min(times) < 0.5, times


def test_help_and_the_package_import_nothing_heavy() -> None:
    code = "import json, sys, trueline, trueline.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"torch", "numpy", "pydantic", "yaml", "pyarrow", "rich"}, loaded


def test_package_names_are_lazy() -> None:
    code = "import sys, trueline; assert 'torch' not in sys.modules; print(trueline.__version__, *dir(trueline))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == trueline("--version").stdout.split()[1]
    assert {"load", "sft", "reward", "dpo", "ppo", "evaluate"} <= set(done.stdout.split())


def test_unknown_name_of_the_package() -> None:
    import trueline as package

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = package.trian


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Usage: trueline"),
        (("sftt",), "Did you mean 'sft'?"),
        (("sft",), "Missing argument"),
        (("sft", "--dry"), "No such option"),
        (("sft", "c.yaml", "--run.steps=5"), "--run.steps=5: settings are written without dashes: run.steps=5"),
        (("sft", "data.jsonl"), "data.jsonl: expected a .yaml file or key.path=value (did you mean data.train=data.jsonl?)"),
        (("sft", "run.steps"), "run.steps: expected a .yaml file or key.path=value (did you mean run.steps=VALUE?)"),
        (("sft", "good"), "(did you mean good.yaml?)"),
        (("sft", "goood.yaml"), "goood.yaml: no such file (did you mean good.yaml?)"),
        (("sft", "old_run"), "(did you mean old_run/config.yaml?)"),
        (("sft", "bad.yaml"), "bad.yaml:1:9: model.pth: unknown key (did you mean model.path?)"),
        (("sft", "good.yaml", "optimizer.lr=abc"), "override optimizer.lr=abc: found 'abc', expected a number above 0"),
        (("sft", "good.yaml", "dpo.beta=1"), "it belongs to `trueline dpo`"),
        (("generate", "m", "--prompts", "p", "--out", "o", "temprature=1"), "unknown key (did you mean temperature?)"),
        (("generate", "m", "--prompts", "p", "--out", "o", "good.yaml"), "this command reads no configuration file"),
        (("generate", "m", "--prompts", "p"), "--out"),
        (("chat", "m", "top_p=2"), "override top_p=2: found 2, expected a number above 0 and up to 1"),
        (("export", "run", "out", "--merge", "--adapter"), "--merge and --adapter exclude each other"),
        (("check", "f", "--show", "0"), "--show"),
        (("demo", "--seed", "x"), "--seed"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "good.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("model: {pth: x}\n", encoding="utf-8")
    (tmp_path / "old_run").mkdir()
    (tmp_path / "old_run" / "config.yaml").write_text(GOOD, encoding="utf-8")
    message = refused(*arguments, cwd=tmp_path) if arguments else "".join(trueline().stdout + trueline().stderr)
    assert words in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml", "good.yaml", "old_run"]  # nothing half-written


def test_all_unusable_arguments_are_told_together(tmp_path: Path) -> None:
    lines = refused("sft", "a", "none.yaml", "b=1", "c", cwd=tmp_path).splitlines()
    assert lines[0] == "3 arguments are not usable:" and [line.split(":")[0].strip() for line in lines[1:]] == ["a", "none.yaml", "c"]


def test_text_that_the_terminal_cannot_show_does_not_end_the_command(tmp_path: Path) -> None:
    done = trueline("sft", "配置", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "expected a .yaml file" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("data.jsonl:3: answer: empty"), 2, "data.jsonl:3: answer: empty"),
        (RunError("loss is not finite at step 3; lower optimizer.lr"), 1, "loss is not finite at step 3"),
        (Interrupted("saved step 4; run the same command to go on"), 130, "saved step 4"),
        (Interrupted("saved step 4", exit_code=143), 143, "saved step 4"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "the disk is full (writing out/x); make room"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out: permission denied"),
        (MemoryError(), 1, "out of memory; lower batch.max_tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("file too short"), 1,
         "model.compile: torch's compiler failed (file too short); a killed run may have left a broken file: delete "),
        (type("BackendFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})("backend='x' raised:\nImportError: short"), 1,
         "model.compile: torch's compiler failed (ImportError: short); a killed run may have left a broken file: delete /kept, or "),
        (ImportError("/kept/cd.main.so: too short"), 1,
         "model.compile: torch's compiler failed (/kept/cd.main.so: too short); a killed run may have left a broken file: delete /kept, "),
        (KeyError("weight"), 1, "internal error: KeyError: 'weight'; this is trueline's mistake"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Recipe:
        @staticmethod
        def run(out: str, seed: int) -> None:
            raise error

    monkeypatch.setattr(cli, "_recipe", lambda name: Recipe)
    monkeypatch.setattr(sys, "argv", ["trueline", "demo"])
    monkeypatch.delenv("TRUELINE_DEBUG", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kept")
    assert exit_code() == code
    shown = capsys.readouterr().err
    assert shown.startswith(words) and "Traceback" not in shown and len(shown.splitlines()) <= 1


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_recipe", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["trueline", "demo"])
    monkeypatch.setenv("TRUELINE_DEBUG", "1")
    assert exit_code() == 1
    assert "Traceback" in capsys.readouterr().err


def test_recipes_get_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verb calls its recipe with its arguments, the configuration typed and merged."""
    calls: list[tuple[str, tuple[object, ...]]] = []

    class Recipe:
        def __init__(self, name: str):
            self.run = lambda *a: calls.append((name, a))
            self.chat = self.check = self.run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_recipe", Recipe)
    Path("good.yaml").write_text(GOOD, encoding="utf-8")
    for line in (
        "sft good.yaml run.seed=3 --dry-run",
        "ppo run.seed=4 good.yaml reward.model=judge",
        "generate m --prompts p --out o temperature=0.7 n=2",
        "export run out --merge",
        "check a b --model m --show 2 --format alpaca",
        "demo --seed 5",
    ):
        monkeypatch.setattr(sys, "argv", ["trueline", *line.split()])
        assert exit_code() == 0
    (sft, ppo, generate, export, check, demo) = calls
    assert sft[1][0].run.seed == 3 and sft[1][1] is True  # type: ignore[attr-defined]
    assert type(ppo[1][0]).__name__ == "PpoStageConfig" and ppo[1][0].reward.model == "judge" and ppo[1][1] is False  # type: ignore[attr-defined]
    assert generate[1][:3] == ("m", "p", "o") and (generate[1][3].temperature, generate[1][3].n) == (0.7, 2)  # type: ignore[attr-defined]
    assert (export, check, demo) == (
        ("export", ("run", "out", "merge", None)),
        ("check", (["a", "b"], "m", 2, "alpaca", None, None, None, "auto")),
        ("demo", ("demo", 5)),
    )  # fmt: skip


def exit_code() -> int:
    try:
        return cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
