"""JPEGs decoded where the towers are: workers hand over bytes, and the device decodes, resizes and lays them out.

What a device cannot take stays on the workers' road: other formats, progressive JPEGs, CMYK, pictures to be turned, very large or
long ones. A JPEG that proves damaged on the device is decoded in the training process as a worker would have: it is named and
replaced in the same way. Only steps of training decode so; what is judged or kept is decoded by workers everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
import torch

from cnclip_ft.models.contract import Preprocessing
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.runtime import to_device
from data_tools.errors import DataFault, RequestError
from data_tools.metadata import JpegStart, jpeg_orientation
from data_tools.pictures import JPEG_END, LONG, TAIL, plain_jpeg
from data_tools.words import Said

Wanted = Literal["auto", "workers", "device"]
_BASELINE = (0xC0, 0xC1)
_LONGEST = 4096  # pixels of a side: beyond it a worker's reduced scale is the cheaper road
_PIXELS_AT_ONCE = (
    64_000_000  # of one call: 200 MB of bytes, and four times that of the largest picture while it is resized
)


class JpegDecoder(Protocol):
    """Whole JPEGs → uint8 ``[3, h, w]`` each, RGB, on its device; None where one cannot be decoded."""

    name: str

    def __call__(self, files: Sequence[np.ndarray]) -> list[torch.Tensor | None]: ...


class NvImageCodec:
    """nvJPEG, and the decoders in the hardware of newer cards, through NVIDIA's nvImageCodec; on the CPU libjpeg-turbo."""

    name = "nvImageCodec"

    def __init__(self, device: torch.device) -> None:
        from nvidia import nvimgcodec

        self._codec, self.device = nvimgcodec, device
        place: dict[str, Any] = {
            "device_id": nvimgcodec.NVIMGCODEC_DEVICE_CURRENT if device.index is None else device.index
        }
        if device.type == "cpu":
            only = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
            place = {"device_id": nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, "backends": [only], "max_num_cpu_threads": 1}
        # Colours between the samples are interpolated, as libjpeg does it.
        self._decoder = nvimgcodec.Decoder(**place, options=":fancy_upsampling=1")
        self._how = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

    def __call__(self, files: Sequence[np.ndarray]) -> list[torch.Tensor | None]:
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        found = self._decoder.decode(
            [self._codec.CodeStream(file) for file in files], params=self._how, cuda_stream=stream
        )
        return [None if image is None else self._tensor(image) for image in found]

    def _tensor(self, image: Any) -> torch.Tensor:
        pixels = (
            torch.from_numpy(np.asarray(image))
            if self.device.type == "cpu"
            else torch.as_tensor(image, device=self.device)
        )
        return pixels.permute(2, 0, 1)


class Torchvision:
    """nvJPEG through torchvision, which gives it up for another library from 0.29 on: taken where it is asked for."""

    name = "torchvision"

    def __init__(self, device: torch.device) -> None:
        from torchvision import io

        self._io, self.device = io, device

    def __call__(self, files: Sequence[np.ndarray]) -> list[torch.Tensor | None]:
        tensors = [torch.from_numpy(file) for file in files]
        try:
            return list(self._io.decode_jpeg(tensors, mode=self._io.ImageReadMode.RGB, device=self.device))
        except RuntimeError:  # of one; the others are decoded alone
            return [self._one(tensor) for tensor in tensors]

    def _one(self, tensor: torch.Tensor) -> torch.Tensor | None:
        try:
            pixels: torch.Tensor = self._io.decode_jpeg(tensor, mode=self._io.ImageReadMode.RGB, device=self.device)
        except RuntimeError:
            return None
        return pixels


def choose_decoder(
    wanted: Wanted, device: torch.device, preprocessing: Preprocessing
) -> tuple[JpegDecoder | None, Said]:
    """What decodes JPEGs on the device (None: workers decode), and the reason.

    Raises:
        RequestError: the device was asked for, and cannot.
    """
    asked = Said("asked for", "已指定")
    if wanted == "workers":
        return None, asked
    if device.type != "cuda":
        lacks = Said(
            "it needs a CUDA device, this run is on {device}",
            "需要 CUDA 设备，本次运行在 {device} 上",
            device=device.type,
        )
    elif not isinstance(preprocessing, SquarePicture):
        lacks = Said(
            "it is for towers that see squares, and this one takes pictures in their own shape",
            "只适用于方形输入的塔，而本塔按图片自身的形状读取",
        )
    elif find_spec("nvidia") and find_spec("nvidia.nvimgcodec"):
        return NvImageCodec(device), Said("nvImageCodec is there", "已安装 nvImageCodec") if wanted == "auto" else asked
    elif wanted == "device" and find_spec("torchvision"):
        return Torchvision(device), asked
    else:
        lacks = Said(
            "it needs NVIDIA's nvImageCodec: pip install -e '.[nvjpeg]'",
            "需要 NVIDIA 的 nvImageCodec：pip install -e '.[nvjpeg]'",
        )
    if wanted == "device":
        raise RequestError(f"data.decode: device cannot be used here: {lacks}; or give data.decode=workers")
    return None, Said("JPEGs not on the card: {why}", "JPEG 不在显卡上解码：{why}", why=lacks)


def for_device(data: bytes | memoryview) -> bool:
    """Whether a device decodes this file as a worker does: a whole baseline JPEG, grey or YCbCr, upright, of common size."""
    try:
        start = plain_jpeg(data)
    except DataFault:
        return False
    if start is None or start.frame not in _BASELINE or max(start.width, start.height) > _LONGEST:
        return False
    long = max(start.width, start.height) >= LONG * min(start.width, start.height)
    ends = JPEG_END in bytes(data[-TAIL:])
    return ends and not long and _common_colours(data, start) and jpeg_orientation(data, start) == 1


def _common_colours(data: bytes | memoryview, start: JpegStart) -> bool:
    """Grey or YCbCr, for every decoder: they differ where a file does not say so plainly."""
    if start.components == 1:
        return True
    named = False
    for marker, begin, end in start.segments:
        if (
            marker == 0xEE
            and bytes(data[begin + 4 : begin + 9]) == b"Adobe"
            and (end < begin + 16 or data[begin + 15] != 1)
        ):
            return False
        if marker in _BASELINE:
            named = named or tuple(data[begin + 10 + 3 * n] for n in range(3)) == (1, 2, 3)
        named = named or (marker == 0xE0 and bytes(data[begin + 4 : begin + 8]) == b"JFIF")
    return named


class OnDevice:
    """Bytes of a batch → its pixels on the device.

    Args:
        whole: decodes the picture of a pair here, as a worker would: ``pair``, ``pixels`` and ``fault`` of `PairDataset`.
    """

    def __init__(
        self,
        decoder: JpegDecoder,
        preprocessing: SquarePicture,
        device: torch.device,
        whole: Callable[[int], dict[str, Any]],
    ) -> None:
        self.decoder, self.preprocessing, self.device, self.whole = decoder, preprocessing, device, whole
        # Beside what the device computes of the step before; the batch waits for it, the CPU does not.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # When the device was done with what was asked of it before a batch, and with decoding the batch.
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(
        self, pairs: np.ndarray, files: list[np.ndarray], places: np.ndarray, decoded: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[str]]:
        """uint8 ``[n, 3, size, size]`` on the device, and what was wrong with pictures.

        Args:
            pairs: int64 ``[n]``, changed where a damaged picture is replaced by another pair's.
            files: JPEGs, of the pairs at `places`.
            decoded: pixels of the other pairs in their order; None where there are none.
        """
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            pixels = torch.empty(len(pairs), *self.preprocessing.shape, dtype=torch.uint8, device=self.device)
            if decoded is not None:
                others = np.setdiff1d(np.arange(len(pairs)), places)
                pixels[to_device(torch.from_numpy(others), self.device)] = to_device(decoded, self.device)
            faults = []
            for place in self._fill(pixels, files, places.tolist()):
                sample = self.whole(int(pairs[place]))
                pairs[place] = sample["pair"]
                pixels[place] = to_device(sample["pixels"], self.device)
                faults += [sample["fault"]] if sample["fault"] else []
        if self._stream is not None:
            now = torch.cuda.current_stream(self.device)
            free, there = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            free.record(now)
            there.record(self._stream)
            self._waits.append((free, there))
            now.wait_stream(self._stream)
            pixels.record_stream(now)
        return pixels, faults

    def waited(self) -> float:
        """Seconds that the device stood still for pictures it decoded, since this was asked; batches that are not there yet are told
        later. Nothing is waited for."""
        seconds = 0.0
        while self._waits and all(event.query() for event in self._waits[0]):
            free, decoded = self._waits.popleft()
            seconds += max(free.elapsed_time(decoded), 0.0) / 1000
        return seconds

    def _fill(self, pixels: torch.Tensor, files: list[np.ndarray], places: list[int]) -> list[int]:
        """Places of the files that could not be decoded."""
        bad = []
        for group in self._in_bounds(files):
            by_size: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}
            for number, picture in zip(group, self.decoder([files[n] for n in group]), strict=True):
                if picture is None:
                    bad.append(places[number])
                else:
                    by_size.setdefault(tuple(picture.shape), []).append((places[number], picture))
            for alike in by_size.values():
                fitted = self.preprocessing.fit_many(torch.stack([picture for _, picture in alike]))
                for (place, _), one in zip(alike, fitted, strict=True):
                    pixels[place] = one
        return bad

    @staticmethod
    def _in_bounds(files: list[np.ndarray]) -> list[list[int]]:
        """Numbers of the files, so many at once that their pixels are few enough."""
        groups: list[list[int]] = [[]]
        held = 0
        for number, file in enumerate(files):
            start = plain_jpeg(file.data)
            size = start.width * start.height if start is not None else 0
            if groups[-1] and held + size > _PIXELS_AT_ONCE:
                groups.append([])
                held = 0
            groups[-1].append(number)
            held += size
        return groups
