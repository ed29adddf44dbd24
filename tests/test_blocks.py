"""Graphs of token blocks (methods/context.md §10)."""

import pytest
import torch
from method_checks import apart

import steerlens
from steerlens import caches
from steerlens.blocks import graph
from steerlens.methods import PASTA, ZeroTuning


def seen(mask):
    return [set(row.nonzero()[:, 0].tolist()) for row in mask[0, 0]]


def test_oracle():
    mask, positions = graph([2, 2, 2], [(0, 1)])
    assert seen(mask) == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {4}, {4, 5}]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1]]


def test_prefix_query_and_pads():
    mask, positions = graph([1, 3, 2], [(0, 2), (1, 2)], prefix=1, query=2, width=11)
    assert seen(mask) == [
        {0}, {1}, {2}, {2, 3}, {2, 4}, {2, 4, 5}, {2, 4, 5, 6}, {*range(2, 8)}, {*range(2, 9)}, {*range(2, 10)},
        {*range(2, 11)},
    ]  # fmt: skip
    assert positions.tolist() == [[0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]]
    assert graph([2, 1, 1], [(0, 1), (1, 2)])[1].tolist() == [[0, 1, 2, 3]]  # along the longest way
    assert not graph([2, 1, 1], [(0, 1), (1, 2)])[0][0, 0, 3, 0]  # a source of a source is not seen
    additive = graph([1, 1], [], dtype=torch.float16)[0]
    assert additive.dtype == torch.float16 and additive[0, 0].tolist() == [[0, -65504], [-65504, 0]]


@torch.no_grad()
@pytest.mark.parametrize("native", ["sdpa", "eager"])
def test_blocks_are_encoded_as_if_with_their_sources_alone(model_of, row, native):
    model = model_of("llama-gqa", native)
    mask, positions = graph([5, 4, 6], [(0, 1)], query=5, dtype=torch.float32)
    found = model(row, attention_mask=mask, position_ids=positions, use_cache=True)
    first, last = (model(ids, use_cache=True) for ids in (row[:, :9], row[:, 9:15]))
    assert apart(found.logits[:, :9], first.logits) < 1e-5
    assert apart(found.logits[:, 9:15], last.logits) < 1e-5
    # the query over all cached keys, and one more token by a plain mask
    step = torch.tensor([[7]])
    more = model(
        step,
        **{caches.NAME: found.past_key_values},
        attention_mask=torch.ones(1, 21),
        position_ids=torch.tensor([[14]]),
    )
    longer, further = graph([5, 4, 6], [(0, 1)], query=6, dtype=torch.float32)
    whole = model(torch.cat([row, step], 1), attention_mask=longer, position_ids=further)
    assert apart(more.logits[:, 0], whole.logits[:, -1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_a_padded_graph_is_steered_as_the_row_alone(model, row, backend):
    """And the steered weights are the law on the unsteered ones."""
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], 1)
    padded, own = (graph([5, 4, 6], [(0, 1), (0, 2)], query=5, width=w) for w in (24, None))
    methods = [ZeroTuning(3.0), PASTA(0.05)]
    found = []
    for shift, tokens, (mask, positions) in ((4, ids, padded), (0, row, own)):
        spans = [[(2 + shift, 5 + shift), (10 + shift, 12 + shift)]]
        with steerlens.steer(model, methods, spans, backend=backend):
            found.append(model(tokens, attention_mask=mask, position_ids=positions).logits[:, shift:])
    assert apart(*found) < 1e-5
    plain = model(row, attention_mask=own[0], position_ids=own[1]).logits
    assert apart(found[1], plain) > 1e-3


def test_errors():
    for arguments, message in (
        (([2, 0], []), "blocks have tokens"),
        (([2, 2], [(1, 0)]), r"edge \(1, 0\): a source stands before its target, and blocks are 0..1"),
        (([2, 2], [(0, 2)]), r"edge \(0, 2\)"),
        (([], []), "width=0"),
    ):
        with pytest.raises(ValueError, match=message):
            graph(*arguments)
    with pytest.raises(ValueError, match="width=3 does not hold the 4 tokens"):
        graph([2, 2], [], width=3)
