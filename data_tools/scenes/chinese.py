"""The Chinese grammar: nouns with their measure words, colours and sizes as attributes, relations from both sides."""

from __future__ import annotations

from random import Random

from data_tools.scenes.vocabulary import Group, Scene, Told

# Shape → (noun, measure word), one of them at random.
NOUNS = {
    "circle": (("圆形", "个"), ("圆", "个"), ("圆圈", "个")),
    "square": (("正方形", "个"), ("方块", "个"), ("方形", "个")),
    "triangle": (("三角形", "个"), ("三角", "个")),
    "star": (("星星", "颗"), ("五角星", "颗"), ("五角星", "个")),
    "heart": (("爱心", "颗"), ("心形", "个"), ("桃心", "颗")),
    "moon": (("月亮", "轮"), ("月牙", "弯"), ("弯月", "轮")),
    "flower": (("花", "朵"), ("花朵", "朵"), ("鲜花", "朵")),
    "fish": (("鱼", "条"), ("鱼儿", "条")),
    "house": (("房子", "座"), ("房子", "栋"), ("房屋", "座")),
    "umbrella": (("雨伞", "把"), ("伞", "把")),
}
COLOUR_WORDS = {
    "red": ("红",), "orange": ("橙", "橘"), "yellow": ("黄",), "green": ("绿",),
    "blue": ("蓝",), "purple": ("紫",), "white": ("白",), "black": ("黑",),
}  # fmt: skip
SIZE_WORDS = {"small": ("小", "小小的", "很小的"), "large": ("大", "大大的", "很大的")}
NUMBERS = ("零", "一", "两", "三", "四", "五", "六")

# Background → (places, nouns): "沙滩上有…", "…，背景是沙滩".
BACKGROUND_WORDS = {
    "grass": (("草地上", "草坪上", "绿草地上"), ("草地", "草坪")),
    "night": (("夜空中", "夜空里", "星空下"), ("夜空", "星空")),
    "snow": (("雪地上", "雪地里"), ("雪地",)),
    "sea": (("海面上", "大海上", "水面上"), ("大海", "海水")),
    "beach": (("沙滩上", "沙地上"), ("沙滩", "沙地")),
    "wall": (("砖墙前", "砖墙上", "墙上"), ("砖墙", "墙")),
    "paper": (("方格纸上", "格子纸上"), ("方格纸", "格子纸")),
    "floor": (("木地板上", "木板上"), ("木地板", "木板")),
    "sunset": (("晚霞中", "夕阳下", "傍晚的天空中"), ("晚霞", "夕阳")),
    "pavement": (("石板路上", "石砖地上"), ("石板路", "石砖地")),
    "wallpaper": (("粉色墙纸上", "圆点墙纸上"), ("粉色墙纸", "圆点墙纸")),
    "blackboard": (("黑板上",), ("黑板",)),
}
CORNER_WORDS = {
    "centre": ("正中间", "中央", "中间"),
    "top left": ("左上角", "左上方"),
    "top right": ("右上角", "右上方"),
    "bottom left": ("左下角", "左下方"),
    "bottom right": ("右下角", "右下方"),
}
# {a}: the first group, {b}: the second; {picture}: "画面" or "图".
CLAUSES = {
    "corner": ("{a}在{picture}{corner}", "{picture}{corner}有{a}", "{corner}是{a}", "{a}位于{picture}的{corner}"),
    "row": ("{a}排成一行", "{a}排成一排", "{a}从左到右排开", "横着排列的{a}"),
    "column": ("{a}排成一列", "{a}从上到下排开", "{a}竖着排成一列", "竖着排列的{a}"),
    "ring": ("{a}围成一圈", "{a}排成圆环", "围成圆圈的{a}"),
    "scattered": ("{a}四处散开", "散落着{a}", "零零散散的{a}", "{a}随意散布"),
    "left": (
        "{a}在{b}的左边", "{a}在{b}左侧", "{b}在{a}的右边", "{b}在{a}右侧", "{b}的左边有{a}", "{a}的右边是{b}",
        "左边是{a}，右边是{b}", "右边是{b}，左边是{a}", "{a}在左，{b}在右", "左侧有{a}，右侧有{b}",
    ),
    "above": (
        "{a}在{b}的上方", "{a}在{b}上面", "{b}在{a}的下方", "{b}在{a}下面", "{b}的上面有{a}", "{a}的下面是{b}",
        "上面是{a}，下面是{b}", "下面是{b}，上面是{a}", "{a}在上，{b}在下", "上方有{a}，下方有{b}",
    ),
    "upper left": (
        "{a}在{b}的左上方", "{b}在{a}的右下方", "{b}的左上方有{a}", "{a}的右下方是{b}", "左上方是{a}，右下方是{b}",
        "右下角有{b}，左上角有{a}", "{a}在左上角，{b}在右下角",
    ),
    "upper right": (
        "{a}在{b}的右上方", "{b}在{a}的左下方", "{b}的右上方有{a}", "{a}的左下方是{b}", "右上方是{a}，左下方是{b}",
        "左下角有{b}，右上角有{a}", "{a}在右上角，{b}在左下角",
    ),
    "inside": ("{a}在{b}里面", "{b}里有{a}", "{b}里面画着{a}", "{a}被{b}包住", "{b}的里面是{a}"),
    "between": ("{a}在{b}之间", "{a}夹在{b}中间", "{b}中间有{a}", "{b}在{a}的两边", "{a}的左右两边是{b}"),
    "around": ("{b}围着{a}", "{a}被{b}围住", "{a}的周围有{b}", "{b}环绕着{a}", "{b}围成一圈，中间是{a}"),
    "one group": ("{a}", "有{a}", "画着{a}"),
    "two groups": ("{a}和{b}", "有{a}和{b}", "{b}和{a}", "有{b}，还有{a}", "{a}与{b}"),
}  # fmt: skip


def sentence(scene: Scene, told: Told, random: Random) -> str:
    """One Chinese caption that tells `told` of `scene`."""
    kind = told.clause(scene, CLAUSES)
    words = told.groups(scene, lambda group, colour: _noun_phrase(group, told, random, colour=colour))
    if kind == "corner":
        words |= {"corner": random.choice(CORNER_WORDS[scene.layout]), "picture": random.choice(("画面", "图"))}
    clause = random.choice(CLAUSES[kind]).format(**words)
    text = _with_background(clause, scene.background, random) if told.background else clause
    return text + "。" if random.random() < 0.25 else text


def _noun_phrase(group: Group, told: Told, random: Random, *, colour: bool = True) -> str:
    noun, measure = random.choice(NOUNS[group.shape])
    if group.count == 1:
        number = "一"
    elif told.counts:
        number = str(group.count) if random.random() < 0.15 else NUMBERS[group.count]
    else:
        number, measure = random.choice((("一些", ""), ("几", measure)))
    size = random.choice(SIZE_WORDS[group.size]) if told.sizes and group.size != "medium" else ""
    if not colour:
        return f"{number}{measure}{size}{noun}"
    word = random.choice(COLOUR_WORDS[group.colour])
    if size.endswith("的"):
        attributes = f"{size}{word}色"
    elif size and random.random() < 0.3:
        attributes = f"{size}{word}色"
    elif size:
        attributes = f"{word}色的{size}"
    else:
        short = word if word not in ("橙", "橘") else f"{word}色"
        attributes = random.choice((f"{word}色的", f"{word}色的", f"{word}色", short))
    return f"{number}{measure}{attributes}{noun}"


def phrase(group: Group, random: Random) -> str:
    """``红色的鱼``, ``五个黄色正方形``: what names the things of a group without a sentence around them."""
    noun, measure = random.choice(NOUNS[group.shape])
    colour = f"{random.choice(COLOUR_WORDS[group.colour])}色"
    return f"{colour}的{noun}" if group.count == 1 else f"{NUMBERS[group.count]}{measure}{colour}{noun}"


def _with_background(clause: str, background: str, random: Random) -> str:
    places, nouns = BACKGROUND_WORDS[background]
    place, noun = random.choice(places), random.choice(nouns)
    if clause.startswith(("有", "画着", "散落着")):
        return f"{place}{clause}"
    return random.choice(
        (
            f"{place}，{clause}",
            f"{place}，{clause}",
            f"在{place}，{clause}",
            f"{clause}，背景是{noun}",
            f"以{noun}为背景，{clause}",
        )
    )
