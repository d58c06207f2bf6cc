"""The demonstration set: the same every time, well split, well told, well drawn."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import statistics
import subprocess
import sys
from random import Random

import pytest
from PIL import Image, ImageChops, ImageStat

from data_tools.errors import RequestError, UserError
from data_tools.scenes import HELD_OUT, Group, Scene, captions, draw, draw_demo, sample_scenes
from data_tools.scenes.backgrounds import BACKGROUND_PAINTERS
from data_tools.scenes.captions import PLAN, Told, caption_of, choose_details
from data_tools.scenes.drawing import _layout, draw_with_boxes
from data_tools.scenes.phrases import phrases
from data_tools.scenes.vocabulary import ARRANGEMENTS, BACKGROUNDS, COLOURS, CORNERS, RELATIONS, SHAPES, SIZES
from data_tools.store import open_store


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return sample_scenes(2000)


@pytest.fixture(scope="module")
def valid() -> list[Scene]:
    return sample_scenes(400, held_out=True)


def _scene(layout: str, first: Group, second: Group | None = None, background: str = "paper") -> Scene:
    return Scene(background, layout, first, second, "test")


def test_no_validation_combination_occurs_in_training(train: list[Scene], valid: list[Scene]) -> None:
    seen = set().union(*(scene.combinations for scene in train))
    assert not seen & HELD_OUT
    assert all(scene.combinations & HELD_OUT for scene in valid)
    # Nothing else is new: what is not held out has been seen.
    assert set().union(*(scene.combinations for scene in valid)) - HELD_OUT <= seen


def test_every_single_attribute_occurs_in_training_and_in_validation(train: list[Scene], valid: list[Scene]) -> None:
    for scenes in (train, valid):
        groups = [group for scene in scenes for group in scene.groups]
        assert {group.shape for group in groups} == set(SHAPES)
        assert {group.colour for group in groups} == set(COLOURS)
        assert {group.size for group in groups} == set(SIZES)
        assert {group.count for group in groups} == {1, 2, 3, 4, 5, 6}
        assert {scene.background for scene in scenes} == set(BACKGROUNDS)
        assert {scene.layout for scene in scenes} == {*CORNERS, *ARRANGEMENTS, *RELATIONS}


def test_every_colour_and_every_shape_keeps_combinations_to_learn_from() -> None:
    for colour in COLOURS:
        assert 1 <= sum(c == colour for c, _ in HELD_OUT) <= 2
    for shape in SHAPES:
        assert 1 <= sum(s == shape for _, s in HELD_OUT) <= 2


def test_no_two_scenes_are_alike(train: list[Scene], valid: list[Scene]) -> None:
    contents = {(s.background, s.layout, s.first, s.second) for s in train + valid}
    assert len(contents) == 2400


def test_nothing_drowns_in_its_background(train: list[Scene]) -> None:
    for scene in train:
        assert not {group.colour for group in scene.groups} & set(BACKGROUNDS[scene.background])
        if scene.layout == "inside":
            assert scene.first.colour != scene.second.colour


def test_more_scenes_start_with_the_same_ones_and_another_seed_gives_others() -> None:
    assert sample_scenes(30)[:10] == sample_scenes(10)
    assert not set(sample_scenes(10, seed=1)) & set(sample_scenes(30))


def test_captions_differ_within_a_scene_and_follow_the_language_plan(train: list[Scene]) -> None:
    for scene in train[:500]:
        told = captions(scene)
        assert tuple(language for language, _ in told) == PLAN
        assert len(set(told)) == len(told)
        for language, text in told:
            assert text.isascii() == (language == "en")
            assert text.strip() == text and "  " not in text and "{" not in text and "，，" not in text


def test_captions_are_varied(train: list[Scene]) -> None:
    texts = [text for scene in train for _, text in captions(scene)]
    assert len(set(texts)) > 0.95 * len(texts)


def test_some_details_are_left_out_and_enough_is_told_to_find_the_scene(valid: list[Scene]) -> None:
    random = Random(0)
    fits, complete = [], 0
    for scene in valid:
        told = choose_details(scene, random)
        complete += told == Told()
        fits.append(sum(told.of(other) == told.of(scene) for other in valid))
    assert 0.3 * len(valid) < complete < 0.8 * len(valid)
    assert statistics.mean(1 / count for count in fits) > 0.95


GRAMMAR = [
    (_scene("left", Group("star", "red", "small", 2), Group("house", "blue", "large", 1)), "zh",
     ["颗|个", "红", "小", "两|2", "一座|一栋", "蓝", "大", "左|右", "方格纸|格子纸"]),
    (_scene("left", Group("star", "red", "small", 2), Group("house", "blue", "large", 1)), "en",
     ["two|2", "red", "small|little|tiny", "stars", "a large|a big", "blue house", "left|right", "squared paper|graph paper"]),
    (_scene("above", Group("umbrella", "orange", "medium", 1), Group("fish", "black", "medium", 3)), "en",
     ["an orange umbrella", "three|3", "black fish", "above|over|below|under|beneath|top"]),
    (_scene("inside", Group("moon", "yellow", "small", 1), Group("circle", "purple", "large", 1)), "zh",
     ["一轮|一弯", "黄", "月", "一个", "紫", "圆", "里|包住"]),
    (_scene("top right", Group("fish", "white", "large", 1), None, "sea"), "zh",
     ["一条", "白", "大", "鱼", "右上", "海|水面"]),
    (_scene("ring", Group("flower", "purple", "medium", 5), None, "snow"), "en",
     ["five|5", "purple|violet", "flowers|blossoms", "circle|ring", "snow"]),
]  # fmt: skip


@pytest.mark.parametrize(("scene", "language", "expected"), GRAMMAR)
def test_a_complete_caption_tells_everything_in_every_wording(scene: Scene, language: str, expected: list[str]) -> None:
    random = Random(0)
    texts = {caption_of(scene, language, Told(), random).lower() for _ in range(200)}
    assert len(texts) > 20
    for text in texts:
        for alternatives in expected:
            assert any(word in text for word in alternatives.split("|")), (text, alternatives)


def test_who_is_where_is_told_the_right_way_round() -> None:
    scene = _scene("left", Group("star", "red", "medium", 1), Group("fish", "blue", "medium", 1))
    random, both = Random(0), set()
    for _ in range(300):
        text = caption_of(scene, "en", Told(background=False), random).lower()
        star_first = text.index("star") < text.index("fish")
        both.add(star_first)
        if "right of" in text:
            assert not star_first, text
        elif "left of" in text:
            assert star_first, text
        elif "on the right" in text:
            between = text[text.index("on the left") : text.index("on the right")]
            assert (star_first and text.startswith("a ") and "fish" in between) or ("star" in between), text
    assert both == {True, False}


def test_what_is_left_out_is_not_said() -> None:
    scene = _scene("left", Group("star", "red", "small", 3), Group("house", "blue", "large", 1), "beach")
    bare = Told(background=False, layout=False, sizes=False, counts=False, every_colour=False)
    random = Random(0)
    for language, words in (
        ("zh", "沙左右小大三3蓝"),
        ("en", ("beach", "sand", "left", "small", "large", "three", "blue")),
    ):
        for _ in range(100):
            text = caption_of(scene, language, bare, random).lower()
            assert not any(word in text for word in words), text
            assert "红" in text or "red" in text


def test_the_picture_shows_what_the_scene_says(train: list[Scene]) -> None:
    for scene in train[:400]:
        placed = {group: places for group, places, _ in _layout(scene, Random(0))}
        assert [len(placed[group]) for group in scene.groups] == [group.count for group in scene.groups]
        for group, places, radius in _layout(scene, Random(0)):
            for x, y in places:
                assert -0.02 < x - radius and x + radius < 1.02 and -0.02 < y - radius and y + radius < 1.02, (
                    scene,
                    group,
                )
        if scene.layout in ("left", "above"):
            axis = 0 if scene.layout == "left" else 1
            ends = max(p[axis] for p in placed[scene.first]), min(p[axis] for p in placed[scene.second])
            assert ends[0] + SIZES[scene.first.size] < ends[1] - SIZES[scene.second.size] + 0.08


def test_things_have_their_colour_and_backgrounds_differ() -> None:
    for colour, rgb in COLOURS.items():
        background = next(name for name, drowned in BACKGROUNDS.items() if colour not in drowned)
        picture = draw(_scene("centre", Group("square", colour, "large", 1), None, background), 64)
        middle = picture.crop((28, 28, 36, 36))
        assert all(abs(found - wanted) <= 14 for found, wanted in zip(ImageStat.Stat(middle).mean, rgb, strict=True)), (
            colour
        )
    pictures = [draw(_scene("centre", Group("square", "purple", "small", 1), None, name), 64) for name in BACKGROUNDS]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) > 20


def test_every_shape_looks_different() -> None:
    pictures = [draw(_scene("centre", Group(shape, "blue", "large", 1)), 64) for shape in SHAPES]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) > 1.5


def test_source_files_and_stores_hold_the_same(tmp_path) -> None:
    draw_demo(tmp_path, train=12, valid=5, size=48, progress=False)
    for split, count in (("train", 12), ("valid", 5)):
        scenes = sample_scenes(count, held_out=split == "valid")
        images = [line.split("\t") for line in (tmp_path / f"{split}_imgs.tsv").read_text("ascii").splitlines()]
        texts = [json.loads(line) for line in (tmp_path / f"{split}_texts.jsonl").read_text("utf-8").splitlines()]
        assert [int(image_id) for image_id, _ in images] == list(range(1, count + 1))
        assert [row["text_id"] for row in texts] == list(range(1, 5 * count + 1))
        told = [(row["image_ids"][0], row["language"], row["text"]) for row in texts]
        assert told == [(k, *caption) for k, scene in enumerate(scenes, start=1) for caption in captions(scene)]

        store = open_store(tmp_path / split)
        assert (store.name, len(store), sorted(store.image_ids)) == (split, 5 * count, list(range(1, count + 1)))
        assert [(p.image_id, p.language, p.text) for p in store.pairs()] == told
        for image_id, encoded in images:
            assert store.image(int(image_id)) == base64.b64decode(encoded)
            assert Image.open(io.BytesIO(store.image(int(image_id)))).size == (48, 48)
    assert not list(tmp_path.glob("*.part"))


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    draw_demo(here, train=20, valid=5, seed=3, progress=False)
    code = "import sys; from data_tools.scenes import draw_demo; draw_demo(sys.argv[1], train=20, valid=5, seed=3)"
    subprocess.run([sys.executable, "-c", code, str(there)], check=True, timeout=60)
    for name in ("train_imgs.tsv", "train_texts.jsonl", "valid_imgs.tsv", "valid_texts.jsonl"):
        assert (
            hashlib.sha256((here / name).read_bytes()).digest() == hashlib.sha256((there / name).read_bytes()).digest()
        )
    assert open_store(here / "train").checksum() == open_store(there / "train").checksum()


@pytest.mark.parametrize("wrong", [{"train": 0}, {"valid": -1}, {"size": 8}, {"size": 5000}])
def test_impossible_requests_are_refused(tmp_path, wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        draw_demo(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        draw_demo(tmp_path / "file" / "demo", train=1, valid=1, progress=False)


# ---- boxes of objects ------------------------------------------------------------------------------------------------


def test_boxes_lie_around_what_is_drawn(train: list[Scene]) -> None:
    for scene in train[:60]:
        picture, things = draw_with_boxes(scene, 64)
        assert picture.tobytes() == draw(scene, 64).tobytes()
        assert [group for group, _ in things] == sorted(
            (group for group in scene.groups for _ in range(group.count)), key=[group for group, _ in things].index
        )
        for _, (x, y, width, height) in things:
            assert 0 <= x < x + width <= 1.00001 and 0 <= y < y + height <= 1.00001


@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_is_that_of_the_pixels_that_differ_from_the_background(shape: str, monkeypatch) -> None:
    scene = _scene("top left", Group(shape, "red", "medium", 1))
    monkeypatch.setitem(BACKGROUND_PAINTERS, "paper", lambda canvas, side, random: None)  # black
    picture, [(_, (x, y, width, height))] = draw_with_boxes(scene, 96)
    edges = [edge / 96 for edge in picture.getbbox()]
    assert max(abs(a - b) for a, b in zip(edges, (x, y, x + width, y + height), strict=True)) <= 1 / 96


def test_phrases_name_a_group_with_all_its_boxes(valid: list[Scene]) -> None:
    scene = _scene("row", Group("square", "yellow", "small", 5))
    _, things = draw_with_boxes(scene)
    found = phrases(scene, things)
    assert [(p.language, len(p.boxes)) for p in found] == [("zh", 5), ("en", 5)]
    assert found[0].text in {f"五个黄色{noun}" for noun in ("正方形", "方块", "方形")}
    assert found[1].text == "five yellow squares"
    centres = [x + width / 2 for x, _, width, _ in found[0].boxes]
    assert centres == sorted(centres)  # a row, drawn from the left
    one = _scene("left", Group("fish", "red", "large", 1), Group("house", "purple", "large", 1))
    texts = [p.text for p in phrases(one, draw_with_boxes(one)[1])]
    assert texts[0] in ("红色的鱼", "红色的鱼儿") and texts[1] == "the red fish" and texts[2].startswith("紫色的房")
    fish, house = (p.boxes[0] for p in phrases(one, draw_with_boxes(one)[1])[1::2])
    assert fish[0] + fish[2] <= house[0] + 0.1
    for scene in valid[:100]:
        found = phrases(scene, draw_with_boxes(scene, 32)[1])
        assert len({p.text for p in found}) == len(found) == 2 * len(scene.groups)
        assert [len(p.boxes) for p in found[::2]] == [group.count for group in scene.groups]


def test_stores_of_phrases_lie_beside_the_set_which_is_the_same(tmp_path) -> None:
    draw_demo(tmp_path / "with", train=12, valid=5, size=48, boxes=True, progress=False)
    draw_demo(tmp_path / "without", train=12, valid=5, size=48, progress=False)
    for split in ("train", "valid"):
        store, plain = (open_store(tmp_path / name / split) for name in ("with", "without"))
        assert (store.checksum(), store.order()) == (plain.checksum(), plain.order())
        told = open_store(tmp_path / "with" / "phrases" / split)
        assert told.image_ids == store.image_ids and all(told.image(n) == store.image(n) for n in store.image_ids)
        assert told.beside_counts["boxes"] == len(told) and {pair.language for pair in told.pairs()} == {"zh", "en"}
    with pytest.raises(RequestError, match="there already"):
        draw_demo(tmp_path / "with", train=12, valid=5, size=48, boxes=True, progress=False)
    draw_demo(tmp_path / "with", train=6, valid=5, size=48, boxes=True, overwrite=True, progress=False)
    assert open_store(tmp_path / "with" / "phrases" / "train").image_count == 6
