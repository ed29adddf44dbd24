"""Vectors on queries and on head outputs: focus_directions, iti, nl_iti, their fits and their export."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from small_models import FAMILIES, NO_SDPA
from steerlens.evals.examples import generate as examples_of
from test_oracles import BACKENDS, compute
from typer.testing import CliRunner
from vector_files import Widths, apart, file_of, generate

import steerlens
from steerlens import fitting, models, vectors
from steerlens.around import Placed, shift
from steerlens.backends.call import Call
from steerlens.edits import ShiftQuery
from steerlens.errors import MethodError, UnsupportedError
from steerlens.examples import Example, ExampleError
from steerlens.facts import ModelFacts
from steerlens.fitting import probes
from steerlens.fitting.focus import Rows
from steerlens.measures import contextual
from steerlens.methods import HeadMask, PerRow, ZeroTuning, from_dict, get
from steerlens.passes import Pass, Prompt
from steerlens.projections import Projections
from steerlens.vectors import HeadVectors, VectorFile

FocusDirections, ITI, NLITI = get("focus_directions"), get("iti"), get("nl_iti")
Q, K = torch.tensor([1.0, 0.5]), torch.tensor([[2.0, 0], [0.5, 1], [-1, 2], [1, -1]])
D_Q, D_K, ALPHA = torch.tensor([-1.0, 2.0]), torch.tensor([0.7, -0.3]), 0.3
BASE, SHIFTED = (0.480212, 0.236778, 0.116748, 0.166263), (0.295046, 0.305664, 0.316664, 0.082627)


def close(got, expected, tolerance=2e-6):
    assert (torch.as_tensor(got) - torch.tensor(expected)).abs().max() < tolerance


def call_of(query=Q, key=K):
    return Call(query[None, None, None], key[None, None], torch.eye(4)[None, None], None, 2**-0.5, None, 3, None, True)


@pytest.mark.parametrize("backend", BACKENDS)
class TestFocusOracle:
    def test_weights(self, backend):
        prompt = Prompt.start(4, None, 1, torch.device("cpu"))
        now = Pass(prompt, 3, 1, None, True, {0: (4, 0)})
        call = call_of()
        close(compute(backend, call)[0, 0, 0], BASE)
        edit = ShiftQuery((0,), HeadVectors(D_Q[None], "oracle"), ALPHA)
        call.query = shift(call.query, [Placed(edit, None, None)], now, 0, "layer 0")
        close(compute(backend, call)[0, 0, 0], SHIFTED)

    def test_a_direction_on_every_key_does_nothing(self, backend):
        close(compute(backend, call_of(key=K + ALPHA * D_K))[0, 0, 0], BASE)
        close(compute(backend, call_of(Q + ALPHA * D_Q, K + ALPHA * D_K))[0, 0, 0], SHIFTED)


def test_focus_is_a_bias_on_the_keys():
    bias = ALPHA * (K @ D_Q) / 2**0.5
    close(bias, (-0.424264, 0.318198, 1.060660, -0.636396))
    close((K @ Q / 2**0.5 + bias).softmax(-1), SHIFTED)


def test_gradient_of_the_gold_mass():
    gold, direction = torch.tensor([[False, True, True, False]]), torch.zeros(1, 2, requires_grad=True)
    mass = Rows(call_of(), gold, torch.ones(1, 1, dtype=torch.bool)).mass(direction)
    mass.sum().backward()
    close(mass[0, 0, 0].detach(), BASE[1] + BASE[2])
    close(direction.grad[0], (-0.280899, 0.256537))


TRUE, FALSE = torch.tensor([[1.0, 2], [3, 2], [2, 5]]), torch.tensor([[0.0, 1], [1, 0], [-1, 2]])
W_O = torch.tensor([[1, 0.5], [-1, 2], [0, 1]])


class TestProbes:
    VALUES = torch.cat([TRUE, FALSE])[:, None]
    LABELS = torch.tensor([True] * 3 + [False] * 3)

    def test_direction_and_deviation(self):
        direction = probes.mass_mean(self.VALUES, self.LABELS)
        close(direction[0], (0.707107, 0.707107))
        close(probes.deviation(self.VALUES, direction), (1.632993,))
        close(probes.deviation(self.VALUES, direction, ddof=1), (1.788854,))

    @pytest.mark.parametrize(("ddof", "expected"), [(0, 17.320508), (1, 18.973666)])
    def test_shift(self, ddof, expected, tmp_path):
        direction = probes.mass_mean(self.VALUES, self.LABELS)
        tensors = {"mean.0": direction, "mean_deviation.0": probes.deviation(self.VALUES, direction)}
        tensors["score.0"] = torch.ones(1)
        file = str(VectorFile("fit", tensors, {"texts": "6"}).save(tmp_path / "v.safetensors"))
        ((edit,),) = ITI(file, 15, top=1, ddof=ddof).plan(ModelFacts("oracle", "llama", 1, (1,), (1,)), None).values()
        found = edit.scale * edit.vectors.values[0]
        close(found, (expected, expected), 1e-5)
        if not ddof:
            close(W_O @ found, (25.980762, 17.320508, 17.320508), 1e-5)

    def test_mean_over_short_answers(self):
        close(probes.last_mean(torch.tensor([[2.0, 1], [4, 3]]), 3), (3, 2))
        close(probes.last_mean(torch.tensor([[9.0, 9], [2, 1], [4, 3]]), 2), (3, 2))

    def test_probes_find_the_heads_that_tell(self):
        generator = torch.Generator().manual_seed(0)
        true = torch.arange(200) % 2 == 0
        values = torch.randn(200, 3, 4, generator=generator)
        values[:, 1, 2] += 3 * true
        # told by a square alone: what a line cannot
        values[:, 2, 0] = torch.where(true, 2.0, 0.3) * values[:, 2, 0].sign()
        train, held = slice(0, 150), slice(150, 200)
        given = values[train], true[train], values[held], true[held]
        direction, accuracy = probes.logistic(*given)
        assert accuracy[1] > 0.85 and accuracy[0] < 0.7 and accuracy[2] < 0.7
        assert direction[1].abs().argmax() == 2 and direction[1, 2] > 0.9
        bent = probes.perceptron(*given, epochs=120)
        assert bent[1] > 0.85 and bent[0] < 0.7 and bent[2] > 0.85

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
        with pytest.raises(UnsupportedError, match=r"pip install 'steerlens\[eval\]'"):
            probes.logistic(self.VALUES, self.LABELS, self.VALUES, self.LABELS)

    def test_examples_of_one_answer_stay_together(self):
        found = probes.Activations({}, torch.zeros(6).bool(), torch.tensor([0, 0, 1, 1, 2, 2]))
        held = probes.split(found, 0.3, 0)
        assert held.sum() == 2 and held.view(3, 2).all(1).sum() == 1
        with pytest.raises(ExampleError, match="at least two examples; there are 1"):
            probes.split(probes.Activations({}, torch.zeros(2).bool(), torch.zeros(2).long()), 0.5, 0)


def native(family):
    return "eager" if family in NO_SDPA else "sdpa"


def methods_of(file):
    return {
        "focus_directions": FocusDirections(file, 0.7, top=5),
        "iti": ITI(file, 2.0, top=5),
        "nl_iti-all": NLITI(file, -2.0, rows="all", heads="1:0,3;2:*"),
        "composed": [ZeroTuning(2.0), FocusDirections(file, 0.7, heads="all"), ITI(file, 1, 3, direction="probe")],
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder, known = tmp_path_factory.mktemp("vectors"), {}

    def get(model, family):
        if family not in known:
            known[family] = file_of(model, folder / f"{family}.safetensors")
        return known[family]

    return get


NAMES = ("focus_directions", "iti", "nl_iti-all", "composed")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3_next"])
def test_on_every_family(family, model_of, prompts, file):
    """Backends agree, cached decode is recomputation, chunked prefill one shot, a padded row the row alone."""
    model, (ids, mask) = model_of(family, native(family)), prompts("left", lengths=(14, 9))
    plain = generate(model, [], None, ids, mask)
    for method in methods_of(file(model, family)).values():
        got = generate(model, method, None, ids, mask)
        assert apart(got.logits, plain.logits) > 1e-3
        for other in ({"backend": "reference"}, {"use_cache": False}, {"prefill_chunk_size": 5}):
            assert apart(generate(model, method, None, ids, mask, **other).logits, got.logits) < 1e-4, other
        alone = generate(model, method, None, ids[1:, 5:], mask[1:, 5:])
        assert apart(torch.stack(alone.logits)[:, 0], torch.stack(got.logits)[:, 1]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_backends(name, backend, model, prompts, file):
    ids, mask = prompts("left", lengths=(14, 9))
    method = methods_of(file(model, "llama-gqa"))[name]
    got, expected = (generate(model, method, None, ids, mask, b, max_new_tokens=2) for b in (backend, "reference"))
    assert apart(got.logits, expected.logits) < 1e-4


@torch.no_grad()
def test_neutral_is_native_bit_for_bit(model, row, file):
    path = file(model, "llama-gqa")
    neutral = [FocusDirections(path, 0), ITI(path, 0), NLITI(path, 0.0), FocusDirections(path, 1, heads={})]
    expected = model(row).logits
    with steerlens.steer(model, neutral) as steered:
        assert torch.equal(model(row).logits, expected) and steered.plan == {}


class Seen(Widths):
    """Queries and head outputs of every layer."""

    def observe(self, layer, call, now):
        self.found[layer] = [call.query.clone()]

    def output(self, layer, output, now):
        self.found.setdefault(layer, [None]).append(output.clone())


@torch.no_grad()
def test_two_heads_of_one_group_and_the_rows_of_a_phase(model, prompts, file):
    ids, mask = prompts("left", lengths=(14, 9))
    path = file(model, "llama-gqa")
    held = vectors.load(path)
    with Seen(model) as before:
        model(ids, attention_mask=mask)
    with (
        steerlens.steer(model, [FocusDirections(path, 0.5, heads="0:1"), ITI(path, 2, heads="0:6")]),
        Seen(model) as at,
    ):
        model(ids, attention_mask=mask)
    moved = at.found[0][0] - before.found[0][0]
    close(moved[:, 1], (0.5 * held.tensors["query.0"][1]).expand(2, 14, -1).tolist(), 1e-5)
    assert not moved[:, [0, 2, 3, 4, 5, 6, 7]].any()
    moved = at.found[0][1] - before.found[0][1]
    shift = 2 * held.tensors["mean.0"][6] * held.tensors["mean_deviation.0"][6]
    close(moved[:, -1, 6], shift.expand(2, -1).tolist(), 1e-5)
    assert not moved[:, :-1, 6].any() and not moved[:, :, [0, 2, 3, 4, 5, 7]].any() and moved[:, :, 1].any()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "opt", "phi3"])
def test_the_shift_arrives_at_the_output_projection(family, model_of, row, file):
    """As a hook on the projection adds it, and as a bias of W_O·shift does."""
    model = model_of(family)
    method = ITI(file(model, family), 3.0, top=7, rows="all")
    projections = Projections(model)
    plan = method.plan(projections.facts, None)
    hooks = []
    for layer, (edit,) in plan.items():
        added = edit.scale * edit.vectors.table(edit.heads, torch.device("cpu")).flatten()
        hook = lambda module, args, added=added: (args[0] + added,)  # noqa: E731
        hooks.append(projections.projection(layer).register_forward_pre_hook(hook))
    expected = model(row).logits
    for hook in hooks:
        hook.remove()
    plain = model(row).logits
    with steerlens.steer(model, method):
        assert apart(model(row).logits, expected) < 1e-5 and apart(expected, plain) > 1e-3
    state = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    try:
        names = fitting.bake(model, method)
        assert len(names) == len(plan) and apart(model(row).logits, expected) < 1e-5
    finally:
        for name in names:
            module = model.get_submodule(name.removesuffix(".bias"))
            module.bias = torch.nn.Parameter(state[name]) if name in state else None
    assert torch.equal(model(row).logits, plain)


def test_what_is_no_bias_is_refused(model, model_of, file):
    with pytest.raises(MethodError, match="focus_directions does more than add vectors"):
        fitting.output_bias(model, FocusDirections(file(model, "llama-gqa")))
    gated = model_of("qwen3_next")
    with pytest.raises(UnsupportedError, match="a gate lies between"):
        fitting.output_bias(gated, ITI(file(gated, "qwen3_next")))


@torch.no_grad()
def test_a_gated_family_is_refused_for_outputs_alone(model_of, row, file):
    model = model_of("qwen3_next")
    path = file(model, "qwen3_next")
    with (
        steerlens.steer(model, ITI(path, 1.0, top=5)),
        pytest.raises(UnsupportedError, match=r"'qwen3_next'.*a gate or a norm"),
    ):
        model(row)
    plain = model(row).logits
    with steerlens.steer(model, FocusDirections(path, 1.0)):
        assert apart(model(row).logits, plain) > 1e-3
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_rows_of_a_batch_their_own_way(model, prompts, file):
    path, (ids, mask) = file(model, "llama-gqa"), prompts("left")
    rows = [FocusDirections(path, 1.0), None, ITI(path, 3.0, 9, "all")]
    with steerlens.steer(model, PerRow(rows)):
        got = model(ids, attention_mask=mask).logits
    for number, method in enumerate(rows):
        with steerlens.steer(model, method or []):
            expected = model(ids, attention_mask=mask).logits
        assert apart(got[number][mask[number].bool()], expected[number][mask[number].bool()]) < 1e-5


@torch.no_grad()
def test_a_vector_is_added_to_an_ablated_head_too(model, row, file):
    path = file(model, "llama-gqa")
    with (
        steerlens.steer(model, [ITI(path, 2, heads="0:6", rows="all"), HeadMask("0:6", mode="zero")]),
        Seen(model) as at,
    ):
        model(row)
    held = vectors.load(path).tensors
    shift = 2 * held["mean.0"][6] * held["mean_deviation.0"][6]
    close(at.found[0][1][0, :, 6], shift.expand(20, -1).tolist(), 1e-6)


class TestErrors:
    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"vectors": 3}, "vectors=3 is no file"),
            ({"vectors": "v.pt"}, "path of a .safetensors file"),
            ({"vectors": "v.safetensors", "top": 0}, "top=0 is out of range"),
            ({"vectors": "v.safetensors", "alpha": "x"}, "alpha='x'"),
            ({"vectors": "v.safetensors", "ddof": 2}, "ddof=2 is unknown; allowed: 0, 1"),
            ({"vectors": "v.safetensors", "rows": "last"}, "rows='last' is unknown; allowed: decode, all"),
            ({"vectors": "v.safetensors", "direction": "x"}, "allowed: mass_mean, probe"),
        ],
    )
    def test_parameters(self, parameters, message):
        with pytest.raises(MethodError, match=message):
            ITI(**parameters)

    def test_round_trip(self):
        for method in (
            FocusDirections("v.safetensors", -0.2, heads="1:2"),
            ITI("v.safetensors"),
            NLITI("v.safetensors"),
        ):
            assert from_dict(json.loads(json.dumps(method.to_dict()))) == method

    def test_files(self, model, model_of, tmp_path, file):
        def fails(match, path, model=model, method=FocusDirections, **more):
            with pytest.raises(MethodError, match=match), steerlens.steer(model, method(str(path), 1.0, **more)):
                model(torch.arange(5, 9)[None])

        fails("cannot read .*none.safetensors", tmp_path / "none.safetensors")
        (tmp_path / "text.safetensors").write_text("{}")
        fails("text.safetensors is no safetensors file", tmp_path / "text.safetensors")
        VectorFile("x", {"query.0": torch.full((8, 8), torch.nan)}, {}).save(tmp_path / "nan.safetensors")
        fails("query.0 holds values that are not finite", tmp_path / "nan.safetensors")
        good = file(model, "llama-gqa")
        fails("top=25 asks for more heads than the 24", good, top=25)
        VectorFile("x", {"query.0": torch.ones(8, 8), "score.0": torch.ones(8)}, {}).save(tmp_path / "o.safetensors")
        fails("has no 'query' of layer 2; it has 'query' of layers \\[0\\]", tmp_path / "o.safetensors", heads="2:1")
        fails(
            r"iti: .* has no 'mean' vectors; it holds query, score; steerlens.fitting.iti\(",
            tmp_path / "o.safetensors",
            method=ITI,
            top=3,
        )
        fails(
            r"'query' of layer 0 is \[8, 8\].*has 4 query heads",
            tmp_path / "o.safetensors",
            heads="0:1",
            model=model_of_heads(model_of),
        )
        VectorFile("x", {"query.0": torch.ones(8, 5), "score.0": torch.ones(8)}, {}).save(tmp_path / "w.safetensors")
        fails("vectors of 5 numbers; the queries of layer 0 of .* have 8", tmp_path / "w.safetensors", top=2)
        VectorFile("x", {"query.7": torch.ones(8, 8), "score.7": torch.ones(8)}, {}).save(tmp_path / "l.safetensors")
        fails("has heads of layer 7; .* has attention in layers 0, 1, 2", tmp_path / "l.safetensors", top=2)


def model_of_heads(model_of):
    from small_models import build

    return build("llama-gqa", num_attention_heads=4)


class TestOnTiny:
    """The fits on the bundled model: they find heads and directions that act on prompts they have not seen."""

    @pytest.fixture(scope="class")
    @classmethod
    def tiny(cls):
        model, tokenizer = models.load("tiny", "cpu")
        seen, unseen = (examples_of("contradiction", 16, first_seed=seed, length=64) for seed in (200_000, 300_000))
        return SimpleNamespace(model=model, tokenizer=tokenizer, seen=seen, unseen=unseen)

    def test_focus(self, tiny, tmp_path):
        fit = fitting.focus_directions(
            tiny.model, tiny.tokenizer, tiny.seen, layers=[1, 2], learning_rate=0.05, epochs=4, batch_size=8
        )
        scores = contextual.measure(tiny.model, tiny.tokenizer, tiny.seen, teacher_forced=True).means()
        for layer in (1, 2):
            expected = [scores[layer, head] for head in range(8)]
            close(fit.tensors[f"score.{layer}"], expected, 1e-5)
        path = str(fit.save(tmp_path / "focus.safetensors"))
        method = FocusDirections(path, 1.0, top=16)
        with steerlens.steer(tiny.model, method):
            steered = contextual.measure(tiny.model, tiny.tokenizer, tiny.unseen, teacher_forced=True).means()
        plain = contextual.measure(tiny.model, tiny.tokenizer, tiny.unseen, teacher_forced=True).means()
        assert sum(steered[1, head] - plain[1, head] for head in range(8)) > 0.1

    def test_iti(self, tiny, tmp_path):
        fit = fitting.iti(tiny.model, tiny.tokenizer, tiny.seen)
        assert fit.metadata["texts"] == str(sum(1 + len(e.alternatives) for e in tiny.seen))
        assert max(float(fit.tensors[f"score.{layer}"].max()) for layer in range(6)) > 0.7
        found = probes.activations(tiny.model, tiny.tokenizer, tiny.unseen, last=1, batch_size=3)
        again = probes.activations(tiny.model, tiny.tokenizer, tiny.unseen, last=1, batch_size=32)
        assert all(apart(found.values[layer], again.values[layer]) < 1e-5 for layer in range(6))
        along = (found.values[3] * fit.tensors["mean.3"]).sum(-1)
        assert (along[found.true].mean(0) > along[~found.true].mean(0)).float().mean() > 0.7

    def test_nl_iti(self, tiny):
        fit = fitting.nl_iti(tiny.model, tiny.tokenizer, tiny.seen, tokens=2, probe_tokens=2)
        assert fit.tensors["mean.5"].shape == (8, 16) and fit.metadata["method"] == "nl_iti"
        assert max(float(fit.tensors[f"score.{layer}"].max()) for layer in range(6)) > 0.6

    def test_examples_without_wrong_answers_are_refused(self, tiny):
        with pytest.raises(ExampleError, match="'alternatives', wrong answers"):
            fitting.iti(tiny.model, tiny.tokenizer, [Example("Question: 1? Answer:", "1")])

    def test_command_line(self, tiny, tmp_path):
        from steerlens.cli import app

        path = file_of(tiny.model, tmp_path / "v.safetensors", scale=4.0)
        prompt = "The code of the harbor bakery is 5020. Question: What is the code of the harbor bakery? Answer:"
        for name in ("focus_directions", "iti", "nl_iti"):
            command = ["run", "--method", name, "--set", f"vectors={path}", "--set", "alpha=5", "--prompt", prompt]
            done = CliRunner().invoke(app, [*command, "--compare", "--json", "--max-new-tokens", "6"])
            assert done.exit_code == 0, done.output
            (result,) = json.loads(done.stdout)["results"]
            assert "5020" in result["baseline"] and result["steered"] != result["baseline"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_and_inference_mode(dtype, tmp_path):
    """Each dtype is kept, and what an inference-mode forward leaves behind serves one with gradients."""
    from small_models import build

    model, ids = build("llama-gqa", dtype=dtype), torch.arange(5, 25)[None]
    path = file_of(model, tmp_path / "v.safetensors")
    methods = [FocusDirections(path, 0.5, heads="all"), ITI(path, 2, heads="all", rows="all"), get("pai")(0.5, 0)]
    with steerlens.steer(model, methods, [[(3, 7)]]):
        with torch.inference_mode():
            first = model(ids).logits.clone()
        second = model(ids).logits
        second.float().sum().backward()
    assert first.dtype == dtype and first.isfinite().all() and apart(second.float(), first.float()) < 1e-2
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()
