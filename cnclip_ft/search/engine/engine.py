"""An index, its model and its search as one: questions in, found pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from cnclip_ft.evaluation import provenance
from cnclip_ft.evaluation.options import Options, open_model
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.retrieval import approximate
from cnclip_ft.retrieval.approximate import ApproximateSearch
from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.search.engine.query import Question, vectors
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


Answer = list[Found] | RequestError


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
        answers: list[Answer] = [[] for _ in questions]
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
        for where in dict.fromkeys(questions[place].where for place, _ in usable):
            some = [(place, vector) for place, vector in usable if questions[place].where == where]
            # One more than asked: a picture that asks for its like is taken out again.
            k = max(questions[place].top + (questions[place].like is not None) for place, _ in some)
            vectors_of = torch.stack([vector for _, vector in some])
            if where:
                rows = torch.from_numpy(self.facets.select(where))
                scores, numbers = self._exact.search_among(rows, vectors_of, k)
            else:
                scores, numbers = self.search.search(vectors_of, k)
            for (place, _), row, found in zip(some, scores.tolist(), numbers.tolist(), strict=True):
                try:
                    answers[place] = self._found(questions[place], row, found)
                except Damaged as error:
                    answers[place] = error
        return answers

    def _found(self, question: Question, scores: list[float], numbers: list[int]) -> list[Found]:
        found = [(number, score) for number, score in zip(numbers, scores, strict=True) if number >= 0]
        found = [(number, score) for number, score in found if number != question.like][: question.top]
        return [
            Found(number, key, score, kept) for number, score in found for key, kept in [self.index.described(number)]
        ]


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
    options = Options(device=device, image_size=identity["image_size"], source=source, trust_import=trust_import)
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
    checksum = described.get("checksum") or described.get("weights_checksum")
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
