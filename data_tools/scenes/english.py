"""The English grammar: articles, plurals, adjective order, relations from both sides."""

from __future__ import annotations

from random import Random

from data_tools.scenes.vocabulary import Group, Scene, Told

# Shape → (singular, plural), one of them at random.
NOUNS = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"),),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"), ("five-pointed star", "five-pointed stars")),
    "heart": (("heart", "hearts"),),
    "moon": (("moon", "moons"), ("crescent moon", "crescent moons"), ("crescent", "crescents")),
    "flower": (("flower", "flowers"), ("blossom", "blossoms")),
    "fish": (("fish", "fish"),),
    "house": (("house", "houses"),),
    "umbrella": (("umbrella", "umbrellas"),),
}
COLOUR_WORDS = {"purple": ("purple", "violet")}  # other colours have one word, their name
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

BACKGROUND_WORDS = {
    "grass": ("on the grass", "on a lawn", "on green grass"),
    "night": ("in the night sky", "against a starry sky", "at night"),
    "snow": ("in the snow", "on a field of snow"),
    "sea": ("on the sea", "on the water", "on the ocean"),
    "beach": ("on the beach", "on the sand"),
    "wall": ("on a brick wall", "in front of a brick wall"),
    "paper": ("on squared paper", "on graph paper"),
    "floor": ("on a wooden floor", "on wooden boards"),
    "sunset": ("at sunset", "in the evening sky", "against a sunset sky"),
    "pavement": ("on the pavement", "on paving stones"),
    "wallpaper": ("on pink wallpaper", "on dotted wallpaper"),
    "blackboard": ("on a blackboard", "on the chalkboard"),
}
CORNER_WORDS = {
    "centre": ("in the middle", "in the centre", "at the center of the picture"),
    "top left": ("in the top left corner", "at the upper left"),
    "top right": ("in the top right corner", "at the upper right"),
    "bottom left": ("in the bottom left corner", "at the lower left"),
    "bottom right": ("in the bottom right corner", "at the lower right"),
}
# {a}: the first group, {b}: the second.
CLAUSES = {
    "corner": ("{a} {corner}", "{corner}, {a}", "there is {a} {corner}"),
    "row": ("{a} in a row", "{a} lined up in a row", "{a} side by side"),
    "column": ("{a} in a column", "{a} stacked in a column", "{a} one above the other"),
    "ring": ("{a} in a circle", "a ring of {a}", "{a} forming a ring"),
    "scattered": ("{a} scattered about", "{a} scattered over the picture", "{a} spread out here and there"),
    "left": (
        "{a} to the left of {b}", "{a} left of {b}", "{b} to the right of {a}", "{b} right of {a}",
        "{a} on the left and {b} on the right", "on the left {a}, on the right {b}", "{b} with {a} on the left",
    ),
    "above": (
        "{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}", "{a} at the top and {b} at the bottom",
        "at the top {a}, at the bottom {b}", "{b} beneath {a}",
    ),
    "upper left": (
        "{a} at the upper left of {b}", "{b} at the lower right of {a}", "{a} above and to the left of {b}",
        "{a} in the top left corner and {b} in the bottom right corner", "at the upper left {a}, at the lower right {b}",
    ),
    "upper right": (
        "{a} at the upper right of {b}", "{b} at the lower left of {a}", "{a} above and to the right of {b}",
        "{a} in the top right corner and {b} in the bottom left corner", "at the upper right {a}, at the lower left {b}",
    ),
    "inside": ("{a} inside {b}", "{a} in {b}", "{b} with {a} inside", "{b} containing {a}"),
    "between": ("{a} between {b}", "{b} with {a} in between", "{b} on either side of {a}"),
    "around": ("{b} around {a}", "{a} surrounded by {b}", "{b} in a ring around {a}", "{a} encircled by {b}"),
    "one group": ("{a}", "a picture of {a}", "a drawing of {a}"),
    "two groups": ("{a} and {b}", "{b} and {a}", "a picture of {a} and {b}", "{b} together with {a}"),
}  # fmt: skip


def sentence(scene: Scene, told: Told, random: Random) -> str:
    """One English caption that tells `told` of `scene`."""
    kind = told.clause(scene, CLAUSES)
    words = told.groups(scene, lambda group, colour: _noun_phrase(group, told, random, colour=colour))
    if kind == "corner":
        words["corner"] = random.choice(CORNER_WORDS[scene.layout])
    text = random.choice(CLAUSES[kind]).format(**words)
    if told.background:
        place = random.choice(BACKGROUND_WORDS[scene.background])
        text = random.choice((f"{text} {place}", f"{text}, {place}", f"{place}, {text}"))
    return text[0].upper() + text[1:] + random.choice(("", "."))


def _noun_phrase(group: Group, told: Told, random: Random, *, colour: bool = True) -> str:
    words = []
    if told.sizes and group.size != "medium":
        words.append(random.choice(SIZE_WORDS[group.size]))
    if colour:
        words.append(random.choice(COLOUR_WORDS.get(group.colour, (group.colour,))))
    words.append(random.choice(NOUNS[group.shape])[group.count > 1])
    if group.count == 1:
        number = "an" if words[0][0] in "aeiou" else "a"
    elif told.counts:
        number = str(group.count) if random.random() < 0.15 else NUMBERS[group.count]
    else:
        number = random.choice(("some", "several"))
    return " ".join((number, *words))


def phrase(group: Group, random: Random) -> str:
    """``the red fish``, ``five yellow squares``: what names the things of a group without a sentence around them."""
    colour = random.choice(COLOUR_WORDS.get(group.colour, (group.colour,)))
    noun = random.choice(NOUNS[group.shape])[group.count > 1]
    return f"the {colour} {noun}" if group.count == 1 else f"{NUMBERS[group.count]} {colour} {noun}"
