"""Training of GLM-4-9B with random weights on one GPU: attention, loss, LoRA, DPO, all weights, compiled layers.

One rule: equal numbers first, then times.

Each section has its own time and ends with a reading of what it took; all of them end within nine minutes. One JSON line per reading, a
table at the end with the targets beside what was read. NEVER RUN ON A GPU YET: every figure that is written anywhere about it is predicted.

`python bench/gpu_train.py [--only SECTION ...]`, on a CPU `python bench/gpu_train.py --small --device cpu`
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import gpu_settings  # noqa: F401 - first of what is imported
import torch
import torch.nn.functional as F
from gpu_report import MATRIX_RATE, OUT_OF_MEMORY, PEAK_RATE, Report, attention_flops, environment, main, matmul_parameters
from torch import Tensor, nn

from trueline.config.schema import AdapterConfig, DpoConfig, OptimizerConfig
from trueline.data.sample import Pair, Sample
from trueline.data.shared import shared_pairs
from trueline.errors import RunError, UserError
from trueline.model import heads
from trueline.model.adapters import add_adapter, remove_adapter, trainable
from trueline.model.attention import packed_attention, runs, varlen_kernel_for
from trueline.model.batch import Batch, pack, pack_pairs
from trueline.model.compiled import check_compiler
from trueline.model.decoder import Decoder
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World
from trueline.recipes.dpo import JudgedBatch, dpo_objective
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train.optimizer import Optimizer, make_optimizer
from trueline.train.step import OutOfMemory, train_step

EQUAL = 2e-2  # relative, bfloat16 beside float32


def attention(report: Report) -> None:
    """The packed kernel beside SDPA in float32, then its times at 16k tokens."""
    config = report.config
    share = config.num_heads // config.num_kv_heads

    def draw(tokens: int, dtype: torch.dtype) -> list[Tensor]:
        counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        drawn = [torch.randn(tokens, n, config.head_dim, device=report.device, dtype=dtype) for n in counts]
        return [x.requires_grad_() for x in drawn]

    lengths = (300, 129, 83)
    found = draw(512, report.dtype)
    out = packed_attention(*found, lengths)
    out.float().square().sum().backward()
    wide = [x.detach().float().requires_grad_() for x in found]
    expected = torch.cat([_dense(q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)) for q, k, v in _cut(wide, lengths)])
    expected.square().sum().backward()
    gaps = [_gap(out, expected), *(_gap(x.grad, y.grad) for x, y in zip(found, wide, strict=True))]  # type: ignore[arg-type]
    report.read("gap to float32 attention: out, q, k, v (worst)", max(gaps), "relative", must=f"<= {EQUAL}", gaps=gaps)
    kernel = varlen_kernel_for(found[0])
    grouped = kernel is not None and runs(kernel, report.device, share)
    report.read("varlen kernel, and with shared heads", float(kernel is not None) + float(grouped), "of 2")
    for length in (2048, 4096, 8192) if not report.small else (64, 128):
        count = (16384 if not report.small else 256) // length
        parts = draw(length * count, report.dtype)
        flops = count * length * attention_flops(replace(config, num_layers=1), length)

        def forward(parts: list[Tensor] = parts, length: int = length, count: int = count) -> Tensor:
            return packed_attention(*parts, (length,) * count)

        spent = report.timed(lambda forward=forward: forward().sum().backward(), rounds=5, warm=2)
        report.read(f"attention forward and backward, {length}", 3.5 * flops / spent["s_median"] / 1e12, "TFLOP/s", **spent)
        with torch.no_grad():
            spent = report.timed(forward, rounds=5, warm=2)
        report.read(f"attention forward, {length}", flops / spent["s_median"] / 1e12, "TFLOP/s", **spent)


def _cut(parts: list[Tensor], lengths: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(lengths) for x in parts), strict=True))


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    unseen = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


def _gap(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def loss(report: Report) -> None:
    """The head's log-probabilities in chunks beside whole logits: a decoder without layers, so that nothing else counts."""
    decoder = report.decoder(layers=0)
    model = LanguageModel(decoder)
    assert decoder.head is not None
    head: nn.Linear = decoder.head
    for count in (4096, 8192) if not report.small else (256,):
        batch = pack([Sample(report.tokens(count).tolist(), [True] * count)]).to(report.device)

        def whole(batch: Batch = batch) -> Tensor:
            logits = head(decoder(batch.tokens, batch.layout))[:-1].float()
            return -F.cross_entropy(logits, batch.tokens[1:], reduction="none")

        with torch.no_grad():
            gap = float((model(batch)[1:] - whole()).abs().mean())
        report.read(f"gap to whole logits, {count} tokens", gap, "mean abs", must=f"<= {EQUAL}")
        sides: list[tuple[str, Callable[[], Tensor], int | None]] = [("whole logits", whole, None)]
        sides += [(f"chunks of {n}", lambda batch=batch: model(batch), n) for n in (256, 2048, 8192)]
        kept = heads.CHUNK
        for name, side, chunk in sides:
            report.clean()
            heads.CHUNK = chunk or kept
            try:
                spent = report.timed(lambda side=side: side().sum().backward(), rounds=3)
                report.read(f"loss, {count} tokens, {name}", spent["s_median"] * 1e3, "ms", **spent, **report.memory())
            except OUT_OF_MEMORY:
                report.read(f"loss, {count} tokens, {name}: out of memory", None, "ms")
            finally:
                heads.CHUNK = kept
                decoder.zero_grad()


class Trainer:
    """One model in training. `kind` is lora or full; `early`: each weight is updated within the backward pass."""

    def __init__(self, report: Report, decoder: Decoder, kind: str, states: str = "float32", dropout: float = 0.1, early: bool = False):
        self.report, self.decoder = report, decoder
        self.role = "policy" if kind == "lora" else None
        if self.role is not None:
            add_adapter(decoder, self.role, AdapterConfig(kind="lora", targets=("q", "k", "v"), rank=8, alpha=32, dropout=dropout), 0)
        parameters = trainable(decoder, self.role, kind)  # type: ignore[arg-type]
        self.max_norm = None if early else 1.0
        settings = {"in_backward": True, "max_norm": None} if early else {}
        self.optimizer: Optimizer = make_optimizer(parameters, OptimizerConfig(states=states, **settings))  # type: ignore[arg-type]
        self.model = LanguageModel(decoder, self.role).train()
        self.steps = 0

    def update(self, batch: Batch) -> float:
        return self.learn(batch, sft_objective(self.model), count_tokens)

    def learn(self, batch: object, objective: Callable, count: Callable) -> float:
        self.steps += 1
        settings = {"world": World(0, 1, self.report.device), "max_norm": self.max_norm, "lr": 1e-5, "step": self.steps, "seed": 0}
        try:
            return train_step(self.optimizer, [batch], objective, count, **settings)["loss"]
        except RunError as error:
            if "out of memory" not in str(error):
                raise
            raise OutOfMemory(str(error)) from None  # also of a step that cannot be tried again: an update within the backward pass

    def end(self) -> None:
        self.optimizer.clear()
        if self.role is not None:
            remove_adapter(self.decoder, self.role)
        recompute(self.decoder, 0)


def recompute(decoder: Decoder, share: float) -> None:
    decoder.recompute = round(share * len(decoder.layers))


def sequences(report: Report, length: int, count: int) -> Batch:
    return pack([Sample(report.tokens(length, seed=i).tolist(), [True] * length) for i in range(count)]).to(report.device)


def rates(report: Report, name: str, kind: str, length: int, tokens: int, spent: dict[str, float], must: str = "", goal: str = "") -> None:
    """Tokens a second with floor ratio (useful operations; nothing recomputed counts) and model FLOP utilisation."""
    config = report.config
    rate = tokens / spent["s_median"]
    matmul, seen = 2.0 * matmul_parameters(config), attention_flops(config, length)
    useful = (3 * matmul if kind == "full" else 2 * matmul) + 3 * seen
    report.read(
        name, rate, "tokens/s", must, goal, **spent, **report.memory(), floor_ratio=rate * useful / MATRIX_RATE,
        utilisation=rate * (3 * matmul + 6 * seen) / PEAK_RATE if kind == "full" else None, useful_tflops=rate * useful / 1e12,
    )  # fmt: skip


def lora_memory(report: Report) -> None:
    """The old demo's settings filled to 1,024 tokens, recompute on; then longer."""
    decoder = report.decoder()
    bounds = {1024: ("<= 20400", "<= 19500"), 2048: ("<= 21531", ""), 4096: ("", "<= 21531")}
    for length in (1024, 2048, 4096, 8192) if not report.small else (64,):
        trainer = Trainer(report, decoder, "lora")
        recompute(decoder, 1)
        report.clean()
        batch = sequences(report, length, 1)
        losses = [trainer.update(batch) for _ in range(2)]
        memory = report.memory()
        must, goal = bounds.get(length, ("", ""))
        report.read(f"LoRA, one sequence of {length}: device memory", memory.get("device_used"), "MiB", must, goal, losses=losses, **memory)
        trainer.end()


def lora_speed(report: Report) -> None:
    """Packed sequences of 4,096, 16,384 tokens in all; nothing, half and everything recomputed, equal losses first."""
    decoder = report.decoder()
    length, count = (4096, 4) if not report.small else (64, 4)
    batch = sequences(report, length, count)
    first: list[float] = []
    for share, name in ((0.0, "nothing"), (0.5, "half"), (1.0, "everything")):
        trainer = Trainer(report, decoder, "lora", dropout=0.0)
        recompute(decoder, share)
        report.clean()
        try:
            first.append(trainer.update(batch))
            spent = report.timed(lambda trainer=trainer: trainer.update(batch), rounds=5 if not report.small else 2)
            bounds = (">= 10500", ">= 14000") if share == 0 else ("", "")
            rates(report, f"LoRA, {count} x {length}, {name} recomputed", "lora", length, length * count, spent, *bounds)
        except OUT_OF_MEMORY as error:
            report.read(f"LoRA, {name} recomputed: out of memory", None, "tokens/s", error=str(error).splitlines()[0])
        trainer.end()
    if first:
        report.read("losses apart, by what is recomputed", max(first) - min(first), "loss", must="<= 0.0001", losses=first)


def dpo(report: Report) -> None:
    """Pairs of 512 / 512 / 512 against stored references, prompts run twice and once."""
    decoder = report.decoder()
    size, count = (512, 8) if not report.small else (32, 2)
    trainer = Trainer(report, decoder, "lora", dropout=0.0)
    pairs = []
    for i in range(count):
        prompt, *answers = (report.tokens(size, seed=3 * i + j).tolist() for j in range(3))
        pairs.append(Pair(*(Sample(prompt + answer, [False] * size + [True] * size) for answer in answers)))
    kinds = [("prompts run twice", pairs), ("prompts run once", list(shared_pairs(pairs)))]
    reference = torch.zeros(2 * count, device=report.device)
    logprobs = []
    for name, some in kinds:
        report.clean()
        batch = pack_pairs(some).to(report.device)
        with torch.no_grad():
            logprobs.append(trainer.model(batch))
        judged = JudgedBatch(batch, reference)
        objective = dpo_objective(trainer.model, DpoConfig())
        spent = report.timed(partial(trainer.learn, judged, objective, lambda _: {"pairs": count}), rounds=3)
        must, goal = (">= 17000", ">= 22000") if name.endswith("once") else ("", "")
        report.read(f"DPO LoRA, {name}: tokens as if twice", count * 4 * size / spent["s_median"], "tokens/s", must, goal, **spent)
        report.read(f"DPO LoRA, {name}", count / spent["s_median"], "pairs/s", **report.memory())
    apart = float((logprobs[0] - logprobs[1]).abs().mean())
    report.read("log-probabilities apart, prompts once and twice", apart, "mean abs", "<= 0.02")
    trainer.end()


def full(report: Report) -> None:
    """All weights, each kind of states with its gradients summed first and used as they are made; the slowest states last.

    With bfloat16 states nothing is recomputed. Predicted for 9.4 billion weights in MiB, first and second way: bfloat16 108,000 to 123,000
    both ways (by what torch keeps of norms), float32 126,000 and 114,000, int8 55,000 and 40,000.
    """
    kinds = (("bfloat16", 4096, 2), ("float32", 4096, 1), ("int8", 768, 1))
    for (states, length, count), early in [(kind, way) for kind in kinds for way in (False, True)]:
        speed = (">= 8300", ">= 10400") if states == "bfloat16" else ("", "")
        bounds = {"int8": ("<= 80935", "<= 42000" if early else "<= 58000"), "float32": ("<= 142336", "<= 134144")}.get(states, ("", ""))
        decoder = report.decoder()
        if report.small:
            length = 64
            decoder.bfloat16()
        recompute(decoder, 0 if states == "bfloat16" else 1)
        report.clean()
        trainer = None
        name = f"all weights, {states}{', in backward' if early else ''}, {count} x {length}"
        try:
            trainer = Trainer(report, decoder, "full", states, early=early)
            batch = sequences(report, length, count)
            loss = trainer.update(batch)
            spent = report.timed(partial(trainer.update, batch), rounds=3 if not report.small else 1)
            rates(report, name, "full", length, length * count, spent, *speed)
            memory = report.memory()
            report.read(f"{name}: device memory", memory.get("device_used"), "MiB", *bounds, loss=loss, **memory)
        except OUT_OF_MEMORY as error:
            report.read(f"{name}: out of memory", None, "MiB", *bounds, error=str(error).splitlines()[0])
        del trainer, decoder
        report.clean()


def compiled(report: Report) -> None:
    """LoRA on packed sequences of 4,096 with and without model.compile, in turns; equal losses first, and what compiling took."""
    try:
        check_compiler(report.device)
    except UserError as error:
        report.read("skipped: nothing can be compiled here", None, "", reason=str(error))
        return
    decoder = report.decoder()
    length, count = (4096, 4) if not report.small else (64, 4)
    batch = sequences(report, length, count)
    losses: list[float] = []
    for name in ("as they are", "compiled", "as they are, again", "compiled, again"):
        trainer = Trainer(report, decoder, "lora", dropout=0.0)
        decoder.compile_layers = name.startswith("compiled")
        report.clean()
        began = time.perf_counter()
        losses.append(trainer.update(batch))
        report.read(f"first step, layers {name}", time.perf_counter() - began, "s")
        spent = report.timed(lambda trainer=trainer: trainer.update(batch), rounds=3 if not report.small else 2)
        rates(report, f"LoRA, {count} x {length}, layers {name}", "lora", length, length * count, spent)
        trainer.end()
    report.read("losses apart, compiled or not", max(losses) - min(losses), "loss", must="<= 0.01", losses=losses)


SECTIONS = [
    ("environment", 20.0, environment),
    ("attention", 40.0, attention),
    ("loss", 40.0, loss),
    ("lora_memory", 80.0, lora_memory),
    ("lora_speed", 100.0, lora_speed),
    ("dpo", 60.0, dpo),
    ("full", 180.0, full),
    ("compiled", 240.0, compiled),  # of the time that the others leave
]

if __name__ == "__main__":
    main("gpu_train", __doc__, 530.0, SECTIONS)
