"""Greedy generation by trueline's engine, transformers' `generate` and its continuous batching, on `bench/rollout.py`'s models and prompts.

`python rollout_side.py {trueline,generate,batching} {uniform,skewed} BATCH`. Answers `compare.py`; readings
hold a hash of some answers in float64.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from sides import serve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rollout import Case, cases, models, ours_answer, theirs_answer  # noqa: E402

KIND = "qwen2"
BLOCK = 32  # tokens in a page of the continuous batching


def batched_answer(model: transformers.PreTrainedModel, case: Case) -> list[list[int]]:
    """transformers' continuous batching, with as many pages as `batch` of the longest requests need."""
    longest = max(map(len, case.prompts)) + case.sampling.max_new_tokens
    config = transformers.GenerationConfig(
        max_new_tokens=case.sampling.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=sorted(case.sampling.stop) or -1,
        use_cache=True,
    )
    settings = transformers.ContinuousBatchingConfig(
        block_size=BLOCK, num_blocks=case.batch * (-(-longest // BLOCK) + 1), max_batch_tokens=max(256, case.batch)
    )
    found = model.generate_batch([list(p) for p in case.prompts], generation_config=config, continuous_batching_config=settings)
    answers = {tuple(x.prompt_ids): list(x.generated_tokens) for x in found.values()}
    return [answers[tuple(p)] for p in case.prompts]


ANSWER: dict[str, Callable[[Any, Case], list[list[int]]]] = {
    "trueline": ours_answer,
    "generate": theirs_answer,
    "batching": batched_answer,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=ANSWER)
    parser.add_argument("case", choices=["uniform", "skewed"])
    parser.add_argument("batch", type=int)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    case = next(c for c in cases() if (c.name, c.batch) == (given.case, given.batch))
    few = Case(case.name, case.batch, case.prompts[:4], case.sampling)
    which, answer = int(given.side != "trueline"), ANSWER[given.side]
    exact: list[str] = []
    model = models(KIND, torch.float32)[which]

    def run() -> dict[str, Any]:
        if not exact:
            exact.append(hashlib.sha256(json.dumps(answer(models(KIND, torch.float64)[which], few)).encode()).hexdigest())
            answer(model, case)  # warm
        began = time.perf_counter()
        answers = answer(model, case)
        seconds = time.perf_counter() - began
        versions = {m.__name__: m.__version__ for m in (torch, transformers)}
        return {"seconds": [seconds], "tokens": [sum(map(len, answers))], "answers": exact[0], "losses": [], "versions": versions}

    serve(run)


if __name__ == "__main__":
    main()
