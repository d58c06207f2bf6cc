"""A recipe: everything a run needs to know, in one typed YAML file.

Unknown keys are refused, so a misspelt setting never trains silently with its default. Settings that contradict
each other are refused here, with both names and the way out, before anything is loaded. ``key.path=value`` on the
command line overrides a single setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from cnclip_ft.new_towers import check_new_towers, fault_lines, short
from cnclip_ft.yaml_file import parse_yaml, read_yaml
from data_tools.errors import RequestError

SHIPPED = Path(__file__).with_name("recipes")
TrainName = Literal["text", "image", "both"]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _place(path: str) -> str:
    if not path.strip() or "\0" in path or len(path.encode("utf-8", "replace")) > 4000:
        raise ValueError("a path is needed here")
    return path


Place = Annotated[str, AfterValidator(_place)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, content: Any) -> Any:
        for name, value in content.items() if isinstance(content, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and "bool" not in str(field.annotation):
                raise ValueError(f"{name} is {str(value).lower()}, which is no value for it")
        return content


class ModelSection(Section):
    """Where every weight comes from."""

    start: Place | dict[str, Any]  # published name, checkpoint, or {image: …, text: …}
    image_size: int | None = Field(None, ge=8, le=16384)  # None: the start's own
    source: Literal["huggingface", "modelscope"] = "huggingface"

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


class Guard(Section):
    """A general split judged along, so that learning one's own data does not unlearn everything else."""

    split: Place
    max_drop: float = Field(1.0, ge=0)  # points of mean recall below the score before the first step
    action: Literal["report", "stop"] = "report"  # stop: such a model is never the best, and the run ends


class ZeroShot(Section):
    """Judged along: are pictures nearest to the name of their class?"""

    zero_shot: Place  # a folder with a sub-folder for each class, or a store whose texts are class names
    classes: Place  # file of classes, as for `cnclip-ft classify`
    templates: Place = "zh"  # zh, en, zh+en, none, or a file

    scores: ClassVar[tuple[str, ...]] = ("accuracy", "top5", "mean_per_class")

    def places(self) -> list[str]:
        """Files and folders it names; `templates` may be a word."""
        return [self.zero_shot, self.classes]


RECALLS = (
    "mean_recall",
    *(f"{way}.{n}" for way in ("text_to_image", "image_to_text") for n in ("r1", "r5", "r10", "mean_recall")),
)
"""Scores of a validation split that is a store."""

# One validation set: a store is a path, what else can be judged a section that begins with its name.
ValidSet = Annotated[
    Annotated[Place, Tag("str")] | Annotated[ZeroShot, Tag("nullable")],
    Discriminator(lambda content: "nullable" if isinstance(content, (dict, ZeroShot)) else "str"),
]


class DataSection(Section):
    """Stores (`cnclip-ft data build` or `data import` makes them) and how they are read."""

    train: Place
    valid: (
        Place | Annotated[dict[str, ValidSet], Field(min_length=1)]
    )  # one split, or {name: split or {zero_shot: …}}; the first one decides what is best
    guard: Guard | None = None  # a split on which the model must not get worse
    context_length: int | None = Field(None, ge=3, le=512)  # tokens of the longest text; None: the start's own
    workers: Annotated[int, Field(ge=0, le=512)] | Literal["auto"] = "auto"  # decoding processes per device
    # Training may decode a JPEG at a half of its scale or less, never below what the tower needs: faster for large photos,
    # whose pixels are then no longer within 1/255 of the whole decoding. Evaluation always decodes whole.
    reduced_jpegs: bool = True
    length_window: int = Field(1, ge=1, le=10**6)  # batches sorted together by length; 1 keeps the order fully random
    max_damaged_images: int = Field(10, ge=0)  # replaced by another pair; one more stops the run

    @field_validator("valid")
    @classmethod
    def _named(cls, valid: str | dict[str, str | ZeroShot]) -> str | dict[str, str | ZeroShot]:
        if isinstance(valid, dict) and not isinstance(next(iter(valid.values())), str):
            raise ValueError(
                "the first validation split is a store: rows and tables show recall on it; name another later"
            )
        for name in valid if isinstance(valid, dict) else ():
            if not name.strip() or not name.isprintable() or name in ("guard", "train"):
                raise ValueError(f"{name!r} cannot name a validation split; choose another word")
        return valid

    def valid_sets(self) -> dict[str, str | ZeroShot]:
        return self.valid if isinstance(self.valid, dict) else {"valid": self.valid}

    def valid_places(self) -> list[str]:
        """All that validation reads."""
        return [p for s in self.valid_sets().values() for p in ([s] if isinstance(s, str) else s.places())]


class Lora(Section):
    """Low-rank updates (arXiv 2106.09685) through peft; merged into the weights of every checkpoint."""

    rank: int = Field(8, ge=1, le=65536)
    alpha: float = Field(16, gt=0)  # the update is scaled by alpha / rank
    dropout: Share = 0.0


class TrainRule(Section):
    """One line of the table that says what trains and how fast."""

    tower: Literal["image", "text", "temperature"]
    part: str = (
        "all"  # all | trunk | projection | last N | first N | rest  (blocks, counted from the output or the input)
    )
    rate: float = Field(1.0, ge=0)  # factor on the stage's learning rate; 0 freezes
    layer_decay: float = Field(1.0, gt=0, le=1)  # factor per block, going down from the output
    lora: Lora | None = None  # train low-rank updates of the part's linear layers instead of its weights

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
            raise ValueError(f"'{part}' is not a part; use all, trunk, projection, rest, 'last N' or 'first N'")
        return part

    @model_validator(mode="after")
    def _lora_is_for_towers(self) -> TrainRule:
        if self.lora and (self.tower == "temperature" or self.part == "projection" or self.rate == 0):
            raise ValueError("lora is for the layers of a tower that trains: take it out of this rule, or set a rate")
        if self.lora and self.layer_decay != 1:
            raise ValueError("lora and layer_decay exclude each other: low-rank updates share one rate")
        return self


class Objective(Section):
    kind: Literal["contrastive", "sigmoid"] = "contrastive"
    positives: Literal["exclude", "soft", "ignore"] = "exclude"
    label_smoothing: Share = 0.0
    tile: Count | None = None

    @model_validator(mode="after")
    def _smoothing_is_for_softmax(self) -> Objective:
        if self.kind == "sigmoid" and self.label_smoothing:
            raise ValueError(
                "label_smoothing spreads the target of a softmax, and kind: sigmoid has none: leave label_smoothing out, "
                "or set kind: contrastive"
            )
        return self


class Augmentation(Section):
    """Random crop, colour and operations on the device. Mirroring is off: it would mirror the text in pictures."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest share of the area kept; 1 = no crop
    colour: float = Field(0.0, ge=0, le=1)  # strength of brightness, contrast and saturation changes
    mirror: bool = False
    operations: int = Field(0, ge=0, le=8)  # so many random operations a picture, as RandAugment
    strength: float = Field(0.3, ge=0, le=1)  # of these operations

    @property
    def changes(self) -> bool:
        return self.crop < 1 or self.colour > 0 or self.mirror or self.operations > 0


class Stage(Section):
    """One stage: what trains, for how long, how fast. `batch_size` is global, over all devices."""

    train: TrainName | Annotated[list[TrainRule], Field(min_length=1, max_length=1000)]
    epochs: float | None = Field(None, gt=0, le=1e6)
    steps: int | None = Field(None, ge=1, lt=10**7)
    batch_size: int = Field(ge=2, le=2**24)
    micro_batch_size: Count | Literal["auto"] | None = (
        None  # per device; splits a batch that does not fit, same gradient
    )
    learning_rate: float = Field(gt=0, le=1e3)
    warmup_steps: int | None = Field(None, ge=0, lt=10**7)  # None: a tenth of the stage, at most 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_rate: float = Field(0.0, ge=0, le=1)  # share of the rate that is left at the end of the cosine
    weight_decay: float = Field(1e-3, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    gradient_clip: float | None = Field(None, gt=0)
    objective: Objective = Objective()
    augment: Augmentation = Augmentation()
    feature_cache: bool = True  # where the image trunk is frozen: compute its features once
    views: int = Field(1, ge=1, le=1000)  # augmented views per image in the cache, rotated by epoch
    batch_norm: Literal["train", "frozen"] = "train"  # statistics of a tower that trains; a frozen tower's never move
    gradient_checkpointing: Literal["none", "image", "text", "both"] = "none"
    patch_dropout: Share = 0.0
    unmasked_steps: int = Field(0, ge=0, lt=10**7)  # last steps of the stage without patch dropping
    validate_every: Count | None = None  # steps; None: at every epoch's end
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of the averaged weights, judged and kept instead
    until: Literal["end", "plateau"] = "end"  # plateau: epochs or steps are then the most it may take
    min_gain: float = Field(0.1, ge=0)  # plateau: a smaller rise of the score that decides counts as none
    patience: int = Field(2, ge=1)  # plateau: validations in a row without a rise
    interpolate: int | None = Field(
        None, ge=2, le=100
    )  # at the end: judge weights between start and best in so many steps
    skip_bad_steps: int = Field(
        0, ge=0
    )  # steps with a loss or gradient that is no number, left out before the run stops

    @model_validator(mode="after")
    def _agree(self) -> Stage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (one of them, not both)")
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be shorter than the stage ({self.steps} steps)")
        if self.views > 1 and not self.feature_cache:
            raise ValueError("views is for the feature cache: set feature_cache: true, or views: 1")
        if self.views > 1 and not self.augment.changes:
            raise ValueError("views above 1 without augmentation would be equal: set augment.crop or augment.colour")
        if isinstance(self.train, list) and all(rule.rate == 0 for rule in self.train):
            raise ValueError("the table freezes everything, so the stage trains nothing: give a rule a rate above 0")
        return self


# Names the run folder has, those of a stage's folder, and those Windows keeps for devices.
_NOT_STAGES = {"report", "state", "tensorboard", "cnclip-ft", "best", "last", "start", "con", "prn", "aux", "nul"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(10)
}


class Recipe(Section):
    """A whole run. Relative paths are taken from the folder the command is started in."""

    model: ModelSection
    data: DataSection
    stages: dict[str, Stage] = Field(min_length=1, max_length=99)
    output: Place = "runs/last"
    feature_cache: Place | None = None  # folder of cached features; None: feature_cache beside the run folder
    seed: int = Field(0, ge=0, lt=2**32)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    log_every: Count = 10
    save_every: Count | None = None  # steps between states to continue from, besides every validation
    best_by: str = (
        "mean_recall"  # what decides: mean_recall, text_to_image.r1, image_to_text.r10, "split: mean_recall", …
    )
    report_to: list[str] = []  # further trackers accelerate knows: wandb, mlflow, comet_ml, …

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
        split, score = score_path(self.best_by)
        sets = self.data.valid_sets()
        if split is not None and split not in sets:
            raise ValueError(f"best_by names the split '{split}'; data.valid has {', '.join(sets)}")
        judged = sets[split] if split is not None else next(iter(sets.values()))
        known = RECALLS if isinstance(judged, str) else judged.scores
        if score not in known:
            raise ValueError(f"best_by is '{self.best_by}', but scores there are {', '.join(known)}")
        return self


def score_path(best_by: str) -> tuple[str | None, str]:
    """``"split: text_to_image.r1"`` → (split or None for the first, name of the score)."""
    split, colon, score = best_by.rpartition(":")
    score = score.strip()
    if score not in RECALLS and score not in ZeroShot.scores:
        raise ValueError(
            f"'{best_by}' is not a score; use mean_recall, or text_to_image or image_to_text with .r1, .r5, .r10 or "
            ".mean_recall, after 'split:' when another than the first validation split decides; of a zero_shot list "
            f"{', '.join(ZeroShot.scores)}"
        )
    return (split.strip() if colon else None), score


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """A path as it is, or the name of a shipped recipe with or without ``.yaml``."""
    path = Path(name)
    shipped = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    try:
        if path.is_file():
            return path
        if len(path.parts) == 1 and shipped.is_file():
            return shipped
        folder = path.is_dir()
    except (OSError, ValueError):  # a name too long, with NUL, links in a circle
        folder = False
    if folder:
        raise RequestError(f"{name} is a folder; name the recipe file in it, e.g. {path / 'recipe.yaml'}")
    raise RequestError(f"{str(name)[:200]}: no such recipe file. Shipped recipes: {', '.join(shipped_recipes())}")


def load_recipe(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and validate a recipe.

    Raises:
        RequestError: naming the file, the key, what was found and what is expected.
    """
    path = find_recipe(name)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RequestError(f"{path}: a recipe is a mapping with model, data and stages; found {type(content).__name__}")
    for override in overrides or []:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RequestError(_explain(path, error)) from None


def _override(content: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    *parents, last = key.split(".")
    if not sign or not all((*parents, last)):
        raise RequestError(f"{override!r} is not key.path=value, e.g. stages.align.batch_size=256")
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise RequestError(f"{override!r}: the value is not YAML: {error}. Put a text in quotes.") from None
    place = content
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RequestError(f"{override!r}: {parent} is not a section, it holds {short(inner)}")
        place = inner
    place[last] = parsed


def _explain(path: Path, error: ValidationError) -> str:
    return f"{path}: this recipe cannot be run:\n" + "\n".join(
        f"  {line}" for line in fault_lines(error, keys_at=_keys_at)
    )


def _keys_at(where: list[str]) -> list[str]:
    names: dict[str, type[Section]] = {
        "": Recipe,
        "model": ModelSection,
        "data": DataSection,
        "guard": Guard,
        "objective": Objective,
        "augment": Augmentation,
        "lora": Lora,
    }
    stage = len(where) == 2 and where[0] == "stages"
    judged = len(where) == 3 and where[:2] == ["data", "valid"]
    section = Stage if stage else ZeroShot if judged else names.get(where[-1] if where else "")
    return list(section.model_fields) if section else []


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every setting spelt out, as ``recipe.yaml`` of the run folder."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
