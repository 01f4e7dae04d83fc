"""What the benchmarks for a GPU share: sections with a time of their own, one JSON line for each reading, a table, and the model.

One rule: a section that fails, runs out of memory or out of time says so and leaves the others theirs. Import `gpu_settings` first.
"""

import argparse
import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trueline.families.folder import materialise
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.train.step import OutOfMemory

GLM4 = DecoderConfig(
    vocab_size=151552, hidden_size=4096, num_layers=40, num_heads=32, num_kv_heads=2, head_dim=128, mlp_size=13696, norm_eps=1.5625e-7,
    rope="interleaved", rope_dim=64,
)  # fmt: skip
GLM4_PARAMETERS = 9_399_951_360
SMALL = DecoderConfig(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=96, rope="interleaved", rope_dim=8
)
MATRIX_RATE, COPY_RATE = 788e12, 4.3e12  # an H200's bfloat16 products of random data, and copies, as once measured; floors are from these
PEAK_RATE = 989e12  # the data sheet's, which model FLOP utilisation is quoted against
AGAIN = 5.0  # seconds from one Cut to the next
OUT_OF_MEMORY = (torch.OutOfMemoryError, OutOfMemory)


class Cut(BaseException):
    """A section's time is over. No Exception: torch's compiler would take it for one of its own."""


class Report:
    """Runs sections and keeps their readings. `seconds` bounds all of them together."""

    def __init__(self, bench: str, arguments: argparse.Namespace, seconds: float):
        self.bench, self.small, self.seconds = bench, arguments.small, seconds
        self.device = torch.device(arguments.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.config = SMALL if self.small else GLM4
        self.machine = torch.cuda.get_device_name(self.device) if self.on_gpu else platform.processor() or "cpu"
        self.began = time.monotonic()
        self.rows: list[dict[str, object]] = []
        self.failed: list[str] = []
        self.section_name = ""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def read(self, name: str, value: float | None, unit: str, must: str = "", goal: str = "", **more: object) -> None:
        """One reading. `must` and `goal` are bounds such as `<= 20400`, met or not; small models meet none, and are not asked to."""
        row: dict[str, object] = {"bench": self.bench, "section": self.section_name, "name": name, "value": value, "unit": unit}
        if not self.small:
            for kind, bound in (("must", must), ("goal", goal)):
                if bound:
                    row |= {kind: bound, f"{kind}_met": value is not None and _meets(value, bound)}
        self.rows.append(row | more)
        model = "glm-4-9b, random weights" if not self.small else "small, random weights"
        print(json.dumps(row | more | {"model": model, "device": self.machine, "load": os.getloadavg()[0]}), flush=True)

    def run(self, sections: list[tuple[str, float, Callable[["Report"], None]]]) -> int:
        """Every section in turn -> exit status, 1 when one failed. After an error that the device does not recover from all are skipped."""
        lost = False
        for name, seconds, section in sections:
            self.section_name = name
            if lost:
                self.read("skipped: the device failed before", None, "")
                continue
            left = self.seconds - (time.monotonic() - self.began)
            began = time.monotonic()
            try:
                if left < 1:
                    raise Cut
                with _alarm(min(seconds, left)):
                    section(self)
            except Cut:
                self.read("cut: out of time", time.monotonic() - began, "s", budget=seconds)
            except OUT_OF_MEMORY as error:
                self.read("out of memory", None, "", error=str(error).splitlines()[0])
            except Exception as error:
                traceback.print_exc()
                self.failed.append(name)
                self.read("failed", None, "", error=f"{type(error).__name__}: {error}"[:300])
            self.read("section", time.monotonic() - began, "s", budget=seconds)
            try:
                self.clean()
            except RuntimeError as error:
                lost = True
                self.failed.append(name)
                self.read("the device failed", None, "", error=f"{type(error).__name__}: {error}"[:300])
        self.table()
        return 1 if self.failed else 0

    def clean(self) -> None:
        gc.collect()
        self.synchronize()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def table(self) -> None:
        print(f"\n{'section':14}{'reading':58}{'value':>14} {'unit':12}{'must':>12} {'met':5}{'goal':>12} met")
        for row in self.rows:
            value = f"{row['value']:,.4g}" if isinstance(row["value"], float) and abs(row["value"]) < 100 else f"{row['value'] or 0:,.0f}"
            value = "-" if row["value"] is None else value
            met = ["" if kind not in row else "yes" if row[f"{kind}_met"] else "NO" for kind in ("must", "goal")]
            print(
                f"{row['section']:14}{row['name']:58}{value:>14} {row['unit']:12}{row.get('must', ''):>12} {met[0]:5}"
                f"{row.get('goal', ''):>12} {met[1]}",
                flush=True,
            )

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self, run: Callable[[], object], rounds: int = 5, warm: int = 1) -> dict[str, float]:
        """Median, least and most seconds of a run, on the wall, the device waited for."""
        seconds = []
        for i in range(warm + rounds):
            self.synchronize()
            began = time.perf_counter()
            run()
            self.synchronize()
            if i >= warm:
                seconds.append(time.perf_counter() - began)
        return {"s_median": statistics.median(seconds), "s_min": min(seconds), "s_max": max(seconds), "n": float(rounds)}

    def memory(self) -> dict[str, float]:
        """MiB: most allocated, most reserved, and what the whole device shows as used (what nvidia-smi shows)."""
        if not self.on_gpu:
            return {}
        free, total = torch.cuda.mem_get_info()
        mib = 2**20
        peaks = {"peak_allocated": torch.cuda.max_memory_allocated() / mib, "peak_reserved": torch.cuda.max_memory_reserved() / mib}
        return peaks | {"device_used": (total - free) / mib}

    def tokens(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, self.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))

    def decoder(self, layers: int | None = None) -> Decoder:
        """The model of random weights, made in place on the device: no second copy exists anywhere."""
        config = self.config if layers is None else DecoderConfig(**{**vars(self.config), "num_layers": layers})
        with torch.device("meta"):
            decoder = Decoder(config).to(self.dtype)
        count = sum(p.numel() for p in decoder.parameters())
        if layers is None and not self.small and count != GLM4_PARAMETERS:
            raise AssertionError(f"{count:,} parameters, expected {GLM4_PARAMETERS:,}")
        materialise(decoder, self.dtype, self.device)
        init_weights(decoder, torch.Generator(self.device).manual_seed(0))
        return decoder.eval()


def environment(report: Report) -> None:
    """Versions, and the two ceilings that floors are counted from."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda or ""}
    rows, columns, inner = (8192, 8192, 8192) if not report.small else (256, 256, 256)
    a, b = (torch.randn(n, m, dtype=report.dtype, device=report.device) for n, m in ((rows, inner), (inner, columns)))
    spent = report.timed(lambda: a @ b, rounds=10, warm=3)
    report.read("matrix product", 2 * rows * columns * inner / spent["s_median"] / 1e12, "TFLOP/s", **spent, **versions)
    source = torch.randn(2**30 if not report.small else 2**20, dtype=report.dtype, device=report.device)
    target = torch.empty_like(source)
    spent = report.timed(lambda: target.copy_(source), rounds=10, warm=3)
    report.read("copy, read and written", 2 * source.nbytes / spent["s_median"] / 1e12, "TB/s", **spent)
    report.read("memory", torch.cuda.mem_get_info()[1] / 2**20 if report.on_gpu else None, "MiB", **report.memory())


def matmul_parameters(config: DecoderConfig) -> int:
    """Weights of matrix products: all but the input embedding, norms and biases."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.mlp_size) + config.hidden_size * config.vocab_size


def attention_flops(config: DecoderConfig, length: int) -> float:
    """Of one token's forward pass in all layers, causal, in sequences of `length`."""
    return 2.0 * config.num_heads * config.head_dim * length * config.num_layers


def arguments_of(description: str | None, name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="a small model, to see that everything runs")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections and no others")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.small:
        parser.error("nine billion weights are for a GPU; on a CPU use --small")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; use --small --device cpu to see that everything runs")
    return arguments


def main(bench: str, description: str | None, seconds: float, sections: list[tuple[str, float, Callable[[Report], None]]]) -> None:
    arguments = arguments_of(description, f"bench/{bench}.py")
    chosen = [section for section in sections if not arguments.only or section[0] in arguments.only]
    sys.exit(Report(bench, arguments, seconds).run(chosen))


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises Cut in here after so many seconds; a kernel that is running is waited for.

    And again every few seconds until it is heard: a finalizer that runs at that moment swallows whatever is raised in it.
    """

    def cut(number: int, frame: object) -> None:
        raise Cut

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _meets(value: float, bound: str) -> bool:
    sign, number = bound.split()
    return value <= float(number) if sign == "<=" else value >= float(number)
