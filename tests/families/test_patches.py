"""Features of single patches: every family and method against the formulas written out on the weights of random towers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import cnclip_ft
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.dense import METHODS, OWN
from cnclip_ft.models.patches import PatchedPicture
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.models.helpers import RESNET, TEXT, VIT, pixels, small
from tests.official import requires_open_clip, run_official

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.models.tower_fixture"
SIGLIP = VIT | {"image": VIT["image"] | {"kind": "siglip"}, "projection": 64}


def attention(look, value, heads, more=None):
    """``[tokens, width]`` twice → the same: every token looks at those alike, head by head, token by token."""
    tokens, width = look.shape
    size, rows = width // heads, []
    for token in range(tokens):
        parts = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = look[:, own] @ look[token, own] / math.sqrt(size)
            powers = (scores if more is None else scores + torch.tensor(more[token])).exp()
            parts.append(powers / powers.sum() @ value[:, own])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def nearness(rows, columns, prefix):
    """What NACLIP adds to the scores: nothing for tokens that are no patches."""
    where = [None] * prefix + [(row, column) for row in range(rows) for column in range(columns)]
    return [[math.exp(-(math.dist(a, b) ** 2) / (2 * 5.0**2)) if a and b else 0.0 for b in where] for a in where]


def expected(layer, hidden, method, rows, columns, prefix, heads):
    """``[prefix + patches, width]`` of one picture before the last block → ``[patches, width]`` behind it."""
    own, normed = layer.self_attn, layer.layer_norm1(hidden)
    query, key, value = own.q_proj(normed), own.k_proj(normed), own.v_proj(normed)
    if method == "maskclip":
        return own.out_proj(value)[prefix:]
    if method == "naclip":
        return own.out_proj(attention(key, value, heads, nearness(rows, columns, prefix)))[prefix:]
    hidden = hidden + own.out_proj(attention(query, value, heads) + attention(key, value, heads))
    return (hidden + layer.mlp(layer.layer_norm2(hidden)))[prefix:]


def before_last(model, block):
    """What the last layer is given when `model` is called by itself: ``[n, tokens, width]``."""
    kept = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model()
    handle.remove()
    return kept[0]


def reference(model, some, method, grids):
    """Projected features of every picture, a list of ``[patches, dim]``."""
    tower = model.image_tower
    inner = tower.vision_model
    layer = inner.encoder.layers[-1]
    hidden = before_last(lambda: model.image_features(some), layer)
    pooled = hasattr(inner, "head")
    found = []
    for one, (rows, columns) in zip(hidden, grids, strict=True):
        prefix = 0 if pooled else 1
        one = one[: prefix + rows * columns]
        patches = expected(layer, one, method, rows, columns, prefix, inner.config.num_attention_heads)
        patches = inner.post_layernorm(patches)
        # SigLIP: what its pooling makes of a picture of that one patch
        found.append(
            torch.cat([inner.head(patch[None, None]) for patch in patches])
            if pooled
            else tower.visual_projection(patches)
        )
    return found


def check(model, some, grids, seen=(1.0, 1.0)):
    with torch.no_grad():
        for method in METHODS:
            given = model.patch_features(some, method)
            assert given.grid.tolist() == [list(grid) for grid in grids] and given.seen == pytest.approx(seen)
            for one, theirs in zip(given.features, reference(model, some, method, grids), strict=True):
                torch.testing.assert_close(one[: len(theirs)], F.normalize(theirs, dim=1), atol=1e-5, rtol=0)
        tokens = model.image_tokens(some)
        torch.testing.assert_close(tokens.pooled, model.image_trunk(some), atol=1e-5, rtol=0)
        assert tokens.patches.shape[:2] == given.features.shape[:2] and tokens.grid.tolist() == given.grid.tolist()


@pytest.mark.parametrize("name", ["clip", "metaclip_2", "altclip", "siglip", "siglip of version 2"])
def test_families_of_squares(written, name):
    model = cnclip_ft.load(written(name))
    side = model.image_size
    # SigLIP's picture of 36 pixels has patches of 8: the last four pixels are in none.
    check(model, pixels(side), [(4, 4)] * 3, (32 / side,) * 2)


def test_pictures_in_their_own_shape(written):
    model = cnclip_ft.load(written("siglip2"))
    some = torch.stack(
        [
            model.image_tower.preprocessing.decode(pixels(40, 1)[0][:, :tall, :wide])
            for tall, wide in ((40, 20), (8, 40), (32, 32))
        ]
    )
    grids = PatchedPicture.unpack(some)[1].tolist()
    assert len(set(map(tuple, grids))) == 3
    check(model, some, grids)


@pytest.mark.parametrize("spec", [VIT, SIGLIP])
@pytest.mark.parametrize("size", [None, 48])
def test_chinese_clip_and_new_towers_at_other_sizes(tmp_path, spec, size):
    model = small(spec)
    if size:
        save_checkpoint(model, tmp_path / "a", info={})
        model = cnclip_ft.load(tmp_path / "a", image_size=size)
    side = (size or 32) // 8
    check(model, pixels(size or 32, 2), [(side, side)] * 2)


@pytest.mark.parametrize("name", ["vit beside xlm-r", "dinov2 beside xlm-r", "siglip beside xlm-r"])
def test_encoders_of_transformers(written, name):
    model = cnclip_ft.load(written(name))
    tower = model.image_tower
    inner = tower.vision_model
    (layers,) = [module for module in inner.modules() if isinstance(module, torch.nn.ModuleList)]
    layer = layers[-1]
    if name.startswith("siglip"):
        prefix, parts, after = 0, layer, lambda one: inner.head(inner.post_layernorm(one)[:, None])
    else:
        own, dino = layer.attention, name.startswith("dino")
        inside = SimpleNamespace(q_proj=own.q_proj, k_proj=own.k_proj, v_proj=own.v_proj, out_proj=own.o_proj)
        prefix, parts = (
            1,
            SimpleNamespace(layer_norm1=layer.norm1 if dino else layer.layernorm_before, self_attn=inside),
        )
        parts.layer_norm2, parts.mlp = layer.norm2 if dino else layer.layernorm_after, layer.mlp
        if dino:
            inside.out_proj = lambda mixed: own.o_proj(mixed) * layer.layer_scale1.lambda1
            parts.mlp = lambda normed: layer.mlp(normed) * layer.layer_scale2.lambda1
        after = inner.layernorm if dino else lambda one: inner.pooler(inner.layernorm(one)[:, None])
    some = pixels(model.image_size)
    with torch.no_grad():
        hidden = before_last(lambda: model.image_features(some), layer)
        for method in METHODS:
            given = model.patch_features(some, method)
            for ours, one in zip(given.features, hidden, strict=True):
                theirs = tower.visual_projection(after(expected(parts, one, method, 4, 4, prefix, 2)))
                torch.testing.assert_close(ours, F.normalize(theirs, dim=1), atol=1e-5, rtol=0)
        tokens = model.image_tokens(some)
        torch.testing.assert_close(tokens.pooled, model.image_trunk(some), atol=1e-5, rtol=0)
        last = inner(pixel_values=model._ready(some)).last_hidden_state
        torch.testing.assert_close(tokens.patches, last[:, prefix:])


def test_other_tokens_of_the_plain_last_block_are_those_of_the_library(written):
    """`tokens`: what transformers gives where nothing is left out, every token of it."""
    import transformers

    theirs = transformers.AutoModel.from_pretrained(written("clip")).eval().vision_model
    model = cnclip_ft.load(written("clip"))
    some = pixels(32)
    with torch.no_grad():
        hidden = theirs.post_layernorm(theirs(model.image_tower.preprocessing.normalise(some)).last_hidden_state)
        torch.testing.assert_close(model.image_tokens(some).patches, hidden[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_carry_gradient_and_drop_no_patch(checkpointing):
    model = small().train()
    model.image_tower.patch_dropout = 0.5
    model.set_gradient_checkpointing(checkpointing, False)
    tokens = model.image_tokens(pixels(32))
    assert tokens.patches.shape == (3, 16, 64)
    (tokens.patches.square().sum() + model.image_tower.project(tokens.pooled).sum()).backward()
    assert all(parameter.grad is not None for parameter in model.image_tower.parameters())


def test_a_tower_by_import_path_that_gives_a_map():
    model, _ = build_start({"image": f"{HERE}:mapped", "text": TEXT, "projection": 32})
    model.eval()
    tower, some = model.image_tower, pixels(24)
    assert tower.patch_methods == (OWN,)
    with torch.no_grad():
        found = model.patch_features(some, OWN)
        own = tower.module.patches(tower.preprocessing.normalise(some))
        theirs = F.normalize(torch.einsum("nchw,dc->nhwd", own, tower.visual_projection.weight), dim=3)
        torch.testing.assert_close(found.features.unflatten(1, (6, 6)), theirs, atol=1e-5, rtol=0)
        tokens = model.image_tokens(some)
        assert torch.equal(tokens.pooled, model.image_trunk(some)) and tokens.patches.shape == (3, 36, 12)
    with pytest.raises(RequestError, match="method 'sclip': .* knows own"):
        model.patch_features(some, "sclip")
    tower.module.output_dim = 13
    with pytest.raises(
        RequestError, match=r"its patches gave \[3, 12, 6, 6\] for 3 images; expected \[3, 13, rows, columns\]"
    ):
        tower.patches(tower.preprocessing.normalise(some), OWN)


@pytest.mark.parametrize("spec", [RESNET, {"image": f"{HERE}:plain", "text": TEXT}])
def test_towers_without_patches_are_refused_in_words(spec):
    model = build_start(spec)[0]
    for ask in (
        lambda: model.patch_features(pixels(model.image_size), "sclip"),
        lambda: model.image_tokens(pixels(model.image_size)),
    ):
        with pytest.raises(RequestError, match="gives no features of single patches.*a ViT.*docs/towers.md"):
            ask()


def test_a_method_nobody_knows():
    with pytest.raises(RequestError, match="method 'gradcam': .* maskclip, sclip, naclip"):
        small().patch_features(pixels(32), "gradcam")


OF_TIMM = """
from types import SimpleNamespace
import torch.nn.functional as F
from cnclip_ft.models.dense import METHODS, changed
from cnclip_ft.models.families.timm import TimmTower, _parts
from tests.families.test_patches import before_last, expected

torch.manual_seed(0)
for pool, head in (("token", "linear"), ("avg", "mlp"), ("map", "none")):
    numbers = {"name": "vit_tiny_patch16_224", "pool": pool, "head": head, "head_bias": False, "image_size": 224}
    tower = TimmTower(numbers, 24).to_empty(device="cpu").eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    trunk = tower.visual.trunk
    block = trunk.blocks[-1]
    part = lambda number: lambda normed: block.attn.qkv(normed).chunk(3, -1)[number]
    layer = SimpleNamespace(
        layer_norm1=block.norm1, layer_norm2=block.norm2, mlp=block.mlp,
        self_attn=SimpleNamespace(q_proj=part(0), k_proj=part(1), v_proj=part(2), out_proj=block.attn.proj),
    )
    with torch.no_grad():
        some = torch.randn(2, 3, 224, 224)
        hidden = before_last(lambda: tower(some), block)
        for method in METHODS:  # a cut of a picture is enough for the loops: 3 × 14 patches
            ours = changed(_parts(block), hidden[:1, :43], method, torch.tensor([[3, 14]]), prefix=1)
            torch.testing.assert_close(ours[0], expected(layer, hidden[0, :43], method, 3, 14, 1, 3), atol=1e-5, rtol=1e-5)
            found = tower.patches(some, method)
            assert found.grid.tolist() == [[14, 14]] * 2 and found.features.shape[:2] == (2, 196)
        each = trunk.norm(block.attn.proj(part(2)(block.norm1(hidden[1, 7]))[None]))
        each = trunk.attn_pool(each[:, None]) if pool == "map" else trunk.fc_norm(each)
        given = tower.patches(some, "maskclip").features[1, 6]
        torch.testing.assert_close(given, tower.project(each)[0] if head != "none" else each[0], atol=1e-5, rtol=1e-4)
        tokens = tower.tokens(some)
        torch.testing.assert_close(tokens.pooled, tower.trunk(some))
        torch.testing.assert_close(tokens.patches, trunk.forward_features(some)[:, 1:])
numbers = {"name": "resnet10t", "pool": "avg", "head": "linear", "head_bias": False, "image_size": 64}
assert TimmTower(numbers, 24).patch_methods == ()
print("done")
"""


@requires_open_clip
@pytest.mark.slow
def test_a_vit_of_timm(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    assert run_official(f"sys.path.append({str(ROOT)!r})\n{OF_TIMM}").strip().endswith("done")
