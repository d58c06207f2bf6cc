"""Texts as people write them and as files garble them: Chinese, English, mixed, emoji, empty, very long."""

from __future__ import annotations

import random

_ENGLISH = (
    "a the red blue dog cat runs over snow with two people's umbrella won't I'm they've he'll CLIP Model 2024 photo-graph naïve "
    "café Straße ΑΣΟΣ İstanbul &amp; &lt;b&gt; #1 3.14 50% x_y (ok) https://a.b/c?d=e"
).split()
_CHINESE = "一只狗在雪地里奔跑，两个人撑着伞。红色的汽车停在路边！“引号”《书名》全角ＡＢＣ１２３、简体繁體貓鳥龍"
_EMOJI = ["🐶", "🏳️‍🌈", "👨‍👩‍👧", "❤️", "😀", "🇨🇳", "✨"]
_ODD = [
    "\u200b", "\xa0", "\t", "\n", "É\u0301", "ﬁ", "Ⅷ", "½", "ẞ", "â€œ", "Ã©", "&amp;amp;", "\u3000", "…", "—", "ñ", "ก็", "हिन्दी",
    "한국어", "日本語", "العربية",
]  # fmt: skip


def many_texts(count: int = 5000, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    texts = ["", " ", "\n\t ", "狗", "a", "狗" * 3000, "dog " * 3000]
    while len(texts) < count:
        kind = draw.random()
        words = draw.choice([1, 2, 3, 5, 8, 12, 20, 40] if draw.random() < 0.98 else [100, 400])
        text = (" " if kind < 0.3 or draw.random() < 0.5 else "").join(_word(draw, kind) for _ in range(words))
        texts.append(text.title() if draw.random() < 0.1 else text)
    return texts


def _word(draw: random.Random, kind: float) -> str:
    if kind < 0.3:
        return draw.choice(_ENGLISH)
    chinese = "".join(draw.choice(_CHINESE) for _ in range(draw.randint(1, 6)))
    if kind < 0.55:
        return chinese
    which = draw.random()
    return (
        draw.choice(_ENGLISH)
        if which < 0.4
        else chinese
        if which < 0.7
        else draw.choice(_EMOJI if which < 0.85 else _ODD)
    )
