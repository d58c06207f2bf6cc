"""Learnt boxes as an ONNX graph of its own: pixels and features of phrases in, boxes and probabilities out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.export.graph_files import read_graph, save_graph
from cnclip_ft.export.onnx_encoder import open_session
from cnclip_ft.export.others import exported
from cnclip_ft.export.parity import require
from cnclip_ft.grounding.boxes import corners
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import UserError

FILE = "ground.onnx"
INPUTS, OUTPUTS = ("pixels", "phrases"), ("boxes", "scores")


class BoxFinder(nn.Module):
    """uint8 ``[batch, *preprocessing.shape]`` and unit fp32 ``[phrases, dim]`` → corners ``[batch, patches, 4]`` as shares of what the tower
    sees, and probabilities ``[batch, patches, phrases]``, both fp32."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor, phrases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        regions = self.model.regions(pixels)
        return corners(regions.boxes).clamp(0, 1), torch.sigmoid(regions.scores(phrases))


def write(model: DualEncoder, folder: Path, dtype: str) -> None:
    """`FILE` in `folder`, compared with the model it is of.

    Raises:
        UserError: torch cannot export it, or what it gives is not what the model gives; the message says why.
    """
    finder, dim = BoxFinder(model).eval(), model.image_tower.output_dim
    generator = torch.Generator().manual_seed(0)
    example = model.image_tower.example(2)
    pixels = torch.randint(0, 256, example.shape, dtype=torch.uint8, generator=generator)
    if len(model.image_tower.preprocessing.shape) != 3:
        pixels = example  # packed patches, which noise would not be
    phrases = F.normalize(torch.randn(3, dim, generator=generator), dim=1)
    shapes = ({0: torch.export.Dim("batch")}, {0: torch.export.Dim("phrases")})
    place = folder / FILE
    save_graph(exported(finder, (pixels, phrases), INPUTS, OUTPUTS, shapes, "the boxes"), place)
    read_graph(place)  # it is whole
    with torch.no_grad():
        apart = [
            (torch.from_numpy(found) - expected).abs().max()
            for some, few in ((pixels, phrases), (pixels[:1], phrases[:1]))
            for found, expected in zip(_run(place, some, few), finder(some, few), strict=True)
        ]
    require(torch.stack(apart).max().item(), place, dtype)


def _run(place: Path, pixels: torch.Tensor, phrases: torch.Tensor) -> list[Any]:
    session = open_session(place)
    try:
        found: list[Any] = session.run(list(OUTPUTS), dict(zip(INPUTS, (pixels.numpy(), phrases.numpy()), strict=True)))
    except Exception as error:  # noqa: BLE001 - the runtime's own kinds of error
        raise UserError(f"ONNX Runtime cannot run {place.name} ({' '.join(str(error).split())[:300]})") from None
    return found


def describe(model: DualEncoder, dtype: str) -> dict[str, Any]:
    """Its part of ``description.json``."""
    return {
        "file": FILE, "inputs": list(INPUTS), "outputs": list(OUTPUTS), "dtype": dtype,
        "phrases": "float32 [phrases, dimension], as text.onnx gives them",
        "boxes": "float32 [batch, patches, (x1, y1, x2, y2)], shares of what the image tower sees",
        "scores": "float32 [batch, patches, phrases], probabilities",
    }  # fmt: skip
