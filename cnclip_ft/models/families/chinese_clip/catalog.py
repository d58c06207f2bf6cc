"""Published sizes: name → architecture, and where the weights live. Numbers: OFA-Sys/Chinese-CLIP, arXiv 2211.01335."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

VOCABULARY = 21128


@dataclass(frozen=True)
class VisionTransformer:
    """ViT image tower; sides in pixels."""

    hidden: int
    layers: int
    heads: int
    patch: int
    image_size: int = 224
    intermediate: int | None = None  # None: 4 × hidden
    kind: str = "vit"


@dataclass(frozen=True)
class ResNet:
    """CLIP's modified ResNet with attention pooling (3-convolution stem, anti-aliased strides)."""

    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32
    image_size: int = 224
    kind: str = "resnet"


@dataclass(frozen=True)
class TextTransformer:
    """RoBERTa-style text tower."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int | None = None  # None: 4 × hidden
    vocabulary: int = VOCABULARY
    positions: int = 512
    dropout: float = 0.1


@dataclass(frozen=True)
class Architecture:
    """Both towers and the dimension they meet in."""

    name: str
    image: VisionTransformer | ResNet
    text: TextTransformer
    projection: int
    hub: str | None = None  # repository name behind the owner OFA-Sys (Hugging Face) or AI-ModelScope (ModelScope)
    file: str | None = None  # official file
    parameters: int | None = field(default=None, compare=False)  # trainable numbers, as published

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def towers(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both as a recipe's ``model.start`` describes new ones."""
        return asdict(self.image), asdict(self.text)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Architecture:
        image = dict(values["image"])
        kind = ResNet if image.get("kind") == "resnet" else VisionTransformer
        if kind is ResNet and "layers" in image:
            image["layers"] = tuple(image["layers"])
        return Architecture(**{**values, "image": kind(**image), "text": TextTransformer(**values["text"])})


_BASE, _LARGE = TextTransformer(), TextTransformer(hidden=1024, layers=24, heads=16)
_ALL = (
    # The official code has its configuration; weights of it were never published.
    Architecture("ViT-B-32", VisionTransformer(768, 12, 12, 32), _BASE, 512),
    Architecture("ViT-B-16", VisionTransformer(768, 12, 12, 16), _BASE, 512, "chinese-clip-vit-base-patch16",
                 "clip_cn_vit-b-16.pt", 188_260_000),
    Architecture("ViT-L-14", VisionTransformer(1024, 24, 16, 14), _BASE, 768, "chinese-clip-vit-large-patch14",
                 "clip_cn_vit-l-14.pt", 406_230_000),
    Architecture("ViT-L-14-336", VisionTransformer(1024, 24, 16, 14, 336), _BASE, 768, "chinese-clip-vit-large-patch14-336px",
                 "clip_cn_vit-l-14-336.pt", 406_560_000),
    Architecture("ViT-H-14", VisionTransformer(1280, 32, 16, 14), _LARGE, 1024, "chinese-clip-vit-huge-patch14",
                 "clip_cn_vit-h-14.pt", 957_600_000),
    Architecture("RN50", ResNet(), TextTransformer(layers=3), 1024, "chinese-clip-rn50", "clip_cn_rn50.pt", 76_990_000),
    # For tests: everything a big one has, in little.
    Architecture("tiny", VisionTransformer(64, 2, 2, 8, 32), TextTransformer(64, 2, 2), 32),
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}


def available_models() -> list[str]:
    """Names of the published sizes."""
    return [name for name, architecture in ARCHITECTURES.items() if architecture.hub]
