"""Mean weights: the mean itself, the greedy way, what cannot be averaged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.cli import app
from cnclip_ft.evaluation.soup import Mean, average
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.evaluation.tiny import make_checkpoint, make_store


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A store; a checkpoint, two near it, one whose weights are noise, one of another start."""
    folder = tmp_path_factory.mktemp("soup")
    make_store(folder / "valid")
    model, _ = build_start({"architecture": "tiny"}, seed=0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, spread in (("a", 0.0), ("b", 0.02), ("c", 0.02), ("noise", 3.0)):
        noise = torch.Generator().manual_seed(len(name) + ord(name[0]))
        model.load_state_dict(
            {
                key: tensor + spread * torch.randn(tensor.shape, generator=noise)
                if tensor.is_floating_point()
                else tensor
                for key, tensor in start.items()
            }
        )
        save_checkpoint(model, folder / name, info={})
    return folder


def test_the_mean_is_the_mean(runs, tmp_path):
    made = average([str(runs / name) for name in "abc"], tmp_path / "mean")
    assert made.members == [str(runs / name) for name in "abc"] and made.judged == [] and made.winner is None
    parts = [load(runs / name).state_dict() for name in "abc"]
    for name, tensor in load(tmp_path / "mean").state_dict().items():
        exact = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "mean/cnclip_ft.json").read_text(encoding="utf-8"))["average_of"] == made.members


def test_counters_are_the_first_ones_and_equal_weights_stay_to_the_bit():
    own = {"weight": torch.randn(5), "count": torch.tensor(3)}
    mean = Mean()
    for other in (own, own, own | {"count": torch.tensor(9)}):
        mean.take(other)
    assert torch.equal(mean.weights["weight"], own["weight"]) and mean.weights["count"] == 3


def test_the_greedy_way_leaves_out_what_harms(runs, tmp_path):
    """Every candidate's score is that of its weights, judged anew here; the best of all is what was written."""
    names = [str(runs / name) for name in ("noise", "a", "b", "c")]
    made = average(names, tmp_path / "mean", [runs / "valid"])
    singles, uniform, greedy = made.judged[:4], made.judged[4], made.judged[5:]
    assert [each.members for each in singles] == [[name] for name in names] and uniform.members == names
    order = [each.members[0] for each in sorted(singles, key=lambda each: -each.score)]
    members, score = order[:1], max(each.score for each in singles)
    for tried, name in zip(greedy, order[1:], strict=True):
        assert tried.members == [*members, name]
        assert tried.name == ("greedy" if tried.score >= score else "greedy, tried")
        if tried.score >= score:
            members, score = tried.members, tried.score
    assert made.winner is not None and made.winner.score == max(each.score for each in made.judged)
    assert names[0] not in made.members
    again = cnclip_ft.evaluate(tmp_path / "mean", runs / "valid").scores
    assert next(iter(again.values())).mean_recall == pytest.approx(made.winner.score)


def test_equal_weights_are_told(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "again")
    for other, alike in ((tmp_path / "again", True), (runs / "b", False)):
        output = tmp_path / f"mean-{alike}"
        done = CliRunner().invoke(app, ["average", str(runs / "a"), str(other), "--output", str(output)])
        assert done.exit_code == 0, done.output
        assert ("hold the same weights" in " ".join(done.output.split())) == alike


def test_what_cannot_be_averaged_is_refused_and_nothing_is_written(runs, tmp_path):
    other = make_checkpoint(tmp_path / "other")
    a, b = str(runs / "a"), str(runs / "b")
    taken = make_store(tmp_path / "taken")
    for checkpoints, output, says in (
        ([a], "out", "at least two"),
        ([a, a], "out", "named twice"),
        ([a, b], taken, "no checkpoint of ours"),
        ([a, b], other, "--overwrite"),
        ([a, b], runs / "a", "which is read here"),
        ([a, str(tmp_path / "none")], "out", "none"),
    ):
        with pytest.raises(RequestError, match=says):
            average(checkpoints, tmp_path / output if output == "out" else output)
    assert not (tmp_path / "out").exists()


def test_another_model_is_told_by_what_differs(runs, tmp_path):
    cut, _ = build_start({"architecture": "tiny"}, seed=0)
    cut.tokenizer = cut.tokenizer.with_context_length(20)
    save_checkpoint(cut, tmp_path / "cut", info={})
    with pytest.raises(RequestError, match="context_length.* differ"):
        average([str(runs / "a"), str(tmp_path / "cut")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    line = [
        "average",
        str(runs / "a"),
        str(runs / "noise"),
        "--judge",
        str(runs / "valid"),
        "--output",
        str(tmp_path / "m"),
    ]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0 and "uniform" in done.output and "flatters" in done.output
    again = CliRunner().invoke(app, line)
    assert isinstance(again.exception, RequestError) and "--overwrite" in str(again.exception)
    assert CliRunner().invoke(app, [*line, "--overwrite"]).exit_code == 0


def test_weights_that_are_no_numbers_are_refused(runs, tmp_path):
    model = load(runs / "b")
    with torch.no_grad():
        model.logit_scale.fill_(float("nan"))  # recall does not see it
    save_checkpoint(model, tmp_path / "broken", info={})
    with pytest.raises(RequestError, match="logit_scale holds NaN"):
        average([str(runs / "a"), str(tmp_path / "broken")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
