"""AutoAugment and its crop beside timm, which the official training takes them from: the same table, shares and pixels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnclip_ft.data.augment import augment
from cnclip_ft.data.auto_augment import (
    AMOUNTS,
    EITHER_WAY,
    OPERATIONS,
    POLICY,
    auto_augment,
    crop_boxes,
    draw_policy,
    fill_of,
    resized_crops,
)
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.recipe_stage import Augmentation
from tests.official import requires_official, run_official

TIMM = {
    "posterise": "PosterizeOriginal", "solarise": "Solarize", "invert": "Invert", "auto contrast": "AutoContrast",
    "equalise": "Equalize", "colour": "Color", "contrast": "Contrast", "sharpness": "Sharpness", "rotate": "Rotate",
    "shear": "ShearX",
}  # fmt: skip
SIDE, DRAWN, CROPPED, REPEATED = 96, 4000, 24, 25
STEPS = sorted({(name, level) for pair in POLICY for name, _, level in pair})
SIGNED = [(name, level, sign) for name, level in STEPS for sign in ((1, -1) if name in EITHER_WAY else (1,))]
# The transform of the official training, built by its own code, and what its parts make of our pictures.
OFFICIAL = """
import json, random, sys
import numpy as np
from PIL import Image
from cn_clip.training.data import LMDBDataset
from timm.data import auto_augment as timm
from torchvision.transforms import functional as F

class Named:
    split, use_augment = "train", True

given = json.load(open("given.json"))
transform = LMDBDataset._build_transform(Named(), given["side"])
crop, flip, _, policy = transform.transforms[:4]
first = policy.policy[0][0]
json.dump({
    "policy": [[[op.name, op.prob, op.magnitude, op.magnitude_std] for op in pair] for pair in policy.policy],
    "fill": first.kwargs["fillcolor"], "resample": int(first.kwargs["resample"]),
    "crop": [list(crop.scale), list(crop.ratio), str(crop.interpolation)], "flip": flip.p,
}, open("told.json", "w"))

def done(picture, name, level, sign):
    timm._randomly_negate = lambda value: sign * value
    op = timm.AugmentOp(name, 1.0, level, hparams=first.hparams)
    assert op.kwargs == first.kwargs
    return op(picture)

pictures = [Image.fromarray(part) for part in np.load("x.npy")]
np.save("operations.npy", np.array([[np.array(done(p, *step)) for p in pictures] for step in given["steps"]]))
out = []
for number, order in enumerate(given["orders"]):
    picture = pictures[number % len(pictures)]
    for step in order:
        picture = done(picture, *step)
    out.append(np.array(picture))
np.save("orders.npy", np.array(out))
random.seed(1)
blank = Image.new("RGB", (given["side"],) * 2)
np.save("drawn.npy", np.array([crop.get_params(blank, crop.scale, crop.ratio) for _ in range(given["drawn"])]))
np.save("crops.npy", np.array([
    np.array(F.resized_crop(pictures[number % len(pictures)], *box, crop.size, crop.interpolation))
    for number, box in enumerate(given["boxes"])
]))
"""


def photos(count: int = 6, side: int = SIDE) -> torch.Tensor:
    """Drawn scenes under a gradient and noise, one dark, one flat but for a stripe, one with few levels."""
    generator = torch.Generator().manual_seed(5)
    scenes = torch.stack([torch.randint(0, 256, (3, 6, 6), generator=generator) for _ in range(count)]).float()
    x = torch.nn.functional.interpolate(scenes, size=side, mode="bicubic") + torch.linspace(-40, 40, side)
    x = x + torch.randn(x.shape, generator=generator) * 6
    x[:, :, side // 3 : side // 2, side // 4 : side // 2] = 250  # hard edges
    x[1] *= 0.3
    x[2] = 77
    x[2, :, 10:14] = 180
    x[3] = (x[3] / 100).round() * 100
    return x.clamp(0, 255).round().to(torch.uint8)


def to_numpy(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).numpy()


@dataclass
class Official:
    told: dict[str, Any]
    operations: np.ndarray  # [step, picture, side, side, 3]
    orders: np.ndarray
    drawn: np.ndarray
    crops: np.ndarray


def boxes() -> torch.Tensor:
    some = crop_boxes(CROPPED, SIDE, 0.9, torch.Generator().manual_seed(0))
    some[0] = torch.tensor([0, 0, SIDE, SIDE])
    return some


def orders() -> list[list[tuple[str, int, int]]]:
    """What is drawn for `photos` many times over, in timm's names."""
    pair, done, back = draw_policy(REPEATED * len(photos()), torch.Generator().manual_seed(3))
    assert len(set(pair.tolist())) == len(POLICY)
    return [
        [
            (TIMM[name], level, -1 if back[row, turn] else 1)
            for turn, (name, _, level) in enumerate(POLICY[number])
            if done[row, turn]
        ]
        for row, number in enumerate(pair.tolist())
    ]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """One process for all: its imports take longer than what it does."""
    place = tmp_path_factory.mktemp("timm")
    np.save(place / "x.npy", to_numpy(photos()))
    steps = [(TIMM[name], level, sign) for name, level, sign in SIGNED]
    given = {"side": SIDE, "drawn": DRAWN, "steps": steps, "orders": orders(), "boxes": boxes().tolist()}
    (place / "given.json").write_text(json.dumps(given))
    run_official(OFFICIAL, cwd=place)
    told = json.loads((place / "told.json").read_text())
    return Official(told, *(np.load(place / f"{name}.npy") for name in ("operations", "orders", "drawn", "crops")))


@requires_official
def test_the_policy_is_that_of_the_official_training(official):
    told = official.told
    assert [[[TIMM[n], probability, level, 0] for n, probability, level in pair] for pair in POLICY] == told["policy"]
    assert told["fill"] == list(fill_of(SquarePicture(224))) == [123, 117, 104]
    assert told["resample"] == Image.Resampling.BICUBIC
    assert told["crop"][0] == [0.9, 1.0] and told["crop"][1] == [0.75, 4 / 3] and "bicubic" in told["crop"][2].lower()
    assert told["flip"] == 0.5


@requires_official
def test_every_operation_gives_the_pixels_of_timm(official):
    """Each operation at each level the policy has, both ways: within 1 of 255, and equal where nothing is resampled."""
    x, fill = photos(), fill_of(SquarePicture(224))
    for (name, level, sign), theirs in zip(SIGNED, official.operations, strict=True):
        ours = OPERATIONS[name](x, sign * AMOUNTS.get(name, float)(level), fill)
        assert ours.dtype == torch.uint8 and ours.shape == x.shape
        away = np.abs(to_numpy(ours).astype(int) - theirs).max()
        assert away <= (name in EITHER_WAY), (name, level, sign, away)


@requires_official
def test_pairs_drawn_here_give_the_pixels_of_timm(official):
    """The whole policy on a batch, every pair at least once, against the same operations of timm one after another."""
    x = photos().repeat(REPEATED, 1, 1, 1)
    ours = to_numpy(auto_augment(x, fill_of(SquarePicture(224)), torch.Generator().manual_seed(3)))
    away = np.abs(ours.astype(int) - official.orders)
    moved = np.array([any(name in ("Rotate", "ShearX") for name, *_ in order) for order in orders()])
    assert (~moved).sum() > 50 and moved.sum() > 20 and away[~moved].max() == 0
    assert (away[moved] <= 1).mean() > 0.999  # what is equalised after a rotation may enlarge a rounding


@requires_official
def test_crops_are_resampled_and_drawn_as_timm_does(official):
    x, mirrored = photos().repeat(CROPPED // len(photos()), 1, 1, 1), torch.arange(CROPPED) % 2 == 0
    theirs = official.crops.copy()
    theirs[::2] = theirs[::2, :, ::-1]
    away = np.abs(to_numpy(resized_crops(x, boxes(), mirrored)).astype(int) - theirs)
    assert away.max() <= 1 and (away == 0).mean() > 0.99

    ours = crop_boxes(DRAWN, SIDE, 0.9, torch.Generator().manual_seed(2)).numpy()
    for part in range(4):  # top, left, height, width: the largest distance of two empirical distributions (p < 0.001)
        places = np.arange(SIDE + 1)
        theirs_below, ours_below = ((a[:, part][:, None] <= places).mean(0) for a in (official.drawn, ours))
        assert np.abs(theirs_below - ours_below).max() < 1.95 * (2 / DRAWN) ** 0.5
    whole, here = ((a[:, 2:] == SIDE).all(1).mean() for a in (official.drawn, ours))
    assert 0.05 < whole < 0.4 and abs(whole - here) < 0.03


def test_pairs_and_operations_are_drawn_in_their_shares():
    count = 50_000
    pair, done, back = draw_policy(count, torch.Generator().manual_seed(1))
    shares = torch.bincount(pair, minlength=25) / count
    assert (shares - 1 / 25).abs().max() < 5 * (1 / 25 / count) ** 0.5
    for number, operations in enumerate(POLICY):
        rows = pair == number
        for turn, (_, probability, _) in enumerate(operations):
            spread = 5 * (0.25 / int(rows.sum())) ** 0.5
            assert abs(done[rows, turn].float().mean() - probability) <= spread * (0 < probability < 1)
    assert abs(back.float().mean() - 0.5) < 0.01
    assert abs((done[:, 0] & done[:, 1]).float().mean() - sum(a[1] * b[1] for a, b in POLICY) / 25) < 0.02


def test_the_setting_crops_mirrors_and_takes_the_policy():
    """Through `augment`: decided by the generator, whatever stands beside a picture, filled with the tower's own mean."""
    setting = Augmentation(crop=0.9, mirror=True, auto_augment="original")
    x = photos(64, 32)
    first, again, other = (augment(x, setting, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == torch.uint8
    changed = x.clone()
    changed[0] = 0
    assert torch.equal(augment(changed, setting, torch.Generator().manual_seed(1))[1:], first[1:])
    half = SquarePicture(32, mean=(0.5,) * 3)
    filled = augment(torch.zeros_like(x), setting, torch.Generator().manual_seed(1), half)
    assert set(filled.unique().tolist()) <= {0, 128, 255, 127} and (filled == 128).any()


def test_random_operations_beside_the_policy_are_refused():
    with pytest.raises(ValueError, match="operations=0"):
        Augmentation(auto_augment="original", operations=2)
