from __future__ import annotations

import sys

import pytest
import torch

from cnclip_ft.evaluation import plots
from data_tools.errors import RequestError


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"pip install 'cnclip-ft\[plots\]'"):
        plots.require_matplotlib()


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plots.confusion_picture(torch.tensor([[3, 1], [0, 0]]), ["猫", "dog"], tmp_path / "new" / "c.png")
    plots.precision_recall_picture(
        torch.tensor([0.1, 1.0]), torch.tensor([1.0, 0.4]), (0.1, 1.0), "x", tmp_path / "p.svg"
    )
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (
        tmp_path / "p.svg"
    ).read_bytes()
    with pytest.raises(RequestError, match=r"ending in .png"):
        plots.confusion_picture(torch.eye(2).long(), ["a", "b"], tmp_path / "c.word")
