"""Generation beside transformers' `generate` and `generate_batch`: the same random models, prompts and stop tokens, greedy. One rule: equal
tokens first.

Prints JSON lines and ends with a table. `python bench/rollout.py [--rounds N] [--threads N]`; about two minutes on two cores.
`--models qwen2_25m` is a model of 25 million parameters; `--batching` adds transformers' continuous batching, `--forms` our own slower
ways: from packed copies of the weights, as where there is no C compiler, and from the trained weights.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from trueline.families.folder import load_decoder, open_folder
from trueline.model.heads import LanguageModel
from trueline.rollout.engine import Engine
from trueline.rollout.packed import PackedDecoder, can_pack
from trueline.rollout.sampling import Sampling

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "pad_token_id": None,
    "eos_token_id": None,
}
THEIRS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen2_25m": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6},
    ),
    "glm": (transformers.GlmConfig, transformers.GlmForCausalLM, {"head_dim": 32, "attention_bias": True}),
}


@dataclass(frozen=True)
class Case:
    """What both sides answer. transformers takes `batch` prompts at a time, ours has `batch` running."""

    name: str
    batch: int
    prompts: list[list[int]]
    sampling: Sampling


def cases() -> list[Case]:
    """Uniform: equal prompts and answers. Skewed: log-normal prompts, answers that stop by themselves after geometric lengths."""
    draw = torch.Generator().manual_seed(0)

    def prompt(n: int) -> list[int]:
        return torch.randint(0, SIZES["vocab_size"], (n,), generator=draw).tolist()

    lengths = torch.randn(64, generator=draw).mul(0.7).add(3.2).exp().clamp(4, 160).int().tolist()
    stops = frozenset(torch.randperm(SIZES["vocab_size"], generator=draw)[:80].tolist())
    skewed = [prompt(n) for n in lengths]
    return [
        Case("uniform", 16, [prompt(32) for _ in range(16)], Sampling(96, temperature=0)),
        Case("uniform", 64, [prompt(32) for _ in range(64)], Sampling(96, temperature=0)),
        Case("skewed", 16, skewed, Sampling(256, temperature=0, stop=stops)),
        Case("skewed", 64, skewed, Sampling(256, temperature=0, stop=stops)),
    ]


def models(kind: str, dtype: torch.dtype) -> tuple[LanguageModel, transformers.PreTrainedModel]:
    """One random model: theirs, and ours read from the folder they save it to."""
    config_class, model_class, extra = THEIRS[kind]
    torch.manual_seed(0)
    theirs = model_class(config_class(**SIZES | extra)).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return LanguageModel(load_decoder(open_folder(Path(folder)), dtype)), theirs


def ours_answer(model: LanguageModel, case: Case, packed: bool = True) -> list[list[int]]:
    engine = Engine(model, case.batch, packed=packed)
    with engine.hold():
        return [r.tokens for r in engine.generate(case.prompts, case.sampling, list(range(len(case.prompts))))]


def copies_answer(model: LanguageModel, case: Case) -> list[list[int]]:
    with patch("trueline.rollout.packed.kernels", return_value=None):
        return ours_answer(model, case)


def batched_answer(model: transformers.PreTrainedModel, case: Case) -> list[list[int]]:
    """Their continuous batching, with as many blocks as `case.batch` requests can fill: by default it takes most of the free memory.

    Without its limit on requests it would run as many as fit into those blocks. Of limits on tokens from 16 to
    2,048 none was faster than this one by more than the spread.
    """
    new, size = case.sampling.max_new_tokens, 32
    longest = max(map(len, case.prompts)) + new
    settings = ContinuousBatchingConfig(
        page_size=size,
        num_blocks=case.batch * (-(-longest // size) + 1),
        max_batch_tokens=max(256, 8 * case.batch),
        max_requests_per_batch=case.batch,
    )
    stop = sorted(case.sampling.stop)
    config = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=stop or -1)
    found = model.generate_batch(case.prompts, config, settings, progress_bar=False)
    answers = [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[1]))]
    return [answer[: next((i + 1 for i, t in enumerate(answer) if t in stop), len(answer))] for answer in answers]


@torch.inference_mode()
def theirs_answer(model: transformers.PreTrainedModel, case: Case) -> list[list[int]]:
    """Left-padded batches in the given order, each as long as its longest answer."""
    answers = []
    stop = sorted(case.sampling.stop)
    for start in range(0, len(case.prompts), case.batch):
        prompts = case.prompts[start : start + case.batch]
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        config = transformers.GenerationConfig(
            max_new_tokens=case.sampling.max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=stop or None, use_cache=True
        )
        out = model.generate(tokens, attention_mask=mask, generation_config=config)[:, longest:].tolist()
        for row in out:
            end = next((i + 1 for i, t in enumerate(row) if t in case.sampling.stop), len(row))
            answers.append(row[:end])
    return answers


def timed(answer: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of processor."""
    wall, processor = time.perf_counter(), time.process_time()
    answer()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(kind: str, case: Case, rounds: int, batching: bool, forms: bool) -> dict[str, object]:
    """Equality in float64, then float32 timings taken in turns."""
    model, peer = models(kind, torch.float64)
    few = Case(case.name, case.batch, case.prompts[: case.batch], case.sampling)
    if ours_answer(model, few) != theirs_answer(peer, few):
        raise SystemExit(f"{kind} {case.name}: greedy tokens differ in float64")
    model, peer = models(kind, torch.float32)
    packing = min(timed(lambda: PackedDecoder(model.decoder, None))[0] for _ in range(3)) if can_pack(model.decoder) else None
    sides = {"trueline": lambda: ours_answer(model, case), "transformers": lambda: theirs_answer(peer, case)}
    if batching:
        sides["batching"] = lambda: batched_answer(peer, case)
    if forms:
        sides |= {"copies": lambda: copies_answer(model, case), "trained": lambda: ours_answer(model, case, packed=False)}
    found = {side: answer() for side, answer in sides.items()}  # also the warm-up
    same = all(answers == found["trueline"] for answers in found.values())
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, answer in sides.items():
            wall, spent = timed(answer)
            seconds[side].append(wall)
            processor[side].append(spent)
    tokens = sum(map(len, found["trueline"]))
    row: dict[str, object] = {
        "bench": "rollout", "model": kind, "case": case.name, "batch": case.batch, "requests": len(case.prompts), "tokens": tokens,
        "longest": max(map(len, found["trueline"])), "identical_float64": True, "identical_float32": same,
        "threads": torch.get_num_threads(), "packing_seconds": packing,
    }  # fmt: skip
    median = {side: statistics.median(values) for side, values in seconds.items()}
    spent = {side: statistics.median(values) for side, values in processor.items()}
    ratio = median["transformers"] / median["trueline"]
    # of processor time: says the same on a machine that others use, where the wall clock does not
    processor_ratio = spent["transformers"] / spent["trueline"]
    others = [side for side in sides if side not in ("trueline", "transformers")]
    batched = {f"{side}_{name}": x[side] / x["trueline"] for name, x in (("ratio", median), ("processor", spent)) for side in others}
    for side, values in seconds.items():
        spread = {"seconds_median": median[side], "seconds_min": min(values), "seconds_max": max(values)}
        line = {**row, "side": side, **spread, "tokens_per_second": tokens / median[side], "load": os.getloadavg()[0]}
        print(json.dumps({**line, "ratio": ratio, "processor_ratio": processor_ratio, **batched}), flush=True)
    return {**row, **{side: tokens / median[side] for side in sides}, "ratio": ratio, "processor_ratio": processor_ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batching", action="store_true")
    parser.add_argument("--forms", action="store_true")
    parser.add_argument("--cases", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--models", nargs="+", default=["qwen2", "glm"], choices=sorted(THEIRS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    chosen = [cases()[number] for number in arguments.cases]
    rows = [compare(kind, case, arguments.rounds, arguments.batching, arguments.forms) for kind in arguments.models for case in chosen]
    print("\ntokens per second; ratio of wall time, and of processor time")
    print(f"{'model':8}{'case':10}{'batch':>6}{'requests':>10}{'transformers':>14}{'trueline':>10}{'ratio':>8}{'processor':>11}")
    for row in rows:
        print(
            "{model:8}{case:10}{batch:6}{requests:10}{transformers:14.0f}{trueline:10.0f}{ratio:8.2f}{processor_ratio:11.2f}".format(**row)
        )


if __name__ == "__main__":
    main()
