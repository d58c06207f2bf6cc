"""Whether a run may go on: the same recipe, the same data, the same model, wherever they now lie."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from cnclip_ft.data.batching import VISITS
from cnclip_ft.models.assembly import describe_model
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.heads import completed
from cnclip_ft.recipe import Recipe, Stage
from cnclip_ft.training.context import Context
from cnclip_ft.training.stage_plan import StagePlan
from cnclip_ft.training.teaching import Teaching
from data_tools.errors import RequestError
from data_tools.store.checksum import written

_AT_ONCE = 2**22

# These do not change what is computed; a batch in other pieces only by rounding.
_FREE = re.compile(
    r"output|log_every|feature_cache|save_every|report_to|compile|model\.source|data\.(workers|decode|max_damaged_images|table_cache)|"
    r"stages\.[^.]+\.(micro_batch_size|gradient_checkpointing|skip_bad_steps|keep_every)"
)
# Where the data and the start lie may change; what they hold is compared.
_PLACES = re.compile(
    r"data\.train(\.\d+\.store)?$|data\.(valid|guard\.split)(\.|$)|model\.start(\.|$)|stages\.[^.]+\.(teach\.(teacher|texts)|distill\.teacher|ground\.boxes)$"
)


def identity(context: Context, model: DualEncoder, plans: Sequence[StagePlan]) -> dict[str, Any]:
    """What the state says of data and model: contents by checksum, the training split's order and tokens too."""
    described = {key: value for key, value in describe_model(model).items() if key != "architecture"}
    described |= {"vocabulary": context.tokenizer.fingerprint(), "new": context.new_parts}
    pairs = context.pairs
    keys, images = (
        [pairs.image_keys, pairs.text_keys],
        context.train_store.image_ids if pairs.ids is None else pairs.ids,
    )
    return {
        "train": context.train_store.checksum(),
        "order": _sha(*keys, more=chain[Any](_as_integers(pairs.tokens), [pairs.starts], written(images, repr))),
        "valid": {name: evaluator.checksum() for name, evaluator in context.evaluators.items()},
        "guard": context.guard_store.checksum() if context.guard_store is not None else None,
        "teaching": {plan.name: _taught(plan.teaching) for plan in plans if plan.teaching is not None},
        "grounding": {plan.name: plan.grounding.digest for plan in plans if plan.grounding is not None},
        "distilling": {plan.name: plan.distilling.teacher.digest for plan in plans if plan.distilling is not None},
        "model": described,
        "devices": context.world,
        "device": context.device.type,
        "precision": context.precision,
    }


def earlier_order(state: dict[str, Any]) -> bool:
    """Whether the run of a state began with the order of an earlier version.

    Raises:
        RequestError: a newer version began it, with an order that is not known here.
    """
    began = state.get("visits", 0)
    if began > VISITS:
        raise RequestError(
            "--continue: a newer version began this run, and its order of pairs is not known here; use that one"
        )
    return not began


def _as_integers(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """As states have always summed them, whatever type holds them here."""
    return (tokens[at : at + _AT_ONCE].astype(np.intc) for at in range(0, len(tokens), _AT_ONCE))


def _taught(teaching: Teaching) -> dict[str, str]:
    store = teaching.texts.store
    return {"teacher": teaching.teacher.digest, "texts": f"{store.checksum()}-{store.order()}"}


def _sha(*parts: Any, more: Iterable[Any] = ()) -> str:
    sha = hashlib.sha256()
    for part in chain(parts, more):
        sha.update(part)
    return sha.hexdigest()


def refuse_other_data(context: Context, now: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """Refuse other data or another model than the run began with; returns what differs and may. `now` is its `identity`.

    A state of an earlier version says nothing of them; its paths were compared instead.

    Raises:
        RequestError: naming the setting, and the ways out.
    """
    if "heads.norm.weight" in state["model"] and completed(state["model"]) is not state["model"]:
        raise RequestError(
            "--continue: an earlier version began this run, whose heads for boxes had fewer numbers. Its checkpoints are read: begin a run from "
            f"one, model.start={context.folder}/STAGE/last output=ANOTHER FOLDER"
        )
    began = state.get("identity")
    if began is None:
        return []
    data = context.recipe.data
    if list(began["valid"]) != list(now["valid"]):
        raise RequestError(
            f"--continue: the run began with the validation splits {', '.join(began['valid'])}; data.valid now has "
            f"{', '.join(now['valid'])}. Name the same ones in the same order."
        )
    places = " + ".join(data.train_places())
    held = [("train", "data.train", places), ("order", "data.train", places)]
    held += [("guard", "data.guard.split", data.guard.split)] if data.guard and data.guard.split else []
    for key, setting, place in held:
        _refuse(context.folder, setting, place, began[key], now[key], "in another order" if key == "order" else "")
    for name, valid in data.valid_sets().items():
        setting = valid.setting(f"data.valid.{name}" if isinstance(data.valid, dict) else "data.valid")
        _refuse(context.folder, setting, valid.places()[0], began["valid"][name], now["valid"][name])
    for name, found in now["teaching"].items():
        teach = context.recipe.stages[name].teach
        for key, checksum in found.items():
            place = getattr(teach, key)
            _refuse(context.folder, f"stages.{name}.teach.{key}", place, began["teaching"][name][key], checksum)
    for name, found in now["grounding"].items():
        ground = context.recipe.stages[name].ground
        place = (None if ground is None else ground.boxes) or places
        _refuse(context.folder, f"stages.{name}.ground.boxes", place, began["grounding"][name], found)
    for name, found in now["distilling"].items():
        distill = context.recipe.stages[name].distill
        place = "" if distill is None else distill.teacher
        _refuse(context.folder, f"stages.{name}.distill.teacher", place, began["distilling"][name], found)
    model = [key for key, before, _ in _differences(began["model"], now["model"]) if before is not None]
    if model:
        raise RequestError(
            f"model.start: {context.recipe.model.start} makes another model than the run in {context.folder} began with (differs in "
            f"{', '.join(model)}). Name the start it began with: model.start=PLACE."
        )
    return [
        f"The run began with {began[key]} as its {what} and goes on with {now[key]}: numbers may differ by rounding and dropout."
        for key, what in (("devices", "number of devices"), ("device", "kind of device"), ("precision", "precision"))
        if began[key] != now[key]
    ]


def _refuse(folder: Path, setting: str, place: str, before: str, now: str, how: str = "") -> None:
    if before != now:
        raise RequestError(
            f"{setting}: {place} holds other data than the run in {folder} began with"
            + (f" (the same pairs {how})" if how else f" (checksum {before[:12]}… → {now[:12]}…)")
            + f". Put the data back, or name their place: {setting}=PLACE. To train on with the new data, start a new run "
            f"from the weights: without --continue, with model.start={folder}/STAGE/last and another output=FOLDER."
        )


def refuse_other_recipe(recipe: Recipe, state: dict[str, Any]) -> Stage | None:
    """Refuse settings that compute something else. The stage of the state may be longer than it was: returned is what it was.

    Raises:
        RequestError: naming each, as it was and as it is.
    """
    stored = yaml.safe_load(state["recipe"])
    biased = "logit_bias" in (state["identity"]["model"] if "identity" in state else state["model"])
    for name, stage in stored["stages"].items():
        if stage["objective"]["kind"] == "sigmoid":  # label_smoothing was once taken and passed over there
            stage["objective"]["label_smoothing"] = 0.0
        now = recipe.stages.get(name)
        if (
            stage["objective"]["kind"] == "contrastive"
            and now is not None
            and now.objective.kind is None
            and not biased
        ):
            stage["objective"]["kind"] = None  # what recipes without the word once meant, and still do for this model
    try:
        stored = Recipe.model_validate(stored).model_dump(
            mode="json"
        )  # settings that are new since have their defaults
    except ValidationError:
        pass
    places_too = "identity" not in state
    if recipe.data.context_length is None and not places_too:  # it was 52 by itself once; the model's own is compared
        stored["data"]["context_length"] = None
    name, setting = list(stored["stages"].items())[state["stage"]]
    found = _differences(stored, recipe.model_dump(mode="json"))
    longer = [
        key
        for key, before, now in found
        if key in (f"stages.{name}.epochs", f"stages.{name}.steps") and before and now and now > before
    ]
    changed = [
        f"{key}: {before!r} → {now!r}"
        for key, before, now in found
        if key not in longer and not _FREE.fullmatch(key) and (places_too or not _PLACES.match(key))
    ]
    if changed:
        raise RequestError(
            "--continue goes on with the very same recipe, but these settings differ (stored → now):\n  "
            + "\n  ".join(changed)
            + "\nTo train on from its weights instead: without --continue, with model.start=RUN/STAGE/last and another output=FOLDER."
        )
    return Stage.model_validate(setting) if longer else None


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in dict.fromkeys([*before, *now])
            for found in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    if path == "data.train" and isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            found
            for number, (one, other) in enumerate(zip(before, now, strict=True))
            for found in _differences(one, other, f"{path}.{number}")
        ]
    return [] if before == now else [(path, before, now)]
