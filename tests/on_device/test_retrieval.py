"""Encoding, exact retrieval and search on every device there may be: the CPU's answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.evaluation.options import Options
from cnclip_ft.features.encode import encode_split
from cnclip_ft.models.checkpoints import load
from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.retrieval.recall import recall, topk
from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.index.renewal import Wishes, build_index
from data_tools.store import open_store
from tests.evaluation import tiny


def unit(count: int, dim: int = 48, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_k_is_the_cpu_s_with_ties_too(device, dtype):
    asking, offered, dim = (70, 900, 48) if device.type == "cpu" else (1000, 20_000, 512)
    queries, gallery = unit(asking, dim).to(dtype), unit(offered, dim, seed=1).to(dtype)
    gallery[500:600] = gallery[:100]  # equal vectors: the lower number first
    expected = topk(queries, gallery, 10, device="cpu")
    found = topk(queries.to(device), gallery, 10, device=device, memory="16MiB")
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)  # float32 products, summed in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_search_finds_what_the_cpu_finds(device, dtype):
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
    # cuDNN convolves float32 in TF32 unless told otherwise, patches too
    torch.testing.assert_close(found.image_features, expected.image_features, atol=5e-4, rtol=0)
    torch.testing.assert_close(found.text_features, expected.text_features, atol=1e-4, rtol=0)
    assert recall(found, device=device).as_dict() == recall(found, device="cpu").as_dict()


def test_an_index_is_made_and_asked_on_the_device(device, tmp_path):
    """By words and by a picture of the index; as a server asks, and as the command does."""
    checkpoint = tiny.make_checkpoint(tmp_path / "best")
    store, answers = tiny.make_store(tmp_path / "valid", images=30), {}
    for kind in ("cpu", device.type):
        options = Options(batch_size=8, workers=0, device=kind)
        build_index(checkpoint, store, tmp_path / f"{kind}.index", options, Wishes(), lambda text: None)
        engine = open_engine(tmp_path / f"{kind}.index", device=kind)
        questions = [Question(text="红色的猫", top=5), Question(like=7, top=5)]
        asked = engine.ask(questions)
        engine.prepare()
        assert [[found.key for found in answer] for answer in engine.ask(questions)] == [
            [found.key for found in answer] for answer in asked
        ]
        answers[kind] = [[(found.key, found.score) for found in answer] for answer in asked]
    for ours, theirs in zip(answers[device.type], answers["cpu"], strict=True):
        assert [key for key, _ in ours] == [key for key, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-4)
