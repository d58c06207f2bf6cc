"""What can be swapped for what: colours, numbers and common things, by a key that both languages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["colour", "number", "position", "object"]
KINDS: tuple[Kind, ...] = ("colour", "number", "position", "object")


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of a sentence where something else could stand.

    Attributes:
        key: what stands there ("red", "3", "dog"; of a position its axis).
        others: keys that could stand there instead.
        put: one of them → the whole sentence with it.
        span: where a colour or a thing stands in the sentence.
        beside: of a colour the thing it is said of, of a thing its colours; empty where no such word stands there.
    """

    kind: Kind
    key: str
    others: tuple[str, ...]
    put: Callable[[str], str]
    span: tuple[int, int] = (0, 0)
    beside: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        return list(map(self.put, self.others))


COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black", "grey", "pink", "brown", "gold", "silver")  # fmt: skip
# People call one thing by either name: neither stands for the other.
_NEAR_COLOURS = (
    ("red", "pink"), ("red", "orange"), ("purple", "pink"), ("yellow", "gold"), ("orange", "gold"), ("orange", "brown"),
    ("brown", "gold"), ("grey", "silver"), ("white", "silver"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """A kind of thing; it is swapped for another of a group that both are in, `near` ones apart.

    Attributes:
        chinese: nouns. measures: measure words it may stand behind, the usual one first.
        english: (singular, plural).
    """

    key: str
    groups: str
    chinese: tuple[str, ...]
    measures: str
    english: tuple[tuple[str, str], ...]
    near: tuple[str, ...] = ()


def _thing(key: str, groups: str, chinese: str, measures: str, english: str = "", near: str = "") -> Thing:
    """`english`: "mouse/mice, …"; a regular plural is left out."""
    pairs = [
        (one, many or _plural(one)) for one, _, many in (each.partition("/") for each in (english or key).split(", "))
    ]
    return Thing(key, groups, tuple(chinese.split()), measures, tuple(pairs), tuple(near.split()))


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "x", "sh", "ch")) else f"{noun}s"


THINGS: dict[str, Thing] = {
    thing.key: thing
    for thing in (
        # The shapes of drawn scenes; those that are things as well are in two groups.
        _thing("circle", "shape", "圆形 圆 圆圈", "个", "circle, disc"),
        _thing("square", "shape", "正方形 方块 方形", "个"),
        _thing("triangle", "shape", "三角形 三角", "个"),
        _thing("star", "shape", "星星 五角星", "颗个", "star, five-pointed star"),
        _thing("heart", "shape", "爱心 心形 桃心", "颗个"),
        _thing("moon", "shape", "月亮 月牙 弯月", "轮弯个", "moon, crescent moon, crescent"),
        _thing("flower", "shape plant", "花朵 鲜花 花", "朵束枝", "flower, blossom"),
        _thing("fish", "shape animal", "鱼 鱼儿", "条", "fish/fish"),
        _thing("house", "shape building", "房子 房屋", "座栋间", "house"),
        _thing("umbrella", "shape tool", "雨伞 伞", "把"),
        _thing("man", "person", "男人 男子 男士", "个位名", "man/men, gentleman/gentlemen", near="boy"),
        _thing("woman", "person", "女人 女子 女士", "个位名", "woman/women, lady/ladies", near="girl"),
        _thing("boy", "person", "男孩 男孩子 男孩儿", "个名", near="man"),
        _thing("girl", "person", "女孩 女孩子 女孩儿", "个名", near="woman"),
        _thing("dog", "animal", "狗 小狗 狗狗", "只条", "dog, puppy/puppies"),
        _thing("cat", "animal", "猫 小猫 猫咪", "只", "cat, kitten"),
        _thing("horse", "animal", "马", "匹"),
        _thing("cow", "animal", "牛 奶牛", "头只"),
        _thing("sheep", "animal", "羊 绵羊", "只头", "sheep/sheep"),
        _thing("pig", "animal", "猪", "头只"),
        _thing("bird", "animal", "鸟 小鸟 鸟儿", "只", near="duck"),
        _thing("duck", "animal", "鸭子", "只", near="bird"),
        _thing("rabbit", "animal", "兔子", "只", "rabbit, bunny/bunnies"),
        _thing("elephant", "animal", "大象", "头只"),
        _thing("tiger", "animal", "老虎", "只头"),
        _thing("lion", "animal", "狮子", "头只"),
        _thing("bear", "animal", "熊", "只头", near="panda"),
        _thing("panda", "animal", "熊猫", "只", near="bear"),
        _thing("monkey", "animal", "猴子", "只"),
        _thing("giraffe", "animal", "长颈鹿", "只头"),
        _thing("zebra", "animal", "斑马", "匹只"),
        _thing("car", "vehicle", "汽车 轿车 小汽车", "辆台", near="taxi"),
        _thing("taxi", "vehicle", "出租车", "辆", "taxi, cab", near="car"),
        _thing("bus", "vehicle", "公交车 公共汽车 巴士", "辆"),
        _thing("truck", "vehicle", "卡车 货车", "辆"),
        _thing("bicycle", "vehicle", "自行车 单车", "辆", "bicycle, bike"),
        _thing("motorcycle", "vehicle", "摩托车", "辆", "motorcycle, motorbike"),
        _thing("train", "vehicle", "火车", "列辆"),
        _thing("plane", "vehicle", "飞机", "架", "plane, airplane"),
        _thing("boat", "vehicle", "小船 船", "艘条只"),
        _thing("chair", "furniture", "椅子", "把张", near="bench"),
        _thing("table", "furniture", "桌子", "张"),
        _thing("sofa", "furniture", "沙发", "张个", "sofa, couch"),
        _thing("bed", "furniture", "床", "张"),
        _thing("bench", "furniture", "长椅 长凳", "张条", near="chair"),
        _thing("apple", "food", "苹果", "个"),
        _thing("banana", "food", "香蕉", "根个"),
        _thing("grape", "food", "葡萄", "串颗"),
        _thing("watermelon", "food", "西瓜", "个"),
        _thing("strawberry", "food", "草莓", "颗个", "strawberry/strawberries"),
        _thing("cake", "food", "蛋糕", "个块"),
        _thing("pizza", "food", "披萨 比萨", "个张块"),
        _thing("sandwich", "food", "三明治", "个"),
        _thing("hat", "clothing", "帽子", "顶", "hat, cap"),
        _thing("dress", "clothing", "连衣裙 裙子", "条件", "dress, skirt"),
        _thing("trousers", "clothing", "裤子 长裤 牛仔裤", "条", "trousers/trousers, pants/pants, jeans/jeans"),
        _thing("shirt", "clothing", "衬衫 衬衣", "件", near="coat"),
        _thing("coat", "clothing", "外套 大衣 夹克", "件", "coat, jacket", near="shirt"),
        _thing("shoe", "clothing", "鞋子 运动鞋 皮鞋", "双只"),
        _thing("scarf", "clothing", "围巾", "条", "scarf/scarves"),
        _thing("football", "ball", "足球", "个", "football, soccer ball"),
        _thing("basketball", "ball", "篮球", "个"),
        _thing("tennis", "ball", "网球", "个", "tennis ball"),
        _thing("baseball", "ball", "棒球", "个"),
        _thing("guitar", "instrument", "吉他", "把"),
        _thing("piano", "instrument", "钢琴", "架台"),
        _thing("violin", "instrument", "小提琴", "把"),
        _thing("drum", "instrument", "鼓", "面个"),
        _thing("phone", "device", "手机 电话", "部台个", "phone, cellphone, cell phone"),
        _thing("computer", "device", "电脑 笔记本电脑", "台", "computer, laptop"),
        _thing("camera", "device", "相机 照相机", "台个部"),
        _thing("cup", "tool", "杯子", "个只", "cup, mug"),
        _thing("bottle", "tool", "瓶子", "个"),
        _thing("knife", "tool", "刀", "把", "knife/knives"),
        _thing("book", "tool", "书", "本"),
        _thing("bag", "tool", "包 书包 背包", "个", "bag, backpack"),
        _thing("tree", "plant", "树 大树", "棵"),
        _thing("bridge", "building", "桥 大桥", "座"),
        _thing("tower", "building", "塔", "座"),
    )
}  # fmt: skip


@cache
def other_colours(key: str) -> tuple[str, ...]:
    """Colours that nobody would call `key`."""
    near = {each for pair in _NEAR_COLOURS if key in pair for each in pair} | {key}
    return tuple(colour for colour in COLOURS if colour not in near)


@cache
def other_numbers(number: int) -> tuple[str, ...]:
    """The numbers next to it, at most two away, from 1 to 10."""
    return tuple(str(n) for n in (number - 2, number - 1, number + 1, number + 2) if 1 <= n <= 10)


@cache
def other_things(key: str) -> tuple[str, ...]:
    """Things of a group that it is in, other than it and what comes near it."""
    thing = THINGS[key]
    mine = set(thing.groups.split())
    return tuple(
        other.key
        for other in THINGS.values()
        if mine & set(other.groups.split()) and other.key != key and other.key not in thing.near
    )
