"""Where pairs come from: one small file a source, each a stream of images, texts and faults (`data_tools.items`).

`open_source` is the one place that knows their names.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.errors import RequestError
from data_tools.items import Source
from data_tools.sources.column_names import Columns
from data_tools.sources.joined import Joined
from data_tools.sources.options import SourceOptions
from data_tools.walk import natural

KINDS = {
    "official": "{split}_imgs.tsv + {split}_texts.jsonl in a folder",
    "folder": "images with captions.csv/.tsv/.jsonl/.parquet/.txt, or a .txt beside each",
    "table": "CSV, TSV, JSONL, JSON, Excel or Parquet files with image paths or bytes",
    "imagefolder": "a Hugging Face imagefolder with metadata.*",
    "webdataset": "tars with images beside .txt or .json",
    "flickr8k-cn": "caption files + photos of Flickr8k",
    "flickr30k-cn": "the distributed TSV + JSONL, or the authors' caption folders + photos",
    "coco-cn": "the authors' caption files + photos of MS-COCO 2014",
    "muge": "the distributed TSV + JSONL",
    "boxes": "phrases with boxes: COCO, YOLO, LabelMe, Flickr30k Entities, JSONL",
    "parallel": "rows in two languages or more, without pictures: TSV, CSV, JSONL or TMX",
}


# Which options mean something to which kind; any other is refused rather than ignored.
_TAKES = {
    "official": (),
    "folder": ("captions", "columns", "encoding", "header", "allow_outside"),
    "table": ("images", "columns", "encoding", "header", "allow_outside"),
    "imagefolder": ("columns", "encoding", "allow_outside"),
    "webdataset": ("columns", "encoding"),
    "flickr8k-cn": ("images", "captions_from"),
    "flickr30k-cn": ("images",),
    "coco-cn": ("images", "captions_from"),
    "muge": (),
    "boxes": ("images", "allow_outside", "names", "box_format"),
    "parallel": ("columns", "encoding"),
}


def open_source(kind: str, places: str | Sequence[str], options: SourceOptions | None = None) -> Mapping[str, Source]:
    """The splits of a source by name; a source without splits has one, named ``""``.

    Args:
        places: several tables, patterns of tables, tars or folders are one source.

    Raises:
        RequestError: an unknown kind, an option it does not take, or a place that is not such a source.
    """
    options = options or SourceOptions()
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        mean = f" (did you mean {near[0]}?)" if near else ""
        raise RequestError(f"source {kind!r} is not known{mean}; there are {', '.join(KINDS)}")
    default = SourceOptions()
    for name in vars(default):
        if getattr(options, name) != getattr(default, name) and name not in _TAKES[kind]:
            flag = {"columns": "--…-column", "header": "--no-header"}.get(name, f"--{name.replace('_', '-')}")
            raise RequestError(f"{flag} means nothing to source {kind!r}; leave it out")
    given = [places] if isinstance(places, str) else list(places)
    if kind == "parallel":
        from data_tools.sources.parallel import ParallelSource

        columns = options.columns
        if replace(columns, text=()) != Columns():
            raise RequestError("source 'parallel' has columns of languages alone: --text-column en --text-column zh")
        files = [Path(file) for place in given for file in _tables(place)]
        return {"": ParallelSource(files, columns.text, options.encoding)}
    if kind == "table":
        given = [file for place in given for file in _tables(place)]
    if len(given) == 1:
        return _open_one(kind, given[0], options)
    if kind not in _SEVERAL:
        raise RequestError(
            f"source {kind!r} is one folder, and {len(given)} were named; {', '.join(_SEVERAL)} may be several"
        )
    opened = [_open_one(kind, place, options) for place in given]
    split = next((place for place, found in zip(given, opened, strict=True) if list(found) != [""]), None)
    if split is not None:
        raise RequestError(f"{split} has splits of its own: import it in a line of its own")
    return {"": Joined([found[""] for found in opened])}


_SEVERAL = ("table", "folder", "webdataset", "boxes")


def _tables(place: str) -> list[str]:
    """The files that a pattern means, in natural order."""
    path = Path(place)
    if path.is_dir():
        raise RequestError(f"{path} is a folder: name its tables ('{path / '*.csv'}'), or say import folder")
    if path.exists() or not any(mark in place for mark in "*?["):
        return [place]
    found = sorted(glob.glob(place, recursive=True), key=natural)
    if not found:
        raise RequestError(f"{place}: no such file")
    return found


def _open_one(kind: str, place: str, options: SourceOptions) -> Mapping[str, Source]:
    path = Path(place)
    if kind == "webdataset":
        from data_tools.sources.webdataset import WebDatasetSource

        return {"": WebDatasetSource(place, options.columns.text, options.encoding)}
    if kind == "table":
        from data_tools.sources.table import TableSource

        table = TableSource(
            path,
            root=options.images,
            columns=options.columns,
            header=options.header,
            outside=options.allow_outside,
            encoding=options.encoding,
        )
        return {"": table}
    if kind == "boxes":
        from data_tools.sources.boxes.recognise import open_boxes

        return open_boxes(path, options)
    if not path.is_dir():
        hint = "; unpack it first" if path.suffix == ".zip" else ""
        raise RequestError(f"{path}: no such folder{hint}")
    if kind == "folder":
        from data_tools.sources.folder import open_folder

        return {"": open_folder(path, options)}
    if kind == "imagefolder":
        from data_tools.sources.imagefolder import imagefolder

        return imagefolder(path, options.columns, options.encoding, options.allow_outside)
    if kind == "flickr8k-cn":
        from data_tools.sources.flickr8k_cn import flickr8k_cn

        return flickr8k_cn(path, options.images, options.captions_from or ("zhc",))
    if kind == "flickr30k-cn":
        from data_tools.sources.flickr30k_cn import flickr30k_cn

        return flickr30k_cn(path, options.images)
    if kind == "coco-cn":
        from data_tools.sources.coco_cn import coco_cn

        return coco_cn(path, options.images, options.captions_from or ("written",))
    if kind == "muge":
        from data_tools.sources.muge import muge

        return muge(path)
    from data_tools.sources.official import OfficialSource

    return {
        file.name.removesuffix("_imgs.tsv"): OfficialSource(path, file.name.removesuffix("_imgs.tsv"))
        for file in sorted(path.glob("*_imgs.tsv"))
    }
