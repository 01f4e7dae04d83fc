"""Greedy answers of the families named, on the CPU and on the pretended device, before and after an update; a JSON line for each family.

A program: its first argument is the folder of the models, and `plain` as its second hides Triton, as where it is not installed.
"""

import json
import sys
from pathlib import Path

if sys.argv[2] == "plain":
    sys.modules["triton"] = None  # type: ignore[assignment]

from tests.accelerator import pretend  # before torch

import torch  # noqa: E402  isort: skip

from trueline.families.folder import load_decoder, open_folder
from trueline.model.decoder import Decoder
from trueline.model.heads import LanguageModel
from trueline.rollout import decode
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Sampling

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [4]]  # the third joins the first, the fourth is read while the third goes on
decode.PROGRAMS = 1  # the interpreter runs one after the other: the past is not split


@torch.no_grad()
def update(decoder: Decoder) -> None:
    """In place, by the same numbers on every device."""
    draw = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.device)


def answers(folder: Path, device: str) -> list[list[tuple[list[int], list[float]]]]:
    model = LanguageModel(load_decoder(open_folder(folder), torch.float32, device))
    engine, found = Engine(model, running=3), []
    if engine.graphs is not None:
        engine.graphs.patience = 0
    for _ in range(2):
        with engine.hold():
            made = engine.generate(PROMPTS, Sampling(4, temperature=0), range(len(PROMPTS)))
        found.append([(rollout.tokens, rollout.logprobs) for rollout in made])
        update(model.decoder)
    return found


for name in sys.argv[3:]:
    before = dict(pretend.counts)
    expected, found = (answers(Path(sys.argv[1]) / name, device) for device in ("cpu", "cuda"))
    counts = {what: count - before[what] for what, count in pretend.counts.items()}
    print(json.dumps({"family": name, "cpu": expected, "device": found, "counts": counts}))
