"""Parallel text: tables with a column for each language, JSONL, or TMX (translation memories) → rows of texts without pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.parsers import expat

from data_tools.annotations import check_text, parse_json
from data_tools.errors import DataFault, RequestError
from data_tools.items import Item, Stream, TextItem, fingerprint_of, located
from data_tools.language import LANGUAGES
from data_tools.parallel import language_code, text_id
from data_tools.regular import regular
from data_tools.sources.separated import find_dialect, records
from data_tools.text_files import AUTO, TextFile

SUFFIXES = (".tsv", ".csv", ".txt", ".jsonl", ".tmx")
_ROW = "A row has the same sentence in two languages or more."
_CHUNK = 2**16
_LONGEST_UNIT = 2**24  # characters
_CODES = ("bpt", "ept", "it", "ph", "ut")  # elements of TMX that hold markup of the translated document, not text
Row = dict[str, Any] | DataFault


class ParallelSource:
    """Rows of all files, counted on; every row gives a text for each of its languages.

    Args:
        columns: those that hold the languages, by name (`en`, `zh-CN`, `中文`); none: every column that names one.

    Raises:
        RequestError: a file that is not there or of another kind.
    """

    kind = "parallel"

    def __init__(self, files: Sequence[Path], columns: Sequence[str] = (), encoding: str = AUTO) -> None:
        self.files, self.columns, self.encoding = list(files), tuple(columns), encoding
        for name in columns:
            if language_code(name) is None:
                raise RequestError(f"--text-column {name}: no language is called so; give codes like en, zh, ja")
        for file in self.files:
            if file.suffix.lower() not in SUFFIXES:
                raise RequestError(
                    f"{file}: parallel text is read from {', '.join(SUFFIXES)}: a column for each language, an object a line with "
                    "a key for each language, or a translation memory"
                )

    def fingerprint(self) -> dict[str, Any]:
        return {"files": fingerprint_of(*self.files), "columns": list(self.columns), "encoding": self.encoding}

    def expected(self) -> dict[str, int]:
        return {}

    def open(self) -> Stream:
        notes: list[str] = []
        sizes = [regular(file) for file in self.files]
        told = [0]
        readers = [_READERS.get(file.suffix.lower(), _table) for file in self.files]
        files = list(zip(self.files, readers, sizes, strict=True))
        for file, reader, _ in files:  # a file that cannot be read at all is said before anything is built
            next(reader(file, self, [], lambda _: None), None)
        return Stream(self._items(files, notes, told), sum(sizes), "B", lambda: told[0], notes)

    def _items(self, files: list[Any], notes: list[str], told: list[int]) -> Iterator[Item]:
        number = before = 0
        for file, reader, size in files:

            def tell(place: int, before: int = before) -> None:
                told[0] = before + place

            for line, row in reader(file, self, notes, tell):
                yield from _texts(row, number, file, line)
                number += 1
            before += size


def _texts(row: Row, number: int, file: Path, line: int) -> Iterator[Item]:
    if isinstance(row, DataFault):
        yield located(row, file, line)
        return
    texts: dict[str, str] = {}
    try:
        for language, value in row.items():
            if value is not None and not (isinstance(value, str) and not value.strip()):
                texts[language] = check_text(value.strip() if isinstance(value, str) else value)
    except DataFault as fault:
        yield located(fault, file, line)
        return
    if len(texts) < 2:
        said = f"it has {next(iter(texts))} alone" if texts else "it has no text in any language"
        yield DataFault(
            f"{said}; its translation is missing", mend=_ROW, kind="missing-translation", file=file, line=line
        )
        return
    for language, text in texts.items():
        # "": not to be guessed from the script, which Japanese shares with Chinese.
        yield TextItem(text_id(number, language), text, [], language if language in LANGUAGES else "", file, line)


def _named(names: Sequence[str], source: ParallelSource, file: Path, notes: list[str]) -> dict[str, str]:
    """Column → its language.

    Raises:
        RequestError: fewer than two are languages, or two are the same.
    """
    # `id` is Indonesian only where it is asked for.
    wanted = source.columns or [name for name in names if name.strip().lower() != "id"]
    found = {name: code for name in names if name in wanted and (code := language_code(name)) is not None}
    missing = [name for name in source.columns if name not in names]
    if missing or len(found) < 2:
        raise RequestError(
            f"{file}: no column {missing[0]!r}; there are {', '.join(names)}"
            if missing
            else f"{file}: fewer than two columns name a language (found: {', '.join(map(repr, names))[:200]}). The first row names them: "
            "en, zh, …"
        )
    if len(set(found.values())) < len(found):
        raise RequestError(
            f"{file}: two columns are of one language ({', '.join(found)}): choose with --text-column, once for each language"
        )
    passed = [name for name in names if name not in found]
    notes.append(
        f"{file.name}: languages {', '.join(dict.fromkeys(found.values()))}"
        + (f"; passed over: {', '.join(passed)}" if passed else "")
    )
    return found


def _table(
    file: Path, source: ParallelSource, notes: list[str], tell: Callable[[int], None]
) -> Iterator[tuple[int, Row]]:
    with TextFile(file, source.encoding) as text:
        dialect, said = find_dialect(text.lines, ".tsv" if file.suffix.lower() != ".csv" else ".csv")
        notes += [f"{file.name}: {each}" for each in said]
    with TextFile(file, source.encoding) as text:
        notes.append(f"{file.name}: {text.read_as}")
        lines = records(text.lines(), dialect)
        head = next(lines, None)
        if head is None:
            raise RequestError(f"{file} is empty")
        if isinstance(head[1], DataFault):
            raise RequestError(f"{file}:{head[0]}: {head[1].problem}. {head[1].mend}")
        names = [name.strip() for name in head[1]]
        languages = _named(names, source, file, notes)
        for line, cells in lines:
            tell(text.tell())
            if isinstance(cells, DataFault):
                yield line, cells
            elif len(cells) != len(names):
                yield (
                    line,
                    DataFault(
                        f"{len(cells)} cells, and the first row has {len(names)}",
                        mend="Put a cell with a separator or a line break in it into quotation marks, or mend the row.",
                        kind="bad-row",
                    ),
                )
            else:
                row = dict(zip(names, cells, strict=True))
                yield line, {code: row[name] for name, code in languages.items()}


def _jsonl(
    file: Path, source: ParallelSource, notes: list[str], tell: Callable[[int], None]
) -> Iterator[tuple[int, Row]]:
    languages: dict[str, str] = {}
    with TextFile(file, source.encoding) as text:
        notes.append(f"{file.name}: {text.read_as}")
        for line, content in text.lines():
            tell(text.tell())
            try:
                if isinstance(content, DataFault):
                    raise content
                if not content.strip():
                    continue
                row = parse_json(content)
                # Data sets of translations keep the languages one level down.
                row = row["translation"] if isinstance(row, dict) and isinstance(row.get("translation"), dict) else row
                if not isinstance(row, dict):
                    raise DataFault("the line is no object", mend='A line is {"en": "…", "zh": "…"}.', kind="bad-json")
            except DataFault as fault:
                yield line, fault
                continue
            languages = languages or _named(list(map(str, row)), source, file, notes)
            others = (
                {} if source.columns else {name: code for name in row if (code := language_code(name)) and name != "id"}
            )
            yield line, {code: row[name] for name, code in (languages | others).items() if name in row}


class _Units:
    """What a TMX file holds: (line, language → text) of every translation unit so far."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler, self.parser.EndElementHandler = self._start, self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.EntityDeclHandler = self._entity
        self.ready: list[tuple[int, Row]] = []
        self.line, self.languages = 0, dict[str, str]()
        self.language: str | None = None
        self.said: list[str] | None = None
        self.length = self.codes = 0
        self.root: str | None = None

    def _entity(self, *_: Any) -> None:
        raise DataFault("it declares entities of its own", mend="Write them out.", kind="bad-xml")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self.root = self.root or name
        if name == "tu":
            self.line, self.languages = self.parser.CurrentLineNumber, {}
        elif name == "tuv":
            self.language = language_code(attributes.get("xml:lang") or attributes.get("lang") or "")
        elif name == "seg":
            self.said, self.length, self.codes = [], 0, 0
        elif name in _CODES:
            self.codes += 1

    def _text(self, text: str) -> None:
        if self.said is not None and not self.codes:
            self.length += len(text)
            if self.length > _LONGEST_UNIT:
                raise DataFault("a sentence of more than 16 million characters", mend="Is it closed?", kind="bad-xml")
            self.said.append(text)

    def _end(self, name: str) -> None:
        if name == "seg" and self.said is not None:
            if self.language is not None:
                self.languages.setdefault(self.language, "".join(self.said))
            self.said = None
        elif name in _CODES:
            self.codes -= 1
        elif name == "tu":
            self.ready.append((self.line, self.languages))


def _tmx(
    file: Path, source: ParallelSource, notes: list[str], tell: Callable[[int], None]
) -> Iterator[tuple[int, Row]]:
    units, wanted = _Units(), {language_code(name) for name in source.columns}
    seen: dict[str, None] = {}
    with open(file, "rb") as handle:
        while True:
            data = handle.read(_CHUNK)
            try:
                units.parser.Parse(data, not data)
            except (expat.ExpatError, DataFault) as error:
                problem = error.problem if isinstance(error, DataFault) else expat.ErrorString(error.code)
                line = units.parser.CurrentLineNumber
                raise RequestError(
                    f"{file}:{line}: this is no XML that can be read ({problem}). Mend the file."
                ) from None
            if units.root not in (None, "tmx"):
                raise RequestError(f"{file} is XML, but no TMX: it begins with <{units.root}>")
            tell(handle.tell())
            for line, languages in units.ready:
                assert not isinstance(languages, DataFault)
                row = {code: text for code, text in languages.items() if not wanted or code in wanted}
                seen |= dict.fromkeys(row)
                yield line, row
            units.ready.clear()
            if not data:
                break
    notes.append(f"{file.name}: languages {', '.join(seen) or 'none'}")


_READERS = {".jsonl": _jsonl, ".tmx": _tmx}
