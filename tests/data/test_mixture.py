"""Several stores as one: ids that never meet, pictures that are one, weights kept, an order known in advance."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cnclip_ft.data.batching import BatchOrder, StageSampler
from cnclip_ft.data.ids import MixedId
from cnclip_ft.data.mixture import Mixture, Part, check_lines, name_image
from cnclip_ft.data.pairs import PairDataset, Span, build_table
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.preprocessing import SquarePicture
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.data.test_batching import make_table
from tests.data.test_images import encoded, picture


def mixed(sizes, weights, *, batch=10, seed=1, kind=BatchOrder, **options) -> BatchOrder:
    table = make_table(range(sum(sizes)), **{k: options.pop(k) for k in ("lengths",) if k in options})
    ends = np.cumsum(sizes).tolist()
    table.spans = tuple(
        Span(f"store {n}", end - size, end, weight)
        for n, (size, end, weight) in enumerate(zip(sizes, ends, weights, strict=True))
    )
    return kind(table, batch, seed=seed, **options)


def visits(order: BatchOrder, batches: np.ndarray) -> list[int]:
    return [int(((batches >= span.start) & (batches < span.stop)).sum()) for span in order.table.spans]


def write(folder, captions, *, shade=0, first=0, language=None):
    """Pictures 0 … with a caption each; those of one `shade` are equal."""
    with StoreWriter(folder) as writer:
        for number, text in enumerate(captions):
            writer.add_image(number, encoded(picture(40 + shade, 30 + number), "PNG"))
            writer.add_pair(number, first + number, text, language)
        writer.finish()
    return open_store(folder)


@pytest.mark.parametrize("by_store", [False, True])
@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 1, 0.5), (0.25, 3, 1.7)])
def test_an_epoch_visits_every_store_as_its_weight_says(by_store, weights):
    sizes = (1000, 3000, 777)
    order = mixed(sizes, weights, batch=10, by_store=by_store)
    wanted = np.array(sizes) * weights
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert batches.shape == (int(wanted.sum()) // 10, 10)
        shares = np.array(visits(order, batches)) / batches.size
        assert np.abs(shares - wanted / wanted.sum()).max() <= 0.01
        assert all(len(np.unique(batch)) == 10 for batch in batches)  # a pair visited twice is in two batches
    if by_store:
        assert all(sum(n > 0 for n in visits(order, batch)) == 1 for batch in batches)
        first = [int(np.flatnonzero(visits(order, batch))[0]) for batch in batches]
        assert first != sorted(first)  # batches alternate at random
    else:
        assert np.mean([sum(n > 0 for n in visits(order, batch)) > 1 for batch in batches]) > 0.5


def test_what_one_epoch_leaves_the_next_ones_visit():
    order = mixed((100, 40), (0.25, 1), batch=5)
    seen = np.concatenate([order.epoch(epoch).ravel() for epoch in range(4)])
    assert np.array_equal(np.bincount(seen[seen < 100], minlength=100), np.ones(100))
    assert np.array_equal(np.bincount(seen[seen >= 100] - 100), np.full(40, 4))


@pytest.mark.parametrize("by_store", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch_and_is_shared(by_store):
    order = mixed((57, 91), (2, 1), batch=12, by_store=by_store, lengths=np.arange(148) % 9 + 3, length_window=3)
    later = mixed((57, 91), (2, 1), batch=12, by_store=by_store, lengths=np.arange(148) % 9 + 3, length_window=3)
    assert np.array_equal(later.epoch(5), order.epoch(5))
    assert not np.array_equal(order.epoch(5), order.epoch(4))
    other = mixed((57, 91), (2, 1), batch=12, seed=2, by_store=by_store, lengths=np.arange(148) % 9 + 3)
    assert not np.array_equal(order.epoch(0), other.epoch(0))
    whole = list(StageSampler(order, 0, 40, 0, 1))
    assert list(StageSampler(order, 23, 40, 0, 1)) == whole[23:]
    shares = [list(StageSampler(order, 0, 40, rank, 3)) for rank in range(3)]
    assert all(sorted(i for share in shares for i in share[step]) == sorted(whole[step]) for step in range(40))


def test_one_store_of_weight_1_has_the_order_it_has_alone():
    alone, listed = BatchOrder(make_table(range(103)), 10, seed=1), mixed((103,), (1,))
    assert np.array_equal(alone.epoch(3), listed.epoch(3))


def test_pairs_of_unreadable_images_are_passed_over_and_the_weights_kept():
    order = mixed((40, 40), (1, 1), batch=8, without_images=set(range(20)))
    batches = order.epoch(0)
    assert batches.min() >= 20 and visits(order, batches) == [19, 37]


@pytest.mark.parametrize(
    ("sizes", "weights", "by_store", "said"),
    [
        ((40, 5), (1, 1), True, r"store 1 has 5 pairs, fewer than a batch of it alone \(8\): data.batches=mixed"),
        ((1000, 8), (1, 0.1), True, r"store 1 \(weight 0.1, 8 pairs\) is never visited.*data.batches=mixed"),
        ((40, 40), (1, 0.001), False, r"store 1 \(weight 0.001, 40 pairs\) is never visited.*larger weight"),
        ((40, 40), (0.05, 0.05), False, r"visits 4 pairs, fewer than a batch \(8\)"),
    ],
)
def test_refusals(sizes, weights, by_store, said):
    with pytest.raises(RequestError, match=said):
        mixed(sizes, weights, batch=8, by_store=by_store)


def test_ids_never_meet_and_one_picture_in_two_stores_is_one(tmp_path):
    chinese = write(tmp_path / "zh", ["一只猫", "一只狗", "a cat"])
    english = write(tmp_path / "en", ["a cat", "a dog", "two birds"], language="en")  # the same pictures, the same ids
    others = write(tmp_path / "others", ["一匹马", "一只狗"], shade=9)  # other pictures with the same ids
    store = pickle.loads(pickle.dumps(Mixture([Part(chinese, language="zh"), Part(english), Part(others, 2.0)])))
    table = build_table(store, TextTokenizer(context_length=12))
    assert table.image_keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    # Ids say nothing across stores; the same words are one text wherever they stand.
    assert table.text_keys.tolist() == [0, 1, 2, 2, 3, 4, 5, 1]
    assert table.languages == {"zh": 3, "en": 3, "": 2}
    assert [(len(span), span.weight) for span in table.spans] == [(3, 1.0), (3, 1.0), (2, 2.0)]
    pixels = PairDataset(store, table, SquarePicture(32))
    assert (pixels[0]["pixels"] == pixels[3]["pixels"]).all() and not (pixels[0]["pixels"] == pixels[6]["pixels"]).all()
    assert name_image(store, store.image_ids[-1]) == f"{tmp_path / 'others'}: image 1"


def ids_by_dictionary(parts) -> list[tuple[int, object]]:
    """The pictures of a mixture, found the plain way: every id looked up in a dictionary, whole pictures compared."""
    met: dict[object, list[tuple[int, bytes]]] = {}
    found = []
    for number, part in enumerate(parts):
        for image_id in part.store.image_ids:
            data = part.store.image(image_id)
            if all(data != other for _, other in met.get(image_id, [])):
                met.setdefault(image_id, []).append((number, data))
                found.append((number, image_id))
    return found


def test_ids_read_by_their_position_are_those_of_a_dictionary(tmp_path, monkeypatch):
    """Four stores that share some pictures; hashes that often meet; numbers and the words that read like them."""
    monkeypatch.setattr("cnclip_ft.data.ids.hash_of", lambda text: len(text) % 3)
    monkeypatch.setattr("cnclip_ft.data.ids._mixed", lambda values: values % np.uint64(3))
    draw, parts = np.random.default_rng(0), []
    for name in "abcd":
        layout = "official" if name == "c" else "plain"
        with StoreWriter(tmp_path / name, layout=layout) as writer:
            for number in draw.permutation(20)[:12].tolist():
                image_id = number if layout == "official" or number % 3 else str(number)
                writer.add_image(image_id, encoded(picture(40 + int(draw.integers(2)), 30 + number), "PNG"))
                writer.add_pair(image_id, number, f"第 {number} 张", None)
            writer.finish()
        parts.append(Part(open_store(tmp_path / name)))
    mixture, expected = Mixture(parts), ids_by_dictionary(parts)
    assert len(expected) < 45  # some are shared
    assert list(mixture.image_ids) == expected and mixture.image_ids[-3:] == expected[-3:]
    assert list(pickle.loads(pickle.dumps(mixture.image_ids))) == expected
    table = build_table(mixture, TextTokenizer(context_length=12))
    for key, pair in zip(
        table.image_keys.tolist(), (pair for part in parts for pair in part.store.pairs()), strict=True
    ):
        number, image_id = expected[key]
        assert image_id == pair.image_id and type(image_id) is type(pair.image_id)
        assert parts[number].store.image(image_id) == mixture.image_view(mixture.image_ids[key])
    gone = next(mixture.pairs())
    gone = replace(gone, image_id=MixedId(2, 99), text_id=MixedId(2, 5))
    assert str(mixture.missing_image(gone)) == str(parts[2].store.missing_image(replace(gone, image_id=99, text_id=5)))


def test_uncompressed_pictures_of_one_frame_are_two(tmp_path):
    """Bitmaps of one size that differ in the middle alone have equal bytes at both ends: only a whole look tells them apart."""

    def store(name, shade):
        image = Image.new("RGB", (200, 200), "white")
        image.paste((shade, 0, 0), (80, 80, 120, 120))
        out = io.BytesIO()
        image.save(out, "BMP")
        with StoreWriter(tmp_path / name) as writer:
            writer.add_image(1, out.getvalue())
            writer.add_pair(1, 1, "一件衣服", None)
            writer.finish()
        return Part(open_store(tmp_path / name))

    red, dark, again = store("red", 255), store("dark", 9), store("again", 255)
    assert len(Mixture([red, dark]).image_ids) == 2 and len(Mixture([red, again]).image_ids) == 1


def test_commands_to_type_hold_a_path_with_spaces_together(tmp_path):
    stores = []
    for name in ("a", "我的 b"):
        with StoreWriter(tmp_path / name) as writer:
            writer.add_image(1, encoded(picture(40, 30), "PNG"))
            writer.add_pair(1, 1, "猫", "zh")
            writer.finish()
        stores.append(open_store(tmp_path / name))
    said = check_lines(Mixture([Part(store) for store in stores]))
    assert said == f"`cnclip-ft data check {tmp_path}/a` and `cnclip-ft data check '{tmp_path}/我的 b'`"
