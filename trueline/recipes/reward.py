"""Reward model: a score per answer such that the preferred of two scores higher (Bradley-Terry, arXiv:2203.02155 eq. 1).

The score is that of the answer's last token. Left out: margins, scores centred by an extra loss, ensembles.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from trueline.config.schema import RankingConfig, RewardConfig
from trueline.model.batch import Batch, pack_pairs
from trueline.model.heads import Scorer
from trueline.recipes.assemble import forget_found, make_scorer, open_model, settle_dtype, train_role
from trueline.recipes.fit import Stage, Task, train
from trueline.recipes.prepare import preference_pairs, with_shared_prompts
from trueline.train.losses import ranking_loss, tokenwise_ranking
from trueline.train.step import Losses, Totals


def run(config: RewardConfig, dry_run: bool = False) -> None:
    """Trains a scorer on `config.data` and leaves it in `<run.output>/model`, which transformers loads as a sequence classifier."""
    config = settle_dtype(config)
    opened = open_model(config.model, config.run.seed, with_head=False)
    pairs = preference_pairs(config.data, opened.folder.family, opened.text(), config.run.seed)
    pairs = with_shared_prompts(pairs, config.ranking.share_prefix)
    role, parameters = train_role(opened, config.model.adapter, "policy", config.run.seed)
    forget_found(opened)
    scorer = make_scorer(opened.decoder, role, opened.score)
    parameters["score.weight"] = scorer.score.get_parameter("weight")
    task = Task(pairs.train, pairs.held_out, pack_pairs, ranking_objective(scorer, config.ranking), count_pairs)
    stage = Stage("reward", config, opened, role, parameters, pairs.train, pairs.held_out, pairs.notes, scorer.score.weight)
    train(stage, scorer, lambda folder: task, dry_run)


def ranking_objective(scorer: Scorer, ranking: RankingConfig) -> Callable[[Batch], tuple[Losses, Totals]]:
    """Mean ranking loss per pair; accuracy is how often the chosen answer's last score is the higher one (a tie counts half)."""

    def objective(batch: Batch) -> tuple[Losses, Totals]:
        scores = scorer(batch)
        chosen, rejected = scores[batch.ends()].view(-1, 2).unbind(1)
        tokenwise = ranking.loss == "tokenwise"
        losses = tokenwise_ranking(scores, batch.tokens, batch.lengths) if tokenwise else ranking_loss(chosen, rejected)
        return {"pairs": losses.sum()}, preference_metrics(chosen - rejected)

    return objective


def preference_metrics(margin: Tensor) -> Totals:
    """Accuracy and margin of one score difference per pair `[N]`."""
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {"accuracy": (right.sum(), len(margin)), "margin": (margin.sum(), len(margin))}


def count_pairs(batch: Batch) -> Mapping[str, int]:
    return {"pairs": batch.num_sequences // 2}
