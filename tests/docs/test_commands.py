"""Every command and every program of the pages runs as it stands, page by page, on a tiny model under the names the pages use."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import Block, blocks, names_in, pages, table
from tests.recipes.commands import Commands
from tests.recipes.toys import FAMILIES, Toys
from tests.structure.tree import ROOT

# what a page may tell a person to type although it is not typed here, and why
SKIPPED = {
    "make setup": "no installation in a test",
    "source .venv/bin/activate": "the tests run in it",
    "make demo": "tests/recipes runs the demo",
    "make test": "it would run this test",
    "make test-slow": "it takes minutes",
    "make lint": "`make test` runs it first",
    "make frozen": "it writes into the working tree",
}
MADE_THERE = {"README.md": ("my-sft",)}  # folders that a page's own commands make
SAME = ("README.zh-CN.md",)  # test_pages.py compares its blocks with the English page's
STAGES = {"sft": "docs/sft.md", "reward": "docs/reward.md", "dpo": "docs/dpo.md", "ppo": "docs/ppo.md"}
REWARD = """def score(answers):
    return [1.0 if 10 <= len(answer) <= 200 else 0.0 for answer in answers]
"""


def larder(folder: Path, toys: Toys, page: str) -> None:
    """What the pages take for granted: a model, its fine-tuned successor, data, a reward function, the configurations."""
    for name in {"my-model", "my-sft"} - set(MADE_THERE.get(page, ())):
        shutil.copytree(toys.model(), folder / name)
    own = FAMILIES if page.startswith("docs/models") else ()
    for name, family in {"my-glm4": "glm", **{f"my-{family}": family for family in own}}.items():
        shutil.copytree(toys.model(family), folder / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    questions = [(f"What is {n} plus one?", f"It is {n + 1}.") for n in range(40)]
    turns = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in questions]
    pairs = [{"prompt": q, "chosen": a, "rejected": f"Who knows? {a}"} for q, a in questions]
    prompts = [{"prompt": q, "expected": a} for q, a in questions]
    for name, records in (("train", turns[:32]), ("dev", turns[32:]), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Each command of a bash block (of a console block, what stands behind `$ `), and the lines it is said to print."""
    console = block.language == "console"
    command: str | None = None
    printed: list[str] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if console and not line.startswith("$ "):
            printed.append(line)
        elif line.strip() and not line.lstrip().startswith("#"):
            if command is not None:
                yield command, printed
            command, printed = line.removeprefix("$ ") if console else line, []
    if command is not None:
        yield command, printed


def skipped(command: str) -> bool:
    return any(command == start or command.startswith(start + " ") for start in SKIPPED)


def execute(command: str, folder: Path, trueline: Commands) -> tuple[int, str]:
    words = shlex.split(command, comments=True)
    if words[0] == "trueline" and not set(words) & {"|", ">", "<", "&&", ";"}:
        done = trueline(*words[1:], cwd=folder, stdin="Hello\n/new\nHello again\n\n")
        return done.code, done.out + done.err
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    plain = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return plain.returncode, plain.stdout + plain.stderr


def as_said(said: list[str], printed: str) -> bool:
    """Whether the lines are what was printed; `...` stands for anything, also for several lines."""
    wanted = "\n".join(said).strip()
    pattern = r"[\s\S]*?".join(re.escape(part) for part in wanted.split("..."))
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.strip().splitlines())) is not None


def run_block(block: Block, folder: Path, trueline: Commands) -> None:
    code = 0
    for command, said in commands(block):
        if skipped(command):
            continue
        if command == "echo $?":
            assert [str(code)] == said, f"{block}: the exit code was {code}"
            continue
        code, printed = execute(command, folder, trueline)
        assert "Traceback" not in printed and "internal error" not in printed, f"{block}: {command}\n{printed}"
        if block.language == "console":
            assert as_said(said, printed), f"{block}: {command} printed\n{printed}"
        else:
            assert code == 0, f"{block}: {command} ended with {code}\n{printed}"


def living_pages() -> list[str]:
    kinds = {"bash", "console", "python"}
    return [page for page in pages() if page not in SAME and kinds & {block.language for block in blocks(page)}]


@pytest.mark.parametrize("page", living_pages())
def test_commands_and_programs_run(page: str, toys: Toys, trueline: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larder(tmp_path, toys, page)
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks(page)):
        if block.name:
            Path(block.name).write_text(block.text, encoding="utf-8")
        elif block.language in ("bash", "console"):
            run_block(block, tmp_path, trueline)
        elif block.language == "python":
            program = tmp_path / f"program-{number}.py"
            program.write_text(block.text, encoding="utf-8")
            runpy.run_path(str(program), run_name="__main__")
    check_run_folders(tmp_path / "runs")
    for stage in (name for name, of in STAGES.items() if of == page):
        check_metrics(page, sorted((tmp_path / "runs").glob(f"{stage}*/metrics.jsonl")))


def check_run_folders(runs: Path) -> None:
    """docs/run-folder.md names every file a run leaves."""
    named = {name.strip("/") for row in table("docs/run-folder.md", "file") for name in names_in(row[0])}
    left = {path.name for status in runs.glob("*/run.json") for path in status.parent.iterdir()}
    assert left <= named, left - named


def check_metrics(page: str, logs: list[Path]) -> None:
    """A stage's page explains every number its runs log, and no other."""
    lines = [json.loads(line) for log in logs for line in log.read_text("utf-8").splitlines()]
    logged = {name for line in lines for name in line} - {"step", "split"}
    explained = {name for row in table(page, "metric") for name in names_in(row[0])}
    assert explained == logged, f"{page} and the log differ: {sorted(explained ^ logged)}"


def test_every_skip_is_needed() -> None:
    typed = [command for page in pages() for block in blocks(page) if block.language == "bash" for command, _ in commands(block)]
    idle = [start for start in SKIPPED if not any(command.startswith(start) for command in typed)]
    assert not idle, f"no page says {idle} any more"


def test_every_verb_is_shown() -> None:
    typed = " ".join(command for page in pages() for block in blocks(page) if block.language == "bash" for command, _ in commands(block))
    # and `make demo`
    verbs = ("sft", "reward", "dpo", "ppo", "prepare", "evaluate", "generate", "chat", "export", "check", "convert", "import")
    assert not [verb for verb in verbs if f"trueline {verb} " not in typed]
