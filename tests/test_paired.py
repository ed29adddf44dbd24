"""Paired differences: the exact test, the interval's coverage, and what is within noise."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steerlens.paired import Difference, difference, sign


def outcomes(better: int, worse: int, same: int) -> tuple[list[float], list[float]]:
    """Outcomes of 0 and 1 before and after."""
    both = [0.0, 1.0] * same
    return [0.0] * better + [1.0] * worse + both[:same], [1.0] * better + [0.0] * worse + both[:same]


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p: twice the smaller tail of a fair coin."""
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


class TestP:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20))
    def test_exact_mcnemar(self, better, worse, same):
        found = difference(*outcomes(better, worse, same), resamples=100)
        assert found.p == pytest.approx(mcnemar(better, worse))
        assert found.mean == pytest.approx((better - worse) / (better + worse + same))
        assert found.n == better + worse + same

    def test_sign_flips_of_few_samples_are_all_tried(self):
        gain = [0.3, -0.1, 0.7, 0.45, 0.2, 0.05]
        means = [abs(np.dot(signs, gain)) for signs in itertools.product((1, -1), repeat=len(gain))]
        wanted = sum(mean >= abs(sum(gain)) - 1e-12 for mean in means) / len(means)
        assert difference([0.0] * 6, gain).p == pytest.approx(wanted)

    def test_many_samples_are_as_an_exact_test(self):
        # 40 pairs that differ by +0.5 or -0.5: a sign test
        gain = [0.5] * 28 + [-0.5] * 12
        assert difference([1.0] * 40, [1 + g for g in gain]).p == pytest.approx(mcnemar(28, 12), abs=0.005)

    @pytest.mark.parametrize("n", [5, 12, 13, 14, 300])
    def test_sign_flips_as_scipy(self, n):
        """Drawn in chunks, or all of them; thirds make sums that are equal but for rounding."""
        for gain in (np.random.default_rng(n).normal(0.2, 1, n), np.random.default_rng(n).integers(-2, 4, n) / 3):
            wanted = stats.permutation_test((gain,), np.mean, permutation_type="samples", n_resamples=20_000).pvalue
            exact = n < 14
            assert difference([0.0] * n, gain.tolist()).p == pytest.approx(wanted, abs=1e-12 if exact else 0.015)

    def test_pairs_that_do_not_differ_leave_the_test_exact(self):
        gain = [2 / 3, 1 / 3, 1 / 3, 2 / 3, -1 / 3] + [0.0] * 95
        assert difference([0.0] * 100, gain).p == pytest.approx(8 / 2**5, abs=1e-12)
        assert difference([0.0] * 100, [1 / 3] + [0.0] * 99).p == 1.0

    def test_p_of_drawn_flips_is_never_0(self):
        assert difference([0.0] * 40, [0.3, 0.7] * 20, resamples=999).p == pytest.approx(1 / 1000)

    def test_many_samples_take_no_longer_than_a_glance(self):
        rng = np.random.default_rng(0)
        before, after = rng.random((2, 10_000))
        begun = time.process_time()
        found = difference(before.tolist(), after.tolist())
        assert time.process_time() - begun < 5 and found.high - found.low == pytest.approx(
            2 * 1.96 * (after - before).std() / 100, rel=0.03
        )

    def test_no_difference(self):
        found = difference([0.2, 0.4], [0.2, 0.4])
        assert (found.mean, found.low, found.high, found.p, found.noise) == (0, 0, 0, 1, True)


class TestInterval:
    @pytest.mark.parametrize(
        ("draw", "true"),
        [
            (lambda rng: rng.normal(0.4, 1, 6), 0.4),
            (lambda rng: rng.normal(0.4, 1, 20), 0.4),
            (lambda rng: rng.exponential(1, 60), 1.0),
            (lambda rng: rng.choice([-1, 0, 1], 60, p=[0.1, 0.6, 0.3]), 0.2),
            (lambda rng: rng.choice([-1, 0, 1], 200, p=[0.03, 0.94, 0.03]), 0.0),
        ],
        ids=["normal-6", "normal-20", "exponential-60", "binary-60", "binary-rare"],
    )
    def test_it_covers_what_it_says(self, draw, true):
        rng, held, times = np.random.default_rng(5), 0, 300
        for _ in range(times):
            gain = draw(rng)
            binary = set(gain) <= {-1, 0, 1}
            before = np.where(gain < 0, 1, np.where(gain > 0, 0, rng.integers(0, 2, len(gain)))) if binary else 0 * gain
            found = difference(before.tolist(), (before + gain).tolist(), resamples=600)
            held += found.low - 1e-12 <= true <= found.high + 1e-12
        assert 0.9 < held / times < 0.99

    def test_wider_with_more_confidence(self):
        gain = np.random.default_rng(0).normal(1, 1, 30).tolist()
        narrow, wide = (difference([0.0] * 30, gain, confidence=c) for c in (0.8, 0.99))
        assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
        assert (narrow.confidence, wide.confidence) == (0.8, 0.99)

    def test_outcomes_of_0_and_1_by_hand(self):
        """Wald's interval of 11 better and 4 worse of 42, where 10 and 3 of 40 were seen (Bonett and Price 2012)."""
        found = difference(*outcomes(10, 3, 27))
        half = 1.959964 * math.sqrt((15 / 42 - (7 / 42) ** 2) / 42)
        assert (found.low, found.high) == pytest.approx((7 / 42 - half, 7 / 42 + half), abs=1e-6)

    def test_all_pairs_alike_leave_room_for_what_was_missed(self):
        found = difference([0.0] * 20, [1.0] * 20)
        assert 0.7 < found.low < 0.8 and found.high == 1.0
        same = difference([1.0] * 20, [1.0] * 20)
        assert same.high == -same.low == pytest.approx(1.959964 * math.sqrt(2) / 22, abs=1e-6)

    @pytest.mark.parametrize("n", [10, 30, 200])
    @pytest.mark.parametrize(("up", "down"), [(0.03, 0.01), (0.01, 0.005), (0.1, 0.3), (0.9, 0.02), (0.0, 0.0)])
    def test_outcomes_of_0_and_1_are_covered_however_rare(self, n, up, down):
        """Over all tables that occur; the bootstrap holds the true difference of the second row in 88 %."""
        better, worse = (table.ravel() for table in np.meshgrid(range(n + 1), range(n + 1)))
        chance = stats.multinomial.pmf(np.stack([better, worse, n - better - worse], 1), n, [up, down, 1 - up - down])
        held = 0.0
        for b, w, p in zip(better, worse, chance, strict=True):
            if p > 1e-6:
                found = difference(*outcomes(int(b), int(w), int(n - b - w)))
                held += p * (found.low - 1e-12 <= up - down <= found.high + 1e-12)
        assert held > 0.945

    def test_a_seed_gives_the_same_again(self):
        rng = np.random.default_rng(1)
        before, after = rng.random(30).tolist(), rng.random(30).tolist()
        assert difference(before, after, seed=3) == difference(before, after, seed=3)
        assert difference(before, after, seed=3) != difference(before, after, seed=4)

    def test_the_other_way_round(self):
        before, after = outcomes(9, 2, 30)
        there, back = difference(before, after), difference(after, before)
        assert (there.mean, there.p) == (-back.mean, back.p)
        assert there.low == pytest.approx(-back.high, abs=0.03)


class TestNoise:
    @pytest.mark.parametrize(
        ("before", "after"),
        [([0.3], [0.9]), ([0.1, 0.2], [0.5, 0.7]), ([0.0] * 5, [0.4] * 5), outcomes(5, 0, 5)],
        ids=["one", "two", "five alike", "five of ten"],
    )
    def test_too_few_to_tell(self, before, after):
        """Their interval does not hold 0, but a fair coin would do it too."""
        found = difference(before, after)
        assert found.low > 0 and found.p > 0.05
        assert found.noise and sign(found) == "within noise" and found.to_dict()["within_noise"]

    def test_words(self):
        assert sign(difference(*outcomes(30, 2, 30))) == "better"
        assert sign(difference(*outcomes(2, 30, 30))) == "worse"
        assert sign(difference(*outcomes(6, 5, 30))) == "within noise"
        assert not Difference(0.2, 0.1, 0.3, 0.01, 9).noise
        assert Difference(0.2, 0.1, 0.3, 0.04, 9, confidence=0.99).noise

    @pytest.mark.parametrize("rate", [0.05, 0.3])
    def test_nothing_is_seldom_called_something(self, rate):
        rng, called, times = np.random.default_rng(2), 0, 300
        for _ in range(times):
            before, after = rng.random(60) < 0.5, rng.random(60)
            after = np.where(after < rate, ~before, before)
            called += not difference(before.astype(float).tolist(), after.astype(float).tolist(), resamples=300).noise
        assert called / times < 0.08


class TestErrors:
    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            ([], [], "each needs one number per sample"),
            ([1.0], [1.0, 2.0], r"\(1,\) before, \(2,\) after"),
            ([[1.0]], [[2.0]], "each needs one number per sample"),
            ([1.0, math.nan], [1.0, 2.0], "not finite"),
            ([1.0, 2.0], [1.0, math.inf], "not finite"),
        ],
    )
    def test_what_is_no_sample(self, before, after, said):
        with pytest.raises(ValueError, match=said):
            difference(before, after)

    def test_plain_types(self):
        found = difference(*outcomes(3, 1, 5)).to_dict()
        assert {type(value) for value in found.values()} == {float, list, int, bool}
        assert list(found) == ["mean", "interval", "confidence", "p", "n", "within_noise"]
