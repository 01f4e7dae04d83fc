"""The same things from Python: load any model for its log-probabilities, scores, rendering and answers; and the stages as functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trueline.config.load import from_any
from trueline.config.schema import (
    DpoStageConfig,
    EvaluateConfig,
    ModelConfig,
    PpoStageConfig,
    RewardConfig,
    SamplingConfig,
    SftConfig,
    StageConfig,
)
from trueline.data.conversation import Conversation
from trueline.data.messages import check_roles, read_turns
from trueline.data.sample import Sample, sample_of
from trueline.data.stream import key, plan
from trueline.errors import UserError
from trueline.model.batch import Batch, pack
from trueline.model.heads import LanguageModel
from trueline.recipes import dpo as dpo_recipe
from trueline.recipes import evaluate as evaluate_recipe
from trueline.recipes import ppo as ppo_recipe
from trueline.recipes import reward as reward_recipe
from trueline.recipes import sft as sft_recipe
from trueline.recipes.assemble import Opened, make_scorer, open_model
from trueline.recipes.generate import answer, language_model_of
from trueline.rollout.sampling import Rollout

MAX_TOKENS = 8192  # of one packed forward; longer sequences run alone


class Model:
    """A loaded model of any family: a language model, or a reward model. Made by `load`."""

    def __init__(self, opened: Opened):
        self.opened = opened

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """log p(token t | before it) of each sequence, a float tensor `[T]` each with 0 at t = 0.

        ChatGLM-6B sees what stands before `<sop>` as a whole: there, a token has been seen before it is predicted.
        """
        model = self._speaker()
        return self._packed(sequences, lambda batch: model(batch))

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """A reward model's score of each whole sequence: that of its last token."""
        if self.opened.score is None:
            raise UserError(f"{self.opened.path} is not a reward model: it has no score head; train one with `trueline reward`")
        scorer = make_scorer(self.opened.decoder, self.opened.role, self.opened.score).eval()
        return [float(scores[-1]) for scores in self._packed(sequences, lambda batch: scorer(batch))]

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> Sample:
        """Tokens of a conversation and which of them are trained; one that waits for the assistant ends with the assistant's header."""
        problems: list[str] = []
        turns = read_turns(list(messages), "messages", lambda field, what: problems.append(f"{field}: {what}"))
        waiting = not turns.messages or turns.messages[-1].role != "assistant"
        check_roles(turns, waiting, lambda field, what: problems.append(f"{field}: {what}"))
        if problems:
            raise UserError("this conversation cannot be rendered:", problems)
        conversation = Conversation(turns.messages, tuple(tools) if tools else turns.tools)
        return self.opened.folder.family.render(conversation, self.opened.text(), open=waiting)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        n: int = 1,
        seed: int = 0,
    ) -> list[Rollout]:
        """`n` answers to each prompt (a text is one user turn, a list of ids is taken as it is), all of the first prompt first."""
        model = self._speaker()
        tokens = [self.render([{"role": "user", "content": p}]).tokens if isinstance(p, str) else list(p) for p in prompts]
        requests = [t for t in tokens for _ in range(n)]
        sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        return answer(model, self.opened, requests, sampling, [key(seed, "generate", i) for i in range(len(requests))])

    def _speaker(self) -> LanguageModel:
        return language_model_of(self.opened)

    def _packed(self, sequences: Sequence[Sequence[int]], run: Any) -> list[torch.Tensor]:
        if not sequences or any(len(s) == 0 for s in sequences):
            raise UserError("an empty list of tokens has no log-probabilities; give at least one token per sequence")
        lengths = [len(s) for s in sequences]
        out: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
        place, blocks = self.opened.decoder.embed.weight.device, self.opened.decoder.config.blocks
        for indices in plan(lengths, max(MAX_TOKENS, *lengths))[0]:
            batch: Batch = pack([sample_of(sequences[i], [True] * lengths[i], blocks) for i in indices]).to(place)
            for i, piece in zip(indices, run(batch).split([lengths[i] for i in indices]), strict=True):
                out[i] = piece.cpu()
        return out


def load(
    path: str | Path,
    dtype: str = "auto",
    adapter: str | None = None,
    tokenizer: str | None = None,
    template: str = "auto",
    base: str | Path | None = None,
) -> Model:
    """A model folder or hub id of any family, a reward model, or an adapter folder (on `base`, or else the base whose path it records).

    `adapter` puts an adapter folder on `path`, whatever base that adapter records. Without tokenizer files it still serves token lists.
    `template` writes conversations down in another family's way, as `model.template` does.
    """
    if adapter is not None:
        path, base = adapter, path
    settings = {"path": str(path), "base": None if base is None else str(base), "dtype": dtype}
    return Model(open_model(ModelConfig.model_validate(settings | {"tokenizer": tokenizer, "template": template}), 0))


Given = str | Path | Mapping[str, Any]
"""A configuration: the path of a YAML file, or a dictionary; the stage's own class will do too."""


def sft(config: Given | SftConfig) -> Path:
    """`trueline sft`; returns the folder of the finished model. Interrupted when a signal stopped the run after it was saved."""
    settings = from_any(SftConfig, config)
    sft_recipe.run(settings)
    return _finished(settings)


def reward(config: Given | RewardConfig) -> Path:
    """`trueline reward`; returns the folder of the finished reward model."""
    settings = from_any(RewardConfig, config)
    reward_recipe.run(settings)
    return _finished(settings)


def dpo(config: Given | DpoStageConfig) -> Path:
    """`trueline dpo`; returns the folder of the finished model."""
    settings = from_any(DpoStageConfig, config)
    dpo_recipe.run(settings)
    return _finished(settings)


def ppo(config: Given | PpoStageConfig) -> Path:
    """`trueline ppo`; returns the folder of the finished policy."""
    settings = from_any(PpoStageConfig, config)
    ppo_recipe.run(settings)
    return _finished(settings)


def evaluate(config: Given | EvaluateConfig) -> dict[str, float]:
    """`trueline evaluate`; returns the numbers of its line in metrics.jsonl."""
    return evaluate_recipe.run(from_any(EvaluateConfig, config))


def _finished(config: StageConfig) -> Path:
    return config.run.output / "model"
