"""`steerlens heads lookback|contextual|sra|importance|maps`: what they write, and what a newcomer gets wrong."""

import json
import os

import pytest
from typer.testing import CliRunner

from steerlens.cli import app
from steerlens.heads import Heads
from steerlens.measures.base import HeadScores

FULL = {
    "prompt": "The mascot of Elmford is a fox. Question: What is the mascot of Elmford? Answer:",
    "answer": "fox",
    "groups": {"context": "The mascot of Elmford is a fox.", "gold": "a fox"},
    "emphasize": "a fox",
}
SMALL = ("--samples", "4", "--length", "64")


def heads(*arguments):
    return CliRunner().invoke(app, ["heads", *map(str, arguments)])


@pytest.fixture
def data(tmp_path):
    def write(*rows):
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return file

    return write


@pytest.mark.parametrize(
    ("arguments", "top"),
    [
        (("lookback", *SMALL), None),
        (("lookback", "--exclude-sink-and-self", "--teacher-forced", *SMALL), None),
        (("contextual", *SMALL), {1: [1, 2, 3, 4, 5, 6, 7]}),
        (("sra", *SMALL), {1: [1, 2, 3, 4, 5, 6, 7]}),
        (("importance", *SMALL), None),
        (("importance", "--estimator", "token", "--normalize", *SMALL), None),
        # tiny's retrieval heads copy embeddings
        (("maps", "--embedding", "raw", "--tokens", "300"), {1: [1, 2, 3, 4, 5, 6, 7]}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_scores_are_written_and_read_back(arguments, top, tmp_path):
    file = tmp_path / "heads.json"
    found = heads(*arguments, "--output", file, "--top", 3)
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines()[0].split()[:3] == ["layer", "head", arguments[0]]
    scores = HeadScores.load(file)
    assert len(scores.scores) == 48 and file.with_suffix(".png").stat().st_size > 1000
    assert Heads.parse(f"{file}:top7").to_json() == scores.top(7) and top in (None, scores.top(7))


def test_files_of_ones_own(data, tmp_path):
    file = data(FULL)
    for measure in ("lookback", "contextual", "sra", "importance"):
        found = heads(measure, "--data", file, "--json")
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["settings"]["examples"] == 1
    pairs = tmp_path / "pairs.jsonl"
    rows = [("same", "red", "red"), ("same", "blue", "notoneword"), ("other", "red", "blue")]
    pairs.write_text("\n".join(json.dumps(dict(zip(("relation", "source", "target"), r, strict=True))) for r in rows))
    found = json.loads(heads("maps", "--pairs", pairs, "--relation", "same", "--json").stdout)
    assert found["summary"]["pairs"] == {"same": 1, "other": 1} and found["settings"]["k"] == 10
    assert found["summary"]["skipped_pairs"] == {"same": 1, "other": 0}
    assert len(found["scores"]["0-0"]) == 1


@pytest.mark.parametrize(
    ("arguments", "second", "expected"),
    [
        (("contextual",), {"answer": "x"}, "contextual needs a group 'gold'"),
        (("lookback",), {"answer": "x"}, "lookback needs a group 'context'"),
        (("lookback", "--teacher-forced"), {"groups": FULL["groups"]}, "lookback needs an 'answer'"),
        (("sra",), {"answer": "x"}, "sra needs a group 'emphasis'"),
        (("importance",), {"emphasize": "color"}, "importance needs an 'answer'"),
        (
            ("sra",),
            {"emphasize": "red", "groups": {"emphasis": "red"}},
            "'emphasize' and 'groups.emphasis' are the same",
        ),
        (("sra",), {"emphasize": "not there"}, "example 2, group 'emphasis': 'not there' is not in the prompt"),
    ],
)
def test_what_an_example_lacks_is_named(arguments, second, expected, data):
    second = {"prompt": "The color of the door is red. Question: What is the color? Answer:", **second}
    found = heads(*arguments, "--data", data(FULL, second))
    assert found.exit_code == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert expected in line and ("example 2" in line or "data.jsonl:2" in line) and "on_missing" not in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("contextual", "--task", "memory"), "contextual needs a group 'gold'"),
        (("maps", "--relation", "x"), "--relation 'x' needs --pairs"),
        (("maps", "--pairs", "no/such.jsonl"), "no/such.jsonl cannot be read"),
        (("importance", "--estimator", "tokens"), "token"),
        (("importance", "--data", "x", "--length", "64"), "--length shapes the prompts of a task; leave it out"),
        (("retrieval", "--length", "64"), "--length: of the prompts of --task and --data; needles"),
        (("retrieval", "--samples", "3", "--lengths", "64"), "--samples: of the prompts"),
        (("maps", "--pairs", "x", "--tokens", "3"), "--tokens are drawn for copying"),
    ],
)
def test_wrong_options(arguments, expected):
    found = heads(*arguments)
    assert found.exit_code == 2 and found.stdout == "" and expected in found.stderr


def test_a_folder_that_cannot_be_written_in_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    found = heads("induction", "--output", tmp_path / "x.json", "--model", "./nowhere")
    assert found.exit_code == 2 and "nothing can be written in" in found.stderr


def test_a_family_that_maps_does_not_know(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from steerlens import models

    config = AutoConfig.for_model(
        "helium",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    models.load("tiny", "cpu")[1].save_pretrained(tmp_path)
    found = heads("maps", "--model", tmp_path, "--tokens", "3")
    (line,) = found.stderr.splitlines()[-1:]
    assert found.exit_code == 1 and "'helium'" in line and "known: cohere, cohere2" in line
