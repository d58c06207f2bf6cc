"""The section of a recipe that says what is trained and judged on, and how it is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from cnclip_ft.recipe_section import Language, Place, Section
from cnclip_ft.recipe_valid import AnyKind, ValidSet, is_store, store_at
from data_tools.negatives import KINDS, Kind


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
    valid: Place | Annotated[dict[str, Annotated[Place | ValidSet, AnyKind()]], Field(min_length=1)]
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
        if isinstance(valid, dict) and not is_store(next(iter(valid.values()))):
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

    def valid_sets(self) -> dict[str, ValidSet]:
        named = self.valid if isinstance(self.valid, dict) else {"valid": self.valid}
        return {name: store_at(each) if isinstance(each, str) else each for name, each in named.items()}

    def decisive(self, stage: str) -> str | None:
        """What decides in a stage of this kind where no `best_by` is given: the first entry that says so of itself."""
        found = ((name, each.scores[0]) for name, each in self.valid_sets().items() if each.decides == stage)
        return next((f"{name}: {score}" for name, score in found), None)

    def valid_places(self) -> list[str]:
        """All that validation reads."""
        return [place for each in self.valid_sets().values() for place in each.places()]
