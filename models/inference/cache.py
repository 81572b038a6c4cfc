"""KV cache: static tensors of keys and values with one row per sequence, and the attention core that writes and reads them.

The rest of the model does not know that it is decoding. `CachedCore` replaces attention's core, and position schemes get the
positions of their tokens from `CacheRows` (see models/position.py).
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Attention, Core
from models.position import Position
from models.token_positions import T, TokenPositions
from parallel.region import TensorParallelRegion


class CacheRows(TokenPositions):
    """The number of tokens in each row of the cache, and the positions of the tokens of the current forward pass.

    Rows 0 … n − 1 are in use, n ≤ `slots`, each with at most `length` tokens. A forward pass reads either whole prompts into new
    rows behind those in use (`prefill`), or one more token of every row (`advance`).
    """

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        super().__init__(TensorParallelRegion(None))  # no pass of a decoder is cut by positions
        self.slots, self.length, self.device = slots, length, device
        self.lengths: list[int] = []
        """Tokens in each row in use, including those of the current pass."""
        self.first = 0
        """The first row of the current pass."""
        self.even = True
        """Whether all rows of a pass of one token each are equally long, so that no key needs to be masked."""
        self._positions: Tensor | None = None
        self._made: dict[Hashable, object] = {}

    def prefill(self, lengths: Sequence[int]) -> None:
        """Prepares a pass that reads prompts of these lengths, each from position 0, into as many new rows."""
        if not 0 < len(lengths) <= self.slots - len(self.lengths) or not 0 < min(lengths) <= max(lengths) <= self.length:
            room = f"{self.slots - len(self.lengths)} rows free, of {self.length} tokens each"
            raise ValueError(f"prompts of {list(lengths)} tokens do not fit: {room}")
        self.first, self._positions = len(self.lengths), None
        self.lengths += lengths
        self._made.clear()

    def advance(self) -> None:
        """Prepares a pass that reads one token of every row in use."""
        if not self.lengths or max(self.lengths) >= self.length:
            raise ValueError(f"rows of {self.lengths} tokens cannot take another: they have room for {self.length}")
        self.first, self.even = 0, min(self.lengths) == max(self.lengths)
        self._positions = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        self._made.clear()

    @property
    def prefilling(self) -> bool:
        """Whether the current pass reads whole prompts."""
        return self._positions is None

    @property
    def positions(self) -> Tensor:
        """'n': the position of each row's token in a pass of one token each."""
        assert self._positions is not None
        return self._positions

    def of(self, x: Tensor) -> Tensor:
        """'s' for prompts, which all start at 0; 'n 1' or 'n 1 1' for one token per row of x 'n 1 d' or 'n h 1 e'."""
        return super().of(x) if self.prefilling else self.positions.view(-1, *(1 for _ in x.shape[2:]))

    def of_keys(self, x: Tensor) -> Tensor:
        """'t': as many as the longest row has."""
        return super().of_keys(x) if self.prefilling else torch.arange(max(self.lengths), device=x.device)

    own = of

    def rows(self, table: Tensor, x: Tensor) -> Tensor:
        """'s d' for prompts, 'n 1 d' for one token per row."""
        return super().rows(table, x) if self.prefilling else F.embedding(self.positions[:, None], table)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What the first layer of the current pass that asked for this key made."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    def mask(self, q: Tensor) -> Tensor | None:
        """'n 1 1 t' in q's dtype: −∞ where a row has no key t. None if all rows are equally long."""
        if self.even:
            return None

        def make() -> Tensor:
            absent = self.of_keys(q) > self.of(q)[..., None]
            return torch.zeros(absent.shape, dtype=q.dtype, device=q.device).masked_fill_(absent, -torch.inf)

        return self.once(("mask", q.dtype), make)


class KeyValueCache(nn.Module):
    """Keys and values 'slots k length e' of this rank's kv heads, in the rows of `rows`. Base class of what attends to them.

    The cache is initialised with zeros, because 0 times what was in uninitialised memory need not be 0.

    On a CPU the cache is at least fp32, whatever the precision of the model: torch's fused bf16 kernel takes five times as long as
    the fp32 kernel for a single query (benchmarks/generate.py).
    """

    def __init__(self, rows: CacheRows, heads: int, length: int, head_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = rows
        self.dtype = torch.promote_types(dtype, torch.float32) if rows.device.type == "cpu" else dtype
        shape = (rows.slots, heads, length, head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=rows.device) for _ in range(2))

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of row `source` to row `target`."""
        for cache in (self.keys, self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def gather(self, parents: Tensor, length: int) -> None:
        """Copies the first `length` tokens of row parents[i] to row i, for all i at once."""
        for cache in (self.keys, self.values):
            cache[: len(parents), :, :length] = cache[parents, :, :length]


class CachedCore(KeyValueCache):
    """Attention's core over a cache.

    In a pass of one token each, the output for a row depends on that row alone, up to rounding: the probability of a masked key
    is 0.
    """

    def __init__(self, core: Core, rows: CacheRows, heads: int, head_size: int, dtype: torch.dtype) -> None:
        super().__init__(rows, heads, rows.length, head_size, dtype)
        self.core = core

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None = None) -> Tensor:
        """q 'b h s e', k and v 'b k s e', bias 'h s s', 'n h 1 t' (or 1 for h) or None (causal) -> 'b h s e'."""
        rows = self.rows
        if rows.prefilling:
            where: tuple = slice(rows.first, len(rows.lengths)), slice(None), slice(k.shape[2])
            self.keys[where], self.values[where] = k, v
            return self.core(q, k, v, bias, samples)

        # Write k and v 'n k 1 e' at each row's position: one slice if all rows are equally long, else by index.
        n, kv_heads = k.shape[:2]
        if rows.even:
            where = slice(n), slice(None), slice(rows.lengths[0] - 1, rows.lengths[0])
        else:
            where, k, v = (torch.arange(n, device=k.device), slice(None), rows.positions), k[:, :, 0], v[:, :, 0]
        self.keys[where], self.values[where] = k, v

        # Attend to all keys of each row. The queries of a kv head are put side by side, so that no head is copied.
        heads, e = q.shape[1], q.shape[3]
        grouped = q.reshape(n, kv_heads, -1, e).to(self.dtype)  # n k h/k e
        mask = rows.mask(grouped)
        if bias is not None:
            mask = bias.expand(n, heads, 1, -1).reshape(n, kv_heads, heads // kv_heads, -1).to(self.dtype)
        used = slice(len(rows.lengths)), slice(None), slice(max(rows.lengths))
        # A core of variant.py need not be a Core. Whether the cache then computes what it does is tried first (variant_check.py).
        scale = 1 / self.core.divisor(grouped) if isinstance(self.core, Core) else None
        y = F.scaled_dot_product_attention(grouped, self.keys[used], self.values[used], attn_mask=mask, scale=scale)
        return y.reshape(n, heads, 1, e).to(q.dtype)


def install_cache(module: nn.Module, rows: CacheRows, heads: int) -> list[CachedCore]:
    """Gives every attention a core with a cache of `heads` kv heads, and every position scheme the positions of the rows."""
    remove_cache(module)
    dtype, cores = next(module.parameters()).dtype, []
    for part in list(module.modules()):
        if isinstance(part, Position):
            part.places = rows
        if isinstance(part, Attention):
            part.core = CachedCore(part.core, rows, heads, part.head_size, dtype)
            cores.append(part.core)
    return cores


def remove_cache(module: nn.Module) -> None:
    """Undoes `install_cache`; without a cache it does nothing."""
    for part in list(module.modules()):
        if isinstance(part, Position):
            part.places = TokenPositions(part.region)
        if isinstance(part, Attention) and isinstance(part.core, CachedCore):
            part.core = part.core.core
