"""`cnclip-ft export` as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cnclip_ft.models.checkpoints import load, save_checkpoint
from tests.models.helpers import RESNET, equal, small, tensors

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, cwd):
    environment = {**__import__("os").environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "cnclip_ft", "export", *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, encoding="utf-8")  # fmt: skip


@pytest.mark.parametrize("to,target", [("huggingface", "out"), ("cn_clip", "out.pt")])
def test_export(to, target, tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={})
    done = command("a", "--to", to, "--output", target, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest difference of unit features to the source" in done.stdout
    assert equal(tensors(load(tmp_path / target)), tensors(small()))


def test_refusals_are_one_line_and_exit_2(tmp_path):
    save_checkpoint(small(RESNET), tmp_path / "a", info={})
    for arguments, message in (
        (("a", "--output", "hf"), "ChineseCLIPModel is a ViT"),
        (("a", "--to", "tarball", "--output", "x"), "--to is 'tarball'"),
        (("nothing", "--output", "x"), "no such file or folder"),
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_help_has_an_example(tmp_path):
    assert "Example: cnclip-ft export" in command("--help", cwd=tmp_path).stdout
