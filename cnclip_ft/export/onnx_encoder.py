"""An exported folder as an encoder: ONNX Runtime behind the calls that `features.encode` makes of a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cnclip_ft.models.assembly import read_tokenizer
from cnclip_ft.models.formats.files import read_json
from cnclip_ft.models.patches import recorded
from data_tools.errors import UserError


class OnnxEncoder(nn.Module):
    """``image.onnx`` and ``text.onnx`` of a folder on the CPU, with as many threads as torch has.

    Raises:
        UserError: ONNX Runtime cannot read or run a file.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        description = read_json(folder / "description.json")
        self.image_size = description["image"]["size"]
        self.image_tower = SimpleNamespace(
            output_dim=description["dimension"],
            preprocessing=recorded(description["image"]),
        )
        self.tokenizer = read_tokenizer(description["text"], folder)
        self.image, self.text = (open_session(folder / description[side]["file"]) for side in ("image", "text"))

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 ``[n, *preprocessing.shape]`` → unit float32 ``[n, dim]``."""
        return _run(self.image, pixels)

    def text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 ``[n, tokens]`` → unit float32 ``[n, dim]``; the mask is not needed, padding is seen inside."""
        return _run(self.text, input_ids)


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning after a call and take the cores from whatever runs next, torch for one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors; it warns of its own rewriting
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime's own kinds of error
        raise UserError(f"{path}: ONNX Runtime cannot read it ({_line(error)})") from None


def _run(session: Any, values: torch.Tensor) -> torch.Tensor:
    try:
        (features,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    except Exception as error:  # noqa: BLE001 - the runtime's own kinds of error
        raise UserError(f"ONNX Runtime cannot run the graph on {list(values.shape)} ({_line(error)})") from None
    return torch.from_numpy(features)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
