"""Text preparation and WordPiece: captions → token ids.

The rules are those of the official code (cn_clip 1.6.0): lower case, Chinese quotation
marks to ``"``, BERT-base-Chinese WordPiece, ``[CLS] … [SEP]``, cut to the context length.
Unlike there, a batch is padded only to its own longest text: the padding is masked in
attention, so the features are the same and the time is not spent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.families.chinese_clip.words import Words
from cnclip_ft.models.families.cleaning import whole_characters
from cnclip_ft.models.schema import Part
from data_tools.errors import RequestError
from data_tools.regular import regular

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

PACKAGED_VOCABULARY = Path(__file__).with_name("vocab.txt")
CONTEXT_LENGTH = 52
_LONGEST = 64 << 20  # bytes of a vocabulary
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read_vocabulary(file: Path) -> dict[str, int]:
    """Token → number, of a ``vocab.txt`` (a token a line) or a WordPiece ``tokenizer.json``.

    Raises:
        RequestError: it cannot be read, or is none.
    """
    try:
        regular(file, _LONGEST)
        if file.suffix == ".json":
            found = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
            vocabulary = {token: found[token] for token in sorted(found, key=found.__getitem__)}
            if list(vocabulary.values()) != list(range(len(vocabulary))):
                raise ValueError("its tokens are not numbered from 0 without a gap")
            return vocabulary
        lines = file.read_text(encoding="utf-8").split("\n")
    except RequestError as error:
        raise RequestError(f"{error}; the vocabulary cannot be read without it: name a BERT vocab.txt") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{file}: the vocabulary cannot be read ({error}); name a BERT vocab.txt") from None
    if lines and not lines[-1]:
        lines.pop()
    return {token.rstrip("\r"): number for number, token in enumerate(lines)}


class WordPiece(Part):
    kind: Literal["wordpiece"] = "wordpiece"


class TextTokenizer(Tokenizer):
    """BERT WordPiece over a vocabulary file.

    Args:
        vocab_file: as `read_vocabulary` takes it; None takes the packaged BERT-base-Chinese list (21,128 tokens).
        context_length: longest text in tokens, ``[CLS]`` and ``[SEP]`` included.

    Raises:
        RequestError: the vocabulary cannot be read or lacks a special token, or the length is below 3.
    """

    kind, schema = "wordpiece", WordPiece
    quotation_marks: ClassVar[dict[str, str]] = {"“": '"', "”": '"'}  # the vocabulary has none of the Chinese ones
    preparation = 'lower case, Chinese quotation marks to ", BERT WordPiece, cut to the context length'

    def __init__(self, vocab_file: str | Path | None = None, context_length: int = CONTEXT_LENGTH) -> None:
        if context_length < 3:
            raise RequestError(
                f"context_length is {context_length}; a text needs at least 3 tokens ([CLS] x [SEP]): data.context_length=3 or more"
            )
        self.vocab_file = Path(vocab_file) if vocab_file is not None else PACKAGED_VOCABULARY
        self.context_length = context_length

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        vocabulary = read_vocabulary(self.vocab_file)
        missing = [token for token in SPECIAL_TOKENS[:4] if token not in vocabulary]
        if missing:
            raise RequestError(f"{self.vocab_file}: no {', '.join(missing)} in it; this is not a BERT vocabulary")
        return vocabulary

    @cached_property
    def _tokenizer(self) -> FastTokenizer:
        from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as FastTokenizer

        vocabulary = self._vocabulary
        # 200 characters: the official limit; a longer run of letters is one [UNK].
        tokenizer = FastTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
        # The quotation marks stand here too, so that whoever loads the saved tokenizer.json gets the same ids.
        tokenizer.normalizer = normalizers.Sequence(
            [
                *(normalizers.Replace(mark, plain) for mark, plain in self.quotation_marks.items()),
                # Private-use characters (old GBK text has some) are unknown words in the official code; BertNormalizer
                # alone would drop them. A rune is a letter no vocabulary here has.
                normalizers.Replace(Regex(r"\p{Co}"), "ᚠ"),
                normalizers.BertNormalizer(lowercase=True),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        cls, sep = ("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[cls, sep]
        )
        return tokenizer

    def __getstate__(self) -> dict[str, object]:
        # Rebuilt from the vocabulary file where it arrives: cheaper than sending it, and picklable everywhere.
        return {"vocab_file": self.vocab_file, "context_length": self.context_length}

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def pad_id(self) -> int:
        return self._vocabulary["[PAD]"]

    @property
    def name(self) -> str:
        return self.vocab_file.name

    def prepare(self, text: str) -> str:
        """Lower-case and unify quotation marks, as the official data set does before WordPiece."""
        text = whole_characters(text).lower()
        for mark, plain in self.quotation_marks.items():
            text = text.replace(mark, plain)
        return text

    def _ids(self, prepared: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(prepared), add_special_tokens=False)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, ``[CLS] … [SEP]``, at most `context_length` of them, not padded."""
        return self.prepared(texts)[1]

    def prepared(self, texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
        cls, sep, room = self._vocabulary["[CLS]"], self._vocabulary["[SEP]"], self.context_length - 2
        ready = [self.prepare(text) for text in texts]
        return ready, [[cls, *ids[:room], sep] for ids in self._ids(ready)]

    def packed(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        ready = self._prepared_at_once(texts)
        return ready, *self._words.packed(ready)

    @cached_property
    def _words(self) -> Words:
        return Words(self._ids, (self._vocabulary["[CLS]"], self._vocabulary["[SEP]"]), self.context_length - 2)

    def _prepared_at_once(self, texts: Sequence[str]) -> list[str]:
        """`prepare` of each; no rule looks beyond the end of a line."""
        joined = "\n".join(texts)
        if joined.count("\n") != len(texts) - 1:
            return [self.prepare(text) for text in texts]
        return self.prepare(joined).split("\n")

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Length of each text in tokens before it is cut, ``[CLS]`` and ``[SEP]`` included."""
        return [len(ids) + 2 for ids in self._ids([self.prepare(text) for text in texts])]

    def mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids != self.pad_id).long()

    def with_context_length(self, context_length: int) -> TextTokenizer:
        return TextTokenizer(self.vocab_file, context_length)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.vocab_file.read_bytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Nothing: descriptions are older than the word for this kind."""
        return {}

    @classmethod
    def read(cls, place: Path | None, context_length: int, described: dict[str, Any]) -> TextTokenizer:
        return cls(place / "vocab.txt" if place is not None and place.is_dir() else place, context_length)

    def save(self, folder: str | Path) -> None:
        """Write vocab.txt, tokenizer.json and tokenizer_config.json, as transformers reads them."""
        folder = Path(folder)
        if self.vocab_file.suffix == ".json":
            (folder / "vocab.txt").write_text(
                "".join(f"{token}\n" for token in self._vocabulary), encoding="utf-8", newline="\n"
            )
        else:
            (folder / "vocab.txt").write_bytes(self.vocab_file.read_bytes())
        # Not its own save: a full disk is a bare Exception there.
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")
        config = {
            # Not BertTokenizer: transformers would rebuild its rules from the vocabulary and lose the quotation marks.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "do_lower_case": True,
            "split_special_tokens": True,  # "[CLS]" written in a caption is text
            "model_max_length": self.context_length,
            "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
        }  # fmt: skip
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
