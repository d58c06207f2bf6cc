"""The command as a user starts it: the README's road on a few scenes, and bad input answered in one message."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnclip_ft.cli

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments, cwd: Path | None = None, code: int = 0) -> str:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-m", "cnclip_ft", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == code, (done.returncode, done.stdout[-1500:], done.stderr[-3000:])
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the demonstration set in little and a finished run."""
    folder = tmp_path_factory.mktemp("road")
    command("data", "demo", "data", "--train", "40", "--valid", "12", cwd=folder)
    short = [
        f"stages.{stage}.{key}={value}"
        for stage in ("align", "contrast")
        for key, value in (("steps", 3), ("batch_size", 16), ("warmup_steps", 1))
    ]
    arguments = ["demo", "data.train=data/train", "data.valid=data/valid", "output=runs/mine", *short]
    said = command("plan", *arguments, cwd=folder)
    assert "stage align" in said and "WARNING" in said and not (folder / "runs").exists()
    said = command("train", *arguments, cwd=folder)
    assert "after contrast" in said and "Best checkpoint" in said
    return folder


def test_help_is_light():
    code = "import sys, cnclip_ft.cli; print([m for m in ('torch', 'lmdb', 'numpy', 'transformers', 'pydantic', 'PIL', 'fastapi', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    said = command("--help")
    for name in (
        "data",
        "plan",
        "train",
        "evaluate",
        "export",
        "encode",
        "topk",
        "classify",
        "calibrate",
        "compare",
        "average",
        "tune",
        "search",
    ):
        assert name in said
    for name in ("plan", "train", "evaluate", "export"):
        assert "Example:" in command(name, "--help"), name


@pytest.mark.parametrize(
    "arguments,code,expected",
    [
        ("--version", 0, f"cnclip-ft {cnclip_ft.__version__}"),
        ("-h", 0, "Usage: cnclip-ft"),
        ("data check -h", 0, "Usage: cnclip-ft data check"),
        ("trian demo", 2, "Did you mean 'train'?"),
        ("data chek", 2, "Did you mean 'check'?"),
        ("train demo --overwite", 2, "--overwrite"),
        ("train dmo", 2, "Did you mean demo?"),
    ],
)
def test_version_help_and_near_misses(arguments, code, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", *shlex.split(arguments)])
    with pytest.raises(SystemExit) as ended:
        cnclip_ft.cli.main()
    said = capsys.readouterr()
    assert ended.value.code == code and expected in (said.err if code else said.out)


def test_the_shell_completes():
    asked = {"_CNCLIP_FT_COMPLETE": "complete_bash", "COMP_WORDS": "cnclip-ft train de", "COMP_CWORD": "2"}
    environment = os.environ | asked | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "cnclip_ft"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["demo", "demo_boxes"], done


@pytest.mark.slow
def test_evaluate_and_export_and_load(place):
    command("evaluate", "runs/mine/contrast/best", "data/valid", "--json", "scores.json", cwd=place)
    scores = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    stored = json.loads((place / "runs/mine/contrast/best/cnclip_ft.json").read_text(encoding="utf-8"))
    assert str(round(stored["mean_recall"], 2))[:4] in json.dumps(scores)
    said = command("export", "runs/mine/contrast/best", "--to", "huggingface", "--output", "hf", cwd=place)
    assert float(re.search(r"(\d\.\de[-+]\d\d)", said)[1]) < 1e-4
    ours, exported = (cnclip_ft.load(place / name) for name in ("runs/mine/contrast/best", "hf"))
    texts = ["一个红色的圆", "a red circle"]
    assert torch.allclose(ours.encode_texts(texts), exported.encode_texts(texts), atol=1e-6)
    assert torch.allclose(ours.encode_texts(texts).norm(dim=1), torch.ones(2))
    picture = next(iter((place / "hf").glob("*.json")))
    with pytest.raises(Exception, match="no readable image"):
        ours.encode_images([picture])


def test_data_road(tmp_path):
    from tests.training.helpers import write_store

    write_store(tmp_path / "store", 3, 2, seed=0)
    said = command("data", "check", "store", cwd=tmp_path)
    assert "3" in said


@pytest.mark.parametrize(
    "arguments,code,expected",
    [
        ("train nowhere.yaml", 2, "nowhere.yaml: no such recipe file"),
        ("train demo data.train=none data.valid=none", 2, "data.train: none"),
        ("train demo stages.align.batchsize=3", 2, "stages.align.batchsize: unknown key"),
        (
            "train demo data.train=data/train data.valid=data/valid stages.align.batch_size=5000 output=r2",
            2,
            "batch size (5000) is larger",
        ),
        ("train demo data.train=data/train data.valid=data/valid output=runs/mine", 2, "holds a run already"),
        ("train demo data.train=data/train data.valid=data/valid output=r3 --continue", 2, "no state to continue from"),
        ("train demo data.train=data/train data.valid=data/valid output=/proc/x", 2, "cannot be written"),
        (
            "train demo data.train=data/train data.valid=data/valid output=r4 model.start=ViT-B-16",
            2,
            "clip_cn_vit-b-16.pt",
        ),
        (
            "train demo data.train=data/train data.valid=data/valid output=r5 stages.align.train=[{tower:\\ text,\\ rate:\\ 0}]",
            2,
            "trains nothing",
        ),
        ("evaluate nothing data/valid", 2, "nothing"),
        ("evaluate runs/mine/contrast/best none", 2, "none"),
        ("export runs/mine/contrast/best --to floppy --output x", 2, "floppy"),
        ("data build none --splits train", 2, "none"),
        ("data check none", 2, "none"),
    ],
)
def test_bad_requests(place, arguments, code, expected, monkeypatch, capsys):
    """In this process, as starting one a time costs more than all else; the next test starts one."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", *shlex.split(arguments)])
    with pytest.raises(SystemExit) as ended:
        cnclip_ft.cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == code and expected in said and len(said.strip().splitlines()) < 12, said


def test_a_bad_request_from_the_shell(place):
    said = command("train", "demo", "data.train=none", "data.valid=none", cwd=place, code=2)
    fault, more = said.strip().splitlines()
    assert fault.startswith("error: data.train: none") and more == "more: docs/recipe.md#data"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_every_command_of_the_readme_exists(name):
    """Each `cnclip-ft …` line parses: the subcommand is known and so is every option it names."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("cnclip-ft ")]
    assert len(lines) >= 9
    helps: dict[tuple[str, ...], str] = {}
    for line in lines:
        words = shlex.split(line)[1:]
        path = tuple(words[:2]) if words[0] in ("data", "search") else (words[0],)
        if path not in helps:
            helps[path] = command(*path, "--help")
        for option in [word for word in words if word.startswith("--")]:
            assert option in helps[path], line


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_at_the_very_end_leaves_as_it_would_have():
    """While the interpreter takes itself apart: no traceback, the command's own exit code, nothing of its output lost."""
    code = (
        "import sys, threading, time\n"
        "from cnclip_ft.cli import main\n"
        "sys.argv = ['cnclip-ft', *sys.argv[1:]]\n"
        "def late():\n"
        "    while threading.main_thread().is_alive(): time.sleep(0.01)\n"  # which waits for this one then
        "    print('ending', file=sys.stderr, flush=True); time.sleep(20)\n"
        "threading.Thread(target=late).start()\n"
        "main()\n"
    )
    for arguments, wanted, said in (
        (["recipe", "list"], 0, "muge_vit-b-16"),
        (["recipe", "show", "nothing"], 2, "no such recipe"),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "ending" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == wanted and said in out + "".join(lines) + err, (lines, out, err)
        assert "Traceback" not in "".join(lines) + err


def test_both_readmes_have_the_same_commands():
    blocks = [
        re.findall(r"```(?:bash|python)\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        for name in ("README.md", "README.zh-CN.md")
    ]
    plain = [[re.sub(r"\s*#.*", "", block) for block in found] for found in blocks]
    assert plain[0] == plain[1]


def test_every_shipped_recipe_is_valid():
    from cnclip_ft.recipe_files import example, load_recipe, shipped_recipes

    assert {"demo", "flickr30k-cn_vit-b-16", "coco-cn_vit-b-16", "muge_vit-b-16"} <= set(shipped_recipes())
    for name in shipped_recipes():
        load_recipe(name, look=example)


@pytest.mark.parametrize(
    "error,code,says",
    [
        (OSError(28, "No space left on device", "/a/b"), 1, "error: /a/b: No space left on device. Free some space"),
        (OSError(36, "File name too long", "x"), 1, "error: x: File name too long. Choose a shorter name."),
        (OSError(40, "Too many levels of symbolic links", "x"), 1, "lead in a circle"),
        (OSError(5, "Input/output error"), 1, "error: Input/output error"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted"),
        (cnclip_ft.cli.UserError("words"), 1, "error: words"),
    ],
)
def test_failures_of_the_system_are_one_line(monkeypatch, capsys, error, code, says):
    def failing(*_):
        raise error

    monkeypatch.setattr("cnclip_ft.recipe_files.load_recipe", failing)
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", "plan", "demo"])
    with pytest.raises(SystemExit) as ended:
        cnclip_ft.cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == code and says in said and len(said.strip().splitlines()) == bool(says)
