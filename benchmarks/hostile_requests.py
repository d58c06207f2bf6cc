"""Requests that should not be made, for `benchmarks/search.py hostile`."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator


def picture(width: int, height: int, form: str = "JPEG") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.effect_noise((width // 4 or 1, height // 4 or 1), 60).convert("RGB").resize((width, height)).save(out, form)
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few kB that claims side × side pixels, and has them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    squeezed = zlib.compressobj(9)
    rows = b"".join(squeezed.compress(bytes(side // 8 + 1)) for _ in range(side)) + squeezed.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def form(fields: dict[str, str], data: bytes | None, name: str = "a.jpg") -> tuple[bytes, dict[str, str]]:
    edge, parts = "----edge7f3a", []
    for key, value in fields.items():
        parts.append(f'--{edge}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode())
    if data is not None:
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{edge}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={edge}"}


def hostile_requests(count: int) -> Iterator[tuple[str, str, str, bytes | None, dict[str, str]]]:
    """(what it tries, method, path, body, headers), mixed by a fixed draw."""
    draw = random.Random(0)
    good, large, huge = picture(640, 480), picture(9000, 6000), os.urandom(21 * 2**20)
    png, bombs = picture(300, 300, "PNG"), [bomb(20_000), bomb(40_000)]
    as_json = {"Content-Type": "application/json"}

    def words(**fields: object) -> tuple[str, str, bytes, dict[str, str]]:
        return "POST", "/api/search", json.dumps(fields).encode(), as_json

    def upload(data: bytes | None, **fields: str) -> tuple[str, str, bytes, dict[str, str]]:
        return "POST", "/api/search/image", *form(fields, data)

    def raw(body: bytes, kind: str = "application/json") -> tuple[str, str, bytes, dict[str, str]]:
        return "POST", "/api/search", body, {"Content-Type": kind}

    def get(path: str) -> tuple[str, str, None, dict[str, str]]:
        return "GET", path, None, {}

    kinds = {
        "oversized upload": lambda: upload(huge),
        "too many pixels": lambda: upload(draw.choice([*bombs, large])),
        "truncated picture": lambda: upload((data := draw.choice([good, png]))[: draw.randrange(len(data))]),
        "flipped bytes": lambda: upload(_flipped(draw, draw.choice([good, png]))),
        "no picture": lambda: upload(draw.choice([b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0", os.urandom(5000), b"<svg/>"])),
        "wrong types": lambda: words(**draw.choice([
            {"text": 5}, {"text": ["a"]}, {"text": {"a": 1}}, {"text": None}, {"text": "a", "top": "many"}, {"like": "../1"},
            {"like": -1}, {"like": 10**12}, {"text": "a", "image_share": 7}, {"text": "a", "unknown": 1}, {"text": "a", "like": 1.5},
        ])),
        "broken JSON": lambda: raw(draw.choice([
            b"", b"{", b"[" * 5000, b'{"text": "\xff\xfe"}', b'{"text": "\\ud83d"}', b'{"text":"a","not_weight":NaN}', b"null",
            b'{"text":"a","top":1e400}', b'{"text":"a","top":' + b"9" * 6000 + b"}", b'{"\\ud83d": 1}',
        ])),
        "wrong content type": lambda: raw(b"text=a", draw.choice(["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])),
        "traversal": lambda: get(draw.choice([
            "/api/images/../../etc/passwd", "/api/images/..%2f..%2f..%2fetc%2fpasswd", "/../../../../etc/passwd",
            "/api/images/%2e%2e/%2e%2e/index.json", "/api/images/0.jpg", "/api/images/....//....//etc/passwd",
            "/api/images/1%00.jpg", "/photos/1.jpg", "/static/../guard.py", "/api/images//etc/passwd", "/api/images/-1",
            "/api/images/99999999999999999999999", "/api/images/1?size=../../large", "/api/images/" + "9" * 3000,
        ])),
        "huge k": lambda: words(text="狗", top=draw.choice([0, -1, 1001, 10**9, 10**30, 1000])),
        "empty": lambda: words(**draw.choice([{}, {"text": ""}, {"text": "  \n"}, {"not": "狗"}, {"text": "狗", "not": "狗", "not_weight": 1}])),
        "emoji": lambda: words(text="🐕‍🦺👩‍👩‍👧‍👦🇨🇳" * draw.randrange(1, 40), top=3),
        "control characters": lambda: words(text="".join(chr(draw.randrange(0, 0x3000)) for _ in range(50)), top=3),
        "100 kB of text": lambda: words(text="雪" * 33_400) if draw.random() < 0.5 else upload(good, text="a" * 100_000),
        "just below the limit": lambda: words(text="x" * 4000, top=1),
        "wrong method": lambda: (draw.choice(["PUT", "DELETE", "PATCH", "OPTIONS"]), draw.choice(["/", "/api/search", "/api/images/1"]), None, {}),
        "foreign host": lambda: ("GET", "/api/index", None, {"Host": "evil.example"}),
        "foreign page": lambda: draw.choice([
            ("POST", "/api/search/image", form({}, good)[0], {**form({}, None)[1], "Origin": "http://evil.example"}),
            ("POST", "/api/search", b'{"text": "a"}', {"Content-Type": "text/plain", "Origin": "null"}),
            ("GET", f"/api/images/{draw.randrange(1000)}", None, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
        ]),
        "lying length": lambda: ("POST", "/api/search", b"{}", {"Content-Length": draw.choice(["-5", "abc", "99999999999"])}),
        "thumbnails": lambda: get(f"/api/images/{draw.randrange(100_000)}?size={draw.choice(['small', 'large'])}"),
        "a picture, as it should be": lambda: upload(good, text="🐕", top="5"),
    }  # fmt: skip
    rare = {"oversized upload": 0.25, "a picture, as it should be": 0.25, "too many pixels": 0.5}
    names = list(kinds)
    for name in draw.choices(names, [rare.get(name, 1.0) for name in names], k=count):
        yield name, *kinds[name]()


def _flipped(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(20):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)
