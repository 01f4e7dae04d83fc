"""Greedy answers of the families named, on the CPU and on the pretended device, before and after an update; a JSON line for each.

A program: its first argument is the folder of the models, and `plain` as its second hides Triton, as where it is not installed. A family
is named with an adapter after a colon, or without one.
"""

import json
import sys
from pathlib import Path

if sys.argv[2] == "plain":
    sys.modules["triton"] = None  # type: ignore[assignment]

from tests.accelerator import pretend  # before torch

import torch  # noqa: E402  isort: skip

from trueline.config.schema import AdapterConfig
from trueline.families.folder import load_decoder, open_folder
from trueline.model.adapters import add_adapter
from trueline.model.decoder import Decoder
from trueline.model.heads import LanguageModel
from trueline.rollout import decode, fused
from trueline.rollout.engine import Engine
from trueline.rollout.fused import FusedDecoder, Product
from trueline.rollout.sampling import Sampling

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [4]]  # the third joins the first, the fourth is read while the third goes on
ADAPTERS = {
    "": None,
    "lora": AdapterConfig(kind="lora", rank=3, targets=("q", "v", "o", "up", "down")),
    "ptuning": AdapterConfig(kind="ptuning", tokens=3),
}
fused.PAYS = 1  # these answers are short
decode.PROGRAMS = 1  # the interpreter runs one after the other: the past is not split


@torch.no_grad()
def update(decoder: Decoder) -> None:
    """In place, by the same numbers on every device."""
    draw = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.device)


def answers(folder: Path, device: str, adapter: str) -> list[list[tuple[list[int], list[float]]]]:
    model = LanguageModel(load_decoder(open_folder(folder), torch.float32, device))
    if (chosen := ADAPTERS[adapter]) is not None:
        model.role = "policy"
        add_adapter(model.decoder, model.role, chosen, 0)
    engine, found = Engine(model, running=3), []
    if engine.graphs is not None:
        engine.graphs.patience = 0
    for _ in range(2):
        with engine.hold():
            made = engine.generate(PROMPTS, Sampling(4, temperature=0), range(len(PROMPTS)))
            if device == "cuda":
                assert isinstance(engine.decoder, FusedDecoder)
                assert all(len(x.parts) == 1 for x in engine.decoder.modules() if isinstance(x, Product))
        found.append([(rollout.tokens, rollout.logprobs) for rollout in made])
        update(model.decoder)
    return found


for name in sys.argv[3:]:
    before = dict(pretend.counts)
    family, _, adapter = name.partition(":")
    expected, found = (answers(Path(sys.argv[1]) / family, device, adapter) for device in ("cpu", "cuda"))
    counts = {what: count - before[what] for what, count in pretend.counts.items()}
    print(json.dumps({"family": name, "cpu": expected, "device": found, "counts": counts}))
