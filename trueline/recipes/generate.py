"""Answers from a model: a file of prompts, or a conversation in the terminal. The renderer and the engine are those of training.

Left out: a server, streaming of single tokens.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from trueline.config.schema import GenerateConfig, ModelConfig, SamplingConfig
from trueline.data.conversation import Conversation, Message
from trueline.data.files import MINDRECORD, find_files, suffix
from trueline.data.formats import load_prompts
from trueline.data.reader import Problems, Record, read_records
from trueline.data.stream import key
from trueline.errors import UserError
from trueline.model.heads import LanguageModel
from trueline.recipes.assemble import Opened, open_model, speaking
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
    with _written_whole(Path(out)) as file:  # before the work: a place that cannot be written is told at once
        rollouts = answer(language_model, opened, [tokens for _, tokens in given], settings, seeds)
        for (prompt, _), rollout in zip(given, rollouts, strict=True):
            file.write(json.dumps(line_of(prompt, rollout), ensure_ascii=False) + "\n")
    Console(stderr=True).print(f"{len(rollouts)} answers in {escape(out)}")


@contextmanager
def _written_whole(target: Path) -> Iterator[TextIO]:
    """A file that replaces `target` once all is written, and leaves nothing when something goes wrong."""
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; name a file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {target} cannot be written: {error.strerror}; name another place") from error
    try:
        with file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


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
    model: LanguageModel, opened: Opened, prompts: list[list[int]], sampling: SamplingConfig, seeds: list[int], running: int = 64
) -> list[Rollout]:
    """Rollouts with their text (None without a tokenizer)."""
    engine = Engine(model, running=running)
    with engine.hold():
        rollouts = engine.generate(prompts, sampling_of(sampling, opened), seeds)
    if opened.tokenizer is None:
        return rollouts
    return [replace(r, text=opened.tokenizer.decode(r.tokens)) for r in rollouts]


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
