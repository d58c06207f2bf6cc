"""What a family of models brings: kinds of towers and tokenizers; one instance is known to `registry`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer
from cnclip_ft.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class WebClasses:
    """What transformers.js calls a family's model: its ``model_type``, the outputs of its classes of one tower, and whether it
    knows the processor by its name of 2022 alone (``…FeatureExtractor``), which transformers reads too.
    """

    model_type: str
    text_output: str = "text_embeds"
    image_output: str = "image_embeds"
    processor_of_2022: bool = False


class Family:
    image_towers: tuple[type[ImageTower], ...] = ()
    text_towers: tuple[type[TextTower], ...] = ()
    tokenizers: tuple[type[Tokenizer], ...] = ()
    name: str = "of its own"
    """As people call it."""
    own_pictures: tuple[str, ...] = ()
    """Kinds of image towers its models have; with another one, a model is a mix."""
    templates: str = "en"
    """Prompts that zero-shot classification begins with, by the names of shipped lists (``zh``, ``en``, ``zh+en``)."""
    transformers_class: str = "library has no class for them"
    """What its class there is made of, in words, for towers that do not fit: ``CLIPModel is a ViT with …``."""
    exports: tuple[str, ...] = ("onnx",)
    """Formats its text towers may be exported to, by name."""
    web: WebClasses | None = None
    """The classes transformers.js has for its models; None where it has none."""
    scalar_shape: tuple[int, ...] = ()
    """Of temperature and bias in files, as transformers' class has them."""

    def name_of(self, model: DualEncoder) -> str:
        """Of a model that is no mix."""
        return self.name

    def transformers_files(self, model: DualEncoder) -> dict[str, dict[str, Any]]:
        """The files of a checkpoint that transformers reads, as JSON by name; of models it does not know, who does."""
        return {
            "config.json": {"model_type": "cnclip_ft", "note": "read with cnclip_ft.load; details in cnclip_ft.json"}
        }
