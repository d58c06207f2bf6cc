"""JPEGs decoded by a device: the batches of the workers' road, and what a device cannot take stays on it."""

from __future__ import annotations

import io
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from cnclip_ft.data import device_decoding
from cnclip_ft.data.batching import BatchOrder, StageSampler, make_loader
from cnclip_ft.data.device_decoding import NvImageCodec, OnDevice, choose_decoder, for_device
from cnclip_ft.data.pairs import PairDataset, build_table
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.preprocessing import SquarePicture
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.data.jpeg_decoders import PillowDecoder, hurt

CPU = torch.device("cpu")
FITS = [
    SquarePicture(32),
    SquarePicture(32, fit="crop"),
    SquarePicture(32, fit="crop_even", resample="bilinear"),
    SquarePicture(37, fit="crop"),
]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth shapes with sharp edges: where a filter that is not the same would be seen."""
    rough = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    fine = np.array(Image.fromarray(rough).resize((width, height), Image.Resampling.NEAREST))
    fine[::3] = np.array(Image.fromarray(rough).resize((width, height)))[::3]
    return Image.fromarray(fine).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png() -> bytes:
    file = io.BytesIO()
    picture(50, 40).save(file, "PNG")
    return file.getvalue()


def without_marker(data: bytes, marker: int) -> bytes:
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


TAKEN = {
    "colour": jpeg(picture(50, 40)),
    "all colours": jpeg(picture(50, 40), subsampling=0),
    "grey": jpeg(picture(50, 40, mode="L")),
    "upright by its EXIF": jpeg(picture(50, 40), exif=turned(1)),
    "a camera's, without JFIF": without_marker(jpeg(picture(50, 40)), 0xE0),
}
LEFT = {
    "progressive": jpeg(picture(50, 40), progressive=True),
    "CMYK": jpeg(picture(50, 40, mode="CMYK")),
    "RGB within": jpeg(picture(50, 40), keep_rgb=True),
    "to be turned": jpeg(picture(50, 40), exif=turned(6)),
    "PNG": png(),
    "cut off": jpeg(picture(50, 40))[:-200],
    "empty": b"",
    "no picture": b"\xff\xd8\xff nothing",
    "a line": jpeg(picture(400, 8)),
    "very large": jpeg(Image.new("RGB", (4097, 8))),
}


@pytest.mark.parametrize("name", TAKEN)
def test_common_jpegs_are_for_the_device(name):
    assert for_device(TAKEN[name]) and for_device(memoryview(TAKEN[name]))


@pytest.mark.parametrize("name", LEFT)
def test_what_decoders_differ_in_stays_with_the_workers(name):
    assert not for_device(LEFT[name])


@pytest.mark.parametrize("rule", FITS, ids=str)
def test_pictures_are_fitted_as_a_worker_does_it(device, rule):
    """But for the odd rounding; enlarged and made small, wide and high; on the CPU and on a card."""
    for size in ((50, 40), (32, 32), (20, 61), (333, 241), (64, 480), (33, 500)):
        images = [picture(*size, seed=seed) for seed in range(3)]
        expected = torch.stack([rule.decode(image) for image in images])
        whole = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        found = rule.fit_many(whole.to(device)).cpu()
        assert found.shape == expected.shape and found.dtype == torch.uint8
        away = (found.int() - expected.int()).abs()
        assert away.max() <= 2 and (away > 0).float().mean() < 0.05, size


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Every kind, twice, in sizes that differ; two are hurt where no header shows it."""
    folder = tmp_path_factory.mktemp("store") / "train"
    readable = {name: data for name, data in LEFT.items() if name not in ("cut off", "empty", "no picture")}
    files = [*TAKEN.values(), *readable.values(), hurt(TAKEN["colour"]), LEFT["cut off"]]
    assert for_device(files[-2])
    files += [jpeg(picture(40 + n, 60 - n, seed=n)) for n in range(12)]
    with StoreWriter(folder) as writer:
        for number, data in enumerate(files):
            writer.add_image(number, data)
            writer.add_pair(number, number, f"图片{number}", "zh")
        writer.finish()
    return open_store(folder)


def batches(store, rule, decoder=None, workers: int = 0, device=CPU):
    tokenizer = TextTokenizer()
    table = build_table(store, tokenizer)
    sampler = StageSampler(BatchOrder(table, 6, seed=0), 0, 8, 0, 1)
    data = PairDataset(store, table, rule, reduced=False, as_file=None if decoder is None else for_device)
    on_device = None if decoder is None else OnDevice(decoder, rule, device, partial(data.sample, decoded=True))
    return list(make_loader(data, sampler, tokenizer, workers, pin=device.type == "cuda", on_device=on_device))


def alike(store, rule, found, most: int = 2, share: float = 1.0):
    expected = batches(store, rule)
    assert sum(len(batch["faults"]) for batch in expected) >= 2
    for batch, right in zip(found, expected, strict=True):
        assert sorted(batch["faults"]) == sorted(right["faults"])
        for name in ("image_keys", "text_keys", "input_ids", "attention_mask"):
            assert torch.equal(batch[name].cpu(), right[name])
        away = (batch["pixels"].cpu().int() - right["pixels"].int()).abs()
        assert (away <= most).float().mean() >= share


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rule", FITS[:2], ids=str)
def test_the_batches_are_those_of_the_workers(store, rule, workers):
    decoder = PillowDecoder()
    alike(store, rule, batches(store, rule, decoder, workers))
    assert decoder.seen > 30  # of 48 pictures in 8 batches, handed over by the workers or by this process


def test_many_pixels_are_decoded_in_parts(store, monkeypatch):
    monkeypatch.setattr(device_decoding, "_PIXELS_AT_ONCE", 5000)
    decoder = PillowDecoder()
    alike(store, FITS[0], batches(store, FITS[0], decoder))
    assert decoder.most <= 2


def test_the_library_decodes_as_the_workers_do(store):
    """NVIDIA's own, on the CPU."""
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    alike(store, FITS[0], batches(store, FITS[0], NvImageCodec(CPU), workers=1))


@pytest.mark.parametrize("kind", ["NvImageCodec", "Torchvision"])
def test_a_card_decodes_nearly_as_the_workers_do(device, store, kind):
    """nvJPEG rounds in its own way, and may interpolate colours in its own."""
    if device.type == "cpu":
        pytest.skip("the stand-in and the library are beside the workers above")
    pytest.importorskip({"NvImageCodec": "nvidia.nvimgcodec", "Torchvision": "torchvision"}[kind])
    decoder = getattr(device_decoding, kind)(device)
    found = batches(store, FITS[0], decoder, workers=1, device=device)
    assert all(batch["pixels"].device.type == "cuda" for batch in found)
    alike(store, FITS[0], found, most=16, share=0.95)


def test_where_it_cannot_be_it_is_refused(monkeypatch):
    rule, card = SquarePicture(32), torch.device("cuda")
    assert choose_decoder("workers", card, rule) == (None, "asked for")
    with pytest.raises(RequestError, match="it needs a CUDA device, this run is on cpu; or give data.decode=workers"):
        choose_decoder("device", CPU, rule)
    assert choose_decoder("auto", CPU, rule)[0] is None
    with pytest.raises(RequestError, match="pictures in their own shape"):
        choose_decoder("device", card, object())
    monkeypatch.setattr(device_decoding, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install -e '\.\[nvjpeg\]'; or give"):
        choose_decoder("device", card, rule)
    found, why = choose_decoder("auto", card, rule)
    assert found is None and why == "JPEGs not on the card: it needs NVIDIA's nvImageCodec: pip install -e '.[nvjpeg]'"


def test_it_is_chosen_by_itself_only_with_the_library_made_for_it(monkeypatch):
    class Stand(PillowDecoder):
        def __init__(self, device):
            super().__init__()

    rule, card = SquarePicture(32), torch.device("cuda")
    monkeypatch.setattr(device_decoding, "NvImageCodec", type("NvImageCodec", (Stand,), {}))
    monkeypatch.setattr(device_decoding, "Torchvision", type("Torchvision", (Stand,), {}))
    there = {"nvidia", "nvidia.nvimgcodec", "torchvision"}
    monkeypatch.setattr(device_decoding, "find_spec", lambda name: name in there)
    for wanted in ("auto", "device"):
        assert type(choose_decoder(wanted, card, rule)[0]).__name__ == "NvImageCodec"
    there -= {"nvidia"}
    assert choose_decoder("auto", card, rule)[0] is None
    assert type(choose_decoder("device", card, rule)[0]).__name__ == "Torchvision"


class Stream:
    """A device's queue whose clock stands where it is set, in milliseconds; None: it has not come so far."""

    def __init__(self) -> None:
        self.clock: float | None = 0.0

    def wait_stream(self, other) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Stream) -> None:
        self.stream, self.at = stream, stream.clock

    def query(self) -> bool:
        self.at = self.stream.clock if self.at is None else self.at
        return self.at is not None

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_what_a_device_stands_still_for_its_own_decoding_counts_as_waiting(store, monkeypatch):
    """From when it was done with the step before until the batch was there; not what it decodes beside a step, and nothing
    is waited for."""
    steps, decoding = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: steps)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    rule = SquarePicture(32)
    on_device = OnDevice(PillowDecoder(), rule, CPU, lambda _pair: {})
    file = np.frombuffer(jpeg(picture(60, 50)), np.uint8)
    for_one = (np.zeros(1, np.int64), [file], np.zeros(1, np.int64), None)
    on_device(*for_one)
    assert (
        on_device.waited() == 0.0 and not on_device._waits
    )  # a CPU decodes while the loader is asked, which is timed there
    on_device._stream = decoding
    found = []
    for free, there in ((100.0, 130.0), (200.0, 190.0), (300.0, 305.0)):
        steps.clock, decoding.clock = free, there
        on_device(*for_one)
    assert on_device.waited() == pytest.approx(0.035) and on_device.waited() == 0.0
    steps.clock, decoding.clock = None, 500.0
    on_device(*for_one)
    found.append(on_device.waited())
    steps.clock = 480.0
    found.append(on_device.waited())
    assert found == [0.0, pytest.approx(0.02)]
