"""Whether a tokenizer may be another model's, though every token it has is one of the text tower's."""

from __future__ import annotations

import logging

from cnclip_ft.models.contract import Tokenizer
from data_tools.words import Said

FEWEST_TOKENS = 0.9  # of a text tower's rows: published ones leave less than a hundredth without a token


def doubt(tokenizer: Tokenizer, rows: int) -> Said | None:
    """What to say of it beside a text tower of so many embeddings."""
    tokens = tokenizer.vocab_size
    if tokens >= rows * FEWEST_TOKENS:
        return None
    return Said(
        "{vocabulary} has {tokens:,} tokens, the text tower rows for {rows:,}: it may be another model's tokenizer, and its ids would "
        "mean other words to the tower. If so, put the tower's own tokenizer files beside its weights",
        "{vocabulary} 有 {tokens:,} 个词元，文本塔有 {rows:,} 行：它可能是另一个模型的分词器，其 id 对文本塔是别的词。若是如此，请把文本塔自己的分词器文件放到权重旁边",
        vocabulary=tokenizer.name,
        tokens=tokens,
        rows=rows,
    )


def warn(tokenizer: Tokenizer, rows: int, source: str) -> None:
    """Log it, where there is something to say."""
    said = doubt(tokenizer, rows)
    if said is not None:
        logging.getLogger("cnclip_ft").warning("%s: %s", source, said)
