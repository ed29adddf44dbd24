"""PAI: logits of emphasised tokens lifted in the rows that predict (core.md §5.6)."""

import json

import pytest
import torch
from small_models import FAMILIES, NO_SDPA
from test_oracles import BACKENDS
from typer.testing import CliRunner
from vector_files import apart, generate

import steerlens
from steerlens import around
from steerlens.backends import reference
from steerlens.backends.call import Call
from steerlens.cli import app
from steerlens.edits import LiftLogits, SpanKeys
from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.methods import ACT, PASTA, HeadMask, PerRow, ZeroTuning, from_dict, get
from steerlens.observing import Observer
from steerlens.passes import Pass, Prompt
from steerlens.spans import Spans

PAI = get("pai")
SPANS = [[(6, 9)], [(7, 9), (11, 12)]]
ALONE = [[(2, 4), (6, 7)]]


@pytest.mark.parametrize("backend", sorted({name.partition("-")[0] for name in BACKENDS}))
def test_oracle(backend):
    x = torch.tensor([[2.0, 1, -0.5, -1]])
    now = Pass(Prompt.start(4, None, 1, x.device), 3, 1, None, True, {0: (4, 0)})
    eye = torch.eye(4)[None, None]
    call = Call(x[None, None], eye, eye, None, 1.0, None, 3, None, True)
    weights = around.attention(backend, call, [], now, 0, lambda part: [])[0, 0, 0]
    assert weights.tolist() == pytest.approx([0.666777, 0.245294, 0.054732, 0.033197], abs=2e-6)
    placed = [around.Placed(LiftLogits((0,), SpanKeys("emphasis"), 0.2), Spans.of([[(1, 3)]]), None)]
    weights = around.attention(backend, call, placed, now, 0, lambda part: [])[0, 0, 0]
    assert weights.tolist() == pytest.approx([0.628996, 0.282626, 0.057061, 0.031316], abs=2e-6)


METHODS = {
    "pai": PAI(0.5, 0),
    "heads": PAI(-0.7, 1, heads="1:0,3;2:*"),
    "composed": [PAI(0.5, 0), ZeroTuning(3.0), PASTA(0.3, heads={1: "*"}), HeadMask({1: [0], 2: [3]})],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_on_every_family(family, name, model_of, prompts):
    """Backends agree, cached decode is recomputation, chunked prefill one shot, a padded row the row alone."""
    model = model_of(family, "eager" if family in NO_SDPA else "sdpa")
    (ids, mask), method = prompts("left", lengths=(14, 9)), METHODS[name]
    if family == "qwen3_next" and name == "composed":
        method = method[:2]
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        rest = method[1:] if isinstance(method, list) else []
        with steerlens.steer(model, rest, SPANS):
            expected = model(ids, attention_mask=mask).logits
        with steerlens.steer(model, method, SPANS):
            found = model(ids, attention_mask=mask).logits
    for row in range(2):
        real = mask[row].bool()
        real[-1] = False
        assert apart(found[row, real], expected[row, real]) < 1e-5
        assert apart(found[row, -1:], plain[row, -1:]) > 1e-3
    got = generate(model, method, SPANS, ids, mask)
    assert apart(got.logits[0][0], found[0, -1]) < 1e-4
    others = ({"backend": "reference"}, {"use_cache": False}, {"prefill_chunk_size": 5})
    for other in others:
        assert apart(generate(model, method, SPANS, ids, mask, **other).logits, got.logits) < 1e-4, other
    alone = generate(model, method, ALONE, ids[1:, 5:], mask[1:, 5:])
    assert apart(torch.stack(alone.logits)[:, 0], torch.stack(got.logits)[:, 1]) < 1e-4


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_backends(backend, model, prompts):
    ids, mask = prompts("left", lengths=(14, 9))
    got, expected = (
        generate(model, METHODS["composed"], SPANS, ids, mask, b, max_new_tokens=2) for b in (backend, "reference")
    )
    assert apart(got.logits, expected.logits) < 1e-4


@torch.no_grad()
def test_scored_continuations_are_lifted_row_by_row_and_in_blocks(model, prompts, monkeypatch):
    """As cached decoding sees them, whatever the number of rows that one block holds."""
    ids, mask = prompts("left", lengths=(14, 9))
    sequences = generate(model, PAI(0.5, 0), SPANS, ids, mask, max_new_tokens=6)
    longer = torch.nn.functional.pad(mask, (0, 6), value=1)
    with steerlens.steer(model, PAI(0.5, 0), SPANS, prompt_lengths=[14, 9]):
        whole = model(sequences.sequences, attention_mask=longer).logits
        monkeypatch.setattr(around.sdpa, "budget", lambda call: 2 * 8 * 20 * 2)
        blocks = model(sequences.sequences, attention_mask=longer).logits
    assert apart(blocks[:, 13:], whole[:, 13:]) < 1e-5
    assert apart(whole[:, 13:-1].transpose(0, 1), torch.stack(sequences.logits)) < 1e-4


@torch.no_grad()
def test_by_definition_and_heads_of_one_group_apart(model, row):
    """The last row of two heads is the softmax of the lifted logits, the other heads' is native."""
    calls, outputs = {}, {}

    class Out(Observer):
        def output(self, layer, output, now):
            outputs.setdefault(layer, []).append(output)

    class Look(Out):
        def observe(self, layer, call, now):
            calls.setdefault(layer, call)

    with Look(model):
        model(row)

    with steerlens.steer(model, PAI(0.8, 0, heads="0:1,2"), [[(3, 7)]]), Out(model):
        model(row)
    call, last = calls[0], slice(19, 20)
    x = reference.logits(call, last, [1, 2])
    x[..., 3:7] += 0.8 * x[..., 3:7].abs()
    expected = x.softmax(-1) @ call.value[:, [0, 0]]
    before, after = outputs[0]
    assert apart(after[:, 19, 1:3], expected[:, :, 0]) < 1e-5
    assert apart(after[:, :, [0, 3, 4, 5, 6, 7]], before[:, :, [0, 3, 4, 5, 6, 7]]) < 1e-6
    assert apart(after[:, :19], before[:, :19]) < 1e-6


@torch.no_grad()
def test_neutral_is_native_bit_for_bit(model, row):
    expected = model(row).logits
    with steerlens.steer(model, [PAI(0), PAI(1.0, 3), PAI(1.0, heads={})], [[(3, 7)]]) as steered:
        assert torch.equal(model(row).logits, expected) and steered.plan == {}


@torch.no_grad()
def test_rows_of_a_batch_their_own_way(model, prompts):
    ids, mask = prompts("left", lengths=(14, 9))
    with steerlens.steer(model, PerRow([None, PAI(0.8, 0)]), SPANS):
        found = model(ids, attention_mask=mask).logits
    for row, method in enumerate([[], PAI(0.8, 0)]):
        with steerlens.steer(model, method, SPANS):
            assert apart(found[row, -1], model(ids, attention_mask=mask).logits[row, -1]) < 1e-5


@torch.no_grad()
def test_a_span_outside_the_window_does_nothing(model_of):
    model, ids = model_of("mistral"), torch.arange(5, 35)[None]
    plain = model(ids).logits
    with steerlens.steer(model, PAI(0.9, 2), [[(2, 5)]]):
        assert apart(model(ids).logits, plain) < 1e-5


def test_what_would_be_wrong_is_refused(model, row):
    with (
        steerlens.steer(model, PAI(), [[(3, 7)]]),
        steerlens.capture(model),
        pytest.raises(UnsupportedError, match="lifted one by one"),
    ):
        model(row)
    with (
        steerlens.steer(model, PAI(), [[(3, 7)]], backend="reference"),
        pytest.raises(UnsupportedError, match="output_attentions"),
    ):
        model(row, output_attentions=True)
    with (
        steerlens.steer(model, [PAI(), ACT()], [[(3, 7)]]),
        pytest.raises(UnsupportedError, match="sinks are found in the attention of whole prompts"),
    ):
        model(row)


def test_parameters(model):
    for parameters, message in (({"alpha": "x"}, "alpha='x'"), ({"first_layer": -1}, "first_layer=-1")):
        with pytest.raises(MethodError, match=message):
            PAI(**parameters)
    with pytest.raises(SpanError, match="pai needs"):
        steerlens.steer(model, PAI())
    assert from_dict(json.loads(json.dumps(PAI(0.3, heads="2:1").to_dict()))) == PAI(0.3, heads="2:1")


def test_command_line():
    said = "The code of the harbor office is"
    prompt = f"{said} 4417. {said} 9032. Question: What is the code of the harbor office? Answer:"
    command = [
        "run",
        "--method",
        "pai",
        "--set",
        "alpha=0.5",
        "--set",
        "first_layer=1",
        "--prompt",
        prompt,
        "--compare",
    ]
    for emphasized in ("4417", "9032"):
        more = ["--emphasize", f"{said} {emphasized}.", "--json", "--max-new-tokens", "6"]
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 0, done.output
        (result,) = json.loads(done.stdout)["results"]
        assert emphasized in result["steered"], result
