"""Folders of SigLIP's published sizes at full width, two layers each: our features are the library's.

Values of ``config.json`` in Hugging Face's google/siglip-* and google/siglip2-*: those that transformers' own conversion scripts
set (models/siglip and models/siglip2, ``convert_*_to_hf.py``), sizes after arXiv 2303.15343 and 2502.14786, big_vision's
``configs/proj/image_text/README_siglip2.md``; what they leave out is transformers' default.
"""

from __future__ import annotations

import pytest
import torch
import transformers

import cnclip_ft
from cnclip_ft.training.loss import SigmoidObjective
from tests.families import cards
from tests.families.test_families import library_pictures, photos

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
GIANT = {"hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 16}
MULTILINGUAL = {"vocab_size": 250000}  # mC4
GEMMA = {"vocab_size": 256000}
PUBLISHED = {
    "siglip-base-patch16-224": (BASE, BASE, {"image_size": 224, "patch_size": 16}),
    "siglip-base-patch16-256-multilingual": (BASE, BASE | MULTILINGUAL, {"image_size": 256, "patch_size": 16}),
    "siglip-large-patch16-384": (LARGE, LARGE, {"image_size": 384, "patch_size": 16}),
    "siglip-so400m-patch14-384": (
        SO400M,
        SO400M,
        {"image_size": 384, "patch_size": 14},
    ),  # 27 × 27 patches, 6 pixels left over
    "siglip-so400m-patch14-224": (
        SO400M,
        SO400M | {"max_position_embeddings": 16},
        {"image_size": 224, "patch_size": 14},
    ),
    "siglip2-base-patch32-256": (BASE, BASE | GEMMA, {"image_size": 256, "patch_size": 32}),
    "siglip2-so400m-patch16-512": (SO400M, SO400M | GEMMA, {"image_size": 512, "patch_size": 16}),
    # Towers of two widths: the text's head leads to the picture's.
    "siglip2-giant-opt-patch16-256": (
        GIANT,
        SO400M | GEMMA | {"projection_size": 1536},
        {"image_size": 256, "patch_size": 16},
    ),
    "siglip2-base-patch16-naflex": (BASE, BASE | GEMMA, {"num_patches": 256, "patch_size": 16}),
    "siglip2-so400m-patch16-naflex": (SO400M, SO400M | GEMMA, {"num_patches": 256, "patch_size": 16}),
}
LAYERS = {"num_hidden_layers": 2}
TEMPERATURE, BIAS = 4.7628, -12.9  # near those of the base size
SAID = ["一只狗在雪地里奔跑", "a red car", "", "dog " * 100]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_features_and_loss_are_the_librarys(name, tmp_path):
    image, text, sizes = PUBLISHED[name]
    naflex = "num_patches" in sizes
    kind = ("Siglip2" if naflex else "Siglip", {"text_config": text | LAYERS, "vision_config": image | sizes | LAYERS})
    torch.manual_seed(0)
    library = getattr(transformers, f"{kind[0]}Model")(getattr(transformers, f"{kind[0]}Config")(**kind[1])).eval()
    library.logit_scale.data.fill_(TEMPERATURE)
    library.logit_bias.data.fill_(BIAS)
    pictures = (
        transformers.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256)
        if naflex
        else cards._squashed(sizes["image_size"])
    )
    for part in (library, cards.gemma(), pictures):
        part.save_pretrained(tmp_path)
    ours = cnclip_ft.load(tmp_path)
    length = text.get("max_position_embeddings", 64)
    assert ours.context_length == length and len(ours.image_tower.blocks()) == 4
    pixels = torch.stack([ours.image_tower.preprocessing.decode(file) for file in photos(len(SAID))])
    ids, mask = ours.tokenizer.pad(ours.tokenizer.encode(SAID))
    with torch.no_grad():
        theirs = library(input_ids=ids, **library_pictures(ours, pixels), return_loss=True)
        images, texts = ours(pixels, ids, mask)
        torch.testing.assert_close(images, theirs.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(texts, theirs.text_embeds, atol=1e-5, rtol=0)
        keys = torch.arange(len(SAID))
        loss = SigmoidObjective()(images, texts, ours.logit_scale, keys, keys, ours.logit_bias).loss
    torch.testing.assert_close(loss, theirs.loss, atol=0, rtol=1e-4)
