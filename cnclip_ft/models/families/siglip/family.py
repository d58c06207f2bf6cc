"""SigLIP as a family: the files from which transformers makes SiglipModel, or Siglip2Model for pictures in their own shape."""

from __future__ import annotations

from typing import Any

from transformers import Siglip2Config, SiglipConfig

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.parts import class_config, processor_config
from cnclip_ft.models.families.siglip import naflex, vision
from cnclip_ft.models.families.siglip.text import SiglipTextTower
from cnclip_ft.models.family import Family, WebClasses


class Siglip(Family):
    name, own_pictures = "SigLIP", (vision.SiglipTower.kind, naflex.NaflexTower.kind)
    image_towers = (vision.SiglipTower, naflex.NaflexTower)
    text_towers = (SiglipTextTower,)
    templates = "siglip"
    transformers_class = "SiglipModel is SigLIP's image tower with its text tower"
    exports = ("huggingface", "open_clip", "onnx")
    scalar_shape = (1,)
    web = WebClasses("siglip", "pooler_output", "pooler_output")  # they end in a pooling, without a projection

    def name_of(self, model: DualEncoder) -> str:
        if model.image_tower.kind == naflex.NaflexTower.kind:
            return "SigLIP 2 (NaFlex)"
        # Of a fixed size they have the same classes; SigLIP 2 has Gemma's vocabulary (arXiv 2502.14786).
        gemma = model.tokenizer.name.startswith(("Siglip2", "Gemma"))
        return "SigLIP 2" if gemma else self.name

    def transformers_files(self, model: DualEncoder) -> dict[str, dict[str, Any]]:
        files = super().transformers_files(model)
        image, dim = model.image_tower.describe(), model.text_tower.output_dim
        text = SiglipTextTower.own_numbers(model.text_tower.describe()) | {
            "projection_size": dim,
            "pad_token_id": model.tokenizer.pad_id,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if image["kind"] == "siglip":
            squares = SiglipConfig(text_config=text, vision_config=vision.SiglipTower.own_numbers(image))
            files["config.json"] = class_config(model, squares, "SiglipModel")
        elif image["kind"] == "siglip2":
            patches = Siglip2Config(text_config=text, vision_config=naflex.NaflexTower.own_numbers(image))
            files["config.json"] = class_config(model, patches, "Siglip2Model")
        return files | {"preprocessor_config.json": processor_config(model, "SiglipImageProcessor", "SiglipProcessor")}


FAMILY = Siglip()
