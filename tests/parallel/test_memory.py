"""Free memory, from files that look like a machine's."""

from pathlib import Path

import torch

from trueline.parallel.memory import UNKNOWN, free_memory, free_on_host, zeros_on_demand


def test_free_memory_is_the_lowest_of_machine_and_control_groups(tmp_path: Path) -> None:
    def write(files: dict[str, str]) -> int:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return free_on_host(tmp_path)

    assert write({"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  4000 kB\n"}) == 4000 * 1024
    group = "sys/fs/cgroup/a/b"
    assert write({"proc/self/cgroup": "0::/a/b\n", f"{group}/memory.max": "max\n", f"{group}/memory.current": "7\n"}) == 4000 * 1024
    assert write({f"{group}/memory.max": "5000\n", f"{group}/memory.stat": "anon 3\ninactive_file 100\n"}) == 5000 - 7 + 100
    assert write({"sys/fs/cgroup/a/memory.max": "900\n", "sys/fs/cgroup/a/memory.current": "1000\n"}) == 0
    old = "sys/fs/cgroup/memory/c"
    limits = {f"{old}/memory.limit_in_bytes": "3000\n", f"{old}/memory.usage_in_bytes": "1000\n"}
    assert write({"proc/self/cgroup": "5:pids:/\n4:memory:/c\n", **limits}) == 2000
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert free_on_host(tmp_path) == UNKNOWN


def test_zeros_on_demand_take_memory_where_they_are_written() -> None:
    def held() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))

    before = held()
    found = zeros_on_demand((1 << 14, 1024), torch.float32)  # 64 MB
    found[::1024] += 1
    assert held() - before < 4_000
    assert found.shape == (1 << 14, 1024) and found[5].sum() == 0 and found.sum() == 16 * 1024
    found.fill_(1)
    assert held() - before > 60_000
