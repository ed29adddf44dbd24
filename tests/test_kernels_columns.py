"""`kernels.column_sums` and the index of keys."""

import pytest
import torch
from kernel_cases import DTYPES, GARBAGE, Labels, Make, check_columns, poisoned
from steerlens.kernels import key_index

CASES = {
    "plain": lambda m: {},
    "window": lambda m: {"window": 9, "softcap": 2.0},
    "window of 1": lambda m: {"window": 1},
    "softcap and sinks": lambda m: {"softcap": 1.5, "scaling": 0.7, "sinks": m.normal(m.H)},
    "padding": lambda m: {"labels": Labels.of(hidden=m.padding())},
    "gates per head": lambda m: {"labels": Labels.of(hidden=m.chance(0.4, 1, m.H, m.Tk)), "window": 20},
    "terms": lambda m: {
        "labels": Labels.of(terms=[m.chance(0.2, m.B, m.H, m.Tk), m.between(0, 3)], hidden=m.padding()),
        "bias": m.normal(1, m.H, m.Tq, 2),
    },
    "gates on all keys": lambda m: {
        "labels": Labels.of(terms=[m.between(0, m.Tk)]),
        "bias": torch.where(m.chance(0.5, 1, m.H, m.Tq, 1), -torch.inf, 1.0),
    },
    "bool mask": lambda m: {"mask": m.chance(0.4, m.B, m.H, m.Tq, m.Tk)},
    "additive mask": lambda m: {
        "mask": torch.where(m.chance(0.4, m.B, 1, m.Tq, m.Tk), -1e9, m.normal(m.B, 1, m.Tq, m.Tk)),
        "labels": Labels.of(hidden=m.padding()),
    },
    "last keys out of sight": lambda m: {"offset": m.Tk - m.Tq - 6},
    "past the keys": lambda m: {"offset": m.Tk - 5, "window": 12},
    "first rows see nothing": lambda m: {"offset": -3},
}


@pytest.mark.parametrize("name", CASES)
def test_sums_and_observers_are_the_definitions(name):
    m = Make(G=1 + len(name) % 2, seed=name, Tq=35, Tk=45)
    query, key, value = m.qkv()
    check_columns(query, key, value, **CASES[name](m))


@pytest.mark.parametrize("name", ["plain", "window", "terms", "bool mask"])
def test_only_counted_rows_and_wanted_heads(name):
    m = Make(2, 4, 2, seed=name, Tq=33, Tk=20)
    qkv, keywords = m.qkv(), CASES[name](m)
    heads = torch.tensor([3, 9, 1], dtype=torch.int32, device=qkv[0].device)[::2]
    counted = m.chance(0.5, m.B, 2 * m.Tq)[:, ::2]
    check_columns(*qkv, counted=counted, heads=heads, **keywords)


@pytest.mark.parametrize("window", [None, 9])
def test_every_alignment_of_rows_keys_and_windows(window):
    m = Make(H=1, Tq=35, Tk=18, D=8, seed=8)
    qkv = m.qkv()
    for offset in range(-8, 8):
        check_columns(*qkv, offset=offset, window=window)


@pytest.mark.parametrize(("Tq", "Tk", "D"), [(1, 1, 8), (1, 33, 16), (16, 16, 80), (48, 32, 16), (64, 64, 7)])
@pytest.mark.parametrize("counted", [False, True])
def test_shapes(Tq, Tk, D, counted):
    m = Make(1, 1, 1, Tq, Tk, D, seed=Tq + D)
    check_columns(*m.qkv(), counted=m.chance(0.5, 1, Tq) if counted else None)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bits_sum_in_fp32(dtype):
    m = Make(seed=4, Tq=35, dtype=dtype)
    check_columns(*m.qkv(), **CASES["terms"](m))


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("Tq", "Tk"), [(75, 37), (64, 64), (37, 130)])
def test_larger_shapes(name, Tq, Tk):
    m = Make(2, 8, 2, Tq, Tk, 40, seed=name)
    qkv, keywords = m.qkv(), CASES[name](m)
    check_columns(*qkv, counted=m.chance(0.5, 1, Tq), **keywords)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("Tk", [1, 16, 45])
def test_the_index_lists_tiles_and_keys_in_order(groups, Tk):
    m, N = Make(Tk=Tk, B=2, seed=groups), 16
    labels = Labels.of(
        group=m.integers(groups, 2, 2, Tk) * m.chance(0.4, 2, 2, Tk),
        groups=groups,
        hidden=m.chance(0.1, 2, 2, Tk) & m.between(0, 20),
        terms=[m.chance(0.3, 2, 2, Tk) & m.between(0, 16)],
    )
    with poisoned():
        found = key_index.index(labels.bits.mT.contiguous().mT, groups, N)
    T = -(-Tk // N)
    for b in range(2):
        for h in range(2):
            tiles = [labels.bits[b, h, t * N : (t + 1) * N].int() for t in range(T)]
            plain = [t for t, bits in enumerate(tiles) if len(bits) == N and not bits.any()]
            others = [t for t, bits in enumerate(tiles) if t not in plain and ((bits & 7) == 0).any()]
            before = found.before[b, h]
            for kind, want in enumerate((plain, others)):
                assert found.tiles[b, h, kind, : len(want)].tolist() == want
                assert before[kind].tolist() == [sum(i < t for i in want) for t in range(T + 1)]
            for g in range(1, groups):
                want = ((labels.bits[b, h].int() & 7) == g).nonzero()[:, 0].tolist()
                assert found.keys[b, h, g - 1, : len(want)].tolist() == want
                assert before[1 + g].tolist() == [sum(i < t * N for i in want) for t in range(T + 1)]
                assert (found.keys[b, h, g - 1, len(want) :] == GARBAGE).all()


def test_an_index_is_made_once():
    labels = Labels.of(hidden=Make().padding())
    assert labels.index(16) is labels.index(16) and labels.index(16) is not labels.index(32)


def test_labels_hold_group_hidden_and_terms_bit_by_bit():
    on = torch.tensor([[[True, False]]])
    assert Labels.of(group=on.int() * 3, groups=4, hidden=on, terms=[on, ~on]).bits.tolist() == [[[15, 16]]]
    assert Labels.of(terms=[on] * 5).bits.dtype == torch.uint8
    wide = Labels.of(terms=[on & False] * 27 + [on])
    assert wide.bits.dtype == torch.int32 and wide.bits.tolist() == [[[1 << 30, 0]]]
