"""Run by MindSpore's own Python, in the folder with the files: `write` makes what we read, `read` compares what we wrote; `kinds` and
`ranks` compare what we wrote and make the like of it for us to read: MindRLHF's data sets, and one layout of ranks from another."""

import gzip
import sys
from pathlib import Path

import numpy as np

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i32": "int32", "i64": "int64"}
SHARDS = (1, 4)


def numbers(rows: int, columns: int) -> np.ndarray:
    return (np.arange(rows * columns).reshape(rows, columns) % 97 - 48).astype(np.float32)


def records() -> list[dict[str, object]]:
    wide = np.array([0, 1, -1, 127, -128, 128, -129, 32767, -32768, 32768, 2**31 - 1, -(2**31), 2**31, -(2**63), 2**63 - 1])
    return [
        {
            "ids": np.roll(wide, i)[: i + 1], "small": np.arange(i + 2, dtype=np.int32) * -70000, "single": np.array([i / 3], np.float32),
            "double": np.array([i / 7, -2.5]), "number": i - 3, "half": i / 5, "text": f"行{i}", "raw": b"\0\1%d" % i,
        }
        for i in range(15)
    ]  # fmt: skip


def columns() -> dict[str, object]:
    arrays = {"ids": "int64", "small": "int32", "single": "float32", "double": "float64"}
    return {name: {"type": kind, "shape": [-1]} for name, kind in arrays.items()} | {
        "number": {"type": "int64"}, "half": {"type": "float64"}, "text": {"type": "string"}, "raw": {"type": "bytes"},
    }  # fmt: skip


def write() -> None:
    tensors = [{"name": name, "data": mindspore.Tensor(numbers(6, 4), getattr(mindspore, kind))} for name, kind in TYPES.items()]
    mindspore.save_checkpoint(tensors, "theirs.ckpt", append_dict={"epoch_num": 3, "note": "x"})
    mindspore.save_checkpoint(tensors, "theirs-crc.ckpt", crc_check=True)
    mindspore.save_checkpoint([{"name": "large", "data": mindspore.Tensor(numbers(150_000, 1000))}], "theirs-large.ckpt")
    for shards in SHARDS:
        writer = FileWriter(f"theirs{shards}.mindrecord", shards, overwrite=True)
        writer.add_schema(columns(), "all")
        writer.write_raw_data(records())
        writer.commit()
    items = [("rows", [2, 2], [0, -1], 2, 2), ("columns", [2, 2], [-1, 0], 0, 0), ("norm", [2, 2], [-1], 0, 0)]
    save_strategy("strategy.ckpt", items)


def save_strategy(path: str, items: list[tuple[str, list[int], list[int], int, int]]) -> None:
    """Each parameter's grid of devices, the axis of it for each dimension, and the optimizer's own cut."""
    strategy = ParallelStrategyMap()
    strategy.current_stage = 0
    for name, grid, axes, step, size in items:
        item = strategy.parallel_layout_item.add()
        item.param_name = name
        layouts = item.parallel_layouts
        layouts.dev_matrix.add().dim.extend(grid)
        layouts.tensor_map.add().dim.extend(axes)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = 0
        layouts.opt_weight_shard_step, layouts.opt_weight_shard_size = step, size
    with open(path, "wb") as file:
        file.write(strategy.SerializeToString())


def fixtures() -> None:
    """The files under fixtures/, small: pages of 32 KiB."""
    tensors = [
        {"name": "a.f32", "data": mindspore.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))},
        {"name": "b.f16", "data": mindspore.Tensor(np.arange(4, dtype=np.float16))},
        {"name": "c.bf16", "data": mindspore.Tensor(np.arange(4, dtype=np.float32), mindspore.bfloat16)},
        {"name": "d.i64", "data": mindspore.Tensor(np.arange(4, dtype=np.int64))},
        {"name": "e.scalar", "data": mindspore.Tensor(3, mindspore.int32)},
        {"name": "f.bool", "data": mindspore.Tensor([True, False])},
    ]
    mindspore.save_checkpoint(tensors, "types.ckpt", append_dict={"epoch_num": 3, "lr": 0.5, "name": "x", "flag": True})
    mindspore.save_checkpoint(tensors[:1], "crc.ckpt", crc_check=True)
    pages = [{"ids": np.full(900, 1000 * i), "box": np.full((2, 150), i, np.float32)} for i in range(40)]
    kinds = {"ids": {"type": "int64", "shape": [-1]}, "box": {"type": "float32", "shape": [2, -1]}}
    plain = [{"number": i, "text": f"行{i}"} for i in range(3)]
    cases = [
        ("all.mindrecord", 1, columns(), records()),
        ("four.mindrecord", 4, columns(), records()),
        ("pages.mindrecord", 1, kinds, pages),
    ]
    cases += [("one.mindrecord", 1, {"ids": kinds["ids"]}, [{"ids": np.arange(i + 1)} for i in range(3)])]
    cases += [("plain.mindrecord", 1, {"number": {"type": "int64"}, "text": {"type": "string"}}, plain)]
    for name, shards, schema, rows in cases:
        writer = FileWriter(name, shards, overwrite=True)
        writer.set_header_size(1 << 14)
        writer.set_page_size(1 << 15)
        writer.add_schema(schema, "fixture")
        writer.write_raw_data(rows)
        writer.commit()
    for file in Path().glob("*.mindrecord*"):
        if file.suffix != ".db":
            Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))


def read() -> None:
    for file in ("ours.ckpt", "ours-pieces.ckpt"):
        found = mindspore.load_checkpoint(file)
        assert list(found) == list(TYPES), list(found)
        for name, kind in TYPES.items():
            assert found[name].dtype == getattr(mindspore, kind), (name, found[name].dtype)
            assert np.array_equal(found[name].astype(mindspore.float32).asnumpy(), numbers(6, 4)), name
    large = mindspore.load_checkpoint("ours-large.ckpt")["large"].asnumpy()
    assert np.array_equal(large, numbers(150_000, 1000))
    for shards in SHARDS:
        first = f"ours{shards}.mindrecord" + ("0" if shards > 1 else "")
        rows = [dict(row.items()) for row in FileReader(first).get_next()]
        data = mindspore.dataset.MindDataset(first, shuffle=False)
        again = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
        assert len(rows) == len(again) == 15
        names = ("ids", "small", "single", "double")
        wanted = [tuple(np.asarray(row[name]).tolist() for name in names) for row in records()]
        wanted = [tuple(map(tuple, row)) for row in wanted]
        for found in (rows, again):
            assert sorted(tuple(tuple(np.asarray(row[name]).tolist()) for name in names) for row in found) == sorted(wanted)
            assert [str(found[0][name].dtype) for name in names] == ["int64", "int32", "float32", "float64"]
    mindspore.transform_checkpoints("ranks", "merged", "checkpoint_", "strategy.ckpt", None)
    merged = mindspore.load_checkpoint("merged/rank_0/checkpoint_0.ckpt")
    for name, whole in (("rows", numbers(8, 4)), ("columns", numbers(4, 8)), ("norm", numbers(1, 8)[0])):
        assert np.array_equal(merged[name].asnumpy(), whole), name


def kinds() -> None:
    """Our data sets `KIND.mindrecord` hold what `KIND.npz` says; `theirs-KIND.mindrecord` is the same from MindSpore."""
    for kind in ("ppo", "dpo", "reward"):
        wanted = np.load(f"{kind}.npz")
        key = "prompt_ids" if kind == "ppo" else "rejected_input_ids"
        count = len(wanted[key])
        expected = sorted(({name: wanted[name][i] for name in wanted.files} for i in range(count)), key=lambda row: row[key].tobytes())
        data = mindspore.dataset.MindDataset(f"{kind}.mindrecord", shuffle=False)
        for rows in (list(FileReader(f"{kind}.mindrecord").get_next()), list(data.create_dict_iterator(num_epochs=1, output_numpy=True))):
            assert len(rows) == count
            for row, values in zip(sorted(rows, key=lambda row: np.asarray(row[key]).tobytes()), expected, strict=True):
                assert set(row) == set(values), (kind, set(row))
                for name, value in values.items():
                    assert np.array_equal(np.asarray(row[name]).reshape(-1), value.reshape(-1)), (kind, name)
                    assert value.ndim == 0 or row[name].dtype == value.dtype, (kind, name)
        writer = FileWriter(f"theirs-{kind}.mindrecord", 1, overwrite=True)
        schema = {name: {"type": str(value.dtype)} | ({"shape": [-1]} if value.ndim else {}) for name, value in expected[0].items()}
        writer.add_schema(schema, kind)
        writer.write_raw_data([{name: value if value.ndim else int(value) for name, value in row.items()} for row in expected])
        writer.commit()


def ranks() -> None:
    """From our `two` (tensor 2, data 2) MindSpore's `theirs-four` (tensor 4), which is our `four`; and checkpoints as a run names them."""
    whole = mindspore.load_checkpoint("one.ckpt")
    for folder, strategy in (("two", [2, 2]), ("four", None)):
        piece = mindspore.load_checkpoint(f"{folder}/rank_0/checkpoint_0.ckpt")
        assert list(piece) == list(whole)
        items = []
        for name, tensor in whole.items():
            cut = [a // b for a, b in zip(tensor.shape, piece[name].shape, strict=True)]
            parts = max(cut)
            grid, place = (strategy, 0) if strategy else ([parts, 4 // parts], 1)  # which axis of the grid, counted from its last
            items.append((name, grid, [place if size > 1 else -1 for size in cut], 0, 0))
        save_strategy(f"{folder}.strategy", items)
    mindspore.transform_checkpoints("two", "theirs-four", "checkpoint_", "two.strategy", "four.strategy")
    for rank in range(4):
        ours = mindspore.load_checkpoint(f"four/rank_{rank}/checkpoint_{rank}.ckpt")
        theirs = mindspore.load_checkpoint(f"theirs-four/rank_{rank}/checkpoint_{rank}.ckpt")
        assert set(ours) == set(theirs) == set(whole)
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and np.array_equal(tensor.asnumpy(), theirs[name].asnumpy()), (rank, name)
        Path(f"run/rank_{rank}").mkdir(parents=True)
        for moment, factor in (("1_30", 0), ("2_9", 1)):
            tensors = [{"name": name, "data": mindspore.Tensor(tensor.asnumpy() * factor)} for name, tensor in ours.items()]
            mindspore.save_checkpoint(tensors, f"run/rank_{rank}/policy_rank_{rank}-{moment}.ckpt")


if __name__ == "__main__":
    import mindspore
    from mindspore.mindrecord import FileReader, FileWriter
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    {"write": write, "read": read, "kinds": kinds, "ranks": ranks, "fixtures": fixtures}[sys.argv[1]]()
    print("done")
