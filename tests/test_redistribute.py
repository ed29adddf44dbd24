"""Edits that depend on the mass of groups of keys, and edits for chosen query rows: every backend does what is said."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from steerlens.kernels import attention as kernels

import steerlens
from steerlens import backends
from steerlens.backends import sdpa
from steerlens.backends.call import Bias, Call, Cut, KeepMass, MoveMass
from steerlens.edits import HIDE, FirstToken, Keep, MassLaw, Redistribute, Reweight, Scale, SpanKeys
from steerlens.errors import UnsupportedError
from steerlens.lower import Placed, lower
from steerlens.methods import PerRow, SpotLight
from steerlens.passes import Pass, Prompt
from steerlens.shards import local
from steerlens.spans import Spans

BACKENDS = ["reference", "sdpa", "sdpa-channels", "triton", "triton-prefill"]
B, H, G, T, D = 2, 4, 2, 40, 16


@dataclass(frozen=True)
class Odds(MassLaw):
    """The less a group holds in a row, the more it moves."""

    share: float = 0.3

    def log_weights(self, mass, row, real):
        return self.share * (1 - mass) / (0.1 + mass) - 0.5 * row[:, None, None, None] / B


@dataclass(frozen=True)
class RawOdds(Odds):
    raw: ClassVar[bool] = True


def compute(backend, call):
    """`sdpa-channels` and `triton-prefill` take the path of long prefills, which these few rows would not."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "sdpa-channels":
            patch.setattr(sdpa, "FEW_ROWS", 0)
        if backend == "triton-prefill":
            patch.setattr(kernels, "DECODE_ROWS", 0)
        return backends.attention(backend.partition("-")[0], call)


def make(edits, *, rows=T, pad=0, seed=0, dtype=torch.float32, sinks=None):
    """A call whose last `rows` columns are query rows; batch row 1 has `pad` pads in front."""
    torch.manual_seed(seed)
    query, key, value = torch.randn(B, H, rows, D), torch.randn(B, G, T, D), torch.randn(B, G, T, D)
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, :pad] = False
    call = Call(*(t.to(dtype) for t in (query, key, value)), None, D**-0.5, None, T - rows, real if pad else None, True)
    if pad or 1 < rows < T:
        call.mask = call.visible(slice(None))
    call.edits, call.sinks = edits, sinks
    return call


def definition(call, law):
    """The weights of a call with one MoveMass, by the textbook, and what a row sums to."""
    edit = call.edits[-1]
    x = torch.einsum("bhid,bhjd->bhij", call.query, call.key.repeat_interleave(H // G, 1)) * call.scaling
    x = x.masked_fill(~call.visible(slice(None)), -torch.inf)
    a = x.softmax(-1).nan_to_num(0)
    factor = torch.ones_like(a)
    masses = torch.stack([(a * keys[:, None, None]).sum(-1) for keys in edit.keys.unbind(1)], -1)
    weights = torch.where(masses > 0, law.log_weights(masses, torch.arange(B), None).clamp(min=HIDE), 0).exp()
    for group, keys in enumerate(edit.keys.unbind(1)):
        here = torch.where(keys[:, None, None], weights[..., group, None], 1.0)
        factor[:, edit.heads] *= here[:, edit.heads]
    a = a * factor
    return a if law.raw else a / a.sum(-1, keepdim=True).clamp(min=1e-30)


def move(law, groups, heads=(0, 1, 2, 3)):
    table = torch.zeros(B, len(groups), T, dtype=torch.bool)
    for place, (start, stop) in enumerate(groups):
        table[:, place, start:stop] = True
        table[1, place] = table[1, place].roll(3)
    row = torch.arange(B)

    def weigh(mass):
        return torch.where(mass > 0, law.log_weights(mass, row, None).clamp(min=HIDE), 0)

    return MoveMass(list(heads), table, weigh, law.raw)


FEW, MANY, TWO = [(4, 9)], [(3, 30)], [(4, 9), (20, 31)]


LAWS = {"more": Odds(0.3), "less": Odds(-0.4), "raw": RawOdds(0.3)}
GROUPS = {"few": FEW, "many": MANY, "two": TWO}
GRID = [
    pytest.param(backend, LAWS[law], GROUPS[groups], id=f"{backend}-{law}-{groups}")
    for backend in BACKENDS
    for law in LAWS
    for groups in GROUPS
    # The interpreter takes seconds for each; whether keys are few or many is nothing to the kernels.
    if "triton" not in backend or (law, groups) == ("raw", "two")
]


@pytest.mark.parametrize(("backend", "law", "groups"), GRID)
class TestLaw:
    def test_is_its_definition(self, backend, law, groups):
        for rows, pad, heads in ((T, 0, (0, 1, 2, 3)), (T, 5, (0, 3)), (1, 0, (0, 3)), (1, 5, (0, 1, 2, 3))):
            call = make([move(law, groups, heads)], rows=rows, pad=pad)
            expected = definition(call, law) @ call.value.repeat_interleave(H // G, 1)
            got = compute(backend, call)
            real = torch.ones(B, rows, dtype=torch.bool) if not pad else call.real[:, T - rows :]
            error = (got - expected).abs().amax(-1).masked_fill(~real[:, None], 0).max()
            assert error <= 1e-5 * expected.abs().max()

    def test_among_others(self, backend, law, groups):
        """Each edit sees the weights that the one before it left; a raw law's gain stays beside them; cuts win."""
        keys = (torch.arange(T) % 5 == 2).expand(B, -1)
        between = KeepMass([1, 2], 0.3, lambda sums: keys[:, None].expand(-1, 2, -1), None)
        bias = Bias(torch.full((1, H, 1), 1.5), keys)
        cut = Cut(torch.tensor([False, False, True, False])[None, :, None], True)
        for edits in ([bias, move(law, groups)], [move(law, groups), between, move(law, TWO), bias, cut]):
            call = make(edits, pad=5)
            expected, got = (compute(name, call)[:, :, 8:] for name in ("reference", backend))
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_beside_learned_sinks(self, backend, law, groups):
        for rows in (1,) if "triton" in backend else (T, 1):
            call = make([move(law, groups)], rows=rows, sinks=torch.tensor([1.0, -1.0, 0.5, 3.0]))
            expected, got = (compute(name, call) for name in ("reference", backend))
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [FEW, MANY, TWO], ids=["few", "many", "two"])
@pytest.mark.parametrize("law", [Odds(0.3), Odds(-3.0), RawOdds(0.3)], ids=["more", "less", "raw"])
def test_sixteen_bit(dtype, groups, law):
    """DESIGN §5.2: at most twice SDPA's own error against fp32, plus one rounding."""
    for rows in (T, 1):
        call = make([move(law, groups)], rows=rows, dtype=dtype)
        exact = make([move(law, groups)], rows=rows)
        for name in ("query", "key", "value"):
            setattr(exact, name, getattr(call, name).float())
        plain, exact_plain = make([], rows=rows, dtype=dtype), make([], rows=rows)
        exact_plain.query, exact_plain.key, exact_plain.value = exact.query, exact.key, exact.value
        own = (compute("sdpa", plain).float() - compute("reference", exact_plain)).abs().max()
        expected = compute("reference", exact)
        error = (compute("sdpa", call).float() - expected).abs().max()
        assert error <= 2 * own + torch.finfo(dtype).eps * expected.abs().max()


def lowered(edits, *, rows=5, batch=2, spans=None, prompt_rows=2):
    now = Pass(Prompt.start(rows, None, batch, torch.device("cpu")), 0, rows, None, True, {0: (rows, 0)})
    spans = None if spans is None else Spans.of(spans)
    placed = [Placed(edit, spans, i, prompt_rows, ("same", i), "context") for i, edit in enumerate(edits)]
    return lower(placed, now, 0, H)


def test_laws_of_several_batch_rows_are_one_where_they_are_alike():
    """As `PerRow` gives them: one pass over the keys, not one for each row."""
    spans = [[(1, 2)], [(2, 3)]]
    groups = (SpanKeys("emphasis"),)
    one, other = (Redistribute(heads, groups, Odds(0.3), batch=(row,)) for row, heads in enumerate(((0, 1), (1, 3))))
    (edit,) = lowered([one, other], spans=spans)
    weights = edit.weigh(torch.full((2, 3, 5, 1), 0.2))[..., 0]
    assert edit.heads == [0, 1, 3]
    assert weights.ne(0)[:, :, 0].tolist() == [[True, True, False], [False, True, True]]
    apart = [
        replace(other, law=Odds(0.4)),
        replace(other, groups=(FirstToken(),)),
        replace(other, queries=FirstToken()),
        replace(other, phase="decode"),
        replace(other, batch=None),
        replace(other, law=Pooled()),
    ]
    for different in apart:
        assert len(lowered([one, different], spans=spans)) == 2
    bias = Reweight((0,), FirstToken(), Scale(1.0))
    assert [type(e) for e in lowered([bias, one, bias, bias], spans=spans)] == [Bias, MoveMass, Bias]


@pytest.mark.parametrize("law", [Scale(1.0), Keep(0.5)])
def test_edits_for_other_query_rows_stay_apart(law):
    keys, rows = SpanKeys("emphasis"), [SpanKeys("a"), SpanKeys("b")]
    spans = {"emphasis": [[(0, 1)]] * 2, "a": [[(1, 2)]] * 2, "b": [[(3, 5)], [(4, 5)]]}
    edits = [Reweight((0, 1), keys, law, queries=q) for q in rows]
    found = lowered(edits, spans=spans)
    assert len(found) == 2
    here = [e.weights[:, 0].ne(0) if isinstance(e, Bias) else e.rows for e in found]
    expected = torch.zeros(2, 2, 5, dtype=torch.bool)
    expected[0, :, 1] = expected[1, 0, 3:] = expected[1, 1, 4:] = True
    assert torch.equal(torch.stack(here), expected)


def test_a_key_of_two_groups_belongs_to_the_first():
    groups = (SpanKeys("a"), SpanKeys("b"))
    edit = Redistribute((0,), groups, Odds())
    (found,) = lowered([edit], spans={"a": [[(1, 3)]] * 2, "b": [[(2, 4)]] * 2})
    assert found.keys[0].long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]


@dataclass(frozen=True)
class Pooled(Odds):
    pooled: ClassVar[bool] = True


@dataclass(frozen=True)
class PerHead(MassLaw):
    nats: tuple[float, ...] = ()

    def log_weights(self, mass, row, real):
        return torch.tensor(self.nats)[None, :, None, None].expand_as(mass)

    def select(self, places):
        return PerHead(tuple(self.nats[place] for place in places))


def test_tensor_parallel_processes_have_their_heads_of_a_law():
    edit = Redistribute((1, 2, 3), (FirstToken(),), PerHead((0.1, 0.2, 0.3)))
    first, second = (local([Placed(edit, None, 0, None)], start, 2)[0].edit for start in (0, 2))
    assert (first.heads, first.law) == ((1,), PerHead((0.1,)))
    assert (second.heads, second.law) == ((0, 1), PerHead((0.2, 0.3)))
    with pytest.raises(UnsupportedError, match="needs the attention of all heads of a layer"):
        local([Placed(replace(edit, law=Pooled()), None, 0, None)], 0, 2)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha"])
def test_rows_that_differ_by_heads(backend, family, model_of, prompts):
    """Laws of different rows become one, whose heads do not come in order."""
    model, ids = model_of(family), prompts(None, (18, 18))[0]
    some, spans = SpotLight(0.3, heads={0: [5, 6], 1: [7], 2: [4]}), [[(4, 7)], [(3, 8)]]
    each = [some, SpotLight(0.3)]
    with torch.no_grad():
        with steerlens.steer(model, PerRow(each), spans, backend=backend):
            together = model(ids).logits
        for row, method in enumerate(each):
            with steerlens.steer(model, method, [spans[row]], backend="reference"):
                alone = model(ids[row : row + 1]).logits
            assert (together[row] - alone[0]).abs().max() < 1e-5 * alone.abs().max()
