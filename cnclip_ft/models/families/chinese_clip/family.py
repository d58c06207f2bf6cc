"""Chinese CLIP as a family: its kinds of towers and its tokenizer."""

from __future__ import annotations

from cnclip_ft.models.families.chinese_clip.resnet import ResNetTower
from cnclip_ft.models.families.chinese_clip.roberta import RobertaTower
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.family import Family


class ChineseClip(Family):
    image_towers = (ViTTower, ResNetTower)
    text_towers = (RobertaTower,)
    tokenizers = (TextTokenizer,)


FAMILY = ChineseClip()
