"""The benchmarks for a GPU, run on a small model on a CPU: that everything in them runs, not how fast."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.structure.tree import ROOT
from trueline.errors import RunError

BARE = """
import importlib.util, runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "pydantic" else super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare]  # and none of an installation that leads to the checkout
assert importlib.util.find_spec("trueline") is importlib.util.find_spec("pydantic") is None
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("bench", "sections"),
    [
        ("gpu_train", ["environment", "attention", "lora_speed"]),
        ("gpu_rollout", ["environment", "decode", "hand_over"]),
        pytest.param("gpu_train", ["environment", "loss", "lora_memory", "dpo", "full"], marks=pytest.mark.slow),
        pytest.param("gpu_rollout", ["environment", "kernel", "lora", "mixed", "theirs"], marks=pytest.mark.slow),
        pytest.param("gpu_train", ["compiled"], marks=pytest.mark.slow),
    ],
)
def test_every_section_runs_and_finds_equal_numbers(bench, sections):
    done = subprocess.run(
        [sys.executable, f"bench/{bench}.py", "--small", "--device", "cpu", "--only", *sections],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines, _, table = done.stdout.partition("\n\n")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["section"] for row in rows if row["name"] == "section"] == sections
    assert not [row for row in rows if "error" in row or row["name"].startswith("cut")]
    gaps = [row["value"] for row in rows if "gap" in row["name"] or "apart" in row["name"] or row["name"].startswith("log-prob")]
    assert (gaps and max(gaps) < 1e-3) or any(row["name"].startswith("skipped") and row["reason"] for row in rows)
    assert all(name in table for name in sections)


@pytest.mark.parametrize(
    ("bench", "sections"),
    [
        ("gpu_train", ["environment", "attention"]),
        pytest.param("gpu_train", ["environment", "lora_speed"], marks=pytest.mark.slow),
        pytest.param("gpu_rollout", ["environment", "hand_over"], marks=pytest.mark.slow),
    ],
)
def test_a_checkout_runs_without_pydantic_and_without_being_installed(bench, sections, tmp_path):
    (tmp_path / "bare.py").write_text(BARE)
    command = [sys.executable, "bare.py", str(ROOT / "bench" / f"{bench}.py"), "--small", "--device", "cpu", "--only", *sections]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.partition("\n\n")[0].splitlines()]
    assert [row["section"] for row in rows if row["name"] == "section"] == sections and not [row for row in rows if "error" in row]


def test_the_stand_in_for_pydantic_knows_names_and_defaults():
    settings = load("gpu_settings")
    pydantic = settings.stand_in()["pydantic"]

    class Section(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(frozen=True)
        path: str
        rank: int = pydantic.Field(8, ge=1)

    class Longer(Section):
        kind: str = "full"

        @pydantic.model_validator(mode="after")
        def sound(self):
            return self

    made = Longer(path="x", rank=4).model_copy(update={"kind": "lora"})
    assert (made.path, made.rank, made.kind, made.sound()) == ("x", 4, "lora", made) and Longer(path="y").rank == 8
    assert list(Longer.model_fields) == ["path", "rank", "kind"] and list(Section.model_fields) == ["path", "rank"]
    with pytest.raises(TypeError, match="path, ranks"):
        Longer(ranks=1)


def small_report(module, seconds=30):
    return module.Report("bench", argparse.Namespace(small=True, device="cpu"), seconds)


def test_a_section_loses_nothing_but_its_own(capsys):
    report = small_report(load("gpu_report"))

    def endless(report):
        report.read("before", 1.0, "s")
        time.sleep(20)

    def broken(report):
        raise ZeroDivisionError("a reading by nothing")

    def hungry(report):
        raise torch.OutOfMemoryError("full")

    def good(report):
        report.read("good", 2.0, "s")

    began = time.monotonic()
    status = report.run([("endless", 0.2, endless), ("broken", 5, broken), ("hungry", 5, hungry), ("good", 5, good)])
    assert status == 1 and time.monotonic() - began < 18 and report.failed == ["broken"]
    rows = [json.loads(line) for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()]
    names = [(row["section"], row["name"]) for row in rows if row["name"] != "section"]
    assert names == [
        ("endless", "before"), ("endless", "cut: out of time"), ("broken", "failed"), ("hungry", "out of memory"), ("good", "good")
    ]  # fmt: skip
    report.seconds = 0
    report.run([("late", 5, good)])
    assert json.loads(capsys.readouterr().out.splitlines()[0])["name"] == "cut: out of time"


def test_after_a_device_failed_the_table_is_all_that_is_left(capsys):
    report = small_report(load("gpu_report"))

    def ending(report):
        report.read("before", 1.0, "s")

        def clean():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        report.clean = clean

    status = report.run([("ending", 5, ending), ("late", 5, ending), ("later", 5, ending)])
    lines, _, table = capsys.readouterr().out.partition("\n\n")
    names = [(row["section"], row["name"]) for row in map(json.loads, lines.splitlines())]
    assert names[:3] == [("ending", "before"), ("ending", "section"), ("ending", "the device failed")]
    assert names[3:] == [("late", "skipped: the device failed before"), ("later", "skipped: the device failed before")]
    assert status == 1 and "illegal" in lines and "before" in table and table.count("skipped") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cut_that_a_finalizer_swallows_comes_again(monkeypatch):
    module = load("gpu_report")
    monkeypatch.setattr(module, "AGAIN", 0.2)
    report, ended = small_report(module), []

    class Slow:
        def __del__(self):
            time.sleep(0.5)
            ended.append("never reached")

    def deaf(report):
        Slow()
        time.sleep(20)

    began = time.monotonic()
    assert report.run([("deaf", 0.2, deaf)]) == 0 and time.monotonic() - began < 15 and not ended
    assert [row["name"] for row in report.rows] == ["cut: out of time", "section"]


def test_memory_that_runs_out_within_the_backward_pass_is_that_rows_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = load("gpu_train")

    def full(*given, **settings):
        raise RunError("step 1: out of memory after the first weights were updated; the last checkpoint is sound.")

    monkeypatch.setattr(module, "train_step", full)
    report = small_report(module)
    assert report.run([("full", 30, module.full)]) == 0
    assert [row["name"].endswith("out of memory") for row in report.rows] == [True] * 6 + [False]


def test_steps_count_where_the_whole_batch_goes_on(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    marks = [(1, 0.0), (4, 1.0), (4, 3.0), (4, 6.0), (3, 10.0), (3, 15.0)]
    assert load("gpu_rollout").steps_of(marks, 4) == [2.0, 3.0]


def test_the_large_model_is_glm_4_9b():
    module = load("gpu_report")
    with torch.device("meta"):
        decoder = module.Decoder(module.GLM4)
    assert sum(p.numel() for p in decoder.parameters()) == module.GLM4_PARAMETERS == 9_399_951_360
    small = small_report(module).decoder()
    counted = sum(p.numel() for n, p in small.named_parameters() if p.dim() == 2 and n != "embed.weight")
    assert counted == module.matmul_parameters(module.SMALL)


def test_bounds_are_marked_met_or_not():
    module = load("gpu_report")
    assert module._meets(3, "<= 3") and not module._meets(3.1, "<= 3") and module._meets(4, ">= 3") and not module._meets(2, ">= 3")


def test_nine_billion_weights_are_refused_on_a_cpu():
    done = subprocess.run([sys.executable, "bench/gpu_train.py", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--small" in done.stderr


@pytest.mark.slow
def test_a_section_without_a_compiler_is_skipped_with_the_reason(tmp_path):
    command = [sys.executable, "bench/gpu_train.py", "--small", "--device", "cpu", "--only", "compiled"]
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[0])
    assert done.returncode == 0 and row["name"].startswith("skipped") and "No working C++ compiler" in row["reason"], done.stderr
