"""Which pictures a renewal of an index encodes."""

from __future__ import annotations

from cnclip_ft.search.index import renewal


def counted(monkeypatch) -> list:
    """Keys that are encoded from here on."""
    seen: list = []
    real = renewal.encode_pictures

    def spying(model, keys, *arguments, **options):
        seen.extend(keys)
        return real(model, keys, *arguments, **options)

    monkeypatch.setattr(renewal, "encode_pictures", spying)
    return seen
