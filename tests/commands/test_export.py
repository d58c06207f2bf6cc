"""`cnclip-ft export` as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cnclip_ft.cli import main
from cnclip_ft.models.checkpoints import load, save_checkpoint
from tests.models.helpers import RESNET, equal, small, tensors

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, cwd):
    environment = {**__import__("os").environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "cnclip_ft", "export", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_export(tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={})
    done = command("a", "--to", "cn_clip", "--output", "out.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest difference of unit features to the source" in done.stdout
    assert equal(tensors(load(tmp_path / "out.pt")), tensors(small()))


def refused(capsys, monkeypatch, *arguments):
    """Exit code and message of the command, run here: three starts of Python would take longer than the tests."""
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", "export", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


def test_refusals_are_one_line_and_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(small(RESNET), tmp_path / "a", info={})
    for arguments, message in (
        (("a", "--output", "hf"), "ChineseCLIPModel is a ViT"),
        (("a", "--to", "tarball", "--output", "x"), "--to is 'tarball'"),
        (("nothing", "--output", "x"), "no such file or folder"),
    ):
        code, said = refused(capsys, monkeypatch, *arguments)
        fault, *more = said.strip().splitlines()
        assert code == 2 and fault.startswith("error: ") and message in fault
        assert not more or (len(more) == 1 and more[0].startswith("more: docs/"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_help_has_an_example(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", "export", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "Example: cnclip-ft export" in capsys.readouterr().out
