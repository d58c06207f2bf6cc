"""A picture's bytes without its metadata, and the one thing in them that changes how it looks: the orientation.

Comments, EXIF, XMP and profiles can be wrong, huge or private, and no pixel depends on them. They are taken out before
a decoder sees the picture, so no odd tag can refuse it, and none can leave with what is made of it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from data_tools.errors import DataFault

_ORIENTATION = 0x0112
_WHOLE_NUMBERS = {3: "H", 4: "L", 8: "h", 9: "l"}  # TIFF's types
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_STANDALONE = frozenset((0x01, *range(0xD0, 0xDA)))  # JPEG markers without a length
_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_KEPT_IN_JPEG = frozenset((0xE0, 0xEE))  # JFIF, and Adobe's word on the colours
_KEPT_IN_PNG = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_SEGMENTS, _PNG_CHUNKS = 20_000, 200_000  # a photo has dozens; of 4 bytes each they take minutes to walk
_TEXT_LIMIT = 2**20  # bytes of a text in a PNG that may hold an orientation
_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a marker behind coded data


class JpegStart(NamedTuple):
    """What stands before the coded data of a JPEG."""

    frame: int  # marker: 0xC0 baseline, 0xC2 progressive, …
    depth: int
    width: int
    height: int
    components: int
    plain: bool  # a frame header of the usual length
    scan: int  # where the first scan's marker stands
    segments: list[tuple[int, int, int]]  # marker, begin, end


def jpeg_start(data: bytes | memoryview) -> JpegStart | None:
    """The segments up to the first scan; None where this is no JPEG, or an odd one.

    Raises:
        DataFault: more segments than anything writes.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, end, frame, segments = 2, len(data) - 3, None, []
    for _ in range(_JPEG_SEGMENTS):
        if at >= end or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # any number of these may stand before a marker
            at += 1
            continue
        if marker == 0xDA:
            return frame and JpegStart(*frame, at, segments)
        if marker in _STANDALONE:
            return None
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            if frame is not None or at + 10 > len(data):
                return None
            depth, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            frame = marker, depth, width, height, components, length == 8 + 3 * components
        segments.append((marker, at, at + 2 + length))
        at += 2 + length
    raise _too_many(f"the JPEG begins with more than {_JPEG_SEGMENTS:,} segments")


def jpeg_scans(data: bytes | memoryview, start: JpegStart, most: int) -> int:
    """Number of scans, counted up to `most`: each is a walk over the whole picture for the decoder."""
    if start.frame in (0xC0, 0xC1) and data[start.scan + 4] == start.components:
        return 1  # all in one; decoders take no second
    at, scans = start.scan, 0
    for _ in range(_JPEG_SEGMENTS):
        if scans >= most:
            break
        marker = data[at + 1]
        scans += marker == 0xDA
        if marker == 0xD9:
            break
        found = _SCAN.search(data, at + 2 + (0 if marker in _STANDALONE else data[at + 2] << 8 | data[at + 3]))
        if found is None or found.start() + 4 > len(data):
            break
        at = found.start()
    else:
        return most  # so much between the scans is no photo either
    return scans


def jpeg_orientation(data: bytes | memoryview, start: JpegStart) -> int:
    """1 to 8 (EXIF 2.3); what EXIF says goes before what XMP says. EXIF may lie in several segments."""
    exif, xmp = b"", b""
    for marker, begin, end in start.segments:
        if marker == 0xE1:
            segment = bytes(data[begin + 4 : end])
            if segment.startswith(b"Exif\0\0"):
                exif += segment[6:]
            elif segment.startswith(_XMP):
                xmp = segment
    return orientation_in(exif, xmp)


def orientation_in(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation (1 to 8) of an EXIF block, else of XMP; 1 where neither says a sensible one."""
    found = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if found is None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _exif_orientation(tiff: bytes) -> int | None:
    """Only this tag is read: the others may be anything."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None
    (at,) = struct.unpack_from(order + "L", tiff, 4)
    if at + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHL", tiff, entry)
        if tag == _ORIENTATION and number == 1 and kind in _WHOLE_NUMBERS:
            return struct.unpack_from(order + _WHOLE_NUMBERS[kind], tiff, entry + 8)[0]
    return None


def bare(data: bytes) -> tuple[bytes, int | None]:
    """The picture without metadata and further frames, and its orientation; None: the decoder has to be asked."""
    if data[:2] == b"\xff\xd8":
        start = jpeg_start(data)
        if start is None:
            return data, None
        kept = [data[b:e] for marker, b, e in start.segments if marker < 0xE0 or marker in _KEPT_IN_JPEG]
        return b"".join((data[:2], *kept, data[start.scan :])), jpeg_orientation(data, start)
    if data[:8] == _PNG:
        return _bare_png(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _bare_gif(data), 1
    return data, None


def _bare_png(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp = [data[:8]], b"", b""
    for name, begin, end in _png_chunks(data):
        if name in _KEPT_IN_PNG:
            kept.append(data[begin:end])
            continue
        body = data[begin + 8 : min(end - 4, begin + 8 + _TEXT_LIMIT)]
        if name == b"eXIf":
            exif = body
        elif name in (b"zTXt", b"tEXt") and body.startswith(b"Raw profile type exif\0"):
            exif = exif or _profile(body[22:] if name == b"tEXt" else _inflated(body[23:]))
        elif name == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            xmp = _inflated(body[20:].lstrip(b"\0")) if body[18:19] == b"\1" else body
    return b"".join(kept), orientation_in(exif, xmp)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 8
    for _ in range(_PNG_CHUNKS):
        if at + 8 > len(data):
            return
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end
    raise _too_many(f"the PNG has more than {_PNG_CHUNKS:,} chunks")


def _too_many(what: str) -> DataFault:
    return DataFault(what, mend="Save it anew, or leave it out.", kind="undecodable-image")


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _TEXT_LIMIT)
    except zlib.error:
        return b""


def _profile(text: bytes) -> bytes:
    """ImageMagick's way: a name, a length, and hexadecimal digits, each on lines of their own."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _bare_gif(data: bytes) -> bytes:
    """Without the comments and programs before the first frame, which decoders put together in quadratic time."""
    if len(data) < 13:
        return data
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept = [data[:at]]
    while data[at : at + 1] == b"\x21":
        begin, at = at, at + 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        if data[begin + 1 : begin + 2] == b"\xf9":  # transparency
            kept.append(data[begin:at])
    return b"".join((*kept, data[at:]))


def tiff_weight(data: bytes) -> int:
    """Bytes that a reader of all tags of a TIFF's first picture would copy: entries may share theirs."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or data[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
        return 0
    large = 43 in data[2:4]
    head, offset, step, entry = ("Q", "Q", 20, "HHQQ") if large else ("H", "L", 12, "HHLL")
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
    weight, seen = 0, set[int]()
    try:
        places = list(struct.unpack_from(order + offset, data, 8 if large else 4))
        while places:
            at = places.pop()
            if at in seen or len(seen) > 8:
                continue
            seen.add(at)
            (count,) = struct.unpack_from(order + head, data, at)
            begin = at + struct.calcsize("<" + head)
            for place in range(begin, min(begin + step * count, len(data) - step + 1), step):
                tag, kind, number, value = struct.unpack_from(order + entry, data, place)
                weight += min(sizes.get(kind, 1) * number, max(0, len(data) - value)) if number > 4 else 8
                if tag in (0x8769, 0x8825, 0xA005):  # EXIF, places, interoperability: tables of their own
                    places.append(value)
    except struct.error:
        pass
    return weight
