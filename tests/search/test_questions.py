"""Words, pictures, both, and not this; the engine, the threshold, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.commands import search as commands
from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.engine.quick_text import use_half_products
from cnclip_ft.search.index.folder import Index
from cnclip_ft.search.index.pictures import uploaded_pixels
from data_tools.errors import RequestError, UserError
from tests.evaluation import tiny
from tests.models.helpers import VIT, small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engine(index):
    return open_engine(index, device="cpu")


@pytest.fixture(scope="module")
def truth(index, checkpoint):
    """Scores of all pictures for a vector made by hand, as (keys, function)."""
    opened, model = Index(index), cnclip_ft.load(checkpoint)
    features = torch.from_numpy(opened.features)

    def best(vector, count):
        scores = features.double() @ F.normalize(vector, dim=0).double()
        order = scores.argsort(descending=True, stable=True)[:count]
        return [opened.key(int(number)) for number in order], scores[order]

    return model, best


def same(found, expected) -> None:
    assert [hit.key for hit in found] == expected[0]
    assert torch.allclose(torch.tensor([hit.score for hit in found]).double(), expected[1], atol=1e-5)


def test_words_pictures_and_what_is_not_wanted(engine, truth):
    model, best = truth
    text, other = model.encode_texts(["一只在雪地里奔跑的狗", "a red car"])
    data = tiny.png(1234)
    picture = model.encode_images([data])[0]
    pixels = uploaded_pixels(data, model.image_tower.preprocessing)
    asked = [
        (Question("一只在雪地里奔跑的狗", top=7), text),
        (Question(pixels=pixels, top=7), picture),
        (Question("a red car", pixels=pixels, image_share=0.3, top=7), 0.7 * other + 0.3 * picture),
        (Question("一只在雪地里奔跑的狗", without="a red car", top=7), text - 0.5 * other),
        (Question("a red car", without="一只在雪地里奔跑的狗", without_weight=0.2, top=1000), other - 0.2 * text),
        (Question("a red car", pixels=pixels, image_share=1.0, top=3), picture),
    ]
    together = engine.ask([question for question, _ in asked])
    for (question, vector), found in zip(asked, together, strict=True):
        same(found, best(vector, question.top))
        (alone,) = engine.ask([question])
        assert [hit.key for hit in alone] == [hit.key for hit in found]


def test_more_like_this_leaves_itself_out(engine, truth):
    _, best = truth
    own = torch.from_numpy(engine.gallery.index.features[4])
    (found,) = engine.ask([Question(like=4, top=6)])
    keys, scores = best(own, 7)
    assert keys[0] == engine.gallery.index.key(4) and [hit.key for hit in found] == keys[1:]
    assert all(hit.number != 4 for hit in found) and scores[1] == pytest.approx(found[0].score, abs=1e-5)


def test_one_bad_question_harms_no_other(engine):
    bad = [
        Question(),
        Question("  "),
        Question("狗", top=0),
        Question("狗", top=1001),
        Question(like=20),
        Question(like=-1),
        Question("狗", image_share=2),
        Question("狗", without="狗", without_weight=1.0),
        Question("狗", without_weight=9),
    ]
    answers = engine.ask([Question("狗", top=2), *bad, Question("猫", top=3)])
    assert all(isinstance(answer, RequestError) for answer in answers[1:-1])
    assert len(answers[0]) == 2 and len(answers[-1]) == 3
    assert engine.ask([]) == []


def test_prepared_answers_are_the_same(index, engine):
    other = open_engine(index, device="cpu")
    other.prepare()
    questions = [Question(text, top=20) for text in ("狗", "a red car", "一只在雪地里奔跑的狗", "🐕", "x" * 3000)]
    for first, second in zip(engine.ask(questions), other.ask(questions), strict=True):
        by_number = {hit.number: hit.score for hit in second}
        assert all(by_number[hit.number] == pytest.approx(hit.score, abs=5e-3) for hit in first)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_quick_tower_says_the_same(pooling):
    model = small(VIT | {"pooling": pooling})
    texts = ["狗", "一只在雪地里奔跑的狗", "x y " * 40, "", "🐕", "two birds, and a tree"]
    before = model.encode_texts(texts)
    alike = use_half_products(model)
    if alike is None:
        pytest.skip("this processor has no half-precision kernels")
    after = model.encode_texts(texts)
    assert not torch.equal(after, before) and torch.allclose(after, before, atol=2e-3)
    alone = torch.cat([model.encode_texts([text]) for text in texts])
    assert torch.allclose(alone, after, atol=1e-5)


@pytest.mark.parametrize("factor", [1e7, 1e-9], ids=["beyond half precision", "below it"])
def test_a_model_that_suffers_is_left_alone(checkpoint, factor):
    model = cnclip_ft.load(checkpoint)
    with torch.no_grad():
        for layer in model.text_tower.modules():
            if type(layer) is torch.nn.Linear:
                layer.weight *= factor
    before = model.encode_texts(["狗"])
    assert use_half_products(model) is None
    assert torch.equal(model.encode_texts(["狗"]), before)


def test_another_model_is_refused(index, tmp_path):
    with pytest.raises(RequestError, match="made by another model"):
        open_engine(index, checkpoint=tiny.make_checkpoint(tmp_path / "c", seed=5), device="cpu")
    with pytest.raises(RequestError, match="no index"):
        open_engine(tmp_path)


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    app.add_typer(commands.app, name="search")

    def call(*arguments, fails: type[UserError] | None = None) -> str:
        result = CliRunner().invoke(app, ["search", *map(str, arguments)])
        if fails is not None:
            assert isinstance(result.exception, fails), (result.exception, result.output)
            return str(result.exception)
        assert result.exit_code == 0, (result.exception, result.output)
        return result.stdout

    app.command()(lambda: None)
    return call


def test_the_command_prints_a_table_or_lines(run, index, photos_once, truth):
    model, best = truth
    expected = best(model.encode_texts(["一只狗"])[0], 5)
    lines = [json.loads(line) for line in run("query", index, "一只狗", "--top", 5, "--json").splitlines()]
    assert [line["id"] for line in lines] == expected[0] and [line["rank"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(
        Path(line["path"]).is_file() and set(line) == {"rank", "score", "number", "id", "path"} for line in lines
    )
    table = run("query", index, "一只狗", "--top", 5)
    assert [row.split()[1] for row in table.splitlines() if row.split()[:1] and row.split()[0].isdigit()] == [
        f"{score:.4f}" for score in expected[1].tolist()
    ]
    limit = (lines[1]["score"] + lines[2]["score"]) / 2
    assert len(run("query", index, "一只狗", "--json", "--threshold", limit).splitlines()) == 2
    picture = photos_once / lines[0]["id"]
    (first, *_) = run("query", index, "--image", picture, "--json").splitlines()
    assert json.loads(first)["id"] == lines[0]["id"] and json.loads(first)["score"] == pytest.approx(1, abs=1e-4)
    for line in run(
        "query", index, "一只狗", "--image", picture, "--image-share", 0.2, "--not", "car", "--json"
    ).splitlines():
        json.loads(line)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("query", "{index}"), "nothing is asked"),
        (("query", "{index}", "狗", "--top", "0"), "1 to 1,000"),
        (("query", "{index}", "狗", "--image", "none.png"), "'none.png' cannot be read"),
        (("query", "{index}", "狗", "--image", "{index}/index.json"), "no readable image"),
        (("query", "{index}", "狗", "--image-share", "3"), "between 0 and 1"),
        (("query", "{index}", "狗", "--threshold", "7"), "between -1 and 1"),
        (("query", "{index}", "狗", "--threshold", "nan"), "between -1 and 1"),
        (("query", "{index}", "狗", "--threshold", "none.json"), "neither a number nor a file"),
        (("query", "{index}", "狗", "--checkpoint", "nowhere"), "nowhere"),
        (("query", "nowhere", "狗"), "no index"),
        (("serve", "nowhere"), "no index"),
        (("serve", "{index}", "--max-upload", "lots"), "lots"),
        (("serve", "{index}", "--host", "no.such.host.invalid"), "cannot listen"),
        (
            ("index", "nowhere", "{photos}", "--output", "o", "--serve", "--host", "no.such.host.invalid"),
            "cannot listen",
        ),
        (("index", "nowhere", "{photos}", "--output", "o", "--port", "8010"), "give --serve too"),
        (("index", "nowhere", "nothing", "--output", "o"), "nothing: no such folder"),
        (("index", "nowhere", "{photos}", "--output", "o"), "nowhere"),
        (("index", "nowhere", "{photos}", "--output", "o", "--approximate", "maybe"), "maybe"),
    ],
)
def test_wrong_requests_are_refused_with_what_to_change(
    run, index, photos_once, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(index=index, photos=photos_once) for argument in arguments]
    assert said in run(*filled, fails=UserError)
    assert not list(tmp_path.iterdir())


def test_a_threshold_of_another_model_is_refused(run, index, tmp_path):
    info = Index(index).info
    own, settings = info["identity"]["checksum"], info["settings"]
    for checksum, fails in ((own, None), ("0" * 64, RequestError)):
        made = {"checksum": checksum, "path": "runs/other"}
        content = {"threshold": {"cosine": -1.0}, "checkpoint": made, "settings": settings}
        (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
        said = run("query", index, "狗", "--threshold", tmp_path / "t.json", fails=fails)
        assert "another checkpoint (runs/other)" in said if fails else "score" in said
    for broken in ("[]", '{"threshold": 3}', "{", '{"threshold": {"cosine": "x"}, "checkpoint": {}}'):
        (tmp_path / "t.json").write_text(broken, encoding="utf-8")
        assert "neither a number" in run("query", index, "狗", "--threshold", tmp_path / "t.json", fails=RequestError)


def test_missing_packages_are_said_with_the_line_to_type(run, index, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("uvicorn", "faiss") else real(name, *a)
    )
    assert "pip install 'cnclip-ft[serve]'" in run("serve", index, fails=RequestError)
    arguments = ("index", "c", "f", "--output", "o", "--approximate", "ivf")
    assert "pip install 'cnclip-ft[faiss]'" in run(*arguments, fails=RequestError)


def test_an_approximate_index_is_used_and_can_be_left_aside(run, make, checkpoint, photos, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'cnclip-ft[faiss]'")
    said = make(checkpoint, photos, tmp_path / "i", approximate="ivf")
    assert "ivf: recall@10" in said and not open_engine(tmp_path / "i", device="cpu").exact
    assert open_engine(tmp_path / "i", device="cpu", exact=True).exact
    (photos / "new.png").write_bytes(tiny.png(70))
    assert "ivf: recall@10" in make(checkpoint, photos, tmp_path / "i")  # it is kept up too
    lines = [run("query", tmp_path / "i", "狗", "--json", *more) for more in ((), ("--exact",))]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 10
    make(checkpoint, photos, tmp_path / "i", approximate="none")
    assert open_engine(tmp_path / "i", device="cpu").exact and not list((tmp_path / "i").glob("*.faiss"))


def test_every_help_has_an_example(run):
    for name in ("index", "query", "serve"):
        assert f"Example: cnclip-ft search {name} " in " ".join(run(name, "--help").split())


def test_the_commands_module_imports_nothing_heavy():
    code = "import sys, cnclip_ft.commands.search; print([m for m in ('torch', 'numpy', 'fastapi', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
