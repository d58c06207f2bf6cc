"""What a pair costs at 20,000 and at 2,000,000 pairs: a step of training, encoding, the best ten, `data check`; and the ratio.

    python benchmarks/scale_steps.py                                  all of it, some twenty minutes on one core
    python benchmarks/scale_steps.py --what one check --pairs 20000 200000

The stores are those of `scale.py`: one small JPEG under many ids, five captions a picture. The model is the tiny one, so that what is
measured is what we do about a pair rather than towers. Each size is a process of its own that is ready before the first measurement;
the two take turns, after one turn that does not count. Given are medians of seconds a unit and their ratio (target 1.1).

    one, two    20 steps of a batch of 256 from the middle of epoch 0: stage one with cached features, stage two with pictures
    images, texts    a share of the store as `encode` computes it: 2,560 pictures, 12,800 texts from its middle
    begin       what `encode` does about the whole store beside that: reading texts, its plan, the list of ids and texts
    topk        the ten best pictures of 500 texts, features of 64 values; seconds a score
    check       `data check` of the whole store, pictures decoded
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TARGET, BATCH, STEPS = 1.1, 256, 20
WHAT = ("one", "two", "images", "texts", "begin", "topk", "check")
Measurement = Callable[[], tuple[float, int]]  # seconds, units


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def steps(place: Path, cached: bool) -> Measurement:
    """A stage of a real run, stepped by hand; frozen features are drawn, which no step's time depends on."""
    import numpy as np
    import torch

    import cnclip_ft.features.frozen_trunk as frozen
    from cnclip_ft.recipe import Recipe
    from cnclip_ft.training.context import make_context
    from cnclip_ft.training.stage_plan import plan_stages
    from cnclip_ft.training.trainer import Trainer

    def drawn(cache: Any, *_: Any, **__: Any) -> bool:
        side = cache.model.image_size
        width = cache.model.image_trunk(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]
        cache._features = np.random.default_rng(0).standard_normal((1, cache.count, width), np.float32)
        return True

    frozen.FeatureCache.build = drawn  # type: ignore[method-assign, assignment] # as said above
    stage = {"train": "text" if cached else "both", "steps": 1_000_000, "batch_size": BATCH, "learning_rate": 1e-6}
    data = {
        "train": str(place / "train"),
        "valid": str(place / "valid"),
        "workers": 0,
        "table_cache": str(place / "cache"),
    }
    start = {"architecture": "tiny"}
    content = {"model": {"start": start}, "data": data, "stages": {"s": stage}, "output": str(place / "run")}
    context, model = make_context(Recipe.model_validate(content), write=False)
    trainer = Trainer(context, plan_stages(context, model)[0], model)
    trainer.step = trainer.plan.order.steps_per_epoch // 2
    batches = trainer.batches()

    def go() -> tuple[float, int]:
        return seconds(lambda: [trainer.take(next(batches)) for _ in range(STEPS)]), STEPS * BATCH

    return go


def encoding(place: Path, what: str) -> Measurement:
    from cnclip_ft.evaluation.encoding import read_for_good
    from cnclip_ft.features.encode import encode_texts, evaluating, iterate_images
    from cnclip_ft.features.folder import FeatureWriter, text_lines
    from cnclip_ft.features.sources import open_source
    from cnclip_ft.models.start import build_start

    model, _ = build_start({"architecture": "tiny"}, seed=0)
    source = open_source(place / "train")
    count = 12_800 if what == "texts" else 2560

    def go() -> tuple[float, int]:
        with evaluating(model), read_for_good():
            if what == "texts":
                middle = len(source.split.texts) // 2 - count // 2
                part = source.split.texts[middle : middle + count]
                return seconds(lambda: encode_texts(model, part, batch_size=BATCH)), len(part)
            middle = len(source.split.image_ids) // 2 - min(count, len(source.split.image_ids)) // 2
            ids = source.split.image_ids[middle : middle + count]
            return seconds(lambda: list(iterate_images(model, ids, source.read, batch_size=BATCH, workers=0))), len(ids)

    def begin() -> tuple[float, int]:
        with tempfile.TemporaryDirectory() as name:

            def work() -> None:
                split = open_source(place / "train").split
                FeatureWriter(Path(name) / "f", split, {}, dim=16, half=False)
                (Path(name) / "texts.jsonl").write_text("\n".join(text_lines(split)), encoding="utf-8")

            return seconds(work), len(source.split.texts)

    return begin if what == "begin" else go


def nearest(place: Path) -> Measurement:
    import torch

    from cnclip_ft.retrieval.recall import topk
    from data_tools.store import open_store

    draw = torch.Generator().manual_seed(0)
    pictures, texts = (
        torch.nn.functional.normalize(torch.randn(count, 64, generator=draw), dim=1)
        for count in (open_store(place / "train").image_count, 500)
    )
    # Of a small store so often that both take alike long.
    often = max(1, 400_000 // len(pictures) // 4)
    return lambda: (seconds(lambda: [topk(texts, pictures, 10) for _ in range(often)]), often * 500 * len(pictures))


def checking(place: Path) -> Measurement:
    from cnclip_ft.models.assembly import read_tokenizer
    from data_tools.check import judge, measure
    from data_tools.store import open_store

    lengths = read_tokenizer({"context_length": 52}, None).lengths

    def go() -> tuple[float, int]:
        store = open_store(place / "train")
        return seconds(lambda: judge([measure(store, lengths=lengths, context_length=52, workers=1)])), len(store)

    return go


def serve(what: str, place: Path) -> None:
    """In a process of its own: a line in, a measurement out."""
    import contextlib
    import os

    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        if what in ("one", "two"):
            go = steps(place, what == "one")
        else:
            go = nearest(place) if what == "topk" else checking(place) if what == "check" else encoding(place, what)
        print("ready", file=answers, flush=True)
        for _ in sys.stdin:
            took, units = go()
            print(took / units, file=answers, flush=True)


class Server:
    def __init__(self, what: str, place: Path) -> None:
        command = [sys.executable, __file__, "--serve", what, str(place)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("a measurement ended early; what it said stands above")
        return line

    def ask(self) -> float:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self.answer())

    def close(self) -> None:
        self.process.communicate()


def compare(what: str, places: list[Path], repeats: int) -> list[float]:
    """Medians of seconds a unit, one a place."""
    servers = [Server(what, place) for place in places]
    if what not in ("begin", "check"):  # those go over everything: what is set up once is little of it
        for server in servers:
            server.ask()
    found = [[server.ask() for server in servers] for _ in range(repeats)]
    for server in servers:
        server.close()
    return [statistics.median(column) for column in zip(*found, strict=True)]


def main() -> None:
    from scale import draw

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs=2, default=[20_000, 2_000_000])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--repeats", type=int, default=7, help="of `check`, which goes over everything: 1")
    parser.add_argument("--folder", type=Path, help="where stores are drawn and kept; else a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[0], Path(given.serve[1]))
        return
    from retrieval import processor

    folder = given.folder or Path(tempfile.mkdtemp())
    found: dict[str, Any] = {"processor": processor(), "pairs": given.pairs, "seconds": {}}
    try:
        places = [folder / f"steps-{pairs}" for pairs in given.pairs]
        for place, pairs in zip(places, given.pairs, strict=True):
            for name, count in (("train", pairs), ("valid", 500)):
                if not (place / name).exists():
                    draw(place / name, count)
        print(found["processor"])
        for what in given.what:
            repeats = 1 if what == "check" else min(given.repeats, 3) if what == "begin" else given.repeats
            one, other = found["seconds"][what] = compare(what, places, repeats)
            print(
                f"{what:7} {1e6 * one:12.6g} µs a unit at {given.pairs[0]:,} pairs, {1e6 * other:12.6g} at {given.pairs[1]:,}: "
                f"{other / one:.3f}× (target {TARGET})",
                flush=True,
            )
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
