"""Drawn scenes with Chinese and English captions: a data set to learn from that needs no download.

    sampling → a `Scene` says what there is → drawing gives its picture, captions its texts, phrases what names its objects → writing gives files and stores

Combinations of colour and shape are held out of training: every validation scene shows one that was never seen, made of a
colour and a shape that were. The same seed gives the same bytes.
"""

from __future__ import annotations

from data_tools.scenes.captions import captions
from data_tools.scenes.drawing import draw
from data_tools.scenes.sampling import sample_scenes
from data_tools.scenes.vocabulary import HELD_OUT, Group, Scene
from data_tools.scenes.writing import draw_demo

__all__ = ["HELD_OUT", "Group", "Scene", "captions", "draw", "draw_demo", "sample_scenes"]
