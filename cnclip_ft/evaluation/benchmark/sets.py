"""The public test sets of `benchmark`: what each is scored on, where a folder may hold it, and how it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.evaluation.classes.zero_shot import Class, labelled_images, read_classes
from cnclip_ft.features.encode import SplitTexts
from cnclip_ft.features.sources import Source, open_source, store_source
from data_tools.annotations import check_text, parse_image, parse_json, read_texts
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, located
from data_tools.language import main_language
from data_tools.regular import sha256
from data_tools.shards import is_pairs
from data_tools.store import Id
from data_tools.text_files import TextFile, read_lines

LANGUAGES = ("zh", "en")
_STORE = "{split}/ or lmdb/{split}/ (stores), or {split}_imgs.tsv with {split}_texts.jsonl"


@dataclass(frozen=True)
class BenchmarkSet:
    """One public test set.

    `folders` are names its folder may have, after letter case, ``-``, ``_`` and blanks are dropped. `images` and `texts` are the
    size of the pool that published numbers are for (texts of one language); a set of classes has `texts` classes.
    """

    name: str
    title: str
    languages: tuple[str, ...]
    split: str
    folders: tuple[str, ...]
    layout: str
    protocol: str
    images: int
    texts: tuple[int, ...]
    classes: bool = False

    def looked_for(self) -> str:
        return f"{self.name}/: {self.layout.format(split=self.split)}"


_FIVE = "the test split of 1,000 pictures, all captions (5 a picture)"
SETS = (
    BenchmarkSet("flickr30k-cn", "Flickr30K-CN", ("zh",), "test", ("flickr30kcn",), _STORE, _FIVE, 1000, (5000,)),
    BenchmarkSet("flickr30k", "Flickr30K", ("en",), "test", ("flickr30k",), _STORE, _FIVE, 1000, (5000,)),
    BenchmarkSet("coco-cn", "COCO-CN", ("zh",), "test", ("cococn",), _STORE,
                 "the test split of 1,000 pictures with the 1,053 captions people wrote", 1000, (1053,)),
    BenchmarkSet("coco", "COCO", ("en",), "test", ("coco", "mscoco"), _STORE,
                 "the 5,000 test pictures of Karpathy's split, all captions (5 or more a picture)", 5000, (25010, 25000)),
    BenchmarkSet("flickr8k-cn", "Flickr8k-CN", ("zh",), "test", ("flickr8kcn",), _STORE, _FIVE, 1000, (5000,)),
    BenchmarkSet("flickr8k", "Flickr8k", ("en",), "test", ("flickr8k",), _STORE, _FIVE, 1000, (5000,)),
    BenchmarkSet("muge", "MUGE", ("zh",), "valid", ("muge",), _STORE,
                 "the valid split (its test has no answers): 5,008 queries among 29,806 pictures", 29806, (5008,)),
    BenchmarkSet("xm3600", "XM3600", LANGUAGES, "test", ("xm3600", "crossmodal3600"),
                 "captions.jsonl and images/ as published, or test/ (a store whose texts carry zh and en)",
                 "3,600 pictures, the first caption of each in the language", 3600, (3600,)),
    BenchmarkSet("xtd10", "XTD10", LANGUAGES, "test", ("xtd10", "xtd"),
                 "test_image_names.txt and test_1kcaptions_{{zh,en}}.txt (also in XTD10/ and MIC/) with the pictures in images/, "
                 "train2014/ or val2014/, or test/ (a store whose texts carry zh and en)",
                 "1,000 pictures, one caption each in the language", 1000, (1000,)),
    BenchmarkSet("imagenet", "ImageNet", LANGUAGES, "val", ("imagenet", "imagenet1k"),
                 "val/ with a folder a class, and classes.zh.txt or classes.en.txt (a line a class: folder<TAB>name|other name); "
                 "templates.zh.txt and templates.en.txt where others than the shipped are wanted",
                 "zero-shot classification of the 50,000 val pictures among 1,000 classes", 50000, (1000,), classes=True),
)  # fmt: skip


@dataclass
class Held:
    """A set that a folder holds: its pictures, and by language the texts that are scored (their places in the split), or the classes
    and by picture the place of its own.

    `templates` are files of the user's; a language without one takes what ships.
    """

    about: BenchmarkSet
    source: Source
    texts: dict[str, list[int]] = field(default_factory=dict)
    classes: dict[str, list[Class]] = field(default_factory=dict)
    labels: dict[str, list[int | None]] = field(default_factory=dict)
    templates: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def languages(self) -> list[str]:
        return [*self.texts, *self.classes]


def chosen_sets(only: Sequence[str], language: str | None) -> list[BenchmarkSet]:
    """The sets asked for.

    Raises:
        RequestError: an unknown name or language.
    """
    names = [one.name for one in SETS]
    unknown = next((name for name in only if name not in names), None)
    if unknown is not None:
        raise RequestError(f"--only {unknown!r}: no such test set; there are {', '.join(names)}")
    if language not in (None, *LANGUAGES):
        raise RequestError(f"--language is {language!r}; use zh or en, or leave it out for both")
    return [one for one in SETS if (not only or one.name in only) and language in (None, *one.languages)]


def find_sets(
    data: Path, wanted: Sequence[BenchmarkSet], language: str | None = None
) -> tuple[list[Held], list[BenchmarkSet]]:
    """What `data` holds of the sets, opened, and the sets it does not hold.

    Raises:
        RequestError: `data` holds none of them, or one twice.
        DataFault: one of them is there and broken.
    """
    if not data.is_dir():
        raise RequestError(f"{data}: no such folder")
    held, missing = [], []
    folders = [path for path in sorted(data.iterdir()) if path.is_dir()]
    for about in wanted:
        languages = [one for one in about.languages if language in (None, one)]
        found = []
        for folder in folders:
            if _squeezed(folder.name) in about.folders:
                one = _open(about, folder, data, languages)
                if one is not None and one.languages:
                    found.append(one)
        if len(found) > 1:
            raise RequestError(
                f"{data} holds {about.title} twice: {found[0].source.path} and {found[1].source.path}; move one away"
            )
        held += found
        missing += [about] if not found else []
    if not held:
        lines = "\n".join(f"  {about.looked_for()}" for about in wanted)
        raise RequestError(f"{data} holds none of the test sets. Below it these are looked for:\n{lines}")
    return held, missing


def _squeezed(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _open(about: BenchmarkSet, folder: Path, data: Path, languages: Sequence[str]) -> Held | None:
    if about.classes:
        return _classes(about, folder, languages)
    if about.name == "xm3600" and (folder / "captions.jsonl").is_file():
        return _xm3600(about, folder, languages)
    if about.name == "xtd10":
        names = _first([folder, folder / "XTD10"], "test_image_names.txt")
        if names is not None:
            return _xtd10(about, folder, data, names, languages)
    source = _pairs(folder, about.split)
    if source is None:
        return None
    held = Held(about, source)
    split = source.split
    if len(about.languages) == 1:  # whatever its texts are marked as: "iphone" is a query of MUGE
        held.texts[about.languages[0]] = list(range(len(split.texts)))
        _refuse_other_language(about, source)
    else:
        for language in languages:
            marks = ("zh", "mixed") if language == "zh" else (language,)
            places = [place for place, mark in enumerate(split.languages) if mark in marks]
            if places:
                held.texts[language] = places
    answered = set(split.positives[:, 1].tolist())
    for language, places in held.texts.items():
        if answered.isdisjoint(places):
            raise RequestError(
                f"{source.path}: no {language} text has a known picture, so there is nothing to score (MUGE's test has no answers; its valid has)"
            )
    return held


def _refuse_other_language(about: BenchmarkSet, source: Source) -> None:
    """Chinese captions in the folder of an English set would stand beside results on English ones."""
    found = main_language(source.split.texts, source.split.languages)
    if found not in (None, *about.languages):
        raise RequestError(
            f"{source.path}: most of its {len(source.split.texts):,} texts are {found}, not in the language of {about.title} "
            f"({about.languages[0]}). Put each language in the folder of its own set, as flickr30k-cn and flickr30k."
        )


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _pairs(folder: Path, split: str) -> Source | None:
    for place in (folder / split, folder / "lmdb" / split):
        if is_pairs(place):
            return store_source(place)
    images, texts = folder / f"{split}_imgs.tsv", folder / f"{split}_texts.jsonl"
    return _official(images, texts, split) if images.is_file() and texts.is_file() else None


class TsvReader:
    """Image id → bytes, straight from the official ``…_imgs.tsv``. `places`: byte offset and length of each line."""

    def __init__(self, file: Path, places: dict[Id, tuple[int, int]]) -> None:
        self.file, self.places = file, places

    def __call__(self, image_id: Id) -> bytes:
        offset, length = self.places[image_id]
        with self.file.open("rb") as handle:
            handle.seek(offset)
            return ImageItem(*parse_image(handle.read(length)), file=self.file).read()


def _official(images: Path, texts: Path, name: str) -> Source:
    """The official source files, without a store made of them."""
    places: dict[Id, tuple[int, int]] = {}
    digest, offset = hashlib.sha256(), 0
    with images.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            digest.update(line)
            if not line.isspace():
                try:
                    image_id, _ = parse_image(line)
                except DataFault as fault:
                    raise located(fault, images, number) from None
                if image_id in places:
                    raise DataFault(
                        f"image id {image_id!r} stands on two lines",
                        mend="Keep one of them.",
                        kind="duplicate-id",
                        file=images,
                        line=number,
                    )
                places[image_id] = (offset, len(line))
            offset += len(line)
    split = _Pairs(list(places))
    with texts.open("rb") as handle:
        for item in read_texts(handle, texts):
            if isinstance(item, DataFault):
                raise item
            for image_id in item.image_ids:
                if image_id not in places:
                    raise DataFault(
                        f"text {item.text_id!r} names image {image_id!r}, which {images.name} does not hold",
                        mend="Take both files from one download.",
                        kind="missing-image",
                        file=texts,
                        line=item.line,
                    )
            split.add(item.text_id, item.text, item.language, item.image_ids)
    digest.update(sha256(texts).encode())
    return Source(name, images, "official", split.done(), TsvReader(images, places), digest.hexdigest())


class _Pairs:
    """A `SplitTexts` text by text."""

    def __init__(self, image_ids: list[Id]) -> None:
        self.split = SplitTexts(image_ids, [], [], [], torch.empty(0, 2, dtype=torch.int64))
        self._at = {image_id: place for place, image_id in enumerate(image_ids)}
        self._pairs: list[tuple[int, int]] = []

    def add(self, text_id: Id, text: str, language: str | None, image_ids: Sequence[Id]) -> int:
        place = len(self.split.texts)
        self.split.text_ids.append(text_id)
        self.split.texts.append(text)
        self.split.languages.append(language)
        self._pairs += [(self._at[image_id], place) for image_id in image_ids]
        return place

    def done(self) -> SplitTexts:
        if self._pairs:
            self.split.positives = torch.tensor(self._pairs, dtype=torch.int64)
        return self.split


def _captioned(
    about: BenchmarkSet,
    file: Path,
    rows: Sequence[tuple[str, dict[str, str]]],
    find: Callable[[str], Path | None],
) -> Held:
    """Pictures by file name with a caption a language; pictures that are not there are left out, and that is said."""
    files = {name: path for name, _ in rows if (path := find(name)) is not None}
    if not files:
        raise RequestError(
            f"{file}: none of its {len(rows):,} pictures is there; put them where docs/evaluation.md#the-public-test-sets says"
        )
    root = file.parent
    pairs, texts = _Pairs(list(files)), dict[str, list[int]]()
    digest = hashlib.sha256(sha256(file).encode())
    for name, captions in rows:
        if name in files:
            digest.update(f"{name} {files[name].stat().st_size}\n".encode())
            for language, caption in captions.items():
                digest.update(f"{language} {caption}\n".encode())
                texts.setdefault(language, []).append(pairs.add(f"{name} {language}", caption, language, [name]))
    source = Source(about.split, root, "captions", pairs.done(), PathReader(files), digest.hexdigest())
    lost = len(rows) - len(files)
    notes = [f"{lost:,} of {len(rows):,} pictures are not there and are left out"] if lost else []
    return Held(about, source, texts, notes=notes)


class PathReader:
    """Image id → path. A class, so that workers can be sent it."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    def __call__(self, image_id: str) -> Path:
        return self.files[image_id]


def _xm3600(about: BenchmarkSet, folder: Path, languages: Sequence[str]) -> Held:
    file = folder / "captions.jsonl"
    rows: list[tuple[str, dict[str, str]]] = []
    with file.open("rb") as handle:
        for number, line in read_lines(handle):
            try:
                if isinstance(line, DataFault):
                    raise line
                row: Any = parse_json(line)
                try:
                    name, captions = row["image/key"], {one: row[one]["caption"][0] for one in languages if one in row}
                except (KeyError, TypeError, IndexError):
                    raise DataFault(
                        "the line is none of XM3600's",
                        mend='A line has "image/key" and by language {"caption": ["…"]}.',
                        kind="missing-field",
                    ) from None
                rows.append((str(name), {one: check_text(text) for one, text in captions.items()}))
            except DataFault as fault:
                raise located(fault, file, number) from None

    def find(name: str) -> Path | None:
        return _first([folder / "images"], f"{name}.jpg")

    return _captioned(about, file, rows, find)


def _xtd10(about: BenchmarkSet, folder: Path, data: Path, names: Path, languages: Sequence[str]) -> Held | None:
    listed = _lines(names)
    captions: dict[str, list[str]] = {}
    for language in languages:
        file = _first([folder, folder / "XTD10", folder / "MIC"], f"test_1kcaptions_{language}.txt")
        if file is None:
            continue
        captions[language] = _lines(file)
        if len(captions[language]) != len(listed):
            raise DataFault(
                f"{len(captions[language]):,} captions for the {len(listed):,} pictures of {names.name}",
                mend="Take both files from one download: line N of one is line N of the other.",
                kind="bad-line",
                file=file,
            )
    if not captions:
        return None
    roots = [folder, *(path for path in sorted(data.iterdir()) if _squeezed(path.name) in ("coco", "mscoco", "cococn"))]
    places = [root / part for root in roots for part in ("images", "train2014", "val2014")]
    rows = [(name, {one: told[number] for one, told in captions.items()}) for number, name in enumerate(listed)]
    return _captioned(about, names, rows, lambda name: _first(places, name))


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    found = []
    with TextFile(path, None) as file:
        for number, line in file.lines():
            if isinstance(line, DataFault):
                raise located(line, path, number)
            if line.strip():
                found.append(line.strip())
    return found


def _classes(about: BenchmarkSet, folder: Path, languages: Sequence[str]) -> Held | None:
    pictures = folder / about.split
    lists = {one: file for one in languages if (file := folder / f"classes.{one}.txt").is_file()}
    if not pictures.is_dir() or not lists:
        return None
    source = open_source(pictures)
    if source.kind != "images":
        raise RequestError(f"{pictures} is no folder of pictures; put a folder a class there")
    classes = {one: read_classes(file) for one, file in lists.items()}
    labels = {one: labelled_images(pictures, source, known)[1] for one, known in classes.items()}
    if all(label is None for label in next(iter(labels.values()))):
        raise RequestError(f"{pictures}: no picture lies in the folder of a class; put a folder a class there")
    templates = {one: file for one in classes if (file := folder / f"templates.{one}.txt").is_file()}
    return Held(about, source, classes=classes, labels=labels, templates=templates, notes=list(source.notes))
