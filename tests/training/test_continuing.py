"""Going on: with the same data and model wherever they lie, in a folder that is one run's at a time, never from broken bytes."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.kept import Kept
from cnclip_ft.training.run import train
from cnclip_ft.training.run_folder import held, run_of
from cnclip_ft.training.run_state import load_state, save_state
from data_tools.errors import RequestError, UserError
from tests.training.helpers import losses, planned, stopped_after, tiny_model, tiny_recipe, write_store

ROOT = Path(__file__).resolve().parents[2]


def recipe_of(stores, folder, **changes):
    return tiny_recipe(stores, output=str(folder), feature_cache=str(stores / "cache"), **changes)


@pytest.fixture(scope="module")
def whole(stores):
    assert train(recipe_of(stores, stores / "whole"))
    return stores / "whole"


@pytest.fixture(scope="module")
def stopped_once(stores):
    assert train(recipe_of(stores, stores / "stopped"), **stopped_after(("contrast", 4))) is False
    return stores / "stopped"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run stopped in its second stage, moved to another place under another name."""
    shutil.copytree(stopped_once, tmp_path / "elsewhere" / "renamed")
    return tmp_path / "elsewhere" / "renamed"


def test_a_stopped_run_has_its_report(stopped_once):
    page = (stopped_once / "report" / "index.html").read_text(encoding="utf-8")
    assert "Stopped. Continue with: cnclip-ft train" in page and "after align" in page and page.count("<svg") == 9
    assert not (stopped_once / "report" / "recall.json").exists()


def same_end(ours: Path, theirs: Path) -> bool:
    a, b = (load_file(folder / "contrast" / "last" / "model.safetensors") for folder in (ours, theirs))
    return losses(ours) == losses(theirs) and all(torch.equal(a[key], b[key]) for key in b)


# ---- the folder ---------------------------------------------------------------------------------------------------


def test_a_moved_run_goes_on_where_its_recipe_lies(stores, whole, stopped, monkeypatch, capsys):
    from cnclip_ft import cli

    shutil.move(stopped, stopped.parent.parent / "again")
    place, before = stopped.parent.parent / "again", sorted(p.name for p in (stores / "stopped").rglob("*"))
    data = [f"data.{key}={stores / 'copies' / key}" for key in ("train", "valid")]
    for key in ("train", "valid"):
        shutil.copytree(stores / key, stores / "copies" / key, dirs_exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", "train", str(place / "recipe.yaml"), "--continue", *data])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    assert same_end(place, whole)
    assert sorted(p.name for p in (stores / "stopped").rglob("*")) == before  # the copy is a run of its own


def test_the_line_that_is_said_goes_on_with_a_tower_of_ones_own(stores, tmp_path, monkeypatch, capsys):
    from cnclip_ft import cli

    start = {
        "image": "tests.models.tower_fixture:plain",
        "text": {"hidden": 32, "layers": 1, "heads": 2},
        "projection": 16,
    }
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(stores, tmp_path / "a run", model={"start": start})
    assert train(recipe, **stopped_after(("contrast", 2))) is False
    line = capsys.readouterr().out.partition("Stopped. Continue with: ")[2].splitlines()[0]
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "a run/report/recall.json").exists()


def test_a_recipe_beside_no_run_names_its_own_output(tmp_path, stopped):
    (tmp_path / "recipe.yaml").write_text((stopped / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert run_of(tmp_path / "recipe.yaml") is None and run_of(stopped / "recipe.yaml") == stopped


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_in_one_folder_are_refused(stores, stopped, overwrite):
    before = sorted(path.name for path in stopped.rglob("*"))
    with held(stopped), pytest.raises(RequestError, match=rf"another process is training.*process {os.getpid()} on"):
        train(recipe_of(stores, stopped), proceed=not overwrite, overwrite=overwrite)
    assert sorted(path.name for path in stopped.rglob("*")) == before


def test_a_lock_left_by_a_dead_process_is_nobodys(stores, whole, stopped):
    (stopped / "cnclip-ft.lock").write_text('{"pid": 1, "host": "elsewhere"}')
    assert train(recipe_of(stores, stopped), proceed=True) and same_end(stopped, whole)
    assert not (stopped / "cnclip-ft.lock").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"contrast": {"batch_size": 1000}},
        {"model": {"start": {"architecture": "huge"}}},
        {"contrast": {"epochs": 1, "steps": None, "warmup_steps": 900}},
        {"align": {"patch_dropout": 0.2}, "model": {"start": {"architecture": "RN50"}}},
    ],
)
def test_a_refused_start_leaves_nothing(stores, tmp_path, changes):
    with pytest.raises(RequestError):
        train(recipe_of(stores, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_start_that_failed_before_its_first_state_is_no_run(stores, whole, tmp_path, monkeypatch):
    def broken(self, model):
        raise OSError(5, "Input/output error")

    from cnclip_ft.training.validation import Judge

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "__call__", broken)
        with pytest.raises(UserError, match=r"Input/output error.\nThere is no state yet"):
            train(recipe_of(stores, tmp_path / "run"))
    with pytest.raises(RequestError, match="before its first state.*without --continue"):
        train(recipe_of(stores, tmp_path / "run"), proceed=True)
    assert train(recipe_of(stores, tmp_path / "run")) and same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "name", ["journal.jsonl", "align/best/photo.jpg", "state/mine", "recipe.yaml", "cnclip-ft.lock"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_the_user_are_not_overwritten(stores, tmp_path, name, overwrite):
    mine = tmp_path / "photos" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(RequestError, match="not overwritten"):
        train(recipe_of(stores, tmp_path / "photos"), overwrite=overwrite)
    assert mine.read_text() == "mine" and len(list((tmp_path / "photos").rglob("*"))) == len(Path(name).parts)


def test_overwriting_leaves_what_no_run_wrote(stores, whole, stopped):
    names = ("notes.txt", "state/notes.txt", "align/notes.txt", "backup/best/model.safetensors")
    (stopped / "backup/best").mkdir(parents=True)
    for name in names:
        (stopped / name).write_text("mine")
    assert train(recipe_of(stores, stopped), overwrite=True) and same_end(stopped, whole)
    assert all((stopped / name).read_text() == "mine" for name in names)


def test_a_recipe_with_words_of_the_user_is_not_replaced(stores, stopped_once, tmp_path):
    written = (stopped_once / "recipe.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(f"# the one that worked\n{written}", encoding="utf-8")
    with pytest.raises(RequestError, match="recipe.yaml is there already.*not overwritten"):
        train(recipe_of(stores, tmp_path))


def test_between_stages_nothing_depends_on_what_was_drawn_before(stores, tmp_path):
    """Low-rank updates are drawn when a stage begins, also where the run goes on from the end of the one before."""
    lora = [{"tower": "image", "lora": {"rank": 2}}, {"tower": "text"}, {"tower": "temperature"}]
    short = {"steps": 2, "validate_every": 2}
    recipes = [
        recipe_of(stores, tmp_path / name, align=short, contrast={"train": lora, **short})
        for name in ("whole", "parts")
    ]
    assert train(recipes[0])
    assert train(recipes[1], **stopped_after(("contrast", 1))) is False
    last, newest = sorted((tmp_path / "parts/state").glob("state-*.pt"))
    newest.unlink()
    assert torch.load(last, weights_only=True)["stage"] == 0
    assert train(recipes[1], proceed=True) and same_end(tmp_path / "parts", tmp_path / "whole")


def test_what_is_no_state_of_a_run_is_passed_over(tmp_path):
    save_state(tmp_path, 1, {"step": 1})
    said = []
    for other in ([1, 2], {"text_projection": torch.ones(2)}):
        torch.save(other, tmp_path / "state-000000009.pt")
        assert load_state(tmp_path, said.append)["step"] == 1
    assert all("not the state of a run" in text for text in said)
    save_state(tmp_path, 2, {"step": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-000000001.pt", "state-000000002.pt"]


@pytest.mark.parametrize("place", ["train", ".", "train/inside"])
def test_a_run_folder_over_its_data_is_refused(stores, place):
    with pytest.raises(RequestError, match="which is read here"):
        train(recipe_of(stores, stores / place), overwrite=True)


# ---- the data, the model and the recipe ---------------------------------------------------------------------------


def _other(folder, seed=7):
    return str(write_store(folder, images=20, captions=2, seed=seed))


def _reordered(stores, folder):
    from data_tools.store import StoreWriter, open_store

    source = open_store(stores / "train")
    with StoreWriter(folder) as writer:
        for image_id in source.image_ids:
            writer.add_image(image_id, source.image(image_id))
        for pair in reversed(list(source.pairs())):
            writer.add_pair(pair.image_id, pair.text_id, pair.text, pair.language)
        writer.finish()
    return str(folder)


@pytest.mark.parametrize("which", ["train", "order", "valid", "names", "model", "rate"])
def test_other_data_model_or_recipe_is_refused(stores, stopped, tmp_path, which):
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 0}
    changes, says = {
        "train": (
            lambda: {"data": data | {"train": _other(tmp_path / "o")}},
            r"data.train: .* holds other data.*checksum",
        ),
        "order": (
            lambda: {"data": data | {"train": _reordered(stores, tmp_path / "o")}},
            r"data.train: .*in another order",
        ),
        "valid": (lambda: {"data": data | {"valid": _other(tmp_path / "o")}}, r"data.valid: .* holds other data"),
        "names": (lambda: {"data": data | {"valid": {"mine": data["valid"]}}}, "splits valid; data.valid now has mine"),
        "model": (lambda: {"model": {"start": {"architecture": "RN50"}}}, r"model.start: .*another model.*image"),
        "rate": (lambda: {"contrast": {"learning_rate": 5e-4}}, r"contrast.learning_rate: 0.001 → 0.0005"),
    }[which]
    before = load_state(stopped / "state", print)["step"]
    with pytest.raises(RequestError, match=says):
        train(recipe_of(stores, stopped, **changes()), proceed=True)
    assert load_state(stopped / "state", print)["step"] == before  # still there to go on from


def test_what_may_change(stores, whole, stopped):
    free = {"align": {"skip_bad_steps": 2}, "contrast": {"gradient_checkpointing": "both", "skip_bad_steps": 2}}
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 1, "max_damaged_images": 50}
    assert train(recipe_of(stores, stopped, data=data, save_every=1, **free), proceed=True)
    assert losses(stopped).keys() == losses(whole).keys()


# ---- states -------------------------------------------------------------------------------------------------------


def test_states_of_the_version_before_are_read(stores, whole, stopped):
    for path in (stopped / "state").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        for key in ("identity", "unjudged"):
            del state[key]
        del state["selection"]["sums"]
        torch.save(state, path)
    assert train(recipe_of(stores, stopped), proceed=True) and same_end(stopped, whole)


def test_a_broken_bit_in_a_state_of_the_version_before_is_noticed(tmp_path):
    torch.save({"step": 1, "weights": torch.arange(1000.0)}, tmp_path / "state-000000001.pt")
    assert load_state(tmp_path, print)["step"] == 1
    with zipfile.ZipFile(tmp_path / "state-000000001.pt") as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    _flip(tmp_path / "state-000000001.pt", largest.header_offset + 2000)
    with pytest.raises(UserError, match="every state is broken"):
        load_state(tmp_path, lambda text: None)


def _flip(path: Path, at: int, bit: int = 0x40) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def test_flips_and_cuts_of_states_are_noticed(tmp_path):
    """Each falls back, and says so; CNCLIP_FT_FLIPS=N tries more."""
    chance = random.Random(0)
    for number in (1, 2):
        save_state(tmp_path, number, {"step": number, "weights": torch.randn(500), "nested": [{"a": torch.ones(3)}]})
    newest = tmp_path / "state-000000002.pt"
    good = newest.read_bytes()
    spots = [0, len(good) - 1, len(good) - 65, len(good) - 66, len(good) - 70]
    spots += [chance.randrange(len(good)) for _ in range(int(os.environ.get("CNCLIP_FT_FLIPS", 60)))]
    for at in spots:
        said = []
        for damage in (
            lambda at=at: _flip(newest, at, 1 << chance.randrange(8)),
            lambda at=at: newest.write_bytes(good[:at]),
        ):
            damage()
            assert load_state(tmp_path, said.append)["step"] == 1, at
            newest.write_bytes(good)
        assert len(said) == 2 and all("broken" in text for text in said)
    assert load_state(tmp_path, print)["step"] == 2
    newest.write_bytes(good[:100])
    (tmp_path / "state-000000001.pt").write_bytes(b"")
    with pytest.raises(UserError, match="every state is broken.*start a new run"):
        load_state(tmp_path, lambda text: None)


@pytest.mark.parametrize("name", ["best", "start"])
def test_a_kept_checkpoint_changed_since_is_noticed(tmp_path, name):
    """The weights a stage ends with come from there."""
    model, kept = tiny_model(), Kept(tmp_path / "contrast", writes=True)
    kept.save(name, model, {})
    assert torch.equal(kept.weights(name, model)["logit_scale"], model.logit_scale)
    weights = tmp_path / "contrast" / name / "model.safetensors"
    _flip(weights, weights.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"contrast/{name}: the weights are not those"):
        kept.weights(name, model)


# ---- faults on the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["validation", "loader", *(pytest.param(name, marks=pytest.mark.slow) for name in ("journal", "damaged"))]
)
def test_a_fault_between_steps_loses_no_step(stores, whole, tmp_path, monkeypatch, fault):
    """The state of all steps is written first; with the fault mended the run ends as an untroubled one."""
    from cnclip_ft.training import journal
    from cnclip_ft.training.validation import Judge

    recipe = recipe_of(stores, tmp_path / "run")
    judge, write, hook = Judge.__call__, journal.Journal.write, None

    def gone(self, model):
        if (tmp_path / "run/contrast/last").exists():
            raise RequestError("demo/valid is gone")
        return judge(self, model)

    def full(self, kind, line=None, **values):
        if (values.get("stage"), values.get("step")) == ("contrast", 6) and kind == "validation":
            with self._told():
                raise OSError(28, "No space left on device")
        return write(self, kind, line, **values)

    def failing(trainer):
        if (trainer.plan.name, trainer.step) == ("contrast", 5):
            raise (
                UserError("11 damaged images") if fault == "damaged" else OSError(5, "Input/output error", "data.mdb")
            )

    with monkeypatch.context() as patch:
        if fault == "validation":
            patch.setattr(Judge, "__call__", gone)
        elif fault == "journal":
            patch.setattr(journal.Journal, "write", full)
        else:
            hook = failing
        with pytest.raises(
            UserError, match=r"\nThe newest state is of stage contrast, step [56]. Continue with: "
        ) as said:
            train(recipe, before_step=hook)
    assert len(str(said.value).splitlines()) == 2
    assert load_state(tmp_path / "run/state", print)["step"] == {"validation": 6, "journal": 6}.get(fault, 5)
    assert train(recipe, proceed=True) and same_end(tmp_path / "run", whole)


def test_a_journal_cut_off_in_a_line_goes_on_in_the_next(stores, whole, stopped):
    with open(stopped / "journal.jsonl", "ab") as file:
        file.write(b'{"time": 1, "kind": "tra')
    assert train(recipe_of(stores, stopped), proceed=True)
    lines = (stopped / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("{") and line.endswith("}") for line in lines) == len(lines) - 1
    assert json.loads(lines[-1])["kind"] == "done"


@pytest.mark.parametrize(
    "environment,says",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed; .*accelerate_fsdp2.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1; set fsdp_version: 2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8; .*precision=bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ".*compile=true"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ".*micro_batch_size"),
        ({"ACCELERATE_USE_XLA": "true"}, "TPUs"),
    ],
)
def test_other_engines_of_accelerate_are_refused(stores, tmp_path, monkeypatch, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=f"accelerate's configuration asks for {says}"):
        train(recipe_of(stores, tmp_path / "run"))
    with pytest.raises(RequestError, match=says):
        planned(recipe_of(stores, tmp_path / "run"))


def test_every_setting_of_a_written_recipe_marks_a_run(stores, stopped):
    content = yaml.safe_load((stopped / "recipe.yaml").read_text(encoding="utf-8"))
    assert run_of(stopped / "recipe.yaml") == stopped and load_recipe(stopped / "recipe.yaml").seed == content["seed"]
