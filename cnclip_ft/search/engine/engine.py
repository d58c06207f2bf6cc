"""An index, its model and its search as one: questions in, found pictures out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cnclip_ft.evaluation.options import Options, open_model
from cnclip_ft.evaluation.results import provenance
from cnclip_ft.grounding.finder import Decoded, default_method, heat_maps
from cnclip_ft.grounding.heat import Heat
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.search.engine.gallery import Gallery
from cnclip_ft.search.engine.local import LocalGallery
from cnclip_ft.search.engine.query import MOST, Question, vectors
from cnclip_ft.search.engine.quick_text import use_half_products
from cnclip_ft.search.engine.remote import MilvusGallery
from cnclip_ft.search.index.folder import Damaged, Index
from cnclip_ft.search.index.listing import Key
from cnclip_ft.search.index.milvus import Away, milvus_place
from data_tools.errors import RequestError
from data_tools.store.layouts import Value


@dataclass(frozen=True)
class Found:
    """A picture of the index, its cosine to the question, and what is kept of it."""

    number: int
    key: Key
    score: float
    columns: dict[str, Value] = field(default_factory=dict)


class Results(list[Found]):
    """Pictures found, best first, and `matches`: how many the index has for the question; None: not counted."""

    def __init__(self, found: Iterable[Found] = (), matches: int | None = None) -> None:
        super().__init__(found)
        self.matches = matches


Answer = Results | RequestError


class Engine:
    """Answers questions about an index; several threads may ask."""

    def __init__(self, gallery: Gallery, model: DualEncoder) -> None:
        self.gallery, self.model = gallery, model

    def prepare(self) -> str:
        """Spend seconds and memory so that every question is quicker: what a server does. Gives what was done, in words."""
        alike = use_half_products(self.model)
        done = [] if alike is None else [f"text tower with half-precision weights (features alike to {1 - alike:.0e})"]
        done += self.gallery.prepare()
        self.ask([Question(text="暖")])
        done += [f"filters: {', '.join(self.gallery.names)}"] if self.gallery.names else []
        return ", ".join(done)

    @property
    def exact(self) -> bool:
        return self.gallery.exact

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer a question, in order; a question that cannot be answered gets its error and harms no other."""
        answers: list[Answer] = [Results() for _ in questions]
        asked: list[int] = []
        likes: dict[int, torch.Tensor] = {}
        for place, question in enumerate(questions):
            try:
                question.check()
                if question.skip + question.top > self.gallery.deepest:
                    raise RequestError(f"this index gives the best {self.gallery.deepest:,} of a question, and no more")
                if question.like is not None and question.like not in likes:
                    likes[question.like] = self._vector(question.like)
                if question.where:
                    self.gallery.check(question.where)
                asked.append(place)
            except RequestError as error:
                answers[place] = error
        made = vectors(self.model, [questions[place] for place in asked], likes)
        usable = [
            (place, vector) for place, vector in zip(asked, made, strict=True) if isinstance(vector, torch.Tensor)
        ]
        for place, vector in zip(asked, made, strict=True):
            if isinstance(vector, RequestError):
                answers[place] = vector
        for group in _looked_for_together(usable, questions):
            self._look([questions[place] for place, _ in group], group, answers)
        return answers

    def _vector(self, number: int) -> torch.Tensor:
        try:
            return self.gallery.vector(number)
        except IndexError:
            raise RequestError(f"no picture {number}: there are {len(self.gallery):,}, from 0") from None

    @property
    def has_heat(self) -> bool:
        """Whether the model can say where in a picture a question is met."""
        return bool(self.model.image_tower.patch_methods)

    def heat(self, question: Question, picture: Decoded) -> Heat:
        """Where in a picture the question is met: cosines of its vector with the picture's patches.

        Raises:
            RequestError: nothing is asked, or the image tower gives no features of patches.
        """
        question.check()
        likes = {} if question.like is None else {question.like: self._vector(question.like)}
        method = default_method(self.model)  # a question is any vector, and learnt heads know phrases
        (vector,) = vectors(self.model, [question], likes)
        if isinstance(vector, RequestError):
            raise vector
        ((heat,),) = heat_maps(self.model, [picture], [vector[None]], method)
        return heat

    def _look(self, questions: list[Question], group: list[tuple[int, torch.Tensor]], answers: list[Answer]) -> None:
        """Fill in the answers of questions that are looked for among the same pictures."""
        where, vectors_of = questions[0].where, torch.stack([vector for _, vector in group])
        # One more than asked: a picture that asks for its like is taken out again.
        k = max(question.skip + question.top + (question.like is not None) for question in questions)
        try:
            scores, numbers = self.gallery.search(vectors_of, k, where)
            matches = self.gallery.counts(questions, vectors_of)
        except Away as error:
            for place, _ in group:
                answers[place] = error
            return
        for row, (place, _) in enumerate(group):
            try:
                answers[place] = self._found(questions[row], scores[row], numbers[row], matches[row])
            except (Damaged, Away) as error:
                answers[place] = error

    def _found(self, question: Question, scores: list[float], numbers: list[int], matches: int | None) -> Results:
        found = [(number, score) for number, score in zip(numbers, scores, strict=True) if number >= 0]
        found = [(number, score) for number, score in found if number != question.like]
        if matches is None:
            assert question.at_least is not None, "else it is counted"
            found = [(number, score) for number, score in found if score >= question.at_least]
        else:
            found = found[:matches]  # the count is exact, and so is the order
        found = found[question.skip : question.skip + question.top]
        described = self.gallery.described([number for number, _ in found])
        return Results(
            [Found(number, key, score, kept) for (number, score), (key, kept) in zip(found, described, strict=True)],
            matches,
        )


def _looked_for_together(
    usable: list[tuple[int, torch.Tensor]], questions: Sequence[Question]
) -> list[list[tuple[int, torch.Tensor]]]:
    """Those of the same conditions; a question far down by itself, or the others would have to look as far."""

    def group(item: tuple[int, torch.Tensor]) -> tuple[object, ...]:
        question = questions[item[0]]
        return question.where, item[0] if question.skip + question.top > MOST else -1

    order = {key: number for number, key in enumerate(dict.fromkeys(map(group, usable)))}
    return [list(some) for _, some in itertools.groupby(sorted(usable, key=lambda item: order[group(item)]), group)]


def open_gallery(place: str | Path) -> Gallery:
    """The pictures of an index: a folder, or `milvus:PATH.db` and `milvus:http://HOST:19530`.

    Raises:
        RequestError: there is no index, it is unfinished or damaged. Away: the server cannot be reached.
    """
    remote = milvus_place(place)
    return LocalGallery(Index(place)) if remote is None else MilvusGallery(remote)


def open_engine(
    index: str | Path | Gallery,
    *,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    exact: bool = False,
    source: str = "huggingface",
    trust_import: bool = False,
    say: Callable[[str], object] = print,
) -> Engine:
    """Open an index with the model it was made by.

    Args:
        index: its place, or its pictures opened.
        checkpoint: where the model lies now, when it was moved. exact: leave an approximate index aside.
        trust_import: as for `load`.

    Raises:
        RequestError: no index, the model is gone, or it is another one.
    """
    gallery = open_gallery(index) if isinstance(index, (str, Path)) else index
    made, identity = gallery.info["checkpoint"], gallery.info["identity"]
    if not isinstance(made.get("path"), str) or not {"image_size", "checksum"} <= identity.keys():
        raise Damaged(gallery.place, "it does not say by which model it was made")
    options = Options(
        device=device,
        image_size=identity["image_size"],
        dimensions=identity.get("dimensions"),
        source=source,
        trust_import=trust_import,
    )
    try:
        opened = open_model(checkpoint or made["path"], options)
    except RequestError as error:
        if checkpoint is not None or Path(made["path"]).exists():
            raise
        raise RequestError(
            f"the model of {gallery.place} cannot be opened ({error}). Say where it lies now with --checkpoint"
        ) from None
    model = opened.model
    described = provenance.describe_checkpoint(model, checkpoint or made["path"])
    checksum = provenance.weights_sum(described)
    if checksum != identity["checksum"]:
        raise RequestError(
            f"{gallery.place} was made by another model than {checkpoint or made['path']} is now; give the right one with "
            "--checkpoint, or bring the index up to date: cnclip-ft search index … --rebuild"
        )
    model.eval().requires_grad_(False)
    noted = gallery.ready(opened.device, exact)
    if noted:
        say(noted)
    return Engine(gallery, model)
