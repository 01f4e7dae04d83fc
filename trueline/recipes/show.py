"""One record as the model will see it, token by token with the trained ones marked, beside the prompt of generation: in text or HTML."""

import html
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from trueline.data.conversation import ROLES, Conversation, Message, Preference, Prompt
from trueline.data.formats import Located
from trueline.data.lint import Value, parts
from trueline.data.sample import Sample
from trueline.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from trueline.families.family import Family
from trueline.families.folder import open_folder, resolve
from trueline.families.peft import adapter_base, adapter_template, is_adapter
from trueline.families.transcript import training_samples

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "observation": "yellow"}
STYLE = """body{font:15px/1.6 sans-serif;margin:2em;background:#fff;color:#222}main{display:grid;grid-template-columns:1fr 1fr;gap:1.5em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;border-radius:6px;padding:1em;margin:0}
.system{color:#8b1a89}.user{color:#06607a}.assistant{color:#17692b}.observation{color:#7a5a00}.mark{color:#b00020;font-weight:bold}
.odd{background:#f2f2f2}u{text-decoration-thickness:2px;text-underline-offset:3px}"""


@dataclass(frozen=True)
class Renderer:
    """How a model writes conversations down."""

    family: Family
    tokenizer: Tokenizer

    def samples(self, value: Value) -> list[tuple[str, Sample]]:
        """A value as training sees it: its parts with their names."""
        if isinstance(value, Conversation):
            name = "answer" if self.family.answers_apart else "conversation"
            return [(name, sample) for sample in training_samples(self.family, value, self.tokenizer)]
        if isinstance(value, Prompt):
            return [("prompt", self.family.render(value.conversation, self.tokenizer, open=True))]
        whole = {name: replace(value.prompt, messages=(*value.prompt.messages, getattr(value, name))) for name in ("chosen", "rejected")}
        return [(name, self.family.render(conversation, self.tokenizer, last_only=True)) for name, conversation in whole.items()]

    def serving(self, value: Value) -> Sample:
        """The prompt of the last answer as generation sees it."""
        return self.family.render(parts(value)[0], self.tokenizer, open=True)


def open_renderer(model: str, template: str = "auto") -> Renderer:
    """The template (or the one of that name) and tokenizer of a model or adapter folder."""
    path = resolve(model)
    base = resolve(adapter_base(path)[0]) if is_adapter(path) else path
    if is_adapter(path) and template == "auto":
        template = adapter_template(path)
    return Renderer(open_folder(base, template).family, load_tokenizer(path if has_tokenizer(path) else base))


def print_record(console: Console, located: Located[Value], renderer: Renderer | None) -> None:
    """The record's turns; with a renderer its tokens, and below them the prompt of generation."""
    value = located.value
    if renderer is None:
        for label, message in _labelled(value):
            console.print(Text.assemble((f"{label}: ", f"bold {COLOURS[message.role]}"), visible(message.content)), soft_wrap=True)
        return
    plain = console.color_system is None
    for name, sample in renderer.samples(value):
        heading = f"{name}: {len(sample)} tokens, {sum(sample.trained)} of them trained ({'in ⟦ ⟧' if plain else 'underlined'})"
        console.print(Text(heading, "bold"), soft_wrap=True)
        console.print(coloured(sample, renderer.tokenizer, plain), soft_wrap=True)
    if not isinstance(value, Prompt):
        serving = renderer.serving(value)
        console.print(Text(f"when serving: {len(serving)} tokens", "bold"))
        console.print(coloured(serving, renderer.tokenizer, plain), soft_wrap=True)


def write_page(path: str, title: str, located: Located[Value], renderer: Renderer | None) -> None:
    """The same as one HTML page without scripts, training and serving side by side. All text is escaped."""
    panes = []
    if renderer is None:
        turns = [(m.role, html.escape(label), _escaped(m.content)) for label, m in _labelled(located.value)]
        panes.append(("record", "\n".join(f'<span class="{role}"><b>{label}: </b>{text}</span>' for role, label, text in turns)))
    else:
        for name, sample in renderer.samples(located.value):
            heading = f"{name}: {len(sample)} tokens, {sum(sample.trained)} of them trained (underlined)"
            panes.append((heading, _marked_up(sample, renderer.tokenizer)))
        if not isinstance(located.value, Prompt):
            serving = renderer.serving(located.value)
            panes.append((f"when serving: {len(serving)} tokens", _marked_up(serving, renderer.tokenizer)))
    body = "".join(f"<section><h2>{html.escape(heading)}</h2><pre>{text}</pre></section>" for heading, text in panes)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{html.escape(visible(title))}</h1><main>{body}</main></html>\n"
    )
    beside = Path(f"{path}.part")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)


def _labelled(value: Value) -> list[tuple[str, Message]]:
    prompt, answers = parts(value)
    labelled = [(f"{m.role} calls {m.tool}" if m.tool else str(m.role), m) for m in prompt.messages + answers]
    if isinstance(value, Preference):
        labelled[-2:] = [("chosen", value.chosen), ("rejected", value.rejected)]
    return labelled


def _marked_up(sample: Sample, tokenizer: Tokenizer) -> str:
    spans = []
    for i, (text, trained, role, control) in enumerate(_spans(sample, tokenizer)):
        classes = " ".join(name for name in (role, "mark" * control, "odd" * (i % 2)) if name)
        inner = f"<u>{_escaped(text)}</u>" if trained else _escaped(text)
        spans.append(f'<span class="{classes}">{inner}</span>')
    return "".join(spans)


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def coloured(sample: Sample, tokenizer: Tokenizer, plain: bool) -> Text:
    """Tokens in their role's colour, every second one dim so that their borders show; trained ones underlined, or `plain`, in ⟦ ⟧."""
    text, inside = Text(), False
    for i, (piece, trained, role, control) in enumerate(_spans(sample, tokenizer)):
        if plain and trained != inside:
            text.append("⟦" if trained else "⟧")
            inside = trained
        colour = "bold red" if control else COLOURS.get(role, "default")
        text.append(visible(piece), colour + " dim" * (i % 2) + " underline" * trained)
    return text.append("⟧") if inside else text


def _spans(sample: Sample, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, str, bool]]:
    """`(text, trained, role, whether it is a control token)` token by token."""
    names = {i: name for name, i in tokenizer.specials.items()}
    starts = [i for i, token in enumerate(sample.tokens) if i == 0 or token in names]
    for start, end in zip(starts, [*starts[1:], len(sample)], strict=True):
        ids, trained = sample.tokens[start:end], sample.trained[start:end]
        name = names.get(ids[0], "")
        opening = tokenizer.decode(ids)
        role = next((r for r in ROLES if r in name or opening.startswith(r)), "")  # <|user|>, or <|im_start|> and then user
        if name:
            yield name, trained[0], "", True
        for piece, on in _pieces(ids, trained, tokenizer):
            yield piece, on, role, False


def _pieces(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """`(text, trained)` token by token; several together where only together they are whole characters."""
    last, start = 0, 0  # where the last piece and this one begin: how a token reads may depend on the one before
    for i, on in enumerate(trained):
        before, whole = tokenizer.decode(ids[last:start]), tokenizer.decode(ids[last : i + 1])
        halved = whole.endswith("\ufffd") and trained[i + 1 : i + 2] == [on]
        if len(whole) > len(before) and not halved:
            yield whole[len(before) :], on
            last, start = start, i + 1


def visible(text: str) -> str:
    """Text that cannot command the terminal: control characters and direction marks by their number, all but line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t\u3000\u00a0" else f"\\x{ord(c):02x}" for c in text)
