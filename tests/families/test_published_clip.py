"""Folders of published CLIP, MetaCLIP 2 and AltCLIP at full width, two layers each: our features and loss are the library's.

Values of ``config.json``: openai/clip-vit-base-patch32 and -large-patch14 and BAAI/AltCLIP are transformers' defaults and OpenAI's table
(arXiv 2103.00020, table 20; AltCLIP: arXiv 2211.06679, XLM-R large under CLIP ViT-L); laion/CLIP-ViT-H-14 is open_clip's
``model_configs/ViT-H-14.json``; facebook/metaclip-2-worldwide-huge-quickgelu has that size with quick_gelu (arXiv 2507.22062). The
rows of the vocabulary are those of the small tokenizers here, which no width depends on.
"""

from __future__ import annotations

import pytest
import torch
import transformers

import cnclip_ft
from cnclip_ft.training.loss import ContrastiveObjective
from tests.families.cards import byte_pairs, pieces
from tests.families.test_families import library_pictures, photos

TWO = {"num_hidden_layers": 2}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "patch_size": 14}
TEXT_BASE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
TEXT_LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TEXT_HUGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
GELU, QUICK = {"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}
OLD_END = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
# class, text, vision, projection, side of the picture
PUBLISHED = {
    "clip-vit-base-patch32": ("CLIP", TEXT_BASE | OLD_END, BASE, 512, 224),
    "clip-vit-large-patch14-336": ("CLIP", TEXT_LARGE | OLD_END, LARGE, 768, 336),
    "CLIP-ViT-H-14-laion2B-s32B-b79K": ("CLIP", TEXT_HUGE | GELU | OLD_END, HUGE | GELU, 1024, 224),
    "metaclip-2-worldwide-huge-quickgelu": ("MetaClip2", TEXT_HUGE | QUICK | OLD_END, HUGE | QUICK, 1024, 224),
    "AltCLIP": ("AltCLIP", {"project_dim": 768}, LARGE, 768, 224),
}
SAID = ["一只狗在雪地里奔跑", "a red car", "", "dog " * 100]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_features_and_loss_are_the_librarys(name, tmp_path):
    kind, text, vision, projection, side = PUBLISHED[name]
    if kind == "CLIP":
        vocabulary, merges = byte_pairs()
        tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    else:
        tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=77)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text | TWO | {"vocab_size": len(tokenizer)},
        vision_config=vision | TWO | {"image_size": side},
        projection_dim=projection,
    )
    library = getattr(transformers, f"{kind}Model")(config).eval()
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    for part in (library, tokenizer, transformers.CLIPImageProcessorPil(**size)):
        part.save_pretrained(tmp_path)
    ours = cnclip_ft.load(tmp_path)
    pixels = torch.stack([ours.image_tower.preprocessing.decode(file) for file in photos(len(SAID))])
    inputs = tokenizer(SAID, truncation=True, max_length=77, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = library(**inputs, **library_pictures(ours, pixels), return_loss=True)
        images, texts = ours(pixels, *ours.tokenizer.pad(ours.tokenizer.encode(SAID)))
        torch.testing.assert_close(images, theirs.image_embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(texts, theirs.text_embeds, atol=1e-5, rtol=1e-5)
        keys = torch.arange(len(SAID))
        found = ContrastiveObjective()(images, texts, ours.logit_scale, keys, keys).loss
    torch.testing.assert_close(found, theirs.loss, atol=1e-5, rtol=1e-5)
