"""An index, its model and its search as one: questions in, found pictures out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from cnclip_ft.evaluation import provenance
from cnclip_ft.evaluation.options import Options, open_model
from cnclip_ft.grounding.finder import Decoded, default_method, heat_maps
from cnclip_ft.grounding.heat import Heat
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.retrieval import approximate
from cnclip_ft.retrieval.approximate import ApproximateSearch
from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.search.engine.query import MOST, Question, vectors
from cnclip_ft.search.engine.quick_text import quicken
from cnclip_ft.search.index.facets import Facets
from cnclip_ft.search.index.folder import Damaged, Index
from cnclip_ft.search.index.listing import Key
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

    def __init__(self, index: Index, model: DualEncoder, search: ExactSearch | ApproximateSearch) -> None:
        self.index, self.model, self.search = index, model, search
        self._features = torch.from_numpy(index.features)

    @cached_property
    def facets(self) -> Facets:
        """What is kept of the pictures; reading it takes a second for 200,000 of them."""
        return Facets(self.index)

    @cached_property
    def _exact(self) -> ExactSearch:
        if isinstance(self.search, ExactSearch):
            return self.search
        return ExactSearch(self._features, self.index.info["largest_norm"], self.model.device)

    def prepare(self) -> str:
        """Spend seconds and memory so that every question is quicker: what a server does. Gives what was done, in words."""
        alike = quicken(self.model)
        copied = isinstance(self.search, ExactSearch) and self.search.keep_copy()
        done = [] if alike is None else [f"text tower with half-precision weights (features alike to {1 - alike:.0e})"]
        done += ["half-precision copy of the features"] if copied else []
        self.ask([Question(text="暖")])
        done += [f"filters: {', '.join(self.facets.names)}"] if self.facets.names else []
        return ", ".join(done)

    @property
    def exact(self) -> bool:
        return isinstance(self.search, ExactSearch)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer a question, in order; a question that cannot be answered gets its error and harms no other."""
        answers: list[Answer] = [Results() for _ in questions]
        asked: list[int] = []
        for place, question in enumerate(questions):
            try:
                question.check()
                if question.like is not None and not 0 <= question.like < len(self.index):
                    raise RequestError(f"no picture {question.like}: there are {len(self.index):,}, from 0")
                if question.where:
                    self.facets.select(question.where)
                asked.append(place)
            except RequestError as error:
                answers[place] = error
        made = vectors(self.model, [questions[place] for place in asked], self._features)
        usable = [
            (place, vector) for place, vector in zip(asked, made, strict=True) if isinstance(vector, torch.Tensor)
        ]
        for place, vector in zip(asked, made, strict=True):
            if isinstance(vector, RequestError):
                answers[place] = vector
        for group in _looked_for_together(usable, questions):
            self._look([questions[place] for place, _ in group], group, answers)
        return answers

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
        if question.like is not None and not 0 <= question.like < len(self.index):
            raise RequestError(f"no picture {question.like}: there are {len(self.index):,}, from 0")
        method = default_method(self.model)  # a question is any vector, and learnt heads know phrases
        (vector,) = vectors(self.model, [question], self._features)
        if isinstance(vector, RequestError):
            raise vector
        ((heat,),) = heat_maps(self.model, [picture], [vector[None]], method)
        return heat

    def _look(self, questions: list[Question], group: list[tuple[int, torch.Tensor]], answers: list[Answer]) -> None:
        """Fill in the answers of questions that are looked for among the same pictures."""
        where, vectors_of = questions[0].where, torch.stack([vector for _, vector in group])
        rows = torch.from_numpy(self.facets.select(where)) if where else None
        # One more than asked: a picture that asks for its like is taken out again.
        k = max(question.skip + question.top + (question.like is not None) for question in questions)
        if rows is None:
            scores, numbers = self.search.search(vectors_of, k)
        else:
            scores, numbers = self._exact.search_among(rows, vectors_of, k)
        matches = self._count(questions, vectors_of, rows)
        for (place, _), question, *found in zip(
            group, questions, scores.tolist(), numbers.tolist(), matches, strict=True
        ):
            try:
                answers[place] = self._found(question, *found)
            except Damaged as error:
                answers[place] = error

    def _count(
        self, questions: list[Question], vectors_of: torch.Tensor, rows: torch.Tensor | None
    ) -> list[int | None]:
        """How many pictures a question has: those that meet `where` and reach `at_least`, without the one it asks with."""
        everything = len(self.index) if rows is None else len(rows)
        found: list[int | None] = [everything] * len(questions)
        limited = [place for place, question in enumerate(questions) if question.at_least is not None]
        if limited and rows is None and not self.exact:
            for place in limited:  # an approximate index is there so that nobody looks at all features
                found[place] = None
        elif limited:
            least = torch.tensor([questions[place].at_least for place in limited], dtype=torch.float64)
            for place, count in zip(limited, self._exact.count(vectors_of[limited], least, rows).tolist(), strict=True):
                found[place] = count
        for place, question in enumerate(questions):
            count = found[place]
            if question.like is None or count is None or (rows is not None and question.like not in rows):
                continue
            own = float(self._features[question.like].double() @ vectors_of[place].double())
            found[place] = count - (question.at_least is None or own >= question.at_least)
        return found

    def _found(self, question: Question, scores: list[float], numbers: list[int], matches: int | None) -> Results:
        found = [(number, score) for number, score in zip(numbers, scores, strict=True) if number >= 0]
        found = [(number, score) for number, score in found if number != question.like]
        if matches is None:
            assert question.at_least is not None, "else it is counted"
            found = [(number, score) for number, score in found if score >= question.at_least]
        else:
            found = found[:matches]  # the count is exact, and so is the order
        found = found[question.skip : question.skip + question.top]
        described = [(number, score, *self.index.described(number)) for number, score in found]
        return Results([Found(number, key, score, kept) for number, score, key, kept in described], matches)


def _looked_for_together(
    usable: list[tuple[int, torch.Tensor]], questions: Sequence[Question]
) -> list[list[tuple[int, torch.Tensor]]]:
    """Those of the same conditions; a question far down by itself, or the others would have to look as far."""

    def group(item: tuple[int, torch.Tensor]) -> tuple[object, ...]:
        question = questions[item[0]]
        return question.where, item[0] if question.skip + question.top > MOST else -1

    order = {key: number for number, key in enumerate(dict.fromkeys(map(group, usable)))}
    return [list(some) for _, some in itertools.groupby(sorted(usable, key=lambda item: order[group(item)]), group)]


def open_engine(
    folder: str | Path,
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
        checkpoint: where the model lies now, when it was moved. exact: leave an approximate index aside.
        trust_import: as for `load`.

    Raises:
        RequestError: no index, the model is gone, or it is another one.
    """
    index = Index(folder)
    made, identity = index.info["checkpoint"], index.info["identity"]
    if not isinstance(made.get("path"), str) or not {"image_size", "checksum"} <= identity.keys():
        raise Damaged(folder, "index.json does not say by which model it was made")
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
            f"the model of {folder} cannot be opened ({error}). Say where it lies now with --checkpoint"
        ) from None
    model = opened.model
    described = provenance.describe_checkpoint(model, checkpoint or made["path"])
    checksum = provenance.weights_sum(described)
    if checksum != identity["checksum"]:
        raise RequestError(
            f"{folder} was made by another model than {checkpoint or made['path']} is now; give the right one with "
            "--checkpoint, or bring the index up to date: cnclip-ft search index … --rebuild"
        )
    model.eval().requires_grad_(False)
    features = torch.from_numpy(index.features)
    search: ExactSearch | ApproximateSearch = ExactSearch(features, index.info["largest_norm"], opened.device)
    file = index.approximate_file
    if file is not None and not exact:
        if approximate.has_faiss():
            search = approximate.read(file, index.features, index.info["approximate"])
        else:
            say(f"note: searching exactly; {approximate.MISSING}")
    return Engine(index, model, search)
