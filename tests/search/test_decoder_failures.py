"""Whatever a decoder raises, a picture is a fault with its name, at every place where pictures are met."""

from __future__ import annotations

import json
import struct

import pytest
from PIL import Image, ImageFile, ImageFont
from typer.testing import CliRunner

from cnclip_ft.cli import app
from cnclip_ft.data.pairs import PairDataset, build_table
from cnclip_ft.evaluation.encoding import encode_to_folder
from cnclip_ft.evaluation.options import Options
from cnclip_ft.features.encode import encode_split
from cnclip_ft.features.folder import read_set
from cnclip_ft.models import preprocessing as images
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.start import build_start
from cnclip_ft.search.index.folder import Index
from cnclip_ft.search.index.pictures import uploaded_pixels
from cnclip_ft.search.web.decoder import LENGTHS, _answer
from cnclip_ft.training.examples import thumbnail
from data_tools.build import build_store
from data_tools.check import measure
from data_tools.check.judge import judge
from data_tools.check.page import write_page
from data_tools.contact_sheet import draw_sheet
from data_tools.errors import DataFault, UserError
from data_tools.pictures import Reencoding, decode_check, open_upright, read_header, reencode
from data_tools.sources import open_source
from data_tools.store import StoreWriter, open_store
from tests.data_tools.samples import picture
from tests.evaluation import tiny

RAISED = [
    struct.error("unpack requires a buffer of 4 bytes"),
    TypeError("'NoneType' object is not subscriptable"),
    RuntimeError("Failed to decode frame 0"),
    MemoryError(),
    OSError("broken data stream"),
    ValueError("bad transparency"),
    SyntaxError("not a TIFF"),
    ZeroDivisionError("division by zero"),
    OverflowError("too large"),
    RecursionError("too deep"),
    KeyError("MPO"),
    IndexError("index out of range"),
    EOFError(),
    AttributeError("im"),
    AssertionError(),
    NotImplementedError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    StopIteration(),
    BufferError("full"),
    Image.DecompressionBombError("bomb"),
    Image.UnidentifiedImageError("cannot identify image file"),
    Exception(),
    ImportError("no module"),
]
BAD = 36  # pixels a side: pictures of this size cannot be decoded
GOOD = tiny.png(1, 32)


@pytest.fixture(params=RAISED, ids=lambda error: type(error).__name__)
def failing(request, monkeypatch):
    """Decoders that raise this for pictures of one size; the others decode."""
    load = ImageFile.ImageFile.load

    def fail(self):
        if BAD in self.size:
            raise request.param
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    return tiny.png(0, BAD)


@pytest.fixture(params=RAISED, ids=lambda error: type(error).__name__)
def failing_to_open(request, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(request.param))
    return tiny.png(0, BAD)


def both(folder, data: bytes, *, store: bool = False):
    """A folder, or a store, of a good picture and the bad one."""
    if store:
        with StoreWriter(folder) as writer:
            for number, content in enumerate((GOOD, data)):
                writer.add_image(number, content)
                writer.add_pair(number, number, f"第{number}张", "zh")
            writer.finish()
        return open_store(folder)
    for name, content in (("a", GOOD), ("b", data)):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(content)
        (folder / name / "1.txt").write_text("图", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "look",
    [
        decode_check,
        open_upright,
        lambda data: reencode(data, Reencoding(16)),
        lambda data: reencode(data, Reencoding(999)),
        images.SquarePicture(24).decode,
        lambda data: images.SquarePicture(24).decode(memoryview(data), reduced=True),
        lambda data: uploaded_pixels(data, SquarePicture(24)),
        lambda data: read_header(data[:-12]),
    ],
)
def test_every_way_to_decode_gives_a_fault(look, failing) -> None:
    with pytest.raises(DataFault) as caught:
        look(failing)
    assert caught.value.kind in ("undecodable-image", "image-too-large")


@pytest.mark.parametrize("look", [read_header, open_upright, images.SquarePicture(24).decode])
def test_every_way_to_open_gives_a_fault(look, failing_to_open) -> None:
    with pytest.raises(DataFault):
        look(failing_to_open)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_the_fast_decoder_cannot_do_is_left_to_pillow(error, monkeypatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    data = picture(1, (60, 40))
    wanted = images.SquarePicture(24).decode(data)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    assert images.SquarePicture(24).decode(data).equal(wanted)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_no_fault(stop, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (_ for _ in ()).throw(stop()))
    with pytest.raises(stop):
        images.SquarePicture(24).decode(GOOD)


@pytest.fixture(scope="module")
def model():
    return build_start({"architecture": "tiny"}, seed=0)[0]


def test_data_commands_go_on(failing, tmp_path, monkeypatch) -> None:
    source = open_source("folder", str(both(tmp_path / "P", failing)))[""]
    report = build_store(source, tmp_path / "S", reencoding=Reencoding(34), on_error="skip", progress=False)
    assert report.images == 1 and {"undecodable-image", "image-too-large"} & report.faults.keys()
    store = both(tmp_path / "T", failing, store=True)
    check = measure(store, progress=False)
    assert check.undecodable == 1
    write_page(judge([check]), {store.name: store}, tmp_path / "page.html")
    monkeypatch.setattr("data_tools.contact_sheet.find_font", lambda *_, **__: ImageFont.load_default(16))
    assert draw_sheet(store, tmp_path / "sheet.png") == 2
    assert thumbnail(failing).getpixel((0, 0)) == (128, 128, 128)
    told = json.loads(
        _answer({"do": "fit", "how": SquarePicture(24).fitting, "pixels": 10**6}, failing)[LENGTHS.size :]
    )
    assert told["kind"] in ("undecodable-image", "image-too-large")  # the server's own decoding process


def test_training_replaces_it_and_evaluation_names_it(failing, tmp_path, model) -> None:
    store = both(tmp_path / "T", failing, store=True)
    pairs = PairDataset(store, build_table(store, TextTokenizer()), images.SquarePicture(24))
    assert pairs[1]["pair"] == 0 and "image 1" in pairs[1]["fault"]
    with pytest.raises(DataFault, match="image 1: "):
        encode_split(model, store)


def test_an_index_leaves_it_out(failing, tmp_path, make, checkpoint) -> None:
    said = make(checkpoint, both(tmp_path / "P", failing), tmp_path / "I")
    index = Index(tmp_path / "I")
    assert list(index.stamps()) == ["a/1.png"] and list(index.damaged) == ["b/1.png"] and "b/1.png: " in said


@pytest.mark.parametrize("workers", [0, 1])
def test_encode_lists_what_it_leaves_out_and_keeps_the_ids_right(tmp_path, checkpoint, workers) -> None:
    folder, quiet = tmp_path / "P", {"say": lambda _: None}
    options = lambda: Options(batch_size=2, workers=workers, device="cpu")  # noqa: E731
    for number in range(7):
        (tmp_path / "P").mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(b"<html>" if number in (0, 3, 4) else tiny.png(number))
    (tmp_path / "Q").mkdir()
    for number in (1, 2, 5, 6):
        (tmp_path / "Q" / f"{number}.png").write_bytes(tiny.png(number))
    with pytest.raises(UserError, match="3 pictures cannot be used.*faults.jsonl") as caught:
        encode_to_folder(checkpoint, folder, tmp_path / "F", options(), **quiet)
    assert caught.value.exit_code == 1
    encode_to_folder(checkpoint, tmp_path / "Q", tmp_path / "G", options(), **quiet)
    found, wanted = read_set(tmp_path / "F", "image"), read_set(tmp_path / "G", "image")
    assert found.ids == wanted.ids == [f"{n}.png" for n in (1, 2, 5, 6)]
    assert (found.features - wanted.features).abs().max() < 1e-5
    faults = [json.loads(line) for line in (tmp_path / "F" / "faults.jsonl").read_text().splitlines()]
    assert [fault["id"] for fault in faults] == ["0.png", "3.png", "4.png"]
    assert all(fault["kind"] == "undecodable-image" and fault["file"].endswith(fault["id"]) for fault in faults)
    encode_to_folder(checkpoint, folder, tmp_path / "F", options(), overwrite=True, on_error="skip", **quiet)
    with pytest.raises(DataFault, match="0.png"):
        encode_to_folder(checkpoint, folder, tmp_path / "H", options(), on_error="fail", **quiet)
    for number in (1, 2, 5, 6):
        (folder / f"{number}.png").unlink()
    with pytest.raises(UserError, match="none of the 3 pictures can be used"):
        encode_to_folder(checkpoint, folder, tmp_path / "J", options(), **quiet)


def test_faults_of_blocks_survive_an_interruption(tmp_path, checkpoint, monkeypatch) -> None:
    from cnclip_ft.features import folder
    from cnclip_ft.features.rows import Rows

    monkeypatch.setitem(folder.PART, "image", 2)
    (tmp_path / "P").mkdir()
    for number in range(6):
        (tmp_path / "P" / f"{number}.png").write_bytes(b"" if number in (1, 4) else tiny.png(number))
    write, calls = Rows.write, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(Rows, "write", stop)
    options = lambda: Options(batch_size=4, workers=0, device="cpu")  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        encode_to_folder(checkpoint, tmp_path / "P", tmp_path / "F", options(), say=lambda _: None)
    encode_to_folder(checkpoint, tmp_path / "P", tmp_path / "F", options(), on_error="skip", say=lambda _: None)
    assert read_set(tmp_path / "F", "image").ids == ["0.png", "2.png", "3.png", "5.png"]
    assert len((tmp_path / "F" / "faults.jsonl").read_text().splitlines()) == 2


def test_classify_leaves_it_out_and_says_so(tmp_path, checkpoint) -> None:
    both(tmp_path / "P", b"no picture")
    (tmp_path / "c.txt").write_text("a\tred\nb\tblue\n", encoding="utf-8")

    def classify(on_error: str) -> list[str]:
        asked = [
            "classify",
            checkpoint,
            tmp_path / "P",
            "--classes",
            tmp_path / "c.txt",
            "--templates",
            "none",
            "--no-cache",
        ]
        asked += ["--output", tmp_path / "o.jsonl", "--json", tmp_path / "o.json", "--on-error", on_error]
        asked += ["--workers", "0", "--device", "cpu"]
        return CliRunner().invoke(app, [str(part) for part in asked], catch_exceptions=False).output.splitlines()

    said = classify("skip")
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == ["a/1.png", "b/1.png"] and lines[1]["fault"][
        "kind"
    ] == "undecodable-image"
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["images"]["count"] == content["scores"]["images"] == 1 and content["left_out"][0]["id"] == "b/1.png"
    assert "1 pictures cannot be used" in said[-1] and any(
        "passed over: 2 of other endings (.txt 2)" in line for line in said
    )
    with pytest.raises(UserError, match="left out"):
        classify("report")
    with pytest.raises(DataFault, match="b/1.png"):
        classify("fail")
