"""`steerlens compare`: pairing by document, verdicts in words, lm-eval's own folders, and what cannot be compared."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from result_folders import DATE, document, row, write
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from steerlens.evals.compare import CompareError, compare, load
from typer.testing import CliRunner

from steerlens.cli import app
from steerlens.cli.compare import COLUMNS
from steerlens.paired import UNSETTLED, difference, holm

ROOT = Path(__file__).resolve().parents[1]


def outcomes(better: int, worse: int, right: int, wrong: int) -> list[tuple[int, int]]:
    return [(0, 1)] * better + [(1, 0)] * worse + [(1, 1)] * right + [(0, 0)] * wrong


@pytest.fixture
def pair(tmp_path):
    """Writes two folders from (before, after) scores per task; None is an error."""

    def made(tasks, metric="follows", **kwargs):
        sides = [[], []]
        for task, scores in tasks.items():
            for number, both in enumerate(scores):
                for side, rows, score in zip("ab", sides, both, strict=True):
                    given = {} if score is None else {metric: score}
                    rows.append(row(document(task, number), side, given, f"said by {side}"))
        return [write(tmp_path / side, rows, **kwargs) for side, rows in zip("ab", sides, strict=True)]

    return made


def compared(folders, **kwargs):
    return compare(*map(load, folders), **kwargs)


class TestNumbers:
    def test_as_statsmodels_and_holm_across_tasks(self, pair):
        tables = {"a": (17, 5, 30, 28), "b": (9, 8, 20, 3), "c": (2, 11, 12, 0), "d": (0, 0, 8, 8)}
        found = compared(pair({task: outcomes(*table) for task, table in tables.items()}))
        wanted = []
        for contrast, (better, worse, right, wrong) in zip(found.contrasts, tables.values(), strict=True):
            n = better + worse + right + wrong
            wanted.append(mcnemar([[right, worse], [better, wrong]], exact=True).pvalue)
            assert contrast.difference.p == pytest.approx(wanted[-1])
            assert contrast.difference.n == n and contrast.difference.mean == pytest.approx((better - worse) / n)
            assert (contrast.before, contrast.after) == pytest.approx(((worse + right) / n, (better + right) / n))
        assert [c.holm for c in found.contrasts] == pytest.approx(holm(wanted))
        assert {c.verdict for c in found.contrasts} == {"within noise"}
        # 17 against 5 and 2 against 11 stand out alone, but not among four
        assert [c.difference.noise for c in found.contrasts] == [False, True, False, True]

    def test_scores_that_are_not_0_and_1(self, pair):
        scores = [(0.1 * i, 0.1 * i + 0.3 + 0.02 * (i % 5)) for i in range(30)]
        (found,) = compared(pair({"summaries": scores}, "rougeL")).contrasts
        gain = [after - before for before, after in scores]
        assert found.difference == difference(*zip(*scores, strict=True))
        assert found.difference.mean == pytest.approx(sum(gain) / 30) and found.verdict == "better"
        low, high = found.difference.low, found.difference.high
        student = stats.t.interval(0.95, 29, sum(gain) / 30, stats.sem(gain))
        assert (low, high) == pytest.approx(student, abs=0.002)

    def test_a_document_counts_once_whatever_the_seeds(self, tmp_path):
        """Four seeds of the same ten documents are ten units, each with its mean."""
        sides = {"a": [], "b": []}
        for number in range(10):
            for seed in range(4):
                doc = document("t", number, seed=seed)
                sides["a"].append(row(doc, "a", {"hit": 0.0}))
                sides["b"].append(row(doc, "b", {"hit": float(number < 5 or seed == 0)}))
        (found,) = compared([write(tmp_path / side, rows) for side, rows in sides.items()]).contrasts
        assert found.difference == difference([0.0] * 10, [1.0] * 5 + [0.25] * 5)
        assert found.difference.n == 10

    def test_only_seeds_of_both_sides_count(self, tmp_path):
        a = [row(document("t", n, seed=s), "a", {"hit": float(s == 0)}) for n in range(6) for s in (0, 1)]
        b = [row(document("t", n, seed=0), "b", {"hit": 1.0}) for n in range(6)]
        (found,) = compared([write(tmp_path / "a", a), write(tmp_path / "b", b)]).contrasts
        assert (found.before, found.after) == (1.0, 1.0)

    def test_other_metrics_are_adjusted_apart(self, tmp_path):
        rows = {"a": [], "b": []}
        for task in ("one", "two"):
            for n in range(30):
                for side in rows:
                    better = side == "b" and n < 12
                    scores = {"first": float(better), "second": float(better), "third": 1.0}
                    rows[side].append(row(document(task, n), side, scores))
        found = compared([write(tmp_path / side, made) for side, made in rows.items()]).contrasts
        p = 2 * 0.5**12
        assert {(c.metric, c.primary): (c.tests, pytest.approx(c.holm)) for c in found} == {
            ("first", True): (2, 2 * p),
            ("second", False): (4, 4 * p),
            ("third", False): (4, 1.0),
        }


class TestWords:
    def test_the_same_run_twice(self, pair):
        a, _ = pair({"conflict": outcomes(10, 0, 10, 10)})
        (found,) = compared([a, a]).contrasts
        assert found.verdict == "within noise"
        assert found.sentence == (
            "conflict: follows 0.333 → 0.333 on 30 documents, none of them with another score: within noise; "
            "0.251 or more would show with 80 % probability."
        )
        # 6 pairs that all change alike are the fewest that McNemar's test rejects at
        assert stats.binom.sf(5, 30, found.minimum_detectable) == pytest.approx(0.8, abs=1e-4)

    def test_lower_is_better(self, pair):
        folders = pair({"t": outcomes(15, 1, 5, 5)}, "toxicity", higher={"toxicity": False})
        (there,), (back,) = (compared(way).contrasts for way in (folders, folders[::-1]))
        assert (there.verdict, back.verdict) == ("worse", "better")
        assert (
            there.difference.mean == -back.difference.mean > 0 and "toxicity (lower is better) 0.231" in there.sentence
        )

    def test_few_documents_are_said_to_be_few(self, pair):
        (found,) = compared(pair({"t": outcomes(4, 0, 0, 0)})).contrasts
        assert found.minimum_detectable is None and "4 documents" in found.sentence
        assert found.sentence.endswith(
            "within noise; nothing can be said of what so few or such uniform scores would show."
        )

    def test_documents_of_one_side(self, tmp_path):
        a = [row(document("t", n), "a", {"hit": 0.0}) for n in range(8)]
        b = [row(document("t", n), "b", {"hit": 1.0}) for n in range(2, 11)]
        extra = [row(document("only", 0), "b", {"hit": 1.0})]
        found = compared([write(tmp_path / "a", a), write(tmp_path / "b", b + extra)])
        assert found.contrasts[0].difference.n == 6
        assert f"only in {tmp_path / 'b'}: only" in found.notes
        said = f"t: 2 only in {tmp_path / 'a'} and 3 only in {tmp_path / 'b'}; the 6 documents in both are compared"
        assert said in found.notes

    def test_other_prompts(self, tmp_path):
        rows = [row(document("t", n), "a", {"hit": 0.0}) for n in range(8)]
        other = [r | {"prompt_hash": "another"} if n < 3 else r for n, r in enumerate(rows)]
        found = compared([write(tmp_path / "a", rows), write(tmp_path / "b", other, versions={"t": 2})])
        assert found.notes == (
            "t: 3 of 8 documents have other prompts in the two runs (prompt_hash): "
            "the difference is one of prompts too",
            f"t: version 1 in {tmp_path / 'a'}, 2 in {tmp_path / 'b'}",
        )

    def test_errors_and_numbers_that_are_none(self, pair):
        scores = [(1, None), (None, 1), (1, float("nan")), *outcomes(0, 0, 5, 0)]
        found = compared(pair({"t": scores}))
        assert (found.contrasts[0].errors, found.contrasts[0].difference.n) == (3, 5)
        assert found.notes == ("t: follows: 3 of 8 documents have no score on one side and are left out",)

    def test_a_metric_of_some_documents_is_no_error(self, tmp_path):
        rows = [row(document("t", n), "a", {"hit": 1.0} | ({"rare": 0.0} if n < 3 else {})) for n in range(9)]
        found = compared([write(tmp_path / side, rows) for side in "ab"])
        assert [(c.metric, c.difference.n, c.errors) for c in found.contrasts] == [("hit", 9, 0), ("rare", 3, 0)]

    def test_a_direction_that_nobody_recorded(self, tmp_path):
        rows = [row(document("t", n), "a", {"hit": 1.0}) for n in range(3)]
        found = compared([write(tmp_path / side, rows, higher_is_better={}) for side in "ab"])
        assert found.notes == ("t: whether more hit is better is not recorded; it is taken to be",)


TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: [red, blue]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: f1, higher_is_better: true}
""",
    "say": r"""
output_type: generate_until
doc_to_text: "{{question}} Answer:"
doc_to_target: "?"
generation_kwargs: {until: ["."], max_gen_toks: 4}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: mark, filter: [{function: regex, regex_pattern: "([?])"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "guess": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " blue"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}
LM_EVAL = """
import sys
from pathlib import Path
from steerlens import models
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

here = Path(sys.argv[1])
model, tokenizer = models.load("tiny")
manager = TaskManager(include_path=str(here / "tasks"), include_defaults=False)
for shots, limit in ((0, 12), (1, 10)):
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    tracker = EvaluationTracker(output_path=str(here / f"shots{shots}"))
    found = simple_evaluate(
        lm, model_args={"pretrained": "tiny"}, tasks=sys.argv[2:], num_fewshot=shots, limit=limit, task_manager=manager,
        log_samples=True, evaluation_tracker=tracker, bootstrap_iters=0,
    )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for task in found["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Two folders that lm-eval wrote: the tiny model without a demonstration, and on fewer documents with one."""
    here = tmp_path_factory.mktemp("harness")
    (here / "tasks").mkdir()
    rows = [{"question": f"Which one is it, number {i}?", "answer": i % 2} for i in range(12)]
    (here / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for task, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {here / 'rows.jsonl'}}}}}\ntest_split: test"
        (here / "tasks" / f"{task}.yaml").write_text(f"task: {task}\n{data}\n{text}")
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(here / "cache")}
    environment = os.environ | quiet | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LM_EVAL, str(here), *TASKS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return here / "shots0", here / "shots1"


class TestHarness:
    def test_its_folders_are_read_whole(self, harness):
        run = load(harness[0])
        assert run.model == "tiny" and run.label == "" and sorted(run.samples) == sorted(TASKS)
        assert {task: len(rows) for task, rows in run.samples.items()} == {"choose": 12, "guess": 12, "say": 24}
        assert run.metrics("choose") == {"acc": True, "f1": False}
        assert run.metrics("say") == {"exact_match,whole": True, "exact_match,mark": True}
        # the means are those that lm-eval has taken itself
        own = {(c.task, c.metric): c.before for c in compare(run, run).contrasts}
        for task, metric in (("choose", "acc"), ("say", "exact_match,whole"), ("say", "exact_match,mark")):
            name = metric if "," in metric else f"{metric},none"
            assert own[task, metric] == pytest.approx(run.results["results"][task][name])
        assert own["say", "exact_match,mark"] > own["say", "exact_match,whole"]

    def test_they_are_compared(self, harness):
        found = compared(harness)
        assert [(c.task, c.metric, c.primary) for c in found.contrasts] == [
            ("choose", "acc", True),
            ("guess", "perplexity", True),
            ("guess", "acc", False),
            ("say", "exact_match,whole", True),
            ("say", "exact_match,mark", False),
        ]
        assert {c.difference.n for c in found.contrasts} == {10}
        notes = "\n".join(found.notes)
        assert "choose: f1 is left out, as its samples hold no single numbers" in notes
        assert "choose: 10 of 10 documents have other prompts" in notes
        assert f"choose: 2 only in {harness[0] / 'tiny'}; the 10 documents in both" in notes

    def test_perplexity_is_the_right_way_round(self, harness):
        """Its rows are log-likelihoods, of which more is better, though lm-eval says of the metric that less is."""
        found = compared(harness, tasks=["guess"], metrics=["perplexity"])
        (contrast,) = found.contrasts
        assert load(harness[0]).results["higher_is_better"]["guess"]["perplexity"] is False
        assert contrast.before < 0 and contrast.higher_is_better
        assert contrast.verdict == ("better" if contrast.after > contrast.before else "worse")
        assert "guess: perplexity is compared as the documents' log-likelihoods, where more is better" in found.notes

    def test_a_rolling_likelihood_counts_per_word(self, tmp_path):
        """lm-eval's rows hold a log-likelihood and the words it is spread over; its f1 holds pairs that are no such."""
        sides = []
        for side, values in (("a", (-12.0, -8.0)), ("b", (-8.0, -4.0))):
            rows = [row(document("read", i), side, {"f1": 1.0}) for i in range(2)]
            rows = [
                {**r, "word_perplexity": [value, 4], "f1": [1, 1], "metrics": ["word_perplexity", "f1"]}
                for r, value in zip(rows, values, strict=True)
            ]
            configs = {"read": {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]}}
            higher = {"word_perplexity": False}
            sides.append(write(tmp_path / side, rows, configs=configs, higher=higher))
        (contrast,) = compare(load(sides[0]), load(sides[1])).contrasts
        assert contrast.metric == "word_perplexity" and contrast.higher_is_better
        assert (contrast.before, contrast.after) == (-2.5, -1.5)


class TestErrors:
    def test_no_results(self, tmp_path):
        with pytest.raises(CompareError, match=r"none does not exist; give a folder that `steerlens eval`"):
            load(tmp_path / "none")
        with pytest.raises(CompareError, match=r"holds no results_<date>.json"):
            load(tmp_path)

    def test_several_runs(self, tmp_path):
        rows = [row(document("t", 0), "a", {"hit": 1.0})]
        for label in ("baseline", "pasta"):
            write(tmp_path / "tiny" / label, rows)
        with pytest.raises(CompareError) as error:
            load(tmp_path)
        assert f"holds 2 runs; give one of them: {tmp_path / 'tiny/baseline'}, {tmp_path / 'tiny/pasta'}" in str(
            error.value
        )

    def test_the_newest_date(self, tmp_path):
        for score, date in (
            (0.0, "2026-11-25T10-20-30.1"),
            (1.0, "2026-11-26T09-00-00"),
            (0.5, "2025-12-31T23-59-59.9"),
        ):
            write(tmp_path, [row(document("t", n), "a", {"hit": score}) for n in range(3)], date=date)
        found = compared([tmp_path, tmp_path / "results_2026-11-25T10-20-30.1.json"])
        assert (found.contrasts[0].before, found.contrasts[0].after) == (1.0, 0.0)
        assert found.notes[0] == f"{tmp_path} holds results of 3 dates: those of 2026-11-26T09-00-00 are compared"

    def test_no_samples(self, tmp_path):
        write(tmp_path, [row(document("t", 0), "a", {"hit": 1.0})])
        (tmp_path / f"samples_t_{DATE}.jsonl").unlink()
        with pytest.raises(CompareError, match=r"run lm-eval again with --log_samples"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"doc_id": 0, "doc_ha', "2: not JSON"),
            ("[]", "2: '[]' is not a JSON object"),
            ('{"doc_id": 0}', "2: 'doc_hash' is None; rows are paired by it, so it must be a text"),
            ('{"doc_id": "x", "doc_hash": "y"}', "2: 'doc_id' is 'x'; rows are paired by it, so it must be a number"),
            (None, "2: doc_id 0 stands twice"),
        ],
    )
    def test_a_row_that_cannot_be_paired(self, line, said, tmp_path):
        made = row(document("t", 0), "a", {"hit": 1.0})
        write(tmp_path, [made])
        path = tmp_path / f"samples_t_{DATE}.jsonl"
        path.write_text(path.read_text() + (json.dumps(made) if line is None else line))
        with pytest.raises(CompareError) as error:
            load(tmp_path)
        assert str(error.value).startswith(f"{path}:{said}") and error.value.exit_code == 2

    def test_bytes_that_are_no_text(self, tmp_path):
        write(tmp_path, [row(document("t", 0), "a", {"hit": 1.0})])
        path = tmp_path / f"samples_t_{DATE}.jsonl"
        path.write_bytes(path.read_bytes() + b'{"doc_id": "\xff"}\n')
        with pytest.raises(CompareError, match=r"jsonl:2: not JSON: 'utf-8' codec"):
            load(tmp_path)

    @pytest.mark.parametrize(("text", "said"), [('{\n"results": {', ":2: not JSON"), ("[]", " is no results file")])
    def test_results_that_cannot_be_read(self, text, said, tmp_path):
        path = tmp_path / f"results_{DATE}.json"
        path.write_text(text)
        with pytest.raises(CompareError) as error:
            load(tmp_path)
        assert str(error.value).startswith(f"{path}{said}")

    def test_nothing_in_common(self, pair, tmp_path):
        a, b = (load(folder) for folder in pair({"t": outcomes(1, 1, 1, 1)}))
        with pytest.raises(CompareError, match=r"task 'tt' is not in both runs; .* has t; .* has t; did you mean 't'"):
            compare(a, b, tasks=["tt"])
        with pytest.raises(CompareError, match=r"metric 'folows' is in none of the tasks; there are follows; did you"):
            compare(a, b, metrics=["folows"])
        c = load(write(tmp_path / "c", [row(document("u", 0), "c", {"follows": 1.0})]))
        with pytest.raises(CompareError, match=r"no task in common: .*a has t; .*c has u"):
            compare(a, c)
        d = load(write(tmp_path / "d", [row(document("t", 99), "d", {"follows": 1.0})]))
        with pytest.raises(CompareError, match=r"share no document with a score: other documents in t \(doc_hash\)"):
            compare(a, d)

    def test_only_errors(self, pair):
        with pytest.raises(CompareError, match=r"no document with a score; t: no metric has numbers in both"):
            compared(pair({"t": [(1, None)] * 3}))


class TestCommand:
    def ran(self, *arguments):
        return CliRunner().invoke(app, ["compare", *map(str, arguments)])

    def test_the_table_and_a_sentence_per_task(self, pair):
        found = self.ran(*pair({"one": outcomes(20, 1, 5, 4), "two": outcomes(2, 1, 5, 22)}))
        assert found.exit_code == 0
        lines = found.stdout.splitlines()
        assert lines[0].endswith("a (tiny, a)") and lines[1].endswith("b (tiny, b)")
        assert re.split("  +", lines[3].strip()) == list(COLUMNS)
        assert lines[4].split()[:5] == ["one", "follows", "30", "0.200", "0.833"] and lines[4].endswith("better")
        assert lines[5].split()[:5] == ["two", "follows", "30", "0.200", "0.233"] and lines[5].endswith("within noise")
        assert lines[7].startswith("one: follows 0.200 → 0.833 on 30 documents, a difference of +0.633 [+0.")
        assert lines[7].endswith("p = 2.1e-05, 4.2e-05 after Holm's correction for 2 tests: better.")
        assert lines[8].startswith("two: follows 0.200 → 0.233") and "within noise" in lines[8]

    def test_noise_whose_interval_excludes_0_is_explained(self, pair, tmp_path):
        """Five of five better: the exact test cannot reject, p = 2/32, though the interval lies above 0."""
        folders, output = pair({"t": outcomes(5, 0, 0, 0), "u": outcomes(3, 2, 0, 0)}), tmp_path / "c.md"
        found = self.ran(*folders, "--output", output)
        assert re.search(r"\+1.000 \[\+0\.\d+, \+1.000\] .* within noise\n", found.stdout)
        assert f"note: {UNSETTLED}" in found.stdout and f"- {UNSETTLED}" in output.read_text()
        both_sides = self.ran(*folders, "--task", "u")
        assert "within noise" in both_sides.stdout and UNSETTLED not in both_sides.stdout

    def test_json_and_markdown(self, pair, tmp_path):
        folders, output = pair({"one": outcomes(20, 1, 5, 4), "two": outcomes(2, 1, 5, 22)}), tmp_path / "c.md"
        found = self.ran(*folders, "--json", "--output", output, "--task", "one", "--metric", "follows")
        data = json.loads(found.stdout)
        assert data == compared(folders, tasks=["one"], metrics=["follows"]).to_dict()
        assert [c["task"] for c in data["contrasts"]] == ["one"] and data["after"]["label"] == "b"
        text = output.read_text("utf-8")
        assert text.startswith("# Comparison\n") and data["contrasts"][0]["sentence"] in text
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len(table) == 3 and len({line.count("|") for line in table}) == 1 and table[2].endswith(" better |")
        again = self.ran(*folders, "--output", output)
        assert again.exit_code == 2 and "exists; give another name, or --force" in again.stderr
        assert output.read_text("utf-8") == text
        assert self.ran(*folders, "--output", output, "--force").exit_code == 0
        assert "two: follows" in output.read_text("utf-8")

    def test_bad_input_writes_nothing(self, pair, tmp_path):
        (a, b), output = pair({"t": outcomes(1, 1, 1, 1)}), tmp_path / "c.md"
        for arguments, said in (
            ((a, tmp_path / "none"), "does not exist"),
            ((a, b, "--task", "u"), "task 'u' is not in both runs"),
            ((a, b, "--metric", "acc"), "metric 'acc' is in none of the tasks"),
            ((tmp_path, b), "holds 2 runs"),
        ):
            found = self.ran(*arguments, "--output", output)
            assert found.exit_code == 2 and said in found.stderr and not found.stdout and not output.exists()
        for bad in (tmp_path / "c.txt", tmp_path / "no" / "c.md"):
            found = self.ran(a, b, "--output", bad)
            assert found.exit_code == 2 and "--output" in found.stderr and not bad.exists()

    def test_it_needs_no_torch(self, pair):
        a, b = pair({"t": outcomes(9, 1, 3, 3)})
        code = (
            "import sys; from steerlens.cli import main; sys.argv = ['steerlens', 'compare', *sys.argv[1:]]\n"
            "try: main()\nfinally: print({'torch', 'datasets', 'lm_eval'} & set(sys.modules), file=sys.stderr)"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(a), str(b)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (
            done.stderr == "set()\n" and "within noise" not in done.stdout.splitlines()[3] and "better" in done.stdout
        )
