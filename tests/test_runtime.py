"""What a run computes in, and why."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.runtime import choose_precision


@pytest.mark.parametrize(("able", "says"), [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "nothing sure"), ({}, "nothing sure")])  # fmt: skip
def test_a_processor_stays_exact_and_says_when_it_could_be_faster(monkeypatch, able, says):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    precision, reason = choose_precision("auto", torch.device("cpu"))
    assert precision == "fp32" and says in reason
    assert choose_precision("bf16", torch.device("cpu"))[0] == "bf16"


def test_a_release_that_cannot_say_is_not_asked(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", torch.device("cpu"))[0] == "fp32"
