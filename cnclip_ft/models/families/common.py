"""What belongs to several families of models and to none alone."""

from __future__ import annotations

from cnclip_ft.models.families.fast_tokenizer import FastTokenizer
from cnclip_ft.models.family import Family


class Shared(Family):
    tokenizers = (FastTokenizer,)


FAMILY = Shared()
