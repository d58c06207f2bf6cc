"""The reference of all recipe keys, as a table for the terminal and as a page of docs/, in English and Chinese."""

from __future__ import annotations

import re
from pathlib import Path

from cnclip_ft.recipe_keys import Key, keys
from cnclip_ft.yaml_file import read_yaml

_CHINESE = Path(__file__).with_name("recipe_keys.zh-CN.yaml")
# Words of types; the longer ones first.
_TYPES = {
    "list of ": "列表：",
    "true or false": "true 或 false",
    "whole number": "整数",
    "number": "数",
    "section": "节",
    "path": "路径",
    "text": "文本",
    "name": "名称",
    " or ": " 或 ",
}
_WORDS = {
    "en": {
        "heads": ["key", "type", "default", "meaning"],
        "required": "required",
        "page": """# Recipe keys

[中文](recipe.zh-CN.md)

**When to use what.** A shipped recipe (`cnclip-ft recipe list`) with a few keys overridden is enough for most; `cnclip-ft recipe new` is for
settings that stay. Of the keys below those of a stage matter most: `batch_size`, `learning_rate`, `epochs`, `train`; leave a key out where you do
not know better.

Every key a recipe may have. On the command line a key is given as `key.path=value`, with a stage's own name for STAGE and a
validation set's for NAME; `[]` stands for an entry of a list. `null` stands for nothing, {} for the defaults of the section. The page
is made by `cnclip-ft recipe keys --markdown`; what the keys do together is told in [training.md](training.md). In the terminal:

```bash
cnclip-ft recipe keys augment
cnclip-ft recipe show flickr30k-cn_vit-b-16
```
""",
    },
    "zh": {
        "heads": ["键", "类型", "默认值", "含义"],
        "required": "必填",
        "page": """# 配方的键

[English](recipe.md)

**什么时候用什么。**多数情况下，用自带的配方（`cnclip-ft recipe list`）并在命令行改几个键就够；设置要长期使用时用 `cnclip-ft recipe new`。
下面的键中，阶段里的最要紧：`batch_size`、`learning_rate`、`epochs`、`train`；没有把握的键不写。

配方可以有的全部键。命令行上写作 `key.path=value`，STAGE 换成阶段名，NAME 换成验证集的名称；`[]` 表示列表里的一项。`null` 表示没有，{} 表示该节的默认值。
本页由 `cnclip-ft recipe keys --language zh --markdown` 生成；各键如何配合见 [training.zh-CN.md](training.zh-CN.md)。在终端里：

```bash
cnclip-ft recipe keys 增强 --language zh
cnclip-ft recipe show flickr30k-cn_vit-b-16
```
""",
    },
}


def rows(language: str = "en", word: str = "") -> list[list[str]]:
    """Path, type, default and meaning of every key in whose path or meaning `word` is found."""
    chinese = read_yaml(_CHINESE) if language == "zh" else {}
    found = []
    for key in keys():
        meaning = chinese.get(key.path) or " ".join(key.meaning.split())
        default = _WORDS[language]["required"] if key.default is None else key.default
        row = [key.path, _type(key, language), str(default), meaning]
        if word.lower() in f"{key.path} {meaning}".lower():
            found.append(row)
    return found


def heads(language: str) -> list[str]:
    return list(_WORDS[language]["heads"])


def _type(key: Key, language: str) -> str:
    if language == "en" or ", ".join(key.words) == key.type:  # words of the recipe itself
        return key.type
    return re.sub("|".join(_TYPES), lambda word: _TYPES[word[0]], key.type)


def page(language: str) -> str:
    """docs/recipe.md or docs/recipe.zh-CN.md: a table for the recipe itself and for every section of it."""
    parts: dict[str, list[list[str]]] = {"": []}
    for row in rows(language):
        above = row[0].rpartition(".")[0]
        parts.setdefault(above, []).append(row)
    text, required = [str(_WORDS[language]["page"])], _WORDS[language]["required"]
    for above, inside in parts.items():
        text += [f"## {above}\n"] if above else []
        text += ["| " + " | ".join(heads(language)) + " |", "|---|---|---|---|"]
        for path, kind, default, meaning in inside:
            cells = [f"`{path.rpartition('.')[2]}`", kind, default if default == required else f"`{default}`", meaning]
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        text.append("")
    return "\n".join(text)
