"""Attention knockout: a masked softmax for chosen rows and keys."""

import pytest
import torch
from method_checks import BACKENDS, apart, attend, close, keeps_its_promises

import steerlens
from steerlens.errors import SpanError
from steerlens.methods import Knockout

ROWS = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.3, 0.2, 0], [0.4, 0.3, 0.2, 0.1]]
SPANS = {
    "subject": [[(9, 12)], [(10, 13)], [(8, 11)]],
    "emphasis": [[(13, 15)], [(14, 16)], [(13, 14)]],
}


@pytest.mark.parametrize("backend", BACKENDS)
class TestOracle:
    def test_the_last_row(self, backend):
        got = attend([ROWS], Knockout(), backend, spans=[[(1, 3)]])[0]
        close(got, [*ROWS[:3], [0.8, 0, 0, 0.2]])

    def test_all_rows(self, backend):
        """Row 0 sees no key but the one that is hidden, and stays."""
        got = attend([ROWS], Knockout(rows="all"), backend, spans=[[(0, 1)]])[0]
        close(got, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.6, 0.4, 0], [0, 0.5, 1 / 3, 1 / 6]])
        assert got[1:, 0].eq(0).all()

    def test_rows_of_a_group(self, backend):
        spans = {"keys": [[(0, 1)]], "rows": [[(2, 3)]]}
        got = attend([ROWS], Knockout("keys", "rows"), backend, spans=spans)[0]
        close(got, [ROWS[0], ROWS[1], [0, 0.6, 0.4, 0], ROWS[3]])


@pytest.mark.parametrize(
    "method", [Knockout(), Knockout("subject", "all", {0: "*", 2: [1, 6]}), Knockout("subject", "emphasis")], ids=str
)
def test_promises(method, model, prompts):
    keeps_its_promises(model, method, Knockout(heads={}), prompts, SPANS)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_a_prompt_that_begins_with_the_hidden_keys(backend, model, prompts):
    """Rows that see nothing else see no pads either, which a kernel may hide by a bias, too."""
    ids, mask = prompts("left")
    spans = [[(0, 3)], [(7, 10)], [(3, 5)]]
    with torch.no_grad():
        got, expected = (
            steered(model, ids, mask, [Knockout(rows="all"), Knockout(rows="all")], spans, name)
            for name in (backend, "reference")
        )
    assert apart(got * mask[..., None], expected * mask[..., None]) < 1e-4


def steered(model, ids, mask, methods, spans, backend):
    with steerlens.steer(model, methods, spans, backend=backend):
        return model(input_ids=ids, attention_mask=mask).logits


def test_hidden_keys_have_no_influence(model, prompts):
    """One layer cut for all later rows: what its subject holds there does not reach them, other layers untouched."""
    ids, mask = prompts(None)
    spans = {"subject": [[(9, 12)]] * 3, "later": [[(12, 20)]] * 3}
    with (
        torch.no_grad(),
        steerlens.steer(model, Knockout("subject", "later", {1: "*"}), spans),
        steerlens.capture(model, spans, stats="mass") as record,
    ):
        model(input_ids=ids, attention_mask=mask)
    assert record[1].mass[:, :, 12:, 0].eq(0).all() and record[1].mass[:, :, 9:12, 0].gt(0).all()


def test_a_group_that_is_not_there():
    with pytest.raises(SpanError, match=r"knockout needs the span group 'rows', and these spans have keys"):
        Knockout("keys", "rows").plan(None, steerlens.spans.Spans.of({"keys": [[(0, 1)]]}))
