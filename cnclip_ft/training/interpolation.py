"""Weights between a stage's start and its best, judged (arXiv 2109.01903): the best mixture is kept where it beats the best."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.journal import Journal
from cnclip_ft.training.selection import Selection
from cnclip_ft.training.validation import Judgement


def interpolate(
    model: DualEncoder,
    start: dict[str, torch.Tensor],
    best: dict[str, torch.Tensor],
    steps: int,
    *,
    judge: Callable[[DualEncoder], Judgement],
    selection: Selection,
    journal: Journal,
    stage: str,
    by: str,
) -> tuple[float, Judgement] | None:
    """Judge ``(1 − α) · start + α · best`` at `steps` + 1 places. All devices take part.

    Returns:
        α and judgement of the mixture that beats the best, whose weights `model` then holds; None where none does.
    """

    def mix(alpha: float) -> None:
        model.load_state_dict(
            {
                name: torch.lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor
                for name, tensor in best.items()
            }
        )

    winner: tuple[float, Judgement] | None = None
    lines: list[tuple[float, Judgement]] = []
    for number in range(steps + 1):
        alpha = number / steps
        mix(alpha)
        judgement = judge(model)
        lines.append((alpha, judgement))
        journal.write("interpolation", None, stage=stage, step=number, alpha=alpha, score=judgement.score)
        if selection.beats(judgement.score, judgement.guard):
            selection.take_mixture(judgement.score, judgement.row())
            winner = alpha, judgement
    journal.say(f"{stage}: weights between its start (α = 0) and its best (α = 1), by {by}")
    for alpha, judgement in lines:
        kept = "  kept" if winner is not None and alpha == winner[0] else ""
        journal.say(f"  α {alpha:.2f}  {judgement.score:6.2f}{selection.guard_note(judgement.guard)}{kept}")
    if winner is None:
        journal.say("  none beats the best checkpoint, which stays")
    else:
        mix(winner[0])
    return winner
