"""InstABoost, GUIDE, context-awareness: static weights of spans; methods/core.md §5.1, §5.2, methods/context.md §11."""

import pytest
import torch
from method_checks import BACKENDS, attend, close, keeps_its_promises

import steerlens
from steerlens.errors import MethodError
from steerlens.methods import GUIDE, ContextAwareness, InstABoost

R = (0.4, 0.2, 0.1, 0.2, 0.1)
CAUSAL = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.3, 0.2, 0], [0.4, 0.3, 0.2, 0.1]]


@pytest.mark.parametrize("backend", BACKENDS)
class TestOracle:
    @pytest.mark.parametrize(
        ("multiplier", "expected"),
        [
            (3, (0.25, 0.375, 0.1875, 0.125, 0.0625)),
            (9, (0.117647, 0.529412, 0.264706, 0.058824, 0.029412)),
        ],
    )
    def test_instaboost(self, backend, multiplier, expected):
        close(attend([[R]], InstABoost(multiplier), backend, spans=[[(1, 3)]])[0, 0], expected)

    def test_instaboost_prefix(self, backend):
        """From the first token to the end of the span; rows inside it are unchanged."""
        got = attend([CAUSAL], InstABoost(3, "prefix"), backend, spans=[[(1, 2)]])[0]
        close(got, [*CAUSAL[:2], [a / 2.6 for a in (1.5, 0.9, 0.2, 0)], [a / 2.4 for a in (1.2, 0.9, 0.2, 0.1)]])

    @pytest.mark.parametrize(("delta", "level"), [(2.0, "!!"), (4.0, "!"), (1.0, "!!!")])
    def test_guide(self, backend, delta, level):
        """Of the logits (2, 1, .5, -1)."""
        rest = (0.609460, 0.224208, 0.135989, 0.030343)
        expected = (0.184611, 0.501825, 0.304372, 0.009191)
        close(attend([[rest]], GUIDE(delta, level), backend, spans=[[(1, 3)]])[0, 0], expected)

    @pytest.mark.parametrize(
        ("layer", "expected"),
        [
            (0, (0.378947, 0.105263, 0.210526, 0.094737, 0.210526)),
            (3, (0.316937, 0.120766, 0.241531, 0.079234, 0.241531)),
            (31, (0.026558, 0.193361, 0.386721, 0.006639, 0.386721)),
        ],
    )
    def test_context_awareness(self, backend, layer, expected):
        """Token 4 is generated. The released code's layers share a mask: the n-th scales by α^n."""
        row = (0.4, 0.1, 0.2, 0.1, 0.2)
        for accumulate in (True, False) if layer == 0 else (True,):
            method = ContextAwareness(0.9, accumulate)
            close(attend([[row]], method, backend, spans=[[(1, 3)]], prompt=4, layers=32, layer=layer)[0, 0], expected)


@pytest.mark.parametrize(
    ("method", "neutral"),
    [
        (InstABoost(5, heads={0: [0, 3], 1: "*"}), InstABoost(1)),
        (InstABoost(5, "prefix"), InstABoost(1, "prefix")),
        (GUIDE(2), GUIDE(0)),
        (ContextAwareness(0.3), ContextAwareness(1)),
        (ContextAwareness(0.5, True), ContextAwareness(1, True)),
    ],
    ids=str,
)
def test_promises(method, neutral, model, prompts):
    keeps_its_promises(model, method, neutral, prompts)


def test_they_are_one_family(model, prompts):
    """M = e^Δ; scaling the rest by α is scaling the span by 1/α while nothing is generated."""
    ids, mask = prompts("left")
    spans, found = [[(9, 12)], [(10, 13)], [(8, 11)]], []
    for method in (InstABoost(4), GUIDE(float(torch.tensor(4.0).log())), ContextAwareness(0.25)):
        with torch.no_grad(), steerlens.steer(model, method, spans):
            found.append(model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    assert (found[1] - found[0]).abs().max() < 1e-5 and (found[2] - found[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: InstABoost(0), "instaboost: multiplier=0 is out of range; allowed: a number > 0"),
        (lambda: InstABoost(extent="all"), "extent='all' is unknown; allowed: span, prefix"),
        (lambda: GUIDE(level="!!!!"), "level='!!!!' is unknown; allowed: !, !!, !!!"),
        (lambda: GUIDE(1e4), r"allowed: a number >= -500 and <= 500"),
        (lambda: ContextAwareness(accumulate="yes"), "accumulate='yes' is unknown; allowed: true, false"),
    ],
)
def test_errors(make, words):
    with pytest.raises(MethodError, match=words):
        make()
