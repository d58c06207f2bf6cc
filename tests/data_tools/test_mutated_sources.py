"""Mutated lines in every source: what is good is stored on its own picture, every other line is a fault of its own.

2,000 mutated lines a source; CNCLIP_FT_MUTATIONS asks for more.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.build import build_store
from data_tools.errors import DataFault
from data_tools.sources import SourceOptions, open_source
from data_tools.store import open_store
from tests.data_tools.samples import picture, text_row

MUTATIONS = int(os.environ.get("CNCLIP_FT_MUTATIONS", "2000"))
_AT_ONCE = 250
_PICTURES = 20
_MARKS = [
    b'"',
    b'""',
    b"\t",
    b",",
    b"\r",
    b"\n",
    b"\0",
    b"\xff",
    b"\\",
    b"{",
    b"#",
    b"\xe2\x80\xa8",
    b"\x85",
    b"\x0b",
    b"|",
    b"../",
    b" ",
]


def mutate(line: bytes, dice: random.Random) -> bytes:
    at, to = sorted(dice.choices(range(len(line) + 1), k=2))
    return dice.choice(
        [
            lambda: line[:at],
            lambda: line[at:],
            lambda: line[:at] + line[to:],
            lambda: line[:at] + dice.choice(_MARKS) + line[at:],
            lambda: line[:at] + dice.randbytes(3) + line[at:],
            lambda: line[:at] + line[at:to] * 2 + line[to:],
            lambda: line[:at] + bytes([dice.randrange(256)]) + line[at + 1 :],
            lambda: line.decode("utf-8", "replace").encode("gb18030"),
        ]
    )()


def name_of(number: int) -> str:
    return f"p{number % _PICTURES:02d}.jpg"


def good_text(number: int) -> str:
    return f"good {number} on {name_of(number)} 图"


def line_of(kind: str, number: int) -> bytes:
    name, text = name_of(number), good_text(number)
    return {
        "csv": f"{name},{text}",
        "tsv": f"{name}\t{text}",
        "lines": f"{name}#{number}\t{text}",
        "txt": text,
        "jsonl": json.dumps({"image": name, "text": text}, ensure_ascii=False),
        "flickr8k-cn": f"{name}#zhc#{number} {text}",
    }[kind].encode()


def write(kind: str, folder: Path, lines: list[bytes]) -> tuple[str, Path, SourceOptions, Path | None]:
    """Lays a source with `lines` down; (kind, place, options, the file whose lines they are, from `first` on)."""
    if kind == "official":
        file = folder / "train_texts.jsonl"
        rows = [name_of(n).encode() + b"\t" + base64.b64encode(picture(n)) for n in range(_PICTURES)]
        (folder / "train_imgs.tsv").write_bytes(b"\n".join(rows))
        file.write_bytes(b"\n".join(lines))
        return "official", folder, SourceOptions(), file
    for number in range(_PICTURES):
        (folder / name_of(number)).write_bytes(picture(number))
    if kind == "txt":  # all on one picture
        (folder / "p00.txt").write_bytes(b"\n".join(lines))
        for number in range(1, _PICTURES):
            (folder / name_of(number)).unlink()
        return "folder", folder, SourceOptions(), folder / "p00.txt"
    if kind == "flickr8k-cn":
        for split in ("train", "val", "test"):
            (folder / f"flickr8k{split}.txt").write_text("".join(f"{name_of(n)}\n" for n in range(_PICTURES)))
        (folder / "flickr8kzhc.caption.txt").write_bytes(b"\n".join(lines))
        return kind, folder, SourceOptions(images=folder), folder / "flickr8kzhc.caption.txt"
    header = {"csv": b"image,text\n", "tsv": b"image\ttext\n"}.get(kind, b"")
    file = folder / {"lines": "captions.txt"}.get(kind, f"captions.{kind}")
    file.write_bytes(header + b"\n".join(lines))
    return "folder", folder, SourceOptions(), file


def stored_pairs(target: Path) -> list[tuple[bytes, str]]:
    store = open_store(target)
    pairs = [(bytes(store.image(pair.image_id)), pair.text) for pair in store.pairs()]
    store.close()
    return pairs


def check_pairs(
    pairs: list[tuple[bytes, str]], good: list[int], number_of: Callable[[int], int] = lambda n: n % _PICTURES
) -> None:
    """Good pairs are there, on their own picture."""
    texts = {text: data for data, text in pairs}
    merged = "".join(text for text in texts if "\n" in text)  # an open quotation mark that another one closed
    for number in good:
        text = good_text(number)
        if text not in texts:
            assert text in merged, text
        else:
            assert texts[text] == picture(number_of(number)), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "lines", "txt", "official", "flickr8k-cn"])
def test_mutated_lines_cost_themselves_only(tmp_path, kind: str) -> None:
    for turn in range(-(-MUTATIONS // _AT_ONCE)):
        dice, folder, target = random.Random(f"{kind} {turn}"), tmp_path / str(turn), tmp_path / f"{turn}.store"
        folder.mkdir()

        def make(number: int) -> bytes:
            return (
                text_row(number, good_text(number), [name_of(number)]) if kind == "official" else line_of(kind, number)
            )

        lines, good = [make(0)], [0]
        for number in range(1, 2 * _AT_ONCE):
            lines.append(make(number) if number % 2 == 0 else mutate(make(number), dice))
            good += [number] if number % 2 == 0 else []
        named, place, options, file = write(kind, folder, lines)
        source = next(iter(open_source(named, str(place), options).values()))

        stream = source.open()
        seen = {item.line for item in stream.items if str(item.file) == str(file)}
        data = file.read_bytes().split(b"\n")
        read = {number for number, line in enumerate(data, start=1) if line.strip(b"\r\n") and not line.isspace()}
        if kind in ("csv", "tsv"):
            read -= {1}  # the header
        unseen = read - seen
        if kind == "csv":  # a quoted cell may span lines
            assert len(unseen) < 60
        elif kind == "tsv":  # tabs alone
            unseen = {number for number in unseen if data[number - 1].strip()}
        elif kind == "flickr8k-cn":  # names that are not in the list of the split
            assert stream.notes == [f"{len(unseen)} captions of images that the list of this split does not name"]
            unseen = set()
        assert kind == "csv" or not unseen, (turn, unseen)

        report = build_store(source, target, on_error="skip", max_faults=10**6, progress=False, workers=turn % 2 * 2)
        check_pairs(stored_pairs(target), good, (lambda n: 0) if kind == "txt" else lambda n: n % _PICTURES)
        listed = (target / "faults.jsonl").read_bytes().count(b"\n")
        assert sum(report.faults.values()) == listed and 0 < report.left_out <= listed < report.read


@pytest.mark.slow
def test_mutated_tars_lose_damaged_members_only(tmp_path) -> None:
    for turn in range(-(-MUTATIONS // _AT_ONCE)):
        dice, place = random.Random(turn), tmp_path / f"{turn}.tar"
        good, starts = [], []
        with tarfile.open(place, "w") as archive:
            for number in range(2 * _AT_ONCE):
                starts.append(archive.offset)
                good += [number] if number % 2 == 0 else []
                for ending, data in (("jpg", picture(number % _PICTURES)), ("txt", good_text(number).encode())):
                    entry = tarfile.TarInfo(f"{number:05d}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        data = bytearray(place.read_bytes())
        for number in range(1, 2 * _AT_ONCE, 2):
            # A header, a content, or the beginning of both.
            at = dice.randrange(starts[number], starts[number] + 512 if dice.random() < 0.7 else starts[number] + 1500)
            data[at : at + 3] = dice.randbytes(3)
        place.write_bytes(data)
        (source,) = open_source("webdataset", str(place)).values()
        report = build_store(source, tmp_path / f"{turn}", on_error="skip", max_faults=10**6, progress=False)
        pairs = stored_pairs(tmp_path / f"{turn}")
        check_pairs(pairs, good)
        whole = {text for data, text in pairs if text.startswith("good ")}
        faulty = sum(report.faults.values())
        assert len(whole) + faulty >= 2 * _AT_ONCE and report.left_out == faulty


@pytest.mark.slow
def test_mutated_rows_of_parquet_cost_themselves_only(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for turn in range(-(-MUTATIONS // _AT_ONCE)):
        dice = random.Random(turn)
        texts, images, good = [], [], []
        for number in range(2 * _AT_ONCE):
            text, data = good_text(number).encode(), picture(number % _PICTURES)
            if number % 2:
                text, data = (mutate(text, dice), data) if dice.random() < 0.7 else (text, mutate(data, dice))
            else:
                good.append(number)
            texts.append(text)
            images.append({"bytes": data, "path": dice.choice([None, "a.jpg", f"{number}.jpg"])})
        column = pa.array(texts, pa.binary())
        text_column = pa.Array.from_buffers(pa.string(), len(texts), column.buffers())
        pq.write_table(pa.table({"image": images, "text": text_column}), tmp_path / "t.parquet", row_group_size=70)
        (source,) = open_source("table", str(tmp_path / "t.parquet")).values()
        rows = [item for item in source.open().items if isinstance(item, DataFault) or hasattr(item, "content")]
        assert {item.line for item in rows} == set(range(1, 2 * _AT_ONCE + 1))
        build_store(source, tmp_path / "s", on_error="skip", max_faults=10**6, progress=False, overwrite=True)
        check_pairs(stored_pairs(tmp_path / "s"), good)
