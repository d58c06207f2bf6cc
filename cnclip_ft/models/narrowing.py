"""Features of fewer numbers: the last linear layer of each projection loses the rows behind them (Matryoshka, arXiv 2205.13147)."""

from __future__ import annotations

import torch
from torch import nn

from cnclip_ft.models.contract import Tower
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import RequestError


def narrow(model: DualEncoder, dimensions: int) -> None:
    """Only the first `dimensions` numbers of the features come out, for a model that was trained so.

    Raises:
        RequestError: there are not more, or no layer of a projection makes them; nothing is changed then.
    """
    dim = model.image_tower.output_dim
    if not 0 < dimensions <= dim:
        raise RequestError(
            f"dimensions is {dimensions}, and the features have {dim} numbers: dimensions=N, at most that"
        )
    if dimensions == dim:
        return
    towers: tuple[Tower, ...] = (model.image_tower, model.text_tower)
    for tower, last in [(tower, _last_layer(tower, dimensions)) for tower in towers]:
        with torch.no_grad():
            last.weight = nn.Parameter(last.weight[:dimensions].clone(), last.weight.requires_grad)
            if last.bias is not None:
                last.bias = nn.Parameter(last.bias[:dimensions].clone(), last.bias.requires_grad)
        last.out_features, tower.output_dim = dimensions, dimensions
    model.architecture, model.narrowed = None, dimensions  # none of the catalogue's any more
    model.heads = None  # they compare whole features


def _last_layer(tower: Tower, dimensions: int) -> nn.Linear:
    layers = [] if tower.projection is None else list(tower.projection.modules())
    last = next((m for m in layers[::-1] if isinstance(m, nn.Linear) and m.out_features == tower.output_dim), None)
    if last is None:
        raise RequestError(
            f"a tower of kind {tower.kind} makes its features without a projection, so they cannot be cut to {dimensions} numbers"
        )
    return last
