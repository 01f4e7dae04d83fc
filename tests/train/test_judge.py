"""Reward functions of every bad kind: none hangs the run, none speaks for another, none survives it."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trueline.errors import RunError, UserError
from trueline.train import judge
from trueline.train.judge import Judge

REWARDS = """
import json, os, subprocess, sys, time
import neighbour

def lengths(answers):
    return [len(a) for a in answers]

def exact(answers, prompts, records):
    return [float(a == r["answer"]) + len(p) for a, p, r in zip(answers, prompts, records)]

def anything(answers, **rest):
    return [len(rest)] * len(answers)

def near(answers):
    return neighbour.scores(answers)

def loud(answers):
    print("x" * 10_000_000)
    os.system("echo from a child")
    print(json.dumps({"scores": [0.0]}), flush=True)
    return lengths(answers)

def endless(answers):
    while True:
        pass

def brood(answers):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(answers[0], "w").write(str(child.pid))
    time.sleep(600)

def short(answers):
    return [1.0]

def nan(answers):
    return [1.0] + [float("nan")] * (len(answers) - 1)

def text(answers):
    return ["1.0" for _ in answers]

def nothing(answers):
    pass

def hidden(answers):
    return {"a": 1.0, "b": 2.0}

def huge(answers):
    return [10 ** 400 for _ in answers]

def fails(answers):
    values = {}
    return values["missing"]

def leaves(answers):
    sys.exit("good bye")

def dies(answers):
    os._exit(3)

def modules(answers):
    return [float(any(name in sys.modules for name in ("torch", "trueline", "numpy")))] * len(answers)

def array(answers):
    import numpy
    return numpy.array([len(a) for a in answers], dtype=numpy.float32)

def items(answers):
    import numpy
    return [numpy.float32(0.5) for a in answers]

def reads_input(answers):
    return [float(len(sys.stdin.read()))] * len(answers)

number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some where 中文")
    (folder / "neighbour.py").write_text("def scores(answers):\n    return [7 for _ in answers]\n", "utf-8")
    (folder / "rewards.py").write_text(REWARDS, "utf-8")
    return folder / "rewards.py"


def line(wanted: str) -> str:
    return str(next(number for number, text in enumerate(REWARDS.splitlines(), 1) if wanted in text))


def score(file: Path, name: str, answers: tuple[str, ...] = ("a", "bb"), timeout: float = 30.0, **more: object) -> list[float]:
    with Judge(f"{file}:{name}", timeout) as judge:
        return judge.score(answers, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lengths", [1, 2]),
        ("near", [7, 7]),
        ("anything", [0, 0]),
        ("modules", [0, 0]),  # the child starts without torch
        ("array", [1, 2]),
        ("items", [0.5, 0.5]),
        ("reads_input", [0, 0]),  # and it cannot read what is meant for the worker
    ],
)
def test_scores(file: Path, name: str, expected: list[float]) -> None:
    assert score(file, name) == expected


def test_prompts_and_records_are_given_to_those_who_ask(file: Path) -> None:
    more = {"prompts": ["p", "pp"], "records": [{"answer": "a"}, {"answer": "c"}]}
    assert score(file, "exact", **more) == [2.0, 2.0]
    assert score(file, "lengths", **more) == [1, 2]
    assert score(file, "anything", **more) == [2, 2]


def test_one_process_serves_many_calls(file: Path) -> None:
    with Judge(f"{file}:lengths", 30) as judge:
        assert [judge.score(["x" * n, "", "好\ud800\n"]) for n in (1, 300_000)] == [[1, 0, 3], [300_000, 0, 3]]
        assert judge.score([]) == []


def test_what_a_function_prints_stays_out_of_the_protocol(file: Path, tmp_path: Path) -> None:
    with Judge(f"{file}:loud", 30, output=tmp_path / "reward.log") as judge:
        assert judge.score(["abc"]) == [3]
    text = (tmp_path / "reward.log").read_text()
    assert text.count("x") == 10_000_000 and "from a child" in text and '"scores"' in text


@pytest.mark.parametrize("name", ["endless", "brood"])
def test_a_late_function_is_killed_with_all_it_started(file: Path, name: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with Judge(f"{file}:{name}", 1.0) as judge:
        began = time.monotonic()
        with pytest.raises(RunError, match=rf"{name} took longer than 1 s for 1 answers and was killed; raise reward.timeout"):
            judge.score([str(note)])
        assert time.monotonic() - began < 10
        with pytest.raises(RunError, match="its process is not running"):
            judge.score(["again"])
    if name == "brood":
        deadline = time.monotonic() + 5
        while running(int(note.read_text())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(int(note.read_text()))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("short", "returned 1 numbers for 2 answers"),
        ("nan", "returned nan for answer 2 of 2; expected a finite number"),
        ("text", "returned a str for answer 1; expected a list of 2 numbers"),
        ("nothing", "returned NoneType; expected a list of 2 numbers"),
        ("hidden", "returned dict; expected a list"),
        ("huge", "failed: OverflowError"),
        ("fails", "failed: KeyError: 'missing' at .*rewards.py:" + line("values[")),
        ("leaves", "failed: SystemExit: good bye at .*rewards.py:" + line("sys.exit(")),
        ("dies", r"its process ended \(exit code 3\) before it answered"),
    ],
)
def test_a_bad_function_ends_the_run_with_a_sentence(file: Path, name: str, complaint: str) -> None:
    with pytest.raises(RunError, match=complaint):
        score(file, name)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("rewards.py", "'rewards.py' is not of the form file.py:function"),
        ("rewards.py:", "is not of the form"),
        ("rewards.py:a b", "is not of the form"),
        ("nowhere.py:lengths", "there is no file nowhere.py"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_starts(spec: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Judge(spec, 1)


@pytest.mark.parametrize(
    ("name", "hint"), [("length", r"did you mean lengths\?"), ("zzz", "its functions are anything, array,"), ("number", "")]
)
def test_a_missing_function_is_named_with_the_nearest(file: Path, name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"has no function {name}; {hint}"):
        score(file, name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import json\nx = = 1\n", r"cannot be loaded: SyntaxError: .* at .*broken.py:2"),
        ("import json\n\nimport no_such_thing\n", r"ModuleNotFoundError: No module named 'no_such_thing' at .*broken.py:3"),
        ("raise SystemExit(0)\n", r"SystemExit: 0 at .*broken.py:1"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_the_persons_mistake(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=complaint):
        score(tmp_path / "broken.py", "reward")


def test_a_file_that_never_loads_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "START_SECONDS", 0.5)
    (tmp_path / "slow.py").write_text("while True: pass\n")
    with pytest.raises(RunError, match="took longer than 0.5 s to load and was killed"):
        score(tmp_path / "slow.py", "reward", timeout=0.1)


ORPHAN = """
import os, sys
from trueline.train.judge import Judge
judge = Judge(sys.argv[1], 600).__enter__()
print(judge._process.pid, flush=True)
judge._process.stdin.write(b'{"answers": ["a"], "prompts": null, "records": null}\\n')
judge._process.stdin.flush()
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_leaves_no_process_behind(file: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, f"{file}:endless"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ, check=False, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(pid) and math.isclose(done.returncode, -9)
