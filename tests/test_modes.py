"""Modes of generation: each is right, or refused by name."""

import threading

import pytest
import torch
import transformers
from modes import (
    METHODS,
    RUNNING,
    SPANS,
    apart,
    assert_same,
    every_method,
    generate,
    greedy,
    positions,
    whole,
)
from small_models import build
from transformers import (
    CompileConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

import steerlens
from steerlens import caches
from steerlens.errors import UnsupportedError


@torch.no_grad()
def guided_by_hand(model, method, spans, ids, mask, negative, scale, tokens):
    """Guidance from its formula: the conditional branch steered, the other one native, over the tokens generated."""
    with steerlens.steer(model, method, spans):
        out, logits, longer = model(ids, attention_mask=mask, position_ids=positions(mask)), [], mask
        for column in tokens.T:
            logits.append(out.logits[:, -1])
            longer = whole(longer, 1)
            at, cache = positions(longer)[:, -1:], out.past_key_values
            out = model(column[:, None], attention_mask=longer, position_ids=at, past_key_values=cache)
    scores = []
    for step, given in enumerate(logits):
        other = model(torch.cat([negative, tokens[:, :step]], 1), use_cache=False).logits[:, -1].log_softmax(-1)
        scores.append(scale * (given.log_softmax(-1) - other) + other)
    return tuple(scores)


class TestGuidance:
    """Classifier-free guidance: the conditional branch is steered, the unconditional one is not."""

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("negative", [False, True], ids=["last token", "negative prompt"])
    @every_method
    def test_is_its_formula(self, name, negative, use_cache, model, prompts):
        ids, mask = prompts("left")
        options = {"guidance_scale": 3.0, "use_cache": use_cache}
        other = ids[:, -1:]
        if negative:
            other = options["negative_prompt_ids"] = prompts(None, lengths=(20, 20, 20), seed=5)[0]
        got = generate(model, METHODS[name], SPANS, ids, mask, **options)
        tokens = got.sequences[:, 20:]
        expected = guided_by_hand(model, METHODS[name], SPANS, ids, mask, other, 3.0, tokens)
        assert apart(got.scores, expected) < 1e-4
        assert torch.equal(torch.stack(expected).argmax(-1).T, tokens)
        assert apart(got.scores, greedy(model, ids, mask, **options).scores) > 1e-3

    def test_a_processor_of_the_users(self, model, prompts):
        ids, mask = prompts("left")
        expected = generate(model, METHODS["pasta"], SPANS, ids, mask, guidance_scale=3.0)
        with steerlens.steer(model, METHODS["pasta"], SPANS):
            own = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model)
            assert_same(greedy(model, ids, mask, logits_processor=LogitsProcessorList([own])), expected)
        assert own.model is model

    def test_records_and_reports_hold_the_conditional_branch_alone(self, model, row):
        with (
            steerlens.capture(model, stats=("lse",)) as record,
            steerlens.steer(model, METHODS["zerotuning"]) as steered,
        ):
            greedy(model, row, guidance_scale=3.0, max_new_tokens=5)
        assert record[0].lse.shape[2] == 24
        assert steered.report()[0] == {"calls": 5, "rows": 24}

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("width", [6, 20, 24])
    def test_another_prompt_inside_is_refused(self, width, use_cache, model, row):
        """What is not transformers' guidance cannot be told apart, so it is not guessed at."""

        def processor(tokens, scores):
            return scores + model(torch.full((1, width), 7), use_cache=use_cache).logits[:, -1]

        with steerlens.steer(model, METHODS["zerotuning"]):
            with pytest.raises(UnsupportedError, match="several prompts inside one generate"):
                greedy(model, row, logits_processor=LogitsProcessorList([processor]))
            plain = greedy(model, row)
        assert_same(plain, generate(model, METHODS["zerotuning"], None, row))

    @pytest.mark.parametrize("held", [9, 24])
    def test_another_prompt_on_a_cache_of_its_own_is_refused(self, held, model, row):
        with torch.no_grad():
            cache = model(torch.cat([row, row], 1)[:, :held]).past_key_values

        def processor(tokens, scores):
            return scores + model(row[:, 9:12], past_key_values=cache).logits[:, -1]

        refused = pytest.raises(UnsupportedError, match=f"3 columns on a cache of {held}")
        with steerlens.steer(model, METHODS["zerotuning"]), refused:
            greedy(model, row, logits_processor=LogitsProcessorList([processor]))

    def test_token_healing_is_refused(self, model, row):
        with steerlens.steer(model, METHODS["zerotuning"]), pytest.raises(UnsupportedError, match="token_healing"):
            greedy(model, row, token_healing=True)


@pytest.fixture(scope="module")
def drafters():
    """Assistants with modules of their own: a smaller model, and one of the same weights."""
    return {"small": build("llama-gqa", num_hidden_layers=1), "twin": build("llama-gqa")}


class TestAssisted:
    """The target alone is steered, so that its greedy text is that of plain decoding."""

    def draft(self, kind, model, drafters):
        if kind == "early exit":
            return {"assistant_early_exit": 1}
        return {"assistant_model": model if kind == "itself" else drafters[kind]}

    @pytest.mark.parametrize("kind", ["small", "twin", "itself", "early exit"])
    @every_method
    def test_is_plain_decoding(self, name, kind, model, row, drafters):
        spans = [[(9, 12)]]
        # transformers 5.10 needs an end-of-sequence token to draft.
        options = {"max_new_tokens": 12, "eos_token_id": 1}
        plain = generate(model, METHODS[name], spans, row, **options)
        assert_same(generate(model, METHODS[name], spans, row, **options, **self.draft(kind, model, drafters)), plain)
        assert not torch.equal(plain.sequences, greedy(model, row, **options).sequences)

    @pytest.mark.parametrize("kind", ["small", "itself", "early exit"])
    @pytest.mark.parametrize("family", ["mistral", "gemma2"])
    @pytest.mark.parametrize("name", ["pasta", "composed"])
    def test_windows_record_what_is_cropped(self, name, family, kind, model_of, row):
        """Sliding-window caches keep more keys than the window while drafts may be taken back."""
        native = "eager" if family == "gemma2" else "sdpa"
        model, drafters = model_of(family, native), {"small": build(family, native, num_hidden_layers=1)}
        options, spans = {"max_new_tokens": 12, "eos_token_id": 1}, [[(9, 12)]]
        plain, draft = generate(model, METHODS[name], spans, row, **options), self.draft(kind, model, drafters)
        try:
            greedy(model, row, **options, **draft)
        except TypeError as error:
            model.config.num_hidden_layers = 3  # early exit leaves it changed
            pytest.skip(f"transformers {transformers.__version__} cannot draft so, unsteered either: {error}")
        assert_same(generate(model, METHODS[name], spans, row, **options, **draft), plain)

    @pytest.mark.parametrize("kind", ["itself", "early exit"])
    def test_drafts_with_the_steered_model_are_native(self, kind, model, row, drafters):
        """Forwards are told by their depth or, where the model drafts whole, by their order: a draft comes first."""
        seen = []
        hook = model.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(out.logits[:, -1]), with_kwargs=True
        )
        try:
            with steerlens.steer(model, METHODS["zerotuning"]) as steered:
                greedy(model, row, eos_token_id=1, **self.draft(kind, model, drafters))
            calls, drafted = steered.report()[0]["calls"], seen[0]
            assert 0 < calls < len(seen)
            if kind == "early exit":
                model.config.num_hidden_layers = 1
            with torch.no_grad():
                native = model(row).logits[:, -1]
        finally:
            model.config.num_hidden_layers = 3
            hook.remove()
        assert apart(drafted, native) < 1e-5

    @pytest.mark.parametrize("kind", ["small", "itself", "early exit"])
    def test_running_sums_refuse(self, kind, model, row, drafters):
        with steerlens.steer(model, RUNNING), pytest.raises(UnsupportedError, match="no assisted decoding"):
            greedy(model, row, eos_token_id=1, **self.draft(kind, model, drafters))

    @pytest.mark.parametrize("whole_decoder", [True, False])
    def test_an_assistant_that_shares_modules_is_refused(self, whole_decoder, model, row):
        assistant = LlamaForCausalLM(model.config)
        if whole_decoder:
            assistant.model = model.model
        else:
            assistant.model.layers = torch.nn.ModuleList(list(model.model.layers[:1]))
        with steerlens.steer(model, METHODS["zerotuning"]), pytest.raises(UnsupportedError, match="shares attention"):
            greedy(model, row, assistant_model=assistant)

    def test_a_callable_with_the_model_as_its_assistant_is_refused(self, model, row):
        with steerlens.steer(model, METHODS["zerotuning"]), pytest.raises(UnsupportedError, match="custom_generate"):
            greedy(model, row, assistant_model=model, custom_generate=loop)


def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A greedy `custom_generate`."""
    prompt = input_ids.shape[1]
    mask, cache, new = kwargs.get("attention_mask"), kwargs[caches.NAME], input_ids
    mask = torch.ones_like(input_ids) if mask is None else mask
    while input_ids.shape[1] < prompt + generation_config.max_new_tokens:
        at = positions(mask)[:, -new.shape[1] :]
        out = model(new, attention_mask=mask, position_ids=at, past_key_values=cache)
        new, mask = out.logits[:, -1].argmax(-1, keepdim=True), whole(mask, 1)
        input_ids = torch.cat([input_ids, new], 1)
    return input_ids


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A `custom_generate` that tries the two best tokens on a repeated cache and keeps the second if it is odd."""
    cache, prompt = kwargs[caches.NAME], input_ids.shape[1]
    out = model(input_ids, past_key_values=cache)
    while input_ids.shape[1] < prompt + generation_config.max_new_tokens:
        two = out.logits[:, -1].topk(2).indices
        cache.batch_repeat_interleave(2)
        out = model(two.view(-1, 1), past_key_values=cache)
        kept = two[:, 1] % 2
        rows = torch.arange(len(two)) * 2 + kept
        cache.batch_select_indices(rows)
        out.logits = out.logits[rows]
        input_ids = torch.cat([input_ids, two.gather(1, kept[:, None])], 1)
    return input_ids


def contrastive_by_hand(model, ids, steps):
    for _ in range(steps):
        two = model(ids, use_cache=False).logits[:, -1].topk(2).indices
        ids = torch.cat([ids, two.gather(1, two[:, 1:] % 2)], 1)
    return ids


class TestCustom:
    @every_method
    def test_a_callable(self, name, model, prompts):
        ids, mask = prompts("left")
        expected = generate(model, METHODS[name], SPANS, ids, mask).sequences
        assert torch.equal(generate(model, METHODS[name], SPANS, ids, mask, custom_generate=loop), expected)

    @every_method
    def test_contrastive(self, name, model, prompts):
        """Rows of a cache that are repeated and selected, against recomputation."""
        ids, _ = prompts(None)
        got = generate(model, METHODS[name], SPANS, ids, custom_generate=contrastive)
        with torch.no_grad(), steerlens.steer(model, METHODS[name], SPANS, prompt_lengths=[20] * 3):
            expected = contrastive_by_hand(model, ids, 8)
        assert torch.equal(got, expected)
        assert not torch.equal(expected, contrastive_by_hand(model, ids, 8))

    def test_a_callable_that_generates_from_the_prompt(self, model, row):
        def twice(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            return model.generate(input_ids, max_new_tokens=8, do_sample=False)

        expected = generate(model, METHODS["zerotuning"], None, row).sequences
        assert torch.equal(generate(model, METHODS["zerotuning"], None, row, custom_generate=twice), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"penalty_alpha": 0.6, "top_k": 4},
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
            {"num_beams": 2, "force_words_ids": [[5]]},
            {"dola_layers": "low"},
        ],
        ids=["contrastive", "group beams", "constrained beams", "dola"],
    )
    def test_what_transformers_moved_to_the_hub_it_refuses_itself(self, options, model, row):
        """Its repositories run as `custom_generate` does; without `trust_remote_code` transformers raises."""
        with steerlens.steer(model, METHODS["zerotuning"]):
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                greedy(model, row, **options)
            after = greedy(model, row[:, :15])
        assert_same(after, generate(model, METHODS["zerotuning"], None, row[:, :15]))


class TestPassedThrough:
    def test_processors_and_scores(self, model, row):
        """A processor sees the steered logits; scores are what it made of them."""
        seen = []

        def forbid(tokens, scores):
            seen.append(scores.clone())
            return scores.index_fill(1, torch.tensor([64, 46]), -1e4)

        got = generate(model, METHODS["pasta"], [[(9, 12)]], row, logits_processor=LogitsProcessorList([forbid]))
        assert apart(tuple(seen), got.logits) < 1e-6
        assert all((s[:, [64, 46]] == -1e4).all() for s in got.scores)
        assert not torch.isin(got.sequences[:, 20:], torch.tensor([64, 46])).any()
        plain = generate(model, METHODS["pasta"], [[(9, 12)]], row)
        assert apart(seen[0], plain.logits[0]) < 1e-6 and apart(plain.logits[0], greedy(model, row).logits[0]) > 1e-3

    @every_method
    def test_a_streamer_in_another_thread(self, name, model, row):
        """They are the steered ones; without a cache every forward must know what the prompt is."""

        class Collect(BaseStreamer):
            def __init__(self):
                self.tokens, self.ended = [], False

            def put(self, value):
                self.tokens += value.view(-1).tolist()

            def end(self):
                self.ended = True

        streamer, spans = Collect(), [[(9, 12)]]
        plain = generate(model, METHODS[name], spans, row).sequences[0].tolist()
        with steerlens.steer(model, METHODS[name], spans):
            thread = threading.Thread(
                target=greedy, args=(model, row), kwargs={"streamer": streamer, "use_cache": False}
            )
            thread.start()
            thread.join(60)
        assert streamer.ended and streamer.tokens == plain != greedy(model, row).sequences[0].tolist()

    def test_compile_config(self, model, row):
        """It reaches transformers, which compiles on accelerators alone."""
        expected = generate(model, METHODS["composed"], [[(9, 12)]], row)
        assert_same(generate(model, METHODS["composed"], [[(9, 12)]], row, compile_config=CompileConfig()), expected)
        assert apart(expected.logits, greedy(model, row).logits) > 1e-3

    def test_embeddings_with_a_static_cache(self, model, prompts):
        ids, mask = prompts("left")
        options = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "cache_implementation": "static"}
        expected = generate(model, METHODS["composed"], SPANS, ids, mask)
        got = generate(model, METHODS["composed"], SPANS, None, mask, **options)
        assert torch.equal(got.sequences, expected.sequences[:, 20:]) and apart(got.logits, expected.logits) < 1e-4


class TestContinuousBatching:
    @pytest.mark.parametrize(
        "name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
    )
    def test_is_refused_by_name(self, name, model):
        refused = pytest.raises(UnsupportedError, match=f"{name} packs .* leave steer")
        with steerlens.steer(model, METHODS["zerotuning"]), refused:
            getattr(model, name)([[4, 5, 6]])
        assert name not in model.__dict__

    def test_paged_generate_is_refused(self, model, row):
        refused = pytest.raises(UnsupportedError, match="cache_implementation='paged'")
        with steerlens.steer(model, METHODS["zerotuning"]), refused:
            greedy(model, row, cache_implementation="paged")

    def test_under_capture_too(self, model):
        with steerlens.capture(model, stats=("lse",)), pytest.raises(UnsupportedError, match="generate_batch"):
            model.generate_batch([[4, 5, 6]])
