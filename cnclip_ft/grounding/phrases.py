"""What is looked for: phrases out of sentences by small rules, in Chinese and English.

The rules know words and endings and no grammar: they cut a caption at what stands between things (prepositions, verbs, commas) and
keep what names one. Where they cut wrongly the phrases can be given as they are meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_ENDS = re.compile('[,.;:!?()\\[\\]"，。；：！？、（）【】《》“”…\n]+')

_WORDS = re.compile(r"([A-Za-z'’-]+(?: +[A-Za-z'’-]+)+)")  # a word alone may be a name: iPhone 手机

# ---- English --------------------------------------------------------------------------------------------------------

_DETERMINERS = frozenset(
    "a an the this that these those some any many several few both each every another other his her its their my your our one two "
    "three four five six seven eight nine ten".split()
)
_BETWEEN = frozenset(
    "in on at by with without near under over above below behind beside besides between among through across along around against "
    "from to into onto toward towards off up down out inside outside upon within while as and or but who which where when while next "
    "front top underneath beneath past during after before for about is are was were be been being am has have had having does do did "
    "there it he she they them him who's it's there's not very then also together".split()
)  # fmt: skip
_VERBS = frozenset(
    "sits stands lies runs walks jumps plays holds wears rides eats drinks looks watches carries throws catches hits kicks pulls pushes "
    "drives flies swims climbs talks smiles sleeps waits poses leans hangs shows shown seen sit stand lie run walk jump play hold wear "
    "ride eat drink look watch carry throw catch hit kick pull push drive fly swim climb talk smile sleep wait pose lean hang sat stood "
    "ran held wore rode ate looked watched carried threw caught covered filled made dressed surrounded parked seated".split()
)
_NOUNS_IN_ING = frozenset(
    "building buildings ceiling painting paintings drawing drawings clothing string king ring rings wing wings thing things spring morning "
    "evening wedding earring earrings swimming fishing sing sting king's railing railings crossing clearing frosting dressing "
    "landing awning icing lightning parking dining living sleeping shopping skiing".split()
)
_EMPTY = frozenset("side left right middle center centre background foreground front top bottom back way lot".split())

# ---- Chinese --------------------------------------------------------------------------------------------------------

_CUTS = (
    "正在|站在|坐在|躺在|走在|跑在|骑在|趴在|停在|放在|挂在|位于|旁边有|上有|里有|中有|面有|[一-龥]着|正|在|和|与|跟|以及|及|并且|同时|而|把|被|向|朝|从|对着|"
    "前面|后面|旁边|下面|上面|里面|外面|中间|之间|附近|身边|边上|奔跑|奔驰|玩耍|行走|站立|跳跃|飞翔|游泳|睡觉|看向|看见|望向|是|有"
)  # fmt: skip
_PLACE = re.compile("(?:上|里|下|中|内|外|边|前|后|旁)+$")
_VERB_AT_END = re.compile("(?:跑|走|站|坐|跳|飞|玩|躺|吃草|吃东西|休息|微笑|笑|表演|比赛|嬉戏|打闹)+$")
_VERB_BETWEEN = re.compile("(?<=[一-龥])(?:穿|戴|拿|抱|牵|骑|踢|握|举|拉|推|追|咬|叼)(?=[一-龥])")
_KEEPS_DE = re.compile("(?:[色大小长短高矮新旧圆方红黄蓝绿白黑灰紫粉橙金银]|年轻|漂亮|可爱|透明|巨大|木头|塑料|金属)的")
_NOTHING = frozenset(
    "他 她 它 他们 她们 它们 我 我们 你 这 那 这里 那里 这个 那个 其中 一起 图片 照片 画面 左边 右边 左侧 右侧 上方 下方 中央".split()
)
_JOINED = re.compile("和平|温和|饱和|暖和|参与|现在|地下|高中|初中|有轨|所有|正方|正面|正在|和尚|从前|对着")


def phrases_of(text: str) -> list[str]:
    """The phrases of a sentence that name something to be seen, in its order, each once; a phrase by itself is one.

    What no rule finds anything in is taken whole: `phrases_of` of any text but blanks gives at least one.
    """
    parts = [part.strip() for one in _ENDS.split(text) for part in _WORDS.split(one)]
    found: list[str] = []
    for part in filter(None, parts):
        found += _chinese(part) if _HAN.search(part) else _english(part)
    return unique(found) or unique([text])


def unique(phrases: Iterable[str]) -> list[str]:
    """Each once, without blanks around it and within it."""
    clean = (" ".join(phrase.split()) for phrase in phrases)
    return list(dict.fromkeys(filter(None, clean)))


def listed(text: str) -> list[str]:
    """Phrases as they stand, one a line, or between commas where there is one line."""
    lines = text.splitlines()
    return unique(lines if len(lines) > 1 else re.split("[,，;；、]", text))


def _english(part: str) -> list[str]:
    found: list[str] = []
    words: list[str] = []

    def close() -> None:
        while words and words[-1].lower() in _DETERMINERS | {"of"}:
            words.pop()
        kept = [word.lower() for word in words if word.lower() not in _DETERMINERS]
        doing = len(kept) == 1 and kept[0].endswith("ing") and kept[0] not in _NOUNS_IN_ING
        if kept and not doing and not set(kept) <= _EMPTY | {"of"}:
            found.append(" ".join(words))
        words.clear()

    for word in part.split():
        low = word.lower().strip("'’")
        named = bool(words) and words[-1].lower() not in _DETERMINERS  # a noun may have been said
        if low in _BETWEEN or low in _VERBS and named or (named and low.endswith("ing") and low not in _NOUNS_IN_ING):
            close()
        elif low in _DETERMINERS and named and words[-1].lower() != "of":
            close()
            words.append(word)
        elif low == "of" and not named:
            close()
        else:
            words.append(word)
    close()
    return found


def _chinese(part: str) -> list[str]:
    # What must not be cut through is put aside as one sign.
    whole: list[str] = []

    def aside(match: re.Match[str]) -> str:
        whole.append(match.group())
        return chr(0xE000 + len(whole) - 1)

    shielded = _JOINED.sub(lambda m: m.group() if m.group() in ("正在", "对着") else aside(m), part)
    found: list[str] = []
    before = 0
    cuts = [*re.finditer(_CUTS, shielded)]
    ends = [*(cut.span() for cut in cuts), (len(shielded), len(shielded))]
    verb = False  # whether what follows is what is worn, held, ridden
    for start, end in ends:
        for piece in _VERB_BETWEEN.split(shielded[before:start]):
            found += _things(piece, verb)
            verb = True
        verb = shielded[start:end].endswith("着")
        before = end
    back = {chr(0xE000 + number): word for number, word in enumerate(whole)}
    return ["".join(back.get(sign, sign) for sign in phrase) for phrase in found]


def _things(piece: str, verb: bool) -> list[str]:
    """``红色衣服的男人`` behind a verb is what is worn and who wears it; ``红色的伞`` is one thing."""
    pieces = [piece]
    if verb and "的" in piece and not _KEEPS_DE.search(piece):
        pieces = list(piece.rsplit("的", 1))
    found = []
    for one in pieces:
        one = one.strip().strip("的地了")
        # A word of two signs may end like a verb or a place: 海边, 马上
        shorter = _VERB_AT_END.sub("", one)
        one = shorter if len(shorter) > 1 or not shorter else one
        shorter = _PLACE.sub("", one)
        one = shorter if len(shorter) > 1 else one
        if one and one not in _NOTHING and _content(one):
            found.append(one)
    return found


def _content(piece: str) -> bool:
    """More than a number and a measure word."""
    return bool(re.sub("^[一二两三四五六七八九十几半多这那]+(?:[只个条张把件群些名位辆匹头朵棵座幅])?", "", piece))
