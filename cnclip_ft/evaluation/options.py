"""How a checkpoint is opened and its towers are run; nothing heavy is imported before that happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import RequestError

if TYPE_CHECKING:
    import torch

    from cnclip_ft.features.encode import SplitFeatures
    from cnclip_ft.features.sources import Source
    from cnclip_ft.models.dual_encoder import DualEncoder


@dataclass
class Options:
    """How to encode and score; `dataset` overrides what the path says ("none" shows no published rows)."""

    batch_size: int = 128
    workers: int | None = None
    device: str | None = None
    dtype: str = "float32"
    image_size: int | None = None
    memory: str = "2GiB"
    dataset: str | None = None
    source: str = "huggingface"
    trust_import: bool = False  # a checkpoint may name code
    dimensions: int | None = None  # the first so many numbers of every feature

    def check(self) -> None:
        """Raises:
        RequestError: a value that cannot be used, before anything heavy starts.
        """
        from cnclip_ft.evaluation.results import provenance, published

        if self.batch_size < 1:
            raise RequestError(f"--batch-size is {self.batch_size}; it must be at least 1")
        if self.dataset not in (None, "none", *published.SPLITS):
            raise RequestError(f"--dataset is {self.dataset!r}; use one of {', '.join(published.SPLITS)}, none")
        provenance.parse_dtype(self.dtype)


@dataclass(frozen=True)
class Opened:
    """A model on its device, and how its towers are run."""

    checkpoint: str | Path
    model: DualEncoder
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    workers: int

    def described(self) -> dict[str, Any]:
        """``checkpoint`` and ``settings``, for the files beside a result. Reads the whole checkpoint."""
        from cnclip_ft.evaluation.results import provenance

        return {
            "checkpoint": provenance.describe_checkpoint(self.model, self.checkpoint),
            "settings": provenance.describe_settings(self.model, self.dtype, self.device),
        }

    def features(self, source: Source) -> SplitFeatures:
        """All images and texts of `source`, encoded."""
        from cnclip_ft.features.encode import encode_source

        return encode_source(
            self.model,
            source.split,
            source.read,
            batch_size=self.batch_size,
            workers=self.workers,
            dtype=self.dtype,
        )

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit float32 ``[n, dim]`` on the CPU."""
        from cnclip_ft.features.encode import encode_texts, evaluating

        with evaluating(self.model, dtype=self.dtype):
            return encode_texts(self.model, texts, batch_size=2 * self.batch_size)


def open_model(checkpoint: str | Path, options: Options) -> Opened:
    """The model on the wished device, with the precision and the processes to run it with."""
    from cnclip_ft.evaluation.results import provenance
    from cnclip_ft.models.checkpoints import load
    from cnclip_ft.runtime import parse_device

    device, dtype = parse_device(options.device), provenance.parse_dtype(options.dtype)
    model = load(
        checkpoint,
        device=device,
        image_size=options.image_size,
        source=options.source,
        trust_import=options.trust_import,
        dimensions=options.dimensions,
    )
    workers = provenance.default_workers(device) if options.workers is None else options.workers
    return Opened(checkpoint, model, device, dtype, options.batch_size, workers)
