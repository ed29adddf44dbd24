"""Edits that depend on the mass of groups of keys, and edits for chosen query rows: every backend does what is said."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from steerlens.kernels import attention as kernels

from steerlens import backends
from steerlens.backends import sdpa
from steerlens.backends.call import Bias, Call, Cut, KeepMass, MoveMass
from steerlens.edits import HIDE, MassLaw

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", [Odds(0.3), Odds(-0.4), RawOdds(0.3)], ids=["more", "less", "raw"])
@pytest.mark.parametrize("groups", [FEW, MANY, TWO], ids=["few", "many", "two"])
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
        for rows in (T, 1):
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
