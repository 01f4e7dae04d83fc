"""Evaluation on held-out files: the loss on answers, a reward model's accuracy on pairs, and what the model itself answers.

Left out: harnesses of benchmarks. The losses are those the training stages log, by the same objectives; what answers are worth beside
references is in `measures`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trueline.config.load import to_yaml
from trueline.config.metrics import MetricsConfig
from trueline.config.schema import EvaluateConfig, MeshConfig, RankingConfig
from trueline.data.cache import TokenPrompt, lengths
from trueline.data.files import find_files
from trueline.data.formats import FileValues
from trueline.data.reader import read_records
from trueline.data.record import Problems
from trueline.data.sample import Pair, Sample
from trueline.data.stream import key, plan
from trueline.data.tokenizer import Tokenizer
from trueline.errors import UserError
from trueline.model.batch import pack, pack_pairs
from trueline.model.heads import Scorer
from trueline.parallel.world import World, start_alone
from trueline.recipes.assemble import Opened, make_scorer, open_model
from trueline.recipes.fit import Task, held_out_values
from trueline.recipes.generate import answer, language_model_of
from trueline.recipes.judges import Scores, asked_of, frozen_config, open_reward, reward_model, sample_line
from trueline.recipes.measures import matches, open_text_measure, references, win_rate
from trueline.recipes.prepare import Prepared, preference_pairs, prompt_tokens, sft_samples
from trueline.recipes.report import run_report
from trueline.recipes.reward import count_pairs, ranking_objective
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.rollout.sampling import Rollout
from trueline.train.budget import Budget
from trueline.train.run import Run

Judged = tuple[Scorer | None, Opened | None]
Others = tuple[list[Rollout], Opened | None]


@dataclass(frozen=True)
class HeldOut:
    """What there is to measure; `notes` say what was left out."""

    pairs: Sequence[Pair]  # for a reward model
    answers: Sequence[Sample]
    prompts: Sequence[TokenPrompt]
    notes: list[str]


def run(config: EvaluateConfig, dry_run: bool = False) -> dict[str, float]:
    """Writes one line to `<run.output>/metrics.jsonl` and every answer to samples.jsonl; returns the line's numbers."""
    if dry_run:
        print(to_yaml(config), end="")
        return {}
    world = start_alone(MeshConfig())
    opened = open_model(config.model, config.run.seed)
    held = read_held_out(config, opened)
    judge = open_judge(config)
    measured = measures_of(config, held.prompts)
    others = other_answers(config, held.prompts)
    with Run("evaluate", config.run, to_yaml(config), world) as run, open_score(config, opened, judge) as score:
        run.begin(0, 1, {str(opened.path): opened.fingerprint})
        for note in held.notes:
            run.say(note)
        values: dict[str, float] = {}
        if held.pairs:
            values |= pair_values(config, opened, held.pairs, world)
        if held.answers:
            values |= answer_values(config, opened, held.answers, world)
        if held.prompts:
            spoken, lines = spoken_values(config, opened, held.prompts, score)
            values |= spoken
            values |= measured(lines)
            if others is not None:
                values |= compared(config, held.prompts, lines, others, judge)
            run.samples(1, lines)
        run.log(1, values, "eval")
        run.say("\n".join(f"  {name:<16} {value:.6g}" for name, value in values.items()))
        run_report(run.folder)
    return values


def read_held_out(config: EvaluateConfig, opened: Opened) -> HeldOut:
    """Pairs for a reward model; for a language model answers, where the files have any, and prompts to answer itself."""
    source = (config.data, opened.folder.family, opened.text())
    seed = config.run.seed
    if opened.score is not None:
        if config.reward is not None:
            raise UserError("reward: the model is a reward model itself; leave reward out to evaluate it on pairs")
        pairs = preference_pairs(*source, seed)
        held = HeldOut(pairs.held_out, [], [], pairs.notes)
    else:
        answers = sft_samples(*source, seed) if file_use(config, opened.text()) != "prompt" else Prepared[Sample]([], [], [])
        prompts = prompt_tokens(*source, config.sampling.max_new_tokens, seed) if config.generate else Prepared[TokenPrompt]([], [], [])
        held = HeldOut([], answers.held_out, prompts.held_out, list(dict.fromkeys(answers.notes + prompts.notes)))
    if not (held.pairs or held.answers or held.prompts):
        raise UserError("the held-out files hold prompts alone, and generate is false, so there is nothing to measure; set generate=true")
    if config.metrics != MetricsConfig() and not held.prompts:
        raise UserError("metrics measures a language model's own answers; set generate=true, or leave metrics out")
    if config.metrics.against and config.reward is None:
        raise UserError("metrics.against compares by reward; set reward.model or reward.function")
    sizes = [int(lengths(items).max()) for items in (held.pairs, held.answers) if len(items)]
    plan(sizes, config.batch.max_tokens)  # refuses what would not fit later
    return held


def open_judge(config: EvaluateConfig) -> Judged:
    """The reward model, if the config asks for one."""
    return reward_model(config.reward, config.model, config.run.seed) if config.reward and config.reward.model else (None, None)


@contextmanager
def open_score(config: EvaluateConfig, policy: Opened | None, judge: Judged) -> Iterator[Scores | None]:
    """The scores of the answers, if the config asks for any."""
    if config.reward is None:
        yield None
        return
    with open_reward(config.reward, policy, *judge, config.run.output, Budget(config.batch.max_tokens, print)) as score:
        yield score


def file_use(config: EvaluateConfig, tokenizer: Tokenizer) -> str:
    """What the first held-out file is made for: answers, pairs, or prompts alone."""
    file = find_files((config.data.eval or config.data.train)[:1])[0][0]
    values = FileValues[Any](file, config.data.format, Problems(), [], tokenizer)  # its problems are told when all of it is read
    next(iter(values), None)
    return values.use


def pair_values(config: EvaluateConfig, opened: Opened, pairs: Sequence[Pair], world: World) -> dict[str, float]:
    """Ranking loss, accuracy and margin of a reward model."""
    scorer = make_scorer(opened.decoder, opened.role, opened.score)
    task = Task(pairs, pairs, pack_pairs, ranking_objective(scorer, RankingConfig()), count_pairs)
    return held_out_values(task, scorer, config.batch.max_tokens, world)


def answer_values(config: EvaluateConfig, opened: Opened, samples: Sequence[Sample], world: World) -> dict[str, float]:
    """Mean negative log-likelihood per trained token of the files' own answers (of pairs, the chosen ones)."""
    model = language_model_of(opened)
    task = Task(samples, samples, pack, sft_objective(model), count_tokens)
    return held_out_values(task, model, config.batch.max_tokens, world)


def spoken_values(
    config: EvaluateConfig, opened: Opened, prompts: Sequence[TokenPrompt], score: Scores | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The model's own answers to the files' prompts: length, share that stopped, and their mean score if a reward is given."""
    seeds = [key(config.run.seed, "evaluate", i) for i in range(len(prompts))]
    rollouts = answer(language_model_of(opened), opened, [p.tokens for p in prompts], config.sampling, seeds)
    count = len(rollouts)
    values = {
        "response_length": sum(len(r.tokens) for r in rollouts) / count,
        "stopped": sum(r.finish == "stop" for r in rollouts) / count,
    }
    scores: list[float | None] = [None] * count
    if score is not None:
        found = score(rollouts, prompts)
        values["score"] = sum(found) / count
        scores = list(found)
    return values, [sample_line(p, r, s) for p, r, s in zip(prompts, rollouts, scores, strict=True)]


def measures_of(config: EvaluateConfig, prompts: Sequence[TokenPrompt]) -> Callable[[list[dict[str, Any]]], dict[str, float]]:
    """What `metrics` asks for, ready before the model answers: it adds each answer's numbers to its line, and returns their means."""
    metrics = config.metrics
    if metrics.text == "none" and not metrics.match:
        return lambda lines: {}
    wanted = references(prompts, metrics.reference, config.data.format)
    measure = open_text_measure(metrics.text) if metrics.text != "none" else None

    def measured(lines: list[dict[str, Any]]) -> dict[str, float]:
        values: dict[str, float] = {}
        known = [(line, reference) for line, reference in zip(lines, wanted, strict=True) if reference is not None]
        for line, reference in known:
            line["reference"] = reference
        answers, found = [line["response"] or "" for line, _ in known], [reference for _, reference in known]
        if metrics.match:
            for (line, _), match in zip(known, matches(answers, found), strict=True):
                line["match"] = match
            values["match"] = sum(line["match"] for line, _ in known) / len(known)
        if measure is not None:
            means, rows = measure(answers, found)
            for (line, _), row in zip(known, rows, strict=True):
                line |= row
            values |= means
        return values | ({"without_reference": len(lines) - len(known)} if len(known) < len(lines) else {})

    return measured


def other_answers(config: EvaluateConfig, prompts: Sequence[TokenPrompt]) -> Others | None:
    """The answers to compare with, and the model that gave them (None: they were read from a file). It is gone before ours answers."""
    against = config.metrics.against
    if against is None:
        return None
    if not against.endswith(".jsonl"):
        other = open_model(frozen_config(config.model, against), config.run.seed)
        family, tokenizer = other.folder.family, other.text()
        tokens = [family.render(p.prompt.conversation, tokenizer, open=True).tokens for p in prompts]
        seeds = [key(config.run.seed, "evaluate", i) for i in range(len(prompts))]
        return answer(language_model_of(other), other, tokens, config.sampling, seeds), other
    records = [record.value for record in read_records([against])]
    if [record.get("prompt") for record in records] != [asked_of(p) for p in prompts]:
        raise UserError(
            f"metrics.against: {against} holds {len(records)} answers, not to the {len(prompts)} prompts of this evaluation in order; "
            "evaluate the other model on the same files"
        )
    return [Rollout([], [], [], "stop", text=str(record.get("response") or "")) for record in records], None


def compared(
    config: EvaluateConfig, prompts: Sequence[TokenPrompt], lines: list[dict[str, Any]], others: Others, judge: Judged
) -> dict[str, float]:
    """The win rate over the other answers, which join the lines with their scores."""
    rollouts, policy = others
    with open_score(config, policy, judge) as score:
        assert score is not None
        theirs = score(rollouts, prompts)
    for line, rollout, found in zip(lines, rollouts, theirs, strict=True):
        line |= {"other_response": rollout.text, "other_score": found}
    alike = [line["response"] == line["other_response"] for line in lines]
    return win_rate([line["score"] for line in lines], theirs, alike)
