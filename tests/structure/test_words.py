"""What must not be written: ways to run foreign code, swallowed errors, this machine's paths."""

import ast
import re

from tests.structure.tree import ROOT, imports, modules, project_files

UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "torch.load", "torch.save", "yaml.load"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load",
    "os.system", "os.popen",
}  # fmt: skip
UNSAFE_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}
MACHINE = re.compile(r"(/)(work|tmp|root|home)/|(py)pi\.org|(python)hosted|(download)\.pytorch")
TEXT = {".py", ".toml", ".txt", ".md", ".yaml", ".yml", ".json", ".html", ".j2", ".jinja", ".css", ".js", ".sh", ""}


def test_nothing_runs_foreign_code() -> None:
    breaches = []
    for module, tree in modules().items():
        breaches += [f"{module}:{line} imports {name}" for name, line in imports(tree) if {name, name.split(".")[0]} & UNSAFE_IMPORTS]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in UNSAFE_CALLS:
                    breaches.append(f"{module}:{node.lineno} {ast.unparse(node.func)}()")
                for keyword in node.keywords:
                    if keyword.arg in UNSAFE_KEYWORDS and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                        breaches.append(f"{module}:{node.lineno} {keyword.arg}=")
    assert not breaches, "\n".join(breaches)


def test_no_abstract_base_classes() -> None:
    """A Protocol says what is needed; nothing has to inherit it."""
    breaches = [f"{module}:{line}" for module, tree in modules().items() for name, line in imports(tree) if name in ("abc", "abc.ABC")]
    assert not breaches, "\n".join(breaches)


def test_no_error_is_swallowed() -> None:
    breaches = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or all(isinstance(line, ast.Pass) for line in node.body))
    ]
    assert not breaches, "bare `except:` or `except ...: pass`:\n" + "\n".join(breaches)


def test_no_unfinished_work() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError|NotImplemented)\b")
    breaches = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "trueline").rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if unfinished.search(line)
    ]
    assert not breaches, "\n".join(breaches)


def test_tests_use_no_mocks() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    mocked = [str(path) for path, tree in trees.items() if any("mock" in name for name, _ in imports(tree))]
    assert not mocked, mocked


def test_no_machine_paths_or_registry_hosts() -> None:
    breaches = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in project_files()
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not breaches, "\n".join(breaches)
