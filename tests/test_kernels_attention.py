"""`kernels.attention` gives what `kernels.definition` defines: every law and extra, on both kernels."""

import pytest
import torch
from kernel_cases import DTYPES, Labels, Make, check, stats_of
from steerlens.kernels.attention import STATS, Law, is_decode, split_count

PATHS = {"prefill": 19, "split": 3}
"""Query rows by path; `split`: decode whose keys are split in three."""


def two(m, p=0.2, **more):
    """Labels of two groups, per head."""
    return Labels.of(group=m.chance(p, m.B, m.H, m.Tk).int(), **more)


def keep(m, labels, beta=None, **more):
    return {
        "labels": labels,
        "law": Law.keep(m.uniform(1, m.H) if beta is None else m.uniform(1, 1) * 0 + beta),
        **more,
    }


def budget(m, groups, B=1, H=1):
    """A table that moves mass between groups and neither makes nor loses any."""
    table = m.uniform(B, H, groups, groups)
    return Law("transfer", table / table.sum(2, keepdim=True))


def terms(m, *ps):
    """Terms that overlap, one the same for all heads and the next by head."""
    return [m.chance(p, m.B, 1 if t % 2 == 0 else m.H, m.Tk) for t, p in enumerate(ps)]


def rows(m, p=0.5):
    return m.chance(p, m.B, m.Tq)


def mask(m, p=0.4, heads=None):
    """A bool mask in which one row sees nothing."""
    seen = m.chance(p, m.B, heads or m.H, m.Tq, m.Tk)
    seen[:, :, m.Tq // 2] = False
    return seen


def additive(m, floor=-1e9):
    return torch.where(mask(m), m.normal(m.B, m.H, m.Tq, m.Tk), floor)


def cut(m, *size):
    """Every cut in turn: none, uniform, zero."""
    return (
        ((torch.arange(m.H * m.Tq).view(1, m.H, m.Tq) + m.integers(3, 1, 1, 1).cpu()) % 3)
        .to(device=m.normal(1).device, dtype=torch.int8)[:, : size[0], : size[1]]
        .expand(*(m.B if len(size) == 3 else 1, -1, -1))
    )


VISIBLE = {
    "plain": lambda m: {},
    "scaling": lambda m: {"scaling": 0.7},
    "window of 7": lambda m: {"window": 7},
    "window of 1": lambda m: {"window": 1},
    "window of 16": lambda m: {"window": 16},
    "window of 17": lambda m: {"window": 17},
    "softcap": lambda m: {"softcap": 1.5, "window": 20},
    "sinks": lambda m: {"sinks": m.normal(m.H) + 1},
    "sinks strided, one of -inf, rows that see nothing": lambda m: {
        "sinks": torch.stack([m.normal(m.H), m.normal(m.H)], 1).index_fill(0, m.integers(1, 1), -torch.inf)[:, 0],
        "offset": -1,
    },
    "offset hides the last keys": lambda m: {"offset": m.Tk - m.Tq - 6},
    "offset 0": lambda m: {"offset": 0},
    "offset beyond the keys": lambda m: {"offset": m.Tk - 2, "window": 4},
    "first rows see nothing": lambda m: {"offset": -2},
    "no row sees anything": lambda m: {"offset": -m.Tq},
    "padding": lambda m: {"labels": Labels.of(hidden=m.padding())},
    "gates per head": lambda m: {"labels": Labels.of(hidden=m.chance(0.4, 1, m.H, m.Tk)), "window": 12},
    "hidden in the middle": lambda m: {"labels": Labels.of(hidden=m.between(14, 34))},
    "everything hidden": lambda m: {"labels": Labels.of(hidden=m.between(0, m.Tk)), "sinks": m.normal(m.H)},
    "bool mask": lambda m: {"mask": mask(m)},
    "bool mask of all heads, strided": lambda m: {"mask": mask(m, heads=2).transpose(2, 3).contiguous().mT[:, :1]},
    "additive mask": lambda m: {"mask": additive(m)},
    "additive mask of -1e4, fp16": lambda m: {"mask": additive(m, -1e4).half()},
    "mask beside padding and sinks": lambda m: {
        "mask": additive(m, -torch.inf),
        "labels": Labels.of(hidden=m.padding()),
        "sinks": m.normal(m.H),
    },
}
STATIC = {
    "one term": lambda m: {"labels": Labels.of(terms=terms(m, 0.1)), "bias": m.normal(1, 1, 1, 1)},
    "two terms that overlap, bias by row": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.1, 0.6), hidden=m.padding()),
        "bias": m.normal(m.B, m.H, m.Tq, 2),
    },
    "bias by row, shared by heads": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.3)),
        "bias": m.normal(1, 1, m.Tq, 1),
    },
    "six terms in int32 labels": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.1, 0.6, 0.1, 0.2, 0.1, 0.3), hidden=m.padding()),
        "bias": m.normal(m.B, 1, 1, 6).expand(-1, m.H, -1, -1),
        "window": 20,
    },
    "a term in every key": lambda m: {"labels": Labels.of(terms=[m.between(0, m.Tk)]), "bias": m.normal(1, m.H, 1, 1)},
    "bias of -inf is a gate": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.5, 0.5)),
        "bias": m.normal(1, m.H, 1, 2).masked_fill(torch.tensor([True, False], device=m.normal(1).device), -torch.inf),
    },
    "gates on all keys": lambda m: {
        "labels": Labels.of(terms=[m.between(0, m.Tk)]),
        "bias": torch.where(m.chance(0.5, 1, m.H, m.Tq, 1), -torch.inf, 1.0),
    },
    "terms with softcap and sinks": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.2)),
        "bias": m.normal(1, m.H, 1, 1),
        "softcap": 2.0,
        "sinks": m.normal(m.H) + 3,
    },
    "terms beside a mask": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.2, 0.2)),
        "bias": m.normal(1, m.H, 1, 2),
        "mask": mask(m),
    },
    "raw": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.1, 0.3), hidden=m.padding()),
        "bias": m.normal(1, m.H, 1, 2) * 2,
        "law": Law("raw"),
    },
    "raw with gates and sinks": lambda m: {
        "labels": Labels.of(terms=terms(m, 0.4)),
        "bias": torch.where(m.chance(0.5, 1, m.H, m.Tq, 1), -torch.inf, 3.0),
        "sinks": m.normal(m.H) + 4,
        "law": Law("raw"),
    },
    "raw that gates all keys": lambda m: {
        "labels": Labels.of(terms=[m.between(0, m.Tk)]),
        "bias": torch.where(m.chance(0.5, 1, m.H, 1, 1), -torch.inf, 3.0),
        "law": Law("raw"),
    },
}
LAWS = {
    "keep a part": lambda m: keep(m, two(m)),
    "keep nothing": lambda m: keep(m, two(m), 0.0, window=20),
    "keep 0.4": lambda m: keep(m, two(m, hidden=m.padding()), 0.4),
    "keep all": lambda m: keep(m, two(m), 1.0),
    "an empty group": lambda m: keep(m, two(m, 0.0), 0.4),
    "all keys in group 1": lambda m: keep(m, two(m, 2.0), 0.4),
    "one key in group 1": lambda m: keep(m, Labels.of(group=m.between(20, 21).int()), 0.4),
    "first keys in group 1": lambda m: keep(
        m, Labels.of(group=m.between(0, 33).int(), hidden=m.padding()), 0.4, offset=9
    ),
    "last keys in group 1": lambda m: keep(m, Labels.of(group=m.between(m.Tk - 18, m.Tk).int()), 0.4, window=9),
    "keep with terms, masses and sinks": lambda m: keep(
        m, two(m, terms=terms(m, 0.2, 0.3)), bias=m.normal(1, m.H, m.Tq, 2), sinks=m.normal(m.H) + 4
    ),
    "keep where sinks are all of group 0": lambda m: keep(m, two(m, 2.0), 0.4, sinks=m.normal(m.H)),
    "keep in some rows": lambda m: {"labels": two(m), "law": Law.keep(m.uniform(m.B, m.H), rows=rows(m))},
    "keep beside a mask": lambda m: keep(m, two(m), 0.4, mask=additive(m)),
    "keep masses, no bias": lambda m: keep(m, two(m, terms=terms(m, 0.2))),
    "labels shared by rows": lambda m: keep(m, Labels.of(group=m.chance(0.3, 1, m.H, m.Tk).int())),
    "labels shared by heads": lambda m: keep(m, Labels.of(group=m.chance(0.3, m.B, 1, m.Tk).int())),
    "a gain": lambda m: {"labels": two(m), "law": Law("transfer", m.uniform(m.B, m.H, 2, 2) * 3), "softcap": 3.0},
    "reach": lambda m: {"labels": two(m), "law": Law("reach", m.uniform(m.B, m.H))},
    "reach 1": lambda m: {"labels": two(m), "law": Law("reach", m.uniform(1, 1) * 0 + 1), "window": 9},
    "reach in some rows, with sinks": lambda m: {
        "labels": two(m, 0.05, hidden=m.padding()),
        "law": Law("reach", m.uniform(1, m.H), rows=rows(m)),
        "sinks": m.normal(m.H),
    },
    "spotlight": lambda m: {
        "labels": two(m, terms=terms(m, 0.3)),
        "bias": m.normal(1, m.H, 1, 1),
        "law": Law("spotlight", m.uniform(m.B, 1)),
    },
    "spotlight in some rows": lambda m: {
        "labels": two(m, 0.05),
        "law": Law("spotlight", m.uniform(1, m.H), rows=rows(m)[:1]),
        "window": 20,
    },
    "three groups": lambda m: {"labels": Labels.of(group=m.integers(3, 1, m.H, m.Tk), groups=3), "law": budget(m, 3)},
    "four groups, one empty": lambda m: {
        "labels": Labels.of(group=m.integers(2, m.B, m.H, m.Tk) * 2, groups=4),
        "law": budget(m, 4),
    },
    "four groups": lambda m: {
        "labels": Labels.of(group=m.integers(4, m.B, m.H, m.Tk), groups=4, hidden=m.padding(), terms=terms(m, 0.3)),
        "bias": m.normal(1, m.H, m.Tq, 1),
        "law": budget(m, 4, m.B, m.H),
        "sinks": m.normal(m.H),
    },
    "reach of four groups": lambda m: {
        "labels": Labels.of(group=m.integers(4, m.B, 1, m.Tk), groups=4),
        "law": Law("reach", m.uniform(1, m.H)),
    },
}
CUT = {
    "cut by head": lambda m: {"cut": cut(m, m.H, 1)},
    "cut by head and padding": lambda m: {"cut": cut(m, m.H, 1), "labels": Labels.of(hidden=m.padding())},
    "cut by row and window": lambda m: {"cut": cut(m, m.H, m.Tq, 1), "window": 11},
    "cut beside gates and window": lambda m: {
        "cut": cut(m, m.H, m.Tq),
        "labels": Labels.of(hidden=m.chance(0.4, m.B, m.H, m.Tk)),
        "window": 18,
    },
    "cut all heads": lambda m: {"cut": cut(m, 1, 1) * 0 + 1, "offset": m.Tk - m.Tq - 5},
    "cut to zero": lambda m: {"cut": cut(m, 1, 1) * 0 + 2},
    "cut rows that see nothing": lambda m: {"cut": cut(m, 1, 1) * 0 + 1, "offset": -2},
    "cut past the keys": lambda m: {"cut": cut(m, m.H, m.Tq), "offset": m.Tk + 5, "window": 15},
    "cut beside a bool mask": lambda m: {"cut": cut(m, m.H, 1), "mask": mask(m)},
    "cut beside an additive mask and padding": lambda m: {
        "cut": cut(m, m.H, m.Tq, 1),
        "mask": additive(m),
        "labels": Labels.of(hidden=m.padding()),
    },
    "cut beside a law": lambda m: keep(m, two(m), 0.4, cut=cut(m, m.H, m.Tq)),
}
ALL = {**VISIBLE, **STATIC, **LAWS, **CUT}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_output_and_statistics_are_the_definitions(name, path):
    m = Make(G=1 + len(name) % 2, seed=name, Tq=PATHS[path])
    qkv, keywords = m.qkv(), ALL[name](m)
    check(*qkv, path=path, stats=stats_of(keywords), **keywords)


BATCHES = [
    "gates per head",
    "bool mask of all heads, strided",
    "additive mask",
    "two terms that overlap, bias by row",
    "keep with terms, masses and sinks",
    "labels shared by rows",
    "labels shared by heads",
    "reach in some rows, with sinks",
    "spotlight in some rows",
    "four groups",
    "cut by row and window",
    "cut beside gates and window",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_grouped_heads(name, path):
    m = Make(2, 4, 2, seed=name, Tq={"prefill": 17, "split": 2}[path], Tk=35)
    qkv, keywords = m.qkv(), ALL[name](m)
    check(*qkv, path=path, **keywords)


@pytest.mark.full
@pytest.mark.parametrize("path", [*PATHS, "decode", None])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("Tq", "Tk"), [(37, 75), (64, 64), (70, 50), (9, 130)])
def test_larger_shapes(name, path, Tq, Tk):
    m = Make(2, 8, 2, Tq, Tk, 40, 48, seed=name)
    qkv, keywords = m.qkv(), ALL[name](m)
    check(*qkv, path=path, stats=stats_of(keywords), **keywords)


LEAN = ["plain", "two terms that overlap, bias by row", "raw", "keep with terms, masses and sinks", *CUT]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", LEAN)
def test_output_without_statistics_is_the_definitions(name, path):
    m = Make(seed=name, Tq=PATHS[path])
    qkv, keywords = m.qkv(), ALL[name](m)
    check(*qkv, path=path, **keywords)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stat", STATS)
def test_each_statistic_without_output(stat, path):
    m = Make(seed=stat, Tq=PATHS[path])
    keywords = STATIC["two terms that overlap, bias by row"](m)
    check(*m.qkv(), path=path, stats=(stat,), output=False, **keywords)


@pytest.mark.parametrize("path", PATHS)
def test_statistics_do_not_know_of_cuts(path):
    m = Make(seed=1, Tq=PATHS[path])
    qkv = m.qkv()
    whole = check(*qkv, path=path, stats=("lse", "entropy"))
    gone = check(*qkv, path=path, stats=("lse", "entropy"), cut=cut(m, 1, 1) * 0 + 2)
    assert torch.equal(whole.lse, gone.lse) and torch.equal(whole.entropy, gone.entropy)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", ["plain", "keep in some rows", "cut by row and window", "cut by head and padding", "additive mask"]
)
def test_heads_are_picked_in_the_order_asked_for(name, path):
    m = Make(1, 4, 2, seed=name, Tq=PATHS[path])
    qkv, keywords = m.qkv(), ALL[name](m)
    heads = torch.tensor([3, 9, 0, 9, 1], dtype=torch.int32, device=qkv[0].device)[::2]
    check(*qkv, path=path, heads=heads, stats=stats_of(keywords), **keywords)
    check(*qkv, path=path, heads=heads, stats=("lse",), output=False, **keywords)


@pytest.mark.parametrize("path", PATHS)
def test_the_lowest_of_equal_keys_is_the_argmax(path):
    m = Make(seed=3, Tq=PATHS[path])
    query, key, value = m.qkv()
    key[:, :, 5:] = key[:, :, 5:6]
    got = check(query, key, value, path=path, stats=("argmax",), scaling=1.0)
    assert set(got.argmax.unique().tolist()) <= set(range(6))
    group = torch.zeros(1, 1, m.Tk, dtype=torch.int, device=key.device)
    group[..., 5:9] = 1
    got = check(query, key, value, path=path, stats=("argmax",), **keep(m, Labels.of(group=group), 1.0))
    assert set(got.argmax.unique().tolist()) <= {*range(6), 9}, "the lowest of group 1 is 5, of group 0 9"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", [0, 1])
def test_the_lowest_of_equal_keys_is_the_argmax_across_groups(first, path):
    m = Make(seed=3, Tq=PATHS[path], Tk=4)
    query, key, value = m.qkv()
    key[:] = key[:, :, :1]
    labels = Labels.of(group=torch.tensor([[[first, first, 1 - first, 1 - first]]], device=key.device))
    got = check(query, key, value, path=path, stats=("argmax",), offset=4, **keep(m, labels, 1.0))
    assert (got.argmax == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 9, 17])
def test_every_alignment_of_rows_keys_and_windows(window, path):
    """Tiles at the edges of causality and window, for every distance of the first row from the edge of a tile."""
    m = Make(H=1, Tq=PATHS[path], Tk=50, D=8, seed=8)
    qkv = m.qkv()
    for offset in range(20, 36):
        check(*qkv, path=path, offset=offset, window=window)
    for offset in range(20, 36):
        check(*qkv, path=path, offset=offset, window=window, cut=cut(m, 1, 1) * 0 + 1)


SHAPES = [
    # B, H, G, Tq, Tk, D, Dv
    pytest.param(1, 1, 1, 1, 1, 8, 8, id="one row, one key"),
    pytest.param(1, 8, 1, 1, 17, 16, 16, id="MQA, one row"),
    pytest.param(2, 2, 2, 15, 15, 16, 16, id="MHA of 15"),
    pytest.param(1, 2, 1, 16, 16, 16, 16, id="tiles of 16"),
    pytest.param(1, 2, 1, 17, 63, 16, 16, id="17 rows, 63 keys"),
    pytest.param(1, 2, 2, 16, 64, 16, 16, id="whole tiles"),
    pytest.param(1, 2, 1, 33, 5, 16, 16, id="more rows than keys"),
    pytest.param(1, 1, 1, 17, 33, 64, 64, id="head dim 64"),
    pytest.param(1, 1, 1, 17, 33, 80, 80, id="head dim 80"),
    pytest.param(1, 1, 1, 17, 33, 96, 96, id="head dim 96"),
    pytest.param(1, 1, 1, 17, 33, 112, 128, id="head dims 112 and 128"),
    pytest.param(1, 1, 1, 17, 33, 192, 128, id="head dims 192 and 128"),
    pytest.param(1, 1, 1, 17, 33, 256, 256, id="head dim 256"),
    pytest.param(1, 1, 1, 17, 33, 7, 33, id="head dims 7 and 33"),
    pytest.param(1, 1, 1, 17, 33, 1, 20, id="head dims 1 and 20"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("B", "H", "G", "Tq", "Tk", "D", "Dv"), SHAPES)
def test_shapes(B, H, G, Tq, Tk, D, Dv, path):
    m = Make(B, H, G, Tq, Tk, D, Dv, seed=Tq * 1000 + Tk + D)
    qkv = m.qkv()
    check(*qkv, path=path, **keep(m, two(m, terms=terms(m, 0.2)), bias=m.normal(1, H, 1, 1)))
    if path == "prefill":
        check(*[x.contiguous() for x in qkv], path=path, cut=cut(m, m.H, m.Tq))


def test_few_packed_rows_are_decoded():
    assert is_decode(8, 8) and not is_decode(8, 9) and not is_decode(1, 65)


@pytest.mark.parametrize(("heads", "groups", "rows"), [(8, 1, 4), (4, 2, 2)])
def test_long_keys_are_split_in_ranges(heads, groups, rows):
    m = Make(1, heads, groups, rows, 200, seed=5)
    assert is_decode(heads // groups, rows) and split_count(m.Tk, groups, 16, 4) > 1
    qkv, keywords = m.qkv(), keep(m, two(m, 0.1, terms=terms(m, 0.2)), window=190, sinks=m.normal(heads))
    check(*qkv, stats=stats_of(keywords), **keywords)


def test_splits_fill_the_processors_and_stay_worth_their_while():
    assert split_count(1 << 20, 8, 64, 132) == 33
    assert split_count(1 << 20, 1, 64, 132) == 64
    assert split_count(1000, 1, 64, 132) == 7
    assert split_count(0, 1, 64, 132) == split_count(10, 9, 64, 4) == 1


SIXTEEN = ["plain", "two terms that overlap, bias by row", "keep a part", "raw", "additive mask", "cut by head"]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits_are_as_exact_as_torch(name, path, dtype):
    m = Make(seed=name, Tq=PATHS[path], dtype=dtype, D=32)
    qkv, keywords = m.qkv(), ALL[name](m)
    check(*qkv, path=path, stats=stats_of(keywords), **keywords)
