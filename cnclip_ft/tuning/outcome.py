"""What a search says at its end: a table, the recipe, a page with what mattered, and how much choosing flatters."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cnclip_ft.recipe import dump_recipe
from cnclip_ft.tuning.drawing import study_of
from cnclip_ft.tuning.search import KEPT, Found
from cnclip_ft.tuning.space import Axis, Space
from cnclip_ft.tuning.trials import Trial, complete
from data_tools import tables
from data_tools.atomic import whole_file
from data_tools.page_style import END, beginning
from data_tools.words import Said, joined, said_in

if TYPE_CHECKING:
    from cnclip_ft.evaluation.options import Options
    from cnclip_ft.evaluation.scores.comparison import HitTable

RECIPE, PAGE = "tuned.yaml", "index.html"
_SHOWN = 10  # trials of a table
_SPLITS = 400
_WIDTH, _HEIGHT = 360, 200
_STATES = {
    "complete": Said("to its end", "完成"),
    "pruned": Said("given up", "提前放弃"),
    "failed": Said("failed", "失败"),
    "running": Said("running", "进行中"),
}
_HEADS = (
    Said("trial", "试验"),
    Said("score", "分数"),
    Said("minutes", "分钟"),
    Said("state", "状态"),
    Said("beside the recipe", "与配方不同处"),
)


@dataclass(frozen=True)
class Flattery:
    """How much the winner's score owes to having been chosen on the pictures it is scored on.

    Args:
        among: leading trials whose weights were scored again.
        loss: points that the best of them on one half of the pictures loses on the other half, over random halves.
        error: standard error of the winner's mean recall over the pictures, in points.
    """

    among: int
    loss: float
    error: float

    def sentence(self) -> Said:
        return Said(
            "Chosen on one half of the validation pictures and told on the other, the best of the leading {among} trials loses "
            "{loss:.2f} points ({splits} random halves); the standard error of its score is {error:.2f}. Expect so much less "
            "on pictures kept apart, and tell the recall on those.",
            "在验证图片的一半上选、在另一半上评，领先的 {among} 次试验中最好者会少 {loss:.2f} 个点（随机对半 {splits} 次）；其分数的标准误为 "
            "{error:.2f}。在另留的图片上请预期低这么多，并以那里的召回率为准。",
            splits=_SPLITS,
            **vars(self),
        )


def flattery(found: Found, stage: str, options: Options) -> Flattery | None:
    """Score the leading trials of a stage picture by picture; None where fewer than two kept their weights."""
    from cnclip_ft.evaluation.options import open_model
    from cnclip_ft.evaluation.scores.comparison import hit_table
    from cnclip_ft.features.sources import store_source
    from cnclip_ft.retrieval.recall import split_ranks
    from cnclip_ft.runtime import parse_device

    leading = [trial for trial in complete(found.trials[stage])[:KEPT] if found.weights(trial).is_dir()]
    store = next(iter(found.recipe.data.valid_sets().values()))
    if len(leading) < 2 or not isinstance(store, str) or found.recipe.best_by != "mean_recall":
        return None
    source, tables_ = store_source(store), []
    for trial in leading:
        features = open_model(found.weights(trial), options).features(source)
        ranks = split_ranks(features, memory=options.memory, device=parse_device(options.device))
        tables_.append(hit_table(features, ranks))
    return measure(tables_)


def measure(hits: list[HitTable], seed: int = 0) -> Flattery:
    """Flattery among models scored on one split; the first one is the winner."""
    generator = torch.Generator().manual_seed(seed)
    used = hits[0].asked.sum(1) > 0
    asked = hits[0].asked[used]
    found = torch.stack([each.hits[used] for each in hits])
    count, losses = len(asked), []
    for _ in range(_SPLITS):
        order = torch.randperm(count, generator=generator)
        one, other = order[: count // 2], order[count // 2 :]
        here, there = (100 * (found[:, half].sum(1) / asked[half].sum(0)).nanmean(1) for half in (one, other))
        losses.append(here.max() - there[here.argmax()])
    drawn = torch.randint(count, (_SPLITS, count), generator=generator)
    means = torch.stack([100 * (found[0, rows].sum(0) / asked[rows].sum(0)).nanmean() for rows in drawn])
    return Flattery(len(hits), float(torch.stack(losses).mean()), float(means.std()))


# ---- what mattered ----------------------------------------------------------------------------------------------


def importance(space: Space, trials: list[Trial]) -> dict[str, float]:
    """Share of each axis in what told good trials from the rest (PED-ANOVA, arXiv 2304.10255); empty of too few trials."""
    import optuna

    ended = complete(trials)
    if len(ended) < 6 or len({trial.score for trial in ended}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return dict(optuna.importance.get_param_importances(study_of(space, ended), evaluator=evaluator))


# ---- words and page ---------------------------------------------------------------------------------------------


def settings_table(space: Space, found: Found, mattered: dict[str, float], width: int | None = None) -> str:
    """What the recipe has, what was found, how much each mattered."""
    best = found.winner(space.name)
    rows = [
        [axis.name, axis.shown(axis.own), axis.shown(best.values[axis.name]), _share(mattered.get(axis.name))]
        for axis in space.axes
    ]
    return tables.table([f"{space.name}", "recipe", "found", "mattered"], rows, text=(0,), width=width)


def trials_table(space: Space, found: Found, width: int | None = None) -> str:
    ended = complete(found.trials[space.name])
    rows = [
        [str(trial.number), f"{trial.score:.2f}", f"{trial.seconds / 60:.1f}", _changes(space, trial)]
        for trial in ended[:_SHOWN]
    ]
    return tables.table([f"{space.name} trial", "score", "minutes", "beside the recipe"], rows, text=(3,), width=width)


def counted(found: Found, stage: str) -> Said:
    states = [trial.state for trial in found.trials[stage]]
    return Said(
        "trials: {all}; {complete} to the end, {pruned} given up, {failed} failed",
        "{all} 次试验：{complete} 次完成，{pruned} 次提前放弃，{failed} 次失败",
        all=len(states),
        **{state: states.count(state) for state in ("complete", "pruned", "failed")},
    )


def shortcomings(found: Found, space: Space) -> list[Said]:
    """What a search of a stage did not reach."""
    trials, best = complete(found.trials[space.name]), found.winner(space.name)
    told: list[Said] = []
    if space.axes and len(trials) == 1:
        told.append(
            Said(
                "stage {name}: one trial came to its end, the recipe itself: nothing was compared. Go on with --continue and a larger --budget "
                "or more --trials",
                "阶段 {name}：只有一次试验完成，即配方本身：没有可比较的。请用 --continue 继续，并给更大的 --budget 或更多的 --trials",
                name=space.name,
            )
            if best.number == 0
            else Said(
                "stage {name}: one trial came to its end: nothing was compared. Go on with --continue and a larger --budget or more --trials",
                "阶段 {name}：只有一次试验完成：没有可比较的。请用 --continue 继续，并给更大的 --budget 或更多的 --trials",
                name=space.name,
            )
        )
    if best.gained_nothing:
        told.append(
            Said(
                "stage {name}: no trial beat its start ({score:.2f}): the best checkpoint has the weights the stage began with",
                "阶段 {name}：没有一次试验超过起点（{score:.2f}）：最好的检查点就是该阶段开始时的权重",
                name=space.name,
                score=best.score,
            )
        )
    return told


def write(found: Found, judged: Flattery | None, language: str) -> tuple[Path, Path]:
    """``tuned.yaml``, and the page in `language`."""
    file, page = found.folder / RECIPE, found.folder / PAGE
    heads = [
        f"# {space.name}: {counted(found, space.name)}; best {found.winner(space.name).score:.2f}"
        for space in found.spaces
    ]
    with whole_file(file, "w") as target:
        target.write("\n".join(heads) + "\n" + dump_recipe(found.recipe))
    title = f"cnclip-ft tune: {found.folder.name}"
    parts = [f"{beginning(title, language)}<h1>{html.escape(title)}</h1>"]
    if found.warning:
        parts.append(f"<p class=hurts>{html.escape(said_in(found.warning, language))}</p>")
    for space in found.spaces:
        parts += _stage_parts(space, found, language)
    if judged is not None:
        parts += [_heading(Said("How much choosing flatters", "挑选带来的高估"), language)]
        parts += [f"<p>{said_in(judged.sentence(), language)}</p>"]
    recipe = html.escape(dump_recipe(found.recipe))
    parts += [_heading(Said("Recipe", "配方"), language), f"<pre tabindex=0>{recipe}</pre>{END}"]
    with whole_file(page, "w") as target:
        target.write("\n".join(parts))
    return file, page


def _stage_parts(space: Space, found: Found, language: str) -> list[str]:
    trials, best = found.trials[space.name], found.winner(space.name)
    own = next((trial for trial in trials if trial.number == 0), None)
    lines = [
        counted(found, space.name),
        Said("best {score:.2f}", "最好 {score:.2f}", score=best.score),
        Said("the recipe itself {score:.2f}", "配方本身 {score:.2f}", score=own.score)
        if own and own.score is not None
        else "",
    ]
    said = joined(filter(None, lines), "; ", "；")
    stage = Said("Stage {name}", "阶段 {name}", name=space.name)
    parts = [_heading(stage, language), f"<p>{html.escape(said_in(said, language))}</p>"]
    parts += [f"<p class=hurts>{html.escape(said_in(each, language))}</p>" for each in shortcomings(found, space)]
    if not space.axes:
        return parts
    mattered = importance(space, trials)
    if mattered:
        parts += [_heading(Said("What mattered", "各项的影响"), language), _bars(space, mattered, language)]
    shown = sorted(space.axes, key=lambda axis: -mattered.get(axis.name, 0.0))
    parts += ["<div class=curves>", *(_scatter(axis, complete(trials), language) for axis in shown), "</div>"]
    rows = "".join(
        f"<tr><th scope=row>{trial.number}</th><td>{'–' if trial.score is None else f'{trial.score:.2f}'}</td>"
        f"<td>{trial.seconds / 60:.1f}</td><td>{said_in(_STATES[trial.state], language)}</td>"
        f"<td style='text-align: left; white-space: normal'>{html.escape(said_in(_changes(space, trial), language))}</td></tr>"
        for trial in sorted(trials, key=lambda trial: (trial.score is None, -(trial.score or 0), trial.number))
    )
    heads = "".join(f"<th>{said_in(head, language)}</th>" for head in _HEADS)
    return [*parts, f"<table class=numbers tabindex=0><tr>{heads}</tr>{rows}</table>"]


def _heading(said: Said, language: str) -> str:
    return f"<h2>{html.escape(said_in(said, language))}</h2>"


def _changes(space: Space, trial: Trial) -> Said:
    """What a trial has otherwise than the recipe."""
    changed = [
        Said("{name} {value}", "{name} {value}", name=axis.said, value=axis.shown(trial.values[axis.name]))
        for axis in space.axes
        if trial.values[axis.name] != axis.own
    ]
    return joined(changed, ", ", "，") if changed else Said("nothing", "无")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _bars(space: Space, mattered: dict[str, float], language: str) -> str:
    height, most = 22 * len(mattered) + 8, max(mattered.values()) or 1.0
    names = {axis.name: said_in(axis.said, language) for axis in space.axes}
    said = ", ".join(f"{names[name]} {_share(value)}" for name, value in mattered.items())
    parts = [f"<div class=curves><svg viewBox='0 0 {_WIDTH} {height}' role=img aria-label='{html.escape(said)}'>"]
    for number, (name, value) in enumerate(sorted(mattered.items(), key=lambda each: -each[1])):
        y = 22 * number + 14
        parts.append(f"<text x=126 y={y + 4} text-anchor=end>{html.escape(name)}</text>")
        parts.append(
            f"<path style='stroke: var(--one); stroke-width: 12; stroke-linecap: butt' d='M132 {y}h{value / most * 170:.1f}'/>"
        )
        parts.append(f"<text x={138 + value / most * 170:.1f} y={y + 4}>{_share(value)}</text>")
    return "".join(parts) + "</svg></div>"


def _scatter(axis: Axis, trials: list[Trial], language: str) -> str:
    """Score against the value of an axis, a dot a trial."""
    if not trials:
        return ""
    scores = [trial.score or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    places, name = list(axis.choices), html.escape(said_in(axis.said, language))

    def x(value: Any) -> float:
        if places:
            share = (places.index(value) + 0.5) / len(places)
        else:
            share = float(torch.tensor(value / axis.low).log() / torch.tensor(axis.high / axis.low).log())
        return 50 + share * (_WIDTH - 70)

    def y(score: float) -> float:
        return 30 + (1 - (score - low) / ((high - low) or 1.0)) * (_HEIGHT - 66)

    parts = [
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{name}'>",
        f"<text class=name x=4 y=15>{name}</text>",
    ]
    parts += [
        f"<text x=44 y={y(score):.1f} text-anchor=end dominant-baseline=middle>{score:.1f}</text>"
        for score in {low, high}
    ]
    ends = places or [axis.low, axis.high]
    parts += [
        f"<text x={x(end):.1f} y={_HEIGHT - 8} text-anchor=middle>{html.escape(axis.shown(end))}</text>" for end in ends
    ]
    parts += [
        f"<circle cx={x(trial.values[axis.name]):.1f} cy={y(trial.score or 0.0):.1f} r=4 style='fill: var(--one); fill-opacity: .6'/>"
        for trial in trials
    ]
    return "".join(parts) + "</svg>"
