"""Whole files, exchanged folders, locks, working folders, and what may be written over."""

import json
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_tools import atomic, outputs
from data_tools.atomic import leftovers, mend_interrupted_swap, swap_in, whole_file, whole_path
from data_tools.errors import RequestError, UserError
from data_tools.lock import FileLock
from data_tools.outputs import FolderKind, refuse_foreign_file, refuse_overlap
from data_tools.scratch import MARKER, Scratch, real_place, scratch_folder

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and permissions of POSIX")


def test_a_file_appears_whole(tmp_path):
    with whole_file(tmp_path / "a/b/x", "w") as file:
        file.write("一\n\udc80")
        file.flush()
        assert not (tmp_path / "a/b/x").exists()
    assert (tmp_path / "a/b/x").read_bytes() == "一\n\\udc80".encode()
    with whole_path(tmp_path / "a/b/x") as beside:
        beside.write_bytes(b"2")
        assert (tmp_path / "a/b/x").read_bytes() != b"2"
    assert os.listdir(tmp_path / "a/b") == ["x"] and (tmp_path / "a/b/x").read_bytes() == b"2"


@pytest.mark.parametrize("way", [whole_file, whole_path])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_on_failure_nothing_is_left(tmp_path, way, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)), way(tmp_path / "x"):
        raise error
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_an_error_of_another_file_is_not_told_as_one_of_this(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "x"):
        open(tmp_path / "source")


def test_a_name_as_long_as_it_may_be(tmp_path):
    name = "名" * 85  # 255 bytes
    with whole_file(tmp_path / name) as file:
        file.write(b"1")
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(UserError, match="cannot be written"), whole_file(tmp_path / (name + "x")):
        pass


@pytest.mark.parametrize("place", ["folder", "folder/", ".", "folder/.."])
def test_a_folder_is_refused(tmp_path, monkeypatch, place):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="is a folder; name a file"), whole_file(place):
        pass
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), whole_file(tmp_path / "file/x"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@posix
def test_links_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far/there").write_text("old")
    (tmp_path / "far/there").chmod(0o640)
    for name in ("there", "dangling"):
        with whole_file(tmp_path / name, "w") as file:
            file.write("new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "far" / name).read_text() == "new"
    assert stat.S_IMODE((tmp_path / "far/there").stat().st_mode) == 0o640
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(UserError), whole_file(tmp_path / "round"):
        pass


@posix
def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "x"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_write_protection_is_heeded(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write everything
    with pytest.raises(RequestError, match="write-protected"), whole_file(tmp_path / "x"):
        pass

    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UserError, match="cannot be written .Permission denied"), whole_file(tmp_path / "y"):
        pass
    assert (tmp_path / "x").read_text() == "old"


@posix
def test_devices_and_pipes_are_written_into(tmp_path):
    with whole_file("/dev/null") as file:
        file.write(b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    with whole_file(tmp_path / "pipe", "w") as file:
        file.write("through")
    reader.join(10)
    assert found == [b"through"] and os.listdir(tmp_path) == ["pipe"]
    code = "from data_tools.atomic import whole_file\nwith whole_file('/dev/stdout', 'w') as f: f.write('b')"
    with open(tmp_path / "log", "wb") as log:
        log.write(b"a")
        log.flush()
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True, timeout=60)
    assert (tmp_path / "log").read_bytes() == b"ab"


def test_two_writers_of_one_file(tmp_path):
    with whole_file(tmp_path / "x") as first, whole_file(tmp_path / "x") as second:
        first.write(b"first")
        second.write(b"second")
        assert len(leftovers(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"first"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    swap_in(tmp_path / "new", tmp_path / "target", tmp_path / "old")
    assert (tmp_path / "target/who").read_text() == "new"
    assert [(tmp_path / name / "who").exists() for name in ("new", "old")].count(True) == 1
    if not exchange:
        os.rename(tmp_path / "target", tmp_path / "new")  # as a kill between the two renames leaves it
        mend_interrupted_swap(tmp_path / "target", tmp_path / "old")
        assert (tmp_path / "target/who").read_text() == "target"


def test_a_lock_says_who_holds_it_and_survives_its_file(tmp_path):
    held = FileLock(tmp_path / "lock", "at work")
    with pytest.raises(RequestError, match=rf"another process is at work \(process {os.getpid()} on "):
        FileLock(tmp_path / "lock", "at work")
    (tmp_path / "lock").unlink()  # its folder is being removed
    again = FileLock(tmp_path / "lock", "at work")  # whoever comes now holds the file that is there
    with pytest.raises(RequestError):
        FileLock(tmp_path / "lock", "at work")
    held.release()
    with pytest.raises(RequestError):
        FileLock(tmp_path / "lock", "at work")
    again.release()
    FileLock(tmp_path / "lock", "at work").release()


def test_a_lock_got_on_a_file_that_is_gone_is_taken_anew(tmp_path, monkeypatch):
    from data_tools import lock

    real, calls = lock._lock, []

    def lock_late(handle):  # the file goes between opening and locking it
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        return real(handle)

    monkeypatch.setattr(lock, "_lock", lock_late)
    held = FileLock(tmp_path / "lock", "at work")
    assert len(calls) == 2 and (tmp_path / "lock").exists()
    held.release()


def scratch(tmp_path):
    return Scratch(real_place(tmp_path / "out"), "building", "building this store")


def test_a_working_folder_is_made_marked_locked_and_removed(tmp_path):
    work = scratch(tmp_path / "new")
    assert work.folder.parent == tmp_path / "new" and work.folder.name != "out.building"
    (work.folder / "half").write_text("")
    with pytest.raises(RequestError, match="another process is building this store"):
        scratch(tmp_path / "new")
    work.release()
    work = scratch(tmp_path / "new")
    assert (work.folder / "half").exists()
    work.clear()
    assert os.listdir(work.folder) == [MARKER]
    work.remove()
    work.remove()
    assert os.listdir(tmp_path / "new") == []


def test_only_one_of_many_gets_a_working_folder_that_comes_and_goes(tmp_path):
    """Marker, lock and folder vanish together under those who wait for them."""
    holders, most, errors = [], [], []

    def work():
        for _ in range(60):
            try:
                mine = scratch(tmp_path)
            except RequestError:
                continue
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
                return
            holders.append(1)
            most.append(len(holders))
            (mine.folder / "file").write_text("")
            holders.pop()
            mine.remove()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and max(most) == 1
    scratch(tmp_path).remove()
    assert os.listdir(tmp_path) == []


def _unmarked(place):
    place.mkdir()
    (place / "diary").write_text("mine")


def _of_another(place):
    place.mkdir()
    (place / MARKER).write_text(json.dumps({"scratch": "building", "of": "other"}))
    (place / "store").write_text("")


def _bad_marker(place):
    place.mkdir()
    (place / MARKER).write_text("[]")
    (place / "diary").write_text("mine")


def _file(place):
    place.write_text("mine")


def _link(place):
    (place.parent / "private").mkdir()
    (place.parent / "private/diary").write_text("mine")
    place.symlink_to(place.parent / "private")


def _link_inside(place):
    (place.parent / "private").mkdir()
    (place.parent / "private/diary").write_text("mine")
    place.mkdir()
    (place / MARKER).write_text(json.dumps({"scratch": "building", "of": "out"}))
    (place / "store").symlink_to(place.parent / "private")


@pytest.mark.parametrize("lay", [_unmarked, _of_another, _bad_marker, _file, _link, _link_inside])
def test_what_is_no_working_folder_of_this_place_is_left_alone(tmp_path, lay):
    lay(scratch_folder(tmp_path / "out", "building"))
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(RequestError, match="left alone"):
        scratch(tmp_path)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_an_empty_folder_and_one_whose_maker_died_at_once_are_taken(tmp_path):
    place = scratch_folder(tmp_path / "out", "building")
    place.mkdir()
    scratch(tmp_path).release()
    (place / MARKER).write_text("")
    scratch(tmp_path).remove()
    assert not place.exists()


@pytest.mark.parametrize("path", ["/", "round"])
def test_places_that_lead_nowhere(tmp_path, path):
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(RequestError):
        real_place(tmp_path / path)


@pytest.mark.parametrize(
    ("output", "relation"),
    [
        ("photos", "is"),
        ("photos/", "is"),
        ("photos/../photos", "is"),
        ("link", "is"),
        ("photos/deep/store", "lies inside"),
        ("link/new", "lies inside"),
        ("photos/dangling", None),
        (".", "holds"),
        ("photos/../x", None),
        ("beside", None),
        ("photos2/x", None),
    ],
)
def test_outputs_that_overlap_a_source(tmp_path, monkeypatch, output, relation):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/dangling").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    if relation is None:
        return refuse_overlap(output, ["photos", "not there"])
    with pytest.raises(RequestError, match=rf"{re.escape(output)} {relation} photos, which is read"):
        refuse_overlap(output, ["photos", "not there"])
    if relation == "lies inside":
        refuse_overlap(output, ["photos"], inside=False)


def test_an_output_file_that_is_a_source_by_another_name(tmp_path):
    (tmp_path / "table.csv").write_text("a")
    os.link(tmp_path / "table.csv", tmp_path / "same.csv")
    with pytest.raises(RequestError, match="is .*which is read"):
        refuse_overlap(tmp_path / "same.csv", [tmp_path / "table.csv"])
    refuse_overlap(tmp_path / "train", [tmp_path / "table.csv"])


KIND = FolderKind("thing", lambda folder: (folder / "sign").is_file(), re.compile(r"sign|data/\d+"))


def _thing(folder, **others):
    (folder / "data").mkdir(parents=True)
    for name, content in {"sign": "", "data/1": "", **others}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("foreign", ["notes.txt", "data/x", "deep/1"])
def test_a_folder_with_a_foreign_file_is_refused_and_never_cleared_of_it(tmp_path, foreign):
    _thing(tmp_path / "a", **{foreign: "mine"})
    with pytest.raises(RequestError, match=f"{foreign} does not belong"):
        KIND.refuse_other(tmp_path / "a")
    assert KIND.clear(tmp_path / "a") == foreign
    assert [path.read_text() for path in (tmp_path / "a").rglob("*") if path.is_file()] == ["mine"]


def test_a_link_is_foreign(tmp_path):
    _thing(tmp_path / "a")
    (tmp_path / "private").mkdir()
    (tmp_path / "private/1").write_text("mine")
    (tmp_path / "a/data/1").unlink()
    (tmp_path / "a/data").rmdir()
    (tmp_path / "a/data").symlink_to(tmp_path / "private")
    with pytest.raises(RequestError, match="data does not belong"):
        KIND.refuse_other(tmp_path / "a")
    assert KIND.clear(tmp_path / "a") == "data" and (tmp_path / "private/1").read_text() == "mine"


def test_what_is_recognised_goes_and_nothing_else_is_taken_for_it(tmp_path):
    _thing(tmp_path / "a", **{".DS_Store": ""})
    KIND.refuse_other(tmp_path / "a")
    assert KIND.clear(tmp_path / "a") is None and not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("")
    for place in ("nothing", "empty"):
        KIND.refuse_other(tmp_path / place)
    with pytest.raises(RequestError, match="no folder"):
        KIND.refuse_other(tmp_path / "file")
    with pytest.raises(RequestError, match=r"no thing \(it holds x\)"):
        KIND.refuse_other(tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "known", "ours"),
    [
        ('{"a": 1, "b": 2}', outputs.json_with("a", "b"), True),
        ('{"a": 1}', outputs.json_with("a", "b"), False),
        ("not json", outputs.json_with("a"), False),
        ("[1]", outputs.json_with("a"), False),
        ('{"id": 1, "ids": []}\n{"x": 1}\n', outputs.lines_with("id", "ids"), True),
        ('{"id": 1, "text": ""}\n', outputs.lines_with("id", "ids"), False),
        ("", outputs.json_with("a"), True),
        ("\x89PNG", outputs.begins(b"\x89PNG", b"<svg"), False),
        ("<svg x", outputs.begins(b"PNG", b"<svg"), True),
        ("<html><meta name=generator>", outputs.holds(b"name=generator"), True),
        ("[" * 100_000, outputs.json_with("a"), False),
    ],
)
def test_files_are_known_by_their_content(tmp_path, content, known, ours):
    (tmp_path / "x").write_text(content, encoding="utf-8")
    if ours:
        return refuse_foreign_file(tmp_path / "x", known, "a report")
    with pytest.raises(RequestError, match="is there already and is not a report: it is not overwritten"):
        refuse_foreign_file(tmp_path / "x", known, "a report")


def test_places_that_hold_no_file(tmp_path):
    refuse_foreign_file(Path(os.devnull), outputs.json_with("a"), "a report")
    refuse_foreign_file(tmp_path / "new", outputs.json_with("a"), "a report")
    with pytest.raises(RequestError, match="is a folder"):
        refuse_foreign_file(tmp_path, outputs.json_with("a"), "a report")
