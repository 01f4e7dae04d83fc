"""Generation of GLM-4-9B with random weights on one GPU: the decode kernel, graphs, prompts, mixed lengths. One rule: equal numbers first.

Each section has its own time and ends with a reading of what it took; all of them end within nine minutes. One JSON line per reading, a
table at the end with the targets beside what was read. NEVER RUN ON A GPU YET: every figure that is written anywhere about it is predicted.

`python bench/gpu_rollout.py [--only SECTION ...]`, on a CPU `python bench/gpu_rollout.py --small --device cpu`
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial

import torch
from gpu_report import COPY_RATE, MATRIX_RATE, OUT_OF_MEMORY, Report, environment, main, matmul_parameters
from torch import Tensor

from trueline.data.sample import Sample
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel
from trueline.rollout.decode import cached_attention, kernel_for, plain_attention
from trueline.rollout.engine import Engine
from trueline.rollout.graphs import graphs_for
from trueline.rollout.sampling import Rollout, Sampling

EQUAL = 2e-2  # relative, bfloat16 beside float32
MUST = {1: (">= 165", ">= 195"), 32: (">= 4000", ">= 5100"), 256: (">= 15600", ">= 20300")}


def kernel(report: Report) -> None:
    """One layer's attention of new tokens to 1,024 and 4,096 stored ones: the kernel beside plain PyTorch, in slots and in pages."""
    config, device = report.config, report.device
    groups, size = config.num_kv_heads, config.head_dim
    batches, lengths = ((1, 32, 128, 256), (1024, 4096)) if not report.small else ((1, 4), (40,))
    there = kernel_for(torch.empty(1, dtype=report.dtype, device=device)) is not None
    report.read("decode kernel", float(there), "of 1")
    for length in lengths:
        for batch in batches:
            q = torch.randn(batch, config.num_heads, size, dtype=report.dtype, device=device)
            # so many layers that their keys and values do not stay in the cache from one run to the next
            layers = max(2, -(-(2**28) // (4 * batch * groups * length * size))) if report.on_gpu else 2
            shape = (layers, batch, groups, length, size)
            keys, values = (torch.randn(shape, dtype=report.dtype, device=device) for _ in range(2))
            counts = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(0)).int()
            counts[0] = length
            counts = counts.to(device)
            expected = plain_attention(q.float(), keys[0].float(), values[0].float(), counts)
            gaps = [_gap(cached_attention(q, keys[0], values[0], counts), expected)]
            pages, table = _paged(keys[0], values[0])
            gaps.append(_gap(cached_attention(q, *pages, counts, None, table), expected))
            report.read(f"gap to float32, batch {batch}, {length}", max(gaps), "relative", must=f"<= {EQUAL}", gaps=gaps)
            sides: list[tuple[str, Callable[..., Tensor]]] = [("kernel", cached_attention)] if there else []
            for name, side in [*sides, ("plain", plain_attention)]:

                spent = report.timed(partial(_every_layer, side, q, keys, values, torch.full_like(counts, length)), rounds=5, warm=2)
                rate = (keys.nbytes + values.nbytes) / spent["s_median"]
                report.read(f"{name}, batch {batch}, {length}", rate / 1e9, "GB/s", **spent, layers=layers, ratio=rate / COPY_RATE)


def _every_layer(side: Callable[..., Tensor], q: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> None:
    for k, v in zip(keys, values, strict=True):
        side(q, k, v, counts)


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _paged(keys: Tensor, values: Tensor, size: int = 16) -> tuple[list[Tensor], Tensor]:
    """The same numbers in pages of `size` tokens in any order, and the table that finds them."""
    rows, groups, length, channels = keys.shape
    most = -(-length // size)
    order = torch.randperm(rows * most, generator=torch.Generator().manual_seed(0)).to(keys.device)
    stored = []
    for part in (keys, values):
        padded = torch.nn.functional.pad(part, (0, 0, 0, most * size - length))
        pages = torch.empty(rows * most, groups, size, channels, dtype=part.dtype, device=part.device)
        pages[order] = padded.unflatten(2, (most, size)).transpose(1, 2).flatten(0, 1)
        stored.append(pages)
    return stored, order.view(rows, most).int()


def answers(report: Report, engine: Engine, prompts: list[list[int]], new: int) -> tuple[list[Rollout], float]:
    """Greedy answers of `new` tokens, and the seconds they took."""
    report.synchronize()
    began = time.perf_counter()
    found = engine.generate(prompts, Sampling(new, temperature=0), list(range(len(prompts))))
    report.synchronize()
    return found, time.perf_counter() - began


def decode(report: Report) -> None:
    """Tokens a second by batch after prompts of 1,024, prompts a second, and what graphs change.

    A step is what a longer answer takes more, so prompts and recordings, which both answers pay for, do not count.
    """
    model = LanguageModel(report.decoder())
    length, new = (1024, 32) if not report.small else (24, 16)
    _compile(report)
    kinds = [("with graphs", graphs_for(model.decoder)), ("without", None)]
    kinds = [kind for kind in kinds if kind[0] == "without" or kind[1] is not None]
    for batch in (1, 32, 256, 128) if not report.small else (1, 3):
        prompts = report.tokens(batch, length).tolist()
        engine = Engine(model, batch)
        seen: list[list[Rollout]] = []
        for name, graphs in kinds:
            engine.graphs = graphs
            with engine.hold():
                _, half = answers(report, engine, prompts, new)
                found, whole = answers(report, engine, prompts, 2 * new)
            seen.append(found)
            step = (whole - half) / new
            weights = 2 * matmul_parameters(report.config)
            stored = batch * (length + 1.5 * new) * 4 * report.config.num_layers * report.config.num_kv_heads * report.config.head_dim
            floor = max(weights / COPY_RATE, weights * batch / MATRIX_RATE) + stored / COPY_RATE
            must, goal = MUST.get(batch, ("", "")) if name == "with graphs" else ("", "")
            report.read(f"decode {name}, batch {batch}", batch / step, "tokens/s", must, goal, s_step=step, floor_ratio=floor / step)
            if name == kinds[0][0]:
                report.read(f"prompts, batch {batch}", batch * length / (half - new * step), "tokens/s", **report.memory())
        gap = _logprob_gap(model, seen[0][:8], report)
        report.read(f"log-probabilities, generated and scored, batch {batch}", gap, "mean abs", "<= 0.01", "<= 0.003")
        if len(seen) > 1:
            same = sum(a.tokens == b.tokens for a, b in zip(*seen, strict=True)) / batch
            report.read(f"answers equal with and without graphs, batch {batch}", same, "share")


def _compile(report: Report) -> None:
    """Every variant of the kernels there can be, so that none is compiled while a step is timed."""
    config = report.config
    q = torch.randn(1, config.num_heads, config.head_dim, dtype=report.dtype, device=report.device)
    stored = torch.randn(1, config.num_kv_heads, 64, config.head_dim, dtype=report.dtype, device=report.device)
    if (found := kernel_for(q)) is not None:
        for power in range(7):
            found(q, stored, stored, torch.ones(1, dtype=torch.int32, device=report.device), None, None, 2**power)


def _logprob_gap(model: LanguageModel, rollouts: list[Rollout], report: Report) -> float:
    samples = [Sample(r.prompt + r.tokens, [False] * len(r.prompt) + [True] * len(r.tokens)) for r in rollouts]
    batch = pack(samples).to(report.device)
    with torch.inference_mode():
        scored = model(batch)[batch.trained].cpu()
    made = torch.tensor([x for r in rollouts for x in r.logprobs])
    return float((scored - made).abs().mean())


def hand_over(report: Report) -> None:
    """From a weight update in place to the next generated token: the weights are shared, so there is nothing to move."""
    model = LanguageModel(report.decoder())
    engine = Engine(model, 1)
    prompt = report.tokens(1, 16).tolist()
    with engine.hold():
        answers(report, engine, prompt, 3)
        _, warm = answers(report, engine, prompt, 2)
    spent = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(1.0)
        report.synchronize()
        began = time.perf_counter()
        with engine.hold():
            answers(report, engine, prompt, 2)
        spent.append(time.perf_counter() - began - warm)
    report.read("from update to generation", max(*spent, 0.0), "s", "<= 0.5", "<= 0.1", each=spent, warm=warm)


def mixed(report: Report) -> None:
    """256 prompts of 100 to 1,024 tokens; answers stop by themselves after about 560 on average, 1,024 at most."""
    model = LanguageModel(report.decoder())
    vocabulary, count, most = report.config.vocab_size, 256 if not report.small else 6, 1024 if not report.small else 12
    least, longest = (100, 1024) if not report.small else (2, 9)
    lengths = torch.randint(least, longest + 1, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [report.tokens(n, seed=i).tolist() for i, n in enumerate(lengths)]
    stops = frozenset(range(0, vocabulary, 560 if not report.small else 8))
    engine = Engine(model, count)
    with engine.hold():
        report.synchronize()
        began = time.perf_counter()
        found = engine.generate(prompts, Sampling(most, stop=stops), list(range(count)))
        report.synchronize()
        seconds = time.perf_counter() - began
    made = [len(r.tokens) for r in found]
    report.read(
        f"{count} mixed requests, answers of {sum(made) / count:.0f} on average", sum(made) / seconds, "tokens/s", ">= 6000", ">= 10000",
        shortest=min(made), longest=max(made), seconds=seconds, **report.memory(),
    )  # fmt: skip


def theirs(report: Report) -> None:
    """transformers' generate on a model of the same sizes, prompts of one length, where it is installed."""
    if importlib.util.find_spec("transformers") is None:
        report.read("transformers is not installed", None, "")
        return
    transformers = importlib.import_module("transformers")
    config = report.config
    sizes = transformers.GlmConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim, attention_bias=True, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None,
        max_position_embeddings=8192,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(report.dtype)
    try:
        with report.device:
            model = transformers.GlmForCausalLM(sizes).eval()
    finally:
        torch.set_default_dtype(before)
    length, new = (1024, 17) if not report.small else (24, 5)
    for batch in (1, 32, 128) if not report.small else (2,):
        prompts = report.tokens(batch, length).to(report.device)

        def generate(count: int, prompts: Tensor = prompts) -> float:
            report.synchronize()
            began = time.perf_counter()
            settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            with torch.inference_mode():
                model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
            report.synchronize()
            return time.perf_counter() - began

        try:
            generate(2)
            step = (generate(new) - generate(1)) / (new - 1)
            report.read(f"transformers generate, batch {batch}", batch / step, "tokens/s", s_step=step, version=transformers.__version__)
        except OUT_OF_MEMORY as error:
            report.read(f"transformers generate, batch {batch}: out of memory", None, "tokens/s", error=str(error).splitlines()[0])


SECTIONS = [
    ("environment", 15.0, environment),
    ("kernel", 60.0, kernel),
    ("decode", 200.0, decode),
    ("hand_over", 30.0, hand_over),
    ("mixed", 90.0, mixed),
    ("theirs", 100.0, theirs),
]

if __name__ == "__main__":
    main("gpu_rollout", __doc__, 530.0, SECTIONS)
