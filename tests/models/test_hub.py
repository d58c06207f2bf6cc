"""Published names: found here first, fetched with resume and checksum, explained when offline."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from cnclip_ft.models import hub
from cnclip_ft.models.checkpoints import load
from cnclip_ft.models.hub import find, repositories
from data_tools.errors import RequestError
from tests.models.helpers import features, official, small


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No file of the machine is found by accident."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("CNCLIP_FT_MODELS", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("place", ["models", "here", "home/.cache/cnclip_ft", "home/.cache/clip"])
@pytest.mark.parametrize("what", ["clip_cn_vit-l-14.pt", "chinese-clip-vit-large-patch14"])
def test_found_here_first(place, what, tmp_path, monkeypatch):
    monkeypatch.setenv("CNCLIP_FT_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / place / what).mkdir(parents=True)
    assert find("ViT-L-14").resolve() == (tmp_path / place / what).resolve()


def test_a_path_wins_over_a_name(tmp_path):
    (tmp_path / "here" / "ViT-L-14").mkdir()
    assert find("ViT-L-14") == Path("ViT-L-14")


def test_what_weights_began_with_by_the_names_of_the_hub(tmp_path):
    large = ["OFA-Sys/chinese-clip-vit-large-patch14"]
    for start in (
        "ViT-L-14",
        "DATAPATH/pretrained_weights/clip_cn_vit-l-14.pt",
        "chinese-clip-vit-large-patch14",
        *large,
    ):
        assert repositories(start) == large, start
    (tmp_path / "here" / "ViT-L-14").mkdir()
    (tmp_path / "here" / "runs").mkdir()
    assert repositories("ViT-L-14") == repositories("runs/best") == repositories("own.pt") == []
    towers = {"image": "openai/clip-vit-base-patch16", "text": "hfl/chinese-roberta-wwm-ext"}
    assert repositories(towers) == list(towers.values())
    assert repositories({"architecture": "tiny"}) == repositories({"image": {"kind": "vit"}, "text": None}) == []
    for content, found in (('{"base_models": ["a/b"]}', ["a/b"]), ("{}", []), ("no JSON", [])):
        (tmp_path / "here" / "runs" / "cnclip_ft.json").write_text(content, encoding="utf-8")
        assert repositories("runs") == found


@pytest.mark.parametrize(
    "source,site",
    [
        ("huggingface", "huggingface.co/OFA-Sys/chinese-clip-vit-large-patch14"),
        ("modelscope", "modelscope.cn/models/AI-ModelScope/chinese-clip-vit-large-patch14"),
    ],
)
def test_offline_names_file_places_and_source(source, site, tmp_path, monkeypatch):
    def offline(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "_download", offline)
    with pytest.raises(RequestError) as caught:
        find("ViT-L-14", source)
    said = str(caught.value)
    for part in (
        "clip_cn_vit-l-14.pt",
        site,
        str(tmp_path / "here"),
        str(tmp_path / "home" / ".cache" / "clip"),
        "CNCLIP_FT_MODELS",
    ):
        assert part in said
    assert "\n" not in said


def test_huggingface_offline_mode_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="ViT-B-16: clip_cn_vit-b-16.pt is not here"):
        load("ViT-B-16")


def test_other_names(monkeypatch):
    with pytest.raises(RequestError, match="no published name \\(ViT-B-16, ViT-L-14"):
        find("ViT-XXL")
    with pytest.raises(RequestError, match="no weights are published: {architecture: ViT-B-32}"):
        find("ViT-B-32")
    with pytest.raises(RequestError, match="source is 'ftp'"):
        find("RN50", "ftp")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(ConnectionError()))
    with pytest.raises(RequestError, match="owner/name: .*could not be fetched from huggingface.co/owner/name"):
        find("owner/name")
    Path("runs").mkdir()
    for path in ("runs/mine", "owner/name.pt", "./owner/name", "../owner", "a/b/c"):  # no names on a hub
        with pytest.raises(RequestError, match="no such file or folder, and no published name"):
            find(path)


def test_a_file_of_another_size_under_a_published_name(tmp_path):
    torch.save({"state_dict": official(small())}, tmp_path / "here" / "clip_cn_rn50.pt")
    with pytest.raises(RequestError, match="found under the name RN50, but its tensors are of another size"):
        load("RN50")
    assert torch.equal(features(load("clip_cn_rn50.pt")), features(small()))  # named as a file, it is what it is


# ---- modelscope: a client of the same interface ---------------------------------------------------------------------


def client(monkeypatch, path, checksum):
    asked = []

    def model_file_download(repository, file):
        asked.append((repository, file))
        return str(path)

    class HubApi:
        def get_model_files(self, repository, recursive):
            return [{"Path": "clip_cn_rn50.pt", "Sha256": checksum}]

    modules = {
        "modelscope": types.ModuleType("modelscope"), "modelscope.hub": types.ModuleType("hub"),
        "modelscope.hub.file_download": types.SimpleNamespace(model_file_download=model_file_download),
        "modelscope.hub.api": types.SimpleNamespace(HubApi=HubApi),
    }  # fmt: skip
    modules["modelscope.hub"].file_download = modules["modelscope.hub.file_download"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_modelscope(tmp_path, monkeypatch):
    path = tmp_path / "clip_cn_rn50.pt"
    path.write_bytes(b"weights")
    asked = client(monkeypatch, path, hashlib.sha256(b"weights").hexdigest())
    assert find("RN50", "modelscope") == path
    assert asked == [("AI-ModelScope/chinese-clip-rn50", "clip_cn_rn50.pt")]


def test_a_damaged_download_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "clip_cn_rn50.pt"
    path.write_bytes(b"damaged")
    client(monkeypatch, path, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(RequestError, match="the download is damaged.*and was removed"):
        find("RN50", "modelscope")
    assert not path.exists()


def test_modelscope_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(RequestError, match=r"pip install 'cnclip-ft\[modelscope\]'"):
        find("RN50", "modelscope")


# ---- Hugging Face: the real client against a hub of our own ---------------------------------------------------------

CONTENT = bytes(range(256)) * (24 << 12)  # the client keeps whole parts of 10 MiB
FETCH = """
import sys
from cnclip_ft.models.hub import find
from data_tools.errors import RequestError
try:
    print(find("RN50"))
except RequestError as error:
    print("refused:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers a hub gives for one file; `checksum` and `drop` can be set on the server."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if not self.path.startswith("/OFA-Sys/chinese-clip-rn50/resolve/main/clip_cn_rn50.pt"):
            self.send_error(404)
            return
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        if body:
            self.server.asked.append(start)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{self.server.checksum}"')
        self.send_header("X-Linked-Etag", f'"{self.server.checksum}"')
        self.send_header("X-Linked-Size", str(len(CONTENT)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        if body:
            data = CONTENT[start:]
            if self.server.drop:
                self.server.drop, data = False, data[: len(data) // 2]
            self.wfile.write(data)
            self.wfile.flush()
            if len(data) < len(CONTENT) - start:
                self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked, server.drop, server.checksum = [], False, hashlib.sha256(CONTENT).hexdigest()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_checkpoint_that_a_run_lacks_is_answered_with_those_it_has(tmp_path):
    run = tmp_path / "run"
    (run / "align" / "best").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    with pytest.raises(RequestError, match="RN50\\)$"):  # a recipe alone is no run
        find(run / "contrast" / "best")
    (run / "journal.jsonl").touch()
    with pytest.raises(RequestError, match="has no checkpoint yet; .* --continue` goes on"):
        find(run / "contrast" / "best")
    (run / "align" / "best" / "cnclip_ft.json").touch()
    with pytest.raises(RequestError, match=re.escape(f"has {run / 'align' / 'best'}; ")):
        find(run / "contrast" / "best")


def fetch(server, tmp_path):
    root = Path(__file__).resolve().parents[2]
    environment = {
        **__import__("os").environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(root), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FETCH], env=environment, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_huggingface_download_goes_on_where_it_was_torn_and_is_not_repeated(server, tmp_path):
    server.drop = True
    path = fetch(server, tmp_path)
    assert Path(path).read_bytes() == CONTENT
    assert server.asked[0] == 0 and len(server.asked) == 2 and server.asked[1] > 0
    assert fetch(server, tmp_path) == path and len(server.asked) == 2


def test_huggingface_download_with_a_wrong_checksum_is_refused(server, tmp_path):
    server.checksum = hashlib.sha256(b"something else").hexdigest()
    assert "the download is damaged" in fetch(server, tmp_path)
    assert not list((tmp_path / "cache").rglob("clip_cn_rn50.pt"))
