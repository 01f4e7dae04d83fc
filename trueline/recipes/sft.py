"""Supervised fine-tuning: the loss is on what the assistant says and on the token that ends its turn (arXiv:2203.02155 sect. 3.5).

Left out: sample weights, curricula. Packing is not an option; it is the only batch form.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from trueline.config.schema import SftConfig
from trueline.model.batch import Batch, pack
from trueline.model.heads import LanguageModel
from trueline.recipes.assemble import forget_found, open_model, settle_dtype, speaking, train_role
from trueline.recipes.fit import Stage, Task, train
from trueline.recipes.prepare import sft_samples
from trueline.train.step import Losses, Totals


def run(config: SftConfig, dry_run: bool = False) -> None:
    """Trains `config.model` on `config.data` and leaves it in `<run.output>/model`."""
    config = settle_dtype(config)
    opened = speaking(open_model(config.model, config.run.seed))
    samples = sft_samples(config.data, opened.folder.family, opened.text(), config.run.seed)
    role, parameters = train_role(opened, config.model.adapter, "policy", config.run.seed)
    forget_found(opened)
    model = LanguageModel(opened.decoder, role)
    task = Task(samples.train, samples.held_out, pack, sft_objective(model), count_tokens)
    stage = Stage("sft", config, opened, role, parameters, samples.train, samples.held_out, samples.notes)
    train(stage, model, lambda folder: task, dry_run)


def sft_objective(model: LanguageModel) -> Callable[[Batch], tuple[Losses, Totals]]:
    """Mean negative log-likelihood per trained token."""

    def objective(batch: Batch) -> tuple[Losses, Totals]:
        return {"tokens": -model.total(batch)}, {}

    return objective


def count_tokens(batch: Batch) -> Mapping[str, Tensor]:
    return {"tokens": batch.trained.sum()}
