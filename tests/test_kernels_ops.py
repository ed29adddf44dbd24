"""The kernels as `torch.library` operators: schemas, shapes without data, `torch.compile`."""

import pytest
import torch
from kernel_cases import Labels, Make, on_path
from steerlens.kernels import attention as home
from steerlens.kernels._launch import Again
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


class Compiled:
    """Stands for a compiled kernel: it notes its launches."""

    function = 1

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """Stands for a kernel that Triton looks up by all arguments."""

    arg_names = ("p_x", "p_y", "n", "scale", "LATE", "EARLY")

    def __init__(self):
        self.found, self.asked = Compiled(), []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.asked.append((arguments, options)) or self.found


def test_a_launch_that_is_known_needs_no_look_up():
    """Numbers and constants as first seen, in the kernel's order; new tensors by their addresses."""
    kernel = Kernel()
    again, grid, x = Again(kernel), (3, 1, 1), torch.zeros(40)
    constants = ({"EARLY": 8}, {"LATE": 2})
    again.launch(grid, (x, x), (7, 0.5), constants, 4, 3, "first")
    assert kernel.asked == [((x, x, 7, 0.5), {"EARLY": 8, "LATE": 2, "num_warps": 4, "num_stages": 3})]
    assert not kernel.found.launches
    other = torch.zeros(40)
    again.launch(grid, (other, x), (7, 0.5), constants, 4, 3, "first")
    assert len(kernel.asked) == 1
    assert kernel.found.launches == [(grid, (other.data_ptr(), x.data_ptr(), 7, 0.5, 2, 8))]


@pytest.mark.parametrize("what", ["another key", "an address that does not divide by 16", "nothing was loaded"])
def test_other_launches_are_looked_up(what):
    kernel = Kernel()
    kernel.found.function = None if what == "nothing was loaded" else 1
    again, x = Again(kernel), torch.zeros(40)
    constants = ({"EARLY": 8, "LATE": 2},)
    again.launch((1, 1, 1), (x, x), (7, 0.5), constants, 4, 3, "first")
    later = x[1:] if "address" in what else x
    again.launch((1, 1, 1), (later, x), (7, 0.5), constants, 4, 3, "second" if "key" in what else "first")
    assert len(kernel.asked) == 2 and not kernel.found.launches


def test_a_cached_step_is_checked_once_for_all_layers(monkeypatch):
    """What was looked at is shape, strides, dtype and device: a change of any of them is looked at anew."""
    looked, original = [], home._Asked.of
    monkeypatch.setattr(home._Asked, "of", lambda *args: looked.append(1) or original(*args))
    m = Make(1, 2, 1, 1, 20, seed=5)
    query, key, value = (t.contiguous() for t in m.qkv())
    labels, bias = Labels.of(terms=[m.chance(0.3, 1, 1, m.Tk)]), m.normal(1, 2, 1, 1)
    home._ASKED.clear()

    def call(key, value, **more):
        return attention(query, key, value, labels=labels, **({"bias": bias} | more)).output

    first = call(key, value)
    assert torch.equal(call(key, value), first) and len(looked) == 1
    assert not torch.equal(call(key.flip(2), value), first) and len(looked) == 1
    for change in ({"window": 9}, {"softcap": 5.0}, {"scaling": 0.3}):
        before = len(looked)
        call(key, value, **change)
        assert len(looked) == before + 1
    assert torch.equal(call(torch.cat([key, key], 3)[..., : m.D], value), first) and len(looked) == 5
    with pytest.raises(ValueError, match="shape of labels"):
        call(key[:, :, :-1], value[:, :, :-1])
