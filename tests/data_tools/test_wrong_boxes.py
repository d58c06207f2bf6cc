"""Boxes that are wrong: each put right and counted, or named at its place; files and lines mutated."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.errors import DataFault, UserError
from data_tools.items import ImageItem, TextItem
from data_tools.sources import open_source
from data_tools.sources.boxes.annotated import CENTRE, CORNERS, SIDES, RawBox
from data_tools.sources.boxes.placing import Frame
from data_tools.store import environments
from data_tools.upright import _TURNS
from tests.data_tools.box_samples import (
    FORMS,
    HEIGHT,
    WIDTH,
    close,
    imported,
    photos,
    told,
    write_entities,
    write_rows,
    write_yolo,
)
from tests.data_tools.test_mutated_sources import mutate


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)


# ---- boxes that are wrong -------------------------------------------------------------------------------------------

WRONG = [
    ([1, 2, 3], SIDES, "not four numbers"),
    ("1 2 3 4", SIDES, "not four numbers"),
    (None, SIDES, "not four numbers"),
    ([1, 2, 3, "4"], SIDES, "no number"),
    ([1, 2, 3, True], SIDES, "no number"),
    ([1, 2, float("nan"), 4], SIDES, "no number"),
    ([1, 2, float("inf"), 4], SIDES, "no number"),
    ([1, 2, 10**400, 4], SIDES, "no number"),
    ([10, 10, 0, 5], SIDES, "is empty"),
    ([10, 10, 10, 40], CORNERS, "is empty"),
    ([10, 10, 1e-9, 5], SIDES, "is empty"),
    ([100, 10, 5, 5], SIDES, "outside of the picture"),
    ([-20, 10, 15, 5], SIDES, "outside of the picture"),
    ([5, 200, 50, 5], CENTRE, "outside of the picture"),
    ([0.1, 0.1, 0.5, 0.5], SIDES, "within one pixel.*relative"),
]


@pytest.mark.parametrize(("numbers", "form", "why"), WRONG)
def test_a_box_that_is_none_is_refused(numbers, form, why) -> None:
    with pytest.raises(DataFault, match=why):
        Frame.of(WIDTH, HEIGHT, 1, None, False).place(RawBox(numbers, form), lambda _: None)


@pytest.mark.parametrize(
    ("numbers", "form", "placed", "counted"),
    [
        ([10, 20, 30, 40], SIDES, [0.1, 0.25, 0.3, 0.5], []),
        ([10, 20, 40, 60], CORNERS, [0.1, 0.25, 0.3, 0.5], []),
        ([25, 40, 30, 40], CENTRE, [0.1, 0.25, 0.3, 0.5], []),
        ([40, 60, 10, 20], CORNERS, [0.1, 0.25, 0.3, 0.5], ["swapped"]),
        ([40, 60, -30, -40], SIDES, [0.1, 0.25, 0.3, 0.5], ["swapped"]),
        ([-10, 20, 50, 80], SIDES, [0, 0.25, 0.4, 0.75], ["cut"]),
        ([-0.5, 20, 50.5, 60.4], SIDES, [0, 0.25, 0.5, 0.75], []),  # less than a pixel is rounding
    ],
)
def test_what_is_put_right_is_counted(numbers, form, placed, counted) -> None:
    said: list[str] = []
    assert Frame.of(WIDTH, HEIGHT, 1, None, False).place(RawBox(numbers, form), said.append) == placed
    assert said == counted


def test_boxes_against_a_brute_force_mask() -> None:
    """Random boxes in all orientations: the box of a turned mask is the turned box."""
    dice = random.Random(3)
    for _ in range(200):
        orientation, width, height = dice.randint(1, 8), dice.randint(20, 60), dice.randint(70, 110)
        x, y = dice.randrange(width - 5), dice.randrange(height - 5)
        to_x, to_y = dice.randint(x + 1, width), dice.randint(y + 1, height)
        mask = Image.new("L", (width, height))
        mask.paste(255, (x, y, to_x, to_y))
        turn = _TURNS.get(orientation)
        upright = mask if turn is None or orientation < 5 else mask.transpose(turn)
        left, top, right, bottom = upright.getbbox()
        frame = Frame.of(width, height, orientation if orientation > 4 else 1, (width, height), False)
        found = frame.place(RawBox([x, y, to_x, to_y], CORNERS), lambda _: None)
        wide, high = upright.size
        expected = [left / wide, top / high, (right - left) / wide, (bottom - top) / high]
        assert np.abs(np.array(found) - expected).max() < 1e-5


def test_faults_stand_at_their_place_and_the_rest_is_kept(tmp_path) -> None:
    photos(tmp_path)
    rows = [
        {
            "image": "a.jpg",
            "phrase": "dog",
            "boxes": [[10, 20, 30, 40], [10, 20, 30, 40], [90, 70, 30, 40], [60, 60, -10, -10]],
        },
        {"image": "a.jpg", "phrase": "cat", "boxes": [[1, 1, 0, 0], [1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2]]},
        {"image": "a.jpg", "phrase": "bird", "boxes": [[300, 1, 5, 5]]},
        {"image": "a.jpg", "phrase": "none", "boxes": []},
        {"image": "gone.jpg", "phrase": "dog", "boxes": [[1, 1, 5, 5]]},
        {"image": "../out.jpg", "phrase": "dog", "boxes": [[1, 1, 5, 5]]},
        {"image": "b.jpg", "phrase": "dog", "boxes": [[1, 1, 5, 5]], "relative": "no"},
        {"image": "b.jpg", "boxes": [[1, 1, 5, 5]]},
        {"image": "a.jpg", "phrase": "x", "boxes": [[0, 0, 1, 1]], "relative": True},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataFault, match=r"r.jsonl:7: .relative. is 'no'"):
        imported(tmp_path / "r.jsonl", tmp_path / "s")
    report = imported(tmp_path / "r.jsonl", tmp_path / "s", on_error="skip")
    found = told(report.store)
    close(
        found,
        {
            "a.jpg": {
                "dog": [[0.1, 0.25, 0.3, 0.5], [0.9, 0.875, 0.1, 0.125], [0.5, 0.625, 0.1, 0.125]],
                "cat": [[0.01, 0.0125, 0.02, 0.025]],
            }
        },
    )
    notes = "\n".join(report.notes)
    for said in (
        "3 boxes twice with one phrase",
        "1 box beyond the edge of the picture: cut",
        "1 box with swapped corners",
        "1 phrase without boxes",
    ):
        assert f"{said}" in notes and "r.jsonl:1" in notes, notes
    faults = [json.loads(line) for line in (tmp_path / "s" / "faults.jsonl").read_text("utf-8").splitlines()]
    assert [(fault["line"], fault["kind"]) for fault in faults] == [
        (7, "bad-field"), (8, "missing-field"), (9, "bad-field"), (2, "bad-box"), (3, "bad-box"), (5, "missing-file"),
        (5, "refused-image"), (6, "outside"),
    ]  # fmt: skip
    assert all(fault["mend"] for fault in faults)


# ---- mutated ---------------------------------------------------------------------------------------------------------


def answers(place: Path) -> tuple[int, list[DataFault]]:
    """Phrases and faults of a source read to its end; anything but these and a refusal in words fails."""
    texts, faults = 0, []
    for item in open_source("boxes", str(place))[""].open().items:
        assert isinstance(item, (ImageItem, TextItem, DataFault))
        texts += isinstance(item, TextItem)
        if isinstance(item, DataFault):
            assert item.problem and item.mend and item.file
            faults.append(item)
    return texts, faults


MUTATED = {
    "rows": lambda folder: write_rows(folder),
    "yolo": lambda folder: write_yolo(folder) / "labels" / "train" / "a.txt",
    "entities": lambda folder: write_entities(folder) / "Sentences" / "a.txt",
}


@pytest.mark.parametrize("form", MUTATED)
def test_500_mutated_lines_are_each_answered_in_words(tmp_path, form: str) -> None:
    dice, file = random.Random(5), MUTATED[form](tmp_path / "data")
    place = file if form == "rows" else tmp_path / "data"
    good = file.read_bytes().split(b"\n")
    before = answers(place)[0]
    for _ in range(10):
        lines = [mutate(dice.choice(good), dice) for _ in range(50)]
        file.write_bytes(b"\n".join([*good, *(line.replace(b"\n", b" ").replace(b"\r", b" ") for line in lines)]))
        texts, faults = answers(place)
        assert texts >= before
        assert all(fault.line is None or fault.line > len(good) or fault.kind == "bad-box" for fault in faults)


@pytest.mark.parametrize("form", ["coco", "labelme", "entities", "data.yaml"])
def test_500_mutated_files_are_each_answered_in_words(tmp_path, form: str) -> None:
    dice, folder = random.Random(7), tmp_path / "data"
    if form == "data.yaml":
        place = write_yolo(folder)
        (folder / "classes.txt").unlink()
        file = folder / "data.yaml"
        file.write_text("path: .\nnames: [dog, red umbrella]\n")
    else:
        place = FORMS[form](folder)
        file = {"coco": place, "labelme": folder / "b.json", "entities": folder / "Annotations" / "a.xml"}[form]
    good, outcomes = file.read_bytes(), {"read": 0, "refused": 0}
    for _ in range(500):
        file.write_bytes(mutate(good, dice))
        try:
            answers(place)
            outcomes["read"] += 1
        except UserError as error:
            assert str(error)
            outcomes["refused"] += 1
    assert outcomes["read"] and sum(outcomes.values()) == 500


_ANYTHING: list[Any] = [
    None, [], {}, "x", "", -1, 0, 1e308, float("nan"), float("inf"), True, [[]], [None], {"a": 1}, "\ud83d", "a\0b", 10**30,
    [1, 2, 3, 4], [[1, 2], [3, 4]], "x" * 5000, "../../etc/passwd", "/", ".", "..",
]  # fmt: skip


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places_in(one, (*path, key))


@pytest.mark.parametrize("form", ["coco", "labelme", "rows", "expressions"])
def test_500_values_of_other_kinds_are_each_answered_in_words(tmp_path, form: str) -> None:
    dice, place = random.Random(11), FORMS[form](tmp_path / "data")
    file = tmp_path / "data" / "b.json" if form == "labelme" else place
    good = (
        [json.loads(line) for line in file.read_text().splitlines()] if form == "rows" else json.loads(file.read_text())
    )
    everywhere = [path for path in places_in(good) if path]
    for _ in range(500):
        content = copy.deepcopy(good)
        *way, last = dice.choice(everywhere)
        inner = content
        for key in way:
            inner = inner[key]
        if dice.random() < 0.15:
            del inner[last]
        else:
            inner[last] = dice.choice(_ANYTHING)
        file.write_text("\n".join(map(json.dumps, content)) if form == "rows" else json.dumps(content))
        with contextlib.suppress(UserError):
            answers(place)
