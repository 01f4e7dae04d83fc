"""Answers from the model being trained, many at once. One rule: schedule, run, collect; a request's answer never depends on the others."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn

from trueline.errors import RunError
from trueline.model.decoder import Decoder, Prefix
from trueline.model.heads import LanguageModel, accumulation_dtype
from trueline.model.layout import places_of
from trueline.rollout.memory import Decode, Memory, Mixed, Prefill
from trueline.rollout.packed import PackedDecoder, can_pack
from trueline.rollout.sampling import Rollout, Sampling, draw, seed_tensor, uniforms

PROMPT_TOKENS = 8192  # prompt tokens in one forward, unless a single prompt is longer: bounds the activations


@dataclass
class Work:
    """What one `generate` call was asked, what waits, and what is done."""

    prompts: list[list[int]]
    seeds: list[int]
    sampling: Sampling
    finished: Callable[[int, Rollout], None] | None = None
    waiting: deque[int] = field(init=False)
    answers: dict[int, Rollout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # long prompts first: requests of like length run together, and equal prompts stand side by side
        self.waiting = deque(sorted(range(len(self.prompts)), key=lambda i: (-len(self.prompts[i]), self.prompts[i], i)))

    @property
    def longest(self) -> int:
        """Most tokens a request can come to have."""
        return max(len(p) for p in self.prompts) + self.sampling.max_new_tokens

    def admit(self, room: int) -> list[list[int]]:
        """Takes up to `room` waiting requests, those with equal prompts in one group."""
        groups: list[list[int]] = []
        tokens = 0
        while self.waiting and room:
            prompt = self.prompts[self.waiting[0]]
            tokens += len(prompt)
            if groups and tokens > PROMPT_TOKENS:
                break
            groups.append([])
            while self.waiting and room and self.prompts[self.waiting[0]] == prompt:
                groups[-1].append(self.waiting.popleft())
                room -= 1
        return groups


class Running:
    """The requests being answered, in rows 0 .. `len` - 1 without gaps. Tensors lie on the model's device, lists serve the scheduler."""

    def __init__(self, rows: int, max_new_tokens: int, dtype: torch.dtype, device: torch.device, blocks: bool = False):
        self.rows = rows
        self.requests: list[int] = []  # row -> request
        self.starts: list[int] = []  # row -> tokens it has, minus `steps`
        self.steps = 0
        self.newest = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.newest)  # of the newest token
        self.made = torch.zeros_like(self.newest)
        self.chances = torch.zeros(rows, max_new_tokens, dtype=torch.float64, device=device)  # the draw of each token
        self.tokens = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, max_new_tokens, dtype=dtype, device=device)
        self.places = torch.zeros(rows, 2, dtype=torch.int64, device=device) if blocks else None  # where answers start, what they fill

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, the newest included."""
        return max(self.starts, default=0) + self.steps

    def add(self, requests: list[int], prompt_lengths: list[int], seeds: list[int]) -> None:
        """Appends rows for requests whose prompts are being read."""
        device, rows = self.newest.device, slice(len(self), len(self) + len(requests))
        self.requests += requests
        self.starts += [n - self.steps for n in prompt_lengths]
        self.position[rows] = torch.tensor(prompt_lengths, device=device) - 1
        self.made[rows] = 0
        numbers = torch.arange(self.tokens.shape[1], device=device)
        self.chances[rows] = uniforms(seed_tensor(seeds, device)[:, None], numbers)

    def extend(self, tokens: Tensor, logprobs: Tensor) -> None:
        """Every request gets its next token."""
        n = len(self)
        rows, made = torch.arange(n, device=tokens.device), self.made[:n]
        self.tokens[rows, made] = tokens
        self.logprobs[rows, made] = logprobs
        self.newest[:n] = tokens
        self.position[:n] += 1
        self.made[:n] += 1
        self.steps += 1

    def remove(self, gone: list[int], memory: Memory) -> None:
        """Drops rows `gone`; the last rows move into the gaps, so that decoding reads one view."""
        kept = len(self) - len(gone)
        gaps = [row for row in gone if row < kept]
        dropped = set(gone)
        movers = [row for row in range(kept, len(self)) if row not in dropped]
        if gaps:
            target, source = (torch.tensor(rows, device=self.newest.device) for rows in (gaps, movers))
            memory.copy(source, target, self.longest)
            states = (self.newest, self.position, self.made, self.chances, self.tokens, self.logprobs)
            for state in states if self.places is None else (*states, self.places):
                state[target] = state[source]
        for listed in (self.requests, self.starts):
            for gap, mover in zip(gaps, movers, strict=True):
                listed[gap] = listed[mover]
            del listed[kept:]


class Engine:
    """Answers prompts with `model`, at most `running` at a time. Key/value memory exists inside `hold()` only.

    >>> with engine.hold():
    ...     rollouts = engine.generate([[5, 6, 7], [8, 9]], Sampling(max_new_tokens=64, stop=frozenset({2})), seeds=[11, 12])
    """

    def __init__(self, model: LanguageModel, running: int = 64):
        if model.decoder.head is None:
            raise ValueError("a decoder without a vocabulary head cannot generate")
        if running < 1:
            raise ValueError(f"running must be at least 1, not {running}")
        self.model, self.running = model, running
        self.decoder: Decoder | PackedDecoder | None = None
        self.state: list[tuple[int, int]] = []
        self.memory: Memory | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Takes the weights as they are now, and makes room for keys and values as needed; all of it is let go at the end of the `with`.

        In float32 on the CPU the weights are packed: as much memory again as the model's, for the length of the `with`.
        """
        if self.memory is not None:
            raise RuntimeError("Engine.hold() is already active")
        decoder, role = self.model.decoder, self.model.role
        weight = decoder.embed.weight
        front = cast(Prefix, decoder.prefixes[role]).keys.shape[1] if role is not None and role in decoder.prefixes else 0
        self.memory = Memory(decoder.config, weight.dtype, weight.device, front)
        self.decoder = PackedDecoder(decoder, role) if can_pack(decoder) else decoder
        self.state = _state(decoder)
        try:
            yield
        finally:
            self.memory = self.decoder = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """One answer per prompt, in the prompts' order. Request i's draws are keyed by `seeds[i]` alone; equal prompts are read once.

        `finished` is told each request's number and answer as soon as it has ended, while others go on.

        Raises ValueError for an empty prompt or a token outside the vocabulary, RunError when the model's numbers are not finite.
        """
        if self.memory is None or self.decoder is None:
            raise RuntimeError("Engine.generate() needs memory: call it inside `with engine.hold():`")
        if _state(self.model.decoder) != self.state:
            raise RuntimeError("the weights changed since `with engine.hold():`; hold anew after each update")
        _check(prompts, seeds, self.model.decoder.config.vocab_size)
        work = Work([list(p) for p in prompts], list(seeds), sampling, finished)
        weight = self.model.decoder.embed.weight
        rows, blocks = min(self.running, len(prompts)), self.model.decoder.config.blocks is not None
        running = Running(rows, sampling.max_new_tokens, accumulation_dtype(weight.dtype), weight.device, blocks)
        stops = torch.zeros(self.model.decoder.config.vocab_size, dtype=torch.bool, device=weight.device)
        stops[[s for s in sampling.stop if 0 <= s < len(stops)]] = True
        with _evaluating(self.model):
            while work.waiting or len(running):
                admitted = work.admit(running.rows - len(running))  # schedule
                logits = _run(work, running, self.decoder, self.model.role, self.memory, admitted)
                _collect(work, running, self.memory, logits, stops)
        return [work.answers[i] for i in range(len(prompts))]


def _run(
    work: Work, running: Running, decoder: Decoder | PackedDecoder, role: str | None, memory: Memory, groups: list[list[int]]
) -> Tensor:
    """One forward over the running requests' newest tokens and the admitted prompts -> logits `[rows, V]` of what comes next."""
    old, longest = len(running), running.longest
    prompts = [work.prompts[group[0]] for group in groups]
    if admitted := [i for group in groups for i in group]:
        running.add(admitted, [len(work.prompts[i]) for i in admitted], [work.seeds[i] for i in admitted])
    memory.reserve(running.rows, running.longest, work.longest)
    contexts, anchors = _place(decoder, running, old, groups, prompts)

    places = None if running.places is None else running.places[:old]
    if not groups:
        hidden = decoder(running.newest[:old], Decode.of(running.position[:old], longest, memory, places), role)
    else:
        leaders = list(accumulate((len(group) for group in groups), initial=old))[:-1]
        prefill = Prefill.of([len(p) for p in prompts], leaders, memory, contexts, anchors)
        layout = Mixed.of(Decode.of(running.position[:old], longest, memory, places), prefill) if old else prefill
        read = torch.tensor([t for p in prompts for t in p], device=running.newest.device)
        hidden = decoder(torch.cat((running.newest[:old], read)), layout, role)
        hidden = hidden[_share(groups, prompts, leaders, old, memory)]
    logits: Tensor = cast(nn.Linear, decoder.head)(hidden)
    return logits.to(accumulation_dtype(logits.dtype))


def _place(
    decoder: Decoder | PackedDecoder, running: Running, old: int, groups: list[list[int]], prompts: list[list[int]]
) -> tuple[list[int] | None, list[int | None] | None]:
    """Context and anchor of each admitted prompt, noted for its rows too; None for a model that has neither."""
    if running.places is None or decoder.config.blocks is None:
        return None, None
    found = [decoder.config.blocks.place(prompt) for prompt in prompts]
    contexts, anchors = [context for context, _ in found], [anchor for _, anchor in found]
    if groups:
        sizes = torch.tensor([len(group) for group in groups], device=running.places.device)
        running.places[old : len(running)] = places_of(contexts, anchors, sizes.device).repeat_interleave(sizes, dim=0)
    return contexts, anchors


def _share(groups: list[list[int]], prompts: list[list[int]], leaders: list[int], old: int, memory: Memory) -> Tensor:
    """Gives each group's leading row's keys and values to the rest of the group -> for each row, where its state lies in the forward."""
    states = list(range(old))
    end = old - 1
    source: list[int] = []
    target: list[int] = []
    for group, prompt, leader in zip(groups, prompts, leaders, strict=True):
        end += len(prompt)
        states += [end] * len(group)
        source += [leader] * (len(group) - 1)
        target += range(leader + 1, leader + len(group))
    device = memory.keys.device
    if target:
        memory.copy(torch.tensor(source, device=device), torch.tensor(target, device=device), max(len(p) for p in prompts))
    return torch.tensor(states, device=device)


def _collect(work: Work, running: Running, memory: Memory, logits: Tensor, stops: Tensor) -> None:
    """Draws every request's next token, and lets the finished requests go."""
    n, sampling = len(running), work.sampling
    tokens, logprobs = draw(logits, running.chances[:n].gather(1, running.made[:n, None])[:, 0], sampling)
    running.extend(tokens, logprobs)
    finished = stops[tokens] | (running.made[:n] == sampling.max_new_tokens)
    gone: list[int] = finished.nonzero()[:, 0].tolist()  # the one question to the device in a step
    if not gone:
        return
    for row, made in zip(gone, running.made[gone].tolist(), strict=True):
        request = running.requests[row]
        answer, chosen = running.tokens[row, :made].tolist(), running.logprobs[row, :made]
        if not chosen.isfinite().all():
            raise RunError(f"the model's logits are not finite for prompt {request}: its weights have diverged or were damaged")
        finish: Literal["stop", "length"] = "stop" if answer[-1] in sampling.stop else "length"
        work.answers[request] = Rollout(work.prompts[request], answer, chosen.tolist(), finish)
        if work.finished is not None:
            work.finished(request, work.answers[request])
    running.remove(gone, memory)


def _check(prompts: Sequence[Sequence[int]], seeds: Sequence[int], vocab_size: int) -> None:
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; a prompt has at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of {vocab_size}: {min(prompt)} to {max(prompt)}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _state(decoder: Decoder) -> list[tuple[int, int]]:
    """Differs once a parameter was written to or replaced."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in decoder.parameters()]
