"""OpenCLIP's introduction: which of three texts fits a picture, from unit features.

Example: python examples/openclip.py CLIP.png
"""

import argparse

import cnclip_ft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture")
parser.add_argument(
    "--model",
    default="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    help="name on the hub, file or folder [default: %(default)s]",
)
parser.add_argument("--texts", nargs="+", default=["a diagram", "a dog", "a cat"])
chosen = parser.parse_args()

model = cnclip_ft.load(chosen.model, device="auto")
image_features = model.encode_images(chosen.picture)
text_features = model.encode_texts(chosen.texts)
text_probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)[0].tolist()

for name, prob in zip(chosen.texts, text_probs, strict=True):
    print(f"{name}  {prob:.4f}")
