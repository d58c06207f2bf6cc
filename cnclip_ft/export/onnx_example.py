"""Cosines: python example.py dog.jpg 一只狗 "a red car" (at least one picture, one text; onnxruntime, tokenizers, numpy, Pillow)."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

here = Path(__file__).resolve().parent
about = json.loads((here / "description.json").read_text(encoding="utf-8"))
image, text = (onnxruntime.InferenceSession(str(here / about[side]["file"])) for side in ("image", "text"))
pictures, texts = ([word for word in sys.argv[1:] if Path(word).is_file() is wanted] for wanted in (True, False))
size = (about["image"]["size"],) * 2
upright = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in pictures]
pixels = np.stack([np.asarray(picture.resize(size, Image.Resampling.BICUBIC)) for picture in upright])
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.enable_truncation(about["text"]["context_length"])
tokenizer.enable_padding(pad_id=about["text"]["pad_id"])
ids = np.array([found.ids for found in tokenizer.encode_batch(texts)], dtype=np.int64)
image_features = image.run(None, {about["image"]["input"]: pixels.transpose(0, 3, 1, 2)})[0]
text_features = text.run(None, {about["text"]["input"]: ids})[0]
for path, row in zip(pictures, image_features @ text_features.T):  # noqa: B905 - equal by construction
    print(path, *(f"{words}: {cosine:.4f}" for words, cosine in zip(texts, row)), sep="  ")  # noqa: B905
