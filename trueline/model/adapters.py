"""LoRA, DoRA and P-tuning v2 on a decoder: add, name, freeze, copy, merge, take off. One rule: an adapter belongs to a role, and the base
is never touched except by `merge_adapter`.

Roles share one trunk: `decoder(tokens, layout, role)` runs with that role's adapter, role None is the bare model.
"""

import copy
from collections.abc import Collection
from typing import Literal, cast

import torch
from torch import Tensor, nn

from trueline.config.schema import AdapterConfig
from trueline.data.stream import key
from trueline.errors import UserError
from trueline.model.decoder import MLP, Attention, Decoder, LowRank, Prefix, halves
from trueline.model.rounding import LEVELS, draws, stochastic

Kind = Literal["full", "lora", "ptuning"]

LOST, ROWS = 0.01, 256  # of a change, by rounding to the nearest; about so many rows of a matrix tell
PREFIX_STD = 0.02  # PEFT draws with 1: with 16 tokens the loss of stories260K is then 8.0 at first, against 2.0 (1.8 without a prefix)


def add_adapter(decoder: Decoder, role: str, config: AdapterConfig, seed: int) -> None:
    """Gives `role` a new adapter on the decoder's device and in its dtype, drawn by `init_adapter`; kind full adds nothing.

    On a decoder that is still on the meta device the adapter is too; call `init_adapter` once it has memory.
    """
    if config.kind == "lora":
        for half in halves(decoder):
            here = [name for name in config.targets if hasattr(half, name)]
            attach_low_rank(half, role, dict.fromkeys(here, (config.rank, scaled_alpha(config))), config.dropout, config.dora)
    elif config.kind == "ptuning":
        attach_prefix(decoder, role, config.tokens)
    init_adapter(decoder, role, seed)


def scaled_alpha(config: AdapterConfig) -> float:
    """What is divided by the rank to give the scale; rank-stabilised (arXiv:2312.03732), alpha is divided by the rank's root instead."""
    return config.alpha * config.rank**0.5 if config.rslora else config.alpha


def low_ranks(half: Attention | MLP, role: str) -> dict[str, LowRank]:
    """`role`'s LoRA on one half of a layer, by projection; empty if it has none there."""
    return dict(cast(nn.ModuleDict, half.adapters[role]).items()) if role in half.adapters else {}  # type: ignore[arg-type]


def attach_low_rank(half: Attention | MLP, role: str, sizes: dict[str, tuple[int, float]], dropout: float, dora: bool = False) -> None:
    """Adapters with uninitialised memory on one half of a layer; `sizes`: projection -> (rank, alpha)."""
    if not sizes:
        return
    _refuse_taken(half.adapters, role)
    made = {}
    for name, (rank, alpha) in sizes.items():
        linear = getattr(half, name)
        with torch.device("meta"):  # without this the layers' own initialisation would consume global random state
            adapter = LowRank(linear.in_features, linear.out_features, rank, alpha, dropout, dora)
        made[name] = adapter.to(linear.weight.dtype).to_empty(device=linear.weight.device)
    half.adapters[role] = nn.ModuleDict(made).train(half.training)


def attach_prefix(decoder: Decoder, role: str, tokens: int) -> None:
    """A prefix of `tokens` learned keys and values per layer, with uninitialised memory."""
    _refuse_taken(decoder.prefixes, role)
    config, weight = decoder.config, decoder.embed.weight
    with torch.device("meta"):
        prefix = Prefix(config.num_layers, tokens, config.num_kv_heads, config.head_dim)
    decoder.prefixes[role] = prefix.to(weight.dtype).to_empty(device=weight.device).train(decoder.training)


@torch.no_grad()
def init_adapter(decoder: Decoder, role: str, seed: int) -> None:
    """Draws `role`'s adapter. Every tensor has its own stream, keyed by the seed and its name, so nothing global is consumed.

    LoRA: `down` uniform in +-1/sqrt(in), `up` zero, so a new adapter changes nothing (arXiv:2106.09685 sect. 4.1). DoRA's magnitudes: the
    lengths of the rows as they are, for the same reason. P-tuning: normal with deviation 0.02.
    A new prefix is NOT without effect (tokens attend to it from the start), so a P-tuning run is measured against a frozen copy of its
    initial prefix (`copy_adapter`), not against the bare model.
    """
    for name, parameter in adapter_parameters(decoder, role).items():
        if parameter.is_meta or name.endswith(".magnitude"):
            continue
        if name.endswith(".up.weight"):
            parameter.zero_()
            continue
        # drawn in float32 on the CPU: the same numbers whatever the device and dtype
        generator = torch.Generator().manual_seed(key(seed, name))
        draw = torch.empty(parameter.shape, dtype=torch.float32)
        if name.endswith(".down.weight"):
            nn.init.kaiming_uniform_(draw, a=5**0.5, generator=generator)
        else:
            draw.normal_(std=PREFIX_STD, generator=generator)
        parameter.copy_(draw)
    for half in halves(decoder):
        for name, adapter in low_ranks(half, role).items():
            if adapter.magnitude is not None and not adapter.magnitude.is_meta:
                adapter.magnitude.copy_(adapter.row_lengths(getattr(half, name).weight))


def adapter_parameters(decoder: Decoder, role: str) -> dict[str, nn.Parameter]:
    """`role`'s parameters by their full name in the decoder; empty if it has no adapter."""
    inner, prefix = f".adapters.{role}.", f"prefixes.{role}."
    return {name: p for name, p in decoder.named_parameters() if inner in name or name.startswith(prefix)}


def base_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """The decoder's parameters without any role's adapter, by name; a tied head counts once."""
    return {name: p for name, p in decoder.named_parameters() if ".adapters." not in name and not name.startswith("prefixes.")}


def trainable(decoder: Decoder, role: str | None, kind: Kind, keep: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Freezes all of the decoder but what is trained, and returns that by name: the base for kind full, otherwise `role`'s adapter.

    `keep`: other roles whose adapters stay as they are (PPO's policy and critic on one trunk).
    """
    if kind == "full":
        chosen = base_parameters(decoder)
        # a batch has few of the vocabulary's tokens: on a CPU, where memory is what it waits for, only their rows have a gradient
        decoder.embed.sparse = decoder.embed.weight.device.type == "cpu"
    elif role is None or not (chosen := adapter_parameters(decoder, role)):
        raise ValueError(f"role {role!r} has no adapter to train")
    kept = {name for other in keep for name in adapter_parameters(decoder, other)}
    for name, parameter in decoder.named_parameters():
        if name not in kept:
            parameter.requires_grad_(name in chosen)
    return chosen


@torch.no_grad()
def merge_adapter(decoder: Decoder, role: str) -> None:
    """Folds `role`'s LoRA into the base weights and removes it: every role then starts from the merged base.

    Each sum is made and rounded once (`merged_weight`): merging and un-merging in bfloat16 drifts.
    """
    if role in decoder.prefixes:
        raise UserError(
            "a P-tuning adapter cannot be merged: learned keys and values are no weights of the model; export it with --adapter instead"
        )
    if not has_adapter(decoder, role):
        raise ValueError(f"role {role!r} has no adapter to merge")
    for half in halves(decoder):
        for name, adapter in low_ranks(half, role).items():
            getattr(half, name).weight.copy_(merged_weight(half, name, adapter))
    remove_adapter(decoder, role)


@torch.no_grad()
def merged_weight(half: Attention | MLP, name: str, adapter: LowRank) -> Tensor:
    """The weight of `half`'s linear `name` with `adapter` in it, summed in float32 at least and rounded once, in its own dtype.

    To bfloat16 it is rounded to the nearest where that keeps the change, and else at random, by draws that are always the same. A young
    adapter adds less than half of a weight's last place: to the nearest, half was left of what ten steps of AdamW at 1e-5 did to the loss.
    """
    weight = cast(nn.Linear, getattr(half, name)).weight.detach()
    wide = adapter.merged(weight)
    if weight.dtype != torch.bfloat16:
        return wide
    rows = slice(None, None, -(-len(weight) // ROWS))
    change, nearest = wide[rows] - weight[rows], wide[rows].to(torch.bfloat16).float() - weight[rows]
    fits = ((nearest * change).sum() / change.square().sum() - 1).abs() < LOST  # then it is the better one, for it adds less noise
    if wide.device.type == "cpu" and fits:  # elsewhere the device would be waited for
        return wide.to(torch.bfloat16)
    draw = draws(key(0, f"merging {name}"), wide.numel(), wide.device)()
    whole = stochastic(wide.flatten(), draw.masked_fill_(fits, LEVELS // 2)).contiguous().view(weight.shape)
    # random bits can make a number of what is none
    return whole.masked_fill_(~torch.stack([p.float().sum() for p in adapter.parameters()]).sum().isfinite(), torch.nan)


def remove_adapter(decoder: Decoder, role: str) -> None:
    """Takes `role`'s adapter off; a role without one is left alone."""
    for home in _homes(decoder, role):
        del home[role]


def rename_adapter(decoder: Decoder, old: str, new: str) -> None:
    """Moves `old`'s adapter, parameters and all, to the role `new`."""
    homes = _homes(decoder, old)
    for home in homes:
        _refuse_taken(home, new)
    for home in homes:
        home[new] = home.pop(old)


def copy_adapter(decoder: Decoder, source: str, target: str) -> None:
    """Gives `target` a frozen copy of `source`'s adapter: the reference of a P-tuning run, or of a run that goes on from an adapter."""
    homes = _homes(decoder, source)
    for home in homes:
        _refuse_taken(home, target)
    for home in homes:
        home[target] = copy.deepcopy(home[source]).requires_grad_(False)


def has_adapter(decoder: Decoder, role: str) -> bool:
    return bool(_homes(decoder, role))


def _homes(decoder: Decoder, role: str) -> list[nn.ModuleDict]:
    """The dictionaries that hold a part of `role`'s adapter."""
    return [home for home in (*(half.adapters for half in halves(decoder)), decoder.prefixes) if role in home]


def _refuse_taken(home: nn.ModuleDict, role: str) -> None:
    if not role.isidentifier():
        raise ValueError(f"a role is named by one word, got {role!r}")
    if role in home:
        raise ValueError(f"role {role!r} already has an adapter; remove it first")
