"""CLIP's byte-pair encoding for files that do not carry it: OpenAI's ``.pt`` and open_clip's folders.

The merges (262,144 bytes of text read up to line 48,894 of ``bpe_simple_vocab_16e6.txt.gz``) are no part of this package. They are
looked for beside the file and in installed packages that bring them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from cnclip_ft.models.families.cleaning import Clean
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer, Rules
from data_tools.errors import RequestError
from data_tools.regular import regular

VOCABULARY = 49408
CONTEXT_LENGTH = 77
MERGES = "bpe_simple_vocab_16e6.txt.gz"
_PACKAGES = ("open_clip", "clip")
_LONGEST = 16 << 20  # bytes of a vocabulary
# OpenAI's pattern, in which words are cut: contractions, letters, single digits, runs of anything else.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
OPENAI_NAMES = ("<|startoftext|>", "<|endoftext|>")
OPEN_CLIP_NAMES = ("<start_of_text>", "<end_of_text>")


class Pairs(NamedTuple):
    """Vocabulary and merges."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]


def clip_bpe(
    folder: Path | None, context_length: int, *, names: tuple[str, str] = OPENAI_NAMES, clean: Clean = "lower"
) -> FastTokenizer:
    """CLIP's tokenizer with the merges found in `folder` or in an installed package.

    Args:
        names: how the two special tokens are written; a text that holds one has that token.
        clean: as open_clip and OpenAI's code prepare a text before.

    Raises:
        RequestError: there are no merges, or they cannot be read.
    """
    vocabulary, merges = _found(folder)
    start, end = names
    vocabulary = {token: number for token, number in vocabulary.items() if number < VOCABULARY - 2}
    vocabulary |= {start: VOCABULARY - 2, end: VOCABULARY - 1}
    backend = Backend(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"
        )
    )
    # What `clean` has done already stands here too, so that whoever loads the saved tokenizer.json gets nearly the same ids.
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            *([normalizers.Lowercase()] * (clean != "whitespace")),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, VOCABULARY - 2), (end, VOCABULARY - 1)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in names])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    rules = Rules(
        kind="transformers", padding="longest", mask="to_end", pad_id=VOCABULARY - 1, end_id=VOCABULARY - 1, clean=clean
    )
    return FastTokenizer(backend, settings, rules, context_length)


def _found(folder: Path | None) -> Pairs:
    """Vocabulary and merges, of the first place that has them."""
    places = []
    if folder is not None:
        if (folder / "tokenizer.json").is_file():
            return _read(folder / "tokenizer.json", _of_whole)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return _read(folder / "merges.txt", _of_pair)
        places.append(folder)
    for name in _PACKAGES:
        package = find_spec(name)
        places += [Path(place) for place in (package.submodule_search_locations or [])] if package else []
    for place in places:
        if (place / MERGES).is_file():
            return _read(place / MERGES, _of_gzip)
    where = "" if folder is None else f"{folder}: "
    raise RequestError(
        f"{where}the merges of CLIP's tokenizer are not in the file of weights. Put vocab.json and merges.txt of any CLIP folder "
        f"of transformers, or OpenAI's {MERGES}, beside it; or install a package that brings them: pip install open_clip_torch"
    )


def _read(file: Path, how: Callable[[Path], Pairs]) -> Pairs:
    try:
        regular(file, _LONGEST)
        found = how(file)
        if len(found.vocabulary) < VOCABULARY - 2:
            raise ValueError(f"{len(found.vocabulary):,} tokens, expected {VOCABULARY:,}")
    except RequestError:
        raise
    except Exception as error:  # noqa: BLE001 - there is no end of what damaged files raise
        raise RequestError(f"{file}: not the vocabulary of CLIP ({str(error)[:200]}); fetch it again") from None
    return found


def _of_whole(file: Path) -> Pairs:
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    merges = [_two(pair if isinstance(pair, str) else " ".join(pair)) for pair in model["merges"]]
    return Pairs(model["vocab"], merges)


def _of_pair(file: Path) -> Pairs:
    vocabulary = json.loads(file.with_name("vocab.json").read_text(encoding="utf-8"))
    lines = file.read_text(encoding="utf-8").split("\n")
    return Pairs(vocabulary, [_two(line) for line in lines if line and not line.startswith("#version")])


def _of_gzip(file: Path) -> Pairs:
    with gzip.open(file) as packed:
        lines = packed.read(_LONGEST).decode("utf-8").split("\n")
    merges = [_two(line) for line in lines[1 : VOCABULARY - 512 - 2 + 1]]
    letters = list(_byte_letters().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return Pairs({token: number for number, token in enumerate(tokens)}, merges)


def _two(line: str) -> tuple[str, str]:
    first, second = line.split(" ")
    return first, second


def _byte_letters() -> dict[int, str]:
    """A printable character for every byte (GPT-2's table): its own where it has one, in the order of their numbers here."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def installed_bpe(context_length: int) -> FastTokenizer:
    """For towers that are newly made."""
    return clip_bpe(None, context_length)
