"""What the tests of caches and of modes of generation share: methods, and greedy generation under them."""

import pytest
import torch

import steerlens
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning

HEADS = {0: [0, 3, 5], 1: [7], 2: "*"}
METHODS = {
    "zerotuning": ZeroTuning(5.0, heads=HEADS),
    "pasta": PASTA(0.05, heads=HEADS),
    "act": ACT(0.0, 0.08, heads=HEADS),
    "headmask": HeadMask({0: [1, 2], 2: "*"}, phase="decode"),
    "composed": [ZeroTuning(2.0), ACT(0.3, 0.08, heads=HEADS), PASTA(0.3, heads={1: "*"}), HeadMask({1: [0], 2: [3]})],
}
CAUSAL = ["zerotuning", "pasta", "headmask"]
"""Methods that may begin in the middle of a prompt."""
SPANS = [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]]
RUNNING = ACT(0.0, 0.08, decode="running")
every_method = pytest.mark.parametrize("name", METHODS)


def method_of(name):
    return RUNNING if name == "running" else METHODS[name]


def generate(model, method, spans, ids, mask=None, *, backend="auto", **options):
    """Greedy generation under steering, with raw logits and processed scores."""
    with steerlens.steer(model, method, spans, backend=backend):
        return greedy(model, ids, mask, **options)


def greedy(model, ids, mask=None, **options):
    keep = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask} | keep | options
    return model.generate(ids, **options)


def apart(got, expected):
    got, expected = (torch.stack(x) if isinstance(x, tuple) else x for x in (got, expected))
    return ((got - expected).abs().max() / expected.abs().max()).item()


def assert_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    assert apart(got.logits, expected.logits) < 1e-4


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def whole(mask, more):
    return torch.nn.functional.pad(mask, (0, more), value=1)
