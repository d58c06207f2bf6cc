"""Where a run's weights come from: one place decides, and says what was loaded, newly made, changed and left over."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.models.assembly import (
    assemble,
    check_vocabulary,
    file_names,
    fill,
    image_tower,
    read_tokenizer,
    resized,
    size_notes,
    stretched,
    temperature,
    text_tower,
)
from cnclip_ft.models.checkpoints import INFO, open_checkpoint, read_checkpoint
from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer
from cnclip_ft.models.doubt import doubt
from cnclip_ft.models.dual_encoder import LOGIT_SCALE_LIMIT, DualEncoder
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.models.families.imported import ImportedTower
from cnclip_ft.models.formats.bert import TextHalf, has_text_half, read_text_half
from cnclip_ft.models.formats.encoder_folders import read_encoder_half
from cnclip_ft.models.formats.folders import is_whole
from cnclip_ft.models.formats.image_half import check_activation, has_image_half, read_image_half
from cnclip_ft.models.halves import own_half, text_half_of_whole
from cnclip_ft.models.hub import find
from cnclip_ft.models.registry import UNNAMED, family_of, image_kinds, text_kinds
from cnclip_ft.models.schema import MOST_PIXELS
from data_tools.errors import RequestError
from data_tools.words import Said, labelled

PROJECTION = 512  # where nothing says otherwise
_IMAGE_TOWER = Said("image tower", "图像塔")


# What a description may say of a tower: what is trained has to be written, and read again.
BOUNDS = {"context_length": (3, 1 << 16), "image_size": (8, MOST_PIXELS), "max_patches": (1, 1 << 14)}


@dataclass
class LoadReport:
    """`loaded`: (part, where from); `new`: parts with fresh weights, as module paths; `changed`: what was adapted, in
    words; `left_over`: tensors not used; `about`: how the model takes texts and pictures."""

    loaded: list[tuple[str, str]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    about: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines: list[str] = [
            _line("loaded", "载入", Said("{part} from {where}", "{part}，来自 {where}", part=part, where=where))
            for part, where in self.loaded
        ]
        lines += [_line("new", "新建", Said("{part} (random)", "{part}（随机）", part=part)) for part in self.new]
        lines += [_line("changed", "调整", what) for what in self.changed]
        if self.left_over:
            names = ", ".join(self.left_over[:4]) + (", …" if len(self.left_over) > 4 else "")
            unused = Said(
                "{count} tensors not used: {names}",
                "{count} 个张量未使用：{names}",
                count=len(self.left_over),
                names=names,
            )
            lines.append(_line("left", "剩余", unused))
        return lines + self.about


def _line(label: str, label_zh: str, said: str) -> Said:
    return labelled(Said(label, label_zh), 9, said)


def build_start(
    spec: str | dict[str, Any],
    *,
    context_length: int | None = None,
    image_size: int | None = None,
    max_patches: int | None = None,
    source: str = "huggingface",
    seed: int = 0,
    trust_import: bool = False,
) -> tuple[DualEncoder, LoadReport]:
    """A model as `model.start` of a recipe describes it, in training mode.

    Args:
        spec: a published name or a path; or ``{architecture: NAME}`` for random weights; or ``{image: …, text: …,
            projection: …, pooling: …, logit_scale: …}`` where image is a CLIP folder or file, an import path,
            ``{path: …, activation: …}`` or ``{kind: vit|resnet, …}`` and text is a BERT folder or file, the folder of any text
            encoder of transformers, or ``{hidden: …, layers: …, heads: …}``.
        context_length: longest text in tokens; None keeps the start's own (52 where it has none).
        image_size: another resolution in pixels; pretrained position embeddings are resized once.
        max_patches: another budget for a tower that takes pictures in their own shape (NaFlex).
        source: where published names come from: ``huggingface`` or ``modelscope``.
        seed: of everything newly made.
        trust_import: as for `load`, where a checkpoint is named. An import path in `spec` itself is the user's own word.

    Raises:
        RequestError: something named is not there, does not fit, or is not known.
    """
    _check_bounds(context_length=context_length, image_size=image_size, max_patches=max_patches)
    torch.manual_seed(seed)
    if isinstance(spec, (str, Path)):
        model, report = _whole(spec, context_length, image_size, source, trust_import)
    elif "architecture" in spec:
        model, report = _random(spec, context_length, image_size)
    else:
        model, report = _from_towers(spec, context_length, image_size, source, trust_import)
    if max_patches is not None:
        model.image_tower.set_budget(max_patches)
    report.about = _about(model)
    return model, report


def _about(model: DualEncoder) -> list[str]:
    """How it takes texts and pictures: what differs between families, and is easily overlooked."""
    tokenizer = model.tokenizer
    padded = Said("the longest of a batch", "补齐到批内最长")
    if tokenizer.padding != "longest":
        padded = Said("that length, padding attended to", "补齐到该长度，会注意到填充")
    texts = Said(
        "{kind}: at most {length} tokens of {vocabulary}, padded to {padded}",
        "{kind}：最多 {length} token，词表 {vocabulary}，{padded}",
        kind=type(model.text_tower).kind,
        length=tokenizer.context_length,
        vocabulary=tokenizer.name,
        padded=padded,
    )
    pictures = Said(
        "{kind}: {how}",
        "{kind}：{how}",
        kind=type(model.image_tower).kind,
        how=model.image_tower.preprocessing.in_words,
    )
    loss = Said("softmax (contrastive)", "softmax（对比损失）")
    if model.logit_bias is not None:
        loss = Said("sigmoid, with its own temperature and bias", "sigmoid，用自己的温度与偏置")
    family = family_of(model.text_tower)
    name: str = family.name_of(model)
    if type(model.image_tower).kind not in family.own_pictures:
        name = Said("texts of {family}, pictures of another", "文本为 {family}，图片来自别的系列", family=family.name)
    about: list[str] = [
        _line("family", "系列", name),
        _line("texts", "文本", texts),
        _line("pictures", "图片", pictures),
        _line("loss", "损失", loss),
    ]
    said = doubt(tokenizer, model.text_tower.vocab_size)
    if said is not None:
        about.append(_line("note", "提示", said))
    return about


def _whole(
    spec: str | Path, context_length: int | None, image_size: int | None, source: str, trust_import: bool
) -> tuple[DualEncoder, LoadReport]:
    checkpoint = open_checkpoint(spec, image_size=image_size, source=source, trust_import=trust_import)
    text, notes = stretched(checkpoint.description["text"], checkpoint.tensors, context_length)
    checkpoint.description = checkpoint.description | {"text": text}
    checkpoint.text_notes += notes
    model = assemble(checkpoint)
    if context_length is not None:
        if model.tokenizer.padding == "max_length" and context_length < model.context_length:
            checkpoint.text_notes.append(
                Said(
                    "texts are filled up to {given} tokens, not {own}, and padding is attended to: features are others than the "
                    "author's. If that is not meant: data.context_length=null",
                    "文本补齐到 {given} token 而非 {own}，且会注意到填充：特征与作者的不同。若非本意，请设 data.context_length=null",
                    given=context_length,
                    own=model.context_length,
                )
            )
        model.tokenizer = model.tokenizer.with_context_length(context_length)
        check_vocabulary(model.tokenizer, model.text_tower, checkpoint.source)
    biased = model.logit_bias is not None
    part = Said("both towers and temperature", "两塔与温度")
    if biased:
        part = Said("both towers, temperature and bias", "两塔、温度与偏置")
    return model.train(), LoadReport(
        loaded=[(part, checkpoint.source)], changed=checkpoint.all_notes, left_over=checkpoint.left_over
    )


def _random(spec: dict[str, Any], context_length: int | None, image_size: int | None) -> tuple[DualEncoder, LoadReport]:
    _refuse_unknown(spec, {"architecture"}, "model.start")
    architecture = ARCHITECTURES.get(spec["architecture"])
    if architecture is None:
        raise RequestError(
            f"model.start.architecture: {spec['architecture']!r} is not known; known: {', '.join(ARCHITECTURES)}"
        )
    image_numbers, text_numbers = architecture.towers()
    image = _new_image(image_numbers, architecture.projection, image_size)
    text = _new_text(text_numbers, architecture.projection)
    same_size = image_size in (None, architecture.image.image_size)
    tokenizer = text.tokenizer(context_length)
    check_vocabulary(tokenizer, text, "model.start")
    model = DualEncoder(image, text, tokenizer, architecture if same_size else None)
    return model, LoadReport(new=["image_tower", "text_tower", "logit_scale"])


def _from_towers(
    spec: dict[str, Any], context_length: int | None, image_size: int | None, source: str, trust_import: bool
) -> tuple[DualEncoder, LoadReport]:
    _refuse_unknown(spec, {"image", "text", "projection", "pooling", "logit_scale"}, "model.start")
    for side in ("image", "text"):
        if side not in spec:
            raise RequestError(f"model.start needs both image and text (or a name or path); {side} is missing")
    report = LoadReport()
    image, logit_scale = _image_tower(spec["image"], spec.get("projection"), image_size, source, report, trust_import)
    text, tokenizer = _text_tower(spec["text"], image.output_dim, spec.get("pooling"), context_length, source, report)
    check_vocabulary(tokenizer, text, "model.start.text")
    model = DualEncoder(image, text, tokenizer, None)
    if "logit_scale" in spec:
        logit_scale = spec["logit_scale"]
        if not isinstance(logit_scale, (int, float)) or not 0 <= logit_scale <= LOGIT_SCALE_LIMIT:
            raise RequestError(
                f"model.start.logit_scale is {logit_scale!r}; it is a logarithm between 0 and {LOGIT_SCALE_LIMIT:.3f} (ln 100)"
            )
        report.changed.append(
            Said(
                "logit_scale set to {scale:g} (temperature 1/{times:.1f})",
                "logit_scale 设为 {scale:g}（温度 1/{times:.1f}）",
                scale=logit_scale,
                times=math.exp(logit_scale),
            )
        )
    elif logit_scale is None:
        report.new.append("logit_scale")
    elif logit_scale > LOGIT_SCALE_LIMIT:
        report.changed.append(
            Said(
                "logit_scale {found:.4g} → {limit:.4g} (ln 100), the most a softmax trains with; the image tower's model had a sigmoid, "
                "with a temperature of its own",
                "logit_scale {found:.4g} → {limit:.4g}（ln 100），softmax 训练的上限；该图像塔的模型用 sigmoid，温度不受此限",
                found=logit_scale,
                limit=LOGIT_SCALE_LIMIT,
            )
        )
        logit_scale = LOGIT_SCALE_LIMIT
    if logit_scale is not None:
        model.logit_scale.data.fill_(logit_scale)
    return model, report


# ---- image ----------------------------------------------------------------------------------------------------------


def _new_image(spec: dict[str, Any], projection: int, image_size: int | None) -> ImageTower:
    kinds = {name: kind for name, kind in image_kinds().items() if kind.can_be_new}
    if spec.get("kind") not in kinds:
        raise RequestError(
            f"model.start.image.kind is {spec.get('kind')!r}; use {' or '.join(f'model.start.image.kind={kind}' for kind in kinds)} (or model.start.image=PATH)"
        )
    return kinds[spec["kind"]].fresh(_without_kind(spec), projection, image_size)


def _without_kind(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "kind"}


def _image_tower(
    spec: Any, projection: int | None, image_size: int | None, source: str, report: LoadReport, trust_import: bool
) -> tuple[ImageTower, float | None]:
    if isinstance(spec, dict) and "path" not in spec:
        report.new.append("image_tower")
        tower = _new_image(spec, projection or PROJECTION, image_size)
        if projection not in (None, tower.output_dim):
            tower.replace_projection(projection)  # which refuses
        return tower, None
    activation = None
    if isinstance(spec, dict):
        _refuse_unknown(spec, {"path", "activation"}, "model.start.image")
        activation, spec = check_activation(spec.get("activation")), spec["path"]
    if not Path(str(spec)).expanduser().exists() and ":" in str(spec):
        tower = ImportedTower(str(spec), projection or PROJECTION, image_size)
        report.loaded.append((_IMAGE_TOWER, Said("{spec} (import path)", "{spec}（导入路径）", spec=spec)))
        report.new.append(f"image_tower.{tower.projection_name}")
        report.changed += size_notes(tower, tower.size_in({}))
        return tower, None
    path = find(spec, source)
    return _pretrained_image(path, activation, projection, image_size, report, trust_import)


def _pretrained_image(
    path: Path,
    activation: str | None,
    projection: int | None,
    image_size: int | None,
    report: LoadReport,
    trust_import: bool,
) -> tuple[ImageTower, float | None]:
    if (path / INFO).is_file() or (is_whole(path) and not has_image_half(path)):
        checkpoint = read_checkpoint(path)
        numbers, dim, where = checkpoint.description["image"], checkpoint.description["projection"], checkpoint.source
        scale: float | None = temperature(checkpoint.tensors, checkpoint.source)
        notes = [*checkpoint.notes, *checkpoint.image_notes]
        tensors, left_over = own_half(checkpoint, image_kinds()[numbers["kind"]], "image_tower.")
    else:
        half = read_image_half(path, activation)
        numbers, dim, where, tensors, scale = half.numbers, half.projection, half.source, half.tensors, half.logit_scale
        left_over, notes = half.left_over, half.notes
    before = numbers
    if image_size is not None:
        numbers, said = resized(numbers, tensors, image_size)
        notes = notes + said
    tower = image_tower(numbers, dim, source=where, trust_import=trust_import)
    notes = notes + size_notes(tower, tower.size_in(before))
    fill(tower, tensors, where)
    report.loaded.append((Said("image tower and visual projection", "图像塔与视觉投影"), where))
    if scale is not None:
        report.loaded.append((Said("temperature", "温度"), where))
    report.left_over += left_over
    report.changed += notes
    if projection not in (None, dim):
        tower.replace_projection(projection)
        report.loaded[-1 if scale is None else -2] = (_IMAGE_TOWER, where)
        report.new.append(f"image_tower.{tower.projection_name}")
        report.changed.append(
            Said(
                "the visual projection to {old} was replaced by a new one to {new}",
                "到 {old} 维的视觉投影换成了到 {new} 维的新投影",
                old=dim,
                new=projection,
            )
        )
    return tower, scale


# ---- text -----------------------------------------------------------------------------------------------------------


def _new_text(spec: dict[str, Any], projection: int) -> TextTower:
    kinds = {name: kind for name, kind in text_kinds().items() if kind.can_be_new}
    name = spec.get("kind", UNNAMED["text"])
    if name not in kinds:
        raise RequestError(
            f"model.start.text.kind is {name!r}: {' or '.join(f'model.start.text.kind={kind}' for kind in kinds)} (or model.start.text=PATH)"
        )
    return kinds[name].fresh(_without_kind(spec), projection)


def _text_tower(
    spec: Any, projection: int, pooling: str | None, context_length: int | None, source: str, report: LoadReport
) -> tuple[TextTower, Tokenizer]:
    pooled = {} if pooling is None else {"pooling": pooling}
    if isinstance(spec, dict):
        report.new.append("text_tower")
        tower = _new_text(spec | pooled, projection)
        return tower, tower.tokenizer(context_length)
    path = find(spec, source)
    half = _text_half(path, pooling)
    numbers, longer = stretched(half.numbers, half.tensors, context_length)
    tower = text_tower(numbers, projection)
    tower.replace_projection(projection)
    names = file_names(tower)
    fresh = {names[name]: tensor for name, tensor in tower.state_dict().items() if tower.in_projection(name)}
    fill(tower, half.tensors | fresh, half.source)
    report.loaded.append((Said("text tower", "文本塔"), half.source))
    report.new.append(f"text_tower.{tower.projection_name}")
    report.changed += half.notes + longer
    report.left_over += half.left_over
    tokenizer = half.tokenizer
    if tokenizer is not None:
        return tower, tokenizer if context_length is None else tokenizer.with_context_length(context_length)
    length = tower.tokenizer(context_length).context_length
    return tower, read_tokenizer({"context_length": length}, half.vocabulary)


def _text_half(path: Path, pooling: str | None) -> TextHalf:
    """Of a whole model of any family, of BERT's kind, or an encoder of transformers."""
    bert = (path / "config.json").is_file() and has_text_half(path)  # a file or folder of CLIP has none
    if (path / INFO).is_file() or (is_whole(path) and not bert):
        return text_half_of_whole(path, pooling)
    return read_text_half(path, pooling) if has_text_half(path) else read_encoder_half(path, pooling)


def _check_bounds(**numbers: int | None) -> None:
    """For callers without a recipe, which is checked when it is read."""
    for key, value in numbers.items():
        least, most = BOUNDS[key]
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise RequestError(
                f"{key} is {repr(value)[:40]}, expected a whole number from {least} to {most:,}; leave it out to keep the start's own"
            )


def _refuse_unknown(spec: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in spec.keys() - known)
    if unknown:
        raise RequestError(f"{where}: unknown key {', '.join(unknown)}; known here: {', '.join(sorted(known))}")
