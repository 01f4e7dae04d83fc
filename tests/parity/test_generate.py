"""Greedy answers against transformers' `generate`, token for token: padded there, packed and queued here; ChatGLM-6B's token by token."""

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig

from tests.parity.cases import EACH, VOCABULARY, Made, has_class
from trueline.families.folder import load_decoder, open_folder
from trueline.model.heads import LanguageModel
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Sampling

STOP = frozenset(range(11, VOCABULARY, 9))
NEW = 24


def their_answers(made: Made, prompts: list[list[int]]) -> list[list[int]]:
    if not has_class(made):
        return [one_by_one(made, prompt) for prompt in prompts]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=sorted(STOP))
    rows = made.theirs.generate(tokens, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in STOP), len(row))] for row in rows]


@torch.no_grad()
def one_by_one(made: Made, prompt: list[int]) -> list[int]:
    """The whole sequence again for each token: no cache that could be wrong in the same way."""
    row = list(prompt)
    while len(row) < len(prompt) + NEW and (len(row) == len(prompt) or row[-1] not in STOP):
        row.append(int(made.logits(row)[-1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parity("greedy")
@pytest.mark.parametrize("name", [*EACH, "qwen2_yarn", "qwen2_windows"])
def test_greedy_answers_are_theirs(made: Callable[[str], Made], name: str) -> None:
    case = made(name)
    prompts = case.rows((7, 1, 21, 4, 4, 12, 9, 2, 16, 5))
    expected = their_answers(case, prompts)
    assert len({tuple(answer) for answer in expected}) > 4 and len({len(answer) for answer in expected}) > 2
    for dtype, running in ((torch.float64, 3), (torch.float64, 64), (torch.float32, 64)):
        engine = Engine(LanguageModel(load_decoder(open_folder(case.folder), dtype)), running)
        with engine.hold():
            ours = engine.generate(prompts, Sampling(NEW, temperature=0, stop=STOP), [0] * len(prompts))
        assert [r.tokens for r in ours] == expected
