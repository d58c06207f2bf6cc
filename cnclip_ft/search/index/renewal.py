"""`cnclip-ft search index`: encode what is new or changed, drop what is gone, put the next state in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnclip_ft.evaluation.options import Opened, Options, open_model
from cnclip_ft.evaluation.results import provenance
from cnclip_ft.features.encode import Meter, evaluating
from cnclip_ft.models.preprocessing import DECODER
from cnclip_ft.retrieval import approximate as approximate_search
from cnclip_ft.search.index.folder import INDEX, Index, IndexWriter, is_index
from cnclip_ft.search.index.identity import check_same
from cnclip_ft.search.index.listing import Key, Listing, list_source
from cnclip_ft.search.index.milvus import Milvus, milvus_place
from cnclip_ft.search.index.milvus_renewal import Sink, renew_collection
from cnclip_ft.search.index.parts import Parts
from cnclip_ft.search.index.pictures import UNREAD, encode_pictures
from data_tools.errors import RequestError, UserError
from data_tools.lock import FileLock
from data_tools.outputs import refuse_overlap
from data_tools.terminal import plain

EXACT_LIMIT = 10_000_000  # vectors; beyond, a look at every one takes seconds
_BLOCK = 16384  # rows joined at once
_NAMED = 10  # damaged pictures said one by one


@dataclass
class Wishes:
    """What the command asks for beside the encoding's own options; `approximate` None: as it was."""

    half: bool = False
    rebuild: bool = False
    moved: bool = False
    approximate: str | None = None

    def check(self) -> None:
        kinds = ("none", *approximate_search.KINDS)
        if self.approximate is not None and self.approximate not in kinds:
            raise RequestError(f"--approximate is {self.approximate!r}; use one of {', '.join(kinds)}")


def build_index(
    checkpoint: str | Path,
    what: str | Path,
    output: str | Path,
    options: Options,
    wishes: Wishes,
    say: Callable[[str], None] = print,
) -> None:
    """Make or bring up to date the index `output`, a folder or `milvus:…`, of a folder of pictures or a store.

    Raises:
        RequestError: the request cannot be used, or `output` is of another checkpoint or source.
        UserError: no picture could be decoded, the model is broken, or the disk is full.
    """
    options.check()
    wishes.check()
    place = milvus_place(output)
    if place is not None and wishes.half:
        raise RequestError("--half is for an index in a folder; Milvus keeps its vectors itself")
    output = Path(output)
    if place is None:
        if wishes.approximate in approximate_search.KINDS:
            approximate_search.require_faiss()
        if output.exists() and not output.is_dir():
            raise RequestError(f"{output} is a file; --output is a folder")
        refuse_overlap(output, [what, checkpoint])
        INDEX.refuse_other(output)
    else:
        Milvus(place).close()  # before the model: a server that is away is said at once
    listing = list_source(what)
    opened = replace(open_model(checkpoint, options), checkpoint=_whole_path(checkpoint))
    model, described = opened.model, opened.described()
    made_by, settings = described["checkpoint"], described["settings"]
    identity = {
        "checksum": provenance.weights_sum(made_by),
        "image_size": model.image_size,
        "dtype": settings["dtype"],
        "stored": "float16" if wishes.half else "float32",
        "image_transform": settings["image_transform"],
        **({} if model.narrowed is None else {"dimensions": model.narrowed}),
    }
    about = {
        "checkpoint": made_by,
        "identity": identity,
        "settings": settings,
        "source": {"kind": listing.kind, "name": listing.name, "path": str(listing.path)},
    }
    if place is not None:
        with evaluating(model, dtype=opened.dtype):
            renew_collection(
                place,
                listing,
                {**about, "dim": model.image_tower.output_dim, "versions": provenance.versions()},
                rebuild=wishes.rebuild,
                moved=wishes.moved,
                approximate=wishes.approximate,
                encode=lambda keys, sink: _encode(opened, keys, listing, sink, say),
                say=say,
            )
        return
    old = Index(output) if is_index(output) and not wishes.rebuild else None
    if old is not None:
        check_same(old.info, old.folder, identity, listing, wishes.moved)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / "lock", "writing this index")
    except OSError as error:
        raise RequestError(f"{output} cannot be written ({error.strerror}); choose another --output") from None
    try:
        # A file's stamp is its size and time, which another folder's file of that name may share.
        plan = {**identity, "source": [listing.kind, str(listing.path)], "decoder": DECODER}
        parts = Parts(output, plan, model.image_tower.output_dim)
        unseen = listing.keep_unseen(old.stamps() if old else {})
        state = _State(listing, old, parts)
        say(state.in_words())
        for note in listing.notes:
            say(note)
        if unseen:
            say(f"{unseen:,} pictures of the index lie where nobody could look now; they are kept")
        with evaluating(model, dtype=opened.dtype):
            if state.wanted:
                _encode(opened, state.wanted, listing, parts, say)
        _finish(output, state, about, wishes, model.image_tower.output_dim, say)
        parts.remove()
    finally:
        lock.release()


def _whole_path(checkpoint: str | Path) -> str:
    """Absolute, so that the index finds its model from anywhere; a published name as it is."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else str(checkpoint)


class _State:
    """The source's pictures, sorted into what is known and what has to be encoded."""

    def __init__(self, listing: Listing, old: Index | None, parts: Parts) -> None:
        self.listing, self.old, self.parts = listing, old, parts
        before = old.stamps() if old else {}
        damaged = old.damaged if old else {}
        self.old_rows: dict[Key, int] = {
            key: row for row, (key, stamp) in enumerate(before.items()) if listing.stamps.get(key) == stamp
        }
        self.known_damaged = {key: found for key, found in damaged.items() if listing.stamps.get(key) == found[0]}
        self.kept, self.gone = len(self.old_rows), sum(key not in listing.stamps for key in before)
        self.changed = sum(key in listing.stamps for key in before) - self.kept
        self.wanted = [
            key
            for key, stamp in listing.stamps.items()
            if key not in self.old_rows and key not in self.known_damaged and not parts.has(key, stamp)
        ]
        self.continued = sum(parts.has(key, stamp) for key, stamp in listing.stamps.items())
        self.same = old is not None and not self.wanted and not self.continued and self.kept == len(before)
        self.same = self.same and self.known_damaged.keys() == damaged.keys()
        self.columns = listing.columns_digest()
        self.same = self.same and old is not None and old.info.get("columns") == self.columns

    def in_words(self) -> str:
        words = f"{len(self.listing.stamps):,} pictures in {self.listing.path}"
        if self.old is not None:
            words += f": {self.kept:,} as they were, {self.changed:,} changed, {self.gone:,} gone"
        if self.continued:
            words += f"; {self.continued:,} were encoded before the interruption"
        return f"{words}; {len(self.wanted):,} to encode" if self.wanted else words

    def sources(self) -> Iterator[tuple[Key, str, int, int]]:
        """(key, stamp, part or −1 for the old index, row) of every picture that has a feature, in order."""
        for key, stamp in self.listing.stamps.items():
            if key in self.old_rows:
                yield key, stamp, -1, self.old_rows[key]
            elif key in self.parts.places and self.parts.places[key][0] == stamp:
                yield key, stamp, *self.parts.places[key][1:]

    def damaged(self) -> list[tuple[Key, str, str]]:
        found = dict(self.known_damaged)
        for key, (stamp, fault) in self.parts.damaged.items():
            now = self.listing.stamps.get(key)
            whole = key in self.parts.places and self.parts.places[key][0] == now
            if now is not None and stamp in ("", now) and not whole and key not in self.old_rows:
                found[key] = stamp, fault
        return [(key, *value) for key, value in found.items()]

    def rows(self, part: int, index: list[int]) -> np.ndarray:
        return self.parts.rows(part, index) if part >= 0 or self.old is None else self.old.features[index]


def _encode(opened: Opened, wanted: list[Key], listing: Listing, sink: Sink, say: Callable[[str], None]) -> None:
    meter = Meter(len(wanted), "pictures")
    batches = encode_pictures(
        opened.model,
        wanted,
        listing.read,
        batch_size=opened.batch_size,
        workers=opened.workers,
        meter=meter,
    )
    try:
        for keys, faults, features in batches:
            # An empty stamp is never equal: a picture that could not be read is tried again the next time.
            rows = [
                (key, "" if fault and fault.startswith(UNREAD) else listing.stamps[key], fault)
                for key, fault in zip(keys, faults, strict=True)
            ]
            sink.add(rows, features)
    finally:
        sink.flush()
        meter.close()
    say(meter.line("pictures"))


def _finish(
    output: Path, state: _State, about: dict[str, Any], wishes: Wishes, dim: int, say: Callable[[str], None]
) -> None:
    damaged = state.damaged()
    kind = _approximate_kind(state, wishes, say)
    before = (state.old.info.get("approximate") or {}).get("kind") if state.old else None
    if state.old is not None and state.same and kind == before:
        say(f"nothing has changed: {output} holds {len(state.old):,} pictures")
        return
    writer = IndexWriter(output)
    columns = state.listing.columns
    items: list[tuple[Any, ...]] = [(key, stamp) for key, stamp, _, _ in state.sources()]
    if columns is not None:
        items = [(key, stamp, kept) if (kept := columns(key)) else (key, stamp) for key, stamp in items]
    if not items:
        raise UserError(
            f"none of the {len(damaged):,} pictures can be used; the first: {damaged[0][0]}: {damaged[0][2]}"
        )
    norms = _Norms(np.dtype(about["identity"]["stored"]))
    writer.features(norms.watch(_blocks(state)), len(items), dim, np.dtype(about["identity"]["stored"]))
    writer.items(items)
    writer.damaged(damaged)
    built = None
    if kind is not None:
        features = np.load(output / writer.files["features"], mmap_mode="c")
        built = approximate_search.build(features, kind, norms.largest, say)
        writer.approximate(built.write)
    writer.commit(
        {
            **about,
            "images": len(items),
            "damaged": len(damaged),
            "dim": dim,
            "largest_norm": norms.largest,
            "approximate": built.about if built else None,
            "columns": state.columns,
            "versions": provenance.versions(),
        }
    )
    say(f"{len(items):,} pictures, {dim} values each ({about['identity']['stored']}), in {output}")
    if damaged:
        say(f"{len(damaged):,} pictures cannot be used and are left out:")
        for key, _, fault in damaged[:_NAMED]:
            say(f"  {plain(str(key), lines=False)}: {fault}")
        if len(damaged) > _NAMED:
            say(f"  … all of them in {output / writer.files['damaged']}")


def _approximate_kind(state: _State, wishes: Wishes, say: Callable[[str], None]) -> str | None:
    count = len(state.listing.stamps)
    if wishes.approximate is not None:
        return None if wishes.approximate == "none" else wishes.approximate
    if state.old is not None and state.old.info.get("approximate"):
        approximate_search.require_faiss()
        return state.old.info["approximate"]["kind"]
    if count <= EXACT_LIMIT:
        return None
    if not approximate_search.has_faiss():
        say(f"note: {count:,} pictures are many for exact search; {approximate_search.MISSING}")
        return None
    return "ivf"


class _Norms:
    """The largest norm of all rows that pass: what the exact search's error bound needs."""

    def __init__(self, stored: np.dtype) -> None:
        self.stored, self.largest = stored, 0.0

    def watch(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            norms = np.linalg.norm(block.astype(self.stored).astype(np.float64), axis=1)
            if not np.isfinite(norms).all():
                raise UserError("features hold NaN or infinity: the model is broken; go back to an earlier checkpoint")
            self.largest = max(self.largest, float(norms.max(initial=0.0)))
            yield block


def _blocks(state: _State) -> Iterator[np.ndarray]:
    """The features in order, ``[<= _BLOCK, dim]`` float32 at once, gathered from the old index and the parts."""
    sources = state.sources()
    while chunk := list(itertools.islice(sources, _BLOCK)):
        by_part: dict[int, list[int]] = {}
        for place, (_, _, part, _) in enumerate(chunk):
            by_part.setdefault(part, []).append(place)
        block = np.empty((len(chunk), state.parts.dim), np.float32)
        for part, places in by_part.items():
            block[places] = state.rows(part, [chunk[place][3] for place in places])
        yield block
