"""Pickles of strangers: plain data is read, everything else is refused within a moment and a few megabytes."""

from __future__ import annotations

import io
import pickle
import random
import time
import tracemalloc
from collections import OrderedDict

import pytest

from data_tools.plain_pickle import PlainUnpickler, ordinary_triple

PLAIN = [
    7,
    -(2**63),
    2.5,
    "一只狗",
    b"ab",
    None,
    True,
    (1, "2", ("a", ["b", {}])),
    {"a": 1, 3: [None], None: (), True: 2},
    "x" * 60_000,
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_plain_data_is_read_as_it_was_written(value, protocol):
    reader = PlainUnpickler(io.BytesIO(pickle.dumps(value, protocol)))
    if protocol < 3 and isinstance(value, bytes):  # a call of a function, then
        with pytest.raises(pickle.UnpicklingError, match="_codecs.encode"):
            reader.load()
    else:
        assert reader.load() == value


HOSTILE = {
    "tuple of itself as a key": b"\x80\x04}K\x01" + b"2\x86" * 60 + b"Ns.",
    "the same by the memo": b"\x80\x02}K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"K\x01s.",
    "in a dict by marks": b"\x80\x04(K\x01" + b"2\x86" * 60 + b"Nd.",
    "numbers of one hash": b"\x80\x04}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 40_000)) + b"u.",
    "floats as keys": b"\x80\x04}G" + bytes(8) + b"Ns.",
    "gigabytes of bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f.",
    "four gigabytes": b"\x80\x04B\xff\xff\xff\xff.",
    "gigabytes of text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x3f.",
    "a frame of gigabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x3f.",
    "a bytearray": b"\x80\x05\x96" + b"\xff" * 4 + bytes(4) + b".",
    "a number of the registry": b"\x80\x02\x82\x01.",
    "a function": b"cos\nsystem\n(S'true'\ntR.",
    "a class": b"(ios\nsystem\n.",
    "something outside": b"Pelse\n.",
    "digits without end": b"I" + b"1" * 200_000 + b"\n.",
    "steps without end": b"]0" * 3_000_000 + b".",
    "no end": b"\x80\x04",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_at_once(name):
    begun = time.perf_counter()
    with pytest.raises((pickle.UnpicklingError, EOFError, ValueError)):
        PlainUnpickler(io.BytesIO(HOSTILE[name])).load()
    assert time.perf_counter() - begun < 15


def test_a_number_of_the_memo_takes_no_memory():
    tracemalloc.start()
    assert PlainUnpickler(io.BytesIO(b"\x80\x04Nr\xff\xff\xff\xff.")).load() is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_sets_are_lists_and_other_dicts_are_refused():
    assert PlainUnpickler(io.BytesIO(pickle.dumps({1, 2}, 4))).load() == [1, 2]
    with pytest.raises(pickle.UnpicklingError, match="collections.OrderedDict"):
        PlainUnpickler(io.BytesIO(pickle.dumps(OrderedDict(a=1)))).load()


IDS = (0, 255, 256, 65_535, 65_536, 2**31, -1, -(2**63), 2**63 - 1, "7", "狗", "x" * 255)
TRIPLES = [
    (one, two, text) for one, two in zip(IDS, IDS[::-1], strict=True) for text in ("", "一只狗", "a" * 255, "长" * 300)
]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps], ids=["C", "Python"])
def test_ordinary_triples_are_read_straight_through(protocol, dumps):
    for triple in TRIPLES:
        assert ordinary_triple(dumps(triple, protocol)) == triple


def test_what_is_read_straight_through_is_what_the_machine_reads():
    draw, same = random.Random(0), 0
    for _ in range(40_000):
        data = bytearray(pickle.dumps(draw.choice(TRIPLES[::2]), draw.randrange(2, 6)))
        for _ in range(draw.randrange(1, 3)):
            data[draw.choice((draw.randrange(len(data)), draw.randrange(min(len(data), 20))))] = draw.randrange(256)
        found = ordinary_triple(bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))]))
        if found is not None:
            same += 1
            read = PlainUnpickler(io.BytesIO(data)).load()
            assert read == found and list(map(type, read)) == list(map(type, found))
    assert same > 1000


@pytest.mark.parametrize(
    "value",
    [
        ("a", "b"),
        ("a", "b", 3),
        ("", 1, "t"),
        (2**64, 1, "t"),
        (True, 1, "t"),
        (1.5, 1, "t"),
        ["a", "b", "c"],
        ("x" * 256, 1, "t"),
        None,
    ],
    ids=str,
)
def test_anything_else_is_left_to_the_machine(value):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert ordinary_triple(pickle.dumps(value, protocol)) is None
        assert ordinary_triple(pickle.dumps((1, 2, "t"), protocol) + b".") is None
