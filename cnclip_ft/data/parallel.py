"""Rows of parallel text as training reads them: every language tokenised once, and which rows are not negatives of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cnclip_ft.data.pairs import PairTable, padded_length
from cnclip_ft.data.same_texts import TextKeys, firsts, hash_of
from cnclip_ft.models.contract import Tokenizer
from data_tools.parallel import ParallelTexts


@dataclass
class ParallelTable(PairTable):
    """Rows instead of pairs: an image key is the row's number, rows with equal text keys share a text in some language.

    `tokens` and `starts` are those of the longest text of a row, by which rows are sorted; `parts` hold the texts of each language.
    """

    parts: tuple[PairTable, ...] = ()

    def batch(self, pairs: np.ndarray, tokenizer: Tokenizer, lengths: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` int64 ``[rows, languages, tokens]``, and keys ``[rows]``."""
        ids = [part.token_ids(row) for row in pairs.tolist() for part in self.parts]
        free = lengths and tokenizer.padding == "longest"
        input_ids, attention_mask = tokenizer.pad(ids, padded_length(max(map(len, ids)), lengths) if free else None)
        return {
            "input_ids": input_ids.unflatten(0, (len(pairs), len(self.parts))),
            "attention_mask": attention_mask.unflatten(0, (len(pairs), len(self.parts))),
            "image_keys": torch.from_numpy(self.image_keys[pairs]),
            "text_keys": torch.from_numpy(self.text_keys[pairs]),
        }


def build_parallel_table(texts: ParallelTexts, languages: Sequence[str], tokenizer: Tokenizer) -> ParallelTable:
    """Tokenise the rows, each of which has all `languages`."""
    count, rows = len(texts), np.arange(len(texts), dtype=np.int64)
    said = [tokenizer.prepared([row[language] for row in texts.rows]) for language in languages]
    prepared = [text for texts_of_one, _ in said for text in texts_of_one]
    hashes = np.fromiter(map(hash_of, prepared), np.uint64, len(prepared))
    others = np.arange(count, len(prepared))  # texts of a row are one, whatever their language
    same_text = firsts(hashes, prepared.__getitem__)
    keys = TextKeys(len(prepared), (others, others % max(count, 1)), same_text).block(0, count)
    parts = []
    for _, ids in said:
        starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        cut = sum(len(each) == tokenizer.context_length for each in ids)
        tokens = np.fromiter((token for each in ids for token in each), dtype=np.intc, count=int(starts[-1]))
        parts.append(PairTable(rows, keys, tokens, starts, cut))
    longest = np.max([part.lengths for part in parts], axis=0)
    starts = np.concatenate([[0], np.cumsum(longest)]).astype(np.int64)
    nothing = np.empty(0, dtype=np.intc)
    return ParallelTable(rows, keys, nothing, starts, sum(part.cut for part in parts), parts=tuple(parts))
