"""`search index … --to milvus:…`: a collection made or brought up to date; stopped at any moment, it goes on from what was put."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch

from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.search.index.collection import Collection, Held, row_id, rows_together
from cnclip_ft.search.index.expressions import kept_fields
from cnclip_ft.search.index.facets import Facets
from cnclip_ft.search.index.identity import check_same
from cnclip_ft.search.index.listing import Key, Listing
from cnclip_ft.search.index.milvus import Milvus, MilvusPlace
from data_tools.errors import UserError
from data_tools.store.layouts import Value
from data_tools.terminal import plain

APPROXIMATE_FROM = 10_000_000  # vectors; beyond, Milvus too takes seconds to look at every one
_SECONDS = 20.0  # after which rows that wait are put: what a server that goes away can cost
_TARGET, _ASKED, _MEASURED = (
    0.99,
    128,
    1_000_000,
)  # recall@10 wanted, over so many pictures, up to so large a collection
_EFFORTS = {"hnsw": (64, 128, 256, 512, 1024, 2048), "ivf": (8, 16, 32, 64, 128, 256, 512, 1024)}
_NAMED = 10  # damaged pictures said one by one


class Sink(Protocol):
    """Where features go as they are encoded."""

    def add(self, rows: list[tuple[Key, str, str | None]], features: np.ndarray) -> None:
        """Rows ``(key, stamp, fault or None)``, and ``[n, dim]`` of those without a fault, in order."""
        ...

    def flush(self) -> None:
        """Write what has been added; also on the way out of an interruption."""
        ...


Encode = Callable[[list[Key], Sink], None]  # keys, in order, as features into the sink


def renew_collection(
    place: MilvusPlace,
    listing: Listing,
    about: dict[str, Any],
    *,
    rebuild: bool,
    moved: bool,
    approximate: str | None,
    encode: Encode,
    say: Callable[[str], None],
) -> None:
    """Make the collection hold what the listing names, and no more.

    Args:
        about: `checkpoint`, `identity`, `settings`, `source` and `dim` of the description.
        approximate: `none`, or a kind of index; None: as it was.

    Raises:
        RequestError: the collection is of another checkpoint or source, or none of ours. Away: the server went away;
            what was put is there, and the next call goes on.
        UserError: no picture could be decoded, or the model is broken.
    """
    with Milvus(place) as server:
        collection = Collection(server)
        info = collection.info()
        if info is not None and not rebuild:
            check_same(info, place, about["identity"], listing, moved)
        kind = _kind(approximate, None if rebuild else info, len(listing.stamps))
        if info is None or rebuild:
            info = {**about, "approximate": kind and {"kind": kind, "effort": _EFFORTS[kind][-1]}, "finished": False}
            collection.create(info)
        held = collection.held()
        damaged = collection.damaged()
    # Closed while workers are started: a process that is forked must not hold threads of gRPC.
    unseen = listing.keep_unseen({key: row.stamp for key, row in held.items()})
    state = _State(listing, held, damaged, info.get("numbers", 0))
    say(state.in_words(info["finished"]))
    for note in listing.notes:
        say(note)
    if unseen:
        say(f"{unseen:,} pictures of the index lie where nobody could look now; they are kept")
    with _Putting(place, state, about["dim"]) as putting:
        if state.wanted:
            encode(state.wanted, putting)
        _settle(putting, state, info, about, kind, say)


def _kind(wanted: str | None, info: dict[str, Any] | None, count: int) -> str | None:
    if wanted is not None:
        return None if wanted == "none" else wanted
    if info is not None:
        return (info["approximate"] or {}).get("kind")
    return "hnsw" if count > APPROXIMATE_FROM else None


class _State:
    """The source's pictures, sorted into what the collection has and what has to be encoded.

    Args:
        numbers: below which all have been given, also to pictures that are gone.
    """

    def __init__(
        self, listing: Listing, held: dict[Key, Held], damaged: dict[Key, tuple[str, str]], numbers: int
    ) -> None:
        self.listing, self.held, self.damaged = listing, held, damaged
        self.kept = [key for key, row in held.items() if listing.stamps.get(key) == row.stamp]
        self.gone = [key for key in held if key not in listing.stamps]
        whole = set(self.kept)
        known = {key for key, (stamp, _) in damaged.items() if listing.stamps.get(key) == stamp}
        self.wanted = [key for key in listing.stamps if key not in whole and key not in known]
        self.repaired = [key for key in damaged if key not in known]
        # A picture that became damaged is not found any more.
        self.hurt = [key for key in known if key in held and key not in whole]
        self.next_number = max(numbers, max((row.number for row in held.values()), default=-1) + 1)

    def in_words(self, finished: bool) -> str:
        words = f"{len(self.listing.stamps):,} pictures in {self.listing.path}"
        if finished:
            changed = len(self.held) - len(self.kept) - len(self.gone)
            words += f": {len(self.kept):,} as they were, {changed:,} changed, {len(self.gone):,} gone"
        elif self.kept:
            words += f"; {len(self.kept):,} were encoded before the interruption"
        return f"{words}; {len(self.wanted):,} to encode" if self.wanted else words

    def row(self, key: Key, vector: np.ndarray) -> dict[str, Any]:
        before, kept = self.held.get(key), self.columns(key)
        held = Held(self.listing.stamps[key], self.next_number if before is None else before.number, _hash(kept))
        self.held[key] = held
        self.next_number += before is None
        return {"id": row_id(key), **asdict(held), "vector": vector, **kept_fields(kept)}

    def columns(self, key: Key) -> dict[str, Value]:
        return self.listing.columns(key) if self.listing.columns is not None else {}

    def relabelled(self) -> Iterator[Key]:
        """Pictures of which something else is kept now."""
        return (key for key in self.kept if key in self.held and self.held[key].kept != _hash(self.columns(key)))


def _hash(columns: dict[str, Value]) -> str:
    if not columns:
        return ""
    return hashlib.blake2b(json.dumps(columns, sort_keys=True).encode(), digest_size=8).hexdigest()


class _Putting:
    """Puts features into the collection, many rows at once; connected with the first of them."""

    def __init__(self, place: MilvusPlace, state: _State, dim: int) -> None:
        self._place, self._state, self._together = place, state, rows_together(dim)
        self._server: Milvus | None = None
        self._rows: list[dict[str, Any]] = []
        self._faults: list[tuple[Key, str, str]] = []
        self._since = time.monotonic()
        self.damaged: list[tuple[Key, str, str]] = []

    def __enter__(self) -> _Putting:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()

    @property
    def collection(self) -> Collection:
        if self._server is None:
            self._server = Milvus(self._place)
            Collection(self._server).load()
        return Collection(self._server)

    def add(self, rows: list[tuple[Key, str, str | None]], features: np.ndarray) -> None:
        if not np.isfinite(features).all():
            raise UserError("features hold NaN or infinity: the model is broken; go back to an earlier checkpoint")
        vectors = iter(features)
        for key, stamp, fault in rows:
            if fault is None:
                self._rows.append(self._state.row(key, next(vectors)))
            else:
                self._faults.append((key, stamp, fault))
        if len(self._rows) >= self._together or time.monotonic() - self._since >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        # Emptied first: a server that is away when an interruption comes is not asked twice.
        rows, self._rows, self._since = self._rows, [], time.monotonic()
        faults, self._faults = self._faults, []
        for start in range(0, len(rows), self._together):
            self.collection.put(rows[start : start + self._together])
        if faults:
            self.collection.put_damaged(faults)
            self.damaged += faults


def _settle(
    putting: _Putting,
    state: _State,
    info: dict[str, Any],
    about: dict[str, Any],
    kind: str | None,
    say: Callable[[str], None],
) -> None:
    """What is left when everything is encoded: values that changed, what is gone, the index, the description."""
    collection, listing = putting.collection, state.listing
    relabelled = list(state.relabelled())
    for start in range(0, len(relabelled), 500):
        vectors = collection.vectors(relabelled[start : start + 500])
        collection.put([state.row(key, vector) for key, vector in vectors.items()])
    again = {key for key, _, _ in putting.damaged}
    out = [*state.gone, *state.hurt, *(key for key in again if key in state.held)]
    if out:  # their numbers are told of before they are out: a page that was served may still ask by one
        collection.describe({**info, "numbers": state.next_number})
    collection.forget(out)
    repaired = [key for key in state.repaired if key not in again]
    collection.forget_damaged(repaired)
    dropped = set(out)
    pictures = {key: row for key, row in state.held.items() if key not in dropped}
    known = {key: fault for key, (_, fault) in state.damaged.items() if key not in repaired}
    faults = known | {key: fault for key, _, fault in putting.damaged}
    if not pictures:
        raise UserError(f"none of the {len(faults):,} pictures can be used; the first: {next(iter(faults.items()))}")
    same = not (state.wanted or relabelled or state.gone or state.hurt or repaired) and info["finished"]
    if same and (info["approximate"] or {}).get("kind") == kind and info["source"] == about["source"]:
        say(f"nothing has changed: {collection.place} holds {len(pictures):,} pictures")
        return
    collection.settle()
    if kind == "ivf" or (info["approximate"] or {}).get("kind") != kind:
        collection.reindex(kind, len(pictures))
    approximate = None if kind is None else _measured(collection, kind, len(pictures), info["dim"], say)
    facets = Facets(map(state.columns, pictures) if listing.columns is not None else (), len(pictures))
    collection.describe(
        {
            **info,
            **about,
            "approximate": approximate,
            "facets": {"names": facets.names, "offered": facets.offered()},
            "numbers": state.next_number,
            "finished": True,
        }
    )
    say(f"{len(pictures):,} pictures, {info['dim']} values each, in {collection.place}")
    if faults:
        say(f"{len(faults):,} pictures cannot be used and are left out:")
        for key, fault in list(faults.items())[:_NAMED]:
            say(f"  {plain(str(key), lines=False)}: {fault}")
        if len(faults) > _NAMED:
            say(f"  … and {len(faults) - _NAMED:,} more, in the collection {collection.name}_about")


def _measured(collection: Collection, kind: str, count: int, dim: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raise the effort of a search until recall@10 against exact search reaches 0.99.

    Asked are pictures of the collection for their neighbours. Beyond a million pictures nothing is measured: all
    vectors would have to come here.
    """
    if count > _MEASURED:
        say(
            f"{kind}: more than {_MEASURED:,} pictures; recall against exact search is not measured, the effort is {_EFFORTS[kind][-2]}"
        )
        return {"kind": kind, "effort": _EFFORTS[kind][-2]}
    features, at = np.empty((count, dim), np.float32), 0
    for found in collection.walk(["vector"], rows_together(dim)):
        for row in found[: count - at]:
            features[at] = row["vector"]
            at += 1
    features = features[:at]
    asked = np.sort(np.random.default_rng(0).choice(at, min(at, _ASKED), replace=False))
    queries, k = features[asked], min(10, at)
    largest = float(np.linalg.norm(features.astype(np.float64), axis=1).max())
    least = ExactSearch(torch.from_numpy(features), largest).search(torch.from_numpy(queries), k)[0][:, -1].tolist()
    recall, effort = 0.0, 0
    for effort in _EFFORTS[kind]:
        both = 0
        for start in range(0, len(asked), 16):
            hits = collection.search(queries[start : start + 16], k, effort, kind)
            for nearest, worst in zip(hits, least[start : start + 16], strict=True):
                both += sum(hit["distance"] >= worst - 1e-6 for hit in nearest)  # of equal ones any will do
        recall = both / (k * len(asked))
        if recall >= _TARGET:
            break
    say(f"{kind}: recall@10 {recall:.3f} against exact search, {len(asked)} pictures asked (effort {effort})")
    return {"kind": kind, "effort": effort, "recall_at_10": recall, "asked": len(asked)}
