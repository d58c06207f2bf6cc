"""What a folder of transformers says about pictures: obeyed, or said by the name of the key.

A picture is squashed to the square, or its shorter side is brought to the square's and the middle taken; bicubic or bilinear;
divided by 255 and normalised. A folder that asks for something else would give other features than its author's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnclip_ft.models.formats.files import read_json
from cnclip_ft.models.patches import PatchedPicture
from cnclip_ft.models.preprocessing import PILLOW_FILTERS, Fit, Resample, SquarePicture
from data_tools.errors import RequestError
from data_tools.words import Said

_FILES = ("processor_config.json", "preprocessor_config.json")
_STEPS = ("do_resize", "do_rescale", "do_center_crop", "do_normalize", "do_convert_rgb")


def picture_rules(folder: Path, usual: SquarePicture) -> tuple[SquarePicture, list[str]]:
    """The folder's way from a picture to pixels, and what else it asks for, in words.

    ``processor_config.json`` goes before ``preprocessor_config.json``, as in transformers 5.

    Args:
        usual: what the family's processor does where the folder leaves it open, with the tower's size.

    Raises:
        RequestError: values that are none.
    """
    file, rules = _processor(folder)
    resample, mean, std, said = _of_any(file, rules, usual)
    fit, wrong = _fit(file, rules, usual)
    return SquarePicture(usual.size, fit, mean, std, resample=resample), said + wrong


def patch_rules(folder: Path, usual: PatchedPicture) -> tuple[PatchedPicture, list[str]]:
    """As `picture_rules`, of a folder whose pictures keep their shape (NaFlex).

    Args:
        usual: what the family's processor does where the folder leaves it open, with the tower's patch.
    """
    file, rules = _processor(folder)
    resample, mean, std, said = _of_any(file, rules, usual)
    patch, budget = rules.get("patch_size", usual.patch), rules.get("max_num_patches", usual.budget)
    if patch != usual.patch:
        said.append(f"{file}: patch_size is {repr(patch)[:60]}; the image tower takes patches of {usual.patch}")
    if type(budget) is not int or not 1 <= budget <= 1 << 14:
        raise RequestError(
            f"{file}: max_num_patches is {repr(budget)[:60]}, expected a whole number from 1 to {1 << 14:,}"
        )
    return PatchedPicture(usual.patch, budget, mean, std, resample), said


def square_side(folder: Path) -> int | None:
    """Side of the squares that the folder's processor makes; None where it does not say, or makes no squares."""
    rules = _processor(folder)[1]
    size = rules.get("crop_size" if rules.get("do_center_crop") else "size", rules.get("size"))
    sides = (
        set(size.values()) if isinstance(size, dict) and size.keys() <= {"height", "width", "shortest_edge"} else {size}
    )
    side = sides.pop() if len(sides) == 1 else None
    return side if type(side) is int and 0 < side <= 1 << 13 else None


def unsaid_rules(folder: Path) -> list[str]:
    """What to say where no file of the folder tells how pictures are prepared, and its family has one usual way."""
    if _processor_file(folder) is not None:
        return []
    return [
        Said(
            "{folder} has neither {one} nor {other}: pictures are prepared in its family's usual way. If its author's is another, put "
            "the file there",
            "{folder} 中没有 {one} 也没有 {other}：图片按该系列的通常方式处理。若作者的方式不同，请把该文件放进去",
            folder=folder,
            one=_FILES[1],
            other=_FILES[0],
        )
    ]


def require_rules(folder: Path, kind: str) -> None:
    """
    Args:
        kind: of model, whose pictures are prepared in many ways.

    Raises:
        RequestError: no file of the folder tells in which.
    """
    if _processor_file(folder) is None:
        raise RequestError(
            f"{folder}: neither {_FILES[1]} nor {_FILES[0]} in it, and nothing else says how pictures are prepared for {kind}: "
            f"another way gives other features. Fetch {_FILES[1]} from where the weights came from, or write it with "
            "transformers: AutoImageProcessor.from_pretrained(AUTHOR'S NAME).save_pretrained(FOLDER)"
        )


def refuse_others(said: list[str]) -> None:
    """For a whole model, whose pictures must be prepared as its folder says."""
    if said:
        raise RequestError(
            f"{said[0]}. Its features would be others than its author's. Set the key to what is done here if that is meant"
        )


def _said(en: str, zh: str, file: Path, *, value: Any, **values: Any) -> Said:
    return Said(f"{{file}}: {en}", f"{{file}}：{zh}", file=file, value=repr(value)[:60], **values)


def _of_any(
    file: Path, rules: dict[str, Any], usual: SquarePicture | PatchedPicture
) -> tuple[Resample, tuple[float, ...], tuple[float, ...], list[str]]:
    """Filter, mean and deviation, and what is asked for that is not done for any picture."""
    said = [
        _said("{key} is {value}, which is not done here", "{key} 为 {value}，这里不这样做", file, key=key, value=value)
        for key, value in rules.items()
        if key.startswith("do_") and value and key not in _STEPS
    ]
    if not rules.get("do_resize", True):
        said.append(
            _said(
                "do_resize is {value}; pictures here are always resized to the square",
                "do_resize 为 {value}；这里总会把图片缩放成正方形",
                file,
                value=rules["do_resize"],
            )
        )
    if not rules.get("do_rescale", True) or not _near(
        [rules.get("rescale_factor", 1 / 255)], [1 / 255], file, "rescale_factor"
    ):
        key = "rescale_factor" if rules.get("do_rescale", True) else "do_rescale"
        said.append(
            _said(
                "{key} is {value}; pictures here are divided by 255", "{key} 为 {value}；这里图片的值除以 255",
                file, key=key, value=rules[key],
            )
        )  # fmt: skip
    resample, wrong = _resample(file, rules, usual)
    mean = _colours(file, rules, "image_mean", usual.mean)
    std = _colours(file, rules, "image_std", usual.std)
    if rules.get("do_normalize", True) is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if min(std) <= 0:
        raise RequestError(f"{file}: image_std is {repr(rules['image_std'])[:60]}, expected numbers above 0")
    return resample, mean, std, said + wrong


def _fit(file: Path, rules: dict[str, Any], usual: SquarePicture) -> tuple[Fit, list[str]]:
    side = usual.size
    square = {"height": side, "width": side}
    cropped = bool(rules.get("do_center_crop", usual.fit == "crop"))
    size = rules.get("size", {"shortest_edge": side} if cropped else square)
    if cropped and rules.get("crop_size", square) not in (side, square):
        return usual.fit, [
            _said(
                "do_center_crop with crop_size {value}; the image tower takes {side} × {side}",
                "do_center_crop 的 crop_size 为 {value}；图像塔的输入是 {side} × {side}",
                file,
                value=rules["crop_size"],
                side=side,
            )
        ]
    if size == square or (size == side and not cropped):
        return "squash", []  # nothing is left to be cut off
    if cropped and size in (side, {"shortest_edge": side}):
        return "crop", []
    return usual.fit, [
        _said(
            "size is {value}; the image tower takes {side} × {side}, squashed or with the middle cut out",
            "size 为 {value}；图像塔的输入是 {side} × {side}，压扁或居中裁剪",
            file,
            value=size,
            side=side,
        )
    ]


def _resample(file: Path, rules: dict[str, Any], usual: SquarePicture | PatchedPicture) -> tuple[Resample, list[str]]:
    value = rules.get("resample", usual.resample)
    for name, number in PILLOW_FILTERS.items():
        if value in (name, int(number)):
            return name, []
    return usual.resample, [
        _said(
            "resample is {value}; pictures here are resized bicubically (3) or bilinearly (2)",
            "resample 为 {value}；这里用双三次（3）或双线性（2）缩放图片",
            file,
            value=value,
        )
    ]


def _colours(file: Path, rules: dict[str, Any], key: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    found = rules.get(key) or list(usual)
    return usual if _near(found, usual, file, key) else tuple(map(float, found))


def _processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the folder says it, and what it says."""
    file, found = _processor_file(folder) or (folder / _FILES[1], {})
    return file, {key: value for key, value in found.items() if value is not None}


def _processor_file(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    file = folder / _FILES[0]
    if file.exists():
        nested = read_json(file).get("image_processor")
        if nested is not None:
            if not isinstance(nested, dict):
                raise RequestError(f"{file}: image_processor is a {type(nested).__name__}, expected an object")
            return file, nested
    file = folder / _FILES[1]
    return (file, read_json(file)) if file.exists() else None


def _near(found: Any, expected: Any, file: Path, key: str) -> bool:
    numbers = isinstance(found, list) and all(type(x) in (int, float) and abs(x) < 1e6 for x in found)
    if not numbers or len(found) != len(expected):
        raise RequestError(f"{file}: {key} is {repr(found)[:60]}, expected {len(expected)} numbers")
    return all(abs(a - b) <= 1e-6 for a, b in zip(found, expected, strict=True))
