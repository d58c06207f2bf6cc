"""One step's gradient, for a batch of any size on a device of any size.

A batch that fits is one forward and one backward. One that does not is split into micro-batches (GradCache, arXiv
2101.06983): features of all chunks without gradient, the loss once on all features, then every chunk again with
its random state restored, backward through ⟨features, ∂loss/∂features⟩; a text tower that is frozen is not asked
again, nor at all where its features are known. The temperature gets its gradient in the loss, once. The result is
the gradient of the undivided batch, dropout and patch dropping included; only batch normalisation in training mode,
whose statistics belong to the batch, cannot be split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from cnclip_ft.data.pairs import padded_length
from cnclip_ft.runtime import to_device
from cnclip_ft.training.hard_negatives import against_negatives
from cnclip_ft.training.loss import LossOutput, Objective
from cnclip_ft.training.sharding import Whole
from data_tools.errors import RequestError

_TEXTS = ("input_ids", "attention_mask")
_TENSORS = ("pixels", "trunk", *_TEXTS)
TEXT_FEATURES = "text_features"  # of a batch: what a frozen text tower says of its texts, which then need not be read


class GradientStep:
    """Puts the gradient of one global batch into the parameters.

    Args:
        model: the DualEncoder, compiled or not. Called with `pixels` or `trunk`, `input_ids` and `attention_mask`;
            returns both unit features.
        objective: an objective of `training.loss`.
        micro_batch_size: pairs per forward on this device; None takes the batch as one.
        autocast: makes the context the towers compute in.
        backward: takes a scalar loss; scales it where fp16 needs it.
        augment: uint8 pixels → uint8 pixels on the device, drawn from torch's own generator and so replayed.
        sharding: how the devices' gradients become one.
        lengths: what texts may be padded to; () is their own longest.
        negatives: weight of each picture's loss against texts of its own (`training.hard_negatives`), which stand behind the m true ones:
            `input_ids` and `attention_mask` are then ``[n, m + K, tokens]``, and `negatives` says where there is one.

    Where a picture has several captions in a step `text_keys` is ``[n, m]``, and the loss is the mean over the m batches in which each
    picture has one of them: no caption stands against another of its own picture.

    Raises:
        RequestError: batch normalisation would use the statistics of a chunk.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        *,
        micro_batch_size: int | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        backward: Callable[[torch.Tensor], Any],
        augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
        sharding: Whole | None = None,
        lengths: Sequence[int] = (),
        negatives: float = 0.0,
    ) -> None:
        self.model, self.objective = model, objective
        self.micro_batch_size, self.autocast, self.backward = micro_batch_size, autocast, backward
        self.augment, self.sharding = augment or (lambda pixels: pixels), sharding or Whole()
        self.lengths, self.negatives = lengths, negatives
        self.parts: dict[str, torch.Tensor] = {}  # of the last loss, where it has parts worth telling
        if micro_batch_size is not None:
            refuse_batch_norm(model)

    def __call__(self, batch: dict[str, Any]) -> LossOutput:
        size, exchange = len(batch["image_keys"]), self.sharding.mean_gradients(self.model.parameters())
        if self.micro_batch_size is None or self.micro_batch_size >= size:
            images, texts = self._features(batch)
            out = self._loss(images, texts, batch)
            with exchange:
                self.backward(out.loss)
        else:
            out = self._divided(batch, size, self.micro_batch_size)
            with exchange:
                pass  # one exchange a step, of the gradients of all micro-batches
        return LossOutput(out.loss.detach(), out.accuracy)

    def _loss(self, images: torch.Tensor, texts: torch.Tensor, batch: dict[str, Any]) -> LossOutput:
        model = self.model
        temperature = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
        keys = batch["text_keys"]
        columns = [keys] if keys.ndim == 1 else keys.unbind(1)
        several = texts if texts.ndim == 3 else texts[:, None]
        outs = [
            self.objective(images, several[:, at], image_keys=batch["image_keys"], text_keys=column, **temperature)
            for at, column in enumerate(columns)
        ]
        out = LossOutput(*(torch.stack(numbers).mean() for numbers in zip(*outs, strict=True)))
        self.parts = {}
        if not self.negatives:
            return out
        present = to_device(batch["negatives"], texts.device)
        told = torch.cat([several[:, :1], several[:, len(columns) :]], 1)
        hard = against_negatives(self.objective, images, told, present, **temperature)
        self.parts = {"pairs": out.loss.detach(), "negatives": hard.detach()}
        return LossOutput(out.loss + self.negatives * hard, out.accuracy)

    def _features(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        """Unit features of pictures and texts; None of what the batch has nothing of."""
        device = self.model.logit_scale.device
        known = batch.get(TEXT_FEATURES)
        asked = [name for name in _TENSORS if name in batch and (known is None or name not in _TEXTS)]
        tensors = {name: to_device(batch[name], device) for name in asked}
        if "pixels" in tensors:
            tensors["pixels"] = self.augment(tensors["pixels"])
        several = tensors["input_ids"].shape[:2] if "input_ids" in tensors and tensors["input_ids"].ndim == 3 else ()
        if several:  # further captions and negatives are texts among texts
            tensors |= {name: tensors[name].flatten(0, 1) for name in _TEXTS}
        with self.autocast():
            images, texts = self.model(**tensors)
        if known is not None:
            return images, to_device(known, device)
        return images, texts.unflatten(0, several) if several else texts

    def _divided(self, batch: dict[str, Any], size: int, micro: int) -> LossOutput:
        chunks = [_chunk(batch, slice(start, start + micro), self.lengths) for start in range(0, size, micro)]
        states, parts = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_random_state(self.model.logit_scale.device))
                parts.append(self._features(chunk))
        after = _random_state(self.model.logit_scale.device)
        images = torch.cat([image for image, _ in parts]).requires_grad_()
        texts = torch.cat([text for _, text in parts]).requires_grad_()
        out = self._loss(images, texts, batch)
        self.backward(out.loss)
        # Texts come after pictures, so pictures draw the same random numbers without them.
        trained = any(p.requires_grad for p in self.model.text_tower.parameters())
        frozen = () if trained else (*_TEXTS, TEXT_FEATURES)
        for number, chunk in enumerate(chunks):
            rows = slice(number * micro, (number + 1) * micro)
            _restore(states[number], self.model.logit_scale.device)
            image, text = self._features({name: each for name, each in chunk.items() if name not in frozen})
            sides = [
                (f, whole.grad[rows])
                for f, whole in ((image, images), (text, texts))
                if f is not None and f.requires_grad and whole.grad is not None
            ]
            torch.autograd.backward([f for f, _ in sides], [g.to(f.dtype) for f, g in sides])
        _restore(after, self.model.logit_scale.device)
        return out


def _chunk(batch: dict[str, Any], rows: slice, lengths: Sequence[int]) -> dict[str, Any]:
    chunk = {name: batch[name][rows] for name in (*_TENSORS, TEXT_FEATURES) if name in batch}
    longest = padded_length(int(chunk["attention_mask"].numpy().sum(-1).max()), lengths)
    return chunk | {name: chunk[name][..., :longest] for name in _TEXTS}


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise where a batch-norm layer in training mode would see micro-batches instead of the batch."""
    for name, module in batch_norms(model):
        if module.training:
            raise batch_norm_refusal("STAGE", name)


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Batch-norm layers by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def batch_norm_refusal(stage: str, name: str) -> RequestError:
    return RequestError(
        f"micro_batch_size with batch normalisation in training mode ({name}): its statistics would be those of "
        f"the micro-batch, and the gradient another one. Give stages.{stage}.batch_norm=frozen, or "
        f"stages.{stage}.micro_batch_size=null."
    )
