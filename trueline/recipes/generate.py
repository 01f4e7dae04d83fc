"""Answers from a model: a file of prompts, or a conversation in the terminal. The renderer and the engine are those of training.

Left out: a server, streaming of single tokens.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from trueline.config.schema import GenerateConfig, ModelConfig, SamplingConfig
from trueline.data.conversation import Conversation, Message
from trueline.data.files import MINDRECORD, find_files, suffix
from trueline.data.formats import load_prompts
from trueline.data.reader import Problems, Record, read_records
from trueline.data.stream import key
from trueline.errors import Interrupted, UserError
from trueline.model.heads import LanguageModel
from trueline.recipes.assemble import Opened, open_model, speaking
from trueline.recipes.unfinished import Unfinished
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Rollout, Sampling


def run(model: str, prompts: str, out: str, settings: GenerateConfig, base: str | None = None) -> None:
    """Reads `{"prompt"}`, `{"messages"}` or `{"tokens"}` a line, writes `{"prompt", "response", "tokens", "logprobs", "finish"}` a line."""
    where = ModelConfig(path=model, base=base, tokenizer=settings.tokenizer, template=settings.template)
    opened = open_model(where, settings.seed)
    language_model = language_model_of(opened)
    given = [item for item in read_prompts(prompts, opened) for _ in range(settings.n)]
    seeds = [key(settings.seed, "generate", i) for i in range(len(given))]
    if any(Path(out).exists() and Path(out).samefile(path) for path in find_files([prompts])[0]):
        raise UserError(f"--out {out} is a file of --prompts, which it would replace; name another file")
    console = Console(stderr=True)
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with Unfinished(Path(out), _work(opened, given, settings)) as unfinished, shown as progress:
        left = [i for i in range(len(given)) if i not in unfinished.lines]
        if len(left) < len(given):
            console.print(f"going on after {len(given) - len(left)} of {len(given)} answers")
        bar = progress.add_task("answers", total=len(given), completed=len(given) - len(left))

        def ended(number: int, rollout: Rollout) -> None:
            unfinished.add(left[number], line_of(given[left[number]][0], rollout))
            progress.advance(bar)

        try:
            answer(language_model, opened, [given[i][1] for i in left], settings, [seeds[i] for i in left], finished=ended)
        except KeyboardInterrupt as error:
            done = f"stopped after {len(unfinished.lines)} of {len(given)} answers"
            raise Interrupted(done + "; the same command goes on from there" * bool(unfinished.lines)) from error
        unfinished.finish()
    console.print(f"{len(given)} answers in {escape(out)}")


def _work(opened: Opened, given: list[tuple[Any, list[int]]], settings: GenerateConfig) -> str:
    """A name for all that the answers depend on: weights (by their files' sizes and times), prompts, stop tokens and settings."""
    files = sorted(file for folder in {opened.path, opened.folder.path} for file in folder.glob("*.safetensors"))
    weights = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = [weights, opened.drawn, given, sorted(opened.stop), settings.model_dump()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_prompts(path: str, opened: Opened) -> list[tuple[Any, list[int]]]:
    """Each line's prompt as it was given, and its tokens."""
    tokenizer = opened.text() if suffix(path) == MINDRECORD else None
    records = list(read_records([path], tokenizer=tokenizer))
    if any("tokens" in record.value for record in records):
        return _token_lists(records, opened.folder.decoder_config.vocab_size)
    found = load_prompts([path], tokenizer=tokenizer)
    if not found:
        raise UserError(f"{path} holds no prompts; expected a line like " + '{"prompt": "..."}')
    render, tokenizer = opened.folder.family.render, opened.text()
    return [(_shown(item.value.record), render(item.value.conversation, tokenizer, open=True).tokens) for item in found]


def _shown(record: dict[str, Any]) -> Any:
    return next((record[name] for name in ("prompt", "messages") if name in record), record)


def _token_lists(records: list[Record], vocabulary: int) -> list[tuple[Any, list[int]]]:
    problems = Problems()
    found: list[tuple[Any, list[int]]] = []
    for record in records:
        tokens = record.value.get("tokens")
        if isinstance(tokens, list) and tokens and all(type(t) is int and 0 <= t < vocabulary for t in tokens):
            found.append((tokens, tokens))
        else:
            problems.add(record.where(), f"not a list of token ids, expected integers from 0 to {vocabulary - 1}, at least one", "tokens")
    problems.stop()
    return found


def line_of(prompt: Any, rollout: Rollout) -> dict[str, Any]:
    """One line of a generation or samples file."""
    return {
        "prompt": prompt,
        "response": rollout.text,
        "tokens": rollout.tokens,
        "logprobs": rollout.logprobs,
        "finish": rollout.finish,
    }


def answer(
    model: LanguageModel,
    opened: Opened,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    seeds: list[int],
    running: int = 64,
    finished: Callable[[int, Rollout], None] | None = None,
) -> list[Rollout]:
    """Rollouts with their text (None without a tokenizer); `finished` is told each with its number as soon as it has ended."""
    found: dict[int, Rollout] = {}

    def ended(number: int, rollout: Rollout) -> None:
        found[number] = replace(rollout, text=opened.tokenizer.decode(rollout.tokens)) if opened.tokenizer else rollout
        if finished is not None:
            finished(number, found[number])

    engine = Engine(model, running=running)
    with engine.hold():
        engine.generate(prompts, sampling_of(sampling, opened), seeds, ended)
    return [found[i] for i in range(len(prompts))]


def sampling_of(config: SamplingConfig, opened: Opened) -> Sampling:
    """The engine's settings, with the stop tokens of this model."""
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, opened.stop)


def language_model_of(opened: Opened) -> LanguageModel:
    """The opened model as it speaks: with the adapter it came with."""
    return LanguageModel(speaking(opened).decoder, opened.role).requires_grad_(False).eval()


def chat(model: str, settings: GenerateConfig, base: str | None = None) -> None:
    """A conversation in the terminal: an empty line or end of input ends it, /new begins another."""
    where = ModelConfig(path=model, base=base, tokenizer=settings.tokenizer, template=settings.template)
    opened = open_model(where, settings.seed)
    language_model, console = language_model_of(opened), Console()
    tokens = opened.text()
    messages: list[Message] = []
    turn = 0
    console.print("An empty line ends the conversation, /new begins another.", style="dim")
    while True:
        try:
            said = console.input("[bold]you>[/bold] ")
        except EOFError:
            return
        if not said.strip():
            return
        if said.strip() == "/new":
            messages = []
            continue
        messages.append(Message("user", said))
        prompt = opened.folder.family.render(Conversation(tuple(messages)), tokens, open=True).tokens
        rollout = answer(language_model, opened, [prompt], settings, [key(settings.seed, "chat", turn)])[0]
        turn += 1
        said_back = (rollout.text or "").strip()
        console.print("[bold]model>[/bold] " + escape(printable(said_back)))
        messages.append(Message("assistant", said_back or " "))


def printable(text: str) -> str:
    """Without control characters, with which a model could steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
