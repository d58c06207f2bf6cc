"""What is wrong with this data, and what it looks like: `measure` counts, `judge` compares and says what hurts."""

from __future__ import annotations

from data_tools.check.judge import CheckReport, judge
from data_tools.check.measure import SplitCheck, measure

__all__ = ["CheckReport", "SplitCheck", "judge", "measure"]
