"""What stands beside an export's weights: where it came from, the licence of its base, and a chat template that is true.

Left out: claims. The card says what was done and measured, and leaves the rest to its author.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import trueline
from trueline.config.load import load_config
from trueline.config.schema import STAGES, ModelConfig
from trueline.data.conversation import Conversation
from trueline.data.files import file_hash
from trueline.errors import UserError
from trueline.families.chat_template import Template, agrees, template_of, writable
from trueline.families.folder import HUB_ID
from trueline.recipes.assemble import Opened, files_fingerprint
from trueline.train.run import read_status

LICENCES = ("LICENSE*", "LICENCE*", "MODEL_LICENSE*", "NOTICE*", "USE_POLICY*")
CHATGLM_TERMS = "ChatGLM's licence asks for a registration before commercial use, and forbids some uses; see MODEL_LICENSE of the base"
TERMS = {
    "glm": "GLM-4's licence asks that a derived model's name begin with glm-4, that its page say \"Built with glm-4\", and that "
    "commercial use be registered",
    **dict.fromkeys(("chatglm", "chatglm2", "chatglm3"), CHATGLM_TERMS),
}
TERMS["chatglm4"] = TERMS["glm"]


@dataclass(frozen=True)
class Lineage:
    """Where a model came from. `base` is None where there is nothing to compare with, and `reason` says why."""

    stage: str | None = None  # None: no run of ours
    kind: str | None = None  # what was trained: full, lora, ptuning
    base: Path | None = None  # the folder of the weights it was trained from
    name: str = ""  # how the run called them
    reason: str = ""
    config: str = ""
    status: dict[str, Any] = field(default_factory=dict)  # run.json
    data: dict[str, str] = field(default_factory=dict)  # file -> sha256
    metrics: dict[str, Any] = field(default_factory=dict)


def lineage(source: Path) -> Lineage:
    """What the run folder at or around `source` says of itself."""
    run = source.parent if source.name == "model" else source
    if not (run / "run.json").is_file():
        return Lineage(reason="not made by a run of trueline")
    status = read_status(run)
    stage = str(status.get("stage"))
    try:
        config: Any = load_config(STAGES[stage], [run / "config.yaml"])
    except (UserError, KeyError):
        return Lineage(stage, reason=f"{run / 'config.yaml'} cannot be read, so the changes could not be compared with the base")
    base, reason = _base_of(config.model, status.get("parents") or {})
    hashes = {name: file_hash(Path(name)) for name in (*config.data.train, *config.data.eval) if Path(name).is_file()}
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run / "metrics.jsonl").is_file() else []
    last = {line.get("split", "train"): line for line in map(json.loads, lines)}
    text = (run / "config.yaml").read_text(encoding="utf-8")
    return Lineage(stage, config.model.adapter.kind, base, config.model.path, reason, text, status, hashes, last)


def _base_of(model: ModelConfig, parents: dict[str, str]) -> tuple[Path | None, str]:
    """The weights a run started from, if they still are what they were."""
    path = Path(model.path).expanduser()
    if model.init == "random":
        return None, "the run began with random weights"
    if not path.is_dir():
        return None, f"the base {model.path} is not here any more, so the changes could not be compared with it"
    if (path / "adapter_config.json").is_file():
        return None, f"the run began with the adapter {model.path}"
    if files_fingerprint(path) not in parents.values():
        return None, f"the base {model.path} is not what it was when the run began, so the changes could not be compared with it"
    return path, ""


def finish_folder(place: Path, opened: Opened, made: Lineage, prompts: list[Conversation]) -> list[str]:
    """Adds template, licences and card to a written folder; returns what a person should be told."""
    notes = [_settle_template(place, opened, prompts)]
    whole = opened.path == opened.folder.path  # a model, not an adapter on one: what it was trained from is another folder
    base, name = (made.base or opened.folder.path, made.name or opened.name) if whole else (opened.folder.path, opened.name)
    if not (place / "adapter_config.json").is_file():
        notes.append(_settle_code(place, opened))
    copied = [file for pattern in LICENCES for file in sorted(base.glob(pattern)) if file.is_file()]
    for file in copied:
        shutil.copyfile(file, place / file.name)
    if terms := TERMS.get(opened.folder.family.name):
        notes.append(f"note: {terms}")
    named = name if HUB_ID.fullmatch(name) and not Path(name).is_dir() else str(opened.folder.config.get("_name_or_path") or "")
    front = {
        "library_name": "peft" if (place / "adapter_config.json").is_file() else "transformers",
        "base_model": named if HUB_ID.fullmatch(named) else Path(name).name,
    }
    front |= _licence(base, copied, front["base_model"])
    (place / "README.md").write_text(_card(files_fingerprint(base) or "random", made, front, terms), encoding="utf-8")
    return [note for note in notes if note]


def _settle_template(place: Path, opened: Opened, prompts: list[Conversation]) -> str:
    """Keeps the folder's chat template if it gives our prompts, else puts our own in its place, else takes it away."""
    if opened.tokenizer is None:
        return ""
    file, settings = place / "chat_template.jinja", place / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    theirs = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    family, names = opened.folder.family, {name: _text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    known = writable(prompts, family, opened.tokenizer)
    if isinstance(theirs, str) and agrees(Template(theirs), family, opened.tokenizer, names, known):
        return ""
    ours = template_of(family, opened.tokenizer, names, known)
    if "chat_template" in config:
        del config["chat_template"]
        settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file.unlink(missing_ok=True)
    if ours is None:
        fate = f"note: no chat template was written: {family.name}'s prompts cannot be given as one text"
    else:
        file.write_text(ours.text, encoding="utf-8")
        added = " ".join((*ours.before, *ours.after))
        fate = f"note: chat_template.jinja leaves out {added}, which this model's tokenizer adds by itself" if added else ""
    if not theirs:
        return fate
    plain = [prompt for prompt in known if not prompt.tools and not any(message.tool for message in prompt.messages)]
    other = "with tools " if isinstance(theirs, str) and agrees(Template(theirs), family, opened.tokenizer, names, plain) else ""
    done = "was replaced by one that does" if ours else "was left out"
    return f"note: the chat template of {opened.folder.path} does not give the prompts {other}the model was trained with; it {done}"


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _settle_code(place: Path, opened: Opened) -> str:
    """The folder carries no code; a hub's can still be named, for those who choose to run it."""
    named = opened.folder.config.get("auto_map")
    if not isinstance(named, dict) or not named:
        return ""
    hub = next((n for n in (opened.name, str(opened.folder.config.get("_name_or_path", ""))) if HUB_ID.fullmatch(n)), None)
    known = {name: code for name, code in named.items() if isinstance(code, str) and (hub or "--" in code)}
    kept = {name: code if "--" in code else f"{hub}--{code}" for name, code in known.items()}
    if not kept:
        return "note: auto_map was left out: the folder carries no code, and no hub id says where it is"
    config = json.loads((place / "config.json").read_text(encoding="utf-8")) | {"auto_map": kept}
    (place / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return ""


def _licence(base: Path, copied: list[Path], name: str) -> dict[str, Any]:
    """The licence as the hub reads it: the base's own word in its card, where it has one, else what the copied file says."""
    theirs: dict[str, Any] = {}
    if (base / "README.md").is_file():
        parts = (base / "README.md").read_text(encoding="utf-8", errors="replace").split("---\n")
        try:
            read = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
        except yaml.YAMLError:
            read = None
        theirs = read if isinstance(read, dict) else {}
    licence = {name: theirs[name] for name in ("license", "license_name", "license_link") if isinstance(theirs.get(name), str)}
    if not licence and copied:
        apache = "Apache License" in copied[0].read_text(encoding="utf-8", errors="replace")[:400]
        own = {"license": "other", "license_name": f"{name.replace('/', '-')}-licence", "license_link": copied[0].name}
        licence = {"license": "apache-2.0"} if apache else own
    return licence


def _card(fingerprint: str, made: Lineage, front: dict[str, Any], terms: str | None) -> str:
    lines = ["---", yaml.safe_dump(front, allow_unicode=True, sort_keys=False).rstrip(), "---", ""]
    if terms and "Built with glm-4" in terms:
        lines += ["Built with glm-4.", ""]
    lines += [f"Exported by trueline {trueline.__version__}.", "", "| | |", "|---|---|", f"| base | `{front['base_model']}` |"]
    lines.append(f"| base, sha256 of its weight files | `{fingerprint}` |")
    if made.stage:
        lines += [f"| stage | {made.stage} |", f"| trained | {made.kind} |"]
        lines += [f"| {name} | {made.status[name]} |" for name in ("step", "seed") if name in made.status]
        lines += [f"| from | `{Path(path).name}`, {mark} |" for path, mark in (made.status.get("parents") or {}).items()]
        lines += [f"| data | `{Path(name).name}`, sha256 `{digest}` |" for name, digest in made.data.items()]
        for split, line in made.metrics.items():
            shown = ", ".join(f"{k} {v:.4g}" for k, v in line.items() if k in ("loss", "accuracy", "score", "kl") and isinstance(v, float))
            lines.append(f"| last {split} metrics (step {line.get('step')}) | {shown} |")
    if terms:
        lines += ["", f"{terms}."]
    if made.config:
        lines += ["", "## Configuration", "", "```yaml", made.config.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def check_run(made: Lineage, source: Path) -> None:
    """A run that trained nothing that can be exported is refused."""
    if made.stage == "evaluate":
        raise UserError(f"{source} is an evaluation, which makes no model; export the model it measured")
