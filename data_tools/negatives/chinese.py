"""What can be swapped in a Chinese sentence. Without word boundaries, so every pattern says what may stand beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial

from data_tools.negatives.vocabulary import THINGS, Slot, other_colours, other_numbers, other_things

MEASURES = "个只条匹头朵颗座栋把位名辆张件本艘架台盏杯瓶盘碗袋箱束支枝棵轮弯双串部顶根列间"
_COLLECTIVE = "群对些排堆"  # stand before anything
_NUMBERS = "零一两三四五六七八九十"
_COLOURS = {
    "red": "红", "orange": "橙橘", "yellow": "黄", "green": "绿", "blue": "蓝", "purple": "紫", "white": "白", "black": "黑",
    "grey": "灰", "pink": "粉", "brown": "棕褐", "gold": "金", "silver": "银",
}  # fmt: skip
_COLOUR_OF = {char: key for key, chars in _COLOURS.items() for char in chars}
_SHADES = {
    "粉红": "pink", "橘红": "orange", "橙红": "orange", "橘黄": "orange", "金黄": "gold", "紫红": "purple", "米白": "white",
    "乳白": "white", "雪白": "white", "天蓝": "blue", "湖蓝": "blue", "宝蓝": "blue", "墨绿": "green", "草绿": "green",
    "翠绿": "green", "军绿": "green", "嫩绿": "green", "乌黑": "black", "漆黑": "black", "咖啡": "brown",
}  # fmt: skip
_CHARS = "".join(_COLOUR_OF)
# Things whose colour is known to everybody: another one is no hard negative.
_ALWAYS = "的?(?:草|天空|海|雪|云|树叶|叶子|沙滩)"

# Nouns behind which, and words in which, ours stand for something else. They are met first, and passed over.
_DECOYS = (
    "热狗", "海狗", "熊猫犬", "北极熊", "小熊", "泰迪熊", "毛绒熊", "海马", "河马", "木马", "马路", "蜗牛", "牛奶", "牛仔", "牛肉", "羊肉", "鱼竿",
    "鱼缸", "鲸鱼", "鳄鱼", "鱿鱼", "花园", "花瓶", "花盆", "花坛", "烟花", "浪花", "雪花", "棉花", "爆米花", "树林", "树枝", "树叶", "树荫", "书店",
    "书架", "书桌", "书本", "书房", "面包", "钱包", "红包", "包子", "汉堡包", "火车站", "汽车站", "公交车站", "飞机场", "床单", "床头", "床上用品", "桥梁", "灯塔", "金字塔",
    "鼓掌", "鼓励", "足球场", "篮球场", "网球场", "棒球场", "网球拍", "棒球棒", "棒球帽", "篮球架", "篮球框", "足球鞋", "苹果树", "香蕉树", "西瓜汁",
    "葡萄酒", "葡萄干", "手机壳", "电脑桌", "书包带", "半圆形", "椭圆形", "扇形", "成圆圈", "成一个圆圈", "成了圆圈", "成了一个圆圈", "刀叉", "刀具", "剪刀", "电话亭", "自行车道", "自行车赛", "船长", "帆船", "轮船",
)  # fmt: skip
_NOUN_OF = {noun: thing.key for thing in THINGS.values() for noun in thing.chinese}
_WORDS = sorted([*_NOUN_OF, *_DECOYS], key=len, reverse=True)
_NOUN = re.compile("|".join(map(re.escape, _WORDS)))
# A noun of one sign is one only between such neighbours; 子 and 儿 behind it make another word of it.
_BEFORE_SHORT = f"{MEASURES}{_COLLECTIVE}的小大几色和与、，。有是着{_CHARS}"
_AFTER_SHORT = re.compile(
    "$|[在和与从向的有是被正都也跑站坐躺趴跳走飞游吃喝看围夹排四散竖横随位里中之旁边左右上下前后、，。；：！？,.;!?\\s]"
)

_SHADE = "|".join([*_SHADES, *_CHARS])
_WITH_SE = re.compile(f"(?<![{_CHARS}彩双三])(?P<lead>[深浅淡暗亮鲜]?)(?P<word>{_SHADE})色(?!{_ALWAYS})")
_BARE = re.compile(f"(?<![{_CHARS}])(?P<word>[红黄绿蓝紫白黑灰粉])(?=(?P<noun>{'|'.join(map(re.escape, _WORDS))}))")
_ATTRIBUTES = "的小大很亮高矮老旧新长短胖瘦可爱毛茸漂木"
_BOTH = re.compile(f"(?<![{_CHARS}])(?!{'|'.join(_SHADES)})[{_CHARS}]{{2}}(?![{_CHARS}])")  # 黑白相间
# A colour and its thing; other colours may be said of it too.
BETWEEN = re.compile(f"色?(?:[和与、][深浅淡暗亮鲜]?(?:{_SHADE})色)*(?:相间)?[{_ATTRIBUTES}]*")
_WITHOUT_SHADES = ("white", "black", "gold", "silver")
_NAMES = ("红包", "黄牛", "黑马", "白花", "红花")  # of one sign each, and more than their two words

_NUMBER = re.compile(
    f"(?<![第每另同某这那几数零〇百千万亿半.{_NUMBERS}\\d])(?P<number>10|[1-9]|[{_NUMBERS[1:]}])(?P<measure>[{MEASURES}])"
    "(?!(?P=measure)|半|多|照片|图片|图像|画面|合影|月|人物?照|金发|长发|短发|卷发|头发|黑发|白发|秀发)"
)
# Only attributes between: a verb would begin with another thing.
_PHRASE = re.compile(
    f"(?P<number>[几这那每整\\d{_NUMBERS}])(?P<measure>[{MEASURES}{_COLLECTIVE}])(?P<more>[{_ATTRIBUTES}色深浅淡暗{_CHARS}]*)$"
)

_SIDES = re.compile("左|右")
_BOTH_SIDES = re.compile("左右|右左|[左右][到至往向][左右]|左撇|座右|左[^，。；]{0,2}右[^，。；]{0,2}对称")
_HEIGHTS = re.compile(
    "(?<![晚早以身加])(?P<one>[上下])(?=[方面边部角])|(?<=[左右])(?P<two>[上下])|(?P<three>[顶底])(?=[部端])|(?<=在)(?P<four>[上下])(?=$|[，。；,])"
)
_BOTH_HEIGHTS = re.compile("上下|下上|[上下][到至往向][上下]|上方?面?和下")
_DEPTHS = re.compile("(?<![以目之])[前后](?=[方面边排])")
_BOTH_DEPTHS = re.compile("前后|[前后]到[前后]")
_INSIDES = re.compile("(?<![这那哪])[里外](?=面)|(?<=室)[内外]")
_OPPOSITE = dict(zip("左右上下顶底前后里外内", "右左下上底顶后前外里外", strict=True))
AXES = (
    ("left-right", _SIDES, _BOTH_SIDES),
    ("up-down", _HEIGHTS, _BOTH_HEIGHTS),
    ("front-back", _DEPTHS, _BOTH_DEPTHS),
    ("in-out", _INSIDES, re.compile("里外|内外|里里外外")),
)
SEPARATORS = re.compile("[，,、；;。.]|和|与|还有|另有")
ANOTHER = re.compile("另一|另外|其他|彼此|互相|相互|相邻")


def slots(text: str) -> Iterator[Slot]:
    yield from _colours(text)
    yield from _numbers(text)
    yield from _positions(text)
    yield from _things(text)


def _colours(text: str) -> Iterator[Slot]:
    for match in _WITH_SE.finditer(text):
        word, (start, stop) = match["word"], match.span("word")
        key = _SHADES.get(word) or _COLOUR_OF[word]
        others = other_colours(key)
        if match["lead"]:
            others = tuple(other for other in others if other not in _WITHOUT_SHADES)
        yield Slot("colour", key, others, partial(_put_colour, text, start, stop, ""), (start, stop))
    for match in _BARE.finditer(text):
        noun, word, (start, stop) = match["noun"], match["word"], match.span()
        if noun not in _NOUN_OF or (len(noun) == 1 and not _AFTER_SHORT.match(text, stop + 1)):
            continue
        key = _COLOUR_OF[word]
        others = () if word + noun in _NAMES else tuple(o for o in other_colours(key) if o not in ("gold", "silver"))
        yield Slot("colour", key, others, partial(_put_colour, text, start, stop, "色"), (start, stop))
    for match in _BOTH.finditer(text):  # not swapped: one of them alone would be another word
        for start, char in enumerate(match[0], match.start()):
            put = partial(_put_colour, text, start, start + 1, "")
            yield Slot("colour", _COLOUR_OF[char], (), put, (start, match.end()))


def _put_colour(text: str, start: int, stop: int, behind: str, other: str) -> str:
    """`behind`: what colours of more than a sign need where the one that was there had nothing behind it."""
    return text[:start] + _COLOURS[other][0] + (behind if other in ("orange", "brown") else "") + text[stop:]


def _numbers(text: str) -> Iterator[Slot]:
    for match in _NUMBER.finditer(text):
        said, (start, stop) = match["number"], match.span("number")
        number = int(said) if said.isascii() else _NUMBERS.index(said.replace("二", "两"))
        yield Slot("number", str(number), other_numbers(number), partial(_put_number, text, start, stop))


def _put_number(text: str, start: int, stop: int, other: str) -> str:
    return text[:start] + (other if text[start].isascii() else _NUMBERS[int(other)]) + text[stop:]


def _positions(text: str) -> Iterator[Slot]:
    for axis, words, both in AXES:
        if words.search(text) and not both.search(text):
            yield Slot("position", axis, (axis,), partial(_put_opposites, text, words))


def _put_opposites(text: str, words: re.Pattern[str], _: str) -> str:
    return words.sub(lambda match: _OPPOSITE[match[0]], text)


@lru_cache(maxsize=4)  # one sentence is asked three times
def nouns(text: str) -> tuple[tuple[str, int, int], ...]:
    """(key, start, stop) of every thing that is named."""
    found = []
    for match in _NOUN.finditer(text):
        noun, (start, stop) = match[0], match.span()
        if noun not in _NOUN_OF:
            continue
        if len(noun) == 1 and not (_before_short(text, start) and _AFTER_SHORT.match(text, stop)):
            continue
        found.append((_NOUN_OF[noun], start, stop))
    return tuple(found)


def _before_short(text: str, start: int) -> bool:
    return start == 0 or text[start - 1] in _BEFORE_SHORT or text[start - 1].isdigit()


def _counted(text: str, start: int) -> re.Match[str] | None:
    """Number, measure and attributes right before a noun."""
    return _PHRASE.search(text, max(start - 12, 0), start)


def phrases(text: str) -> list[str]:
    """Things with number, measure and attributes, as far as they are said: two alike are told apart by nothing."""
    found = []
    for _, start, stop in nouns(text):
        before = _counted(text, start)
        found.append(text[before.start() if before else start : stop])
    return found


def _things(text: str) -> Iterator[Slot]:
    for key, start, stop in nouns(text):
        yield Slot("object", key, other_things(key), partial(_put_thing, text, key, start, stop), (start, stop))


def _put_thing(text: str, key: str, start: int, stop: int, other: str) -> str:
    """The measure word in front becomes one that the other thing may have."""
    thing, before = THINGS[other], _counted(text, start)
    form = THINGS[key].chinese.index(text[start:stop])
    head = text[:start]
    if before and before["measure"] not in thing.measures + _COLLECTIVE:
        head = text[: before.start("measure")] + thing.measures[0] + text[before.end("measure") : start]
    return head + thing.chinese[form % len(thing.chinese)] + text[stop:]
