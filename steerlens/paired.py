"""Paired statistics: is a difference on the same samples more than noise?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Difference:
    """The paired difference after minus before.

    Attributes:
        mean: over the samples.
        low, high: its interval at `confidence`.
        p: two-sided; exact McNemar for outcomes of 0 and 1, else a paired sign-flip test.
        n: samples.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    confidence: float = 0.95

    @property
    def noise(self) -> bool:
        """Whether the interval holds 0, or the test does not reject it: few samples leave the two apart."""
        return self.low <= 0 <= self.high or self.p > 1 - self.confidence

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with `within_noise`."""
        return {
            "mean": self.mean,
            "interval": [self.low, self.high],
            "confidence": self.confidence,
            "p": self.p,
            "n": self.n,
            "within_noise": self.noise,
        }


def difference(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, confidence: float = 0.95, resamples: int = 10_000
) -> Difference:
    """The paired difference of two lists of outcomes, with a percentile bootstrap interval.

    The percentiles are moved outwards by as much as Student's t at n - 1 exceeds the normal quantile, and by
    √(n/(n-1)): plain ones are too narrow for few samples (Hesterberg 2015, arXiv 1411.5279, §5.3). Where every pair
    differs by the same amount the bootstrap has no width; the interval then allows for the pairs that n samples may
    have missed (Clopper-Pearson bound on 0 of n), for outcomes of 0 and 1.

    Args:
        before: one finite number per sample.
        after: the same samples in the same order.
        seed: of the resampling.
        confidence: of the interval, between 0 and 1.
        resamples: of the bootstrap and of the sign-flip test.

    Raises:
        ValueError: if the lists differ in length, are empty or hold a number that is not finite.
    """
    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"paired samples: {x.shape} before, {y.shape} after; each needs one number per sample")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("paired samples: a number is not finite")
    gain = y - x
    binary = bool(np.isin([x, y], (0, 1)).all())
    low, high = _interval(gain, binary, seed, confidence, resamples)
    return Difference(float(gain.mean()), low, high, _p(gain, binary, seed, resamples), len(gain), confidence)


def _interval(gain: Any, binary: bool, seed: int, confidence: float, resamples: int) -> tuple[float, float]:
    from scipy import stats

    if np.ptp(gain) == 0:
        missed = 1 - ((1 - confidence) / 2) ** (1 / len(gain)) if binary else 0.0
        bounds = (-1.0, 1.0) if binary else (-np.inf, np.inf)
        return float(max(gain[0] - missed, bounds[0])), float(min(gain[0] + missed, bounds[1]))
    n = len(gain)
    away = stats.t.ppf((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1))
    found = stats.bootstrap(
        (gain,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // n),
        confidence_level=1 - 2 * stats.norm.sf(away),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _p(gain: Any, binary: bool, seed: int, resamples: int) -> float:
    from scipy import stats

    if not gain.any() or (len(gain) == 1 and not binary):
        return 1.0
    if binary:
        better, worse = int((gain > 0).sum()), int((gain < 0).sum())
        return float(stats.binomtest(better, better + worse).pvalue)
    found = stats.permutation_test(
        (gain,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=max(1, 4_000_000 // len(gain)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def sign(difference: Difference) -> str:
    """In a word or two: better, worse, or within noise."""
    if difference.noise or math.isclose(difference.mean, 0):
        return "within noise"
    return "better" if difference.mean > 0 else "worse"
