"""What towers have in common that are models of transformers: their part of a description is read off its configuration."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from cnclip_ft.models.contract import TextTower, Tower
from cnclip_ft.models.families.parts import new_projection, set_checkpointing


class TransformersTower(Tower):
    config_keys: ClassVar[tuple[str, ...]]
    """What a description has of the configuration, by its names, in the order of files."""

    @property
    @abstractmethod
    def model(self) -> Any:
        """transformers' model."""

    @classmethod
    def own_numbers(cls, numbers: dict[str, Any]) -> dict[str, Any]:
        """Of a description, what the configuration takes."""
        return {key: numbers[key] for key in cls.config_keys}

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind} | {key: getattr(self.model.config, key) for key in self.config_keys}

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        set_checkpointing(self.model, wanted)


class ProjectedText(TransformersTower, TextTower):
    """A text model, and a bias-free map into the common space behind it."""

    file_prefixes = ("text_model.", "text_projection.")
    text_model: Any
    text_projection: nn.Linear

    @property
    def model(self) -> Any:
        return self.text_model

    @property
    def projection(self) -> nn.Module:
        return self.text_projection

    def replace_projection(self, output_dim: int) -> None:
        width = self.text_projection.in_features
        self.text_projection, self.output_dim = new_projection(width, output_dim), output_dim
