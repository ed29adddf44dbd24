"""Families beyond those of the grid: the self-check, refusals by name, hybrids, vision-language models."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from small_models import build
from steerlens.evals.families import tiny
from test_invariants import apart
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import steerlens
from steerlens import caches, decoder, facts, selfcheck
from steerlens.errors import HeadError, RecipeError, UnsupportedError
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning

STRONG = ZeroTuning(9.0)


@pytest.fixture
def fresh(monkeypatch):
    """A self-check that has not passed anything yet."""
    monkeypatch.setattr(selfcheck, "_passed", set())


@pytest.mark.parametrize(
    ("family", "why"),
    [
        *[(f, "interface") for f in ("bloom", "mpt", "xglm", "falcon", "gptj", "gpt_neo", "codegen")],
        *[(f, "no attention") for f in ("mamba", "mamba2", "falcon_mamba", "rwkv")],
        *[(f, "sparse") for f in ("deepseek_v32", "glm_moe_dsa") if f in CONFIG_MAPPING],
        ("xlnet", "interface"),
    ],
)
def test_refused_by_name(family, why):
    with pytest.raises(UnsupportedError, match=rf"model family '{family}'.*{why}.*another family: llama, qwen2"):
        steerlens.steer(tiny(family), STRONG)


STACK = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2,
}  # fmt: skip
ENCODER_DECODERS = {
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 2},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    "t5gemma": {"encoder": STACK, "decoder": STACK},
}


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders_are_refused(family):
    config = AutoConfig.for_model(family, vocab_size=99, **ENCODER_DECODERS[family])
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UnsupportedError, match=rf"{family} with cross-attention.*decoder-only"):
        steerlens.steer(model, STRONG)


def test_bidirectional_attention_is_refused():
    with pytest.raises(UnsupportedError, match="bidirectional"):
        facts.read(AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True))
    with pytest.raises(UnsupportedError, match="bidirectional"):
        facts.read(AutoConfig.for_model("llama", is_causal=False))
    with pytest.raises(UnsupportedError, match="is_causal=False"):
        steerlens.steer(tiny("bert", is_decoder=False), STRONG)


class TestSelfCheck:
    def test_runs_once_and_leaves_nothing(self, fresh):
        model = tiny("starcoder2").train()
        seen, before = [], set(model.model.__dict__)
        hook = model.model.register_forward_pre_hook(lambda *a: seen.append(1))
        for _ in range(2):
            with steerlens.steer(model, STRONG):
                pass
        hook.remove()
        assert len(seen) == 4  # a prefill and a step, natively and routed
        assert model.training and model.model.layers[0].self_attn.training and set(model.model.__dict__) == before

    def test_tested_families_skip_it(self, model_of, monkeypatch):
        monkeypatch.setattr(selfcheck, "_probe", lambda *a: pytest.fail("checked"))
        with steerlens.steer(model_of("llama-gqa"), STRONG):
            pass

    def test_runs_again_for_another_class_config_attention_or_dtype(self, fresh, monkeypatch):
        probed, own = [], type("Own", (type(tiny("starcoder2").model),), {})

        def other():
            model = tiny("starcoder2")
            model.model.__class__ = own
            return model

        monkeypatch.setattr(selfcheck, "_probe", lambda *a: probed.append(1))
        for make in (
            lambda: tiny("starcoder2"),
            lambda: tiny("starcoder2", native="eager"),
            lambda: tiny("starcoder2", rope_theta=7.0),
            lambda: tiny("starcoder2").to(torch.bfloat16),
            other,
        ):
            for _ in range(2):
                with steerlens.steer(make(), STRONG):
                    pass
        assert len(probed) == 5

    def test_the_probe_is_padded_and_takes_a_step(self, monkeypatch):
        model, masks = tiny("starcoder2").model, []
        hook = model.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True)
        with torch.no_grad():
            prefill, step = selfcheck._forwards(model, torch.device("cpu"))
        hook.remove()
        pads, width = selfcheck.PADS, selfcheck.COLUMNS
        assert [mask.sum(1).tolist() for mask in masks] == [[width, width - pads], [width + 1, width + 1 - pads]]
        assert step.shape[1] == 1 and not prefill[1, :pads].any() and prefill[1, pads:].any(-1).all()
        monkeypatch.setattr(caches, "find", lambda output: None)  # a family without a cache
        assert len(selfcheck._forwards(model, torch.device("cpu"))) == 1

    @pytest.mark.parametrize("call", [0, 1], ids=["prefill", "step"])
    def test_a_value_that_is_no_number(self, fresh, monkeypatch, call):
        """In the first attention call of layer 0 or in its second."""
        from steerlens import backends

        own, calls = backends.attention, []

        def broken(name, given):
            calls.append(1)
            return own(name, given) * (torch.nan if len(calls) == 1 + 3 * call else 1)

        monkeypatch.setattr(backends, "attention", broken)
        with (
            pytest.raises(UnsupportedError, match=r"self-check.*layer 0: nan"),
            steerlens.steer(tiny("starcoder2"), STRONG),
        ):
            pass

    def test_a_model_that_answers_otherwise_when_it_is_steered(self, fresh, monkeypatch):
        model = tiny("starcoder2")
        own, count = model.model.norm.forward, []
        model.model.norm.forward = lambda x: own(x) * (1.0 if count.append(1) or len(count) < 4 else torch.nan)
        with pytest.raises(UnsupportedError, match=r"self-check.*its output"), steerlens.steer(model, STRONG):
            pass

    @pytest.mark.parametrize("what", ["steer", "capture"])
    def test_attention_that_is_not_what_it_seems(self, fresh, monkeypatch, what):
        """A family whose native attention does more than softmax(qk)v."""
        import transformers.models.starcoder2.modeling_starcoder2 as modeling

        own = modeling.eager_attention_forward

        def more(*args, **kwargs):
            output, weights = own(*args, **kwargs)
            return output * 1.001, weights

        monkeypatch.setattr(modeling, "eager_attention_forward", more)
        model = tiny("starcoder2", native="eager")
        context = steerlens.steer(model, STRONG) if what == "steer" else steerlens.capture(model)
        with pytest.raises(UnsupportedError, match=r"'starcoder2' fails the self-check.*layer 0: 1.0e-03"), context:
            pass
        assert model.model.layers[0].self_attn.config is model.config and "_steerlens_engine" not in vars(model.model)
        monkeypatch.setattr(modeling, "eager_attention_forward", own)
        with steerlens.steer(model, STRONG):
            pass

    def test_a_layer_that_never_reaches_the_interface(self, fresh):
        model = tiny("starcoder2")
        model.model.layers[1].self_attn.forward = lambda hidden_states, **kw: (hidden_states, None)
        with pytest.raises(UnsupportedError, match=r"self-check.*layers \[1\]"), steerlens.steer(model, STRONG):
            pass

    def test_a_model_that_cannot_run_the_probe(self, fresh):
        model = tiny("starcoder2")
        model.model.layers[1].forward = lambda *a, **kw: 1 / 0
        with pytest.raises(UnsupportedError, match="ZeroDivisionError"), steerlens.steer(model, STRONG):
            pass

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bit(self, fresh, dtype, monkeypatch):
        model = tiny("starcoder2").to(dtype)
        with steerlens.steer(model, STRONG):
            pass
        import transformers.models.starcoder2.modeling_starcoder2 as modeling

        own = modeling.eager_attention_forward
        monkeypatch.setattr(
            modeling, "eager_attention_forward", lambda m, q, k, v, a, **kw: own(m, q, k, v, None, **kw)
        )
        with (
            pytest.raises(UnsupportedError, match="self-check"),
            steerlens.steer(tiny("starcoder2", native="eager").to(dtype), STRONG),
        ):
            pass

    def test_a_context_shorter_than_the_probe(self, fresh):
        with steerlens.steer(tiny("gpt_bigcode", n_positions=16), STRONG):
            pass

    def test_a_model_without_weights(self, fresh):
        with torch.device("meta"):
            model = tiny("starcoder2")
        with pytest.raises(UnsupportedError, match="self-check"), steerlens.steer(model, STRONG):
            pass


class TestHybrids:
    def test_layers_without_attention_say_so(self, model_of):
        model = model_of("qwen3_next")
        with pytest.raises(HeadError, match=r"layer 0 of qwen3_next has no attention \(linear_attention\).*1, 2, 3"):
            steerlens.steer(model, ZeroTuning(2.0, heads={0: [1]}))
        for heads in ("all", "*:3", "*:*"):
            assert list(steerlens.steer(model, ZeroTuning(2.0, heads=heads)).plan) == [1, 2, 3]
        known = steerlens.steer(model, STRONG)._engine.facts
        assert (known.heads, known.kv_heads) == ((0, 8, 8, 8), (0, 2, 2, 2))

    def test_recipes_count_the_heads_of_attention_layers(self, model_of):
        recipe = steerlens.load_recipe("pasta-tiny")
        known = steerlens.steer(model_of("qwen3_next"), STRONG)._engine.facts
        made = recipe.model_copy(update={"model": recipe.model.model_copy(update={"layers": 4, "heads": 8})})
        with pytest.raises(RecipeError, match=r"layer|heads"):
            recipe.check(known)
        made.model_copy(update={"methods": [STRONG]}).check(known)

    def test_layers_share_the_keys_of_the_last_layer_of_their_kind(self):
        kinds = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding", "full")]
        config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)
        assert facts.read(config).keys_of == {4: 2, 5: 3}

    def test_heads_per_layer(self):
        model = tiny("laguna")
        with steerlens.steer(model, STRONG) as steered:
            assert steered._engine.facts.heads == (8, 4, 8)
            with pytest.raises(HeadError, match=r"head 5 of layer 1.*0\.\.3"):
                steerlens.steer(model, ZeroTuning(2.0, heads={1: [5]}))

    def test_the_same_heads_of_layers_that_have_more_and_fewer(self, prompts):
        model, (ids, mask) = tiny("laguna"), prompts("left")
        for method in (STRONG, HeadMask("all")):
            found = []
            for heads in ("*:0,1", "1:0,1"):  # layer 1 has fewer than the others
                for backend in ("auto", "reference"):
                    with (
                        torch.no_grad(),
                        steerlens.steer(model, dataclasses.replace(method, heads=heads), backend=backend),
                    ):
                        found.append(model(ids, attention_mask=mask).logits[mask.bool()])
            assert apart(found[0], found[1]) < 1e-5 and apart(found[2], found[3]) < 1e-5
            assert apart(found[0], found[2]) > 1e-3


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize(
    "method",
    [STRONG, HeadMask("all"), HeadMask("all", phase="decode"), ACT(0.3, 0.08, heads={0: "*", 1: "*"})],
    ids=lambda m: m.name,
)
def test_layers_that_share_keys(family, method, prompts):
    """Their cache holds nothing, and generate gives them the last row alone."""
    model, (ids, mask) = tiny(family), prompts("left")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for backend, more in (("auto", {}), ("reference", {}), ("auto", {"use_cache": False})):
        with steerlens.steer(model, method, backend=backend):
            found.append(torch.stack(model.generate(ids, attention_mask=mask, **options, **more).logits))
    plain = torch.stack(model.generate(ids, attention_mask=mask, **options).logits)
    assert apart(found[1], found[0]) < 1e-4 and apart(found[2], found[0]) < 1e-4 and apart(plain, found[0]) > 1e-3


def test_act_cannot_find_sinks_in_rows_that_are_not_computed(prompts):
    model, (ids, mask) = tiny("gemma4_text"), prompts("left")
    if not hasattr(model.model, "_maybe_slice_kv_shared_inputs"):
        pytest.skip(f"transformers {transformers.__version__} computes every row of gemma4's layers that share keys")
    with steerlens.steer(model, ACT(0.3, 0.08)), pytest.raises(UnsupportedError, match="whole prompt"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_a_layer_that_attends_twice(prompts):
    """diffllama's weights serve two halves of its values: one record of them, and sinks taken out of each half."""
    model, (ids, mask) = tiny("diffllama"), prompts("left")
    if not decoder.uses_interface(type(model.model.layers[0].self_attn)):
        pytest.skip("older transformers compute diffllama's attention in code of its own")
    longer, found = torch.nn.functional.pad(mask, (0, 1), value=1), []
    for backend in ("auto", "reference"):
        with torch.no_grad(), steerlens.steer(model, ACT(0.3, 0.08), backend=backend), steerlens.capture(model) as seen:
            first = model(ids, attention_mask=mask)
            again = {caches.NAME: caches.find(first)}
            found.append(model(ids[:, :1], attention_mask=longer, **again).logits)
        assert seen[0].entropy.shape == (3, 8, 21)
    assert apart(*found) < 1e-5


def test_a_layer_that_attends_twice_on_a_static_cache(prompts):
    """diffllama: the unwritten slots are cut off both times."""
    model, (ids, mask) = tiny("diffllama"), prompts("left")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for more in ({}, {"cache_implementation": "static"}):
        with steerlens.steer(model, [STRONG, ACT(0.0, 0.05)]):
            found.append(torch.stack(model.generate(ids, attention_mask=mask, **options, **more).logits))
    assert apart(*found) < 1e-4


class TestPackedSequences:
    def test_refused(self, model_of):
        model, ids = model_of("llama-gqa"), torch.arange(5, 17)[None]
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
        with steerlens.steer(model, STRONG):
            with pytest.raises(UnsupportedError, match="packed into one row"):
                model(ids, position_ids=positions, use_cache=False)
            model(ids, position_ids=torch.arange(12)[None], use_cache=False)
            model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
            model(ids, position_ids=positions, past_key_values=DynamicCache())


@pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("method", [STRONG, PASTA(0.05), ACT(0.3, 0.08), HeadMask({0: "*"})], ids=lambda m: m.name)
def test_a_native_kernel_that_takes_padding_in_two_dimensions(family, side, method, model_of, prompts):
    """As flash attention does: its mask is [B, columns] or None, the window an argument."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    from steerlens.masks import from_columns

    def native(module, query, key, value, mask, *, sliding_window=None, **kwargs):
        offset = key.shape[2] - query.shape[2]
        real = None if mask is None else mask[:, -key.shape[2] :].bool()
        visible = from_columns(query, key.shape[2], offset, real, sliding_window)
        return sdpa_attention_forward(module, query, key, value, visible, **kwargs)

    AttentionInterface.register("two_dimensions", native)
    AttentionMaskInterface.register("two_dimensions", flash_attention_mask)
    spans = {"left": [[(9, 12)], [(10, 13)], [(8, 11)]]}.get(side, [[(4, 7)], [(4, 6)], [(8, 11)]])
    ids, mask = prompts(side) if side else prompts(lengths=(13,) * 3)  # one more than the window
    found = []
    for name in ("two_dimensions", "sdpa"):
        model = build(family, name)
        with torch.no_grad(), steerlens.steer(model, method, spans):
            first = model(ids, attention_mask=mask)
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = model(ids[:, :1], attention_mask=longer, past_key_values=first.past_key_values)
        found.append(torch.cat([first.logits[mask.bool()], step.logits[:, 0]]))
    assert apart(*found) < 1e-5


@pytest.fixture(scope="module")
def llava():
    return tiny("llava")


@pytest.fixture(scope="module")
def inputs(llava):
    image, vision = llava.config.image_token_id, llava.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[5, *[image] * count, 30, 31, 32, 33, 34], [6, *[image] * count, 40, 41, 42, 43, 44]])
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class TestVisionLanguage:
    """The text tower alone is steered; image tokens are columns like others."""

    def test_the_text_tower_is_steered(self, llava, inputs):
        tower = [module for name, module in llava.named_modules() if "vision" in name and hasattr(module, "config")]
        before = [module.config for module in tower]
        with torch.no_grad():
            base, found = llava(**inputs).logits, []
            for backend in ("auto", "reference"):
                with steerlens.steer(llava, STRONG, backend=backend) as steered:
                    assert [module.config for module in tower] == before
                    found.append(llava(**inputs).logits)
            assert list(steered.report()) == list(range(llava.config.text_config.num_hidden_layers))
            assert apart(found[1], found[0]) < 1e-5 and apart(base, found[0]) > 1e-3
            assert torch.equal(llava(**inputs).logits, base)

    def test_generate_and_spans_on_image_tokens(self, llava, inputs):
        """All but the emphasised columns scaled by alpha, image tokens as any other."""
        spans = [[(1, 3)], [(2, 4)]]
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with steerlens.steer(llava, PASTA(0.05), spans):
            got = torch.stack(llava.generate(**inputs, **options).logits)
        embeds = llava.model.get_input_embeddings()(inputs["input_ids"])
        features = llava.get_image_features(pixel_values=inputs["pixel_values"])
        features = features if isinstance(features, torch.Tensor | list | tuple) else features.pooler_output
        images = torch.cat(list(features)).reshape(-1, embeds.shape[-1])
        embeds[inputs["input_ids"] == llava.config.image_token_id] = images
        with steerlens.steer(llava, PASTA(0.05), spans):
            alone = llava.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
        assert apart(torch.stack(alone.logits), got) < 1e-5
        with steerlens.steer(llava, PASTA(0.05), [[(30, 33)], [(2, 4)]]), pytest.raises(steerlens.errors.SpanError):
            llava.generate(**inputs, **options)

    def test_bidirectional_image_blocks_are_honoured(self):
        """gemma3's image tokens see each other: such a mask is not taken for plain causal padding."""
        model = build("gemma3", num_hidden_layers=2, layer_types=["full_attention"] * 2)
        visible = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        visible[:, :, 4:9, 4:9] = True
        ids = torch.arange(10, 34)[None]
        inputs = {"input_ids": ids, "attention_mask": {"full_attention": visible, "sliding_attention": visible}}
        with torch.no_grad():
            found = []
            for backend in ("auto", "reference"):
                with steerlens.steer(model, ACT(0.3, 0.08), backend=backend):
                    found.append(model(**inputs).logits)
            with steerlens.steer(model, ACT(0.3, 0.08)):
                causal = model(ids).logits
        assert apart(found[1], found[0]) < 1e-5 and apart(causal, found[0]) > 1e-3


def test_dv_wider_than_d():
    """Values wider than the queries, as some latent attentions have them."""
    from steerlens import backends
    from steerlens.backends.call import Call
    from steerlens.facts import ModelFacts
    from steerlens.lower import Placed, lower
    from steerlens.passes import Pass, Prompt

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 24)
    for method in (STRONG, ACT(0.2, 0.05), HeadMask("all")):
        found = []
        for backend in ("sdpa", "reference"):
            now = Pass(Prompt.start(40, None, 2, q.device), 0, 40, None, True, {0: (40, 0)})
            call = Call(3 * q, k, v, None, 8**-0.5, None, 0, None, True)
            edits = method.plan(ModelFacts("x", "llama", 1, (8,), (2,)), None)[0]
            call.edits = lower([Placed(e, None, i, None) for i, e in enumerate(edits)], now, 0, 8)
            found.append(backends.attention(backend, call))
        assert found[0].shape == (2, 8, 40, 24) and apart(*found) < 1e-5


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 2, 8)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize(("rows", "offset"), [(24, 0), (8, 0), (8, 5), (20, 5), (1, 9)])
def test_calls_without_a_mask(rows, offset, pads, sinks):
    """As a native kernel that takes padding in two dimensions has them."""
    from steerlens import backends
    from steerlens.backends.call import Bias, Call, Cut, KeepMass

    torch.manual_seed(0)
    length = rows + offset
    q, k, v = torch.randn(2, 8, rows, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, :pads] = False
    keys = torch.zeros(2, length, dtype=torch.bool)
    keys[:, [4, 6]] = True
    seen = torch.arange(rows) + offset >= real.long().argmax(1)[:, None]
    moves = Bias(torch.randn(1, 8, 1), keys), KeepMass([1, 2, 6], 0.2, lambda _: keys[:, None].expand(-1, 3, -1), None)
    cut = Cut((torch.arange(8) == 3)[None, :, None], True)
    for edits in ([moves[0]], [moves[0], cut], [moves[1]], [*reversed(moves), cut]):
        found = []
        for backend in ("sdpa", "reference"):
            call = Call(3 * q, k, v, None, 8**-0.5, None, offset, real if pads else None, True, edits)
            call.sinks = sinks
            if rows == 1 and pads:
                call.mask = real[:, None, None]
            found.append(backends.attention(backend, call).transpose(1, 2)[seen])
        assert apart(*found) < 1e-5


def test_the_list_of_tested_families_is_the_grid():
    from small_models import FAMILIES

    assert {model_type for model_type, _ in FAMILIES.values()} == set(facts.TESTED)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert all(f"`{family}`" in readme for family in facts.TESTED)
