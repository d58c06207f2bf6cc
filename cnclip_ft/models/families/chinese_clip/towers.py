"""Towers: pixels or token ids in, features of the common dimension out (not yet of unit length).

An image tower is a trunk (`trunk`, the part a feature cache can replace) and a bias-free projection (`project`).
Parameter names below a tower are those of transformers' ChineseCLIPModel, or of the official code for RN50.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from transformers import (
    ChineseCLIPTextConfig,
    ChineseCLIPTextModel,
    ChineseCLIPVisionConfig,
    ChineseCLIPVisionModel,
)

from cnclip_ft.models.families.chinese_clip.catalog import ResNet, TextTransformer, VisionTransformer
from cnclip_ft.models.families.chinese_clip.fresh import keep_scale_, sine_positions_
from cnclip_ft.models.families.chinese_clip.layers import Packing, lighten, uses_sdpa
from cnclip_ft.models.families.chinese_clip.resnet import ModifiedResNet
from cnclip_ft.models.preprocessing import OPENAI_MEAN, OPENAI_STD, SquarePicture
from data_tools.errors import RequestError


class ImageTower(nn.Module):
    """What every image tower has.

    Attributes: `image_size` (pixels), `mean`, `std` (per channel, 0…1), `input` (``normalised`` or ``uint8``: what
    `trunk` takes), `output_dim`.
    """

    input = "normalised"
    mean, std = OPENAI_MEAN, OPENAI_STD
    image_size: int
    output_dim: int

    @property
    def preprocessing(self) -> SquarePicture:
        return SquarePicture(self.image_size, "squash", tuple(self.mean), tuple(self.std), self.input)

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 3, s, s]`` → ``[n, width]``, before the projection."""
        raise TypeError(f"{type(self).__name__} has no trunk")  # abstract

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """``[n, width]`` → ``[n, output_dim]``."""
        return features

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.project(self.trunk(pixels))

    def blocks(self) -> list[nn.Module]:
        """Stem first, then layers, the projection (or pooling) last; every parameter in exactly one."""
        raise TypeError(f"{type(self).__name__} has no blocks")  # abstract


class ViTTower(ImageTower):
    """transformers' ChineseCLIP vision model with its projection.

    `patch_dropout` (arXiv 2212.00794): share of the patches left out of a training step, drawn per image; 0 in eval mode.
    """

    def __init__(self, config: ChineseCLIPVisionConfig, output_dim: int) -> None:
        super().__init__()
        self.vision_model = ChineseCLIPVisionModel(config)
        lighten(self.vision_model.encoder.layers, first_token=True)
        self.visual_projection = new_projection(config.hidden_size, output_dim)
        self.image_size, self.output_dim, self.patch_dropout = config.image_size, output_dim, 0.0

    @staticmethod
    def make(numbers: VisionTransformer, output_dim: int) -> ViTTower:
        config = ChineseCLIPVisionConfig(
            hidden_size=numbers.hidden, intermediate_size=numbers.intermediate or 4 * numbers.hidden,
            num_hidden_layers=numbers.layers, num_attention_heads=numbers.heads, image_size=numbers.image_size,
            patch_size=numbers.patch, projection_dim=output_dim, hidden_act="quick_gelu",
        )  # fmt: skip
        tower = ViTTower(config, output_dim)
        keep_scale_(tower.vision_model.encoder)
        sine_positions_(tower.vision_model.embeddings.position_embedding)
        return tower

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.vision_model
        if not (self.training and self.patch_dropout > 0):
            return model(pixel_values=pixels).pooler_output
        tokens = model.embeddings(pixels)
        count = tokens.shape[1] - 1
        kept = max(1, round(count * (1 - self.patch_dropout)))
        # Drawn on the CPU generator, so that a replayed step draws the same on every device.
        order = torch.rand(len(tokens), count).argsort(1)[:, :kept].to(tokens.device) + 1
        patches = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        hidden = model.pre_layrnorm(torch.cat([tokens[:, :1], patches], dim=1))
        return model.post_layernorm(model.encoder(inputs_embeds=hidden).last_hidden_state[:, 0])

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.visual_projection(features)

    def blocks(self) -> list[nn.Module]:
        model = self.vision_model
        stem = nn.ModuleList([model.embeddings, model.pre_layrnorm])
        layers = list(model.encoder.layers)
        return [stem, *layers[:-1], nn.ModuleList([layers[-1], model.post_layernorm]), self.visual_projection]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        _checkpoint(self.vision_model, wanted)


class ResNetTower(ImageTower):
    """RN50's image tower and smaller ones like it; the pooling projects, so `project` is the identity."""

    # Devices whose convolutions want the channels together in memory: tensor cores do (PyTorch's channels-last tutorial);
    # on two CPU cores it was 2 %.
    channels_last_on = ("cuda",)

    def __init__(self, numbers: ResNet, output_dim: int) -> None:
        super().__init__()
        self.visual = ModifiedResNet(numbers.layers, numbers.width, numbers.heads, numbers.image_size, output_dim)
        self.numbers, self.image_size, self.output_dim, self.checkpointing = (
            numbers,
            numbers.image_size,
            output_dim,
            False,
        )

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.device.type in self.channels_last_on:
            pixels = pixels.contiguous(memory_format=torch.channels_last)  # every layer passes it on
        if not (self.checkpointing and self.training):
            return self.visual(pixels)
        x = self.visual.stem(pixels)
        for stage in self.visual.stages():
            x = torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)
        return self.visual.attnpool(x)

    def blocks(self) -> list[nn.Module]:
        v = self.visual
        return [nn.ModuleList([v.conv1, v.bn1, v.conv2, v.bn2, v.conv3, v.bn3]), *v.stages(), v.attnpool]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        self.checkpointing = wanted


class ForeignTower(ImageTower):
    """Any module by import path (docs/towers.md), with a new projection on top."""

    def __init__(self, path: str, output_dim: int) -> None:
        super().__init__()
        self.path = path
        self.module = _make_foreign(path)
        self.visual_projection = new_projection(self.module.output_dim, output_dim)
        self.image_size, self.output_dim = int(self.module.image_size), output_dim
        self.mean, self.std = tuple(self.module.mean), tuple(self.module.std)
        self.input = getattr(self.module, "input", "normalised")

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.module(pixels)
        if features.ndim != 2 or features.shape[1] != self.module.output_dim:
            raise RequestError(
                f"{self.path}: the module gave {list(features.shape)} for {len(pixels)} images; "
                f"expected [{len(pixels)}, {self.module.output_dim}] (its own output_dim)"
            )
        return features

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.visual_projection(features)

    def blocks(self) -> list[nn.Module]:
        own = self.module.blocks() if hasattr(self.module, "blocks") and callable(self.module.blocks) else [self.module]
        return [*own, self.visual_projection]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        if hasattr(self.module, "set_gradient_checkpointing"):
            self.module.set_gradient_checkpointing(wanted)
        elif wanted:
            raise RequestError(f"{self.path} has no set_gradient_checkpointing(bool); leave gradient_checkpointing off")


def _make_foreign(path: str) -> nn.Module:
    name, colon, attribute = path.partition(":")
    if not colon:
        raise RequestError(f"{path!r} is neither a folder nor an import path like package.module:factory")
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(
            f"the image tower {path} cannot be imported ({error}). Install the package that holds it, or set PYTHONPATH to its folder"
        ) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code; one that leaves would end the command as if done
        raise RequestError(f"{path}: importing it failed ({type(error).__name__}: {error})") from error
    try:
        module = factory()
    except RequestError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
        raise RequestError(f"{path}: the factory failed ({type(error).__name__}: {error})") from error
    missing = [name for name in ("output_dim", "image_size", "mean", "std") if not hasattr(module, name)]
    said = (
        f"is a {type(module).__name__}"
        if not isinstance(module, nn.Module)
        else f"lacks {', '.join(missing)}"
        if missing
        else ""
    )
    if said:
        raise RequestError(
            f"{path}: the factory must return an nn.Module with output_dim, image_size, mean and std; it {said}"
        )
    if getattr(module, "input", "normalised") not in ("normalised", "uint8"):
        raise RequestError(f"{path}: input is {module.input!r}; use 'normalised' or 'uint8'")
    return module


class RobertaTower(nn.Module):
    """RoBERTa-style text tower: the last hidden state of ``[CLS]`` (or the mean of all tokens) through a projection.

    transformers' own pooler is never used: in a stand-alone text model it is random.
    """

    def __init__(self, config: ChineseCLIPTextConfig, output_dim: int, pooling: str = "cls") -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise RequestError(f"text pooling is {pooling!r}; use cls or mean")
        self.text_model = ChineseCLIPTextModel(config, add_pooling_layer=False)
        lighten(self.text_model.encoder.layer, first_token=pooling == "cls")
        self.text_projection = new_projection(config.hidden_size, output_dim)
        self.output_dim, self.pooling = output_dim, pooling

    @staticmethod
    def make(numbers: TextTransformer, output_dim: int, pooling: str = "cls") -> RobertaTower:
        config = ChineseCLIPTextConfig(
            vocab_size=numbers.vocabulary, hidden_size=numbers.hidden, num_hidden_layers=numbers.layers,
            num_attention_heads=numbers.heads, intermediate_size=numbers.intermediate or 4 * numbers.hidden,
            max_position_embeddings=numbers.positions, hidden_dropout_prob=numbers.dropout,
            attention_probs_dropout_prob=numbers.dropout,
        )  # fmt: skip
        tower = RobertaTower(config, output_dim, pooling)
        keep_scale_(tower.text_model.encoder)
        return tower

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        on_cpu = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and uses_sdpa(self.text_model.config):
            return self.text_projection(self._packed(input_ids, attention_mask))
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return self.text_projection(hidden[:, 0])
        weight = attention_mask[..., None].to(hidden.dtype)
        return self.text_projection((hidden * weight).sum(1) / weight.sum(1))

    def _packed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """``[n, width]``, computed without padding. Elsewhere than on the CPU, counting the tokens would wait for the device."""
        packing = Packing.of(attention_mask)
        hidden = packing.gather(self.text_model.embeddings(input_ids=input_ids))
        for layer in self.text_model.encoder.layer:
            hidden = layer(hidden, packing)
        if self.pooling == "cls":
            return hidden
        lengths = attention_mask.sum(1, keepdim=True).to(hidden.dtype)
        return packing.spread(hidden).sum(1) / lengths

    def blocks(self) -> list[nn.Module]:
        """Embeddings first, then layers, the projection last."""
        return [self.text_model.embeddings, *self.text_model.encoder.layer, self.text_projection]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        _checkpoint(self.text_model, wanted)


def new_projection(width: int, output_dim: int) -> nn.Linear:
    """A bias-free map to the common dimension with fresh weights that keep the scale."""
    projection = nn.Linear(width, output_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _checkpoint(model: Any, wanted: bool) -> None:
    if wanted:
        # transformers renamed the call late in version 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # works with frozen inputs and under DistributedDataParallel
    else:
        # What transformers' own call does; that one warns of its coming name from version 5.20 on.
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
