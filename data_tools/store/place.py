"""The place of a store: what may be replaced there, the folder it is built in, and how it takes its place.

cnclip-ft.<name>.building/     a working folder (`data_tools.scratch`) beside <name>
    request.json               what is built from what, the build's own number, and whether it is finished
    seen/                      ids met          faults.jsonl    what was left out
    store/                     becomes <name>; after that what was there before, until it is removed
    old/                       what was there before, where two folders cannot be exchanged at once
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from pathlib import Path
from typing import Any

from data_tools.atomic import swap_in, whole_file
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.faults import FILE_NAME
from data_tools.outputs import FolderKind, is_empty
from data_tools.scratch import OLD, Scratch, real_place
from data_tools.store.manifest import LIST, MANIFEST, read_manifest
from data_tools.store.opening import PURPOSE, open_store
from data_tools.tables import note

NUMBERS_FILE = "image_ids.tsv"


def _about(folder: Path) -> dict[str, Any] | None:
    """The `meta` record of the store in `folder`; None: no store that can be read."""
    try:
        store = open_store(folder, sample=False)
    except (RequestError, DataFault):
        return None
    try:
        return store.about
    finally:
        store.close()  # Windows renames no open file


def _is_store(folder: Path) -> bool:
    """A damaged store is one by its manifest: it is to be built again in its place."""
    try:
        return _about(folder) is not None or read_manifest(folder) is not None
    except RequestError:
        return False


STORE = FolderKind(
    "store",
    _is_store,
    re.compile(
        rf"(shard-\d{{5}}/)?(pairs|imgs|columns)/((data|lock)\.mdb|{re.escape(LIST)})|"
        + "|".join(map(re.escape, (NUMBERS_FILE, FILE_NAME, MANIFEST)))
    ),
)


def refuse_place(target: str | Path, *, overwrite: bool) -> None:
    """Refuse a place where something is that is no store, or a store that is not to be replaced.

    Raises:
        RequestError: naming what is there.
    """
    place = real_place(target)
    STORE.refuse_other(place)
    if place.is_dir() and not is_empty(place) and not overwrite:
        raise RequestError(f"{target} holds a store already; replace it with --overwrite, or choose another place")


class Workplace:
    """The folder a store is built in, held until `remove` or `leave`.

    Args:
        request: what is built from what, as JSON; None: it is not to be gone on with.
        resume: go on with what is there, if it is of the same request.

    Attributes:
        resumed: there is something to go on with. finished: all is written, `store/` only has to take its place.
        in_place: the store of this request stands at `target`, nothing is left to do.

    Raises:
        RequestError: the place is taken, another process builds here, or the interrupted build was of something else.
        UserError: it cannot be written.
    """

    def __init__(self, target: Path, request: dict[str, Any] | None, *, resume: bool, overwrite: bool) -> None:
        self.target, self.place = target, real_place(target)
        STORE.refuse_other(self.place)
        self._scratch = Scratch(self.place, PURPOSE, "building this store")
        self.folder = self._scratch.folder
        self.store, self._note_file = self.folder / "store", self.folder / "request.json"
        self.resumed = self.finished = self.in_place = False
        note: dict[str, Any] = {}
        try:
            self._scratch.mend()
            note = self._read_note()
            self._choose(note, request, resume, overwrite)
        except BaseException:
            self._scratch.release() if note else self._scratch.remove()
            raise

    def _read_note(self) -> dict[str, Any]:
        try:
            return json.loads(self._note_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # never begun, or cleared in part

    def _choose(self, note: dict[str, Any], request: dict[str, Any] | None, resume: bool, overwrite: bool) -> None:
        digest = None if request is None else _digest(request)
        there = _about(self.place) or {}
        done = (
            note.get("finished", False) and there.get("build") == note["build"]
        )  # what lies here is only to be removed
        if resume and request is not None:
            if (not note or done) and there.get("request") == digest:
                self.in_place = True
                return
            if note and not done:
                self._refuse_other_request(note["request"], request)
                self.resumed, self.finished = True, note["finished"]
                if self.finished and (_about(self.store) or {}).get("build") != note["build"]:
                    raise RequestError(
                        f"{self.folder} belongs to a finished build, but its store is neither there nor at {self.target}. "
                        "Start anew without --continue."
                    )
                overwrite = overwrite or note["overwrite"]
            if not note:
                self._say_older()
        refuse_place(self.target, overwrite=overwrite)
        if self.resumed:
            self._note = note
            return
        self._note_file.unlink(missing_ok=True)  # first: what is cleared in part is not gone on with
        self._put_aside()
        self._scratch.clear()
        self._note = {
            "request": request,
            "digest": digest,
            "build": secrets.token_hex(16),
            "overwrite": overwrite,
            "finished": False,
        }
        if request is not None:
            self._write_note()

    def _say_older(self) -> None:
        older = self.place.with_name(f"{self.place.name}.building")  # as version 0.1.0 called it
        if (older / "request.json").is_file() and (older / "seen").is_dir():
            note(
                f"note: {older} looks like an interrupted build of an older version, which cannot be gone on with; this one "
                "begins anew. Remove that folder when you are sure of it."
            )

    def _refuse_other_request(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        differing = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
        if differing:
            raise RequestError(
                f"{self.folder} holds an interrupted build of other files or settings (different: {', '.join(sorted(differing))}). "
                "Repeat it as it was, or start anew without --continue."
            )

    @property
    def about(self) -> dict[str, Any]:
        """What the store says of its build: a number of its own, and of which request it is."""
        return {"build": self._note["build"], "request": self._note["digest"]}

    def _write_note(self) -> None:
        with whole_file(self._note_file, "w") as file:
            json.dump(self._note, file, ensure_ascii=False)

    def finish(self) -> None:
        """From here on an interrupted build is finished, not gone on with."""
        self._note["finished"] = True
        if self._note["request"] is not None:
            self._write_note()

    def take_place(self) -> None:
        """Put `store/` in its place; what was there is removed if it still is a store and nothing else.

        Raises:
            RequestError: something else is there by now.
            UserError: it cannot be replaced (on Windows: a program has the old one open).
        """
        STORE.refuse_other(self.place)  # hours may have gone by
        if is_empty(self.place):
            STORE.clear(self.place)
        try:
            swap_in(self.store, self.place, self.folder / OLD)
        except PermissionError as error:
            raise UserError(
                f"{self.target} cannot be replaced ({error}). Close the programs that have it open."
            ) from None

    def remove(self) -> None:
        """Remove the folder, with the store that was replaced: only what belongs to one."""
        try:
            self._put_aside()
            self._scratch.remove()
        except OSError:
            pass  # it stays, marked, for the next build to clear
        finally:
            self._scratch.release()

    def _put_aside(self) -> None:
        for before in (self.store, self.folder / OLD):
            self._scratch.put_aside(before, STORE)

    def leave(self) -> None:
        """Let go; what is there can be gone on with."""
        self._scratch.release()


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
