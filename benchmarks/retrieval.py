"""Retrieval and encoding beside the official scripts, in the same run: medians of interleaved repeats, and ratios.

    python benchmarks/retrieval.py small            1,000 images × 5,000 texts: features → top-10 and recall both ways
    python benchmarks/retrieval.py large            100,000 × 100,000: time, share of the matrix rate, peak memory
    python benchmarks/retrieval.py texts            text features a second on Flickr8k-CN captions, same weights
    python benchmarks/retrieval.py agree --checkpoint C --split S     our recalls of a real checkpoint against the official ones

Both sides get the same threads (``--threads``). Starting Python and importing torch is left out on both sides. The
official package comes from `run_scripts/test.sh`; `texts` reads ``$CNCLIP_FT_REAL_DATA/flickr8k-cn``. Figures mean
something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.official import Official  # noqa: E402

# Reads one JSON line {"module", "arguments"} after another, runs the script, answers with its seconds.
OFFICIAL_SERVER = """
import contextlib, io, json, os, runpy, time, torch, numpy, tqdm
torch.set_num_threads(int(sys.argv[1]))
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    request = json.loads(line)
    sys.argv = [request["module"], *request["arguments"]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        runpy.run_module("cn_clip.eval." + request["module"], run_name="__main__")
        seconds = time.perf_counter() - began
    print(seconds, file=answers, flush=True)
"""

# The official text road of extract_features.py: tokenise one by one, pad to 52, batches of 32 (its default).
OFFICIAL_TEXTS = """
import json, time, torch
from pathlib import Path
from types import SimpleNamespace
from safetensors.torch import save_file
import cn_clip.clip
from cn_clip.clip.model import CLIP
from cn_clip.eval.data import get_eval_txt_dataset
folder, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(0)
configs = Path(cn_clip.clip.__file__).parent / "model_configs"
info = json.loads((configs / "ViT-B-16.json").read_text()) | json.loads((configs / "RoBERTa-wwm-ext-base-chinese.json").read_text())
model = CLIP(**info).float().eval()
save_file({k: v.contiguous() for k, v in model.state_dict().items() if k.startswith(("bert.", "text_projection"))}, folder / "text.safetensors")
args = SimpleNamespace(text_data=str(folder / "texts.jsonl"), text_batch_size=32)
for line in sys.stdin:
    data = get_eval_txt_dataset(args, max_txt_length=52).dataloader
    rows, began = [], time.perf_counter()
    with torch.no_grad():
        for ids, texts in data:
            features = model(None, texts)
            features /= features.norm(dim=-1, keepdim=True)
            rows.append(features)
    seconds = time.perf_counter() - began
    save_file({"features": torch.cat(rows).contiguous()}, folder / "official.safetensors")
    print("SECONDS", seconds, flush=True)
"""


def processor() -> str:
    """The processor, and the kernels that torch and its BLAS choose on it: what a ratio may hang on."""
    import platform

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    return f"{name}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}, {blas})"


def rate(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: int = 1024) -> float:
    """Operations a second of a matrix product of `rows` × `rows` features of 512 values: the median of 15."""
    a, b = torch.randn(rows, 512), torch.randn(rows, 512)
    product(a, b)
    return 2 * 512 * rows * rows / statistics.median(timed(lambda: product(a, b)) for _ in range(15))


def kernels() -> str:
    """What a matrix product by torch alone (MKL, where it has it) reaches here, and the one that ours takes."""
    from cnclip_ft.retrieval.tiles import products

    own = "oneDNN" if torch.backends.mkldnn.is_available() else "torch's own"
    alone = rate(lambda a, b: a @ b.T)
    return f"matrix products: {alone / 1e9:.0f} GFLOP/s by torch.mm, {rate(products) / 1e9:.0f} by ours ({own})"


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def small(threads: int, repeats: int) -> None:
    """Official: JSONL → top-10 → score, both ways. Ours: from the tensors, and from the same JSONL to the same files."""
    from cnclip_ft.features import official_files as files
    from cnclip_ft.features.encode import SplitFeatures
    from cnclip_ft.retrieval.recall import ranks_and_topk, summarise, topk

    torch.manual_seed(0)
    images = F.normalize(torch.randn(1000, 512), dim=1)
    owner = torch.arange(5000) // 5
    texts = F.normalize(images[owner] + 4 * F.normalize(torch.randn(5000, 512), dim=1), dim=1)
    split = SplitFeatures(
        image_ids=list(range(1000)),
        text_ids=list(range(5000)),
        texts=[""] * 5000,
        languages=[None] * 5000,
        positives=torch.stack([owner, torch.arange(5000)], 1),
        image_features=images,
        text_features=texts,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        img, txt, truth = folder / "img.jsonl", folder / "txt.jsonl", folder / "texts.jsonl"
        files.write_features(img, files.IdFeatures("image", split.image_ids, images))
        files.write_features(txt, files.IdFeatures("text", split.text_ids, texts))
        files.write_text(
            truth, (json.dumps({"text_id": t, "text": "", "image_ids": [int(owner[t])]}) for t in range(5000))
        )
        files.write_answers(folder / "texts.tr.jsonl", files.turn_answers(files.read_answers(truth)))
        server = Official(OFFICIAL_SERVER, str(threads))

        def official() -> float:
            total = 0.0
            for suffix, golden in (("", truth), ("_tr", folder / "texts.tr.jsonl")):
                predictions = str(folder / f"official{suffix}.jsonl")
                inputs = [f"--image-feats={img}", f"--text-feats={txt}", f"--output={predictions}"]
                total += server.ask(json.dumps({"module": f"make_topk_predictions{suffix}", "arguments": inputs}))
                scoring = [str(golden), predictions, str(folder / f"score{suffix}.json")]
                total += server.ask(json.dumps({"module": f"evaluation{suffix}", "arguments": scoring}))
            return total

        def from_tensors() -> None:
            found, _, _ = ranks_and_topk(split, 10)
            summarise(found.text_ranks, 1000)
            summarise(found.image_ranks, 5000)

        def from_jsonl() -> None:
            asking, pool, right = files.read_features(txt), files.read_features(img), files.read_answers(truth)
            for suffix in ("", "_tr"):
                _, found = topk(asking.features, pool.features, 10)
                path = folder / f"ours{suffix}.jsonl"
                files.write_text(path, files.prediction_lines(asking.kind, asking.ids, pool.kind, pool.ids, found))
                files.write_json(
                    folder / f"ours{suffix}.json",
                    files.score_file(files.score_predictions(files.read_predictions(path), right)),
                )
                asking, pool, right = pool, asking, files.turn_answers(right)

        from_tensors()
        runs = [(official(), timed(from_tensors), timed(from_jsonl)) for _ in range(repeats)]
        server.close()
        for suffix in ("", "_tr"):
            ours, theirs = (json.loads((folder / f"{who}{suffix}.json").read_text()) for who in ("ours", "score"))
            if ours != theirs:
                raise SystemExit(f"scores differ: {ours} against {theirs}")
            same = (folder / f"ours{suffix}.jsonl").read_bytes() == (folder / f"official{suffix}.jsonl").read_bytes()
            print(f"scores equal; prediction files {'identical' if same else 'differ'}: ours{suffix}.jsonl")
    theirs, tensors, jsonl = (statistics.median(column) for column in zip(*runs, strict=True))
    print(processor())
    print(kernels())
    print(f"1,000 images × 5,000 texts, dim 512, {threads} thread(s), median of {repeats}")
    print(f"official, JSONL → top-10 → score, both ways   {theirs:8.3f} s")
    print(
        f"ours, tensors → top-10 and recall, both ways  {tensors:8.3f} s   {theirs / tensors:6.1f}× faster (target 50)"
    )
    print(f"ours, the same JSONL to the same files        {jsonl:8.3f} s   {theirs / jsonl:6.1f}× faster (target 10)")


def resident(what: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process, in bytes. Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def large(threads: int, size: int, memory: str) -> None:
    """Exact top-10 both ways; its arithmetic against what the machine's matrix product reaches by itself."""
    from cnclip_ft.retrieval.recall import topk
    from cnclip_ft.retrieval.tiles import products

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, texts = torch.empty(size, 512), torch.empty(size, 512)
    for features in (images, texts):
        for part in features.split(4096):
            part.normal_()
            part /= part.norm(dim=1, keepdim=True)
    best = rate(products, min(size, 4096))
    topk(texts[:600], images[:600], 10)  # what the first call sets up is not memory of the search
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far no longer counts
    before = resident("VmRSS")
    seconds = timed(lambda: topk(texts, images, 10, memory=memory)) + timed(
        lambda: topk(images, texts, 10, memory=memory)
    )
    reached = 2 * 2 * 512 * size * size / seconds
    answers = size * 10 * 12
    print(
        f"{size:,} × {size:,}, dim 512, {threads} thread(s), --memory {memory}: exact top-10 both ways in {seconds:.1f} s"
    )
    print(
        f"arithmetic {reached / 1e9:.1f} GFLOP/s of {best / 1e9:.1f} measured: {100 * reached / best:.0f} % (target 50)"
    )
    print(
        f"peak memory over the features {(resident('VmHWM') - before) / 2**30:.2f} GiB, answers ({answers / 2**30:.2f}) included (target 1.3)"
    )


def texts(threads: int, repeats: int, count: int) -> None:
    """Text features a second, official road against ours, with the official model's weights in both."""
    from safetensors.torch import load_file

    from cnclip_ft.features.encode import encode_texts, evaluating
    from cnclip_ft.models.start import build_start

    data = os.environ.get("CNCLIP_FT_REAL_DATA")
    if not data:
        raise SystemExit("set CNCLIP_FT_REAL_DATA to the folder that holds flickr8k-cn")
    lines = (Path(data) / "flickr8k-cn" / "valid_texts.zh.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    captions = [json.loads(line)["text"] for line in lines]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        server = Official(OFFICIAL_TEXTS, str(folder), str(threads))
        server.ask("warm up")
        model, _ = build_start({"architecture": "ViT-B-16"})
        weights = load_file(folder / "text.safetensors")
        tower = {"text_projection.weight": weights.pop("text_projection").T}
        tower |= {
            key.replace("bert.", "text_model.", 1): value for key, value in weights.items() if ".pooler." not in key
        }
        missing, unexpected = model.text_tower.load_state_dict(tower, strict=False)
        if missing or any(not key.endswith("position_ids") for key in unexpected):
            raise SystemExit(f"the official names do not fit: missing {missing}, left over {unexpected}")
        with evaluating(model):
            mine = encode_texts(model, captions)
            runs = [(server.ask("go"), timed(lambda: encode_texts(model, captions))) for _ in range(repeats)]
        server.close()
        gap = (mine - load_file(folder / "official.safetensors")["features"]).abs().max().item()
    theirs, ours = (statistics.median(column) for column in zip(*runs, strict=True))
    print(
        f"{len(captions):,} Flickr8k-CN captions, RoBERTa base, {threads} thread(s), median of {repeats}; largest difference {gap:.1e}"
    )
    print(
        f"official {len(captions) / theirs:8.1f} texts/s\nours     {len(captions) / ours:8.1f} texts/s   {theirs / ours:.2f}× (target 2)"
    )


def agree(threads: int, checkpoint: str, split: str) -> None:
    """Encode a store with a real checkpoint; the official scripts must find what `topk` and `evaluate` find, both ways.

    Captions that read the same have the same feature. The official scripts then take whichever stands first in the
    file; `topk` does the same, and `evaluate` counts the tie against the model. So the predictions must score alike,
    and `evaluate` may be lower by no more than the queries whose best positive ties with a stranger.
    """
    from cnclip_ft.features import official_files as files
    from cnclip_ft.features.encode import encode_split
    from cnclip_ft.features.folder import text_lines
    from cnclip_ft.models.checkpoints import load
    from cnclip_ft.retrieval.recall import recall, topk
    from data_tools.store import open_store

    features = encode_split(load(checkpoint), open_store(split))
    # The official scripts take whole numbers as ids: give every item its position.
    features.image_ids, features.text_ids = list(range(len(features.image_ids))), list(range(len(features.text_ids)))
    scores, equal = recall(features), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        img, txt, truth = folder / "img.jsonl", folder / "txt.jsonl", folder / "texts.jsonl"
        files.write_features(img, files.IdFeatures("image", features.image_ids, features.image_features))
        files.write_features(txt, files.IdFeatures("text", features.text_ids, features.text_features))
        files.write_text(truth, text_lines(features))
        answers = files.read_answers(truth)
        files.write_answers(folder / "texts.tr.jsonl", files.turn_answers(answers))
        server = Official(OFFICIAL_SERVER, str(threads))
        for suffix, golden, mine, q, g in (
            ("", truth, scores.text_to_image, features.text_features, features.image_features),
            ("_tr", folder / "texts.tr.jsonl", scores.image_to_text, features.image_features, features.text_features),
        ):
            predictions, result = folder / f"p{suffix}.jsonl", folder / f"s{suffix}.json"
            inputs = [f"--image-feats={img}", f"--text-feats={txt}", f"--output={predictions}"]
            server.ask(json.dumps({"module": f"make_topk_predictions{suffix}", "arguments": inputs}))
            server.ask(
                json.dumps({"module": f"evaluation{suffix}", "arguments": [str(golden), str(predictions), str(result)]})
            )
            theirs = json.loads(result.read_text())["scoreJson"]
            right = files.read_answers(golden)
            kind, other = right.query_kind, files.OTHER[right.query_kind]
            own = files.Answers(kind, dict(enumerate(topk(q, g, 10)[1].tolist())))
            ours = files.score_predictions(own, right)
            ties = sum(tied(q[query], g, targets) for query, targets in right.targets.items() if targets)
            for k, strict in mine.recall.items():
                equal &= (
                    ours[f"r{k}"] == theirs[f"r{k}"]
                    and 0 <= theirs[f"r{k}"] - strict <= 100 * ties / mine.queries + 1e-9
                )
                print(
                    f"{kind}→{other} R@{k:<2}  official {theirs[f'r{k}']:8.4f}  topk {ours[f'r{k}']:8.4f}  evaluate {strict:8.4f}"
                )
            print(f"{kind}→{other}: {ties} of {mine.queries} queries tie with a stranger at their best positive")
        server.close()
    print("both agree" if equal else "they differ")
    if not equal:
        raise SystemExit(1)


def tied(query: torch.Tensor, gallery: torch.Tensor, targets: list[int]) -> bool:
    """Does an item that is no positive score exactly as the best positive?"""
    scores = gallery.double() @ query.double()
    best = scores[targets].max()
    scores[targets] = -torch.inf
    return bool(((scores - best).abs() < 1e-12).any())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("small", "large", "texts", "agree"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=100_000, help="large: images, and texts")
    parser.add_argument("--memory", default="1GiB", help="large")
    parser.add_argument("--captions", type=int, default=500, help="texts")
    parser.add_argument("--checkpoint", help="agree")
    parser.add_argument("--split", help="agree: a store")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "small":
        small(args.threads, args.repeats)
    elif args.what == "large":
        large(args.threads, args.size, args.memory)
    elif args.what == "agree":
        if not (args.checkpoint and args.split):
            parser.error("agree needs --checkpoint and --split")
        agree(args.threads, args.checkpoint, args.split)
    else:
        texts(args.threads, args.repeats, args.captions)


if __name__ == "__main__":
    main()
