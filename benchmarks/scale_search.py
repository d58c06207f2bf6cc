"""An index in milvus-lite beside one in a folder, of the same vectors and the same model, in one run.

    python benchmarks/scale_search.py                                   200,000 pictures: the figures of docs/scale.md
    python benchmarks/scale_search.py --pictures 2000 --asked 20 --architecture tiny     seconds: whether it works

Vectors in: rows a second that are put as `search index` puts them, and until they are flushed. Answers: questions in words over HTTP,
one after another, to `search serve` of either; the collection asked in this process, without words and HTTP; recall@10 of it against exact search. Prints the processor; --json writes all.
Nothing here needs data or the network; about 1.5 GB of disk for a moment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrieval import processor
from search import Client, make_index, questions, server

RATE, TIMES = 5000, 1.5  # targets: rows a second, ×


def fill(place: str, index: Path, kind: str | None) -> dict[str, float]:
    """The pictures of a folder's index into a collection: rows a second, with and without the flush, and recall@10."""
    from cnclip_ft.retrieval.exact import ExactSearch
    from cnclip_ft.search.index.collection import Collection, row_id, rows_together
    from cnclip_ft.search.index.folder import Index
    from cnclip_ft.search.index.milvus import Milvus, milvus_place

    opened, effort = Index(index), 256
    count, dim = opened.features.shape
    approximate = kind and {"kind": kind, "effort": effort}
    info = {**opened.info, "approximate": approximate, "facets": {"names": [], "offered": {}}, "finished": True}
    with Milvus(milvus_place(place)) as connection:
        collection, together = Collection(connection), rows_together(dim)
        collection.create(info)
        began = time.perf_counter()
        for start in range(0, count, together):
            numbers = range(start, min(start + together, count))
            rows = []
            for number, vector in zip(numbers, np.array(opened.features[start : numbers.stop]), strict=True):
                key, stamp = opened.item(number)
                row = {"id": row_id(f"{number}/{key}"), "number": number, "stamp": stamp, "kept": ""}
                rows.append(row | {"columns": {}, "numbers": {}, "vector": vector})
            collection.put(rows)
        put = time.perf_counter() - began
        collection.settle()
        settled = time.perf_counter() - began
        asked = np.array(opened.features[: min(100, count)])
        exact = ExactSearch(torch.from_numpy(opened.features), opened.info["largest_norm"])
        truth = exact.search(torch.from_numpy(asked), 10)[1].tolist()
        found, taken = [], []
        for row in asked:
            began = time.perf_counter()
            found += collection.search(row[None], 10, effort, kind)
            taken.append(time.perf_counter() - began)
        both = sum(len({hit["number"] for hit in hits} & set(row)) for hits, row in zip(found, truth, strict=True))
    return {
        "put_per_second": count / put,
        "with_flush_per_second": count / settled,
        "embedded_ms": 1000 * statistics.median(taken),
        "recall_at_10": both / (10 * len(asked)),
    }


def median_answer(place: str | Path, asked: int) -> float:
    """Milliseconds, the median, after ten questions that are not counted."""
    with server(place, None) as (port, _):
        client, texts = Client(port), questions(asked + 10)
        return statistics.median([client.ask(text) for text in texts][10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--asked", type=int, default=200)
    parser.add_argument("--architecture", default="ViT-B-16")
    parser.add_argument("--approximate", choices=["none", "hnsw", "ivf"], default="none")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    kind = None if given.approximate == "none" else given.approximate
    found: dict[str, Any] = {"processor": processor(), "pictures": given.pictures, "approximate": given.approximate}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = make_index(folder, given.pictures, given.architecture)
        place = f"milvus:{folder}/pictures.db"
        found |= fill(place, index, kind)
        found["folder_ms"] = median_answer(index, given.asked)
        found["milvus_ms"] = median_answer(place, given.asked)
    found["times"] = found["milvus_ms"] / found["embedded_ms"]
    found["times_of_folder"] = found["milvus_ms"] / found["folder_ms"]
    print(f"{found['processor']}; {given.pictures:,} pictures, {given.architecture}, milvus-lite ({given.approximate})")
    print(
        f"put {found['put_per_second']:,.0f} a second (target {RATE:,}), with the flush {found['with_flush_per_second']:,.0f}; "
        f"recall@10 {found['recall_at_10']:.3f}"
    )
    print(
        f"over HTTP p50 {found['milvus_ms']:.1f} ms, milvus-lite itself {found['embedded_ms']:.1f} ms: {found['times']:.2f}× (target {TIMES}); "
        f"a folder searched exactly {found['folder_ms']:.1f} ms over HTTP: {found['times_of_folder']:.2f}×"
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
