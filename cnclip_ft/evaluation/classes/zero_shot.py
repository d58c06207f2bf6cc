"""Classification by words: the class whose averaged prompts are nearest to the picture (arXiv 2103.00020, 3.1)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from cnclip_ft.features.encode import encode_texts
from cnclip_ft.features.sources import Source
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.formats.files import save_tensors
from data_tools.atomic import whole_path
from data_tools.cache import cache_folder
from data_tools.errors import DataFault, RequestError, UserError

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Class:
    """`key` is what labels say (a folder's name); `names` are the words put into the templates."""

    key: str
    names: tuple[str, ...]


def read_classes(path: str | Path) -> list[Class]:
    """A line a class: ``name``, ``name|another name``, or ``key<TAB>name|another name``; lines with ``#`` are comments.

    Raises:
        RequestError: not readable, or fewer than two classes.
        DataFault: an empty name, or a key that stands twice.
    """
    path = Path(path)
    classes: dict[str, Class] = {}
    known: dict[str, str] = {}
    for number, line in _lines(path):
        key, tab, names = line.partition("\t")
        words = tuple(dict.fromkeys(_same(word) for word in (names if tab else key).split("|")))
        key = _same(key) if tab else words[0]
        taken = next((word for word in (key, *words) if word in known), None)
        if not key or not all(words):
            problem, mend = "an empty class name", "Write `name` or `key<TAB>name|other name`."
        elif key in classes:
            problem = f"class {key!r} stands here a second time"
            mend = "Keep one line a class; other names go behind |."
        elif taken is not None:
            problem = (
                f"{taken!r} is a name of class {known[taken]!r} already (a folder or text of this name could be either)"
            )
            mend = "Give each class names of its own."
        else:
            problem = ""
        if problem:
            raise DataFault(problem, mend=mend, kind="bad-class", file=path, line=number)
        known |= dict.fromkeys((key, *words), key)
        classes[key] = Class(key, words)
    if len(classes) < 2:
        raise RequestError(f"{path} names {len(classes)} classes; at least two are needed")
    return list(classes.values())


def _same(name: str) -> str:
    """One spelling of letters that can be written in several ways: macOS writes file names apart."""
    return unicodedata.normalize("NFC", name.strip())


def read_templates(spec: str, setting: str = "--templates") -> list[str]:
    """``zh``, ``en``, ``clip``, ``siglip`` (shipped; ``zh+en`` is both), ``none`` (the bare name) or a file with ``{}`` in every line.

    Args:
        setting: where `spec` was given, for messages.

    Raises:
        RequestError: no such list or file, or it is empty.
        DataFault: a line without ``{}``.
    """
    if spec == "none":
        return ["{}"]
    shipped = {path.stem for path in TEMPLATES.glob("*.txt")}
    names = spec.split("+")
    files = [TEMPLATES / f"{name}.txt" for name in names] if set(names) <= shipped else [Path(spec)]
    if not files[0].is_file():
        raise RequestError(
            f"{setting} is {spec!r}: neither a file nor one of {', '.join(sorted(shipped))}, none (join with +)"
        )
    templates: dict[str, None] = {}
    for file in files:
        for number, line in _lines(file):
            if line.count("{}") != 1:
                raise DataFault(
                    f"the template {line!r} has {line.count('{}')} places for the name",
                    mend="Write {} once.",
                    kind="bad-template",
                    file=file,
                    line=number,
                )
            templates[line] = None
    if not templates:
        raise RequestError(f"{files[0]} holds no templates")
    return list(templates)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8; save it as UTF-8") from None
    numbered = ((number, line.strip("\r\n ")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def class_features(
    model: DualEncoder,
    classes: Sequence[Class],
    templates: Sequence[str],
    *,
    key: str | None = None,
    batch_size: int = 256,
) -> torch.Tensor:
    """Unit ``[classes, dim]``: the mean of the unit features of every template with every name of a class.

    Args:
        key: what tells this model (weights, precision, context length) from others; with it the result is kept in
            `cache_folder` and taken from there the next time.
    """
    file = None
    if key is not None:
        asked = json.dumps([key, [[c.key, c.names] for c in classes], list(templates)], ensure_ascii=False)
        file = cache_folder() / "classes" / f"{hashlib.sha256(asked.encode()).hexdigest()}.safetensors"
        try:
            return load_file(file)["classes"]
        except (OSError, KeyError, SafetensorError):
            pass  # not there yet, or broken: made again below
    features = encode_texts(model, prompts(classes, templates), batch_size=batch_size)
    averaged = average_prompts(features, classes, templates)
    if file is not None:
        _keep(file, averaged)
    return averaged


def prompts(classes: Sequence[Class], templates: Sequence[str]) -> list[str]:
    """Every template with every name of every class."""
    return [template.replace("{}", name) for c in classes for name in c.names for template in templates]


def average_prompts(features: torch.Tensor, classes: Sequence[Class], templates: Sequence[str]) -> torch.Tensor:
    """Unit features of `prompts` → unit ``[classes, dim]``."""
    sizes = [len(c.names) * len(templates) for c in classes]
    return F.normalize(torch.stack([part.mean(0) for part in features.split(sizes)]), dim=1)


def _keep(file: Path, features: torch.Tensor) -> None:
    with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs time, not the answer
        with whole_path(file) as beside:
            save_tensors({"classes": features.contiguous()}, beside)


def labelled_images(path: Path, source: Source, classes: Sequence[Class]) -> tuple[list[Any], list[int | None]]:
    """Image ids and the class each belongs to: the sub-folder's name, or a store's text; None: no label.

    Raises:
        DataFault: a folder or text that is no class.
        RequestError: a store image with several classes.
    """
    at = {c.key: number for number, c in enumerate(classes)}
    names = at | {name: number for number, c in enumerate(classes) for name in c.names}
    if source.kind == "images":
        ids = [str(name) for name in source.split.image_ids]
        tops = [_same(i.split("/")[0]) if "/" in i else None for i in ids]
        unknown = next((top for top in tops if top is not None and top not in names), None)
        if unknown is not None:
            raise DataFault(
                f"folder {unknown!r} is no class of the list",
                mend="Add it to the list of classes, as `folder<TAB>name`.",
                kind="unknown-class",
                file=path,
            )
        return ids, [None if top is None else names[top] for top in tops]
    labels: list[int | None] = [None] * len(source.split.image_ids)
    for image, text in source.split.positives.tolist():
        word = _same(source.split.texts[text])
        if word not in names:
            raise DataFault(
                f"text {word!r} is no class of the list",
                mend="Build the store with class names as texts.",
                kind="unknown-class",
                file=path,
                item_id=source.split.text_ids[text],
            )
        if labels[image] not in (None, names[word]):
            raise RequestError(f"image {source.split.image_ids[image]!r} has several classes; one is needed")
        labels[image] = names[word]
    return source.split.image_ids, labels


@dataclass
class ClassReport:
    """Scores in percent over the labelled images; `confusion` int64 ``[true, predicted]``."""

    images: int
    top1: float
    top5: float | None  # None below six classes: it would say nothing
    per_class: dict[str, float | None]  # None: no image of this class
    counts: dict[str, int]
    mean_per_class: float
    confusion: torch.Tensor

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"confusion": self.confusion.tolist()}


def class_ranks(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Rank of each picture's class, 1 is best; ties count against the model.

    Args:
        scores: ``[images, classes]``. truth: int64 ``[images]``.
    """
    own = scores.gather(1, truth[:, None])
    return (scores >= own).sum(1)  # the class itself is one of them


def score_classes(scores: torch.Tensor, labels: Sequence[int | None], classes: Sequence[Class]) -> ClassReport | None:
    """Similarities ``[images, classes]`` → report; None when no image is labelled. Ties count against the model."""
    known = torch.tensor([i for i, label in enumerate(labels) if label is not None], dtype=torch.int64)
    if not len(known):
        return None
    truth = torch.tensor([label for label in labels if label is not None])
    scores = scores[known].double()
    rank = class_ranks(scores, truth)
    predicted = torch.where(rank == 1, truth, scores.scatter(1, truth[:, None], -torch.inf).argmax(1))
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((truth, predicted), torch.ones_like(truth), accumulate=True)
    counts = confusion.sum(1)
    accuracy = [100 * int(confusion[i, i]) / int(n) if n else None for i, n in enumerate(counts)]
    seen = [value for value in accuracy if value is not None]
    return ClassReport(
        images=len(known),
        top1=100 * int((rank <= 1).sum()) / len(known),
        top5=100 * int((rank <= 5).sum()) / len(known) if len(classes) > 5 else None,
        per_class={c.key: value for c, value in zip(classes, accuracy, strict=True)},
        counts={c.key: int(n) for c, n in zip(classes, counts, strict=True)},
        mean_per_class=sum(seen) / len(seen),
        confusion=confusion,
    )
