"""The model card beside an export: README.md with the hub's metadata, recall, checksums, settings and how to load it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from cnclip_ft.evaluation.results.provenance import image_size_notes
from cnclip_ft.evaluation.results.recall_table import recall_table
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.hub import repositories
from cnclip_ft.models.registry import family_of
from cnclip_ft.retrieval.recall import RetrievalScores

CARD = "README.md"
_MARK = re.compile(r"<!-- cnclip-ft ([0-9a-f]{64}) -->\n")
_COLUMNS = [f"{short}_r{k}" for short in ("t2i", "i2t") for k in (1, 5, 10)] + ["mean_recall"]


def hub_metadata(
    model: DualEncoder,
    to: str,
    folder: Path,
    info: dict[str, Any],
    checkpoint: str,
    dtype: str,
    license_name: str | None,
) -> dict[str, Any]:
    """What the hub reads off a card (its "Model Cards" page), of an export in the format `to` that lies in `folder`.

    The languages are those of the training data's texts, and for weights nobody says this of those of Chinese CLIP alone.
    """
    family, recipe = family_of(model.text_tower), info.get("recipe") or {}
    kind = family.transformers_files(model)["config.json"].get("model_type")
    start = (recipe.get("model") or {}).get("start")
    base = info.get("base_models", repositories(start or checkpoint))  # checkpoints of versions before do not say it
    relation = "finetune" if recipe else "quantized" if dtype == "int8" else None
    library = {"huggingface": "transformers", "open_clip": "open_clip"}.get(to)
    if (folder / "onnx").is_dir():
        library = "transformers.js"
    tags = [kind if kind != "cnclip_ft" else None, "image-text-retrieval", "onnx" if to == "onnx" else None]
    return {
        "language": info.get("languages") or (["zh"] if family.templates == "zh" else None),
        "license": license_name,
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification",
        "base_model": base[0] if len(base) == 1 else base,
        "base_model_relation": relation if base else None,
        "tags": [tag for tag in tags if tag],
    }


def write_card(
    file: Path,
    name: str,
    to: str,
    info: dict[str, Any],
    *,
    metadata: dict[str, Any],
    dtype: str,
    difference: float,
    advice: str,
    recall: tuple[RetrievalScores, RetrievalScores] | None,
) -> None:
    """Write the card of an export in the format `to` at `file`; `info` is what the checkpoint knows of itself, `metadata` that of
    `hub_metadata`."""
    recipe = info.get("recipe") or {}
    head = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{head}---\n", f"# {name}\n"]
    stage = f", stage {info['stage']}, step {info.get('step')}" if "stage" in info else ""
    parts.append(
        f"Image and text features in one space, for search and classification. Exported by cnclip-ft as {to}, {dtype}{stage}; "
        f"unit features differ from the checkpoint's by {difference:.1e} at most."
        + "".join(f" They are of {note}." for note in image_size_notes(info))
        + ("" if metadata["license"] else " No licence was named.")
        + "\n"
    )
    parts.append(f"## Use\n\n{advice}\n")
    parts += _recall(info, recall)
    if info.get("data"):
        rows = "\n".join(f"| {split} | `{checksum}` |" for split, checksum in info["data"].items())
        parts.append(f"## Data\n\n| split | checksum |\n|---|---|\n{rows}\n")
    if info.get("start"):
        parts.append("## Weights it began with\n\n" + "\n".join(f"* {line}" for line in info["start"]) + "\n")
    if recipe:
        settings = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        parts.append(f"## Settings\n\n```yaml\n{settings}```\n")
    text = "\n".join(parts)
    mark = f"<!-- cnclip-ft {hashlib.sha256(text.encode()).hexdigest()} -->\n"
    file.write_text(text + mark, encoding="utf-8", newline="\n")


def _recall(info: dict[str, Any], recall: tuple[RetrievalScores, RetrievalScores] | None) -> list[str]:
    parts = []
    row = info.get("row")
    if row:
        heads = [f"{arrow} R@{k}" for arrow in ("text→image", "image→text") for k in (1, 5, 10)] + ["mean recall"]
        cells = ["–" if row.get(key) is None else f"{row[key]:.1f}" for key in _COLUMNS]
        parts.append(
            f"## Recall on its validation split{_own_size(info)}\n\n| {' | '.join(heads)} |\n|{'---:|' * len(heads)}\n| {' | '.join(cells)} |\n"
        )
    if recall is not None:
        table = recall_table({"checkpoint": recall[0], "export": recall[1]})
        parts.append(f"## Recall of checkpoint and export\n\n```\n{table}\n```\n")
    return parts


def _own_size(info: dict[str, Any]) -> str:
    """The checkpoint was judged at its own."""
    sides = info.get("image_size")
    return f" (pictures of {sides['own']} × {sides['own']})" if sides else ""


def card_of_file(export: Path) -> Path:
    """Where the card of an export lies that is a file: beside it, ``mine.pt`` has ``mine.md``."""
    return export.with_name(f"{export.name if export.suffix == '.md' else export.stem}.md")


def is_card(file: Path, of: str | None = None) -> bool:
    """Whether the file is a card that nobody has changed since; with `of` that of the export of this name."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, mark = text[: text.rfind("<!-- cnclip-ft ")], text[text.rfind("<!-- cnclip-ft ") :]
    found = _MARK.fullmatch(mark)
    whole = found is not None and found[1] == hashlib.sha256(body.encode()).hexdigest()
    return whole and (of is None or f"\n# {of}\n" in body)
