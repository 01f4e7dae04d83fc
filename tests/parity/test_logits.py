"""Our decoder, loss and folders against transformers', random tiny models and a real one, in float64 to 1e-6."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.parity.cases import CASES, EACH, OWN_CLASS, Made, has_class, our_logits, samples
from trueline.families.export import save_folder
from trueline.families.folder import fingerprint, load_decoder, load_score, open_folder, random_decoder, weight_slots
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel, Scorer

Make = Callable[[str], Made]


@torch.no_grad()
@pytest.mark.parity("logits")
@pytest.mark.parametrize("name", CASES)
def test_logits_are_theirs_alone_and_packed(made: Make, name: str) -> None:
    case = made(name)
    decoder = load_decoder(open_folder(case.folder), torch.float64)
    rows = case.rows()
    expected = [case.logits(row) for row in rows]
    assert max(e.abs().max() for e in expected) > 0.5  # logits of a model that does something
    for row, wanted, packed in zip(rows, expected, our_logits(decoder, rows), strict=True):
        torch.testing.assert_close(our_logits(decoder, [row])[0], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(packed, wanted, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parity("logits")
@pytest.mark.parametrize("name", CASES)
def test_float32_is_theirs_to_rounding(made: Make, name: str) -> None:
    case = made(name)
    (row,) = case.rows((30,))
    ours = our_logits(load_decoder(open_folder(case.folder), torch.float32), [row])[0]
    torch.testing.assert_close(ours, case.logits(row).float(), rtol=0, atol=1e-5)


def test_the_older_spelling_of_scaled_angles_is_the_same(made: Make, tmp_path: Path) -> None:
    for name in ("qwen2_yarn", "llama_3_1", "llama_linear"):
        folder = made(name).folder
        new = open_folder(folder).decoder_config
        config = json.loads((folder / "config.json").read_text())
        inner = config.pop("rope_parameters")
        config["rope_theta"] = inner.pop("rope_theta")
        config["rope_scaling"] = {"type" if k == "rope_type" else k: v for k, v in inner.items()}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert open_folder(tmp_path).decoder_config == new


@torch.no_grad()
@pytest.mark.parity("logits")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_theirs_on_a_real_model(shared: Path, family: str) -> None:
    folder = shared / "models" / "stories260K" / f"hf-{family}"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    norms = [(module, name, norm) for module in theirs.modules() for name, norm in module.named_children() if name.endswith("norm")]
    assert len(norms) == 11
    for module, name, norm in norms:
        # theirs rounds through float32 whatever the model, which on these logits of 20 is 2e-6; that is not ours to reproduce
        exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
        exact.weight = norm.weight
        setattr(module, name, exact)
    draw = torch.Generator().manual_seed(5)
    rows = [[1, *torch.randint(1, 512, (n,), generator=draw).tolist()] for n in (40, 200, 3)]
    ours = our_logits(load_decoder(open_folder(folder), torch.float64), rows)
    for row, found in zip(rows, ours, strict=True):
        torch.testing.assert_close(found, theirs(torch.tensor([row])).logits[0], rtol=0, atol=1e-9)


def their_loss(case: Made, rows: list[list[int]], trained: list[list[bool]]) -> Tensor:
    """Mean negative log-likelihood of the trained tokens: from a padded batch by their own class, else from the logits."""
    if not has_class(case):
        tables = [F.log_softmax(case.logits(row), -1) for row in rows]
        places = [(table, t, row[t]) for table, row, flag in zip(tables, rows, trained, strict=True) for t in range(1, len(row)) if flag[t]]
        return -torch.stack([table[t - 1, token] for table, t, token in places]).mean()
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    flags = torch.tensor([[i > 0 and i < len(row) and flag[i] for i in range(width)] for row, flag in zip(rows, trained, strict=True)])
    return case.theirs(tokens, attention_mask=mask, labels=tokens.where(flags, -100)).loss


@pytest.mark.parity("loss and gradients")
@pytest.mark.parametrize("name", EACH)
def test_loss_and_gradients_are_theirs(made: Make, name: str) -> None:
    case = made(name)
    folder = open_folder(case.folder)
    decoder = load_decoder(folder, torch.float64)
    rows = case.rows((12, 7, 20))
    trained = [[i % 3 != 1 for i in range(len(row))] for row in rows]
    case.theirs.zero_grad()
    loss = their_loss(case, rows, trained)
    loss.backward()
    batch = pack(samples(decoder, rows, trained))
    ours = -LanguageModel(decoder)(batch).sum() / batch.trained.sum()
    ours.backward()
    assert int(batch.trained.sum()) == sum(sum(flag[1:]) for flag in trained)
    torch.testing.assert_close(ours, loss.detach().to(ours.dtype), rtol=0, atol=1e-6)
    wanted = case.published({key: p.grad for key, p in case.theirs.named_parameters()})
    slots = weight_slots(decoder, folder.family)
    assert slots.keys() == wanted.keys()
    for key, (weight, parts) in slots.items():
        grads = [p.grad for p in parts]
        torch.testing.assert_close(weight.join(grads, decoder.config) if weight.join else grads[0], wanted[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parity("export")
@pytest.mark.parametrize("name", [*OWN_CLASS, "llama_all_biased"])
def test_a_folder_of_ours_loads_in_transformers_bit_for_bit(
    made: Make, tmp_path: Path, name: str, dtype: torch.dtype, shard_bytes: float
) -> None:
    theirs = made(name).theirs
    folder = open_folder(made(name).folder)
    decoder = load_decoder(folder, dtype)
    save_folder(tmp_path / "out", decoder, folder, shard_bytes=shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 if shard_bytes == 5e9 else 2 < len(list((tmp_path / "out").iterdir()))
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert back.dtype == dtype and type(back) is type(theirs)
    wanted = {key: tensor.to(dtype) for key, tensor in theirs.state_dict().items()}
    assert back.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in back.state_dict().items())
    again = load_decoder(open_folder(tmp_path / "out"), dtype)
    assert fingerprint(again.named_parameters()) == fingerprint(decoder.named_parameters())


@pytest.mark.parity("export")
@pytest.mark.parametrize("name", EACH)
def test_a_folder_of_theirs_and_ours_hold_the_same(made: Make, tmp_path: Path, name: str) -> None:
    """Names and bits; a buffer that follows from the configuration is not written."""
    folder = open_folder(made(name).folder)
    save_folder(tmp_path / "out", load_decoder(folder, torch.float64), folder)
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder.path / "model.safetensors")
    theirs = {key: tensor for key, tensor in theirs.items() if not key.endswith("inv_freq")}
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    again = open_folder(tmp_path / "out")
    assert again.decoder_config == folder.decoder_config and again.family.name == folder.family.name == family_of(name)


def family_of(name: str) -> str:
    return name.partition("_")[0]


@pytest.mark.parity("export")
@pytest.mark.parametrize("name", EACH)
def test_a_reward_model_scores_the_same_in_their_network(made: Make, tmp_path: Path, name: str) -> None:
    case = made(name)
    folder = open_folder(case.folder)
    decoder = load_decoder(folder, torch.float64, with_head=False)
    scorer = Scorer(decoder)
    with torch.no_grad():
        scorer.score.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_folder(tmp_path / "out", decoder, folder, score=scorer.score.weight)
    rows = case.rows((12, 7, 20))
    batch = pack(samples(decoder, rows))
    ours = scorer(batch)[batch.ends()].detach()
    if name in OWN_CLASS:
        theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
        assert not any(info.values()), info
        assert type(theirs).__name__ == folder.family.scorer_architecture and theirs.config.num_labels == 1
        width = max(map(len, rows))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            wanted = theirs(padded, attention_mask=(padded != 0).long()).logits[:, 0]
    else:
        wanted = torch.stack([case.last_hidden(row) @ scorer.score.weight[0] for row in rows]).detach()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    saved = open_folder(tmp_path / "out")
    assert saved.kind == "classifier"
    back = Scorer(load_decoder(saved, torch.float64))
    with torch.no_grad():
        back.score.weight.copy_(load_score(saved))  # type: ignore[arg-type]
    assert torch.equal(back(batch)[batch.ends()], ours)


@torch.no_grad()
@pytest.mark.parity("logits", "glm")
def test_random_weights_make_the_same_model_in_transformers(made: Make, tmp_path: Path) -> None:
    folder = open_folder(made("glm").folder)
    decoder = random_decoder(folder, torch.float64, seed=3)
    save_folder(tmp_path / "out", decoder, folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    row = made("glm").rows()[0]
    torch.testing.assert_close(our_logits(decoder, [row])[0], theirs(torch.tensor([row])).logits[0], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parity("logits")
@pytest.mark.parametrize("name", ["qwen2", "chatglm4", "chatglm"])
def test_logprobs_are_theirs_at_a_temperature(made: Make, name: str) -> None:
    case = made(name)
    row = case.rows()[0]
    model = LanguageModel(load_decoder(open_folder(case.folder), torch.float64))
    ours = model(pack(samples(model.decoder, [row])), temperature=0.7)
    table = F.log_softmax(case.logits(row) / 0.7, -1)
    wanted = torch.stack([table[i - 1, token] if i else table.new_zeros(()) for i, token in enumerate(row)])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
