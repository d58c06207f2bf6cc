"""Sides of the table for a card: what takes steps, ours and others'. Each says its FLOP a pair and its memory, and is closed."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.official import Official
from benchmarks.step import OFFICIAL_STEP, TEXT_OF, OurStage
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.training import compiling, throughput
from cnclip_ft.training.memory import tokens_per_text

DEVICE = os.environ.get("DEVICE", "cuda")
REHEARSAL = DEVICE == "cpu"
TOKENS = 52  # what the others pad every text to
_TINY = {
    "embed_dim": 32, "image_resolution": 32, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 8,
    "vocab_size": 21128, "text_attention_probs_dropout_prob": 0.1, "text_hidden_act": "gelu", "text_hidden_dropout_prob": 0.1,
    "text_hidden_size": 64, "text_initializer_range": 0.02, "text_intermediate_size": 128,
    "text_max_position_embeddings": 512, "text_num_attention_heads": 2, "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}  # fmt: skip


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def fast_roads_on_the_cpu() -> None:
    """What the rehearsal has instead of a card: Pillow behind the interface of its decoder, and plain layers for those of 8 bits."""
    from cnclip_ft.training import context, fp8
    from tests.data.jpeg_decoders import PillowDecoder

    context.choose_decoder = lambda wanted, *_: (PillowDecoder() if wanted == "device" else None, "a rehearsal")
    context.check_fp8 = lambda *_: None
    fp8.eight_bit = lambda layer: layer


class Ours:
    """A stage of a real run."""

    def __init__(self, folder: Path, size: str, batch: int, texts: list[str], **settings: Any) -> None:
        if REHEARSAL:
            compiling.COMPILER["backend"] = "eager"
            fast_roads_on_the_cpu()
        frozen = settings.pop("frozen")
        self.stage = OurStage(
            folder,
            size,
            batch,
            texts,
            train="text" if frozen else "both",
            precision="bf16",
            workers=0 if REHEARSAL else min(12, os.cpu_count() or 1),
            start=settings.pop("start", {"architecture": size}),
            context_length=16 if REHEARSAL else None,  # one length: nothing is compiled in a step that is timed
            **settings,
        )
        self.step = self.stage.step
        trainer = self.stage.trainer
        self.flops = throughput.flops_per_pair(trainer.plan, trainer.whole, tokens_per_text(trainer.context)) or 0.0

    def memory(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0

    def close(self) -> None:
        self.stage.close()


class Peer:
    """transformers' ChineseCLIPModel of a size, stepped as others do it; its batch lies on the device."""

    def __init__(self, size: str, batch: int, texts: list[str], *, frozen: bool, style: str) -> None:
        from transformers import ChineseCLIPModel

        from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer

        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = ChineseCLIPModel(config_of(size)).train()
        self.style = style
        if frozen:
            self.model.vision_model.requires_grad_(False)
            self.model.visual_projection.requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.features = torch.compile(self._features, backend="eager" if REHEARSAL else "inductor")
        side = self.model.config.vision_config.image_size
        tokenizer = TextTokenizer(context_length=TOKENS)
        ids, mask = tokenizer.pad(tokenizer.encode(texts[:batch]), TOKENS)
        self.ids, self.mask = ids.to(DEVICE), mask.to(DEVICE)
        self.pixels = torch.randn(batch, 3, side, side, device=DEVICE)
        self.flops = flops_of(self.model, frozen)

    def _features(
        self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.model.get_image_features(pixel_values=pixels).pooler_output
        text = self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)

    def step(self, count: int = 1) -> float:
        """Seconds a step of `count`, after the last of which the card is waited for."""
        began = time.perf_counter()
        for _ in range(count):
            self._step()
        wait()
        return (time.perf_counter() - began) / count

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            if self.style == "open_clip":
                image, text = self.features(self.pixels, self.ids, self.mask)
                logits = self.model.logit_scale.exp() * image @ text.T
                own = torch.arange(len(logits), device=DEVICE)
                cross_entropy = torch.nn.functional.cross_entropy
                loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
            else:
                given = {"input_ids": self.ids, "pixel_values": self.pixels, "attention_mask": self.mask}
                loss = self.model(**given, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)

    memory = Ours.memory

    def close(self) -> None:
        pass


class OfficialSide:
    """cn_clip's own step, in a process of its own."""

    def __init__(self, folder: Path, size: str, batch: int, texts: list[str], *, frozen: bool) -> None:
        from transformers import ChineseCLIPModel

        with torch.device("meta"):
            self.flops = flops_of(ChineseCLIPModel(config_of(size)), frozen)
        self.lines = [json.dumps(random.Random(n).sample(texts, batch), ensure_ascii=False) for n in range(3)]
        self.count = 0
        names = size, TEXT_OF.get(size, "RoBERTa-wwm-ext-base-chinese")
        if size == "tiny":
            tiny = folder / "tiny.json"
            tiny.write_text(json.dumps(_TINY))
            names = str(tiny), str(tiny)
        self.process = Official(
            OFFICIAL_STEP,
            *names,
            str(batch),
            "frozen" if frozen else "both",
            str(torch.get_num_threads()),
            "-",
            DEVICE,
            cuda=DEVICE == "cuda",
        )  # last: whoever has no side cannot end its process

    def step(self, count: int = 1) -> float:
        """The mean of `count`; the process waits for the card after each, its batch lies there."""
        times = []
        for _ in range(count):
            self.count += 1
            times.append(self.process.ask(self.lines[self.count % 3]))
        return sum(times) / count

    def memory(self) -> float:
        return self.process.ask("memory") / 2**30

    def close(self) -> None:
        self.process.process.kill()
        self.process.process.wait()


def config_of(size: str) -> Any:
    """transformers' configuration of a published size."""
    from transformers import ChineseCLIPConfig

    found = ARCHITECTURES[size]
    image, text = found.image, found.text
    return ChineseCLIPConfig(
        vision_config={
            "hidden_size": image.hidden,
            "intermediate_size": image.intermediate or 4 * image.hidden,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": image.image_size,
            "patch_size": image.patch,
            "projection_dim": found.projection,
        },
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.intermediate or 4 * text.hidden,
            "projection_dim": found.projection,
        },
        projection_dim=found.projection,
    )


def flops_of(model: torch.nn.Module, frozen: bool) -> float:
    """FLOP of a pair whose text has 52 tokens, all of them counted."""
    side = model.config.vision_config.image_size
    trained = {
        name for name, _ in model.named_parameters() if not (frozen and name.startswith(("vision_model", "visual_")))
    }
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool, device="meta")
    ids = torch.zeros(2, TOKENS, dtype=torch.int64, device="meta")
    pixels = torch.empty(2, 3, side, side, device="meta")
    return throughput.counted(model, trained, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}) / 2
