"""Damaged stores: found on opening or by `data check`, named, and never the end of the process."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import lmdb
import pytest

from data_tools.check import judge, measure
from data_tools.errors import RequestError, UserError
from data_tools.store import PairStore, StoreWriter, environments, open_store
from data_tools.store.pages import check_runs, keys_of, walk
from tests.data_tools.samples import content, picture

FIXTURE = Path(__file__).parent / "fixtures" / "stores_version_1.tar.xz"
LAYOUTS = {"plain": {}, "sharded": {"shard_size": 12}, "official": {"layout": "official"}}


def build(target: Path, images: int = 30, seed: int = 0, **options) -> Path:
    with StoreWriter(target, **options) as writer:
        for number in range(images):
            writer.add_image(number, picture(seed + number, (96, 80), "PNG"))  # some 5 kB: on pages of their own
        for number in range(4 * images):
            beside = (
                {"boxes": [[0.5, 0.25, 0.5, number / 200]], "weight": 2} if number % 7 == 1 and number > 60 else None
            )
            writer.add_pair(number % images, number, f"第{number}句 a caption of some length {seed}", "mixed", beside)
        writer.add_lone_text("lone", "搜索", "zh")
        writer.finish().close()
    return target


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for name, options in LAYOUTS.items():
        build(folder / name, **options)
    return folder


def check(path: Path) -> str:
    """What `data check` says of a damaged store; fails for one it takes for whole."""
    try:
        store = open_store(path, sample=False)
        try:
            report = judge([measure(store, progress=False)])
        finally:
            store.close()
    except UserError as error:
        return str(error)
    assert report.hurts, f"{path} passes for whole"
    return "; ".join(finding.problem for finding in report.findings if finding.hurts)


def change(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new))


def change_meta(folder: Path, **changes) -> None:
    with (
        lmdb.open(str(folder / "pairs"), map_size=2**24, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        meta = json.loads(transaction.get(b"meta"))
        transaction.put(b"meta", json.dumps(meta | changes).encode())


# ---- stores of today, of before, and of others ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "sharded", "official", "foreign"])
def test_stores_of_version_1_without_a_manifest_are_read_and_checked(tmp_path, name: str) -> None:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    store = open_store(tmp_path / name)
    images, pairs, lone = content(store)
    assert sorted(images) == [1, 2, 3, 4, 5] and all(data.startswith(b"\x89PNG") for data in images.values())
    assert sorted((p.image_id, p.text_id, p.text) for p in pairs) == sorted(
        (n % 5 + 1, 10 + n, f"第{n}句 caption") for n in range(7)
    )
    assert lone == ([] if name == "foreign" else [(99, "搜索", "zh")])
    foreign = "eba72a208e16203a7de2a309e01327537614eb8dacd51a120650c3dcd7fabc19"
    own = "64c2ef8e803f32122d672b86f5f8d853b4201466b7a26bd4d61b0b77537d0b71"
    found = measure(store, progress=False)
    assert found.checksum == store.checksum() == (foreign if name == "foreign" else own)
    assert found.order == store.order() and store.manifest is None
    assert not judge([found]).hurts
    before = store.generation
    store.close()
    shutil.copytree(tmp_path / name, tmp_path / "copy")
    assert open_store(tmp_path / "copy").generation == before


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_whole_store_passes_and_its_sums_are_computed(whole, name: str) -> None:
    store = open_store(whole / name)
    found = measure(store, progress=False)
    assert not judge([found]).hurts
    assert found.checksum == found.stated_checksum == store.manifest.checksum == store.checksum()
    assert found.order == found.stated_order == store.order()
    assert {path.name for path in (whole / name).iterdir()} - {"pairs", "imgs"} == {"manifest.json"} | (
        {"shard-00000", "shard-00001", "shard-00002"} if name == "sharded" else set()
    )


def test_a_store_in_a_read_only_folder_is_read(whole, tmp_path) -> None:
    copy = Path(shutil.copytree(whole / "plain", tmp_path / "s"))
    before = sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*"))
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        store = open_store(copy)
        assert not judge([measure(store, progress=False)]).hurts and len(store.order()) == 64
        store.close()
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755)
    assert sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*")) == before


# ---- damage ---------------------------------------------------------------------------------------------------------


def flip_caption(store: Path) -> None:
    change(store / "pairs" / "data.mdb", "第57句".encode(), "第58句".encode())


def flip_picture(store: Path) -> None:
    data = bytearray((store / "imgs" / "data.mdb").read_bytes())
    data[data.find(picture(7, (96, 80), "PNG")) + 900] ^= 1
    (store / "imgs" / "data.mdb").write_bytes(data)


def zero_the_end(store: Path) -> None:
    file = store / "imgs" / "data.mdb"
    data = file.read_bytes()
    file.write_bytes(data[:-9000] + bytes(9000))


def imgs_of_another(store: Path) -> None:
    build(store.parent / "other", seed=1000)
    shutil.copy(store.parent / "other" / "imgs" / "data.mdb", store / "imgs" / "data.mdb")


def pairs_of_another(store: Path) -> None:
    build(store.parent / "other", seed=1000)
    for name in ("data.mdb", "data.crc32"):
        shutil.copy(store.parent / "other" / "pairs" / name, store / "pairs" / name)


def no_list(store: Path) -> None:
    (store / "imgs" / "data.crc32").unlink()


def flip_list(store: Path) -> None:
    data = bytearray((store / "imgs" / "data.crc32").read_bytes())
    data[5] ^= 8
    (store / "imgs" / "data.crc32").write_bytes(data)


DAMAGES = {
    "cut": (lambda s: os.truncate(s / "imgs" / "data.mdb", (s / "imgs" / "data.mdb").stat().st_size - 12288), "in part"),
    "cut to nothing": (lambda s: os.truncate(s / "pairs" / "data.mdb", 0), "empty"),
    "cut within a page": (lambda s: os.truncate(s / "pairs" / "data.mdb", 5000), "second page|in part"),
    "longer": (lambda s: open(s / "pairs" / "data.mdb", "ab").write(bytes(4096)), "finished with"),
    "caption": (flip_caption, "pair 57.* differ"),
    "picture": (flip_picture, r"image 7 \(1 in all\) differ"),
    "zeros": (zero_the_end, "page [0-9]+ is none|differ"),
    "other imgs": (imgs_of_another, "differ|finished with"),
    "other pairs": (pairs_of_another, "another build|finished with"),
    "no list": (no_list, "data.crc32.*missing"),
    "list": (flip_list, "data.crc32|differ"),
    "no manifest's json": (lambda s: (s / "manifest.json").write_bytes(b"\xff{"), "manifest.json is damaged"),
    "manifest of words": (lambda s: (s / "manifest.json").write_text('["x"]'), "manifest.json is damaged"),
    "manifest's checksum": (lambda s: change(s / "manifest.json", open_store(s).order()[:40].encode(), b"0" * 40), "order"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(whole, tmp_path, damage: str) -> None:
    copy = Path(shutil.copytree(whole / "plain", tmp_path / "s"))
    spoil, why = DAMAGES[damage]
    spoil(copy)
    said = check(copy)
    assert re.search(why, said), said
    if damage not in ("caption", "picture", "zeros", "list", "no list", "manifest's checksum"):
        with pytest.raises(UserError, match=str(copy)):
            open_store(copy)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (flip_caption, "checksum"),
        (flip_picture, "checksum|cannot be decoded"),
        (zero_the_end, "none of LMDB's"),
        (imgs_of_another, "checksum"),
        (pairs_of_another, "checksum"),
        (lambda s: change(s / "pairs" / "data.mdb", "第57".encode(), b"\xa4\xac\xac57"), "pair 57 is not JSON"),
        (lambda s: change(s / "pairs" / "data.mdb", b'[27,57,"', b'[27,[7,"'), "pair 57 is not"),
        (lambda s: change(s / "pairs" / "data.mdb", b'[27,57,"', b'[2777,"_'), "pair 57 is not"),
        (lambda s: change_meta(s, pairs=119), "120 pairs|121 pairs"),
        (lambda s: change_meta(s, images=31), "30 images"),
        (lambda s: change_meta(s, pairs="120"), "meta record"),
        (lambda s: change_meta(s, lone_texts=-1), "meta record"),
        (lambda s: change_meta(s, sums=["0"]), "meta record"),
        (lambda s: change_meta(s, shards=None), "meta record"),
        (lambda s: change_meta(s, layout=[1]), "meta record"),
        (lambda s: change_meta(s, format=None), "not known"),
        (lambda s: change_meta(s, build=7), "meta record"),
    ],
)
def test_without_a_manifest_counts_and_sums_are_compared(whole, tmp_path, spoil, why: str) -> None:
    copy = Path(shutil.copytree(whole / "plain", tmp_path / "s"))
    (copy / "manifest.json").unlink()
    spoil(copy)
    said = check(copy)
    assert re.search(why, said), said


def test_shards_belong_together(whole, tmp_path) -> None:
    other = build(tmp_path / "other", seed=1000, shard_size=12)
    for number, (spoil, why) in enumerate(
        {
            "swapped": (
                lambda s: [
                    (s / a).rename(s / b)
                    for a, b in [("shard-00000", "x"), ("shard-00001", "shard-00000"), ("x", "shard-00001")]
                ],
                "is shard 1",
            ),
            "missing": (lambda s: shutil.rmtree(s / "shard-00001"), "2 shards are there, the store has 3"),
            "of another": (
                lambda s: [shutil.rmtree(s / "shard-00001"), shutil.copytree(other / "shard-00001", s / "shard-00001")],
                "of another store",
            ),
        }.values()
    ):
        copy = Path(shutil.copytree(whole / "sharded", tmp_path / str(number)))
        spoil(copy)
        for manifest in (True, False):
            if not manifest:
                (copy / "manifest.json").unlink()
            with pytest.raises(UserError, match=why):
                open_store(copy)


def test_what_lmdb_would_follow_out_of_the_file_is_refused(whole, tmp_path) -> None:
    """Every field of the pages that LMDB trusts, set to something else one by one."""
    source = whole / "plain" / "pairs" / "data.mdb"
    data, tree = source.read_bytes(), walk(source)
    newer = 4096 * (struct.unpack_from("=Q", data, 4096 + 144) > struct.unpack_from("=Q", data, 144))
    root = struct.unpack_from("=Q", data, newer + 88 + 40)[0] * 4096
    leaf = int(tree.leaves[1]) * 4096
    assert len(tree.leaves) > 2 and walk(whole / "plain" / "imgs" / "data.mdb").runs.shape == (30, 3)
    node = struct.unpack_from("=H", data, leaf + 16)[0]
    changes = {
        "magic": (16, b"\0"), "page size": (40, b"\1\1"), "flags": (newer + 92, b"\4"), "depth": (newer + 94, b"\7"),
        "root": (newer + 128, b"\xff\xff"), "last page": (newer + 136, b"\xff\xff\xff"), "entries": (newer + 120, b"\1\1"),
        "branch number": (root, b"\x77"), "branch kind": (root + 10, b"\2"), "child": (root + struct.unpack_from("=H", data, root + 18)[0], b"\xff\xff"),
        "leaf kind": (leaf + 10, b"\1"), "lower": (leaf + 12, b"\xff\xff"), "upper": (leaf + 14, b"\xff\xff"),
        "pointer": (leaf + 16, b"\xff\x0f"), "size": (leaf + node, b"\xff\xff"), "node flags": (leaf + node + 4, b"\2"),
        "key": (leaf + node + 6, b"\xff\xff"), "apart": (leaf + node + 4, b"\1"),
    }  # fmt: skip
    for name, (at, new) in changes.items():
        copy = tmp_path / "data.mdb"
        copy.write_bytes(data[:at] + new + data[at + len(new) :])
        with pytest.raises(UserError):
            walk(copy)
            pytest.fail(name)
    images = bytearray((whole / "plain" / "imgs" / "data.mdb").read_bytes())
    run = walk(whole / "plain" / "imgs" / "data.mdb").runs[5]
    images[int(run[0]) * 4096 + 12] ^= 1
    copy.write_bytes(images)
    with pytest.raises(UserError, match="none of LMDB's"):
        check_runs(walk(copy))
    assert keys_of(walk(copy), {int(run[0])}) == [b"i" + struct.pack(">Q", 2**63 + 5)]


# ---- loops: CNCLIP_FT_FLIPS and CNCLIP_FT_CUTS make them longer ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("manifest", [True, False])
def test_flipped_bits_and_cuts_are_found(whole, tmp_path, monkeypatch, manifest: bool) -> None:
    """Anywhere in any file of any layout; without a manifest, bytes that belong to nothing may change."""
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)
    flips, cuts = int(os.environ.get("CNCLIP_FT_FLIPS", "100")), int(os.environ.get("CNCLIP_FT_CUTS", "30"))
    draw = random.Random(int(os.environ.get("CNCLIP_FT_SEED", "0")))
    before = {name: content(open_store(whole / name)) for name in LAYOUTS}
    for number in range(flips + cuts):
        name = draw.choice(list(LAYOUTS))
        copy = Path(shutil.copytree(whole / name, tmp_path / str(number)))
        if not manifest:
            (copy / "manifest.json").unlink()
        file = draw.choice(sorted(copy.rglob("data.mdb")))
        data = bytearray(file.read_bytes())
        if number < flips:
            # Every second one among the first pages, where those that lead to others are.
            at = draw.randrange(len(data) if number % 2 else 5 * 4096)
            data[at] ^= 1 << draw.randrange(8)
        else:
            at = draw.randrange(len(data))
            del data[at:]
        file.write_bytes(data)
        try:
            assert check(copy), (name, at)
        except AssertionError:
            assert not manifest and number < flips, (name, file, at)
            read = content(open_store(copy))
            # Of a language, no sum is kept there.
            images, pairs, lone = [
                [(p.image_id, p.text_id, p.text) for p in part] if at == 1 else part for at, part in enumerate(read)
            ]
            assert (images, lone) == (before[name][0], before[name][2]), (name, file, at)
            assert pairs == [(p.image_id, p.text_id, p.text) for p in before[name][1]], (name, file, at)
        shutil.rmtree(copy)


@pytest.mark.slow
def test_the_command_says_it(whole, tmp_path) -> None:
    draw = random.Random(1)
    for number in range(6):
        copy = Path(shutil.copytree(whole / list(LAYOUTS)[number % 3], tmp_path / str(number)))
        file = draw.choice(sorted(copy.rglob("data.mdb")))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 16
        file.write_bytes(data if number % 2 else data[: len(data) // 2])
        done = subprocess.run(
            [sys.executable, "-m", "cnclip_ft", "data", "check", str(copy)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path,
        )
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr and str(copy) in done.stderr, done.stderr


def test_not_a_store_stays_a_wrong_request(tmp_path) -> None:
    with pytest.raises(RequestError):
        open_store(tmp_path)
    assert PairStore(tmp_path).path == tmp_path
