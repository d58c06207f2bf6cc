"""What a score depends on is written beside it."""

from __future__ import annotations

import json

import pytest
import torch

from cnclip_ft.evaluation.results import provenance
from cnclip_ft.models.checkpoints import load
from cnclip_ft.runtime import parse_device
from data_tools.errors import RequestError


def test_the_record_says_what_a_score_depends_on(checkpoint):
    model = load(checkpoint)
    about = provenance.describe_checkpoint(model, checkpoint)
    assert (
        about["architecture"] == "tiny"
        and len(about["checksum"]) == 64
        and about["history"] == {"stage": "align", "step": 7}
    )
    settings = provenance.describe_settings(model, torch.float32, torch.device("cpu"))
    assert settings["text"]["context_length"] == 52 and settings["image_transform"]["size"] == 32
    assert settings["dtype"] == "float32" and "ties" in settings["ranking"]
    assert provenance.versions()["torch"] == torch.__version__
    json.dumps([about, settings])


def test_a_model_that_is_no_file_is_told_by_its_weights(checkpoint):
    model = load(checkpoint)
    first = provenance.describe_checkpoint(model, "ViT-B-16")["weights_checksum"]
    assert first == provenance.weights_checksum(load(checkpoint))
    with torch.no_grad():
        model.logit_scale += 1e-3
    assert provenance.weights_checksum(model) != first


def test_devices_and_precisions():
    assert (
        parse_device("cpu").type == "cpu"
        and parse_device("auto") == parse_device(None)
        and provenance.parse_dtype("bfloat16") is torch.bfloat16
    )
    with pytest.raises(RequestError, match="device 'quantum' cannot be used"):
        parse_device("quantum")
    with pytest.raises(RequestError, match="dtype is 'float8'"):
        provenance.parse_dtype("float8")
