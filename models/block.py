"""Transformer blocks: how attention and the MLP are added to the residual stream. 'b s d' -> 'b s d'."""

from torch import Tensor, nn

from models.attention import EVERY_ATTENTION
from models.dropout import Dropout
from models.registry import BuildContext


class Block(nn.Module):
    """The modules of a block: two norms, attention, an MLP and residual dropout. A subclass defines `forward(x, samples, segments)`.

    x: 'b s d', equal on every tensor rank ('b s/tp d' under sequence parallelism); samples: 'b', the global sample indices that
    dropout masks are computed from (None without dropout); segments: 'b s', the numbers of the documents to which attention is confined
    (None if it is not). A subclass without the third parameter works where it is None.
    """

    final_norm = True
    """Whether the model ends with a norm of its own, because the residual stream leaves the last block unnormalised."""

    def __init__(self, name: str, context: BuildContext) -> None:
        super().__init__()
        model, seed, grid = context.model, context.seed, context.grid
        self.attention_norm = context.norm(f"{name}.attention_norm", model.hidden_size)
        self.attention = context.chosen("attention", EVERY_ATTENTION)(f"{name}.attention", context)
        self.mlp_norm = context.norm(f"{name}.mlp_norm", model.hidden_size)
        self.mlp = context.chosen("mlp")(f"{name}.mlp", model, context.init, grid)
        self.attention_dropout = Dropout(f"{name}.attention.residual", model.residual_dropout, seed, grid)
        self.mlp_dropout = Dropout(f"{name}.mlp.residual", model.residual_dropout, seed, grid)

    def attend(self, x: Tensor, samples: Tensor | None, segments: Tensor | None = None) -> Tensor:
        """Attention followed by residual dropout. 'b s d' -> 'b s d'."""
        y = self.attention(x, samples) if segments is None else self.attention(x, samples, segments)
        return self.attention_dropout(y, samples)

    def feed_forward(self, x: Tensor, samples: Tensor | None) -> Tensor:
        """The MLP followed by residual dropout. 'b s d' -> 'b s d'."""
        return self.mlp_dropout(self.mlp(x, samples), samples)

    think = feed_forward
    """The former name of `feed_forward`, which blocks in experiments' variant.py may use."""


class PreNormBlock(Block):
    """x += attention(norm(x)); x += mlp(norm(x)) (GPT-2, Llama; arXiv:2002.04745)."""

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.attention_norm(x), samples, segments)
        return x + self.feed_forward(self.mlp_norm(x), samples)


class PostNormBlock(Block):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)) (arXiv:1706.03762)."""

    final_norm = False

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        x = self.attention_norm(x + self.attend(x, samples, segments))
        return self.mlp_norm(x + self.feed_forward(x, samples))


class ParallelBlock(Block):
    """x + attention(norm₁(x)) + mlp(norm₂(x)) (GPT-NeoX, arXiv:2204.06745, §2.1)."""

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        return x + self.attend(self.attention_norm(x), samples, segments) + self.feed_forward(self.mlp_norm(x), samples)


RESIDUALS = {"pre_norm": PreNormBlock, "post_norm": PostNormBlock, "parallel": ParallelBlock}
