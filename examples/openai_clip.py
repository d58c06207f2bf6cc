"""CLIP's introduction: which of three texts fits a picture, with the calls of its package.

Example: python examples/openai_clip.py CLIP.png
"""

import argparse

import torch
from PIL import Image

from cnclip_ft.clip import load_from_name

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture")
parser.add_argument(
    "--model", default="openai/clip-vit-base-patch32", help="name on the hub, file or folder [default: %(default)s]"
)
parser.add_argument("--texts", nargs="+", default=["a diagram", "a dog", "a cat"])
chosen = parser.parse_args()

model, preprocess = load_from_name(chosen.model)
device = model.logit_scale.device
image = preprocess(Image.open(chosen.picture)).unsqueeze(0).to(device)
text = model.tokenize(chosen.texts).to(device)

with torch.no_grad():
    logits_per_image, logits_per_text = model.get_similarity(image, text)
    probs = logits_per_image.softmax(dim=-1)[0].tolist()

for name, prob in zip(chosen.texts, probs, strict=True):
    print(f"{name}  {prob:.4f}")
