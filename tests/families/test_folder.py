import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from trueline.errors import UserError
from trueline.families.export import save_folder
from trueline.families.folder import WANTED, fingerprint, load_decoder, load_score, open_folder, random_decoder, resolve

GATE_UP = "model.layers.1.mlp.gate_up_proj.weight"


@pytest.fixture
def saved(model_folder, tmp_path):
    """A complete tiny model folder, and a way to change its tensors or its config."""

    def make(kind="glm", tensors=None, config=None, score=None, **sizes):
        folder = open_folder(model_folder(kind, **sizes))
        out = tmp_path / f"saved{len(list(tmp_path.iterdir()))}"
        save_folder(out, random_decoder(folder, torch.float32, seed=1), folder, score=score)
        if tensors:
            held = load_file(out / "model.safetensors")
            tensors(held)
            save_file(held, out / "model.safetensors")
        if config:
            path = out / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return out

    return make


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        load_decoder(open_folder(path), torch.float32, **options)
    return str(caught.value)


# ---- finding


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_hub_id_is_downloaded_without_code_and_pickles(tmp_path):
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(tmp_path)

    assert resolve("org/name-1.5B", download) == tmp_path
    patterns = asked["org/name-1.5B"]["allow_patterns"]
    assert "*.safetensors" in patterns and not any(p.endswith((".py", ".bin", ".pt", "*")) for p in patterns)


def test_the_hub_is_asked_through_its_own_client(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path))
    assert resolve("org/name") == tmp_path
    assert asked == [("org/name", {"allow_patterns": WANTED, "ignore_patterns": ["*/*"]})]


def test_a_hub_that_cannot_be_reached_is_one_sentence():
    def download(name, **options):
        raise ConnectionError("no route\nto host")

    with pytest.raises(UserError, match=r"org/name: no such folder here, and no model .*ConnectionError: no route\)$"):
        resolve("org/name", download)


@pytest.mark.parametrize("name", ["nothing", "../a/b", "/a/b", "./a", "a/../b", "a/b/c"])
def test_what_is_neither_is_refused_without_asking_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve(name, download=lambda *a, **k: pytest.fail("asked the hub"))


def test_no_name_is_not_the_current_folder():
    with pytest.raises(UserError, match="name is empty"):
        resolve("")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "x")


# ---- opening


def test_what_a_folder_says(saved, model_folder):
    folder = open_folder(saved("llama"))
    assert (folder.family.name, folder.kind, folder.decoder_config.num_layers, folder.generation) == ("llama", "causal", 2, {})
    assert open_folder(saved("glm", score=torch.ones(1, 16))).kind == "classifier"
    assert open_folder(model_folder("qwen2", architectures=None)).kind == "causal"


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_an_unreadable_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json"):
        open_folder(tmp_path)


def test_a_folder_without_a_config_says_what_it_is(tmp_path):
    with pytest.raises(UserError, match="no config.json, so not a model folder$"):
        open_folder(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="it is a run's folder, whose model is .*/model once it is finished$"):
        open_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter's folder"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_folder(tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_a_model_that_is_not_ours_names_its_folder(model_folder, changes, named):
    path = model_folder("glm", **changes)
    with pytest.raises(UserError, match=named) as caught:
        open_folder(path)
    assert str(path) in str(caught.value)


def test_code_in_a_folder_is_never_run(saved, caplog):
    path = saved(config={"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    witness = path / "witness"
    (path / "modeling_own.py").write_text(f"open({str(witness)!r}, 'w')\n")
    with caplog.at_level(logging.WARNING):
        load_decoder(open_folder(path), torch.float32)
    assert "never run" in caplog.text and not witness.exists() and "modeling_own" not in sys.modules


# ---- reading


@pytest.mark.parametrize("kind", ["qwen2", "glm", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_is_what_is_read(saved, kind, tied):
    path = saved(kind, tie_word_embeddings=tied)
    folder = open_folder(path)
    drawn = random_decoder(folder, torch.float32, seed=1)
    found = load_decoder(folder, torch.float32)
    assert fingerprint(found.named_parameters()) == fingerprint(drawn.named_parameters())
    assert (found.head.weight is found.embed.weight) == tied
    assert ("lm_head.weight" in load_file(path / "model.safetensors")) != tied
    half = load_decoder(folder, torch.bfloat16)
    assert all(torch.equal(p, drawn.get_parameter(name).bfloat16()) for name, p in half.named_parameters())


def test_a_trunk_can_be_read_without_its_head(saved):
    decoder = load_decoder(open_folder(saved()), torch.float32, with_head=False)
    assert decoder.head is None


def test_a_classifier_has_no_head_and_its_score_is_read(saved):
    score = torch.arange(16.0)[None]
    folder = open_folder(saved(score=score))
    assert load_decoder(folder, torch.float32).head is None
    assert torch.equal(load_score(folder), score)
    assert load_score(open_folder(saved())) is None


def test_a_classifier_of_two_labels_or_none_is_refused(saved):
    two = saved(score=torch.ones(1, 16), tensors=lambda t: t.update({"score.weight": torch.ones(2, 16)}))
    none = saved(score=torch.ones(1, 16), tensors=lambda t: t.pop("score.weight"))
    for path, found in ((two, r"shape \[2, 16\]"), (none, "missing")):
        with pytest.raises(UserError, match=rf"score.weight: {found}, expected \[1, 16\]"):
            load_score(open_folder(path))


def test_everything_that_does_not_fit_is_listed_at_once(saved):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.extra"] = torch.ones(2)
        tensors[GATE_UP] = torch.ones(24, 16)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(3)

    text = refusal(saved(tensors=spoil))
    assert sorted(line.strip() for line in text.splitlines()[1:]) == [
        "model.layers.0.mlp.extra: no part of this glm model",
        "model.layers.0.self_attn.q_proj.bias: shape [3], expected [16]",
        f"{GATE_UP}: shape [24, 16], expected [48, 16]",
        "model.norm.weight: missing",
    ]


def test_a_score_in_a_language_model_is_a_stranger(saved):
    assert "score.weight: no part" in refusal(saved(tensors=lambda t: t.update({"score.weight": torch.ones(1, 16)})))


def test_many_problems_are_counted_not_all_printed(saved):
    text = refusal(saved(config={"num_hidden_layers": 40}))
    assert len(text.splitlines()) == 52 and text.splitlines()[-1].strip().startswith("and ")


def test_a_buffer_of_older_files_is_passed_over(saved):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    load_decoder(open_folder(saved(tensors=add)), torch.float32)


def test_integers_are_not_weights(saved):
    assert "model.norm.weight holds torch.int8" in refusal(saved(tensors=lambda t: t.update({"model.norm.weight": torch.ones(16).char()})))


def test_a_tied_head_may_be_there_if_it_is_the_embedding(saved):
    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    load_decoder(open_folder(saved(tie_word_embeddings=True, tensors=same)), torch.float32)
    load_decoder(open_folder(saved(tie_word_embeddings=True, tensors=other)), torch.float32, with_head=False)
    assert "tie_word_embeddings" in refusal(saved(tie_word_embeddings=True, tensors=other))


@pytest.mark.slow
def test_a_model_is_never_in_memory_twice(model_folder, tmp_path):
    """64 MiB in bfloat16, read as bfloat16: the peak stays under weights plus the largest tensor (a quarter) plus what reading costs."""
    path = model_folder(hidden_size=1024, intermediate_size=2048, vocab_size=8192, head_dim=128, num_hidden_layers=2)
    folder = open_folder(path)
    save_folder(tmp_path / "big", random_decoder(folder, torch.bfloat16, seed=0), folder)
    script = """
import resource, sys, torch
from trueline.families.folder import load_decoder, open_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoder = load_decoder(open_folder(sys.argv[1]), torch.bfloat16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, sum(p.nbytes for p in decoder.parameters()) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    grown, weights = map(float, done.stdout.split())
    assert weights > 50
    assert grown < 1.6 * weights


# ---- random weights and fingerprints


def test_a_seed_is_one_model_in_every_dtype_with_or_without_a_head(model_folder):
    folder = open_folder(model_folder())
    one, again, other = (random_decoder(folder, torch.float32, seed) for seed in (5, 5, 6))
    assert fingerprint(one.named_parameters()) == fingerprint(again.named_parameters()) != fingerprint(other.named_parameters())
    double = random_decoder(folder, torch.float64, 5, with_head=False)
    assert all(torch.equal(p.float(), one.get_parameter(name)) for name, p in double.named_parameters())


def test_a_fingerprint_sees_names_dtypes_shapes_and_bits_but_not_order():
    a, b = torch.tensor([1.0, -0.0]), torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16)
    first = fingerprint([("a", a), ("b", b)])
    assert first == fingerprint([("b", b.clone()), ("a", a)])
    assert len(first) == 64
    others = [
        [("a", a)],
        [("a", a), ("c", b)],
        [("a", a + 0.0), ("b", b)],
        [("a", a), ("b", b.T)],
        [("a", a), ("b", b.reshape(4))],
        [("a", a), ("b", b.float())],
        [("a", a.view(torch.int32)), ("b", b)],
    ]
    assert len({first, *map(fingerprint, others)}) == 8
    assert fingerprint([("a", torch.ones(2, 0)), ("s", torch.tensor(1.0))])
