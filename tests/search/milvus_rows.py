"""What a collection in Milvus holds, and whether two hold the same."""

from __future__ import annotations

import numpy as np

from cnclip_ft.search.index.collection import Collection, key_of
from cnclip_ft.search.index.milvus import Milvus, milvus_place


def held(place: str) -> dict:
    """Key → (stamp, what is kept, vector) of everything in the collection, and that no number is given twice."""
    with Milvus(milvus_place(place)) as server:
        collection = Collection(server)
        assert collection.info() is not None
        rows = [row for some in collection.walk(["id", "number", "stamp", "columns", "vector"], 100) for row in some]
    assert len({row["number"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    return {key_of(row["id"]): (row["stamp"], row["columns"], np.array(row["vector"], np.float32)) for row in rows}


def equal(a: dict, b: dict) -> bool:
    same = a.keys() == b.keys() and all(a[key][:2] == b[key][:2] for key in a)
    return same and all(np.allclose(a[key][2], b[key][2], atol=1e-5) for key in a)
