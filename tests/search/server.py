"""What tests send to the server, and what its refusals look like."""

from __future__ import annotations

import io

from PIL import Image

LOCAL = "http://127.0.0.1"


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "PNG")
    return out.getvalue()


def problem(response, status: int) -> dict:
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) == {"code", "detail"} and len(content["detail"]) < 1500
    return content
