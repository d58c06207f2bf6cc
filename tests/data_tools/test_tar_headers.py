"""Headers of ordinary files are read by a short cut: with the answers of the standard library, whatever the header."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from data_tools.sources.tar_members import TarMembers, _Header

FIELDS = ("name", "size", "type", "chksum")


def read(kind: type[tarfile.TarInfo], header: bytes) -> object:
    try:
        found = kind.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        return type(error), str(error)
    return [getattr(found, name) for name in FIELDS], found.isreg(), found.issparse()


def summed(header: bytearray) -> bytes:
    """With the sum that belongs to it."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def headers() -> list[bytes]:
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for name in ("0001.jpg", "图/1.txt", "a" * 99, "a" * 100, f"{'b' * 60}/{'a' * 80}", "x/"):
            for size in (0, 1, 511, 512, 2**20, 8**11 - 1):
                for kind in (b"0", b"\0", b"1", b"2", b"5", b"S", b"7", b"x", b"L"):
                    member = tarfile.TarInfo(name)
                    member.size, member.type, member.mtime, member.uid = size, kind, 1700000000, 1000
                    data = member.tobuf(format, "utf-8", "surrogateescape")
                    found.append(data[-512:])
    return found


def test_every_kind_of_header():
    made = headers()
    assert [read(_Header, one) for one in made] == [read(tarfile.TarInfo, one) for one in made]


@pytest.mark.parametrize("mended", [False, True])
def test_mutated_headers(mended):
    """With a sum that is wrong, and with the right one over fields that are not."""
    chance, made = random.Random(0), headers()
    for _ in range(4000):
        header = bytearray(chance.choice(made))
        for _ in range(chance.randint(1, 3)):
            place = chance.choice([chance.randrange(512), chance.randrange(96, 160), chance.randrange(326, 350)])
            header[place] = chance.choice([0, 32, 48, 55, 56, 127, 128, 255, chance.randrange(256)])
        wanted = summed(header) if mended else bytes(header)
        assert read(_Header, wanted) == read(tarfile.TarInfo, wanted)


def test_the_short_cut_is_taken(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(tarfile.TarInfo, "frombuf", classmethod(never))
    member = tarfile.TarInfo("0001.jpg")
    member.size = 75_000
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert _Header.frombuf(member.tobuf(format), "utf-8", "surrogateescape").size == 75_000


@pytest.mark.parametrize("header", [b"", b"\0" * 512, b"x" * 511, b"x" * 513, b"x" * 512])
def test_what_is_no_header(header):
    assert read(_Header, header) == read(tarfile.TarInfo, header)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_tars_have_the_members_that_tarfile_finds(tmp_path, format):
    """Each once, in order, at its place: files, links, folders, long names, owners and times that take other forms, two tars in one."""
    chance, long = random.Random(format), format != tarfile.USTAR_FORMAT
    for _ in range(60):
        whole = b""
        for _ in range(chance.randint(1, 2)):
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w", format=format) as tar:
                for number in range(chance.randint(0, 5)):
                    name = chance.choice(
                        ["{}.jpg", "图/{}.txt", "\udcff{}", "a" * 99 * (1 + long) + "{}", "d/" * 30 + "{}"]
                    )
                    member = tarfile.TarInfo(name.format(number))
                    member.type = chance.choice([b"0", b"0", b"0", b"\0", b"1", b"2", b"5", b"7"])
                    content = (
                        chance.randbytes(chance.choice([0, 1, 511, 512, 513])) if member.type in b"0\x007" else b""
                    )
                    member.size, member.linkname = len(content), "0.jpg" * (member.type in b"12")
                    member.mtime, member.uid = (
                        chance.choice([0, -5 * long, 2**31]),
                        chance.choice([0, 3_000_000 * long]),
                    )
                    tar.addfile(member, io.BytesIO(content))
            whole += made.getvalue()
        (tmp_path / "t.tar").write_bytes(whole)
        with tarfile.open(tmp_path / "t.tar", ignore_zeros=True, encoding="utf-8", errors="surrogateescape") as tar:
            expected = [
                (one.name, (tar.extractfile(one).read(), one.offset_data) if one.isreg() else None)
                for one in tar
                if not one.isdir()
            ]
        found = [
            (one.name, (one.content, one.place) if isinstance(one.content, bytes) else None)
            for one in TarMembers(tmp_path / "t.tar")
        ]
        assert found == expected
