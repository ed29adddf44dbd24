"""`steerlens.capture` against weights written out in full."""

import dataclasses
import threading

import pytest
import torch
from small_models import build
from steerlens.kernels import _configs

import steerlens
from steerlens.backends import reference, sdpa
from steerlens.backends.call import Bias, Call, KeepMass
from steerlens.errors import SpanError, SteeringStateError, UnsupportedError
from steerlens.massive import Massive
from steerlens.methods import ACT, HeadMask, ZeroTuning
from steerlens.recording import STATS
from steerlens.spans import Spans

SPANS = Spans.of({"emphasis": [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]], "query": [[(17, 20)]] * 3})


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Half the programs to interpret."""
    monkeypatch.setattr(_configs, "INTERPRETER", dataclasses.replace(_configs.INTERPRETER, rows=32, keys=32))


@pytest.fixture(params=["llama-gqa", "gemma2", "mistral"])
def model(request, model_of):
    return model_of(request.param, "eager")


@pytest.mark.parametrize("methods", [(), ZeroTuning(5.0), ACT(0.2, 0.08)], ids=["plain", "zerotuning", "act"])
def test_statistics_are_those_of_the_weights(model, prompts, methods):
    ids, mask = prompts("left")
    with torch.no_grad(), steerlens.steer(model, methods, backend="reference"):
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
        with steerlens.capture(model, spans=SPANS) as record:
            model(ids, attention_mask=mask)
    real = mask.bool()
    assert record.groups == ("emphasis", "query")
    for layer in range(3):
        a, got = weights[layer], record[layer]
        columns = torch.arange(20)
        for row in range(3):
            rows = a[row][:, real[row]]
            for g, group in enumerate(record.groups):
                inside = torch.zeros(20, dtype=torch.bool)
                for start, stop in SPANS.groups[group][row]:
                    inside |= (columns >= start) & (columns < stop)
                assert (got.mass[row, :, real[row], g] - rows[..., inside].sum(-1)).abs().max() < 1e-5
            assert (got.entropy[row][:, real[row]] - torch.special.entr(rows).sum(-1)).abs().max() < 1e-5
            assert torch.equal(got.argmax[row][:, real[row]], rows.argmax(-1))
            # Without a window every later real row sees a key; with one, those within it do.
            seen = (rows > 0).sum(1)
            mean = rows.sum(1) / seen
            assert (got.column_mean[row] - mean)[:, real[row]].abs().max() < 1e-5
            for stat in ("mass", "entropy", "lse"):
                assert getattr(got, stat)[row][:, ~real[row]].isnan().all()
            assert (got.argmax[row][:, ~real[row]] == -1).all() and got.column_mean[row][:, ~real[row]].isnan().all()


def test_capture_changes_nothing_and_takes_everything_off(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    with torch.no_grad():
        base = model(ids, attention_mask=mask).logits
        with steerlens.capture(model) as record:
            assert torch.equal(model(ids, attention_mask=mask).logits, base)
    assert record.groups == ("first_token",) and "_steerlens" not in model.model.layers[0].self_attn.__dict__


def test_lse(model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts()
    seen = {}
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda m, a, k, o: seen.update(k), with_kwargs=True)
    with torch.no_grad(), steerlens.capture(model, stats=["lse"], heads={0: [5]}) as record:
        model(ids)
    hook.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, x = model.model.layers[0].self_attn, seen["hidden_states"]
    with torch.no_grad():
        q = attention.q_proj(x).view(3, 20, 8, 8).transpose(1, 2)
        k = attention.k_proj(x).view(3, 20, 2, 8).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *seen["position_embeddings"])
    x = q[:, 5] @ k[:, 1].transpose(1, 2) * 8**-0.5
    x = x.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    assert record[0].lse.shape == (3, 1, 20) and (record[0].lse[:, 0] - x.logsumexp(-1)).abs().max() < 1e-4
    assert record.layers == (0,) and record[0].heads == (5,) and record[0].mass is None
    with pytest.raises(KeyError, match="layer 1 is not captured"):
        record[1]


@pytest.mark.parametrize("heads", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 6]])
def test_lse_counts_learned_sinks(heads, model_of, prompts):
    """A row sums to 1 less the sink's share, which is exp(sink - lse)."""
    model, (ids, _) = model_of("gpt_oss", "eager"), prompts()
    with torch.no_grad(), steerlens.capture(model, [[(0, 20)]] * 3, ["lse", "mass"], heads={0: heads}) as record:
        model(ids)
    sinks = model.model.layers[0].self_attn.sinks[heads][:, None]
    assert ((sinks - record[0].lse).exp() + record[0].mass[..., 0] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
def test_forwards_are_appended(family, model_of, prompts):
    """Prefill and decode together are what one forward over all tokens records."""
    model, (ids, mask) = model_of(family), prompts("left")
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        with steerlens.capture(model) as record:
            model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        with steerlens.capture(model) as once:
            model(out[:, :-1], attention_mask=torch.nn.functional.pad(mask, (0, 4), value=1))
        with steerlens.capture(model, rows="last", stats=["mass"]) as last:
            model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        with steerlens.capture(model, rows=7, stats=["mass"]) as seven:
            model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for layer in range(3):
        assert torch.equal(seven[layer].mass.nan_to_num(), record[layer].mass[:, :, 13:].nan_to_num())
        for stat in ("mass", "entropy", "lse", "column_mean"):
            got, expected = getattr(record[layer], stat), getattr(once[layer], stat)
            assert got.shape == expected.shape and torch.equal(got.isnan(), expected.isnan())
            assert (got - expected).nan_to_num().abs().max() < 1e-4
        assert torch.equal(record[layer].argmax, once[layer].argmax)
        assert (last[layer].mass - record[layer].mass[:, :, 19:]).abs().max() < 1e-6


def test_a_prompt_in_chunks(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    options = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    records = []
    for chunk in (None, 7):
        with steerlens.capture(model, SPANS, stats=["mass", "column_mean"]) as record:
            model.generate(ids, prefill_chunk_size=chunk, **options)
        records.append(record[1])
    assert (records[0].mass - records[1].mass).nan_to_num().abs().max() < 1e-5
    assert (records[0].column_mean - records[1].column_mean).nan_to_num().abs().max() < 1e-5


@pytest.mark.parametrize(
    "options", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}], ids=["two", "beams"]
)
def test_each_prompt_becomes_several_rows(options, model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False} | options
    with torch.no_grad(), steerlens.capture(model, SPANS, stats=["mass"]) as record:
        out = model.generate(ids, **options)
    rows = torch.arange(3).repeat_interleave(2)
    spans = {name: [ranges[row] for row in rows] for name, ranges in SPANS.groups.items()}
    whole = ids[rows] if "num_beams" in options else out[:, :-1]
    real = torch.nn.functional.pad(mask[rows], (0, whole.shape[1] - 20), value=1)
    with torch.no_grad(), steerlens.capture(model, spans, stats=["mass"]) as once:
        model(whole, attention_mask=real)
    got, expected = record[1].mass[:, :, : whole.shape[1]], once[1].mass
    assert len(got) == 6 and torch.equal(got.isnan(), expected.isnan())
    assert (got - expected).nan_to_num().abs().max() < 1e-5


def test_one_record_one_batch(model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts()
    with steerlens.capture(model) as record:
        model(ids)
        with pytest.raises(SteeringStateError, match="holds 3 rows"):
            model(ids[:2])
        with pytest.raises(SteeringStateError, match="on already"), record:
            pass


def test_capture_is_as_careful_as_steer(model_of, prompts):
    model, caught = model_of("llama-gqa"), []

    def attach():
        with pytest.raises(SteeringStateError, match="another thread") as error:
            steerlens.steer(model, ZeroTuning(2.0)).attach()
        caught.append(error)

    with steerlens.capture(model):
        thread = threading.Thread(target=attach)
        thread.start()
        thread.join()
        with pytest.raises(SteeringStateError, match=r"steerlens\.capture"):
            model.set_attn_implementation("eager")
    assert caught
    with steerlens.capture(model, [[(1, 2)]]), pytest.raises(SpanError, match="1 prompt rows"):
        model(prompts()[0])


def test_bad_requests(model_of, prompts):
    model = model_of("llama-gqa")
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        steerlens.capture(model, stats="entrop")
    assert steerlens.capture(model, stats="entropy").stats == ("entropy",)
    with pytest.raises(ValueError, match="rows='first'"):
        steerlens.capture(model, rows="first")
    with steerlens.capture(model, spans=SPANS), pytest.raises(SpanError, match="3 prompt rows"):
        model(prompts()[0][:2])


def test_ties_and_keys_that_no_row_saw(model_of, prompts):
    """A uniform head attends to all it sees alike: the lowest column counts. What no captured row sees has no mean."""
    model, (ids, mask) = model_of("mistral"), prompts("left")
    with steerlens.steer(model, HeadMask({0: "*"})), steerlens.capture(model, rows="last", heads={0: [2]}) as record:
        model(ids, attention_mask=mask)
    assert record[0].argmax.tolist() == [[[8]]] * 3  # the window of 12 ends at column 19
    assert record[0].column_mean[:, 0, :8].isnan().all()
    assert (record[0].column_mean[:, 0, 8:] - 1 / 12).abs().max() < 1e-6


def test_rows_of_pads_are_no_rows(model_of, prompts):
    """Pads on the right see every token before them, and count nowhere."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("right")
    with torch.no_grad(), steerlens.capture(model) as together:
        model(ids, attention_mask=mask)
    with torch.no_grad(), steerlens.capture(model) as alone:
        model(ids[1:2, :13])
    for stat in ("column_mean", "mass", "entropy", "lse"):
        got, expected = getattr(together[1], stat)[1:2, :, :13], getattr(alone[1], stat)
        assert (got - expected).abs().max() < 1e-4, stat


def test_pads_stay_pads_when_the_mask_is_left_out_later(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    with torch.no_grad(), steerlens.capture(model, stats=["column_mean"]) as record:
        cache = model(ids, attention_mask=mask).past_key_values
        model(ids[:, -1:], past_key_values=cache)
    real = torch.nn.functional.pad(mask, (0, 1), value=1).bool()
    assert torch.equal(record[0].column_mean.isnan().all(1), ~real)


def test_capture_alone_leaves_the_native_attention_on(model_of, prompts):
    model, (ids, mask) = model_of("llama-gqa", "eager"), prompts("left")
    with torch.no_grad():
        base = model(ids, attention_mask=mask, output_attentions=True)
        with steerlens.capture(model, stats=["mass"]):
            got = model(ids, attention_mask=mask, output_attentions=True)
    assert torch.equal(got.logits, base.logits)
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, base.attentions, strict=True))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_a_token_that_sees_no_key(backend, model_of, prompts):
    """Its argmax is the first column, whoever computes it; a mask of the user's may hide a token's own key."""
    model, (ids, _) = model_of("llama-gqa"), prompts(None, (18, 18))
    visible = torch.ones(18, 18, dtype=torch.bool).tril().expand(2, 1, 18, 18).clone()
    visible[0, :, 8] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    steered = steerlens.steer(model, ZeroTuning(3.0, heads={0: [1]}), backend=backend)
    with torch.no_grad(), steered, steerlens.capture(model, heads={0: [0, 1]}) as record:
        model(ids, attention_mask=mask)
    got = record[0]
    assert got.argmax[0, :, 8].tolist() == [0, 0] and (got.argmax[0, :, 9:] > 0).any()
    assert (got.mass[0, :, 8] == 0).all() and (got.entropy[0, :, 8] == 0).all() and (got.lse[0, :, 8] < -1e3).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_each_head_under_its_own_mask(backend, model_of, prompts):
    """A mask of the user's may differ between heads: a key's mean is over the rows that see it in that head."""
    model, (ids, _) = model_of("llama-gqa", "eager"), prompts(None, (18, 18))
    visible = torch.ones(18, 18, dtype=torch.bool).tril().expand(2, 8, 18, 18).clone()
    visible[:, 5, 10:, 3:9], visible[1, 2, :, 1:4] = False, False
    visible |= torch.eye(18, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions[1]
        steered = steerlens.steer(model, ZeroTuning(3.0, heads={2: [0]}), backend=backend)
        with steered, steerlens.capture(model, heads={1: [2, 4, 5]}) as record:
            model(ids, attention_mask=mask)
    chosen = weights[:, [2, 4, 5]]
    expected = chosen.sum(2) / visible[:, [2, 4, 5]].sum(2)
    assert (record[1].column_mean - expected).abs().max() < 1e-5
    assert torch.equal(record[1].argmax, chosen.argmax(-1))


@pytest.mark.parametrize(
    ("family", "methods", "backend", "widths"),
    [
        ("llama-gqa", (), "auto", range(1, 41)),
        ("llama-gqa", [ZeroTuning(3.0), ACT(0.2, 0.08)], "auto", range(1, 41)),
        ("gpt_oss", [ACT(0.2, 0.08), HeadMask({1: [2]})], "auto", range(1, 41)),
        ("mistral", ZeroTuning(3.0), "auto", (40,)),  # a mask of the model's own says what rows see
        ("mistral", [HeadMask({0: [1]})], "triton", range(1, 13)),  # ablated rows are not the kernels' to sum up
    ],
    ids=["plain", "steered", "sinks", "masked", "window"],
)
def test_blocks_of_rows_look_at_the_keys_near_them(family, methods, backend, widths, model_of, prompts, monkeypatch):
    """The same, whether a block holds all rows and keys or one row and what it may see."""
    model, (ids, mask) = model_of(family, "eager"), prompts("left", (40, 29))
    found, seen = [], set()
    original = reference.near
    monkeypatch.setattr(reference, "near", lambda *a: seen.add((n := original(*a))[0].key.shape[2]) or n)
    for budget in (1 << 20, 1):
        monkeypatch.setattr(sdpa, "budget", lambda call, size=budget: size)
        steered, heads = steerlens.steer(model, methods, backend=backend), {0: [0, 1, 5], 1: [2]}
        with torch.no_grad(), steered, steerlens.capture(model, [[(12, 20)]] * 2, heads=heads) as record:
            model(ids, attention_mask=mask)
        found.append(record)
    assert set(widths) <= seen
    for layer in found[0].layers:
        for stat in STATS:
            got, expected = (getattr(record[layer], stat) for record in found)
            assert torch.equal(got.isnan(), expected.isnan()), stat
            assert (got - expected).nan_to_num().abs().max() < 1e-5, (layer, stat)


@pytest.mark.parametrize("cached", [0, 7])
@pytest.mark.parametrize("window", [None, 5])
def test_weights_of_the_keys_near_a_block_are_all_weights(window, cached):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 12, 8, generator=generator), torch.randn(2, 2, 12 + cached, 8, generator=generator)
    real = torch.ones(2, 12 + cached, dtype=torch.bool)
    real[1, :3] = False
    places = torch.arange(12 + cached)
    edits = [
        Bias(torch.full((1, 4, 1), 1.5), (places % 3 == 1).expand(2, -1)),
        KeepMass([1, 2], 0.3, lambda sums: (places % 4 == 2).expand(2, 2, -1), None),
    ]
    call = Call(query, key, key, None, 1.0, None, cached, real, window is None, edits, torch.randn(4), window=window)
    kept = reference.resolve(call)
    expected, lse = reference.weights_and_lse(call, kept, slice(0, 12), [0, 2, 3])
    for rows in (slice(0, 12), slice(0, 1), slice(4, 6), slice(11, 12)):
        near, some, place = reference.near(call, kept, rows)
        got, got_lse = reference.weights_and_lse(near, some, rows, [0, 2, 3])
        whole = torch.zeros(2, 3, got.shape[2], 12 + cached)
        whole[..., place : place + got.shape[3]] = got
        assert (whole - expected[:, :, rows]).abs().max() < 1e-6
        assert (got_lse - lse[..., rows]).nan_to_num(0, 0, 0).abs().max() < 1e-5
        least = 0 if window is None else max(cached + rows.start - 4, 0)
        assert place == least and got.shape[3] == cached + rows.stop - least


class TestMassive:
    """Largest activations of the hidden state after each decoder layer."""

    def test_oracle(self):
        x = torch.tensor([0.05, -0.1, 150, 0.1, 0.08, -0.05, 0.12, 0.2])
        found = Massive.of(x[None, None], torch.tensor([[4]]))
        assert found.values[0, 0].tolist() == pytest.approx([150, 0.2, 0.12])
        assert found.channels.tolist() == [[[2, 7, 6]]] and found.median.item() == pytest.approx(0.1)
        assert (found.values[0, 0, 0] / found.median[0, 0]).item() == pytest.approx(1500)
        assert found.find() == [(0, 4, 2, 150.0)] and found.find()[0].column == 4
        assert found.find(least=150) == found.find(ratio=1501) == []
        assert [a.channel for a in found.find(least=0.15, ratio=1)] == [2, 7]
        exact = Massive.of(torch.tensor([[[0.125, 128, 0.125, 0]]]), torch.tensor([[0]]))
        assert exact.find(ratio=1024) == [(0, 0, 1, 128.0)]
        negative = Massive.of(-x[None, None], torch.tensor([[4]]))
        assert negative.find() == [(0, 4, 2, -150.0)]

    def test_the_median_is_the_lower_of_the_middle_two(self):
        """As torch's, which the published code takes."""
        found = Massive.of(torch.tensor([[[-4.0, 3, 2, -1]]]), torch.tensor([[0]]))
        assert found.median.item() == 2

    @pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2", "opt", "gpt_neox", "qwen3_next", "llama4"])
    def test_of_hidden_states(self, family, model_of, prompts):
        model, (ids, mask) = model_of(family, "eager"), prompts("left")
        with torch.no_grad(), steerlens.capture(model, stats=["massive"]) as record:
            states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        pads = ~mask.bool()
        for layer in record.layers[:-1]:  # behind the last one is a norm
            got, expected = record[layer].massive, states[layer + 1].float()
            assert torch.equal(got.values[~pads], expected.gather(-1, got.channels.clamp(min=0))[~pads])
            top = expected.abs().sort(-1, descending=True).values
            assert (got.values.abs() - top[..., :3])[~pads].abs().max() == 0
            assert torch.equal(got.median[~pads], top[..., 32][~pads]) and got.median[pads].isnan().all()
            assert torch.equal(got.columns, torch.where(pads, -1, torch.arange(20)))
            assert (got.channels[pads] == -1).all() and got.values[pads].isnan().all()
        assert record[record.layers[-1]].massive.values.shape == (3, 20, 3)

    def test_generated_tokens_are_appended(self, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa"), prompts("left")
        records = [
            steerlens.capture(model, stats=stats, rows=rows)
            for stats, rows in ((["massive"], "all"), (["lse", "massive"], "last"))
        ]
        for record in records:
            with torch.no_grad(), steerlens.steer(model, ZeroTuning(3.0)), record:
                out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        with (
            torch.no_grad(),
            steerlens.steer(model, ZeroTuning(3.0)),
            steerlens.capture(model, stats=["massive"]) as once,
        ):
            model(out[:, :-1], attention_mask=torch.nn.functional.pad(mask, (0, 3), value=1))
        got, last, expected = (record[2].massive for record in (*records, once))
        assert got.values.shape == (3, 23, 3) and (got.values - expected.values).nan_to_num().abs().max() < 1e-4
        assert torch.equal(last.values, got.values[:, 19:]) and last.columns.tolist() == [[19, 20, 21, 22]] * 3
        assert torch.equal(records[1][2].columns, last.columns) and records[1][2].lse.shape[2] == 4

    def test_it_finds_a_channel_that_was_made_massive(self, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa"), prompts("left")

        def spike(module, args, output):
            output[1, 9, 5] = -1e5
            return output

        handle = model.model.layers[1].register_forward_hook(spike)
        try:
            with torch.no_grad(), steerlens.capture(model, stats=["massive"]) as record:
                model(ids, attention_mask=mask)
        finally:
            handle.remove()
        assert record[1].massive.find() == [(1, 9, 5, -1e5)] and record[0].massive.find() == []

    def test_hooks_are_taken_off(self, model_of, prompts):
        model, (ids, _) = model_of("llama-gqa"), prompts()

        def state():
            return [(len(m._forward_hooks), set(m.__dict__)) for m in model.modules()]

        def interrupted(*args):
            raise KeyboardInterrupt

        before, plain = state(), [len(layer._forward_hooks) for layer in model.model.layers]
        with pytest.raises(KeyboardInterrupt), steerlens.capture(model, stats=["massive"], heads={1: [0]}):
            hooked = [len(layer._forward_hooks) for layer in model.model.layers]
            assert [now - then for now, then in zip(hooked, plain, strict=True)] == [0, 1, 0]
            raise KeyboardInterrupt
        assert state() == before
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.model.layers[2], "register_forward_hook", interrupted)
            steerlens.capture(model, stats=["massive"]).__enter__()
        assert state() == before
        record = steerlens.capture(model, [[(1, 2)]], stats=["massive"])
        with record, pytest.raises(SpanError):
            model(ids)
        assert state() == before and record[0].massive is None

    def test_a_layer_that_keeps_the_last_rows_alone(self, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa"), prompts("left")
        handle = model.model.layers[2].register_forward_hook(lambda m, a, output: output[:, -2:])
        try:
            with torch.no_grad(), steerlens.capture(model, stats=["massive"]) as record:
                model(ids, attention_mask=mask)
        finally:
            handle.remove()
        assert record[2].massive.columns.tolist() == [[18, 19]] * 3 and record[1].massive.columns.shape == (3, 20)

    def test_attention_outside_of_decoder_layers(self):
        model = build("llama-gqa")
        model.model.layers = torch.nn.ModuleList(layer.self_attn for layer in model.model.layers)
        with pytest.raises(UnsupportedError, match=r"layers \[0, 2\] of LlamaModel .*leave 'massive' out of stats"):
            steerlens.capture(model, stats=["massive"], heads="0:1;2:*")

    def test_hidden_states_of_another_shape(self, model_of, prompts):
        model, (ids, _) = model_of("llama-gqa"), prompts()
        handle = model.model.layers[1].register_forward_hook(lambda m, a, output: output[None])
        try:
            with (
                steerlens.capture(model, stats=["massive"]),
                pytest.raises(UnsupportedError, match=r"layer 1 .*\[1, 3, 20, 64\]"),
            ):
                model(ids)
        finally:
            handle.remove()


class TestMaps:
    """Whole rows of weights of a few heads."""

    HEADS = {0: [6, 1], 2: "*"}
    STEERED = (ZeroTuning(5.0), ACT(0.2, 0.08), HeadMask({2: [3]}))

    @pytest.mark.parametrize(
        ("backend", "side", "methods"),
        [
            ("reference", "left", ()),
            ("reference", "right", STEERED),
            ("sdpa", "left", STEERED),
            ("sdpa", "right", ()),
            ("triton", "left", STEERED),
            ("triton", "right", ()),
        ],
        ids=lambda value: value if isinstance(value, str) else "steered" if value else "plain",
    )
    def test_maps_are_the_weights_finally_used(self, side, methods, backend, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa", "eager"), prompts(side)
        neutral = ZeroTuning(1 + 1e-7, heads={0: [0]})  # so that there is a context that names the backend
        methods = [neutral, *methods]
        with torch.no_grad(), steerlens.steer(model, methods, backend="reference"):
            weights = model(ids, attention_mask=mask, output_attentions=True).attentions
        capture = steerlens.capture(model, stats=(), heads={}, maps=self.HEADS)
        with torch.no_grad(), steerlens.steer(model, methods, backend=backend), capture as record:
            model(ids, attention_mask=mask)
        assert record.layers == (0, 2) and record[0].heads == () and record[0].mass is None
        assert (record[0].map_heads, record[2].map_heads) == ((1, 6), tuple(range(8)))
        pads = ~mask.bool()
        hidden = (pads[:, :, None] | pads[:, None, :])[:, None]
        for layer in (0, 2):
            got = record[layer].map
            assert got.dtype == torch.float32 and record[layer].map_rows == tuple(range(20))
            assert torch.equal(got.isnan(), hidden.expand_as(got))
            expected = weights[layer][:, list(record[layer].map_heads)]
            assert torch.where(hidden, 0, got - expected).abs().max() < 1e-5
            # every real row sums to 1, but where its head's output was set to zero or a mean, which sums to 1 as well
            assert (got.nansum(-1) - 1)[~pads[:, None].expand(got.shape[:3])].abs().max() < 1e-5

    @pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
    def test_generated_rows_are_appended_and_columns_grow(self, backend, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa"), prompts("left", (18, 11))
        whole = torch.nn.functional.pad(mask, (0, 2), value=1)
        steered = steerlens.steer(model, ZeroTuning(3.0), backend=backend)
        records = {
            rows: steerlens.capture(model, stats=["lse"], heads={1: [0]}, maps={1: [2, 5]}, map_rows=rows)
            for rows in ("all", "last", (3, 17, 18))
        }
        with torch.no_grad(), steered:
            for record in records.values():
                with record:
                    out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
            with steerlens.capture(model, stats=(), maps={1: [2, 5]}) as once:
                model(out[:, :-1], attention_mask=whole)
        every, expected = records["all"][1].map, once[1].map
        assert every.shape == (2, 2, 20, 20) and torch.equal(every.isnan(), expected.isnan())
        assert every[0].triu(1).eq(0).all() and every[1, :, 7:, 7:].triu(1).eq(0).all()
        assert (every - expected).nan_to_num().abs().max() < 1e-5
        assert records["all"][1].lse.shape == (2, 1, 20)
        for rows, columns in (("last", (17, 18, 19)), ((3, 17, 18), (3, 17, 18))):
            some = records[rows][1]
            assert some.map_rows == columns and (some.map.shape[2] == 3 and some.map.shape[3] == 20 - (rows != "last"))
            apart = some.map - every[:, :, list(columns), : some.map.shape[3]]
            assert apart.nan_to_num().abs().max() < 1e-6

    def test_columns_that_a_sliding_cache_let_go(self, model_of, prompts):
        model, (ids, mask) = model_of("mistral"), prompts("left")
        with torch.no_grad(), steerlens.capture(model, stats=(), maps={0: [0]}) as record:
            out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        with torch.no_grad(), steerlens.capture(model, stats=(), maps={0: [0]}) as once:
            model(out[:, :-1], attention_mask=torch.nn.functional.pad(mask, (0, 3), value=1))
        got, expected = record[0].map, once[0].map
        assert torch.equal(got.isnan(), expected.isnan()) and (got - expected).nan_to_num().abs().max() < 1e-5
        assert got[0, 0, 22, :11].eq(0).all()

    def test_a_map_beyond_its_limit_is_refused_before_it_is_made(self, model_of, prompts, monkeypatch):
        model, (ids, _) = model_of("llama-gqa"), prompts()
        size = 4 * 3 * 10 * 20 * 20  # batch 3, 10 heads
        with torch.no_grad(), steerlens.capture(model, maps=self.HEADS, map_limit=size) as record:
            cache = model(ids).past_key_values
            with pytest.raises(UnsupportedError, match=r"10 heads in 2 layers would take 51\.68 KiB at 21 columns"):
                model(ids[:, :1], past_key_values=cache)
        assert record[2].map.shape == (3, 8, 20, 20)
        monkeypatch.setattr(steerlens.recording.Record, "observe", None)
        with (
            steerlens.capture(model, maps=self.HEADS, map_limit=size - 1),
            pytest.raises(UnsupportedError, match=r"map_limit is 46\.87 KiB.*fewer heads.*map_rows='last'"),
        ):
            model(ids)

    def test_32k_columns_are_refused_by_default(self, model_of):
        model = model_of("llama-gqa")
        with steerlens.capture(model, maps="all"), pytest.raises(UnsupportedError, match="would take 96 GiB at 32768"):
            model(torch.ones(1, 32768, dtype=torch.long))

    @pytest.mark.parametrize("rows", ["first", [], [-1], [1.5], [True]])
    def test_rows_that_are_none(self, rows, model_of):
        with pytest.raises(ValueError, match=r"map_rows=.*allowed: 'all', 'last'"):
            steerlens.capture(model_of("llama-gqa"), maps="all", map_rows=rows)
