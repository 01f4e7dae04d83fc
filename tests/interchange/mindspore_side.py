"""Run by MindSpore's own Python, in the folder with the files: `write` makes what we read, `read` compares what we wrote."""

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
    strategy = ParallelStrategyMap()
    strategy.current_stage = 0
    for name, grid, axes, step, size in (("rows", [2, 2], [0, -1], 2, 2), ("columns", [2, 2], [-1, 0], 0, 0), ("norm", [2, 2], [-1], 0, 0)):
        item = strategy.parallel_layout_item.add()
        item.param_name = name
        layouts = item.parallel_layouts
        layouts.dev_matrix.add().dim.extend(grid)
        layouts.tensor_map.add().dim.extend(axes)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = 0
        layouts.opt_weight_shard_step, layouts.opt_weight_shard_size = step, size
    with open("strategy.ckpt", "wb") as file:
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


if __name__ == "__main__":
    import mindspore
    from mindspore.mindrecord import FileReader, FileWriter
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    {"write": write, "read": read, "fixtures": fixtures}[sys.argv[1]]()
    print("done")
