"""The loss of the validation pool: against loops in double precision, over one device and several."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.stage_plan import plan_stage
from cnclip_ft.training.validation_loss import ValidationLoss
from tests.training.helpers import planned, tiny_recipe
from tests.training.test_processes import launch

TOKENIZER = SimpleNamespace(prepare=str.lower)


def pool(images: int = 12, texts: int = 40, seed: int = 0) -> SplitFeatures:
    """A picture has several texts, two texts read alike, and one belongs to two pictures."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return F.normalize(torch.randn(count, 6, generator=generator), dim=1)

    words = [f"text {number}" for number in range(texts)]
    words[7] = words[3].upper()
    pairs = [(number % images, number) for number in range(texts)] + [(5 % images, 0)]
    return SplitFeatures(
        image_ids=list(range(images)), text_ids=list(range(texts)), texts=words, languages=[None] * texts,
        positives=torch.tensor(pairs), image_features=draw(images), text_features=draw(texts),
    )  # fmt: skip


def model(scale: float = 2.0, bias: float | None = None):
    logit_bias = None if bias is None else torch.tensor(bias)
    return SimpleNamespace(device=torch.device("cpu"), logit_scale=torch.tensor(scale), logit_bias=logit_bias)


def by_hand(features, batch, scale, bias, positives, sigmoid=False):
    """The loss of a batch of pairs by its definition, an entry at a time."""
    pairs = features.positives[batch].tolist()
    words = [features.texts[text].lower() for _, text in pairs]
    x = torch.stack([features.image_features[image] for image, _ in pairs]).double()
    y = torch.stack([features.text_features[text] for _, text in pairs]).double()
    z, n = torch.tensor(scale).double().exp() * x @ y.T, len(pairs)
    same = [[pairs[i][0] == pairs[j][0] or words[i] == words[j] for j in range(n)] for i in range(n)]
    total = 0.0
    for i in range(n):
        for row in () if sigmoid else (z[i], z[:, i]):
            left = [row[j] for j in range(n) if j == i or positives == "ignore" or not same[i][j]]
            total += float(torch.stack(left).logsumexp(0) - row[i]) / (2 * n)
        for j in range(n if sigmoid else 0):
            if i == j or not same[i][j]:
                total -= float(F.logsigmoid((1 if i == j else -1) * (z[i, j] + bias))) / n
    return total


@pytest.mark.parametrize("size", [8, 16, 41, 1000])
@pytest.mark.parametrize("positives", ["exclude", "ignore"])
def test_it_is_the_mean_over_batches_of_the_stage(size, positives):
    features, objective = pool(), ContrastiveObjective(positives, tile=3)
    loss = ValidationLoss(objective, size, TOKENIZER, seed=3)
    found = loss(model(), features)
    batches = loss._order.epoch(0)
    assert batches.shape == (max(41 // size, 1), min(size, 41)) == (found.batches, found.pairs)
    assert len(set(batches.ravel().tolist())) == batches.size  # no pair twice
    expected = [by_hand(features, batch, 2.0, None, positives) for batch in batches]
    assert found.value == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert loss(model(), features) == found  # the same batches again
    assert ValidationLoss(objective, size, TOKENIZER, seed=3)(model(), features) == found
    other = ValidationLoss(objective, size, TOKENIZER, seed=4)(model(), features)
    assert (other.value == pytest.approx(found.value)) == (size >= 41)  # one batch of all has one loss


def test_a_sigmoid_has_it_with_its_bias_alone():
    features, loss = pool(), ValidationLoss(SigmoidObjective(tile=5), 16, TOKENIZER, seed=0)
    assert loss(model(), features) is None
    found = loss(model(bias=-3.0), features)
    expected = [by_hand(features, batch, 2.0, -3.0, "exclude", sigmoid=True) for batch in loss._order.epoch(0)]
    assert found.value == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_pools_that_say_nothing():
    def loss(features):
        return ValidationLoss(ContrastiveObjective(), 8, TOKENIZER, seed=0)(model(), features)

    assert loss(None) is None
    assert loss(pool(images=1, texts=9)) is None  # every batch shows one picture
    single = pool()
    single.positives = single.positives[:1]
    assert loss(single) is None


def test_stages_that_do_not_learn_from_pairs_have_none(stores):
    context, built, plans = planned(tiny_recipe(stores, output=str(stores / "kinds")))
    assert ValidationLoss.of(context, plans[0]).batch_size == 8
    setting = context.recipe.stages["contrast"]
    assert ValidationLoss.of(context, plan_stage(context, built, 1, "contrast", setting)) is not None
    apart = SimpleNamespace(apart=context.pairs, objective=plans[0].objective)
    assert ValidationLoss.of(context, apart) is None
    assert ValidationLoss.of(context, SimpleNamespace(apart=None, objective=object())) is None


SHARED = """
import pickle, sys
from pathlib import Path
import torch.distributed as dist
from cnclip_ft.training.loss import ContrastiveObjective
from cnclip_ft.training.validation_loss import ValidationLoss
from tests.training.test_validation_loss import TOKENIZER, model, pool

dist.init_process_group("gloo")
found = [ValidationLoss(ContrastiveObjective(tile=3), size, TOKENIZER, seed=3)(model(), pool()) for size in (8, 40, 1000)]
gathered = [None] * dist.get_world_size()
dist.all_gather_object(gathered, found)
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_bytes(pickle.dumps(gathered))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_several_devices_have_the_loss_of_one(tmp_path):
    launch(SHARED, tmp_path, 2, str(tmp_path / "found"))
    first, other = pickle.loads((tmp_path / "found").read_bytes())
    assert first == other
    for found, size in zip(first, (8, 40, 40), strict=True):  # of 41 pairs two devices take 40 at once
        alone = ValidationLoss(ContrastiveObjective(tile=3), size, TOKENIZER, seed=3)(model(), pool())
        assert found.value == pytest.approx(alone.value, rel=1e-6) and found.pairs == alone.pairs
