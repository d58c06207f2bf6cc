"""Tables of pairs against a dictionary and a loop: tokens, places, keys and counts, however the pairs lie."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

import cnclip_ft.data.ids as ids_module
import cnclip_ft.data.pair_tables as pair_tables
import cnclip_ft.data.pairs as pairs_module
from cnclip_ft.data.mixture import Mixture, Part
from cnclip_ft.data.pair_tables import Making
from cnclip_ft.data.pairs import build_table
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from data_tools.joining import join
from data_tools.language import detect_language
from data_tools.shards import open_pairs
from data_tools.store import StoreWriter, open_store
from tests.data.test_same_texts import Dictionary
from tests.data_tools.samples import picture
from tests.data_tools.shard_samples import samples, write_tar

TEXTS = [
    "一只狗",
    "一只“狗”",
    "A Dog",
    "a dog",
    "a dog ",
    "T恤 24码",
    "\u200b",
    "。",
    "É\u0301t",
    "🐶",
    "狗" * 60,
    "x" * 300,
    "a\nb",
]


def write(folder, kind: str, count: int = 150, seed: int = 0, **options):
    chance = random.Random(seed)

    def named(number):
        return number if kind == "numbers" or (kind == "both" and number % 2) else f"图{number}"

    with StoreWriter(folder, **options) as writer:
        for image in range(30):
            writer.add_image(named(image), picture(image))
        for number in range(count):
            text_id = chance.choice([number, chance.randint(0, count)])  # some texts stand on several pictures
            text = TEXTS[text_id % len(TEXTS)] if text_id % 3 else f"{TEXTS[text_id % len(TEXTS)]} {text_id}"
            writer.add_pair(named(chance.randint(0, 29)), named(text_id), text, [None, "zh", "mixed"][text_id % 3])
        writer.finish()
    return open_store(folder)


def plain(store, tokenizer):
    """The table's arrays and counts by a loop over `pairs`."""
    images = {image_id: place for place, image_id in enumerate(store.image_ids)}
    known, keys, image_keys, ids, said, spoken = Dictionary(), [], [], [], Counter(), Counter()
    for pair in store.pairs():
        keys.append(known.key(pair.text_id, tokenizer.prepare(pair.text)))
        image_keys.append(images[pair.image_id])
        ids.append(tokenizer.encode([pair.text])[0])
        said[pair.language or ""] += 1
        spoken[pair.language or detect_language(pair.text) or ""] += 1
    return {
        "tokens": [one for each in ids for one in each],
        "starts": [0, *np.cumsum(list(map(len, ids)))],
        "image_keys": image_keys,
        "text_keys": known.resolve(np.array(keys)),
    }, (sum(len(each) == tokenizer.context_length for each in ids), said, spoken)


@pytest.fixture(params=["numbers", "words", "both", "official", "shards", "joined", "tars", "mixture"])
def source(request, tmp_path):
    kind = request.param
    if kind == "official":
        return write(tmp_path / "s", "numbers", layout="official")
    if kind == "shards":
        return write(tmp_path / "s", "numbers", shard_size=7)
    if kind == "joined":
        for part in range(2):
            with StoreWriter(tmp_path / f"{part}") as writer:
                for number in range(40 * part, 40 * part + 40):
                    writer.add_image(number, picture(number))
                    writer.add_pair(number, number, TEXTS[number % len(TEXTS)], None)
                writer.finish()
        return join([tmp_path / "0", tmp_path / "1"], tmp_path / "all.yaml")[0]
    if kind == "tars":
        for part in range(2):
            write_tar(tmp_path / f"t/{part}.tar", samples(20 * part, 20, captions=3))
        return open_pairs(tmp_path / "t")
    if kind == "mixture":
        parts = [write(tmp_path / f"m{part}", ("numbers", "both")[part], 60, seed=part) for part in range(2)]
        return Mixture([Part(parts[0]), Part(parts[1], 2.0, "en")])
    return write(tmp_path / "s", kind)


@pytest.mark.parametrize("colliding", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_table_is_that_of_a_loop(tmp_path, monkeypatch, source, kept, colliding):
    monkeypatch.setattr(pairs_module, "KEPT_FROM", 0)
    monkeypatch.setattr(pair_tables, "BLOCK", 40)
    monkeypatch.setattr(Making.__init__, "__defaults__", (40,))
    if colliding:
        monkeypatch.setattr(ids_module, "hash_of", lambda text: len(text) % 3)
        monkeypatch.setattr(pair_tables, "hash_of", lambda text: len(text) % 3)
    tokenizer = TextTokenizer(context_length=12)
    table = build_table(source, tokenizer, place=tmp_path / "cache" if kept else None)
    arrays, counts = plain(source, tokenizer)
    for name, expected in arrays.items():
        assert np.array_equal(getattr(table, name), expected), name
    assert (table.cut, table.languages, table.spoken) == counts


def test_a_run_of_pairs_is_those_pairs(source):
    if isinstance(source, Mixture):
        expected = list(source.pairs())
    else:
        expected = [source[number] for number in range(len(source))]
        assert list(source.pairs()) == expected
    told = [(pair.image_id, pair.text_id, pair.text, pair.language) for pair in expected]
    count = len(told)
    for start, stop in [
        (0, count),
        (0, 1),
        (count - 1, count),
        (3, 3),
        (5, 41),
        (39, count),
        (count // 2, count // 2 + 9),
    ]:
        assert [tuple(fields) for fields in source.fields(start, stop)] == told[start:stop]
