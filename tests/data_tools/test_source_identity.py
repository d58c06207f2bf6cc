"""Which picture a caption stands on: by bytes where they are at hand, never on another picture of the same name."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_tools import build as building
from data_tools.build import build_split, build_store
from data_tools.errors import DataFault, RequestError
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.column_names import Columns
from data_tools.store import environments, open_store
from tests.data_tools.samples import picture, write_official


def seeds(target: Path, count: int = 6) -> dict[str, int]:
    """text → the picture it stands on."""
    store = open_store(target)
    known = {picture(seed): seed for seed in range(count)}
    return {pair.text: known[bytes(store.image(pair.image_id))] for pair in store.pairs()}


def taken(kind: str, place: Path, target: Path, options: SourceOptions | None = None, **build):
    (source,) = open_source(kind, str(place), options).values()
    return build_store(source, target, progress=False, overwrite=True, **build)


def kinds(target: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (target / "faults.jsonl").read_bytes().split(b"\n") if line]


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "names",
    [
        ("1.png", "1.png", "1.png"),
        ("a/1.png", "b/1.png", "a/1.png"),
        (None, None, None),
        ("/x/1.png", "C:\\y\\1.png", "../1.png"),
    ],
)
def test_rows_with_bytes(tmp_path, names, workers: int) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [(0, names[0], "零"), (1, names[1], "一"), (0, names[2], "又零"), (2, names[0], "二"), (1, names[1], "又一")]
    pq.write_table(
        pa.Table.from_pylist(
            [{"image": {"bytes": picture(seed), "path": name}, "text": text} for seed, name, text in rows]
        ),
        tmp_path / "t.parquet",
    )
    report = taken("table", tmp_path / "t.parquet", tmp_path / "s", workers=workers)
    assert seeds(tmp_path / "s") == {"零": 0, "一": 1, "又零": 0, "二": 2, "又一": 1} and report.images == 3
    assert (report.read, report.again, report.left_out) == (10, 2, 0)
    assert not any(
        "/x" in image_id or ":" in image_id or ".." in image_id for image_id in open_store(tmp_path / "s").image_ids
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_tars_with_equal_keys(tmp_path, workers: int) -> None:
    for shard, seed in enumerate((0, 1, 0)):
        write_tar(tmp_path / f"{shard}.tar", [("0.jpg", picture(seed)), ("0.txt", f"{seed} in {shard}".encode())])
    write_tar(
        tmp_path / "3.tar",
        [
            ("0.jpg", b"broken"),
            ("0.txt", b"lost"),
            ("a.jpg", picture(2)),
            ("a.jpg", picture(2)),
            ("a.txt", b"a"),
            ("b.jpg", picture(3)),
            ("b.jpg", picture(4)),
            ("b.txt", b"b"),
            ("c.jpg", picture(3)),
            ("c.png", picture(4)),
            ("d.jpg", picture(5)),
            ("d.json", b'{"caption": []}'),
            ("e.txt", b"alone"),
        ],
    )
    report = taken("webdataset", tmp_path, tmp_path / "s", on_error="skip", workers=workers)
    assert seeds(tmp_path / "s") == {"0 in 0": 0, "1 in 1": 1, "0 in 2": 0, "a": 2}
    assert kinds(tmp_path / "s") == [
        "undecodable-image",
        "refused-image",
        "bad-member",
        "bad-member",
        "empty-text",
        "missing-image",
    ]
    assert report.read == report.left_out + report.again + 8 and (report.left_out, report.again) == (6, 1)


def test_threads_tell_the_same_faults(tmp_path) -> None:
    """A refused picture that comes again while the first one of its name is on the way."""
    draw, members = random.Random(0), []
    for number in range(80):
        data = draw.choice((picture(1), picture(2), picture(7)[:-30], b""))
        name = "ab"[number % 2]
        members += [(f"{name}.jpg", data), (f"{name}.txt", f"{number}".encode())]
    write_tar(tmp_path / "t.tar", members)
    lists = []
    for workers in (0, 1, 3):
        taken("webdataset", tmp_path / "t.tar", tmp_path / f"{workers}", on_error="skip", workers=workers)
        lists.append((tmp_path / f"{workers}" / "faults.jsonl").read_bytes())
    assert lists[0] == lists[1] == lists[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_id_that_comes_again_with_another_picture(tmp_path, workers: int) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.jpg").write_bytes(picture(seed))
    (tmp_path / "t.csv").write_text("image,id,text\n0.jpg,1,a\n1.jpg,1,b\n0.jpg,1,c\n2.jpg,2,d\n1.jpg,1,e\n")
    options = SourceOptions(columns=Columns(image_id="id"))
    taken("table", tmp_path / "t.csv", tmp_path / "s", options, on_error="skip", workers=workers)
    assert seeds(tmp_path / "s") == {"a": 0, "c": 0, "d": 2}
    assert kinds(tmp_path / "s") == ["duplicate-image-id", "refused-image"] * 2
    (tmp_path / "t.jsonl").write_text(
        "".join(
            json.dumps({"image": f"{s}.jpg", "id": i, "text": t}) + "\n" for s, i, t in ((0, 7, "a"), (1, "7", "b"))
        )
    )
    taken("table", tmp_path / "t.jsonl", tmp_path / "s", options, workers=workers)
    assert seeds(tmp_path / "s") == {"a": 0, "b": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_between_two_images_of_a_stem(tmp_path, workers: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, seed in (("a.jpg", 0), ("a.png", 1), ("b.jpg", 2)):
        (folder / name).write_bytes(picture(seed))
        (folder / name).with_suffix(".txt").write_text(f"text of {name[0]}")
    report = taken("folder", folder, tmp_path / "s", workers=workers)
    found = [(pair.image_id, pair.text) for pair in open_store(tmp_path / "s").pairs()]
    assert found == [("a.jpg", "text of a"), ("a.png", "text of a"), ("b.jpg", "text of b")]
    assert "1 .txt beside several images of that name (a.txt)" in "".join(report.lines())
    (folder / "a.png.txt").write_text("its own")
    taken("folder", folder, tmp_path / "s", workers=workers)
    assert seeds(tmp_path / "s") == {"text of a": 0, "its own": 1, "text of b": 2}
    (folder / "captions.txt").write_text("a.jpg\tjpg\na.png#0 png\na\tneither\nb\tb\nb.png\tnone\n./b.jpg\tagain\n")
    taken("folder", folder, tmp_path / "s", on_error="skip", workers=workers)
    assert seeds(tmp_path / "s") == {"jpg": 0, "png": 1, "b": 2, "again": 2}
    assert kinds(tmp_path / "s") == ["ambiguous-name", "missing-file"]


@pytest.mark.skipif(os.name == "nt", reason="links and names of bytes")
@pytest.mark.parametrize("form", ["captions.csv", "captions.txt"])
def test_names_that_lead_out_need_a_word(tmp_path, form: str) -> None:
    for place in ("in/sub", "out"):
        (tmp_path / place).mkdir(parents=True)
    for name, seed in (("in/a.jpg", 0), ("in/sub/b.jpg", 1), ("out/c.jpg", 2)):
        (tmp_path / name).write_bytes(picture(seed))
    (tmp_path / "in/link.jpg").symlink_to("../out/c.jpg")
    (tmp_path / "in/linked").symlink_to("../out")
    (tmp_path / "in/inner.jpg").symlink_to("sub/b.jpg")
    out = [
        "../out/c.jpg",
        f"{tmp_path}/out/c.jpg",
        f"file://{tmp_path}/out/c.jpg",
        "link.jpg",
        "linked/c.jpg",
        "sub/../../out/c.jpg",
    ]
    names = ["a.jpg", "sub/../a.jpg", f"{tmp_path}/in/a.jpg", "inner.jpg", *out]
    separator = "," if form.endswith("csv") else "\t"
    header = ["image,text"] if form.endswith("csv") else []
    (tmp_path / "in" / form).write_text("\n".join(header + [f"{name}{separator}{n}" for n, name in enumerate(names)]))
    report = taken("folder", tmp_path / "in", tmp_path / "s", on_error="skip")
    assert seeds(tmp_path / "s") == {"0": 0, "1": 0, "2": 0, "3": 1} and report.faults == {"outside": len(out)}
    with pytest.raises(DataFault, match="outside of .*--allow-outside"):
        taken("folder", tmp_path / "in", tmp_path / "s")
    report = taken("folder", tmp_path / "in", tmp_path / "s", SourceOptions(allow_outside=True))
    assert set(seeds(tmp_path / "s").values()) == {0, 1, 2} and any(
        f"{len(out)} names lead out" in line for line in report.lines()
    )
    (tmp_path / "in" / form).rename(tmp_path / "table")
    (tmp_path / "in" / form).symlink_to(tmp_path / "table")
    with pytest.raises(RequestError, match="link out of .*--captions"):
        open_source("folder", str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        ("C:\\a.jpg", "outside"),
        ("\\\\server\\a.jpg", "outside"),
        ("~/a.jpg", "missing-file"),
        ("s3://b/a.jpg", "remote-image"),
        ("oss://b/a", "remote-image"),
        ("data:text/plain;base64,AAAA", "undecodable-image"),
        ("data:image/png,AAAA", "bad-base64"),
        ("/dev/zero", "outside"),
        (".", "bad-id"),
    ],
)
def test_other_things_than_paths(tmp_path, cell: str, kind: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": cell, "text": "x"}))
    with pytest.raises(DataFault) as caught:
        taken("table", tmp_path / "t.jsonl", tmp_path / "s")
    assert caught.value.kind == kind


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file names of any bytes")
def test_file_names_in_gbk(tmp_path) -> None:
    folder, name = tmp_path / "in", "红色".encode("gbk")
    folder.mkdir()
    for number, stem in enumerate((name, b"\xff", b"b")):
        place = os.path.join(os.fsencode(folder), stem)
        Path(os.fsdecode(place + b".jpg")).write_bytes(picture(number))
        Path(os.fsdecode(place + b".txt")).write_text(f"text {number}" if number != 1 else "")
    report = taken("folder", folder, tmp_path / "s", on_error="skip")
    assert set(open_store(tmp_path / "s").image_ids) == {"红色.jpg", "\\xff.jpg", "b.jpg"} and report.faults == {
        "empty-text": 1
    }
    "\n".join(report.lines()).encode()
    (folder / "captions.csv").write_text("image,text\n红色.jpg,一\nb.jpg,二\n")
    taken("folder", folder, tmp_path / "s")
    assert seeds(tmp_path / "s") == {"一": 0, "二": 2}
    (folder / "captions.csv").rename(folder / "captions.txt")
    (folder / "captions.txt").write_text("红色.jpg\t一\n")
    taken("folder", folder, tmp_path / "s")
    write_tar(tmp_path / "t.tar", [(os.fsdecode(name + b".jpg"), picture(0)), (os.fsdecode(name + b".txt"), b"x")])
    taken("webdataset", tmp_path / "t.tar", tmp_path / "s")
    assert open_store(tmp_path / "s").image_ids == ["红色.jpg".removesuffix(".jpg")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_only_regular_files_are_opened(tmp_path) -> None:
    for name in ("t.csv", "t.jsonl", "t.json", "t.parquet", "t.tar", "pipe.jpg"):
        os.mkfifo(tmp_path / name)
    for name in ("t.csv", "t.jsonl", "t.json", "t.parquet", "t.tar"):
        with pytest.raises(RequestError, match="pipe|no such tar"):
            taken("webdataset" if name == "t.tar" else "table", tmp_path / name, tmp_path / "s")
    (tmp_path / "a.csv").write_text("image,text\npipe.jpg,x\n")
    with pytest.raises(DataFault, match="pipe"):
        taken("table", tmp_path / "a.csv", tmp_path / "s")


def test_tars_that_claim_much(tmp_path) -> None:
    """Sparse files, gigabytes of zeros in a gzip, long headers: a fault each, at once."""
    good = [("z.jpg", picture(0)), ("z.txt", b"good")]
    sparse = tarfile.TarInfo("s.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    big = tarfile.TarInfo("big.jpg")
    big.size = 2**33
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**25
    link = tarfile.TarInfo("l.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "z.jpg"
    tail = write_tar(tmp_path / "good.tar", good).read_bytes()
    for entry, kind in ((sparse, "bad-member"), (link, "bad-member"), (big, "bad-member"), (header, "bad-tar")):
        for pack in (bytes, gzip.compress):
            (tmp_path / "t.tar").write_bytes(pack(entry.tobuf(tarfile.GNU_FORMAT) + tail))
            try:
                taken("webdataset", tmp_path / "t.tar", tmp_path / "s", on_error="skip")
                assert kind in kinds(tmp_path / "s") and seeds(tmp_path / "s") == {"good": 0}
            except DataFault as fault:  # nothing readable stands behind a member that is longer than the file
                assert entry is big and fault.kind == "empty-split" and kind in str(fault)


_KILL = """
import os, signal, sys
from data_tools import build
from data_tools.store import environments
environments.BATCH_ITEMS = 2
take = build._Build._take
def stopping(self, position, item, data):
    if position == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
    take(self, position, item, data)
build._Build._take = stopping
build.build_split(sys.argv[1], "train", sys.argv[2], on_error="skip", progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize("then", ["nothing", "gone", "shorter", "longer", "mended"])
def test_faults_of_a_killed_build_are_listed_once_whatever_became_of_the_list(tmp_path, monkeypatch, then: str) -> None:
    folder = write_official(tmp_path / "in", images=8)
    texts = (folder / "train_texts.jsonl").read_bytes().split(b"\n")
    (folder / "train_texts.jsonl").write_bytes(b"\n".join(b"{" if n % 3 == 1 else line for n, line in enumerate(texts)))
    straight = build_split(folder, "train", tmp_path / "straight", on_error="skip", progress=False)
    root = str(Path(building.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _KILL, str(folder), str(tmp_path / "s"), "25"], env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == -signal.SIGKILL
    (listed,) = [file for file in tmp_path.rglob("faults.jsonl") if "straight" not in str(file)]
    lines = listed.read_bytes()
    assert lines.count(b"\n") > 2
    if then == "gone":
        listed.unlink()
    elif then != "nothing":
        listed.write_bytes({"shorter": lines[:50], "longer": lines + b"{}\n", "mended": b"{}\n" + lines}[then])
    monkeypatch.setattr(environments, "BATCH_ITEMS", 2)
    report = build_split(folder, "train", tmp_path / "s", on_error="skip", resume=True, progress=False)
    assert report.continued > 10 and report.faults == straight.faults
    assert (report.read, report.again, report.left_out) == (straight.read, straight.again, straight.left_out)
    assert (tmp_path / "s/faults.jsonl").read_bytes() == (tmp_path / "straight/faults.jsonl").read_bytes()
