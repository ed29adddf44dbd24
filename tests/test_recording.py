"""`steerlens.capture` against weights written out in full."""

import threading

import pytest
import torch

import steerlens
from steerlens.errors import SpanError, SteeringStateError, UnsupportedError
from steerlens.methods import ACT, HeadMask, ZeroTuning
from steerlens.spans import Spans

SPANS = Spans.of({"emphasis": [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]], "query": [[(17, 20)]] * 3})


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
        steerlens.capture(model, stats=["entrop"])
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


class TestMaps:
    """Whole rows of weights of a few heads."""

    HEADS = {0: [6, 1], 2: "*"}

    @pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
    @pytest.mark.parametrize(
        "methods", [(), [ZeroTuning(5.0), ACT(0.2, 0.08), HeadMask({2: [3]})]], ids=["", "steered"]
    )
    @pytest.mark.parametrize("side", ["left", "right"])
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
