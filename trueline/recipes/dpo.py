"""Direct preference optimisation (arXiv:2305.18290) and its IPO and hinge forms.

Reference log-probabilities are computed once, before the first step, and kept in the run folder with the fingerprint of the model they are
of. Left out: online reference passes, further members of the loss family.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from trueline.config.schema import DpoConfig, DpoStageConfig
from trueline.data.cache import items_fingerprint, lengths
from trueline.data.sample import Pair
from trueline.errors import UserError
from trueline.model.batch import Batch, pack_pairs
from trueline.model.heads import LanguageModel
from trueline.recipes.assemble import Opened, forget_found, open_model, settle_dtype, speaking, train_role
from trueline.recipes.fit import Stage, Task, train
from trueline.recipes.generate import language_model_of
from trueline.recipes.prepare import Prepared, preference_pairs, with_shared_prompts
from trueline.recipes.reference import model_fingerprint, pair_logprobs, store_reference, stored_reference
from trueline.recipes.reward import preference_metrics
from trueline.train.losses import dpo_loss
from trueline.train.step import Losses, Totals


@dataclass(frozen=True)
class Judged:
    """A pair with its two reference log-probabilities, summed over each answer."""

    pair: Pair
    reference: Tensor  # [2]: chosen, rejected

    def __len__(self) -> int:
        return len(self.pair)


class JudgedPairs(Sequence[Judged]):
    """Pairs beside their reference log-probabilities `[pairs, 2]`, put together when asked for."""

    def __init__(self, pairs: Sequence[Pair], reference: Tensor):
        self.pairs, self.reference = pairs, reference
        self.sides = lengths(pairs)[:, None]

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, i: int) -> Judged: ...

    @overload
    def __getitem__(self, i: slice) -> "JudgedPairs": ...

    def __getitem__(self, i: int | slice) -> "Judged | JudgedPairs":
        return JudgedPairs(self.pairs[i], self.reference[i]) if isinstance(i, slice) else Judged(self.pairs[i], self.reference[i])


@dataclass(frozen=True)
class JudgedBatch:
    batch: Batch
    reference: Tensor  # [N], chosen at even indices

    def to(self, device: torch.device | str) -> "JudgedBatch":
        return JudgedBatch(self.batch.to(device), self.reference.to(device))


def run(config: DpoStageConfig, dry_run: bool = False) -> None:
    """Trains `config.model` on `config.data` and leaves it in `<run.output>/model`."""
    config = settle_dtype(config)
    opened, pairs, model, parameters = _open(config)

    def build(folder: Path) -> Task[Judged, JudgedBatch]:
        values = reference_logprobs(config, reference_model(config, model, opened), pairs, folder)
        forget_found(opened)
        cut = len(pairs.train)
        trained, held_out = JudgedPairs(pairs.train, values[:cut]), JudgedPairs(pairs.held_out, values[cut:])
        return Task(trained, held_out, pack_judged, dpo_objective(model, config.dpo), lambda b: count_items(b, config.dpo))

    stage = Stage("dpo", config, opened, model.role, parameters, pairs.train, pairs.held_out, pairs.notes)
    train(stage, model, build, dry_run)


def prepare(config: DpoStageConfig) -> Path:
    """Stores the reference log-probabilities of all pairs at `reference.path`; for `reference.kind: stored`."""
    opened, pairs, model, _ = _open(settle_dtype(config))
    reference = reference_model(config, model, opened)
    target = Path(str(config.reference.path))
    values = both_logprobs(reference, pairs, config.batch.max_tokens)
    store_reference(target, values, model_fingerprint(reference), items_fingerprint(pairs.train, pairs.held_out))
    return target


def both_logprobs(reference: LanguageModel, pairs: Prepared[Pair], max_tokens: int) -> Tensor:
    """`[pairs, 2]`: those trained on, then those held out."""
    reference.eval()
    return torch.cat([pair_logprobs(reference, part, max_tokens) for part in (pairs.train, pairs.held_out) if len(part)])


def _open(config: DpoStageConfig) -> tuple[Opened, Prepared[Pair], LanguageModel, dict[str, nn.Parameter]]:
    opened = speaking(open_model(config.model, config.run.seed))
    pairs = preference_pairs(config.data, opened.folder.family, opened.text(), config.run.seed)
    pairs = with_shared_prompts(pairs, config.dpo.share_prefix)
    role, parameters = train_role(opened, config.model.adapter, "policy", config.run.seed)
    return opened, pairs, LanguageModel(opened.decoder, role), parameters


def reference_model(config: DpoStageConfig, model: LanguageModel, opened: Opened) -> LanguageModel:
    """What `config.reference` means, before the first step: the policy itself (it has not moved yet), its bare trunk, or another folder."""
    kind = config.reference.kind
    if kind == "adapters_off":
        if model.role is None:
            raise UserError("reference.kind: adapters_off needs model.adapter.kind lora or ptuning; full has no adapter to switch off")
        return LanguageModel(opened.decoder, None)
    if kind == "frozen" and config.reference.path is not None:
        settings = config.model.model_copy(update={"path": config.reference.path, "init": "load"})
        return language_model_of(open_model(settings, config.run.seed))
    fresh_lora = opened.adapter is None and model.role is not None and model.role not in opened.decoder.prefixes
    return LanguageModel(opened.decoder, None) if fresh_lora else model  # a fresh LoRA has no effect, so no say in the fingerprint either


def reference_logprobs(config: DpoStageConfig, reference: LanguageModel, pairs: Prepared[Pair], folder: Path) -> Tensor:
    """`[pairs, 2]`: stored before (`reference.path`, or by an earlier start of this run), or computed now and kept in the run folder."""
    model, data = model_fingerprint(reference), items_fingerprint(pairs.train, pairs.held_out)
    if config.reference.kind == "stored":
        return stored_reference(Path(str(config.reference.path)), model, data)
    path = folder / "reference.safetensors"
    with contextlib.suppress(UserError):  # nothing there yet, or of a start with other settings
        return stored_reference(path, model, data)
    values = both_logprobs(reference, pairs, config.batch.max_tokens)
    store_reference(path, values, model, data)
    return values


def pack_judged(items: Sequence[Judged]) -> JudgedBatch:
    return JudgedBatch(pack_pairs([item.pair for item in items]), torch.cat([item.reference for item in items]))


def dpo_objective(model: LanguageModel, dpo: DpoConfig) -> Callable[[JudgedBatch], tuple[Losses, Totals]]:
    """Mean preference loss per pair, plus `sft_weight` times the chosen answers' mean negative log-likelihood per token."""

    def objective(judged: JudgedBatch) -> tuple[Losses, Totals]:
        batch = judged.batch
        policy = batch.per_sequence(model(batch))
        tokens = batch.per_sequence(batch.trained.to(policy.dtype))
        scale = tokens if dpo.loss == "ipo" else torch.ones_like(tokens)  # IPO is on averages over an answer's tokens
        (chosen, rejected), (ref_chosen, ref_rejected) = (
            (x / scale).view(-1, 2).unbind(1) for x in (policy, judged.reference.to(policy.dtype))
        )
        losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, dpo.beta, dpo.loss, dpo.label_smoothing)
        sums: Losses = {"pairs": losses.sum()}
        if dpo.sft_weight:
            sums["chosen tokens"] = -dpo.sft_weight * policy[0::2].sum()
        won, lost = dpo.beta * (chosen - ref_chosen).detach(), dpo.beta * (rejected - ref_rejected).detach()
        rewards: Totals = {"chosen_reward": (won.sum(), len(won)), "rejected_reward": (lost.sum(), len(lost))}
        return sums, preference_metrics(won - lost) | rewards

    return objective


def count_items(judged: JudgedBatch, dpo: DpoConfig) -> Mapping[str, int | Tensor]:
    """Pairs, and with an SFT term the chosen answers' tokens."""
    batch = judged.batch
    counts: dict[str, int | Tensor] = {"pairs": batch.num_sequences // 2}
    if dpo.sft_weight:
        counts["chosen tokens"] = batch.per_sequence(batch.trained.long())[0::2].sum()
    return counts
