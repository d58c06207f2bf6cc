"""Tables of pairs on the disk: made once of a store and a tokenizer, by all processes in shares, memory-mapped by each.

::

    pairs-KEY/
        {tokens,starts,image_keys,text_keys}.npy    as `pairs.PairTable` has them, tokens in the smallest type that holds them
        ids.npy                                     ids of the images, where all are numbers; else ids.jsonl, one a line
        lines.npy                                   … and where its lines begin
        table.json                                  written last: sums of the files, and what was counted
        work/block-NUMBER.npz                       what is done, until all is

An interrupted making goes on with the blocks that are missing. KEY tells store, tokenizer and context length: changed ones have another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnclip_ft.collectives import meet, on_first, rank, together
from cnclip_ft.data.blocks import Block, Blocks
from cnclip_ft.data.ids import MixedId, Positions, hashes_of, is_number
from cnclip_ft.data.mixture import Mixture
from cnclip_ft.data.same_texts import TextKeys, firsts, hash_of
from cnclip_ft.models.contract import Tokenizer
from data_tools.arrays import ReadWhenAsked, write_array
from data_tools.atomic import leftovers, whole_file
from data_tools.errors import UserError
from data_tools.language import detect_language
from data_tools.store import Pair, PairSource
from data_tools.words import Said

FORMAT = 1
BLOCK = 2**15  # pairs between two marks: what an interruption can cost
_ADVICE = "Free some space, or name another place: data.table_cache=FOLDER."
_ARRAYS = ("tokens", "starts", "image_keys", "text_keys")
_CHUNK = 2**20


class ImageIds(ReadWhenAsked[Any]):
    """Ids of images by their position, as they lie on the disk: each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open()

    def _open(self) -> None:
        self._lines: mmap.mmap | None = None
        if (self.folder / "ids.npy").exists():
            self._numbers = np.load(self.folder / "ids.npy", mmap_mode="r")
            return
        self._numbers = np.load(self.folder / "lines.npy", mmap_mode="r")
        with open(self.folder / "ids.jsonl", "rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._open()

    def __len__(self) -> int:
        return len(self._numbers) - (self._lines is not None)

    def at(self, position: int) -> Any:
        if self._lines is None:
            return int(self._numbers[position])
        found = json.loads(self._lines[int(self._numbers[position]) : int(self._numbers[position + 1])])
        return MixedId(*found) if isinstance(found, list) else found


class Making:
    """A table while it is made, of one store or several as one.

    Args:
        block: pairs made together.
    """

    def __init__(self, store: PairSource | Mixture, tokenizer: Tokenizer, block: int = BLOCK) -> None:
        self.store, self.tokenizer, self.size = store, tokenizer, block
        self._positions: Positions | None = None

    @property
    def blocks(self) -> int:
        return -(-len(self.store) // self.size)

    def block(self, number: int) -> Block:
        """The pairs of a block, tokenised.

        Raises:
            DataFault: a pair is damaged, or names an image that is not there.
        """
        if self._positions is None:
            self._positions = Positions(self.store.image_ids)
        start = number * self.size
        fields = self.store.fields(start, min(start + self.size, len(self.store)))
        image_ids, text_ids, texts, languages = zip(*fields, strict=True)
        ready, tokens, lengths = self.tokenizer.packed(texts)
        images = self._positions.of(image_ids)
        for at in np.flatnonzero(images < 0)[:1].tolist():
            raise self.store.missing_image(Pair(*fields[at]))
        spoken = (language or detect_language(text) for text, language in zip(texts, languages, strict=True))
        counts = [_counted(languages), _counted(spoken)]
        return {
            "tokens": tokens.astype(_smallest(int(tokens.max(initial=0)))),
            "lengths": lengths,
            "images": images,
            "ids": hashes_of(text_ids),
            "texts": np.fromiter(map(hash_of, ready), np.uint64, len(ready)),
            "numbers": np.array([all(map(is_number, text_ids))]),
            "counts": np.frombuffer(json.dumps(counts).encode(), np.uint8),
        }

    def keys(self, gathered: Callable[[str], np.ndarray]) -> TextKeys:
        """Keys of the texts, where `gathered` gives one array of all blocks."""
        # Hashes of whole numbers differ as these do: there is nothing to settle.
        settled = None if gathered("numbers").all() else lambda place: _pair(self.store, place).text_id
        same_id = firsts(gathered("ids"), settled)
        same_text = firsts(gathered("texts"), lambda place: self.tokenizer.prepare(_pair(self.store, place).text))
        return TextKeys(len(self.store), same_id, same_text)

    def about(self, blocks: Callable[[], Iterator[Block]]) -> dict[str, Any]:
        """What is counted: pairs, tokens, texts that are cut, the type of tokens, and languages."""
        found: dict[str, Any] = {"pairs": len(self.store), "tokens": 0, "cut": 0, "dtype": "uint8"}
        said, spoken = Counter[str](), Counter[str]()
        for block in blocks():
            found["tokens"] += len(block["tokens"])
            # As long as allowed means cut, or exactly fitting; the report of `data check` tells the two apart.
            found["cut"] += int((block["lengths"] == self.tokenizer.context_length).sum())
            found["dtype"] = np.promote_types(found["dtype"], block["tokens"].dtype).name
            one, other = json.loads(block["counts"].tobytes())
            said.update(one)
            spoken.update(other)
        return found | {"languages": dict(said), "spoken": dict(spoken)}


def _pair(store: PairSource | Mixture, number: int) -> Pair:
    return store.resolved(number) if isinstance(store, Mixture) else store[number]


def _counted(values: Iterable[str | None]) -> Counter[str]:
    """How many of each, "" for none."""
    found = Counter[str]()
    for value, count in Counter(values).items():
        found[value or ""] += count
    return found


def _smallest(largest: int) -> np.dtype[Any]:
    return np.dtype(np.uint16) if largest < 2**16 else np.dtype(np.uint32)


def starts_of(blocks: Iterable[Block]) -> Iterator[np.ndarray]:
    """Where the tokens of every pair begin, block by block, and at last where they end."""
    end = 0
    yield np.zeros(1, np.int64)
    for block in blocks:
        found = end + np.cumsum(block["lengths"])
        end = int(found[-1])
        yield found


def table_key(store: PairSource | Mixture, tokenizer: Tokenizer) -> str:
    """Hex digits over all that decides a table."""
    if isinstance(store, Mixture):
        held = [[part.store.generation, part.language] for part in store.parts]
    else:
        held = [[store.generation, None]]
    told = [FORMAT, BLOCK, held, tokenizer.kind, tokenizer.fingerprint(), tokenizer.context_length]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


class TableFolder:
    """A table on the disk (module docstring). Its methods are collective: all devices call them."""

    def __init__(self, place: Path, making: Making, device: torch.device) -> None:
        self.making, self.device = making, device
        self.folder = place / f"pairs-{table_key(making.store, making.tokenizer)}"
        self.work = self.folder / "work"
        self.blocks = Blocks(self.work, making.blocks, making.block, advice=_ADVICE, what="table of pairs")

    def ready(self, say: Callable[[str], Any]) -> dict[str, Any]:
        """Make what is missing; returns what `table.json` says.

        Raises:
            UserError: nothing can be written there.
            DataFault: as `Making.block`.
        """
        told: list[str] = []
        on_first(lambda: told.extend(self._look()), self.device)
        if rank() == 0 and told:
            say(told[0])
        if not meet(self.device, number=int(self._whole())):
            with together(self.device):
                self.blocks.fill(self.device, self._unless_whole)
            on_first(self._finish, self.device)
        return self._about()

    def _whole(self) -> bool:
        return (self.folder / "table.json").is_file()

    def _about(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "table.json").read_text(encoding="utf-8"))
        return found

    def _look(self) -> list[str]:
        """Take away a table that is not what was written; what is to be said of that."""
        path, store = self.folder / "table.json", self.making.store
        if not path.is_file():
            return [
                Said(
                    "{store}: its table of {pairs:,} pairs is made, once for this store and tokenizer, in {folder}",
                    "{store}：正在制作 {pairs:,} 个图文对的表（每个数据仓与分词器只做一次），位于 {folder}",
                    store=store.path,
                    pairs=len(store),
                    folder=self.folder,
                )
            ]
        try:
            sums = self._about()["sums"]
            hurt = next((name for name, known in sums.items() if _sum(self.folder / name) != known), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            hurt = path.name
        if hurt is None:
            return []
        path.unlink(missing_ok=True)
        return [
            Said(
                "{folder}: {file} is damaged; the table of {pairs:,} pairs is made anew",
                "{folder}：{file} 已损坏；重新制作 {pairs:,} 个图文对的表",
                folder=self.folder,
                file=hurt,
                pairs=len(store),
            )
        ]

    def _read(self) -> Iterator[Block]:
        return map(self.blocks.read, range(self.blocks.count))

    @contextlib.contextmanager
    def _unless_whole(self) -> Iterator[None]:
        """Another run may make the same table; the quicker one takes away what both worked on, which is no error of the other."""
        try:
            yield
        except (OSError, UserError):
            if not self._whole():
                raise

    def _gathered(self, name: str) -> np.ndarray:
        """An array of all blocks, behind one another on the disk."""
        path, count, dtype = self.work / f"{name}.bin", 0, np.dtype(np.uint8)
        with whole_file(path, advice=_ADVICE) as file:
            for block in self._read():
                dtype, count = block[name].dtype, count + len(block[name])
                file.write(block[name].data)
        return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)

    def _finish(self) -> None:
        with self._unless_whole():
            if not self._whole():
                self._put_together()
        # Now, not before: a run beside this one may still write.
        for unfinished in leftovers(self.folder):
            unfinished.unlink(missing_ok=True)
        for done in (self.work, self.folder / "blocks"):  # the latter of an older version, whose hashes were others
            shutil.rmtree(done, ignore_errors=True)

    def _put_together(self) -> None:
        about = self.making.about(self._read)
        count = about["pairs"]
        keys = self.making.keys(self._gathered)
        self._array("tokens", (block["tokens"] for block in self._read()), about["tokens"], about["dtype"])
        self._array("starts", starts_of(self._read()), count + 1, "int64")
        self._array("image_keys", (block["images"] for block in self._read()), count, "int64")
        self._array(
            "text_keys", (keys.block(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK)), count, "int64"
        )
        names = [f"{name}.npy" for name in _ARRAYS] + self._ids()
        about["sums"] = {name: _sum(self.folder / name) for name in names}
        with whole_file(self.folder / "table.json", "w", advice=_ADVICE) as file:
            json.dump(about, file, ensure_ascii=False)

    def _array(self, name: str, blocks: Iterable[np.ndarray], count: int, dtype: str) -> None:
        with whole_file(self.folder / f"{name}.npy", advice=_ADVICE) as file:
            write_array(file, blocks, (count,), np.dtype(dtype))

    def _ids(self) -> list[str]:
        ids = self.making.store.image_ids
        if all(type(image_id) is int for image_id in ids):
            parts = (np.array(ids[at : at + BLOCK], np.int64) for at in range(0, len(ids), BLOCK))
            self._array("ids", parts, len(ids), "int64")
            return ["ids.npy"]
        (self.folder / "ids.npy").unlink(missing_ok=True)  # of another version: it would be taken first
        ends = [0]
        with whole_file(self.folder / "ids.jsonl", advice=_ADVICE) as file:
            for image_id in ids:
                line = json.dumps(image_id).encode() + b"\n"
                file.write(line)
                ends.append(ends[-1] + len(line))
        self._array("lines", [np.array(ends, np.int64)], len(ends), "int64")
        return ["ids.jsonl", "lines.npy"]

    def arrays(self) -> dict[str, np.ndarray]:
        """Memory-mapped, by name."""
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}


def _sum(path: Path) -> str:
    """CRC-32 and size of a file: what tells a damaged one; empty where it cannot be read."""
    value, size = 0, 0
    try:
        with open(path, "rb") as file:
            while part := file.read(_CHUNK):
                value, size = zlib.crc32(part, value), size + len(part)
    except OSError:
        return ""
    return f"{value:08x}-{size}"
