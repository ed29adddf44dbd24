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
        p: two-sided; exact McNemar for outcomes of 0 and 1, else a paired sign-flip test of the mean.
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
    """The paired difference of two lists of outcomes, with its interval and test.

    For outcomes of 0 and 1 the interval is the adjusted Wald one of Bonett and Price 2012 and the test is exact
    McNemar. Else the interval is a percentile bootstrap, whose percentiles are moved outwards by as much as Student's t
    at n - 1 exceeds the normal quantile, and by √(n/(n-1)): plain ones are too narrow for few samples (Hesterberg
    2015, arXiv 1411.5279, §5.3). The test flips signs, in all ways where up to 13 pairs differ. Both hold for
    differences of any shape as n grows; for a few very skewed ones (n = 10, lognormal) the interval covers 85 %.

    Args:
        before: one finite number per sample.
        after: the same samples in the same order.
        seed: of the resampling.
        confidence: of the interval, between 0 and 1.
        resamples: of the bootstrap and of the sign-flip test; unused for outcomes of 0 and 1.

    Raises:
        ValueError: if the lists differ in length, are empty or hold a number that is not finite.
    """
    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"paired samples: {x.shape} before, {y.shape} after; each needs one number per sample")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("paired samples: a number is not finite")
    gain = y - x
    binary = _binary(x, y)
    if binary:
        low, high = _adjusted_wald(gain, confidence)
    else:
        low, high = _bootstrapped(gain, seed, confidence, resamples)
    return Difference(float(gain.mean()), low, high, _p(gain, binary, seed, resamples), len(gain), confidence)


def _adjusted_wald(gain: Any, confidence: float) -> tuple[float, float]:
    """Wald's interval after adding one pair that gets better and one that gets worse."""
    from scipy.stats import norm

    n = len(gain) + 2
    better, worse = (int((gain > 0).sum()) + 1) / n, (int((gain < 0).sum()) + 1) / n
    middle = better - worse
    half = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((better + worse - middle**2) / n)
    return max(-1.0, middle - half), min(1.0, middle + half)


def _bootstrapped(gain: Any, seed: int, confidence: float, resamples: int) -> tuple[float, float]:
    from scipy import stats

    n = len(gain)
    if np.ptp(gain) == 0:
        return float(gain[0]), float(gain[0])
    rng = np.random.default_rng(seed)
    means = [gain[rng.integers(n, size=(rows, n), dtype=np.int32)].mean(1) for rows in _chunks(resamples, n)]
    tail = stats.norm.sf(stats.t.ppf((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1)))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _p(gain: Any, binary: bool, seed: int, resamples: int) -> float:
    from scipy.stats import binomtest

    gain = gain[gain != 0]  # pairs that do not differ look the same either way
    if not len(gain):
        return 1.0
    if binary:
        return float(binomtest(int((gain > 0).sum()), len(gain)).pvalue)
    observed, size = abs(gain.sum()), np.abs(gain).sum()
    exact = 2 ** len(gain) <= resamples
    rng, found = np.random.default_rng(seed), 0
    for rows in [2 ** len(gain)] if exact else _chunks(resamples, len(gain)):
        bits = np.arange(rows)[:, None] >> np.arange(len(gain)) & 1 if exact else _coins(rng, rows, len(gain))
        # sums that are equal but for rounding count as equal
        found += int((np.abs(2 * (bits @ gain) - gain.sum()) >= observed - 1e-9 * size).sum())
    return found / 2 ** len(gain) if exact else (found + 1) / (resamples + 1)


def _coins(rng: np.random.Generator, rows: int, columns: int) -> Any:
    """Fair coins, 0 and 1."""
    bits = np.frombuffer(rng.bytes(rows * -(-columns // 8)), np.uint8).reshape(rows, -1)
    return np.unpackbits(bits, axis=1, count=columns).astype(float)


def _chunks(rows: int, columns: int) -> list[int]:
    """So many rows at a time that an array of them stays small."""
    most = max(1, 1_000_000 // columns)
    return [min(most, rows - done) for done in range(0, rows, most)]


def sign(difference: Difference) -> str:
    """In a word or two: better, worse, or within noise."""
    if difference.noise or math.isclose(difference.mean, 0):
        return "within noise"
    return "better" if difference.mean > 0 else "worse"


UNSETTLED = (
    "Within noise although the interval excludes 0: the test (exact McNemar for outcomes of 0 and 1, else sign-flip) "
    "does not reject, after Holm's correction for the number of tasks."
)


def unsettled(verdict: str, low: float | None, high: float | None) -> bool:
    """Whether a verdict is "within noise" although the interval excludes 0, which `UNSETTLED` explains."""
    return verdict == "within noise" and low is not None and high is not None and not low <= 0 <= high


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p values for being several, in the given order (Holm 1979).

    To reject those up to 0.05 keeps the chance of any false rejection at 5 %, however the tests hang together.

    Raises:
        ValueError: for a p that is not between 0 and 1.
    """
    p = np.asarray(ps, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p values {list(ps)}: each must be between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def minimum_detectable(
    before: Sequence[float], after: Sequence[float], *, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """The least difference that as many samples as these show with probability `power`, by the test of `difference`.

    For outcomes of 0 and 1 from the share of discordant pairs (`detectable_shift`), else from the standard deviation
    of the differences (`detectable_mean`).

    Returns:
        A difference above 0 in the unit of the outcomes, or None where there is none: too few samples, or outcomes
        other than 0 and 1 that show no spread.
    """
    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    gain = y - x
    if _binary(x, y):
        return detectable_shift(float((gain != 0).mean()), len(gain), alpha=alpha, power=power)
    spread = 0.0 if len(gain) < 2 or np.ptp(gain) == 0 else float(gain.std(ddof=1))
    return detectable_mean(spread, len(gain), alpha=alpha, power=power)


def detectable_shift(discordant: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The least difference of two proportions that exact McNemar shows with probability `power`.

    The power is exact and unconditional: summed over how many of `n` pairs are discordant (Connor 1987 has the normal
    approximation). A shift above `discordant` takes as many discordant pairs as it needs.

    Args:
        discordant: share of the pairs whose outcomes differ, between 0 and 1.
        n: pairs.
        alpha: level of the two-sided test.
        power: probability to reject, between `alpha` and 0.99.

    Returns:
        Between 0 and 1, or None where even a shift of 1 would not be seen.
    """
    from scipy.optimize import brentq
    from scipy.stats import binom

    pairs = np.arange(n + 1)
    least = binom.ppf(alpha / 2, pairs, 0.5)
    least -= binom.cdf(least, pairs, 0.5) > alpha / 2  # at most so many of them on the lesser side reject

    def reached(shift: float) -> float:
        share = max(discordant, shift)
        weight = binom.pmf(pairs, n, share)
        seen = weight > 1e-12
        m, lesser, tilt = pairs[seen], least[seen], (share + shift) / (2 * share)
        return float(weight[seen] @ (binom.cdf(lesser, m, 1 - tilt) + binom.cdf(lesser, m, tilt)))

    if reached(1.0) < power:
        return None
    return float(brentq(lambda shift: reached(shift) - power, 1e-9, 1.0, xtol=1e-6))


def detectable_mean(deviation: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The least mean difference that a paired test shows with probability `power`.

    By the power of the paired t test (noncentral t), which the sign-flip test has as n grows.

    Args:
        deviation: standard deviation of the differences.
        n: pairs.
        alpha: level of the two-sided test.
        power: probability to reject, between `alpha` and 0.99.

    Returns:
        In the unit of `deviation`, or None where that is 0 or no sign flip of `n` pairs could reach `alpha`.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    if deviation == 0 or 2.0 ** (1 - n) > alpha:
        return None
    critical = t.ppf(1 - alpha / 2, n - 1)

    def reached(noncentrality: float) -> float:
        return float(nct.sf(critical, n - 1, noncentrality) + nct.cdf(-critical, n - 1, noncentrality))

    return float(brentq(lambda c: reached(c) - power, 1e-9, 3 * critical)) * deviation / math.sqrt(n)


def _binary(x: Any, y: Any) -> bool:
    return bool(np.isin([x, y], (0, 1)).all())
