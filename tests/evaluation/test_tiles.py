"""Sizes of tiles stay within their memory."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.retrieval.tiles import Side, error_bound, full_precision, parse_memory, products, tile_shape
from data_tools.errors import RequestError, UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text, size", [("2GiB", 2**31), ("512MiB", 2**29), ("1.5G", 3 * 2**29), ("64 mb", 2**26), (2**30, 2**30)]
)
def test_sizes_are_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["lots", "", "1KiB", "-2GiB", "2 apples"])
def test_other_sizes_are_refused(text):
    with pytest.raises(RequestError, match="memory is"):
        parse_memory(text)


@pytest.mark.parametrize("memory", [2**24, 2**28, 2**34])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_tile_stays_within_half_of_the_memory(memory, device):
    rows, columns = tile_shape(10**6, 10**7, memory, torch.device(device))
    assert rows * columns * 7 <= memory // 2 and rows >= 1 and columns % 64 == 0


def test_features_that_are_not_numbers_are_refused():
    for value in (float("nan"), float("inf")):
        features = torch.ones(3, 4)
        features[1, 2] = value
        with pytest.raises(UserError, match="NaN or infinity"):
            Side(features, CPU, 2**28, "image")


def test_full_precision_overrides_what_is_set_and_restores_it():
    torch.manual_seed(0)
    a, b = torch.randn(64, 512), torch.randn(64, 512)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), full_precision():
            product, tile = a @ b.T, products(a, b)
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert product.dtype == torch.float32
    for found in (product, tile):
        assert (found.double() - a.double() @ b.double().T).abs().max() < 1e-3  # bfloat16 is wrong by about 0.1 here


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("queries, gallery, dim", [(1, 1, 1), (70, 33, 512), (1024, 1000, 768), (0, 5, 8), (5, 0, 8)])
def test_products_are_wrong_by_no_more_than_the_bound(queries, gallery, dim, onednn, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    draw = torch.Generator().manual_seed(queries)
    sides = [torch.randn(count, dim, generator=draw) for count in (queries, gallery)]
    q, g = (Side(features, CPU, 2**28, "image") for features in sides)
    with full_precision():
        found = products(*sides)
    assert found.dtype == torch.float32 and found.shape == (queries, gallery) and found.is_contiguous()
    wrong = (found.double() - sides[0].double() @ sides[1].double().T).abs()
    assert (wrong <= error_bound(q, g)[:, None]).all()
