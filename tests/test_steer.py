"""What `steer` promises around the numbers: routing, restoring, composing, refusing, reporting."""

import copy
import pickle
import threading
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from small_models import build
from transformers import AutoConfig, DynamicCache, GenerationConfig, TextIteratorStreamer

import steerlens
from steerlens import caches
from steerlens.errors import (
    HeadError,
    MethodError,
    NotReachedError,
    SpanError,
    SteeringStateError,
    UnsupportedError,
)
from steerlens.methods import ACT, PASTA, DecodingMethod, HeadMask, PerRow, PromptMethod, ZeroTuning, from_dict, names

STRONG = ZeroTuning(9.0)


@torch.no_grad()
def run(model, ids, **options):
    return model(ids, **options).logits


def fingerprint(model):
    """Everything that steering may touch."""
    return (
        set(model.__dict__),
        set(model.model.__dict__),
        model.config._attn_implementation,
        [id(layer.self_attn.config) for layer in model.model.layers],
        [set(x.self_attn.__dict__) for x in model.model.layers],
        len(model.model._forward_pre_hooks),
        len(model.model._forward_hooks),
        getattr(model.generate, "__func__", model.generate),
    )


class TestRestoring:
    def test_exit_leaves_nothing(self, model, prompts):
        ids, _ = prompts()
        before, base = fingerprint(model), run(model, ids)
        with steerlens.steer(model, [STRONG, HeadMask({1: [2]})]):
            assert fingerprint(model) != before and not torch.equal(run(model, ids), base)
        assert fingerprint(model) == before and torch.equal(run(model, ids), base)

    def test_exception_inside(self, model, prompts):
        before = fingerprint(model)
        with pytest.raises(KeyboardInterrupt), steerlens.steer(model, STRONG):
            raise KeyboardInterrupt
        assert fingerprint(model) == before

    def test_exception_in_the_middle_of_a_forward(self, model, prompts):
        ids, _ = prompts()
        base, before = run(model, ids), fingerprint(model)

        def fail(*args):
            raise KeyboardInterrupt

        with steerlens.steer(model, STRONG):
            steered = run(model, ids)
            hook = model.model.layers[1].register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                model.generate(ids, max_new_tokens=3)
            hook.remove()
            assert torch.equal(run(model, ids), steered)
        assert fingerprint(model) == before and torch.equal(run(model, ids), base)

    def test_neutral_steering_routes_nothing(self, model):
        before = fingerprint(model)
        with steerlens.steer(model, [ZeroTuning(1.0), ACT(1.0)]):
            assert fingerprint(model) == before

    def test_detached_state_is_forgotten(self, model, prompts):
        """Sinks found in one stretch of steering are not those of the next, though the cache goes on."""
        ids, _ = prompts()
        steered = steerlens.steer(model, ACT(0.3, 0.08))
        with torch.no_grad(), steerlens.steer(model, HeadMask({0: [1]})):
            with steered:
                cache = model(ids).past_key_values
            with steered, pytest.raises(UnsupportedError, match="whole prompt"):
                model(ids[:, :1], past_key_values=cache)

    def test_contexts_left_in_any_order(self, model, prompts):
        ids, _ = prompts()
        base = run(model, ids)
        one, two = steerlens.steer(model, STRONG), steerlens.steer(model, HeadMask({1: "*"}))
        one.attach()
        alone = run(model, ids)
        two.attach()
        both = run(model, ids)
        one.detach()
        second = run(model, ids)
        two.detach()
        with steerlens.steer(model, HeadMask({1: "*"})):
            assert torch.equal(run(model, ids), second)
        with steerlens.steer(model, [STRONG, HeadMask({1: "*"})]):
            assert torch.equal(run(model, ids), both)
        assert not torch.equal(alone, both) and torch.equal(run(model, ids), base)

    def test_unsteered_layers_stay_native(self, model):
        with steerlens.steer(model, ZeroTuning(2.0, heads={1: [0]})):
            names = [layer.self_attn.config._attn_implementation for layer in model.model.layers]
        assert names == ["sdpa", "steerlens", "sdpa"] and model.config._attn_implementation == "sdpa"

    def test_weights_can_be_saved_while_steered(self, model, tmp_path):
        with steerlens.steer(model, STRONG):
            model.save_pretrained(tmp_path)
        assert "steerlens" not in (tmp_path / "config.json").read_text()

    def test_a_users_own_generate_stays(self, model, prompts):
        ids, _ = prompts()
        expected = model.generate(ids, max_new_tokens=3, do_sample=False)
        own = type(model).generate.__get__(model)
        model.generate = lambda *args, **kwargs: own(*args, **kwargs) + 1
        try:
            mine = model.generate
            with steerlens.steer(model, ZeroTuning(1.0001)):
                assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected + 1)
            assert model.generate is mine
        finally:
            del model.generate

    @pytest.mark.parametrize("first", [0, 1])
    def test_the_model_and_its_decoder(self, model, prompts, first):
        before = fingerprint(model)
        both = [steerlens.steer(model, STRONG), steerlens.steer(model.model, HeadMask({1: [2]}))]
        for steering in both:
            steering.attach()
        both[first].detach()
        model.generate(prompts()[0], max_new_tokens=2)
        both[1 - first].detach()
        assert fingerprint(model) == before

    @pytest.mark.parametrize("what", ["steer", "capture"])
    def test_attach_that_fails_half_way(self, model, monkeypatch, what):
        from steerlens import engine

        before, make, made = fingerprint(model), engine.Site, []

        def fail(*args):
            if made:
                raise MemoryError
            made.append(make(*args))
            return made[0]

        context = steerlens.steer(model, STRONG) if what == "steer" else steerlens.capture(model)
        monkeypatch.setattr(engine, "Site", fail)
        with pytest.raises(MemoryError), context:
            pass
        assert fingerprint(model) == before


class TestComposition:
    def test_nested_is_listed(self, model, prompts):
        ids, _ = prompts()
        spans = [[(4, 7)], [(5, 6)], [(9, 12)]]
        with steerlens.steer(model, STRONG), steerlens.steer(model, [PASTA(0.1)], spans):
            nested = run(model, ids)
        with steerlens.steer(model, [STRONG, PASTA(0.1)], spans):
            assert torch.equal(run(model, ids), nested)

    def test_static_biases_add_up(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, [ZeroTuning(2.0), ZeroTuning(3.0)]):
            twice = run(model, ids)
        with steerlens.steer(model, ZeroTuning(6.0)):
            assert (run(model, ids) - twice).abs().max() < 1e-4

    def test_ablation_wins_wherever_it_stands(self, model, prompts):
        ids, _ = prompts()
        mask = HeadMask({0: "*", 1: "*", 2: "*"}, mode="zero")
        with steerlens.steer(model, mask):
            alone = run(model, ids)
        with steerlens.steer(model, [mask, STRONG]):
            assert torch.equal(run(model, ids), alone)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_a_uniform_head_stays_uniform_wherever_it_stands(self, model, prompts, backend):
        ids, _ = prompts()
        mask = HeadMask({0: "*", 1: "*", 2: "*"})
        with steerlens.steer(model, mask, backend=backend):
            alone = run(model, ids)
        for methods in ([mask, STRONG], [STRONG, mask], [mask, ACT(0.0, 0.05)]):
            with steerlens.steer(model, methods, backend=backend):
                assert (run(model, ids) - alone).abs().max() < 1e-4

    def test_the_outer_context_comes_first(self, model, prompts):
        ids, _ = prompts()
        sinks = ACT(0.0, 0.1)
        found = []
        for methods in ([STRONG, sinks], [sinks, STRONG]):
            with steerlens.steer(model, methods):
                found.append(run(model, ids))
            with steerlens.steer(model, methods[0]), steerlens.steer(model, methods[1]):
                assert torch.equal(run(model, ids), found[-1])
        assert (found[0] - found[1]).abs().max() > 1e-2

    def test_contexts_with_spans_of_their_own(self, model, prompts):
        """Outside one span, then outside the other: what `sections="published"` does with both."""
        ids, _ = prompts()
        one, two = [[(4, 7)]] * 3, [[(9, 11)]] * 3
        with steerlens.steer(model, PASTA(0.2), one), steerlens.steer(model, PASTA(0.2), two):
            nested = run(model, ids)
        with steerlens.steer(model, PASTA(0.2, sections="published"), [[(4, 7), (9, 11)]] * 3):
            assert (run(model, ids) - nested).abs().max() < 1e-4

    def test_two_backends_on_one_model(self, model):
        with steerlens.steer(model, STRONG, backend="reference"):
            with pytest.raises(SteeringStateError, match="different backends"):
                steerlens.steer(model, STRONG, backend="sdpa").attach()
            steerlens.steer(model, STRONG, backend="auto").attach().detach()


class TestSafety:
    @pytest.mark.parametrize(
        "act",
        [
            copy.deepcopy,
            pickle.dumps,
            lambda m: copy.deepcopy(m.model.layers[0]),
            lambda m: m.set_attn_implementation("eager"),
        ],
        ids=["deepcopy", "pickle", "deepcopy-layer", "set_attn_implementation"],
    )
    def test_refused_while_steered(self, act):
        model = build("llama-gqa")  # a model that once gave hidden states keeps hooks that nothing pickles
        with steerlens.steer(model, STRONG), pytest.raises(SteeringStateError, match=r"steer\(llama, zerotuning\)"):
            act(model)
        copy.deepcopy(model)

    def test_attach_from_a_second_thread(self, model):
        caught = []

        def attach():
            try:
                steerlens.steer(model, STRONG).attach()
            except SteeringStateError as error:
                caught.append(str(error))

        with steerlens.steer(model, STRONG):
            thread = threading.Thread(target=attach)
            thread.start()
            thread.join()
        assert caught and "another thread" in caught[0]

    def test_ctrl_c_in_a_forward_frees_the_model_for_other_threads(self, model, prompts):
        ids, _ = prompts()

        def interrupt(*args):
            raise KeyboardInterrupt

        with steerlens.steer(model, STRONG):
            hook = model.model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(ids)
            hook.remove()
            outputs = []
            thread = threading.Thread(target=lambda: outputs.append(run(model, ids)))
            thread.start()
            thread.join()
            assert torch.equal(outputs[0], run(model, ids))

    def test_two_threads_at_once(self, model, prompts):
        ids, _ = prompts()
        caught = []

        def second(*args):
            def other():
                with pytest.raises(SteeringStateError, match="two threads") as error:
                    model(ids)
                caught.append(error)

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        with steerlens.steer(model, STRONG):
            hook = model.model.layers[1].register_forward_pre_hook(second)
            try:
                model(ids)
            finally:
                hook.remove()
        assert caught

    def test_generate_in_another_thread_is_steered(self, model, prompts):
        ids, _ = prompts(None, lengths=(9,))

        class Words:
            def decode(self, tokens, **kwargs):
                return " ".join(map(str, tokens)) + " "

        with steerlens.steer(model, STRONG):
            expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, 9:].tolist()
            streamer = TextIteratorStreamer(Words(), skip_prompt=True)
            options = {"max_new_tokens": 5, "do_sample": False, "streamer": streamer}
            thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
            thread.start()
            text = "".join(streamer)
            thread.join()
        assert text.split() == [str(t) for t in expected]
        assert model.generate(ids, max_new_tokens=5, do_sample=False)[0, 9:].tolist() != expected

    def test_attached_twice(self, model):
        with steerlens.steer(model, STRONG) as steered, pytest.raises(SteeringStateError, match="attached already"):
            steered.attach()

    def test_a_layer_outside_its_decoder(self, model):
        x, cos = torch.zeros(1, 4, 64), torch.zeros(1, 4, 8)
        with steerlens.steer(model, STRONG), pytest.raises(SteeringStateError, match="outside a forward"):
            model.model.layers[0].self_attn(x, position_embeddings=(cos, cos), attention_mask=None)

    def test_a_layer_after_a_forward_that_failed(self, model, prompts):
        """What the failed forward was about is not taken for the next call."""

        def fail(*args):
            raise RuntimeError("stop")

        x, cos = torch.zeros(3, 20, 64), torch.zeros(3, 20, 8)
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with steerlens.steer(model, STRONG):
            with pytest.raises(RuntimeError, match="stop"):
                model(prompts()[0])
            hook.remove()
            with pytest.raises(SteeringStateError, match="outside a forward"):
                model.model.layers[0].self_attn(x, position_embeddings=(cos, cos), attention_mask=None)

    def test_attention_that_is_not_causal_is_refused(self, model, prompts):
        with steerlens.steer(model, STRONG), pytest.raises(UnsupportedError, match="is_causal"):
            model(prompts()[0], is_causal=False)

    def test_other_heads_than_the_config_says(self, model, prompts):
        """As under tensor parallelism."""
        with steerlens.steer(model, STRONG) as steered:
            steered._engine.facts = replace(steered._engine.facts, heads=(16,) * 3)
            with pytest.raises(UnsupportedError, match="8 query heads"):
                model(prompts()[0])

    def test_rows_of_spans_and_methods_must_agree(self, model):
        with pytest.raises(SpanError, match="disagree"):
            steerlens.steer(model, PerRow([PASTA(), None]), [[(1, 2)]] * 3)

    def test_facts(self, model_of):
        from steerlens import facts

        found = facts.read(model_of("llama-gqa").config)
        assert (found.layers, found.heads, found.kv_heads) == (3, (8,) * 3, (2,) * 3)
        assert facts.read(model_of("gpt2").config).kv_heads == (8,) * 3
        assert facts.read(model_of("llama-gqa").config, {0: 4, 2: None}).heads == (4, 0, 8)
        assert found.name == "llama" and facts.read(AutoConfig.for_model("llama", name_or_path="own")).name == "own"

    def test_cross_attention_is_refused(self):
        from transformers import GPT2Config

        from steerlens import facts

        with pytest.raises(UnsupportedError, match="cross-attention"):
            facts.read(GPT2Config(add_cross_attention=True))

    def test_a_layer_that_is_never_called(self):
        model = build("llama-gqa")
        ids = torch.arange(3, 9)[None]
        with steerlens.steer(model, STRONG):
            model.model.layers[1].self_attn.forward = lambda hidden_states, **kw: (hidden_states, None)
            for call in (model, lambda x: model.generate(x, max_new_tokens=2)):
                with pytest.raises(NotReachedError, match=r"layers \[1\]"):
                    call(ids)

    def test_other_families_are_refused_by_name(self):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=20)
        with pytest.raises(UnsupportedError, match=r"'bloom'.*llama"):
            steerlens.steer(AutoModelForCausalLM.from_config(config), STRONG)
        with pytest.raises(UnsupportedError, match="Linear"):
            steerlens.steer(torch.nn.Linear(2, 2), STRONG)

    def test_wrappers(self, model, prompts):
        wrapped = torch.nn.Sequential()
        wrapped.add_module("module", model)
        before = run(model, prompts()[0])
        with steerlens.steer(wrapped, STRONG):
            assert not torch.equal(run(model, prompts()[0]), before)

    def test_a_cache_that_gives_other_keys_than_it_announced(self, model, prompts):
        class Drops(DynamicCache):
            def update(self, *args, **kwargs):
                return tuple(states[:, :, 1:] for states in super().update(*args, **kwargs))

        with steerlens.steer(model, STRONG), pytest.raises(UnsupportedError, match=r"19 keys.*announced 20"):
            model(prompts()[0], past_key_values=Drops())

    def test_a_cache_of_other_rows(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, STRONG):
            cache = model(ids).past_key_values
            with pytest.raises(UnsupportedError, match="prompt of 3 rows, this forward has 2"):
                model(ids[:2, :1], past_key_values=cache)

    def test_dropout_is_refused(self, prompts):
        model = build("llama-gqa", attention_dropout=0.1).train()
        with steerlens.steer(model, STRONG), pytest.raises(UnsupportedError, match="dropout"):
            model(prompts()[0])

    def test_unknown_attention_arguments_are_refused(self, model, prompts):
        with steerlens.steer(model, STRONG), pytest.raises(UnsupportedError, match="cu_seq_lens_q"):
            model(prompts()[0], cu_seq_lens_q=torch.tensor([0, 4]))

    def test_soft_cap_on_a_named_backend(self, model_of, prompts):
        with (
            steerlens.steer(model_of("gemma2", "eager"), STRONG, backend="sdpa"),
            pytest.raises(UnsupportedError, match="softcap"),
        ):
            model_of("gemma2", "eager")(prompts()[0])

    def test_a_backend_of_no_such_name(self, model):
        with pytest.raises(ValueError, match="sdpaa"):
            steerlens.steer(model, STRONG, backend="sdpaa")

    def test_attentions_are_given_by_the_reference_alone(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, STRONG, backend="reference"):
            weights = model(ids, output_attentions=True).attentions
        assert all((w.sum(-1) - 1).abs().max() < 1e-5 for w in weights)
        half = build("llama-gqa", "eager", torch.bfloat16)
        with steerlens.steer(half, STRONG, backend="reference"):
            assert {w.dtype for w in half(ids, output_attentions=True).attentions} == {torch.bfloat16}
        with steerlens.steer(model, STRONG), pytest.raises(UnsupportedError, match="capture"):
            model(ids, output_attentions=True)

    @pytest.mark.parametrize("left", [0, 1])
    def test_sinks_of_a_context_stay_when_another_one_is_left(self, left, model, prompts):
        """Two contexts whose edits are alike, for other rows and heads."""
        ids, more = prompts()[0][:2], torch.tensor([[5], [6]])
        methods = [ACT(0.0, 0.05, heads={1: [1]}), ACT(0.0, 0.05, heads={1: [2]})]
        rows = [PerRow([methods[0], None]), PerRow([None, methods[1]])]

        with torch.no_grad():
            contexts = [steerlens.steer(model, row).attach() for row in rows]
            cache = model(ids, use_cache=True)[caches.NAME]
            contexts[left].detach()
            found = model(more, **{caches.NAME: cache}).logits[:, -1]
            contexts[1 - left].detach()
            with steerlens.steer(model, rows[1 - left]):
                cache = model(ids, use_cache=True)[caches.NAME]
                wanted = model(more, **{caches.NAME: cache}).logits[:, -1]
            assert (found - wanted)[1 - left].abs().max() < 1e-5
            # a context that comes later has no sinks of this prompt
            with steerlens.steer(model, rows[0]):
                cache = model(ids, use_cache=True)[caches.NAME]
                with steerlens.steer(model, rows[1]), pytest.raises(UnsupportedError, match="whole prompt"):
                    model(more, **{caches.NAME: cache})

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_attentions_that_a_family_does_not_ask_its_layers_for(self, family, model_of, prompts):
        model, (ids, _) = model_of(family, "eager"), prompts()
        with torch.no_grad(), steerlens.steer(model, ZeroTuning(3.0, heads={1: [2]}), backend="reference"):
            weights = model(ids, output_attentions=True).attentions
            with steerlens.capture(model, stats=(), maps="all") as record:
                model(ids)
        assert len(weights) == 3
        assert all((record[layer].map - weights[layer]).abs().max() < 1e-5 for layer in range(3))
        with steerlens.steer(model, ZeroTuning(3.0, heads={1: [2]})), pytest.raises(UnsupportedError, match="capture"):
            model(ids, output_attentions=True)

    def test_running_act_refuses_what_its_state_cannot_follow(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, ACT(0.3, 0.08, decode="running")):
            model.generate(ids, max_new_tokens=3, do_sample=False)
            with pytest.raises(UnsupportedError, match="running"):
                model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
            with pytest.raises(UnsupportedError, match="beams"):
                model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False)


class TestSpans:
    def test_needed(self, model):
        with pytest.raises(SpanError, match="pasta needs"):
            steerlens.steer(model, PASTA())

    @pytest.mark.parametrize(
        ("spans", "message"),
        [
            ([[(3, 2)]], "not a range"),
            ([(1, 3)], "one list per prompt row"),
            ([[(1, 2, 3)]], "one list per prompt row"),
        ],
    )
    def test_malformed(self, model, spans, message):
        with pytest.raises(SpanError, match=message):
            steerlens.steer(model, PASTA(), spans)

    def test_rows_must_fit(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, PASTA(), [[(2, 4)], [(2, 4)]]):
            with pytest.raises(SpanError, match="2 prompt rows, the batch has 3"):
                model(ids)
            with pytest.raises(SpanError, match="2 prompt rows"):
                model.generate(ids, max_new_tokens=2)
            model(ids[:2])

    def test_end_after_the_prompt(self, model, prompts):
        with steerlens.steer(model, PASTA(), [[(2, 40)]]), pytest.raises(SpanError, match="ends after the prompt"):
            model(prompts()[0][:1])

    def test_fingerprint(self, model, prompts):
        ids, mask = prompts("left")
        ranges = (((9, 12),), ((9, 12),), ((9, 12),))
        spans = steerlens.Spans({"emphasis": ranges}, steerlens.spans.digests(ids, mask))
        changed = ids.clone()
        changed[1, -1] = 4
        with steerlens.steer(model, PASTA(), spans):
            model(ids, attention_mask=mask)
            model.generate(ids, attention_mask=mask, max_new_tokens=2, num_beams=2)
            for call in (
                lambda: model(changed, attention_mask=mask),
                lambda: model.generate(changed, attention_mask=mask, max_new_tokens=2),
            ):
                with pytest.raises(SpanError, match="row 1"):
                    call()

    def test_fingerprint_is_not_that_of_a_continuation(self, model, prompts):
        """A cache filled unsteered: its prompt is not seen any more, so nothing is there to check."""
        ids, _ = prompts()
        spans = steerlens.Spans({"emphasis": (((9, 12),),) * 3}, steerlens.spans.digests(ids, None))
        with torch.no_grad():
            cache = model(ids).past_key_values
            with steerlens.steer(model, PASTA(), spans):
                model(ids[:, :1], past_key_values=cache)

    def test_fingerprint_is_not_that_of_embeddings(self, model, prompts):
        ids, _ = prompts()
        spans = steerlens.Spans({"emphasis": (((9, 12),),) * 3}, steerlens.spans.digests(ids, None))
        with torch.no_grad(), steerlens.steer(model, PASTA(0.05), spans):
            expected = model(ids).logits
            assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)

    def test_fingerprint_covers_the_padding(self, model, prompts):
        ids, mask = prompts("left")
        spans = steerlens.Spans({"emphasis": (((9, 12),),) * 3}, steerlens.spans.digests(ids, mask))
        with steerlens.steer(model, PASTA(), spans), pytest.raises(SpanError, match="row 1"):
            model(ids)

    def test_beams_of_the_generation_config(self, model, prompts):
        ids, mask = prompts("left")
        config = copy.deepcopy(model.generation_config)
        config.update(num_beams=2, max_new_tokens=3, do_sample=False)
        with steerlens.steer(model, PASTA(0.1), [[(9, 12)]] * 3):
            got = model.generate(ids, attention_mask=mask, generation_config=config)
            expected = model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=3, do_sample=False)
        assert torch.equal(got, expected)

    def test_methods_without_spans_ignore_them(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, STRONG):
            expected = run(model, ids)
        other = steerlens.Spans({"emphasis": (((1, 2),),)}, ("9:0",))
        for spans in ([[(1, 2)]] * 3, [[(1, 2)]], other):
            for method in (STRONG, PerRow([STRONG] * 3)):
                with steerlens.steer(model, method, spans):
                    assert torch.equal(run(model, ids), expected)

    def test_a_row_without_sections_is_not_steered(self, model, prompts):
        ids, _ = prompts()
        base = run(model, ids)
        with steerlens.steer(model, PASTA(0.05), [[(4, 6)], [], [(4, 6)]]):
            got = run(model, ids)
        assert (got - base)[1].abs().max() < 1e-5 and (got - base)[0].abs().max() > 1e-2

    def test_fingerprint_of_a_prompt_with_its_continuation(self, model, prompts):
        ids, mask = prompts(None, lengths=(20,))
        spans = steerlens.Spans({"emphasis": (((9, 12),),)}, steerlens.spans.digests(ids[:, :15], mask[:, :15]))
        with steerlens.steer(model, PASTA(), spans, prompt_lengths=15):
            model(ids)
            with pytest.raises(SpanError, match="row 0"):
                model(ids.flip(1))
        with steerlens.steer(model, PASTA(), spans), pytest.raises(SpanError, match="row 0"):
            model(ids)
        with steerlens.capture(model, spans), pytest.raises(SpanError, match="row 0"):
            model(ids)


class TestGenerateArguments:
    def test_positional_config(self, model, prompts):
        ids, _ = prompts()
        config = GenerationConfig(num_beams=2, max_new_tokens=3, do_sample=False)
        with steerlens.steer(model, PASTA(0.1), [[(2, 4)]] * 3):
            assert torch.equal(model.generate(ids, config), model.generate(input_ids=ids, generation_config=config))
        with steerlens.steer(model, ACT(0.3, 0.08, decode="running")), pytest.raises(UnsupportedError, match="beams"):
            model.generate(ids, config)

    def test_a_decoder_called_by_position(self, model, prompts):
        ids, mask = prompts("left")
        with torch.no_grad(), steerlens.steer(model, STRONG):
            expected = model.model(input_ids=ids, attention_mask=mask)[0]
            assert torch.equal(model.model(ids, mask)[0], expected)

    def test_embeddings(self, model, prompts):
        ids, mask = prompts("left")
        embeds, options = model.get_input_embeddings()(ids), {"max_new_tokens": 4, "do_sample": False}
        with steerlens.steer(model, PASTA(0.05), [[(9, 12)], [(10, 13)], [(8, 11)]]):
            expected = model.generate(ids, attention_mask=mask, **options)[:, 20:]
            assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **options), expected)
            got = model.generate(input_ids=ids[:, :0], inputs_embeds=embeds, attention_mask=mask, **options)
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("method", [STRONG, ACT(0.3, 0.08)], ids=["zerotuning", "act"])
    def test_no_mask_and_prompt_lookup(self, model_of, prompts, method):
        ids, _ = prompts(None, lengths=(20,))
        # transformers 5.10 looks prompts up only with an end-of-sequence token.
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1}
        for family in ("llama-gqa", "mistral"):
            with steerlens.steer(model_of(family), method):
                plain = model_of(family).generate(ids, **options)
                assert torch.equal(model_of(family).generate(ids, prompt_lookup_num_tokens=5, **options), plain)

    def test_chunks_by_hand(self, model, prompts):
        """With `prompt_lengths` the prompt may come in several bare forwards."""
        ids, _ = prompts(None, lengths=(20,))
        for method in (PASTA(0.05), HeadMask({0: "*"}, phase="prefill"), HeadMask({0: "*"}, phase="decode")):
            with torch.no_grad(), steerlens.steer(model, method, [[(9, 12)]], prompt_lengths=20):
                whole = model(ids).logits
                first = model(ids[:, :8])
                rest = model(ids[:, 8:], past_key_values=first.past_key_values).logits
            assert (torch.cat([first.logits, rest], 1) - whole).abs().max() < 1e-4


class TestReport:
    def test_counts(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, ZeroTuning(2.0, heads={0: [1], 2: [0]})) as steered:
            assert steered.report() == {0: {"calls": 0, "rows": 0}, 2: {"calls": 0, "rows": 0}}
            model.generate(ids, max_new_tokens=4, do_sample=False)
            inside = steered.report()
        assert inside == {layer: {"calls": 4, "rows": 3 * (20 + 3)} for layer in (0, 2)}
        model(ids)
        assert steered.report() == inside

    def test_counts_begin_at_attach(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, HeadMask({0: [1]})):
            model(ids)
            with steerlens.steer(model, STRONG) as steered:
                model(ids[:2])
        assert steered.report() == {layer: {"calls": 1, "rows": 40} for layer in range(3)}

    @pytest.mark.parametrize("method", [STRONG, ACT(0.3, 0.08)], ids=["zerotuning", "act"])
    def test_mass(self, model, prompts, method):
        ids, mask = prompts("left")
        with steerlens.steer(model, method, report="mass") as steered:
            model(ids, attention_mask=mask)
        change = torch.stack([layer["delta_mass"] for layer in steered.report().values()])
        assert change.shape == (3, 8)
        assert (change >= 0).all() if method is STRONG else (change <= 1e-7).all()
        assert change.abs().max() > 0.05

    def test_gradients_after_a_forward_in_inference_mode(self, model, prompts):
        """What is kept for later forwards must not be tensors of inference mode."""
        ids, _ = prompts()
        with steerlens.steer(model, HeadMask({0: [1, 4, 6]})):
            with torch.inference_mode():
                model(ids)
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embeds).logits.sum().backward()
        assert embeds.grad.abs().max() > 0

    def test_mass_over_inference_and_normal_mode(self, model, prompts):
        ids, _ = prompts()
        with steerlens.steer(model, STRONG, report="mass") as steered:
            with torch.inference_mode():
                model(ids)
            once = steered.report()[1]["delta_mass"]
            model(ids)
            assert (steered.report()[1]["delta_mass"] - once).abs().max() < 1e-6

    def test_mass_is_the_captured_change(self, model, prompts):
        """Layer 0's input does not depend on steering, so its Δψ is the difference of two captures."""
        ids, mask = prompts("left")
        found = []
        for methods in ((), STRONG):
            with (
                steerlens.steer(model, methods, report="mass") as steered,
                steerlens.capture(model, stats=("mass",)) as record,
            ):
                run(model, ids, attention_mask=mask)
            found.append(record[0].mass[..., 0].transpose(0, 1).flatten(1).nanmean(1))
        assert (steered.report()[0]["delta_mass"] - (found[1] - found[0])).abs().max() < 1e-6


class TestKindsOfMethod:
    """Only edit methods ship so far; the other two kinds have their place."""

    def test_prompt_method(self, model, prompts):
        @dataclass(frozen=True)
        class Reverse(PromptMethod):
            name: ClassVar[str] = "reverse"

            def prepare(self, inputs, spans):
                key = "input_ids" if "input_ids" in inputs else "inputs"
                return {**inputs, key: inputs[key].flip(1)}, spans

        ids, _ = prompts()
        expected = model.generate(ids.flip(1), max_new_tokens=3, do_sample=False)
        with steerlens.steer(model, Reverse()):
            assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
            with pytest.raises(SteeringStateError, match="prepare"):
                model(ids)

    def test_spans_of_a_prompt_method_are_those_of_its_generate(self, model, prompts):
        @dataclass(frozen=True)
        class Shift(PromptMethod):
            name: ClassVar[str] = "shift"

            def prepare(self, inputs, spans):
                return inputs, steerlens.Spans.of(
                    [[(a + 4, b + 4) for a, b in row] for row in spans.groups["emphasis"]]
                )

        ids, _ = prompts()
        options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with steerlens.steer(model, PASTA(0.05), [[(6, 9)]] * 3):
            expected = model.generate(ids, **options).logits
        with steerlens.steer(model, [Shift(), PASTA(0.05)], [[(2, 5)]] * 3):
            for _ in range(2):
                assert torch.equal(torch.stack(model.generate(ids, **options).logits), torch.stack(expected))

    def test_decoding_method(self, model, prompts):
        @dataclass(frozen=True)
        class Twice(DecodingMethod):
            name: ClassVar[str] = "twice"

            def generate(self, model, inputs, spans, **kwargs):
                one = model.generate(**inputs, **kwargs)
                return torch.cat([one, model.generate(**inputs, **kwargs)])

        ids, _ = prompts()
        with steerlens.steer(model, [Twice(), STRONG]):
            got = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
            with pytest.raises(SteeringStateError, match="score"):
                model(ids)
        with steerlens.steer(model, STRONG):
            one = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(got, torch.cat([one, one]))
        with pytest.raises(MethodError, match="two decoding"):
            steerlens.steer(model, [Twice(), Twice()])


class TestMethods:
    def test_names_and_round_trip(self):
        assert names() == sorted(names()) and {"act", "headmask", "pasta", "zerotuning"} <= set(names())
        for method in (
            STRONG,
            PASTA(0.2, heads={1: [3, 2]}),
            ACT(0.1, 5, "relative"),
            HeadMask("1:2;3:*"),
            PerRow([STRONG, None]),
        ):
            assert from_dict(method.to_dict()) == method

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ZeroTuning(0), "gamma=0.*> 0"),
            (lambda: ZeroTuning(float("nan")), "gamma"),
            (lambda: PASTA(-1), "alpha"),
            (lambda: ACT(1.2), "beta=1.2.*<= 1"),
            (lambda: PASTA(scale="exclud"), "did you mean 'exclude'"),
            (lambda: HeadMask("all", mode="mean"), "uniform, zero"),
            (lambda: from_dict({"method": "pata"}), "did you mean 'pasta'"),
            (lambda: from_dict({"method": "pasta", "alfa": 1}), "did you mean 'alpha'"),
            (lambda: from_dict({"method": "headmask"}), "needs heads"),
            (lambda: ZeroTuning("2"), "gamma='2'"),
            (lambda: PerRow([3]), "row 0"),
        ],
    )
    def test_bad_parameters(self, make, message):
        with pytest.raises(MethodError, match=message):
            make()

    @pytest.mark.parametrize(
        ("heads", "message"),
        [
            ({3: [0]}, r"layer 3.*0\.\.2"),
            ({0: [8]}, r"head 8.*0\.\.7"),
            ("0:8", r"head 8.*0\.\.7"),
            ("0-1", "no ':'"),
            ({0: [-1]}, "head -1"),
            ("x.json:top3", "cannot read"),
            (3, "not a head specification"),
            ({0: "3"}, "neither"),
            ("0:10000", "names index 10000"),
        ],
    )
    def test_bad_heads(self, model, heads, message):
        with pytest.raises(HeadError, match=message):
            steerlens.steer(model, ZeroTuning(2.0, heads=heads))

    def test_head_specifications(self, tmp_path):
        from steerlens.facts import ModelFacts
        from steerlens.heads import Heads

        facts = ModelFacts("m", "llama", 3, (4,) * 3, (2,) * 3)
        scores = tmp_path / "scores.json"
        scores.write_text('{"0-1": [0.5, 0.7], "2-3": 0.9, "1-0": [0.95, 0.1], "1-2": 0.6}')
        lists = tmp_path / "lists.json"
        lists.write_text('{"1": [3, 0]}')
        for spec, expected in [
            ("all", {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}),
            ({1: [3, 0]}, {1: (0, 3)}),
            ("1:3,0;2:*", {1: (0, 3), 2: (0, 1, 2, 3)}),
            ("0-1:2-3", {0: (2, 3), 1: (2, 3)}),
            ("*:1", {0: (1,), 1: (1,), 2: (1,)}),
            ("1:3;1:0;*:2", {0: (2,), 1: (0, 2, 3), 2: (2,)}),
            (f"{scores}:top3", {0: (1,), 1: (2,), 2: (3,)}),
            (str(lists), {1: (0, 3)}),
            ({1: torch.tensor([3, 0])}, {1: (0, 3)}),
            ({}, {}),
            ("", {}),
        ]:
            parsed = Heads.parse(spec)
            assert parsed.resolve(facts) == expected
            assert Heads.parse(parsed.to_json()) == parsed and Heads.parse(str(parsed)) == parsed
