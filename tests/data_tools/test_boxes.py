"""Phrases with boxes from every form, on the picture they were drawn on, whatever way it is stored; what is wrong is named."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cnclip_ft.cli import app
from data_tools.build import build_store
from data_tools.check import judge, measure
from data_tools.check.tables import in_words
from data_tools.contact_sheet import draw_sheet
from data_tools.errors import DataFault, RequestError
from data_tools.pictures import open_upright
from data_tools.sources import SourceOptions, open_source
from data_tools.store import StoreWriter, environments, open_store
from data_tools.upright import _TURNS
from tests.data_tools.box_samples import (
    FORMS,
    HEIGHT,
    SHARES,
    WIDTH,
    close,
    coco_content,
    drawn,
    imported,
    labelme_content,
    photos,
    told,
    write_coco,
    write_entities,
    write_labelme,
    write_rows,
    write_yolo,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("after", [None, 3])
def test_every_form_brings_the_same(tmp_path, monkeypatch, form: str, after: int | None) -> None:
    place = FORMS[form](tmp_path / "data")
    if after is not None:  # interrupted
        from data_tools import build as building

        take = building._Build._take

        def stopping(self, position, item, data) -> None:
            if position >= after:
                raise KeyboardInterrupt
            take(self, position, item, data)

        with monkeypatch.context() as patch:
            patch.setattr(building._Build, "_take", stopping)
            with pytest.raises(KeyboardInterrupt):
                imported(place, tmp_path / "s", resume=True)
    report = imported(place, tmp_path / "s", resume=True)
    close(told(report.store), SHARES)
    images = [report.store.image(image_id) for image_id in report.store.image_ids]
    assert sorted(images) == sorted(map(drawn, range(2))) and not report.faults
    boxless = "2 phrases without boxes passed over (the first: a.xml, 'the park')"
    assert report.notes == ([boxless] if form == "entities" else [])


@pytest.mark.parametrize("form", ["coco", "yolo", "labelme", "entities", "rows"])
def test_names_give_every_phrase_in_both_languages(tmp_path, form: str) -> None:
    (tmp_path / "zh.tsv").write_text("name\tzh\nDog\t狗\n", encoding="utf-8")
    report = imported(FORMS[form](tmp_path / "data"), tmp_path / "s", SourceOptions(names=tmp_path / "zh.tsv"))
    wanted = {name: {**found, "狗": found["dog"]} for name, found in SHARES.items()}
    close(told(report.store), wanted)
    assert {pair.language for pair in report.store.pairs() if pair.text == "狗"} == {"zh"}
    assert any("1 phrase without a translation in zh.tsv: 'red umbrella'" in note for note in report.notes)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is empty"),
        ("dog 狗\n", r"zh.tsv:1: 'dog 狗' is not name<TAB>translation"),
        ("a\tb\na\tc\n", "zh.tsv:2: 'a' stands for 'b' and 'c'"),
    ],
)
def test_a_table_of_names_that_is_none_is_refused(tmp_path, content: str, why: str) -> None:
    (tmp_path / "zh.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=why):
        imported(write_rows(tmp_path / "data"), tmp_path / "s", SourceOptions(names=tmp_path / "zh.tsv"))


# ---- upright pictures -----------------------------------------------------------------------------------------------


def stored(orientation: int, kind: str = "JPEG") -> bytes:
    """A black upright picture of 100 × 80 with a white rectangle at (10, 20) of 30 × 16, stored in `orientation`."""
    upright = Image.new("RGB", (WIDTH, HEIGHT))
    upright.paste("white", (10, 20, 40, 36))
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = back.get(orientation, _TURNS.get(orientation))
    image = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **({"quality": 98, "subsampling": 0} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_picture(tmp_path, orientation: int, kind: str) -> None:
    data = stored(orientation, kind)
    (tmp_path / "p.jpg").write_bytes(data)
    image = Image.open(io.BytesIO(data))
    pixels = (
        np.asarray(image.convert("L")) > 128 if kind != "TIFF" else np.asarray(open_upright(data).convert("L")) > 128
    )
    down, across = np.where(pixels)
    raw = [int(across.min()), int(down.min()), int(np.ptp(across)) + 1, int(np.ptp(down)) + 1]
    sizes = {"width": pixels.shape[1], "height": pixels.shape[0]}  # of the picture as it is stored
    rows = [{"image": "p.jpg", "phrase": "upright", "boxes": [[10, 20, 30, 16]]}]
    if orientation in (1, 5, 6, 7, 8):
        rows = [{"image": "p.jpg", "phrase": "as stored", "boxes": [raw], **sizes}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = imported(tmp_path / "r.jsonl", tmp_path / "s").store
    white = np.asarray(open_upright(data).convert("L")) > 128
    down, across = np.where(white)
    seen = [across.min() / WIDTH, down.min() / HEIGHT, (np.ptp(across) + 1) / WIDTH, (np.ptp(down) + 1) / HEIGHT]
    assert np.abs(np.array(store.beside(0)["boxes"][0]) - seen).max() < 1e-5 and white.shape == (HEIGHT, WIDTH)


def test_a_stated_size_of_another_shape_is_another_picture(tmp_path) -> None:
    photos(tmp_path)
    rows = [
        {"image": "a.jpg", "phrase": "x", "boxes": [[10, 20, 30, 40]], "width": 300, "height": 100},
        {"image": "b.jpg", "phrase": "shrunk since", "boxes": [[10, 20, 30, 40]], "width": 401, "height": 320},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataFault, match=r"r.jsonl:1: .*picture of 300×100 pixels, and it has 100×80") as caught:
        imported(tmp_path / "r.jsonl", tmp_path / "s")
    assert caught.value.kind == "other-size"
    store = imported(tmp_path / "r.jsonl", tmp_path / "s", on_error="skip").store
    assert np.abs(np.array(store.beside(0)["boxes"][0]) - [10 / 401, 20 / 320, 30 / 401, 40 / 320]).max() < 1e-6


def test_crowds_points_and_bare_pictures_are_counted(tmp_path) -> None:
    file = write_coco(tmp_path / "coco")
    content = coco_content()
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"] += [
        {"id": 20, "image_id": 99, "category_id": 0, "bbox": [1, 1, 2, 2]},
        {"id": 21, "image_id": 7, "category_id": 5, "bbox": [1, 1, 2, 2]},
        {"id": 22, "image_id": 7, "category_id": 0},
        {"id": 23, "image_id": 7, "category_id": 0, "bbox": [10, 10, 0, 3]},
        "nothing",
    ]
    content["images"] += [{"id": 50, "file_name": "bare.jpg"}, {"id": 51}]
    file.write_text(json.dumps(content))
    report = imported(file, tmp_path / "s", on_error="skip")
    assert told(report.store)["a.jpg"]["dog"] == [[0.5, 0.1, 0.25, 0.2]]
    faults = [json.loads(line) for line in (tmp_path / "s" / "faults.jsonl").read_text("utf-8").splitlines()]
    places = {
        "annotation 20",
        "annotation 21",
        "annotation 22",
        "annotation 9",
        "image 51",
        "val2017/a.jpg, annotation 23",
        "a.jpg, annotation 23",
    }
    assert {fault["id"] for fault in faults} <= places and len(faults) == 6
    assert any("1 crowd (iscrowd) passed over" in note and "annotation 1" in note for note in report.notes)
    assert any("1 picture without any phrase passed over (the first: bare.jpg)" in note for note in report.notes)
    write_labelme(tmp_path / "labelme")
    content = labelme_content("b.jpg")
    content["shapes"] += [
        {"label": "nose", "shape_type": "point", "points": [[1, 2]]},
        {"label": "ball", "shape_type": "circle", "points": [[50, 40], [60, 40]]},
        {"label": "roof", "points": [[10, 10], [30, 40], [20, 5]]},
    ]
    (tmp_path / "labelme" / "b.json").write_text(json.dumps(content))
    report = imported(tmp_path / "labelme", tmp_path / "l")
    found = told(report.store)["b.jpg"]
    assert (
        found["ball"] == [[0.4, 0.375, 0.2, 0.25]]
        and found["roof"] == [[0.1, 0.0625, 0.2, 0.4375]]
        and "nose" not in found
    )
    assert any("1 shape without an area (points, lines) passed over" in note for note in report.notes)


def test_captions_go_in_beside_instances(tmp_path) -> None:
    instances = write_coco(tmp_path / "coco")
    captions = {"images": coco_content()["images"], "annotations": [{"id": 1, "image_id": 7, "caption": "two dogs"}]}
    file = instances.with_name("captions_val2017.json")
    file.write_text(json.dumps(captions))
    source = open_source("boxes", [str(instances), str(file)])[""]
    store = build_store(source, tmp_path / "s", progress=False).store
    found = told(store)
    assert found["a.jpg"].pop("two dogs") == []
    close(found, SHARES)


def test_yolo_by_data_yaml_has_its_splits(tmp_path) -> None:
    folder = write_yolo(tmp_path / "yolo")
    (folder / "classes.txt").unlink()
    (folder / "images" / "val").mkdir()
    (folder / "images" / "train" / "b.jpg").rename(folder / "images" / "val" / "b.jpg")
    (folder / "labels" / "val").mkdir()
    (folder / "labels" / "train" / "b.txt").rename(folder / "labels" / "val" / "b.txt")
    (folder / "list.txt").write_text("./images/val/b.jpg\n")
    (folder / "data.yaml").write_text(
        "path: ../nowhere\ntrain: ../train\nval: list.txt\nnames: {0: dog, 1: red umbrella}\n"
    )
    (folder / "data.yaml").write_text((folder / "data.yaml").read_text().replace("../train", "images/train"))
    found = open_source("boxes", str(folder))
    assert list(found) == ["train", "valid"]
    for name, picture_name in (("train", "a.jpg"), ("valid", "b.jpg")):
        close(
            told(build_store(found[name], tmp_path / name, progress=False).store), {picture_name: SHARES[picture_name]}
        )
    with pytest.raises(RequestError, match="has splits of its own"):
        open_source("boxes", [str(folder), str(folder)])
    named = "names: [dog, red umbrella]\n"
    (folder / "data.yaml").write_text(f"train: /nowhere/on/it/images/train\n{named}")  # another machine's
    close(
        told(build_store(open_source("boxes", str(folder))["train"], tmp_path / "n", progress=False).store),
        {"a.jpg": SHARES["a.jpg"]},
    )
    for content, why in (
        (f"train: ../../..\n{named}", "lies outside of .*--images"),
        (f"train: images/../../..\n{named}", "lies outside of .*--images"),
        (f"path: ..\ntrain: images/train\n{named}", "its path leads to .*--images"),
        (f"train: images/nothing\n{named}", "no such folder of pictures"),
    ):
        (folder / "data.yaml").write_text(content)
        with pytest.raises(RequestError, match=why):
            open_source("boxes", str(folder))
    (folder / "data.yaml").write_text("names: 5\n")
    with pytest.raises(RequestError, match="nothing names their classes"):
        open_source("boxes", str(folder))
    with pytest.raises(RequestError, match="names is no list of classes"):
        open_source("boxes", str(folder / "data.yaml"))


def test_entities_by_lists_have_their_splits(tmp_path) -> None:
    folder = write_entities(tmp_path / "e")
    (folder / "train.txt").write_text("a\n")
    (folder / "val.txt").write_text("b\n")
    found = open_source("boxes", str(folder))
    assert list(found) == ["train", "valid"]
    close(told(build_store(found["valid"], tmp_path / "s", progress=False).store), {"b.jpg": SHARES["b.jpg"]})


def test_what_is_in_no_form_is_said(tmp_path) -> None:
    for name, content, why in (
        ("a.json", "{", "is no JSON that can be read"),
        ("b.json", '{"a": 1}', "is none of COCO's instances"),
        ("c.csv", "a,b\n", "is none of COCO's instances"),
        ("d.json", '{"images": [], "annotations": [], "categories": []}', "categories names no class"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(RequestError, match=why):
            list(open_source("boxes", str(tmp_path / name))[""].open().items)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="nothing of COCO's instances"):
        open_source("boxes", str(tmp_path / "empty"))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_x.json").write_text("{}")
    with pytest.raises(RequestError, match="name one of its files .*instances_x.json"):
        open_source("boxes", str(tmp_path / "annotations"))
    with pytest.raises(RequestError, match="no such file"):
        open_source("boxes", str(tmp_path / "gone.jsonl"))
    with pytest.raises(RequestError, match="--names means nothing to source 'table'"):
        open_source("table", "x.csv", SourceOptions(names=tmp_path / "zh.tsv"))
    with pytest.raises(RequestError, match="--box-format"):
        open_source("boxes", str(write_coco(tmp_path / "coco")), SourceOptions(box_format="xyxy"))


# ---- looking at them -------------------------------------------------------------------------------------------------


def test_the_check_says_what_boxes_are_like(tmp_path) -> None:
    store = imported(write_rows(tmp_path / "data"), tmp_path / "s").store
    found = measure(store, progress=False)
    assert found.boxes is not None
    assert (found.boxes.pairs, found.boxes.boxes, found.boxes.phrases, found.boxes.whole) == (3, 4, 2, 1)
    assert found.boxes.most == [["dog", 2, 3], ["red umbrella", 1, 1]]
    assert found.boxes.areas.median == 5 and found.boxes.areas.most == 100  # 5, 5, 15, 100 %: rank 1.5
    report = judge([found])
    assert [finding.kind for finding in report.findings] == ["whole_boxes"] and not report.hurts
    json.dumps(report.as_dict())
    for language, said in (("en", "boxes a phrase"), ("zh", "每条短语的框")):
        words = in_words(report, language=language)
        assert said in words and "dog 2 (3), red umbrella 1 (1)" in words
    with StoreWriter(tmp_path / "twice") as writer:
        writer.add_image(1, drawn(1))
        writer.add_pair(1, 1, "dog", "en", {"boxes": [[0, 0, 0.5, 0.5]] * 2})
        twice = judge([measure(writer.finish(), progress=False)])
    assert twice.hurts and "in 1 pairs a box stands twice" in twice.findings[0].sentence()


def test_the_sheet_draws_boxes_around_their_things(tmp_path) -> None:
    grey = io.BytesIO()
    Image.new("RGB", (200, 100), "grey").save(grey, "PNG")
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_image(1, grey.getvalue())
        writer.add_pair(1, 1, "nothing", "en")
        writer.add_pair(1, 2, "thing", "en", {"boxes": [[0.25, 0.2, 0.5, 0.4]]})
        store = writer.finish()
    assert draw_sheet(store, tmp_path / "all.png", columns=2, rows=1) == 2
    assert draw_sheet(store, tmp_path / "boxes.png", columns=2, rows=1, boxes=True) == 1
    pixels = np.asarray(Image.open(tmp_path / "boxes.png").convert("RGB")).astype(int)
    yellow = (abs(pixels - [255, 255, 0]).sum(-1)) == 0
    down, across = np.where(yellow)
    # The picture is 200 × 100 in a cell of 224, 12 pixels from the edges of the sheet.
    left, top = 12 + 12, 12 + (224 - 100) // 2
    assert abs(across.min() - (left + 50)) <= 3 and abs(across.max() - (left + 150)) <= 3
    assert abs(down.min() - (top + 20)) <= 3 and abs(down.max() - (top + 60)) <= 3
    assert not yellow[top + 40, left + 100]
    with pytest.raises(RequestError, match="no pair has boxes to draw"):
        with StoreWriter(tmp_path / "none") as writer:
            writer.add_image(1, grey.getvalue())
            writer.add_pair(1, 1, "nothing", "en")
            draw_sheet(writer.finish(), tmp_path / "none.png", boxes=True)


def test_by_command(tmp_path) -> None:
    place = write_coco(tmp_path / "coco")
    (tmp_path / "zh.tsv").write_text("dog\t狗\nred umbrella\t红色的伞\n", encoding="utf-8")
    done = CliRunner().invoke(
        app,
        ["data", "import", "boxes", str(place), "--names", str(tmp_path / "zh.tsv"), "--output", str(tmp_path / "s")],
    )
    assert done.exit_code == 0, done.output
    store = open_store(tmp_path / "s")
    assert store.beside_counts == {"pairs": 6, "boxes": 6, "negatives": 0, "weight": 0}
