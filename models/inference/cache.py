"""A static cache of keys and values, and attention that reads and writes it: a row a sequence, each as long as it is.

Nothing else of a model knows that it is decoding. Attention's core is replaced by one that keeps what it is given and looks at
what was kept; position schemes ask where their tokens are (models/position.py), and are told by the rows.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Core
from models.position import Made, TokenPositions


class Rows(TokenPositions):
    """Which rows are in use and how many tokens each holds; during a pass, the places of the tokens that it reads.

    Rows 0 … n − 1 are in use, without a gap. A pass reads either whole prompts into new rows behind them (`begin`), or one more
    token of every row (`advance`). `slots` is the largest n, `length` the tokens that a row has room for.
    """

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        self.slots, self.length, self.device = slots, length, device
        self.lengths: list[int] = []
        """Tokens in each row in use, those of the pass under way included."""
        self.first = 0
        """The first row that the pass under way reads."""
        self.even = True
        """Whether all rows of a pass that advances are equally long: then no key need be masked."""
        self._now: Tensor | None = None
        self._made: dict[Hashable, object] = {}

    def begin(self, lengths: Sequence[int]) -> None:
        """The coming pass reads prompts of these lengths, side by side from place 0, into as many new rows."""
        if not 0 < len(lengths) <= self.slots - len(self.lengths) or not 0 < min(lengths) <= max(lengths) <= self.length:
            room = f"{self.slots - len(self.lengths)} rows free, of {self.length} tokens each"
            raise ValueError(f"prompts of {list(lengths)} tokens do not fit: {room}")
        self.first, self._now = len(self.lengths), None
        self.lengths += lengths
        self._made.clear()

    def advance(self) -> None:
        """The coming pass reads one token of every row in use."""
        if not self.lengths or max(self.lengths) >= self.length:
            raise ValueError(f"rows of {self.lengths} tokens cannot take another: they have room for {self.length}")
        self.first, self.even = 0, min(self.lengths) == max(self.lengths)
        self._now = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        self._made.clear()

    @property
    def begins(self) -> bool:
        """Whether the pass under way reads prompts."""
        return self._now is None

    @property
    def now(self) -> Tensor:
        """'n': the place of each row's token in a pass that advances."""
        assert self._now is not None
        return self._now

    def of(self, x: Tensor, first: int = 0) -> Tensor:
        """'s' for prompts, which all begin at 0; 'n 1' or 'n 1 1' for one token a row of x 'n 1 d' or 'n h 1 e'."""
        return super().of(x, first) if self.begins else self.now.view(-1, *(1 for _ in x.shape[2:]))

    def of_keys(self, x: Tensor) -> Tensor:
        """'t': as many as the longest row has."""
        return super().of_keys(x) if self.begins else torch.arange(max(self.lengths), device=x.device)

    def rows(self, table: Tensor, x: Tensor, first: int = 0) -> Tensor:
        """'s d' or 'n 1 d'."""
        return super().rows(table, x, first) if self.begins else F.embedding(self.now[:, None], table)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Made by the first layer that asks during a pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    def mask(self, q: Tensor) -> Tensor | None:
        """'n 1 1 t' in q's dtype: −∞ where a row has no such key; None where every row has all."""
        return None if self.even else self.once(("mask", q.dtype), lambda: self._mask(q))

    def _mask(self, q: Tensor) -> Tensor:
        absent = self.of_keys(q) > self.of(q)[..., None]
        return torch.zeros(absent.shape, dtype=q.dtype, device=q.device).masked_fill_(absent, -torch.inf)


class CachedCore(nn.Module):
    """Attention's core over a cache 'slots k length e' of this rank's kv heads.

    What a pass that advances computes for a row depends on that row alone, up to rounding: a masked key's probability is 0.
    The cache begins as zeros, because 0 times whatever was there before need not be 0.

    On a CPU it is kept in fp32 at least, whatever the model's precision: torch's fused bf16 kernel takes five times as long for
    a single query as fp32's (benchmarks/generate.py).
    """

    def __init__(self, core: Core, rows: Rows, heads: int, head_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.core, self.rows = core, rows
        self.dtype = torch.promote_types(dtype, torch.float32) if rows.device.type == "cpu" else dtype
        shape = (rows.slots, heads, rows.length, head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=rows.device) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None = None) -> Tensor:
        """q 'b h s e', k and v 'b k s e', bias 'h s s', 'n h 1 t' or None (causal) -> 'b h s e'."""
        rows = self.rows
        if rows.begins:
            place = slice(rows.first, len(rows.lengths)), slice(None), slice(k.shape[2])
            self.keys[place], self.values[place] = k, v
            return self.core(q, k, v, bias, samples)
        self._keep(k, v)
        used = slice(len(rows.lengths)), slice(None), slice(max(rows.lengths))
        n, heads, _, e = q.shape
        grouped = q.reshape(n, k.shape[1], -1, e).to(self.dtype)  # n k h/k e: the queries of a kv head side by side, no head copied
        mask = rows.mask(grouped) if bias is None else bias.view(n, k.shape[1], -1, bias.shape[-1]).to(self.dtype)
        y = F.scaled_dot_product_attention(grouped, self.keys[used], self.values[used], attn_mask=mask)
        return y.reshape(n, heads, 1, e).to(q.dtype)

    def _keep(self, k: Tensor, v: Tensor) -> None:
        """Writes 'n k 1 e' at each row's place."""
        rows = self.rows
        if rows.even:
            place: tuple = slice(len(k)), slice(None), slice(rows.lengths[0] - 1, rows.lengths[0])
        else:
            place, k, v = (torch.arange(len(k), device=k.device), slice(None), rows.now), k[:, :, 0], v[:, :, 0]
        self.keys[place], self.values[place] = k, v

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes a copy of the first `length` tokens of row `source`."""
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]

    def gather(self, parents: Tensor, length: int) -> None:
        """Row i becomes a copy of the first `length` tokens of what row parents[i] was, for all i at once."""
        for kept in (self.keys, self.values):
            kept[: len(parents), :, :length] = kept[parents, :, :length]
