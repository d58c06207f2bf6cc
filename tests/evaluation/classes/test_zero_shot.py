"""Classes by words: lists and templates are read, prompts averaged, scores counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.evaluation.classes import zero_shot
from cnclip_ft.evaluation.classes.zero_shot import Class, class_features, read_classes, read_templates, score_classes
from cnclip_ft.features.encode import evaluating
from cnclip_ft.features.sources import open_source
from cnclip_ft.models.checkpoints import load
from data_tools.errors import DataFault, RequestError
from data_tools.store import StoreWriter
from tests.evaluation.tiny import png

ANIMALS = [Class("cat", ("猫", "小猫")), Class("dog", ("狗",))]


def test_class_lists(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# animals\ncat\t猫|小猫\n\n狗|犬\nbird\n", encoding="utf-8")
    assert read_classes(path) == [Class("cat", ("猫", "小猫")), Class("狗", ("狗", "犬")), Class("bird", ("bird",))]


@pytest.mark.parametrize(
    "text, said",
    [("猫\n猫\n", ":2: class '猫'"), ("猫\n狗|\n", ":2: an empty class name"), ("\t猫\n狗\n", ":1: an empty")],
)
def test_broken_class_lists_are_named(tmp_path, text, said):
    (tmp_path / "c.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataFault) as caught:
        read_classes(tmp_path / "c.txt")
    assert said in str(caught.value)


def test_one_class_is_too_few(tmp_path):
    (tmp_path / "c.txt").write_text("猫\n", encoding="utf-8")
    with pytest.raises(RequestError, match="at least two"):
        read_classes(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_bytes("一只猫\n两只狗".encode("gbk"))
    with pytest.raises(RequestError, match="not UTF-8"):
        read_classes(tmp_path / "c.txt")


def test_templates_shipped_and_own(tmp_path):
    chinese, english = read_templates("zh"), read_templates("en")
    assert (
        len(chinese) >= 20 and len(english) >= 20 and read_templates("zh+en") == list(dict.fromkeys(chinese + english))
    )
    assert all(any("\u4e00" <= c <= "\u9fff" for c in line) for line in chinese if line != "{}")
    assert read_templates("none") == ["{}"]
    (tmp_path / "own.txt").write_text("看，{}！\n没有位置\n", encoding="utf-8")
    with pytest.raises(DataFault, match="own.txt:2: the template"):
        read_templates(str(tmp_path / "own.txt"))
    with pytest.raises(RequestError, match="neither a file nor one of clip, en, siglip, zh"):
        read_templates("french")


def test_a_class_is_the_mean_of_its_prompts(checkpoint):
    model = load(checkpoint)
    with evaluating(model):
        found = class_features(model, ANIMALS, ["{}", "一只{}"])
    prompts = model.encode_texts(["猫", "一只猫", "小猫", "一只小猫"])
    assert torch.allclose(found[0], F.normalize(prompts.mean(0), dim=0), atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)


def test_averaged_prompts_are_kept_and_told_apart(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("CNCLIP_FT_CACHE", str(tmp_path / "cache"))
    model = load(checkpoint)
    calls = []
    encode = zero_shot.encode_texts
    monkeypatch.setattr(zero_shot, "encode_texts", lambda *a, **k: calls.append(1) or encode(*a, **k))
    with evaluating(model):
        first = class_features(model, ANIMALS, ["{}"], key="weights")
        assert torch.equal(class_features(model, ANIMALS, ["{}"], key="weights"), first) and len(calls) == 1
        class_features(model, ANIMALS, ["{}"], key="other weights")
        class_features(model, ANIMALS, ["一只{}"], key="weights")
        class_features(model, ANIMALS[::-1], ["{}"], key="weights")
        assert len(calls) == 4
        for file in (tmp_path / "cache" / "classes").iterdir():
            file.write_bytes(b"broken")
        assert torch.equal(class_features(model, ANIMALS, ["{}"], key="weights"), first) and len(calls) == 5


def test_scores_by_hand():
    classes = [Class(str(i), (str(i),)) for i in range(7)]
    scores = torch.eye(7)[[0, 0, 1, 2, 3]]
    report = score_classes(scores, [0, 1, 1, None, 3], classes)
    assert report.images == 4 and report.top1 == 75
    assert report.per_class == {"0": 100.0, "1": 50.0, "2": None, "3": 100.0, "4": None, "5": None, "6": None}
    assert report.mean_per_class == pytest.approx(250 / 3)
    assert report.confusion[1].tolist() == [1, 1, 0, 0, 0, 0, 0] and report.confusion.sum() == 4
    assert report.top5 == 75  # the wrong one ties with all the other zeros, which counts against the model
    assert score_classes(scores, [None] * 5, classes) is None
    assert score_classes(scores[:, :2], [0, 1, 1, None, 0], classes[:2]).top5 is None


def test_a_tie_is_no_hit():
    report = score_classes(torch.full((3, 2), 0.5), [0, 1, 0], ANIMALS)
    assert report.top1 == 0 and report.confusion.diagonal().sum() == 0


def test_labels_come_from_folders_or_from_a_stores_texts(tmp_path):
    photos = tmp_path / "photos"
    for name in ("cat/1.png", "狗/2.png", "loose.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(png(1))
    ids, labels = zero_shot.labelled_images(photos, open_source(photos), ANIMALS)
    assert dict(zip(ids, labels, strict=True)) == {"cat/1.png": 0, "狗/2.png": 1, "loose.png": None}
    (photos / "cow").mkdir()
    (photos / "cow" / "3.png").write_bytes(png(2))
    with pytest.raises(DataFault, match="folder 'cow' is no class"):
        zero_shot.labelled_images(photos, open_source(photos), ANIMALS)

    def build(name, *texts):
        with StoreWriter(tmp_path / name) as writer:
            for number, (image, text) in enumerate(texts):
                if image not in {i for i, _ in texts[:number]}:
                    writer.add_image(image, png(image))
                writer.add_pair(image, number, text)
            writer.finish()
        return open_source(tmp_path / name)

    good = build("good", (1, "小猫"), (2, "dog"))
    assert zero_shot.labelled_images(good.path, good, ANIMALS) == ([1, 2], [0, 1])
    with pytest.raises(DataFault, match="'牛' is no class"):
        bad = build("bad", (1, "牛"))
        zero_shot.labelled_images(bad.path, bad, ANIMALS)
    with pytest.raises(RequestError, match="several classes"):
        both = build("both", (1, "猫"), (1, "狗"))
        zero_shot.labelled_images(both.path, both, ANIMALS)


@pytest.mark.parametrize(
    "lines", ["a\t猫\nb\t狗|猫\n", "a\t猫\n猫\t狗\n", "猫|狗\n狗\n", "a\tb\nb\tc\n", "e\u0301\n\u00e9\n"]
)
def test_a_name_of_two_classes_is_refused(tmp_path, lines):
    (tmp_path / "c.txt").write_text(lines, encoding="utf-8")
    with pytest.raises(DataFault, match=r"c.txt:2: ") as caught:
        zero_shot.read_classes(tmp_path / "c.txt")
    assert caught.value.kind == "bad-class"


def test_spellings_of_one_name_are_one(tmp_path):
    (tmp_path / "c.txt").write_text("caf\u00e9|caf\u00e9\nbar\n", encoding="utf-8")
    classes = zero_shot.read_classes(tmp_path / "c.txt")
    assert classes[0].names == ("caf\u00e9",)
    (tmp_path / "P" / "cafe\u0301").mkdir(parents=True)  # as macOS writes it
    (tmp_path / "P" / "cafe\u0301" / "a.png").write_bytes(png(1))
    assert zero_shot.labelled_images(tmp_path / "P", open_source(tmp_path / "P"), classes)[1] == [0]
