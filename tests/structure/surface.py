"""What other programs and people's habits rely on, as text: verbs with their options, public Python names, configuration keys."""

import ast

import typer.main

import trueline
from tests.structure.tree import ROOT, modules
from trueline.cli import app
from trueline.config.describe import describe
from trueline.config.schema import STAGES, Config, GenerateConfig

SURFACE = ROOT / "tests" / "structure" / "surface.txt"
PAGE = ROOT / "docs" / "configuration.md"


def surface() -> str:
    parts = {"Verbs": _verbs(), "Python": _names(), "Configuration keys": _keys()}
    return "".join(f"# {title}\n" + "".join(f"{line}\n" for line in lines) + "\n" for title, lines in parts.items())


def _verbs() -> list[str]:
    group = typer.main.get_command(app)
    lines = ["trueline " + " ".join(_parameter(p) for p in group.params)]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        lines.append(" ".join([f"trueline {name}", *(_parameter(p) for p in command.params)]))
    return lines


def _parameter(parameter: object) -> str:
    name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name.upper()  # type: ignore[attr-defined]
    many = "..." if parameter.nargs == -1 else ""  # type: ignore[attr-defined]
    default = parameter.default  # type: ignore[attr-defined]
    shown = f"={default}" if default not in (None, False, "") and isinstance(default, str | int) else ""
    return f"{name}{shown}{many}" if parameter.required else f"[{name}{shown}{many}]"  # type: ignore[attr-defined]


def _names() -> list[str]:
    """`trueline.__all__`, with signatures as trueline/api.py writes them."""
    written = {node.name: node for node in modules().get("trueline.api", ast.Module([], [])).body if isinstance(node, _DEFINITIONS)}
    lines = []
    for name in trueline.__all__:
        node = written.get(name)
        lines.append(f"trueline.{name}" + (f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""))
    for node in written.values():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")]
            lines += [f"{node.name}.{method.name}({ast.unparse(method.args)})" for method in methods]
    return lines


def _keys() -> list[str]:
    """One line for each different key: default, what it accepts, and the commands that have it."""
    commands: dict[str, type[Config]] = {**STAGES, "generate": GenerateConfig}
    users: dict[str, list[str]] = {}
    for command, schema in commands.items():
        for key in describe(schema).values():
            if not key.section:
                default = "required" if key.required else key.default
                users.setdefault(f"{key.name} = {default} | {key.expected}", []).append(command)
    return [f"{line} | {' '.join(names)}" for line, names in users.items()]


_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
