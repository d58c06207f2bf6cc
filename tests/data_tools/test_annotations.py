"""The official source files: every line becomes an item or a fault, whatever is in it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.annotations import parse_image, parse_text, read_images, read_lines, read_texts
from data_tools.build import build_split
from data_tools.errors import DataFault
from data_tools.items import ImageItem, TextItem
from data_tools.store import layouts, open_store
from tests.data_tools.samples import picture, text_row

FILE = Path("train_texts.jsonl")
GOOD = text_row(1, "一只狗", [5, "a.jpg"], language="zh")
IMAGE = b"5\t" + base64.b64encode(picture(5))


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        (b"{", "bad-json", "column 2"),
        (b'{"text_id": 1,}', "bad-json", "column"),
        (b"[1, 2]", "bad-json", "list"),
        (b"null", "bad-json", "NoneType"),
        (b"[" * 100_000, "bad-json", "broken JSON"),
        (b'{"text_id": ' + b"9" * 5000 + b"}", "bad-json", "digits"),
        (text_row(10**30, "a", []), "bad-id", "64 bits"),
        (text_row(True, "a", []), "bad-id", "bool"),
        (text_row(1.5, "a", []), "bad-id", "float"),
        (text_row("", "a", []), "bad-id", "text_id"),
        (text_row(None, "a", []), "bad-id", "NoneType"),
        (text_row([1], "a", []), "bad-id", "list"),
        (text_row(1, "", []), "empty-text", "empty"),
        (text_row(1, " \t\n", []), "empty-text", "empty"),
        (text_row(1, 5, []), "bad-text", "int"),
        (b'{"text_id": 1, "text": "\\ud83d", "image_ids": []}', "bad-text", "half a character"),
        (b'{"text_id": 1, "text": "a\\u0000b", "image_ids": []}', "bad-text", "NUL"),
        (b'{"text_id": 1, "text": "a\0b"}', "bad-json", "control"),
        (b'{"text_id": 1, "image_ids": []}', "missing-field", "'text'"),
        (b'{"text": "a"}', "missing-field", "'text_id'"),
        (b"{}", "missing-field", "none"),
        (text_row(1, "a", 5), "bad-field", "int"),
        (text_row(1, "a", "5"), "bad-field", "str"),
        (text_row(1, "a", [5, 5]), "bad-field", "twice"),
        (text_row(1, "a", [None]), "bad-id", "image id"),
        (text_row(1, "a", [], language="xx"), "bad-language", "'xx'"),
        (text_row(1, "a", [], language=5), "bad-language", "5"),
        ("一只狗".encode("gb18030"), "not-utf8", "GBK: '一只狗'"),
        ("一只狗".encode("utf-16"), "not-utf8", "UTF-16"),
        (b"\xff", "not-utf8", "0xff"),
    ],
)
def test_faults_of_a_text_line(line: bytes, kind: str, says: str) -> None:
    with pytest.raises(DataFault) as caught:
        parse_text(line)
    assert caught.value.kind == kind and says in str(caught.value) and caught.value.mend


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"5", "bad-tsv"),
        (b"5 " + IMAGE[2:], "bad-tsv"),
        (b"\t" + IMAGE[2:], "bad-id"),
        (b"5\t", "bad-base64"),
        (b"5\t  ", "bad-base64"),
        (b"x" * 501 + b"\tAAAA", "bad-id"),
        ("一只狗".encode("gb18030") + b"\tAAAA", "not-utf8"),
    ],
)
def test_faults_of_an_image_line(line: bytes, kind: str) -> None:
    with pytest.raises(DataFault) as caught:
        parse_image(line)
    assert caught.value.kind == kind and caught.value.mend


@pytest.mark.parametrize("decode", [layouts._strict_decode, layouts._strict_decode_slowly])
@pytest.mark.parametrize(
    "data",
    [b"!" + IMAGE[3:], IMAGE[2:-1], IMAGE[2:-5] + "图".encode(), b"AAA", b"A" * 7, IMAGE[2:40] + b" " + IMAGE[40:]],
)
def test_damaged_base64_is_a_fault_of_its_image(monkeypatch, data: bytes, decode) -> None:
    monkeypatch.setattr(layouts, "_strict_decode", decode)
    item = next(read_images(io.BytesIO(b"5\t" + data), FILE))
    assert isinstance(item, ImageItem)
    with pytest.raises(DataFault, match="base64") as caught:
        item.read()
    assert (caught.value.line, caught.value.item_id) == (1, 5)


@pytest.mark.parametrize("decode", [layouts._strict_decode, layouts._strict_decode_slowly])
@pytest.mark.parametrize("length", [766, 767, 768])
def test_both_base64_alphabets_are_read(monkeypatch, decode, length: int) -> None:
    """With the fast library and without."""
    monkeypatch.setattr(layouts, "_strict_decode", decode)
    data = (bytes(range(256)) * 3)[:length]
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        item = next(read_images(io.BytesIO(b"7\t" + encode(data)), FILE))
        assert isinstance(item, ImageItem) and item.read() == data and item.image_id == 7


def test_line_ends_marks_and_blank_lines() -> None:
    text = b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + text_row(2, "b", []) + b"\r\n" + text_row(3, "c", [])
    items = list(read_texts(io.BytesIO(text), FILE))
    assert [(item.text_id, item.line) for item in items] == [(1, 1), (2, 4), (3, 5)]
    assert items[0] == TextItem(1, "一只狗", [5, "a.jpg"], "zh", FILE, 1)


def test_an_endless_line_costs_no_memory_and_one_fault() -> None:
    found = list(read_lines(io.BytesIO(b"x" * 1000 + b"\nshort\n" + b"y" * 500), longest=100))
    assert [(number, getattr(line, "kind", line)) for number, line in found] == [
        (1, "line-too-long"),
        (2, b"short"),
        (3, "line-too-long"),
    ]


# Ten thousand damaged lines: each test below draws 100 examples of up to 50 lines and more, in two kinds of file.
def _damage(line: bytes) -> st.SearchStrategy[bytes]:
    cut = st.integers(0, len(line)).map(lambda end: line[:end])
    insert = st.tuples(st.integers(0, len(line)), st.binary(min_size=1, max_size=6)).map(
        lambda at: line[: at[0]] + at[1] + line[at[0] :]
    )
    flip = st.tuples(st.integers(0, len(line) - 1), st.integers(0, 255)).map(
        lambda at: line[: at[0]] + bytes([at[1]]) + line[at[0] + 1 :]
    )
    return st.one_of(cut, insert, flip)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud83d", "\0", "", 1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
_ROWS = st.fixed_dictionaries(
    {}, optional={"text_id": _VALUES, "text": _VALUES, "image_ids": _VALUES, "language": _VALUES}
)
_TEXT_LINES = st.one_of(
    st.just(GOOD),
    _damage(GOOD),
    _ROWS.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=30),
    st.text(max_size=12).map(lambda text: text.encode("gb18030", "replace")),
    st.just(b"\xef\xbb\xbf" + GOOD),
)
_SMALL = base64.b64encode(b"small picture")
_IMAGE_LINES = st.one_of(st.just(b"5\t" + _SMALL), _damage(b"5\t" + _SMALL), st.binary(max_size=30))
_LINE_ENDS = st.sampled_from([b"\n", b"\r\n"])


def _file(lines: list[tuple[bytes, bytes]]) -> tuple[bytes, int]:
    """The file and how many lines in it hold something."""
    data = b"".join(line + end for line, end in lines)
    text = data.removeprefix(b"\xef\xbb\xbf")
    return data, sum(1 for line in text.split(b"\n") if line.strip())


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(_TEXT_LINES, _LINE_ENDS), min_size=50, max_size=60))
def test_no_text_line_is_lost_and_none_breaks_the_reader(lines) -> None:
    data, read = _file(lines)
    items = list(read_texts(io.BytesIO(data), FILE))
    accepted = [item for item in items if isinstance(item, TextItem)]
    faults = [item for item in items if isinstance(item, DataFault)]
    assert len(accepted) + len(faults) == len(items) == read
    assert all(fault.file == str(FILE) and fault.line and fault.mend and fault.kind for fault in faults)
    assert all(item.text.strip() and item.text.encode() and "\0" not in item.text for item in accepted)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(_IMAGE_LINES, _LINE_ENDS), min_size=50, max_size=60))
def test_no_image_line_is_lost_and_none_breaks_the_reader(lines) -> None:
    data, read = _file(lines)
    items = list(read_images(io.BytesIO(data), FILE))
    assert len(items) == read
    for item in items:
        if isinstance(item, ImageItem):
            try:
                item.read()
            except DataFault as fault:
                assert fault.kind == "bad-base64" and fault.line == item.line


_IDS = st.integers(1, 6) | st.sampled_from(["1", "x", 2**63, -1])


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(_IDS, st.booleans()), min_size=1, max_size=10),
    st.lists(
        st.one_of(
            _TEXT_LINES,
            st.tuples(_IDS, st.sampled_from("ab"), st.lists(_IDS, max_size=3)).map(lambda row: text_row(*row)),
        ),
        max_size=20,
    ),
)
def test_a_build_accounts_for_every_line(tmp_path_factory, images, texts) -> None:
    """With duplicate ids, missing partners and broken pictures: what is in the store and what is in the list is all there was."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = [
        b"%s\t%s" % (str(image_id).encode(), base64.b64encode(picture(n) if good else b"no picture"))
        for n, (image_id, good) in enumerate(images)
    ]
    rows.append(b"99\t" + base64.b64encode(picture(99)))
    texts = [*texts, text_row("good", "a good line", [99])]
    (folder / "train_imgs.tsv").write_bytes(b"\n".join(rows))
    data = b"\n".join(texts)
    (folder / "train_texts.jsonl").write_bytes(data)

    report = build_split(folder, "train", on_error="skip", progress=False)
    store = open_store(folder / "train")
    listed = []
    if report.faults:
        listed = [json.loads(line) for line in (folder / "train" / "faults.jsonl").read_text("utf-8").splitlines()]
    assert sum(report.faults.values()) == len(listed)
    image_faults = [fault for fault in listed if fault["file"].endswith("imgs.tsv")]
    assert len(store.image_ids) + len(image_faults) == len(rows)
    faulty_lines = {fault["line"] for fault in listed if fault["file"].endswith("texts.jsonl")}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip() and number not in faulty_lines:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            assert any(pair.text == row["text"] for pair in store.pairs()) or any(
                text == row["text"] for _, text, _ in store.lone_texts
            )
    store.close()
