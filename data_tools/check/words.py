"""The words of the check in English and Chinese: rows, findings, headings, kinds of faults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.words import Said, joined, said_in

_ROWS = {
    "images": ("images", "图片"),
    "texts": ("texts", "文本"),
    "pairs": ("pairs", "图文对"),
    "per_image": ("pairs per image", "每张图的图文对"),
    "images_without_text": ("images without text", "没有文本的图片"),
    "missing_images": ("pairs without image", "没有图片的图文对"),
    "repeated_texts": ("text on other images too", "文本也在其他图片上"),
    "repeated_images": ("content under another id", "内容另有编号"),
    "false_negatives": ("false negatives at {batch:,}", "批量 {batch:,} 时的假负例"),
    "tokens": ("caption tokens", "文本长度（token）"),
    "cut": ("cut at {context_length} tokens", "超过 {context_length} token 被截断"),
    "characters": ("caption characters", "文本字数"),
    "languages": ("languages", "语言"),
    "formats": ("formats", "图片格式"),
    "modes": ("colour modes", "颜色模式"),
    "width": ("width", "宽"),
    "height": ("height", "高"),
    "bytes": ("bytes an image", "每张图的字节数"),
    "undecodable": ("undecodable", "无法解码"),
    "unreadable": ("unreadable headers", "文件头不可读"),
    "skipped": ("left out by the build", "构建时略过"),
    "kept": ("kept: {column}", "保留的列：{column}"),
    "beside_boxes": ("pairs with boxes", "有框的图文对"),
    "boxes": ("boxes", "框"),
    "per_phrase": ("boxes a phrase", "每条短语的框"),
    "areas": ("% of the picture in a box", "框占图片的百分比"),
    "phrases": ("phrases: pairs (boxes)", "短语：图文对（框）"),
    "beside_negatives": ("pairs with negatives", "有负例文本的图文对"),
    "beside_weight": ("pairs with a weight", "有权重的图文对"),
    "checksum": ("checksum", "校验和"),
    "rows": ("rows", "行"),
    "characters_of": ("characters, {of}", "字数，{of}"),
    "usual": ("usual length {pair}", "通常的长度比 {pair}"),
    "repeated_rows": ("rows of equal texts", "文本相同的行"),
    "untranslated": ("one text in two languages", "两种语言文本相同"),
    "doubtful": ("doubtful by length", "长度可疑"),
}
_PIECES = {
    "lone": (" + {count:,} without image", "，另有 {count:,} 条没有图片"),
    "share": ("{rate:.2%} of pairs", "{rate:.2%} 的图文对"),
    "smaller": ("split is smaller", "划分没有这么大"),
    "values": ("{values:,} values", "{values:,} 种取值"),
    "four": (
        "Four numbers: smallest / median / 95 % are no larger / largest. One number: all are that.",
        "四个数依次为：最小 / 中位数 / 95% 不超过 / 最大。只有一个数：全都如此。",
    ),
    "false": (
        "False negatives: pairs that meet an equal picture or text in a random batch of that size.",
        "假负例：在这样大的随机批量中遇到相同图片或相同文本的图文对。",
    ),
    "shared": (
        "{first} / {second}: {images:,} pictures and {texts:,} captions in both",
        "{first} / {second}：共有 {images:,} 张图片、{texts:,} 条文本",
    ),
    "hurts": ("hurts", "有害"),
    "note": ("note", "提示"),
    "fine": ("nothing here hurts training", "没有发现有害训练的问题"),
    "title": ("Data check", "数据检查"),
    "nothing": ("nothing to report", "没有问题"),
    "h_undecodable": ("Undecodable", "无法解码"),
    "h_repeated_images": ("Equal pictures under several ids", "相同图片有多个编号"),
    "h_repeated_texts": ("Captions on most pictures", "出现在最多图片上的文本"),
    "h_longest": ("Longest captions (tokens)", "最长的文本（token）"),
    "h_without_text": ("Without text", "没有文本"),
    "h_skipped": ("Left out by the build", "构建时略过的"),
    "h_sample": ("A random sample", "随机样本"),
    "h_doubtful": ("Doubtful translations, by length", "长度可疑的译文"),
    "h_untranslated": ("One text in two languages", "两种语言文本相同"),
}
_FINDINGS = {
    "changed": (
        "{what}: {there} found, {stated} stated by the store: something in it has changed",
        "{what}：实际为 {there}，数据仓记为 {stated}：内容有变",
        "Copy it again from where it is whole, or build it again.",
        "请从完好之处重新复制，或重新构建。",
    ),
    "undecodable": (
        "{count:,} images cannot be decoded", "{count:,} 张图片无法解码",
        "Build again with --on-error skip, or replace them.", "用 --on-error skip 重新构建，或换掉这些图片。",
    ),
    "missing": (
        "{count:,} pairs name an image that is not in the store", "{count:,} 个图文对所指的图片不在数据仓中",
        "Build the store again.", "请重新构建数据仓。",
    ),
    "no_pairs": (
        "no pairs: without answers it can be encoded and searched, not trained on or scored",
        "没有图文对：没有答案时可以编码与检索，不能训练或评测", "", "",
    ),
    "repeated_images": (
        "{count:,} images ({share:.1%}) have the content of another id: in a batch they are false negatives",
        "{count:,} 张图片（{share:.1%}）的内容另有编号：在一个批量中它们是假负例",
        "Give equal pictures one id.", "相同的图片请用同一编号。",
    ),
    "cut": (
        "{share:.1%} of the captions are longer than {context_length} tokens and will be cut",
        "{share:.1%} 的文本超过 {context_length} token，会被截断",
        "Give data.context_length={enough} (the longest has {most} tokens).", "可设 data.context_length={enough}（最长的有 {most} token）。",
    ),
    "without_text": (
        "{count:,} images have no text: they only enlarge the gallery", "{count:,} 张图片没有文本：它们只会扩大候选图库", "", "",
    ),
    "lone": (
        "{count:,} texts have no image: they are neither trained on nor scored",
        "{count:,} 条文本没有图片：既不参与训练也不参与评测", "", "",
    ),
    "large": (
        "the pictures are large (median {width}×{height}): decoding will slow training down",
        "图片较大（中位数 {width}×{height}）：解码会拖慢训练", "Build with --max-side 512.", "构建时加 --max-side 512。",
    ),
    "skipped": (
        "the build left out {count:,} items ({kinds})", "构建时略过了 {count:,} 项（{kinds}）",
        "Each is in {file}, with what to do.", "每一项及改法见 {file}。",
    ),
    "repeated_boxes": (
        "in {count:,} pairs a box stands twice: it counts twice in training",
        "{count:,} 个图文对中有重复的框：训练时会算两次", "Import them again.", "请重新导入。",
    ),
    "whole_boxes": (
        "{count:,} boxes ({share:.1%}) are around nearly all of their picture: they teach where little",
        "{count:,} 个框（{share:.1%}）几乎占满整张图片：对学习位置帮助不大", "", "",
    ),
    "repeated_rows": (
        "{count:,} rows ({share:.1%}) have the texts of another row", "{count:,} 行（{share:.1%}）与另一行文本相同",
        "They are learnt more often; take them out if that is not wanted.", "它们会学得更多；若不需要，请去掉。",
    ),
    "untranslated_rows": (
        "{count:,} rows ({share:.1%}) have one text in two languages: nothing is learnt from them",
        "{count:,} 行（{share:.1%}）两种语言的文本相同：从中学不到东西", "Take them out, or translate them.", "请去掉，或补上译文。",
    ),
    "doubtful_rows": (
        "{count:,} rows ({share:.1%}) have a length more than {factor:g} times off what is usual for their languages",
        "{count:,} 行（{share:.1%}）的长度比与这两种语言通常的相差 {factor:g} 倍以上",
        "Look at them (--html): translations may be cut, or stand in the wrong row.", "请查看（--html）：译文可能被截断，或错了行。",
    ),
    "rows_without": (
        "not every row has every language ({listed} of {rows:,})", "并非每行都有全部语言（{listed}，共 {rows:,} 行）", "", "",
    ),
    "shared_images": (
        "{count:,} pictures are in both splits: scores will be too good", "{count:,} 张图片同时在两个划分中：分数会偏高",
        "Take them out of one.", "请从其中一个划分去掉。",
    ),
    "shared_texts": (
        "{count:,} captions ({share:.1%} of {second}'s) are in both splits",
        "{count:,} 条文本（占 {second} 的 {share:.1%}）同时在两个划分中",
        "Normal for short captions; look at the examples if it is much.", "短文本属正常；若很多，请看示例。",
    ),
}  # fmt: skip
# What is wrong, and what to do: in Chinese alone, for in English every fault has its own words.
_KINDS = {
    "ambiguous-name": ("图片名称可指多个文件", "写出带扩展名的名称。"),
    "bad-base64": ("base64 有误", "重新把图片编码为 base64。"),
    "bad-caption-line": ("文本行的格式有误", "每行为：图片#序号<TAB>句子。"),
    "bad-csv": ("行的格式有误", "含分隔符的单元格请加引号，引号要成对。"),
    "bad-data": ("数据有误", "改正或去掉它。"),
    "bad-field": ("字段有误", "改正该字段的值。"),
    "bad-id": ("编号无效", "编号应为 64 位整数或 1 至 500 字节的文本。"),
    "bad-json": ("JSON 有误", "每行应是一个 JSON 对象。"),
    "bad-annotation": ("标注无效", "修正该标注，或去掉。"),
    "bad-box": ("框无效", "修正该框，或去掉；像素与比例（relative）勿混淆。"),
    "missing-annotation": ("缺少标注文件", "请取同一版本的标注。"),
    "other-size": ("框所指的图片尺寸不同", "请确认这是当时标注的图片。"),
    "bad-xml": ("XML 无法读取", "请从原处重新取得该文件。"),
    "bad-beside": ("文本旁的负例、权重或框无效", "框为 [x, y, 宽, 高]（占图片的比例），负例为文本，权重大于 0。"),
    "bad-language": ("语言无效", "写 zh、en 或 mixed，或不写（会自动识别）。"),
    "bad-member": ("tar 中的成员有误", "重新写出这个 tar。"),
    "bad-parquet": ("Parquet 的这一部分无法读取", "重新写出该文件。"),
    "bad-row": ("行有误", "给每一列取名。"),
    "bad-tar": ("tar 已损坏", "重新获取或写出。"),
    "bad-text": ("文本无效", "以 UTF-8 重新导出文件。"),
    "bad-tsv": ("行的格式有误", "每行为：图片编号<TAB>base64。"),
    "damaged-store": ("数据仓已损坏", "从完好之处重新复制，或重新构建。"),
    "duplicate-image-id": ("图片编号重复", "每张图片用各自的编号。"),
    "duplicate-text-id": ("文本编号重复", "每条文本用各自的编号。"),
    "empty-text": ("文本为空", "写上文本，或去掉这一行。"),
    "file-too-large": ("图片文件过大", "缩小图片。"),
    "image-too-large": ("图片过大", "缩小或略过它。"),
    "line-too-long": ("行过长", "把它拆开，或检查是否缺少换行。"),
    "missing-caption": ("没有文本", "补上文本，或移走该图片。"),
    "missing-field": ("缺少字段", "补上该字段。"),
    "missing-file": ("图片文件不存在", "把它放到那里，或改正路径。"),
    "missing-translation": ("缺少译文", "每行是同一句话的两种或多种语言。"),
    "missing-image": ("所指图片不存在", "补上图片，或去掉这条文本。"),
    "mixed-ids": ("编号既有数字又有文本", "统一为一种。"),
    "not-utf8": ("编码不符", "用 --encoding 指明编码，或以 UTF-8 重新导出。"),
    "outside": ("在文件夹之外", "若信任指出它的文件，请加 --allow-outside。"),
    "refused-image": ("图片被拒收", "改好该图片（它自己的问题另有一条）。"),
    "remote-image": ("图片是网址", "不会去下载：请先下载到图片文件夹。"),
    "stable": ("读取时内容在变", "等写完再读。"),
    "too-many-scans": ("JPEG 的扫描次数过多", "重新保存，或略过它。"),
    "undecodable-image": ("图片无法解码", "换掉或略过它。"),
    "unreadable-captions": ("文本文件无法读取", "改好或去掉该文件。"),
}  # fmt: skip


def row_name(name: str, language: str, **values: Any) -> str:
    return said_in(Said(*_ROWS[name], **values), language)


def piece(name: str, language: str, **values: Any) -> str:
    return said_in(Said(*_PIECES[name], **values), language)


def finding_words(kind: str, values: Mapping[str, Any]) -> tuple[Said, Said]:
    """(what is wrong, what to do)."""
    problem, problem_zh, mend, mend_zh = _FINDINGS[kind]
    if "kinds" in values:
        values = {**values, "kinds": kinds_in_words(values["kinds"])}
    return Said(problem, problem_zh, **values), Said(mend, mend_zh, **values)


def kinds_in_words(kinds: Mapping[str, int]) -> Said:
    """``12 missing-file, 3 empty-text``."""
    each = [
        Said("{count:,} {kind}", "{kind} {count:,}", count=count, kind=Said.exactly(kind, _kind(kind)[0]))
        for kind, count in kinds.items()
    ]
    return joined(each, ", ", "，")


def fault_in_words(kind: str, problem: str, mend: str = "") -> Said:
    """A fault with its own words in English; in Chinese with those of its kind."""
    what, then = _kind(kind)
    return Said.exactly(f"{problem}. {mend}" if mend else problem, f"{what}。{then}" if mend else what)


def _kind(kind: str) -> tuple[str, str]:
    return _KINDS.get(kind, (kind, _KINDS["bad-data"][1]))
