"""Features of a whole split: every image once, every distinct text once, and which belong together."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from cnclip_ft.data.images import decode
from data_tools.errors import DataFault

if TYPE_CHECKING:
    from cnclip_ft.models.dual_encoder import DualEncoder
    from data_tools.store import PairStore

_TEXTS_AT_ONCE = 16384  # tokenised and sorted by length together


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


def read_texts(store: PairStore) -> SplitTexts:
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
                kind="ambiguous-text-id", file=store.path, item_id=text_id,
            )  # fmt: skip
        return number

    pairs: dict[tuple[int, int], None] = {}
    for pair in store.pairs():
        if pair.image_id not in image_at:
            raise DataFault(
                f"text {pair.text_id!r} names image {pair.image_id!r}, which the store does not hold",
                mend="Build the store again from complete source files.", kind="missing-image",
                file=store.path, item_id=pair.text_id,
            )  # fmt: skip
        pairs[image_at[pair.image_id], text_number(pair.text_id, pair.text, pair.language)] = None
    for text_id, text, language in store.lone_texts:
        text_number(text_id, text, language)
    if pairs:
        out.positives = torch.tensor(list(pairs), dtype=torch.int64)
    return out


def encode_split(
    model: DualEncoder,
    store: PairStore,
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> SplitFeatures:
    """Unit features of every image and every distinct text of a store, lone texts too.

    Args:
        model: taken to `device` when it is elsewhere; its training mode is restored.
        batch_size: images at once; texts go in batches twice as large.
        workers: processes that decode images; 0 decodes here.
        dtype: float16 or bfloat16 run the towers under autocast; None and float32 leave them as they are.
        progress: show bars, on a terminal only.

    Raises:
        DataFault: an image cannot be decoded, or the store contradicts itself.
    """
    split = read_texts(store)
    seconds: dict[str, float] = {}
    with evaluating(model, device, dtype):
        began = time.perf_counter()
        images = encode_images(
            model, split.image_ids, store.image, batch_size=batch_size, workers=workers, progress=progress
        )
        seconds["images"] = time.perf_counter() - began
        began = time.perf_counter()
        texts = encode_texts(model, split.texts, batch_size=2 * batch_size, progress=progress)
        seconds["texts"] = time.perf_counter() - began
    return SplitFeatures(**vars(split), image_features=images, text_features=texts, seconds=seconds)


@contextlib.contextmanager
def evaluating(
    model: DualEncoder, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode, no gradients, the wished device and autocast inside; every module's mode restored after."""
    if device is not None and torch.device(device) != model.device:
        model.to(device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    half = dtype in (torch.float16, torch.bfloat16)
    autocast = torch.autocast(model.device.type, dtype) if half else contextlib.nullcontext()
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Pictures(Dataset):
    """Image id → its id and picture, or the message of what is wrong with it (an error would lose its id on the way)."""

    def __init__(self, image_ids: Sequence[Any], read: Callable[[Any], Any], size: int) -> None:
        self.image_ids, self.read, self.size = image_ids, read, size

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, str | None]:
        try:
            return decode(self.read(self.image_ids[index]), self.size), None
        except DataFault as error:
            return None, f"image {self.image_ids[index]!r}: {error.problem}"
        except (KeyError, OSError) as error:
            return None, f"image {self.image_ids[index]!r} cannot be read ({error})"


def _collate(samples: list[tuple[torch.Tensor | None, str | None]]) -> tuple[torch.Tensor | None, list[str]]:
    faults = [fault for _, fault in samples if fault]
    return (None if faults else torch.stack([pixels for pixels, _ in samples])), faults


def encode_images(
    model: DualEncoder,
    image_ids: Sequence[Any],
    read: Callable[[Any], Any],
    *,
    batch_size: int = 128,
    workers: int = 0,
    progress: bool = True,
) -> torch.Tensor:
    """Unit float32 ``[n, dim]`` on the CPU. `read` gives bytes or a path for an id; call inside `evaluating`.

    Raises:
        DataFault: an image cannot be read or decoded; the message names it.
    """
    pictures = _Pictures(image_ids, read, model.image_size)
    loader = DataLoader(
        pictures, batch_size=batch_size, num_workers=min(workers, len(image_ids)), collate_fn=_collate,
        pin_memory=model.device.type == "cuda",
    )  # fmt: skip
    features, filled = torch.empty(len(image_ids), model.image_tower.output_dim), 0
    with bar(len(image_ids), "images", progress) as shown:
        for pixels, faults in loader:
            if faults:
                raise DataFault(
                    faults[0],
                    mend="Replace it or leave it out (`cnclip-ft data check` lists all).",
                    kind="undecodable-image",
                )
            part = model.image_features(pixels.to(model.device, non_blocking=True)).float()
            features[filled : filled + len(part)] = part.cpu()
            filled += len(part)
            shown.update(len(part))
    return features


def encode_texts(
    model: DualEncoder, texts: Sequence[str], *, batch_size: int = 256, progress: bool = True
) -> torch.Tensor:
    """Unit float32 ``[n, dim]`` on the CPU, in the order given; texts of like length share a batch."""
    features = torch.empty(len(texts), model.image_tower.output_dim)
    with bar(len(texts), "texts", progress) as shown:
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            ids = model.tokenizer.encode(texts[first : first + _TEXTS_AT_ONCE])
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                input_ids, mask = model.tokenizer.pad([ids[row] for row in rows])
                part = model.text_features(input_ids.to(model.device), mask.to(model.device)).float().cpu()
                features[torch.tensor(rows) + first] = part
                shown.update(len(rows))
    return features


def bar(total: int, name: str, wanted: bool = True) -> Any:
    """A progress bar on stderr, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="", disable=not (wanted and sys.stderr.isatty()), leave=False)
