"""The names and the behaviour of cn_clip's `cn_clip.clip` (1.6.0) over our models: its published code runs with the import changed.

Features, ids and scores are those of the original; `preprocess` is within 1/255 of its pixels (2/255 for single values of
hard-edged noise; our resize is torch's, not Pillow's), and it turns photos upright by their EXIF tag. Weights are float32 on every device; ``model.half()`` makes them
float16, as the original's are on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.models.assembly import fill, resized
from cnclip_ft.models.checkpoints import load as load_model
from cnclip_ft.models.contract import Preprocessing, Tokenizer
from cnclip_ft.models.dual_encoder import DualEncoder, each_text
from cnclip_ft.models.families.chinese_clip.catalog import available_models
from cnclip_ft.models.families.chinese_clip.wordpiece import CONTEXT_LENGTH, TextTokenizer
from cnclip_ft.models.formats.bert import read_text_half
from cnclip_ft.models.formats.image_half import read_image_half
from cnclip_ft.models.preprocessing import PictureSource, SquarePicture
from cnclip_ft.runtime import parse_device
from data_tools.errors import RequestError

__all__ = ["CLIP", "available_models", "image_transform", "load", "load_from_name", "tokenize"]

_IDS = "ids, an int64 or int32 tensor [n, tokens]"


class CLIP(nn.Module):
    """A model behind the calls of cn_clip's `CLIP`; features are not normalised, as there.

    Args:
        encoder: of any family.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.encoder.logit_scale

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    def tokenize(self, texts: str | Iterable[str], context_length: int | None = None) -> torch.Tensor:
        """Texts → int64 ``[n, context_length]`` by the model's own tokenizer, prepared as in its training."""
        tokenizer = self.encoder.tokenizer
        return _padded(tokenizer if context_length is None else tokenizer.with_context_length(context_length), texts)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """A batch of what `preprocess` gives, ``[n, 3, s, s]`` → ``[n, dim]``.

        Raises:
            RequestError: it is no tensor.
        """
        _check_tensor("encode_image", image, "a tensor [n, 3, s, s]", "torch.stack([preprocess(picture)])")
        return self.encoder.image_tower(image.to(self.dtype) if image.is_floating_point() else image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """What `tokenize` gives, ``[n, tokens]`` → ``[n, dim]``.

        Raises:
            RequestError: no table of ids, ids of another vocabulary, or more tokens than the tower has positions.
        """
        _check_tensor("encode_text", text, _IDS, "model.tokenize(texts)")
        kind, shape = str(text.dtype).removeprefix("torch."), list(text.shape)
        if kind not in ("int64", "int32") or len(shape) != 2 or (shape[0] and not shape[1]):
            raise RequestError(f"encode_text takes {_IDS}, found {kind} {shape}; made by model.tokenize(texts)")
        if not shape[0]:
            return torch.empty(0, self.encoder.text_tower.output_dim, dtype=self.dtype, device=text.device)
        self._check_ids(text)
        longest = self.encoder.text_tower.max_length
        if text.shape[1] > longest:
            raise RequestError(f"texts of {text.shape[1]} tokens, but the text tower has {longest} positions")
        return self.encoder.text_tower(text, self.encoder.tokenizer.mask(text))

    def _check_ids(self, text: torch.Tensor) -> None:
        """Most of Chinese CLIP's ids are tokens of other vocabularies too, and would be taken for other words."""
        around = _tokenizer(CONTEXT_LENGTH).encode([""])[0]  # what stands around every text
        if self.encoder.tokenizer.encode([""])[0] != around:
            last = text.ne(0).sum(1, keepdim=True).clamp(min=1) - 1
            ends = torch.cat([text[:, :1], text.gather(1, last)], 1)
            if ends.eq(torch.tensor(around, device=text.device)).all():
                raise RequestError(
                    "the ids are clip.tokenize's, which are Chinese CLIP's, and this model has a vocabulary of its own: model.tokenize(texts)"
                )
        rows = self.encoder.text_tower.vocab_size
        for token in map(int, text.aminmax()):
            if not 0 <= token < rows:
                raise RequestError(
                    f"token {token}, but the text tower has {rows:,}, from 0; its own ids: model.tokenize(texts)"
                )

    def forward(self, image: torch.Tensor | None, text: torch.Tensor | None) -> Any:
        """Unit features of both and the temperature's inverse; where one is None, the plain features of the other."""
        if text is None:
            if image is None:
                raise RequestError("image and text are both None")
            return self.encode_image(image)
        if image is None:
            return self.encode_text(text)
        return *self._unit(image, text), self.logit_scale.exp()

    def get_similarity(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines times the temperature's inverse (and a sigmoid model's bias): ``[images, texts]`` and its transpose."""
        images, texts = self._unit(image, text)
        logits = self.logit_scale.exp() * images @ texts.T
        if self.encoder.logit_bias is not None:
            logits = logits + self.encoder.logit_bias
        return logits, logits.T

    def _unit(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.normalize(self.encode_image(image), dim=1), F.normalize(self.encode_text(text), dim=1)


def _check_tensor(call: str, given: Any, takes: str, how: str) -> None:
    if not isinstance(given, torch.Tensor):
        raise RequestError(f"{call} takes {takes}, found {type(given).__name__}; made by {how}")


class Preprocess:
    """One picture (Pillow image, path, bytes, uint8 pixels) → what `CLIP.encode_image` takes a batch of."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: PictureSource) -> torch.Tensor:
        return self.preprocessing.normalise(self.preprocessing.decode(image)[None].contiguous())[0]

    def __repr__(self) -> str:
        return f"Preprocess({self.preprocessing})"


def load_from_name(
    name: str | Path,
    device: str | torch.device = "auto",
    download_root: str | Path | None = None,
    vision_model_name: str | None = None,
    text_model_name: str | None = None,
    input_resolution: int | None = None,
    use_modelscope: bool = False,
) -> tuple[CLIP, Preprocess]:
    """A model, in evaluation mode, and its preprocessing.

    Args:
        name: a published name, or whatever `cnclip_ft.load` reads. Only a published name that is not found here is fetched.
        device: the best that is there by default.
        download_root: folder where a published name is looked for first and downloaded to.
        vision_model_name, text_model_name: the original asks for them; here the file itself says what it is.
        input_resolution: another one than the file's resizes the position embeddings.
        use_modelscope: fetch from there.

    Raises:
        RequestError: nothing readable is there.
    """
    source = "modelscope" if use_modelscope else "huggingface"
    model = load_model(name, device=device, image_size=input_resolution, source=source, download_root=download_root)
    return CLIP(model).eval(), Preprocess(model.image_tower.preprocessing)


def load(
    model: CLIP,
    device: str | torch.device = "auto",
    clip_path: str | Path | None = None,
    bert_path: str | Path | None = None,
    use_flash_attention: bool = False,
) -> CLIP:
    """Other weights into a model: an image tower and temperature of OpenAI's kind, a text tower of BERT's. The projection of
    texts stays the model's.

    Args:
        use_flash_attention: changes nothing; attention is torch's own.

    Raises:
        RequestError: they are not of the model's size.
    """
    if not isinstance(model, CLIP):
        found = f"{os.fspath(model)!r}" if isinstance(model, (str, os.PathLike)) else type(model).__name__
        raise RequestError(
            f"load puts weights into a model, found {found}. To open a checkpoint: load_from_name(NAME_OR_PATH), or "
            "cnclip_ft.load(NAME_OR_PATH)"
        )
    encoder = model.encoder
    if clip_path is not None:
        image = read_image_half(Path(clip_path))
        resized(image.numbers, image.tensors, encoder.image_size)
        fill(encoder.image_tower, image.tensors, image.source)
        if image.logit_scale is not None:
            encoder.logit_scale.data.fill_(image.logit_scale)
    if bert_path is not None:
        text, tower = read_text_half(Path(bert_path)), encoder.text_tower
        kept = {name: tensor for name, tensor in tower.state_dict().items() if tower.in_projection(name)}
        fill(tower, text.tensors | kept, text.source)
    return model.to(parse_device(device)).eval()


class _AsWritten(TextTokenizer):
    """cn_clip's tokenizer knows nothing of what its data set does to quotation marks before."""

    quotation_marks = {}


@cache
def _tokenizer(context_length: int) -> TextTokenizer:
    return _AsWritten(context_length=context_length)


def tokenize(texts: str | Iterable[str], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """Texts → int64 ``[n, context_length]``, filled up with 0: cn_clip's ids.

    Those of Chinese CLIP's vocabulary; another model's are `CLIP.tokenize`'s. Chinese quotation marks are unknown here, as
    there; `CLIP.tokenize` writes them ``"``, as in the training.
    """
    return _padded(_tokenizer(context_length), texts)


def _padded(tokenizer: Tokenizer, texts: str | Iterable[str]) -> torch.Tensor:
    ids = tokenizer.encode(list(each_text(texts)))
    return tokenizer.pad(ids, length=tokenizer.context_length)[0]


def image_transform(image_size: int = 224) -> Preprocess:
    """Preprocessing of Chinese CLIP for this resolution: squashed to a square, bicubic, OpenAI's mean and deviation."""
    return Preprocess(SquarePicture(image_size))
