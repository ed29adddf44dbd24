"""Caches: steered is the law on the same cache, also where an old one meets a later prompt."""

import contextlib
import copy
import importlib.metadata

import pytest
import torch
from modes import (
    CAUSAL,
    METHODS,
    RUNNING,
    SPANS,
    apart,
    assert_same,
    generate,
    greedy,
    method_of,
    positions,
    whole,
)
from small_models import build
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.generation import configuration_utils

import steerlens
from steerlens.errors import SpanError, UnsupportedError
from steerlens.methods import PASTA, HeadMask, ZeroTuning
from steerlens.spans import Spans, digests

IMPLEMENTATIONS = [
    (family, cache)
    for family in ("llama-gqa", "mistral", "gemma2")
    for cache in sorted({*configuration_utils.ALL_CACHE_IMPLEMENTATIONS} - {"quantized"})
    # transformers offloads the layers without a window alone, and fails where there is none
    if not (family == "mistral" and cache.startswith("offloaded_"))
]


@pytest.fixture
def streams(monkeypatch):
    """Offloaded caches copy on side streams, which only an accelerator has: here they are stand-ins that do nothing."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())


class TestCaches:
    @pytest.mark.parametrize(("family", "cache"), IMPLEMENTATIONS)
    @pytest.mark.parametrize("name", ["composed", "pasta", "running"])
    def test_every_implementation_is_the_dynamic_one(self, family, cache, name, model_of, prompts, streams):
        model, (ids, mask) = model_of(family, "eager" if family == "gemma2" else "sdpa"), prompts("left")
        plain = generate(model, method_of(name), SPANS, ids, mask)
        assert_same(generate(model, method_of(name), SPANS, ids, mask, cache_implementation=cache), plain)
        assert apart(plain.logits, greedy(model, ids, mask).logits) > 1e-3

    def test_a_users_offloaded_cache(self, model, prompts, streams):
        ids, mask = prompts("left")
        cache = DynamicCache(config=model.config, offloading=True)
        got = generate(model, METHODS["composed"], SPANS, ids, mask, past_key_values=cache)
        assert cache.offloading
        assert_same(got, generate(model, METHODS["composed"], SPANS, ids, mask))

    @pytest.mark.parametrize("backend", ["quanto", "hqq", "fp8"])
    @pytest.mark.parametrize("name", [*METHODS, "running"])
    def test_quantised(self, backend, name, model, prompts):
        """The law on the same cache: the prompt's step is that of any cache, and the definition agrees after it."""
        package = {"quanto": "optimum-quanto", "hqq": "hqq"}.get(backend)
        if package is not None and not any(importlib.metadata.distributions(name=package)):
            pytest.skip(f"the package {package} is not installed")
        options = {"backend": backend}
        if backend == "fp8":
            if not hasattr(cache_utils, "Fp8QuantizedLayer"):
                pytest.skip("this transformers has no fp8 cache")
        else:
            axis = int(backend == "hqq")
            options |= {"nbits": 4, "q_group_size": 32, "residual_length": 4, "axis_key": axis, "axis_value": axis}

        def generated(*args, **more):
            # transformers 5.10 takes the backend out of the cache_config that it is given.
            return greedy(*args, cache_implementation="quantized", cache_config=dict(options), **more)

        ids, mask = prompts("left")
        method = method_of(name)
        with steerlens.steer(model, method, SPANS):
            got = generated(model, ids, mask)
        layers = got.past_key_values.layers
        assert all(layer._quantized_keys is not None and layer.get_seq_length() == 27 for layer in layers)
        assert backend == "fp8" or all(isinstance(layer, cache_utils.QuantizedLayer) for layer in layers)
        with steerlens.steer(model, method, SPANS, backend="reference"):
            assert_same(got, generated(model, ids, mask))
        dynamic = generate(model, method, SPANS, ids, mask)
        assert apart(got.logits[0], dynamic.logits[0]) < 1e-5
        assert apart(got.logits[1], dynamic.logits[1]) > 1e-4  # it is quantised
        plain = generated(model, ids, mask)
        assert all(apart(a, b) > 1e-3 for a, b in zip(got.logits, plain.logits, strict=True))

    @pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
    @pytest.mark.parametrize("name", CAUSAL)
    def test_chunks_into_a_static_cache(self, family, name, model_of, prompts):
        model, (ids, mask) = model_of(family), prompts("left")
        options = {"cache_implementation": "static", "prefill_chunk_size": 6}
        plain = generate(model, METHODS[name], SPANS, ids, mask)
        assert_same(generate(model, METHODS[name], SPANS, ids, mask, **options), plain)

    @pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
    def test_a_static_cache_that_is_longer_and_used_again(self, family, model_of, prompts):
        model, (ids, mask) = model_of(family), prompts("left")
        plain = generate(model, METHODS["composed"], SPANS, ids, mask)
        cache = StaticCache(config=model.config, max_cache_len=80)
        for _ in range(2):
            assert_same(generate(model, METHODS["composed"], SPANS, ids, mask, past_key_values=cache), plain)
            cache.reset()


class TestTurns:
    """A later prompt on an old cache. Old keys stay as they were computed; spans count columns of the whole text."""

    def talk(self, model, cache, prompts):
        """The first turn on `cache`: its whole text with the next prompt behind it, and the mask."""
        ids, mask = prompts("left")
        first = greedy(model, ids, mask, past_key_values=cache)
        following = prompts(None, lengths=(6, 6, 6), seed=9)[0]
        return torch.cat([first.sequences, following], 1), whole(mask, 14)

    @pytest.mark.parametrize("contexts", [1, 2])
    @pytest.mark.parametrize("only_new", [False, True])
    @pytest.mark.parametrize("kind", ["dynamic", "static", "chunked"])
    @pytest.mark.parametrize("name", [*CAUSAL, "uniform"])
    def test_one_layer_is_recomputation(self, name, kind, only_new, contexts, prompts):
        """The keys of a first layer do not depend on the steering, so an old cache changes nothing there."""
        model = build("llama-gqa", num_hidden_layers=1)
        method = HeadMask({0: [1, 4]}) if name == "uniform" else METHODS[name]
        if name in ("zerotuning", "pasta"):
            method = type(method)(method.gamma if name == "zerotuning" else method.alpha, heads={0: [0, 3, 5]})
        elif name == "headmask":
            method = HeadMask({0: "*"}, phase="decode")
        cache = StaticCache(config=model.config, max_cache_len=64) if kind == "static" else DynamicCache()
        with contextlib.ExitStack() as stack:
            stack.enter_context(steerlens.steer(model, method, SPANS))
            ids, mask = self.talk(model, cache, prompts)
            options = {"prefill_chunk_size": 4} if kind == "chunked" else {}
            new, kept, spans = ids[:, cache.get_seq_length() :] if only_new else ids, copy.deepcopy(cache), SPANS
            if contexts == 2:
                stack.pop_all().close()
                spans = [[*SPANS[0], (29, 33)], [(30, 32)], [(12, 14)]]
                stack.enter_context(steerlens.steer(model, method, spans))
            got = greedy(model, new, mask, past_key_values=cache, **options)
        expected, plain = generate(model, method, spans, ids, mask), greedy(model, ids, mask)
        native = greedy(model, new, mask, past_key_values=kept, **options)
        if kind == "chunked" and apart(native.logits, plain.logits) > 1e-3:
            pytest.skip("this transformers feeds chunks of a prompt again that its cache holds, unsteered too")
        assert torch.equal(got.sequences[:, -8:], expected.sequences[:, -8:])
        assert apart(got.logits, expected.logits) < 1e-4
        assert apart(got.logits, plain.logits) > 1e-3

    @pytest.mark.parametrize("name", CAUSAL)
    def test_is_the_law_on_the_old_cache(self, name, model, prompts):
        """Against forwards by hand on a copy, of which the steering never saw the first turn."""
        cache = DynamicCache()
        with steerlens.steer(model, METHODS[name], SPANS):
            ids, mask = self.talk(model, cache, prompts)
        kept, spans = copy.deepcopy(cache), [[(29, 33)], [(30, 32)], [(12, 14)]]
        got = generate(model, METHODS[name], spans, ids, mask, past_key_values=cache)
        logits, new, seen = [], ids[:, kept.get_seq_length() :], mask
        with torch.no_grad(), steerlens.steer(model, METHODS[name], spans, backend="reference"):
            for token in got.sequences[:, ids.shape[1] :].T:
                at = positions(seen)[:, -new.shape[1] :]
                out = model(new, attention_mask=seen, position_ids=at, past_key_values=kept)
                logits.append(out.logits[:, -1])
                new, seen = token[:, None], whole(seen, 1)
        assert apart(got.logits, tuple(logits)) < 1e-4

    @pytest.mark.parametrize("method", [METHODS["act"], RUNNING], ids=["frozen", "running"])
    def test_act_refuses_an_old_cache(self, method, model, prompts):
        cache = DynamicCache()
        with steerlens.steer(model, method):
            ids, mask = self.talk(model, cache, prompts)
            with pytest.raises(UnsupportedError, match="no reused prefix"):
                greedy(model, ids, mask, past_key_values=cache)

    def test_spans_of_other_inputs(self, model, prompts):
        """Spans that were resolved on the new tokens alone count from the wrong column."""
        cache = DynamicCache()
        ids, mask = self.talk(model, cache, prompts)
        new = ids[:, cache.get_seq_length() :]
        spans = Spans(groups={"emphasis": (((1, 3),),) * 3}, fingerprint=digests(new, None))
        with pytest.raises(SpanError, match="not what the spans were resolved on"):
            generate(model, METHODS["pasta"], spans, new, mask, past_key_values=cache)
        spans = Spans(groups={"emphasis": (((1, 3),),) * 3}, fingerprint=digests(ids, mask))
        assert generate(model, METHODS["pasta"], spans, ids, mask, past_key_values=cache).sequences.shape[1] == 42


def test_a_cache_that_drops_tokens_is_refused(model, row):
    """As StreamingLLM's, which holds the first and the last tokens: its keys are other tokens' than steering counts."""

    class Streaming(cache_utils.DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            found = super().update(keys, values)
            held = [*range(4), *range(max(self.keys.shape[2] - 6, 4), self.keys.shape[2])]
            self.keys, self.values = self.keys[:, :, held], self.values[:, :, held]
            return found

    layers = [Streaming() for _ in model.model.layers]
    with torch.no_grad(), steerlens.steer(model, METHODS["pasta"], [[(4, 7)]]):
        for given in ({"layers": layers}, {"layer_class_to_replicate": Streaming}):
            with pytest.raises(UnsupportedError, match=r"has layers of .*Streaming: whether they hold every token"):
                model(row, past_key_values=cache_utils.Cache(**given))
        model(row, past_key_values=DynamicCache())
    cache = cache_utils.Cache(layers=layers)
    with torch.no_grad():
        model(row, past_key_values=cache)
    assert cache.get_seq_length() == 10


class TestPrefix:
    """A prefix by a bare forward, the rest of the prompt on its cache."""

    @pytest.mark.parametrize("name", ["zerotuning", "pasta"])
    def test_a_native_prefix(self, name, prompts):
        """In one layer it equals the whole prompt at once; the prompt is both parts."""
        model, (ids, _) = build("llama-gqa", num_hidden_layers=1), prompts(None)
        method = ZeroTuning(5.0) if name == "zerotuning" else PASTA(0.05)
        with torch.no_grad():
            cache = model(ids[:, :8]).past_key_values
            with steerlens.steer(model, method, SPANS):
                got, expected = model(ids[:, 8:], past_key_values=cache).logits, model(ids).logits[:, 8:]
        assert apart(got, expected) < 1e-5

    def test_act_refuses_a_native_prefix(self, model, row):
        with torch.no_grad():
            cache = model(row[:, :8]).past_key_values
            with (
                steerlens.steer(model, METHODS["act"]),
                pytest.raises(UnsupportedError, match="of a prompt of 20"),
            ):
                model(row[:, 8:], past_key_values=cache)

    def test_what_follows_a_steered_prefix_counts_as_generated(self, model, row):
        """Unless `prompt_lengths` says otherwise."""
        method = HeadMask({0: "*"}, phase="decode")
        with torch.no_grad():
            with steerlens.steer(model, method):
                cache = model(row[:, :8]).past_key_values
                got = model(row[:, 8:], past_key_values=cache).logits
            with steerlens.steer(model, method, prompt_lengths=8):
                assert apart(got, model(row).logits[:, 8:]) < 1e-5
            with steerlens.steer(model, method, prompt_lengths=20):
                cache = model(row[:, :8]).past_key_values
                rest, at_once = model(row[:, 8:], past_key_values=cache).logits, model(row).logits[:, 8:]
        assert apart(rest, at_once) < 1e-5 and apart(rest, got) > 1e-3


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", [*METHODS, "running"])
def test_two_generations_by_turns(name, static, model, prompts):
    """Forwards of two prompts, alternately, each on its own cache and with its own state."""
    both = [prompts(None, lengths=(20, 20, 20), seed=s)[0] for s in (0, 1)]
    following = torch.tensor([[5], [6], [7]])

    def step(state):
        new = state["ids"] if state["ids"] is not None else following + len(state["out"])
        state["out"].append(model(new, past_key_values=state["cache"]).logits[:, -1])
        state["ids"] = None

    def states():
        fixed = StaticCache(config=model.config, max_cache_len=40)
        caches = (fixed if static else DynamicCache(), DynamicCache())
        return [{"ids": ids, "cache": cache, "out": []} for ids, cache in zip(both, caches, strict=True)]

    with torch.no_grad(), steerlens.steer(model, method_of(name), SPANS):
        alone, turns = states(), states()
        for state in alone:
            for _ in range(5):
                step(state)
        for _ in range(5):
            for state in turns:
                step(state)
    for one, other in zip(turns, alone, strict=True):
        assert apart(tuple(one["out"]), tuple(other["out"])) < 1e-5
    assert apart(tuple(alone[0]["out"]), tuple(alone[1]["out"])) > 1e-2
