"""Answers from the model being trained, many at once. One rule: schedule, run, collect; a request's answer never depends on the others."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn

from trueline.errors import RunError
from trueline.model.decoder import Decoder, DecoderConfig, Prefix
from trueline.model.heads import LanguageModel, accumulation_dtype
from trueline.model.layout import places_of
from trueline.parallel.memory import free_memory
from trueline.rollout.fused import FusedDecoder, can_fuse
from trueline.rollout.graphs import graphs_for
from trueline.rollout.memory import Decode, Memory, Mixed, Prefill, make_memory
from trueline.rollout.native import Kernels
from trueline.rollout.packed import PAYS, PackedDecoder, can_pack
from trueline.rollout.sampling import Rollout, Sampling, draw, seed_tensor, uniforms

PROMPT_TOKENS = 8192  # prompt tokens in one forward, unless a single prompt is longer: bounds the activations
Answering = Decoder | PackedDecoder | FusedDecoder
COLUMNS = 256  # where steps are recorded, memory is a multiple of these long: prompts of about one length then need the same


class Work:
    """What one `generate` call was asked, what waits, and what is done."""

    def __init__(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, finished: Callable[[int, Rollout], None] | None = None
    ):
        self.prompts, self.seeds, self.sampling, self.finished = prompts, seeds, sampling, finished
        # long prompts first: requests of like length run together, and equal prompts stand side by side
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], i)))
        numbers: dict[tuple[int, ...], int] = {}
        self.kinds = [numbers.setdefault(tuple(p), len(numbers)) for p in prompts]  # equal prompts, equal kinds
        self.answers: dict[int, Rollout] = {}
        self.answered = 0  # tokens of all answers
        self.promised: dict[int, int] = {}  # pages each request was admitted with

    @property
    def longest(self) -> int:
        """Most tokens a request can come to have."""
        return max(len(p) for p in self.prompts) + self.sampling.max_new_tokens

    def expected(self, request: int) -> int:
        """Tokens the request will have: its prompt, and as long an answer as the finished ones on average (at first, the longest)."""
        most = self.sampling.max_new_tokens
        return len(self.prompts[request]) + (-(-self.answered // len(self.answers)) if self.answers else most)

    def admit(self, running: "Running", memory: Memory) -> tuple[dict[int, int], list[int]]:
        """Takes waiting requests for the free rows: those that join a row which holds their prompt (request -> row), those whose is read.

        A prompt is read by one request; the others wait for the next step, their rows kept free. Where memory is in pages, so many are
        admitted as the pages are expected to serve: nobody is refused, he waits.
        """
        holders: dict[int, int | None] = {self.kinds[request]: row for row, request in enumerate(running.requests)}
        joining: dict[int, int] = {}
        reading: list[int] = []
        later: list[int] = []
        room, tokens = running.rows - len(running), 0
        pages = min(memory.total - sum(self.promised[i] for i in running.requests), memory.free - memory.missing(running.lengths))
        while self.waiting and len(joining) + len(reading) + len(later) < room:
            request = self.waiting[0]
            length, kind = len(self.prompts[request]), self.kinds[request]
            price = memory.price(self.expected(request), length - 1 if kind in holders else 0)
            if (price > pages and (len(running) or reading)) or (kind not in holders and reading and tokens + length > PROMPT_TOKENS):
                break
            self.waiting.popleft()
            self.promised[request] = price
            pages -= price
            if kind not in holders:
                holders[kind] = None  # from the next step on
                reading.append(request)
                tokens += length
            elif (row := holders[kind]) is None:
                later.append(request)
            else:
                joining[request] = row
        self.waiting.extendleft(reversed(later))
        return joining, reading


class Running:
    """The requests being answered, in rows 0 .. `len` - 1 without gaps. Tensors lie on the model's device, lists serve the scheduler."""

    def __init__(self, rows: int, max_new_tokens: int, dtype: torch.dtype, device: torch.device, blocks: bool = False):
        self.rows = rows
        self.requests: list[int] = []  # row -> request
        self.starts: list[int] = []  # row -> tokens it has, minus `steps`
        self.begins: list[int] = []  # row -> step of its admission
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
    def lengths(self) -> list[int]:
        """Tokens of each request, the newest included."""
        return [start + self.steps for start in self.starts]

    def add(self, requests: list[int], work: Work) -> None:
        """Appends rows for requests whose prompts are being read, all of them or the last token."""
        if not requests:
            return
        device, rows = self.newest.device, slice(len(self), len(self) + len(requests))
        lengths = [len(work.prompts[i]) for i in requests]
        self.requests += requests
        self.starts += [n - self.steps for n in lengths]
        self.begins += [self.steps] * len(requests)
        self.newest[rows] = torch.tensor([work.prompts[i][-1] for i in requests], device=device)
        self.position[rows] = torch.tensor(lengths, device=device) - 1
        self.made[rows] = 0
        numbers = torch.arange(self.tokens.shape[1], device=device)
        self.chances[rows] = uniforms(seed_tensor([work.seeds[i] for i in requests], device)[:, None], numbers)

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
        memory.remove(gone, movers, gaps, max(self.lengths, default=0))
        if gaps:
            target, source = (torch.tensor(rows, device=self.newest.device) for rows in (gaps, movers))
            states = (self.newest, self.position, self.made, self.chances, self.tokens, self.logprobs)
            for state in states if self.places is None else (*states, self.places):
                state[target] = state[source]
        for listed in (self.requests, self.starts, self.begins):
            for gap, mover in zip(gaps, movers, strict=True):
                listed[gap] = listed[mover]
            del listed[kept:]


class Engine:
    """Answers prompts with `model`, at most `running` at a time. Key/value memory exists inside `hold()` only.

    `budget`: bytes for keys and values, by default half of what is free when they are made. `packed`: whether answers may come from
    copies of weights (on the CPU as `packed.can_pack` says, where they may have `packed.PAYS` tokens; elsewhere as `fused.can_fuse` says).

    with engine.hold():
        rollouts = engine.generate([[5, 6, 7], [8, 9]], Sampling(max_new_tokens=64, stop=frozenset({2})), seeds=[11, 12])
    """

    def __init__(self, model: LanguageModel, running: int = 64, budget: int | None = None, packed: bool = True):
        if model.decoder.head is None:
            raise ValueError("a decoder without a vocabulary head cannot generate")
        if running < 1:
            raise ValueError(f"running must be at least 1, not {running}")
        self.model, self.running, self.budget, self.packed = model, running, budget, packed
        self.decoder: Answering | None = None
        self.state: list[tuple[int, int]] = []
        self.front = 0  # tokens of the learned prefix
        self.memory: Memory | None = None
        self.preempted = 0  # requests that had to begin again, in all
        self.graphs = graphs_for(model.decoder)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Takes the weights as they are now, and makes room for keys and values as needed; all of it is let go at the end of the `with`.

        Packed weights are made when first needed and take as much memory again as the model's; on an accelerator, matrices with LoRA are
        merged then. All others that answer are those that are trained, in the same memory.
        """
        if self.decoder is not None:
            raise RuntimeError("Engine.hold() is already active")
        decoder, role = self.model.decoder, self.model.role
        self.decoder, self.state = decoder, _state(decoder)
        self.front = cast(Prefix, decoder.prefixes[role]).keys.shape[1] if role is not None and role in decoder.prefixes else 0
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

        Raises ValueError for an empty prompt or a token outside the vocabulary, RunError when the model's numbers are not finite or when
        one request's keys and values do not fit in the budget.
        """
        if self.decoder is None:
            raise RuntimeError("Engine.generate() needs memory: call it inside `with engine.hold():`")
        if _state(self.model.decoder) != self.state:
            raise RuntimeError("the weights changed since `with engine.hold():`; hold anew after each update")
        _check(prompts, seeds, self.model.decoder.config.vocab_size)
        if self.packed and self.decoder is self.model.decoder:
            self.decoder = _answering(self.model.decoder, self.model.role, sampling.max_new_tokens)
        work = Work([list(p) for p in prompts], list(seeds), sampling, finished)
        config, weight = self.model.decoder.config, self.model.decoder.embed.weight
        rows = min(self.running, len(prompts))
        running = Running(rows, sampling.max_new_tokens, accumulation_dtype(weight.dtype), weight.device, config.blocks is not None)
        self.memory = None  # before the new is made
        lengths = [len(p) + sampling.max_new_tokens for p in prompts]
        budget = free_memory(weight.device) // 2 if self.budget is None else self.budget
        stored = self.decoder.stored if isinstance(self.decoder, PackedDecoder) else weight.dtype
        self.memory = make_memory(config, stored, weight.device, lengths, rows, budget, self._native() is not None)
        if self.graphs is not None and self.memory.table is None:
            most = -(-max(lengths) // COLUMNS) * COLUMNS
            self.memory.reserve(rows, [most], most)  # at once: a memory that grows moves, and recordings end
        stops = torch.zeros(config.vocab_size, dtype=torch.bool, device=weight.device)
        stops[[s for s in sampling.stop if 0 <= s < len(stops)]] = True
        with _evaluating(self.model):
            while work.waiting or len(running):
                self.preempted += _make_room(work, running, self.memory)
                joining, reading = work.admit(running, self.memory)  # schedule
                logits = self._run(work, running, self.memory, joining, reading)
                _collect(work, running, self.memory, logits, stops)
        return [work.answers[i] for i in range(len(prompts))]

    def _run(self, work: Work, running: Running, memory: Memory, joining: dict[int, int], reading: list[int]) -> Tensor:
        """One forward over the running requests' newest tokens and the admitted prompts -> logits `[rows, V]` of what comes next."""
        decoder, old, admitted = cast(Answering, self.decoder), len(running), [*joining, *reading]
        # who joins reads the prompt's last token again: the first token of the answer follows from its state
        joined = list(range(old, old + len(joining)))
        memory.share(list(joining.values()), joined, [len(work.prompts[i]) - 1 for i in joining])
        running.add(admitted, work)
        contexts, anchors = _place(self.model.decoder.config, running, [work.prompts[i] for i in admitted], len(reading))
        memory.reserve(running.rows, running.lengths, work.longest)

        old += len(joining)
        longest = max(running.lengths[:old], default=0)
        inputs = tuple(x[:old] for x in (running.newest, running.position, running.places) if x is not None)
        if not reading:
            return self._replay(memory, longest, *inputs)
        prompts = [work.prompts[i] for i in reading]
        lengths = [len(p) for p in prompts]
        prefill = Prefill.of(lengths, list(range(old, len(running))), memory, contexts, anchors)
        layout = Mixed.of(self._decoding(memory, longest, *inputs[1:]), prefill) if old else prefill
        read = torch.tensor([t for p in prompts for t in p], device=running.newest.device)
        ends = [old - 1 + end for end in accumulate(lengths)]
        wanted = torch.tensor([*range(old), *ends], device=read.device)
        tokens = torch.cat((running.newest[:old], read))
        if isinstance(decoder, Decoder):
            return _logits(decoder, decoder(tokens, layout, self.model.role)[wanted])
        return _logits(decoder, decoder(tokens, layout, self.model.role, wanted))

    def _replay(self, memory: Memory, longest: int, *inputs: Tensor) -> Tensor:
        """`_decode`, recorded where that can be: what fills up a batch is written to rows of no request; pages all belong to one."""
        if self.graphs is None or memory.table is not None or self.front:
            return self._decode(memory, longest, *inputs)
        places = [place for place, _ in self.state]
        if isinstance(self.decoder, FusedDecoder):
            places += self.decoder.addresses
        key = (type(self.decoder), self.model.role, memory.keys.shape, memory.keys.data_ptr(), memory.values.data_ptr(), *places)
        return self.graphs(partial(self._decode, memory, memory.keys.shape[3]), inputs, memory.keys.shape[1], key)

    def _decode(self, memory: Memory, longest: int, newest: Tensor, position: Tensor, places: Tensor | None = None) -> Tensor:
        """Logits after the running requests' newest tokens; tensors of N rows, `longest` as `Decode.of` has it."""
        decoder = cast(Answering, self.decoder)
        return _logits(decoder, decoder(newest, self._decoding(memory, longest, position, places), self.model.role))

    def _decoding(self, memory: Memory, longest: int, position: Tensor, places: Tensor | None = None) -> Decode:
        windows: set[int | None] = set(self.model.decoder.config.windows) or {None}
        return Decode.of(position, longest, memory, windows, self.front, places, self._native())

    def _native(self) -> Kernels | None:
        return self.decoder.native if isinstance(self.decoder, PackedDecoder) else None


def _answering(decoder: Decoder, role: str | None, tokens: int) -> Answering:
    """What makes answers of so many tokens soonest, `decoder` itself or another form of it."""
    if can_pack(decoder):
        return PackedDecoder(decoder, role) if tokens >= PAYS else decoder
    return FusedDecoder(decoder, role) if can_fuse(decoder, role, tokens) else decoder


def _logits(decoder: Answering, hidden: Tensor) -> Tensor:
    logits: Tensor = cast(nn.Linear, decoder.head)(hidden)
    return logits.to(accumulation_dtype(logits.dtype))


def _make_room(work: Work, running: Running, memory: Memory) -> int:
    """Sends the youngest requests back to wait until the others have pages for their newest token -> how many.

    They begin again later, and come to the same answer: draws are keyed by the request's seed. The oldest is never sent back, so there is
    always one that comes to its end.
    """
    sent = 0
    while memory.missing(running.lengths) > memory.free:
        row = max(range(len(running)), key=lambda i: (running.begins[i], i))
        work.waiting.appendleft(running.requests[row])
        running.remove([row], memory)
        sent += 1
    return sent


def _place(
    config: DecoderConfig, running: Running, prompts: list[list[int]], read: int
) -> tuple[list[int] | None, list[int | None] | None]:
    """Notes context and anchor of the last rows, of these `prompts` -> those of the last `read`; None for a model that has neither."""
    if running.places is None or config.blocks is None:
        return None, None
    found = [config.blocks.place(prompt) for prompt in prompts]
    contexts, anchors = [context for context, _ in found], [anchor for _, anchor in found]
    if found:
        running.places[len(running) - len(found) : len(running)] = places_of(contexts, anchors, running.places.device)
    return contexts[len(found) - read :], anchors[len(found) - read :]


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
        work.answered += made
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
