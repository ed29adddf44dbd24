"""FocusICL: the numbers of methods/context.md §6."""

import itertools
import json
import math
import random
import sys

import pytest
import torch
from method_checks import BACKENDS, apart, attend, close, generate, keeps_its_promises
from small_models import NO_SDPA
from typer.testing import CliRunner

import steerlens
from steerlens import around, blocks, models
from steerlens.backends.call import Call
from steerlens.cli import app
from steerlens.edits import DropLowest, SpanKeys
from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.examples import Example, ExampleError
from steerlens.fitting import focusicl
from steerlens.methods import PASTA, ZeroTuning, get
from steerlens.methods.focusicl import FocusICL
from steerlens.passes import Pass, Prompt
from steerlens.prompted import Setting
from steerlens.spans import Spans

focus = sys.modules["steerlens.fitting.focusicl"]  # the function has its module's name
SCORES = torch.tensor([1, 0, 2, -1, 0.5, 1.5, 1, 0.5])
VALUES = torch.arange(1.0, 9.0)
SPANS = {"demos": [[(2, 6), (7, 9), (10, 13), (13, 16)], [(8, 10), (10, 12), (13, 16)], [(4, 8)]]}
"""Of the fixture `prompts("left")`: rows of 20, 13 and 17 tokens; the last has no second batch."""


def two_batches(weights):
    method = FocusICL(0, 3, weights)
    groups = {"demos": [[(0, 6)]], "batches": [[(0, 3), (3, 6)]], "before batches": [[(0, 3)]], "behind": [[(6, 8)]]}
    return Setting("focusicl", {0: method.edits((0,), [2])}, groups), groups


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weights", "output", "query"), [("demos", 4.747643, 0.326396), ("all", 4.856795, 0.331592)])
def test_hierarchy(backend, weights, output, query):
    setting, groups = two_batches(weights)
    got = attend([[SCORES.softmax(0).tolist()]], setting, backend, spans=groups)[0, 0]
    close(got @ VALUES, output, 3e-6)
    close(got[6:].sum(), query)
    if weights == "demos":
        factors = (got / SCORES.softmax(0))[[0, 3, 6]]
        close(factors, (0.895836, 0.746428, 1.642264), 4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["demos", "all"])
def test_rows_of_the_demonstrations_see_their_batch_alone(backend, weights):
    setting, groups = two_batches(weights)
    square = SCORES.expand(8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1)
    got = attend([square.tolist()], setting, backend, spans=groups)[0]
    assert got[3:6, :3].abs().max() == 0
    for row, keys in ((2, slice(0, 3)), (5, slice(3, 6))):
        close(got[row, keys], SCORES[keys].softmax(0).tolist())
    close(got[7] @ VALUES, {"demos": 4.747643, "all": 4.856795}[weights], 3e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_filter(backend):
    now = Pass(Prompt.start(8, None, 1, SCORES.device), 7, 1, None, True, {0: (8, 0)})
    query, value = SCORES[None, None, None], VALUES[None, None, :, None].expand(1, 1, 8, 8)
    call = Call(query, torch.eye(8)[None, None], value, None, 1.0, None, 7, None, True)
    close(around.attention(backend, call, [], now, 0, lambda part: [])[..., 0], 4.355803, 3e-6)
    spans = Spans.of({"demos": [[(0, 6)]]})
    placed = [around.Placed(DropLowest((0,), SpanKeys("demos"), 0.4), spans, None)]
    close(around.attention(backend, call, placed, now, 0, lambda part: [])[..., 0], 4.476488, 3e-6)
    call.value = torch.eye(8)[None, None]
    weights = around.attention(backend, call, placed, now, 0, lambda part: [])[0, 0, 0]
    close(weights, (0.131925, 0, 0.358609, 0, 0.080017, 0.217508, 0.131925, 0.080017))


def test_filter_counts_visible_keys_and_takes_the_earlier_of_equal_ones():
    x = torch.tensor([[[[1.0, 1, 1, 1, 0, 1, 1, 1, 1, 1]]]])
    seen = torch.tensor([True] * 10)
    edit = DropLowest((0,), SpanKeys("demos"), 0.3)
    assert around._lowest(x, seen, edit)[0, 0, 0].nonzero()[:, 0].tolist() == [0, 1, 4]
    seen[7:] = False
    assert around._lowest(x, seen, edit)[0, 0, 0].nonzero()[:, 0].tolist() == [0, 4]
    assert not around._lowest(x, seen & False, edit).any()


@pytest.mark.parametrize(("keys", "fraction", "dropped"), [(150, 0.42, 63), (100, 0.59, 59), (7, 0.4, 2), (3, 0.3, 0)])
def test_filter_rounds_down_and_no_further(keys, fraction, dropped):
    x = torch.arange(float(keys))[None, None, None]
    found = around._lowest(x, x >= 0, DropLowest((0,), SpanKeys("demos"), fraction))
    assert found[0, 0, 0].nonzero()[:, 0].tolist() == list(range(dropped))


def test_positions():
    assert blocks.aligned([0], [[(0, 5), (5, 8)]], 10).tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 6]]
    assert blocks.aligned([2], [[(4, 5), (5, 8)]], 10).tolist() == [[0, 0, 0, 1, 4, 2, 3, 4, 5, 6]]
    assert blocks.aligned([1], [[(3, 6)]], 8).tolist() == [[0, 0, 1, 2, 3, 4, 5, 6]]


def test_batches():
    demos = [(2, 6), (7, 9), (10, 13), (13, 16), (17, 18)]
    assert FocusICL(batch=2).batches(demos) == [(2, 10), (10, 17), (17, 18)]
    assert FocusICL(batch=None).batches(demos) == FocusICL(batch=9).batches(demos) == [(2, 18)]


METHODS = {
    "filter": FocusICL(0.4, None),
    "batches": FocusICL(0.0, 2),
    "all": FocusICL(0.0, 1, "all"),
    "both": FocusICL(0.3, 1),
}


@pytest.mark.parametrize("name", METHODS)
def test_promises(name, model, prompts):
    keeps_its_promises(model, METHODS[name], FocusICL(0, None), prompts, SPANS)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2", "gpt_oss", "qwen3"])
def test_families(model_of, prompts, family):
    model = model_of(family, "eager" if family in NO_SDPA else "sdpa")
    keeps_its_promises(model, METHODS["both"], FocusICL(0, None), prompts, SPANS)


def test_batches_are_read_as_if_alone(model, row):
    """By hand: each batch behind the shared prefix in a forward of its own, and its keys put together."""
    spans, method = {"demos": [[(2, 6), (6, 9), (9, 16)]]}, FocusICL(0, 1, "all")
    with steerlens.steer(model, method, spans):
        found = model.generate(
            row, max_new_tokens=1, return_dict_in_generate=True, use_cache=True, output_hidden_states=True
        )
    states, cache = found.hidden_states[0], found.past_key_values
    with torch.no_grad():
        for (a, b), start in zip(spans["demos"][0], (5, 6, 2), strict=True):
            ids = torch.cat([row[:, :2], row[:, a:b]], 1)
            positions = torch.tensor([[0, 1, *range(start, start + b - a)]])
            alone = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), output_hidden_states=True)
            for layer in range(3):
                assert apart(states[layer][:, a:b], alone.hidden_states[layer][:, 2:]) < 1e-5
                assert (
                    apart(cache.layers[layer].keys[:, :, a:b], alone.past_key_values.layers[layer].keys[:, :, 2:])
                    < 1e-5
                )


def test_the_mix_is_one_attention_with_log_t_on_what_is_in_no_batch(model, row):
    """`weights="all"` against a mask of one's own."""
    spans = {"demos": [[(2, 6), (6, 9), (9, 16)]]}
    got = generate(model, FocusICL(0, 1, "all"), spans, row, torch.ones_like(row), max_new_tokens=1, min_new_tokens=1)
    mask = torch.full((20, 20), -torch.inf).triu(1)
    for (a, b), (c, d) in itertools.permutations(spans["demos"][0], 2):
        mask[a:b, c:d] = -torch.inf
    mask[16:, 2:16] -= math.log(3)
    positions = blocks.aligned([0], spans["demos"], 20)
    with torch.no_grad():
        expected = model(row, attention_mask=mask[None, None], position_ids=positions).logits[:, -1:]
    assert apart(got, expected) < 1e-5


def test_beside_other_methods_and_beams(model, prompts):
    ids, mask = prompts("left")
    spans = SPANS | {"emphasis": [[(3, 5)], [(8, 9)], [(5, 7)]]}
    for methods in ([ZeroTuning(3.0), METHODS["both"]], [METHODS["both"], PASTA(0.1)]):
        keeps = generate(model, methods, spans, ids, mask)
        assert apart(keeps, generate(model, methods, spans, ids, mask, backend="reference")) < 1e-4
        assert apart(keeps, generate(model, METHODS["both"], SPANS, ids, mask)) > 1e-3
    with steerlens.steer(model, METHODS["both"], SPANS):
        found = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=4, do_sample=False)
    own = {"demos": [[(a - 7, b - 7) for a, b in SPANS["demos"][1]]]}
    with steerlens.steer(model, METHODS["both"], own):
        alone = model.generate(ids[1:2, 7:], num_beams=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(found[1, 7 : 7 + alone.shape[1]], alone[0])


def test_score_is_what_generate_does(model, prompts):
    ids, mask = prompts("left")
    method = METHODS["both"]
    with steerlens.steer(model, method, SPANS):
        steps = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    expected = torch.stack(steps.logits, 1).log_softmax(-1).gather(2, steps.sequences[:, 20:, None])[..., 0]
    ids, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
    own = {"demos": [[(a - p, b - p) for a, b in r] for r, p in zip(SPANS["demos"], (0, 7, 3), strict=True)]}
    for i, pad in enumerate((0, 7, 3)):
        ids[i, : 23 - pad], mask[i, : 23 - pad] = steps.sequences[i, pad:], 1
    with steerlens.steer(model, [method], own, prompt_lengths=[20, 13, 17]):
        scored = method.score(model, {"input_ids": ids, "attention_mask": mask}, own)
    for i, length in enumerate((20, 13, 17)):
        assert (scored[i, length - 1 : length + 2] - expected[i]).abs().max() < 1e-4


def test_refusals(model, model_of, row):
    assert get("focusicl") is FocusICL
    spans = {"demos": [[(2, 6), (6, 9)]]}
    for parameters, message in (
        ({"fraction": 1}, "fraction=1 "),
        ({"batch": 0}, "batch=0"),
        ({"weights": "x"}, "allowed: demos, all"),
    ):
        with pytest.raises(MethodError, match=message):
            FocusICL(**parameters)
    with (
        pytest.raises(SpanError, match="row 0 ends with its demos"),
        steerlens.steer(model, FocusICL(), {"demos": [[(2, 20)]]}),
    ):
        model.generate(row)
    for message, other, options in (
        ("mix tokens without it", model_of("qwen3_next"), {}),
        ("leave out position_ids", model, {"position_ids": torch.arange(20)[None]}),
        ("focusicl .* packed sequences", model, {"use_cache": False}),
        ("dropped", model, {"capture": True}),
    ):
        capture = steerlens.capture(other) if options.pop("capture", False) else steerlens.steer(other, [])
        with steerlens.steer(other, FocusICL(0.3, 1), spans), capture, pytest.raises(UnsupportedError, match=message):
            other.generate(row, max_new_tokens=2, **options)


def test_choice_of_fraction_and_batch():
    assert focus.choose({0.1: (3, 2.5, 2.2, 2.1, 2.15, 2.3, 2.4)}) == (0.1, 4)
    assert focus.choose({0.0: (3, 3, 3, 3), 0.2: (3, 2.5, 2.2, 2.1), 0.4: (3, 2.5, 2.2, 2.2)}) == (0.2, None)


LABELS = {"iron": "fep", "truck": "blick", "silver": "fep", "cobalt": "fep", "tractor": "blick"}
EXAMPLES = [Example(f"{word} belongs to", f"{label}.") for word, label in LABELS.items()]


def test_search_scores_answers_behind_their_demonstrations():
    model, tokenizer = models.load("tiny")
    found, table = [], []
    choose = focus.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(focus, "choose", lambda perplexities: (table.append(perplexities), choose(perplexities))[1])
        method = focusicl(
            model, tokenizer, EXAMPLES, fractions=(0.0, 0.4), draws=2, most=3, separator=" ", advance=found.append
        )
    assert len(found) == 2 * 4 * 2 and isinstance(method, FocusICL) and method.fraction in (0.0, 0.4)
    shuffle = random.Random(0)
    expected = [0.0] * 4
    for _ in range(2):
        order = shuffle.sample(EXAMPLES, 4)
        for i, target in enumerate(order):
            texts = [f"{e.prompt} {e.answer}" for e in order[: i + 1]]
            ids = tokenizer(" ".join(texts), return_tensors="pt")["input_ids"]
            answer = len(tokenizer(" " + target.answer, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-answer:]
            expected[i] += float((-logs.mean()).exp()) / 2
    assert table[0][0.0] == pytest.approx(expected, rel=1e-4)
    assert table[0][0.4][0] == table[0][0.0][0] and table[0][0.4][3] != pytest.approx(expected[3], rel=1e-4)
    with pytest.raises(ExampleError, match="most=1 of 5 examples; allowed: 2 to 4"):
        focusicl(model, tokenizer, EXAMPLES, most=1)
    with pytest.raises(ExampleError, match="'answer'"):
        focusicl(model, tokenizer, [*EXAMPLES, Example("gold belongs to")])


def test_command_line(tmp_path):
    file = tmp_path / "demos.jsonl"
    file.write_text("\n".join(json.dumps(f"{word} belongs to {label}.") for word, label in LABELS.items()))
    question = "Question: What does tractor belong to? Answer:"
    arguments = ["--demos", str(file), "--query", question, "--prompt", "{demos} {query}", "--max-new-tokens", "2"]
    found = CliRunner().invoke(app, ["run", "--recipe", "focusicl-tiny", *arguments])
    assert found.exit_code == 0, found.output
    assert found.stdout.strip().startswith("blick")
