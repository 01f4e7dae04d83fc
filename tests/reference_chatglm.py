"""ChatGLM-6B written down once more for the tests: one sequence at a time, their names, dense masks, every rotation by its angle.

An oracle: nothing in it comes from `trueline.model`. It is itself held to the authors' recorded tensors (tests/parity/test_chatglm.py).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, hidden: int, inner: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.attention = nn.ModuleDict({"query_key_value": nn.Linear(hidden, 3 * hidden), "dense": nn.Linear(hidden, hidden)})
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(hidden, inner), "dense_4h_to_h": nn.Linear(inner, hidden)})

    def forward(self, x: Tensor, rows: tuple[list[int], list[int]], hidden: Tensor, prefix: Tensor | None) -> Tensor:
        seen = self.input_layernorm(x)
        heads = self.attention["query_key_value"](seen).view(len(x), self.heads, -1)
        size = heads.shape[-1] // 3
        q, k, v = heads[..., :size], heads[..., size : 2 * size], heads[..., 2 * size :]
        q, k = turned(q, rows), turned(k, rows)
        if prefix is not None:  # [2, P, H, d]
            k, v = torch.cat((prefix[0], k)), torch.cat((prefix[1], v))
            hidden = torch.cat((hidden.new_zeros(len(x), prefix.shape[1]), hidden), 1)
        scores = torch.einsum("thd,shd->hts", q, k) / size**0.5
        mixed = torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = seen * 56**0.5 + self.attention["dense"](mixed.flatten(1))
        seen = self.post_attention_layernorm(x)
        y = self.mlp["dense_h_to_4h"](seen)
        y = 0.5 * y * (1 + torch.tanh(0.7978845608028654 * y * (1 + 0.044715 * y * y)))
        return seen * 56**0.5 + self.mlp["dense_4h_to_h"](y)


def turned(x: Tensor, rows: tuple[list[int], list[int]]) -> Tensor:
    """`x` `[T, H, d]`: channels i and i + d/4 of the first half turn by the first position, those of the second half by the second."""
    out, quarter = x.clone(), x.shape[-1] // 4
    for half, positions in enumerate(rows):
        for i in range(quarter):
            speed = torch.tensor(10000.0 ** (-2 * i / (2 * quarter))).half().item()
            angles = torch.tensor(positions, dtype=torch.float32) * speed
            cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
            a, b = x[..., 2 * half * quarter + i], x[..., (2 * half + 1) * quarter + i]
            out[..., 2 * half * quarter + i], out[..., (2 * half + 1) * quarter + i] = a * cos - b * sin, b * cos + a * sin
    return out


class Reference(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        hidden, sizes = config["hidden_size"], (config["inner_hidden_size"], config["num_attention_heads"])
        blocks = [Block(hidden, *sizes, config.get("layernorm_epsilon", 1e-5)) for _ in range(config["num_layers"])]
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], hidden),
                "layers": nn.ModuleList(blocks),
                "final_layernorm": nn.LayerNorm(hidden, eps=config.get("layernorm_epsilon", 1e-5)),
            }
        )
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)
        self.prefix: Tensor | None = None  # PEFT's prompt_embeddings [P, L 2 H d]

    def positions(self, tokens: list[int]) -> tuple[int, list[int], list[int]]:
        start, gmask, mask = (self.config[f"{name}_token_id"] for name in ("bos", "gmask", "mask"))
        if start not in tokens:  # theirs fails here; ours is then an ordinary causal model
            return 0, list(range(len(tokens))), [0] * len(tokens)
        context = tokens.index(start)
        used = gmask if gmask in tokens else mask
        place = tokens.index(used) if used in tokens else max(context - 1, 0)  # theirs fails without; ours fills the place before <sop>
        answer = range(1, len(tokens) - context + 1)
        return context, [*range(context), *[place] * len(answer)], [0] * context + list(answer)

    def states(self, tokens: list[int]) -> Tensor:
        context, *rows = self.positions(tokens)
        hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        hidden[:, :context] = False
        x = self.transformer["word_embeddings"](torch.tensor(tokens))
        for i, block in enumerate(self.transformer["layers"]):  # type: ignore[arg-type]
            prefix = None
            if self.prefix is not None:
                count, size = len(self.prefix), self.config["hidden_size"]
                prefix = self.prefix.view(count, -1, 2, self.config["num_attention_heads"], size // self.config["num_attention_heads"])
                prefix = prefix[:, i].transpose(0, 1).to(x.dtype)
            x = block(x, rows, hidden, prefix)
        return self.transformer["final_layernorm"](x)

    def forward(self, tokens: list[int]) -> Tensor:
        return self.lm_head(self.states(tokens))


def read_reference(folder: Path) -> Reference:
    """A folder's weights; a reward model has no head, a tied one has the embedding."""
    model = Reference(json.loads((folder / "config.json").read_text()))
    weights = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.endswith("inv_freq")}
    weights.pop("score.weight", None)
    weights.setdefault("lm_head.weight", weights["transformer.word_embeddings.weight"])
    model.load_state_dict(weights)
    return model.eval()
