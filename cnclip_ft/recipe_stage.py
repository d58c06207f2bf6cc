"""Settings that stand in a stage of a recipe: what trains and how, the objective, augmentation, teachers, boxes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cnclip_ft.recipe_section import Count, OneOf, Place, Section, Share

# Losses over pairs, module:class each (`training.loss.Objective`), found when a stage is planned: reading a recipe imports nothing
# heavy. Code from outside adds its own.
OBJECTIVES = {
    "contrastive": "cnclip_ft.training.loss:ContrastiveObjective",
    "sigmoid": "cnclip_ft.training.loss:SigmoidObjective",
}


class Lora(Section):
    """Low-rank updates (arXiv 2106.09685) through peft; merged into the weights of every checkpoint."""

    rank: int = Field(8, ge=1, le=65536)
    """Rank of the updates."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Share of an update's inputs that is dropped while it trains."""


class TrainRule(Section):
    """One line of the table that says what trains and how fast."""

    tower: Literal["image", "text", "temperature", "heads"]
    """What the rule is for; temperature covers the bias of a sigmoid objective too, heads are those of a `ground` stage."""
    part: str = "all"
    """all, trunk, projection, 'last N', 'first N' (blocks, from the output or the input) or rest."""
    rate: float = Field(1.0, ge=0)
    """Factor on the stage's learning rate; 0 freezes."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor per block on the rate, going down from the output."""
    lora: Lora | None = None
    """Train low-rank updates of the part's linear layers instead of its weights."""

    @field_validator("part")
    @classmethod
    def _known_part(cls, part: str) -> str:
        words = part.split()
        ranged = (
            len(words) == 2
            and words[0] in ("last", "first")
            and words[1].isascii()
            and words[1].isdigit()
            and 0 < len(words[1]) < 6
            and int(words[1]) > 0
        )
        if part not in ("all", "trunk", "projection", "rest") and not ranged:
            raise ValueError(f"'{part}' is not a part: {{here}}=all, trunk, projection, rest, 'last N' or 'first N'")
        return part

    @model_validator(mode="after")
    def _lora_is_for_towers(self) -> TrainRule:
        if self.lora and (self.tower in ("temperature", "heads") or self.part == "projection" or self.rate == 0):
            raise ValueError("lora is for the layers of a tower that trains: {here}.lora=null, or {here}.rate=1")
        if self.lora and self.layer_decay != 1:
            raise ValueError(
                "lora and layer_decay exclude each other: low-rank updates share one rate: {here}.lora=null, or {here}.layer_decay=1"
            )
        return self


class Objective(Section):
    kind: Annotated[str, OneOf(OBJECTIVES)] | None = None
    """Softmax over the batch in both directions, or a sigmoid for every pair; null: the start's own, sigmoid where it brings a
    bias (SigLIP)."""
    positives: Literal["exclude", "soft", "ignore"] = "exclude"
    """Other pairs of the batch with the same image or text: no negatives, positives too, or negatives all the same."""
    label_smoothing: Share = 0.0
    """Share of the target spread over the batch; contrastive only."""
    dimensions: Annotated[list[Count], Field(max_length=32)] | None = None
    """Widths that features may be cut to afterwards (`--dimensions`): the loss is the mean over each of them and whole features; null: none."""
    tile: Count | None = None
    """Rows of the score matrix that are computed at once; null: as memory suggests."""

    @field_validator("dimensions")
    @classmethod
    def _some(cls, widths: list[int] | None) -> list[int] | None:
        if widths == []:
            raise ValueError(
                "the list is empty, so there is no width to cut to: {here}=null, or widths below the model's own, {here}=[256, 128]"
            )
        return widths

    @model_validator(mode="after")
    def _smoothing_is_for_softmax(self) -> Objective:
        if self.kind == "sigmoid" and self.label_smoothing:
            raise ValueError(
                "label_smoothing spreads the target of a softmax, and a sigmoid has none: {here}.label_smoothing=0, "
                "or {here}.kind=contrastive"
            )
        return self


class Augmentation(Section):
    """Random crop, colour and operations on the device. Mirroring is off: it would mirror the text in pictures."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of the area that a random crop keeps; 1: no crop."""
    size: int | None = Field(None, ge=8, le=8192)
    """Side of these crops in pixels, smaller than the model's for quicker steps of a tower that takes any; null: the model's."""
    colour: float = Field(0.0, ge=0, le=1)
    """Strength of random changes of brightness, contrast and saturation."""
    mirror: bool = False
    """Mirror every second picture."""
    operations: int = Field(0, ge=0, le=8)
    """So many random operations a picture, as RandAugment."""
    strength: float = Field(0.3, ge=0, le=1)
    """Strength of these operations."""
    auto_augment: Literal["original"] | None = None
    """AutoAugment's policy for ImageNet instead, with timm's operations, and crops drawn and resampled as timm's; null: none."""

    @model_validator(mode="after")
    def _one_policy(self) -> Augmentation:
        if self.auto_augment and self.operations:
            raise ValueError("auto_augment brings its own operations: {here}.operations=0, or {here}.auto_augment=null")
        return self

    @model_validator(mode="after")
    def _size_of_crops(self) -> Augmentation:
        if self.size is not None and self.crop == 1:
            raise ValueError("size is that of random crops, and there are none: {here}.crop=0.3, or {here}.size=null")
        if self.size is not None and self.auto_augment:
            raise ValueError("auto_augment has crops of the model's size alone: {here}.size=null")
        return self

    @property
    def changes(self) -> bool:
        return self.crop < 1 or self.colour > 0 or self.mirror or self.operations > 0 or self.auto_augment is not None


class Teach(Section):
    """A frozen teacher's features of sentences are met by the text tower, in several languages, on parallel text alone."""

    teacher: Place
    """The teacher: a checkpoint of any kind."""
    texts: Place
    """A store of parallel text (`cnclip-ft data import parallel`)."""
    language: str = Field("en", pattern="^[a-z]{2}$")
    """The language the teacher reads."""
    languages: (
        Annotated[list[Annotated[str, Field(pattern="^[a-z]{2}$")]], Field(min_length=1, max_length=100)] | None
    ) = None
    """The languages that are learnt; null: all of the store."""
    meet: float = Field(1.0, gt=0, le=1000)
    """Weight of the squared distance between the student's unit feature of a text, in every language, and the teacher's."""
    between: float = Field(0.1, ge=0, le=1000)
    """Weight of the InfoNCE between the languages of a row; 0: none."""
    keep: Literal["best", "last"] = "best"
    """What the stage ends with: its best by `best_by`, or its end, for a teacher in whose space the pictures do not lie."""


class Distill(Section):
    """A frozen teacher's features of the same pairs are met beside the stage's own objective."""

    teacher: Place
    """The teacher: a checkpoint of any kind, larger or smaller than the model."""
    features: float = Field(1.0, ge=0, le=1000)
    """Weight of the squared distance between unit features of model and teacher, half for pictures and half for texts."""
    similarities: float = Field(0.0, ge=0, le=1000)
    """Weight of the divergence (KL) of the model's in-batch similarities from the teacher's, both ways."""
    pairs: float = Field(1.0, ge=0, le=1000)
    """Weight of the stage's own objective; 0: the teacher alone."""

    @model_validator(mode="after")
    def _learns_something(self) -> Distill:
        if not self.features and not self.similarities:
            raise ValueError("with both weights 0 nothing is learnt of the teacher: {here}.features=1")
        return self


class Ground(Section):
    """Heads on the image tower's patches learn boxes for phrases, and the towers with them (OWL-ViT)."""

    boxes: Place | None = None
    """A store whose phrases have boxes; null: `data.train`."""
    negatives: int = Field(50, ge=0, le=10000)
    """Random other phrases of the store that every picture of a step is asked as well."""
    stay: float = Field(10.0, ge=0, le=1000)
    """Weight of the squared distance between unit features of pictures and phrases and what they were when the stage began: retrieval
    stays; 0: none."""
