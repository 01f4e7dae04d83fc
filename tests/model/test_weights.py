import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from trueline.errors import UserError
from trueline.model.weights import read_shapes, read_tensors, write_tensors

INDEX = "model.safetensors.index.json"
TENSORS = [
    ("a", torch.arange(6.0).reshape(2, 3)),
    ("b.weight", torch.ones(4, dtype=torch.bfloat16)),
    ("c", torch.zeros(0, 5)),
    ("d", torch.tensor(2.0)),
]


@pytest.fixture
def sharded(tmp_path):
    write_tensors(tmp_path, TENSORS, shard_bytes=24)
    return tmp_path


def refusal(folder):
    with pytest.raises(UserError) as caught:
        list(read_tensors(folder))
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text


def change_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


# ---- what goes in comes out


@pytest.mark.parametrize(("shard_bytes", "files"), [(5e9, 1), (24, 2), (1, 4)])
def test_what_is_written_is_read(tmp_path, shard_bytes, files):
    written = write_tensors(tmp_path, TENSORS, shard_bytes)
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    found = dict(read_tensors(tmp_path))
    assert found.keys() == dict(TENSORS).keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in TENSORS)
    assert read_shapes(tmp_path) == {name: tuple(t.shape) for name, t in TENSORS}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 80))
def test_shards_keep_to_their_size(tmp_path_factory, sizes, shard_bytes):
    folder = tmp_path_factory.mktemp("shards")
    tensors = [(f"t{i}", torch.full((n,), float(i))) for i, n in enumerate(sizes)]
    write_tensors(folder, iter(tensors), shard_bytes)
    assert [(n, t.tolist()) for n, t in sorted(read_tensors(folder), key=lambda x: int(x[0][1:]))] == [(n, t.tolist()) for n, t in tensors]
    if (folder / INDEX).is_file():
        placed = json.loads((folder / INDEX).read_text())["weight_map"]
        for file in set(placed.values()):
            held = [t.nbytes for n, t in tensors if placed[n] == file]
            assert sum(held) <= shard_bytes or sum(map(bool, held)) == 1


def test_views_and_strides_are_written_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path, [("rows", base[1:]), ("turned", base.T), ("whole", base)])
    found = dict(read_tensors(tmp_path))
    assert torch.equal(found["rows"], base[1:]) and torch.equal(found["turned"], base.T) and torch.equal(found["whole"], base)


def test_two_tensors_of_one_name_are_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="called a"):
        write_tensors(tmp_path, [TENSORS[0], TENSORS[0]])


# ---- refusals


def test_no_weights(tmp_path):
    assert "no weights, expected model.safetensors" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt", "rank_0.ckpt"]
)
def test_pickles_are_not_opened_but_explained(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    text = refusal(tmp_path)
    assert name in text and "save_pretrained" in text


def test_safetensors_beside_pickles_are_read(tmp_path):
    write_tensors(tmp_path, TENSORS)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert len(list(read_tensors(tmp_path))) == 4


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file(tmp_path, keep):
    write_tensors(tmp_path, TENSORS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut short or damaged" in refusal(tmp_path)


@pytest.mark.parametrize("change", [(0, 0x40), (7, 0x80), (8, 0x01)])
def test_a_flipped_header(tmp_path, change):
    write_tensors(tmp_path, TENSORS)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[change[0]] ^= change[1]
    path.write_bytes(bytes(data))
    assert "cut short or damaged" in refusal(tmp_path)


@pytest.mark.parametrize("offsets", ["[0,23]", "[4,24]", "[0,99999999999999999999]"])
def test_offsets_that_lie(tmp_path, offsets):
    write_tensors(tmp_path, TENSORS[:1])
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b"[0,24]", offsets.encode())
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[-24:])
    assert "cut short or damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": null}']
)
def test_an_unreadable_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    assert INDEX in refusal(tmp_path)


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "sub/../../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b", ""]
)
def test_an_index_that_leads_out(sharded, target):
    save_file({"a": torch.ones(2, 3)}, sharded.parent / "outside.safetensors")
    change_index(sharded, lambda placed: placed.update(a=target))
    assert "not a file of this folder; refused" in refusal(sharded)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors"])
def test_a_link_that_leads_out(sharded, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / "x.safetensors"
    save_file(dict(TENSORS), outside)
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to(outside)
    assert "leads out of its folder; refused" in refusal(sharded)


def test_a_hub_caches_links_are_followed(tmp_path):
    """snapshots/REVISION/model.safetensors -> ../../blobs/HASH, as the hub's client lays them out."""
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(dict(TENSORS), blobs / "hash")
    (snapshot / "model.safetensors").symlink_to(os.path.join("..", "..", "blobs", "hash"))
    assert len(list(read_tensors(snapshot))) == 4


def test_a_shard_that_is_not_there(sharded):
    (sharded / "model-00001-of-00002.safetensors").unlink()
    assert "it is not there" in refusal(sharded)


def test_a_tensor_that_is_not_in_its_shard(sharded):
    change_index(sharded, lambda placed: placed.update(b="model-00002-of-00002.safetensors", e="model-00002-of-00002.safetensors"))
    assert "b (and 1 more) is in this file, but it is not" in refusal(sharded)


def test_a_tensor_in_two_shards(sharded):
    save_file({"b.weight": torch.ones(1), "d": torch.ones(1), "a": torch.ones(1)}, sharded / "model-00002-of-00002.safetensors")
    change_index(sharded, lambda placed: placed.pop("c"))
    assert "a is also in another file" in refusal(sharded)
