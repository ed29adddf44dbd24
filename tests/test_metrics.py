"""Metrics: values by hand and by the libraries that define them, what scores nothing, plug-ins, missing libraries."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef
from steerlens.evals import metrics
from steerlens.evals.doc import Doc, Output
from steerlens.evals.metrics import MetricError, degenerate
from steerlens.evals.metrics_answers import UNNAMED, normalize
from steerlens.evals.metrics_forms import entropy
from steerlens.evals.metrics_summaries import fragments

from steerlens.examples import Example

BIOGRAPHY = "She studied law in Lyon and later in Geneva, where her mother lived. He knew her well."
NEUTRAL = "They studied law in Lyon and later in Geneva, where their mother lived. They knew them well."
LABELS = ["positive", "negative"]
LOWER = {"constraints": [{"id": "change_case:english_lowercase", "kwargs": None}]}
IFEVAL = {"prompt": "…", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}


def doc(answer=None, data=None, choices=(), target=None, alternatives=()):
    return Doc("demo", 0, 0, Example("p", answer, tuple(alternatives)), tuple(choices), target, data=data or {})


def said(*texts):
    return Output(texts=texts)


def value(name, document, output, **arguments):
    metric = metrics.get(name)
    metric.check(arguments)
    return metric(document, output, **arguments)


def scorer(source, text):
    return float(text in source)


# What earns each text metric its best value: document, text, arguments.
BEST = {
    "exact": (doc("Paris"), "Paris", {}),
    "follows": (doc("Paris"), "Paris.", {}),
    "contains": (doc("Paris"), "It is Paris", {}),
    "em": (doc("Paris"), "the Paris!", {}),
    "f1": (doc("Paris"), "Paris", {}),
    "alternative": (doc("Paris", alternatives=["Rome"]), "Rome", {}),
    "label": (doc("positive"), "Positive: a joy", {"labels": LABELS}),
    "json_valid": (doc(), '{"occupation": "nurse"}', {"keys": ["occupation"]}),
    "json_value": (doc("nurse"), '{"occupation": "a nurse"}', {"key": "occupation"}),
    "pronoun_change": (doc(data={"bio": BIOGRAPHY}), NEUTRAL, {"source": "bio"}),
    "fluency": (doc(), BIOGRAPHY, {}),
    "ifeval_strict": (doc(data=IFEVAL), "no marks here", {}),
    "ifeval_loose": (doc(data=IFEVAL), "no marks here", {}),
    "ifeval_strict_share": (doc(data=IFEVAL), "no marks here", {}),
    "ifeval_loose_share": (doc(data=IFEVAL), "no marks here", {}),
    "constraints": (doc(data=LOWER), "this is all in lower case", {}),
    "constraints_first": (doc(data=LOWER), "this is all in lower case", {}),
    "constraints_last": (doc(data=LOWER), "this is all in lower case", {}),
    "obeys": (doc(data={"form": "capitals"}), "LOUD AND CLEAR", {}),
    "obeys_last": (doc(data={"form": "json"}), '{"color": "red"}', {}),
    "rouge1": (doc("a storm hit the coast"), "A storm hit the coast.", {}),
    "rouge2": (doc("a storm hit the coast"), "A storm hit the coast.", {}),
    "rougeL": (doc("a storm hit the coast"), "A storm hit the coast.", {}),
    "coverage": (doc(data={"document": "A storm hit the coast."}), "a storm hit", {}),
    "density": (doc(data={"document": "A storm hit the coast."}), "a storm hit", {}),
    "faithfulness": (doc(data={"document": "A storm hit."}), "storm", {"scorer": f"{__name__}:scorer"}),
}
CODED = {"macro_f1", "mcc"}
HOLLOW = ["", " \n", "…", "{}", "-" * 80, "no " * 9, '{"a": ""}' * 9]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _itself())


def _itself():
    module = type(sys)(__name__)
    module.scorer = scorer
    return module


class TestDegenerate:
    def test_every_text_metric_is_tried(self):
        built_in = {n for n in metrics.names() if metrics.get(n).output == "generate"}
        assert built_in == {*BEST, *CODED, "drift"}

    @pytest.mark.parametrize("name", BEST)
    def test_hollow_text_is_worth_nothing_where_the_best_is_worth_something(self, name):
        document, best, arguments = BEST[name]
        assert value(name, document, said(best), **arguments) >= 1
        for text in [*HOLLOW, f"{best} " * 12]:
            assert value(name, document, said(text), **arguments) == 0, text

    def test_drift_of_hollow_text_is_never_an_improvement(self):
        document = doc(data=LOWER)
        assert value("drift", document, said("NOT THIS ONE", "but this one is")) == 1
        assert value("drift", document, said("but this one is", "...")) == -1
        assert value("drift", document, said("...", "...")) == 0
        assert value("constraints", document, Output()) == 0

    @pytest.mark.parametrize("name", sorted(CODED))
    def test_corpus_metrics_count_it_as_no_label(self, name):
        for text in [*HOLLOW, "positive " * 9]:
            assert value(name, doc("positive"), said(text), labels=LABELS) == UNNAMED

    @given(st.text("abcdefgh ", min_size=1, max_size=12), st.integers(4, 40))
    def test_loops(self, phrase, times):
        letters = len(phrase.replace(" ", ""))
        assert degenerate(f"{phrase} " * times) == (letters == 0 or letters * times >= 12)

    @given(st.text("ab.", max_size=9), st.text("abc", max_size=30), st.integers(0, 9), st.text("abc.", max_size=30))
    def test_a_loop_over_more_than_half_is_found_wherever_it_lies(self, phrase, before, times, after):
        text = before + phrase * times + phrase[:3] + after

        def looped(start, period):
            stop = start + period
            while stop < len(text) and text[stop] == text[stop - period]:
                stop += 1
            most = max(12, len(text) // 2 + 1, 4 * period)
            return stop - start >= most and any(c.isalnum() for c in text[start : start + period])

        found = any(looped(start, period) for period in range(1, len(text) // 4 + 1) for start in range(len(text)))
        assert metrics._loops(text) == found

    def test_a_long_text_takes_no_time(self):
        text = "".join(chr(97 + i * i * 7919 % 26) + str(i) for i in range(40_000))
        start = time.perf_counter()
        assert not degenerate(text) and degenerate(text * 5)
        assert time.perf_counter() - start < 5

    @pytest.mark.parametrize(
        "text",
        ["1", "10000000000", BIOGRAPHY, "say: 1,000,000,000", "ha ha", "+1 (555) 555 5555", "東京都は日本の首都"],
    )
    def test_what_says_something(self, text):
        assert not degenerate(text)


class TestAnswers:
    def test_squad_by_hand(self):
        document = doc("A cat sat down", {"all": ["A cat sat down", "the dog"]})
        assert normalize("The  Cat's, a hat!") == "cats hat"
        assert value("f1", document, said("the cat sat")) == pytest.approx(0.8)  # 2 common words of 2 and 3
        assert value("em", document, said("Cat sat down.")) == 1
        assert value("em", document, said("dog")) == 0
        assert value("em", document, said("dog"), answers="all") == 1
        assert value("f1", document, said("a dog barks"), answers="all") == pytest.approx(2 / 3)

    def test_contains_the_answer_not_its_absence(self):
        assert value("contains", doc("The"), said("anything")) == 0  # normalises to nothing
        assert value("contains", doc("1"), said("in 2018")) == 1
        assert value("contains", doc("1"), said("in 2018"), words=True) == 0
        assert value("contains", doc("New York"), said("in new york, perhaps"), words=True) == 1

    @pytest.mark.parametrize(
        ("text", "right"),
        [
            ("positive", 1),
            (' "Positive".', 1),
            ("positively so", 0),
            ("negative, not positive", 0),
            ("it is positive", 0),
        ],
    )
    def test_label_is_the_first_word(self, text, right):
        assert value("label", doc("positive"), said(text), labels=LABELS) == right

    def test_the_longest_label_that_fits(self):
        labels = ["teacher", "teacher of yoga"]
        assert value("label", doc("teacher"), said("Teacher of yoga"), labels=labels) == 0

    def test_corpus_metrics_are_scikit_learns(self):
        gold = ["positive", "positive", "negative", "negative", "negative"]
        given = ["positive", "negative", "negative", "negative", "dunno"]
        for name in CODED:
            metric = metrics.get(name)
            cells = [metric(doc(g), said(t), labels=LABELS) for g, t in zip(gold, given, strict=True)]
            by_hand = {"macro_f1": (2 / 3 + 2 / 3) / 2, "mcc": matthews_corrcoef(gold, given)}
            assert metric.aggregate(cells) == pytest.approx(by_hand[name])
            assert not metric.paired and math.isnan(metric.aggregate([]))
        assert f1_score(gold, given, labels=LABELS, average="macro") == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("name", "document", "arguments", "says"),
        [
            ("em", doc(), {}, "needs 'answer'"),
            ("em", doc("a"), {"answers": "gold"}, "the field 'gold', which document 0 of task 'demo' does not have"),
            ("em", doc("a", {"gold": 3}), {"answers": "gold"}, "must be a list of answers"),
            ("alternative", doc("a"), {}, "needs 'alternatives'"),
            ("alternative", doc("a", alternatives=["b"]), {"by": "sound"}, "allowed: follows, em, contains"),
            ("label", doc("positve"), {"labels": LABELS}, "did you mean 'positive'"),
        ],
    )
    def test_what_is_lacking(self, name, document, arguments, says):
        with pytest.raises(MetricError, match=says):
            value(name, document, said("some text"), **arguments)


class TestChoices:
    def test_by_hand(self):
        document = doc(choices=[" ab", "abcd", "x"], target=1, data={"right": [1, 0, 1]})
        output = Output(logprobs=(math.log(0.4), math.log(0.2), math.log(0.2)))
        assert value("acc", document, output) == 0
        assert value("acc_norm", document, output) == 1  # -0.46, -0.40 and -1.61 per character
        assert value("acc", replace(document, target=0), output) == 1
        assert value("logprob", document, output) == pytest.approx(math.log(0.2))
        assert value("mc2", document, output) == pytest.approx(0.25)
        assert value("mc2", document, output, labels="right") == pytest.approx(0.75)
        assert value("mc2", document, Output(logprobs=(-math.inf,) * 3)) == 0

    def test_as_lm_eval(self):
        from lm_eval.api.task import ConfigurableTask

        class Task(ConfigurableTask):
            def __init__(self):
                self.OUTPUT_TYPE, self.multiple_input, self.multiple_target = "multiple_choice", 0, 0
                self._metric_fn_list = {"acc": None, "acc_norm": None}
                self._config = type("Config", (), {"process_results": None, "use_prompt": None})()

            def doc_to_choice(self, doc):
                return ["four", "a very long one", "x"]

            def doc_to_target(self, doc):
                return doc["right"]

        for logprobs in [(-3.0, -4.0, -2.0), (-3.0, -11.0, -2.9), (-8.0, -9.0, -2.1)]:
            for right in range(3):
                theirs = Task().process_results({"right": right}, [(one, False) for one in logprobs])
                ours = doc(choices=["four", "a very long one", "x"], target=right)
                assert theirs["acc"] == value("acc", ours, Output(logprobs=logprobs))
                assert theirs["acc_norm"] == value("acc_norm", ours, Output(logprobs=logprobs))

    def test_a_choice_without_likelihood(self):
        with pytest.raises(MetricError, match="log-likelihood for each of its 2 choices, not target 0 and 1"):
            value("acc", doc(choices=["a", "b"], target=0), Output(logprobs=(-1.0,)))


class TestForms:
    @pytest.mark.parametrize(
        ("text", "valid"),
        [
            ('{"occupation": "nurse"}', 1),
            ('```json\n{"occupation": ["nurse", "poet"]}\n```', 1),
            ('{"occupation": 0}', 1),
            ('{"name": "nurse"}', 0),
            ('{"occupation": ""}', 0),
            ('{"occupation": null}', 0),
            ('{"occupation": [""]}', 0),
            ('{"occupation": "nurse nurse nurse nurse"}', 0),
            ('{"occupation": "nurse", "occupation": "nurse"}', 0),
            ('{"occupation": NaN}', 0),
            ('{"occupation": "nurse"', 0),
            ('["occupation"]', 0),
            ('"occupation"', 0),
            ('Sure: {"occupation": "nurse"}', 0),
            ('{"occupation": "nurse"} as asked', 0),
        ],
    )
    def test_json(self, text, valid):
        assert value("json_valid", doc(), said(text), keys=["occupation"]) == valid

    def test_json_that_goes_on(self):
        text = '{"occupation": "nurse"}\nNext: {"occupation"'
        assert value("json_valid", doc(), said(text), whole=False) == 1
        assert value("json_value", doc("nurse"), said(text), key="occupation", whole=False) == 1
        assert value("json_value", doc("poet"), said(text), key="occupation", whole=False) == 0
        for name in ("json_valid", "json_value"):
            again = said('{"name": "Ann", "occupation": "nurse"}\n' * 6)
            assert value(name, doc("nurse"), again, whole=False) == 1 and value(name, doc("nurse"), again) == 0
            for text in [*HOLLOW, '{"occupation": "nurse nurse nurse nurse"}', "nurse " * 9]:
                assert value(name, doc("nurse"), said(text), whole=False) == 0
        assert value("json_value", doc("nurse"), said('{"name": "nurse"}'), key="occupation") == 0

    def test_entropy_by_hand(self):
        assert entropy("a b c d") == pytest.approx(math.log2(3) / 3 + 2 / 3)  # 3 bigrams, 2 trigrams, all distinct
        assert entropy("a a a a a") == entropy("a b") == 0

    @pytest.mark.parametrize(
        ("text", "passes"),
        [
            (NEUTRAL, 1),
            (NEUTRAL.replace("their", "her"), 0),
            (NEUTRAL.replace("They knew", "He knew"), 0),
            ("They work hard.", 0),
            ("The history of the theatre is a long one, there is little to say of it here.", 0),
            (NEUTRAL[:40], 0),
        ],
    )
    def test_pronouns(self, text, passes):
        assert value("pronoun_change", doc(data={"bio": BIOGRAPHY}), said(text), source="bio") == passes


class TestInstructions:
    ROW = {
        "key": 1,
        "prompt": "Write two bullet points without commas.",
        "instruction_id_list": [
            "punctuation:no_comma",
            "detectable_format:number_bullet_lists",
            "length_constraints:number_words",
        ],
        "kwargs": [
            {"num_bullets": None, "relation": None, "num_words": None},
            {"num_bullets": 2, "relation": None, "num_words": None},
            {"num_bullets": None, "relation": "less than", "num_words": 8},
        ],
    }

    @pytest.mark.parametrize(
        "text",
        [
            "* one\n* two",
            "Sure, here:\n* one\n* two",
            "* one\n* two\nHope that helps, dear friend of many words",
            "* one, two",
            "nothing of the kind",
        ],
    )
    def test_as_lm_eval(self, text):
        from lm_eval.tasks.ifeval.utils import process_results

        theirs = process_results(self.ROW, [text])
        document = doc(data=self.ROW)
        assert value("ifeval_strict", document, said(text)) == theirs["prompt_level_strict_acc"]
        assert value("ifeval_loose", document, said(text)) == theirs["prompt_level_loose_acc"]
        strict, loose = theirs["inst_level_strict_acc"], theirs["inst_level_loose_acc"]
        assert value("ifeval_strict_share", document, said(text)) == pytest.approx(sum(strict) / 3)
        assert value("ifeval_loose_share", document, said(text)) == pytest.approx(sum(loose) / 3)

    def test_turns(self):
        document = doc(data=LOWER)
        texts = said("a river runs through the town", "THE TOWN IS OLD AND GREY", "it has a small market", "No.")
        assert value("constraints", document, texts) == 0.5
        assert value("constraints_first", document, texts) == 1
        assert value("constraints_last", document, texts) == 0
        assert value("drift", document, texts) == -1

    def test_languages_are_told_the_same_way_twice(self):
        document = doc(data={"constraints": [{"id": "language:response_language", "kwargs": {"language": "pt"}}]})
        texts = said(*["no me importa too"] * 30)  # by draw pt or it
        assert value("constraints", document, texts) in (0, 1)

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ({}, "the field 'constraints'"),
            ({"constraints": []}, "not empty"),
            ({"constraints": ["no comma"]}, "must be a list of"),
            ({"constraints": [{"id": "punctuation:no_coma"}]}, "did you mean 'punctuation:no_comma'"),
            ({"constraints": [{"id": "punctuation:no_comma", "kwargs": {"marks": 1}}]}, "marks"),
            ({"constraints": [{"id": "language:response_language", "kwargs": {"language": "xx"}}]}, "KeyError: 'xx'"),
        ],
    )
    def test_constraints_that_are_none(self, data, says):
        with pytest.raises(MetricError, match=says):
            value("constraints", doc(data=data), said("some text"))

    def test_nothing_is_printed_of_a_download_that_failed(self, tmp_path):
        code = (
            "import nltk; nltk.download = lambda *_: print('Error loading');"
            "from steerlens.evals import metrics; metrics.get('constraints').prepare({});"
            "import lm_eval.tasks.ifeval.instructions_util"
        )
        nowhere = {**os.environ, "HOME": str(tmp_path), "NLTK_DATA": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=nowhere)
        assert "rror loading" not in done.stdout + done.stderr and "ownloaded" not in done.stdout + done.stderr

    def test_the_sentence_model_is_asked_for(self, monkeypatch):
        import nltk

        def missing(*_):
            raise LookupError

        monkeypatch.setattr(nltk.data, "find", missing)
        with pytest.raises(MetricError, match=r"python -m nltk\.downloader punkt_tab"):
            metrics.get("ifeval_strict").prepare({})
        row = {**IFEVAL, "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{}]}
        with pytest.raises(MetricError, match="number_sentences"):
            value("ifeval_strict", doc(data=row), said("One. Two."))
        metrics.get("constraints").prepare({})


class TestSummaries:
    def test_rouge_by_hand(self):
        document, text = doc("the cats sat on mats"), said("the cat sat")
        assert value("rouge1", document, text) == pytest.approx(0.75)  # 3 of 3 and 3 of 5 words
        assert value("rouge1", document, text, stem=False) == pytest.approx(0.5)  # 2 of 3 and 2 of 5
        assert value("rouge2", document, text) == pytest.approx(2 / 3)  # 2 of 2 and 2 of 4 pairs
        assert value("rougeL", document, said("sat the cat")) == pytest.approx(0.5)  # "the cat"

    def test_fragments_by_hand(self):
        source, summary = list("abcdefabd"), list("abdexabc")
        assert fragments(source, summary) == [3, 1, 3]  # "a b d" is longer than "a b"
        document = doc(data={"article": " ".join(source)})
        assert value("coverage", document, said(" ".join(summary)), source="article") == pytest.approx(7 / 8)
        assert value("density", document, said(" ".join(summary)), source="article") == pytest.approx(19 / 8)

    @given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcde"), max_size=12))
    def test_what_is_covered_is_what_the_source_has(self, source, summary):
        found = fragments(source, summary)
        assert sum(found) == sum(token in source for token in summary)
        assert sum(fragments(source, source)) == len(source) and len(fragments(source, source)) <= 1

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("no_such_module:score", "cannot be loaded: No module named 'no_such_module'"),
            ("math:no_such", "cannot be loaded"),
            ("math:pi", "is a float; it must be a function"),
            ("math", "unknown scorer 'math'"),
        ],
    )
    def test_scorers_that_are_none(self, name, says):
        with pytest.raises(MetricError, match=says):
            metrics.get("faithfulness").prepare({"scorer": name})

    def test_scores_that_are_none(self):
        with pytest.raises(MetricError, match="gave 'x'; it must give a finite number"):
            value("faithfulness", doc(data={"document": "storm"}), said("x"), scorer="builtins:max")


class TestRegistry:
    def test_unknown(self):
        with pytest.raises(MetricError, match="did you mean 'rougeL'"):
            metrics.get("rougel")
        with pytest.raises(MetricError, match="no argument 'answer'; it takes answers, words; did you mean 'answers'"):
            metrics.get("contains").check({"answer": "x"})
        with pytest.raises(MetricError, match="needs the argument 'labels'"):
            metrics.get("label").prepare({})
        assert MetricError.exit_code == 2

    def test_aggregate(self):
        assert metrics.get("em").aggregate([0, 1, 1, 1]) == 0.75
        assert math.isnan(metrics.get("em").aggregate([]))
        assert [n for n in metrics.names() if not metrics.get(n).higher_is_better] == ["alternative"]

    def plugged(self, monkeypatch, tmp_path, text):
        (tmp_path / "plugged_metrics.py").write_text(f"from steerlens.evals import metrics\n{text}\n")
        entry = EntryPoint("shout", "plugged_metrics:shout", "steerlens.metrics")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "plugged_metrics", raising=False)
        metrics.names()
        monkeypatch.setattr(metrics, "_REGISTRY", dict(metrics._REGISTRY))
        monkeypatch.setattr(metrics, "entry_points", lambda group: [entry] if group == "steerlens.metrics" else [])
        metrics._load.cache_clear()
        monkeypatch.setattr(metrics, "_load", metrics._load.__wrapped__)

    def test_plug_in(self, monkeypatch, tmp_path):
        text = "@metrics.metric('shout')\ndef shout(doc, output):\n    return output.text.isupper()"
        self.plugged(monkeypatch, tmp_path, text)
        assert "shout" in metrics.names()
        assert value("shout", doc(), said("LOUD")) == 1 and value("shout", doc(), said("LOUD" * 9)) == 0

    def test_plug_in_without_decorator(self, monkeypatch, tmp_path):
        self.plugged(monkeypatch, tmp_path, "shout = metrics.Metric('shout', lambda doc, output: 1.0)")
        assert value("shout", doc(), said("any")) == 1

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("shout = print", r"entry point 'shout' .* must be a steerlens\.evals\.metrics\.Metric"),
            ("shout = metrics.Metric('em', print)", "'em' is registered already"),
        ],
    )
    def test_plug_in_that_is_none_or_takes_a_name(self, monkeypatch, tmp_path, text, says):
        self.plugged(monkeypatch, tmp_path, text)
        with pytest.raises(MetricError, match=says):
            metrics.names()

    @pytest.mark.parametrize(
        ("name", "missing"),
        [
            ("rougeL", ("rouge_score", "rouge_score.rouge_scorer")),
            ("mcc", ("sklearn", "sklearn.metrics")),
            ("ifeval_strict", ("lm_eval", "lm_eval.tasks.ifeval.instructions_registry")),
        ],
    )
    def test_missing_library(self, monkeypatch, name, missing):
        for module in missing:
            monkeypatch.setitem(sys.modules, module, None)
        arguments = {"labels": LABELS} if name == "mcc" else {}
        with pytest.raises(MetricError, match=r"pip install 'steerlens\[eval\]'"):
            metrics.get(name).prepare(arguments)

    def test_names_load_no_library(self):
        code = (
            "import sys, json; from steerlens.evals import metrics; names = metrics.names();"
            "print(json.dumps([m for m in ('torch', 'transformers', 'datasets', 'lm_eval', 'sklearn', 'nltk', "
            "'rouge_score') if m in sys.modules]))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == []
