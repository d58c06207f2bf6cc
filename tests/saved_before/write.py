"""Writes what stands beside this file: one of everything a user keeps, and the numbers it gave (`expected.json`).

Run with the code of the version whose files these are (0.1.0, before its modules were reorganised)::

    PYTHONPATH=. python tests/saved_before/write.py EMPTY_FOLDER

When to run it again: never. These files stand for those that lie on users' disks, and what a later version writes is no
proof that it reads them. Only when a format is added that nothing here stands for: then for that format alone, with the
version that brings it, into a folder of its own. So it writes into an empty folder only and replaces nothing.

It reaches into modules of that version (to stop a run at a certain step, for one); the tests that read do not.
All numbers come from seeds. What a run, a build or a clock draws (tokens, times) differs from one writing to the next.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
platform.platform = lambda *_, **__: "Linux"  # written into files; which machine it was is of no use there

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import cnclip_ft  # noqa: E402
from cnclip_ft.cli import app  # noqa: E402
from cnclip_ft.evaluation import encode_run  # noqa: E402
from cnclip_ft.models.checkpoints import save_checkpoint  # noqa: E402
from cnclip_ft.models.start import build_start  # noqa: E402
from cnclip_ft.training.stage import StageRun  # noqa: E402
from data_tools.scenes import captions, draw, sample_scenes  # noqa: E402
from data_tools.store import StoreWriter, open_store  # noqa: E402

HERE = Path(__file__).resolve().parent
LONE = [(9001, "一张没有人拍过的照片", "zh"), ("lone", "a picture nobody took", "en")]
TEXTS = ["红色的圆在左边", "two blue stars on a green lawn", "“黑夜”里的月亮"]
QUESTIONS = ["三颗黄色的星", "a red square"]
CHANGED = 1_700_000_000  # when the photos were last changed: an index knows them by size and time
# No dropout: what it draws depends on torch's build, and the losses are to be compared elsewhere too.
VIT = {"kind": "vit", "hidden": 8, "layers": 2, "heads": 2, "patch": 8, "image_size": 16, "intermediate": 16}
RESNET = {"kind": "resnet", "layers": [1, 1], "width": 4, "heads": 2, "image_size": 16}
STAGE = {"steps": 6, "batch_size": 6, "learning_rate": 5e-3, "warmup_steps": 2, "validate_every": 2}
ALIGN = STAGE | {"train": "text"}
CONTRAST = STAGE | {"train": "both", "augment": {"crop": 0.8, "colour": 0.2}, "gradient_clip": 1.0}
TOWERS = {"image": VIT, "text": "start/bert", "projection": 8}
# name: (model.start, stages, stage and step it is stopped behind, further settings)
RUNS = {
    "first_stage": ("checkpoints/vit", {"align": ALIGN, "contrast": CONTRAST}, ("align", 3), {}),
    "second_stage": ("checkpoints/vit", {"align": ALIGN, "contrast": CONTRAST}, ("contrast", 3), {}),
    "sigmoid": (TOWERS, {"contrast": CONTRAST | {"objective": {"kind": "sigmoid"}}}, ("contrast", 3), {}),
    "low_rank": (
        "checkpoints/vit",
        {
            "tune": STAGE
            | {
                "train": [{"tower": "image", "lora": {"rank": 2}}, {"tower": "text"}, {"tower": "temperature"}],
                "ema": 0.9,
                "interpolate": 2,
                "until": "plateau",
                "patience": 9,
            }
        },
        ("tune", 3),
        {"guard": {"split": "stores/official", "max_drop": 90.0}},
    ),
}


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code in (0, 130), done.output
    return done.output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def png(scene, size: int) -> bytes:
    file = io.BytesIO()
    draw(scene, size).save(file, "PNG")
    return file.getvalue()


# ---- stores ---------------------------------------------------------------------------------------------------------


def write_stores(folder: Path) -> None:
    """train and valid in our layout, official in cn_clip's; pictures as large as the towers take them, so that nothing
    depends on how a library resizes."""
    train, valid = sample_scenes(12), sample_scenes(12, held_out=True)
    for name, scenes, layout in (("train", train, "plain"), ("valid", valid, "plain"), ("official", valid, "official")):
        word = (lambda number: f"雪/{number}.png") if name == "official" else (lambda number: 100 + number)
        ids = [word(number) for number in range(len(scenes))]
        if name == "valid":
            ids[3] = "雪地/三.png"
        with StoreWriter(folder / name, layout=layout) as writer:
            for image_id, scene in zip(ids, scenes, strict=True):
                writer.add_image(image_id, png(scene, 16))
            for number, scene in enumerate(scenes):
                for which, (language, text) in enumerate(captions(scene, ("zh", "en"))):
                    writer.add_text(2 * number + which, text, [ids[number]], language)
            if name == "valid":  # one text on two pictures
                writer.add_text("two", "两张照片", [ids[0], ids[5]], "zh")
            for text_id, text, language in LONE if name != "train" else ():
                writer.add_lone_text(text_id, text, language)
            writer.finish()


def told_by(path: Path) -> dict:
    import hashlib

    store = open_store(path)
    return {
        "pairs": [[pair.image_id, pair.text_id, pair.text, pair.language] for pair in store.pairs()],
        "lone": [list(lone) for lone in store.lone_texts],
        "pictures": [[image_id, hashlib.sha256(store.image(image_id)).hexdigest()] for image_id in store.image_ids],
        "checksum": store.checksum(),
    }


def write_photos(folder: Path) -> None:
    for number, scene in enumerate(sample_scenes(12, held_out=True)):
        path = folder / ("雪 地" if number % 2 else "dogs") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(scene, 16))
        os.utime(path, (CHANGED, CHANGED))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def write_bert(folder: Path) -> None:
    """A BERT folder with a vocabulary of its own, of the words of the stores: small, and what a text start may be."""
    from cnclip_ft.data.texts import SPECIAL_TOKENS
    from transformers import BertConfig, BertModel

    texts = [
        pair.text for name in ("train", "valid") for pair in open_store(folder.parent.parent / "stores" / name).pairs()
    ]
    texts += TEXTS + QUESTIONS + [text for _, text, _ in LONE]
    words = {word for text in texts for word in text.lower().split() if word.isascii()}
    marks = {mark for text in texts for mark in text.lower() if not mark.isspace()}
    tokens = [*SPECIAL_TOKENS, *sorted({word.strip(".,") for word in words} | marks)]
    # A plan of this version tries the model with token 1000. Nothing is learnt of these; zeros take no room when packed.
    unused = range(len(tokens), 1008)
    tokens += [f"[unused{number}]" for number in unused]
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(7)
    folder.mkdir(parents=True)
    model = BertModel(config, add_pooling_layer=False)
    tensors = {
        name: torch.randn(tensor.shape) * 0.3 + ("LayerNorm.weight" in name)
        for name, tensor in model.named_parameters()
    }
    tensors["embeddings.word_embeddings.weight"][unused.start :] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def write_checkpoints(folder: Path) -> None:
    for number, (name, spec) in enumerate(
        {"vit": TOWERS, "resnet": {"image": RESNET, "text": "start/bert", "projection": 8, "pooling": "mean"}}.items()
    ):
        model = build_start(spec, context_length=30, seed=number + 1)[0]
        save_checkpoint(model, folder / name, info={"stage": "contrast", "step": 7})
    # Another mean and deviation than OpenAI's, as a folder of transformers may say; kept in half precision.
    other = Path("other")
    shutil.copytree(folder / "vit", other)
    (other / "cnclip_ft.json").unlink()
    rules = json.loads((other / "preprocessor_config.json").read_text(encoding="utf-8"))
    rules |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.125]}
    (other / "preprocessor_config.json").write_text(json.dumps(rules), encoding="utf-8")
    model = cnclip_ft.load(other, dtype=torch.float16)
    save_checkpoint(model, folder / "other_mean_half", info={"stage": "contrast", "step": 9})
    shutil.rmtree(other)
    command("export", folder / "vit", "--to", "huggingface", "--output", folder / "exported_huggingface")


def features_of(checkpoint: Path) -> dict:
    model, store = cnclip_ft.load(checkpoint), open_store("stores/valid")
    pictures = [store.image(image_id) for image_id in store.image_ids[:2]]
    return {
        "context_length": model.context_length,
        "texts": model.encode_texts(TEXTS).tolist(),
        "images": model.encode_images(pictures).tolist(),
    }


# ---- runs -----------------------------------------------------------------------------------------------------------


def begin(name: str, stop: tuple[str, int] | None, output: str) -> None:
    start, stages, _, more = RUNS[name]
    recipe = {
        "model": {"start": start},
        "data": {"train": "stores/train", "valid": "stores/valid", "workers": 0, "context_length": 30, **more},
        "stages": stages, "output": output, "feature_cache": "feature_cache", "log_every": 1, "seed": 3,
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    original = StageRun._one_step

    def stopping(self, batch):
        out = original(self, batch)
        if (self.name, self.step + 1) == stop:
            self.run.stop._asked = True
        return out

    StageRun._one_step = stopping
    try:
        command("train", "recipe.yaml")
    finally:
        StageRun._one_step = original
        Path("recipe.yaml").unlink()


def told_by_run(folder: Path) -> dict:
    """Losses as the journal has them, every digit, and the recall at the end."""
    journal = [line for line in lines(folder / "journal.jsonl") if line["kind"] in ("train", "continue")]
    at = max((n for n, line in enumerate(journal) if line["kind"] == "continue"), default=-1) + 1
    return {
        "losses": [[line["stage"], line["step"], line["loss"]] for line in journal[at:]],
        "recall": json.loads((folder / "report/recall.json").read_text(encoding="utf-8")),
    }


def pack(folder: Path) -> None:
    """A run folder becomes ``<run>.tar.xz``: most of it is the same weights again and again."""
    with tarfile.open(folder.with_suffix(".tar.xz"), "w:xz", preset=9) as file:
        for path in sorted(folder.rglob("*")):
            about = file.gettarinfo(path, str(path.relative_to(folder.parent)))
            about.uid = about.gid = about.mtime = 0
            about.uname = about.gname = ""
            with open(path, "rb") if path.is_file() else nullcontext() as content:
                file.addfile(about, content)
    shutil.rmtree(folder)


def write_runs() -> dict:
    expected = {}
    for name, (_, _, stop, _) in RUNS.items():
        place = Path("runs") / name
        begin(name, stop, str(place))
        shutil.rmtree(place / "tensorboard")  # nothing reads it again, and the names in it are those of a machine
        shutil.copytree(place, "continued")
        command("train", "continued/recipe.yaml", "--continue")
        begin(name, None, "whole")
        expected[name], whole = told_by_run(Path("continued")), told_by_run(Path("whole"))
        assert whole["losses"][-len(expected[name]["losses"]) :] == expected[name]["losses"]
        assert whole["recall"] == expected[name]["recall"]
        shutil.rmtree("continued")
        shutil.rmtree("whole")
        pack(place)
    return expected


# ---- features, indexes, and the files of the other commands ----------------------------------------------------------


def write_features() -> None:
    for name in ("vit", "resnet"):
        more = ["--format", "jsonl"] if name == "vit" else ["--half"]
        command("encode", f"checkpoints/{name}", "stores/valid", "--output", f"features/{name}", *more)
    original = encode_run.encode_texts

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    encode_run.encode_texts = interrupted
    try:
        with suppress(KeyboardInterrupt):
            command("encode", "checkpoints/vit", "stores/valid", "--output", "features/begun")
    finally:
        encode_run.encode_texts = original


def write_indexes() -> dict:
    command("search", "index", "checkpoints/vit", "photos", "--output", "indexes/exact")
    command(
        "search",
        "index",
        "checkpoints/vit",
        "stores/valid",
        "--output",
        "indexes/approximate",
        "--half",
        "--approximate",
        "hnsw",
    )
    expected = {}
    for index in ("exact", "approximate"):
        Path("indexes", index, "lock").unlink()  # worth nothing after the process that held it, and names the machine
        for question in QUESTIONS:
            said = command("search", "query", f"indexes/{index}", question, "--json", "--top", 5)
            found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            expected.setdefault(index, {})[question] = [[line["id"], line["score"]] for line in found]
    return expected


def write_results() -> dict:
    Path("results").mkdir()
    command("calibrate", "checkpoints/vit", "stores/valid", "--recall", 0.5, "--json", "results/calibration.json")
    command("topk", "features/vit", "features/vit", "--output", "results/predictions.jsonl")
    answers = [line for line in lines(Path("features/vit/texts.jsonl")) if line["image_ids"]]
    with open("results/valid_texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
    command("evaluate", "results/predictions.jsonl", "results/valid_texts.jsonl", "--json", "results/score.json")
    command("evaluate", "checkpoints/vit", "stores/valid", "--json", "vit.json")
    command("evaluate", "features/resnet", "--json", "resnet.json")
    command("compare", "features/vit", "features/resnet", "--draws", 100, "--json", "compared.json")
    said = command(
        "search",
        "query",
        "indexes/exact",
        QUESTIONS[0],
        "--json",
        "--top",
        12,
        "--threshold",
        "results/calibration.json",
    )
    expected = {
        "recall": {name: recall_in(Path(f"{name}.json")) for name in ("vit", "resnet")},
        "compared": json.loads(Path("compared.json").read_text(encoding="utf-8"))["results"],
        "above_threshold": [json.loads(line)["id"] for line in said.splitlines() if line.startswith("{")],
    }
    assert 0 < len(expected["above_threshold"]) < 12
    for name in ("vit.json", "resnet.json", "compared.json"):
        Path(name).unlink()
    return expected


def recall_in(path: Path) -> dict:
    scores = json.loads(path.read_text(encoding="utf-8"))["splits"]["valid"]
    return {name: scores[name] for name in ("mean_recall", "text_to_image", "image_to_text", "by_language")}


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    assert not target.exists() or not any(target.iterdir()), f"{target} is not empty, and what is there stays"
    # A plain place: paths are written into some files.
    place = Path(tempfile.gettempdir()) / "saved"
    place.mkdir()
    os.chdir(place)
    try:
        write_stores(Path("stores"))
        write_photos(Path("photos"))
        write_bert(Path("start/bert").resolve())
        write_checkpoints(Path("checkpoints"))
        expected = {
            "texts": TEXTS,
            "changed": CHANGED,
            "stores": {name: told_by(Path("stores") / name) for name in ("train", "valid", "official")},
            "checkpoints": {path.name: features_of(path) for path in sorted(Path("checkpoints").iterdir())},
            "runs": write_runs(),
        }
        write_features()
        expected["search"] = write_indexes()
        expected |= write_results()
        Path("expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        shutil.copytree(place, target, dirs_exist_ok=True)
    finally:
        os.chdir(HERE)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
