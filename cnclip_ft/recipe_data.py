"""The part of a recipe that says what is trained and judged on; what all its sections share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from data_tools.negatives import KINDS, Kind

Language = Literal["zh", "en", "mixed"]

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _place(path: str) -> str:
    if not path.strip() or "\0" in path or len(path.encode("utf-8", "replace")) > 4000:
        raise ValueError("a path is needed here")
    return path


Place = Annotated[str, AfterValidator(_place)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, content: Any) -> Any:
        for name, value in content.items() if isinstance(content, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and "bool" not in str(field.annotation):
                raise ValueError(f"{name} is {str(value).lower()}, which is no value for it")
        return content


class Guard(Section):
    """A general split judged along, so that learning one's own data does not unlearn everything else."""

    split: Place | None = None
    """A store the model must not get worse on; null: the first validation split, of which a `language` is watched."""
    language: Literal["zh", "en"] | None = None
    """The language whose texts count, by themselves; null: all texts together."""
    max_drop: float = Field(1.0, ge=0)
    """Points of mean recall it may lose against the score before the first step."""
    action: Literal["report", "stop"] = "report"
    """What a larger drop does; stop: such a model is never the best, and the run ends."""

    @model_validator(mode="after")
    def _watches_something(self) -> Guard:
        if self.split is None and self.language is None:
            raise ValueError("a guard watches a split or a language: {here}.split=PLACE or {here}.language=en")
        return self


class ValidStore(Section):
    """A store to judge on, whose texts do not all say their language."""

    store: Place
    """The store."""
    language: Language | None = None
    """Of texts that do not say theirs."""

    def places(self) -> list[str]:
        return [self.store]


class ZeroShot(Section):
    """Judged along: are pictures nearest to the name of their class?"""

    zero_shot: Place
    """A folder with a sub-folder for each class, or a store whose texts are class names."""
    classes: Place
    """File of classes, as for `cnclip-ft classify`."""
    templates: Place = "zh"
    """Prompts: zh, en, clip, siglip, several joined (zh+en), none, or a file."""

    scores: ClassVar[tuple[str, ...]] = ("accuracy", "top5", "mean_per_class")

    def places(self) -> list[str]:
        """Files and folders it names; `templates` may be a word."""
        return [self.zero_shot, self.classes]


class Negatives(Section):
    """Hard negatives: each picture against texts of its own that are not true of it, beside the batch."""

    swap: Annotated[list[Kind], Field(max_length=4)] = list(KINDS)
    """Attributes of which one is swapped in the pair's own caption, in Chinese and English; []: none."""
    kept: bool = True
    """Take the negatives that the store keeps beside a pair, too (`data mine`, or a column `negatives` of an imported table)."""
    count: int = Field(4, ge=1, le=64)
    """Most negatives of a pair in a step; each is one more text for the text tower."""
    weight: float = Field(1.0, gt=0, le=1000)
    """Weight of their loss beside the objective."""

    @field_validator("swap")
    @classmethod
    def _each_once(cls, swap: list[Kind]) -> list[Kind]:
        if len(set(swap)) < len(swap):
            raise ValueError(f"an attribute stands there twice: {{here}}=[{', '.join(dict.fromkeys(swap))}]")
        return swap

    @model_validator(mode="after")
    def _come_from_somewhere(self) -> Negatives:
        if not self.swap and not self.kept:
            raise ValueError("nothing is swapped and none is taken from the store: {here}.kept=true, or {here}=null")
        return self


class BoxesSplit(Section):
    """Judged along: does the model, once it has learnt boxes, find what phrases name?"""

    boxes: Place
    """A store whose phrases have boxes."""

    scores: ClassVar[tuple[str, ...]] = (
        *(f"{way}_r{k}" for way in ("any_box", "merged_box") for k in (1, 5, 10)),
        "pointing",
    )

    def places(self) -> list[str]:
        return [self.boxes]


RECALLS = (
    "mean_recall",
    *(f"{way}.{n}" for way in ("text_to_image", "image_to_text") for n in ("r1", "r5", "r10", "mean_recall")),
)
"""Scores of a validation split that is a store. Those of a language by itself begin with it, ``en.text_to_image.r1``; those of
Chinese and English, one mean of both, with ``languages``."""
PARTS = ("zh", "en", "mixed", "languages")


def _kind(content: Any) -> str:
    """The tag of a validation set; these words do not stand in messages."""
    if isinstance(content, ValidStore) or isinstance(content, dict) and content.keys() & {"store", "language"}:
        return "none"
    if isinstance(content, BoxesSplit) or isinstance(content, dict) and "boxes" in content:
        return "bool"
    return "nullable" if isinstance(content, (dict, ZeroShot)) else "str"


# One validation set: a store is a path or says its language, what else can be judged a section that begins with its name.
ValidSet = Annotated[
    Annotated[Place, Tag("str")]
    | Annotated[ValidStore, Tag("none")]
    | Annotated[ZeroShot, Tag("nullable")]
    | Annotated[BoxesSplit, Tag("bool")],
    Discriminator(_kind),
]


class TrainStore(Section):
    """One of several stores that are trained on together."""

    store: Place
    """The store."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often an epoch visits each of its pairs; 0.5: every second one, the others in the next epoch."""
    language: Language | None = None
    """Of texts that do not say theirs."""

    @field_validator("weight", mode="before")
    @classmethod
    def _visited(cls, weight: Any) -> Any:
        if isinstance(weight, (int, float)) and not weight > 0:
            raise ValueError("a store of the list is visited: give {here}=1 or another number above 0, or take it out")
        return weight


class DataSection(Section):
    """Stores (`cnclip-ft data build` or `data import` makes them) and how they are read."""

    train: (
        Annotated[Place, Tag("str")]
        | Annotated[list[TrainStore], Field(min_length=1, max_length=1000), Tag("nullable")]
    ) = Field(discriminator=Discriminator(lambda content: "nullable" if isinstance(content, list) else "str"))
    """The store to train on, or shards (`tars/{00000..00099}.tar`, a folder of tars or Parquet files), or several:
    `[{store: A, weight: 2, language: zh}, {store: B}]`."""
    batches: Literal["mixed", "by_store"] = "mixed"
    """Of several stores: every batch holds pairs of all, or those of one store."""
    captions: Literal["all", "one", "weighted"] = "all"
    """What an epoch visits; all: every pair; one: every picture with one of its captions, each as likely; weighted: the same by the
    `weight` that pairs keep."""
    caption_languages: dict[Language, Annotated[float, Field(gt=0, le=1000)]] | None = None
    """With one or weighted: how much likelier captions in a language are, `{zh: 2, en: 1}`; a language not named has 1, null: all have."""
    valid: Place | Annotated[dict[str, ValidSet], Field(min_length=1)]
    """The store to judge on, or several by name: `{name: store, {store: …, language: …}, {zero_shot: …} or {boxes: …}}`; the first one
    decides what is best."""
    guard: Guard | None = None
    """A split on which the model must not get worse."""
    context_length: int | None = Field(None, ge=3, le=512)
    """Tokens a text may have, longer ones are cut, which the plan counts; null: the start's own."""
    workers: Annotated[int, Field(ge=0, le=512)] | Literal["auto"] = "auto"
    """Processes that decode pictures, per device; auto: as many as the first steps show to be needed, and the machine has cores."""
    decode: Literal["auto", "workers", "device"] = "auto"
    """Where training decodes JPEGs; device: on the card with nvJPEG; auto: there, where NVIDIA's nvImageCodec is installed."""
    # Whose pixels are then no longer within 1/255 of the whole decoding.
    reduced_jpegs: bool = True
    """Decode large JPEGs at a smaller scale in training, never below what the tower needs: faster. Evaluation decodes whole."""
    length_window: int = Field(1, ge=1, le=10**6)
    """Batches that are sorted together by caption length: less padding; 1 keeps the order fully random."""
    table_cache: Place | None = None
    """Folder of tables of pairs (50,000 and more): tokens and keys, made once and mapped by every process; null: where cached features lie."""
    order: Literal["global", "by_shard"] = "global"
    """How an epoch is shuffled; global: all pairs; by_shard: runs of pairs that lie behind one another, and those of some runs among
    themselves, as disks and object stores want to be read."""
    order_window: int = Field(65536, ge=16, le=2**40)
    """With by_shard: pairs that are shuffled among themselves, of sixteen runs; more is more random."""
    max_damaged_images: int = Field(10, ge=0)
    """Pictures that cannot be decoded and are replaced by another pair; one more stops the run."""

    @field_validator("train", mode="before")
    @classmethod
    def _some(cls, train: Any) -> Any:
        if isinstance(train, list):
            if not train:
                raise ValueError("the list is empty, so there is nothing to train on; name a store: {here}=PLACE")
            return [{"store": each} if isinstance(each, str) else each for each in train]
        if isinstance(train, dict):
            raise ValueError("one store is a path, {here}=PLACE; several are a list, {here}=[{store: A}, {store: B}]")
        return train

    @field_validator("caption_languages", mode="before")
    @classmethod
    def _likely(cls, languages: Any) -> Any:
        for language, weight in languages.items() if isinstance(languages, dict) else ():
            if isinstance(weight, (int, float)) and not weight > 0:
                raise ValueError(
                    f"a caption in {language} is drawn with a weight above 0: {{here}}={{{language}: 1}} or another such number. "
                    "To train without that language, export a store of the others (cnclip-ft data export --languages)"
                )
        return languages

    @model_validator(mode="after")
    def _one_is_drawn(self) -> DataSection:
        if self.caption_languages and self.captions == "all":
            raise ValueError(
                "caption_languages says which caption of a picture is drawn, and every pair is visited: {here}.captions=one, or "
                "{here}.caption_languages=null"
            )
        return self

    @field_validator("valid")
    @classmethod
    def _named(cls, valid: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(valid, dict) and isinstance(next(iter(valid.values())), (ZeroShot, BoxesSplit)):
            raise ValueError(
                "the first validation split is a store: rows and tables show recall on it; name another later"
            )
        for name in valid if isinstance(valid, dict) else ():
            if not name.strip() or not name.isprintable() or name in ("guard", "train"):
                raise ValueError(f"{name!r} cannot name a validation split; choose another word")
        return valid

    def train_stores(self) -> list[TrainStore]:
        return [TrainStore(store=self.train)] if isinstance(self.train, str) else self.train

    def train_places(self) -> list[str]:
        return [each.store for each in self.train_stores()]

    def valid_sets(self) -> dict[str, ValidStore | ZeroShot | BoxesSplit]:
        named = self.valid if isinstance(self.valid, dict) else {"valid": self.valid}
        return {name: ValidStore(store=each) if isinstance(each, str) else each for name, each in named.items()}

    @property
    def boxes_split(self) -> str | None:
        """The name of the first split with boxes."""
        return next((name for name, each in self.valid_sets().items() if isinstance(each, BoxesSplit)), None)

    def valid_places(self) -> list[str]:
        """All that validation reads."""
        return [place for each in self.valid_sets().values() for place in each.places()]


def is_recall(score: str) -> bool:
    """Whether a split that is a store has this score."""
    part, _, rest = score.partition(".")
    return score in RECALLS or (part in PARTS and rest in RECALLS)


def score_path(best_by: str) -> tuple[str | None, str]:
    """``"split: text_to_image.r1"`` → (split or None for the first, name of the score)."""
    split, colon, score = best_by.rpartition(":")
    score = score.strip()
    if not is_recall(score) and score not in (*ZeroShot.scores, *BoxesSplit.scores):
        raise ValueError(
            f"'{best_by}' is not a score: best_by=mean_recall, or best_by=text_to_image.r1 (or .r5, .r10, .mean_recall, or image_to_text), "
            "best_by=en.text_to_image.r1 for a language by itself (or zh), best_by=languages.mean_recall for the mean of both, "
            "best_by='SPLIT: mean_recall' when another than the first validation split decides; of a zero_shot list "
            f"best_by='SPLIT: {'|'.join(ZeroShot.scores)}', and of boxes best_by='SPLIT: {'|'.join(BoxesSplit.scores)}'"
        )
    return (split.strip() if colon else None), score
