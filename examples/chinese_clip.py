"""Chinese-CLIP's introduction: which of four names fits a picture.

Example: python examples/chinese_clip.py pokemon.jpeg
"""

import argparse

import torch
from PIL import Image

from cnclip_ft.clip import load_from_name

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture")
parser.add_argument("--model", default="ViT-B-16", help="published name, file or folder [default: %(default)s]")
parser.add_argument("--texts", nargs="+", default=["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"])
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
