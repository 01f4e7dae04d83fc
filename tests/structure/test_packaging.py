"""What is installed is what is imported: declared, bounded and pinned."""

import re
import sys
import tomllib
from importlib.metadata import version

import trueline
from tests.structure.tree import ROOT, imports, modules, project_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {"pyyaml": "yaml"}
PINS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower() for requirement in requirements}


def test_every_import_is_declared() -> None:
    known = {IMPORT_NAMES.get(name, name).replace("-", "_") for name in declared(PROJECT["dependencies"])}
    extras = PROJECT["optional-dependencies"]
    # triton comes with torch where there is a GPU; elsewhere nothing imports the module that imports it
    known |= {"trueline", "tensorboard", "triton"} | {name.replace("-", "_") for name in declared(extras["evaluate"])}
    known |= set(sys.stdlib_module_names)
    undeclared = [f"{m}:{line} {n}" for m, tree in modules().items() for n, line in imports(tree) if n.split(".")[0] not in known]
    assert not undeclared, "\n".join(undeclared)


def test_torch_is_bounded_above() -> None:
    """Without the upper bound pip takes a newer CUDA build of several GB where a local wheel would do."""
    assert "torch>=2.11,<2.14" in PROJECT["dependencies"]


def test_constraints_pin_every_direct_dependency_and_no_build() -> None:
    assert not [pin for pin in PINS if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", pin)]
    extras = PROJECT["optional-dependencies"]
    wanted = declared(PROJECT["dependencies"] + extras["test"] + extras["dev"] + extras["evaluate"]) - {"trueline"}
    pinned = {pin.split("==")[0].lower().replace("-", "_") for pin in PINS}
    assert not {name for name in wanted if name.replace("-", "_") not in pinned}


def test_one_version() -> None:
    assert "version" in PROJECT["dynamic"]
    assert version("trueline") == trueline.__version__
    assert f"## {trueline.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_templates_are_installed_with_the_package() -> None:
    """A wheel holds the Python files and what package-data names; anything else would be missing outside of a checkout."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns = tool["setuptools"]["package-data"]["*"]
    files = [path for path in project_files() if path.is_relative_to(ROOT / "trueline") and path.suffix != ".py"]
    assert files and not [str(path) for path in files if not any(path.match(pattern) for pattern in patterns)]
