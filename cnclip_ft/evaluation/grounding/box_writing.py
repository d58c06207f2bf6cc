"""Self-training: boxes that a model with learnt heads finds for the phrases of plain pairs, as a store to learn from (GLIP, arXiv 2112.03857).

Of every picture the captions are split into phrases (`grounding.phrases`); a phrase keeps the boxes whose probability is at least the threshold, and is
thrown away where none is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cnclip_ft.evaluation.options import Opened
from cnclip_ft.features.encode import encode_texts, evaluating
from cnclip_ft.grounding.finder import LEARNT, MOST_PROPOSED, Decoded, Grounded, How, decode, find
from cnclip_ft.grounding.heat import Box
from cnclip_ft.grounding.phrases import phrases_of
from cnclip_ft.models.sums import sum_of
from data_tools.bars import Bar
from data_tools.errors import DataFault, RequestError
from data_tools.language import detect_language
from data_tools.outputs import refuse_overlap
from data_tools.shards import open_pairs
from data_tools.store import Id, PairSource, StoreWriter, open_store

THRESHOLD = 0.5  # probability


@dataclass(frozen=True)
class BoxesWritten:
    """How much came of it; `asked` phrases, each in its picture; `damaged` pictures were left out."""

    pictures: int
    asked: int
    kept: int
    boxes: int
    damaged: int


def write_boxes(
    opened: Opened,
    source: str | Path,
    output: str | Path,
    *,
    threshold: float = THRESHOLD,
    overwrite: bool = False,
    proceed: bool = False,
) -> BoxesWritten:
    """Write the store `output`: the pictures of `source` with the phrases of their captions that the model finds, and where.

    Whole or not there; where it is interrupted, `proceed` goes on behind the last picture written.

    Args:
        threshold: least probability of a box, above 0 and below 1.

    Raises:
        RequestError: the model has not learnt boxes, the threshold is none, or the place is taken.
        DataFault: nothing is found at all, so there would be no store.
    """
    if not 0 < threshold < 1:
        raise RequestError(f"--threshold is {threshold:g}; of --write-boxes it is a probability, above 0 and below 1")
    model = opened.model
    How(LEARNT).method_of(model)  # refuses
    store = open_pairs(source)
    refuse_overlap(Path(output), [source])
    asked = _phrases(store)
    request = {
        "source": "boxes of a model", "store": store.checksum(), "order": store.order(), "threshold": threshold,
        "weights": sum_of(model.state_dict().items()).hexdigest(),
    }  # fmt: skip
    total = sum(map(len, asked.values()))
    with StoreWriter(output, request=request, resume=proceed, overwrite=overwrite) as writer:
        damaged = 0
        if not writer.in_place:
            ids, stride = list(asked), 1 + max(map(len, asked.values()), default=0)
            done, rest = divmod(
                writer.done, stride
            )  # of a picture that was written in part, what is there is passed over
            for number, found in _found(opened, store, asked, ids, done):
                if found is None:
                    damaged += 1
                    continue
                first, passed = number * stride, rest if number == done else 0
                kept = [(one.phrase, sure) for one in found if (sure := _sure(one, threshold))]
                if kept and not passed:
                    writer.add_image(ids[number], store.image(ids[number]), item=first)
                for place, (phrase, sure) in enumerate(kept, 1):
                    if place >= passed:
                        writer.add_text(
                            f"{ids[number]}/{place}",
                            phrase,
                            [ids[number]],
                            detect_language(phrase),
                            item=first + place,
                            beside={"boxes": [list(box) for box in sure]},
                        )
            if not writer.pairs:
                raise DataFault(
                    f"no box of any phrase has a probability of {threshold:g} or more",
                    mend="Give a lower --threshold, or train the boxes longer.",
                    kind="empty-split",
                    file=Path(output),
                )
            writer.finish()
    written = open_store(output)
    boxes = sum(len(beside["boxes"]) for _, beside in written.all_beside())
    return BoxesWritten(len(written.image_ids), total, len(written), boxes, damaged)


def _phrases(store: PairSource) -> dict[Id, list[str]]:
    """Of every picture the phrases of its captions, each once."""
    found: dict[Id, dict[str, None]] = {image_id: {} for image_id in store.image_ids}
    for pair in store.pairs():
        if pair.image_id in found:
            found[pair.image_id] |= dict.fromkeys(phrases_of(pair.text))
    return {image_id: list(phrases) for image_id, phrases in found.items() if phrases}


def _found(
    opened: Opened, store: PairSource, asked: dict[Id, list[str]], ids: list[Id], done: int
) -> Iterator[tuple[int, list[Grounded] | None]]:
    """From picture `done` on what is found in each; None for one that cannot be read."""
    model, size = opened.model, max(1, opened.batch_size // 8)
    how = How(LEARNT, threshold=0.0, most=MOST_PROPOSED)
    with evaluating(model, dtype=opened.dtype):
        for start in Bar(range(done, len(ids), size), desc="boxes", unit="batch"):
            some = range(start, min(start + size, len(ids)))
            decoded: dict[int, Decoded] = {}
            for number in some:
                try:
                    decoded[number] = decode(model, store.image(ids[number]))
                except DataFault:
                    continue
            phrases = [asked[ids[number]] for number in decoded]
            texts = list(dict.fromkeys(text for own in phrases for text in own))
            places = {text: place for place, text in enumerate(texts)}
            features = encode_texts(model, texts) if texts else torch.empty(0)
            given = [features[[places[text] for text in own]] for own in phrases]
            found = (
                dict(zip(decoded, find(model, list(decoded.values()), phrases, given, how), strict=True))
                if decoded
                else {}
            )
            for number in some:
                yield number, found.get(number)


def _sure(found: Grounded, threshold: float) -> list[Box]:
    """Boxes that are probable enough and have an area; the store keeps none that leads out of its picture."""
    return [
        region.box for region in found.boxes if region.score >= threshold and region.box[2] > 0 and region.box[3] > 0
    ]
