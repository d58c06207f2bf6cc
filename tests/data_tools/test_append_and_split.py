"""A table behind another, next month's behind this month's, and pictures dealt over splits with like ones together."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import alike, appending, splitting
from data_tools.appending import kept_form
from data_tools.build import build_store
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.pictures import PIXEL_LIMIT, Reencoding
from data_tools.preparation import Preparation
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.stored import Appended, StoreSource
from data_tools.splitting import Shares, build_splits
from data_tools.store import environments, open_store
from tests.commands.test_data import call
from tests.data_tools.samples import content, write_official


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)


def painted(seed: int, side: int = 96, quality: int = 90, cut: int = 0) -> bytes:
    """A smooth picture; the same seed in another size, quality and cut is like it."""
    grey = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(grey).resize((192, 192), Image.Resampling.BICUBIC)
    image = image.crop((cut, cut, 192 - cut, 192 - cut)).resize((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def rows(folder: Path, file: str, numbers, text: str = "第{}件", more: str = "") -> Path:
    for n in numbers:
        if not (folder / f"{n}.jpg").exists():
            (folder / f"{n}.jpg").write_bytes(painted(n))
    (folder / file).write_text(
        "image,text,类目\n" + "".join(f"{n}.jpg,{text.format(n)},c{n % 3}\n" for n in numbers) + more, encoding="utf-8"
    )
    return folder / file


def source(*files: Path):
    return open_source("table", list(map(str, files)))[""]


def pairs(place: Path) -> list[tuple]:
    return [(pair.image_id, pair.text_id, pair.text) for pair in open_store(place).pairs()]


def test_like_pictures_are_found_and_strangers_are_not() -> None:
    copies = [alike.small_copy(painted(n)) for n in range(150)]
    copies += [alike.small_copy(painted(n, 64, 60)) for n in range(0, 150, 3)]
    copies += [alike.small_copy(painted(n, 120, 75, cut=2)) for n in range(0, 150, 5)]
    groups = alike.group(np.array(copies), np.arange(len(copies), dtype=np.uint64))
    assert groups[:150].tolist() == list(range(150))
    assert groups[150:200].tolist() == list(range(0, 150, 3)) and groups[200:].tolist() == list(range(0, 150, 5))
    # Small goods on much white, which differ in a few places.
    goods = np.full((60, 8, 8, 3), 255, np.uint8)
    goods[:, 2:5, 2:6] = np.random.default_rng(0).integers(0, 200, (60, 3, 4, 3))
    again = np.clip(goods.astype(int) + np.random.default_rng(1).integers(-1, 2, goods.shape), 0, 255).astype(np.uint8)
    groups = alike.group(np.concatenate([goods, again]), np.arange(120, dtype=np.uint64))
    assert groups.tolist() == [*range(60), *range(60)]
    # Blank pictures say nothing; equal bytes are alike whatever they show.
    blank = np.full((3, 8, 8, 3), 255, np.uint8)
    assert alike.group(blank, np.array([1, 2, 1], np.uint64)).tolist() == [0, 1, 0]


def test_several_tables_are_one_source(tmp_path) -> None:
    rows(tmp_path, "a-1.csv", range(3))
    rows(tmp_path, "a-2.csv", range(2, 5))
    rows(tmp_path, "a-10.csv", [5])
    build_store(source(tmp_path / "a-*.csv"), tmp_path / "s", progress=False)
    assert [(i, t) for i, t, _ in pairs(tmp_path / "s")] == [
        ("0.jpg", 1),
        ("1.jpg", 2),
        ("2.jpg", 3),
        ("2.jpg", 4),
        ("3.jpg", 5),
        ("4.jpg", 6),
        ("5.jpg", 7),
    ]
    with pytest.raises(RequestError, match="no such file"):
        source(tmp_path / "b-*.csv")
    with pytest.raises(RequestError, match="is a folder: name its tables"):
        source(tmp_path)
    with pytest.raises(RequestError, match="imagefolder' is one folder, and 2 were named"):
        open_source("imagefolder", [str(tmp_path)] * 2)


@pytest.mark.parametrize("form", [{}, {"layout": "official"}, {"shard_size": 2}, {"reencoding": Reencoding(48, 80)}])
def test_next_month_is_added(tmp_path, form: dict) -> None:
    build_store(source(rows(tmp_path, "a.csv", range(5))), tmp_path / "s", progress=False, **form)
    (tmp_path / "4.jpg").write_bytes(painted(400))  # the picture behind the name has changed
    rows(tmp_path, "b.csv", range(3, 7), more="0.jpg,又一句,c0\n")
    old, how = StoreSource(tmp_path / "s"), form.get("reencoding")
    report = build_store(
        Appended(old, source(tmp_path / "b.csv"), Preparation(how, PIXEL_LIMIT)),
        tmp_path / "s",
        overwrite=True,
        progress=False,
        reencoding=how,
        **kept_form(open_store(tmp_path / "s")),
    )
    texts = [text for _, _, text in pairs(tmp_path / "s")]
    # The third row stands there; the fourth picture is another one now.
    assert sorted(texts) == sorted([*(f"第{n}件" for n in range(7)), "第4件", "又一句"])
    assert "1 text stands there already" in "\n".join(report.lines())
    store = open_store(tmp_path / "s")
    assert (
        store.image_count == 8
        and store.layout == form.get("layout", "plain")
        and (store.shards > 2) == ("shard_size" in form)
    )
    again = Appended(StoreSource(tmp_path / "s"), source(tmp_path / "b.csv"), Preparation(how, PIXEL_LIMIT))
    before = open_store(tmp_path / "s").checksum()
    form_now = kept_form(open_store(tmp_path / "s")) | ({"reencoding": how} if how else {})
    build_store(again, tmp_path / "s", overwrite=True, progress=False, **form_now)
    assert form.get("layout") == "official" or open_store(tmp_path / "s").checksum() == before


def test_append_by_command(tmp_path) -> None:
    rows(tmp_path, "a.csv", range(3))
    rows(tmp_path, "b.csv", range(2, 5))
    command = ("import", "table", tmp_path / "a.csv", "--output", tmp_path / "s")
    assert call(*command, "--append")[0] == 0  # nothing is there: it is made
    wanted = content(open_store(tmp_path / "s"))
    code, out = call(*command)
    assert code == 2 and "--overwrite" in out and content(open_store(tmp_path / "s")) == wanted
    code, out = call("import", "table", tmp_path / "b.csv", "--output", tmp_path / "s", "--append")
    assert code == 0 and "2 pairs were added to the 3 that were there" in out, out
    assert open_store(tmp_path / "s").columns_of("4.jpg") == {"类目": "c1"}
    assert call(*command, "--append", "--overwrite")[0] == 2


def listed(store: Path) -> list[str]:
    return [json.loads(line)["problem"] for line in (store / "faults.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("split", [(), ("--split", "0.5,0.5")])
def test_what_earlier_imports_left_out_stays_listed(tmp_path, split) -> None:
    rows(tmp_path, "a.csv", range(8), more="lost-in-may.jpg,x,y\n")
    rows(tmp_path, "b.csv", range(8, 12), more="lost-in-june.jpg,x,y\nlost-in-may.jpg,x,y\n")
    rows(tmp_path, "c.csv", range(12, 14))
    more = ("--output", tmp_path / "s", "--append", "--on-error", "skip", *split)
    first = tmp_path / "s" / "train" if split else tmp_path / "s"
    assert call("import", "table", tmp_path / "a.csv", *more)[0] == 0
    may = listed(first)
    assert len(may) > 0 and all(
        "lost-in-may" in problem or "picture" in problem or "image" in problem for problem in may
    )
    assert call("import", "table", tmp_path / "b.csv", *more)[0] == 0
    june = listed(first)
    assert june[: len(may)] == may and any("lost-in-june" in line for line in june)
    assert call("import", "table", tmp_path / "c.csv", *more)[0] == 0
    assert listed(first) == june  # nothing was left out this time
    code, out = call("check", first)
    assert code == 0 and f"{len(june)} " in out


@pytest.mark.parametrize("split", [(), ("--split", "0.5,0.5")])
def test_new_values_of_pictures_that_are_there_are_said_and_taken_when_asked_for(tmp_path, split) -> None:
    rows(tmp_path, "a.csv", range(8))
    rows(tmp_path, "b.csv", [*range(1, 3), 8])
    (tmp_path / "b.csv").write_text(
        (tmp_path / "b.csv").read_text(encoding="utf-8").replace("第1件,c1", "第1件,新类"), encoding="utf-8"
    )
    base = ("--output", tmp_path / "s", *split)

    def kept(name: str) -> dict:
        stores = [tmp_path / "s" / part for part in ("train", "valid")] if split else [tmp_path / "s"]
        found = [open_store(place).columns_of(name) for place in stores]
        return next(columns for columns in found if columns)

    assert call("import", "table", tmp_path / "a.csv", *base)[0] == 0
    code, out = call("import", "table", tmp_path / "b.csv", *base, "--append")
    said = " ".join(out.split())
    assert code == 0 and "1 pictures that are there have new values of columns (类目 1): the old ones were kept" in said
    assert "--update-columns takes the new ones" in said and kept("1.jpg") == {"类目": "c1"}
    code, out = call("import", "table", tmp_path / "b.csv", *base, "--append", "--update-columns")
    assert code == 0 and "(类目 1): they took the place of the old ones" in " ".join(out.split())
    assert kept("1.jpg") == {"类目": "新类"} and kept("2.jpg") == {"类目": "c2"}
    code, out = call("import", "table", tmp_path / "b.csv", *base, "--append", "--update-columns")
    assert code == 0 and "new values" not in out
    code, out = call("import", "table", tmp_path / "b.csv", *base, "--update-columns")
    assert code == 2 and "it goes with --append only" in " ".join(out.split())


def test_like_pictures_go_into_one_split(tmp_path) -> None:
    for n in range(0, 40, 4):
        (tmp_path / f"{n + 100}.jpg").write_bytes(painted(n, 64, 60))
    numbers = [*range(40), *range(100, 140, 4)]
    table = rows(tmp_path, "a.csv", numbers, more="nope.jpg,x,y\n")
    arguments = ("import", "table", table, "--output", tmp_path / "d", "--split", "0.6,0.2,0.2", "--on-error", "skip")
    code, out = call(*arguments)
    assert code == 0 and "20 pictures are like others, in 10 groups" in out, out
    found = {name: open_store(tmp_path / "d" / name).image_ids for name in ("train", "valid", "test")}
    assert [len(found[name]) for name in found] == [30, 10, 10]
    of = {image_id: name for name, ids in found.items() for image_id in ids}
    assert all(of[f"{n}.jpg"] == of[f"{n + 100}.jpg"] for n in range(0, 40, 4))
    faults = [json.loads(line)["kind"] for line in (tmp_path / "d/train/faults.jsonl").read_bytes().splitlines()]
    assert "missing-file" in faults and str(tmp_path / "d/train/faults.jsonl") in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["d"]
    code, out = call(*arguments)
    assert code == 2 and "holds a store already" in out
    # The same seed deals alike, whatever the order of the rows and names; another one does not.
    shuffled = rows(tmp_path, "b.csv", numbers[::-1])
    for seed, same in ((0, True), (1, False)):
        build_splits(source(shuffled), tmp_path / f"e{seed}", Shares.parse("0.6,0.2,0.2", seed), progress=False)
        assert (sorted(open_store(tmp_path / f"e{seed}/train").image_ids) == sorted(found["train"])) is same
    # Next month: like pictures go where theirs are, others are dealt.
    valid = found["valid"][0].split(".")[0]
    (tmp_path / "500.jpg").write_bytes(painted(int(valid) % 100, 80, 70))
    rows(tmp_path, "c.csv", [500, *range(200, 210), int(valid)], text="新{}")
    again = ("import", "table", tmp_path / "c.csv", "--output", tmp_path / "d", "--split", "0.6,0.2,0.2", "--append")
    code, out = call(*again)
    assert code == 0 and "6 pairs were added to the 30 that were there" in out, out
    now = {name: open_store(tmp_path / "d" / name) for name in found}
    assert "500.jpg" in now["valid"] and f"新{valid}" in [pair.text for pair in now["valid"].pairs()]
    assert [store.image_count for store in now.values()] == [36, 13, 12]
    assert all(set(found[name]) <= set(now[name].image_ids) for name in found)


def test_a_column_says_the_split(tmp_path) -> None:
    rows(tmp_path, "a.csv", range(6))
    text = (
        (tmp_path / "a.csv")
        .read_text("utf-8")
        .replace("类目", "split")
        .replace("c0", "val")
        .replace("c1", "训练")
        .replace("c2", "train")
    )
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    build_splits(source(tmp_path / "a.csv"), tmp_path / "d", "split", progress=False)
    assert [open_store(tmp_path / "d" / name).image_ids for name in ("train", "valid")] == [
        ["1.jpg", "2.jpg", "4.jpg", "5.jpg"],
        ["0.jpg", "3.jpg"],
    ]
    with pytest.raises(
        RequestError, match="--split-column 'part': no such column; beside picture and text there are split"
    ):
        build_splits(source(tmp_path / "a.csv"), tmp_path / "e", "part", progress=False)
    (tmp_path / "a.csv").write_text(text.replace("训练", ""), encoding="utf-8")
    with pytest.raises(DataFault, match="2 pictures have no value in column 'split'"):
        build_splits(source(tmp_path / "a.csv"), tmp_path / "e", "split", progress=False)
    assert not (tmp_path / "e").exists() and not list(tmp_path.glob("cnclip-ft*"))


@pytest.mark.parametrize(
    "wrong", ["1", "0.5,0.6", "a,b", "0.5,0.2,0.2,0.1", "x=0.5,x=0.5", "../x=0.5,y=0.5", "1.0,0.0"]
)
def test_shares_that_are_none(wrong: str) -> None:
    with pytest.raises(RequestError):
        Shares.parse(wrong)
    assert dict(Shares.parse("a=0.7, b=0.3").sizes) == {"a": 0.7, "b": 0.3}


def test_flags_that_exclude_one_another(tmp_path) -> None:
    table = rows(tmp_path, "a.csv", range(3))
    base = ("import", "table", table, "--output", tmp_path / "d")
    assert call(*base, "--split", "0.5,0.5", "--split-column", "x")[0] == 2
    code, out = call(*base, "--split", "train=0.4,a=0.2,b=0.2,c=0.2")
    assert code == 2 and "too few" in out
    assert SourceOptions().encoding == "auto" and not (tmp_path / "d").exists()


def test_an_interrupted_split_goes_on(tmp_path, monkeypatch) -> None:
    table = rows(tmp_path, "a.csv", range(12))
    how = Shares.parse("0.5,0.5")
    build_splits(source(table), tmp_path / "wanted", how, progress=False)
    for stop in ("all", "valid"):  # in the import itself, and in a split
        with monkeypatch.context() as patch:
            patch.setattr(splitting, "build_store", _stopping(splitting.build_store, stop))
            with pytest.raises(KeyboardInterrupt):
                build_splits(source(table), tmp_path / "d", how, resume=True, progress=False)
        assert list(tmp_path.glob("cnclip-ft.d.splitting"))
    build_splits(source(table), tmp_path / "d", how, resume=True, progress=False)
    for name in ("train", "valid"):
        assert content(open_store(tmp_path / "d" / name)) == content(open_store(tmp_path / "wanted" / name))
    assert not list(tmp_path.glob("cnclip-ft*"))


def _stopping(build, name: str):
    def stopped(source, target, **options):
        if Path(target).name == name:
            raise KeyboardInterrupt
        return build(source, target, **options)

    return stopped


@pytest.mark.parametrize("kind", ["folder", "table", "imagefolder", "webdataset", "official"])
def test_a_store_is_never_replaced_unasked(tmp_path, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    place, target = folder, tmp_path / "s"
    if kind == "official":
        write_official(folder, "train", images=1)
        target = tmp_path / "s" / "train"
    elif kind == "webdataset":
        (folder / "0.jpg").write_bytes(painted(0))
        (folder / "0.txt").write_text("a")
        place = folder / "a.tar"
        with tarfile.open(place, "w") as tar:
            tar.add(folder / "0.jpg", "0.jpg")
            tar.add(folder / "0.txt", "0.txt")
    else:
        (folder / "0.jpg").write_bytes(painted(0))
        (folder / "metadata.csv").write_text("file_name,text\n0.jpg,a\n")
        place = folder / "metadata.csv" if kind == "table" else folder
    command = ("import", kind, place, "--output", tmp_path / "s")
    assert call(*command)[0] == 0
    before = open_store(target).generation
    code, out = call(*command)
    assert code == 2 and "replace it with --overwrite" in out and open_store(target).generation == before
    if kind != "official":
        code, out = call(*command, "--split", "0.5,0.5", "--output", tmp_path)
        assert code in (1, 2) and open_store(target).generation == before
        for more in ([], ["--overwrite"]):  # a store holds no stores
            code, out = call(*command, "--split", "0.5,0.5", *more)
            assert code == 2 and "is a store itself" in " ".join(out.split()) and "Choose another --output" in out
        assert open_store(target).generation == before and not (target / "train").exists()
    assert call(*command, "--overwrite")[0] == 0 and open_store(target).generation != before


def test_an_append_that_stopped_between_two_parts_goes_on_as_it_was_dealt(tmp_path, monkeypatch) -> None:
    first, second = rows(tmp_path, "a.csv", range(40)), rows(tmp_path, "b.csv", range(40, 80))

    def add(output: Path, table: Path, **options) -> None:
        build_splits(source(table), output, Shares.parse("0.8,0.1,0.1"), progress=False, **options)

    for output in (tmp_path / "straight", tmp_path / "stopped"):
        add(output, first)
    add(tmp_path / "straight", second, append=True)

    def full(part, target, **options):
        if target.name == "valid":
            raise UserError("the disk is full")
        return build_store(part, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(appending, "build_store", full)
        with pytest.raises(UserError, match="full"):
            add(tmp_path / "stopped", second, append=True)
    assert len(open_store(tmp_path / "stopped" / "train")) > 32, "the first part is in its place already"
    add(tmp_path / "stopped", second, append=True, resume=True)
    for name in splitting.NAMES:
        assert pairs(tmp_path / "stopped" / name) == pairs(tmp_path / "straight" / name)
    assert not (tmp_path / "cnclip-ft.stopped.splitting").exists()


def test_what_another_process_added_meanwhile_is_not_lost(tmp_path) -> None:
    files = [
        rows(tmp_path, f"{name}.csv", numbers) for name, numbers in zip("abc", ([1, 2], [3, 4], [5, 6]), strict=True)
    ]
    build_store(source(files[0]), tmp_path / "s", progress=False)

    def appended(file: Path) -> Appended:
        return Appended(StoreSource(tmp_path / "s"), source(file), Preparation(None, PIXEL_LIMIT))

    class Slow(Appended):
        def open(self):  # the walk through a large folder; another command ends in the meantime
            found = super().open()
            build_store(appended(files[1]), tmp_path / "s", overwrite=True, progress=False)
            return found

    with pytest.raises(RequestError, match="again"):
        build_store(
            Slow(StoreSource(tmp_path / "s"), source(files[2]), Preparation(None, PIXEL_LIMIT)),
            tmp_path / "s",
            overwrite=True,
            progress=False,
        )
    assert [pair[0] for pair in pairs(tmp_path / "s")] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
