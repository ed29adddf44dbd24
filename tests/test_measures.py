"""Measures of heads: the formulas against the specification's numbers, the measures on `tiny` and small models."""

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_models import build
from steerlens.evals import examples as world
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import steerlens
from steerlens.cli import app
from steerlens.encoding import Chars, Regex, Role, Substring
from steerlens.errors import HeadError
from steerlens.examples import Example, ExampleError, read
from steerlens.heads import Heads
from steerlens.measures import maps, needles, repeated, retrieval, sinks
from steerlens.measures.base import HeadScores, MeasureError, batches, greedy
from steerlens.methods import HeadMask
from steerlens.models import load

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
MODEL = {"id": "m", "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu", dtype="float32")


def heads(*arguments):
    return CliRunner().invoke(app, ["heads", *map(str, arguments)])


# --- scores -------------------------------------------------------------------------------------------------


def scores(**more):
    return HeadScores("m", MODEL, {(1, 0): [0.25, 0.5], (0, 1): [0.375], (0, 0): [0.9], (1, 1): [0.1]}, **more)


def test_scores_rank_by_mean_with_ties_by_index():
    found = scores()
    assert found.means() == {(0, 0): 0.9, (0, 1): 0.375, (1, 0): 0.375, (1, 1): 0.1}
    assert HeadScores("m", MODEL, {(1, 0): [1], (0, 1): [1], (0, 0): [2]}).ranked() == [(0, 0), (0, 1), (1, 0)]
    assert found.top(3) == {0: [0, 1], 1: [0]}
    with pytest.raises(HeadError, match="top 5 were asked for; m scores 4 heads"):
        found.top(5)


def test_scores_are_written_and_read(tmp_path):
    found = scores(other={"count": {(0, 0): [1 / 3]}}, settings={"a": 1}, summary={"n": 2})
    found.save(tmp_path / "s.json")
    data = json.loads((tmp_path / "s.json").read_text())
    assert list(data) == ["measure", "model", "settings", "summary", "date", "versions", "scores", "other"]
    assert data["scores"]["1-0"] == [0.25, 0.5] and data["other"]["count"] == {"0-0": [0.333333]}
    assert HeadScores.load(tmp_path / "s.json") == found
    assert Heads.parse(f"{tmp_path}/s.json:top3") == Heads.parse(found.top(3))
    (tmp_path / "other.json").write_text('{"0-0": 1}')
    (tmp_path / "none.json").write_text(json.dumps(data | {"scores": {}}))
    for name in ("other.json", "missing.json", "none.json"):
        with pytest.raises(HeadError, match=f"{name} holds no head scores"):
            HeadScores.load(tmp_path / name)


@pytest.mark.parametrize("values", [[], [float("nan")], [1, float("inf")]])
def test_scores_that_are_no_numbers_are_refused(values):
    with pytest.raises(MeasureError, match="head 0-1"):
        HeadScores("m", MODEL, {(0, 0): [1], (0, 1): values})
    with pytest.raises(MeasureError, match="no head"):
        HeadScores("m", MODEL, {})


def test_heat_map_and_table(tmp_path):
    found = scores(other={"count": {h: [2] for h in [(0, 0), (0, 1), (1, 0), (1, 1)]}})
    found.heat_map(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]
    columns, rows = found.table(2)
    assert columns == ["layer", "head", "m", "count"]
    assert rows == [["0", "0", "0.9", "2"], ["0", "1", "0.375", "2"]]


def test_batches_name_the_prompt_that_is_too_long(tiny):
    examples = [Example("one"), Example("the " * 1100)]
    with pytest.raises(ExampleError, match=r"example 2 has 1103 tokens.* room for 1024"):
        list(batches(*tiny, examples, 2))


def test_batches_count_examples_over_batches(tiny):
    examples = [Example("one"), Example("two", groups={"gold": ("three",)})]
    with pytest.raises(ExampleError, match=r"^example 2, group 'gold': 'three' is not in the prompt"):
        list(batches(*tiny, examples, 1, groups=("gold",)))


def test_greedy_is_the_model_alone(tiny, monkeypatch):
    """Whatever its config would do to the likeliest token; to the end of its room or the tokenizer's end of text."""
    model, tokenizer = tiny
    inputs, _ = steerlens.encode(tokenizer, [world.generate("lookup", 1)[0].prompt, "The the the the"])
    expected = []
    for row in range(2):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row] == 1][None]
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected.append(ids[0, -12:].tolist())
    for name, value in {"repetition_penalty": 9.0, "num_beams": 3, "do_sample": True, "eos_token_id": None}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    for ended in (expected[0][3], expected[1][5]):
        other = SimpleNamespace(eos_token_id=ended, pad_token_id=0)
        stops = [row.index(ended) if ended in row else 12 for row in expected]
        got = greedy(model, other, inputs, 12)
        assert got == [row[:stop] for row, stop in zip(expected, stops, strict=True)]
    long, _ = steerlens.encode(tokenizer, "the " * 1018)
    room = 1024 - long["input_ids"].shape[1]
    assert 0 < room == len(greedy(model, SimpleNamespace(eos_token_id=None, pad_token_id=0), long, 50)[0])


# --- retrieval ----------------------------------------------------------------------------------------------

PROMPT = [1, 50, 10, 11, 12, 13, 51, 11, 60, 61]


@pytest.mark.parametrize(
    ("keys", "produced", "count", "distinct"),
    [
        ([3, 4, 3, 5], [11, 12, 11, 99], 0.75, 0.5),
        ([7, 4, 3, 5], [11, 12, 11, 99], 0.5, 0.5),
        ([3, 3, 3, 3, 3], [11] * 5, 1.25, 0.25),  # a token copied again and again: the count is no share
        ([10, 11, 0, 1], [10, 11, 1, 50], 0, 0),  # generated keys, and keys outside the needle
    ],
)
def test_copy_scores_of_the_specification(keys, produced, count, distinct):
    counts, sets = retrieval.copy_scores(torch.tensor([keys, [0] * len(keys)]), produced, PROMPT, range(2, 6))
    assert (counts.tolist(), sets.tolist()) == ([count, 0], [distinct, 0])


@pytest.mark.parametrize("case", [f"llama_{kind}_score{n}" for kind in ("mha", "gqa") for n in range(3)])
def test_published_retrieval_scores(case):
    """The published code's keys and counts, from our capture around `generate`."""
    data = load_file(GOLDEN / f"rethead__{case}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / case.rsplit("_", 1)[0]).eval()
    with torch.no_grad(), steerlens.capture(model, stats=("argmax",), rows="last") as record:
        out = model.generate(data["input_ids"], do_sample=False, max_new_tokens=24, eos_token_id=[], pad_token_id=0)
    ids, produced = data["input_ids"][0].tolist(), data["generated_ids"][0].tolist()
    assert out[0, len(ids) :].tolist() == produced
    for layer in record.layers:
        keys = record[layer].argmax[0]
        assert torch.equal(keys.T, data["top1_key"][:, layer].to(keys.dtype))
        counts, _ = retrieval.copy_scores(keys, produced, ids, range(*data["needle_range"].tolist()))
        assert torch.allclose(counts, data["retrieval_score"][layer].float(), atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        ("The code is 4417.", "It IS the code, 4417!", 1),
        ("eat a sandwich and a pie", "a sandwich", 2 / 6),  # "a" is wanted twice, given once
        ("4417", " 441", 0),
        ("?!", "so?!", 1),
        ("?!", "so", 0),
        ("北京", "首都是北京。", 1),
        ("北京", "南京 of 4417", 0.5),
    ],
)
def test_recall_counts_words_with_repeats(reference, response, expected):
    assert retrieval.recall(reference, response) == pytest.approx(expected)


def test_the_needle_is_the_answer_inside_the_gold_span():
    text = "So. The code of 44 is 4417. Yes."
    start = text.index("The code")
    gold = lambda selector, prompt=text, answer="4417": retrieval._narrow(  # noqa: E731
        Example(prompt, answer, groups={"gold": (selector,)})
    )
    (chars,) = gold(Chars(start, start + 23))
    assert text[chars.start : chars.stop] == "4417"
    assert gold(Chars(start, start + 23), answer="44")[0].start == text.index("44 is")  # a word, no part of one
    (chars,) = gold(Chars(0, 12), "中国的首都是北京，不是南京", "北京")
    assert (chars.start, chars.stop) == (6, 8)
    assert gold(Chars(0, 3)) == (Chars(0, 3),)
    assert gold("The code of 44 is 4417.", answer=None) == ("The code of 44 is 4417.",)
    assert gold(Role("user")) == (Role("user"),)
    chat = ({"role": "user", "content": text},)
    for selector in ("code of 44 is 4417.", Substring("code of 44 is 4417.", "last")):
        (found,) = gold(selector, chat)
        assert isinstance(found, Regex) and re.search(found.pattern, text)[1] == "4417"


def test_no_accepted_trial_is_an_error(tiny):
    examples = [Example(f"{e.prompt} Nobody near", e.answer, groups=e.groups) for e in world.generate("lookup", 3)]
    with pytest.raises(MeasureError, match=r"none of 3 trials was accepted.*the last was"):
        retrieval.measure(*tiny, examples, max_new_tokens=2)
    with pytest.raises(ExampleError, match=r"group 'gold'.* example 2 "):
        retrieval.measure(*tiny, [*examples[:1], Example("What?", "x")])


def test_half_of_the_words_are_not_enough(tiny, monkeypatch):
    examples = world.generate("lookup", 2)
    monkeypatch.setattr(retrieval, "recall", lambda reference, response: 0.5)
    with pytest.raises(MeasureError, match=r"none of 2 trials was accepted"):
        retrieval.measure(*tiny, examples, max_new_tokens=2)


def test_the_row_of_the_newline_is_the_last():
    tokenizer = SimpleNamespace(decode=lambda ids: {1: "a", 2: ".\n"}[ids[0]])
    assert retrieval._line([1, 1, 2, 1, 2], tokenizer) == [1, 1, 2]
    assert retrieval._line([1, 1], tokenizer) == [1, 1] and retrieval._line([], tokenizer) == []


def test_batches_change_no_score(tiny):
    """Padding, rows that stop early and their company leave a row's scores alone."""
    examples = [e for n in (40, 64, 96) for e in world.generate("lookup", 2, length=n, first_seed=900)]
    alone, together = (retrieval.measure(*tiny, examples, batch_size=n) for n in (1, 6))
    assert alone.summary["accepted"] > 3
    assert alone.scores == together.scores and alone.other == together.other


# --- needles ------------------------------------------------------------------------------------------------


def test_needles_stand_at_sentence_ends_and_lengths_are_met(tiny):
    _, tokenizer = tiny
    hay, hidden = world.haystack(200, 0), world.needles(12, 0)
    assert len({needle.text for needle in hidden}) == 12
    examples = needles.grid(tokenizer, hidden, hay, [60, 120], [0, 50, 100], 2, seed=1)
    assert len(examples) == 12
    for number, example in enumerate(examples):
        length, depth = [60, 120][number // 3 % 2], [0, 50, 100][number % 3]
        size = len(tokenizer(example.prompt)["input_ids"])
        assert length - 20 < size <= length
        (gold,), (context,) = example.groups["gold"], example.groups["context"]
        text, before = example.prompt[: context.stop], example.prompt[: gold.start]
        assert example.prompt[gold.start : gold.stop] == hidden[number].text
        assert example.prompt[context.stop :] == f" Question: {hidden[number].question} Answer:"
        assert before == "" or before.endswith(". ")
        rest = len(text) - len(hidden[number].text)
        assert -80 < len(before) - depth / 100 * rest <= 0  # characters: the end of the sentence before
    assert examples == needles.grid(tokenizer, hidden, hay, [60, 120], [0, 50, 100], 2, seed=1)
    # The last sentence of a file has no space behind it.
    (again,) = needles.grid(tokenizer, hidden, ["It rained.\n", "Nobody came."], [90], [0], 1)
    assert "It rained.\nNobody came. It rained.\nNobody came. " in again.prompt
    with pytest.raises(ExampleError, match=r"a prompt of 9 tokens is too short.*--lengths"):
        needles.grid(tokenizer, hidden, hay, [9], [0], 1)


def test_real_texts_split_into_sentences(tmp_path):
    text = 'He said "No." Then 3.5 men left! 好。坏。\n\nA title\n\nThe end'
    (tmp_path / "hay.txt").write_text(text, encoding="utf-8")
    found = needles.sentences(tmp_path / "hay.txt")
    assert "".join(found) == text
    assert [s.strip() for s in found] == ['He said "No."', "Then 3.5 men left!", "好。", "坏。", "A title", "The end"]
    (tmp_path / "n.jsonl").write_text('{"needle": "X is 4.", "question": "What is X?"}\n')
    assert needles.read(tmp_path / "n.jsonl") == [needles.Needle("X is 4.", "What is X?")]
    for line, message in [
        ('{"needle": "X"}', "n.jsonl:1: .*'needle' and 'question'"),
        ('{"needle": "X", "question": 3}', "n.jsonl:1: 'question' is 3"),
        ('{"needle": "X", "question": "q", "anser": "3"}', "n.jsonl:1: unknown key 'anser'.*did you mean 'answer'"),
        ("[", "n.jsonl:1: not JSON"),
        ("", "holds no needle"),
    ]:
        (tmp_path / "n.jsonl").write_text(line)
        with pytest.raises(ExampleError, match=message):
            needles.read(tmp_path / "n.jsonl")


@pytest.mark.parametrize(
    ("reader", "row"),
    [
        (read, {"prompt": "a{}b"}),
        (needles.read, {"needle": "a{}b", "question": "q"}),
        (maps.read, {"relation": "r", "source": "a{}b", "target": "t"}),
    ],
    ids=["examples", "needles", "pairs"],
)
def test_every_data_file_is_read_alike(reader, row, tmp_path):
    """A line ends at a line feed alone, and what no tokenizer can take is named by its line."""
    file, line = tmp_path / "d.jsonl", json.dumps(row)
    odd = "\u2028\x85"
    rows = [line.replace("a{}b", f"a{odd}b"), "", line.replace("a{}b", "ab")]
    file.write_text("\r\n".join(rows), encoding="utf-8-sig")
    assert repr(f"a{odd}b") in repr(reader(file)) and "'ab'" in repr(reader(file))
    for bad, message in [
        (line.replace("a{}b", "\\ud800"), "d.jsonl:2: holds half of a surrogate pair"),
        ("[" * 100_000, "d.jsonl:2: not JSON: maximum recursion"),
        ("[]", r"d.jsonl:2: '\[\]' is not a JSON object"),
    ]:
        file.write_text(f"{rows[2]}\n{bad}\n")
        with pytest.raises(ExampleError, match=message):
            reader(file)


# --- sinks --------------------------------------------------------------------------------------------------


def test_sink_metric_of_the_specification():
    weights = torch.tensor(
        [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.2, 0.3, 0], [0.4, 0.1, 0.2, 0.3]], dtype=torch.float64
    )
    means = weights.sum(0) / torch.arange(4, 0, -1)
    assert torch.allclose(means, torch.tensor([0.625, 0.7 / 3, 0.25, 0.3]).double())
    assert [sinks.percent([mean], 0.3) for mean in means.tolist()] == [100, 0, 0, 0]
    padded = torch.cat([torch.tensor([torch.nan] * 2).double(), means])[None, None]
    first, hidden = sinks.first_and_hidden(padded, 0.24)
    assert (first.item(), hidden.item()) == (0.625, pytest.approx(2 / 3))
    assert sinks.first_and_hidden(padded, 0.3)[1].item() == 0  # above it, not at it


def test_sinks_are_the_column_means_of_eager_attention(tiny):
    model, tokenizer = tiny
    examples = [Example(e.prompt) for n in (40, 64) for e in world.generate("needle", 2, length=n)]
    found = sinks.measure(model, tokenizer, examples, tokens=30)
    assert found.summary["tokens"] == [30, 30] and found.summary["prompts"] == 4
    eager = AutoModelForCausalLM.from_pretrained(ROOT / "steerlens" / "tiny", attn_implementation="eager").eval()
    for place, example in enumerate(examples):
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"][:, :30]
        with torch.no_grad():
            maps = eager(ids, output_attentions=True).attentions
        for layer, weights in enumerate(maps):
            for head, value in enumerate(weights[0, :, :, 0].mean(-1).tolist()):
                assert found.scores[layer, head][place] == pytest.approx(value, abs=1e-5)


def test_sinks_of_a_padded_row_are_those_of_the_row_alone(tiny):
    """GPT-2 counts pads as positions unless it is told."""
    _, tokenizer = tiny
    model = build("gpt2", vocab_size=len(tokenizer))
    examples = [Example(e.prompt) for n in (32, 64) for e in world.generate("lookup", 1, length=n)]
    alone, together = (sinks.measure(model, tokenizer, examples, batch_size=n) for n in (1, 2))
    for head, values in alone.scores.items():
        assert together.scores[head] == pytest.approx(values, abs=1e-5)


def test_sinks_read_the_beginning_of_long_texts(tiny):
    found = sinks.measure(*tiny, [Example("the " * 1100)])
    assert found.summary["tokens"] == [64, 64]
    with pytest.raises(ExampleError, match=r"room for 1024: give shorter prompts, or have fewer"):
        sinks.measure(*tiny, [Example("the " * 1100)], tokens=1100)


def test_massive_activations_are_summed_up_by_channel(tiny):
    model, tokenizer = tiny

    def blow_up(module, arguments, output):
        hidden = output.clone()
        hidden[0, -short, 7], hidden[1, 0, 7], hidden[1, 5, 9] = 7e4, -9e4, 8e4
        return hidden

    examples = [Example("one or two"), Example("one or two or three or four")]
    short, long = (len(tokenizer(example.prompt)["input_ids"]) for example in examples)
    assert short < long
    assert sinks.measure(model, tokenizer, examples).summary["massive_activations"] == []
    hook = model.model.layers[3].register_forward_hook(blow_up)
    try:
        found = sinks.measure(model, tokenizer, examples).summary["massive_activations"]
    finally:
        hook.remove()
    assert [row["channel"] for row in found] == [7, 9]
    assert [row["on_first_token"] for row in found] == [1, 0]
    assert found[0]["largest_per_layer"].keys() == {"3", "4", "5"}  # the residual stream carries it on
    assert (found[0]["largest_per_layer"]["3"], found[1]["largest_per_layer"]["3"]) == (-9e4, 8e4)


def test_the_first_tokens_of_padded_rows():
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    for count, expected, real in [
        (2, [[5, 6], [1, 2]], [[1, 1], [1, 1]]),
        (4, [[0, 5, 6, 7], [1, 2, 3, 4]], [[0, 1, 1, 1], [1] * 4]),
    ]:
        cut = sinks.first_tokens({"input_ids": ids, "attention_mask": mask}, count)
        assert (cut["input_ids"].tolist(), cut["attention_mask"].tolist()) == (expected, real)


# --- repeated tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [0, 1])
def test_formulas_on_made_up_weights(bos):
    length = 3
    total = 2 * length + bos
    weights = torch.zeros(1, 2, total, total)
    # Head 0 looks at what followed the same token, one row of three half-heartedly; head 1 at the token before.
    for row, weight in zip(range(bos + length, total), (1, 0.5, 1), strict=True):
        weights[0, 0, row, row - length + 1] = weight
    for row in range(1, total):
        weights[0, 1, row, row - 1] = 1 if row > bos else 0.7
    assert repeated.induction(weights, length).tolist() == [[pytest.approx(2.5 / 3), 0]]
    assert repeated.previous(weights, length).tolist() == [[0, 1]]


def test_sequences_are_random_tokens_twice(tiny):
    model, tokenizer = tiny
    ids = repeated.sequences(model, tokenizer, 40, 3, 5)
    assert ids.shape == (3, 81) and (ids[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(ids[:, 1:41], ids[:, 41:])
    assert not set(ids[:, 1:].flatten().tolist()) & set(tokenizer.all_special_ids)
    assert torch.equal(ids, repeated.sequences(model, tokenizer, 40, 3, 5))
    assert not torch.equal(ids, repeated.sequences(model, tokenizer, 40, 3, 6))


def test_sequences_begin_with_bos_where_texts_do(tiny):
    model, tokenizer = tiny
    bare = copy.deepcopy(tokenizer)
    bare.add_bos_token = False
    bare.backend_tokenizer.post_processor = ByteLevel()
    assert bare.bos_token_id is not None and bare("a")["input_ids"][0] != bare.bos_token_id
    ids = repeated.sequences(model, bare, 40, 3, 5)
    assert torch.equal(ids, repeated.sequences(model, tokenizer, 40, 3, 5)[:, 1:])


def test_a_sliding_window_hides_the_first_half(model_of, tiny):
    _, tokenizer = tiny
    found = repeated.measure(model_of("mistral"), tokenizer, length=20, samples=2)
    assert set(found.means().values()) == {0}
    assert min(repeated.measure(model_of("mistral"), tokenizer, "previous", length=20, samples=2).means().values()) > 0


def test_large_maps_are_taken_in_parts(tiny, monkeypatch):
    whole = repeated.measure(*tiny, length=12, samples=3)
    monkeypatch.setattr(repeated, "MAP_LIMIT", 4 * 8 * 25**2 * 2 + 1)
    parts = repeated.measure(*tiny, length=12, samples=3, batch_size=3)
    for head, values in whole.scores.items():
        assert parts.scores[head] == pytest.approx(values, abs=1e-5)
    with pytest.raises(ExampleError, match=r"600 tokens, twice \(1201\), .* of 1024: allowed are 2 to 511 "):
        repeated.measure(*tiny, length=600)


# --- the command --------------------------------------------------------------------------------------------


def test_retrieval_finds_the_heads_that_look_up(tiny, tmp_path):
    """Without the 7 best heads `tiny` cannot look things up, without 7 others it can."""
    out = tmp_path / "out.json"
    found = heads("retrieval", "--lengths", "128,256", "--trials", 1, "--top", 7, "--output", out)
    assert found.exit_code == 0, found.stderr
    assert found.stdout.splitlines()[0].split() == ["layer", "head", "retrieval", "count"]
    assert "attempted: 10\n" in found.stdout
    assert f"wrote {out} and {tmp_path / 'out.png'}; use: --heads {out}:top7" in found.stderr
    data = json.loads(out.read_text())
    assert data["model"] == {"id": "tiny", "layers": 6, "heads": 8}
    assert data["settings"]["lengths"] == [128, 256] and data["settings"]["seed"] == 0
    chosen = Heads.parse(f"{out}:top7")
    assert chosen == Heads.parse("1:1-7")

    model, tokenizer = tiny
    lookups = world.generate("lookup", 40, first_seed=700_000, length=256)
    others = random.Random(0).sample([(n, h) for n in range(6) for h in range(8) if n != 1], 7)

    def accuracy(mask):
        inputs, _ = steerlens.encode(tokenizer, [e.prompt for e in lookups])
        with steerlens.steer(model, mask):
            texts = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(texts, skip_special_tokens=True)
        return sum(a.strip().removesuffix(".") == e.answer for a, e in zip(answers, lookups, strict=True)) / 40

    assert accuracy(HeadMask(heads=f"{out}:top7")) < 0.3
    assert accuracy(HeadMask(heads=";".join(f"{n}:{h}" for n, h in others))) > 0.6
    prompt = ["--prompt", lookups[0].prompt, "--max-new-tokens", "6", "--compare", "--json"]
    steered = CliRunner().invoke(app, ["run", "--method", "headmask", "--heads", f"{out}:top7", *prompt])
    result = json.loads(steered.stdout)["results"][0]
    assert result["baseline"].strip() == lookups[0].answer != result["steered"].strip()


def test_induction_heads_of_tiny_stand_above_heads_that_look_one_token_back():
    """All retrieval heads are induction heads."""
    found = json.loads(heads("induction", "--samples", 4, "--json").stdout)
    means = {head: sum(values) / len(values) for head, values in found["scores"].items()}
    assert {head for head, mean in means.items() if mean > 0.5} == {f"1-{head}" for head in range(8)}
    found = json.loads(heads("previous", "--samples", 4, "--json").stdout)
    means = {head: sum(values) / len(values) for head, values in found["scores"].items()}
    assert {head for head, mean in means.items() if mean > 0.5} == {"0-3", "0-7"}


def test_your_own_prompts(tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [
        {
            "prompt": e.prompt,
            "answer": e.answer,
            "groups": {"gold": [e.prompt[slice(*vars(e.groups["gold"][0]).values())]]},
        }
        for e in world.generate("lookup", 4, first_seed=60, length=64)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = heads("retrieval", "--data", data, "--samples", 3, "--count", "--json")
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["summary"]["attempted"] == 3 and result["settings"]["data"] == str(data)
    assert list(result["other"]) == ["set"] and result["settings"]["rank"] == "count"


def test_real_haystacks_get_the_published_question(tmp_path, monkeypatch):
    (tmp_path / "hay.txt").write_text("It rained. Nobody came. " * 30)
    (tmp_path / "n.jsonl").write_text(json.dumps({"needle": "The best thing is {tea}.", "question": "What is best?"}))
    seen = []
    monkeypatch.setattr(retrieval, "measure", lambda model, tokenizer, examples, **_: seen.extend(examples) or scores())
    options = ["--haystack", tmp_path / "hay.txt", "--needles", tmp_path / "n.jsonl"]
    found = heads("retrieval", *options, "--lengths", 200, "--depths", "0,100")
    assert found.exit_code == 0, found.stderr
    assert len(seen) == 4
    end = "\nBased on the content of the book, Question: What is best?\nAnswer:"
    assert all(example.prompt.endswith(end) for example in seen)
    assert seen[0].prompt.startswith("The best thing is {tea}. ") and seen[1].prompt.removesuffix(end).endswith(
        "{tea}."
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["retrieval", "--task", "lokup"], 2, "unknown task 'lokup'.*did you mean 'lookup'"),
        (["sinks", "--data", "{here}/none.jsonl"], 2, "none.jsonl cannot be read"),
        (["retrieval", "--data", "{here}/plain.jsonl"], 2, "retrieval needs a group 'gold'.*example 1 "),
        (["retrieval", "--data", "{here}/lost.jsonl"], 2, "group 'gold'.*'nowhere' is not in the prompt"),
        (["retrieval", "--data", "{here}/long.jsonl"], 2, "example 1 has 11.. tokens.*room for 1024"),
        (["retrieval", "--data", "{here}/hard.jsonl"], 1, "none of 1 trials was accepted"),
        (["retrieval", "--lengths", "64", "--task", "lookup"], 2, "--lengths shape needles.*leave out --task"),
        (["retrieval", "--lengths", "64,x"], 2, "--lengths '64,x' is not a list of whole numbers"),
        (["retrieval", "--depths", "50,101"], 2, "from 0 to 100"),
        (["retrieval", "--lengths", "12"], 2, "12 tokens is too short"),
        (["retrieval", "--lengths", "2000", "--depths", "0"], 2, "example 1 has 1... tokens.*room for 1024"),
        (["retrieval", "--task", "lookup", "--data", "x"], 2, "--task and --data exclude each other"),
        (["sinks", "--output", "{here}/old.json"], 2, "old.json exists; .*--force"),
        (["sinks", "--output", "{here}/picture.json"], 2, "picture.png exists; .*--force"),
        (["sinks", "--output", "{here}/no/out.json"], 2, "there is no folder"),
        (["sinks", "--output", "{here}/out.txt"], 2, "must end in .json"),
        (["induction", "--length", "600"], 2, "room of 1024: allowed are 2 to 511 tokens"),
        (["induction", "--model", "./nowhere"], 1, "no such folder"),
    ],
)
def test_what_newcomers_get_wrong(arguments, code, message, tmp_path):
    """One line that says what is wrong, the exit code, and nothing written."""
    gold = {"prompt": "The code of the hall is 1.", "answer": "1", "groups": {"gold": ["nowhere"]}}
    for name, row in {
        "plain": {"prompt": "w1"},
        "lost": gold,
        "long": gold
        | {"prompt": "the hall is 1. " * 230, "groups": {"gold": ["the hall is 1. the hall is 1. " * 115]}},
        "hard": {"prompt": "The hall was blue.", "answer": "zebra", "groups": {"gold": ["The hall was blue."]}},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "picture.png").write_text("")
    before = sorted(tmp_path.iterdir())
    arguments = [a.replace("{here}", str(tmp_path)) for a in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "fresh.json")]
    found = heads(*arguments)
    assert (found.exit_code, found.stdout) == (code, ""), found.stderr
    assert len(found.stderr.splitlines()) == 1 and re.search(message, found.stderr), found.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_force_writes_over(tmp_path):
    out = tmp_path / "old.json"
    out.write_text("{}")
    assert heads("sinks", "--samples", 1, "--length", 32, "--output", out, "--force").exit_code == 0
    assert json.loads(out.read_text())["measure"] == "sinks"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="waits for a pipe")
def test_a_stopped_run_says_so(tmp_path):
    os.mkfifo(tmp_path / "data.jsonl")
    command = [sys.executable, "-m", "steerlens.cli", "heads", "sinks", "--data", str(tmp_path / "data.jsonl")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not caught(running.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert (running.stdout.read(), running.stderr.read()) == ("", "steerlens: stopped; no scores were written\n")


def caught(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return int(mask, 16) >> (signal.SIGHUP - 1) & 1


def test_help_of_heads_loads_nothing_heavy():
    code = (
        "import sys; from steerlens.cli import app\n"
        "try: app(['heads', 'retrieval', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'numpy', 'matplotlib', 'yaml')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.stderr.strip() == "[]" and "--lengths" in found.stdout and "--model" in found.stdout
