"""Texts that are not true of a pair's picture, beside its own text: which ones a step shows, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from random import Random

import numpy as np
import torch

from cnclip_ft.data.mixture import Mixture
from cnclip_ft.data.pairs import PairTable, pad_rows
from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.recipe_data import Negatives
from data_tools.errors import RequestError
from data_tools.negatives import Mention, draw, mentioned, slots_of
from data_tools.store import PairSource
from data_tools.words import Said

_LOOKED_AT = 4096  # captions that say what words there are


@dataclass
class NegativeTexts:
    """Up to `setting.count` negatives of any pair, drawn anew in every step by a function of (seed, step, pair).

    Those that the store keeps for the pair and swapped ones take turns. A negative that the model could not tell from a caption of the picture (its tokens are the same) is left out. What is swapped in
    is said in other captions of the store: a word that none of them has, or a thing in a colour that none gives it, would give the negative away.

    Args:
        key: the setting, for messages.

    Raises:
        RequestError: no pair keeps any, and nothing can be swapped in any of the captions looked at.
    """

    store: PairSource | Mixture
    table: PairTable
    tokenizer: Tokenizer
    setting: Negatives
    seed: int
    key: str

    def __post_init__(self) -> None:
        step = max(len(self.store) // _LOOKED_AT, 1)
        texts = [self.store[pair].text for pair in range(0, len(self.store), step)]
        self.known: set[Mention] = set().union(*map(mentioned, texts))
        found = [{slot.kind for slot in slots_of(text, self.setting.swap, self.known)} for text in texts]
        self.shares = {kind: sum(kind in kinds for kinds in found) / len(texts) for kind in self.setting.swap}
        self.share = sum(map(bool, found)) / len(texts)
        self.kept = self.store.beside_counts.get("negatives", 0) if self.setting.kept else 0
        if not self.share and not self.kept:
            none = f"none of the {len(self.store):,} pairs of {self.store.path} keeps negatives"
            if self.setting.swap:
                said = f"in none of {len(texts):,} captions of {self.store.path} was anything found to swap ({', '.join(self.setting.swap)})"
                none = f"{said}, and no pair keeps negatives" if self.setting.kept else said
            raise RequestError(
                f"{self.key}: {none}. Give {self.key}=null; or find some, cnclip-ft data mine CHECKPOINT STORE --output NEW, or import a "
                "table with a column negatives"
            )

    def describe(self, texts: int) -> list[Said]:
        """Lines of the plan; `texts` of a pair go through the text tower."""
        shares = ", ".join(f"{kind} {100 * share:.0f}%" for kind, share in self.shares.items())
        lines = [
            Said(
                "    hard negatives: {weight:g} · loss against up to {count} texts a pair that are not true, {texts} texts a pair go through "
                "the text tower",
                "    难负例：{weight:g} · 每对对至多 {count} 条不符文本的损失，每对有 {texts} 条文本经过文本塔",
                weight=self.setting.weight,
                count=self.setting.count,
                texts=texts,
            )
        ]
        if self.setting.swap:
            lines.append(
                Said(
                    "    something can be swapped in {share:.0f}% of the captions ({shares})",
                    "    {share:.0f}% 的文本可换词（{shares}）",
                    share=100 * self.share,
                    shares=shares,
                )
            )
        if self.setting.kept:
            lines.append(Said("    {kept:,} pairs keep negatives", "    {kept:,} 个图文对自带负例", kept=self.kept))
        return lines

    @cached_property
    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        return self.table.by_image()

    def _true(self, pair: int) -> set[bytes]:
        """Tokens of every caption of the pair's picture."""
        order, starts = self._by_image
        image = self.table.image_keys[pair]
        return {_bytes(self.table.token_ids(other)) for other in order[starts[image] : starts[image + 1]].tolist()}

    def texts(self, pair: int, step: int) -> list[str]:
        """Negatives of a pair in a step (of the stage), different ones."""
        random, count = Random(f"{self.seed}/{step}/{pair}"), self.setting.count
        kept = self.store.beside(pair).get("negatives", []) if self.kept else []
        slots = slots_of(self.store[pair].text, self.setting.swap, self.known)
        swapped = [text for _, text in draw(slots, count, random)]
        turns = zip_longest(random.sample(kept, min(len(kept), count)), swapped)
        return list(dict.fromkeys(text for turn in turns for text in turn if text is not None))[:count]

    def batch(self, captions: np.ndarray, step: int, lengths: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """What takes the place of a batch's texts.

        Args:
            captions: int64 ``[n, m]``, numbers of pairs; the first of each row is the pair itself, the negatives are its.
            lengths: as `PairTable.batch` has it.

        Returns:
            `input_ids` and `attention_mask` int64 ``[n, m + count, tokens]``, the captions first, the pair's own again wherever there
            is no negative; `negatives` bool ``[n, count]``: where there is one.
        """
        pairs = captions[:, 0].tolist()
        texts = [self.texts(pair, step) for pair in pairs]
        encoded = iter(self.tokenizer.encode([text for some in texts for text in some]))
        ids: list[np.ndarray | list[int]] = []
        present = np.zeros((len(texts), self.setting.count), dtype=bool)
        for row, (pair, some) in enumerate(zip(pairs, texts, strict=True)):
            own, met = self.table.token_ids(pair), self._true(pair)
            others: list[np.ndarray | list[int]] = []
            for _ in some:
                tokens = next(encoded)
                if _bytes(tokens) not in met:
                    met.add(_bytes(tokens))
                    others.append(tokens)
            present[row, : len(others)] = True
            ids += map(self.table.token_ids, captions[row].tolist())
            ids += [*others, *[own] * (self.setting.count - len(others))]
        input_ids, mask = (part.unflatten(0, (len(texts), -1)) for part in pad_rows(ids, self.tokenizer, lengths))
        return {"input_ids": input_ids, "attention_mask": mask, "negatives": torch.from_numpy(present)}


def _bytes(tokens: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(tokens, dtype=np.intc).tobytes()
