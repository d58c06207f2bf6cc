"""What a run spends beside its steps: validation over encoding, writing states, the journal.

    python benchmarks/run.py [validation] [state] [journal] [--repeats 5]

* validation: recall on 1,000 images × 5,000 texts against the encoding it needs anyway, with the demonstration recipe's
  model. A larger model encodes longer, so its share is smaller. Bound: 5 % over encoding.
* state: how long saving a ViT-B-16 state (weights and AdamW) stops training, against `torch.save` of the same tensors to
  the same disk. Bound: 1.5 times. Both copy or write 2.3 GB: a slow or full disk slows only the second.
* journal: its share of the step time of the tiny model, a line every 10 steps as by default. Bound: 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from cnclip_ft.recipe import Recipe  # noqa: E402
from cnclip_ft.recipe_files import load_recipe  # noqa: E402


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def validation(folder: Path, repeats: int) -> None:
    from cnclip_ft.evaluation.kinds.recall import Recall
    from cnclip_ft.features.encode import encode_split
    from cnclip_ft.models.start import build_start
    from cnclip_ft.training.validation import Judge
    from data_tools.scenes.writing import draw_demo
    from data_tools.store import open_store

    draw_demo(folder / "demo", train=8, valid=1000, overwrite=True, progress=False)
    store = open_store(folder / "demo" / "valid")
    recipe = load_recipe("demo", ["data.train=x", "data.valid=x"])
    model, _ = build_start(recipe.model.start)
    from contextlib import nullcontext

    judge = Judge({"valid": Recall(store)}, torch.device("cpu"), 0, nullcontext)
    judge(model)
    pairs = []
    for _ in range(repeats):
        alone = timed(lambda: encode_split(model, store))
        pairs.append((alone, judge(model).seconds))
    alone, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"validation, {len(store.image_ids):,} images × {len(store):,} texts, median of {repeats}")
    print(
        f"  encoding {alone:6.2f} s   encoding and recall {whole:6.2f} s   {100 * (whole / alone - 1):+.1f} % (bound 5)"
    )


def state(folder: Path, repeats: int) -> None:
    from cnclip_ft.models.start import build_start
    from cnclip_ft.training.run_state import StateWriter

    model, _ = build_start({"architecture": "ViT-B-16"})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    writer, rows = StateWriter(folder / "state"), []
    for number in range(repeats + 1):
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        stop = timed(lambda number=number, content=content: writer.save(number, content))
        writer.wait()
        plain = timed(lambda content=content: torch.save(content, folder / "plain.pt"))
        rows.append((stop, plain))
    stop, plain = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    size = (folder / "plain.pt").stat().st_size / 1e9
    print(f"state of ViT-B-16, {size:.1f} GB, median of {repeats}")
    print(f"  training stops {stop:6.2f} s   torch.save {plain:6.2f} s   {stop / plain:.2f}× (bound 1.5)")


def journal(folder: Path, repeats: int) -> None:
    from cnclip_ft.training.journal import Journal, Meter
    from cnclip_ft.training.run import train
    from tests.training.helpers import write_store

    write_store(folder / "train", images=200, captions=2, seed=0)
    write_store(folder / "valid", images=10, captions=2, seed=1)
    spent = [0.0]

    def counted(function):
        def wrapper(*arguments, **values):
            began = time.perf_counter()
            try:
                return function(*arguments, **values)
            finally:
                spent[0] += time.perf_counter() - began

        return wrapper

    for owner, names in ((Journal, ("write",)), (Meter, ("add", "summary", "pause"))):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    shares = []
    for number in range(repeats):
        stage = {
            "train": "both",
            "steps": 300,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "warmup_steps": 1,
            "validate_every": 1000,
        }
        recipe = Recipe.model_validate(
            {
                "model": {"start": {"architecture": "tiny"}},
                "stages": {"stage": stage},
                "output": str(folder / f"run{number}"),
                "data": {"train": str(folder / "train"), "valid": str(folder / "valid"), "workers": 0},
            }
        )
        began = []

        def first_step(trainer, began=began):
            if not began:
                trainer.context.journal.say = lambda text="": None  # the terminal is the reader's
                trainer.context.journal.write("warm", step=0, value=0.0)  # TensorBoard is imported here, once a run
                spent[0] = 0.0
                began.append(time.perf_counter())
            elif trainer.step == 299:  # before the validation of the last step
                shares.append((spent[0], time.perf_counter() - began[0]))

        train(recipe, before_step=first_step)
    spent_, whole = (statistics.median(column) for column in zip(*shares, strict=True))
    print(f"journal, tiny model, 300 steps, a line every 10, median of {repeats}")
    print(
        f"  step {1000 * whole / 300:.2f} ms, journal {1e6 * spent_ / 300:.0f} µs of it: {100 * spent_ / whole:.2f} % (bound 1)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="validation, state, journal; all of them where none is named")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    parts = ["validation", "state", "journal"]
    if unknown := set(given.what) - set(parts):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(parts)}")
    for what in given.what or parts:
        with tempfile.TemporaryDirectory() as name:
            globals()[what](Path(name), given.repeats)


if __name__ == "__main__":
    main()
