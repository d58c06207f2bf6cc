"""Every picture's nearest classes, by one model: what is found, and the lines and the table it is told in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cnclip_ft.evaluation.classes.zero_shot import Class, ClassReport, class_features, score_classes
from cnclip_ft.evaluation.options import Opened
from cnclip_ft.evaluation.results.recall_table import number
from cnclip_ft.features.encode import Meter, encode_images, evaluating
from data_tools.errors import DataFault, UserError
from data_tools.tables import table, terminal_width

_SHOWN = 40  # classes in the printed table; the JSON has all


@dataclass
class Classified:
    """`cosines` and `shares` are ``[pictures that could be used, classes]``; `faults`, by place, the others'.

    `report` is None where no picture has a label; `speed` is a line to print.
    """

    ids: Sequence[Any]
    labels: Sequence[int | None]
    keys: list[str]
    cosines: torch.Tensor
    shares: torch.Tensor
    faults: dict[int, DataFault]
    report: ClassReport | None
    speed: str

    def lines(self) -> Iterator[str]:
        """JSON with the five best classes of every picture, then of every fault."""
        best = self.cosines.topk(min(5, len(self.keys)), dim=1).indices.tolist()
        whole = [place for place in range(len(self.ids)) if place not in self.faults]
        for row, place in enumerate(whole):
            cosines, shares = self.cosines[row].tolist(), self.shares[row].tolist()
            found = [
                {"class": self.keys[c], "cosine": round(cosines[c], 6), "share": round(shares[c], 6)} for c in best[row]
            ]
            yield json.dumps({**self._named(place), "classes": found}, ensure_ascii=False)
        for place, fault in self.faults.items():
            yield json.dumps({**self._named(place), "fault": fault.as_dict()})

    def _named(self, place: int) -> dict[str, Any]:
        label = self.labels[place]
        return {"image_id": self.ids[place], "label": None if label is None else self.keys[label]}


def classify_images(
    opened: Opened,
    ids: Sequence[Any],
    labels: Sequence[int | None],
    read: Callable[[Any], Any],
    classes: Sequence[Class],
    templates: Sequence[str],
    *,
    key: str | None,
    fail: bool,
) -> Classified:
    """Pictures without a label are classified and not scored.

    Args:
        key: what the averaged prompts are kept under; None: nowhere. fail: stop at the first picture that cannot be used.

    Raises:
        DataFault: a picture cannot be used, with `fail`.
        UserError: none can be used.
    """
    faults: dict[int, DataFault] = {}
    with evaluating(opened.model, dtype=opened.dtype):
        words = class_features(opened.model, classes, templates, key=key, batch_size=2 * opened.batch_size)
        meter = Meter(len(ids), "images")
        pixels = encode_images(
            opened.model,
            ids,
            read,
            batch_size=opened.batch_size,
            workers=opened.workers,
            meter=meter,
            on_fault=None if fail else faults.__setitem__,
        )
        meter.close()
        if len(faults) == len(ids):
            raise UserError(f"none of the {len(ids):,} pictures can be used; the first: {faults[0]}")
        whole = [place for place in range(len(ids)) if place not in faults]
        cosines = pixels[whole] @ words.T
        shares = (cosines * opened.model.logit_scale.exp().float().cpu()).softmax(1)
    report = score_classes(cosines, [labels[place] for place in whole], classes)
    return Classified(ids, labels, [c.key for c in classes], cosines, shares, faults, report, meter.line("images"))


def report_table(report: ClassReport) -> str:
    """The accuracies, then the classes, worst first."""
    top5 = "" if report.top5 is None else f"  top-5 {report.top5:.1f}"
    head = f"top-1 {report.top1:.1f}{top5}  mean per class {report.mean_per_class:.1f}  ({report.images:,} images)"
    worst = sorted(report.per_class.items(), key=lambda item: (item[1] is None, item[1] or 0))
    rows = [[key, str(report.counts[key]), number(value)] for key, value in worst[:_SHOWN]]
    more = len(worst) - _SHOWN
    return (
        head
        + "\n\n"
        + table(["class", "images", "accuracy"], rows, width=terminal_width())
        + (f"\n… and {more} more" if more > 0 else "")
    )
