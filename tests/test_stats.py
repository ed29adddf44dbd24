"""Holm's correction, what a sample size can show, and the summary of a job's result folders."""

import json

import numpy as np
import pytest
from result_folders import document, row, write, write_job
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from steerlens.evals.compare import CompareError
from steerlens.evals.doc import Steering
from steerlens.evals.stats import CHANGED, CLIPPED, summarize

from steerlens.methods import PASTA
from steerlens.paired import detectable_mean, detectable_shift, difference, holm, minimum_detectable


class TestHolm:
    @pytest.mark.parametrize("count", range(1, 12))
    def test_as_statsmodels(self, count):
        ps = np.random.default_rng(count).beta(0.3, 2, count).round(2).tolist()
        assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])

    def test_edges(self):
        assert holm([]) == [] and holm([0.04]) == [0.04]
        assert holm([0.03, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
        for wrong in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="each must be between 0 and 1"):
                holm([0.5, wrong])


class TestMcNemar:
    @pytest.mark.parametrize("table", [[[101, 121], [59, 33]], [[5, 0], [6, 5]], [[0, 0], [1, 0]], [[9, 4], [4, 9]]])
    def test_as_statsmodels(self, table):
        (both, worse), (better, neither) = table
        before = [1] * (both + worse) + [0] * (better + neither)
        after = [1] * both + [0] * worse + [1] * better + [0] * neither
        assert difference(before, after).p == pytest.approx(mcnemar(table, exact=True).pvalue)


class TestDetectable:
    @pytest.mark.parametrize(("discordant", "n"), [(0.0, 40), (0.1, 200), (0.4, 60), (0.25, 1000)])
    def test_a_shift_is_found_four_times_in_five(self, discordant, n):
        shift = detectable_shift(discordant, n)
        share, times = max(discordant, shift), 20_000
        odds = [(share + shift) / 2, (share - shift) / 2, 1 - share]
        better, worse, _ = np.random.default_rng(0).multinomial(n, odds, size=times).T
        p = np.minimum(1, 2 * stats.binom.cdf(np.minimum(better, worse), better + worse, 0.5))
        assert (p <= 0.05).mean() == pytest.approx(0.8, abs=0.015)

    def test_a_shift_near_the_normal_approximation(self):
        """Connor 1987, for many pairs; the exact test needs a little more."""
        z, discordant, n = stats.norm.ppf([0.975, 0.8]), 0.3, 20_000
        shift = detectable_shift(discordant, n)
        needed = (z[0] * discordant**0.5 + z[1] * (discordant - shift**2) ** 0.5) ** 2 / shift**2
        assert 0.97 < needed / n < 1

    @pytest.mark.parametrize("n", [6, 15, 80, 5000])
    def test_a_mean_as_statsmodels(self, n):
        wanted = TTestPower().solve_power(nobs=n, power=0.8, alpha=0.05)
        assert detectable_mean(1.7, n) == pytest.approx(1.7 * wanted, rel=1e-3)

    def test_a_mean_is_found_four_times_in_five(self):
        rng, n, times = np.random.default_rng(1), 25, 400
        shift = detectable_mean(2.0, n)
        found = [difference([0.0] * n, rng.normal(shift, 2, n).tolist(), resamples=400).p <= 0.05 for _ in range(times)]
        assert np.mean(found) == pytest.approx(0.8, abs=0.06)

    def test_from_pairs(self):
        rng = np.random.default_rng(2)
        before, after = rng.integers(0, 2, (2, 90)).tolist()
        share = sum(x != y for x, y in zip(before, after, strict=True)) / 90
        assert minimum_detectable(before, after) == detectable_shift(share, 90)
        before, after = rng.random((2, 90)).tolist()
        spread = np.std(np.subtract(after, before), ddof=1)
        assert minimum_detectable(before, after) == pytest.approx(detectable_mean(spread, 90))

    def test_more_shows_more(self):
        assert detectable_shift(0.2, 50) > detectable_shift(0.2, 400) > detectable_shift(0.05, 400)
        assert (
            detectable_shift(0.2, 400, power=0.9) > detectable_shift(0.2, 400) > detectable_shift(0.2, 400, alpha=0.1)
        )

    def test_nothing_can_be_shown(self):
        """Five pairs reach p = 2 / 2^5 at best."""
        assert detectable_shift(0.5, 5) is None and detectable_mean(1.0, 5) is None
        assert detectable_shift(0.5, 6) is not None and detectable_mean(1.0, 6) is not None
        assert minimum_detectable([0.5] * 30, [0.7] * 30) is None and minimum_detectable([0.5], [0.7]) is None


BASELINE = Steering("baseline", role="baseline")
METHOD = Steering("pasta", (PASTA(heads="all"),))
SWEEP = [Steering(f"pasta alpha={a}", (PASTA(heads="all", alpha=a),), "sweep", "pasta", ("alpha", a)) for a in (1, 0.1)]
RANDOM = [Steering(f"pasta random {k}", (PASTA(heads={0: [k]}),), "random_heads", "pasta") for k in (1, 2)]
NEUTRAL = Steering("pasta neutral", (PASTA(heads="all", alpha=1),), "neutral", "pasta")

LENGTHS = (64, 256)
N = 24
# right answers by number of the document: baseline 8 of 24, PASTA 20, the random heads 8 and 12
RIGHT = {"baseline": range(8), "pasta": range(2, 22), "pasta random 1": range(8), "pasta random 2": range(12)}


def conflict(label, error=None):
    """24 documents on a grid of two lengths; the score is right or wrong, and beside it stands a log-probability."""
    rows = []
    for n in range(N):
        doc = document("conflict", n, cell={"length": LENGTHS[n % 2], "depth": 0.5})
        right = n in RIGHT.get(label, RIGHT["baseline"])
        scores = {} if n == error else {"follows": float(right), "logprob": -1.0 - n / 8 + right}
        rows.append(row(doc, label, scores, f"{'right' if right else 'wrong'} {n}"))
    return rows


def choice(label, acc):
    rows = []
    for n in range(N):
        logprobs = (-1.0, -2.0) if acc(n) else (-2.0, -1.0)
        rows.append(row(document("choice", n, choices=(" yes", " no")), label, {"acc": acc(n)}, logprobs=logprobs))
    return rows


@pytest.fixture
def job(tmp_path):
    """A job's folder: two tasks, a method with its sweep and controls; one sample of the method failed."""
    never = [0.0] * N
    runs = [
        (BASELINE, conflict("baseline") + choice("baseline", lambda n: never[n])),
        (METHOD, conflict("pasta", error=23) + choice("pasta", lambda n: float(n < 9))),
        *[(s, conflict(s.label)) for s in SWEEP],
        *[(s, conflict(s.label)) for s in RANDOM],
        (NEUTRAL, conflict("pasta neutral") + choice("pasta neutral", lambda n: never[n])),
    ]
    return write_job(tmp_path / "job", runs)


FIGURES = [
    {"task": "conflict", "metric": "follows", "baseline": 33.0, "steered": 80.0, "unit": "percent"},
    {"task": "conflict", "metric": None, "baseline": 60.0, "steered": 61.0, "unit": "percent"},
    {"task": "conflict", "metric": "follows", "steered": 61.0, "unit": "percent"},
    {"task": "boolq", "metric": "acc", "baseline": 60.1, "steered": 82.5, "unit": "percent"},
    {"task": "conflict", "metric": "logprob", "baseline": -2.0, "steered": 9.0, "unit": "nats"},
    {"task": "own/conflict.yaml", "baseline": 33.0, "steered": 80.0, "other_model": "LLaMA-7B", "note": "other data"},
    {"task": "conflict", "baseline": 80.0, "steered": 33.0, "other_model": "LLaMA-7B"},
]
JOB = {
    "name": "small",
    "models": ["tiny"],
    "tasks": [{"task": "conflict", "limit": 24}, "choice"],
    "steerings": ["pasta"],
    "published": [{"steering": "pasta", **figure} for figure in FIGURES],
    "skipped": [{"steering": "pasta", "task": "needle", "why": "no span group"}],
}


def one(entries, **wanted):
    (found,) = [e for e in entries if all(e[key] == value for key, value in wanted.items())]
    return found


class TestSummary:
    def test_what_there_is(self, job):
        found = summarize(job, JOB)
        assert (found["schema"], found["name"], found["models"]) == (1, "small", ["tiny"])
        assert found["date"] == "2026-11-26T10-20-30.123456" and found["skipped"] == JOB["skipped"]
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["tasks"][0] == {
            "task": "conflict",
            "summary": "What it asks.",
            "primary": "follows",
            "metrics": ["follows", "logprob"],
            "output": "generate",
            "cells": ["length", "depth"],
        }
        assert found["tasks"][1]["task"] == "choice" and found["tasks"][1]["cells"] == []
        assert [run["label"] for run in found["runs"]] == [
            "baseline",
            "pasta",
            "pasta alpha=0.1",
            "pasta alpha=1",
            "pasta random 1",
            "pasta random 2",
            "pasta neutral",
        ]
        assert found["runs"][2] == {
            "model": "tiny",
            "label": "pasta alpha=0.1",
            "role": "sweep",
            "of": "pasta",
            "dose": {"parameter": "alpha", "value": 0.1},
            "folder": "tiny/pasta_alpha=0.1",
        }
        (error,) = found["errors"]
        assert error.pop("error") == "CUDA out of memory"
        assert error == {"model": "tiny", "steering": "pasta", "task": "conflict", "seed": 0, "doc_id": 23}

    def test_a_comparison_by_hand(self, job):
        """Of 23 documents without an error 2 get worse (0, 1) and 14 better (8 to 21)."""
        found = one(summarize(job, JOB)["comparisons"], after="pasta", task="conflict", metric="follows")
        assert [found[key] for key in ("model", "before", "primary", "role")] == ["tiny", "baseline", True, "method"]
        assert (found["n"], found["errors"]) == (23, 1)
        assert (found["baseline"], found["steered"]) == pytest.approx((8 / 23, 20 / 23))
        p = 2 * sum(stats.binom.pmf(k, 16, 0.5) for k in range(3))
        assert found["difference"]["mean"] == pytest.approx(12 / 23) and found["difference"]["p"] == pytest.approx(p)
        # of the two tasks the other is surer: 9 better, none worse
        assert found["p_holm"] == pytest.approx(max(p, 2 * 2 * 0.5**9)) and found["verdict"] == "better"
        assert found["minimum_detectable"] == pytest.approx(detectable_shift(16 / 23, 23))
        assert found["sentence"].startswith("conflict: follows 0.348 → 0.870 on 23 documents")
        assert found["cells"] == [
            {"length": 64, "depth": 0.5, "n": 12, "before": pytest.approx(4 / 12), "after": pytest.approx(10 / 12)},
            {"length": 256, "depth": 0.5, "n": 11, "before": pytest.approx(4 / 11), "after": pytest.approx(10 / 11)},
        ]

    def test_changed_samples(self, job):
        comparisons = summarize(job, JOB)["comparisons"]
        found = one(comparisons, after="pasta", task="conflict", metric="follows")["changed"]
        assert len(found) == CHANGED
        assert one(comparisons, after="pasta", task="conflict", metric="follows")["changed_total"] == 16
        # gains and losses in turn, as long as there are both
        assert [sample["doc_id"] for sample in found[:6]] == [8, 0, 9, 1, 10, 11]
        assert found[0] == {
            "doc_id": 8,
            "seed": 0,
            "prompt": "conflict question 8?",
            "target": "answer 8",
            "before": "wrong 8",
            "after": "right 8",
            "before_score": 0.0,
            "after_score": 1.0,
        }
        choice = one(comparisons, after="pasta", task="choice", metric="acc")["changed"][0]
        assert (choice["target"], choice["before"], choice["after"]) == ("yes", "no", "yes")
        assert one(comparisons, after="pasta", task="conflict", metric="logprob")["changed"] == []

    def test_controls(self, job):
        summary = summarize(job, JOB)
        found = one(summary["controls"], task="conflict")
        assert (found["of"], found["metric"]) == ("pasta", "follows")
        random = found["random_heads"]
        assert random == {"mean": pytest.approx(10 / 23), "low": 8 / 23, "high": 12 / 23, "sets": 2}
        # per document the mean of the two sets: 1 for 0 to 7, a half for 8 to 11
        averaged = [1.0] * 8 + [0.5] * 4 + [0.0] * 11
        own = [float(n in RIGHT["pasta"]) for n in range(23)]
        assert found["against_random"] == difference(averaged, own).to_dict()
        assert (
            found["verdict"] == "better"
            and "0.870 against 0.435 with random heads (2 drawn, 0.348 to 0.522)" in (found["sentence"])
        )
        assert found["p_holm"] == found["against_random"]["p"]  # the other task has no random heads
        assert found["neutral_identical"] is True and found["neutral_changed"] == 0
        other = one(summary["controls"], task="choice")
        assert other["random_heads"] is None and other["neutral_identical"] is True

    @pytest.mark.parametrize(
        ("change", "same"),
        [
            ({"filtered_resps": ["another"]}, False),
            ({"filtered_resps": [[-1.0, False], [-2.0, False]]}, False),
            ({"follows": 0.0}, False),
            ({"logprob": -1.00003}, True),
            ({"logprob": -1.1}, False),
            ({"error": "failed"}, False),
            ({"doc_hash": "another"}, False),
        ],
    )
    def test_neutral_strength_that_changes_a_row(self, job, change, same):
        rows = conflict("pasta neutral")
        rows[0] |= {"logprob": -1.0}
        first = [rows[0] | change, *rows[1:]]
        write(job / "tiny" / "pasta_neutral", first, NEUTRAL)
        write(job / "tiny" / "baseline", rows, BASELINE)
        found = one(summarize(job, JOB)["controls"], task="conflict")
        assert (found["neutral_identical"], found["neutral_changed"]) == (
            same,
            0 if same else 2 if "doc_hash" in change else 1,
        )

    def test_neutral_strength_of_a_method_that_does_not_know_what_is_greedy(self, job):
        rows = conflict("pasta neutral")
        choices, unknown = ([[-0.71, greedy], [-0.72, False]] for greedy in (True, False))
        write(job / "tiny" / "pasta_neutral", [rows[0] | {"filtered_resps": unknown}, *rows[1:]], NEUTRAL)
        write(job / "tiny" / "baseline", [rows[0] | {"filtered_resps": choices}, *rows[1:]], BASELINE)
        assert one(summarize(job, JOB)["controls"], task="conflict")["neutral_identical"] is True

    def test_published_figures(self, job):
        found = summarize(job, JOB)["published"]
        assert found[0]["measured_baseline"] == pytest.approx(100 * 8 / 23)
        assert found[0]["measured_steered"] == pytest.approx(100 * 20 / 23)
        low, high = found[0]["interval"]
        assert low < 47 < high and 20 < low < 100 * 12 / 23 < high < 80
        assert [figure["agrees"].partition(":")[0] for figure in found] == [
            "agrees",
            "differs",
            "no published difference to compare with; measured +52.2 [" + found[2]["agrees"].partition("[")[2],
            "not measured here",
            "differs",
            "same direction",
            "other direction",
        ]
        assert (
            f"the published difference +47 lies in the measured +52.2 [{low:+.1f}, {high:+.1f}], n = 23"
            in (found[0]["agrees"])
        )
        assert found[1]["metric"] == "follows" and found[1]["model"] == "tiny" and found[3]["measured_steered"] is None
        assert found[5]["agrees"] == (
            "same direction: published +47 on another model (LLaMA-7B), "
            f"measured +52.2 [{low:+.1f}, {high:+.1f}], n = 23"
        )
        assert found[5]["note"] == "other data" and found[6]["agrees"].startswith("other direction: published -47 on")
        assert found[4]["measured_baseline"] == pytest.approx(sum(-1 - n / 8 + (n < 8) for n in range(23)) / 23)

    def test_a_figure_of_another_model_beside_what_is_within_noise(self, job):
        figure = {"steering": "pasta alpha=1", "task": "conflict", "baseline": 33.0, "steered": 80.0}
        (found,) = summarize(job, JOB | {"published": [figure | {"other_model": "LLaMA-7B"}]})["published"]
        assert found["agrees"].startswith("no direction to compare, within noise: published +47 on another model")

    def test_holm_is_over_the_tasks_of_one_steering(self, job):
        found = summarize(job, JOB)["comparisons"]
        mine = [c for c in found if c["after"] == "pasta" and c["primary"]]
        assert [c["p_holm"] for c in mine] == pytest.approx(holm([c["difference"]["p"] for c in mine]))
        alone = one(found, after="pasta alpha=1", metric="follows")
        assert alone["p_holm"] == alone["difference"]["p"] == 1.0 and alone["verdict"] == "within noise"

    def test_holm_is_over_the_tasks_that_have_random_heads(self, tmp_path):
        """6 of 6 that change are enough for one task (2 / 2^6 = 0.031), not for two."""
        sides = [(BASELINE, 0), (METHOD, 6), (RANDOM[0], 0)]
        runs = [
            (s, [row(document(task, n), s.label, {"hit": float(n < right)}) for task in "tu" for n in range(30)])
            for s, right in sides
        ]
        for control in summarize(write_job(tmp_path, runs), {})["controls"]:
            assert control["against_random"]["p"] == pytest.approx(2 / 2**6) and control["p_holm"] == pytest.approx(
                4 / 2**6
            )
            assert control["verdict"] == "within noise"

    def test_long_texts_are_clipped(self, tmp_path):
        scores = [(BASELINE, 0.0), (METHOD, 1.0)]
        runs = [(s, [row(document("t", 0), s.label, {"hit": score}, "x" * 9000 + "\ud83d")]) for s, score in scores]
        folder = write_job(tmp_path, runs)
        (changed,) = summarize(folder, {})["comparisons"][0]["changed"]
        assert len(changed["after"]) <= CLIPPED and "x […] x" in changed["after"]
        assert changed["after"].endswith("x?")  # half of a character cannot be written

    def test_a_steering_whose_every_sample_failed(self, job):
        failed = [row(document("conflict", n), "pasta random 1", {}) for n in range(N)]
        write(job / "tiny" / "pasta_random_1", failed, RANDOM[0])
        found = summarize(job, JOB)
        assert not [c for c in found["comparisons"] if c["after"] == "pasta random 1"] and len(found["errors"]) == N + 1
        assert any(note.startswith("tiny, pasta random 1: ") for note in found["notes"])
        assert one(found["controls"], task="conflict")["random_heads"]["sets"] == 1

    def test_two_models(self, job):
        rows = [r | {"model": "org/other"} for r in conflict("baseline")]
        write(job / "org_other" / "baseline", rows, BASELINE)
        write(job / "org_other" / "pasta", [r | {"model": "org/other"} for r in conflict("pasta")], METHOD)
        found = summarize(job, JOB | {"models": [{"id": "org/other"}, "tiny"]})
        assert found["models"] == ["org/other", "tiny"]
        assert [c["n"] for c in found["comparisons"] if c["after"] == "pasta" and c["metric"] == "follows"] == [24, 23]
        assert [p["model"] for p in found["published"] if p["task"] == "conflict"][:2] == ["org/other", "tiny"]
        of_one = JOB | {"published": [figure | {"model": "tiny"} for figure in JOB["published"]]}
        assert {p["model"] for p in summarize(job, of_one)["published"]} == {"tiny"}


class TestErrors:
    def test_what_is_no_job_folder(self, tmp_path):
        with pytest.raises(CompareError, match=r"holds no <model>/<steering>/results_<date>.json; run the job first"):
            summarize(tmp_path, {})
        write(tmp_path / "tiny" / "pasta", conflict("pasta"), METHOD)
        with pytest.raises(CompareError, match=r"holds no run 'baseline' to compare with, only pasta; resume the job"):
            summarize(tmp_path, {})
        write(tmp_path / "tiny" / "plain", conflict("x"))
        with pytest.raises(CompareError, match=r"plain/results_.*json does not say which steering of a job it is of"):
            summarize(tmp_path, {})
