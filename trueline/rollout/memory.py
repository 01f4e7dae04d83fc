"""Keys and values of the requests being answered, and the layouts that fill and read them. One rule: every way to store them answers alike.

Slots are read as views; pages are gathered, one layer at a time, unless a kernel reads them through their table. A learned prefix is in
neither: it is read where the model has it, once for all requests.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from trueline.errors import RunError
from trueline.model.attention import attend_past, decode_attention, decode_prefixed
from trueline.model.decoder import DecoderConfig
from trueline.model.layout import Packed, block_positions, count_up
from trueline.rollout.decode import cached_attention, kernel_for, turning_kernel_for
from trueline.rollout.native import Kernels

AHEAD = 64  # columns reserved ahead, at least: growing copies
PAGE = 16  # tokens; half of it is what a request leaves unused on average


def whole(tokens: int) -> int:
    """`tokens` and what is left of the last page: so many columns are stored and read, for products of other sizes are slower."""
    return -(-tokens // PAGE) * PAGE


class Slots:
    """Keys and values `[L, rows, G, columns, d]`: a row per request, a column per token.

    Every number in it is finite, also where no token lies: a masked value counts 0 times itself. `beside`: a channel's keys lie side by
    side, not a key's channels; on a CPU batched products of few queries then take less time.
    """

    table: Tensor | None = None  # rows are where they are
    free = total = 2**62  # never short: it is chosen where the longest requests fit

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device, beside: bool = False):
        shape = (config.num_layers, 0, config.num_kv_heads, 0, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.beside = beside

    def price(self, length: int, shared: int = 0) -> int:
        """Pages that a request of `length` tokens needs for itself when it joins one that has its first `shared`."""
        return 0

    def missing(self, lengths: list[int]) -> int:
        """Pages to be taken before row i can hold `lengths[i]` tokens."""
        return 0

    def reserve(self, rows: int, lengths: list[int], limit: int) -> None:
        """Room for `rows` requests of `lengths`, and for some more tokens up to `limit`: most answers stop long before."""
        layers, old_rows, heads, old_columns, size = self.keys.shape
        columns = max(lengths, default=0)
        if rows <= old_rows and columns <= old_columns:
            return
        if columns > old_columns:
            columns = whole(max(columns, min(columns + max(columns // 2, AHEAD), limit)))
        shape = (layers, max(rows, old_rows), heads, max(columns, old_columns), size)
        for name in ("keys", "values"):  # one after the other: only one of them is held twice
            old = getattr(self, name)
            beside = self.beside and name == "keys"
            new = old.new_zeros((*shape[:3], size, shape[3])).transpose(3, 4) if beside else old.new_zeros(shape)
            new[:, :old_rows, :, :old_columns] = old
            setattr(self, name, new)

    def write(self, layer: int, rows: Tensor, columns: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores `k`, `v` `[T, G, d]` at `rows` `[T]`, `columns` `[T]`."""
        self.keys[layer, rows, :, columns] = k
        self.values[layer, rows, :, columns] = v

    def share(self, sources: list[int], targets: list[int], lengths: list[int]) -> None:
        """Rows `targets`, which are new, begin with the first tokens of rows `sources`."""
        if targets:
            self._copy(sources, targets, max(lengths))

    def remove(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        """Rows `gone` are over; rows `sources`, of at most `length` tokens, become rows `targets`, which are some of those."""
        if targets:
            self._copy(sources, targets, length)

    def _copy(self, sources: list[int], targets: list[int], length: int) -> None:
        source, target = (torch.tensor(rows, device=self.keys.device) for rows in (sources, targets))
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]

    def past(self, rows: int, length: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens of rows 0 .. `rows` - 1: two `[rows, G, length, d]`."""
        return self.keys[layer, :rows, :, :length], self.values[layer, :rows, :, :length]

    def views(self, index: Tensor, length: int) -> "Views":
        """Of rows 0 .. N - 1, whose newest tokens are number `index` `[N]` and whose past has at most `length` tokens."""
        heads, columns = self.keys.shape[2:4]
        past_keys, past_values = (x[:, : len(index), :, :length].flatten(1, 2) for x in (self.keys, self.values))
        own, newest = torch.arange(len(index) * heads), index.repeat_interleave(heads)
        keys, values = self.keys.flatten(1, 2).unbind(), self.values.flatten(1, 3).unbind()
        return Views(keys, values, own, newest, own * columns + newest, past_keys.transpose(2, 3).unbind(), past_values.unbind())


@dataclass(frozen=True)
class Views:
    """Each layer's part of slots, cut once for all layers of a step on a CPU, where cutting takes as long as computing."""

    keys: tuple[Tensor, ...]  # all there is [rows x G, columns, d]
    values: tuple[Tensor, ...]  # [rows x G x columns, d]
    own: Tensor  # 0 .. N x G - 1
    newest: Tensor  # column of the newest key of each [N x G]
    places: Tensor  # of the newest values among all [N x G]
    past_keys: tuple[Tensor, ...]  # [N x G, d, length]
    past_values: tuple[Tensor, ...]  # [N x G, length, d]


class Pages:
    """Keys and values `[L, pages, G, PAGE, d]` of a fixed number of pages; a request has those that row i of `table` names, in order.

    No page but a request's last has room left. Whole pages of a shared prompt belong to several requests. All numbers are finite.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device, budget: int):
        self.free_pages = list(range(budget // (PAGE * bytes_per_token(config, dtype))))[::-1]
        self.total = len(self.free_pages)
        shape = (config.num_layers, self.total, config.num_kv_heads, PAGE, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.users = [0] * self.total
        self.held: list[list[int]] = []  # row -> its pages
        self.stale = False  # the table is older than `held`
        self.table = torch.zeros(0, 0, dtype=torch.int32, device=device)  # [rows, most pages of a row]
        self.places = self.table  # [rows, G, most]: where each head's part of each page lies among all of a layer's

    @property
    def free(self) -> int:
        return len(self.free_pages)

    def price(self, length: int, shared: int = 0) -> int:
        return -(-length // PAGE) - shared // PAGE

    def missing(self, lengths: list[int]) -> int:
        return sum(self.price(n) - (len(self.held[i]) if i < len(self.held) else 0) for i, n in enumerate(lengths))

    def reserve(self, rows: int, lengths: list[int], limit: int) -> None:
        """Pages for row i to hold `lengths[i]` tokens; `missing` told whether there are enough."""
        if not self.stale and not self.missing(lengths) and len(self.held) == len(lengths):
            return
        self.stale = False
        self.held += [[] for _ in range(len(lengths) - len(self.held))]
        for held, length in zip(self.held, lengths, strict=True):
            held += [self._take() for _ in range(self.price(length) - len(held))]
        most = max(map(len, self.held), default=0)
        rows_of_pages = [held + [0] * (most - len(held)) for held in self.held]
        self.table = torch.tensor(rows_of_pages, dtype=torch.int32, device=self.keys.device).view(-1, most)
        heads = self.keys.shape[2]
        self.places = self.table[:, None] * heads + torch.arange(heads, device=self.table.device)[:, None]

    def write(self, layer: int, rows: Tensor, columns: Tensor, k: Tensor, v: Tensor) -> None:
        pages, inside = self.table[rows, columns // PAGE], columns % PAGE
        self.keys[layer, pages, :, inside] = k
        self.values[layer, pages, :, inside] = v

    def share(self, sources: list[int], targets: list[int], lengths: list[int]) -> None:
        """Whole pages are named by both rows, the rest is copied."""
        for source, target, length in zip(sources, targets, lengths, strict=True):
            held = self.held[source][: length // PAGE]
            for page in held:
                self.users[page] += 1
            if length % PAGE:
                held.append(self._take())
                for part in (self.keys, self.values):
                    part[:, held[-1]] = part[:, self.held[source][len(held) - 1]]
            assert target == len(self.held)
            self.held.append(held)
        self.stale = True

    def remove(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        for page in [page for row in gone for page in self.held[row]]:
            self.users[page] -= 1
            if not self.users[page]:
                self.free_pages.append(page)
        for source, target in zip(sources, targets, strict=True):
            self.held[target] = self.held[source]
        del self.held[len(self.held) - len(gone) :]
        self.stale = True

    def past(self, rows: int, length: int, layer: int) -> tuple[Tensor, Tensor]:
        most = self.price(length)
        places = self.places[:rows, :, :most].flatten()
        shape = (rows, self.keys.shape[2], most * PAGE, -1)
        keys, values = (part[layer].flatten(0, 1).index_select(0, places).view(shape) for part in (self.keys, self.values))
        return keys[:, :, :length], values[:, :, :length]

    def _take(self) -> int:
        page = self.free_pages.pop()
        self.users[page] = 1
        return page


Memory = Slots | Pages


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Key and value of one token in every layer."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def needs_pages(bytes_per_token: int, budget: int, lengths: list[int], running: int) -> bool:
    """Whether slots for `running` of the requests, of `lengths` tokens at most, would take more than `budget` bytes.

    A slot is as long as the longest request: it wastes what answers leave unused, and costs nothing to find: taken where it fits.
    """
    rows = min(running, len(lengths))
    return rows * whole(max(lengths, default=0)) * bytes_per_token > budget


def make_memory(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, lengths: list[int], running: int, budget: int, native: bool = False
) -> Memory:
    """Slots or pages for `running` requests at a time, of at most `lengths` tokens. RunError if one has no room in `budget`.

    `native`: they are read by `Decode.turn_and_attend`.
    """
    each = bytes_per_token(config, dtype)
    if not needs_pages(each, budget, lengths, running):
        # kernels read a key's channels side by side
        kernel = native or kernel_for(torch.empty(0, dtype=dtype, device=device)) is not None
        return Slots(config, dtype, device, device.type == "cpu" and not kernel)
    longest = whole(max(lengths)) * each
    if longest > budget:
        raise RunError(
            f"keys and values of a request of {max(lengths)} tokens take {longest / 2**20:.1f} MiB, and {budget / 2**20:.1f} MiB are there "
            "for them; lower sampling.max_new_tokens, or raise rollout.memory"
        )
    # no more than all requests can fill
    return Pages(config, dtype, device, min(budget, sum(whole(n) * each for n in sorted(lengths)[-running:])))


@dataclass(frozen=True)
class Prefill:
    """Whole prompts, packed, which also leave their keys and values in memory."""

    inner: Packed
    memory: Memory
    rows: Tensor  # row of each token [T]
    columns: Tensor  # where each token is stored [T]

    @staticmethod
    def of(
        lengths: list[int], rows: list[int], memory: Memory, contexts: list[int] | None = None, anchors: list[int | None] | None = None
    ) -> "Prefill":
        device = memory.keys.device
        of_token = torch.tensor(rows, device=device).repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))
        return Prefill(Packed.of(lengths, contexts, device, anchors), memory, of_token, count_up(lengths, device))

    @property
    def positions(self) -> Tensor:
        return self.inner.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        self.memory.write(layer, self.rows, self.columns, k, v)
        return self.inner.attend(layer, q, k, v, window)

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        self.memory.write(layer, self.rows, self.columns, k, v)
        return self.inner.attend_prefixed(layer, q, k, v, keys, values, window)


@dataclass(frozen=True)
class Decode:
    """The newest token of each request in rows 0 .. N - 1; its past lies in memory."""

    positions: Tensor  # [N] or [2, N]
    memory: Memory
    rows: Tensor  # 0 .. N - 1
    columns: Tensor  # where each token is stored [N]: how many stand before it
    lengths: Tensor  # tokens stored of each, the newest included [N] int32
    # by window: [N, G, 1, prefix and columns read], minus infinity where a request's newest token does not look; none for kernels
    masks: dict[int | None, Tensor]
    longest: int  # columns read
    turn: tuple[Tensor, Tensor] | None = None  # cosines and sines `[N, 1, pairs]` where heads are turned as they are stored
    interleaved: bool = False
    native: Kernels | None = None  # for `turn_and_attend`

    @staticmethod
    def of(
        index: Tensor,
        longest: int,
        memory: Memory,
        windows: set[int | None],
        front: int = 0,
        places: Tensor | None = None,
        native: Kernels | None = None,
    ) -> "Decode":
        """`index` `[N]`: each token's in its sequence; `longest` is 1 + the largest, or more, known without asking the device.

        `front`: tokens of the learned prefix. `places` `[N, 2]` makes two rows of positions (`layout.block_positions`).
        """
        device, dtype, longest = memory.keys.device, memory.keys.dtype, whole(longest)
        positions = index if places is None else block_positions(index, places)
        masks = {}
        native = None if front else native
        for window in windows if front or (native is None and kernel_for(memory.keys) is None) else ():
            ahead = torch.arange(-front, longest, device=device) - index[:, None]
            unseen = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            mask = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, -torch.inf)
            # repeated for each head once, for all layers
            masks[window] = mask[:, None, None].expand(-1, memory.keys.shape[2], -1, -1).contiguous()
        rows = torch.arange(len(index), device=device)
        return Decode(positions, memory, rows, index, (index + 1).int(), masks, longest, native=native)

    def turning(self, cos: Tensor, sin: Tensor, config: DecoderConfig) -> "Decode | None":
        """This layout for heads that are not turned yet, where a kernel turns and stores them at once."""
        if self.masks or self.memory.table is not None or config.rope_rows or turning_kernel_for(self.memory.keys) is None:
            return None
        return replace(self, turn=(cos, sin), interleaved=config.rope == "interleaved")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        if self.turn is not None and (kernel := turning_kernel_for(q)) is not None:
            q = kernel(q, k, v, *self.turn, self.memory.keys[layer], self.memory.values[layer], self.columns, self.interleaved)
        else:
            self.memory.write(layer, self.rows, self.columns, k, v)
        if not self.masks:
            return cached_attention(q, self.memory.keys[layer], self.memory.values[layer], self.lengths, window, self.memory.table)
        return decode_attention(q, *self.memory.past(len(q), self.longest, layer), self.masks[window])

    @cached_property
    def views(self) -> Views | None:
        """For `attend_groups`: of slots, without a learned prefix."""
        fits = isinstance(self.memory, Slots) and all(mask.shape[-1] == self.longest for mask in self.masks.values())
        return self.memory.views(self.columns, self.longest) if fits and self.masks else None  # type: ignore[union-attr]

    def attend_groups(self, layer: int, heads: Tensor, window: int | None) -> Tensor:
        """`attend` where there are `views`: `heads` `[N x G, H / G + 2, d]`, a key head's queries, key and value -> `[N x G, H / G, d]`."""
        views = self.views
        assert views is not None
        shared = heads.shape[1] - 2
        views.keys[layer].index_put_((views.own, views.newest), heads[:, shared])
        views.values[layer].index_copy_(0, views.places, heads[:, shared + 1])
        return attend_past(heads[:, :shared], views.past_keys[layer], views.past_values[layer], self.masks[window].flatten(0, 1))

    def turn_and_attend(self, layer: int, heads: Tensor, turn: Tensor, window: int | None) -> Tensor:
        """`attend` by `native`: `heads` `[N, G, H / G + 2, d]` are turned first, by `turn` `[N, 1, pairs]` -> `[N, G, H / G, d]`."""
        assert self.native is not None
        memory = self.memory
        return self.native.attend(
            heads, turn, memory.keys[layer], memory.values[layer], memory.table, self.columns, self.longest, window
        )

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        self.memory.write(layer, self.rows, self.columns, k, v)
        return decode_prefixed(q, keys, values, *self.memory.past(len(q), self.longest, layer), self.masks[window])


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
