"""Both ways with the official package, which runs in a process of its own: its readers on our store, our reader on its store."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.build import build_split, build_store
from data_tools.sources import open_source
from data_tools.store import open_store
from tests.data_tools.samples import picture, write_lines, write_official
from tests.official import requires_official, run_official

# Prints every pair and every image as the official readers give them, pixels as a hash.
_READ = """
import hashlib, json, pickle, sys
from cn_clip.training.data import LMDBDataset
from cn_clip.eval.data import EvalImgDataset

def look(folder):
    found = {"pairs": [], "images": {}}
    data = LMDBDataset(folder, split="val", max_txt_length=52, resolution=32)
    for index in range(len(data)):
        image, text, _ = data[index]
        image_id, text_id, raw = pickle.loads(data.txn_pairs.get(str(index).encode()).tobytes())
        found["pairs"].append([image_id, text_id, raw, hashlib.sha256(image.numpy().tobytes()).hexdigest(), text.tolist()])
    del data
    images = EvalImgDataset(folder + "/imgs", resolution=32)
    for index in range(len(images)):
        image_id, image = images[index]
        found["images"][image_id] = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    return found

print(json.dumps([look(folder) for folder in sys.argv[1:]]))
"""
_BUILD = """
import runpy, sys
sys.argv = ["build_lmdb_dataset.py", "--data_dir", sys.argv[1], "--splits", "train", "--lmdb_dir", sys.argv[2]]
runpy.run_module("cn_clip.preprocess.build_lmdb_dataset", run_name="__main__")
"""

pytestmark = requires_official


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Source files; `theirs`, `ours`, `photos-store`: built by the official script, by us, by us from photos with names."""
    folder = tmp_path_factory.mktemp("cross")
    write_official(folder, images=15)
    with (folder / "train_texts.jsonl").open("ab") as file:
        file.write('{"text_id": 900, "text": "“引号” 和 Ａ，on two", "image_ids": [3, 1]}\n'.encode())
    run_official(_BUILD, folder, folder / "theirs")
    build_split(folder, "train", folder / "ours", layout="official", progress=False)
    photos = folder / "photos"
    photos.mkdir()
    for number, name in enumerate(("猫.jpg", "dog.jpg")):
        (photos / name).write_bytes(picture(number))
    write_lines(photos / "captions.csv", [b"image,text,price", "猫.jpg,一只猫,9".encode(), b"dog.jpg,a dog,8"])
    build_store(open_source("folder", str(photos))[""], folder / "photos-store", layout="official", progress=False)
    return folder


@pytest.fixture(scope="module")
def seen(folder) -> list[dict]:
    """The three stores as the official readers see them."""
    return json.loads(
        run_official(_READ, folder / "theirs/train", folder / "ours", folder / "photos-store").splitlines()[-1]
    )


def test_the_official_readers_read_our_store_as_their_own(seen) -> None:
    theirs, ours, _ = seen
    assert len(theirs["pairs"]) == 47 and len(theirs["images"]) == 15
    assert ours == theirs


def test_a_folder_of_photos_goes_through_the_official_readers(folder, seen) -> None:
    """String ids are numbered on the way; the list beside the store leads back."""
    assert [pair[:3] for pair in seen[2]["pairs"]] == [[1, 1, "一只猫"], [2, 2, "a dog"]] and list(
        seen[2]["images"]
    ) == ["1", "2"]
    assert open_store(folder / "photos-store").columns_of(1) == {"price": "9"}  # where the official readers do not look
    assert (folder / "photos-store" / "image_ids.tsv").read_text("utf-8").splitlines() == ["2\tdog.jpg", "1\t猫.jpg"]


def test_our_reader_reads_the_official_store(folder) -> None:
    theirs, ours = open_store(folder / "theirs" / "train"), open_store(folder / "ours")
    assert theirs.layout == "official" and len(theirs) == 47
    assert list(theirs.pairs()) == list(ours.pairs()) and sorted(theirs.image_ids) == sorted(ours.image_ids)
    assert all(theirs.image(k) == ours.image(k) == picture(k) for k in ours.image_ids)
    assert theirs.checksum() == ours.checksum()


def test_pixels_of_our_layout_are_the_official_ones(folder, seen, tmp_path) -> None:
    """What our own layout gives, decoded as the official reader decodes, is the same tensor."""
    plain = build_split(folder, "train", tmp_path / "plain", progress=False).store
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    for pair, (image_id, text_id, text, pixels, _) in zip(plain.pairs(), seen[0]["pairs"], strict=True):
        assert (pair.image_id, pair.text_id, pair.text) == (image_id, text_id, text)
        image = Image.open(io.BytesIO(plain.image(image_id))).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).sub(mean).div(std)
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == pixels
