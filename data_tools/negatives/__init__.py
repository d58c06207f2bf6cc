"""Hard negatives of a caption: the same sentence with one attribute another, in Chinese and English.

    vocabulary → chinese, english find what can be swapped in a sentence → swaps chooses

A caption in which nothing is found has none: better no negative than one that is still true.
"""

from __future__ import annotations

from data_tools.negatives.swaps import Mention, draw, mentioned, slots_of
from data_tools.negatives.vocabulary import KINDS, Kind, Slot

__all__ = ["KINDS", "Kind", "Mention", "Slot", "draw", "mentioned", "slots_of"]
