"""Encoders as they are deployed: eager PyTorch, torch.compile, ONNX Runtime float32 and int8, with the same threads.

    python benchmarks/deploy.py                              ViT-B-16, random weights: one item, and batches of 32
    python benchmarks/deploy.py --size RN50 --no-compile     another published size
    python benchmarks/deploy.py --only-recall --checkpoint C --split S [--checkpoint …]      what int8 costs in recall

All graphs come from `cnclip_ft.export.onnx`. Medians of interleaved repeats and ratios to eager PyTorch; a text has
``--tokens`` tokens. Needs ``pip install 'cnclip-ft[onnx]'``. Figures mean something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402


def encoders(size: str, folder: Path, compiled: bool) -> tuple[dict[str, dict[str, Callable]], int]:
    """Side → name → function from input to features; and the side of the pictures in pixels."""
    from cnclip_ft.export import onnx
    from cnclip_ft.export.onnx_encoder import OnnxEncoder
    from cnclip_ft.export.settings import ExportSettings
    from cnclip_ft.models.start import build_start

    model = build_start({"architecture": size})[0].eval()
    image, text = model.image_features, lambda ids: model.text_features(ids, torch.ones_like(ids))
    sides = {"image": {"eager PyTorch": image}, "text": {"eager PyTorch": text}}
    if compiled:
        sides["image"]["torch.compile"] = torch.compile(image, dynamic=False)
        sides["text"]["torch.compile"] = torch.compile(text, dynamic=False)
    for dtype in ("float32", "int8"):
        onnx.write(model, folder / dtype, ExportSettings({"exported_from": size}, dtype))
        runtime = OnnxEncoder(folder / dtype)
        sides["image"][f"ONNX Runtime {dtype}"] = runtime.image_features
        sides["text"][f"ONNX Runtime {dtype}"] = lambda ids, runtime=runtime: runtime.text_features(ids, ids)
    return sides, model.image_size


def measure(ways: dict[str, Callable], values: torch.Tensor, repeats: int) -> dict[str, float]:
    """Name → median seconds; every repeat walks all ways, so that a busy moment meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for way in ways.values():
            way(values)  # compilation and the first allocation
        for _ in range(repeats):
            for name, way in ways.items():
                began = time.perf_counter()
                way(values)
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def speed(size: str, wanted: list[str], tokens: int, repeats: int, compiled: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        sides, side = encoders(size, Path(name), compiled)
        generator = torch.Generator().manual_seed(0)
        for which in wanted:
            ways = sides[which]
            for batch in (1, 32):
                if which == "image":
                    values = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
                else:
                    values = torch.randint(1000, 9000, (batch, tokens), generator=generator)
                found = measure(ways, values, repeats if batch == 1 else max(3, repeats // 4))
                eager, full = found["eager PyTorch"], found["ONNX Runtime float32"]
                print(f"\n{size}, {which} encoder, batch {batch}, {torch.get_num_threads()} thread(s)")
                for way, seconds in found.items():
                    print(
                        f"  {way:22} {1000 * seconds:9.1f} ms {batch / seconds:9.1f} a second   "
                        f"{eager / seconds:5.2f} × eager   {full / seconds:5.2f} × float32",
                        flush=True,
                    )


def recall_lost(checkpoint: str, split: str) -> None:
    from cnclip_ft.export.run import export_checkpoint, points_lost

    with tempfile.TemporaryDirectory() as name:
        before, after = export_checkpoint(checkpoint, "onnx", Path(name) / "int8", dtype="int8", verify=split).recall
    print(f"{checkpoint} on {split}: mean recall {before.mean_recall:.2f} → int8 {after.mean_recall:.2f}")
    print(f"  points lost: {points_lost(before, after)} (target: at most 0.5)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="ViT-B-16")
    parser.add_argument("--sides", nargs="+", choices=["image", "text"], default=["image", "text"])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only-recall", action="store_true")
    parser.add_argument("--checkpoint", action="append", default=[])
    parser.add_argument("--split", action="append", default=[])
    options = parser.parse_args()
    if len(options.checkpoint) != len(options.split):
        parser.error("name one --split for every --checkpoint")
    torch.set_num_threads(options.threads)
    if not options.only_recall:
        speed(options.size, options.sides, options.tokens, options.repeats, not options.no_compile)
    for checkpoint, split in zip(options.checkpoint, options.split, strict=True):
        recall_lost(checkpoint, split)


if __name__ == "__main__":
    main()
