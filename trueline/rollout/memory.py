"""Key/value memory of the requests being answered, and the layouts that fill and read it. One rule: it is read as views, never gathered."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trueline.model.attention import decode_attention
from trueline.model.decoder import DecoderConfig
from trueline.model.layout import Packed, block_positions, count_up

AHEAD = 64  # columns reserved ahead, at least: growing copies


class Memory:
    """Keys and values `[L, rows, G, columns, d]`: a row per request, a column per token; P-tuning's prefix takes the first `front` columns.

    Every number in it is finite, also where no token lies: a masked value counts 0 times itself.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device, front: int = 0):
        self.front = front
        self.windows = set(config.windows) or {None}
        shape = (config.num_layers, 0, config.num_kv_heads, 0, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def reserve(self, rows: int, length: int, limit: int) -> None:
        """Room for `rows` requests of `length` tokens, and for some more up to `limit`: most answers stop long before."""
        layers, old_rows, heads, old_columns, size = self.keys.shape
        columns = self.front + length
        if rows <= old_rows and columns <= old_columns:
            return
        if columns > old_columns:
            columns = max(columns, min(columns + max(columns // 2, AHEAD), self.front + limit))
        shape = (layers, max(rows, old_rows), heads, max(columns, old_columns), size)
        for name in ("keys", "values"):  # one after the other: only one of them is held twice
            old = getattr(self, name)
            new = old.new_zeros(shape)
            new[:, :old_rows, :, :old_columns] = old
            setattr(self, name, new)

    def write(self, layer: int, rows: Tensor, columns: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores `k`, `v` `[T, G, d]` at `rows` `[T]`, `columns` `[T]`."""
        self.keys[layer, rows, :, columns] = k
        self.values[layer, rows, :, columns] = v

    def write_prefix(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores a learned prefix `[P, G, d]` in front of `rows` `[T]`."""
        self.keys[layer, rows, :, : self.front] = keys.transpose(0, 1).to(self.keys.dtype)
        self.values[layer, rows, :, : self.front] = values.transpose(0, 1).to(self.values.dtype)

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies the prefix and the first `length` tokens of rows `source` `[N]` to rows `target` `[N]`."""
        columns = self.front + length
        for part in (self.keys, self.values):
            part[:, target, :, :columns] = part[:, source, :, :columns]


@dataclass(frozen=True)
class Prefill:
    """Whole prompts, packed, which also leave their keys and values in memory."""

    inner: Packed
    memory: Memory
    leaders: Tensor  # row of each prompt [N]
    rows: Tensor  # row of each token [T]
    columns: Tensor  # where each token is stored [T]

    @staticmethod
    def of(
        lengths: list[int], rows: list[int], memory: Memory, contexts: list[int] | None = None, anchors: list[int | None] | None = None
    ) -> "Prefill":
        device = memory.keys.device
        leaders = torch.tensor(rows, device=device)
        of_token = leaders.repeat_interleave(torch.tensor(lengths, device=device))
        inner = Packed.of(lengths, contexts, device, anchors)
        return Prefill(inner, memory, leaders, of_token, count_up(lengths, device) + memory.front)

    @property
    def positions(self) -> Tensor:
        return self.inner.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        self.memory.write(layer, self.rows, self.columns, k, v)
        return self.inner.attend(layer, q, k, v, window)

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        self.memory.write_prefix(layer, self.leaders, keys, values)
        self.memory.write(layer, self.rows, self.columns, k, v)
        return self.inner.attend_prefixed(layer, q, k, v, keys, values, window)


@dataclass(frozen=True)
class Decode:
    """The newest token of each request in rows 0 .. N - 1; its past lies in memory."""

    positions: Tensor  # [N] or [2, N]
    memory: Memory
    rows: Tensor  # 0 .. N - 1
    columns: Tensor  # where each token is stored [N]
    masks: dict[int | None, Tensor]  # by window: [N, G, 1, columns read], minus infinity where a request's newest token does not look
    past: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer [N, G, columns read, d], views of the memory

    @staticmethod
    def of(index: Tensor, longest: int, memory: Memory, places: Tensor | None = None) -> "Decode":
        """`index` `[N]`: each token's in its sequence; `longest` is 1 + the largest, known without asking the device.

        `places` `[N, 2]` makes two rows of positions (`layout.block_positions`).
        """
        keys = memory.keys
        columns = index + memory.front
        positions = index if places is None else block_positions(index, places)
        ahead = torch.arange(memory.front + longest, device=keys.device) - columns[:, None]
        masks = {}
        for window in memory.windows:
            unseen = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            mask = torch.zeros(unseen.shape, dtype=keys.dtype, device=keys.device).masked_fill_(unseen, -torch.inf)
            # repeated for each head once, for all layers
            masks[window] = mask[:, None, None].expand(-1, keys.shape[2], -1, -1).contiguous()
        views = (part[:, : len(index), :, : memory.front + longest].unbind() for part in (keys, memory.values))
        return Decode(positions, memory, torch.arange(len(index), device=keys.device), columns, masks, tuple(zip(*views, strict=True)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        self.memory.write(layer, self.rows, self.columns, k, v)
        return decode_attention(q, *self.past[layer], self.masks[window])

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        return self.attend(layer, q, k, v, window)  # the prompt left the prefix in memory


@dataclass(frozen=True)
class Mixed:
    """Newest tokens of the running requests, then the prompts of the admitted ones: one forward serves both."""

    decode: Decode
    prefill: Prefill
    positions: Tensor  # [N + T] or [2, N + T]

    @staticmethod
    def of(decode: Decode, prefill: Prefill) -> "Mixed":
        return Mixed(decode, prefill, torch.cat((decode.positions, prefill.positions), -1))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        n = len(self.decode.rows)
        old = self.decode.attend(layer, q[:n], k[:n], v[:n], window)
        return torch.cat((old, self.prefill.attend(layer, q[n:], k[n:], v[n:], window)))

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        n = len(self.decode.rows)
        old = self.decode.attend_prefixed(layer, q[:n], k[:n], v[:n], keys, values, window)
        return torch.cat((old, self.prefill.attend_prefixed(layer, q[n:], k[n:], v[n:], keys, values, window)))
