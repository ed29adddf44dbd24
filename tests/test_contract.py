"""What steerlens takes for granted of transformers. After an upgrade, what broke first fails here, by name."""

import inspect
import weakref

import pytest
import torch
from small_models import FAMILIES, build
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerlens import caches, decoder, engine, follow
from steerlens.engine import steered_attention

NAME = "steerlens_contract"


@pytest.fixture
def calls(monkeypatch):
    """Routes every attention layer to native SDPA or eager, and notes what it was given."""
    seen = []

    def attach(model, mask="sdpa"):
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[mask])
        model.config._attn_implementation_internal = NAME
        return seen

    def note(module, query, key, value, attention_mask, **kwargs):
        seen.append((query, key, value, attention_mask, kwargs))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(NAME, note)
    return attach


@torch.no_grad()
def run(model, length=8, pads=0, **more):
    ids = torch.arange(5, 5 + length)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    return model(ids, attention_mask=mask, **more)


def test_attention_and_mask_functions_are_registered_by_name():
    assert ALL_ATTENTION_FUNCTIONS.get_interface("steerlens", None) is steered_attention
    assert "steerlens" in ALL_MASK_ATTENTION_FUNCTIONS
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", run) is run


def test_each_attention_module_reads_the_name_from_its_own_config(calls):
    import copy

    model = build("llama-gqa")
    seen = calls(build("llama-gqa"))
    layer = model.model.layers[1].self_attn
    layer.config = copy.copy(layer.config)
    layer.config._attn_implementation_internal = NAME
    run(model)
    assert len(seen) == 1 and model.config._attn_implementation == "sdpa"


def test_attention_functions_are_given_unrepeated_keys_positionally(calls):
    model = build("llama-gqa")
    seen = calls(model)
    run(model)
    query, key, value, _, kwargs = seen[0]
    assert len(seen) == 3
    assert query.shape == (2, 8, 8, 8) and key.shape == value.shape == (2, 2, 8, 8)
    assert kwargs["scaling"] == pytest.approx(8**-0.5) and kwargs["dropout"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_functions_are_given_no_argument_that_is_not_understood(family, calls):
    """A new one must be understood before it is let through: it may change what attention means."""
    model = build(family, "eager")
    seen = calls(model, "eager")
    run(model)
    known = engine._UNDERSTOOD | {"dropout", "scaling"}
    assert {name for call in seen for name, value in call[4].items() if value is not None} <= known


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_modules_are_recognised_by_their_source(family):
    facts, modules = decoder.read(decoder.find(build(family, "eager")))
    assert sorted(modules) == list(facts.attention_layers) and len(modules) == 3


@pytest.mark.parametrize(
    ("kind", "pads", "expected"),
    [
        ("sdpa", 0, None),
        ("sdpa", 3, (torch.bool, (2, 1, 8, 8))),
        ("eager", 0, (torch.float32, (2, 1, 8, 8))),
        ("eager", 3, (torch.float32, (2, 1, 8, 8))),
        ("flash_attention_2", 0, None),
        ("flash_attention_2", 3, (torch.bool, (2, 8))),
    ],
)
def test_masks_come_in_the_native_form(kind, pads, expected, calls):
    model = build("llama-gqa")
    seen = calls(model, kind)
    run(model, pads=pads)
    mask = seen[0][3]
    assert (None if mask is None else (mask.dtype, tuple(mask.shape))) == expected
    if mask is not None and mask.ndim == 4:
        hidden = ~mask if mask.dtype == torch.bool else mask == torch.finfo(mask.dtype).min
        assert hidden[0, 0].equal(~torch.ones(8, 8, dtype=torch.bool).tril())
        assert not hidden[1, 0, 5, pads:6].any() and hidden[1, 0, 5, :pads].all() and hidden[1, 0, 5, 6:].all()


class TestCaches:
    def test_its_name_as_an_argument_and_in_the_output(self):
        model = build("llama-gqa")
        assert caches.NAME in inspect.signature(type(model.model).forward).parameters
        output = run(model)
        assert isinstance(caches.find(output), DynamicCache) and caches.NAME in output

    @pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_sizes_are_announced_before_the_update(self, family, kind, calls):
        """(length, first column) of a layer's key axis, and the columns seen so far."""
        model = build(family)
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
        seen, total = calls(model), 0
        for length in (20, 1, 4, 1):
            announced = cache.get_mask_sizes(length, 0)
            assert int(cache.get_seq_length()) == total
            run(model, length, **{caches.NAME: cache})
            total += length
            assert seen[-1][1].shape[2] == announced[0]
            window = 12 if family == "mistral" else total
            if kind == "dynamic":
                assert announced == (min(total, window + length - 1), max(total - window - length + 1, 0))

    def test_state_can_hang_on_one_cache(self):
        cache = DynamicCache()
        assert weakref.ref(cache)() is cache and cache.__dict__ is not None
        assert weakref.WeakKeyDictionary({cache: 1})[cache] == 1
        assert all(hasattr(Cache, name) for name in follow.MOVES)


def test_the_decoder_and_the_text_config():
    model = build("llama-gqa")
    assert model.get_decoder() is model.model is model.base_model
    assert model.config.get_text_config(decoder=True) is model.config
    opt = build("opt")
    assert opt.get_decoder() is opt.model.decoder


class TestGenerate:
    def test_its_signature(self):
        parameters = inspect.signature(type(build("llama-gqa")).generate).parameters
        assert list(parameters)[:3] == ["self", "inputs", "generation_config"]

    @pytest.mark.parametrize(
        ("options", "widths"),
        [
            ({}, [8, 1, 1]),
            ({"use_cache": False}, [8, 9, 10]),
            ({"prefill_chunk_size": 3}, [3, 3, 2, 1, 1]),
            ({"num_beams": 2}, [8, 1, 1]),
        ],
    )
    def test_the_forwards_inside(self, options, widths):
        """The prompt comes first, whole or in chunks, then one column a step; the decoder is given all by name."""
        model, seen = build("llama-gqa"), []
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs["input_ids"].shape)), with_kwargs=True
        )
        model.generate(torch.arange(5, 13)[None], max_new_tokens=3, do_sample=False, **options)
        hook.remove()
        assert [shape[1] for _, shape in seen] == widths and not any(args for args, _ in seen)
        assert {shape[0] for _, shape in seen} == {options.get("num_beams", 1)}


def test_positions_that_start_again_are_packed_sequences(calls):
    """Without a mask and a cache, and not otherwise."""
    model = build("llama-gqa")
    seen, ids = calls(model), torch.arange(5, 13)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
        assert not seen[-1][3][0, 0, 5, :4].any()
        model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
        assert seen[-1][3] is None


def test_implementations_are_set_by_a_name_in_the_config():
    model = build("llama-gqa")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager" == model.config._attn_implementation_internal
    with pytest.raises(ValueError, match="softmax_of_nothing"):
        model.set_attn_implementation("softmax_of_nothing")
