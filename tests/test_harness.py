"""lm-eval tasks under steering: lm-eval's own numbers without a method, the row alone steered by hand with one."""

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from steerlens.evals import cost, harness
from steerlens.evals.doc import Steering
from steerlens.evals.evaluate import Evaluation, Options
from steerlens.evals.folder import Worker
from steerlens.evals.harness_options import HarnessError
from steerlens.evals.job import Job
from steerlens.evals.world.tasks import sample

import steerlens
from steerlens import caches, models
from steerlens.errors import MethodError, RecipeError, SpanError, SteerlensError
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning
from steerlens.methods.base import DecodingMethod, PromptMethod
from steerlens.recipe import load_recipe

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._index import Entry, Kind, TaskIndex  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from steerlens.evals import harness_tasks  # noqa: E402
from steerlens.evals.harness_lm import SteerlensLM  # noqa: E402

ROOT = Path(__file__).parents[1]
PASTA_TINY = load_recipe("pasta-tiny").methods
BASELINE = Steering("baseline", role="baseline")


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of every kind on the same documents, plain and tagged; in `holey`, document 3 has no tag."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for seed in range(9):
        found = sample("conflict", 2_000_000_000 + seed, (40, 56, 48)[seed % 3])
        (start, stop), text = found.spans[0], found.prompt
        tagged = f"{text[:start]}<em>{text[start:stop]}</em>{text[stop:]}"
        choices = [found.alternatives[0], found.answer, f"{found.answer}. The {found.alternatives[0]}"]
        row = {"plain": text, "tagged": tagged, "holey": text if seed == 3 else tagged, "choices": choices, "gold": 1}
        rows.append(row)
    (folder / "docs.json").write_text("\n".join(map(json.dumps, rows)))

    def task(name, **config):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.json")}}}
        config = {"task": name, **data, "test_split": "test", **config}
        (folder / f"{name}.yaml").write_text(json.dumps(config))

    for column in ("plain", "tagged", "holey"):
        prompt = {"doc_to_text": "{{" + column + "}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
        task(f"choose_{column}", output_type="multiple_choice", **prompt, metric_list=[{"metric": "acc"}])
        options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
        exact = [{"metric": "exact_match", "regexes_to_ignore": [r"^\s+"]}]
        task(f"say_{column}", output_type="generate_until", **prompt, generation_kwargs=options, metric_list=exact)
    task(
        "text",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{plain}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["choose_plain", "say_plain"]}))
    (folder / "nested.yaml").write_text(json.dumps({"group": "nested", "task": ["both", "text"]}))
    return folder


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    """No network, and lm-eval's own index is never read."""

    def refuse(self, address):
        raise AssertionError(f"network: {address}")

    build = TaskIndex.build

    def local(paths, **options):
        assert not [path for path in paths if "lm_eval" in Path(path).parts], "the default index was built"
        return build(paths, **options)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(TaskIndex, "build", staticmethod(local))


@pytest.fixture
def run(tiny, folder):
    """`run(task, *methods, …)`: results and rows."""

    def go(task, *methods, batch_size=4, **entry):
        steering = Steering("steered", methods) if methods else BASELINE
        entry = {"lm_eval": task, "include_path": str(folder), **entry}
        return harness.run(*tiny, entry, steering, batch_size=batch_size, name="tiny")

    return go


def scores(rows):
    return [[float(resp[0][0]) for resp in row["resps"]] for row in rows]


def by_hand(tiny, methods, context, continuation, limit=1024):
    """The continuation's log-likelihood in a row of its own, and whether it is greedy; tags mark the emphasis."""
    model, tokenizer = tiny
    inputs, spans = steerlens.encode(tokenizer, context, tags="em" if "<em>" in context else None)
    clean = re.sub("</?em>", "", context)
    prompt = inputs["input_ids"][0].tolist()
    whole = tokenizer(clean + continuation, add_special_tokens=not clean.startswith("<s>"))["input_ids"]
    assert whole[: len(prompt)] == prompt
    cut = max(len(whole) - limit - 1, 0)
    whole, length = whole[cut:], len(prompt) - cut
    ranges = {group: [[(a - cut, b - cut) for a, b in rows[0]]] for group, rows in spans.groups.items()}
    parts = [whole[:-1]]
    if any(getattr(method, "decode", "") == "running" for method in methods):
        parts = [whole[:length], *([token] for token in whole[length:-1])]
    cache, logits = None, []
    with torch.no_grad(), steerlens.steer(model, list(methods), ranges or None, prompt_lengths=[length]):
        for part in parts:
            output = model(torch.tensor([part]), **{caches.NAME: cache})
            cache = caches.find(output)
            logits.append(output.logits[0])
    logits = torch.cat(logits).log_softmax(-1)[length - 1 :]
    rest = torch.tensor(whole[length:])
    return float(logits.gather(1, rest[:, None]).sum()), bool((logits.argmax(-1) == rest).all())


def by_hand_all(tiny, methods, rows, limit=1024):
    pairs = [[tuple(argument.values()) for argument in row["arguments"].values()] for row in rows]
    return [[by_hand(tiny, methods, *pair, limit) for pair in row] for row in pairs]


# --- without a method it is lm-eval's own model ----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["choose_plain", "say_plain", "text"])
def test_without_a_method_every_number_is_lm_evals(tiny, folder, run, task):
    model, tokenizer = tiny
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    expected = lm_eval.simple_evaluate(hf, tasks=[task], task_manager=manager, batch_size=4, **seeds)
    results, rows = run(task)
    theirs = [harness_tasks.plain_row(row) for row in expected["samples"][task]]
    assert [{key: row[key] for key in theirs[0]} for row in rows] == theirs
    assert {**harness_tasks.plain(expected["results"][task]), "sample_errors": 0} == results["results"][task]
    assert {k: rows[0][k] for k in ("model", "steering", "task", "seed")} == {
        "model": "tiny",
        "steering": "baseline",
        "task": task,
        "seed": 0,
    }
    # A neutral method goes through our own batching, and changes nothing either.
    _, neutral = run(task, ZeroTuning(1.0))
    assert [row["resps"] for row in neutral] == [row["resps"] for row in rows]


# --- steered: each row as it would be alone --------------------------------------------------------------------------

CASES = {
    "zerotuning": ("choose_plain", [ZeroTuning(4.0)], {}),
    "act": ("choose_plain", [ACT(0.2, 0.05)], {}),
    "act-running": ("choose_plain", [ACT(0.2, 1.5, threshold_mode="relative", decode="running")], {}),
    "headmask-decode": ("choose_plain", [HeadMask({1: "*", 4: "*"}, phase="decode")], {}),
    "headmask-prefill": ("choose_plain", [HeadMask({1: "*", 4: "*"}, phase="prefill")], {}),
    "pasta": ("choose_tagged", PASTA_TINY, {"tags": "em"}),
    "pasta-shots": ("choose_tagged", PASTA_TINY, {"tags": "em:emphasis", "num_fewshot": 1}),
    "pasta-chat": ("choose_tagged", PASTA_TINY, {"tags": {"emphasis": "em"}, "apply_chat_template": True}),
    "composed": ("choose_tagged", [*PASTA_TINY, ACT(0.2, 0.05)], {"tags": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_steered_log_likelihoods_are_those_of_each_row_alone(tiny, run, name):
    task, methods, entry = CASES[name]
    results, rows = run(task, *methods, **entry)
    expected = by_hand_all(tiny, methods, rows)
    assert len(rows) == 9 and results["config"]["steerlens_errors"] == []
    for row, wanted in zip(rows, expected, strict=True):
        assert [float(r[0][0]) for r in row["resps"]] == pytest.approx([total for total, _ in wanted], abs=1e-5)
        assert [r[0][1] for r in row["resps"]] == [greedy for _, greedy in wanted]
    plain = by_hand_all(tiny, [ZeroTuning(1.0)], rows)
    assert max(abs(a[0] - b[0]) for x, y in zip(expected, plain, strict=True) for a, b in zip(x, y, strict=True)) > 0.01


def test_shots_and_chats_carry_their_tags_to_where_they_are_stripped(run):
    _, shots = run("choose_tagged", *PASTA_TINY, tags="em", num_fewshot=2, limit=2)
    assert shots[0]["arguments"]["gen_args_0"]["arg_0"].count("<em>") == 3
    _, chats = run("choose_tagged", *PASTA_TINY, tags="em", apply_chat_template=True, limit=2)
    assert re.match(r"<s><\|user\|>.*<em>.*</em>.*<\|assistant\|>$", chats[0]["arguments"]["gen_args_0"]["arg_0"])


def test_continuations_that_differ_in_their_last_token_share_a_forward(tiny, run, monkeypatch):
    rows = []
    call = SteerlensLM._model_call
    monkeypatch.setattr(
        SteerlensLM, "_model_call", lambda self, inps, *a: rows.append(len(inps)) or call(self, inps, *a)
    )
    run("choose_plain", ZeroTuning(4.0))
    assert sum(rows) == 9 * 2  # two one-token choices and a longer one


def test_one_text_under_two_emphases_is_two_rows(tiny):
    parts = [f"The mascot of the eastern depot is {animal}." for animal in ("beaver", "wolf")]
    ask = " Question: What is the mascot of the eastern depot? Answer:"
    contexts = [f"<em>{parts[0]}</em> {parts[1]}{ask}", f"{parts[0]} <em>{parts[1]}</em>{ask}"]
    requests = [Instance("loglikelihood", {}, (context, " wolf"), 0) for context in contexts]
    lm = SteerlensLM(tiny[0], tokenizer=tiny[1], methods=PASTA_TINY, tags="em", batch_size=2)
    found = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx([by_hand(tiny, PASTA_TINY, context, " wolf")[0] for context in contexts], abs=1e-5)
    assert abs(found[0] - found[1]) > 0.1


def test_generation_is_steered_with_the_spans_of_its_batch(tiny, run):
    model, tokenizer = tiny
    results, rows = run("say_tagged", *PASTA_TINY, tags="em")
    _, plain = run("say_tagged", tags="em")
    for row in rows:
        inputs, spans = steerlens.encode(tokenizer, row["arguments"]["gen_args_0"]["arg_0"], tags="em")
        with steerlens.steer(model, list(PASTA_TINY), spans):
            output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert row["resps"] == [[tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]]
    assert results["results"]["say_tagged"]["exact_match,none"] == 1.0
    assert [row["resps"] for row in rows] != [row["resps"] for row in plain]
    assert [row["resps"] for row in plain] == [row["resps"] for row in run("say_plain")[1]]


def test_a_rolling_window_is_generated_behind_its_first_token(tiny, run):
    model, tokenizer = tiny
    method = HeadMask({2: "*"}, phase="decode")
    for limit in (1024, 16):
        _, rows = run("text", method, max_length=limit)
        for row in rows:
            ids = tokenizer(row["doc"]["plain"])["input_ids"]
            windows = get_rolling_token_windows(token_list=ids, prefix_token=1, max_seq_len=limit, context_len=1)
            total = 0.0
            for context, rest in map(make_disjoint_window, windows):
                with torch.no_grad(), steerlens.steer(model, method, prompt_lengths=[1]):
                    logits = model(torch.tensor([(context + rest)[:-1]])).logits[0].log_softmax(-1)
                total += float(logits[len(context) - 1 :].gather(1, torch.tensor(rest)[:, None]).sum())
            assert float(row["resps"][0][0]) == pytest.approx(total, abs=1e-4)


@dataclass(frozen=True)
class Sharpened(DecodingMethod):
    """Halves the temperature: a stand-in for methods that own their forwards."""

    name: ClassVar[str] = "sharpened"
    source: ClassVar[str] = "test"
    summary: ClassVar[str] = "test"

    def generate(self, model, inputs, spans, **kwargs):
        return model.generate(**inputs, **kwargs)

    def score(self, model, inputs, spans):
        logits = 2 * model(**inputs).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]


def test_a_decoding_method_scores_itself(tiny, run):
    model, tokenizer = tiny
    _, rows = run("choose_plain", Sharpened())
    for row in rows:
        for response, argument in zip(row["resps"], row["arguments"].values(), strict=True):
            context, continuation = argument.values()
            prompt = tokenizer(context)["input_ids"]
            whole = torch.tensor([tokenizer(context + continuation)["input_ids"]])
            with torch.no_grad():
                logits = (2 * model(whole).logits[0, len(prompt) - 1 : -1]).log_softmax(-1)
            rest = whole[0, len(prompt) :]
            assert float(response[0][0]) == pytest.approx(float(logits.gather(1, rest[:, None]).sum()), abs=1e-4)
            assert response[0][1] == bool((logits.argmax(-1) == rest).all())
    # A window of rolling text fills the model, and the method passes all of it through.
    for row in run("text", Sharpened(), max_length=17, limit=2)[1]:
        ids = tokenizer(row["doc"]["plain"])["input_ids"]
        windows = get_rolling_token_windows(token_list=ids, prefix_token=1, max_seq_len=16, context_len=1)
        total = 0.0
        for context, rest in map(make_disjoint_window, windows):
            whole = torch.tensor([context + rest])
            with torch.no_grad():
                total += float(Sharpened().score(model, {"input_ids": whole}, None)[0, len(context) - 1 :].sum())
        assert float(row["resps"][0][0]) == pytest.approx(total, abs=1e-3)
    _, rows = run("say_plain", Sharpened())
    assert [row["resps"] for row in rows] == [row["resps"] for row in run("say_plain")[1]]


# --- what cannot be steered as asked ---------------------------------------------------------------------------------


def test_left_truncation_moves_the_first_token_and_cuts_spans(tiny, run):
    limit = 40
    _, rows = run("choose_plain", ZeroTuning(4.0), max_length=limit)
    expected = by_hand_all(tiny, [ZeroTuning(4.0)], rows, limit)
    for got, wanted in zip(scores(rows), expected, strict=True):
        assert got == pytest.approx([total for total, _ in wanted], abs=1e-5)
    assert scores(rows) != scores(run("choose_plain", ZeroTuning(4.0))[1])

    results, rows = run("choose_tagged", *PASTA_TINY, tags="em", max_length=limit)
    tokenizer, cut = tiny[1], []
    for row in rows:
        context, continuation = row["doc"]["tagged"], max(row["doc"]["choices"], key=len)
        inputs, spans = steerlens.encode(tokenizer, context, tags="em")
        length = inputs["input_ids"].shape[1] + len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        if spans.groups["emphasis"][0][0][0] < length - limit - 1:
            cut.append(row["doc_id"])
    assert 0 < len(cut) < len(rows)
    failed = [row for row in rows if "error" in row]
    assert [row["doc_id"] for row in failed] == cut == [e["doc_id"] for e in results["config"]["steerlens_errors"]]
    assert all("left truncation" in row["error"] and row["resps"] == [] and "acc" not in row for row in failed)
    good = [row["acc"] for row in rows if "error" not in row]
    figures = results["results"]["choose_tagged"]
    assert figures["acc,none"] == pytest.approx(sum(good) / len(good)) and figures["sample_len"] == len(good)
    assert figures["sample_errors"] == len(cut)
    _, said = run("say_tagged", *PASTA_TINY, tags="em", max_length=limit)
    assert 0 < sum("error" in row for row in said) < len(said)


@pytest.mark.parametrize("task", ["choose_holey", "say_holey"])
def test_a_document_without_its_tag_is_a_sample_error_and_the_others_stay_as_they_are(run, task):
    results, rows = run(task, *PASTA_TINY, tags="em")
    assert [row["doc_id"] for row in rows if "error" in row] == [3]
    assert results["config"]["steerlens_errors"][0]["doc_id"] == 3
    assert "<em>" in results["config"]["steerlens_errors"][0]["error"]
    _, whole = run(task.replace("holey", "tagged"), *PASTA_TINY, tags="em")
    for one, two in zip(rows, whole, strict=True):
        if one["doc_id"] != 3 and task == "say_holey":
            assert one["resps"] == two["resps"]
        elif one["doc_id"] != 3:
            assert [r[0] for r in one["filtered_resps"]] == pytest.approx(
                [r[0] for r in two["filtered_resps"]], abs=1e-5
            )


def test_markup_is_text_unless_tags_are_on(tiny, run):
    _, rows = run("choose_tagged", limit=3)
    for row, got in zip(rows, scores(rows), strict=True):
        ids = tiny[1](row["doc"]["tagged"])["input_ids"]
        whole = tiny[1](row["doc"]["tagged"] + " " + row["doc"]["choices"][1])["input_ids"]
        with torch.no_grad():
            logits = tiny[0](torch.tensor([whole])).logits[0].log_softmax(-1)
        assert got[1] == pytest.approx(float(logits[len(ids) - 1, whole[-1]]), abs=1e-5)
    stripped, plain = scores(run("choose_tagged", limit=3, tags="em")[1]), scores(run("choose_plain", limit=3)[1])
    assert stripped == plain != scores(rows)


@dataclass(frozen=True)
class Rewritten(PromptMethod):
    name: ClassVar[str] = "rewritten"
    source: ClassVar[str] = "test"
    summary: ClassVar[str] = "test"

    def prepare(self, inputs, spans):
        return inputs, spans


@pytest.mark.parametrize(
    ("task", "method", "entry", "said"),
    [
        ("choose_tagged", PASTA(), {}, "pasta needs spans for 'emphasis', and no tag"),
        ("choose_tagged", PASTA(), {"tags": "b:documents"}, "pasta needs spans for 'emphasis', and no tag"),
        ("choose_plain", PASTA(), {"tags": "em"}, "first 8 prompts of task 'choose_plain' has a <em>"),
        ("say_plain", PASTA(), {"tags": "em"}, "first 8 prompts of task 'say_plain' has a <em>"),
        ("text", PASTA(), {"tags": "em"}, "pasta acts on spans"),
        ("text", ACT(), {}, "act acts on what it finds in the prompt"),
        ("text", HeadMask({0: "*"}, phase="prefill"), {}, "headmask acts on"),
        ("choose_plain", Rewritten(), {}, "rewritten rewrites prompts"),
        ("choose_plain", ZeroTuning(), {"tags": "<em>"}, "no tag's name"),
        ("choose_plain", ZeroTuning(), {"num_fewshots": 1}, "did you mean 'num_fewshot'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tiny, run, monkeypatch, task, method, entry, said):
    monkeypatch.setattr(tiny[0], "forward", lambda *a, **k: pytest.fail("a forward ran"))
    with pytest.raises(HarnessError, match=re.escape(said)) as caught:
        run(task, method, **entry)
    assert caught.value.exit_code == 2


def test_without_the_recorder_a_bad_sample_ends_the_run(tiny, folder):
    lm = SteerlensLM(tiny[0], tokenizer=tiny[1], methods=list(PASTA_TINY), tags="em")
    with pytest.raises(SpanError, match="<em>"):
        lm_eval.simple_evaluate(lm, tasks=["choose_holey"], task_manager=TaskManager(None, str(folder), False))


# --- options, results, caches, tasks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "methods"),
    [
        ({}, []),
        ({"method": "zerotuning", "gamma": 1.5}, [ZeroTuning(1.5)]),
        ({"method": "zerotuning+act", "act.beta": 0.3, "gamma": 2, "heads": "0:1"}, None),
        ({"method": "zerotuning+act", "act.beta": 0.3, "zerotuning.heads": "0:1"}, [ZeroTuning(heads="0:1"), ACT(0.3)]),
        ({"methods": '[{"method": "act", "beta": 0.1}]', "threshold": 0.2}, [ACT(0.1, 0.2)]),
        ({"recipe": "pasta-tiny", "alpha": 0.5, "tags": "em"}, [PASTA(0.5, heads=PASTA_TINY[0].heads)]),
    ],
)
def test_model_arguments_make_methods(arguments, methods):
    if methods is None:
        with pytest.raises(HarnessError, match="both have it"):
            SteerlensLM("tiny", device="cpu", **arguments)
        return
    lm = SteerlensLM("tiny", device="cpu", **arguments)
    assert lm.methods == methods and lm.backend == "causal"
    info = lm.get_model_info()
    assert info["steering"]["methods"] == [method.to_dict() for method in methods]
    assert info["steering"]["fingerprint"] == Steering("", tuple(methods)).fingerprint


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"method": "zerotunin"}, MethodError, "zerotuning"),
        ({"method": "zerotuning", "gama": 2}, MethodError, "did you mean 'gamma'"),
        ({"method": "zerotuning", "gamma": -1}, MethodError, "out of range"),
        ({"recipe": "pasta-tny", "tags": "em"}, RecipeError, "pasta-tiny"),
        ({"method": "zerotuning", "backend": "tritn"}, HarnessError, "did you mean 'triton'"),
        ({"methods": "zerotuning"}, HarnessError, "is not JSON"),
        ({"methods": '["zerotuning"]'}, HarnessError, "write a list such as"),
        ({"methods": [{"gamma": 2}]}, HarnessError, "write a list such as"),
        ({"methods": 5}, HarnessError, "write a list such as"),
        ({"method": 5}, MethodError, "unknown method '5'"),
        ({"tags": "em:emphasis;b:emphasis"}, HarnessError, "a group has two tags"),
        ({"pretrained": None}, HarnessError, "no model: give pretrained="),
    ],
)
def test_wrong_model_arguments_name_what_is_meant(arguments, error, said):
    with pytest.raises(error, match=said):
        SteerlensLM(**{"pretrained": "tiny", "device": "cpu", **arguments})


def test_results_say_how_they_were_steered(run):
    results, rows = run("both", ZeroTuning(1.5), limit=2)
    config = results["config"]
    assert config["model"] == "steerlens" and config["model_args"]["pretrained"] == "tiny"
    assert config["steering"]["methods"] == [ZeroTuning(1.5).to_dict()]
    assert config["steering"]["fingerprint"] == Steering("x", (ZeroTuning(1.5),)).fingerprint
    assert set(results["results"]) >= {"choose_plain", "say_plain"} and len(rows) == 4
    assert results["group_subtasks"] == {"both": ["choose_plain", "say_plain"]}
    json.dumps([results, rows], allow_nan=False)


def test_a_group_of_groups_runs_each_task_once(run):
    results, rows = run("nested", ZeroTuning(1.5), limit=2)
    assert [(row["task"], row["doc_id"]) for row in rows] == [
        (task, n) for task in ("choose_plain", "say_plain", "text") for n in range(2)
    ]
    assert set(results["group_subtasks"]) == {"nested", "both"}


def test_a_task_that_two_names_hold_is_refused(folder):
    with pytest.raises(HarnessError, match="'say_plain' and 'nested' both hold the task 'say_plain'"):
        harness.check(["say_plain", "nested"], str(folder))
    found = harness.check(["both", "text", "choose_tagged"], str(folder))
    assert sorted(found) == ["choose_plain", "choose_tagged", "say_plain", "text"]


def test_a_member_of_a_group_shares_no_file(folder, tmp_path):
    text = (ROOT / "evals/tasks/conflict.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("task: conflict", "task: say plain"))
    tasks = [str(tmp_path / "own.yaml"), {"lm_eval": "both", "include_path": str(folder)}]
    job = {"schema": 1, "name": "j", "models": ["tiny"], "tasks": tasks}
    with pytest.raises(SteerlensError, match="the tasks 'say plain' and 'say_plain' would share the file") as error:
        assert Job.from_dict(job).loaded
    assert error.value.exit_code == 2


def test_a_folder_that_is_not_there_is_named(folder):
    with pytest.raises(HarnessError, match=r"include_path '.*nowhere' is no folder"):
        harness.check(["both"], str(folder / "nowhere"))


def test_git_stays_silent_outside_a_repository(run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    results, _ = run("say_plain")
    assert "fatal" not in capfd.readouterr().err and results["git_hash"] is None


def test_a_steering_without_spans_is_told_how_to_mark_them(folder):
    pasta = {"label": "p", "methods": list(PASTA_TINY)}
    tasks = [{"lm_eval": "say_tagged", "include_path": str(folder)}]
    job = {"schema": 1, "name": "j", "models": ["tiny"], "steerings": [pasta], "tasks": tasks}
    with pytest.raises(SteerlensError, match=r"<em>…</em> .*'tags: em' in its job entry or --task-set 'say_tagged.ta"):
        cost.estimate(Job.from_dict(job))
    found = cost.estimate(Job.from_dict(job | {"tasks": [tasks[0] | {"tags": "em"}]}))
    assert not found["skipped"] and found["total"]["without"] == ["say_tagged"]


def test_a_response_cache_belongs_to_one_steering(tiny, folder, tmp_path):
    def go(*methods, **arguments):
        lm = SteerlensLM(tiny[0], tokenizer=tiny[1], methods=methods, tags="em", batch_size=4, **arguments)
        tasks = harness_tasks.Tasks(include_path=str(folder))
        cache = str(tmp_path / "responses")
        found = harness_tasks.evaluate(lm, tasks=["choose_holey"], task_manager=tasks, use_cache=cache)
        return [row["resps"] for row in found["samples"]["choose_holey"]], found["config"]["steerlens_errors"]

    first = go(*PASTA_TINY)
    assert go(*PASTA_TINY) == first and len(first[1]) == 1
    with pytest.raises(HarnessError, match="another model or steering"):
        go(PASTA(0.5))
    with pytest.raises(HarnessError, match="another model or steering"):
        go(*PASTA_TINY, add_bos_token=False)


def test_tasks_are_made_for_the_model_that_is_run(folder):
    """Runs share the index of tasks, not what their tasks are told of them."""
    told = [
        harness_tasks.load("say_plain", str(folder), json.dumps({"pretrained": name}))[1][0].config.metadata[
            "pretrained"
        ]
        for name in ("one", "other", "one")
    ]
    assert told == ["one", "other", "one"]


def test_a_local_group_may_hold_tasks_of_lm_eval(folder, tmp_path, monkeypatch):
    """Its index is read then, and only then."""
    (tmp_path / "beyond.yaml").write_text("group: beyond\ntask: [hellaswag]\n")
    read = []
    monkeypatch.setattr(harness_tasks.Tasks, "build_defaults", lambda tasks: read.append(tasks.include_path))
    harness_tasks.load("both", str(folder), '{"pretrained": "index"}')
    assert not read
    with contextlib.suppress(TypeError):  # no index here, so no such task
        harness_tasks.load("beyond", str(tmp_path), "{}")
    assert set(read) == {str(tmp_path)}


def test_lm_evals_index_is_read_for_names_that_are_not_local(folder, monkeypatch):
    harness.check(["choose_tagged", "both", str(folder / "text.yaml")], str(folder))
    harness_tasks.indexed.cache_clear()
    built = []

    def build(paths, **options):
        built.append(list(paths))
        return {"hellaswag": Entry("hellaswag", Kind.TASK, None, {})}

    monkeypatch.setattr(TaskIndex, "build", staticmethod(build))
    with pytest.raises(HarnessError, match="'hellaswg'; did you mean 'hellaswag'") as caught:
        harness.check(["hellaswg"])
    assert caught.value.exit_code == 2 and Path(lm_eval.__file__).parent / "tasks" in built[-1]
    times = len(built)
    harness.check(["hellaswag"])
    assert len(built) == times
    harness_tasks.indexed.cache_clear()


# --- in a job ---------------------------------------------------------------------------------------------------------


def test_a_job_gives_the_same_rows_in_one_process_and_in_shards(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: tiny)
    here = {"include_path": str(folder), "limit": 4}
    job = Job.from_dict(
        {
            "schema": 1,
            "name": "sharded",
            "models": ["tiny"],
            "steerings": ["pasta-tiny", {"label": "zero", "methods": [{"method": "zerotuning"}]}],
            "tasks": [
                {"task": "conflict", "limit": 4},
                {"lm_eval": "say_holey", "tags": "em", **here},
                {"lm_eval": "choose_plain", "num_fewshot": 1, **here},
            ],
            "max_new_tokens": 2,
            "batch_size": 2,
            "output": "results",
        }
    )

    def rows(output):
        found = {}
        for path in output.glob("tiny/*/samples_*.jsonl"):
            for row in map(json.loads, path.open()):
                row.pop("seconds", None)
                found[row["steering"], row["task"], row["doc_id"], row["filter"]] = row
        return found

    Evaluation(job, Options(tmp_path / "one")).run()
    assert Evaluation(job, Options(tmp_path / "two", Worker(1, 2))).run().missing
    assert not Evaluation(job, Options(tmp_path / "two", Worker(0, 2))).run().missing
    assert not Evaluation(job, Options(tmp_path / "one", resume=True)).run().written
    whole = rows(tmp_path / "one")
    assert whole == rows(tmp_path / "two") and len(whole) == 4 * (3 + 3 + 2)
    assert [key for key, row in whole.items() if "error" in row] == [("pasta-tiny", "say_holey", 3, "none")]
    said = [row["arguments"]["gen_args_0"]["arg_1"] for key, row in whole.items() if key[1] == "say_holey"]
    assert {options["max_gen_toks"] for options in said} == {2}


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_reports_usage_and_sample_errors(folder, tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--model", "steerlens", "--device", "cpu", *arguments])
        return harness.main()

    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    local = ["--include_path", str(folder), "--batch_size", "4"]
    steered = "pretrained=tiny,recipe=pasta-tiny"
    assert command("--model_args", steered, "--tasks", "choose_holey", *local) == 2
    assert "give tags=em:emphasis" in capsys.readouterr().err
    output = ["--output_path", str(tmp_path), "--log_samples"]
    tasks = "choose_holey,say_tagged"
    assert command("--model_args", f"{steered},tags=em", "--tasks", tasks, *local, *output) == 3
    assert "task choose_holey, doc_id 3: no <em>" in capsys.readouterr().err
    (results,) = (tmp_path / "tiny").glob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["steering"]["methods"] == harness_tasks.plain([method.to_dict() for method in PASTA_TINY])
    assert [error["doc_id"] for error in config["steerlens_errors"]] == [3]
    (samples,) = (tmp_path / "tiny").glob("samples_choose_holey_*.jsonl")
    assert [row["doc_id"] for row in map(json.loads, samples.open()) if "error" in row] == [3]


def test_two_processes_give_what_one_gives(run, folder, tmp_path):
    single = {task: run(task, *PASTA_TINY, tags="em") for task in ("choose_holey", "say_tagged")}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "steerlens.evals.harness"]
    options = ["--model", "steerlens", "--model_args", "pretrained=tiny,recipe=pasta-tiny,tags=em", "--batch_size", "4"]
    tasks = [
        "--tasks",
        ",".join(single),
        "--include_path",
        str(folder),
        "--log_samples",
        "--output_path",
        str(tmp_path),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, *command, "run", *options, *tasks], env=environment, capture_output=True)
    assert ran.returncode == 1 and b"choose_holey, doc_id 3: no <em>" in ran.stderr, ran.stderr.decode()[-8000:]
    (file,) = (tmp_path / "tiny").glob("results_*.json")
    results = json.loads(file.read_text())
    for task, (expected, rows) in single.items():
        (samples,) = (tmp_path / "tiny").glob(f"samples_{task}_*.jsonl")
        found = sorted(map(json.loads, samples.open()), key=lambda row: row["doc_id"])
        assert [row.get("error") for row in found] == [row.get("error") for row in rows]
        for ours, theirs in zip(rows, found, strict=True):
            assert ours["prompt_hash"] == theirs["prompt_hash"] and ours.get("acc") == theirs.get("acc")
            for one, two in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
                assert one == two if isinstance(one, str) else math.isclose(one[0], float(two[0]), abs_tol=1e-4)
        figures = {k: v for k, v in expected["results"][task].items() if isinstance(v, float | int)}
        assert {k: results["results"][task][k] for k in figures} == pytest.approx(figures)
