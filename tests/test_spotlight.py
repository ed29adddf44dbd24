"""SpotLight: the numbers of methods/core.md §4h."""

import pytest
import torch
from method_checks import BACKENDS, attend, close, keeps_its_promises

import steerlens
from steerlens.errors import MethodError, SpanError
from steerlens.methods import SpotLight

R1, R2 = (0.5, 0.1, 0.3, 0.1), (0.2, 0.5, 0.2, 0.1)
CAUSAL = [[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.15, 0.05]]


@pytest.mark.parametrize("backend", BACKENDS)
class TestOracle:
    @pytest.mark.parametrize(
        ("law", "expected"),
        [("ratio", (0.416667, 0.25, 0.25, 0.083333)), ("odds", (0.388889, 0.3, 0.233333, 0.077778))],
    )
    def test_one_row(self, backend, law, expected):
        close(attend([[R1]], SpotLight(0.3, law=law), backend, spans=[[(1, 2)]])[0, 0], expected)

    def test_a_target_that_is_reached_changes_nothing(self, backend):
        close(attend([[R1]], SpotLight(0.1), backend, spans=[[(1, 2)]])[0, 0], R1, 1e-6)

    @pytest.mark.parametrize(
        ("granularity", "expected"),
        [
            ("row", [(0.4, 0.28, 0.24, 0.08), R2]),
            (
                "layer",
                [(0.491803, 0.114754, 0.295082, 0.098361), (0.184615, 0.538462, 0.184615, 0.092308)],
            ),
        ],
    )
    def test_two_heads(self, backend, granularity, expected):
        """The row law leaves the head that has enough. For the layer law S = {1} holds (.1 + .5) / 2 = .3."""
        method = SpotLight(0.35, granularity=granularity)
        got = attend([[R1], [R2]], method, backend, spans=[[(1, 2)]], prompt=3)
        close(got[:, 0], expected)

    @pytest.mark.parametrize(
        ("granularity", "expected"),
        [("row", (0.64, 0.12, 0.24)), ("layer", (0.432432, 0.081081, 0.486486))],
    )
    def test_rows_before_the_span(self, backend, granularity, expected):
        """The published mean counts them: the last row overshoots the target."""
        got = attend([CAUSAL], SpotLight(0.3, granularity=granularity), backend, spans=[[(2, 3)]])[0]
        close(got, [*CAUSAL[:2], expected])

    def test_a_span_that_has_all_of_a_row(self, backend):
        close(attend([[R1]], SpotLight(0.5), backend, spans=[[(0, 4)]])[0, 0], R1, 1e-6)


@pytest.mark.parametrize("method", [SpotLight(0.4), SpotLight(0.4, "odds"), SpotLight(0.4, granularity="layer")])
def test_promises(method, model, prompts):
    keeps_its_promises(model, method, SpotLight(0), prompts)


def test_layer_granularity_promises_less():
    row, layer = SpotLight(), SpotLight(granularity="layer")
    assert (row.causal, row.cache_exact, row.chunk_exact) == (True, True, True)
    assert (layer.causal, layer.cache_exact, layer.chunk_exact) == (False, False, False)


def test_odds_reach_the_target_in_every_row_that_sees_the_span(model, prompts):
    ids, mask = prompts("left")
    spans = [[(9, 12)], [(10, 13)], [(8, 11)]]
    with (
        torch.no_grad(),
        steerlens.steer(model, SpotLight(0.6, "odds", heads={1: [2, 3]}), spans),
        steerlens.capture(model, spans, stats="mass") as record,
    ):
        model(input_ids=ids, attention_mask=mask)
    steered, other = record[1].mass[0, [2, 3], 12:, 0], record[1].mass[0, [0, 4], 12:, 0]
    assert (steered - 0.6).abs().max() < 1e-5 and other.max() < 0.6


def test_errors():
    with pytest.raises(MethodError, match="target=1 is out of range"):
        SpotLight(1)
    with pytest.raises(SpanError, match="spotlight needs the span group 'emphasis'"):
        SpotLight().plan(None, None)
