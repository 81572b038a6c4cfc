"""The layers of a model of any kind, chosen by the `kind` of its settings."""

from collections.abc import Callable, Mapping

from models import bert, gpt, t5
from models.encoder_config import AnyModel
from parallel.grid import Grid
from parallel.layers import Layer

LAYERS: dict[str, Callable[..., list[Layer]]] = {"gpt": gpt.layers, "bert": bert.layers, "t5": t5.layers}
"""`model.kind` -> the function that lists its layers."""


def layers(
    model: AnyModel,
    grid: Grid,
    seed: int,
    variants: Mapping[str, type] | None = None,
    recompute: str = "none",
    context: tuple[str, ...] = (),
) -> list[Layer]:
    """The unbuilt layers in order, as of models.gpt.layers, models.bert.layers or models.t5.layers."""
    return LAYERS[model.kind](model, grid, seed, variants, recompute, context)
