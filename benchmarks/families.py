"""Other families beside their own libraries: the training step of CLIP and SigLIP, and loading of every family.

    python benchmarks/families.py two  [--family clip --batch 32]    stage two, both towers
    python benchmarks/families.py one  [--family clip --batch 32]    stage one, image tower frozen, features cached
    python benchmarks/families.py load [--only clip siglip …]        `load` beside `AutoModel.from_pretrained`
    python benchmarks/families.py cpu                                all of it

Three sides take turns over the same weights and captions, after two steps that do not count: ours is the stage itself with its
loader, ids, clipping and checks; open_clip's is what its `train_one_epoch` does with a batch that is ready (its model, its loss,
AdamW, clamp; the image tower locked as `--lock-image` does); the third is `Trainer.training_step` of transformers on the library's
model with a batch that is ready, padded to the model's length as its contrastive example does. Given are medians and their ratio.
CLIP is ViT-B-32 on English captions as long as Flickr8k's, SigLIP is B/16 at 224. Weights are random.

`load` is timed in fresh processes, imports included, as a script that starts and loads; the two take turns over a folder that
transformers wrote, at published width (MetaCLIP 2, AltCLIP and the dual encoder with two layers). The embeddings have as many rows as a
published vocabulary; the tokenizer's file is of that size too but for SigLIP and SigLIP 2, which have a small one.

Bounds: CLIP two ≥ 1.15, one ≥ 6; SigLIP two ≥ 1.0, one ≥ 5; load ≤ 1.3.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.official import Official, Side  # noqa: E402
from benchmarks.step import OurStage, pictures_of_noise, write_store  # noqa: E402
from tests.official import FOLDER  # noqa: E402

OPEN_CLIP_STEP = """
import json, time, open_clip
folder, frozen, threads, batch = sys.argv[1], sys.argv[2] == "one", int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.train()
if frozen:
    model.lock_image_tower()
loss_function = open_clip.loss.SigLipLoss() if model.logit_bias is not None else open_clip.ClipLoss()
exclude = lambda n, p: p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(
    [{"params": [p for n, p in named if exclude(n, p)], "weight_decay": 0.0},
     {"params": [p for n, p in named if not exclude(n, p)], "weight_decay": 0.2}], lr=1e-6, betas=(0.9, 0.98), eps=1e-6)
side = model.visual.image_size
side = side[0] if isinstance(side, (tuple, list)) else side
images = torch.randn(batch, 3, side, side)
for line in sys.stdin:
    texts = tokenizer(json.loads(line))
    began = time.perf_counter()
    optimizer.zero_grad()
    found = model(images, texts)
    loss_function(*found).backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, 4.6052)
    print(time.perf_counter() - began, flush=True)
"""
TRAINER_STEP = """
import json, sys, time, torch
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments
folder, frozen, threads, batch, length = sys.argv[1], sys.argv[2] == "one", int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
model, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
if frozen:
    for parameter in model.vision_model.parameters():
        parameter.requires_grad = False
arguments = TrainingArguments("x", use_cpu=True, report_to=[], learning_rate=1e-6, weight_decay=0.1)
trainer = Trainer(model, arguments)
trainer.create_optimizer()
trainer.current_gradient_accumulation_steps = 1
side = model.config.vision_config.image_size
images = torch.randn(batch, 3, side, side)
for line in sys.stdin:
    inputs = tokenizer(json.loads(line), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    inputs = dict(inputs) | {"pixel_values": images, "return_loss": True}
    began = time.perf_counter()
    trainer.training_step(model, inputs)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    trainer.optimizer.step()
    model.zero_grad()
    print(time.perf_counter() - began, flush=True)
"""
LOAD = {
    "transformers": "import sys, time; b = time.perf_counter(); from transformers import AutoModel; "
    "AutoModel.from_pretrained(sys.argv[1]).eval(); print('SECONDS', time.perf_counter() - b)",
    "ours": "import sys, time; b = time.perf_counter(); import cnclip_ft; cnclip_ft.load(sys.argv[1]); "
    "print('SECONDS', time.perf_counter() - b)",
}


def captions(count: int) -> list[str]:
    """English captions of the lengths of Flickr8k's: 11.8 words on average, drawn."""
    draw = random.Random(0)
    words = "a man in the snow rides his red bicycle past two girls and a brown dog that runs across green grass near water".split()
    return [" ".join(draw.choices(words, k=max(4, round(draw.gauss(11.8, 3.9))))) + " ." for _ in range(count)]


# ---- folders as transformers writes them ----------------------------------------------------------------------------


def clip_folder(folder: Path) -> Path:
    import transformers

    sys.path.append(str(FOLDER))  # the merges
    from cnclip_ft.models.families.clip.bpe import _found

    found = _found(None)
    special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    tokenizer = transformers.CLIPTokenizer(vocab=found.vocabulary | special, merges=found.merges, model_max_length=77)
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config={"hidden_act": "gelu"}, text_config={"hidden_act": "gelu"})
    )
    return saved(folder, model, tokenizer, transformers.CLIPImageProcessorPil())


def siglip_folder(folder: Path) -> Path:
    import transformers

    from tests.families.cards import gemma

    torch.manual_seed(0)
    # Exact gelu and one layer norm for all, which timm's tower of that name has too.
    config = transformers.SiglipConfig(vision_config={"hidden_act": "gelu"}, text_config={})
    model = transformers.SiglipModel(config)
    model.logit_scale.data.fill_(2.3)
    model.logit_bias.data.fill_(-10.0)
    return saved(folder, model, gemma(), transformers.SiglipImageProcessorPil())


def siglip2_folder(folder: Path) -> Path:
    """NaFlex, base size; the vocabulary is small, its rows those of the published one."""
    import transformers

    from tests.families.cards import gemma

    torch.manual_seed(0)
    text = {"vocab_size": 256000, "pad_token_id": 0}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config={}))
    model.logit_scale.data.fill_(2.3)
    model.logit_bias.data.fill_(-10.0)
    return saved(folder, model, gemma(), transformers.Siglip2ImageProcessorPil())


def dual_folder(folder: Path) -> Path:
    """A VisionTextDualEncoder: ViT-B/16 and XLM-R base."""
    import transformers

    torch.manual_seed(0)
    text = {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "num_hidden_layers": 2}
    config = transformers.VisionTextDualEncoderConfig(
        vision_config=transformers.ViTConfig(num_hidden_layers=2).to_dict(),
        text_config=transformers.XLMRobertaConfig(**text).to_dict(),
        projection_dim=512,
    )
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(250001), model_max_length=512)
    model = transformers.VisionTextDualEncoderModel(config)
    return saved(folder, model, tokenizer, transformers.ViTImageProcessorPil())


def saved(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def pieces(count: int) -> list[tuple[str, float]]:
    """As many pieces as a published vocabulary has."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [chr(code) for code in range(0x4E00, 0x9FA5)]
    draw = random.Random(0)
    words = dict.fromkeys([*special, "▁", *letters])
    while len(words) < count:
        words["▁" * draw.randint(0, 1) + "".join(draw.choices(letters, k=draw.randint(2, 6)))] = None
    return [(word, 0.0 if word in special else -8.0 - number / count) for number, word in enumerate(words)]


def multilingual(kind: str, rows: int, text: dict[str, Any], vision: dict[str, Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import transformers

        tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(rows - 1), model_max_length=77)
        config = getattr(transformers, f"{kind}Config")(
            text_config=text | {"vocab_size": rows, "num_hidden_layers": 2},
            vision_config=vision | {"num_hidden_layers": 2},
            projection_dim=512,
        )
        return saved(
            folder, getattr(transformers, f"{kind}Model")(config), tokenizer, transformers.CLIPImageProcessorPil()
        )

    return make


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
END = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "clip": clip_folder,
    "siglip": siglip_folder,
    "metaclip_2": multilingual("MetaClip2", 901629, END, {}),
    "altclip": multilingual("AltCLIP", 250002, {}, LARGE),
    "siglip2": siglip2_folder,
    "vision-text-dual-encoder": dual_folder,
}
LENGTHS = {"clip": 77, "siglip": 64}


# ---- measuring ------------------------------------------------------------------------------------------------------


def step(kind: str, family: str, batch: int, threads: int, repeats: int) -> None:
    from cnclip_ft.export.run import export_checkpoint

    torch.set_num_threads(threads)
    texts = captions(2000)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = FOLDERS[family](place / "library")
        export_checkpoint(folder, "open_clip", place / "open_clip")
        write_store(place / "train", texts, pictures_of_noise(len(texts) // 5))
        theirs = [
            Official(OPEN_CLIP_STEP, place / "open_clip", kind, str(threads), str(batch)),
            Side(TRAINER_STEP, folder, kind, str(threads), str(batch), str(LENGTHS[family])),
        ]
        lines = [json.dumps(random.Random(n).sample(texts, batch)) for n in range(repeats + 2)]
        ours = OurStage(place, family, batch, texts, train="text" if kind == "one" else "both", start=str(folder))
        rows = [(*(side.ask(line) for side in theirs), ours.step()) for line in lines][2:]
        *others, mine = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"stage {kind}, {family}, batch {batch}, {threads} threads, median of {repeats}", flush=True)
        print(f"  ours {batch / mine:8.2f} pairs/s", flush=True)
        for label, seconds in zip(("open_clip", "Trainer"), others, strict=True):
            print(f"  {label:<10} {batch / seconds:8.2f} pairs/s   {seconds / mine:6.2f}×", flush=True)
        for side in theirs:
            side.close()


def load(names: list[str], repeats: int) -> None:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            folder = FOLDERS[name](Path(place) / name)
            found: dict[str, list[float]] = {side: [] for side in LOAD}
            for _ in range(repeats):
                for side, code in LOAD.items():
                    done = subprocess.run(
                        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
                        env=environment,
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    found[side].append(float(done.stdout.split()[-1]))
            theirs, mine = (statistics.median(found[side]) for side in LOAD)
            weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
            print(
                f"load {name:<12} {weights:5.2f} GB   transformers {theirs:6.2f} s   ours {mine:6.2f} s   {mine / theirs:5.2f}×",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("one", "two", "load", "cpu"))
    parser.add_argument("--family", choices=tuple(LENGTHS), default="clip")
    parser.add_argument("--only", nargs="+", choices=tuple(FOLDERS), default=list(FOLDERS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    if a.what == "load":
        load(a.only, a.repeats)
    elif a.what == "cpu":
        for family in LENGTHS:
            for kind in ("two", "one"):
                step(kind, family, a.batch, a.threads, a.repeats)
        load(a.only, a.repeats)
    else:
        step(a.what, a.family, a.batch, a.threads, a.repeats)


if __name__ == "__main__":
    main()
