"""A recipe: everything a run needs to know, typed. What stands under a field is its line in docs/recipe.md.

Unknown keys are refused, so a misspelt setting never trains silently with its default. Settings that contradict
each other are refused here, with both names and the way out, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, field_validator, model_validator

from cnclip_ft.new_towers import check_new_towers
from cnclip_ft.recipe_data import DataSection, Negatives
from cnclip_ft.recipe_section import Count, Place, Section, Share
from cnclip_ft.recipe_stage import Augmentation, Distill, Ground, Objective, Teach, TrainRule
from cnclip_ft.recipe_valid import score_path

TrainName = Literal["text", "image", "both", "heads"]


class ModelSection(Section):
    """Where every weight comes from."""

    start: Place | dict[str, Any]
    """A published name, a checkpoint of any kind, or towers: `{image: …, text: …}`."""
    image_size: int | None = Field(None, ge=8, le=8192)
    """Side of the pictures in pixels; null: the start's own."""
    max_patches: int | None = Field(None, ge=1, le=16384)
    """Most patches of a picture, for towers that take it in its own shape (NaFlex); null: the start's own."""
    source: Literal["huggingface", "modelscope"] = "huggingface"
    """Where published names come from."""

    @field_validator("start")
    @classmethod
    def _new_towers(cls, start: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(start, dict) and "architecture" not in start:
            check_new_towers(start)
        elif isinstance(start, dict) and not isinstance(start["architecture"], str):
            raise ValueError(f"architecture is a name (found {start['architecture']!r})")
        return start

    @property
    def code(self) -> str | None:
        """The import path of an image tower, where that is the start."""
        image = self.start.get("image") if isinstance(self.start, dict) else None
        image = str(image.get("path") if isinstance(image, dict) else image)
        return image if ":" in image and not Path(image).expanduser().exists() else None


class Stage(Section):
    """One stage: what trains, for how long, how fast. `batch_size` is global, over all devices."""

    kind: Literal["pairs", "teach", "ground"] = "pairs"
    """What it learns from: pictures with texts, a teacher (`teach`), or pictures with boxes (`ground`)."""
    teach: Teach | None = None
    """kind teach: the teacher, and the parallel text."""
    distill: Distill | None = None
    """kind pairs: a teacher beside the pairs, and what of it is met."""
    negatives: Negatives | None = None
    """kind pairs: texts beside each pair that are not true of its picture (hard negatives); null: none."""
    captions_at_once: int = Field(1, ge=1, le=64)
    """kind pairs: so many captions of its picture each pair brings into a step, its own and others drawn anew; the picture goes through
    its tower once."""
    ground: Ground | None = None
    """kind ground: the boxes."""
    train: TrainName | Annotated[list[TrainRule], Field(min_length=1, max_length=1000)]
    """Which tower trains (of a `ground` stage the heads always do; heads: they alone), or a table of rules that cover every parameter
    once."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """How long the stage trains, in passes over the data; either this or steps."""
    steps: int | None = Field(None, ge=1, lt=10**7)
    """How long the stage trains, in steps of a global batch; either this or epochs."""
    batch_size: int = Field(ge=2, le=2**24)
    """Pairs that are compared with each other, over all devices; of a `ground` stage pictures."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Pairs computed at once per device where the batch does not fit, with the same gradient; auto: as many as fit."""
    learning_rate: float = Field(gt=0, le=1e3)
    """Highest rate of the stage."""
    warmup_steps: int | None = Field(None, ge=0, lt=10**7)
    """Steps in which the rate rises from zero; null: a tenth of the stage, at most 100."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the rate goes on after the warm-up."""
    final_rate: float = Field(0.0, ge=0, le=1)
    """Share of the rate that is left at the end of the cosine."""
    weight_decay: float = Field(1e-3, ge=0)
    """AdamW's; biases, norms, embeddings and the temperature have none."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """AdamW's decay of its two averages."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's addend under the root."""
    gradient_clip: float | None = Field(None, gt=0)
    """Largest norm of a gradient; null: not bounded."""
    objective: Objective = Objective()
    """What the stage makes small."""
    augment: Augmentation = Augmentation()
    """Random changes of the pictures."""
    feature_cache: bool = True
    """Where the image trunk or the whole text tower is frozen: compute its features once."""
    views: int = Field(1, ge=1, le=1000)
    """Augmented views per image in the cache, rotated by epoch."""
    batch_norm: Literal["train", "frozen"] = "train"
    """Statistics of batch normalisation in a tower that trains; a frozen tower's never move."""
    gradient_checkpointing: Literal["none", "image", "text", "both"] = "none"
    """Towers that compute their activations again in the backward: less memory, about a third slower."""
    patch_dropout: Share = 0.0
    """Share of a picture's patches that training leaves out (FLIP)."""
    unmasked_steps: int = Field(0, ge=0, lt=10**7)
    """Last steps of the stage without patch dropping."""
    validate_every: Count | None = None
    """Steps between validations; null: at every epoch's end."""
    keep_every: Count | None = None
    """Epochs between checkpoints that stay, as `epoch-N` in the stage's folder; null: best and last alone."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of averaged weights, which are then judged and kept."""
    until: Literal["end", "plateau"] = "end"
    """plateau: stop when validations bring no rise; epochs or steps are then the most it may take."""
    min_gain: float = Field(0.1, ge=0)
    """plateau: a smaller rise of the score, in points, counts as none."""
    patience: int = Field(2, ge=1)
    """plateau: validations in a row without a rise."""
    interpolate: int | None = Field(None, ge=2, le=100)
    """At the end: judge weights between start and best in so many steps, and keep the winner."""
    best_by: str | None = None
    """The score that decides in this stage, as the run's `best_by`; null: that one, in a `ground` stage any_box_r1 of the first split with
    boxes."""
    skip_bad_steps: int = Field(0, ge=0)
    """Steps with a loss or gradient that is no number, left out before the run stops."""

    @model_validator(mode="after")
    def _agree(self) -> Stage:
        if (self.epochs is None) == (self.steps is None):
            way = (
                "{here}.epochs=N or {here}.steps=N"
                if self.epochs is None
                else "{here}.epochs=null or {here}.steps=null"
            )
            raise ValueError(f"give either epochs or steps (one of them, not both): {way}")
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be shorter than the stage ({self.steps} steps): "
                f"{{here}}.warmup_steps={self.steps // 10}"
            )
        if self.views > 1 and not self.feature_cache:
            raise ValueError("views is for the feature cache: {here}.feature_cache=true, or {here}.views=1")
        if self.views > 1 and not self.augment.changes:
            raise ValueError(
                "views above 1 without augmentation would be equal: {here}.augment.crop=0.8, or {here}.views=1"
            )
        if (self.kind == "teach") != (self.teach is not None):
            raise ValueError(
                "kind: teach needs its teacher and its texts: {here}.teach={teacher: CHECKPOINT, texts: DIR/parallel}"
                if self.teach is None
                else "teach is for kind: teach: {here}.kind=teach, or {here}.teach=null"
            )
        if self.kind == "teach" and self.distill is not None:
            raise ValueError(
                "distill is for pairs of picture and text, and a teaching stage sees none: {here}.distill=null"
            )
        if self.kind == "teach" and self.negatives is not None:
            raise ValueError("negatives stand beside pictures, and a teaching stage sees none: {here}.negatives=null")
        if self.distill is not None and self.captions_at_once > 1:
            raise ValueError(
                "what a teacher says is met of each pair's own caption, so captions_at_once is not for a stage with distill: "
                "{here}.captions_at_once=1, or {here}.distill=null"
            )
        if self.kind == "teach":
            for name in ("objective", "augment", "views", "patch_dropout", "unmasked_steps", "captions_at_once"):
                default = type(self).model_fields[name].default
                if getattr(self, name) != default:
                    typed = "{}" if isinstance(default, Section) else default
                    raise ValueError(f"{name} is for pictures, and a teaching stage sees none: {{here}}.{name}={typed}")
            if self.interpolate and self.teach is not None and self.teach.keep == "last":
                raise ValueError("interpolate chooses by score, keep: last does not: {here}.interpolate=null")
            if self.train in ("image", "both"):
                raise ValueError(
                    "a teaching stage sees no pictures, so the image tower cannot train: {here}.train=text"
                )
        self._agree_on_boxes()
        if isinstance(self.train, list) and all(rule.rate == 0 for rule in self.train):
            raise ValueError(
                "the table freezes everything, so the stage trains nothing: give a rule a rate above 0, {here}.train.0.rate=1"
            )
        return self

    def _agree_on_boxes(self) -> None:
        if self.kind != "ground":
            if self.ground is not None:
                raise ValueError("ground is for kind: ground: {here}.kind=ground, or {here}.ground=null")
            if self.train == "heads":
                raise ValueError(
                    "heads train in a stage of kind ground alone: {here}.kind=ground, or {here}.train=both"
                )
            return
        self.ground = self.ground or Ground()
        if self.distill is not None:
            raise ValueError(
                "distill is for pairs of picture and text, and this stage learns boxes: {here}.distill=null"
            )
        if self.negatives is not None:
            raise ValueError(
                "negatives stand beside pairs, and this stage learns boxes; other phrases are its own, {here}.ground.negatives: "
                "{here}.negatives=null"
            )
        for name in ("objective", "views", "patch_dropout", "unmasked_steps", "captions_at_once"):
            default = type(self).model_fields[name].default
            if getattr(self, name) != default:
                typed = "{}" if isinstance(default, Section) else default
                raise ValueError(f"{name} is for pairs, and this stage learns boxes: {{here}}.{name}={typed}")
        if self.augment.changes and self.augment != Augmentation(colour=self.augment.colour):
            raise ValueError(
                "crops, mirroring and operations would move things out of their boxes; colour alone may change: "
                f"{{here}}.augment={{colour: {self.augment.colour:g}}}"
            )

    @field_validator("best_by")
    @classmethod
    def _known_score(cls, best_by: str | None) -> str | None:
        if best_by is not None:
            score_path(best_by)
        return best_by


# Names the run folder has, those of a stage's folder, and those Windows keeps for devices.
_NOT_STAGES = {"report", "state", "tensorboard", "cnclip-ft", "best", "last", "start", "con", "prn", "aux", "nul"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(10)
}


class Recipe(Section):
    """A whole run. Relative paths are taken from the folder the command is started in."""

    rules: Literal["own-data"] | None = None
    """What stages `align` and `contrast` leave open follows from data, device and start; null: nothing does. A run's `recipe.yaml` says what
    was chosen, and null here."""
    model: ModelSection
    """Where every weight comes from."""
    data: DataSection
    """What is trained and judged on."""
    stages: dict[str, Stage] = Field(min_length=1, max_length=99)
    """The stages by name, in order; each starts from the best of the one before. `stages.NAME=null` behind a command leaves one out."""
    output: Place = "runs/last"
    """The run folder."""
    feature_cache: Place | None = None
    """Folder of cached features; null: `feature_cache` beside the run folder."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of new weights, of the order of the pairs and of all that is drawn."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format the towers compute in; auto: bf16 where the device is fast at it."""
    fp8: bool = False
    """Products of the layers in 8 bits (torchao) beside bf16: cards of compute capability 8.9 or more; pays with `compile`."""
    compile: bool | Literal["layers", "max-autotune"] = False
    """Compile the towers with torch.compile for training steps; `layers`: one layer for all that are alike, in seconds;
    `max-autotune`: try many kernels, for minutes."""
    log_every: Count = 10
    """Steps between two lines of the log."""
    save_every: Count | None = None
    """Steps between states to continue from, besides every validation."""
    best_by: str = "mean_recall"
    """The score that decides: mean_recall, text_to_image.r1, image_to_text.r10, en.mean_recall, languages.mean_recall (the mean of
    Chinese and English, each by itself), 'split: mean_recall', 'birds: accuracy', …"""
    report_to: list[str] = []
    """Further trackers that accelerate knows: wandb, mlflow, comet_ml, …"""
    _chosen: tuple[str, ...] = PrivateAttr(default=())

    @property
    def chosen(self) -> tuple[str, ...]:
        """What `rules` chose and why, a line each; of a recipe that was read from a run, or has none: nothing."""
        return self._chosen

    def with_reasons(self, lines: Iterable[str]) -> Recipe:
        """The same recipe, that says so of itself."""
        recipe = self.model_copy()
        recipe._chosen = tuple(lines)
        return recipe

    @field_validator("stages")
    @classmethod
    def _plain_names(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        for name in stages:
            plain = name.replace("_", "").replace("-", "").isalnum() and len(name.encode()) <= 100
            if not plain or name.lower() in _NOT_STAGES:
                raise ValueError(f"{name!r} cannot name a stage (it becomes a folder of the run); choose another word")
        if len({name.lower() for name in stages}) < len(stages):
            raise ValueError("two stages differ in capitals only (each becomes a folder of the run)")
        return stages

    @field_validator("best_by")
    @classmethod
    def _known_score(cls, best_by: str) -> str:
        score_path(best_by)
        return best_by

    @model_validator(mode="after")
    def _best_by_names_a_split(self) -> Recipe:
        self._check_score(self.best_by, "best_by")
        for name, stage in self.stages.items():
            if stage.kind == "ground" and self.data.decisive("ground") is None:
                raise ValueError(
                    f"stage {name} learns boxes, and data.valid has no split to judge them by: data.valid={{pairs: DIR/valid, boxes: "
                    "{boxes: DIR/valid_boxes}}"
                )
            if stage.best_by is not None:
                self._check_score(stage.best_by, f"stages.{name}.best_by")
        return self

    def _check_score(self, best_by: str, key: str) -> None:
        split, score = score_path(best_by)
        sets = self.data.valid_sets()
        if split is not None and split not in sets:
            raise ValueError(
                f"{key} names the split '{split}'; data.valid has {', '.join(sets)}: {key}='{next(iter(sets))}: {score}'"
            )
        judged = sets[split] if split is not None else next(iter(sets.values()))
        if not judged.has_score(score):
            raise ValueError(
                f"{key} is '{best_by}', but scores there are {', '.join(judged.scores)}: "
                f"{key}='{split or next(iter(sets))}: {judged.scores[0]}'"
            )

    def decides(self, stage: str) -> str:
        """The score that decides in this stage."""
        setting = self.stages[stage]
        return setting.best_by or self.data.decisive(setting.kind) or self.best_by


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every setting spelt out, as ``recipe.yaml`` of the run folder."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
