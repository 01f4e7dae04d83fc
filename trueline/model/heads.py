"""What the stages ask of a decoder: log-probabilities of tokens, or one score per token. The one-token shift is written here, twice."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trueline.model.batch import Batch
from trueline.model.decoder import Decoder

CHUNK = 2048  # rows of logits alive at once on an accelerator; with fewer the matrix products slow down
CPU_CHUNK = 256  # float32 rows on a CPU, twice as many 16-bit ones: more gain nothing there, and 2,048 rows of 151,936 are 1.2 GB
# bytes of logits for which a CPU takes more rows: of 16 bits, since each chunk's part of the head's gradient is made and added by itself,
# and of those that are kept
MANY = 2**25
NARROW = 128  # rows for heads no wider than this, whose products need no more
LAUNCHED = 2**26  # numbers of a 16-bit product that are added at once on an accelerator, and logits that are worked on
CACHED = 2**20  # the same on a CPU: they stay in its caches; waking its threads costs little


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every dtype but float64: log-probabilities, scores and losses are never 16-bit."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Loss = Callable[[Tensor, Tensor], Tensor]  # log p of some tokens, and their places in the batch, to a loss of each, all `[n]`


def likelihood(logprobs: Tensor, at: object) -> Tensor:
    """The `Loss` that is log p itself."""
    return logprobs


class LinearLogProbability(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] for each row, never holding `[rows, vocabulary]`.

    Backward makes each chunk's logits again, but for the last one's, which lie there still. With a frozen head none are made again:
    d log p / d hidden is made in the forward pass, kept in place of `hidden`, and backward scales its rows.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        sums = _Gradients(hidden, weight, True, False) if for_hidden and not for_weight else None
        kept, picked = None, []
        for at, rows, chunk, wanted in _chunks(_rows_kept(weight) if for_weight else chunk_rows(weight), hidden, weight, target):
            if for_hidden and for_weight and at + len(rows) == len(hidden):
                kept = chunk
            picked.append(_read(chunk, wanted, temperature, None if sums is None and kept is None else _ones))
            if sums is not None:
                sums.add(at, rows, chunk)
        ctx.save_for_backward(*((hidden, weight, target) if sums is None else sums.whole()[:1]))
        ctx.kept, ctx.temperature = kept, temperature  # type: ignore[attr-defined]
        return torch.cat(picked)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        first, *others = ctx.saved_tensors  # type: ignore[attr-defined]
        if not others:
            return (first * grad[:, None]).to(first.dtype), None, None, None
        hidden, (weight, target) = first, others
        sums = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])  # type: ignore[attr-defined]
        kept, ctx.kept = ctx.kept, None  # type: ignore[attr-defined]
        left = len(hidden) - (0 if kept is None else len(kept))
        if kept is not None:
            for logits, slope in _blocks(kept, grad[left:]):
                logits.copy_(_wide(logits).mul_(slope[:, None]))
            sums.add(left, hidden[left:], kept)
            del logits
        del kept  # before others are made
        again = _chunks(_rows_kept(weight), hidden[:left], weight, target[:left], grad[:left]) if left else ()
        for at, rows, change, wanted, slope in again:
            _read(change, wanted, ctx.temperature, partial(_part, slope))  # type: ignore[attr-defined]
            sums.add(at, rows, change)
            del rows, change  # the logits' memory: what follows may need it
        return *sums.whole(), None, None


class LinearLoss(torch.autograd.Function):
    """The sum over all rows of a loss of their `LinearLogProbability` alone, and that.

    The loss's slopes are then known before the backward pass, so both gradients are made in the forward pass from the same logits, which
    need not be made twice; the backward pass scales them (as arXiv:2410.10989 does for cross entropy). `loss` gets its rows as a slice.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, loss: Callable[[Tensor, slice], Tensor]
    ) -> tuple[Tensor, Tensor]:
        summed = hidden.new_zeros((), dtype=accumulation_dtype(hidden.dtype))
        picked: list[Tensor] = []

        def slopes(at: int, found: Tensor, done: int) -> Tensor:
            logprobs = found.detach().requires_grad_()
            with torch.enable_grad():
                value = loss(logprobs, slice(at + done, at + done + len(found))).sum()
            summed.add_(value.detach())
            return torch.autograd.grad(value, logprobs)[0]

        sums = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])  # type: ignore[attr-defined]
        for at, rows, change, wanted in _chunks(chunk_rows(weight), hidden, weight, target):
            picked.append(_read(change, wanted, temperature, partial(slopes, at)))
            sums.add(at, rows, change)
        ctx.sums = sums  # type: ignore[attr-defined]
        logprobs = torch.cat(picked)
        ctx.mark_non_differentiable(logprobs)
        return summed, logprobs

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        sums: _Gradients = ctx.sums  # type: ignore[attr-defined]
        return *sums.whole(grad), None, None, None


class _Gradients:
    """What chunks of changed logits `[rows, V]` add up to, for the hidden states and for the head's weight where they are wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool):
        self.source = weight if for_hidden else None
        self.hidden = torch.empty_like(hidden) if for_hidden else None
        # float32 even for a bfloat16 head: chunk sums in 16 bits would bias the gradient
        self.weight = torch.empty_like(weight, dtype=accumulation_dtype(weight.dtype)) if for_weight else None
        self.dtype, self.first, self.used = weight.dtype, True, False

    def add(self, at: int, rows: Tensor, change: Tensor) -> None:
        """A chunk whose first row is number `at`."""
        if self.hidden is not None and self.source is not None:
            torch.mm(change, self.source, out=self.hidden[at : at + len(rows)])
        if self.weight is not None and self.weight.dtype == change.dtype:
            self.weight.addmm_(change.T, rows, beta=0 if self.first else 1)  # with 0, what the memory held does not count
        elif self.weight is not None:
            size = max(1, (CACHED if change.device.type == "cpu" else LAUNCHED) // rows.shape[1])
            for whole, part in zip(self.weight.split(size), change.split(size, 1), strict=True):  # so that no 16-bit sum is as large
                product = part.T @ rows
                whole.copy_(product) if self.first else whole.add_(product)
        self.first = False

    def whole(self, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients in their tensors' dtypes, times `scale`; they are given away, so once only."""
        if self.used:
            raise RuntimeError("these gradients were used already: no second backward pass through them")
        hidden, weight, self.hidden, self.weight, self.source, self.used = self.hidden, self.weight, None, None, None, True
        if scale is not None:
            hidden, weight = (None if x is None else x.mul_(scale) for x in (hidden, weight))
        return hidden, None if weight is None else weight.to(self.dtype)


def _read(chunk: Tensor, target: Tensor, temperature: float, slopes: Callable[[Tensor, int], Tensor] | None) -> Tensor:
    """log p of the targets in a chunk's logits, whose memory is used up.

    With `slopes`, from log p of some rows and the number of rows before them to a factor for each, the memory then holds
    d log p / d logits times those.
    """
    found: list[Tensor] = []
    for logits, targets in _blocks(chunk, target):
        wide = _wide(logits)
        at, top, total = _exponentials(wide, targets, temperature)
        found.append(at - (total.log() + top))
        if slopes is not None:
            slope = slopes(found[-1], sum(map(len, found[:-1]))) / temperature
            wide.mul_((-slope / total)[:, None]).scatter_add_(-1, targets[:, None], slope[:, None])
            logits.copy_(wide)
        del wide  # before the next are made
    return torch.cat(found)


def _ones(found: Tensor, done: int) -> Tensor:
    return torch.ones_like(found)


def _part(column: Tensor, found: Tensor, done: int) -> Tensor:
    return column[done : done + len(found)]


def chunk_rows(weight: Tensor) -> int:
    """Rows of logits alive at once for a head's weight `[V, D]`."""
    if weight.device.type != "cpu":
        return CHUNK
    rows = (NARROW if weight.shape[1] <= NARROW else CPU_CHUNK) * (2 if weight.itemsize == 2 else 1)
    if weight.itemsize == 2 and weight.shape[1] > NARROW:
        rows = max(rows, MANY // (2 * len(weight)))
    return min(CHUNK, rows)


def _rows_kept(weight: Tensor) -> int:
    """The same where one chunk's logits are kept from the forward to the backward pass."""
    return max(chunk_rows(weight), min(CHUNK, MANY // (weight.itemsize * len(weight))))


def _chunks(size: int, hidden: Tensor, weight: Tensor, *columns: Tensor) -> Iterator[tuple[Any, ...]]:
    """At most `size` rows at a time, the last ones as many as there are: the first's number, the rows of `hidden`, their logits, all in the
    same memory, and the columns' rows."""
    sizes = [len(hidden) % size] * (len(hidden) % size > 0 or not len(hidden)) + [size] * (len(hidden) // size)
    room = hidden.new_empty(sizes[-1], len(weight))
    at = 0
    for rows, *others in zip(*(x.split(sizes) for x in (hidden, *columns)), strict=True):
        yield at, rows, torch.mm(rows, weight.T, out=room[: len(rows)]), *others
        at += len(rows)


def _blocks(logits: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A chunk's rows, so few at a time that they stay in a CPU's cache, or that their float32 copies on an accelerator are small."""
    size = max(1, (CACHED if logits.device.type == "cpu" else LAUNCHED) // logits.shape[1])
    return zip(*(x.split(size) for x in (logits, *columns)), strict=True)


def _wide(logits: Tensor) -> Tensor:
    """The logits in the dtype in which they are summed: themselves, or a copy of 16-bit ones."""
    return logits.to(accumulation_dtype(logits.dtype))


def _exponentials(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Makes exp(logit - the row's highest) of logits / temperature in their own memory.

    Returns the target's logit, the highest, and the sum of what was made, each `[rows]`.
    """
    if temperature != 1:
        logits.div_(temperature)
    found = logits.gather(-1, target[:, None])[:, 0]
    top = logits.amax(-1, keepdim=True)
    return found, top[:, 0], logits.sub_(top).exp_().sum(-1)


class LanguageModel(nn.Module):
    """A decoder in one of its roles, as a distribution over the next token. Several share one decoder."""

    def __init__(self, decoder: Decoder, role: str | None = None):
        super().__init__()
        self.decoder, self.role = decoder, role

    def total(self, batch: Batch) -> Tensor:
        """Sum of `forward(batch)`, made faster."""
        return self.losses(batch, likelihood)[0]

    def losses(self, batch: Batch, loss: Loss, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Sum of `loss` over trained tokens, and `forward`'s `[T]` without a gradient: for losses of one token's log-probability each.

        Of n log-probabilities and their tokens' places in the batch, both `[n]`, `loss` makes n losses; it gets some tokens at a time.
        """
        rows = batch.trained.nonzero()[:, 0]
        if not torch.is_grad_enabled():
            logprobs = self(batch, temperature)
            return loss(logprobs[rows], rows).sum(), logprobs
        total, picked = LinearLoss.apply(*self._predictions(batch, rows), temperature, lambda found, at: loss(found, rows[at]))
        return total, picked.new_zeros(len(batch.tokens)).index_copy(0, rows, picked)

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """log p(token t | before it) at index t `[T]`, zero on untrained tokens; float32 (float64 for a float64 model).

        With a temperature, the log-probabilities of the distribution tokens are sampled from: logits / temperature, before any truncation.
        """
        rows = batch.trained.nonzero()[:, 0]
        picked = LinearLogProbability.apply(*self._predictions(batch, rows), temperature)
        return picked.new_zeros(len(batch.tokens)).index_copy(0, rows, picked)

    def _predictions(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States that predict the tokens at `rows` `[n, D]`, the head's weight, and those tokens `[n]`."""
        hidden = self.decoder(batch.inputs, batch.layout, self.role)
        # the shift: token t is predicted by the state at t - 1
        return batch.states(hidden, rows - 1), self.decoder.head.weight, batch.tokens[rows]  # type: ignore[union-attr]


class Scorer(nn.Module):
    """A decoder in one of its roles with a scalar head: the reward model, and PPO's critic. It has no vocabulary head."""

    def __init__(self, decoder: Decoder, role: str | None = None):
        super().__init__()
        self.decoder, self.role = decoder, role
        weight = decoder.embed.weight
        self.score = nn.Linear(decoder.config.hidden_size, 1, bias=False, dtype=weight.dtype, device=weight.device)
        nn.init.zeros_(self.score.weight)  # scores start at 0, whatever the trunk; gradients reach the head at once

    def forward(self, batch: Batch) -> Tensor:
        """Score of each token's state `[T]`; float32 (float64 for a float64 model)."""
        hidden = self.decoder(batch.inputs, batch.layout, self.role)
        scores = batch.states(self.score(hidden)[:, 0])
        return scores.to(accumulation_dtype(scores.dtype))


def values_before(scores: Tensor, batch: Batch) -> Tensor:
    """A critic's `scores` `[T]` as the value of the state *before* token t at index t; zero on untrained tokens."""
    return torch.cat((scores.new_zeros(1), scores[:-1])) * batch.trained  # the shift
