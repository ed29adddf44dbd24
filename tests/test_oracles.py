"""The numbers of methods/core.md §0-3 and methods/heads.md §1, through every backend."""

import math
from types import SimpleNamespace

import pytest
import torch
from steerlens.kernels import attention as kernels

from steerlens import backends
from steerlens.backends import channels, sdpa
from steerlens.backends.call import Bias, Call, Cut, KeepMass
from steerlens.edits import FirstToken, Keep, Reweight, Scale, Sinks
from steerlens.facts import ModelFacts
from steerlens.lower import Placed, lower
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning
from steerlens.passes import Pass, Prompt
from steerlens.spans import Spans

BACKENDS = ["reference", "sdpa", "sdpa-channels", "triton", "triton-prefill"]
FACTS = ModelFacts("oracle", "llama", 1, (1,), (1,))
X = (2.0, 1.0, 0.5, -1.0)
A = [
    [1, 0, 0, 0, 0],
    [0.6, 0.4, 0, 0, 0],
    [0.5, 0.3, 0.2, 0, 0],
    [0.5, 0.05, 0.4, 0.05, 0],
    [0.4, 0.1, 0.3, 0.12, 0.08],
]
DECODE = [0.42, 0.08, 0.28, 0.06, 0.04, 0.12]


def compute(backend, call):
    """`sdpa-channels` and `triton-prefill` take the path of long prefills, which these few rows would not."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "sdpa-channels":
            patch.setattr(sdpa, "FEW_ROWS", 0)
        if backend == "triton-prefill":
            patch.setattr(kernels, "DECODE_ROWS", 0)
        return backends.attention(backend.partition("-")[0], call)


def attend(rows, method, backend, *, spans=None, prompt=None, seen=0, value=None, width=None):
    """Attention whose logits are `rows` [Tq, Tk], for one head; the weights, or the output with `value`."""
    x = torch.tensor(rows, dtype=torch.float32)
    Tq, Tk = x.shape
    eye = torch.eye(Tk)
    value = eye if value is None else torch.tensor(value, dtype=torch.float32)
    prompt = prompt or Prompt.start(width or Tk, None, 1, x.device)
    now = Pass(prompt, seen, Tq, None, True, {0: (Tk, 0)})
    spans = None if spans is None else Spans.of(spans)
    edits = method.plan(FACTS, spans).get(0, ()) if method else ()
    placed = [Placed(e, spans, ("oracle", i), None) for i, e in enumerate(edits)]
    call = Call(x[None, None], eye[None, None], value[None, None], None, 1.0, None, seen, None, True)
    call.edits = lower(placed, now, 0, 1)
    return compute(backend, call)[0, 0]


def close(got, expected, tolerance=2e-6):
    assert (got - torch.tensor(expected)).abs().max() < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
class TestZeroTuning:
    @pytest.mark.parametrize(
        ("gamma", "expected"),
        [
            (4, (0.861921, 0.079271, 0.048080, 0.010728)),
            (0.3, (0.318879, 0.391030, 0.237172, 0.052920)),
        ],
    )
    def test_weights(self, backend, gamma, expected):
        close(attend([X], ZeroTuning(gamma), backend, seen=3)[0], expected)

    def test_output(self, backend):
        value = [[1, 0], [0, 1], [1, 1], [2, -1]]
        close(attend([X], None, backend, seen=3, value=value)[0], (0.806135, 0.329854))
        close(attend([X], ZeroTuning(4), backend, seen=3, value=value)[0], (0.931457, 0.116623))

    @pytest.mark.parametrize(
        ("gamma", "expected"),
        [
            (4, (0.8, 0.08, 0.08, 0.04)),
            (0.3, (0.230769, 0.307692, 0.307692, 0.153846)),
        ],
    )
    def test_published_weights(self, backend, gamma, expected):
        rows = [[math.log(a) for a in (0.5, 0.2, 0.2, 0.1)]]
        close(attend(rows, ZeroTuning(gamma), backend, seen=3)[0], expected)

    def test_not_a_scaled_key(self, backend):
        """core.md §1b: scaling k_0 is something else when the logit is negative."""
        x = (-1.0, 1.0, 0.5, 0.0)
        assert attend([x], None, backend, seen=3)[0, 0].item() == pytest.approx(0.064148, abs=2e-6)
        assert attend([x], ZeroTuning(4), backend, seen=3)[0, 0].item() == pytest.approx(0.215181, abs=2e-6)

    def test_entropy_outside_the_first_token_stays(self, backend):
        for gamma in (0.3, 4):
            rest = attend([X], ZeroTuning(gamma), backend, seen=3)[0, 1:]
            assert torch.special.entr(rest / rest.sum()).sum().item() == pytest.approx(0.884452, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
class TestACT:
    ROWS = [[math.log(a) if a else -50.0 for a in row] for row in A]
    EXPECTED = [
        [1, 0, 0, 0, 0],
        [0.84, 0.16, 0, 0, 0],
        [0.8, 0.12, 0.08, 0, 0],
        [0.745455, 0.02, 0.16, 0.074545, 0],
        [0.56, 0.04, 0.12, 0.168, 0.112],
    ]

    def prefill(self, backend, **options):
        prompt = Prompt.start(5, None, 1, torch.device("cpu"))
        return prompt, attend(self.ROWS, ACT(0.4, 0.1, **options), backend, prompt=prompt)

    @pytest.mark.parametrize("options", [{}, {"spare": "first_sink"}, {"decode": "off"}])
    def test_prefill(self, backend, options):
        close(self.prefill(backend, **options)[1], self.EXPECTED)

    def test_column_means(self, backend):
        prompt, _ = self.prefill(backend)
        (state,) = prompt.sinks.values()
        close(state.sums[0, 0] / state.counts[0, 0], (0.6, 0.2125, 0.3, 0.085, 0.08))
        assert state.keys[0, 0].tolist() == [False, True, True, False, False]

    @pytest.mark.parametrize(
        ("decode", "expected"),
        [
            ("frozen", (0.561750, 0.032, 0.112, 0.080250, 0.053500, 0.160500)),
            ("running", (0.652615, 0.032, 0.112, 0.093231, 0.062154, 0.048)),
            ("off", DECODE),
        ],
    )
    def test_decode(self, backend, decode, expected):
        prompt, _ = self.prefill(backend, decode=decode)
        row = [[math.log(a) for a in DECODE]]
        got = attend(row, ACT(0.4, 0.1, decode=decode), backend, prompt=prompt, seen=5)[0]
        close(got, expected)
        assert got.sum().item() == pytest.approx(1, abs=1e-6)  # the published code's rows sum to 1.4792

    def test_relative_threshold_agrees_at_its_own_n(self, backend):
        """0.1 absolute is 0.5/N with N = 5."""
        prompt = Prompt.start(5, None, 1, torch.device("cpu"))
        close(attend(self.ROWS, ACT(0.4, 0.5, threshold_mode="relative"), backend, prompt=prompt), self.EXPECTED)

    def test_a_row_that_sees_only_sinks_is_left_alone(self, backend):
        """β = 0 and every key a sink but the spared one, which row 0 alone sees: no 0/0."""
        got = attend(self.ROWS, ACT(0.0, 0.01, spare="first_token"), backend)
        assert not got.isnan().any()
        close(got, [[1, 0, 0, 0, 0]] * 5, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
class TestPASTA:
    R = [[math.log(a) for a in (0.4, 0.2, 0.1, 0.2, 0.1)]]

    @pytest.mark.parametrize(
        ("spans", "sections", "prompt", "expected"),
        [
            ([[(1, 3)]], "union", 5, (0.013029, 0.651466, 0.325733, 0.006515, 0.003257)),
            ([[(1, 3)]], "union", 4, (0.009852, 0.492611, 0.246305, 0.004926, 0.246305)),
            ([[(1, 2), (3, 4)]], "union", 4, (0.007921, 0.396040, 0.001980, 0.396040, 0.198020)),
            ([[(1, 2), (3, 4)]], "published", 4, (0.000384, 0.019222, 0.000096, 0.019222, 0.961076)),
        ],
    )
    def test_exclude(self, backend, spans, sections, prompt, expected):
        method = PASTA(0.01, sections=sections)
        close(attend(self.R, method, backend, spans=spans, width=prompt, seen=4)[0], expected)

    def test_include_is_exclude_with_the_inverse(self, backend):
        for sections in ("union", "published"):
            one = attend(self.R, PASTA(0.01), backend, spans=[[(1, 3)]], width=4, seen=4)
            two = attend(
                self.R, PASTA(100, scale="include", sections=sections), backend, spans=[[(1, 3)]], width=4, seen=4
            )
            close(one, two.tolist())

    @pytest.mark.parametrize("alpha", [1e-300, 1e-40])
    def test_rows_before_the_span_stay_however_small_alpha_is(self, backend, alpha):
        rows = TestACT.ROWS
        got, base = (attend(rows, m, backend, spans=[[(3, 4)]]) for m in (PASTA(alpha), None))
        close(got[:3], base[:3].tolist(), 1e-4)

    def test_rows_before_the_span_stay(self, backend):
        rows = TestACT.ROWS
        got, base = (attend(rows, m, backend, spans=[[(3, 4)]]) for m in (PASTA(0.01), None))
        close(got[:3], base[:3].tolist(), 1e-6)
        assert (got[3:] - base[3:]).abs().max() > 0.1

    def test_generation_moves_decode_rows_only(self, backend):
        method = PASTA(0.1, scale="generation")
        close(
            attend(TestACT.ROWS, method, backend, spans=[[(1, 2)]]), attend(TestACT.ROWS, None, backend).tolist(), 1e-6
        )
        got = attend(self.R, method, backend, spans=[[(1, 2)]], width=4, seen=4)[0]
        assert got[4].item() == pytest.approx(0.1 / (0.09 + 0.1), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
class TestHeadMask:
    Q, K, V = [[1, 0], [0, 1], [2, 1]], [[1, 0], [0, 2], [1, 1]], [[1, 0], [0, 1], [3, -1]]

    def run(self, backend, method, pad=False):
        q, k, v = (torch.tensor(t, dtype=torch.float32)[None, None] for t in (self.Q, self.K, self.V))
        real = None
        if pad:
            q, k = (torch.cat([torch.full((1, 1, 1, 2), 9.0), t], 2) for t in (q, k))
            v = torch.cat([torch.full((1, 1, 1, 2), 9.0), v], 2)
            real = torch.tensor([[False, True, True, True]])
        T = q.shape[2]
        prompt = Prompt.start(T, real, 1, q.device)
        call = Call(q, k, v, None, 2**-0.5, None, 0, real, True)
        if pad:
            call.mask = call.visible(slice(None)) & real[:, None, None]
        edits = method.plan(FACTS, None)[0] if method else ()
        call.edits = lower(
            [Placed(e, None, i, None) for i, e in enumerate(edits)], Pass(prompt, 0, T, real, True, {0: (T, 0)}), 0, 1
        )
        return compute(backend, call)[0, 0, -3:]

    @pytest.mark.parametrize("pad", [False, True])
    @pytest.mark.parametrize(
        ("method", "expected"),
        [
            (None, [[1, 0], [0.195570, 0.804430], [1.758725, -0.255235]]),
            (HeadMask("all"), [[1, 0], [0.5, 0.5], [1.333333, 0]]),
            (HeadMask("all", mode="zero"), [[0, 0]] * 3),
            (HeadMask("all", phase="decode"), [[1, 0], [0.195570, 0.804430], [1.333333, 0]]),
            (HeadMask("all", phase="prefill"), [[1, 0], [0.5, 0.5], [1.758725, -0.255235]]),
        ],
    )
    def test_rows(self, backend, method, expected, pad):
        close(self.run(backend, method, pad), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_group_lemma(backend):
    """core.md §0 item 2: the mass moves, the ratios inside S and outside it stay."""
    x, value = (1.2, -0.3, 0.7, 0.0, 0.4), [[1, 0], [0, 1], [2, 1], [-1, 1], [0.5, 0.5]]
    keys = torch.zeros(1, 5, dtype=torch.bool)
    keys[:, 1:3] = True
    psi, inside, outside = 0.321551, torch.tensor((1.462117, 1.0)), torch.tensor((0.527540, 0.300401))
    k, v = torch.eye(5)[None, None], torch.tensor(value)[None, None]
    for edit, moved in [
        (Bias(torch.full((1, 1, 1), math.log(3.0)), keys), 3 * psi / (1 + 2 * psi)),
        (KeepMass([0], 0.4, lambda sums: keys[:, None], None), 0.4 * psi),
    ]:
        call = Call(torch.tensor([[[x]]]), k, v, None, 1.0, None, 4, None, True, [edit])
        got = compute(backend, call)[0, 0, 0]
        close(got, (moved * inside + (1 - moved) * outside).tolist(), 3e-6)


def test_plans_name_what_the_oracles_use():
    assert ACT(0.4, 5, threshold_mode="relative").plan(FACTS, None)[0][0].keys == Sinks(5.0, True)
    assert ACT(0.4).plan(FACTS, None)[0][0].law == Keep(0.4)
    assert isinstance(
        lower(
            [Placed(HeadMask("all").plan(FACTS, None)[0][0], None, 0, None)],
            Pass(Prompt.start(3, None, 1, torch.device("cpu")), 0, 3, None, True, {0: (3, 0)}),
            0,
            1,
        )[0],
        Cut,
    )


def planned(*edits):
    """A method of exactly these edits."""
    return SimpleNamespace(plan=lambda facts, spans: {0: list(edits)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_edit_sees_the_weights_that_the_one_before_left(backend):
    first = [m.plan(FACTS, None)[0][0] for m in (ZeroTuning(0.2), ACT(0.4, 0.1))]
    found = []
    for one, two in (first, first[::-1]):
        after = attend(TestACT.ROWS, planned(one), backend).clamp(min=1e-30).log().tolist()
        expected = attend(after, planned(two), backend)
        close(attend(TestACT.ROWS, planned(one, two), backend), expected.tolist())
        found.append(expected)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_keep_nothing_before_another_edit(backend):
    """β = 0 leaves exact zeros, whatever comes after it."""
    edits = [ACT(0.0, 0.1).plan(FACTS, None)[0][0], ZeroTuning(2.0).plan(FACTS, None)[0][0]]
    got = attend(TestACT.ROWS, planned(*edits), backend)
    assert got[1:, 1].abs().max() < 1e-6 and got[2:, 2].abs().max() < 1e-6
    close(got[4], (10 / 12.5, 0, 0, 1.5 / 12.5, 1 / 12.5), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("phase", "moved"), [("decode", [4]), ("prefill", [0, 1, 2, 3])])
def test_the_phase_of_a_static_law(backend, phase, moved):
    edit = Reweight((0,), FirstToken(), Scale(math.log(0.2)), phase)
    got, base, all_rows = (attend(TestACT.ROWS, m, backend) for m in (planned(edit), None, ZeroTuning(0.2)))
    close(got, [(all_rows if row in moved else base)[row].tolist() for row in range(5)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_row_that_is_all_sink(backend):
    """ψ → 1: o_N must not come from a difference that cancels."""
    prompt = Prompt.start(5, None, 1, torch.device("cpu"))
    attend(TestACT.ROWS, ACT(0.4, 0.1), backend, prompt=prompt)
    got = attend([[-14.0, 6.0, 2.0, -12.0, -13.0, -14.0]], ACT(0.4, 0.1), backend, prompt=prompt, seen=5)[0]
    inside, outside = (torch.tensor(x).softmax(-1) for x in ((6.0, 2.0), (-14.0, -12.0, -13.0, -14.0)))
    close(got[[1, 2]], (0.4 * inside).tolist(), 1e-5)
    close(got[[0, 3, 4, 5]], (0.6 * outside).tolist(), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pads_are_no_keys_that_mass_could_go_to(backend):
    """Every real key is in S: the rows stay, although S leaves out the pads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    real = (torch.arange(20) >= 4)[None]
    found = []
    for edits in ([KeepMass([0], 0.0, lambda sums: real[:, None], None)], []):
        call = Call(q, k, v, None, 1.0, None, 0, real, True, edits)
        call.mask = call.visible(slice(None)) & real[:, None, None]
        found.append(compute(backend, call)[:, :, 4:])
    close(found[0], found[1].tolist())


@pytest.mark.parametrize("native", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_law_before_another_where_one_key_has_all(native):
    """1-ψ is too small for the dtype, and still the law holds: what S loses goes to the rest."""
    gap = 120.0 if native == torch.float32 else 20.0
    q = torch.tensor([1.0, 0]).expand(1, 1, 1, 2)
    k = torch.tensor([[0.0, 0], [gap, 0], [-1.0, 0]])[None, None]
    v = torch.eye(3)[None, None, :, :2]
    edits = [KeepMass([0], 0.3, lambda sums: torch.tensor([[[False, True, False]]]), None)]
    edits.append(Bias(torch.zeros(1, 1, 1), torch.tensor([[True, False, False]])))
    call = Call(*(t.to(native) for t in (q, k, v)), None, 1.0, None, 2, None, True, edits)
    first = 0.7 / (1 + math.exp(-1))
    for backend in BACKENDS:
        close(compute(backend, call)[0, 0, 0].float(), (first, 0.3), 1e-5 if native == torch.float32 else 2e-3)


def test_split_stays_finite_and_adds_up():
    values = torch.tensor([1e6, -1e6, math.pi, -1000 / 0.0625])
    for dtype in (torch.float16, torch.bfloat16):
        high, low = channels.split(values, dtype)
        assert high.isfinite().all() and low.isfinite().all()
        assert high[2].float() + low[2].float() == pytest.approx(math.pi, abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_spared_one_where_the_first_token_is_no_sink(backend):
    rows = [[1], [0.05, 0.95], [0.05, 0.9, 0.05], [0.05, 0.8, 0.1, 0.05]]
    x = [[math.log(a) for a in row] + [-50.0] * (4 - len(row)) for row in rows]
    base = attend(x, None, backend)
    close(attend(x, ACT(0.5, 0.4, spare="first_sink"), backend), base.tolist())
    got = attend(x, ACT(0.5, 0.4), backend)
    close(got[1:, 1], (0.5 * base[1:, 1]).tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_act_leaves_alone_in_the_same_forward(backend):
    """Prompt and continuation at once, `decode="off"`: the continuation's row stays."""
    got = attend(TestACT.ROWS, ACT(0.4, 0.1, decode="off"), backend, width=4)
    base, edited = (attend(TestACT.ROWS, m, backend, width=4) for m in (None, ACT(0.4, 0.1)))
    close(got, [*edited[:4].tolist(), base[4].tolist()])
    assert (edited[4] - base[4]).abs().max() > 0.1
