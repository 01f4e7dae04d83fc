"""The benchmarks for a GPU, run on a small model on a CPU: that everything in them runs, not how fast."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch

from tests.structure.tree import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("bench", "sections"),
    [
        ("gpu_train", ["environment", "attention", "loss", "lora_memory", "lora_speed", "dpo", "full"]),
        ("gpu_rollout", ["environment", "kernel", "decode", "hand_over", "mixed", "theirs"]),
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


def test_a_section_loses_nothing_but_its_own(capsys):
    report = load("gpu_report").Report("bench", argparse.Namespace(small=True, device="cpu"), 30)

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


def test_the_large_model_is_glm_4_9b():
    module = load("gpu_report")
    with torch.device("meta"):
        decoder = module.Decoder(module.GLM4)
    assert sum(p.numel() for p in decoder.parameters()) == module.GLM4_PARAMETERS == 9_399_951_360
    small = module.Report("bench", argparse.Namespace(small=True, device="cpu"), 30).decoder()
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
