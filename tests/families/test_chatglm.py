"""ChatGLM-6B: what it renders, which configurations it takes, its fused matrices, and what must not matter about a context."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.reference_chatglm import Reference
from trueline.config.schema import AdapterConfig
from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample, sample_of
from trueline.errors import UserError
from trueline.families.chatglm import CHATGLM, join_heads, read_config, split_heads
from trueline.families.folder import load_decoder, open_folder, random_decoder
from trueline.families.transcript import training_samples
from trueline.model.adapters import adapter_parameters, add_adapter
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel

TOKENS = ("[MASK]", "[gMASK]", "<sop>", "<eop>", "<pad>")
CONFIG: dict[str, Any] = {
    "model_type": "chatglm", "vocab_size": 60, "hidden_size": 32, "inner_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 7, "gmask_token_id": 5, "mask_token_id": 6, "position_encoding_2d": True, "initializer_range": 0.3,
}  # fmt: skip
ROWS = [[20, 21, 22, 5, 7, 30, 31], [20, 6, 21, 22, 7, 30, 31, 32], [5, 7, 40], [20, 21, 22, 23], [9, 5, 7, 8, 8, 8, 8]]


def said(*texts: str, system: str = "") -> tuple[Message, ...]:
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return (*([Message("system", system)] if system else []), *turns)


def test_one_question_and_rounds(letters) -> None:
    tokenizer = letters(*TOKENS)
    sample = CHATGLM.render(Conversation(said("hi", "ho")), tokenizer)
    assert tokenizer.show(sample.tokens) == "hi[gMASK]<sop>ho<eop>"
    assert sample.trained == [False] * 4 + [True] * 3 and (sample.context, sample.anchor) == (3, 2)
    sample = CHATGLM.render(Conversation(said("a", "b", "c", "d", "e", "f")), tokenizer)
    wanted = "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：d\n[Round 2]\n问：e\n答：[gMASK]<sop>f<eop>"
    assert tokenizer.show(sample.tokens) == wanted and sum(sample.trained) == 2
    assert sample == CHATGLM.render(Conversation(said("a", "b", "c", "d", "e", "f")), tokenizer, last_only=True)
    rounds = "S\n[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：[gMASK]<sop>"
    for texts, shown in ((("hi", "ho"), "S\nhi[gMASK]<sop>ho<eop>"), (("a", "b", "c"), rounds)):
        found = CHATGLM.render(Conversation(said(*texts, system="S")), tokenizer, open=len(texts) % 2 == 1)
        assert tokenizer.show(found.tokens) == shown


TEXT = st.text(st.sampled_from("ab \n<sop>说[MASK]"), min_size=1, max_size=4)


@given(texts=st.lists(TEXT, min_size=2, max_size=6), system=st.sampled_from(["", "S"]))
def test_the_answer_follows_the_prompt_it_would_be_generated_from(letters, texts: list[str], system: str) -> None:
    tokenizer, messages = letters(*TOKENS), said(*texts[: len(texts) // 2 * 2], system=system)
    whole = CHATGLM.render(Conversation(messages), tokenizer)
    prompt = CHATGLM.render(Conversation(messages[:-1]), tokenizer, open=True)
    answer = [*tokenizer.encode(messages[-1].content), tokenizer.specials["<eop>"]]
    assert whole.tokens == prompt.tokens + answer and whole.trained == [False] * len(prompt) + [True] * len(answer)
    assert not any(prompt.trained)
    assert (whole.context, whole.anchor) == (prompt.context, prompt.anchor) == (len(prompt) - 1, len(prompt) - 2)


def test_tools_are_refused(letters) -> None:
    for conversation in (Conversation(said("a", "b"), ({"name": "f"},)), Conversation((*said("a"), Message("assistant", "{}", tool="f")))):
        with pytest.raises(UserError, match="ChatGLM-6B has no format for tools"):
            CHATGLM.render(conversation, letters(*TOKENS))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"position_encoding_2d": False}, "position_encoding_2d: False is not supported for chatglm, only True"),
        ({"num_attention_heads": 16}, "a head has 2 channels, expected a multiple of 4"),
        ({"quantization_bit": 4}, "quantization_bit: 4 is not supported"),
        ({"pre_seq_len": 128}, "pre_seq_len: 128 is not supported"),
        ({"position_encoding_2d": ..., "inner_hidden_size": ...}, "this is no ChatGLM-6B, but a later model of the same type"),
        ({"num_layers": "two"}, "num_layers: 'two', expected a whole number"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config({name: value for name, value in (CONFIG | changes).items() if value is not ...})
    assert sentence in str(caught.value)


def test_the_published_configuration(shared: Path) -> None:
    config = open_folder(shared / "data/tokenizers/chatglm-6b").decoder_config
    assert (config.num_layers, config.mlp_size, config.head_dim, config.vocab_size) == (28, 16384, 128, 130528)
    assert config.blocks is not None and config.blocks.start == 130004 and config.blocks.masks == (130001, 130000)


def test_fused_rows_go_by_heads() -> None:
    config = read_config(CONFIG)
    fused = torch.arange(96.0)[:, None].expand(-1, 3)
    q, k, v = split_heads(fused, config)
    assert q[:, 0].tolist() == [24 * h + i for h in range(4) for i in range(8)]
    assert torch.equal(k, q + 8) and torch.equal(v, q + 16) and torch.equal(join_heads([q, k, v], config), fused)


def folder_of(place: Path, **changes: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(CONFIG | changes))
    return place


class Few:
    """A tokenizer of 60 ids."""

    specials = {"[gMASK]": 5, "[MASK]": 6, "<sop>": 7, "<eop>": 8}

    def encode(self, text: str) -> list[int]:
        return [10 + ord(letter) % 50 for letter in text]


@torch.no_grad()
def test_the_loss_of_a_conversation_is_that_of_its_answers(tmp_path: Path) -> None:
    """Two answers packed as they are trained, against the tests' network asked for each answer behind a prompt written by hand."""
    reference = Reference(CONFIG).double().eval()
    folder = folder_of(tmp_path / "base")
    save_file(reference.state_dict(), folder / "model.safetensors")
    samples = training_samples(CHATGLM, Conversation(said("ab", "cde", "f", "gh")), Few())
    batch = pack(samples)
    found = LanguageModel(load_decoder(open_folder(folder), torch.float64), None)(batch).split(batch.lengths)
    loss = [-float(part[torch.tensor(sample.trained)].sum()) for part, sample in zip(found, samples, strict=True)]
    wanted = []
    for prompt, answer in (("ab", "cde"), ("[Round 0]\n问：ab\n答：cde\n[Round 1]\n问：f\n答：", "gh")):
        context, row = Few().encode(prompt), [*Few().encode(answer), 8]
        logits = reference([*context, 5, 7, *row])[len(context) + 1 : -1]
        wanted.append(-float(logits.log_softmax(-1)[torch.arange(len(row)), torch.tensor(row)].sum()))
    assert loss == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", ["full", "lora", "ptuning"])
def test_alone_packed_and_recomputed_are_one(tmp_path: Path, kind: Any) -> None:
    """Log-probabilities and gradients of rows with and without a context, in any company."""
    opened = open_folder(folder_of(tmp_path / "drawn"))
    decoder = random_decoder(opened, torch.float64, seed=3)
    role = None if kind == "full" else "policy"
    if role:
        add_adapter(decoder, role, AdapterConfig(kind=kind, rank=2, tokens=3, targets=("q", "v", "up")), 0)
        for parameter in adapter_parameters(decoder, role).values():
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    model = LanguageModel(decoder, role)
    samples = [sample_of(row, [True] * len(row), opened.decoder_config.blocks) for row in ROWS]

    def run(groups: list[list[Sample]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model.zero_grad()
        found: dict[tuple[int, ...], torch.Tensor] = {}
        for group in groups:
            batch = pack(group)
            logprobs = model(batch)
            logprobs.sum().backward()
            found |= {tuple(s.tokens): part.detach() for s, part in zip(group, logprobs.split(batch.lengths), strict=True)}
        return [found[tuple(row)] for row in ROWS], [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = run([[s] for s in samples])
    decoder.recompute = len(decoder.layers)
    for groups in ([samples], [samples[:2], samples[:1:-1]]):
        for ours, alone in zip(run(groups), expected, strict=True):
            assert len(ours) == len(alone) > 0
            for x, y in zip(ours, alone, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    blind = pack([replace(samples[0], context=0)])
    assert (model(blind) - expected[0][0]).abs().max() > 1e-3


def test_a_tokenizer_of_other_ids_is_refused(toys, trueline, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in toys.model("chatglm").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 9}))
    prompts = toys.data("prompts.jsonl")
    done = trueline("generate", folder, "--prompts", prompts, "--out", tmp_path / "out.jsonl")
    assert done.code == 2 and "are not <sop> and [gMASK] of the tokenizer (3, 2)" in done.err
