"""A tokenizer of a transformers folder: its ids, its padding and mask, kept with a checkpoint; code of a folder never runs."""

import json
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cnclip_ft.models.families.fast_tokenizer import FastTokenizer
from data_tools.errors import RequestError

TEXTS = ["a dog on snow", "一只狗 A Dog", "", "🐕 狗" * 40, "x\ty  z", "<end> inside"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Byte BPE whose padding is its end token, as CLIP's."""
    place = tmp_path_factory.mktemp("bpe")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<begin>", "<end>"])
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 0), ("<end>", 1)]
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<begin>", eos_token="<end>", pad_token="<end>", model_max_length=16
    )
    theirs.save_pretrained(place)
    return place


@pytest.mark.parametrize("length", [5, 16, 60])
def test_ids_lengths_and_masks_are_the_librarys(folder, length):
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = FastTokenizer.of_folder(folder, length, mask="to_end")
    ids = theirs(TEXTS, truncation=True, max_length=length)["input_ids"]
    assert ours.encode(TEXTS) == ids and max(map(len, ids)) == length and ours.encode([]) == []
    assert ours.lengths(TEXTS) == [len(found) for found in theirs(TEXTS, verbose=False)["input_ids"]]
    padded, mask = ours.pad([one for one, text in zip(ids, TEXTS, strict=True) if "<end>" not in text])
    wanted = theirs.pad({"input_ids": [one for one, text in zip(ids, TEXTS, strict=True) if "<end>" not in text]})
    assert padded.tolist() == wanted["input_ids"] and mask.tolist() == wanted["attention_mask"]
    assert ours.prepare("A  Dog") == "a  dog"
    ready, flat, lengths = ours.packed(TEXTS)
    assert ready == [ours.prepare(text) for text in TEXTS] and lengths.tolist() == list(map(len, ids))
    assert flat.tolist() == [one for found in ids for one in found] and len(ours.packed([])[1]) == 0


def test_padding_that_is_attended_to(folder):
    ours = FastTokenizer.of_folder(folder, 16, padding="max_length", mask="all")
    ids, mask = ours.pad(ours.encode(["a"]))
    assert ids.shape == (1, 16) and mask.all()


def test_it_is_kept_with_a_model_and_sent_to_workers(folder, tmp_path):
    ours = FastTokenizer.of_folder(folder, 16, mask="to_end")
    ours.encode(TEXTS), ours.lengths(TEXTS)
    ours.save(tmp_path)
    back = FastTokenizer.read(tmp_path, 16, ours.describe())
    for other in (back, pickle.loads(pickle.dumps(ours)), ours.with_context_length(9).with_context_length(16)):
        assert other.fingerprint() == ours.fingerprint() and other.encode(TEXTS) == ours.encode(TEXTS)
    assert ours.with_context_length(9).encode(TEXTS)[0] != [] and max(map(len, ours.encode(TEXTS))) == 16
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.model_max_length == 16 and theirs(TEXTS, truncation=True)["input_ids"] == ours.encode(TEXTS)
    other = FastTokenizer.of_folder(folder, 16, mask="all")
    assert other.fingerprint() != ours.fingerprint()
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(RequestError, match="cannot be read.*fetch tokenizer.json"):
        FastTokenizer.read(tmp_path, 16, ours.describe())


def test_the_mask_is_made_of_ids_alone_in_a_graph(folder):
    ours = FastTokenizer.of_folder(folder, 16, mask="to_end")
    ids = torch.tensor([[0, 7, 1, 1, 1], [0, 7, 8, 9, 1]])
    assert ours.mask(ids).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_code_of_a_folder_never_runs(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n", encoding="utf-8")
    with pytest.raises(RequestError, match="names code of its own .* which is never run"):
        FastTokenizer.of_folder(tmp_path, 16)
    assert not (tmp_path / "ran").exists()


def test_too_short_a_length_and_no_tokenizer(folder, tmp_path):
    with pytest.raises(RequestError, match="at least 3 tokens, 2 of them special"):
        FastTokenizer.of_folder(folder, 2)
    with pytest.raises(RequestError, match="no tokenizer.json in it; fetch the folder whole"):
        FastTokenizer.of_folder(tmp_path, 16)
