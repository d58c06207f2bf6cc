"""One caption a picture and epoch, drawn by weights: how likely each is, and which an epoch draws, by a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cnclip_ft.data.mixture import Mixture, stores_of
from data_tools.errors import RequestError
from data_tools.language import detect_language
from data_tools.store import PairSource

_GOLDEN = (5**0.5 - 1) / 2
_STREAM = (
    2**31
)  # tells these draws from those of epochs and of the stores of a mixture, which are seeded by smaller numbers


def caption_weights(store: PairSource | Mixture, *, kept: bool, languages: Mapping[str, float]) -> np.ndarray:
    """float64 ``[pairs]`` in stored order: how likely a caption is among those of its picture, up to a factor.

    Args:
        kept: by the `weight` that a pair keeps beside its text, 1 where it keeps none.
        languages: times that of the language it says or, where it says none, has by its letters; 1 where that is not named.

    Raises:
        RequestError: a store keeps no weight at all, or no caption is in a language that is named.
    """
    weights, start = np.ones(len(store)), 0
    for each in stores_of(store) if kept else ():
        if not each.beside_counts.get("weight"):
            raise RequestError(
                f"data.captions=weighted: no pair of {each.path} keeps a weight. Import a table with a column `weight`, or draw "
                "captions that are all as likely: data.captions=one"
            )
        for number, beside in each.all_beside():
            weights[start + number] = beside.get("weight", 1.0)
        start += len(each)
    if languages:
        factors, met = np.ones(len(store)), set()
        for number, pair in enumerate(store.pairs()):
            language = pair.language or detect_language(pair.text) or ""
            met.add(language)
            factors[number] = languages.get(language, 1.0)
        for language in languages:
            if language not in met:
                raise RequestError(
                    f"data.caption_languages: {language} is named, and no caption of {store.path} is in that language (there are "
                    f"{', '.join(sorted(met - {''})) or 'none'}): data.caption_languages={{}}"
                )
        with np.errstate(over="ignore"):
            weights = np.clip(weights * factors, np.finfo(float).tiny, np.finfo(float).max)  # numbers above 0 they stay
    return weights


class OneCaption:
    """Pictures with their captions, of which each visit draws one, as likely as its weight says.

    A picture begins at a random place between 0 and 1 and goes on by the golden ratio from visit to visit (a Kronecker sequence, whose
    points are spread evenly whatever their number). What lies there is drawn: every draw by itself has the probabilities of the
    weights, and the counts of N visits are nearer to them than those of N independent draws.

    Args:
        pairs: int64 ``[pairs]``, those that may be drawn. images: int64 ``[pairs]``, their pictures. weights: ``[pairs]``, above 0.
        part: another number for every store of a mixture.
    """

    def __init__(self, pairs: np.ndarray, images: np.ndarray, weights: np.ndarray, seed: int, part: int = 0) -> None:
        order = np.argsort(images, kind="stable")
        self._pairs = pairs[order]
        _, self._firsts, counts = np.unique(images[order], return_index=True, return_counts=True)
        self.units = np.arange(len(counts))
        # Ends of the captions' shares, those of picture n between n and n + 1. Sums run over all pictures: of weights as they are,
        # the large ones of one picture would swallow the small ones of the next.
        unit, shares = np.repeat(self.units, counts), weights[order]
        if len(counts):
            shares = shares / np.maximum.reduceat(shares, self._firsts)[unit]
        ends = shares.cumsum()
        before = ends[self._firsts] - shares[self._firsts]
        lasts = self._firsts + counts - 1
        self._ends = unit + (ends - before[unit]) / (ends[lasts] - before)[unit]
        self._ends[lasts] = self.units + 1
        self._begin = np.random.default_rng([seed, _STREAM, part]).random(len(counts))

    def __len__(self) -> int:
        return len(self.units)

    def draw(self, units: np.ndarray, visit: int) -> np.ndarray:
        """The pair each of these pictures (numbers below `len`) is shown with at its visit of this number, from 0."""
        place = units + (self._begin[units] + visit * _GOLDEN) % 1
        place = np.minimum(place, np.nextafter(units + 1.0, 0))  # a sum that was rounded up is the next picture's
        return self._pairs[np.searchsorted(self._ends, place, side="right")]
