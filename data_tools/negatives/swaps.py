"""Sentence → what can be swapped in it, and some of that by chance."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random
from types import ModuleType

from data_tools.language import detect_language
from data_tools.negatives import chinese, english
from data_tools.negatives.vocabulary import KINDS, Kind, Slot

Mention = tuple[str, ...]  # `mentioned`

_END = re.compile(r"[\s。.!！?？]+$")


def slots_of(text: str, kinds: Collection[Kind] = KINDS, known: Collection[Mention] | None = None) -> list[Slot]:
    """What of `text` can be swapped; empty where nothing can.

    Args:
        kinds: of attributes.
        known: what may be put in, as `mentioned` names it; None: anything. With that of all captions no negative is known by a word
            that no caption has, or by a thing in a colour that no caption gives it: such a sentence would be told from a caption
            without the picture (SugarCrepe, arXiv 2306.14610), and a model would unlearn the thing in that colour.
    """
    language = detect_language(text)
    if language is None:
        return []
    grammar = english if language == "en" else chinese
    return [
        slot
        for found in _tied(list(grammar.slots(text)), text, grammar)
        if found.kind in kinds and (slot := _usable(found, text, grammar, known)).others
    ]


def mentioned(text: str) -> set[Mention]:
    """(kind, key) of what is said in `text`, of positions the axes; ("colour", key, thing) of a thing in its colour."""
    slots = slots_of(text)
    coloured = {("colour", colour, slot.key) for slot in slots if slot.kind == "object" for colour in slot.beside}
    return {(slot.kind, slot.key) for slot in slots} | coloured


def draw(slots: Sequence[Slot], count: int, random: Random) -> list[tuple[Kind, str]]:
    """At most `count` different sentences, (what was swapped, sentence): from kind to kind, from place to place, in random order."""
    waiting: dict[Kind, list[tuple[Slot, list[str]]]] = {}
    for slot in slots:
        waiting.setdefault(slot.kind, []).append((slot, list(slot.others)))
    found: dict[str, Kind] = {}
    kinds = random.sample(list(waiting), len(waiting))
    for places in waiting.values():
        random.shuffle(places)
    while kinds and len(found) < count:
        kind = kinds.pop(0)
        slot, others = waiting[kind].pop(0)
        found.setdefault(slot.put(others.pop(random.randrange(len(others)))), kind)
        if others:
            waiting[kind].append((slot, others))
        if waiting[kind]:
            kinds.append(kind)
    return [(kind, text) for text, kind in found.items()]


def _tied(slots: list[Slot], text: str, grammar: ModuleType) -> list[Slot]:
    """Colours and the thing right behind them know of each other; none is put beside itself."""
    things = [number for number, slot in enumerate(slots) if slot.kind == "object"]
    colours: dict[int, list[int]] = {}
    for number, slot in enumerate(slots):
        if slot.kind == "colour":
            stop = slot.span[1]
            thing = next((each for each in things if slots[each].span[0] >= stop), None)
            if thing is not None and grammar.BETWEEN.fullmatch(text, stop, slots[thing].span[0]):
                colours.setdefault(thing, []).append(number)
    for thing, found in colours.items():
        keys = tuple(slots[number].key for number in found)
        for number in found:
            others = tuple(other for other in slots[number].others if other not in keys)
            slots[number] = replace(slots[number], others=others, beside=(slots[thing].key,))
        slots[thing] = replace(slots[thing], beside=keys)
    return slots


def _usable(slot: Slot, text: str, grammar: ModuleType, known: Collection[Mention] | None) -> Slot:
    """Without what may not be put in, and without sentences that say the same."""
    if slot.kind != "position":
        return (
            slot if known is None else replace(slot, others=tuple(o for o in slot.others if _is_known(slot, o, known)))
        )
    same = _symmetric(text, grammar) or _parts(slot.put(slot.key), grammar) == _parts(text, grammar)
    return replace(slot, others=()) if same else slot


def _is_known(slot: Slot, other: str, known: Collection[Mention]) -> bool:
    if not slot.beside:
        return (slot.kind, other) in known
    return all(("colour", *((other, it) if slot.kind == "colour" else (it, other))) in known for it in slot.beside)


def _symmetric(text: str, grammar: ModuleType) -> bool:
    """Whether places say nothing: of two things alike either may be the left one."""
    phrases = grammar.phrases(text)
    return len(set(phrases)) < len(phrases) or bool(grammar.ANOTHER.search(text))


def _parts(text: str, grammar: ModuleType) -> list[str]:
    """What is said, whatever the order."""
    parts = (part.strip() for part in grammar.SEPARATORS.split(_END.sub("", text.lower())))
    return sorted(part for part in parts if part)
