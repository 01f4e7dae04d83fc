"""What the stages ask of a decoder: log-probabilities of tokens, or one score per token. The one-token shift is written here, twice."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trueline.model.batch import Batch
from trueline.model.decoder import Decoder

CHUNK = 2048  # rows of logits alive at once on an accelerator; with fewer the matrix products slow down
CPU_CHUNK = 256  # more gain nothing on a CPU, and 2,048 rows of a vocabulary of 151,936 are 1.2 GB


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every dtype but float64: log-probabilities, scores and losses are never 16-bit."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearLogProbability(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] for each row, never holding `[rows, vocabulary]`.

    Forward keeps the log-sum-exp of each row; backward makes each chunk's logits again. The head's gradient is skipped when it is frozen.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
        picked, totals = [], []
        for rows, wanted in _chunks(hidden, target):
            logits = _logits(rows, weight, temperature)
            found = logits.gather(-1, wanted[:, None])[:, 0]
            top = logits.amax(-1, keepdim=True)
            # the log-sum-exp, in the logits' own memory
            totals.append(logits.sub_(top).exp_().sum(-1).log_().add_(top[:, 0]))
            picked.append(found - totals[-1])
        ctx.save_for_backward(hidden, weight, target, torch.cat(totals))
        ctx.temperature = temperature  # type: ignore[attr-defined]
        return torch.cat(picked)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, target, totals = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_hidden = []
        # float32 even for a bfloat16 head: chunk sums in 16 bits would bias the gradient
        grad_weight = torch.zeros_like(weight, dtype=totals.dtype) if needs_weight else None
        for rows, wanted, total, slope in _chunks(hidden, target, totals, grad / temperature):
            # d log p / d logits = onehot - softmax, made in the logits' own memory
            change = _logits(rows, weight, temperature).sub_(total[:, None]).exp_().mul_(-slope[:, None])
            change = change.scatter_add_(-1, wanted[:, None], slope[:, None]).to(hidden.dtype)
            if needs_hidden:
                grad_hidden.append(change @ weight)
            if grad_weight is not None:
                grad_weight += change.T @ rows
        return torch.cat(grad_hidden) if needs_hidden else None, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def chunk_rows(device: torch.device) -> int:
    """Rows of logits alive at once."""
    return min(CHUNK, CPU_CHUNK) if device.type == "cpu" else CHUNK


def _chunks(*columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The columns' rows, so many at a time as the logits of are held at once."""
    return zip(*(x.split(chunk_rows(columns[0].device)) for x in columns), strict=True)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).to(accumulation_dtype(hidden.dtype))
    return logits if temperature == 1 else logits.div_(temperature)


class LanguageModel(nn.Module):
    """A decoder in one of its roles, as a distribution over the next token. Several share one decoder."""

    def __init__(self, decoder: Decoder, role: str | None = None):
        super().__init__()
        self.decoder, self.role = decoder, role

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """log p(token t | before it) at index t `[T]`, zero on untrained tokens; float32 (float64 for a float64 model).

        With a temperature, the log-probabilities of the distribution tokens are sampled from: logits / temperature, before any truncation.
        """
        hidden = self.decoder(batch.tokens, batch.layout, self.role)
        rows = batch.trained.nonzero()[:, 0]
        # the shift: token t is predicted by the state at t - 1
        picked = LinearLogProbability.apply(hidden[rows - 1], self.decoder.head.weight, batch.tokens[rows], temperature)  # type: ignore[union-attr]
        return picked.new_zeros(len(batch.tokens)).index_copy(0, rows, picked)


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
        hidden = self.decoder(batch.tokens, batch.layout, self.role)
        scores: Tensor = self.score(hidden)[:, 0]
        return scores.to(accumulation_dtype(scores.dtype))


def values_before(scores: Tensor, batch: Batch) -> Tensor:
    """A critic's `scores` `[T]` as the value of the state *before* token t at index t; zero on untrained tokens."""
    return torch.cat((scores.new_zeros(1), scores[:-1])) * batch.trained  # the shift
