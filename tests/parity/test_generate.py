"""Greedy answers against transformers' `generate`, token for token: padded there, packed and queued here."""

from pathlib import Path

import pytest
import torch
from transformers import (
    GenerationConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import PreTrainedModel as Peer

from trueline.families.folder import load_decoder, open_folder
from trueline.model.heads import LanguageModel
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Sampling

SIZES = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "glm": (GlmConfig, GlmForCausalLM, {"head_dim": 16, "attention_bias": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "qwen3_windows": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "glm4": (Glm4Config, Glm4ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
}
STOP = frozenset(range(3, 120, 9))


def their_answers(model: Peer, prompts: list[list[int]], new: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=sorted(STOP))
    rows = model.generate(tokens, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in STOP), len(row))] for row in rows]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_theirs(name: str, tmp_path: Path) -> None:
    config, model, changes = MODELS[name]
    torch.manual_seed(0)
    theirs = model(config(**SIZES | changes)).double().eval()
    theirs.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 120, (n,), generator=draw).tolist() for n in (7, 1, 21, 4, 4, 12, 9, 2, 16, 5)]
    expected = their_answers(theirs, prompts, 24)
    assert len({len(answer) for answer in expected}) > 4
    decoder = load_decoder(open_folder(tmp_path), torch.float64)
    for running in (3, 64):
        engine = Engine(LanguageModel(decoder), running)
        with engine.hold():
            ours = engine.generate(prompts, Sampling(24, temperature=0, stop=STOP), [0] * len(prompts))
        assert [r.tokens for r in ours] == expected
