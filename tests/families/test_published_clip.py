"""Folders of published CLIP, MetaCLIP 2, AltCLIP and VisionTextDualEncoder at full width, two layers each: our features and loss are the library's.

Values of ``config.json``: openai/clip-vit-base-patch32 and -large-patch14 and BAAI/AltCLIP are transformers' defaults and OpenAI's table
(arXiv 2103.00020, table 20; AltCLIP: arXiv 2211.06679, XLM-R large under CLIP ViT-L); laion/CLIP-ViT-H-14 is open_clip's
``model_configs/ViT-H-14.json``; facebook/metaclip-2-worldwide-huge-quickgelu has that size with quick_gelu (arXiv 2507.22062). The
rows of the vocabulary are those of the small tokenizers here, which no width depends on. The dual encoders are the two that transformers'
own documentation makes: openai/clip-vit-base-patch32 with FacebookAI/roberta-base (examples/pytorch/contrastive-image-text), and
google/vit-base-patch16-224 with google-bert/bert-base-uncased (model_doc/vision-text-dual-encoder); ViTConfig's and BertConfig's
defaults are those, RoBERTa's numbers are of arXiv 1907.11692 with 514 positions.
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
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2,
               "pad_token_id": 1}  # fmt: skip
BERT = {"pad_token_id": 1}  # the small tokenizer's
# classes of pictures and texts, and what is not their default
DUAL = {
    "clip-roberta": ("CLIPVision", "Roberta", BASE, ROBERTA),
    "vit-bert": ("ViT", "Bert", {}, BERT),
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
    same(tmp_path, library, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", DUAL)
def test_features_and_loss_of_a_dual_encoder_are_the_librarys(name, tmp_path):
    pictures, texts, vision, text = DUAL[name]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=512)
    torch.manual_seed(0)
    config = transformers.VisionTextDualEncoderConfig(
        vision_config=getattr(transformers, f"{pictures}Config")(**vision, **TWO).to_dict(),
        text_config=getattr(transformers, f"{texts}Config")(**text, **TWO, vocab_size=len(tokenizer)).to_dict(),
        projection_dim=512,
    )
    library = transformers.VisionTextDualEncoderModel(config).eval()
    processor = (
        transformers.CLIPImageProcessorPil() if pictures == "CLIPVision" else transformers.ViTImageProcessorPil()
    )
    for part in (library, tokenizer, processor):
        part.save_pretrained(tmp_path)
    same(tmp_path, library, tokenizer)


def same(folder, library, tokenizer):
    ours = cnclip_ft.load(folder)
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
