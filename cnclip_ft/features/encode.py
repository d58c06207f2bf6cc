"""Features of a whole split: every image once, every distinct text once, and which belong together."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cnclip_ft.data.pictures import Fault, Pictures, data_fault, in_batches
from cnclip_ft.models.modes import evaluation_mode
from cnclip_ft.runtime import Fetched, keep_activations, to_device
from data_tools.circles import no_search_for_circles
from data_tools.errors import DataFault, UserError
from data_tools.pictures import MISSING

if TYPE_CHECKING:
    from cnclip_ft.models.contract import Tokenizer
    from cnclip_ft.models.dual_encoder import DualEncoder
    from data_tools.store import PairSource

OnFault = Callable[[int, DataFault], None]  # position among the ids, and what is wrong with the image
_TEXTS_AT_ONCE = 65536  # tokenised and sorted by length together


@dataclass
class SplitTexts:
    """Texts of a split in the order first met, lone ones last, and their pairs; no features yet."""

    image_ids: list[int | str]
    text_ids: list[int | str]
    texts: list[str]
    languages: list[str | None]
    positives: torch.Tensor  # int64 [m, 2]: (image index, text index)


@dataclass
class SplitFeatures(SplitTexts):
    """A split as numbers: unit float32 features ``[n, dim]`` on the CPU, beside what `SplitTexts` says."""

    image_features: torch.Tensor
    text_features: torch.Tensor
    seconds: dict[str, float] = field(default_factory=dict)  # encoding time of images and texts

    def with_texts(self, index: torch.Tensor) -> SplitFeatures:
        """The same images with some of the texts (int64 ``[n]``, ascending) and the pairs among them."""
        place = torch.full((len(self.text_ids),), -1, dtype=torch.int64)
        place[index] = torch.arange(len(index))
        text = place[self.positives[:, 1]]
        pairs = torch.stack([self.positives[:, 0], text], 1)[text >= 0]
        chosen = index.tolist()
        return SplitFeatures(
            image_ids=self.image_ids,
            text_ids=[self.text_ids[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            languages=[self.languages[i] for i in chosen],
            positives=pairs,
            image_features=self.image_features,
            text_features=self.text_features[index],
        )


@no_search_for_circles()
def read_texts(store: PairSource) -> SplitTexts:
    """Walk a store's pairs once.

    Raises:
        DataFault: a pair names an image the store does not hold, or a text id carries two different texts.
    """
    image_ids = list(store.image_ids)
    image_at = {image_id: number for number, image_id in enumerate(image_ids)}
    text_at: dict[int | str, int] = {}
    out = SplitTexts(image_ids, [], [], [], torch.empty(0, 2, dtype=torch.int64))

    def text_number(text_id: int | str, text: str, language: str | None) -> int:
        number = text_at.setdefault(text_id, len(out.text_ids))
        if number == len(out.text_ids):
            out.text_ids.append(text_id)
            out.texts.append(text)
            out.languages.append(language)
        elif out.texts[number] != text:
            raise DataFault(
                f"text id {text_id!r} stands for {out.texts[number]!r} and for {text!r}",
                mend="Give every text an id of its own and build the store again.",
                kind="ambiguous-text-id",
                file=store.path,
                item_id=text_id,
            )
        return number

    pairs: dict[tuple[int, int], None] = {}
    for pair in store.pairs():
        if pair.image_id not in image_at:
            raise store.missing_image(pair)
        pairs[image_at[pair.image_id], text_number(pair.text_id, pair.text, pair.language)] = None
    for text_id, text, language in store.lone_texts:
        text_number(text_id, text, language)
    if pairs:
        out.positives = torch.tensor(list(pairs), dtype=torch.int64)
    return out


def encode_split(model: DualEncoder, store: PairSource, **options: Any) -> SplitFeatures:
    """`encode_source` of a store.

    Raises:
        DataFault: an image cannot be decoded, or the store contradicts itself.
    """
    return encode_source(model, read_texts(store), store.image, **options)


def encode_source(
    model: DualEncoder,
    split: SplitTexts,
    read: Callable[[Any], Any],
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> SplitFeatures:
    """Unit features of every image and every distinct text of a split, lone texts too.

    Args:
        model: taken to `device` when it is elsewhere; its training mode is restored.
        read: gives an image's bytes or path for its id.
        batch_size: images at once; texts go in batches twice as large.
        workers: processes that decode images; 0 decodes here.
        dtype: float16 or bfloat16 run the towers under autocast; None and float32 leave them as they are.
        progress: show bars, on a terminal only.

    Raises:
        DataFault: an image cannot be decoded.
    """
    with evaluating(model, device, dtype):
        meter = Meter(len(split.image_ids), "images", progress)
        images = encode_images(model, split.image_ids, read, batch_size=batch_size, workers=workers, meter=meter)
        meter.close()
        text_meter = Meter(len(split.texts), "texts", progress)
        texts = encode_texts(model, split.texts, batch_size=2 * batch_size, meter=text_meter)
        text_meter.close()
    seconds = {"images": meter.seconds, "texts": text_meter.seconds}
    return SplitFeatures(**vars(split), image_features=images, text_features=texts, seconds=seconds)


@contextlib.contextmanager
def evaluating(
    model: DualEncoder, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode, no gradients, the wished device and autocast inside; every module's mode restored after."""
    if device is not None and torch.device(device) != model.device:
        model.to(device)
    half = dtype in (torch.float16, torch.bfloat16)
    autocast = torch.autocast(model.device.type, dtype) if half else contextlib.nullcontext()
    with evaluation_mode(model), torch.inference_mode(), autocast:
        yield


def named(fault: Fault) -> DataFault:
    """The exception, with the picture named and what to do."""
    # A file says where it is; a store's picture is looked for among all of them.
    advice = "" if fault["file"] or fault["kind"] == MISSING else " (`cnclip-ft data check` lists all)"
    problem, mend = f"image {fault['id']!r}: {fault['problem']}", f"{fault['mend'].rstrip('.')}{advice}."
    return data_fault(fault | {"problem": problem, "mend": mend})


def iterate_images(
    model: DualEncoder,
    image_ids: Sequence[Any],
    read: Callable[[Any], Any],
    *,
    batch_size: int = 128,
    workers: int = 0,
    meter: Meter | None = None,
    on_fault: OnFault | None = None,
    trunk: bool = False,
) -> Iterator[torch.Tensor]:
    """Unit float32 ``[<= batch_size, dim]`` on the CPU, in the order of the ids; call inside `evaluating`.

    Args:
        read: gives an image's encoded bytes, or its path, for an id.
        trunk: give what the image trunk says, ``[<= batch_size, width]``, before the projection.
        on_fault: is told of an image that cannot be read or decoded, whose row is NaN; None raises the fault.

    Raises:
        DataFault: an image cannot be read or decoded, without `on_fault`; the message names it.
    """
    keep_activations(model.device)
    encode = model.image_trunk if trunk else model.image_features
    pictures = Pictures(image_ids, read, model.image_tower.preprocessing)
    first, ahead = 0, int(model.device.type == "cuda")  # a card computes a batch while the one before is handed over
    under_way: deque[tuple[list[Fault | None], Fetched | None]] = deque()

    def handed_over() -> torch.Tensor:
        faults, features = under_way.popleft()
        part = torch.full((len(faults), model.image_tower.output_dim), torch.nan)
        if features is not None:
            whole = sound(features(), "image")
            part = torch.full((len(faults), whole.shape[1]), torch.nan)
            part[torch.tensor([fault is None for fault in faults])] = whole
        if meter is not None:
            meter.add(len(part))
        return part

    for pixels, faults in pictures.batches(
        in_batches(len(image_ids), batch_size), workers=workers, pin=model.device.type == "cuda"
    ):
        for place, fault in enumerate(faults, first):
            if fault is not None:
                error = named(fault)
                if on_fault is None:
                    raise error
                on_fault(place, error)
        first += len(faults)
        features = None if pixels is None else Fetched(encode(to_device(pixels, model.device)).float())
        under_way.append((faults, features))
        if len(under_way) > ahead:
            yield handed_over()
    while under_way:
        yield handed_over()


def sound(features: torch.Tensor, name: str) -> torch.Tensor:
    """The features.

    Raises:
        UserError: one is not finite.
    """
    if not torch.isfinite(features).all():
        raise UserError(
            f"the {name} features hold NaN or infinity: the model is broken; go back to an earlier checkpoint"
        )
    return features


def encode_images(
    model: DualEncoder, image_ids: Sequence[Any], read: Callable[[Any], Any], **options: Any
) -> torch.Tensor:
    """All of `iterate_images` in one tensor ``[n, dim]``."""
    features, filled = torch.empty(len(image_ids), model.image_tower.output_dim), 0
    for part in iterate_images(model, image_ids, read, **options):
        features[filled : filled + len(part)] = part
        filled += len(part)
    return features


def encode_texts(
    model: DualEncoder, texts: Sequence[str], *, batch_size: int = 256, meter: Meter | None = None
) -> torch.Tensor:
    """Unit float32 ``[n, dim]`` on the CPU, in the order given; call inside `evaluating`.

    Texts of like length share a batch. Texts that read the same are encoded once: in different batches their
    features would differ in the last bit, and what is a tie would be decided by chance.
    """
    features = torch.empty(len(texts), model.image_tower.output_dim)
    for batch in text_batches(model.tokenizer, texts, batch_size):
        features[batch.places] = encode_batch(model, batch)[batch.rows]
        if meter is not None:
            meter.add(len(batch.rows))
    return features


@dataclass
class TextBatch:
    """Distinct token ids, and which texts are theirs: the text at `places[i]` reads as `ids[rows[i]]`."""

    ids: list[tuple[int, ...]]
    places: list[int]
    rows: list[int]


def text_batches(tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> Iterator[TextBatch]:
    """The batches of `encode_texts`."""
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        places: dict[tuple[int, ...], list[int]] = {}
        for place, ids in enumerate(tokenizer.encode(texts[first : first + _TEXTS_AT_ONCE]), first):
            places.setdefault(tuple(ids), []).append(place)
        distinct = sorted(places, key=len)
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            rows = [row for row, ids in enumerate(batch) for _ in places[ids]]
            yield TextBatch(batch, [place for ids in batch for place in places[ids]], rows)


def encode_batch(model: DualEncoder, batch: TextBatch) -> torch.Tensor:
    """Unit float32 ``[len(batch.ids), dim]`` on the CPU."""
    input_ids, mask = model.tokenizer.pad(batch.ids)
    features = model.text_features(to_device(input_ids, model.device), to_device(mask, model.device))
    return sound(features.float().cpu(), "text")


class Meter:
    """A progress bar on stderr (on a terminal only) that keeps the first batch, the warm-up, apart."""

    def __init__(self, total: int, name: str, wanted: bool = True) -> None:
        from data_tools.bars import Bar

        self._bar = Bar(total=total, desc=name, unit="", shown=wanted)
        self.count = self.first_count = 0
        self.began = self.last = time.perf_counter()
        self.first_seconds = 0.0

    def add(self, count: int) -> None:
        self.last = time.perf_counter()
        if not self.count:
            self.first_count, self.first_seconds = count, self.last - self.began
        self.count += count
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        return self.last - self.began

    @property
    def rate(self) -> float | None:
        """Items a second after the first batch; None when there was only one."""
        rest = self.seconds - self.first_seconds
        return (self.count - self.first_count) / rest if self.count > self.first_count and rest > 0 else None

    def line(self, name: str) -> str:
        rate = (
            ""
            if self.rate is None
            else f", {self.rate:,.0f} a second after the first batch ({self.first_seconds:.2f} s)"
        )
        return f"{name}: {self.count:,} in {self.seconds:.1f} s{rate}"
