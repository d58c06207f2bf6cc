"""The official training step beside ours: same start, same batches, same settings, same curve of losses."""

from __future__ import annotations

import json

import pytest
import torch

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.preprocessing import normalise
from cnclip_ft.training.run import train
from tests.official import requires_official, run_official
from tests.training.helpers import losses, prepared, tiny_recipe

STEPS = 10
CONFIG = {
    "embed_dim": 64, "image_resolution": 32, "vision_layers": 3, "vision_width": 128, "vision_patch_size": 8,
    "vocab_size": 21128, "text_attention_probs_dropout_prob": 0.0, "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.0, "text_hidden_size": 128, "text_initializer_range": 0.02,
    "text_intermediate_size": 512, "text_max_position_embeddings": 512, "text_num_attention_heads": 2,
    "text_num_hidden_layers": 3, "text_type_vocab_size": 2,
}  # fmt: skip

MAKE = """
import json
from cn_clip.clip.model import CLIP
torch.manual_seed(0)
model = CLIP(**json.loads(sys.argv[1])).float()
torch.save({"epoch": 0, "step": 0, "name": "x", "state_dict": {"module." + k: v for k, v in model.state_dict().items()}}, sys.argv[2])
"""

# The loop of `train.py` with its own `get_loss`; no AMP, no schedule.
TRAIN = """
import json
from types import SimpleNamespace
from cn_clip.clip.model import CLIP
from cn_clip.training.train import get_loss
config, start, data, setting = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
model = CLIP(**config).float()
state = torch.load(start)["state_dict"]
model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
model.train()
decays = lambda n, p: p.ndim >= 2 and "embedding" not in n and "conv1" not in n
named = list(model.named_parameters())
optimizer = torch.optim.AdamW(
    [{"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
     {"params": [p for n, p in named if decays(n, p)], "weight_decay": setting["weight_decay"]}],
    lr=setting["learning_rate"], betas=(0.9, 0.98), eps=1e-6,
)
args = SimpleNamespace(accum_freq=1, mask_ratio=0, distillation=False, aggregate=False, local_device_rank=0,
                       report_training_batch_acc=False)
for images, texts in torch.load(data):
    optimizer.zero_grad()
    loss, _ = get_loss(model, images, texts, torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(), args)
    loss.backward()
    optimizer.step()
    model.logit_scale.data = torch.clamp(model.logit_scale.data, 0, 4.6052)
    print("LOSS", loss.item())
"""


@requires_official
@pytest.mark.parametrize("micro", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_the_curve_of_losses_is_that_of_the_official_step(stores, tmp_path, micro):
    run_official(MAKE, json.dumps(CONFIG), tmp_path / "start.pt")
    save_checkpoint(load(tmp_path / "start.pt"), tmp_path / "start", info={})
    config = json.loads((tmp_path / "start" / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "start" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "start" / "cnclip_ft.json").unlink()

    setting = {"learning_rate": 2e-3, "weight_decay": 0.1}
    stage = {
        "train": "both",
        "steps": STEPS,
        "batch_size": 8,
        "warmup_steps": 0,
        "schedule": "constant",
        "micro_batch_size": micro,
        "objective": {"positives": "ignore"},
        "validate_every": 100,
        **setting,
    }
    recipe = tiny_recipe(
        stores, output=str(tmp_path / "run"), model={"start": str(tmp_path / "start")}, stages={"contrast": stage}
    )
    recipe = recipe.model_copy(update={"stages": {"contrast": recipe.stages["contrast"]}})

    batches, trainer = [], prepared(recipe, 0)
    for batch in trainer.batches():
        tower, ids = trainer.model.image_tower, batch["input_ids"]
        pixels = normalise(batch["pixels"], tower.preprocessing.mean, tower.preprocessing.std, torch.float32)
        batches.append((pixels, torch.nn.functional.pad(ids, (0, 52 - ids.shape[1]))))
    assert len(batches) == STEPS
    torch.save(batches, tmp_path / "batches.pt")

    assert train(recipe)
    ours = [losses(tmp_path / "run")["contrast", step] for step in range(1, STEPS + 1)]
    out = run_official(TRAIN, json.dumps(CONFIG), tmp_path / "start.pt", tmp_path / "batches.pt", json.dumps(setting))
    theirs = [float(line.split()[1]) for line in out.splitlines() if line.startswith("LOSS")]
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert max(theirs) - min(theirs) > 0.1  # the weights do move, so that agreement means something
