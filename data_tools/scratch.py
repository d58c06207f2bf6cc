"""Working folders: beside what they are for, under a name of ours, marked, and one process's at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from data_tools.atomic import mend_interrupted_swap, swap_in
from data_tools.errors import RequestError, UserError
from data_tools.lock import FileLock
from data_tools.outputs import FolderKind
from data_tools.tables import note

OLD = "old"  # what stood at the place, where it and the new one cannot be exchanged at once
MARKER = (
    "cnclip-ft-scratch.json"  # says what the folder is, and is its lock: the two cannot be there one without the other
)


def real_place(target: str | Path) -> Path:
    """Where `target` leads to: links followed, `.` and `..` gone.

    Raises:
        RequestError: it is a root of the file system, or links that lead in a circle.
    """
    try:
        place = Path(os.path.realpath(target))
        os.path.lexists(place) and os.stat(place)
    except OSError as error:
        raise RequestError(f"{target} leads nowhere ({error.strerror}); choose another place") from None
    if not place.name:
        raise RequestError(f"{target} is the root of a file system; choose a folder of its own")
    return place


def scratch_folder(place: Path, purpose: str) -> Path:
    """The working folder for `place` (a `real_place`): ``cnclip-ft.<name>.<purpose>`` beside it, on the same disk."""
    return place.with_name(f"cnclip-ft.{place.name}.{purpose}")


class Scratch:
    """The working folder for `place`, made or taken over, and locked until `remove` or `release`.

    A folder is taken over if its marker says that it is of this purpose and of a place of this name; an empty one too.

    Args:
        place: a `real_place`; missing folders above it are made.
        what: what is being done, as a participle: for the message that another process does it.

    Raises:
        RequestError: something else has this name, it holds links, or another process works in it.
        UserError: it cannot be written.
    """

    def __init__(self, place: Path, purpose: str, what: str) -> None:
        self.place, self.purpose, self.folder = place, purpose, scratch_folder(place, purpose)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            while not self._take(what):
                pass  # the process before has just removed the folder
        except OSError as error:
            raise UserError(f"{place} cannot be written ({error.strerror or error}). Choose another place.") from None

    def _take(self, what: str) -> bool:
        with suppress(FileExistsError):
            self.folder.mkdir()
        try:
            found = self._others()
            if found is not None:
                time.sleep(0.05)  # a folder that is just being made or removed is looked at twice
                found = self._others()
            if found is None:
                self._lock = FileLock(self.folder / MARKER, what, scratch=self.purpose, of=self.place.name)
        except FileNotFoundError:
            return False
        if found is not None:
            raise RequestError(
                f"{self.folder}: this name is needed for work on {self.place.name}, but what is there is {found}. "
                "It is left alone: move it away, or choose another output."
            )
        return True

    def _others(self) -> str | None:
        """What is there, if it is not a working folder of this place."""
        kind = self.folder.lstat().st_mode
        if not stat.S_ISDIR(kind):
            return "a link" if stat.S_ISLNK(kind) else "a file"
        marker = self.folder / MARKER
        note = (
            marker.read_text(encoding="utf-8", errors="replace") if marker.is_file() and not marker.is_symlink() else ""
        )
        names = sorted(set(os.listdir(self.folder)) - {MARKER})
        if not names and not note:
            return None  # empty, or its maker died at once
        try:
            known = json.JSONDecoder().raw_decode(note)[0]
            if (known["scratch"], known["of"]) != (self.purpose, self.place.name):
                return f"the working folder of {known['of']!r} ({known['scratch']})"
        except (ValueError, KeyError, TypeError):
            return f"not marked as a working folder (it holds {(names or [MARKER])[0]})"
        for above, folders, files in os.walk(self.folder):
            for name in (*folders, *files):
                if os.path.islink(os.path.join(above, name)):
                    return f"no longer as it was made ({os.path.join(above, name)} is a link)"
        return None

    def clear(self) -> None:
        """Remove what lies in it."""
        for entry in self.folder.iterdir():
            if entry.name != MARKER:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def swap_in(self, new: Path, kind: FolderKind) -> None:
        """Put `new`, a folder or file in here, at the place. What was there goes, but for what `kind` does not know.

        Raises:
            OSError: it cannot be replaced.
        """
        old = self.folder / OLD
        swap_in(new, self.place, old)
        for before in (new, old):
            self.put_aside(before, kind)

    def put_aside(self, before: Path, kind: FolderKind) -> None:
        """Remove the folder or file `before`, which stood at the place; what is not of this kind is kept beside it."""
        if before.is_dir():
            kept = kind.clear(before)
            if kept is not None:
                aside = self.place.with_name(f"cnclip-ft.{self.place.name}.{secrets.token_hex(4)}")
                os.rename(before, aside)
                note(f"note: {kept} is not of a {kind.name}: what was at {self.place} lies in {aside} now")
        else:
            before.unlink(missing_ok=True)

    def mend(self) -> None:
        """Bring back what stood at the place if a process died between the two renames that replace it."""
        mend_interrupted_swap(self.place, self.folder / OLD)

    def remove(self) -> None:
        """Remove it and let go. What cannot be removed stays, marked, for the next one to clear."""
        try:
            if self._lock.held:
                self.clear()
                if os.name != "posix":
                    self._lock.release()  # Windows removes no open file
                # Only the marker is left. Who comes when it is gone makes a new one, and then the folder stays.
                shutil.rmtree(self.folder)
        except OSError:
            pass
        finally:
            self._lock.release()

    def release(self) -> None:
        """Let go and leave everything for the next one; may be repeated."""
        self._lock.release()
