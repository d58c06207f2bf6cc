"""Small models that have what big ones have."""

from __future__ import annotations

import torch

from cnclip_ft.models.assembly import file_names
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.formats.cn_clip import to_official
from cnclip_ft.models.start import build_start

TEXT = {"hidden": 64, "layers": 2, "heads": 1}
VIT = {
    "image": {"kind": "vit", "hidden": 64, "layers": 2, "heads": 1, "patch": 8, "image_size": 32},
    "text": TEXT,
    "projection": 32,
}
RESNET = VIT | {"image": {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 8, "heads": 4, "image_size": 64}}


def small(spec: dict = VIT, seed: int = 1) -> DualEncoder:
    """A model of random weights, in evaluation mode; heads 64 wide, as a bare file of weights implies."""
    model = build_start(spec, seed=seed)[0]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():  # biases, norms and statistics that are not the initial ones
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by file name."""
    names = file_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def official(model: DualEncoder) -> dict[str, torch.Tensor]:
    """The state dict the official code would save."""
    return {f"module.{name}": tensor for name, tensor in to_official(tensors(model)).items()}


def pixels(size: int, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def features(model: DualEncoder, texts=("一只狗", "a red car", "")) -> torch.Tensor:
    """Unit features of images and texts in one tensor."""
    return torch.cat([model.image_features(pixels(model.image_size)), model.encode_texts(texts)])


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Bomb:
    """What a stranger's pickle may hold: unpickling it runs code (here: makes a file)."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
