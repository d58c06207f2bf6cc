"""Encoded image → uint8 square tensor in the worker; normalised per batch on the device.

Resizing runs on uint8, which is several times faster than Pillow's and within 1/255 of it (2/255 for single values of
hard-edged noise: at most 18 of the 150,528 of a square of 224); turning each image into floats in the worker would cost more than
decoding it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image

from cnclip_ft.runtime import to_device
from data_tools.errors import DataFault
from data_tools.metadata import jpeg_orientation
from data_tools.pictures import MISSING, PIXEL_LIMIT, middle, middle_of, open_upright, plain_jpeg, read_file, upright
from data_tools.words import Said

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels, a third slower (extra `fast`)
    simplejpeg = None

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
NORMALISED_INSIDE = "inside the graph; give bytes 0 to 255"
DECODER = "simplejpeg" if simplejpeg else "pillow"  # they choose their reduced scales differently
# Since version 13 Pillow resamples down before across where the height shrinks by more than twice as much.
_PILLOW_TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13


PictureSource: TypeAlias = bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray | torch.Tensor
Fit = Literal["squash", "crop", "crop_even"]
CROPS: dict[Fit, str] = {"crop": "centre", "crop_even": "centre, rounded to even"}  # in records of scores
Resample = Literal["bicubic", "bilinear"]
PILLOW_FILTERS: dict[Resample, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@dataclass(frozen=True)
class SquarePicture:
    """`models.contract.Preprocessing` of the towers that see a square; the defaults are the official ones (cn_clip 1.6.0).

    Args:
        size: side of the square in pixels.
        fit: ``squash`` stretches the whole picture to it; ``crop`` brings the shorter side to `size` and takes the middle,
            as transformers' CLIPImageProcessor does; ``crop_even`` rounds the edge as torchvision does (`data_tools.pictures.middle`).
        mean, std: per channel, of values from 0 to 1.
        input: ``normalised``, or ``uint8`` for a tower that normalises by itself.
        resample: antialiased, as Pillow does it.
    """

    size: int
    fit: Fit = "squash"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    input: Literal["normalised", "uint8"] = "normalised"
    resample: Resample = "bicubic"

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.size, self.size

    def decode(
        self,
        source: PictureSource,
        *,
        reduced: bool = False,
        pixel_limit: int = PIXEL_LIMIT,
    ) -> torch.Tensor:
        """One picture as uint8 ``[3, size, size]``, RGB; in memory the channels lie together.

        Args:
            source: encoded bytes, a path, a Pillow image, or uint8 pixels: numpy ``[h, w, 3]`` (RGB; also ``[h, w]`` and
                ``[h, w, 4]``), torch ``[3, h, w]``.
            reduced: let a JPEG decode at a half of its scale or less, no side below `size`. Much faster for
                large photos and no longer within 1/255 of the full decoding: for training, not for evaluation.

        Raises:
            DataFault: it cannot be read or decoded, or is above a limit (`data_tools.pictures`); nothing else.
        """
        pixels = whole_picture(source, self.size if reduced else None, pixel_limit)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.fit == "squash":
            return squash(image, self.size, self.resample)
        return crop(image, self.size, self.resample, even=self.fit == "crop_even")

    def fit_many(self, pixels: torch.Tensor) -> torch.Tensor:
        """Whole pictures of one size, uint8 ``[n, 3, h, w]`` on any device → uint8 ``[n, 3, size, size]`` there.

        As `decode` within 2/255, nearly all values equal; for pictures whose sides are less than `data_tools.pictures.LONG` times apart.
        """
        height, width = pixels.shape[2:]
        tall = wide = self.size
        if self.fit != "squash":
            tall, wide, top, left = middle_of(width, height, self.size, even=self.fit == "crop_even")
        fitted = stretch_many(pixels, tall, wide, self.resample)
        return fitted if self.fit == "squash" else fitted[..., top : top + self.size, left : left + self.size]

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 ``[n, 3, size, size]`` → what the tower takes, on the tensor's device."""
        return normalise(pixels, self.mean, self.std, dtype) if self.input == "normalised" else pixels

    def part(self, width: int, height: int) -> tuple[float, float, float, float]:
        if self.fit == "squash":
            return 0.0, 0.0, 1.0, 1.0
        tall, wide, top, left = middle_of(width, height, self.size, even=self.fit == "crop_even")
        return left / wide, top / tall, self.size / wide, self.size / tall

    def pack(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @property
    def in_words(self) -> str:
        how = "压扁成正方形" if self.fit == "squash" else "短边缩放后取中间"
        return Said(
            "{size} × {size}, {resize}",
            f"{{size}} × {{size}}，{how}（{{resample}}）",
            size=self.size,
            resize=self.describe()["resize"],
            resample=self.resample,
        )

    @property
    def fitting(self) -> dict[str, Any]:
        return {"size": self.size, "fit": self.fit, "resample": self.resample}

    def record(self) -> dict[str, Any]:
        squash = self.fit == "squash"
        return {
            "size": self.size, "resize": f"{'square squash' if squash else 'shorter side'}, antialiased {self.resample} on uint8",
            "crop": CROPS.get(self.fit),
            "input": self.input, "mean": list(self.mean), "std": list(self.std),
        }  # fmt: skip

    def outside(self) -> dict[str, Any]:
        cropped = self.fit != "squash"
        how = (
            "shorter side to size, {}, then the middle"
            if cropped
            else "square squash (no crop, aspect ratio not kept), {}"
        )
        told: dict[str, Any] = {"resize": how.format(self.resample), "mean": list(self.mean), "std": list(self.std)}
        told["normalisation"] = NORMALISED_INSIDE if self.input == "normalised" else None
        told |= {"fit": self.fit} if cropped else {}
        return told | ({"resample": self.resample} if self.resample != "bicubic" else {})

    def processor(self) -> dict[str, Any]:
        cropped = {"crop_size": {"height": self.size, "width": self.size}} if self.fit != "squash" else {}
        return {
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size} if cropped else {"height": self.size, "width": self.size},
            "resample": int(PILLOW_FILTERS[self.resample]),
            "do_center_crop": bool(cropped),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        } | cropped

    def for_transformers(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": normalise(pixels, self.mean, self.std)}

    def describe(self) -> dict[str, Any]:
        how = f"squash-{self.resample}" if self.fit == "squash" else f"shortest-edge-{self.resample}-centre-crop"
        how += "-even" if self.fit == "crop_even" else ""
        return {
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "input": self.input,
            "resize": how,
        }


def whole_picture(source: PictureSource, at_least: int | None, pixel_limit: int) -> np.ndarray:
    """uint8 ``[h, w, 3]``, upright; a JPEG at a smaller scale where `at_least` is given, no side below it."""
    if not isinstance(source, PictureSource):
        raise DataFault(
            f"no picture, but {type(source).__name__}",
            mend="Give a path, encoded bytes, a Pillow image or uint8 pixels.",
            kind="undecodable-image",
        )
    try:
        if isinstance(source, (np.ndarray, torch.Tensor)):
            source = _of_pixels(source)
        if isinstance(source, Image.Image):
            return np.array(upright(source, pixel_limit))
        if isinstance(source, bytearray):
            source = memoryview(source)
        data = read_file(source) if isinstance(source, (str, Path)) else source
        pixels = _decode_plain_jpeg(data, at_least, pixel_limit) if simplejpeg else None
        if pixels is None:
            pixels = np.array(open_upright(bytes(data), pixel_limit=pixel_limit, at_least=at_least))
        return pixels
    except DataFault as fault:
        if isinstance(source, (str, Path)) and fault.kind not in (MISSING, "file-too-large"):  # these name it
            raise DataFault(fault.problem, mend=fault.mend, kind=fault.kind, file=source) from None
        raise
    except MemoryError:
        raise DataFault(
            "the image cannot be decoded: memory is short", mend="Shrink it or leave it out.", kind="undecodable-image"
        ) from None


def _of_pixels(pixels: np.ndarray | torch.Tensor) -> Image.Image:
    """Numpy's order of axes is that of Pillow and OpenCV, torch's that of torchvision."""
    shape, kind, order = tuple(pixels.shape), str(pixels.dtype).removeprefix("torch."), "[h, w, 3]"
    if isinstance(pixels, torch.Tensor):
        order = "[3, h, w]"
        pixels = (pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels).cpu().numpy()
    if kind != "uint8" or pixels.ndim not in (2, 3) or pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        raise DataFault(
            f"the pixels are {kind} {list(shape)}, expected uint8 {order}, red first",
            mend="Convert them to that.",
            kind="undecodable-image",
        )
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))


def _decode_plain_jpeg(data: bytes | memoryview, at_least: int | None, pixel_limit: int) -> np.ndarray | None:
    """uint8 ``[h, w, 3]``, upright, of a grey or colour JPEG, whole the very pixels Pillow gives; None leaves it to Pillow."""
    start = plain_jpeg(data, pixel_limit=pixel_limit)
    if start is None:
        return None
    try:
        if start.components == 3 and simplejpeg.decode_jpeg_header(data)[2] != "YCbCr":
            return None
        # Scales between 1/2 and 1 would take longer than all of it: they have no vector code.
        scaled = {"min_height": at_least, "min_width": at_least, "min_factor": 2} if at_least else {}
        return _upright(simplejpeg.decode_jpeg(data, **scaled), jpeg_orientation(data, start))
    except Exception:  # noqa: BLE001 - damaged: Pillow says how
        return None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def squash(pixels: torch.Tensor, size: int, resample: Resample = "bicubic") -> torch.Tensor:
    """uint8 ``[3, h, w]`` → uint8 ``[3, size, size]``, antialiased, within 1/255 of Pillow's (see above)."""
    return stretch(pixels, size, size, resample)


def stretch(pixels: torch.Tensor, tall: int, wide: int, resample: Resample) -> torch.Tensor:
    """uint8 ``[3, h, w]`` → uint8 ``[3, tall, wide]``, antialiased, within 1/255 of Pillow's (see above)."""
    height, width = pixels.shape[1:]
    if (height, width) == (tall, wide):
        return pixels
    # Not `pixels.unsqueeze(0)`: by its strides torch would take it for planes, and lay out what it returns as such.
    batch = pixels.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    if _PILLOW_TALL_FIRST and height - tall > 2 * max(width - wide, 0):
        # Between the two passes values are cut to 0…255, so their order shows (up to 8/255): take Pillow's.
        batch = _interpolate(batch, (tall, width), resample)
    return _interpolate(batch, (tall, wide), resample)[0]


def stretch_many(pixels: torch.Tensor, tall: int, wide: int, resample: Resample) -> torch.Tensor:
    """uint8 ``[n, 3, h, w]`` on any device → uint8 ``[n, 3, tall, wide]``, of Pillow's but for the odd rounding: on cards torch resizes floats alone.

    In two passes that round to 0…255 each, in Pillow's order.
    """
    height, width = pixels.shape[2:]
    tall_first = _PILLOW_TALL_FIRST and height - tall > 2 * max(width - wide, 0)
    fitted = pixels.float()
    for size in ((tall, width) if tall_first else (height, wide), (tall, wide)):
        if tuple(fitted.shape[2:]) != size:
            fitted = _interpolate(fitted, size, resample).add_(0.5).floor_().clamp_(0, 255)
    return fitted.to(torch.uint8)


def crop(pixels: torch.Tensor, size: int, resample: Resample = "bicubic", *, even: bool = False) -> torch.Tensor:
    """uint8 ``[3, h, w]`` → the middle, uint8 ``[3, size, size]``, of the picture with its shorter side at `size` pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(middle(image, size, PILLOW_FILTERS[resample], even=even))).permute(2, 0, 1)


def _interpolate(batch: torch.Tensor, size: tuple[int, int], resample: Resample) -> torch.Tensor:
    return torch.nn.functional.interpolate(batch, size=size, mode=resample, antialias=True)


def normalise(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 ``[n, 3, h, w]`` → `dtype`, ``(x / 255 − mean) / std`` per channel, on the tensor's device.

    One multiplication and one addition: the division by 255 is folded into both. In memory the numbers lie as the pixels did.
    """
    scale = to_device(torch.tensor([1 / (255 * s) for s in std]), pixels.device).view(1, 3, 1, 1)
    shift = to_device(torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]), pixels.device).view(1, 3, 1, 1)
    return torch.addcmul(shift, pixels.to(torch.float32), scale).to(dtype)


def at_size(pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """uint8 squares ``[n, 3, s, s]`` as a tower for pictures of another `size` (height, width) takes them; as they are where that is theirs."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    resized = F.interpolate(pixels.float(), size=list(size), mode="bicubic", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
