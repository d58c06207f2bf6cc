"""Making an index and keeping it up: added, changed, gone, damaged, interrupted; whole at every moment."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

import cnclip_ft
from cnclip_ft.evaluation.options import Options
from cnclip_ft.models.checkpoints import checkpoint_checksum, save_checkpoint
from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.index import renewal as building
from cnclip_ft.search.index.folder import Index
from cnclip_ft.search.index.parts import Parts
from data_tools.errors import RequestError, UserError
from data_tools.store import StoreWriter
from tests.evaluation import tiny
from tests.models.test_towers import foreign
from tests.search.encoded import counted


def features(folder) -> dict:
    index = Index(folder)
    return {index.key(number): np.array(index.features[number]) for number in range(len(index))}


def test_features_are_those_of_the_model(index, checkpoint, photos_once):
    model = cnclip_ft.load(checkpoint)
    opened = Index(index)
    keys = [opened.key(number) for number in range(len(opened))]
    assert keys == sorted(keys) and len(keys) == 20 and "雪 地/01.png" in keys
    expected = model.encode_images([photos_once / key for key in keys])
    assert torch.allclose(torch.from_numpy(np.array(opened.features)), expected, atol=1e-5)
    assert isinstance(opened.features, np.memmap)


def test_only_what_changed_is_encoded(make, checkpoint, photos, tmp_path, monkeypatch):
    make(checkpoint, photos, tmp_path / "i")
    before = features(tmp_path / "i")
    seen = counted(monkeypatch)
    assert "nothing has changed" in make(checkpoint, photos, tmp_path / "i")
    assert seen == []
    (photos / "new.png").write_bytes(tiny.png(77))
    (photos / "dogs" / "00.png").write_bytes(tiny.png(88, size=50))
    (photos / "dogs" / "02.png").unlink()
    said = make(checkpoint, photos, tmp_path / "i")
    assert "18 as they were, 1 changed, 1 gone; 2 to encode" in said
    assert sorted(seen) == ["dogs/00.png", "new.png"]
    after = features(tmp_path / "i")
    assert set(after) == set(before) - {"dogs/02.png"} | {"new.png"}
    assert not np.allclose(after["dogs/00.png"], before["dogs/00.png"])
    assert all(np.array_equal(after[key], before[key]) for key in before.keys() & after.keys() - {"dogs/00.png"})
    make(checkpoint, photos, tmp_path / "fresh")
    fresh = features(tmp_path / "fresh")
    assert list(fresh) == list(after) and all(np.allclose(fresh[key], after[key], atol=1e-5) for key in fresh)


def test_same_size_another_time_counts_as_changed(make, checkpoint, photos, tmp_path, monkeypatch):
    make(checkpoint, photos, tmp_path / "i")
    seen = counted(monkeypatch)
    file = photos / "dogs" / "00.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    make(checkpoint, photos, tmp_path / "i")
    assert seen == ["dogs/00.png"]


def test_an_interrupted_run_goes_on(make, checkpoint, photos, tmp_path, monkeypatch):
    real = building.encode_pictures

    def interrupted(*arguments, **options):
        for number, batch in enumerate(real(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(building, "encode_pictures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(checkpoint, photos, tmp_path / "i", batch_size=4)
    with pytest.raises(RequestError, match="unfinished"):
        Index(tmp_path / "i")
    monkeypatch.setattr(building, "encode_pictures", real)
    # What happens to the source meanwhile is seen.
    first = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))[0]
    (photos / first).write_bytes(tiny.png(99, size=44))
    seen = counted(monkeypatch)
    said = make(checkpoint, photos, tmp_path / "i", batch_size=4)
    assert "7 were encoded before the interruption" in said and len(seen) == 13 and first in seen
    make(checkpoint, photos, tmp_path / "whole")
    whole, continued = features(tmp_path / "whole"), features(tmp_path / "i")
    assert list(whole) == list(continued)
    assert all(np.allclose(whole[key], continued[key], atol=1e-5) for key in whole)
    assert not (tmp_path / "i" / "parts").exists()


def test_an_interrupted_update_leaves_the_old_index(make, checkpoint, photos, tmp_path, monkeypatch):
    make(checkpoint, photos, tmp_path / "i")
    before = features(tmp_path / "i")
    (photos / "new.png").write_bytes(tiny.png(77))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(building.IndexWriter, "items", lambda *_: full())
        with pytest.raises(OSError):
            make(checkpoint, photos, tmp_path / "i")
    assert features(tmp_path / "i").keys() == before.keys()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left.*give the same command again"):
            make(checkpoint, photos, tmp_path / "i")
    assert features(tmp_path / "i").keys() == before.keys()
    seen = counted(monkeypatch)
    make(checkpoint, photos, tmp_path / "i")
    assert seen == [] and "new.png" in features(tmp_path / "i")
    names = {path.name.split("-")[0] for path in (tmp_path / "i").iterdir()}
    assert names == {"index.json", "features", "items", "offsets", "damaged", "lock"}
    assert len(list((tmp_path / "i").glob("features-*"))) == 1


def test_a_reader_keeps_what_it_has_open(make, checkpoint, photos, tmp_path):
    make(checkpoint, photos, tmp_path / "i")
    opened = Index(tmp_path / "i")
    row = np.array(opened.features[3])
    for path in list(photos.rglob("*.png"))[:15]:
        path.unlink()
    make(checkpoint, photos, tmp_path / "i")
    assert len(Index(tmp_path / "i")) == 5 and len(opened) == 20
    assert np.array_equal(opened.features[3], row) and opened.key(19)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_counted_and_named(make, checkpoint, photos, tmp_path, monkeypatch, workers):
    (photos / "cut.png").write_bytes(tiny.png(5)[:60])
    (photos / "words.jpg").write_text("no picture")
    (photos / "empty.webp").touch()
    (photos / "notes.txt").write_text("not looked at")
    (photos / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    said = make(checkpoint, photos, tmp_path / "i", workers=workers)
    assert "4 pictures cannot be used" in said
    for name in ("cut.png", "words.jpg", "empty.webp", "program.png"):
        assert name in said
    opened = Index(tmp_path / "i")
    assert len(opened) == 20 and opened.damaged.keys() == {"cut.png", "words.jpg", "empty.webp", "program.png"}
    seen = counted(monkeypatch)
    assert "nothing has changed" in make(checkpoint, photos, tmp_path / "i") and seen == []
    (photos / "cut.png").write_bytes(tiny.png(5))
    make(checkpoint, photos, tmp_path / "i")
    opened = Index(tmp_path / "i")
    assert seen == ["cut.png"] and len(opened) == 21 and "cut.png" not in opened.damaged


def test_a_file_that_could_not_be_read_is_tried_again(make, checkpoint, photos, tmp_path, monkeypatch):
    real = building.list_source

    def failing(path):
        listing = real(path)
        read = listing.read

        def refuse(key):
            if key == "dogs/04.png":
                raise PermissionError(13, "Permission denied")
            return read(key)

        listing.read = refuse
        return listing

    with monkeypatch.context() as patch:
        patch.setattr(building, "list_source", failing)
        assert "dogs/04.png: cannot be read: Permission denied" in make(checkpoint, photos, tmp_path / "i")
    assert len(Index(tmp_path / "i")) == 19
    make(checkpoint, photos, tmp_path / "i")
    assert len(Index(tmp_path / "i")) == 20 and not Index(tmp_path / "i").damaged


def test_nothing_usable_is_an_error(make, checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(RequestError, match="holds no pictures"):
        make(checkpoint, tmp_path / "photos", tmp_path / "i")
    (tmp_path / "photos" / "a.png").write_text("nothing")
    with pytest.raises(UserError, match="none of the 1 pictures can be used.*a.png"):
        make(checkpoint, tmp_path / "photos", tmp_path / "i")


def test_another_checkpoint_is_refused_with_the_way_out(make, checkpoint, photos, tmp_path):
    make(checkpoint, photos, tmp_path / "i")
    before = features(tmp_path / "i")
    other = tiny.make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(RequestError, match="another checkpoint.*--rebuild"):
        make(other, photos, tmp_path / "i")
    assert all(np.array_equal(row, before[key]) for key, row in features(tmp_path / "i").items())
    make(other, photos, tmp_path / "i", rebuild=True)
    assert not any(np.allclose(row, before[key]) for key, row in features(tmp_path / "i").items())
    with pytest.raises(RequestError, match="other settings.*stored float32 → float16"):
        make(other, photos, tmp_path / "i", half=True)


def test_another_folder_is_refused_unless_it_was_moved(make, checkpoint, photos, tmp_path, monkeypatch):
    make(checkpoint, photos, tmp_path / "i")
    shutil.copytree(photos, tmp_path / "elsewhere")  # times are kept
    with pytest.raises(RequestError, match="--moved"):
        make(checkpoint, tmp_path / "elsewhere", tmp_path / "i")
    seen = counted(monkeypatch)
    make(checkpoint, tmp_path / "elsewhere", tmp_path / "i", moved=True)
    assert seen == []


def test_foreign_folders_are_left_alone(make, checkpoint, photos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(RequestError, match="letter.txt"):
        make(checkpoint, photos, tmp_path / "mine")
    with pytest.raises(RequestError, match="is a file"):
        make(checkpoint, photos, tmp_path / "mine" / "letter.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_two_at_once_are_refused(make, checkpoint, photos, tmp_path):
    from data_tools.lock import FileLock

    make(checkpoint, photos, tmp_path / "i")
    lock = FileLock(tmp_path / "i" / "lock", "writing this index")
    with pytest.raises(RequestError, match="another process is writing"):
        make(checkpoint, photos, tmp_path / "i")
    lock.release()


def test_a_store_by_its_content(make, checkpoint, store, tmp_path, monkeypatch):
    shutil.copytree(store, tmp_path / "s")
    make(checkpoint, tmp_path / "s", tmp_path / "i")
    opened = Index(tmp_path / "i")
    assert len(opened) == 30 and opened.key(0) == 100 and opened.info["source"]["kind"] == "store"
    shutil.rmtree(tmp_path / "s")
    with StoreWriter(tmp_path / "s") as writer:  # 100 as it was, 101 another, 102 … gone, 500 new
        for image_id, seed in ((100, 0), (101, 50), (500, 51)):
            writer.add_image(image_id, tiny.png(seed))
        writer.add_pair(100, 0, "猫", "zh")
        writer.finish()
    seen = counted(monkeypatch)
    said = make(checkpoint, tmp_path / "s", tmp_path / "i")
    assert "1 as they were, 1 changed, 28 gone; 2 to encode" in said and seen == [101, 500]


def test_half_takes_half_the_room(make, checkpoint, photos, index, tmp_path):
    make(checkpoint, photos, tmp_path / "i", half=True)
    half, full = Index(tmp_path / "i"), Index(index)
    assert half.features.dtype == np.float16
    assert np.allclose(half.features, full.features, atol=1e-3)


@pytest.mark.parametrize(
    "change", [{"format": 99}, {"images": 3}, {"files": {}}, {"files": {"features": "none.npy"}}], ids=str
)
def test_a_damaged_index_is_said(index, tmp_path, change):
    shutil.copytree(index, tmp_path / "i")
    info = json.loads((tmp_path / "i" / "index.json").read_text(encoding="utf-8"))
    (tmp_path / "i" / "index.json").write_text(json.dumps(info | change), encoding="utf-8")
    with pytest.raises(RequestError, match="newer cnclip-ft|--rebuild"):
        Index(tmp_path / "i")


def test_no_path_leads_out_of_the_folder(tmp_path):
    from cnclip_ft.search.index.listing import FolderBytes
    from data_tools.errors import DataFault

    (tmp_path / "secret.png").write_bytes(tiny.png(1))
    (tmp_path / "photos").mkdir()
    for key in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"):
        with pytest.raises(DataFault, match="outside"):
            FolderBytes(tmp_path / "photos")(key)


def test_what_nobody_can_look_at_is_kept(make, checkpoint, photos, tmp_path):
    """A drive that is away: its pictures are not taken for gone."""
    (photos / "dogs").rename(tmp_path / "drive")
    (photos / "dogs").symlink_to(tmp_path / "drive")
    assert "followed 1 links (dogs)" in make(checkpoint, photos, tmp_path / "i")
    before = Index(tmp_path / "i").stamps()
    (tmp_path / "drive").rename(tmp_path / "away")
    said = make(checkpoint, photos, tmp_path / "i")
    assert "10 pictures of the index lie where nobody could look now" in said and "links to nothing (dogs)" in said
    assert Index(tmp_path / "i").stamps() == before
    (photos / "dogs").unlink()  # now they are gone indeed
    assert "10 gone" in make(checkpoint, photos, tmp_path / "i")


def test_another_order_of_the_same_pictures_encodes_and_drops_nothing(make, checkpoint, photos, tmp_path, monkeypatch):
    make(checkpoint, photos, tmp_path / "i")
    index = Index(tmp_path / "i")
    before = {index.key(row): index.features[row].copy() for row in range(len(index))}
    (photos / "new.png").write_bytes(tiny.png(77))
    monkeypatch.setattr("data_tools.walk.natural", lambda name: [-ord(letter) for letter in name])
    assert "20 as they were, 0 changed, 0 gone; 1 to encode" in make(checkpoint, photos, tmp_path / "i")
    index = Index(tmp_path / "i")
    after = {index.key(row): index.features[row] for row in range(len(index))}
    assert list(after)[:20] != list(before) and all((after[key] == before[key]).all() for key in before)


def _json(change):
    def damage(folder):
        info = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        change(info)
        (folder / "index.json").write_text(json.dumps(info), encoding="utf-8")

    return damage


def _bytes(name, change):
    def damage(folder):
        (path,) = folder.glob(f"{name}-*")
        path.write_bytes(change(path.read_bytes()))

    return damage


DAMAGES = {
    "items cut": _bytes("items", lambda data: data[:-30]),
    "items cut at a line": _bytes("items", lambda data: data[: data.rindex(b"\n", 0, -1) + 1]),
    "items empty": _bytes("items", lambda data: b""),
    "items longer": _bytes("items", lambda data: data + b'["x", "1"]\n'),
    "items garbled": _bytes("items", lambda data: b"\xff" * len(data)),
    "items of other shapes": _bytes("items", lambda data: b'{"a": 1}' + b" " * (len(data) - 9) + b"\n"),
    "items nested": _bytes("items", lambda data: b"[" * len(data)),
    "items shifted": _bytes("items", lambda data: data[1:] + b"\n"),
    "offsets cut": _bytes("offsets", lambda data: data[:-9]),
    "offsets are text": _bytes("offsets", lambda data: b"hello"),
    "offsets garbled": _bytes("offsets", lambda data: data[:128] + b"\xff" * (len(data) - 128)),
    "features cut": _bytes("features", lambda data: data[:-9]),
    "features empty": _bytes("features", lambda data: b""),
    "features of another type": _bytes("features", lambda data: data.replace(b"<f4", b"<i4", 1)),
    "damaged garbled": _bytes("damaged", lambda data: b"hello\n"),
    "info is a list": lambda folder: (folder / "index.json").write_text("[]"),
    "info is nested": lambda folder: (folder / "index.json").write_text("[" * 100_000),
    "info is cut": lambda folder: (folder / "index.json").write_text('{"format": 1'),
    "no files": _json(lambda info: info.pop("files")),
    "files are a list": _json(lambda info: info.update(files=[])),
    "files elsewhere": _json(lambda info: info["files"].update(items="../../etc/passwd")),
    "images are words": _json(lambda info: info.update(images="20")),
    "images are negative": _json(lambda info: info.update(images=-1)),
    "more images": _json(lambda info: info.update(images=info["images"] + 1)),
    "another width": _json(lambda info: info.update(dim=7)),
    "no norm": _json(lambda info: info.update(largest_norm=None)),
    "source is a word": _json(lambda info: info.update(source="photos")),
    "source of an unknown kind": _json(lambda info: info["source"].update(kind="s3")),
    "model without a path": _json(lambda info: info["checkpoint"].update(path=None)),
    "identity empty": _json(lambda info: info.update(identity={})),
    "approximate without effort": _json(lambda info: info.update(approximate={"kind": "ivf"})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_index_is_told_in_one_message(name, index, make, checkpoint, photos_once, tmp_path):
    """By the question, or where it can only show there by the next update; with --rebuild it is whole again."""
    folder = tmp_path / "i"
    shutil.copytree(index, folder)
    DAMAGES[name](folder)
    with pytest.raises(RequestError, match=r"--rebuild|--output|newer cnclip-ft") as caught:
        engine = open_engine(folder, device="cpu")
        (answer,) = engine.ask([Question("狗", top=20)])
        if isinstance(answer, RequestError):
            raise answer
        make(checkpoint, photos_once, folder)
    assert len(str(caught.value)) < 600
    assert ("--rebuild" in str(caught.value)) == (
        name not in ("info is a list", "info is nested", "info is cut", "no files")
    )
    if name in ("items cut", "identity empty", "another width"):
        make(checkpoint, photos_once, folder, rebuild=True)
        assert len(open_engine(folder, device="cpu").ask([Question("狗", top=20)])[0]) == 20


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: b"", lambda data: b"\xff" * len(data)])
@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_a_damaged_part_is_encoded_again(ending, change, tmp_path):
    identity, features = {"checksum": "a"}, np.ones((2, 3), np.float32)
    parts = Parts(tmp_path, identity, 3)
    parts.add([("a", "1", None), ("b", "1", "broken"), ("c", "1", None)], features)
    parts.flush()
    (file,) = (tmp_path / "parts").glob(f"*.{ending}")
    file.write_bytes(change(file.read_bytes()))
    again = Parts(tmp_path, identity, 3)
    assert not any(again.has(key, "1") for key in "abc")
    again.add([("d", "1", None)], features[:1])
    again.flush()
    assert Parts(tmp_path, identity, 3).has("d", "1")


def test_an_index_keeps_to_the_size_of_its_pictures(photos_once, tmp_path):
    """Of a tower for squares of any size the weights, and so the checksum, are the same at every size."""
    save_checkpoint(foreign("convolutional")[0], tmp_path / "a", info={})
    save_checkpoint(cnclip_ft.load(tmp_path / "a", image_size=40, trust_import=True), tmp_path / "b", info={})
    assert checkpoint_checksum(tmp_path / "a") == checkpoint_checksum(tmp_path / "b")
    trusted = Options(device="cpu", trust_import=True)
    building.build_index(tmp_path / "a", photos_once, tmp_path / "i", trusted, building.Wishes(), lambda line: None)
    with pytest.raises(RequestError, match="made with other settings .image_size 24 → 40"):
        building.build_index(tmp_path / "b", photos_once, tmp_path / "i", trusted, building.Wishes(), lambda line: None)
    assert open_engine(tmp_path / "i", checkpoint=tmp_path / "b", trust_import=True).model.image_size == 24
