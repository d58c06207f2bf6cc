"""Mined negatives against brute force; what is left out and why; a walk that is taken up."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.evaluation import mining
from cnclip_ft.evaluation.mining import Mined, NothingFound, Wishes, _Captions, mine, reads_as
from cnclip_ft.evaluation.mining_table import lines
from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.features.folder import FeatureWriter
from cnclip_ft.retrieval.recall import topk_below
from data_tools.errors import RequestError


def random_unit(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("tile", [64, 1024])
def test_topk_below_is_that_of_brute_force(k, tile, monkeypatch):
    """Whole numbers: many scores are equal, and some equal the limit."""
    draw = torch.Generator().manual_seed(k)
    queries, gallery = (torch.randint(-1, 2, (count, 4), generator=draw).float() for count in (150, 90))
    own = torch.stack([torch.randint(150, (300,), generator=draw), torch.randint(90, (300,), generator=draw)], 1)
    limit = torch.randint(-1, 4, (150,), generator=draw).double()
    monkeypatch.setattr("cnclip_ft.retrieval.scan.tile_shape", lambda *_: (tile // 2, tile))
    values, indices, above = topk_below(queries, gallery, k, own, limit)
    scores, mine_ = queries.double() @ gallery.double().T, torch.zeros(150, 90, dtype=torch.bool)
    mine_[own[:, 0], own[:, 1]] = True
    over = scores >= limit[:, None]
    assert (over & ~mine_).sum(1).equal(above)
    for row in range(150):
        allowed = (~over & ~mine_)[row].nonzero()[:, 0].tolist()
        best = sorted(allowed, key=lambda item: (-float(scores[row, item]), item))[:k]
        assert [item for item in indices[row].tolist() if item >= 0] == best
        assert values[row, : len(best)].tolist() == [float(scores[row, item]) for item in best]
        assert values[row, len(best) :].isinf().all()


def test_topk_below_tells_scores_apart_that_float32_cannot():
    base = random_unit(1, 32, 0).double()
    gallery = torch.cat([base * (1 - n * 1e-9) for n in range(40)]).double()
    gallery = torch.cat([gallery, random_unit(40, 32, 1).double()])[torch.randperm(80)]
    stored = gallery.float()
    exact = (base.float().double() @ stored.double().T)[0]
    limit = exact.sort(descending=True).values[10:11]
    _, indices, above = topk_below(base.float(), stored, 5, torch.empty(0, 2, dtype=torch.int64), limit)
    grid = (exact / 1e-12).round()
    best = sorted((~(exact >= limit)).nonzero()[:, 0].tolist(), key=lambda item: (-float(grid[item]), item))[:5]
    assert indices[0].tolist() == best and int(above) == int((exact >= limit).sum())


def test_what_reads_the_same() -> None:
    assert reads_as("A red fish, on the table.") == reads_as("a RED fish on table")
    assert reads_as("红色的圆，在左边。") == reads_as("红色圆 在左边") == reads_as("红色圆在左边")
    assert reads_as("ＡＢＣ 鞋") == reads_as("abc鞋")
    assert reads_as("两只黑色的狗") != reads_as("两只白色的狗")
    assert reads_as("a red dog left of a blue cat") != reads_as("a blue dog left of a red cat")
    assert reads_as("的") == "的" and reads_as("!?") == "!?"  # nothing would be left of them


@pytest.fixture
def features() -> SplitFeatures:
    """60 pictures of two captions each, Chinese and English; 7 and 8 are alike; some captions read the same."""
    image = random_unit(60, 16, 0)
    texts = [text for n in range(60) for text in (f"第{n}张的图", f"the picture {n}")]
    texts[2 * 20], texts[2 * 21 + 1] = (
        "第3张图。",
        "A picture 4",
    )  # of pictures 20 and 21: reads as a caption of 3 and of 4
    owner = torch.arange(120) // 2
    text = F.normalize(image[owner] + 0.8 * random_unit(120, 16, 1), dim=1)
    text[100] = -image[50]  # fits not at all
    return SplitFeatures(
        list(range(60)), list(range(120)), texts, ["zh", "en"] * 60, torch.stack([owner, torch.arange(120)], 1), image, text
    )  # fmt: skip


def folder_of(features, folder):
    """What `encode` would leave of these."""
    if not folder.exists():
        writer = FeatureWriter(folder, features, {}, dim=features.image_features.shape[1], half=False)
        for kind, rows in writer.rows.items():
            rows.fill(rows.missing(), [getattr(features, f"{kind}_features").numpy()])
        writer.finish({})
    return folder


@pytest.fixture
def mined(tmp_path):
    """`mine` of features in memory."""

    def found(features, groups, wishes, asking=None) -> Mined:
        held = folder_of(features, tmp_path / f"features-{len(list(tmp_path.iterdir()))}")
        return mine(held, tmp_path / "walk", lambda: groups, wishes, asking)

    return found


@pytest.mark.parametrize("by", ["image", "text"])
@pytest.mark.parametrize("at_once", [7, 1000])
def test_negatives_are_those_of_brute_force(features, mined, by, at_once, monkeypatch) -> None:
    monkeypatch.setattr("cnclip_ft.evaluation.mining._AT_ONCE", at_once)
    groups = np.arange(60)
    groups[8] = 7
    found = mined(features, groups, Wishes(5, by, 0.9))
    keys = [(language, reads_as(text)) for language, text in zip(features.languages, features.texts, strict=True)]
    firsts = [place for place, key in enumerate(keys) if keys.index(key) == place]
    owned = {
        group: {keys[t] for i, t in features.positives.tolist() if groups[i] == group} for group in groups.tolist()
    }
    image, text = features.image_features.double(), features.text_features.double()
    for row, (i, t) in enumerate(features.positives.tolist()):
        asking = image[i] if by == "image" else text[t]
        own = float(asking @ text[t])
        assert float(found.own[row]) == pytest.approx(own, abs=1e-12)
        others = [
            c for c in firsts if features.languages[c] == features.languages[t] and keys[c] not in owned[groups[i]]
        ]
        scores = {c: float(asking @ text[c]) for c in others}
        allowed = [c for c in others if own > 0 and scores[c] < 0.9 * own - 1e-12]
        best = sorted(allowed, key=lambda c: -scores[c])[:5]
        assert [c for c in found.texts[row].tolist() if c >= 0] == best
        assert int(found.above[row]) == (len(others) - len(allowed) if own > 0 else 0)
    negatives = found.negatives(features)
    assert len(negatives) == (119 if by == "image" else 120)  # the picture of 50 does not know its caption
    told = "\n".join(lines(found, Wishes(5, by, 0.9)))
    assert re.search(r"^all +120 +120 ", told, re.M) and "pictures alike, which lend each other no negatives: 2" in told


def test_texts_without_a_picture_are_no_candidates(features, mined) -> None:
    features.texts.append("没有图")
    features.text_ids.append(999)
    features.languages.append("zh")
    features.text_features = torch.cat([features.text_features, features.image_features[:1]])
    assert 120 not in mined(features, np.arange(60), Wishes(119, below=1)).texts


def test_only_some_pictures_ask_and_all_offer(features, mined) -> None:
    found = mined(features, np.arange(60), Wishes(3), [n == 5 for n in range(60)])
    assert found.asked.nonzero()[:, 0].tolist() == [10, 11] and len(found.negatives(features)) == 2
    whole = mined(features, np.arange(60), Wishes(3))
    assert found.texts[10:12].equal(whole.texts[10:12])


def test_a_language_that_is_not_said_is_read_off_the_letters(features, mined) -> None:
    said = mined(features, np.arange(60), Wishes(3))
    features.languages = [None] * 120
    assert mined(features, np.arange(60), Wishes(3)).texts.equal(said.texts)
    assert _Captions.of(features).languages == ["en", "zh"]


def test_what_was_walked_is_taken_up_and_that_of_another_request_is_not(features, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mining, "_AT_ONCE", 20)
    held, walked, grouped, search = folder_of(features, tmp_path / "f"), [], [], mining.Walk.search

    def searching(self, block, *given):
        if len(walked) == 4:
            raise KeyboardInterrupt
        walked.append(block.number)
        return search(self, block, *given)

    def groups():
        grouped.append(1)
        return np.arange(60)

    monkeypatch.setattr(mining.Walk, "search", searching)
    with pytest.raises(KeyboardInterrupt):
        mine(held, tmp_path / "walk", groups, Wishes(3))
    monkeypatch.setattr(
        mining.Walk, "search", lambda self, block, *given: walked.append(block.number) or search(self, block, *given)
    )
    found = mine(held, tmp_path / "walk", groups, Wishes(3))
    assert walked == [0, 1, 2, 3, 4, 5] and len(grouped) == 1
    whole = mine(held, tmp_path / "other", groups, Wishes(3))
    names = ("texts", "scores", "above", "own")
    assert all(getattr(found, name).equal(getattr(whole, name)) for name in names)
    hurt = tmp_path / "other" / "blocks" / "block-000002.npz"
    hurt.write_bytes(hurt.read_bytes()[:200])
    walked.clear()
    mended = mine(held, tmp_path / "other", groups, Wishes(3))
    assert walked == [2] and all(getattr(mended, name).equal(getattr(whole, name)) for name in names)
    walked.clear()
    for wishes, asking in ((Wishes(4), None), (Wishes(4, "text"), None), (Wishes(4, "text"), [True] * 59 + [False])):
        again = mine(held, tmp_path / "walk", groups, wishes, asking)
        assert again.texts.shape == (120, 4) and int(again.asked.sum()) == (118 if asking else 120)
    assert len(walked) == 18


def test_nothing_found_is_said(features, mined) -> None:
    with pytest.raises(NothingFound, match="no pair gets a negative.*--below 1"):
        mined(features, np.zeros(60, np.int64), Wishes(3))


@pytest.mark.parametrize(
    "wrong", [Wishes(0), Wishes(by="both"), Wishes(below=0), Wishes(below=1.5), Wishes(below=float("nan"))]
)
def test_wishes_that_cannot_be_met_are_refused(wrong) -> None:
    with pytest.raises(RequestError, match="--(count|by|below)"):
        wrong.check()
