"""Anchor re-weighting: the numbers of methods/context.md §7h, and its fit."""

import pytest
import torch
from method_checks import BACKENDS, apart, attend, close, generate, keeps_its_promises

import steerlens
from steerlens import fitting
from steerlens.errors import MethodError, SpanError
from steerlens.examples import Example, ExampleError
from steerlens.methods import AnchorReweighting
from steerlens.vectors import VectorFile

ROW = (0.2, 0.1, 0.3, 0.15, 0.25)
SPANS = [[(9, 12), (13, 14)], [(10, 11), (15, 16)], [(8, 11), (14, 16)]]


@pytest.fixture
def file(tmp_path):
    """`file(tensors)`: the path of a file of factors."""

    def write(tensors, name="beta.safetensors"):
        path = tmp_path / name
        VectorFile("test", {f"beta.{layer}": torch.tensor(t) for layer, t in tensors.items()}, {}).save(path)
        return str(path)

    return write


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("renormalise", "expected"),
    [
        (False, (0.2, 0.164872, 0.3, 0.055182, 0.25)),
        (True, (0.206174, 0.169962, 0.309261, 0.056885, 0.257718)),
    ],
)
def test_oracle(file, backend, renormalise, expected):
    """The second head has no factors; the first row is no decode row."""
    method = AnchorReweighting(file({0: [[0.5, -1.0], [0.0, 0.0]]}), renormalise)
    before = (0.3, 0.3, 0.2, 0.2, 0)
    got = attend([[before, ROW]] * 2, method, backend, spans=[[(1, 2), (3, 4)]])
    close(got[0, 1], expected)
    close(got[1, 1], ROW)
    close(got[:, 0], [before] * 2)
    if not renormalise:
        assert got[0, 1].sum().item() == pytest.approx(0.970054, abs=2e-6)


@pytest.mark.parametrize("renormalise", [False, True])
def test_promises(file, renormalise, model, prompts):
    torch.manual_seed(0)
    factors = {layer: (3 * torch.randn(8, 2)).tolist() for layer in (0, 2)}
    neutral = {layer: torch.zeros(8, 2).tolist() for layer in (0, 2)}
    method = AnchorReweighting(file(factors), renormalise)
    keeps_its_promises(model, method, AnchorReweighting(file(neutral, "neutral.safetensors")), prompts, SPANS)


def test_what_is_recorded_is_what_was_used(file, model, prompts):
    """Recorded masses hold the factor; the mass that a row sums to is not renormalised by what comes after."""
    ids, mask = prompts("left")
    method = AnchorReweighting(file({1: [[2.0, 0.5]] * 8}))
    found = []
    for methods in ([], [method], [method, steerlens.methods.GUIDE(0.0, heads="all")]):
        with (
            torch.no_grad(),
            steerlens.steer(model, methods, SPANS, report="mass") as steered,
            steerlens.capture(model, {"a": [r[:1] for r in SPANS], "b": [r[1:] for r in SPANS]}, stats="mass") as kept,
        ):
            model(input_ids=ids, attention_mask=mask)
        found.append(kept[1].mass[:, :, -1])
    assert torch.allclose(found[1], found[0] * torch.tensor([2.0, 0.5]).exp(), atol=1e-6)
    assert steered.report()[1]["delta_mass"].gt(0).all()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_finite_differences(backend, frozen, model, prompts):
    """Through both ways of the sdpa backend: with weights that need gradients it has no log-sum-exp."""
    from steerlens.fitting.anchors import Candidate

    ids, mask = prompts("left")
    torch.manual_seed(0)
    beta = {layer: torch.randn(8, 2, requires_grad=True) for layer in (0, 2)}

    def loss():
        with steerlens.steer(model, Candidate(beta, False), SPANS, backend=backend):
            return model(input_ids=ids, attention_mask=mask).logits[:, -1].log_softmax(-1)[:, 5].sum()

    needed = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in needed if frozen else ():
            parameter.requires_grad_(False)
        gradients = torch.autograd.grad(loss(), list(beta.values()))
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
    with torch.no_grad():
        for (table, gradient), at in zip(zip(beta.values(), gradients, strict=True), ((3, 1), (6, 0)), strict=True):
            values = []
            for step in (0.05, -0.1):
                table[at] += step
                values.append(loss())
            table[at] += 0.05
            assert ((values[0] - values[1]) / 0.1 - gradient[at]).abs() < 2e-2 * gradient.abs().max()


@pytest.fixture(scope="module")
def tiny():
    from steerlens import models

    return models.load("tiny")


LABELS = ("red", "blue")


def test_a_fit_lowers_its_loss_and_leaves_the_model_alone(tiny, tmp_path):
    model, tokenizer = tiny
    prompt = "The code of the harbor office is {}. The code of the market hall is {}. The code of the {} is"
    examples = [
        Example(prompt.format(4417, 9032, place), answer, (other,), {"emphasis": ("4417", "9032")})
        for place, answer, other in (("harbor office", "9032", "4417"), ("market hall", "4417", "9032"))
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    found = fitting.anchor_reweighting(model, tokenizer, examples, epochs=5, learning_rate=0.3, advance=losses.append)
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2]) and len(losses) == 10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    path = found.save(tmp_path / "beta.safetensors")
    ids, spans = steerlens.encode(tokenizer, [e.prompt for e in examples], ["4417", "9032"])
    base, steered = (
        generate(model, method, spans, ids["input_ids"], ids["attention_mask"])[:, 0]
        for method in ([], AnchorReweighting(str(path)))
    )
    assert apart(steered, base) > 1e-2


def test_errors(file, model, tiny):
    with pytest.raises(MethodError, match=r"holds 'beta' of layers \[7\]; needed are 'beta.<layer>' of layers"):
        steerlens.steer(model, AnchorReweighting(file({7: [[1.0]] * 8})), SPANS)
    with pytest.raises(MethodError, match=r"'beta' of layer 0 is \[3, 2\]; layer 0 of llama has 8 query heads"):
        steerlens.steer(model, AnchorReweighting(file({0: [[1.0, 2.0]] * 3})), SPANS)
    with pytest.raises(SpanError, match=r"row 0 has 2 emphasised ranges, and layer 0 .* has factors for 3 anchors"):
        steerlens.steer(model, AnchorReweighting(file({0: [[1.0] * 3] * 8})), SPANS)
    example = Example("red or blue:", "red", (), {"emphasis": ("red", "blue")})
    with pytest.raises(ExampleError, match="example 1 needs 'alternatives'"):
        fitting.anchor_reweighting(*tiny, [example])
