"""Backend `triton` in models: what the reference gives, call by call and cached; its captures; what it refuses."""

import contextlib
import dataclasses
import importlib
import types

import pytest
import torch
from small_models import build
from steerlens.kernels import _configs
from test_invariants import CORE, METHODS, apart, generate, logits, method_of, native_of

import steerlens
from steerlens import backends
from steerlens.backends import fused
from steerlens.backends.call import Bias, Call, KeepMass
from steerlens.errors import UnsupportedError
from steerlens.methods import ACT, GUIDE, PASTA, HeadMask, Knockout, PerRow, SpotLight, ZeroTuning
from steerlens.observing import Observer
from steerlens.recording import STATS

LENGTHS = (18, 11)
SPANS = {
    None: [[(5, 8)], [(4, 6), (9, 10)]],
    "left": [[(5, 8)], [(10, 12), (15, 16)]],
    "right": [[(5, 8)], [(4, 6), (8, 9)]],
}
QUICK = {("llama-gqa", name) for name in METHODS} | {(family, "composed") for family in CORE}
GRID = [
    pytest.param(
        family,
        native,
        name,
        id=f"{family}-{native}-{name}",
        marks=() if (family, name) in QUICK and native == native_of(family) else pytest.mark.full,
    )
    for family in CORE
    for native in ("sdpa", "eager")
    for name in METHODS
    if native == "eager" or native_of(family) == "sdpa"
]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Half the programs to interpret; the kernels' own tests look at the edges of tiles."""
    monkeypatch.setattr(_configs, "INTERPRETER", dataclasses.replace(_configs.INTERPRETER, rows=32, keys=32))


def one_each(backend, *args, **options):
    return [logits(*args, backend=b, **options) for b in (backend, "reference")]


@pytest.mark.parametrize(("family", "native", "name"), GRID)
def test_generate_agrees_with_the_reference(family, native, name, model_of, prompts):
    """Left-padded prefill through one kernel, cached steps through the other."""
    model, (ids, mask), method = model_of(family, native), prompts("left", LENGTHS), method_of(name, family)
    one, two = (
        generate(model, method, SPANS["left"], ids, mask, backend=b, max_new_tokens=3) for b in ("triton", "reference")
    )
    plain = generate(model, (), None, ids, mask, max_new_tokens=3)
    assert torch.equal(one.sequences, two.sequences)
    assert apart(torch.stack(one.logits), torch.stack(two.logits)) < 1e-5
    assert apart(torch.stack(one.logits), torch.stack(plain.logits)) > 1e-3


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("name", ["act", "composed"])
def test_prefill_agrees_with_the_reference(side, name, model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts(side, LENGTHS)
    got, expected = one_each("triton", model, ids, mask, METHODS[name], SPANS[side])
    assert apart(got, expected, mask) < 1e-5


@pytest.mark.parametrize("name", ["act-running", "composed"])
def test_a_static_cache_has_unwritten_slots(name, model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left", LENGTHS)
    method = METHODS.get(name, ACT(0.3, 0.08, decode="running"))
    options = {"max_new_tokens": 2, "backend": "triton"}
    plain = generate(model, method, SPANS["left"], ids, mask, **options)
    static = generate(model, method, SPANS["left"], ids, mask, cache_implementation="static", **options)
    assert apart(torch.stack(static.logits), torch.stack(plain.logits)) < 1e-5


def test_beams_and_rows_of_their_own(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left", LENGTHS)
    rows = PerRow([ZeroTuning(4.0), PASTA(0.05, heads={1: [2]})])
    found = [
        generate(model, rows, SPANS["left"], ids, mask, num_beams=2, max_new_tokens=2, backend=b).sequences
        for b in ("triton", "reference")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
def test_a_users_own_4d_mask(kind, model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts(None, (18, 18))
    visible = torch.ones(18, 18, dtype=torch.bool).tril().expand(2, 1, 18, 18).clone()
    visible[:, :, 8:, 5] = False
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    if kind == "bias":
        mask[..., 3] += 0.7
    method = [ACT(0.3, 0.08), ZeroTuning(2.0), HeadMask({0: [1]})]
    got, expected = one_each("triton", model, ids, mask, method)
    assert apart(got, expected) < 1e-5


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_windows_go_to_the_kernel_by_their_width(family, model_of, prompts, monkeypatch):
    """No T×T mask is walked: layers with a window of 12 call the kernel with it, whatever mask the model made."""
    seen = []
    original = fused._seen
    monkeypatch.setattr(fused, "_seen", lambda call: seen.append(original(call)) or seen[-1])
    model, (ids, mask) = model_of(family, native_of(family)), prompts("left", (20, 17))
    got, expected = one_each("triton", model, ids, mask, ZeroTuning(3.0))
    assert apart(got, expected, mask) < 1e-5
    assert 12 in {call["window"] for call in seen} and {call["mask"] for call in seen} == {None}


@pytest.mark.parametrize("method", [HeadMask({0: [1], 1: [2]}), ACT(0.3, 0.05)], ids=["headmask", "act"])
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_layers_of_one_forward_may_hold_different_columns(family, method, model_of, prompts):
    """Past its window a sliding cache holds fewer keys than the layer beside it; both hide the same pads."""
    model, (ids, mask) = model_of(family, native_of(family)), prompts("left", (40, 33))
    # act wants its prompt in one forward
    ends = (40,) if isinstance(method, ACT) else (18, 40)
    found = []
    for backend in ("triton", "reference"):
        cache, parts = None, []
        with torch.no_grad(), steerlens.steer(model, method, backend=backend):
            for start, end in zip((0, *ends), ends, strict=False):
                output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits * mask[:, start:end, None])
            for _ in range(3):  # without a mask, so that the kernel is told of the pads alone
                parts.append(model(ids[:, :1], past_key_values=cache).logits)
        found.append(torch.cat(parts, 1))
    assert apart(*found) < 1e-5


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt_oss"])
@pytest.mark.parametrize(
    "method", [(), [PASTA(0.1), ACT(0.2, 0.08)], HeadMask({1: [2]})], ids=["none", "moved", "ablated"]
)
def test_captures_agree_with_the_reference(side, family, method, model_of, prompts):
    model, (ids, mask) = model_of(family, native_of(family)), prompts(side, LENGTHS)
    found = []
    for backend in ("triton", "reference"):
        # a neutral edit of one head, so that there is a context that names the backend
        methods = [
            ZeroTuning(1 + 1e-7, heads={0: [0]}),
            *(method if isinstance(method, list) else [method] * bool(method)),
        ]
        steered = steerlens.steer(model, methods, SPANS[side], backend=backend)
        with torch.no_grad(), steered, steerlens.capture(model, SPANS[side], heads={0: [0, 3, 5], 1: "*"}) as record:
            model(input_ids=ids, attention_mask=mask)
        found.append(record)
    for layer in found[0].layers:
        for stat in STATS:
            got, expected = (getattr(record[layer], stat) for record in found)
            assert torch.equal(got.isnan(), expected.isnan()), stat
            close = torch.where(got.isnan(), 0, got - expected).abs().max()
            assert close <= 1e-5 * expected.nan_to_num().abs().max(), (layer, stat)


@pytest.mark.parametrize("fraction", [1.0, 1 - 1e-9])
def test_a_law_that_keeps_nearly_all_of_nearly_all_mass(fraction):
    """As a term it is log w = log β + log(1-ψ) - log(1-βψ), near log(0/0)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator) for n in (20, 20, 20))
    key[..., 0, :] *= 100
    inside = torch.zeros(1, 2, 20, dtype=torch.bool)
    inside[..., 0] = True
    edits = [
        KeepMass([0, 1], fraction, lambda sums: inside, None),
        Bias(torch.full((1, 2, 1), 0.5), torch.arange(20)[None] % 3 == 1),
    ]
    call = Call(query, key, value, None, 1.0, None, 0, None, True, edits)
    got, expected = backends.attention("triton", call), backends.attention("reference", call)
    assert apart(got, expected) < 1e-5


def test_kernels_are_launched_on_the_device_of_their_call(monkeypatch):
    """A layer of a model on several devices may lie on another than the current one."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for device, expected in ((first, []), (second, [second])):
        call = types.SimpleNamespace(query=types.SimpleNamespace(is_cuda=True, device=device))
        assert fused._supported(call, lambda: list(entered)) == expected


def test_many_span_groups_take_several_passes(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts(None, (18, 18))
    spans = {f"document {i}": [[(i % 15, i % 15 + 2)]] * 2 for i in range(30)}
    found = []
    for backend in ("triton", "reference"):
        steered = steerlens.steer(model, ZeroTuning(2.0, heads={0: [0]}), backend=backend)
        recording = steerlens.capture(model, spans, stats=("mass",), heads={0: [0, 1]})
        with torch.no_grad(), steered, recording as record:
            model(input_ids=ids, attention_mask=mask)
        found.append(record[0].mass)
    assert found[0].shape == (2, 2, 18, 30) and apart(*found) < 1e-5


def test_the_report_of_moved_mass_agrees_with_the_reference(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left", LENGTHS)
    found = []
    for backend in ("triton", "reference"):
        steered = steerlens.steer(model, [PASTA(0.1), ACT(0.2, 0.08)], SPANS["left"], backend=backend, report="mass")
        with torch.no_grad(), steered:
            model(input_ids=ids, attention_mask=mask)
        found.append(torch.stack([row["delta_mass"] for row in steered.report().values()]))
    assert apart(*found) < 1e-5 and found[1].abs().max() > 0.01


class TestRefusals:
    def test_gradients(self, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa"), prompts(None, LENGTHS)
        with (
            pytest.raises(UnsupportedError, match="no backward"),
            steerlens.steer(model, ZeroTuning(2), backend="triton"),
        ):
            model(ids, attention_mask=mask)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype, prompts):
        ids, mask = prompts(None, LENGTHS)
        with pytest.raises(UnsupportedError, match=r"dtype of query is torch\..*allowed"):
            logits(build("llama-gqa", "sdpa").to(dtype), ids, mask, ZeroTuning(2), backend="triton")

    def test_too_many_biases(self, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa"), prompts(None, LENGTHS)
        with pytest.raises(UnsupportedError, match="29 static biases"):
            spans = [[(i % 17, i % 17 + i // 17 + 1) for i in range(29)]] * len(ids)
            logits(model, ids, mask, PASTA(0.5, sections="published"), spans, backend="triton")

    def test_a_device_without_kernels(self, model_of, prompts, monkeypatch):
        from steerlens.kernels import _launch

        monkeypatch.setattr(_launch, "interpreted", lambda: False)
        model, (ids, mask) = model_of("llama-gqa"), prompts(None, LENGTHS)
        with pytest.raises(UnsupportedError, match="device of query is cpu; allowed: cuda"):
            logits(model, ids, mask, ZeroTuning(2), backend="triton")

    def test_triton_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(backends, "find_spec", lambda name: None)
        with pytest.raises(UnsupportedError, match="steerlens\\[gpu\\]"):
            backends.check("triton")


@pytest.fixture
def hopper(monkeypatch):
    """As on a device whose record has triton faster; counts what goes to the kernels."""
    taken = []
    original = fused.attention
    monkeypatch.setattr(fused, "attention", lambda call: taken.append(call) or original(call))
    monkeypatch.setattr(backends, "fastest", lambda device, dtype: "triton")
    return taken


class TestAuto:
    def test_sdpa_where_no_record_says_otherwise(self, model_of, prompts, monkeypatch):
        monkeypatch.setattr(fused, "attention", None)
        model, (ids, mask) = model_of("llama-gqa"), prompts(None, LENGTHS)
        logits(model, ids, mask, ZeroTuning(2))

    @pytest.mark.parametrize(
        ("capability", "dtype", "expected"),
        [
            ((9, 0), torch.bfloat16, "triton"),
            ((9, 0), torch.float16, "triton"),
            ((9, 0), torch.float32, "sdpa"),
            ((8, 0), torch.bfloat16, "sdpa"),
        ],
    )
    def test_by_device_and_dtype(self, capability, dtype, expected, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(backends, "_launches", lambda: True)
        assert backends.fastest.__wrapped__(torch.device("cuda", 0), dtype) == expected
        assert backends.fastest(torch.device("cpu"), dtype) == "sdpa"

    def test_sdpa_where_triton_finds_no_compiler(self, monkeypatch, caplog):
        """Many images that have PyTorch have no C compiler, which Triton wants at its first launch."""

        driver = importlib.import_module("triton.runtime.driver")

        class NoCompiler:
            @property
            def active(self):
                raise RuntimeError("Failed to find C compiler")

        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(driver, "driver", NoCompiler())
        assert backends.fastest.__wrapped__(torch.device("cuda", 0), torch.bfloat16) == "sdpa"
        assert "Failed to find C compiler" in caplog.text

    def test_triton_where_a_record_has_it_faster(self, hopper, model_of, prompts):
        model, (ids, mask) = model_of("mistral"), prompts("left", (20, 17))
        got, expected = one_each("auto", model, ids, mask, ZeroTuning(3.0))
        assert {call.window for call in hopper} == {12}
        assert apart(got, expected, mask) < 1e-5

    def test_what_needs_gradients_goes_to_sdpa(self, hopper, model_of, prompts):
        model, (ids, mask) = model_of("mistral"), prompts("left", (20, 17))
        with steerlens.steer(model, ZeroTuning(3.0)):
            steered = model(ids, attention_mask=mask).logits
        assert steered.requires_grad and not hopper
        # nor does the engine leave out a mask for their sake
        query = torch.zeros(1, 1, 1, 8, requires_grad=True)
        assert not backends.takes_kernels("auto", query) and backends.takes_kernels("auto", query.detach())
        assert apart(steered.detach(), logits(model, ids, mask, ZeroTuning(3.0), backend="reference"), mask) < 1e-5

    def test_what_the_kernels_lack_is_computed_without_them(self, hopper, model_of, prompts):
        """A window that they were given by its width, too."""
        model, (ids, mask) = model_of("mistral"), prompts("left", (20, 17))
        spans = [[(i % 12 + 8, i % 12 + 9) for i in range(29)]] * 2
        got, expected = one_each("auto", model, ids, mask, PASTA(0.5, sections="published"), spans)
        assert hopper and apart(got, expected, mask) < 1e-5

    def test_a_window_without_its_mask_is_kept_by_what_takes_over(self, hopper, monkeypatch):
        def refuse(call):
            raise UnsupportedError("not by kernels")

        monkeypatch.setattr(fused, "attention", refuse)
        query, key, value = (torch.randn(1, 2, 20, 8) for _ in range(3))
        bias = Bias(torch.full((1, 2, 1), 2.0), torch.arange(20)[None] == 3)
        call = Call(query, key, value, None, 0.3, None, 0, None, False, [bias], window=5)
        assert apart(backends.attention("auto", call), backends.attention("reference", call)) < 1e-6

    def test_captures_and_reports_too(self, hopper, model_of, prompts, monkeypatch):
        asked = []
        for name in ("statistics", "moved"):
            monkeypatch.setattr(fused, name, lambda *args, name=name: asked.append(name) or refuse())

        def refuse():
            raise UnsupportedError("not by kernels")

        model, (ids, mask) = model_of("llama-gqa"), prompts("left", LENGTHS)
        with (
            torch.no_grad(),
            steerlens.steer(model, ZeroTuning(3.0), report="mass") as steered,
            steerlens.capture(model, SPANS["left"], stats=("mass",)) as record,
        ):
            model(ids, attention_mask=mask)
        assert set(asked) == {"statistics", "moved"}
        assert not record[0].mass[0].isnan().any() and steered.report()


@pytest.mark.parametrize("law", ["ratio", "odds"])
def test_a_floor_under_a_groups_mass_is_one_pass(law, model_of, prompts, monkeypatch):
    """SpotLight's law is one that the kernels have; only where an edit follows are masses measured first."""
    seen = []
    original = fused._kernels().attention
    monkeypatch.setattr(fused._kernels(), "attention", lambda *a, **k: seen.append(k.get("stats")) or original(*a, **k))
    model, (ids, mask) = model_of("llama-gqa"), prompts("left", LENGTHS)
    everywhere, some, others = (SpotLight(0.4, law=law, heads=h) for h in ("all", {0: [1, 2], 1: [3]}, {0: [5, 2]}))
    for method in (everywhere, some, PerRow([some, others]), PerRow([None, everywhere])):
        got, expected = one_each("triton", model, ids, mask, method, SPANS["left"])
        assert apart(got, expected, mask) < 1e-5 and set(seen) == {None}
    seen.clear()
    got, expected = one_each("triton", model, ids, mask, [SpotLight(0.4, law=law), ZeroTuning(2.0)], SPANS["left"])
    assert apart(got, expected, mask) < 1e-5 and ["mass"] in seen


@pytest.mark.parametrize("family", ["llama-gqa", "gpt_oss"])
def test_keys_outside_a_span_are_moved_by_those_inside(family, model_of, prompts, monkeypatch):
    """The same weights, with fewer tiles that hold labels; not beside a learned sink, which stays as it is."""
    labelled = []
    original = fused._labels
    monkeypatch.setattr(fused, "_labels", lambda call, terms, *a: labelled.append(terms) or original(call, terms, *a))
    model, (ids, mask) = model_of(family, native_of(family)), prompts("left", LENGTHS)
    got, expected = one_each("triton", model, ids, mask, PASTA(0.05), SPANS["left"])
    assert apart(got, expected, mask) < 1e-5
    inside = [int(keys[0].sum()) for terms in labelled for _, keys in terms]
    assert set(inside) == ({3} if family == "llama-gqa" else {15})


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_keys_that_an_edit_hid_hold_no_mass_to_raise(backend, model_of, prompts):
    """ψ = 0 is left alone by SpotLight, though a key of the spans is seen."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("left", LENGTHS)
    got, expected = one_each(backend, model, ids, mask, [Knockout(rows="all"), SpotLight(0.3)], SPANS["left"])
    assert apart(got, expected, mask) < 1e-5


def test_a_law_made_a_bias_goes_with_its_layer(model_of, prompts):
    """[H, rows] numbers for each group and layer: kept, they would be more than a layer's keys in deep models."""
    memo = {}

    class Memo(Observer):
        def observe(self, layer, call, now):
            memo.update(call.memo)

    model, (ids, mask) = model_of("llama-gqa"), prompts("left", LENGTHS)
    methods = [SpotLight(0.3), GUIDE(1.0)]
    with torch.no_grad(), steerlens.steer(model, methods, SPANS["left"], backend="triton"), Memo(model):
        model(ids, attention_mask=mask)
    kept = [value[0] for key, value in memo.items() if isinstance(key, tuple) and key[0] == "labels"]
    assert not any(len(terms) > 1 and isinstance(terms[1], tuple) for terms in kept)
