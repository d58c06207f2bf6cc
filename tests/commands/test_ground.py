"""`ground`: what is a picture and what is a phrase, what is written and drawn, and everything that is refused in words."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.cli import app
from cnclip_ft.grounding import drawing
from cnclip_ft.models.checkpoints import save_checkpoint
from data_tools.errors import DataFault, RequestError
from tests.evaluation import tiny
from tests.evaluation.results.test_plots import write_font
from tests.models.helpers import RESNET, small


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for number, name in enumerate(("photo.jpg", "b.png")):
        (tmp_path / name).write_bytes(tiny.png(number, 48))
    (tmp_path / "dog").mkdir()
    return tmp_path


def ground(checkpoint, *words):
    return CliRunner().invoke(app, ["ground", str(checkpoint), *map(str, words), "--device", "cpu"])


def content(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_line_of_the_first_page(checkpoint, here):
    line = ["photo.jpg", "红色的伞", "a red umbrella", "--picture", "out.png", "--json", "out.json"]
    done = ground(checkpoint, *line)
    assert done.exit_code == 0, done.output
    written = content(here / "out.json")
    (entry,) = written["grounded"]
    assert written["phrases"] == ["红色的伞", "a red umbrella"] and (entry["width"], entry["height"]) == (48, 48)
    model = cnclip_ft.load(checkpoint)
    for found, said in zip(model.ground("photo.jpg", ["红色的伞", "a red umbrella"]), entry["grounded"], strict=True):
        assert said["phrase"] == found.phrase and said["score"] == pytest.approx(found.score, abs=1e-4)
        assert np.allclose(said["boxes"], [region.box for region in found.boxes], atol=1e-4) and said["relative"]
        assert np.allclose(said["heat"]["values"], found.heat.values, atol=1e-3)
        assert said["point"] == pytest.approx(found.heat.point, abs=1e-4)
        assert f"{found.score:.3f}" in done.output
    with Image.open(here / "out.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 2 * drawing.SIDE
    assert ground(checkpoint, *line).exit_code == 0  # its own files are written over
    (here / "out.png").write_bytes(tiny.png(7))
    assert isinstance(ground(checkpoint, *line).exception, RequestError)


def test_sentences_are_split_and_phrases_are_not(checkpoint, here):
    (here / "list.txt").write_text("a dog, brown\n红色的伞\n", encoding="utf-8")
    done = ground(
        checkpoint, "一只狗在雪地里奔跑", "photo.jpg", "b.png", "--phrases", "a man in a hat, bus", "--phrases", "list.txt",
        "--json", "a.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    phrases = ["一只狗", "雪地", "a man in a hat", "bus", "a dog, brown", "红色的伞"]
    assert content(here / "a.json")["phrases"] == phrases and " | ".join(phrases) in done.output
    assert [entry["picture"] for entry in content(here / "a.json")["grounded"]] == ["photo.jpg", "b.png"]


def test_two_hundred_phrases_and_a_line_of_a_picture(checkpoint, here):
    Image.new("RGB", (1, 3000), "red").save(here / "line.png")
    (here / "many.txt").write_text("\n".join(f"thing {number}" for number in range(200)), encoding="utf-8")
    done = ground(checkpoint, "line.png", "--phrases", "many.txt", "--json", "a.json", "--picture", "a.png")
    assert done.exit_code == 0, done.output
    assert "200 phrases" in done.output and "the first 15 of 200 phrases are drawn" in done.output
    (entry,) = content(here / "a.json")["grounded"]
    assert (entry["width"], entry["height"], len(entry["grounded"])) == (1, 3000, 200)


@pytest.mark.parametrize(
    "words,says",
    [
        (["photo.jpg"], "no phrase to look for"),
        (["photo.jpg", ""], "no phrase to look for"),
        (["photo.jpg", "--phrases", " , "], "no phrase to look for"),
        (["红色的伞"], "no picture among '红色的伞'"),
        (["phto.jpg", "红色的伞"], "phto.jpg: there is no such picture; if it is meant as words: --phrases"),
        (["photo.jpg", "dog"], r"dog is a folder here.*dog/\*.jpg.*--phrases 'dog'"),
        (["photo.jpg", "--phrases", "没有.txt"], "--phrases 没有.txt: there is no such file"),
        (["photo.jpg", "伞", "--threshold", "2"], "the threshold is 2; it is a share"),
        (["photo.jpg", "伞", "--method", "x"], "method 'x': an image tower of kind vit knows maskclip, sclip, naclip"),
        (["photo.jpg", "伞", "--picture", "a.jpg"], "a.jpg: the picture is written as PNG"),
        (["photo.jpg", "伞", "--json", "photo.jpg"], "photo.jpg is photo.jpg, which is read here"),
    ],
)
def test_what_is_refused_is_refused_in_words(checkpoint, here, words, says):
    done = ground(checkpoint, *words)
    assert isinstance(done.exception, RequestError) and re.search(says, str(done.exception), re.S), done.exception


def test_more_phrases_than_are_taken(checkpoint, here):
    (here / "many.txt").write_text("\n".join(f"thing {number}" for number in range(1001)), encoding="utf-8")
    assert "1,001 phrases" in str(ground(checkpoint, "photo.jpg", "--phrases", "many.txt").exception)
    (here / "bytes.txt").write_bytes("一只狗".encode("gb18030"))
    assert "not UTF-8" in str(ground(checkpoint, "photo.jpg", "--phrases", "bytes.txt").exception)


def test_a_damaged_picture_is_named_and_the_rest_is_done(checkpoint, here):
    (here / "torn.jpg").write_bytes((here / "photo.jpg").read_bytes()[:60])
    done = ground(checkpoint, "torn.jpg", "photo.jpg", "伞", "--json", "a.json")
    assert done.exit_code == 1 and "1 of 2 pictures cannot be used" in str(done.exception)
    assert "torn.jpg" in str(done.exception) and "The rest is complete" in str(done.exception)
    assert [entry["picture"] for entry in content(here / "a.json")["grounded"]] == ["photo.jpg"]
    alone = ground(checkpoint, "torn.jpg", "伞", "--json", "b.json")
    assert "The rest" not in str(alone.exception) and not (here / "b.json").exists()


def test_a_checkpoint_without_patches(here, tmp_path):
    save_checkpoint(small(RESNET), tmp_path / "resnet", info={})
    done = ground(tmp_path / "resnet", "photo.jpg", "伞")
    assert isinstance(done.exception, RequestError) and "a ViT" in str(done.exception)


def test_python_refuses_the_same(checkpoint, here):
    model = cnclip_ft.load(checkpoint)
    for wrong in ("", "  ", []):
        with pytest.raises(RequestError, match="no phrase"):
            model.ground("photo.jpg", wrong)
    with pytest.raises(DataFault):
        model.ground(b"nothing", "dog")
    assert [found.phrase for found in model.ground("photo.jpg", "a dog and a cat")] == ["a dog", "a cat"]


def test_the_legend_is_chinese_where_a_font_is(here, monkeypatch):
    found = cnclip_ft.load(tiny.make_checkpoint(here / "best")).ground("photo.jpg", ["中国猫", "a dog"])
    picture = Image.open("photo.jpg").convert("RGB")
    monkeypatch.setattr("data_tools.contact_sheet.font_folders", lambda: [here / "fonts"])
    (note,) = drawing.draw([(picture, found)], "a.png")
    assert "phrases are numbered" in note and "no font with Chinese glyphs" in note
    write_font(here / "fonts" / "wqy-microhei.ttf", "中国猫 adog0123456789.-#")
    assert drawing.draw([(picture, found)], "b.png") == []
    assert (here / "a.png").read_bytes() != (here / "b.png").read_bytes()
