"""The values of the next trial, by Optuna: a function of the trials that ended and of a seed, so that a search goes on as it would have."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cnclip_ft.tuning.space import Space, Values
from cnclip_ft.tuning.trials import Trial

if TYPE_CHECKING:
    import optuna

_CHANGED = 3  # settings, of the first trials


def study_of(space: Space, trials: Iterable[Trial], sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """A study that knows these trials, all of which ended."""
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {axis.name: axis.distribution() for axis in space.axes}
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    for trial in sorted(trials, key=lambda trial: trial.number):
        told = create_trial(
            params=trial.values,
            distributions=distributions,
            value=trial.score,
            intermediate_values=trial.reports,
            state=states[trial.state],
        )
        study.add_trial(told)
    return study


def draw(space: Space, ended: list[Trial], seed: int) -> Values:
    """What to try next. The first trial is the recipe itself."""
    if not ended:
        return space.own()
    import optuna

    at_large = max(5, len(space.axes))  # before the better ones say where to draw
    sampler = optuna.samplers.TPESampler(seed=seed + len(ended), n_startup_trials=at_large, multivariate=True)
    asked = study_of(space, ended, sampler).ask({axis.name: axis.distribution() for axis in space.axes})
    drawn = dict(asked.params)
    if len(ended) > at_large:
        return drawn
    # The first ones change a few settings of the recipe at a time: where all change, one bad value hides the good ones.
    changed = random.Random(f"{seed} {space.name} {len(ended)}").sample(list(drawn), min(_CHANGED, len(drawn)))
    return space.own() | {name: drawn[name] for name in changed}
