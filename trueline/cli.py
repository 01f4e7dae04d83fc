"""Verbs to recipes: the only place that parses a command line, and the only one that turns an error into a message and an exit code.

Recipes, and torch with them, are imported by the command that needs them, so that `--help` stays fast.
"""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from trueline import __version__
from trueline.errors import Interrupted, RunError, UserError, compiler_failed, disk_full, first_words, out_of_memory

app = typer.Typer(
    help="Align language models: fine-tuning, reward models, PPO and DPO, and everything around them.",
    epilog="Exit codes: 0 done; 1 the run failed; 2 wrong usage, configuration or data; 130, 143 interrupted after saving.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG.yaml|key.path=value",
        help="Configuration files, a later one over an earlier one, then single settings over all of them: optimizer.lr=1e-5",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and what follows from it, then stop.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="How to sample: temperature=0.7 top_p=0.9 max_new_tokens=200", show_default=False),
]
Base = Annotated[
    str | None, typer.Option(metavar="DIR", help="Model under the adapter, when it is not where the adapter says.", show_default=False)
]
Stage = Annotated[
    str | None, typer.Option(metavar="STAGE", help="sft, reward, dpo or ppo, when the configuration's sections do not tell.")
]
AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help="Model or adapter folder, or a hub id.", show_default=False)]


@app.command()
def sft(arguments: Arguments, dry_run: DryRun = False) -> None:
    """Fine-tune on conversations."""
    _stage("sft", arguments, dry_run)


@app.command()
def reward(arguments: Arguments, dry_run: DryRun = False) -> None:
    """Train a reward model on preferences."""
    _stage("reward", arguments, dry_run)


@app.command()
def dpo(arguments: Arguments, dry_run: DryRun = False) -> None:
    """Train on preferences directly."""
    _stage("dpo", arguments, dry_run)


@app.command()
def ppo(arguments: Arguments, dry_run: DryRun = False) -> None:
    """Train on prompts with a reward model or a Python reward."""
    _stage("ppo", arguments, dry_run)


@app.command()
def prepare(
    arguments: Arguments,
    stage: Stage = None,
) -> None:
    """Tokenise a stage's files ahead of training; for dpo with reference.kind: stored, also compute the reference."""
    name = _told(arguments, stage)
    _recipe("ahead").run(name, _configuration(name, arguments))


@app.command()
def plan(
    arguments: Arguments,
    stage: Stage = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="Run the fullest micro-batch for some seconds; without, no time is told.")
    ] = True,
) -> None:
    """Tell the memory, disk and time of a run before it is started."""
    name = _told(arguments, stage)
    _recipe("plan").run(name, _configuration(name, arguments), calibration, json)


@app.command()
def evaluate(arguments: Arguments, dry_run: DryRun = False) -> None:
    """Measure a model on held-out records, and let it answer them."""
    _stage("evaluate", arguments, dry_run)


@app.command()
def generate(
    model: AnyModel,
    prompts: Annotated[str, typer.Option(metavar="FILE.jsonl", help="Prompts, messages or tokens, one object a line.")],
    out: Annotated[str, typer.Option(metavar="FILE.jsonl", help="Where the answers go, one object a line.")],
    settings: Settings = None,
    base: Base = None,
) -> None:
    """Answer a file of prompts."""
    sampling = _sampling(settings)
    _recipe("generate").run(model, prompts, out, sampling, base)


@app.command()
def chat(model: AnyModel, settings: Settings = None, base: Base = None) -> None:
    """Talk with a model in the terminal."""
    sampling = _sampling(settings)
    _recipe("generate").chat(model, sampling, base)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, model folder or adapter folder.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the weights.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the adapter alone.")] = False,
    base: Base = None,
) -> None:
    """Write a folder that other tools load."""
    if merge and adapter:
        raise UserError("--merge and --adapter exclude each other; give one")
    _recipe("export").run(source, out, "merge" if merge else "adapter" if adapter else None, base)


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Data files, folders or patterns.", show_default=False)],
    model: Annotated[str | None, typer.Option(metavar="DIR", help="Also render with this model's template and tokenizer.")] = None,
    show: Annotated[int | None, typer.Option(metavar="N", min=1, help="Show record N: its tokens, and which of them are trained.")] = None,
    format: Annotated[str, typer.Option(metavar="NAME", help="Schema of the files, when it should not be recognised.")] = "auto",
    fix: Annotated[str | None, typer.Option(metavar="OUT", help="Write corrected copies there (a folder or a .jsonl file).")] = None,
    quarantine: Annotated[str | None, typer.Option(metavar="DIR", help="Copy bad records there, and why they are bad.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="With --show: also write the record as a page.")] = None,
    template: Annotated[str, typer.Option(metavar="NAME", help="Another family's template, as model.template names it.")] = "auto",
) -> None:
    """Validate data files."""
    _recipe("check").check(files, model, show, format, fix, quarantine, html, template)


@app.command("import")
def import_configuration(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE|key=value...", help="YAML or JSON files, or a text with the old command line.", show_default=False),
    ],
    out: Annotated[str | None, typer.Option(metavar="CONFIG.yaml", help="Write the new configuration here.")] = None,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="The model, when the old files do not name one we can read.")] = None,
    devices: Annotated[int, typer.Option(metavar="N", min=1, help="Devices the old run used; its batch was per device.")] = 1,
) -> None:
    """Turn another program's configuration into ours."""
    _recipe("legacy").run(files, out, model, devices)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder, .ckpt, folder of rank_N, .mindrecord.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="DST", help="A folder, or a .ckpt, .jsonl or .mindrecord file.", show_default=False)],
    model: Annotated[str | None, typer.Option(metavar="PATH", help="The model's sizes: its folder or MindFormers YAML.")] = None,
    strategy: Annotated[str | None, typer.Option(metavar="PATH", help="MindSpore strategy file, or a folder of them.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(metavar="N", min=1, help="Ranks that share each weight.")] = None,
    data_parallel: Annotated[int | None, typer.Option(metavar="N", min=1, help="Copies of these ranks.")] = None,
    prompt_length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a prompt in MindRecord.")] = 2048,
    length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a whole record in MindRecord.")] = 4096,
    kind: Annotated[str, typer.Option(metavar="STAGE", help="MindRecord columns for MindRLHF's ppo, dpo or reward model.")] = "ppo",
    checkpoint: Annotated[str | None, typer.Option(metavar="PATTERN", help="Which .ckpt of each rank folder (default: newest).")] = None,
    out_strategy: Annotated[str | None, typer.Option(metavar="PATH", help="--strategy of DST, when SRC has one of its own.")] = None,
) -> None:
    """Convert MindSpore checkpoints and data sets to open formats and back."""
    lengths, parallel = (prompt_length, length), (tensor_parallel, data_parallel)
    _recipe("convert").run(source, out, model, strategy, *parallel, lengths, kind, checkpoint, out_strategy)


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for everything the demo writes.")] = "demo",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the data and of every run.")] = 0,
) -> None:
    """Run the whole chain on data it writes itself, and report."""
    _recipe("demo").run(out, seed)


def _version(asked: bool) -> None:
    if asked:
        print(f"trueline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def _recipe(name: str) -> Any:
    return importlib.import_module(f"trueline.recipes.{name}")


def _stage(name: str, arguments: Sequence[str], dry_run: bool) -> None:
    config = _configuration(name, arguments)  # a mistake there is told before anything large is loaded
    _recipe(name).run(config, dry_run)


def _told(arguments: Sequence[str], stage: str | None) -> str:
    from trueline.config.load import told_stage

    name = stage or told_stage(*_split(arguments))
    if name not in ("sft", "reward", "dpo", "ppo"):
        raise UserError(f"--stage {name}: expected sft, reward, dpo or ppo")
    return name


def _configuration(stage: str, arguments: Sequence[str]) -> Any:
    from trueline.config.load import load_config
    from trueline.config.schema import STAGES

    files, settings = _split(arguments)
    return load_config(STAGES[stage], files, settings)


def _sampling(settings: Sequence[str] | None) -> Any:
    from trueline.config.load import load_config
    from trueline.config.schema import GenerateConfig

    files, given = _split(settings or [])
    if files:
        raise UserError(f"{files[0]}: this command reads no configuration file; expected key=value, for example temperature=0.7")
    return load_config(GenerateConfig, [], given)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Configuration files and `key.path=value` settings; all other arguments in one UserError."""
    files, settings, problems = [], [], []
    for argument in arguments:
        if Path(argument).suffix in (".yaml", ".yml") and (Path(argument).exists() or "=" not in argument):
            files.append(argument)
            if not Path(argument).exists():
                problems.append(f"{argument}: no such file" + _suggestion(argument))
        elif re.match(r"[A-Za-z_][\w.]*=", argument):
            settings.append(argument)
        else:
            problems.append(f"{argument}: expected a .yaml file or key.path=value" + _suggestion(argument))
    if problems:
        raise UserError(problems[0]) if len(problems) == 1 else UserError(f"{len(problems)} arguments are not usable:", problems)
    return files, settings


def _suggestion(argument: str) -> str:
    path = Path(argument)
    if (path / "config.yaml").is_file():
        return f" (did you mean {path / 'config.yaml'}?)"
    folder = path.parent
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")) if folder.is_dir() else []
    near = [name for name in names if Path(name).stem == path.name] or get_close_matches(path.name, names, 1)
    if near:
        return f" (did you mean {folder / near[0]}?)"
    if path.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz"):
        return f" (did you mean data.train={argument}?)"
    return f" (did you mean {argument}=VALUE?)" if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", argument) else ""


def main() -> int:
    """The command line; returns or exits with the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Chinese must not end a run
    # read when torch is loaded: micro-batches are of all lengths, and pieces of fixed size leave gaps that none fits
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        for argument in sys.argv[1:]:
            if re.fullmatch(r"--[a-z_]+(\.[a-z_]+)+(=.*)?", argument, re.DOTALL):
                name, _, value = argument[2:].partition("=")
                raise UserError(f"{argument}: settings are written without dashes: {name}={value or 'VALUE'}")
        app(prog_name="trueline")
    except (UserError, RunError, Interrupted) as error:
        return _stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _stop("interrupted", 130)
    except Exception as error:
        return _stop(_sentence(error), 1)
    return 0


def _stop(message: str, code: int) -> int:
    if os.environ.get("TRUELINE_DEBUG") == "1":
        traceback.print_exc()
    print(message, file=sys.stderr)
    return code


def _sentence(error: Exception) -> str:
    """What to say of an error nobody foresaw; it still names the cause and what to do."""
    if isinstance(error, OSError) and disk_full(error):
        return f"the disk is full{f' (writing {error.filename})' if error.filename else ''}; make room and run the same command again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    if out_of_memory(error):
        return "out of memory; lower batch.max_tokens (or rollout.running), set model.recompute=true, or train an adapter"
    first = str(error).strip().partition("\n")[0]
    if compiler_failed(error):
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "its cache")
        remedy = f"a killed run may have left a broken file: delete {kept}, or set model.compile=false"
        return f"model.compile: torch's compiler failed ({first_words(error)}); {remedy}"
    report = "run again with TRUELINE_DEBUG=1 and report it with the traceback"
    return f"internal error: {type(error).__name__}{f': {first}' if first else ''}; this is trueline's mistake: {report}"
