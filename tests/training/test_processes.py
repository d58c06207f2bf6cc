"""Several processes (torchrun with gloo): the numbers of one, whole or in shares (FSDP2), also stopped and continued."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.training.context import Context
from cnclip_ft.training.run import train
from cnclip_ft.training.stage_plan import plan_stages
from data_tools.errors import RequestError
from tests.training.helpers import losses, planned, records, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch` sets from its configuration
MODEL = {"start": {
    "image": {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32},
    "text": {"hidden": 32, "layers": 2, "heads": 2, "dropout": 0.0}, "projection": 16,
}}  # fmt: skip

TRAIN = """
import os, signal, sys
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.run import train

recipe, proceed, stop_at, how = sys.argv[1], sys.argv[2] == "continue", sys.argv[3], sys.argv[4]

def step(trainer):
    if how == "kill" and f"{trainer.plan.name}-{trainer.step}" == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "term" and f"{trainer.plan.name}-{trainer.step + 1}" == stop_at and trainer.context.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)

train(load_recipe(recipe), proceed=proceed, before_step=step)
"""

EXCHANGE = """
import torch, torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from cnclip_ft import collectives

collectives._BUCKET_BYTES = 100  # several buckets
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
sizes = [(3,), (20,), (4, 5), (2, 3, 2, 2), (7,), (), (9,), (30,), (2,)]
parameters = [torch.nn.Parameter(draw(*size)) for size in sizes]
parameters[3].data = parameters[3].data.contiguous(memory_format=torch.channels_last)
parameters[4].data = parameters[4].data.float()
frozen, unused = parameters[6].requires_grad_(False), parameters[1]
trained = [p for p in parameters if p is not frozen and p is not unused]

def loss(step, turned):
    terms = [lambda p=p: (p * (1 + step + dist.get_rank())).tanh().square().sum() for p in trained]
    parts = {n: checkpoint(terms[n], use_reentrant=False) if n == 2 else terms[n]()
             for n in (reversed(range(len(terms))) if turned else range(len(terms)))}
    return sum(part.double() for part in parts.values()) + (frozen * 2).sum()

def right(step, turned):
    expected = torch.autograd.grad(loss(step, turned), trained)
    for grad in expected:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    with collectives.mean_gradients(parameters):
        loss(step, turned).backward()
    assert all(torch.equal(p.grad, grad) and p.grad.stride() == p.stride() for p, grad in zip(trained, expected))
    assert frozen.grad is None and unused.grad is None
    clear()

def clear():
    assert not any(p._post_accumulate_grad_hooks for p in parameters)
    for p in parameters:
        p.grad = None

def check_exchange():
    for step in range(2):
        right(step, turned=dist.get_rank() == 1)  # the engine finishes gradients in another order on each device

    def fail(grad):  # of the last gradient: by then the first buckets are under way
        sent.extend(p for p in trained if p.grad is not None and p.grad.untyped_storage().nbytes() > p.grad.nbytes)
        raise ArithmeticError
    sent, hook = [], trained[0].register_hook(fail)
    try:
        with collectives.mean_gradients(parameters):
            loss(0, False).backward()
    except ArithmeticError:
        hook.remove()
        clear()
    assert sent
    right(3, turned=False)
    try:
        with collectives.mean_gradients(parameters):
            for _ in range(2):
                loss(0, False).backward()
        raise SystemExit("a second gradient was added to one under way")
    except RuntimeError as error:
        assert "twice" in str(error)
        clear()
    right(4, turned=True)
"""
TRAIN = (
    EXCHANGE
    + TRAIN
    + """
if dist.is_initialized() and dist.get_world_size() == 2:
    check_exchange()
sys.stdout.flush()
os._exit(0)  # as the command does where it is one of several
"""
)


def launch(code: str, folder: Path, processes: int, *arguments: str, environment: dict | None = None) -> str:
    script = folder / f"script-{abs(hash(code))}.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # One thread each: more threads than cores make gloo's waits long.
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **(environment or {}))
    done = subprocess.run(
        [*command, str(script), *arguments], env=env, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    if done.returncode and "kill" not in arguments:
        raise AssertionError(done.stdout[-1500:] + done.stderr[-4000:])
    return done.stdout


def two_train_as_one(folder: Path, one: Recipe, two: Recipe) -> None:
    """The recipe `one` here, `two` with two processes: every step has the same loss."""
    assert train(one)
    (folder / "two.yaml").write_text(dump_recipe(two), encoding="utf-8")
    launch(TRAIN, folder, 2, str(folder / "two.yaml"), "new", "never", "")
    here, there = losses(Path(one.output)), losses(Path(two.output))
    assert here.keys() == there.keys() and all(here[key] == pytest.approx(there[key], abs=1e-5) for key in here)


def run(
    stores: Path,
    name: str,
    processes: int,
    stops: tuple[str, ...] = (),
    how: str = "term",
    shares: bool = False,
    model: dict = MODEL,
    **changes,
) -> Path:
    """Train the tiny recipe in `processes`; stop at each of `stops` and continue."""
    recipe = tiny_recipe(stores, output=str(stores / name), model=model, feature_cache=str(stores / "cache"), **changes)
    path = stores / f"{name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    for number, stop in enumerate((*stops, "never")):
        proceed = "continue" if number else "new"
        launch(
            TRAIN,
            stores,
            processes,
            str(path),
            proceed,
            stop,
            how if stop != "never" else "term",
            environment=FSDP2 if shares else None,
        )
    return stores / name


def same_weights(ours: Path, theirs: Path) -> float:
    """Largest difference between two runs' last weights."""
    a, b = (load_file(folder / "contrast" / "last" / "model.safetensors") for folder in (ours, theirs))
    # A key's bias has no gradient but rounding (softmax does not see a shift), and Adam blows that up.
    seen = [key for key in b if not key.endswith(("key.bias", "k_proj.bias"))]
    return max((a[key] - b[key]).abs().max().item() for key in seen)


@pytest.fixture(scope="module")
def one(stores) -> Path:
    return run(stores, "one", 1, contrast={"interpolate": 2})


@pytest.mark.parametrize(
    "micro,shares",
    [
        pytest.param(None, False, id="whole", marks=pytest.mark.slow),
        pytest.param(2, True, id="fsdp2, accumulated", marks=pytest.mark.slow),
        pytest.param(2, False, id="whole, accumulated", marks=pytest.mark.slow),
        pytest.param(None, True, id="fsdp2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(stores, one, micro, shares):
    # Checkpointing changes no number: beside a frozen tower in the first stage, of both towers in the second.
    checkpointed = {"gradient_checkpointing": "both"}
    two = run(
        stores,
        f"two-{micro}-{shares}",
        2,
        shares=shares,
        align=checkpointed,
        contrast=checkpointed | {"micro_batch_size": micro, "interpolate": 2},
    )
    assert losses(two).keys() == losses(one).keys()
    assert max(abs(value - losses(one)[key]) for key, value in losses(two).items()) < 1e-5
    assert same_weights(two, one) < 1e-4
    # Adam makes a step of rounding where a gradient is nothing else: updates are as near as that lets them be.
    near = {"gradient_norms": 1e-3, "relative_updates": 1e-2, "loss": 1e-4, "training_loss": 1e-4}
    for kind in ("train", "validation"):
        for ours, theirs in zip(records(two, kind), records(one, kind), strict=True):
            assert near.keys() & ours.keys() == near.keys() & theirs.keys()
            for name in near.keys() & ours.keys():
                assert ours[name] == pytest.approx(theirs[name], rel=near[name]), (ours["stage"], ours["step"], name)
    mixed = [[(each["alpha"], each["score"]) for each in records(folder, "interpolation")] for folder in (one, two)]
    assert mixed[0] == mixed[1] and len(mixed[0]) > 1
    recalls = [(folder / "report" / "recall.txt").read_text(encoding="utf-8") for folder in (one, two)]
    assert recalls[0] == recalls[1]


RESNET = {
    "start": MODEL["start"]
    | {
        "image": {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 8, "heads": 4, "image_size": 64},
    }
}


@pytest.mark.slow
def test_two_processes_equal_one_with_batch_norm_that_stands_still(stores):
    frozen = {"model": RESNET, "contrast": {"batch_norm": "frozen"}}
    one, two = run(stores, "norm-one", 1, **frozen), run(stores, "norm-two", 2, **frozen)
    assert max(abs(value - losses(one)[key]) for key, value in losses(two).items()) < 1e-5
    assert same_weights(two, one) < 1e-4


def test_statistics_of_processes_without_cards_are_refused(stores, monkeypatch):
    """Each would have its own; frozen, of a frozen tower and of one process they are not. Said before the first stage trains."""
    found = {}
    for name, changes in {
        "trains": {"model": RESNET},
        "frozen": {"model": RESNET, "contrast": {"batch_norm": "frozen"}},
        "without": {"model": MODEL},
    }.items():
        context, model, plans = planned(tiny_recipe(stores, output=str(stores / "refused"), **changes))
        found[name] = context, model
        assert len(plans) == 2  # one process
    monkeypatch.setattr(Context, "world", 2)
    said = r"stages.contrast: .*visual.bn1\), which 2 processes share on GPUs.*contrast.batch_norm=frozen"
    with pytest.raises(RequestError, match=said):
        plan_stages(*found["trains"])
    assert len(plan_stages(*found["frozen"])) == len(plan_stages(*found["without"])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shares", [False, True], ids=["whole", "fsdp2"])
def test_two_processes_stopped_and_continued_equal_uninterrupted(stores, shares):
    """A stop asked of one process only stops both; with accumulation, averaged weights and the feature cache."""
    changes = {"align": {"ema": 0.9}, "contrast": {"micro_batch_size": 2, "ema": 0.9}}
    whole = run(stores, f"uninterrupted-{shares}", 2, shares=shares, **changes)
    parts = run(stores, f"stopped-{shares}", 2, ("align-2", "align-5", "contrast-4"), shares=shares, **changes)
    assert losses(parts) == losses(whole)
    a, b = (load_file(folder / "contrast" / "last" / "model.safetensors") for folder in (parts, whole))
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.slow
def test_two_processes_killed_between_saves_continue_from_the_last_one(stores):
    whole = run(stores, "unkilled", 2)
    parts = run(stores, "killed", 2, ("align-5", "contrast-4"), how="kill")
    assert losses(parts) == losses(whole)
    a, b = (load_file(folder / "contrast" / "last" / "model.safetensors") for folder in (parts, whole))
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.slow
def test_low_rank_updates_begin_equal_on_all_processes(stores):
    lora = {"train": [{"tower": "image", "lora": {"rank": 2}}, {"tower": "text"}, {"tower": "temperature"}], "steps": 3}
    one, two = (run(stores, f"lora-{processes}", processes, contrast=lora) for processes in (1, 2))
    assert max(abs(value - losses(one)[key]) for key, value in losses(two).items()) < 1e-5
    assert same_weights(two, one) < 1e-4


GRADIENTS = """
import gc, os, sys
from contextlib import nullcontext
import torch, torch.distributed as dist
from cnclip_ft.collectives import mean_gradients
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.optimizer import give_bias
from cnclip_ft.training.sharding import Sharded, Whole
from tests.training.helpers import random_batch, tiny_model

torch.set_default_dtype(torch.float32)
dist.init_process_group("gloo")
ranks, rank = dist.get_world_size(), dist.get_rank()

def gradients():
    found = {}
    for shares in (False, True):
        sharding = Sharded(torch.device("cpu"), reshard=True) if shares else Whole()
        for micro in (None, 1):
            for frozen in (False, True):
                for kind in (ContrastiveObjective, SigmoidObjective):
                    model, objective = tiny_model(dropout=0.0).double(), kind(tile=3)
                    give_bias(model, objective)
                    model.image_tower.vision_model.requires_grad_(not frozen)
                    batch = random_batch(model, 8)
                    rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
                    share = {key: value[rows] for key, value in batch.items()}
                    trained = sharding.place(model)
                    step = GradientStep(trained, objective, micro_batch_size=micro, autocast=nullcontext,
                                        backward=lambda loss: loss.backward(), sharding=sharding)
                    loss = step(share).loss
                    grads = {n: sharding.full(p.grad) for n, p in trained.named_parameters() if p.grad is not None}
                    found[shares, micro, frozen, kind.__name__] = {"loss": loss, **grads}
    return found

def exchanged_as_it_goes():
    # The bits of gradients exchanged while the backward runs, and of those added and halved behind it.
    found = []
    for waits in (False, True):
        model = tiny_model(dropout=0.0).double()
        features = model(**{key: value[rank * 4 : rank * 4 + 4] for key, value in random_batch(model, 8).items()
                            if key in ("pixels", "input_ids", "attention_mask")})
        loss = sum(part.square().sum(0).cumsum(0).prod() for part in features)
        with nullcontext() if waits else mean_gradients(model.parameters()):
            loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        for grad in grads if waits else ():
            dist.all_reduce(grad)
            grad /= 2
        found.append(grads)
    assert len(found[0]) == len(found[1]) > 20 and all(map(torch.equal, *found))

if ranks == 2:
    exchanged_as_it_goes()
found = gradients()
if rank == 0:
    torch.save(found, sys.argv[1])
# gloo's threads end with their groups, which meshes and shared weights hold. Those that are left when the interpreter ends may still
# let go of a tensor, ask for its lock, and are ended in the middle of that: "terminate called without an active exception".
del found
gc.collect()
dist.barrier()  # a process that leaves while others still talk may be ended by its threads
dist.destroy_process_group()
os._exit(0)
"""


@pytest.mark.slow
def test_gradients_of_two_and_four_processes_are_those_of_one(tmp_path):
    """Float64; with and without accumulation, a frozen tower, both objectives, whole weights and shares. Of two processes, an
    exchange beside the backward gives the very bits of one behind it."""
    found = {}
    for processes in (1, 2, 4):
        launch(GRADIENTS, tmp_path, processes, str(tmp_path / f"{processes}.pt"))
        found[processes] = torch.load(tmp_path / f"{processes}.pt")
    reference = found[1]
    for processes in (1, 2, 4):
        for (shares, micro, frozen, kind), grads in found[processes].items():
            expected = reference[False, None, frozen, kind]
            assert grads.keys() == expected.keys()
            assert any(name.startswith("image_tower.vision_model") for name in grads) is not frozen
            for name, tensor in grads.items():
                torch.testing.assert_close(
                    tensor, expected[name], atol=1e-10, rtol=1e-8, msg=f"{processes} {shares} {micro} {name}"
                )


@pytest.mark.parametrize(
    "environment,changes,says",
    [
        ({"FSDP_VERSION": "1"}, {}, "set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params, which is not supported"),
        ({}, {"contrast": {"micro_batch_size": "auto"}}, "micro_batch_size: auto.*micro_batch_size=N"),
        (
            {},
            {
                "contrast": {
                    "train": [
                        {"tower": "image", "lora": {"rank": 2}},
                        {"tower": "text", "rate": 0},
                        {"tower": "temperature"},
                    ]
                }
            },
            "LoRA trains too little",
        ),
    ],
)
def test_what_shares_cannot_do_is_refused(stores, monkeypatch, environment, changes, says):
    import torch.distributed as dist

    from data_tools.errors import RequestError

    for name, value in (FSDP2 | environment).items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RequestError, match=says):
            planned(tiny_recipe(stores, output=str(stores / "refused"), **changes))
    finally:
        dist.destroy_process_group()
