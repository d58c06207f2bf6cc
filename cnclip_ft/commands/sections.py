"""Where the documentation says more of an error.

docs/troubleshooting.md, whose headings are words of messages; of one that advises a recipe's key, the reference of that key; of one
that advises an option or a command, what stands of the command that was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORDS = (
    "out of memory on",
    "Training stopped before it reached the weights",
    "--continue goes on with the very same recipe",
    "holds other data than the run in",
    "holds a run already",
    "every state is broken",
    "damaged images, more than data.max_damaged_images allows",
    "carry the same text, so there is nothing to tell apart",
    "the full rate would never be reached",
    "is larger than",
    "this recipe cannot be run:",
    "--strict: the plan has warnings",
    "cannot be shared evenly by",
    "a process that loads pictures was ended from outside",
    "its features are computed again",
    "cannot be used (",
    "the run there is finished",
    "features hold NaN or infinity",
    "the recipe itself takes about",
    "is neither a store",
    "no such store, folder or file",
    "is not UTF-8",
    "holds something else than",
    "is not a store",
    "is not a readable LMDB file",
    "holds a store already",
    "is known to hold the",
    "the first line has to name the columns",
    "Mend the source, or raise --max-faults",
    ": another process is ",
    "no font with Chinese glyphs is installed",
    "tells these pictures apart too badly",
    "and could not be fetched from",
    "whole models that are read here",
    "the tensors are not those of the model it describes",
    "which no file of weights may do",
    "no such file or folder, and no published name",
    "refused, reading it would run code of the file",
    "the file is torn or damaged",
    "its image tower is code that the checkpoint names",
    "is not known here (known: ",
    "pip install 'cnclip-ft[",
    "was made by another model than",
    "cannot listen on",
    "the features of the export differ from the source by",
    "no threshold reaches precision",
    "holds no index",
    "can be reached from other machines",
)
# Command → page, section, section of the Chinese page.
COMMANDS = {
    "data": ("data", "what-is-checked-and-what-happens-to-faults", "检查与错误处理"),
    "data check": ("data", "data-check", "data-check"),
    "data curate": ("data", "data-curate", "data-curate"),
    "data mine": ("data", "data-mine", "data-mine"),
    "data export": ("data", "data-export", "data-export"),
    "train": ("training", "when-something-goes-wrong", "出错时"),
    "plan": ("training", "when-something-goes-wrong", "出错时"),
    "tune": ("training", "searching-for-settings", "搜索设置"),
    "evaluate": ("evaluation", "recall", "召回率"),
    "benchmark": ("evaluation", "the-public-test-sets", "公开测试集"),
    "encode": ("evaluation", "features", "特征"),
    "topk": ("evaluation", "search-and-the-official-files", "检索与官方文件"),
    "classify": ("evaluation", "your-own-classes", "自己的类别"),
    "calibrate": ("evaluation", "what-score-means-match", "多少分才算匹配"),
    "compare": ("evaluation", "better-or-chance", "更好还是碰巧"),
    "average": ("evaluation", "one-model-of-several-runs", "多次训练合成一个模型"),
    "ground": ("grounding", "find-phrases", "查找短语"),
    "export": ("checkpoints", "export", "导出"),
    "search": ("search", "ask", "查询"),
    "search index": ("search", "index", "建索引"),
    "search serve": ("search", "serve", "网页服务"),
    "recipe": ("training", "what-trains", "训练哪些参数"),
    "scripts": ("migrate", "scripts-of-the-shell", "shell-脚本"),
}
_KEY = re.compile(r"\b((?:stages|data|model)(?:\.[\w-]+)+)=")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*|\bcnclip-ft [a-z]")


def section_for(message: str, language: str, given: Sequence[str] = ()) -> str | None:
    """``docs/troubleshooting.md#…`` or another section (zh: of the Chinese page); None where nothing is advised, or a page is named.

    Args:
        given: the words of the command line.
    """
    if "docs/" in message:
        return None
    ending, joined = ".zh-CN.md" if language == "zh" else ".md", " ".join(message.split())
    words = next((each for each in WORDS if each.strip() in joined), None)
    if words is not None:
        return f"docs/troubleshooting{ending}#{anchor(words)}"
    key = _KEY.search(joined)
    if key is not None:
        return f"docs/recipe{ending}#{anchor(_section_of(key.group(1)))}"
    named = [word for word in given[:2] if not word.startswith("-")]
    known = COMMANDS.get(" ".join(named)) or COMMANDS.get(named[0] if named else "")
    if known is None or _OPTION.search(joined) is None:
        return None
    return f"docs/{known[0]}{ending}#{known[2 if language == 'zh' else 1]}"


def _section_of(key: str) -> str:
    """The section of docs/recipe.md that lists a key."""
    first, *rest = key.split(".")
    if first == "stages":
        if len(rest) > 2 and rest[1] == "train":
            return "stages.STAGE.train[].lora" if "lora" in rest[3:-1] else "stages.STAGE.train[]"
        own = (
            f".{rest[1]}"
            if len(rest) > 2 and rest[1] in ("teach", "distill", "negatives", "objective", "augment")
            else ""
        )
        return f"stages.STAGE{own}"
    if first == "data" and len(rest) > 1:
        return {"guard": "data.guard", "train": "data.train[]", "valid": "data.valid.NAME"}.get(rest[0], "data")
    return "model.start" if first == "model" and rest[0] == "start" and len(rest) > 1 else first


def anchor(words: str) -> str:
    """What a heading becomes in an address, as code hosts make it: lower case, punctuation off, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
