"""DESIGN §5, on tiny random models: native × backend × padding × prefill/decode × MHA/GQA/MQA × method."""

import contextlib
import copy
import dataclasses
from typing import ClassVar

import pytest
import torch
import transformers
from small_models import FAMILIES, NO_SDPA, WINDOWED, build
from transformers import DynamicCache, StaticCache

import steerlens
from steerlens import backends, decoder, masks
from steerlens.backends import reference, sdpa
from steerlens.backends.call import Bias, Call, Cut, KeepMass
from steerlens.edits import FirstToken, PromptKeys, Reweight, Scale
from steerlens.errors import UnsupportedError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.lower import Placed, lower
from steerlens.methods import ACT, PASTA, EditMethod, HeadMask, PerRow, ZeroTuning
from steerlens.passes import Pass, Prompt
from steerlens.spans import Spans

HEADS = {0: [0, 3, 5], 1: [7], 2: "*"}
METHODS = {
    "zerotuning": ZeroTuning(3.0, heads=HEADS),
    "pasta": PASTA(0.05, heads=HEADS),
    "pasta-published": PASTA(0.2, sections="published", heads=HEADS),
    "act": ACT(0.3, 0.08, heads=HEADS),
    "act-first-sink": ACT(0.0, 0.08, spare="first_sink", heads=HEADS),
    "headmask": HeadMask({0: [1, 2], 2: [0]}),
    "headmask-zero": HeadMask({0: [1, 2], 2: [0]}, mode="zero", phase="decode"),
    "composed": [ZeroTuning(2.0), ACT(0.3, 0.08, heads=HEADS), PASTA(0.3, heads={1: "*"}), HeadMask({1: [0], 2: [3]})],
}
SPANS = {
    None: [[(9, 12)], [(4, 6), (11, 12)], [(8, 11)]],
    "left": [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]],
    "right": [[(9, 12)], [(4, 6), (11, 12)], [(8, 11)]],
}


CORE = ("llama-gqa", "gpt2", "mistral", "gemma2", "gpt_oss", "qwen3_next", "deepseek_v3", "llama4")
GRID = [
    # In the small grid every family runs on one native attention, and those unlike each other on both.
    pytest.param(
        family,
        native,
        id=f"{family}-{native}",
        marks=() if native == "sdpa" or family in CORE else pytest.mark.full,
    )
    for family in FAMILIES
    for native in ("sdpa", "eager")
    if family not in NO_SDPA or native == "eager"
]


def native_of(family):
    return "eager" if family in NO_SDPA else "sdpa"


def method_of(name, family):
    """A method of `METHODS`; where layer 0 has no attention, a layer later."""

    def shift(method):
        table = getattr(method, "heads", Heads(None)).table
        if table is None:
            return method
        return dataclasses.replace(method, heads=Heads(tuple((layer + 1, heads) for layer, heads in table)))

    methods = METHODS[name]
    if family != "qwen3_next":
        return methods
    return [shift(m) for m in methods] if isinstance(methods, list) else shift(methods)


def apart(got, expected, mask=None):
    """Largest difference over the largest value, on real positions."""
    if mask is not None:
        got, expected = got[mask.bool()], expected[mask.bool()]
    return ((got - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def logits(model, ids, mask, methods=(), spans=None, **options):
    with steerlens.steer(model, methods, spans, **options):
        return model(input_ids=ids, attention_mask=mask).logits


@dataclasses.dataclass(frozen=True)
class Identity(EditMethod):
    """Forces every layer through the routed path and changes nothing."""

    name: ClassVar[str] = "identity"
    source: ClassVar[str] = "test"
    summary: ClassVar[str] = "test"

    def plan(self, facts, spans):
        edit = [Reweight(tuple(range(h)), FirstToken(), Scale(0.0)) for h in facts.heads]
        return {layer: (edit[layer],) for layer in facts.attention_layers}


@pytest.mark.parametrize(("family", "native"), GRID)
@pytest.mark.parametrize("side", [None, "left", "right"])
class TestPrefill:
    def test_neutral_is_native_bit_for_bit(self, family, native, side, model_of, prompts):
        model, (ids, mask) = model_of(family, native), prompts(side)
        base = logits(model, ids, mask)
        neutral = [ZeroTuning(1), PASTA(1), ACT(1), HeadMask({})]
        with steerlens.steer(model, neutral, SPANS[side]) as steered:
            assert torch.equal(logits(model, ids, mask), base)
            assert steered.plan == {} and steered.report() == {}

    @pytest.mark.parametrize("backend", ["reference", "auto"])
    def test_routed_identity_is_native(self, family, native, side, backend, model_of, prompts):
        model, (ids, mask) = model_of(family, native), prompts(side)
        assert apart(logits(model, ids, mask, Identity(), backend=backend), logits(model, ids, mask), mask) < 1e-5

    @pytest.mark.parametrize("name", METHODS)
    def test_backends_agree_and_something_moves(self, family, native, side, name, model_of, prompts):
        model, (ids, mask) = model_of(family, native), prompts(side)
        before = logits(model, ids, mask)
        got, expected = (
            logits(model, ids, mask, method_of(name, family), SPANS[side], backend=b) for b in ("auto", "reference")
        )
        assert apart(got, expected, mask) < 1e-4
        assert apart(expected, before, mask) > 1e-3
        assert torch.equal(logits(model, ids, mask), before)


@pytest.mark.parametrize(("family", "native"), GRID)
@pytest.mark.parametrize("name", METHODS)
class TestDecoding:
    def test_a_padded_row_is_the_row_alone(self, family, native, name, model_of, prompts):
        model, (ids, mask), method = model_of(family, native), prompts("left"), method_of(name, family)
        together = generate(model, method, SPANS["left"], ids, mask)
        for row in range(3):
            pads = int((1 - mask[row]).sum())
            spans = [[(a - pads, b - pads) for a, b in SPANS["left"][row]]]
            alone = generate(
                model, method_of(name, family), spans, ids[row : row + 1, pads:], mask[row : row + 1, pads:]
            )
            assert apart(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0]) < 1e-4

    def test_cached_decode_is_recomputation(self, family, native, name, model_of, prompts):
        model, (ids, mask) = model_of(family, native), prompts("left")
        cached = generate(model, method_of(name, family), SPANS["left"], ids, mask)
        again = generate(model, method_of(name, family), SPANS["left"], ids, mask, use_cache=False)
        assert torch.equal(cached.sequences, again.sequences)
        assert apart(torch.stack(cached.logits), torch.stack(again.logits)) < 1e-4

    def test_chunked_prefill_is_one_shot_or_refused(self, family, native, name, model_of, prompts):
        model, (ids, mask) = model_of(family, native), prompts("left")
        whole = generate(model, method_of(name, family), SPANS["left"], ids, mask)
        methods = method_of(name, family) if isinstance(method_of(name, family), list) else [method_of(name, family)]
        if not all(m.chunk_exact for m in methods):
            with pytest.raises(UnsupportedError, match="whole prompt"):
                generate(model, method_of(name, family), SPANS["left"], ids, mask, prefill_chunk_size=7)
            return
        chunked = generate(model, method_of(name, family), SPANS["left"], ids, mask, prefill_chunk_size=7)
        assert torch.equal(whole.sequences, chunked.sequences)
        assert apart(torch.stack(chunked.logits), torch.stack(whole.logits)) < 1e-4

    def test_backends_agree(self, family, native, name, model_of, prompts):
        model, (ids, mask) = model_of(family, native), prompts("left")
        one, two = (
            generate(model, method_of(name, family), SPANS["left"], ids, mask, backend=b) for b in ("auto", "reference")
        )
        assert torch.equal(one.sequences, two.sequences)
        assert apart(torch.stack(one.logits), torch.stack(two.logits)) < 1e-4


def generate(model, methods, spans, ids, mask, backend="auto", **options):
    with steerlens.steer(model, methods, spans, backend=backend):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **{"max_new_tokens": 6, **options},
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["zerotuning", "pasta", "headmask"])
def test_causal_methods_look_at_nothing_later(family, name, model_of, prompts):
    model, (ids, mask), method = model_of(family, native_of(family)), prompts(None), method_of(name, family)
    changed = ids.clone()
    changed[:, 15:] = 5
    one, two = (logits(model, t, mask, method, SPANS[None]) for t in (ids, changed))
    assert method.causal and apart(two[:, :15], one[:, :15]) < 1e-5
    assert not ACT.causal


OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_heads_of_one_kv_group(family, backend, model_of, prompts):
    """Heads 0 and 1 share a key/value head; steering head 1 leaves the outputs of all others as they are."""
    model, (ids, mask), first = model_of(family, native_of(family)), prompts("left"), int(family == "qwen3_next")
    _, modules = decoder.read(decoder.find(model))
    projection = next(getattr(modules[first], name) for name in OUTPUT if hasattr(modules[first], name))
    seen = {}
    hook = projection.register_forward_pre_hook(lambda m, a: seen.setdefault("x", a[0]))
    outputs, heads = [], {first: [1]}
    for methods in ((), ZeroTuning(4.0, heads=heads), ACT(0.0, 0.05, heads=heads), HeadMask(heads)):
        seen.clear()
        logits(model, ids, mask, methods, backend=backend)
        outputs.append(seen["x"].reshape(*ids.shape, 8, -1)[mask.bool()])
    hook.remove()
    for steered in outputs[1:]:
        assert apart(steered[:, [0, 2, 3, 4, 5, 6, 7]], outputs[0][:, [0, 2, 3, 4, 5, 6, 7]]) < 1e-5
        assert apart(steered[:, 1], outputs[0][:, 1]) > 1e-3


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_key_outside_the_window_is_a_no_op(family, backend, prompts):
    """Window 12 of 30 tokens: late rows of a one-layer model no longer see token 0, and nothing is NaN."""
    model = build(family, native_of(family), **WINDOWED[family])
    ids, mask = prompts(None, lengths=(30, 30))
    base, steered = (logits(model, ids, mask, m, backend=backend) for m in ((), ZeroTuning(9.0)))
    assert apart(steered[:, 12:], base[:, 12:]) < 1e-6
    assert apart(steered[:, 1:12], base[:, 1:12]) > 1e-3
    out = generate(model, ZeroTuning(9.0), None, ids, mask, backend=backend)
    plain = generate(model, (), None, ids, mask)
    assert apart(torch.stack(out.logits), torch.stack(plain.logits)) < 1e-6


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True, "seed": 3},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["beams", "sampling", "beams+returns"],
)
def test_repeated_rows(name, options, model_of, prompts):
    """Beams and return sequences: both backends agree, and row 1 of the batch is row 1 alone."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    seed, options = options.get("seed"), {k: v for k, v in options.items() if k != "seed"}

    def run(spans, ids, mask, backend):
        torch.manual_seed(seed or 0)
        with steerlens.steer(model, METHODS[name], spans, backend=backend):
            return model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=5, **({"do_sample": False} | options)
            )

    assert torch.equal(run(SPANS["left"], ids, mask, "auto"), run(SPANS["left"], ids, mask, "reference"))
    if seed is None:
        together = run(SPANS["left"], ids, mask, "auto")
        returns = len(together) // 3
        alone = run([[(a - 7, b - 7) for a, b in SPANS["left"][1]]], ids[1:2, 7:], mask[1:2, 7:], "auto")
        assert torch.equal(together[returns : 2 * returns, 7:], alone)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["act-running", "act", "composed", "headmask"])
def test_static_cache_is_the_dynamic_one(family, name, model_of, prompts):
    model, (ids, mask) = model_of(family, native_of(family)), prompts("left")
    method = method_of(name, family) if name in METHODS else ACT(0.3, 0.08, decode="running")
    plain = generate(model, method, SPANS["left"], ids, mask)
    try:
        generate(model, [], None, ids, mask, cache_implementation="static")
    except (AttributeError, KeyError, TypeError) as error:  # llama4 and qwen3_next on transformers 5.10
        pytest.skip(f"transformers {transformers.__version__} cannot run {family} on a static cache at all: {error!r}")
    static = generate(model, method, SPANS["left"], ids, mask, cache_implementation="static")
    assert torch.equal(plain.sequences, static.sequences)
    assert apart(torch.stack(static.logits), torch.stack(plain.logits)) < 1e-4


def test_bare_forward_with_a_static_cache(model_of, prompts):
    """The unwritten slots of a static cache are no keys: a uniform head's mean must not count them."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    method = [HeadMask({0: "*"}), ZeroTuning(3.0, heads={1: "*"})]
    found = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        with torch.no_grad(), steerlens.steer(model, method):
            first = model(ids, past_key_values=cache).logits[:, -1:]
            found.append(torch.cat([first, model(ids[:, :1], past_key_values=cache).logits], 1))
    assert apart(found[1], found[0]) < 1e-5


def one_call(name, q, k, v, backend, heads, spans, edits=True):
    """A method on one attention call, q [B, 8, T, D] over two key/value heads."""
    methods = METHODS[name] if isinstance(METHODS[name], list) else [METHODS[name]]
    methods = [dataclasses.replace(m, heads={0: [1, 6]} if isinstance(m, HeadMask) else heads) for m in methods]
    spans = Spans.of(spans)
    now = Pass(Prompt.start(q.shape[2], None, q.shape[0], q.device), 0, q.shape[2], None, True, {0: (q.shape[2], 0)})
    call = Call(q, k, v, None, q.shape[-1] ** -0.5, None, 0, None, True)
    plans = [e for m in methods for e in m.plan(ModelFacts("x", "llama", 1, (8,), (2,)), spans)[0]] if edits else []
    call.edits = lower([Placed(e, spans, i, None) for i, e in enumerate(plans)], now, 0, 8)
    return backends.attention(backend, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_sixteen_bit_error(dtype, name):
    """DESIGN §5.2: at most twice SDPA's own error against fp32 plus one rounding."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 200, 64).to(dtype) for h in (8, 2, 2))
    spans = [[(40, 60), (90, 95)], [(3, 70)]]
    q[..., 0] += 3
    k[:, :, [4, 30, 31], 0] += 10  # sinks
    wide = (q.float(), k.float(), v.float())
    exact = one_call(name, *wide, "reference", "all", spans)
    plain = one_call(name, *wide, "reference", "all", spans, edits=False)
    own = (one_call(name, q, k, v, "sdpa", "all", spans, edits=False).float() - plain).abs().max()
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (exact - plain).abs().max() > 0.1
    assert (one_call(name, q, k, v, "sdpa", "all", spans).float() - exact).abs().max() <= 2 * own + rounding


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients(backend, name):
    """gradcheck in fp64, over more rows than the few that take the additive path."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, h, 18, 3, dtype=torch.float64, requires_grad=True) for h in (8, 2, 2)]

    def run(q, k, v):
        return one_call(name, q, k, v, backend, {0: [0, 3, 5]}, [[(4, 6), (11, 12)]])

    assert torch.autograd.gradcheck(run, tensors, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("rows", [20, 8])
@pytest.mark.parametrize("method", [ACT(0.3, 0.06), [ACT(0.3, 0.06), ZeroTuning(0.3)]], ids=["act", "composed"])
def test_gradients_of_learned_sinks_alone(method, rows, prompts):
    ids, _ = prompts(None)
    found = []
    for backend in ("sdpa", "reference"):
        model = build("gpt_oss", "eager").requires_grad_(False)
        sinks = model.model.layers[0].self_attn.sinks.requires_grad_()
        with steerlens.steer(model, method, backend=backend):
            model(ids[:, :rows]).logits.square().mean().backward()
        found.append(sinks.grad)
    assert apart(*found) < 1e-4 and found[0].abs().max() > 0


def test_no_mask_at_all_is_an_all_ones_mask(model_of, prompts):
    """lm-eval's log-likelihood calls: right-padded, no mask."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("right")
    for name, method in METHODS.items():
        assert torch.equal(
            logits(model, ids, None, method, SPANS["right"]),
            logits(model, ids, torch.ones_like(mask), method, SPANS["right"]),
        ), name


@pytest.mark.parametrize("name", ["pasta", "act", "headmask-zero"])
def test_prompt_lengths_tell_continuations_apart(name, model_of, prompts):
    """Prompt and continuation in one bare forward equal the prompt and forced decoding."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None, lengths=(24, 24))
    spans, lengths = [[(3, 6)], [(9, 12)]], (20, 18)
    once = logits(model, ids, None, METHODS[name], spans, prompt_lengths=lengths)
    assert apart(once, logits(model, ids, None, METHODS[name], spans)) > 1e-4
    for row, length in enumerate(lengths):
        with torch.no_grad(), steerlens.steer(model, METHODS[name], spans[row : row + 1]):
            out = model(ids[row : row + 1, :length])
            parts, cache = [out.logits], out.past_key_values
            for column in range(length, 24):
                parts.append(model(ids[row : row + 1, column : column + 1], past_key_values=cache).logits)
        assert apart(once[row : row + 1], torch.cat(parts, 1)) < 1e-4


def test_rows_steered_each_their_own_way(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    rows = [ZeroTuning(4.0), None, PASTA(0.05, heads={1: [2]})]
    spans = SPANS["left"]
    for backend in ("auto", "reference"):
        together = generate(model, PerRow(rows), spans, ids, mask, backend=backend)
        for row, method in enumerate(rows):
            alone = generate(model, [method] if method else [], spans, ids, mask)
            assert apart(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, row]) < 1e-4
    beams = generate(model, PerRow(rows), spans, ids, mask, num_beams=2)
    alone = generate(model, rows[0], spans, ids, mask, num_beams=2)
    assert torch.equal(beams.sequences[0], alone.sequences[0])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_users_own_4d_mask(kind, model_of, prompts):
    """A 4-D mask that hides a key is honoured, by both backends alike; -inf-like floats and bools are one thing."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    visible = torch.ones(20, 20, dtype=torch.bool).tril().expand(3, 1, 20, 20).clone()
    visible[:, :, 8:, 5] = False
    mask = (
        visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    )
    for name, method in METHODS.items():
        got, expected = (logits(model, ids, mask, method, SPANS[None], backend=b) for b in ("auto", "reference"))
        assert apart(got, expected) < 1e-4, name
        assert apart(logits(model, ids, None, method, SPANS[None]), expected) > 1e-3, name


def test_a_4d_mask_whose_pads_see_themselves(model_of, prompts):
    """As many write it, lest a row be empty."""
    side = "left"
    model, (ids, mask) = model_of("llama-gqa"), prompts(side)
    visible = mask[:, None, None].bool() & torch.ones(20, 20, dtype=torch.bool).tril()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for name, method in METHODS.items():
        found = []
        for given in (mask, visible | torch.eye(20, dtype=torch.bool)):
            with torch.no_grad(), steerlens.steer(model, method, SPANS[side]):
                found.append(model(ids, attention_mask=given, position_ids=positions).logits)
        assert apart(*found, mask) < 1e-4, name


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_4d_mask_of_each_head(kind, model_of, prompts):
    """Heads that see different keys, one row nothing but sinks; in the prompt and in a cached step."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    visible = torch.ones(21, 21, dtype=torch.bool).tril().expand(3, 8, 21, 21).clone()
    visible[:, 3:, 8:, 5] = False
    visible[:, 0, 15:, 1:] = False
    mask = visible if kind == "bool" else torch.where(visible, 0.0, torch.finfo(torch.float32).min)

    def run(method, backend="auto"):
        with torch.no_grad(), steerlens.steer(model, method, SPANS[None], backend=backend):
            first = model(ids, attention_mask=mask[:, :, :20, :20])
            step = model(ids[:, :1], attention_mask=mask[:, :, 20:], past_key_values=first.past_key_values)
            return torch.cat([first.logits, step.logits], 1)

    native = run(())
    assert apart(run(Identity()), native) < 1e-5
    for name, method in METHODS.items():
        got, expected = run(method), run(method, "reference")
        assert apart(got, expected) < 1e-4 and apart(expected, native) > 1e-3, name


def test_a_head_sees_beside_a_set_what_its_own_mask_shows():
    mask = torch.tensor([[[[True, False, False]], [[True, True, False]]]])
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 3, 4)
    call = Call(q, k, k, mask, 1.0, None, 2, None, False)
    keys = torch.tensor([[[True, False, False]]])
    assert [call.sees_beside(keys, [head]).item() for head in (0, 1)] == [False, True]


def test_a_row_that_sees_no_key(model_of, prompts):
    """Its attention is zero, as natively, for every method and in every layer."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    mask = torch.ones(20, 20, dtype=torch.bool).tril().expand(3, 1, 20, 20).clone()
    mask[:, :, 7] = False
    assert apart(logits(model, ids, mask, Identity(), backend="reference"), logits(model, ids, mask)) < 1e-5
    for name, method in METHODS.items():
        got, expected = (logits(model, ids, mask, method, SPANS[None], backend=b) for b in ("auto", "reference"))
        assert apart(got, expected) < 1e-4, name


def test_a_4d_mask_with_real_biases(model_of, prompts):
    """A user's ALiBi-like bias stays under the steering; a uniform head ignores it."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    bias = torch.where(distance >= 0, -0.3 * distance.float(), torch.finfo(torch.float32).min).expand(3, 1, 20, 20)
    for name, method in METHODS.items():
        got, expected = (logits(model, ids, bias, method, SPANS[None], backend=b) for b in ("auto", "reference"))
        assert apart(got, expected) < 1e-4, name


def test_prompt_keys_alone():
    """`PromptKeys` without sections means every prompt token of every row."""
    now = Pass(
        Prompt.start(4, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool(), 2, torch.device("cpu")),
        4,
        1,
        None,
        True,
        {},
    )
    assert now.key_columns(PromptKeys(), None).tolist() == [[True] * 4 + [False]] * 2


@pytest.mark.parametrize("name", ["zerotuning", "pasta", "act", "act-running", "composed"])
@pytest.mark.parametrize("move", ["reorder", "select", "repeat", "copy"])
def test_state_follows_the_cache(name, move, model_of, prompts):
    """Rows that the caller moves between forwards take their prompt along."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    following = torch.tensor([[5], [6], [7]])
    method = METHODS[name] if name in METHODS else ACT(0.0, 0.08, decode="running")
    with torch.no_grad(), steerlens.steer(model, method, SPANS["left"]):
        position = mask.sum(1, keepdim=True)

        def start():
            cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
            assert cache.get_seq_length() == 20
            return cache

        def step(cache, rows):
            longer = torch.nn.functional.pad(mask[rows], (0, 1), value=1)
            return model(
                following[rows], attention_mask=longer, past_key_values=cache, position_ids=position[rows]
            ).logits

        plain, moved = start(), start()
        if move == "copy":
            kept, moved = moved, copy.deepcopy(moved)
            rows = torch.tensor([0, 1, 2])
            kept.reorder_cache(torch.tensor([2, 2, 2]))
        elif move == "reorder":
            rows = torch.tensor([2, 0, 1])
            moved.reorder_cache(rows)
        elif move == "select":
            rows = torch.tensor([1])
            moved.batch_select_indices(rows)
        else:
            rows = torch.tensor([0, 0, 1, 1, 2, 2])
            moved.batch_repeat_interleave(2)
        assert apart(step(moved, rows), step(plain, torch.arange(3))[rows]) < 1e-5
    assert "reorder_cache" not in plain.__dict__


def test_a_cache_cropped_into_its_prompt_starts_another(model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    with torch.no_grad(), steerlens.steer(model, PASTA(0.05), SPANS[None]):
        cache = model(ids).past_key_values
        cache.crop(-8)
        again = model(ids[:, 12:], past_key_values=cache).logits
        assert apart(again, model(ids).logits[:, 12:]) < 1e-5


def test_an_emptied_cache_starts_another_prompt(model_of, prompts):
    model, (ids, mask), (others, _) = model_of("llama-gqa"), prompts("left"), prompts(None)
    with torch.no_grad(), steerlens.steer(model, ZeroTuning(5.0), prompt_lengths=(10, 10, 10)):
        cache = StaticCache(config=model.config, max_cache_len=24)
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.reset()
        assert apart(model(others, past_key_values=cache).logits, model(others).logits) < 1e-5


ROWS = {
    "same keys": [ZeroTuning(4.0), ZeroTuning(0.2), None],
    "act": [ACT(0.0, 0.08), None, ACT(0.0, 0.08)],
    "act, each its own": [None, ACT(0.0, 0.08), ACT(0.5, 0.2)],
    "heads of their own": [ZeroTuning(4.0, heads={0: [1, 2]}), ZeroTuning(9.0, heads={0: [2], 1: [0]}), None],
    "act, heads of their own": [ACT(0.0, 0.08, heads={0: [0, 1]}), None, ACT(0.0, 0.08, heads={0: [5], 1: "*"})],
    "headmask, heads of their own": [HeadMask({0: [1]}), HeadMask({0: [3, 4]}), HeadMask({0: [1]}, mode="zero")],
    "headmask": [HeadMask({0: "*"}, phase="decode"), None, HeadMask({0: "*"}, phase="decode")],
    "pasta": [PASTA(0.05), PASTA(0.05), None],
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_that_share_keys_or_methods(rows, backend, model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    together = torch.stack(generate(model, PerRow(rows), SPANS["left"], ids, mask, backend=backend).logits)
    plain = torch.stack(generate(model, (), None, ids, mask).logits)
    for row, method in enumerate(rows):
        alone = torch.stack(generate(model, [method] if method else [], SPANS["left"], ids, mask).logits)
        assert apart(together[:, row], alone[:, row]) < 1e-4
        assert (apart(alone[:, row], plain[:, row]) > 1e-3) == (method is not None)


@pytest.mark.parametrize(
    ("methods", "kinds"),
    [
        ([ACT(0.5, 0.08), ACT(0.5, 0.08)], [KeepMass, KeepMass]),
        ([ZeroTuning(9.0), ACT(0.2, 0.08), ZeroTuning(9.0)], [Bias, KeepMass, Bias]),
        ([HeadMask({0: "*"}), HeadMask({0: [1]}, mode="zero"), HeadMask({0: [1, 2]})], [Cut, Cut, Cut]),
    ],
    ids=["a law twice", "a bias on both sides of a law", "ablations"],
)
def test_alike_edits_of_one_row_keep_their_order(methods, kinds, model_of, prompts, monkeypatch):
    model, seen = model_of("llama-gqa"), []
    ids, _ = prompts(None, lengths=(20,))
    attention = backends.attention
    monkeypatch.setattr(backends, "attention", lambda name, call: (seen.append(call.edits), attention(name, call))[1])
    together = logits(model, ids, None, [PerRow([method]) for method in methods])
    assert [type(edit) for edit in seen[0]] == kinds
    with contextlib.ExitStack() as stack:
        for method in methods:
            stack.enter_context(steerlens.steer(model, method))
        with torch.no_grad():
            assert apart(together, model(ids).logits) < 1e-4


@pytest.mark.parametrize(
    ("rows", "edits"),
    [
        ([ZeroTuning(2.0, heads={0: [h]}) for h in range(8)], 1),
        ([ZeroTuning(2.0, heads={0: [1]}), ZeroTuning(3.0, heads={0: [1]}), PASTA(0.1, heads={0: [2]})], 2),
        ([ACT(0.0, 0.08, heads={0: [h]}) for h in range(8)], 1),
        ([ACT(0.0, 0.08), ACT(0.5, 0.08)], 2),
        ([HeadMask({0: [h]}) for h in range(8)], 1),
        ([HeadMask({0: [1]}), HeadMask({0: [1]}, mode="zero"), HeadMask({0: [2]})], 3),
    ],
    ids=["gammas", "keys", "act", "fractions", "headmask", "modes"],
)
def test_a_layer_holds_alike_edits_of_many_rows_in_one(rows, edits, model_of, prompts, monkeypatch):
    """What makes many candidates in one batch cheap."""
    model, seen = model_of("llama-gqa"), []
    ids, _ = prompts(None, lengths=(20,) * len(rows))
    attention = backends.attention
    monkeypatch.setattr(backends, "attention", lambda name, call: (seen.append(call.edits), attention(name, call))[1])
    logits(model, ids, None, PerRow(rows), [[(3, 6)]] * len(rows))
    assert len(seen[0]) == edits


@pytest.mark.parametrize("heads", [(0, 5, 6), (2, 3, 7), (1, 4, 5, 6)])
@pytest.mark.parametrize("more", [(), (ZeroTuning(2.0),)], ids=["last", "followed"])
def test_uneven_heads_of_several_groups(heads, more):
    """Heads per key/value group that do not fill the rectangle."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 24, 8) for h in (8, 2, 2))
    facts = ModelFacts("x", "llama", 1, (8,), (2,))
    found = []
    for backend in ("sdpa", "reference"):
        now = Pass(Prompt.start(24, None, 2, q.device), 0, 24, None, True, {0: (24, 0)})
        call = Call(3 * q, k, v, None, 8**-0.5, None, 0, None, True)
        plans = [e for m in (ACT(0.0, 0.1, heads={0: heads}), *more) for e in m.plan(facts, None)[0]]
        call.edits = lower([Placed(e, None, i, None) for i, e in enumerate(plans)], now, 0, 8)
        found.append(backends.attention(backend, call))
    assert apart(*found) < 1e-5


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("masked", ["plain", "padded", "per head", "sinks"])
def test_many_biases_are_added_a_few_heads_at_a_time(kv_heads, masked, monkeypatch):
    """Their channels would make the copies of queries, keys and values several times as wide."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8) for h in (8, kv_heads, kv_heads))
    call = Call(3 * q, k, v, None, 8**-0.5, None, 0, None, True)
    if masked == "padded":
        call.real = torch.arange(40) >= torch.tensor([[0], [5]])
    if masked == "per head":
        near = torch.arange(40)[:, None] - torch.arange(40)
        call.mask, call.plain = torch.stack([(near >= 0) & (near < 9 + h) for h in range(8)])[None], False
    if masked == "sinks":
        call.sinks = torch.randn(8)
    call.edits = [Bias(torch.randn(2, 8, 40), torch.rand(2, 40) < 0.3) for _ in range(20)]
    taken, portions = [], sdpa._run_in_portions
    monkeypatch.setattr(sdpa, "_run_in_portions", lambda *args: (taken.append(args[4]), portions(*args))[1])
    found, expected = (backends.attention(name, call) for name in ("sdpa", "reference"))
    seen = slice(None) if masked != "padded" else slice(5, None)
    assert taken and taken[0] < 8
    assert apart(found[:, :, seen], expected[:, :, seen]) < 1e-5


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_frozen_sinks_that_a_crop_took_are_no_keys(backend, model_of, prompts):
    """Where prompt_lengths fix the prompt, a cache cropped into it holds only some of its sinks."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None, (40,))
    found = []
    for name in (backend, "reference"):
        method = ACT(0.3, 0.02, heads={0: [1, 2]})
        with torch.no_grad(), steerlens.steer(model, method, backend=name, prompt_lengths=40):
            cache = model(ids, use_cache=True).past_key_values
            cache.crop(-30)
            found.append(model(ids[:, 10:11], past_key_values=cache).logits)
    assert apart(*found) < 1e-5


def test_rows_after_a_crop_are_rows_of_the_new_prompt(model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    with torch.no_grad(), steerlens.steer(model, HeadMask({0: "*", 2: "*"}, phase="decode")):
        cache = model(ids).past_key_values
        cache.crop(-10)
        again = model(ids[:, 10:15], past_key_values=cache).logits
        assert apart(again, model(ids[:, :15]).logits[:, 10:]) < 1e-5


def test_another_generate_on_an_old_cache_has_its_own_prompt(prompts):
    """In one layer the old keys do not depend on the steering, so the cache changes nothing."""
    model, (ids, mask) = build("llama-gqa", num_hidden_layers=1), prompts("left")
    one = generate(model, PASTA(0.05), SPANS["left"], ids, mask)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["attention_mask"] = torch.nn.functional.pad(mask, (0, 6), value=1)
    with steerlens.steer(model, PASTA(0.05), SPANS["left"]):
        fresh = model.generate(one.sequences, **options)
    with steerlens.steer(model, PASTA(0.05), SPANS["left"]):
        first = model.generate(ids, **options | {"attention_mask": mask, "max_new_tokens": 6})
        again = model.generate(one.sequences, past_key_values=first.past_key_values, **options)
    assert apart(torch.stack(again.logits), torch.stack(fresh.logits)) < 1e-4


@pytest.mark.parametrize("head", [0, 3, 4])
def test_sinks_that_a_window_has_left_behind(head, prompts):
    """A cache that keeps every key of a windowed layer: what the mask hides is no sink any more."""
    model, (ids, _) = build("mistral", num_hidden_layers=1), prompts(None, lengths=(20,))
    found = []
    for backend in ("auto", "reference"):
        with torch.no_grad(), steerlens.steer(model, ACT(0.0, 0.06, heads={0: [head]}), backend=backend):
            cache, parts = DynamicCache(), []
            model(ids, past_key_values=cache)
            for column in range(6):
                parts.append(model(ids[:, column : column + 1], past_key_values=cache).logits)
        found.append(torch.cat(parts, 1))
    assert apart(*found) < 1e-4


@pytest.mark.parametrize(
    "methods",
    [
        [HeadMask({0: [1, 2]}, mode="zero"), HeadMask({0: [2, 3]})],
        [HeadMask({0: [1, 2]}), HeadMask({0: [2, 3]}, mode="zero", phase="decode")],
        [ACT(0.0, 0.02), ACT(0.3, 0.05)],
        [ACT(0.3, 0.05), ACT(0.0, 0.02, spare="first_sink")],
        [ACT(0.5, 0.05), ZeroTuning(2.0), ACT(0.0, 0.02)],
        [HeadMask({0: [1], 1: [2]}), ZeroTuning(5.0)],
        [ACT(0.3, 0.05), ACT(0.0, 0.02, heads={0: [5], 1: [6, 7]})],
    ],
    ids=["zero+uniform", "uniform+zero", "act0+act", "act+act0", "act+zt+act0", "uniform+zt", "act+one-group"],
)
def test_methods_that_overlap(methods, model_of, prompts):
    """Later ablations win; two row-dependent laws run one after the other."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    one, two = (generate(model, methods, None, ids, mask, backend=b) for b in ("auto", "reference"))
    assert apart(torch.stack(one.logits), torch.stack(two.logits)) < 1e-4
    for part in (slice(0, 20), slice(8, 20)):  # more rows than a few, and few
        ids, mask = ids[:, part], mask[:, part]
        got, expected = (logits(model, ids, mask, methods, backend=b) for b in ("auto", "reference"))
        assert apart(got, expected, mask) < 1e-4
        assert apart(expected, logits(model, ids, mask, methods[-1]), mask) > 1e-3


def test_what_a_mask_tells_of_tokens():
    """(real tokens, whether visibility is causal and padding alone)."""
    two = torch.tensor([[0, 1, 1]])
    assert masks.token_mask(None, 3) == masks.token_mask({"full_attention": None}, 3) == (None, True)
    assert masks.token_mask(two, 3)[0] is two and masks.token_mask(two, 3)[1]
    window, full = (two.bool()[:, None, None, -keys:].expand(1, 1, 3, keys) for keys in (2, 3))
    assert masks.token_mask(window, 3) == (None, False)  # it tells nothing of the first column
    assert masks.token_mask({"sliding_attention": window}, 2)[0].tolist() == [[True, True]]
    for mask in (full, {"sliding_attention": window, "full_attention": full}):
        real, plain = masks.token_mask(mask, 3)
        assert (real.tolist(), plain) == ([[False, True, True]], False)
    with pytest.raises(UnsupportedError, match=r"shape \(3,\)"):
        masks.token_mask(two[0], 3)
    with pytest.raises(UnsupportedError, match="is a list"):
        masks.token_mask([two], 3)


def test_visibility_from_columns():
    """For kernels that are told the padding and the window instead of a mask."""
    real = torch.tensor([[False, True, True, True, True]])
    seen = masks.from_columns(torch.zeros(1, 1, 2, 4), 5, 3, real, 3)
    assert seen.int().tolist() == [[[[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]]
    assert masks.from_columns(torch.zeros(1, 1, 2, 4), 5, 3, None, None).sum().item() == 9


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_users_biases_are_those_of_the_native_model(backend, model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    bias = torch.where(distance >= 0, -0.3 * distance.float(), torch.finfo(torch.float32).min).expand(3, 1, 20, 20)
    native = logits(model, ids, bias)
    assert apart(logits(model, ids, bias, Identity(), backend=backend), native) < 1e-5
    assert apart(logits(model, ids, None), native) > 1e-2


@pytest.mark.parametrize("hide", [-1e4, -1e9, -torch.inf])
@pytest.mark.parametrize("name", ["zerotuning", "act", "headmask"])
def test_numbers_that_a_users_mask_hides_keys_with(name, hide, model_of, prompts):
    """Pads are no first tokens and no visible keys, whichever number it is."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    visible = torch.ones(20, 20, dtype=torch.bool).tril() & mask[:, None, None].bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for given in (mask, torch.where(visible, 0.0, hide)):
        with torch.no_grad(), steerlens.steer(model, METHODS[name]):
            found.append(model(ids, attention_mask=given, position_ids=positions).logits[mask.bool()])
    assert apart(*found) < 1e-5


@pytest.mark.parametrize("heads", ["all", "*:1,2,6"])
@pytest.mark.parametrize("more", [[], [ZeroTuning(3.0)]], ids=["act", "composed"])
def test_a_users_mask_of_each_head(heads, more, model_of, prompts):
    """Heads that see more keys move mass to them, whatever the first head sees."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    visible = torch.stack([(distance >= 0) & (distance < 1 + head) for head in range(8)]).expand(3, 8, 20, 20)
    methods = [ACT(0.1, 0.06, heads=heads), *more]
    got, expected = (logits(model, ids, visible, methods, backend=b) for b in ("sdpa", "reference"))
    assert apart(got, expected) < 1e-4


@torch.no_grad()
def test_a_users_biases_hold_at_a_decode_step(model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts(None)
    bias = 2 * torch.randn(21, 21, generator=torch.Generator().manual_seed(5))
    hidden = torch.ones_like(bias, dtype=torch.bool).triu(1)
    bias = bias.masked_fill(hidden, torch.finfo(torch.float32).min).expand(3, 1, 21, 21)
    found = []
    for backend in ("auto", "reference"):
        with steerlens.steer(model, ACT(0.3, 0.08), backend=backend):
            cache = model(ids, attention_mask=bias[..., :20, :20]).past_key_values
            found.append(model(ids[:, :1], attention_mask=bias[..., 20:, :], past_key_values=cache).logits)
    assert apart(*found) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_column_sums_in_sixteen_bit(dtype):
    """Sums from the transposed kernel keep the digits that fp32 weights of the same inputs have."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 200, 64).to(dtype) for h in (4, 2, 2))
    k[:, :, 5, 0], q[..., 0] = 12, 6
    call = Call(4 * q, k, v, None, 64**-0.5, None, 0, None, True)
    lse = sdpa._run(call, sdpa.Inputs(call.query, k, v), [], want_lse=True)[1]
    rows, heads = torch.ones(1, 200, dtype=torch.bool), [0, 1, 3]
    chosen = sdpa.Selection(call, heads)
    got = sdpa._summer(call, sdpa.Inputs(call.query, k, v), [], chosen, lse)(rows)
    expected = reference.summer(call, [], heads)(rows)
    assert torch.equal(got[1], expected[1]) and apart(got[0], expected[0]) < 2e-3


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize(
    "method", [ACT(0.0, 1.5, "relative"), HeadMask({0: "*", 2: "*"}, phase="decode")], ids=["relative", "decode"]
)
def test_prompt_lengths_and_relative_thresholds_count_real_tokens(method, side, model_of, prompts):
    model, (ids, mask), lengths = model_of("llama-gqa"), prompts(side), (15, 9, 12)
    together = logits(model, ids, mask if side else None, method, prompt_lengths=lengths)
    for row, length in enumerate(lengths):
        pads = int((1 - mask[row]).sum()) if side else 0
        alone = logits(model, ids[row : row + 1, pads:], None, method, prompt_lengths=length)
        assert apart(together[row, pads:], alone[0]) < 1e-4
    twice = [t.repeat_interleave(2, 0) for t in (ids, mask)]
    again = logits(model, twice[0], twice[1] if side else None, method, prompt_lengths=lengths)
    assert apart(again, together.repeat_interleave(2, 0), twice[1]) < 1e-5


def test_pads_amid_the_prompt_are_no_rows(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts(None)
    mask[:, 6:9] = 0
    with torch.no_grad(), steerlens.steer(model, ACT(0.0, 1.5, "relative")):
        got = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        expected = model(ids[mask.bool()].view(3, 17)).logits
    assert apart(got[mask.bool()].view_as(expected), expected) < 1e-4


def test_chunks_of_a_prompt_whose_mask_transformers_infers(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    expected = generate(model, METHODS["pasta"], SPANS["left"], ids, mask)
    got = generate(model, METHODS["pasta"], SPANS["left"], ids, None, prefill_chunk_size=7)
    assert apart(torch.stack(got.logits), torch.stack(expected.logits)) < 1e-4
