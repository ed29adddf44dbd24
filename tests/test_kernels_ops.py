"""The kernels as `torch.library` operators: schemas, shapes without data, `torch.compile`."""

import pytest
import torch
from kernel_cases import Labels, Make, on_path
from steerlens.kernels import attention as home
from steerlens.kernels.attention import Law, attention
from steerlens.kernels.column_sums import column_sums

UTILS = ("test_schema", "test_faketensor")


def calls(name):
    """Arguments of every call of one operator while a few variants run."""
    found, op = [], getattr(torch.ops.steerlens, name).default

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op:
                found.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    m = Make(1, 2, 1, 5, 20, Dv=24, seed=name)
    query, key, value = m.qkv()
    heads = torch.tensor([1], dtype=torch.int32, device=query.device)
    labels = Labels.of(group=m.chance(0.3, 1, m.H, m.Tk).int(), terms=[m.chance(0.3, 1, 1, m.Tk)])
    keep = {"labels": labels, "bias": m.normal(1, 1, 1, 1), "law": Law.keep(m.uniform(1, 1))}
    with Spy():
        for path in ("prefill", "split"):
            with on_path(path):
                got = attention(query, key, value, stats=("lse", "entropy", "argmax", "mass"), heads=heads, **keep)
                attention(query, key, value, cut=torch.ones(1, 2, 1, dtype=torch.int8, device=query.device), window=9)
                attention(query, key, value, stats=("lse_before",), output=False, **{**keep, "labels": Labels.of(
                    terms=[m.chance(0.3, 1, 1, m.Tk)]), "law": None})  # fmt: skip
        column_sums(query, key, got.lse, heads=heads)
        column_sums(query, key, got.lse.expand(1, 2, -1).contiguous(), labels=labels, counted=m.chance(0.5, 1, m.Tq))
    return op, found


@pytest.mark.parametrize("name", ["attention", "column_sums", "key_index"])
def test_schema_and_shapes_are_what_the_operator_does(name):
    op, found = calls(name)
    assert len(found) >= 2
    for args, kwargs in found:
        torch.library.opcheck(op, args, kwargs, test_utils=UTILS)


@pytest.mark.parametrize("path", ["prefill", "split"])
@pytest.mark.parametrize("inside", [False, True], ids=["labels passed", "labels made inside"])
def test_a_compiled_call_gives_the_same_numbers(inside, path):
    m = Make(1, 2, 1, 5, 33, seed=3)
    query, key, value = m.qkv()
    group, beta = m.chance(0.3, 1, m.H, m.Tk).int(), m.uniform(1, m.H)
    made = Labels.of(group=group)

    def call(query, key, value):
        labels = Labels.of(group=group) if inside else made
        got = attention(query, key, value, labels=labels, law=Law.keep(beta), stats=("lse", "argmax"))
        return got.output * 2, got.lse, got.argmax

    torch._dynamo.reset()
    with torch.no_grad(), on_path(path):
        want = call(query, key, value)
        made.known.clear()
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(query, key, value)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_compiled_column_sums_give_the_same_numbers():
    m = Make(1, 2, 1, 5, 33, seed=3)
    query, key, value = m.qkv()

    def call(query, key, value):
        lse = attention(query, key, value, stats=("lse",), output=False).lse
        return column_sums(query, key, lse, counted=None)

    torch._dynamo.reset()
    with torch.no_grad():
        want = call(query, key, value)
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(query, key, value)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_decode_is_reached_by_the_shape_alone(monkeypatch):
    """A call with few rows launches the split kernel and its merge, one with many rows the prefill kernel."""
    launched = []

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(home, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("steered_prefill_kernel", "steered_decode_kernel", "steered_merge_kernel"):
        monkeypatch.setattr(home, name, Spy(name))
    with torch.no_grad():
        attention(*Make(1, 4, 1, 16, 20, seed=1).qkv())
        assert launched == ["steered_decode_kernel", "steered_merge_kernel"]
        launched.clear()
        attention(*Make(1, 4, 1, 17, 20, seed=1).qkv())
        assert launched == ["steered_prefill_kernel"]
