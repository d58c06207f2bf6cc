"""One walk through a folder: what is a picture, what is passed over, and that both are said."""

from __future__ import annotations

import os
import random

import pytest
from PIL import Image

from data_tools.errors import RequestError
from data_tools.walk import ENDINGS, is_picture, natural, walk
from tests.data_tools.samples import picture


def put(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_counts_in_any_case_and_pillow_can_open_its_format(ending: str, tmp_path) -> None:
    put(tmp_path, f"a{ending}", f"B{ending.upper()}", f"c{ending}.txt")
    assert walk(tmp_path).names() == [f"B{ending.upper()}", f"a{ending}"]
    Image.init()
    format = {**Image.EXTENSION, ".pnm": "PPM"}[ending]
    assert format == "MPO" or format in Image.OPEN  # an MPO is opened as the JPEG it begins with


def test_what_is_passed_over_is_counted_by_kind_and_said(tmp_path) -> None:
    put(
        tmp_path,
        "a.jpg",
        "._a.jpg",
        ".hidden/b.jpg",
        ".ipynb_checkpoints/a.jpg",
        "__MACOSX/a.jpg",
        "Thumbs.db",
        ".DS_Store",
        "s/@eaDir/a.jpg",
        "d.heic",
        "E.HEIC",
        "f.svg",
        "notes.txt",
        "captions.csv",
        "README",
        "v.mp4",
    )
    found = walk(tmp_path)
    (line,) = found.lines(used=(".txt",))
    assert found.names() == ["a.jpg"]
    assert "7 hidden (.DS_Store, ._a.jpg, .hidden, …), 3 of other endings (none 1, .csv 1, .mp4 1)" in line
    assert (
        "3 of formats that are not read (.heic 2, .svg 1; E.HEIC, d.heic, f.svg; convert them to JPEG or PNG)" in line
    )
    assert ".txt" not in line and ".txt 1" in found.lines()[0]
    assert walk(tmp_path / ".hidden").names() == ["b.jpg"]  # named by the user, so meant


def test_links_are_followed_once_and_circles_end(tmp_path) -> None:
    put(tmp_path, "P/a.jpg", "P/sub/b.jpg", "far/c.jpg", "far/deep/d.jpg", "one.jpg")
    os.symlink("../far", tmp_path / "P/linked")
    os.symlink("../far/deep", tmp_path / "P/then")
    os.symlink("sub", tmp_path / "P/again")
    os.symlink("..", tmp_path / "P/sub/up")
    os.symlink("../..", tmp_path / "P/sub/above")
    os.symlink("../P", tmp_path / "far/back")
    os.symlink("../one.jpg", tmp_path / "P/one.jpg")
    os.symlink("/nowhere/z.jpg", tmp_path / "P/z.jpg")
    os.symlink("loop.jpg", tmp_path / "P/loop.jpg")
    found = walk(tmp_path / "P")
    assert found.names() == ["a.jpg", "linked/c.jpg", "linked/deep/d.jpg", "one.jpg", "sub/b.jpg"]
    passed, followed = found.lines()
    assert followed == "followed 2 links (one.jpg, linked)"
    assert "2 links to nothing (loop.jpg, z.jpg)" in passed
    assert "5 links in a circle or to a folder met before (" in passed
    found = walk(tmp_path / "P", outside=False)
    assert found.names() == ["a.jpg", "sub/b.jpg"]
    assert "links out of the folder (linked, one.jpg, then, …; --allow-outside follows them)" in found.lines()[0]


def test_what_is_no_file_is_not_opened_and_what_is_closed_is_said(tmp_path) -> None:
    put(tmp_path, "a.jpg", "shut/b.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.chmod(tmp_path / "shut", 0)
    try:
        found = walk(tmp_path)
        assert found.lines()[0].count("no files (pipes, devices) (pipe.jpg, zero.png)") == 1
        if os.getuid():  # root may read everything
            assert found.names() == ["a.jpg"] and "may not be read (shut/; give" in found.lines()[0]
    finally:
        os.chmod(tmp_path / "shut", 0o700)


def test_the_order_is_natural_and_does_not_depend_on_the_disk() -> None:
    wanted = [
        "a/2.jpg",
        "a/10.jpg",
        "a/b/1.jpg",
        "a-1.jpg",
        "b.jpg",
        "img1.jpg",
        "img01.jpg",
        "img2.jpg",
        "img10.jpg",
        f"img{'9' * 5000}.jpg",
        "图2.jpg",
        "图10.jpg",
        "\udcff.jpg",
    ]
    for seed in range(5):
        assert sorted(random.Random(seed).sample(wanted, len(wanted)), key=natural) == sorted(wanted, key=natural)
    order = sorted(wanted, key=natural)
    for first, second in (
        ("a/2.jpg", "a/10.jpg"),
        ("img2.jpg", "img10.jpg"),
        ("img10.jpg", f"img{'9' * 5000}.jpg"),
        ("图2.jpg", "图10.jpg"),
    ):
        assert order.index(first) < order.index(second)


def test_sizes_and_totals(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    put(tmp_path, "a.txt")
    (found,) = walk(tmp_path).pictures
    assert (found.size, found.changed) == (len(picture(1)), (tmp_path / "a.jpg").stat().st_mtime_ns)
    assert walk(tmp_path).totals[:2] == [2, len(picture(1)) + 1]


def test_no_folder_and_no_picture_are_requests_that_say_why(tmp_path) -> None:
    with pytest.raises(RequestError, match="no folder that can be read"):
        walk(tmp_path / "none")
    put(tmp_path, "x.heic")
    assert "convert them" in str(walk(tmp_path).nothing())
    assert not is_picture("a.jpg.txt") and is_picture("x/A.JPE")
