"""The package as text and syntax trees; the structure tests read it and import nothing of it."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "trueline"


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted module name to syntax tree, all of trueline/."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Every import at or below a node as `(dotted name, line)`; `from a import b` gives both `a` and `a.b`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, child.lineno
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield base, child.lineno
            for alias in child.names:
                yield f"{base}.{alias.name}", child.lineno


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child


def project_files() -> list[Path]:
    """What the project consists of: tracked files and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
