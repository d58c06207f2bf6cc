"""What is there stays: outputs over sources, over folders and files of the user's, through links, beside them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from data_tools.store import open_store
from tests.commands.test_data import call
from tests.data_tools.samples import picture, write_official
from tests.evaluation import tiny


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file, link and empty folder below."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name] = "empty"
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    for name in ("photos", "photos/deep", "other"):
        (folder / name).mkdir()
        for number in range(2):
            (folder / name / f"{number}.jpg").write_bytes(picture(len(name) * 10 + number))
            (folder / name / f"{number}.txt").write_text(f"{name} {number}", encoding="utf-8")
    for file in ("mine/thesis/text.txt", "mine/pairs/data.mdb", "mine/imgs/1.jpg", "file"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("years of work", encoding="utf-8")
    assert call("import", "folder", folder / "other", "--output", folder / "store")[0] == 0
    shutil.copytree(folder / "store", folder / "noted")
    (folder / "noted/notes.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(folder / "store", folder / "linked")
    shutil.move(folder / "linked/imgs", folder / "elsewhere")
    links = {
        "link": "mine",
        "to-photos": "photos",
        "nowhere": "nowhere/at/all",
        "round": "round",
        "linked/imgs": "../elsewhere",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture
def photos(template, tmp_path, monkeypatch) -> Path:
    """``photos`` with captions, ``mine`` with things of the user's, a store ``store`` and one with notes in it."""
    shutil.copytree(template, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--continue"]])
@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("photos", "is photos, which is read"),
        ("photos/", "is photos"),
        ("to-photos", "is photos"),
        ("other/../photos", "is photos"),
        ("photos/store", "lies inside photos"),
        ("photos/deep", "lies inside photos"),
        (".", "holds photos"),
        ("photos/..", "holds photos"),
        ("/", "holds photos"),
        ("mine", "is no store (it holds imgs)"),
        ("link", "is no store"),
        ("mine/thesis", "is no store"),
        ("file", "is no folder"),
        ("round", "leads nowhere"),
        ("noted", "notes.txt does not belong to one"),
        ("linked", "imgs does not belong to one"),
        ("file/x", "cannot be written"),
    ],
)
def test_no_store_takes_the_place_of_anything_else(photos, output, says, flags) -> None:
    before = snapshot(photos)
    code, out = call("import", "folder", "photos", "--output", output, *flags)
    assert code in (1, 2) and says in out, out
    assert snapshot(photos) == before


def test_a_store_is_replaced_on_request_only(photos) -> None:
    before = snapshot(photos)
    code, out = call("import", "folder", "photos", "--output", "store")
    assert code == 2 and "store holds a store already; replace it with --overwrite" in out
    assert snapshot(photos) == before
    Path("to-store").symlink_to("store")
    assert call("import", "folder", "photos", "--output", "to-store", "--overwrite")[0] == 0
    assert open_store("store").image_count == 4 and Path("to-store").is_symlink()
    assert call("import", "folder", "photos", "--output", "store", "--continue")[0] == 0  # it is the one asked for
    assert set(os.listdir(photos)) - {name.split("/")[0] for name in before} == {"to-store"}


def test_the_folder_stood_in_is_replaced_as_well(photos, monkeypatch) -> None:
    monkeypatch.chdir("store")
    code, out = call("import", "folder", "../photos", "--output", ".", "--overwrite")
    assert code == 0 and "4 images" in out and open_store(photos / "store").image_count == 4


def test_stores_lie_beside_their_official_files_and_all_are_looked_at_first(tmp_path) -> None:
    for split in ("train", "valid"):
        write_official(tmp_path, split, images=2)
    assert call("build", tmp_path, "--splits", "train,valid")[0] == 0
    shutil.rmtree(tmp_path / "train")
    code, out = call("build", tmp_path, "--splits", "train,valid")
    assert code == 2 and "valid holds a store already" in out and not (tmp_path / "train").exists()
    assert call("build", tmp_path, "--splits", "train,valid", "--continue")[0] == 0  # valid is there, train is built
    (tmp_path / "valid" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert call("build", tmp_path, "--splits", "train,valid", "--overwrite")[0] == 2
    code, out = call("build", tmp_path, "--splits", tmp_path.name, "--output", tmp_path.parent)
    assert code == 2 and snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["out.building", "out.unchecked", "out.old", "cnclip-ft.out.building"])
@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_lies_beside_an_output_is_left_alone(photos, name, kind) -> None:
    if kind == "folder":
        shutil.copytree("mine", name)
    elif kind == "link":
        Path(name).symlink_to("mine")
    else:
        Path(name).write_text("mine")
    before = snapshot(photos)
    code, out = call("import", "folder", "photos", "--output", "out")
    assert code == (2 if name.startswith("cnclip") else 0), out
    shutil.rmtree("out", ignore_errors=True)
    assert snapshot(photos) == before


def test_the_demonstration_set_replaces_itself_alone(photos) -> None:
    size = ["--train", 2, "--valid", 1, "--size", 16]
    for name in ("train", "valid_imgs.tsv", "train_texts.jsonl"):
        Path("demo").mkdir()
        if name == "train":
            shutil.copytree("photos", "demo/train")
        else:
            Path("demo", name).write_text("1\tx")
        before = snapshot(photos)
        for flags in ([], ["--overwrite"]):
            assert call("demo", "demo", *size, *flags)[0] == 2 and snapshot(photos) == before
        shutil.rmtree("demo")
    assert call("demo", "demo", *size)[0] == 0
    before = snapshot(photos)
    code, out = call("demo", "demo", *size)
    assert code == 2 and "--overwrite" in out and snapshot(photos) == before
    assert call("demo", "demo", *size, "--overwrite", "--seed", 5)[0] == 0
    assert call("demo", "demo", *size, "--overwrite")[0] == 0
    assert Path("demo/train_imgs.tsv").read_bytes() == before["demo/train_imgs.tsv"]
    Path("demo/valid_texts.jsonl").write_bytes(b"edited by hand\n")
    assert call("demo", "demo", *size, "--overwrite")[0] == 2
    assert Path("demo/valid_texts.jsonl").read_bytes() == b"edited by hand\n"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("check", "store", "--json"), "x.json"),
        (("check", "store", "--html"), "x.html"),
        (("show", "store", "--output"), "x.png"),
    ],
)
def test_reports_and_sheets_replace_themselves_alone(photos, command, name) -> None:
    if command[0] == "show":
        Path("other/0.txt").write_text("plain words")
    Path("x").mkdir()
    Path("mine", name).write_bytes(
        picture(1) if name.endswith("png") else b'{"splits": [' if name.endswith("n") else b"<html>"
    )
    Path("empty").write_bytes(b"")
    Path("far").symlink_to(f"x/{name}")
    Path("same").hardlink_to("store/pairs/data.mdb")
    before = snapshot(photos)
    for place in (
        f"mine/{name}",
        "photos/0.jpg",
        "mine",
        "link/thesis",
        "store/pairs/data.mdb",
        f"store/{name}",
        "same",
    ):
        code, out = call(*command, place)
        assert code == 2 and ("not overwritten" in out or "is a folder" in out or "which is read" in out), (place, out)
        assert snapshot(photos) == before, place
    for place in (f"x/{name}", f"x/{name}", "far", "empty", os.devnull):
        code, out = call(*command, place)
        assert code == 0 or "hurts" in out or code == 1 and command[0] == "check", (place, out)
    assert Path("far").is_symlink() and Path("x", name).stat().st_size > 100
    assert not list(photos.rglob(".cnclip*"))


def test_two_outputs_are_two_files(photos) -> None:
    code, out = call("check", "store", "--json", "one", "--html", "./one")
    assert code == 2 and "named for two outputs" in out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "best")


def _refused(photos: Path, work, *words: str) -> None:
    from data_tools.errors import RequestError

    before = snapshot(photos)
    with pytest.raises(RequestError, match="|".join(words)):
        work()
    assert snapshot(photos) == before


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("output", ["mine", "file", "link", "m", "m/inside", ".", "noted", "photos"])
@pytest.mark.parametrize("to", ["huggingface", "cn_clip"])
def test_exports_take_no_place_but_their_own(photos, checkpoint, to, output, overwrite) -> None:
    from cnclip_ft.export.run import export_checkpoint

    shutil.copytree(checkpoint, "m")
    _refused(
        photos,
        lambda: export_checkpoint("m", to, output, overwrite=overwrite),
        "not overwritten",
        "which is read",
        "not an export",
        "something else than a model",
        "is no folder",
    )


def test_an_export_with_a_foreign_file_stays_and_a_checkpoint_saved_over_one_keeps_it(
    photos, checkpoint, capsys
) -> None:
    from cnclip_ft.export.run import export_checkpoint
    from cnclip_ft.models.checkpoints import load, save_checkpoint

    export_checkpoint(checkpoint, "huggingface", "out")
    Path("out/notes.txt").write_text("mine")
    _refused(
        photos, lambda: export_checkpoint(checkpoint, "huggingface", "out", overwrite=True), "notes.txt does not belong"
    )
    Path("out/notes.txt").unlink()
    Path("out/README.md").write_text("mine")
    _refused(
        photos,
        lambda: export_checkpoint(checkpoint, "huggingface", "out", overwrite=True),
        "README.md was changed or is your own",
    )
    save_checkpoint(load("out"), "out", info={})
    kept = [path for path in photos.glob("cnclip-ft.out.*/*")]
    assert [path.name for path in kept] == ["README.md"] and kept[0].read_text() == "mine"
    assert "README.md is not of a checkpoint" in capsys.readouterr().err and not Path("out/README.md").exists()
    export_checkpoint(checkpoint, "huggingface", "out", overwrite=True)
    export_checkpoint(checkpoint, "cn_clip", "out.pt")
    export_checkpoint(checkpoint, "cn_clip", "out.pt", overwrite=True)
    load("out.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_names_that_are_no_text_come_and_go(photos, checkpoint) -> None:
    from cnclip_ft.evaluation.encoding import encode_to_folder
    from cnclip_ft.evaluation.options import Options
    from cnclip_ft.export.run import export_checkpoint
    from cnclip_ft.features.folder import read_set
    from data_tools.build import build_split
    from data_tools.errors import RequestError

    name, options = os.fsdecode(b"\xd5\xd5"), Options(workers=0, device="cpu")
    shutil.copytree("photos", name)
    picture = next(Path(name).rglob("*.jpg"))
    picture.rename(picture.with_name(f"{name}.jpg"))
    write_official(Path(name, "set"), images=2)
    assert build_split(Path(name, "set"), "train", progress=False, layout="official").pairs == 6
    for number in (1, 2):  # as the second one, what the first wrote is recognised
        encode_to_folder(str(checkpoint), name, f"{name}.f", options, half=number == 2, overwrite=True)
    assert any(image_id.endswith(f"{name}.jpg") for image_id in read_set(f"{name}.f", "image").ids)
    with pytest.raises(RequestError, match="not UTF-8"):  # no library reads it there
        export_checkpoint(str(checkpoint), "huggingface", f"{name}.x")


def test_features_behind_a_link_are_replaced_there(photos, checkpoint) -> None:
    from cnclip_ft.evaluation.encoding import encode_to_folder
    from cnclip_ft.evaluation.options import Options
    from cnclip_ft.features.folder import read_info

    Path("l").symlink_to("real")
    Path("real").mkdir()
    for overwrite in (False, True):
        encode_to_folder(str(checkpoint), "photos", "l", Options(workers=0, device="cpu"), overwrite=overwrite)
    assert Path("l").is_symlink() and read_info("real")["images"] > 0


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("output", ["mine", "file", "photos", "photos/features", ".", "with-parts", "noted", "m"])
def test_features_take_no_place_but_their_own(photos, checkpoint, output, overwrite) -> None:
    from cnclip_ft.evaluation.encoding import encode_to_folder
    from cnclip_ft.evaluation.options import Options

    shutil.copytree(checkpoint, "m")
    shutil.copytree("photos", "with-parts/parts")
    options = Options(workers=0, device="cpu")
    _refused(
        photos,
        lambda: encode_to_folder("m", "photos", output, options, overwrite=overwrite),
        "not overwritten",
        "which is read",
        "no folder",
    )


@pytest.mark.parametrize("rebuild", [True, False])
@pytest.mark.parametrize(
    "output", ["mine", "file", "photos", "photos/index", ".", "with-parts", "with-json", "noted", "m"]
)
def test_an_index_takes_no_place_but_its_own(photos, checkpoint, output, rebuild) -> None:
    from cnclip_ft.evaluation.options import Options
    from cnclip_ft.search.index.renewal import Wishes, build_index

    shutil.copytree(checkpoint, "m")
    shutil.copytree("photos", "with-parts/parts")
    Path("with-json").mkdir()
    Path("with-json/index.json").write_text('{"format": 1, "my": "site"}')
    options = Options(workers=0, device="cpu")
    _refused(
        photos,
        lambda: build_index("m", "photos", output, options, Wishes(rebuild=rebuild), str),
        "not overwritten",
        "which is read",
        "is a file",
    )


def test_an_index_with_photos_in_it_is_named_and_left(photos, checkpoint) -> None:
    from cnclip_ft.evaluation.options import Options
    from cnclip_ft.search.index.renewal import Wishes, build_index

    options = Options(workers=0, device="cpu")
    build_index(checkpoint, "photos", "i", options, Wishes(), str)
    build_index(checkpoint, "photos", "i", options, Wishes(rebuild=True), str)
    shutil.copytree("other", "i/parts")
    _refused(
        photos, lambda: build_index(checkpoint, "photos", "i", options, Wishes(), str), r"parts/0.jpg does not belong"
    )
