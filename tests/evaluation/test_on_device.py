"""Encoding, exact retrieval, export and search on every device there may be: the CPU's answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.features.encode import encode_split
from cnclip_ft.models.checkpoints import load
from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.retrieval.recall import recall, topk
from data_tools.store import open_store
from tests.evaluation import tiny


def unit(count: int, dim: int = 48, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_k_is_the_cpu_s_with_ties_too(device, dtype):
    queries, gallery = unit(70).to(dtype), unit(900, seed=1).to(dtype)
    gallery[500:600] = gallery[:100]  # equal vectors: the lower number first
    expected = topk(queries, gallery, 10, device="cpu")
    found = topk(queries.to(device), gallery, 10, device=device, memory="16MiB")
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_search_finds_what_the_cpu_finds(device, dtype):
    gallery, queries = unit(3000).to(dtype), unit(5, seed=2)
    largest = float(gallery.float().norm(dim=1).max())
    expected, found = (ExactSearch(gallery, largest, where).search(queries, 20) for where in ("cpu", device))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)


def test_a_split_is_encoded_as_on_the_cpu(device, tmp_path):
    store = open_store(tiny.make_store(tmp_path / "valid"))
    model = load(tiny.make_checkpoint(tmp_path / "best"))
    expected = encode_split(model, store, device="cpu", progress=False)
    found = encode_split(model, store, device=device, workers=2, progress=False)
    assert found.image_features.device.type == "cpu"
    torch.testing.assert_close(found.image_features, expected.image_features, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.text_features, expected.text_features, atol=1e-4, rtol=0)
    assert recall(found, device=device).as_dict() == recall(found, device="cpu").as_dict()
