"""What a curation leaves out, found in features made for it; the limits it measures; the command, page and new store."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.evaluation.curation import finding
from cnclip_ft.evaluation.curation.finding import Wishes, curate
from cnclip_ft.evaluation.options import Options, open_model
from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.features.sources import store_source
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.commands.test_data import call
from tests.data_tools.samples import content, picture
from tests.evaluation import tiny

SPARE = "常见的句子"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("c") / "best")


@pytest.fixture(scope="module")
def opened(checkpoint):
    return open_model(checkpoint, Options(device="cpu", workers=0))


@pytest.fixture
def store(tmp_path):
    """40 pictures; 30 and 31 are smaller copies of 0, 32 of 1; captions 5 and 6 are swapped; 10 to 19 share a text; 39 has none."""
    with StoreWriter(tmp_path / "s") as writer:
        for n in range(40):
            of = {30: 0, 31: 0, 32: 1}.get(n, n)
            writer.add_image(n, picture(of, (32 - n % 3, 24) if n >= 30 else (64, 48)), columns={"类目": f"c{n % 2}"})
        for n in range(39):
            writer.add_pair(n, n, SPARE if 10 <= n < 20 else f"第 {n} 张图", "zh")
        writer.finish()
    return tmp_path / "s"


@pytest.fixture
def features() -> SplitFeatures:
    """As a good model would see that store."""
    draw = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(40, 64, generator=draw), dim=1)
    for copy, of in {30: 0, 31: 0, 32: 1}.items():
        image[copy] = F.normalize(image[of] + 0.01 * torch.randn(64, generator=draw), dim=0)
    text = F.normalize(image[:39] + 0.1 * torch.randn(39, 64, generator=draw), dim=1)
    text[[5, 6]] = text[[6, 5]]
    common = F.normalize(image[10:20].sum(0), dim=0)
    text[10:20] = F.normalize(common + 0.2 * image[10:20], dim=1)
    texts = [SPARE if 10 <= n < 20 else f"第 {n} 张图" for n in range(39)]
    pairs = torch.stack([torch.arange(39)] * 2, 1)
    return SplitFeatures(list(range(40)), list(range(39)), texts, ["zh"] * 39, pairs, image, text)


def test_what_is_found(store, features, opened) -> None:
    found = curate(open_store(store), features, opened, Wishes(near=0.99, most=6))
    assert [(group.stays, {image for image, _ in group.others}) for group in found.groups] == [(0, {30, 31}), (1, {32})]
    assert {misfit.image_id for misfit in found.misfits} == {5, 6} and found.misfits[0].score < found.fit
    assert found.just_fit and all(misfit.score >= found.fit for misfit in found.just_fit)
    (crowd,) = found.crowds
    assert (crowd.text, crowd.images, len(crowd.leaves)) == (SPARE, 10, 4)
    scores = (features.image_features[10:20] * features.text_features[10:20]).sum(1)
    assert {image for image, _, _ in crowd.leaves} == {10 + n for n in scores.argsort()[:4].tolist()}
    assert sorted(row["why"] for row in found.records()) == ["crowd"] * 4 + ["like"] * 3 + ["misfit"] * 2
    nothing = curate(open_store(store), features, opened, Wishes(near=1.0, fit=-1.0, most=40))
    assert not nothing.dropped_pairs and not nothing.records()


def test_a_chain_of_like_pictures_does_not_take_strangers_along(store, features, opened) -> None:
    for step in range(8):  # each like the next, the ends unlike
        angle = torch.tensor(0.1 * step)
        features.image_features[20 + step] = torch.cos(angle) * F.one_hot(torch.tensor(0), 64) + torch.sin(
            angle
        ) * F.one_hot(torch.tensor(1), 64)
    found = curate(open_store(store), features, opened, Wishes(near=0.99, fit=-1.0, most=40))
    images = features.image_features
    for group in found.groups:
        assert all(float(images[group.stays] @ images[image]) >= 0.99 - 1e-6 for image, _ in group.others)
    assert {26, 23, 20} & {group.stays for group in found.groups} and len(found.groups) >= 4


def test_limits_are_measured(store, features, opened, monkeypatch) -> None:
    with pytest.raises(
        RequestError, match=r"apart too badly: .* lie \d+% of copies at half the size; .*--near [01]\.\d{5}"
    ):  # untrained
        finding._near_limit(open_store(store), opened.features(store_source(store)), opened, Wishes())
    noise = 0.001 * torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    copies = F.normalize(features.image_features + noise, dim=1)
    monkeypatch.setattr(finding, "encode_images", lambda model, numbers, read, batch_size: copies[list(numbers)])
    limit, said = finding._near_limit(open_store(store), features, opened, Wishes())
    own = (copies.double() * features.image_features.double()).sum(1)
    assert limit == pytest.approx(float(own.quantile(1 - finding._FOUND))) and "of 40 copies at half the size" in said
    limit, said = finding._fit_limit(features, opened, Wishes())
    assert 0 < limit < 0.4 and "% of the store's own" in said
    with pytest.raises(RequestError, match="cannot tell captions apart"):
        features.text_features[:] = features.text_features[
            torch.randperm(39, generator=torch.Generator().manual_seed(1))
        ]
        finding._fit_limit(features, opened, Wishes())
    for wrong in (Wishes(near=2), Wishes(fit=-3), Wishes(most=0)):
        with pytest.raises(RequestError):
            wrong.check()


def test_the_limit_allows_few_strangers_a_picture_whatever_their_number(tmp_path, opened, monkeypatch) -> None:
    """1,000 pictures, 100 of them doubles: one pair in thousands is near, and yet every tenth picture meets a stranger."""
    draw = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(1000, 16, generator=draw), dim=1)
    with StoreWriter(tmp_path / "s") as writer:
        for n in range(1000):
            writer.add_image(n, picture(n - 900 if n >= 900 else n, (16, 16)))
            writer.add_pair(n, n, f"第 {n} 张图", "zh")
        writer.finish()
    image[900:] = F.normalize(image[:100] + 0.02 * torch.randn(100, 16, generator=draw), dim=1)
    pairs = torch.stack([torch.arange(1000)] * 2, 1)
    texts = [f"第 {n} 张图" for n in range(1000)]
    features = SplitFeatures(list(range(1000)), list(range(1000)), texts, ["zh"] * 1000, pairs, image, image.clone())
    copies = F.normalize(image + 0.17 * torch.randn(1000, 16, generator=draw), dim=1)
    chosen: list[int] = []

    def encode(model, numbers, read, batch_size):
        chosen.extend(torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:200].sort().values.tolist())
        return copies[chosen]

    monkeypatch.setattr(finding, "encode_images", encode)
    limit, said = finding._near_limit(open_store(tmp_path / "s"), features, opened, Wishes())
    cosines = image.double() @ image.double().T
    own = (copies[chosen].double() * image[chosen].double()).sum(1)
    strangers = cosines.clone().fill_diagonal_(-1)
    doubles = torch.arange(100)
    strangers[doubles, doubles + 900] = strangers[doubles + 900, doubles] = -1
    measured = float(own.quantile(1 - finding._FOUND))
    assert float((strangers >= measured).double().mean()) < 0.001  # of pairs: few
    assert float((strangers >= measured).sum()) / 1000 > 5 * finding._STRANGERS  # of pictures: many
    assert limit > measured and float((strangers >= limit).sum()) / 1000 <= 3 * finding._STRANGERS  # 500 were looked at
    assert float((cosines[doubles, doubles + 900] >= limit).double().mean()) > 0.9 and "of 200 copies" in said


def test_beyond_many_pictures_faiss_proposes(store, features, opened, monkeypatch) -> None:
    exactly = curate(open_store(store), features, opened, Wishes(near=0.99, fit=-1.0, most=40))
    said: list[str] = []
    monkeypatch.setattr(finding, "_EXACTLY", 10)
    monkeypatch.setattr("cnclip_ft.retrieval.approximate.has_faiss", lambda: False)
    assert curate(open_store(store), features, opened, Wishes(near=0.99, fit=-1.0, most=40), said.append) == exactly
    assert "every one of 40 pictures is compared with every other" in said[0] and "faiss" in said[0]
    monkeypatch.undo()
    pytest.importorskip("faiss")
    monkeypatch.setattr(finding, "_EXACTLY", 10)
    built: list[str] = []
    build = finding.approximate.build
    monkeypatch.setattr(finding.approximate, "build", lambda *given: built.append(given[1]) or build(*given))
    assert curate(open_store(store), features, opened, Wishes(near=0.99, fit=-1.0, most=40), said.append) == exactly
    assert built == ["ivf"]


def test_the_command(store, checkpoint, tmp_path, monkeypatch, features) -> None:
    monkeypatch.setattr("cnclip_ft.evaluation.options.Opened.features", lambda self, source: features)
    before = content(open_store(store))
    base = (
        "curate",
        store,
        checkpoint,
        "--report",
        tmp_path / "r.html",
        "--near",
        0.99,
        "--most",
        6,
        "--device",
        "cpu",
    )
    code, out = call(*base, "--language", "zh")
    assert (
        code == 0 and "3 of 40 pictures are like another, in 2 groups" in out and "2 of 39 captions do not fit" in out
    ), out
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "与图片不符的文本（2）" in page and page.count("<img") > 20 and SPARE in page and "http" not in page
    assert "<div class=kept>类目 c0</div>" in page and "<div class=kept>类目 c1</div>" in page
    assert not (tmp_path / "new").exists()
    code, out = call(*base, "--output", tmp_path / "new", "--list", tmp_path / "l.jsonl")
    assert code == 0 and "Captions that do not fit" in (tmp_path / "r.html").read_text("utf-8")
    made = open_store(tmp_path / "new")
    gone = {30, 31, 32, 5, 6} | {
        row["image_id"] for row in map(json.loads, (tmp_path / "l.jsonl").read_text("utf-8").splitlines())
    }
    assert set(made.image_ids) == set(range(40)) - gone and 39 in made and len(made) == 39 - len(gone)
    assert made.columns_of(3) == {"类目": "c1"} and content(open_store(store)) == before
    for wrong, says in (
        ((*base, "--output", store), "is "),
        ((*base, "--output", tmp_path / "new"), "holds a store"),
        ((*base[:3], "--report", store / "manifest.json"), ""),
        ((*base, "--fit", "x"), "neither a number nor"),
    ):
        code, out = call(*wrong)
        assert code == 2 and says in out, out
    assert content(open_store(store)) == before
