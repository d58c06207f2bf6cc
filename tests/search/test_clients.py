"""Clients that others generate from /openapi.json, in Python and TypeScript, against a running server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

PYTHON = """
import json, sys
from pathlib import Path
from client import Client
from client.api.pictures import get_image
from client.api.search import get_index, search, search_image
from client.models import Ask, BodySearchImage, Problem
from client.types import File

client, photo = Client(base_url=sys.argv[1]), Path(sys.argv[2])
about = get_index.sync(client=client)
words = search.sync(client=client, body=Ask(text="一只狗", not_="车", top=3))
with photo.open("rb") as payload:
    file = File(payload=payload, file_name="a.png", mime_type="image/png")
    picture = search_image.sync(client=client, body=BodySearchImage(image=file, top=2))
image = get_image.sync(0, client=client)
refused = search.sync(client=client, body=Ask(text=""))
gone = get_image.sync(9999, client=client)
print(json.dumps({"images": about.images, "words": len(words.results), "found": picture.results[0].id,
                  "magic": image.payload.read(2).hex(), "refused": isinstance(refused, Problem) and refused.code,
                  "gone": isinstance(gone, Problem) and gone.code}))
"""
TYPESCRIPT = """
import { readFileSync } from "node:fs";
import { client } from "./client/client.gen";
import { getImage, getIndex, search, searchImage } from "./client/sdk.gen";

async function main(): Promise<void> {
  client.setConfig({ baseUrl: process.argv[2] });
  const about = await getIndex();
  const words = await search({ body: { text: "一只狗", not: "车", top: 3 } });
  const image: Blob = new Blob([new Uint8Array(readFileSync(process.argv[3]))], { type: "image/png" });
  const picture = await searchImage({ body: { image, top: 2 } });
  const small = await getImage({ path: { number: 0 }, query: { size: "small" }, parseAs: "blob" });
  const data: Blob | File | undefined = small.data;
  const refused = await search({ body: { text: "" } });
  const gone = await getImage({ path: { number: 9999 } });
  const code = (problem: { code: string } | undefined): string | undefined => problem?.code;
  console.log(JSON.stringify({
    images: about.data?.images, words: words.data?.results.length, found: picture.data?.results[0].id,
    magic: Buffer.from(await data!.arrayBuffer()).subarray(0, 2).toString("hex"),
    refused: code(refused.error), gone: code(gone.error),
  }));
}
main();
"""
EXPECTED = {
    "images": 20,
    "words": 3,
    "found": "dogs/00.png",
    "magic": "ffd8",
    "refused": "bad-request",
    "gone": "not-found",
}


@pytest.fixture(scope="module")
def server(index):
    """Address of a server over the index of twenty pictures."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "cnclip_ft", "search", "serve", str(index), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if found := re.search(r"(http://\S+)/", line):
                    break
            assert found, lines
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture
def description(server, tmp_path):
    with urllib.request.urlopen(f"{server}/openapi.json", timeout=60) as answer:
        (tmp_path / "openapi.json").write_bytes(answer.read())
    return tmp_path / "openapi.json"


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_python_client(server, description, photos_once, tmp_path):
    generator = shutil.which("openapi-python-client")
    if generator is None:
        pytest.skip("no openapi-python-client on the path: pipx install openapi-python-client")
    (tmp_path / "client.yaml").write_text("content_type_overrides: {image/jpeg: application/octet-stream}\n")
    said = run(
        generator,
        "generate",
        "--path",
        description,
        "--output-path",
        "client",
        "--meta",
        "none",
        "--config",
        "client.yaml",
        cwd=tmp_path,
    )
    assert "WARNING" not in said and "rror" not in said, said
    (tmp_path / "use.py").write_text(PYTHON, encoding="utf-8")
    python = Path(generator).resolve().with_name("python")  # it brings what its clients import
    said = run(
        python if python.exists() else sys.executable, "use.py", server, photos_once / "dogs/00.png", cwd=tmp_path
    )
    assert json.loads(said) == EXPECTED


def test_a_typescript_client(server, description, photos_once, tmp_path):
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no node and npm: apt-get install nodejs npm")
    (tmp_path / "package.json").write_text('{"private": true}')
    packages = ("@hey-api/openapi-ts@0.95.0", "typescript@5", "@types/node@20")
    installed = subprocess.run(
        [shutil.which("npm"), "install", "--no-audit", "--no-fund", "--prefer-offline", *packages],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install {packages[0]}: {installed.stderr.strip()[-200:]}")
    run(tmp_path / "node_modules/.bin/openapi-ts", "-i", description, "-o", "client", cwd=tmp_path)
    (tmp_path / "use.ts").write_text(TYPESCRIPT, encoding="utf-8")
    strict = ("--strict", "--target", "es2022", "--lib", "es2022,dom,dom.iterable", "--skipLibCheck", "--types", "node")
    run(
        tmp_path / "node_modules/.bin/tsc",
        *strict,
        "--module",
        "commonjs",
        "--moduleResolution",
        "node10",
        "--ignoreDeprecations",
        "5.0",
        "--outDir",
        "out",
        "use.ts",
        cwd=tmp_path,
    )
    said = run("node", "out/use.js", server, photos_once / "dogs/00.png", cwd=tmp_path)
    assert json.loads(said) == EXPECTED
