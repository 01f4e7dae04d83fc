"""Greedy generation by trueline's engine, transformers' `generate` and its continuous batching, on `bench/rollout.py`'s models and prompts.

`python rollout_side.py {trueline,generate,batching} {uniform,skewed} BATCH MODEL [--dtype auto]`. Answers `compare.py`; readings hold a
hash of some answers in float64, and in bfloat16 how far its log-probabilities are on average from those of float32.
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
from rollout import THEIRS, Case, batched_answer, cases, models, ours_answer, theirs_answer  # noqa: E402

from trueline.data.sample import answered  # noqa: E402
from trueline.model.batch import pack  # noqa: E402
from trueline.parallel.world import fast_bfloat16  # noqa: E402
from trueline.rollout.engine import Engine  # noqa: E402


def log_probability_gap(kind: str, case: Case) -> float:
    """Mean difference of our log-probabilities of bfloat16 answers from those the same weights have for them in float32."""
    model = models(kind, torch.bfloat16)[0]
    engine = Engine(model, case.batch)
    with engine.hold():
        rollouts = engine.generate(case.prompts, case.sampling, list(range(len(case.prompts))))
    batch = pack([answered(r.prompt, r.tokens, None) for r in rollouts])
    with torch.no_grad():
        expected = model.float().eval()(batch)[batch.trained]
    return float((torch.tensor([x for r in rollouts for x in r.logprobs]) - expected).abs().mean())


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
    parser.add_argument("model", choices=THEIRS)
    parser.add_argument("--dtype", choices=["float32", "auto"], default="float32")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    case = next(c for c in cases() if (c.name, c.batch) == (given.case, given.batch))
    few = Case(case.name, case.batch, case.prompts[:4], case.sampling)
    which, answer = int(given.side != "trueline"), ANSWER[given.side]
    exact: list[str] = []
    dtype = torch.bfloat16 if given.dtype == "auto" and fast_bfloat16() else torch.float32  # as for a PPO run on a model of this width
    model = models(given.model, dtype)[which]
    gap = log_probability_gap(given.model, few) if dtype == torch.bfloat16 and not which else 0.0

    def run() -> dict[str, Any]:
        if not exact:
            exact.append(hashlib.sha256(json.dumps(answer(models(given.model, torch.float64)[which], few)).encode()).hexdigest())
            answer(model, case)  # warm
        began = time.perf_counter()
        answers = answer(model, case)
        seconds = time.perf_counter() - began
        versions = {m.__name__: m.__version__ for m in (torch, transformers)}
        found = {"seconds": [seconds], "tokens": [sum(map(len, answers))], "answers": exact[0], "losses": [], "versions": versions}
        return found | {"gap": gap, "dtype": str(dtype).removeprefix("torch.")}

    serve(run)


if __name__ == "__main__":
    main()
