"""Positional hidden-state scaling (methods/context.md §4)."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import steerlens
from steerlens import caches
from steerlens.errors import MethodError, UnsupportedError
from steerlens.fitting import channels
from steerlens.measures.base import MeasureError
from steerlens.methods import PASTA, HeadMask, PerRow
from steerlens.methods.positional_scaling import PositionalScaling

STRONG = PositionalScaling(5, -4.0, 1, 2)
H = [[1, 2, 0, 1], [0, 1, 1, 0], [1, 0.5, 0, 2]]


@pytest.fixture(scope="module")
def bare():
    """One layer that is nothing but attention on the rows of H, without positions."""
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[:3] = torch.tensor(H)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).weight.copy_(torch.eye(4))
    layer.input_layernorm = torch.nn.Identity()
    model.model.rotary_emb.forward = lambda x, position_ids: (
        torch.ones(1, x.shape[1], 4),
        torch.zeros(1, x.shape[1], 4),
    )
    return model


@torch.no_grad()
def last_row(model, factor):
    found = []
    module = model.model.layers[0].self_attn
    hook = module.register_forward_hook(lambda m, args, output: found.append(output[0][0]))
    with steerlens.steer(model, PositionalScaling(1, factor, 0, 0)):
        model(torch.tensor([[0, 1, 2]]))
    hook.remove()
    return found[-1]


def test_oracle(bare):
    module = copy.deepcopy(bare)
    with torch.no_grad():
        module.model.layers[0].self_attn.q_proj.weight[3, 1] = 0.25
        module.model.layers[0].self_attn.k_proj.weight[0, 1] = 0.5
        module.model.layers[0].self_attn.k_proj.weight[2, 1] = -1
    value = torch.tensor(H, dtype=torch.float32)
    native = last_row(module, 1)
    for factor, weights in {
        1: (0.400967, 0.050977, 0.548056),
        0.5: (0.303371, 0.054391, 0.642237),
        0: (0.253716, 0.056612, 0.689672),
        -1: (0.263775, 0.062652, 0.673573),
    }.items():
        rows = last_row(module, factor)
        assert (rows[-1] - torch.tensor(weights) @ value).abs().max() < 3e-6
        assert torch.equal(rows[:-1], native[:-1])


def test_minus_one_is_neutral_where_channels_do_not_mix(bare):
    assert (last_row(bare, -1) - last_row(bare, 1)).abs().max() < 1e-6
    assert (last_row(bare, 0) - last_row(bare, 1)).abs().max() > 1e-3


@torch.no_grad()
def by_hand(model, method, ids):
    """Logits of one prompt's rows from the layers' parts, with scaled columns in a copy's projections."""
    base, scaled = model.model, copy.deepcopy(model.model)
    for layer in scaled.layers[method.first_layer : method.last_layer + 1]:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight[:, method.channel] *= method.factor
    hidden, width = base.embed_tokens(ids), ids.shape[1]
    turned = base.rotary_emb(hidden, position_ids=torch.arange(width)[None])
    mask = torch.full((width, width), -torch.inf).triu(1)[None, None]
    for one, other in zip(base.layers, scaled.layers, strict=True):
        x = one.input_layernorm(hidden)
        rows = [layer.self_attn(x, position_embeddings=turned, attention_mask=mask)[0] for layer in (one, other)]
        hidden = hidden + torch.cat([rows[0][:, :-1], rows[1][:, -1:]], 1)
        hidden = hidden + one.mlp(one.post_attention_layernorm(hidden))
    return model.lm_head(base.norm(hidden))


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "qwen2", "qwen3"])
@pytest.mark.parametrize("native", ["sdpa", "eager"])
def test_by_hand(model_of, row, family, native):
    model = model_of(family, native)
    with torch.no_grad(), steerlens.steer(model, STRONG) as steered:
        logits = model(row).logits
    expected = by_hand(model, STRONG, row)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits - model(row).logits).abs().max() > 1e-2 * expected.abs().max()
    assert steered.report() == {1: {"calls": 1, "rows": 20}, 2: {"calls": 1, "rows": 20}}
    assert "forward" not in model.model.layers[1].self_attn.__dict__
    assert not model.model.layers[1].self_attn.q_proj._forward_pre_hooks


@pytest.mark.parametrize("methods", [[STRONG], [PASTA(0.05), STRONG, HeadMask("1:3", phase="decode")]])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma2", "gpt_oss", "olmo2", "opt"])
def test_cached_decoding_is_recomputation(model_of, prompts, family, methods):
    model = model_of(family, "eager")
    ids, mask = prompts("left")
    spans = [[(9, 12)]] * 3
    with torch.no_grad(), steerlens.steer(model, methods, spans):
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    whole = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], 1)
    given = {"input_ids": out.sequences[:, :-1], "attention_mask": whole, "use_cache": False}
    if family != "opt":
        given["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), steerlens.steer(model, methods, spans, prompt_lengths=mask.sum(1).tolist()):
        logits = model(**given).logits[:, -5:]
    steps = torch.stack(out.logits, 1)
    assert (logits - steps).abs().max() < 1e-4 * steps.abs().max()


def test_a_padded_row_is_the_row_alone_and_rows_apart(model, prompts):
    ids, mask = prompts("left")
    method = PositionalScaling(5, -4.0, 0, 2, skip_first=3)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    native = torch.stack(model.generate(ids, attention_mask=mask, **options).logits)
    with steerlens.steer(model, PerRow([method, None, method])):
        together = torch.stack(model.generate(ids, attention_mask=mask, **options).logits)
    assert (together[0, 1] - native[0, 1]).abs().max() < 1e-4
    for i, pad in ((0, 0), (2, 3)):
        with steerlens.steer(model, method):
            alone = torch.stack(model.generate(ids[i : i + 1, pad:], **options).logits)
        assert (alone[0, 0] - together[0, i]).abs().max() < 1e-4
        assert (together[0, i] - native[0, i]).abs().max() > 1e-2
    with steerlens.steer(model, PositionalScaling(5, -4.0, 0, 2, skip_first=20)):
        unscaled = torch.stack(model.generate(ids, attention_mask=mask, **{**options, "max_new_tokens": 1}).logits)
    assert (unscaled[0] - native[0]).abs().max() < 1e-4


def test_beams_move_what_the_cache_holds(model, row):
    with steerlens.steer(model, STRONG):
        one = model.generate(row, max_new_tokens=4, num_beams=2, do_sample=False)
        again = model.generate(torch.cat([row, row]), max_new_tokens=4, num_beams=2, do_sample=False)
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], one[0])


def test_neutral(model, row):
    with torch.no_grad(), steerlens.steer(model, PositionalScaling(5, 1.0, 0, 2)) as steered:
        assert not steered.plan
        assert torch.equal(model(row).logits, model(row).logits)


def test_what_cannot_be_exact_is_refused(model, model_of, row):
    with torch.no_grad():
        cache = caches.find(model(row[:, :8], use_cache=True))
    with steerlens.steer(model, STRONG), torch.no_grad():
        for tokens in (row[:, 8:9], row[:, 8:]):
            with pytest.raises(UnsupportedError, match="before this steering"):
                model(tokens, use_cache=True, **{caches.NAME: copy.deepcopy(cache)})
        with pytest.raises(UnsupportedError, match="prefill_chunk_size"):
            model.generate(row, max_new_tokens=2, prefill_chunk_size=7)
        with steerlens.capture(model), pytest.raises(UnsupportedError, match="twice"):
            model(row)
    with steerlens.steer(model, STRONG, report="mass"), pytest.raises(UnsupportedError, match="twice"):
        model(row)
    for family, message in (("gpt2", "q_proj"), ("phi3", "q_proj"), ("qwen3_next", "gate")):
        with pytest.raises(UnsupportedError, match=message), steerlens.steer(model_of(family), STRONG):
            pass
    with pytest.raises(MethodError, match=r"0\.\.2"):
        steerlens.steer(model, PositionalScaling(5, 0.0, 1, 3))
    with steerlens.steer(model, PositionalScaling(64, 0.0, 1, 2)), pytest.raises(MethodError, match=r"0\.\.63"):
        model(row)
    with pytest.raises(MethodError, match="before first_layer"):
        PositionalScaling(5, 0.0, 3, 2)
    assert "forward" not in model.model.layers[1].self_attn.__dict__


def test_channels_that_go_one_way():
    at = np.linspace(0, 1, 400)
    noise = np.random.default_rng(0).normal(0, 1, (8, 400, 6))
    means = np.cos(7 * at)[None, :, None] + 0.02 * noise
    means[:, :, 1] = at + 0.001 * noise[:, :, 1]
    means[:, :, 4] = -(at**2) + 0.02 * noise[:, :, 4]
    means[3:5, :, 2] = at + 0.001 * noise[3:5, :, 2]  # in a quarter of the layers, not in more
    found = channels.rank(means)
    assert [channel for channel, _ in found] == [1, 4]
    assert found[0][1] < found[1][1]


def test_search_on_a_model(model):
    found = channels.positional_channels(model, samples=4, length=100, top=3)
    assert 1 <= len(found) <= 3
    assert found == sorted(found, key=lambda one: one[1])
    with pytest.raises(MeasureError, match="50 are needed"):
        channels.positional_channels(model, samples=1, length=20)
