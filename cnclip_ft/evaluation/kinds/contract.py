"""What everything that is judged during training promises.

All devices call `Evaluator.judge` together, and the encoder they are given shares the work: what comes back from it is the same on
all of them. Nothing else need be shared or written: journal, tables, report and checkpoints show what `judge` returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from cnclip_ft.features.encode import SplitFeatures
    from cnclip_ft.features.shared_encoder import SharedEncoder


class Scores(Protocol):
    """What one evaluator found, in percent."""

    def value(self, name: str) -> float | None:
        """The score of this name; None where the data have no ground truth for it."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for journal and checkpoints."""


class Evaluator(ABC):
    """One entry of `data.valid`, opened and checked before anything is trained."""

    tabled: ClassVar[tuple[str, ...]] = ()
    """Scores that get a column of their own in tables: those of the first entry stand there anyway."""

    @abstractmethod
    def judge(self, name: str, encoder: SharedEncoder) -> tuple[Scores, SplitFeatures | None]:
        """Scores, and features where example queries can be made of them. Collective; `name` tells the entries apart."""

    @abstractmethod
    def say(self, scores: Any) -> list[str]:
        """Scores of `judge` as words of the line of a validation, the most telling first."""

    @abstractmethod
    def chance(self) -> dict[str, float | None]:
        """What a model that guesses would score."""

    @abstractmethod
    def checksum(self) -> str:
        """Tells what it judges by from other content: --continue compares it."""

    @abstractmethod
    def describe(self) -> str:
        """Its line in the plan."""
