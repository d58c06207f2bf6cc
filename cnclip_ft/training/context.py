"""What all stages of a run share, made once: devices, number format, stores, pairs, journal."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cnclip_ft.data.captions import caption_weights
from cnclip_ft.data.device_decoding import JpegDecoder, choose_decoder
from cnclip_ft.data.mixture import Mixture, Part, stores_of
from cnclip_ft.data.official_layout import split_in, weights_beside
from cnclip_ft.data.pairs import PairTable, build_table
from cnclip_ft.evaluation.kinds.contract import Evaluator
from cnclip_ft.evaluation.kinds.recall import BY_LANGUAGE, Recall
from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.start import LoadReport, build_start
from cnclip_ft.recipe import Recipe
from cnclip_ft.recipe_data import DataSection
from cnclip_ft.recipe_valid import score_path
from cnclip_ft.runtime import choose_precision, keep_activations
from cnclip_ft.training.fp8 import check_fp8
from cnclip_ft.training.journal import Journal
from cnclip_ft.training.run_folder import check_place
from cnclip_ft.training.sharding import Whole, refuse_other_engines, settle_sharding
from cnclip_ft.training.trackers import tracker_names
from data_tools.errors import RequestError
from data_tools.parallel import is_parallel
from data_tools.shards import ShardSource, open_pairs
from data_tools.store import PairSource
from data_tools.tables import note
from data_tools.words import Said, language_of, said_in

Value = TypeVar("Value")


@dataclass(frozen=True)
class Context:
    """Read by everything that trains, changed by nothing.

    `pairs` is the training split, numbered and tokenised; `start` says where the model's weights came from. Pictures are decoded by
    `workers` processes, by at most `most_workers` where the first steps show that more are needed; `decoder` takes JPEGs from them.
    """

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    device: torch.device
    precision: str
    precision_reason: str
    sharding: Whole
    journal: Journal
    train_store: PairSource | Mixture
    evaluators: dict[str, Evaluator]
    guard_store: PairSource | None
    pairs: PairTable
    tokenizer: Tokenizer
    start: LoadReport
    workers: int
    most_workers: int
    decoder: JpegDecoder | None
    decoder_reason: Said
    cache_folder: Path
    trust_import: bool
    earlier_order: bool = False  # the pairs come as an earlier version drew them, with which the run began
    goes_on: bool = False  # the run in the folder is continued

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this device is the one that writes."""
        return self.accelerator.is_main_process

    @property
    def valid_stores(self) -> dict[str, PairSource]:
        """Those of `evaluators` that are stores of pairs, the first one among them."""
        return {name: each.store for name, each in self.evaluators.items() if isinstance(each, Recall)}

    @property
    def new_parts(self) -> list[str]:
        """Module paths of the model that began without pretrained weights."""
        return [str(part[0] if isinstance(part, tuple) else part) for part in self.start.new]

    def from_main(self, value: Value) -> Value:
        """What the first device says, on all of them."""
        found = [value]
        if self.world > 1:
            broadcast_object_list(found)
        return found[0]

    def autocast(self) -> AbstractContextManager[object]:
        """The number format the towers compute in."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision])


def make_context(
    recipe: Recipe,
    *,
    write: bool = True,
    trust_import: bool = False,
    goes_on: bool = False,
    earlier_order: bool = False,
) -> tuple[Context, DualEncoder]:
    """Open what the recipe names, and build its model on this process's device.

    Args:
        write: whether the journal is written.
        trust_import: as for `load`.
        goes_on: the run in the folder is continued, so nothing there is cleared.
        earlier_order: as `Context` has it.

    Raises:
        RequestError: something named is not there, or a setting that cannot work.
    """
    refuse_other_engines()
    if not goes_on:
        check_place(recipe)
    folder = Path(recipe.output)
    # accelerate launches on CPUs only when told that there is nothing else.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), log_with=tracker_names(recipe.report_to), project_dir=folder
    )
    device = accelerator.device
    keep_activations(device)
    precision, reason = choose_precision(recipe.precision, device)
    sharding = settle_sharding(device)
    if recipe.fp8:
        check_fp8(device, precision, sharding)
    train_store = open_train(recipe.data)
    pair_weights = None
    if recipe.data.captions != "all":
        languages: dict[str, float] = {name: each for name, each in (recipe.data.caption_languages or {}).items()}
        pair_weights = caption_weights(train_store, kept=recipe.data.captions == "weighted", languages=languages)
    evaluators = {name: valid.open(name, open_split) for name, valid in recipe.data.valid_sets().items()}
    guard = recipe.data.guard
    guard_store = open_split(guard.split, "data.guard.split") if guard and guard.split else None
    _refuse_unsaid_languages(recipe, evaluators, guard_store)
    _refuse_faulty_shards(recipe, train_store)
    model, start = start_of(recipe, image_size=recipe.model.image_size, trust_import=trust_import)
    decoder, decoder_reason = choose_decoder(recipe.data.decode, device, model.image_tower.preprocessing)
    cache_folder = Path(recipe.feature_cache) if recipe.feature_cache else folder.parent / "feature_cache"
    workers, most_workers = _workers(recipe, accelerator.num_processes)
    context = Context(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        device=device,
        precision=precision,
        precision_reason=reason,
        sharding=sharding,
        journal=Journal(folder, active=accelerator.is_main_process and write),
        train_store=train_store,
        evaluators=evaluators,
        guard_store=guard_store,
        pairs=build_table(
            train_store,
            model.tokenizer,
            pair_weights,
            place=Path(recipe.data.table_cache) if recipe.data.table_cache else cache_folder,
            device=device,
            say=_say,
        ),
        tokenizer=model.tokenizer,
        start=start,
        workers=workers,
        most_workers=most_workers,
        decoder=decoder,
        decoder_reason=decoder_reason,
        cache_folder=cache_folder,
        trust_import=trust_import,
        earlier_order=earlier_order,
        goes_on=goes_on,
    )
    model.to(device)
    return context, model


def start_of(recipe: Recipe, *, image_size: int | None, trust_import: bool) -> tuple[DualEncoder, LoadReport]:
    """The model a recipe starts from, for pictures of `image_size` (None: its own); raises as `build_start`."""
    return build_start(
        weights_beside(recipe.model.start, recipe.data.train_places()),
        context_length=recipe.data.context_length,
        image_size=image_size,
        max_patches=recipe.model.max_patches,
        source=recipe.model.source,
        seed=recipe.seed,
        trust_import=trust_import,
    )


def _say(text: str) -> None:
    """Before there is a journal: what takes long, on the terminal alone."""
    note(said_in(text, language_of(None)))


def _refuse_unsaid_languages(recipe: Recipe, evaluators: dict[str, Evaluator], guard_store: PairSource | None) -> None:
    """Refuse a language by itself that no text says it is in."""
    split, score = score_path(recipe.best_by)
    judged, first = evaluators[split] if split else None, next(iter(evaluators.values()))
    language, guard = score.partition(".")[0], recipe.data.guard
    if language in BY_LANGUAGE and isinstance(by := judged or first, Recall):
        by.refuse_without(language, "best_by")
    if guard is not None and guard.language is not None and isinstance(first, Recall):
        watched = first if guard_store is None else Recall(guard_store, guard.language)
        watched.refuse_without(guard.language, "data.guard.language")


def _refuse_faulty_shards(recipe: Recipe, train_store: PairSource | Mixture) -> None:
    """Samples that give no pair are counted as damaged pictures are: above the limit they are no accident."""
    found = stores_of(train_store)
    faults = sum(sum(store.faults.values()) for store in found)
    if faults > recipe.data.max_damaged_images:
        told = "; ".join(f"{store.path}: {store.faults_in_words()}" for store in found if store.faults)
        raise RequestError(
            f"data.train: {told} That is more than data.max_damaged_images allows ({recipe.data.max_damaged_images}). Mend the shards, "
            f"or train without these: data.max_damaged_images={2 * faults}"
        )


def shard_notes(context: Context) -> list[str]:
    """What is to be known of shards that are trained on or judged on as they lie."""
    stores = [*stores_of(context.train_store), *context.valid_stores.values()]
    return list(dict.fromkeys(told for store in stores for told in store.notes))


def _workers(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Processes to begin with, and the most there may be (`sizing`)."""
    if recipe.data.workers != "auto":
        return recipe.data.workers, recipe.data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = max(cores // processes - 1, 0)  # one is for the process that trains
    # On a CPU run the towers want the cores; on a GPU run decoding does.
    return (min(8, cores // processes), max(own, 1)) if torch.cuda.is_available() else (min(2, own), min(2, own))


def open_train(data: DataSection) -> PairSource | Mixture:
    """The store that is trained on, or several as one.

    Raises:
        RequestError: one of them is none, is empty, or stands in the list twice.
    """
    if isinstance(data.train, str):
        return open_split(data.train, "data.train")
    parts, places, shards = [], set(), dict[Path, str]()
    for number, each in enumerate(data.train):
        store = open_split(each.store, f"data.train.{number}.store")
        place = store.path.resolve()
        if place in places:
            raise RequestError(
                f"data.train.{number}.store: {each.store} stands in the list before. To visit its pairs more often give that entry "
                "another weight, data.train.N.weight=2"
            )
        places.add(place)
        for file in store.files if isinstance(store, ShardSource) else ():
            before = shards.setdefault(file.resolve(), each.store)
            if before != each.store:
                raise RequestError(
                    f"data.train.{number}.store: {file} belongs to {before} before as well; name every shard once"
                )
        parts.append(Part(store, each.weight, each.language))
    return Mixture(parts)


def open_split(path: str, key: str) -> PairSource:
    """Open a store of the recipe, or that of its split in a data set's folder; an empty one is refused."""
    try:
        store = open_pairs(split_in(path, "train" if key.startswith("data.train") else "valid"))
    except RequestError as error:
        raise RequestError(f"{key}: {error} If it lies elsewhere: {key}=PLACE.") from None
    if is_parallel(store):
        raise RequestError(
            f"{key}: {path} holds parallel text, which has no pictures; a stage of kind teach learns from it, "
            f"stages.STAGE.teach.texts={path}. Name a store of pictures and captions: {key}=PLACE"
        )
    if len(store) == 0:
        raise RequestError(f"{key}: {path} has no pairs. Check the build's summary, or name another split.")
    return store
