"""Generation of GLM-4-9B with random weights on one GPU: the decode kernel, graphs, prompts, mixed lengths. One rule: equal numbers first.

Each section has its own time and ends with a reading of what it took; all of them end within nine minutes. One JSON line per reading, a
table at the end with the targets beside what was read. NEVER RUN ON A GPU YET: every figure that is written anywhere about it is predicted.

`python bench/gpu_rollout.py [--only SECTION ...]`, on a CPU `python bench/gpu_rollout.py --small --device cpu`
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import gpu_settings  # noqa: F401 - first of what is imported
import torch
from gpu_report import COPY_RATE, MATRIX_RATE, OUT_OF_MEMORY, Report, environment, main, matmul_parameters
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trueline.config.schema import AdapterConfig
from trueline.data.sample import Sample
from trueline.model.adapters import adapter_parameters, add_adapter
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel
from trueline.rollout.decode import cached_attention, kernel_for, plain_attention
from trueline.rollout.engine import Engine
from trueline.rollout.fused import FusedDecoder, merged_bytes
from trueline.rollout.graphs import PATIENCE, CudaGraph, graphs_for
from trueline.rollout.memory import Memory
from trueline.rollout.sampling import Rollout, Sampling

EQUAL = 2e-2  # relative, bfloat16 beside float32
MUST = {1: (">= 165", ">= 195"), 32: (">= 4000", ">= 5100"), 256: (">= 15600", ">= 20300")}


@torch.inference_mode()
def kernel(report: Report) -> None:
    """One layer's attention of new tokens to 1,024 and 4,096 stored ones: the kernel beside plain PyTorch, in slots and in pages.

    What is timed is a recording, as in generation: launched from Python, small batches would show what launching takes.
    """
    config, device = report.config, report.device
    groups, size = config.num_kv_heads, config.head_dim
    batches, lengths = ((1, 32, 128, 256), (1024, 4096)) if not report.small else ((1, 4), (40,))
    there = kernel_for(torch.empty(1, dtype=report.dtype, device=device)) is not None
    report.read("decode kernel", float(there), "of 1")
    for length in lengths:
        for batch in batches:
            q = torch.randn(batch, config.num_heads, size, dtype=report.dtype, device=device)
            # so many layers that their keys and values do not stay in the cache from one run to the next
            layers = max(2, -(-(2**28) // (4 * batch * groups * length * size))) if not report.small else 2
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
                run = partial(_every_layer, side, q, keys, values, torch.full_like(counts, length))
                try:
                    spent = report.timed(CudaGraph(run, (), None).replay if report.on_gpu else run, rounds=5, warm=2)
                except RuntimeError as error:
                    report.read(f"{name}, batch {batch}, {length}: cannot be recorded", None, "GB/s", error=str(error)[:300])
                    continue
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


class MarkedEngine(Engine):
    """Notes when each step without prompts begins, and of how many requests it is: the step before it has been waited for by then."""

    def __init__(self, model: LanguageModel, running: int, packed: bool = True):
        super().__init__(model, running, packed=packed)
        self.marks: list[tuple[int, float]] = []

    def _replay(self, memory: Memory, longest: int, *inputs: Tensor) -> Tensor:
        self.marks.append((len(inputs[0]), time.perf_counter()))
        return super()._replay(memory, longest, *inputs)


def steps_of(marks: list[tuple[int, float]], rows: int) -> list[float]:
    """Seconds of each step of so many requests that another such step follows."""
    return [end - start for (count, start), (after, end) in pairwise(marks) if count == after == rows]


def answers(report: Report, engine: Engine, prompts: list[list[int]], new: int) -> tuple[list[Rollout], float]:
    """Greedy answers of `new` tokens, and the seconds they took."""
    report.synchronize()
    began = time.perf_counter()
    found = engine.generate(prompts, Sampling(new, temperature=0), list(range(len(prompts))))
    report.synchronize()
    return found, time.perf_counter() - began


def decode(report: Report) -> None:
    """Tokens a second by batch after prompts of 1,024, prompts a second, and what graphs change.

    Steps of the whole batch are timed one by one and their median counts: one in which a graph is recorded is none of the middle. Prompts
    are timed up to the first step without any. A call before compiles and records.
    """
    config, model = report.config, LanguageModel(report.decoder())
    length, new = (1024, 64) if not report.small else (24, 16)
    _compile(report)
    recorder = graphs_for(model.decoder)
    kinds = [None] if recorder is None else [recorder, None]
    for batch in (1, 32, 256, 128) if not report.small else (1, 3):
        prompts = report.tokens(batch, length).tolist()
        engine = MarkedEngine(model, batch)
        seen: list[list[Rollout]] = []
        for graphs in kinds:
            engine.graphs = graphs
            with engine.hold():
                if not seen:
                    _, warm = answers(report, engine, prompts, new)
                engine.marks.clear()
                began = time.perf_counter()
                found, seconds = answers(report, engine, prompts, new)
            steps = steps_of(engine.marks, batch)
            step = statistics.median(steps)
            recorded = {} if graphs is None else {"recordings": len(graphs.recordings), "off": graphs.off}
            name = "without graphs" if graphs is None else "with graphs" if recorded["recordings"] and not graphs.off else "graphs not used"
            weights = 2 * matmul_parameters(config)
            stored = batch * (length + new / 2) * 4 * config.num_layers * config.num_kv_heads * config.head_dim
            floor = max(weights / COPY_RATE, weights * batch / MATRIX_RATE) + stored / COPY_RATE
            must, goal = MUST.get(batch, ("", "")) if not seen else ("", "")
            report.read(
                f"decode {name}, batch {batch}", batch / step, "tokens/s", must, goal, s_step=step, s_min=min(steps), s_max=max(steps),
                n=len(steps), floor_ratio=floor / step, seconds=seconds, **recorded,
            )  # fmt: skip
            if not seen:
                read = engine.marks[0][1] - began
                report.read(f"prompts, batch {batch}", batch * length / read, "tokens/s", seconds=read, warm_up=warm, **report.memory())
            seen.append(found)
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
    """From a weight update in place to the next generated token: the weights are shared, so there is nothing to move or to record again.

    All calls are of the same lengths, so that the same memory serves them, and what a call takes without an update is taken off.
    """
    model = LanguageModel(report.decoder())
    engine = Engine(model, 1)
    prompt, new = report.tokens(1, 512 if not report.small else 16).tolist(), PATIENCE + 2  # the first call's last step is recorded
    with engine.hold():
        answers(report, engine, prompt, new)
        _, warm = answers(report, engine, prompt, new)
    spent: list[float] = []
    recorded: list[int] = []
    for _ in range(3):
        kept = dict(engine.graphs.recordings) if engine.graphs else {}
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(1.0)
        report.synchronize()
        began = time.perf_counter()
        with engine.hold():
            answers(report, engine, prompt, new)
        spent.append(time.perf_counter() - began - warm)
        recorded.append(sum(kept.get(size) is not made for size, made in engine.graphs.recordings.items()) if engine.graphs else 0)
    report.read("from update to generation", max(*spent, 0.0), "s", "<= 0.5", "<= 0.1", each=spent, warm=warm)
    off = {"off": engine.graphs.off, "recordings": len(engine.graphs.recordings)} if engine.graphs else {}
    report.read("recordings made after an update, most", float(max(recorded)), "", goal="<= 0", each=recorded, **off)


def lora(report: Report) -> None:
    """LoRA of rank 8 on every linear: what merging it for generation takes, steps with it merged and applied, and what the merge rounds."""
    decoder, batch = report.decoder(), 32 if not report.small else 3
    length, new = (1024, 32) if not report.small else (24, 16)
    config = AdapterConfig(kind="lora", targets=("q", "k", "v", "o", "gate", "up", "down"), rank=8, alpha=32.0, dropout=0.0)
    add_adapter(decoder, "policy", config, 0)
    model, draw = LanguageModel(decoder.eval(), "policy"), torch.Generator(report.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter_parameters(decoder, "policy").items():
            if name.endswith("up.weight"):
                parameter.normal_(0.0, 1e-3, generator=draw)
    with torch.inference_mode():
        spent = report.timed(partial(FusedDecoder, decoder, "policy"), rounds=3, warm=1)
    report.read("LoRA merged for generation", spent["s_median"], "s", "<= 0.5", "<= 0.1", **spent, bytes=merged_bytes(decoder, "policy"))
    prompts = report.tokens(batch, length).tolist()
    for name, packed in (("merged", True), ("applied", False)):
        engine = MarkedEngine(model, batch, packed)
        with engine.hold():
            answers(report, engine, prompts, new)
            engine.marks.clear()
            found, _ = answers(report, engine, prompts, new)
            form = type(engine.decoder).__name__
        step = statistics.median(steps_of(engine.marks, batch))
        report.read(f"decode with LoRA {name}, batch {batch}", batch / step, "tokens/s", s_step=step, form=form, **report.memory())
        gap = _logprob_gap(model, found[:8], report)
        report.read(f"log-probabilities, generated with LoRA {name} and scored", gap, "mean abs", "<= 0.01", "<= 0.003")


def mixed(report: Report) -> None:
    """256 prompts of 100 to 1,024 tokens; answers stop by themselves, at 1,024 tokens at the latest, after 562 on average.

    That is the mean of answers of 100 to 1,024, of which the targets are: of a token in 760 that stops, 760 (1 - exp(-1024 / 760)).
    """
    model = LanguageModel(report.decoder())
    vocabulary, count, most = report.config.vocab_size, 256 if not report.small else 6, 1024 if not report.small else 12
    least, longest = (100, 1024) if not report.small else (2, 9)
    lengths = torch.randint(least, longest + 1, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [report.tokens(n, seed=i).tolist() for i, n in enumerate(lengths)]
    stops = frozenset(range(0, vocabulary, 760 if not report.small else 8))
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
    """transformers' generate on a model of the same sizes, prompts of one length, where it is installed: medians of its steps.

    As it is, and without cuDNN's attention, which is planned anew for every length that keys and values grow to; the better one is the
    peer.
    """
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
    length, new = (1024, 12) if not report.small else (24, 5)

    def generate(prompts: Tensor, new: int) -> list[float]:
        """Seconds of each step after the prompts'."""
        marks: list[float] = []

        def mark(tokens: Tensor, logits: Tensor) -> Tensor:
            report.synchronize()
            marks.append(time.perf_counter())
            return logits

        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        processors = transformers.LogitsProcessorList([mark])
        with torch.inference_mode():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), logits_processor=processors, **settings)
        return [end - start for start, end in pairwise(marks)]

    generate(report.tokens(1, length).to(report.device), 2)
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for batch in (1, 32, 128) if not report.small else (2,):
        prompts = report.tokens(batch, length).to(report.device)
        rates = []
        for way, backends in (("as it is", None), ("without cuDNN's attention", others)):
            name = f"transformers generate, batch {batch}, {way}"
            try:
                with nullcontext() if backends is None else sdpa_kernel(backends):
                    steps = generate(prompts, new)
            except OUT_OF_MEMORY as error:
                report.read(f"{name}: out of memory", None, "tokens/s", error=str(error).splitlines()[0])
                continue
            step = statistics.median(steps)
            rates.append(batch / step)
            spent = {"s_step": step, "s_min": min(steps), "s_max": max(steps), "n": len(steps)}
            report.read(name, rates[-1], "tokens/s", **spent, version=transformers.__version__)
        report.read(f"transformers generate, batch {batch}, the better one", max(rates, default=None), "tokens/s")


SECTIONS = [
    ("environment", 15.0, environment),
    ("kernel", 60.0, kernel),
    ("decode", 200.0, decode),
    ("hand_over", 30.0, hand_over),
    ("lora", 40.0, lora),
    ("mixed", 90.0, mixed),
    ("theirs", 90.0, theirs),
]

if __name__ == "__main__":
    main("gpu_rollout", __doc__, 530.0, SECTIONS)
