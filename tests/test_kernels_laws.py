"""Laws that hold between calls of the kernels, whatever the definition says."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, Labels, Make, check, check_columns, close, on_path, stats_of
from steerlens.kernels.attention import Law, attention

PATHS = {"prefill": 17, "split": 3}


@pytest.fixture(params=PATHS)
def call(request):
    """`call(m, **keywords)`: the same inputs through one of the kernels."""
    m = Make(1, 2, 1, PATHS[request.param], 40, seed=7)
    tensors = m.qkv()

    def run(order=None, **keywords):
        query, key, value = tensors
        if order is not None:
            key, value = key[:, :, order], value[:, :, order]
        with torch.no_grad(), on_path(request.param):
            return attention(query, key, value, **keywords)

    run.make = m
    return run


def same(one, other, *names):
    for name in names or ("output",):
        close(name, getattr(one, name), getattr(other, name).double())


def test_moving_nothing_is_plain_attention(call):
    m = call.make
    labels = Labels.of(group=m.integers(4, 1, m.H, m.Tk), groups=4)
    stats = ("lse", "entropy", "argmax")
    moved = call(labels=labels, law=Law("transfer", torch.eye(4, device=DEVICE)[None, None]), stats=stats)
    same(moved, call(stats=stats), "output", "lse", "entropy", "top")


@pytest.mark.parametrize("kind", ["reach", "spotlight"])
def test_a_target_of_nothing_is_plain_attention(call, kind):
    labels = Labels.of(group=call.make.chance(0.3, 1, 2, 40).int())
    same(call(labels=labels, law=Law(kind, torch.zeros(1, 1, device=DEVICE))), call())


def test_a_row_the_law_does_not_apply_to_is_plain(call):
    m = call.make
    rows = m.chance(0.5, 1, m.Tq)
    labels = Labels.of(group=m.chance(0.3, 1, m.H, m.Tk).int())
    table = torch.zeros(1, 1, device=DEVICE)
    steered, plain = call(labels=labels, law=Law.keep(table, rows=rows)).output, call().output
    close("output", steered[:, :, ~rows[0]], plain[:, :, ~rows[0]].double())
    assert (steered - plain)[:, :, rows[0]].abs().max() > 1e-2


def test_reach_gives_the_group_its_target(call):
    m = call.make
    group = m.between(3, 6)
    labels = Labels.of(group=group.int(), terms=[group])
    mass = call(labels=labels, law=Law("reach", torch.full((1, 1), 0.8, device=DEVICE)), stats=("mass",)).mass
    before = call(labels=Labels.of(terms=[group]), stats=("mass",)).mass
    close("mass", mass, before.clamp(min=0.8).double())


def test_a_bias_multiplies_weights(call):
    m = call.make
    term = m.chance(0.3, 1, 1, m.Tk)
    labels, factor = Labels.of(terms=[term, ~term]), 3.0
    bias = torch.tensor([math.log(factor), 0.0], device=DEVICE).view(1, 1, 1, 2)
    before = call(labels=labels, stats=("mass",)).mass
    after = call(labels=labels, bias=bias, stats=("mass",)).mass
    odds = after[..., 0] / after[..., 1] / (before[..., 0] / before[..., 1])
    seen = before.amin(-1) > 1e-3
    close("odds", odds[seen], torch.full_like(odds[seen], factor).double())


def test_a_bias_split_over_two_terms_adds_up(call):
    m = call.make
    term = m.chance(0.3, 1, m.H, m.Tk)
    whole = call(labels=Labels.of(terms=[term]), bias=torch.full((1, 1, 1, 1), 1.5, device=DEVICE), stats=("lse",))
    halves = torch.tensor([2.0, -0.5], device=DEVICE).view(1, 1, 1, 2)
    same(call(labels=Labels.of(terms=[term, term]), bias=halves, stats=("lse",)), whole, "output", "lse")


def test_keys_come_in_any_order_under_a_mask(call):
    m = call.make
    order = torch.randperm(m.Tk, generator=m.generator).to(DEVICE)
    seen, group = m.chance(0.5, 1, m.H, m.Tq, m.Tk), m.chance(0.3, 1, m.H, m.Tk).int()
    law = Law.keep(m.uniform(1, m.H))
    straight = call(mask=seen, labels=Labels.of(group=group), law=law, stats=("lse", "entropy"))
    turned = call(
        order, mask=seen[..., order], labels=Labels.of(group=group[..., order]), law=law, stats=("lse", "entropy")
    )
    same(turned, straight, "output", "lse", "entropy")


def test_a_causal_mask_is_no_mask(call):
    m = call.make
    causal = torch.ones(m.Tq, m.Tk, dtype=torch.bool, device=DEVICE).tril(m.Tk - m.Tq)[None, None]
    same(call(mask=causal, stats=("lse",)), call(stats=("lse",)), "output", "lse")


def test_a_window_wider_than_the_keys_is_none(call):
    m = call.make
    labels = Labels.of(group=m.chance(0.3, 1, m.H, m.Tk).int())
    law = Law.keep(m.uniform(1, m.H))
    for window in (m.Tk, 1000):
        assert torch.equal(call(labels=labels, law=law, window=window).output, call(labels=labels, law=law).output)


def test_raw_without_a_bias_is_plain(call):
    labels = Labels.of(terms=[call.make.chance(0.3, 1, 2, 40)])
    stats = ("lse", "entropy", "argmax")
    raw = call(labels=labels, bias=torch.zeros(1, 1, 1, 1, device=DEVICE), law=Law("raw"), stats=stats)
    same(raw, call(stats=stats), "output", "lse", "entropy", "top")


def test_raw_multiplies_weights_of_a_term_by_the_factor(call):
    m = call.make
    labels = Labels.of(terms=[m.chance(0.3, 1, m.H, m.Tk)])
    plain = call(labels=labels, stats=("mass",)).mass
    bias = torch.full((1, 1, 1, 1), math.log(2.0), device=DEVICE)
    raw = call(labels=labels, bias=bias, law=Law("raw"), stats=("mass",)).mass
    close("mass", raw, 2 * plain.double())


def test_a_hidden_key_is_a_gate_of_minus_infinity(call):
    m = call.make
    gate = m.chance(0.5, 1, m.H, m.Tk)
    biased = call(labels=Labels.of(terms=[gate]), bias=torch.full((1, 1, 1, 1), -torch.inf, device=DEVICE))
    same(call(labels=Labels.of(hidden=gate)), biased)


def test_a_sink_scales_all_weights(call):
    m = call.make
    sinks, plain = m.normal(m.H), call(stats=("lse",))
    share = torch.sigmoid(plain.lse.double() - sinks.double()[:, None])
    got = call(sinks=sinks)
    close("output", got.output, plain.output.double() * share[..., None])


def test_a_call_is_deterministic(call):
    m = call.make
    keywords = {"labels": Labels.of(group=m.chance(0.3, 1, m.H, m.Tk).int()), "law": Law.keep(m.uniform(1, m.H))}
    assert torch.equal(call(**keywords).output, call(**keywords).output)


@st.composite
def calls(draw, biggest):
    """Any shape, any visibility, any law or terms: inputs of `check` and `check_columns`."""
    G, path = draw(st.sampled_from([1, 2])), draw(st.sampled_from(["prefill", "decode", "split"]))
    m = Make(
        B=draw(st.integers(1, 2)),
        H=G * draw(st.sampled_from([1, 2])),
        G=G,
        Tq=draw(st.integers(1, biggest if path == "prefill" else 4)),
        Tk=draw(st.integers(1, biggest)),
        D=draw(st.sampled_from([3, 16, 24, 32])),
        Dv=draw(st.sampled_from([5, 16, 24])),
        seed=draw(st.integers(0, 10**6)),
    )
    B, H, Tq, Tk = draw(st.sampled_from([1, m.B])), draw(st.sampled_from([1, m.H])), m.Tq, m.Tk
    some = {}
    if draw(st.booleans()):
        some["window"] = draw(st.integers(1, Tk + 3))
    if draw(st.booleans()):
        some["offset"] = draw(st.integers(-Tq, Tk + 3))
    if not some and draw(st.booleans()):
        some["mask"] = m.chance(0.6, B, H, Tq, Tk)
        if draw(st.booleans()):
            some["mask"] = torch.where(some["mask"], m.normal(B, H, Tq, Tk), -1e9)
    if draw(st.booleans()):
        some["softcap"] = draw(st.floats(0.5, 30))
    if draw(st.booleans()):
        some["sinks"] = m.normal(m.H)
    kind = draw(st.sampled_from([None, "bias", "raw", "transfer", "reach", "spotlight"]))
    count = draw(st.integers(1, 6)) if kind in ("bias", "raw") else draw(st.integers(0, 1)) if kind else 0
    hidden = m.chance(0.2, B, 1, Tk) if draw(st.booleans()) else None
    groups = draw(st.integers(2, 4)) if kind not in (None, "bias", "raw") else 1
    if kind or hidden is not None:
        some["labels"] = Labels.of(
            group=m.integers(groups, B, H, Tk) * m.chance(0.5, B, 1, Tk) if groups > 1 else None,
            groups=groups,
            hidden=hidden,
            terms=[m.chance(draw(st.sampled_from([0.0, 0.1, 1.0])), B, H, Tk) for _ in range(count)],
        )
    if count:
        some["bias"] = m.normal(B, H, draw(st.sampled_from([1, Tq])), count)
        if draw(st.booleans()):
            some["bias"] = torch.where(m.chance(0.2, *some["bias"].shape), -torch.inf, some["bias"])
    rows = m.chance(0.5, B, Tq) if draw(st.booleans()) else None
    if kind == "raw":
        some["law"] = Law("raw")
    elif groups > 1:
        size = (B, H, groups, groups) if kind == "transfer" else (B, H)
        some["law"] = Law(kind, m.uniform(*size), rows)
    if draw(st.booleans()):
        some["cut"] = m.integers(3, B, H, draw(st.sampled_from([1, Tq]))).to(torch.int8)
    stats = tuple(draw(st.lists(st.sampled_from(stats_of(some)), unique=True)))
    return m, some, stats, path


QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=16, **QUIET)
@given(calls(biggest=24))
def test_any_call_is_the_definitions(call):
    m, some, stats, path = call
    check(*m.qkv(), path=path, stats=stats, **some)


@settings(max_examples=8, **QUIET)
@given(calls(biggest=24))
def test_any_column_sums_are_the_definitions(call):
    m, some, _, _ = call
    keep = {k: v for k, v in some.items() if k not in ("cut", "law")}
    if "labels" in keep and keep["labels"].groups > 1:
        del keep["labels"]
        keep.pop("bias", None)
    check_columns(*m.qkv(), counted=m.chance(0.5, m.B, m.Tq), **keep)


@pytest.mark.full
@settings(max_examples=600, **{**QUIET, "derandomize": False})
@given(calls(biggest=80))
def test_any_larger_call_is_the_definitions(call):
    m, some, stats, path = call
    check(*m.qkv(), path=path, stats=stats, **some)
