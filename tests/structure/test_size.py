"""Files, functions and class chains stay short enough to be read in one go."""

import ast

from tests.structure.tree import PACKAGE, functions, modules

BANNED_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
FILE_LINES, FUNCTION_LINES, RECIPE_LINES, PRODUCT_LINES = 400, 60, 100, 16_200  # C counts too
LONGER = {"config/schema.py": 480}  # every key in one table, read from top to bottom; cut in two it would say less
RECORD_BASES = {"Config"}  # the config base counts as a library's


def code_lines(tree: ast.Module) -> int:
    """Lines that hold code: no blanks, comments or docstrings. Explaining a thing well must not count against it."""
    held = {line for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr | ast.arg) for line in (node.lineno, node.end_lineno)}
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held - prose)


def lengths() -> dict[str, int]:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.c")]
    return {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}


def test_files_are_short() -> None:
    long = {name: lines for name, lines in lengths().items() if lines >= LONGER.get(name, FILE_LINES)}
    assert not long, f"{FILE_LINES} lines or more: {long}"


def test_product_is_small() -> None:
    total = sum(code_lines(tree) for tree in modules().values())
    total += sum(bool(line.strip()) for path in PACKAGE.rglob("*.c") for line in path.read_text(encoding="utf-8").splitlines())
    longest = sorted(lengths().items(), key=lambda item: -item[1])[:10]
    assert total < PRODUCT_LINES, f"trueline/ has {total} lines of code, expected fewer than {PRODUCT_LINES}; longest: {longest}"


def test_functions_are_short() -> None:
    """A recipe reads top to bottom as one function, so its `run` may be longer."""
    long = []
    for module, tree in modules().items():
        for function in functions(tree):
            limit = RECIPE_LINES if module.startswith("trueline.recipes.") and function.name == "run" else FUNCTION_LINES
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines >= limit:
                long.append(f"{module}:{function.lineno} {function.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_no_drawer_names() -> None:
    drawers = [module for module in modules() if BANNED_NAMES.intersection(module.split("."))]
    assert not drawers, f"say what these hold: {drawers}"


def test_class_chains_are_one_deep() -> None:
    bases: dict[str, list[str]] = {}
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases]

    def depth(name: str) -> int:
        own = [base for base in bases.get(name, []) if base in bases and base not in RECORD_BASES and base != name]
        return max((1 + depth(base) for base in own), default=0)

    deep = {name: depth(name) for name in bases if depth(name) > 1}
    assert not deep, f"more than one of our own classes above: {deep}"


def test_every_module_says_what_it_is() -> None:
    silent = [module for module, tree in modules().items() if tree.body and not ast.get_docstring(tree)]
    assert not silent, f"no docstring: {silent}"
