"""What the rules of `own-data` chose for a stage, as the plan tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.words import Said


@dataclass(frozen=True)
class Choice:
    """Settings of a stage by key path inside it, and why."""

    stage: str
    settings: dict[str, Any]
    why: Said

    def line(self) -> Said:
        """As the plan says it."""
        told = ", ".join(_told(key, value) for key, value in self.settings.items())
        return Said("{stage}: {told}: {why}", "{stage}：{told}：{why}", stage=self.stage, told=told, why=self.why)


def _told(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(_told(f"{key}.{inner}", each) for inner, each in value.items())
    return f"{key} {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value) if not isinstance(value, list) else "; ".join(_rule(each) for each in value)


def _rule(rule: Mapping[str, Any]) -> str:
    return f"{rule['tower']} {rule.get('part', '')}".strip() + f" ×{rule.get('rate', 1):g}"
