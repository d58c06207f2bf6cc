"""Shards as they lie: the same as the store that is imported from them, whatever wrote them; what cannot be read is named."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from data_tools.build import build_store
from data_tools.errors import RequestError
from data_tools.shards import ShardSource, open_pairs
from data_tools.shards import files as shard_files
from data_tools.sources import open_source
from tests.data_tools.samples import picture
from tests.data_tools.shard_samples import everything, imported, rows, samples, write_parquet, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


def test_tars_are_the_store_that_is_imported_from_them(tars, tmp_path) -> None:
    pytest.importorskip("webdataset")
    store = everything(imported("webdataset", tars, tmp_path / "store"))
    for place in (tars, f"{tars}/{{00000..00002}}.tar", f"{tars}/0000*.tar"):
        found = open_pairs(place)
        assert isinstance(found, ShardSource) and everything(found) == store
    one = open_pairs(tars / "00001.tar")
    assert everything(one) == everything(imported("webdataset", tars / "00001.tar", tmp_path / "one"))
    assert "nothing" not in one and one.image_ids[0] in one and 7 not in one
    with pytest.raises(KeyError):
        one.image("nothing")
    with pytest.raises(IndexError):
        one[10]
    assert one.image_ids[-1] == "000004" and one.image_ids[1:3] == ["000001", "000002"]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("how", [{}, {"row_group_size": 2}, {"compression": "none"}])
def test_parquet_files_are_the_store_that_is_imported_from_them(tmp_path, named, how) -> None:
    """Without names every file counts its rows, so pictures of several files have one name, and get their own."""
    folder = tmp_path / "shards"
    for number in range(3):
        write_parquet(folder / f"{number}.parquet", rows(samples(number * 4, 4, captions=2), named), **how)
    store = everything(imported("table", folder / "*.parquet", tmp_path / "store"))
    assert everything(open_pairs(folder)) == store
    assert everything(open_pairs(f"{folder}/*.parquet")) == store


def test_tars_and_parquet_of_the_same_pairs_are_the_same(tars, tmp_path) -> None:
    for number, first in enumerate((10, 0, 20)):
        write_parquet(tmp_path / "p" / f"{number}.parquet", rows(samples(first, 5, captions=1 + number)))
    one, other = open_pairs(tars), open_pairs(tmp_path / "p")
    assert everything(one) == everything(other) and one.generation != other.generation


def test_pictures_of_one_name(tmp_path) -> None:
    """The same picture in two shards is one; another one of its name gets its own id; both as an import does it."""
    pytest.importorskip("webdataset")
    about = {"json": b'{"caption": "a", "from": "second"}'}
    write_tar(
        tmp_path / "t" / "0.tar", [("a", {"jpg": picture(1), "txt": b"one"}), ("b", {"jpg": picture(2), "txt": b"b"})]
    )
    write_tar(
        tmp_path / "t" / "1.tar", [("b", {"jpg": picture(3), "txt": b"other"}), ("a", {"jpg": picture(1), **about})]
    )
    write_tar(
        tmp_path / "t" / "2.tar",
        [
            ("b", {"jpg": picture(3), "txt": b"again"}),
            ("a", {"jpg": picture(4), **about}),
            ("b", {"jpg": picture(2), "txt": b"b2"}),
        ],
    )
    found = everything(open_pairs(tmp_path / "t"))
    assert found == everything(imported("webdataset", tmp_path / "t", tmp_path / "store"))
    assert len(found["ids"]) == 4 and len(found["pairs"]) == 7


def test_negatives_and_weights_come_along(tmp_path) -> None:
    pytest.importorskip("webdataset")
    lines = [
        {"caption": ["x", "y"], "negatives": ["z"], "weight": [1, 2.5]},
        {"caption": "v"},
        {"caption": "w", "weight": 3},
    ]
    write_tar(
        tmp_path / "t" / "0.tar",
        [(str(n), {"jpg": picture(n), "json": json.dumps(line).encode()}) for n, line in enumerate(lines)],
    )
    shutil.copy(tmp_path / "t" / "0.tar", tmp_path / "t" / "1.tar")
    found = everything(open_pairs(tmp_path / "t"))
    assert found == everything(imported("webdataset", tmp_path / "t", tmp_path / "store"))
    assert found["counts"] == {"pairs": 6, "negatives": 4, "weight": 6}


def test_tars_of_the_library_itself(tmp_path) -> None:
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "t").mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/t/%05d.tar", maxcount=4, verbose=0) as sink:
        for number in range(10):
            sink.write({"__key__": f"{number:04d}", "jpg": picture(number), "txt": f"第{number}张"})
    found = open_pairs(f"{tmp_path}/t/{{00000..00002}}.tar")
    assert everything(found) == everything(imported("webdataset", tmp_path / "t", tmp_path / "store"))
    assert len(found) == 10 and found[9].text == "第9张"


@pytest.mark.parametrize("form", ["ustar", "gnu", "pax"])
def test_tars_of_gnu_tar(tmp_path, form) -> None:
    """Long names take headers of their own, which differ by form."""
    program = shutil.which("tar")
    if program is None or b"GNU" not in subprocess.run([program, "--version"], capture_output=True).stdout:
        pytest.skip("no GNU tar")
    pytest.importorskip("webdataset")
    folder = tmp_path / "files" / ("d" * 90)
    folder.mkdir(parents=True)
    for number in range(4):
        name = f"{'图' * (20 if form != 'ustar' else 5)}{number}"
        (folder / f"{name}.jpg").write_bytes(picture(number))
        (folder / f"{name}.txt").write_text(f"文{number}", encoding="utf-8")
    (tmp_path / "t").mkdir()
    command = [program, f"--format={form}", "--sort=name", "-cf", str(tmp_path / "t" / "0.tar"), "."]
    subprocess.run(command, check=True, cwd=tmp_path / "files")
    found = everything(open_pairs(tmp_path / "t"))
    assert found == everything(imported("webdataset", tmp_path / "t", tmp_path / "store"))
    assert len(found["ids"]) == 4


def test_what_img2dataset_leaves_beside_its_tars_is_passed_over(tars) -> None:
    (tars / "00000_stats.json").write_text("{}")
    write_parquet(tars / "00000.parquet", [{"url": "x", "caption": "y", "key": "0"}])
    assert len(open_pairs(tars)) == 5 + 10 + 15
    (tars / "other.parquet").write_bytes(b"")
    with pytest.raises(RequestError, match="two kinds of shards"):
        open_pairs(tars)


def test_bad_members_are_named_and_left_out(tmp_path) -> None:
    bad = [
        ("0", {"jpg": picture(0), "txt": b"\xff\xfe\xff\x00\x81"}),
        ("1", {"jpg": picture(1)}),
        ("2", {"jpg": picture(2), "json": b"{"}),
        ("3", {"txt": b"no picture"}),
        ("4", {"jpg": picture(4), "txt": b"  "}),
        ("5", {"jpg": picture(5)[:300], "txt": b"cut"}),
        ("6", {"jpg": picture(6), "txt": "好".encode()}),
    ]
    write_tar(tmp_path / "t" / "0.tar", bad)
    source = open_pairs(tmp_path / "t")
    assert [pair.text for pair in source.pairs()][-2:] == ["cut", "好"]
    listed = [(fault["id"], fault["kind"], Path(fault["file"]).name) for fault in source.left_out()]
    assert [entry[0] for entry in listed][-4:] == ["1", "2", "3", "4"] and {entry[2] for entry in listed} == {"0.tar"}
    assert {"missing-caption", "bad-json", "missing-image", "empty-text"} <= {entry[1] for entry in listed}
    assert isinstance(source, ShardSource) and sum(source.faults.values()) == len(listed)
    assert source.image("5") == picture(5)[:300]  # that it is no picture is found where it is decoded


def test_links_and_devices_are_named(tmp_path) -> None:
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t" / "0.tar", "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE),
            ("d.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name, data in (("../../e.jpg", picture(1)), ("../../e.txt", b"up")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_pairs(tmp_path / "t")
    assert list(source.image_ids) == ["../../e"]  # a name, never a place
    assert [fault["kind"] for fault in source.left_out()] == ["bad-member"] * 4
    assert not list(tmp_path.parent.rglob("e.jpg"))


@pytest.mark.parametrize(
    ("make", "place", "says"),
    [
        (lambda t: (t / "00001.tar").unlink(), "{t}/{{00000..00002}}.tar", "1 of 3 shards are missing .*00001.tar"),
        (lambda t: None, "{t}/none-*.tar", "no shard has such a name"),
        (lambda t: None, "{t}/{{00000,00001,00000}}.tar", "stands twice"),
        (lambda t: (t / "b.tar").symlink_to(t / "00000.tar"), "{t}", "stands twice"),
        (lambda t: os.mkfifo(t / "b.tar"), "{t}", "a pipe or a device"),
        (
            lambda t: subprocess.run(["gzip", t / "00001.tar"], check=True),
            "{t}",
            "is packed.*gunzip -k .*00001.tar.gz",
        ),
        (lambda t: shutil.move(t / "00001.tar", t / "sub.tar"), "{t}/sub.tar", None),
        (lambda t: write_tar(t / "more" / "0.tar", samples(90, 1)), "{t}", "its folder more holds shards as well"),
    ],
)
def test_places_that_cannot_be_read(tars, make, place, says) -> None:
    make(tars)
    if says is None:
        assert len(open_pairs(place.format(t=tars))) == 10
        return
    with pytest.raises(RequestError, match=says):
        open_pairs(place.format(t=tars))


def test_a_packed_tar_under_a_plain_name(tars) -> None:
    subprocess.run(["gzip", tars / "00001.tar"], check=True)
    shutil.move(tars / "00001.tar.gz", tars / "00001.tar")
    with pytest.raises(RequestError, match="is packed"):
        open_pairs(tars)


def test_parquet_that_holds_no_pictures(tmp_path) -> None:
    write_parquet(tmp_path / "a" / "0.parquet", [{"image": "a.jpg", "text": "a"}])
    with pytest.raises(
        RequestError, match="holds no bytes of pictures but string, perhaps their paths.*data import table"
    ):
        open_pairs(tmp_path / "a")
    write_parquet(tmp_path / "b" / "0.parquet", [{"url": "a.jpg", "caption": "a"}])
    with pytest.raises(RequestError, match="none of the columns is known to hold the image"):
        open_pairs(tmp_path / "b")
    write_parquet(
        tmp_path / "c" / "0.parquet",
        [{"image": {"bytes": None, "path": "../a.jpg"}, "text": "a"}, *rows(samples(0, 1))][1:],
    )
    assert len(open_pairs(tmp_path / "c")) == 1
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RequestError, match="not a readable Parquet file"):
        open_pairs(tmp_path / "d")


def test_large_row_groups_are_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_tools.shards.source._LARGE_GROUP", 1000)
    write_parquet(tmp_path / "a" / "0.parquet", rows(samples(0, 6)))
    source = open_pairs(tmp_path / "a")
    assert isinstance(source, ShardSource) and "a row group has up to" in source.notes[0]


def _read_all(source: ShardSource) -> list[bytes]:
    return [source.image(image_id) for image_id in source.image_ids]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_their_own_files(tars, method) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    source = open_pairs(tars)
    wanted = _read_all(source)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read_all, [source, source]) == [wanted, wanted]


def test_open_files_are_few(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shard_files, "OPEN_FILES", 8)
    for number in range(40):
        write_tar(tmp_path / "t" / f"{number:05d}.tar", samples(number * 2, 2))
    source = open_pairs(tmp_path / "t")
    source.image(source.image_ids[0])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(2):
        assert len(_read_all(source)) == 80
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 8


def test_row_groups_in_memory_are_few(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shard_files, "GROUP_BYTES", 3000)
    for number in range(6):
        write_parquet(tmp_path / "p" / f"{number}.parquet", rows(samples(number * 4, 4)), row_group_size=2)
    source = open_pairs(tmp_path / "p")
    assert isinstance(source, ShardSource)
    assert _read_all(source) == [picture(number) for number in range(24)]
    assert source._shards._kept() <= 3000 or len(source._shards._open) == 1


def test_shards_without_a_pair(tmp_path) -> None:
    write_tar(tmp_path / "t" / "0.tar", [("1", {"jpg": picture(1)})])
    with pytest.raises(RequestError, match="no picture with a caption.*missing-caption.*0.tar: 1: no caption"):
        open_pairs(tmp_path / "t")
    (tmp_path / "e.tar").write_bytes(b"")
    with pytest.raises(RequestError, match="no picture with a caption"):
        open_pairs(tmp_path / "e.tar")


def test_refused_texts_keep_their_numbers(tmp_path) -> None:
    """As an import of the pattern counts them, over the end of a shard too."""
    pytest.importorskip("webdataset")
    blank = {"json": b'{"caption": ["a", " "]}'}
    write_tar(tmp_path / "t" / "0.tar", [("0", {"jpg": picture(0), **blank}), ("1", {"jpg": picture(1), **blank})])
    write_tar(tmp_path / "t" / "1.tar", [("2", {"jpg": picture(2), "txt": b"b"})])
    found = everything(open_pairs(tmp_path / "t"))
    store = build_store(
        open_source("webdataset", str(tmp_path / "t"))[""], tmp_path / "s", on_error="skip", progress=False
    ).store
    assert found == everything(store) and [pair.text_id for pair, _ in found["pairs"]] == [1, 3, 5]
