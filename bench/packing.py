"""Packed training beside padded training: the same small model, records and optimizer. One rule: equal losses first.

Two padded sides: transformers as most scripts drive it (right padding, attention mask, all logits), and our own decoder on the padded
rectangle, which wastes its trunk on padding but not its head. Prints JSON lines and ends with a table.

`python bench/packing.py [--data FILE --model DIR] [--rounds N] [--threads N]`: with a file, its records' lengths and loss masks.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from trueline.config.schema import DataConfig, OptimizerConfig
from trueline.data.sample import Sample
from trueline.data.tokenizer import load_tokenizer
from trueline.families.folder import open_folder
from trueline.families.qwen2 import QWEN2
from trueline.model.batch import Batch, pack
from trueline.model.decoder import Decoder
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World
from trueline.recipes.prepare import sft_samples
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train.optimizer import make_optimizer
from trueline.train.step import train_step

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
STEPS = 4  # updates per timing
EQUAL = 1e-5  # relative, float32
OPTIMIZER = OptimizerConfig(lr=1e-4)
IGNORED = -100  # what cross_entropy leaves out


@dataclass(frozen=True)
class Case:
    """What every side trains on: `STEPS` batches."""

    name: str
    batch: int
    batches: list[list[Sample]]

    @property
    def real(self) -> int:
        return sum(len(s) for batch in self.batches for s in batch)

    @property
    def padded(self) -> int:
        return sum(len(batch) * max(map(len, batch)) for batch in self.batches)


@dataclass(frozen=True)
class Side:
    """One way to train: the loss of a batch, and an update on it that returns the loss before it."""

    name: str
    loss: Callable[[Sequence[Sample]], float]
    update: Callable[[Sequence[Sample]], float]


def drawn_samples(count: int) -> list[Sample]:
    """Lengths as in CValues-Comparison: prompts of about 11 tokens, answers of 145 on average, log-normal."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randn(count, generator=draw).mul(0.4).add(2.3).exp().clamp(4, 40).int().tolist()
    answers = torch.randn(count, generator=draw).mul(0.6).add(4.8).exp().clamp(8, 700).int().tolist()
    return [made(p + a, [i >= p for i in range(p + a)], draw) for p, a in zip(prompts, answers, strict=True)]


def file_samples(file: str, model: str, count: int) -> list[Sample]:
    """The first records of a file in the folder's template; their tokens are drawn anew, to fit the small vocabulary."""
    found = sft_samples(DataConfig(train=(file,), overlength="drop"), open_folder(model).family, load_tokenizer(model), 0).train
    draw = torch.Generator().manual_seed(0)
    return [made(len(s), s.trained, draw) for s in found[:count]]


def made(length: int, trained: list[bool], draw: torch.Generator) -> Sample:
    return Sample(torch.randint(0, SIZES["vocab_size"], (length,), generator=draw).tolist(), trained)


def rectangle(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded tokens, attention mask and labels, each `[N, L]`."""
    longest = max(map(len, samples))
    pads = [longest - len(s) for s in samples]
    tokens = torch.tensor([s.tokens + [0] * n for s, n in zip(samples, pads, strict=True)])
    mask = torch.tensor([[1] * len(s) + [0] * n for s, n in zip(samples, pads, strict=True)])
    wanted = ([t if kept else IGNORED for t, kept in zip(s.tokens, s.trained, strict=True)] for s in samples)
    return tokens, mask, torch.tensor([row + [IGNORED] * n for row, n in zip(wanted, pads, strict=True)])


def their_loss(model: transformers.PreTrainedModel, samples: Sequence[Sample]) -> Tensor:
    tokens, mask, labels = rectangle(samples)
    logits = model(input_ids=tokens, attention_mask=mask).logits
    labels = labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED)


def their_update(model: transformers.PreTrainedModel, adam: torch.optim.Optimizer, samples: Sequence[Sample]) -> float:
    loss = their_loss(model, samples)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_norm)
    adam.step()
    adam.zero_grad()
    return loss.item()


def padded(samples: Sequence[Sample]) -> Batch:
    """All sequences as long as the longest: in causal attention nothing sees what is padded behind it."""
    longest = max(map(len, samples))
    return pack([Sample(s.tokens + [0] * (longest - len(s)), s.trained + [False] * (longest - len(s))) for s in samples])


def our_side(name: str, state: dict[str, Tensor], form: Callable[[Sequence[Sample]], Batch]) -> Side:
    decoder = our_decoder(state)
    model = LanguageModel(decoder)
    objective = sft_objective(model)
    optimizer = make_optimizer(dict(decoder.named_parameters()), OPTIMIZER)

    def loss(samples: Sequence[Sample]) -> float:
        batch = form(samples)
        with torch.no_grad():
            return float(objective(batch)[0]["tokens"] / batch.trained.sum())

    def update(samples: Sequence[Sample]) -> float:
        settings = {"world": World(), "max_norm": OPTIMIZER.max_norm, "lr": OPTIMIZER.lr, "step": 1, "seed": 0}
        return train_step(optimizer, [form(samples)], objective, count_tokens, **settings)["loss"]

    return Side(name, loss, update)


def our_decoder(state: dict[str, Tensor]) -> Decoder:
    decoder = Decoder(QWEN2.read_config(SIZES))
    copied = {}
    for weight in QWEN2.weights:
        for layer in range(decoder.config.num_layers if "{}" in weight.theirs else 1):
            if weight.theirs.format(layer) in state:
                copied[weight.ours[0].format(layer)] = state[weight.theirs.format(layer)]
    decoder.load_state_dict(copied)
    return decoder


def sides() -> list[Side]:
    """The same random weights three times."""
    torch.manual_seed(0)
    peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).train()
    state = {name: x.clone() for name, x in peer.state_dict().items()}
    adam = torch.optim.AdamW(peer.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, weight_decay=0.0, fused=True)

    def peer_loss(samples: Sequence[Sample]) -> float:
        with torch.no_grad():
            return float(their_loss(peer, samples))

    return [
        our_side("packed", state, pack),
        our_side("padded", state, padded),
        Side("transformers", peer_loss, partial(their_update, peer, adam)),
    ]


def gap(values: Sequence[Sequence[float]]) -> float:
    """Largest relative difference from the first side's numbers."""
    return max(abs(a - b) / abs(a) for other in values[1:] for a, b in zip(values[0], other, strict=True))


def compare(case: Case, rounds: int) -> dict[str, object]:
    """Losses before and over `STEPS` updates must agree; then timings taken in turns."""
    contenders = sides()
    before = gap([[side.loss(batch) for batch in case.batches] for side in contenders])
    during = gap([[side.update(batch) for batch in case.batches] for side in contenders])  # also the warm-up
    if before > EQUAL:
        raise SystemExit(f"{case.name}: losses differ by {before:.1e} relative, expected at most {EQUAL}")
    wall: dict[str, list[float]] = {side.name: [] for side in contenders}
    processor: dict[str, list[float]] = {side.name: [] for side in contenders}
    for _ in range(rounds):
        for side in contenders:
            began, spent = time.perf_counter(), time.process_time()
            for batch in case.batches:
                side.update(batch)
            wall[side.name].append(time.perf_counter() - began)
            processor[side.name].append(time.process_time() - spent)
    row: dict[str, object] = {
        "bench": "packing", "case": case.name, "batch": case.batch, "tokens_real": case.real, "tokens_padded": case.padded,
        "loss_gap": before, "loss_gap_after_updates": during, "threads": torch.get_num_threads(), "rounds": rounds,
    }  # fmt: skip
    median = {name: statistics.median(values) for name, values in wall.items()}
    spent = {name: statistics.median(values) for name, values in processor.items()}
    for name, values in wall.items():
        spread = {"seconds_median": median[name], "seconds_min": min(values), "seconds_max": max(values)}
        # of processor time: says the same on a machine that others use, where the wall clock does not
        ratios = {"ratio": median[name] / median["packed"], "processor_ratio": spent[name] / spent["packed"]}
        line = {**row, "side": name, **spread, "tokens_per_second": case.real / median[name], **ratios, "load": os.getloadavg()[0]}
        print(json.dumps(line), flush=True)
        row |= {f"{name} speed": case.real / median[name], f"{name} ratio": ratios["ratio"], f"{name} processor": ratios["processor_ratio"]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="records whose lengths to use; needs --model")
    parser.add_argument("--model", help="folder with config.json and tokenizer files, for their template")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16], help="records at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if bool(arguments.data) != bool(arguments.model):
        parser.error("--data and --model need each other")
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    rows = []
    for batch in arguments.batches:
        count = batch * STEPS
        samples = file_samples(arguments.data, arguments.model, count) if arguments.data else drawn_samples(count)
        name = os.path.splitext(os.path.basename(arguments.data))[0] if arguments.data else "cvalues lengths"
        batches = [samples[i : i + batch] for i in range(0, count, batch)]
        rows.append(compare(Case(name, batch, batches), arguments.rounds))
    print("\nreal tokens per second; packed over each padded side: ratio of wall time, and of processor time")
    print(f"{'case':18}{'batch':>6}{'real/padded':>14}{'packed':>8}{'padded':>9}{'ratio':>7}{'cpu':>6}{'transformers':>14}{'ratio':>7}{'cpu':>6}")
    for r in rows:
        share = f"{r['tokens_real']}/{r['tokens_padded']}"
        print(f"{r['case']:18}{r['batch']:6}{share:>14}{r['packed speed']:8.0f}", end="")
        for name, width in (("padded", 9), ("transformers", 14)):
            print(f"{r[name + ' speed']:{width}.0f}{r[name + ' ratio']:7.2f}{r[name + ' processor']:6.2f}", end="")
        print()


if __name__ == "__main__":
    main()
