"""Exporters and quantisers of others: kept quiet, and asked why they failed."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cnclip_ft.export.graph_files import OPSET
from data_tools.errors import UserError


def reason(error: BaseException) -> str:
    """What lies at the bottom of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters and quantisers, which warn of what is neither ours nor the user's to mend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def exported(
    module: nn.Module,
    examples: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: Any,
    what: str,
) -> Any:
    """`module` as torch's exporter gives it.

    Args:
        shapes: sizes that stay open, of every input, as `torch.onnx.export` takes them.
        what: the module in words, for the message.

    Raises:
        UserError: torch cannot export it; the message says why.
    """
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                examples,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                dynamic_shapes=shapes,
            )
        except Exception as error:  # noqa: BLE001 - a tower by import path may fail in any way
            raise UserError(f"torch cannot export {what} to ONNX: {reason(error)}") from None
    assert program is not None  # it is where dynamo exports
    return program.model
