"""The page that goes with an exported model: what it is, what it was made from, and whose licence it is under."""

import json
import shutil
from pathlib import Path
from typing import Any

from trueline import __version__

LICENCES = ("LICENSE*", "LICENCE*", "MODEL_LICENSE*", "NOTICE*", "USE_POLICY*")
RULES = {
    "glm": "GLM-4's licence: a derived model's name begins with glm-4, and what uses it shows \"Built with glm-4\"; commercial use needs a "
    "registration with the authors.",
    "chatglm": "ChatGLM's licence: no military or unlawful use; commercial use needs a registration with the authors.",
}


def licence_rule(family: str) -> str | None:
    """The sentence a person has to know before publishing a model of this family; None for families without one."""
    name = "glm" if family in ("glm", "chatglm4") else "chatglm" if family.startswith("chatglm") else family
    return RULES.get(name)


def copy_licences(base: Path, out: Path) -> list[str]:
    """Copies the base's licence files; returns their names."""
    found = sorted({path for pattern in LICENCES for path in base.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, out / path.name)
    return [path.name for path in found]


def write_card(
    out: Path, name: str, family: str, base: str, kind: str, run: dict[str, Any] | None, proof: dict[str, Any], licences: list[str]
) -> None:
    """README.md of the model `name`, with YAML front matter.

    `run` is run.json of the run that made the model, `proof` what the export gate found.
    """
    front = {"base_model": base, "library_name": "peft" if kind == "adapter" else "transformers", "tags": ["trueline"]}
    if licences:
        front |= {"license": "other", "license_name": licences[0]}
    lines = ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()), "---", "", f"# {name}", ""]
    lines += [f"A {kind} of `{base}` ({family}), written by trueline {__version__}.", ""]
    if run is not None:
        lines += ["## Lineage", "", "| | |", "|---|---|"]
        lines += [f"| stage | {run.get('stage')} |", f"| steps | {run.get('step')} |", f"| seed | {run.get('seed')} |"]
        lines += [f"| from | `{path}` {mark} |" for path, mark in (run.get("parents") or {}).items()]
        lines += [""]
    lines += ["## Proof", "", "Read back in a process of its own before it got its name:", "", "```json"]
    lines += [json.dumps(proof, indent=2, ensure_ascii=False), "```", ""]
    if rule := licence_rule(family):
        lines += ["## Licence", "", rule, ""]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")
