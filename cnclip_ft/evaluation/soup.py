"""Several fine-tunings of one start as one model: their mean weights, uniform or greedy (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.evaluation.options import Options, open_model
from cnclip_ft.evaluation.results import provenance
from cnclip_ft.features.sources import store_source
from cnclip_ft.models.assembly import describe_model
from cnclip_ft.models.checkpoints import CHECKPOINT, load, save_checkpoint
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.retrieval.recall import recall
from data_tools.bars import Bar
from data_tools.errors import RequestError
from data_tools.outputs import is_empty, refuse_overlap
from data_tools.scratch import real_place

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Judged:
    """One candidate: the checkpoints whose weights it holds in equal shares, and its mean recall in percent."""

    name: str
    members: list[str]
    score: float


@dataclass(frozen=True)
class Soup:
    """What was written: the members of the average, and every candidate that was judged on the way."""

    members: list[str]
    judged: list[Judged]
    alike: bool = False
    """Whether all checkpoints hold the same weights, so that there is nothing to average."""
    at_size: dict[str, Any] = field(default_factory=dict)
    """`provenance.image_size` of them."""

    @property
    def winner(self) -> Judged | None:
        return next((each for each in self.judged if each.members == self.members), None)


class Mean:
    """The mean of weights, taken in one by one; whole numbers (counters) are the first one's."""

    def __init__(self) -> None:
        self.count, self.weights = 0, Weights()

    def with_one(self, other: Weights) -> Weights:
        """The mean if `other` were taken in too."""
        share = 1 / (self.count + 1)
        return {
            name: torch.lerp(self.weights[name], tensor, share)
            if self.count and tensor.is_floating_point()
            else self.weights.get(name, tensor).clone()
            for name, tensor in other.items()
        }

    def take(self, other: Weights) -> None:
        self.weights = self.with_one(other)
        self.count += 1


def average(
    checkpoints: Sequence[str],
    output: str | Path,
    judges: Sequence[str | Path] = (),
    options: Options | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Soup:
    """Write the mean of checkpoints as a checkpoint: of all of them, or with `judges` the best of three ways.

    With `judges` every checkpoint is scored, the uniform mean of all, and the greedy one: from the best checkpoint on, each
    next one in order of its score is taken in where the mean recall does not fall. What scores best is written; where that is a
    single checkpoint, its weights are.

    Args:
        checkpoints: two or more that `load` reads, of the same towers, tokenizer and picture rule.
        judges: stores; the score is the mean over them of the mean recall.

    Raises:
        RequestError: they cannot be averaged, or the place is taken; nothing was written.
    """
    options = options or Options()
    options.check()
    named = _named(checkpoints)
    _refuse_place(Path(output), [*checkpoints, *map(str, judges)], overwrite)
    sources = [store_source(store) for store in judges]
    opened = open_model(checkpoints[0], options)
    model, first = opened.model, _fixed(opened.model)

    def weights(checkpoint: str) -> Weights:
        other = load(
            checkpoint,
            device=opened.device,
            image_size=options.image_size,
            source=options.source,
            trust_import=options.trust_import,
            dimensions=options.dimensions,
        )
        _refuse_other(checkpoints[0], first, checkpoint, _fixed(other))
        _refuse_no_numbers(checkpoint, other.state_dict())
        return {name: tensor.detach() for name, tensor in other.state_dict().items()}

    judged: list[Judged] = []
    total = 2 * len(named) if sources else len(named)  # each, all, and all but one in the greedy way

    with Bar(total=total, desc="candidates", unit="model", shown=progress) as bar:

        def judge(name: str, members: list[str]) -> float:
            scores = [
                recall(opened.features(s), memory=options.memory, device=opened.device).mean_recall for s in sources
            ]
            if None in scores:
                raise RequestError(f"{judges[scores.index(None)]}: no ground truth to judge by")
            judged.append(Judged(name, members, sum(score or 0.0 for score in scores) / len(scores)))
            bar.update()
            return judged[-1].score

        mean, alike = Mean(), True
        for checkpoint in named:
            own = weights(checkpoint)
            # the mean of equal weights is those weights, to the bit
            alike = alike and all(torch.equal(tensor, mean.weights.get(name, tensor)) for name, tensor in own.items())
            mean.take(own)
            if sources:
                model.load_state_dict(own)
                judge(checkpoint, [checkpoint])
            else:
                bar.update()
        best, kept = mean.weights, named
        if sources:
            model.load_state_dict(mean.weights)
            judge("uniform", named)
            best, kept = _greedy(judged, mean.weights, weights, model, judge)
    model.load_state_dict(best)
    found = Soup(kept, judged, alike, provenance.image_size(model))
    save_checkpoint(model, output, info=_info(found, sources))
    return found


def _greedy(
    judged: list[Judged],
    uniform: Weights,
    weights: Callable[[str], Weights],
    model: DualEncoder,
    judge: Callable[[str, list[str]], float],
) -> tuple[Weights, list[str]]:
    """Go the greedy way; the weights that score best of all, and whose they are. Of equal ones the one of more checkpoints."""
    *singles, of_all = judged
    order = sorted(singles, key=lambda each: -each.score)
    greedy, members, score = Mean(), [order[0].name], order[0].score
    greedy.take(weights(order[0].name))
    for each in order[1:]:
        other = weights(each.name)
        model.load_state_dict(greedy.with_one(other))
        tried = judge("greedy", [*members, each.name])
        if tried >= score:
            greedy.take(other)
            members, score = [*members, each.name], tried
        else:
            judged[-1] = replace(judged[-1], name="greedy, tried")
    if of_all.score > score or (of_all.score == score and len(of_all.members) > len(members)):
        return uniform, of_all.members
    return greedy.weights, members


def _named(checkpoints: Sequence[str]) -> list[str]:
    named = [str(checkpoint) for checkpoint in checkpoints]
    if len(named) < 2:
        raise RequestError("name at least two checkpoints to average")
    places = [real_place(name) if Path(name).exists() else name for name in named]
    twice = next((name for name, place in zip(named, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise RequestError(f"{twice} is named twice; name every checkpoint once")
    return named


def _refuse_place(output: Path, sources: Sequence[str], overwrite: bool) -> None:
    refuse_overlap(output, sources)
    CHECKPOINT.refuse_other(output)
    if output.exists() and not is_empty(output) and not overwrite:
        raise RequestError(f"{output} exists. Choose another --output, or replace it with --overwrite")


def _fixed(model: DualEncoder) -> dict[str, Any]:
    """What all checkpoints of an average must share."""
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pictures = model.image_tower.preprocessing.record()
    return describe_model(model) | {
        "vocabulary": model.tokenizer.fingerprint(),
        "picture rule": pictures,
        "shapes of the tensors": tensors,
    }


def _refuse_other(first: str, wanted: dict[str, Any], checkpoint: str, found: dict[str, Any]) -> None:
    differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if differing:
        raise RequestError(
            f"{checkpoint} is of another model than {first}: {', '.join(differing)} differ. "
            "Only fine-tunings of one start can be averaged"
        )


def _refuse_no_numbers(checkpoint: str, weights: Weights) -> None:
    bad = next((name for name, tensor in weights.items() if tensor.isnan().any()), None)
    if bad is not None:
        raise RequestError(f"{checkpoint}: {bad} holds NaN, and so would every mean with it; leave it out")


def _info(soup: Soup, sources: Sequence[Any]) -> dict[str, Any]:
    return {
        "average_of": soup.members,
        "judged": [asdict(each) for each in soup.judged],
        **soup.at_size,
        "data": {str(source.path): source.checksum for source in sources},
        "versions": provenance.versions(),
    }
