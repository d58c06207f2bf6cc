"""A message that advises a key of a recipe prints the line to type: every text of both packages is read for advice without one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnclip_ft.recipe_keys import keys
from data_tools.check.judge import MOST_TOKENS

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted({key.path.rpartition(".")[2].removesuffix("[]") for key in keys()}, key=len, reverse=True)
ANY, LONG = "|".join(NAMES), "|".join(name for name in NAMES if "_" in name)  # those with _ are no words of prose

# How a text names a key: by its path (a value stands as ‹› in it), in backticks, by a name that is no word, as YAML.
PATH = rf"(?:(?:stages|data|model)|‹›)(?:\.(?:\w+|‹›))*\.(?:{ANY})\b"
KEY = rf"(?:`(?:[\w.]+\.)?(?:{ANY})(?:`|: )|{PATH}|(?<![\w-])(?:{LONG})\b|(?<![\w-])(?:{ANY}): (?=\w))"
UNTYPED = r"(?![\w.‹›]*=)"
DO = (
    r"\b(?:set|raise|lower|use|give|try|leave|choose|take|put|add|drop|remove|keep|make|change|turn|reduce|increase"
    r"|(?:smaller|larger|higher|another|more|fewer)(?! than))\b"
)
TOLD = rf"{DO}\s+(?:[^\s.;:]+\s+){{0,3}}?({KEY}){UNTYPED}"
TOLD_ZH = rf"(?:请|可|改用|设|调高|调低|去掉|减小|增大|换).{{0,8}}?({KEY}){UNTYPED}"
# A refusal that begins with a key, or says what it is, and goes on with what to do.
ABOUT = rf"^(?:{PATH}|(?:stages\.)?‹›: (?:{LONG})|(?:{ANY}))(?:: | is )|^(?:{LONG}) ‹›|{PATH}"
DOES = (
    rf"(?:[;:.,] ?|\bor ){DO}.*?(?:\bit\b|\bout\b|\bor\b|a number|‹›|\boff\b)|\b(?:use|choose) (?:‹›|\w+ or |'?\w+'?, )"
)
LINE = r"(?:\w|‹›|\])=|\bcnclip-ft \w|--\w"

HONEST = {
    "the published numbers are for another ‹› ‹› split: this one has ‹›",  # a split of a public set
}


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of every literal that is prose; what is filled in stands as ‹›."""
    for package in ("cnclip_ft", "data_tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
            told |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
            for node in ast.walk(tree):
                if id(node) in told:
                    continue
                if isinstance(node, ast.JoinedStr):
                    parts = node.values
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts = [node]
                else:
                    continue
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "‹›" for part in parts)
                text = re.sub(r"\{[\w!:.,]+\}", "‹›", text)  # of `format` and of Said
                if re.search(r"[ ，。]", text):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def untyped(text: str) -> str | None:
    """What a text advises without the line to type."""
    for pattern in (TOLD, TOLD_ZH):
        if found := re.search(pattern, text, re.IGNORECASE):
            return found[1]
    if re.search(ABOUT, text) and (found := re.search(DOES, text, re.IGNORECASE)) and not re.search(LINE, text):
        return found[0]
    return None


@pytest.mark.parametrize(
    "text",
    [
        "precision: fp16 needs a CUDA device, this run is on cpu; use auto, fp32 or bf16",
        "model.max_patches is ‹›: a tower of kind ‹› sees all pictures in one size; leave it out",
        "this tower takes pictures in their own shape. Leave image_size out; in a recipe model.max_patches: N is another budget",
        "FSDP2 with fp16: loss scaling over shares is not supported; set precision: bf16 or fp32",
        "fsdp_offload_params; set it to false, and a smaller micro_batch_size in the recipe",
        "image_size ‹› is no multiple of ‹›, the tower's patch size; use ‹› or ‹›",
        "stages.‹›: micro_batch_size: auto tries sizes until one fails; give a number",
        "Raise data.context_length (the longest has ‹› tokens).",
        "可调高 data.context_length（最长的有 ‹› token）。",
        "若非本意，请去掉 data.context_length",
        "this takes memory: try a smaller `batch_size`",
    ],
)
def test_advice_without_a_line_is_seen(text):
    assert untyped(text)


@pytest.mark.parametrize(
    "text",
    [
        "precision: fp16 needs a CUDA device, this run is on cpu: precision=auto or precision=bf16",
        "Give stages.‹›.micro_batch_size=‹› (same gradient)",
        "请设 stages.‹›.micro_batch_size=‹›（梯度不变）",
        "the guard split lost more than data.guard.max_drop allows",
        "--precision ‹›: a share lies between 0 and 1",
    ],
)
def test_a_line_to_type_and_a_mere_mention_are_not(text):
    assert not untyped(text)


def test_every_message_that_advises_a_key_prints_the_line_to_type():
    found = {where: (what, text) for where, text in texts() if (what := untyped(text)) and text not in HONEST}
    assert not found, "\n".join(f"{where} [{what}] {text}" for where, (what, text) in found.items())


def test_the_length_advised_by_the_check_is_one_a_recipe_may_have():
    length = next(key for key in keys() if key.path == "data.context_length")
    assert f"≤ {MOST_TOKENS} " in f"{length.type} "
