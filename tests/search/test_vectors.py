"""Exact search is exact; approximate search is measured and scores truly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.retrieval import approximate, exact
from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.retrieval.recall import topk


def unit(count: int, dim: int = 24, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute_force(queries, gallery, k):
    """By float64 products and a stable sort; scores closer than 1e-12 are equal."""
    scores = (queries.double() @ gallery.double().T / 1e-12).round() * 1e-12
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), order


@pytest.mark.parametrize("k", [1, 7, 300, 1000])
@pytest.mark.parametrize("asked", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_is_brute_force(monkeypatch, k, asked, dtype):
    gallery = unit(700).to(dtype)
    gallery[100:140] = gallery[300]  # forty equal ones: the order is theirs
    queries = torch.cat([gallery[300:301].float(), unit(4, seed=1)])[:asked]
    largest = float(gallery.double().norm(dim=1).max())
    expected = brute_force(queries, gallery, k)
    for scores_bytes, converted in ((exact._SCORES, exact._CONVERTED), (4096, 4096)):  # one tile, and many
        monkeypatch.setattr(exact, "_SCORES", scores_bytes)
        monkeypatch.setattr(exact, "_CONVERTED", converted)
        search = ExactSearch(gallery, largest)
        for _ in range(2):  # from the features, and from a copy where the processor has the kernels
            scores, numbers = search.search(queries, k)
            assert torch.equal(numbers, expected[1])
            assert torch.allclose(scores.double(), expected[0], atol=1e-6)
            search.keep_copy()
    assert torch.equal(numbers, topk(queries, gallery.float(), k)[1])


def test_neighbours_in_the_last_bit_are_told_apart():
    """float32 products alone would put some of these in the wrong order."""
    base = unit(1, 64)[0]
    gallery = F.normalize(base + 1e-5 * unit(3000, 64, seed=2), dim=1)
    search = ExactSearch(gallery, float(gallery.double().norm(dim=1).max()))
    for _ in range(2):  # the copy proposes 114 of 3,000 that are all alike to it: it has to give way
        _, numbers = search.search(base[None], 50)
        assert torch.equal(numbers, brute_force(base[None], gallery, 50)[1])
        search.keep_copy()
    assert not torch.equal(numbers[0], (gallery @ base).argsort(descending=True, stable=True)[:50])


def test_a_copy_decides_most_by_itself(monkeypatch):
    gallery, queries = unit(5000, 64), unit(40, 64, seed=1)
    search = ExactSearch(gallery, 1.0001)
    if not search.keep_copy():
        pytest.skip("this processor has no half-precision kernels")
    asked: list[int] = []
    real = search._by_features
    monkeypatch.setattr(search, "_by_features", lambda q, k: asked.append(len(q)) or real(q, k))
    scores, numbers = search.search(queries, 20)
    expected = brute_force(queries, gallery, 20)
    assert torch.equal(numbers, expected[1]) and torch.allclose(scores.double(), expected[0], atol=1e-7)
    assert sum(asked) < 4


def clustered(count: int = 4000, dim: int = 24) -> np.ndarray:
    centres = unit(40, dim, seed=3)
    return F.normalize(centres[torch.arange(count) % 40] + 0.7 * unit(count, dim, seed=4), dim=1).numpy()


@pytest.mark.parametrize("kind", approximate.KINDS)
def test_approximate_is_measured_and_scores_truly(tmp_path, kind):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'cnclip-ft[faiss]'")
    features = clustered()
    said: list[str] = []
    built = approximate.build(features, kind, 1.0001, said.append)
    # The recall that was said, counted again by hand.
    asked = np.sort(np.random.default_rng(0).choice(len(features), built.about["asked"], replace=False))
    if kind == "ivf":  # the same draw, after the training sample's
        random = np.random.default_rng(0)
        cells = built.index.nlist
        random.choice(len(features), min(len(features), 128 * cells), replace=False)
        asked = np.sort(random.choice(len(features), built.about["asked"], replace=False))
    products = features[asked].astype(np.float64) @ features.T.astype(np.float64)
    products[np.arange(len(asked)), asked] = -9
    truth = np.argsort(-products, axis=1, kind="stable")[:, :10]
    found = approximate.neighbours(built, features, asked)
    recall = sum(len(a & set(b)) for a, b in zip(found, truth.tolist(), strict=True)) / truth.size
    assert recall == pytest.approx(built.about["recall_at_10"], abs=0.002) and recall >= 0.95
    assert f"recall@10 {built.about['recall_at_10']:.3f}" in said[0] and kind in said[0]
    built.write(tmp_path / "a.faiss")
    again = approximate.read(tmp_path / "a.faiss", features, built.about)
    queries = torch.from_numpy(clustered()[:3])
    scores, numbers = again.search(queries, 5)
    for row in range(3):
        true = features[numbers[row].numpy()].astype(np.float64) @ queries[row].double().numpy()
        assert np.allclose(scores[row], true, atol=1e-6) and list(true) == sorted(true, reverse=True)


@pytest.mark.parametrize("kind", approximate.KINDS)
@pytest.mark.parametrize("count", [1, 3, 50])
def test_approximate_over_a_handful(kind, count):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'cnclip-ft[faiss]'")
    features = unit(count).numpy()
    built = approximate.build(features, kind, 1.0001, lambda _: None)
    _, numbers = built.search(torch.from_numpy(features[:1]), 1000)
    assert numbers[0, 0] == 0 and numbers.shape == (1, count)


def test_without_faiss_the_way_is_said(monkeypatch):
    monkeypatch.setattr(approximate, "has_faiss", lambda: False)
    with pytest.raises(approximate.RequestError, match=r"pip install 'cnclip-ft\[faiss\]'"):
        approximate.require_faiss()
