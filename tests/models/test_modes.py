"""Modes of a model's modules are as before after the block, however they were mixed and however it ends."""

from __future__ import annotations

import pytest
from torch import nn

from cnclip_ft.models.modes import evaluation_mode, modes_kept


def mixed() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_evaluation_inside_and_the_mixture_after():
    model = mixed()
    before = modes(model)
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(modes(model))
        raise KeyError
    assert modes(model) == before == [True, True, True, False, True]


def test_what_the_block_changes_is_undone():
    model = mixed().eval()
    with modes_kept(model) as found:
        assert [module for module, _ in found] == list(model.modules())
        model.train()
    assert not any(modes(model))


def test_a_model_in_evaluation_is_left_alone(monkeypatch):
    model = mixed().eval()
    monkeypatch.setattr(nn.Module, "__setattr__", None)
    with evaluation_mode(model):
        pass
