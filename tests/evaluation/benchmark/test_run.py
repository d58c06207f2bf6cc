"""`benchmark`: every layout found and scored, what is missing or wrong told, intervals, published results, going on."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnclip_ft.evaluation.benchmark import run
from cnclip_ft.evaluation.benchmark.run import KIND, benchmark_tables, run_benchmark
from cnclip_ft.evaluation.benchmark.sets import SETS, chosen_sets, find_sets
from cnclip_ft.evaluation.classes.zero_shot import (
    class_features,
    labelled_images,
    read_classes,
    read_templates,
    score_classes,
)
from cnclip_ft.evaluation.options import Options
from cnclip_ft.evaluation.outputs import refuse_outputs
from cnclip_ft.evaluation.results import published
from cnclip_ft.evaluation.scores.comparison import hit_table, intervals
from cnclip_ft.evaluation.scores.scorecard import score_checkpoint
from cnclip_ft.features.encode import encode_images, evaluating
from cnclip_ft.features.sources import open_source
from cnclip_ft.models.checkpoints import load
from cnclip_ft.retrieval.recall import split_ranks
from data_tools.errors import DataFault, RequestError
from data_tools.store import StoreWriter
from tests.evaluation.tiny import make_checkpoint, make_store, png, random_split

OPTIONS = Options(device="cpu", batch_size=8, workers=0)
BY_NAME = {one.name: one for one in SETS}


def make_official(folder, split, images=6):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{100 + n}\t{base64.b64encode(png(n)).decode()}" for n in range(images)]
    (folder / f"{split}_imgs.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    texts = [{"text_id": n, "text": f"第{n}张 图", "image_ids": [100 + n]} for n in range(images)]
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    (folder / f"{split}_texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with StoreWriter(folder.parent / f"{folder.name}-as-a-store") as writer:
        for n in range(images):
            writer.add_image(100 + n, png(n))
        for text in texts:
            writer.add_pair(text["image_ids"][0], text["text_id"], text["text"], "zh")
        writer.finish()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with every layout, a few pictures each; Flickr8k, Flickr30K and MUGE's answers are not in it."""
    root = tmp_path_factory.mktemp("sets")
    make_store(root / "Flickr30k-CN" / "lmdb" / "test")
    (root / "coco").mkdir()
    with StoreWriter(root / "coco" / "test") as writer:
        for n in range(5):
            writer.add_image(n, png(n))
            writer.add_pair(n, n, f"photo {n}", "en")
        writer.finish()
    make_official(root / "coco_cn", "test")
    (root / "xm3600" / "images").mkdir(parents=True)
    rows = []
    for n in range(6):
        (root / "xm3600" / "images" / f"k{n}.jpg").write_bytes(png(n))
        words = {
            "zh": {"caption": [f"{n}号照片", "另一句"]},
            "en": {"caption": [f"photo {n}"]},
            "de": {"caption": ["x"]},
        }
        rows.append(json.dumps({"image/key": f"k{n}", "image/locale": "zh", **words}, ensure_ascii=False))
    (root / "xm3600" / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "xtd10" / "XTD10").mkdir(parents=True)
    (root / "xtd10" / "MIC").mkdir()
    (root / "coco" / "val2014").mkdir()
    names = [f"COCO_val2014_{n:012}.jpg" for n in range(4)]
    for n, name in enumerate(names):
        (root / "coco" / "val2014" / name).write_bytes(png(20 + n))
    (root / "xtd10" / "XTD10" / "test_image_names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (root / "xtd10" / "XTD10" / "test_1kcaptions_zh.txt").write_text("一\n二\n三\n四\n", encoding="utf-8")
    (root / "xtd10" / "MIC" / "test_1kcaptions_en.txt").write_text("one\ntwo\nthree\nfour\n", encoding="utf-8")
    for first, key in enumerate(("n01", "n02")):
        (root / "imagenet" / "val" / key).mkdir(parents=True)
        for n in range(3):
            (root / "imagenet" / "val" / key / f"{n}.JPEG").write_bytes(png(10 * first + n))
    (root / "imagenet" / "classes.zh.txt").write_text("n01\t猫|小猫\nn02\t狗\n", encoding="utf-8")
    (root / "imagenet" / "classes.en.txt").write_text("n02\tdog\nn01\tcat\n", encoding="utf-8")
    (root / "imagenet" / "templates.en.txt").write_text("a photo of a {}\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def report(data, checkpoint):
    return run_benchmark(checkpoint, data, SETS, OPTIONS)


def entry(report, name, language):
    return next(one for one in report[KIND] if (one["dataset"], one["language"]) == (name, language))


def test_every_layout_is_found_and_the_missing_are_listed(report):
    pools = {
        (one["dataset"], one["language"]): (one["images"], one.get("texts", one.get("classes"))) for one in report[KIND]
    }
    assert pools == {
        ("flickr30k-cn", "zh"): (12, 25), ("coco-cn", "zh"): (6, 6), ("coco", "en"): (5, 5),
        ("xm3600", "zh"): (6, 6), ("xm3600", "en"): (6, 6), ("xtd10", "zh"): (4, 4), ("xtd10", "en"): (4, 4),
        ("imagenet", "zh"): (6, 2), ("imagenet", "en"): (6, 2),
    }  # fmt: skip
    assert [line.split("/")[0] for line in report["missing"]] == ["flickr30k", "flickr8k-cn", "flickr8k", "muge"]
    assert all(one["published"] == [] for one in report[KIND])


def test_recalls_are_those_of_evaluate(report, data, checkpoint):
    for name, store in (("flickr30k-cn", data / "Flickr30k-CN/lmdb/test"), ("coco-cn", data / "coco_cn-as-a-store")):
        card = score_checkpoint(checkpoint, [store], OPTIONS)
        ours, scores = entry(report, name, "zh")["scores"], next(iter(card.scores.values()))
        for k in (1, 5, 10):
            assert ours[f"text→image R@{k}"]["value"] == pytest.approx(scores.text_to_image.recall[k])
            assert ours[f"image→text R@{k}"]["value"] == pytest.approx(scores.image_to_text.recall[k])
        assert ours["mean recall"]["value"] == pytest.approx(scores.mean_recall)
        assert all(one["low"] <= one["value"] <= one["high"] for one in ours.values())


def test_a_language_is_its_own_texts_among_all_pictures(data, tmp_path, checkpoint):
    """A store that holds both: what evaluate says of each language by itself."""
    (tmp_path / "xm3600").mkdir()
    make_store(tmp_path / "xm3600" / "test", lone=0)
    found = run_benchmark(checkpoint, tmp_path, SETS, OPTIONS)
    scores = score_checkpoint(checkpoint, [tmp_path / "xm3600/test"], OPTIONS).scores["test"]
    for language in ("zh", "en"):
        one = entry(found, "xm3600", language)
        assert (one["images"], one["texts"]) == (12, 12)
        assert one["scores"]["mean recall"]["value"] == pytest.approx(scores.by_language[language].mean_recall)
    alone = run_benchmark(checkpoint, tmp_path, SETS, OPTIONS, language="en")
    assert [one["language"] for one in alone[KIND]] == ["en"]
    assert alone[KIND][0]["scores"] == entry(found, "xm3600", "en")["scores"]


def test_accuracy_is_that_of_classify(report, data, checkpoint):
    source, model = open_source(data / "imagenet/val"), load(checkpoint)
    for language, templates in (("zh", "zh"), ("en", str(data / "imagenet/templates.en.txt"))):
        classes = read_classes(data / "imagenet" / f"classes.{language}.txt")
        with evaluating(model):
            pictures = encode_images(model, source.split.image_ids, source.read)
            words = class_features(model, classes, read_templates(templates))
        right = score_classes(pictures @ words.T, labelled_images(source.path, source, classes)[1], classes)
        one = entry(report, "imagenet", language)
        assert one["scores"]["top-1"]["value"] == pytest.approx(right.top1) and list(one["scores"]) == ["top-1"]
        assert one["templates"] == read_templates(templates)


def test_intervals_against_a_loop_over_the_drawn_pictures():
    split = random_split(12, 30, seed=3)
    found = split_ranks(split)
    owner = dict(zip(split.positives[:, 1].tolist(), split.positives[:, 0].tolist(), strict=True))
    hits = {"text→image R@1": {}, "image→text R@5": {}}
    for text, rank in zip(found.text_index.tolist(), found.text_ranks.tolist(), strict=True):
        hits["text→image R@1"].setdefault(owner[text], []).append(rank <= 1)
    for image, rank in zip(found.image_index.tolist(), found.image_ranks.tolist(), strict=True):
        hits["image→text R@5"].setdefault(image, []).append(rank <= 5)
    generator = torch.Generator().manual_seed(7)
    draws = [row for size in (64, 64, 22) for row in torch.randint(12, (size, 12), generator=generator).tolist()]
    by_name = {one.measure: one for one in intervals(hit_table(split, found), draws=150, seed=7)}
    for name, of_image in hits.items():
        drawn = [[hit for image in row for hit in of_image[image]] for row in draws]
        shares = sorted(100 * sum(hit) / len(hit) for hit in drawn)
        place = 0.025 * (len(shares) - 1)  # linear between neighbours
        low = shares[int(place)] + (place % 1) * (shares[int(place) + 1] - shares[int(place)])
        high = shares[-1 - int(place)] - (place % 1) * (shares[-1 - int(place)] - shares[-2 - int(place)])
        every = [hit for image in of_image for hit in of_image[image]]
        assert by_name[name].value == pytest.approx(100 * sum(every) / len(every))
        assert (by_name[name].low, by_name[name].high) == pytest.approx((low, high))


def test_published_results_stand_on_their_pool_alone():
    one = {"found": [], "language": "zh", "images": 1000, "texts": 1053}
    beside = run._beside(BY_NAME["coco-cn"], one, "ViT-B-16")
    names = [(row["model"], row["size"], row["setting"]) for row in beside["published"]]
    assert ("Chinese-CLIP", "ViT-B-16", "fine-tuned") in names and ("Chinese-CLIP", "RN50", "fine-tuned") not in names
    assert ("AltCLIP", "ViT-L-14", "zero-shot") in names and len(names) == 7
    for wrong in ({"images": 999}, {"texts": 5000}):
        beside = run._beside(BY_NAME["coco-cn"], one | wrong, "ViT-B-16")
        assert beside["published"] == [] and "no published result" in beside["notes"][-1]
    classes = {"found": [], "language": "en", "images": 50000, "classes": 1000, "templates": ["{}"]}
    assert {row["model"] for row in run._beside(BY_NAME["imagenet"], classes, None)["published"]} == {
        "CLIP",
        "SigLIP 2",
        "FG-CLIP 2",
    }
    assert run._beside(BY_NAME["imagenet"], classes | {"classes": 999}, None)["published"] == []


def test_every_published_row_names_a_set_its_language_and_its_source():
    for name, language in published._OTHERS:
        assert language in BY_NAME[name].languages
    for about in SETS:
        for language in about.languages:
            for row in published.all_rows(about.name, language, None):
                assert row.source and row.setting == "zero-shot"
                for recalls in filter(None, (row.text_to_image, row.image_to_text)):
                    known = [number for number in recalls if number is not None]
                    assert known == sorted(known) and 0 <= known[0] <= known[-1] <= 100
    assert published.all_rows("flickr8k-cn", "zh", None) == []


def test_the_tables(report):
    one = dict(report[KIND][0], published=[row.as_dict() for row in published.all_rows("flickr30k", "en", None)])
    text = benchmark_tables(dict(report, benchmark=[one, *report[KIND][1:]]), width=200)
    lines = text.split("\n")
    siglip = next(line for line in lines if "SigLIP 2 B/16" in line)
    assert siglip.split()[-7:] == ["78.0", "–", "–", "92.6", "–", "–", "–"]
    assert any(line.startswith("xm3600 · en") for line in lines) and any("top-1" in line for line in lines)
    assert "[2] arXiv 2103.00020, table 13" in text and "not there: muge/: valid/" in text
    assert "instead of 1,000 and 5,000: no published result is shown" in text


def test_nothing_there_names_what_is_looked_for(tmp_path):
    (tmp_path / "flickr30k-cn").mkdir()
    with pytest.raises(RequestError) as caught:
        find_sets(tmp_path, SETS)
    said = str(caught.value)
    assert (
        all(f"  {one.name}/: " in said for one in SETS)
        and "test_imgs.tsv" in said
        and "{" not in said.replace("{zh,en}", "")
    )
    with pytest.raises(RequestError, match="no such folder"):
        find_sets(tmp_path / "none", SETS)
    with pytest.raises(RequestError, match="--only 'coco-zh'.*there are flickr30k-cn, "):
        chosen_sets(["coco-zh"], None)
    with pytest.raises(RequestError, match="--language is 'de'"):
        chosen_sets([], "de")
    assert [one.name for one in chosen_sets(["coco-cn", "xtd10"], "en")] == ["xtd10"]


@pytest.mark.parametrize(
    "name, file, content, said",
    [
        ("coco-cn", "test_texts.jsonl", '{"text_id": 1, "text": "x", "image_ids": [5]}\n', r"texts.jsonl:1.*image 5, which"),
        ("coco-cn", "test_texts.jsonl", '{"text_id": 1, "text": "x"}\n', r"texts.jsonl:1.*'image_ids' is missing"),
        ("coco-cn", "test_imgs.tsv", "100\tAAAA\n100\tAAAA\n", r"imgs.tsv:2.*100 stands on two lines"),
        ("coco-cn", "test_imgs.tsv", "100\n", r"imgs.tsv:1.*no tab"),
        ("xm3600", "captions.jsonl", '{"image/key": "k0", "zh": {}}\n', r"captions.jsonl:1.*none of XM3600's"),
        ("xtd10", "XTD10/test_1kcaptions_zh.txt", "一\n二\n", r"captions_zh.txt.*2 captions for the 4 pictures"),
        ("imagenet", "classes.zh.txt", "n01\t猫\nn03\t鸟\n", r"'n02' is no class of the list"),
    ],
)  # fmt: skip
def test_a_broken_set_is_named(data, tmp_path, name, file, content, said):
    folder = next(path for path in data.iterdir() if path.name.replace("_", "-") == name)
    shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / folder.name / file).write_text(content, encoding="utf-8")
    with pytest.raises(DataFault, match=f"(?s){said}"):
        find_sets(tmp_path, [BY_NAME[name]])


def test_sets_that_cannot_be_scored_are_refused(tmp_path, data):
    make_store(tmp_path / "muge" / "valid", answers=False)
    with pytest.raises(RequestError, match="no zh text has a known picture"):
        find_sets(tmp_path, SETS)
    make_official(tmp_path / "english" / "coco", "test")
    shutil.rmtree(tmp_path / "english" / "coco-as-a-store")
    (tmp_path / "english" / "coco" / "test_texts.jsonl").write_text(
        '{"text_id": 1, "text": "一只猫", "image_ids": [100], "language": "zh"}\n', encoding="utf-8"
    )
    with pytest.raises(RequestError, match="most of its 1 texts are zh, not in the language of COCO"):
        find_sets(tmp_path / "english", SETS)
    for name in ("coco_cn", "COCO-CN"):
        make_store(tmp_path / "twice" / name / "test", images=2)
    with pytest.raises(RequestError, match="holds COCO-CN twice"):
        find_sets(tmp_path / "twice", SETS)


def test_pictures_that_are_not_there_are_said(data, tmp_path):
    (tmp_path / "xm3600").mkdir()
    (tmp_path / "xm3600" / "captions.jsonl").write_bytes((data / "xm3600/captions.jsonl").read_bytes())
    with pytest.raises(RequestError, match="none of its 6 pictures is there"):
        find_sets(tmp_path, SETS)
    (tmp_path / "xm3600" / "images").mkdir()
    for n in range(4):
        (tmp_path / "xm3600" / "images" / f"k{n}.jpg").write_bytes(png(n))
    (held,), _ = find_sets(tmp_path, SETS)
    assert held.notes == ["2 of 6 pictures are not there and are left out"] and len(held.texts["zh"]) == 4


def test_a_stopped_run_goes_on(data, tmp_path, checkpoint, report, monkeypatch):
    file, calls = tmp_path / "b.json", []
    encode = run.SharedEncoder.split

    def count(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return encode(*args, **kwargs)

    wanted = chosen_sets(["flickr30k-cn", "coco", "xm3600"], None)
    monkeypatch.setattr(run.SharedEncoder, "split", count)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(checkpoint, data, wanted, OPTIONS, json_file=file)
    assert [one["dataset"] for one in json.loads(file.read_text(encoding="utf-8"))[KIND]] == ["flickr30k-cn", "coco"]
    refuse_outputs([], json_file=file, kind=KIND)  # its own report
    with pytest.raises(RequestError):
        refuse_outputs([], json_file=file, kind="splits")
    calls, said = [], []
    monkeypatch.setattr(run.SharedEncoder, "split", lambda *a, **k: calls.append(1) or encode(*a, **k))
    again = run_benchmark(checkpoint, data, wanted, OPTIONS, json_file=file, say=said.append)
    assert len(calls) == 1 and [line.split(" ")[0] for line in said] == ["flickr30k-cn", "coco"]
    assert again[KIND] == [one for one in report[KIND] if one["dataset"] in ("flickr30k-cn", "coco", "xm3600")]
    assert len(run._done(file, again)) == 4
    assert run._done(file, again | {"settings": again["settings"] | {"dtype": "bfloat16"}}) == {}
    calls.clear()
    run_benchmark(make_checkpoint(tmp_path / "other", seed=1), data, wanted[:1], OPTIONS, json_file=file)
    assert len(calls) == 1  # other weights


def test_a_run_of_other_sets_keeps_what_the_file_holds(data, tmp_path, checkpoint):
    """So does a run that is stopped before it comes to them."""
    file = tmp_path / "b.json"
    run_benchmark(checkpoint, data, chosen_sets(["xtd10"], None), OPTIONS, json_file=file)
    run_benchmark(checkpoint, data, chosen_sets(["coco-cn"], None), OPTIONS, json_file=file)
    kept = json.loads(file.read_text(encoding="utf-8"))[KIND]
    assert {one["dataset"] for one in kept} == {"coco-cn", "xtd10"}


@pytest.mark.slow
def test_two_processes_report_what_one_does(data, tmp_path, checkpoint, report):
    """Also where a report is gone on with, and where a picture is broken: said by both, and no waiting."""
    file, markdown = tmp_path / "b.json", tmp_path / "b.md"
    words = [
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "cnclip_ft",
        "benchmark",
        str(checkpoint),
        "--data",
        str(data),
    ]
    words += [
        "--json",
        str(file),
        "--markdown",
        str(markdown),
        "--device",
        "cpu",
        "--batch-size",
        "8",
        "--workers",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "OMP_NUM_THREADS": "1"}

    def launch(*more):
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words, *more],
            env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300,
        )  # fmt: skip

    done = launch("--only", "coco", "--only", "xm3600")
    assert done.returncode == 0, done.stderr
    done = launch()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("taken from") == 2 and "coco-cn" in markdown.read_text(encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8"))[KIND] == report[KIND]
    (data / "coco" / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(b"no picture")
    done = launch("--only", "xtd10")
    assert done.returncode and "COCO_val2014_000000000002.jpg" in done.stderr
