"""ChatGLM2, ChatGLM3 and GLM-4 in their original layout once more, in NumPy: one sequence, their names, every rotation by its angle.

An oracle: nothing in it comes from trueline or from torch. It is itself held to the authors' recorded tensors
(tests/parity/test_chatglm2.py).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = dict[str, Array]


def normed(x: Array, scale: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def linear(x: Array, weights: Weights, name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def turned(x: Array, ratio: float) -> Array:
    """`x` `[T, H, d]`: of the first half of each head channels 2 j and 2 j + 1 turn together. Angles are float32, as published."""
    out, half = x.copy(), x.shape[-1] // 2
    for t in range(len(x)):
        for j in range(half // 2):
            angle = np.float32(t) * np.float32((10000.0 * ratio) ** (-2 * j / half))
            a, b = x[t, :, 2 * j], x[t, :, 2 * j + 1]
            out[t, :, 2 * j], out[t, :, 2 * j + 1] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def attended(x: Array, weights: Weights, name: str, config: dict[str, Any], prefix: Array | None) -> Array:
    """One layer's attention, `[T, H d]`, before its last projection. `prefix` `[2, P, G, d]`: keys and values that every token sees."""
    heads, size, length = config["num_attention_heads"], config["kv_channels"], len(x)
    fused = linear(x, weights, f"{name}.query_key_value")
    if config.get("multi_query_attention"):
        groups = config["multi_query_group_num"]
        parts = np.split(fused, [heads * size, (heads + groups) * size], axis=1)
        q, k, v = (part.reshape(length, -1, size) for part in parts)
    else:
        q, k, v = np.split(fused.reshape(length, heads, 3 * size), 3, axis=2)
    q, k = turned(q, config.get("rope_ratio", 1)), turned(k, config.get("rope_ratio", 1))
    before = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        k, v = np.concatenate((prefix[0], k)), np.concatenate((prefix[1], v))
    out = np.zeros((length, heads, size), x.dtype)
    for head in range(heads):
        group = head // (heads // k.shape[1])
        for t in range(length):
            seen = before + t + 1
            scores = k[:seen, group] @ q[t, head] / np.sqrt(size)
            shares = np.exp(scores - scores.max())
            out[t, head] = shares / shares.sum() @ v[:seen, group]
    return out.reshape(length, heads * size)


def hidden_of(weights: Weights, config: dict[str, Any], tokens: list[int], prefix: Array | None = None) -> Array:
    """`[T, D]`, after the last norm. `prefix` `[P, L 2 G d]`: PEFT's prompt_embeddings."""
    eps, layers = config["layernorm_epsilon"], config["num_layers"]
    x = weights["transformer.embedding.word_embeddings.weight"][tokens]
    for i in range(layers):
        name, own = f"transformer.encoder.layers.{i}", None
        if prefix is not None:
            own = prefix.reshape(len(prefix), layers, 2, -1, config["kv_channels"])[:, i].transpose(1, 0, 2, 3)
        seen = normed(x, weights[f"{name}.input_layernorm.weight"], eps)
        x = x + linear(attended(seen, weights, f"{name}.self_attention", config, own), weights, f"{name}.self_attention.dense")
        seen = normed(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
        gate, up = np.split(linear(seen, weights, f"{name}.mlp.dense_h_to_4h"), 2, axis=1)
        x = x + linear(gate / (1 + np.exp(-gate)) * up, weights, f"{name}.mlp.dense_4h_to_h")
    return normed(x, weights["transformer.encoder.final_layernorm.weight"], eps)


def logits_of(weights: Weights, config: dict[str, Any], tokens: list[int], prefix: Array | None = None) -> Array:
    """`[T, V]`."""
    return linear(hidden_of(weights, config, tokens, prefix), weights, "transformer.output_layer")


def loss_of(weights: Weights, config: dict[str, Any], rows: list[list[int]], labels: list[list[int]]) -> float:
    """Mean negative log-likelihood of the labels (below 0: none) from the token before each."""
    found = []
    for row, wanted in zip(rows, labels, strict=True):
        logits = logits_of(weights, config, row)
        logits = logits - logits.max(-1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found += [-table[t - 1, token] for t, token in enumerate(wanted) if t and token >= 0]
    return float(np.mean(found))
