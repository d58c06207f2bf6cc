"""What can be swapped in an English sentence; articles, plurals and a verb right behind follow what is swapped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial

from data_tools.negatives.vocabulary import THINGS, Slot, other_colours, other_numbers, other_things

_COLOURS = {
    "red": "red", "orange": "orange", "yellow": "yellow", "green": "green", "blue": "blue", "purple": "purple", "violet": "purple",
    "white": "white", "black": "black", "grey": "grey", "gray": "grey", "pink": "pink", "brown": "brown", "golden": "gold",
    "silver": "silver",
}  # fmt: skip
_WORD_OF = {key: word for word, key in reversed(_COLOURS.items())}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# What is no attribute of anything behind it, or always of this colour.
_COLOUR = re.compile(
    rf"\b(?P<article>an?\s+)?(?P<shade>dark |light |pale |deep )?(?P<word>{'|'.join(_COLOURS)})\b"
    r"(?!\s*-)(?!\s+(?:grass|lawn|sky|water|snow|sea|ocean|sand|leaves|juice|light|house\b(?=\s+press)))",
    re.IGNORECASE,
)
_BLACK_AND_WHITE = re.compile(r"\bblack[\s-]+and[\s-]+white\b|\bblack[\s-]?&[\s-]?white\b", re.IGNORECASE)
_FRUIT_OR_METAL = ("orange", "silver", "violet")
_ATTRIBUTE = re.compile(r"\s+(?!(?:on|in|at|and|or|with|is|are|was|of|to|from|by|for|that|which|slices?)\b)[a-z]")
_SINGULAR, _PLURAL = (
    {forms[plural]: thing.key for thing in THINGS.values() for forms in thing.english} for plural in (0, 1)
)
_FORMS = {noun: forms for thing in THINGS.values() for forms in thing.english for noun in forms}
_DECOYS = (
    "hot dog", "hot dogs", "teddy bear", "teddy bears", "stuffed bear", "polar bear", "in a circle", "in circles", "times square",
    "train station", "train tracks", "train track", "bus stop", "bus station", "fire truck", "table tennis", "tennis court",
    "football field", "basketball court", "baseball cap", "baseball bat", "baseball field", "baseball player", "basketball player",
    "football player", "tennis player", "flower pot", "flower bed", "fish tank", "apple tree", "phone booth", "book store",
    "cup of", "cups of", "bed room", "tree branch", "tree trunk",
)  # fmt: skip


def _any_of(words: Iterable[str]) -> str:
    """A pattern of many words by their first letters, a quarter of the time of one behind the other; longer ones first."""
    by_letter: dict[str, list[str]] = {}
    for word in sorted(set(words), key=len, reverse=True):
        by_letter.setdefault(word[0], []).append(re.escape(word[1:]))
    return "|".join(f"{letter}(?:{'|'.join(rests)})" for letter, rests in by_letter.items())


_NOUN = re.compile(rf"\b(?:{_any_of([*_SINGULAR, *_PLURAL, *_DECOYS])})\b(?!\s*[-'’])", re.IGNORECASE)
_ADJECTIVES = rf"(?:(?:{'|'.join(_COLOURS)}|small|little|tiny|large|big|huge|young|old|tall|short|long|wooden|cute|fluffy|dark|light)\s+)*"
_COUNTED = re.compile(rf"\b(?P<number>an?|{'|'.join(_NUMBERS[1:])}|10|[2-9])\s+(?P<more>{_ADJECTIVES})$", re.IGNORECASE)
BETWEEN = re.compile(  # a colour and its thing; other colours may be said of it too
    rf"(?:\s*(?:[,/&]\s*|and\s+)+(?:(?:dark|light|pale|deep)\s+)?(?:{'|'.join(_COLOURS)})\b)*\s+{_ADJECTIVES}",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    rf"(?<![\d.,:/$-])\b(?P<number>{'|'.join(_NUMBERS[2:])}|10|[2-9])\b(?=\s+[a-z])"
    r"(?!\s+(?:am|pm|a\.m|p\.m|x|cm|mm|m|km|kg|g|ml|inch|inches|feet|foot|years?|months?|hours?|minutes?|o'clock|percent|or|to|hundred|thousand|dozen)\b)",
    re.IGNORECASE,
)
_VERB = re.compile(r"\s+(is|are|was|were|has|have)\b", re.IGNORECASE)
_VERBS = {"is": "are", "was": "were", "has": "have"}
_VERBS |= {many: one for one, many in _VERBS.items()}

_WHERE = r"\b(?:on|to|at|in|from|towards?)\s+(?:the|its|his|her|their|your|our)\s+(?:far\s+|extreme\s+|upper\s+|lower\s+|top\s+|bottom\s+)?"
_SIDES = re.compile(
    rf"{_WHERE}(left|right)\b(?!\s+(?:now|away|time|direction))|\b(left|right)(?=\s+of\b)"
    r"|\b(left|right)(?=[\s-]+(?:side|hand|corner|half|edge|arm|leg|foot|eye|ear|shoulder|lane)\b)|\b(?:top|bottom|upper|lower|far)\s+(left|right)\b",
    re.IGNORECASE,
)
_HEIGHTS = re.compile(
    r"\b(above|below|beneath|underneath|on top of)\b(?!\s+(?:all|average))|\b(under)(?=\s+(?:an?|the|its|his|her|their|some|several|\w+s|\d+)\b)"
    r"|(?<!all )(?<!hand )\b(over)(?=\s+(?:an?|two|three|four|five|six|some|several|\d+)\b)"
    r"|\b(?:at|in|on|near)\s+the\s+(top|bottom|upper|lower)\b(?!\s+of\s+(?:a|the)\s+hill)|\b(top|bottom|upper|lower)(?=\s+(?:left|right|corner|half|shelf|row)\b)",
    re.IGNORECASE,
)
_DEPTHS = re.compile(r"\b(in front of|behind)\b", re.IGNORECASE)
_INSIDES = re.compile(r"\b(inside|outside|indoors|outdoors)\b", re.IGNORECASE)
_OPPOSITE = {
    "left": "right", "right": "left", "above": "below", "below": "above", "beneath": "above", "underneath": "above", "under": "above",
    "over": "under", "on top of": "under", "top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper", "in front of": "behind",
    "behind": "in front of", "inside": "outside", "outside": "inside", "indoors": "outdoors", "outdoors": "indoors",
}  # fmt: skip
AXES = (
    (
        "left-right",
        _SIDES,
        re.compile(r"\b(?:left|right)\s*(?:and|or|to|/|&)\s*(?:the\s+)?(?:left|right)\b", re.IGNORECASE),
    ),
    (
        "up-down",
        _HEIGHTS,
        re.compile(r"above (?:the|each|one) other|top (?:to|and) bottom|bottom to top", re.IGNORECASE),
    ),
    ("front-back", _DEPTHS, re.compile(r"(?:behind|in front of) (?:the|each|one) (?:an)?other", re.IGNORECASE)),
    ("in-out", _INSIDES, re.compile(r"inside and out|inside out", re.IGNORECASE)),
)
SEPARATORS = re.compile(r"[,，;；.]|\band\b|\bwith\b")
ANOTHER = re.compile(r"\b(?:another|other|others|each other|opposite|next to each)\b", re.IGNORECASE)


# Without case a pattern takes these for i and s: what it finds with them is no word that is known.
_LOOKALIKES = re.compile("[ıİſ]")


def slots(text: str) -> Iterator[Slot]:
    if _LOOKALIKES.search(text):
        return
    yield from _colours(text)
    yield from _numbers(text)
    yield from _positions(text)
    yield from _things(text)


def _as_written(said: str, word: str) -> str:
    return word[:1].upper() + word[1:] if said[:1].isupper() else word


def _article(text: str, start: int, word: str) -> str:
    """What stands before `start`, its last article as `word` wants it."""
    found = re.search(r"\b(an?)(\s+)$", text[:start], re.IGNORECASE)
    if found is None:
        return text[:start]
    return text[: found.start()] + _as_written(found[1], _a(word)) + found[2]


def _a(word: str) -> str:
    return "an" if word[0].lower() in "aeiou" else "a"


def _colours(text: str) -> Iterator[Slot]:
    together = [match.span() for match in _BLACK_AND_WHITE.finditer(text)]
    for match in _COLOUR.finditer(text):
        said, (start, stop) = match["word"], match.span("word")
        word = said.lower()
        if said[0].isupper() and start:
            continue
        if word in _FRUIT_OR_METAL and not _ATTRIBUTE.match(text, stop):
            continue
        key = _COLOURS[word]
        others = () if any(begin <= start < end for begin, end in together) else other_colours(key)
        if match["shade"]:
            others = tuple(other for other in others if other not in ("white", "black", "gold", "silver"))
        yield Slot("colour", key, others, partial(_put_colour, text, start, stop), (start, stop))


def _put_colour(text: str, start: int, stop: int, other: str) -> str:
    return _put_word(text, start, stop, _WORD_OF[other])


def _put_word(text: str, start: int, stop: int, word: str) -> str:
    return _article(text, start, word) + _as_written(text[start:stop], word) + text[stop:]


def _numbers(text: str) -> Iterator[Slot]:
    met: set[int] = set()
    for key, start, stop in nouns(text):
        before, noun = _counted(text, start), text[start:stop].lower()
        if before is None:
            continue
        met.add(before.start("number"))
        number = _number(before["number"])
        if noun not in (_SINGULAR if number == 1 else _PLURAL) or (number == 1 and THINGS[key].groups == "clothing"):
            continue
        yield Slot("number", str(number), other_numbers(number), partial(_put_counted, text, before, start, stop))
    for match in _NUMBER.finditer(text):
        if match.start() not in met:
            number = _number(match["number"])
            others = tuple(other for other in other_numbers(number) if other != "1")
            yield Slot("number", str(number), others, partial(_put_number, text, *match.span()))


def _counted(text: str, start: int) -> re.Match[str] | None:
    """Number and adjectives right before a noun."""
    return _COUNTED.search(text, max(start - 40, 0), start)


def _number(said: str) -> int:
    said = said.lower()
    return 1 if said in ("a", "an") else int(said) if said.isdigit() else _NUMBERS.index(said)


def _put_number(text: str, start: int, stop: int, other: str) -> str:
    said = text[start:stop]
    return text[:start] + _as_written(said, other if said.isdigit() else _NUMBERS[int(other)]) + text[stop:]


def _put_counted(text: str, before: re.Match[str], start: int, stop: int, other: str) -> str:
    """The number of a thing that is known: its noun, and the verb of the sentence's first, follow."""
    said, more, noun, tail = before["number"], before["more"], text[start:stop].lower(), text[stop:]
    many = other != "1"
    word = _a(more or noun) if not many else other if said.isdigit() else _NUMBERS[int(other)]
    if before.start() == 0 and many != (_number(said) > 1) and (verb := _VERB.match(tail)):
        tail = tail[: verb.start(1)] + _VERBS[verb[1].lower()] + tail[verb.end() :]
    return (
        text[: before.start()]
        + _as_written(said, word)
        + text[before.end("number") : start]
        + _FORMS[noun][many]
        + tail
    )


def _positions(text: str) -> Iterator[Slot]:
    for axis, words, both in AXES:
        if words.search(text) and not both.search(text):
            yield Slot("position", axis, (axis,), partial(_put_opposites, text, words))


def _put_opposites(text: str, words: re.Pattern[str], _: str) -> str:
    new, last = "", 0
    for match in words.finditer(text):
        group = match.lastindex or 0
        said, (start, stop) = match[group], match.span(group)
        new += text[last:start] + _as_written(said, _OPPOSITE[said.lower()])
        last = stop
    return new + text[last:]


@lru_cache(maxsize=4)  # one sentence is asked three times
def nouns(text: str) -> tuple[tuple[str, int, int], ...]:
    """(key, start, stop) of every thing that is named."""
    named = (
        (_SINGULAR.get(match[0].lower()) or _PLURAL.get(match[0].lower()), match) for match in _NOUN.finditer(text)
    )
    return tuple((key, *match.span()) for key, match in named if key is not None)


def phrases(text: str) -> list[str]:
    """Things with number and attributes, as far as they are said: two alike are told apart by nothing."""
    found = []
    for _, start, stop in nouns(text):
        before = _counted(text, start)
        found.append(text[before.start() if before else start : stop].lower())
    return found


def _things(text: str) -> Iterator[Slot]:
    for key, start, stop in nouns(text):
        yield Slot("object", key, other_things(key), partial(_put_thing, text, key, start, stop), (start, stop))


def _put_thing(text: str, key: str, start: int, stop: int, other: str) -> str:
    noun, counted = text[start:stop].lower(), _counted(text, start)
    many = noun not in _SINGULAR or (counted is not None and _number(counted["number"]) > 1)
    forms = THINGS[other].english
    form = next(number for number, each in enumerate(THINGS[key].english) if noun in each)
    return _put_word(text, start, stop, forms[form % len(forms)][many])
