"""Rates that are advised for a global batch: published, or measured (docs/training.md#settings-that-follow-from-the-data)."""

from __future__ import annotations

import math

# Peak rates the paper and its repository pair with a global batch for fine-tuning all weights (arXiv 2211.01335,
# appendix; the smallest pair is the maintainers' advice after 2e-5 at batch 96 ended below zero-shot).
PUBLISHED_RATES = ((96, 2e-6), (1024, 5e-5), (4096, 3e-5), (7680, 5e-5), (12800, 5e-5), (20480, 2e-5))


def suggested_rate(batch_size: int) -> float:
    """Highest published rate for a batch of this size, interpolated in the logarithm of both below 1,024."""
    smallest, first = PUBLISHED_RATES[0], PUBLISHED_RATES[1]
    if batch_size >= first[0]:
        return max(rate for batch, rate in PUBLISHED_RATES if first[0] <= batch <= batch_size)
    share = math.log(batch_size / smallest[0]) / math.log(first[0] / smallest[0])
    return smallest[1] * (first[1] / smallest[1]) ** max(share, 0.0)


def joining_rate(batch_size: int) -> float:
    """Rate of both towers in the second stage of towers that had never met: 3e-5 at batch 256, by the square root of the batch, at
    most the 5e-5 that is published for 1,024 and more."""
    return min(3e-5 * math.sqrt(batch_size / 256), 5e-5)


def far_rate(batch_size: int) -> float:
    """Rate of the image tower in that stage where it is a convolutional network that learnt from no texts: 4e-4 at batch 256, by the
    square root of a smaller one."""
    return min(4e-4 * math.sqrt(batch_size / 256), 4e-4)
