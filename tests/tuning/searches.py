"""A short recipe, a stand-in for the process of a trial, a search of both, and what it looks through."""

from __future__ import annotations

import json

from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.context import make_context
from cnclip_ft.training.stage_plan import plan_stages
from cnclip_ft.tuning.search import Search
from cnclip_ft.tuning.space import axes_of
from data_tools.errors import UserError


def recipe(stores, *overrides, train="train"):
    short = [
        f"stages.{stage}.{key}={value}"
        for stage in ("align", "contrast")
        for key, value in (("steps", 12), ("batch_size", 16), ("warmup_steps", 3), ("validate_every", "null"))
    ]
    return load_recipe(
        "demo",
        [
            f"data.train={stores / train}",
            f"data.valid={stores / 'valid'}",
            "model.start={architecture: tiny}",
            "data.captions=all",  # a store of this test has fewer pictures than a batch
            *short,
            *overrides,
        ],
    )


class Fake:
    """Stands for the process of a trial: six validations, and a score by the trial's stage alone."""

    def __init__(self, score=lambda stage: 10.0, left=0.0, stop_at=None, fails=lambda number: False, at_start=0.0):
        self.score, self.left, self.stop_at, self.fails, self.runs = score, left, stop_at, fails, []
        self.at_start = at_start

    def __call__(self, runner, follow):
        number = int(runner.folder.name)
        settings = load_recipe(runner.file).stages[runner.stage]
        self.runs.append((runner.stage, number, settings))
        if self.fails(number):
            raise UserError("out of paper")
        if len(self.runs) == self.stop_at:
            raise KeyboardInterrupt
        score = self.score(settings)
        follow({"kind": "validation", "stage": "start", "step": 0, "score": self.at_start})
        for step in range(1, 7):
            at = step * (settings.validate_every or 2)
            for record in (
                {"kind": "train", "stage": runner.stage, "step": at, "seconds_left": self.left},
                {"kind": "validation", "stage": runner.stage, "step": at, "mean_recall": score, "score": score},
            ):
                reason = follow(record)
                if reason:
                    return "stopped", reason
        best = runner.folder / runner.stage / "best"
        best.mkdir(parents=True)
        said = {"format": 1, "model": {}, "score": max(score, self.at_start)}
        (best / "cnclip_ft.json").write_text(json.dumps(said), encoding="utf-8")
        return "complete", ""


def searched(stores, folder, fake, *, trials=8, proceed=False, **more):
    lines: list[str] = []
    settings = more.pop("settings", None) or recipe(stores)
    search = Search(settings, folder, trials=trials, say=lines.append, run=fake, stages=["align"], **more)
    return search.execute(proceed=proceed), lines


def space_of(stores, name="contrast"):
    context, model = make_context(recipe(stores), write=False)
    plan = next(plan for plan in plan_stages(context, model) if plan.name == name)
    return axes_of(plan, context.new_parts, 1000, 1, patches=True, captions=5.0)
