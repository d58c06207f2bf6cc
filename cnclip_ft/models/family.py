"""What a family of models brings: kinds of towers and tokenizers; one instance is known to `registry`."""

from __future__ import annotations

from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer


class Family:
    image_towers: tuple[type[ImageTower], ...] = ()
    text_towers: tuple[type[TextTower], ...] = ()
    tokenizers: tuple[type[Tokenizer], ...] = ()
