"""SPA, the plausibility gate and Attention Buckets: their numbers, and generation against each branch alone."""

import copy
import json
import math

import pytest
import torch
from modes import apart, assert_same, greedy, positions, whole
from small_models import build
from typer.testing import CliRunner

import steerlens
from steerlens import caches
from steerlens.cli import app
from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.methods import ACT, PASTA, HeadMask, PerRow, ZeroTuning, from_dict
from steerlens.methods.attention_buckets import AttentionBuckets
from steerlens.methods.decore import DeCoRe
from steerlens.methods.plausibility_gate import PlausibilityGate
from steerlens.methods.spa import SPA
from steerlens.spans import Spans, digests

SPANS = [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]]
GATED = {
    "pasta": [PASTA(0.02)],
    "act": [ACT(0.0, 0.08)],
    "two": [ZeroTuning(3.0), HeadMask({0: [1, 2], 2: "*"}, phase="decode")],
}


@torch.no_grad()
def alone(model, ids, mask, tokens, methods=(), spans=None, hidden=None):
    """Logits [steps, B, V] of one branch over the tokens generated; `hidden` [B, columns] is taken out of the mask."""
    with steerlens.steer(model, list(methods), spans, backend="reference"):
        longer, cache, logits, part, at = mask, None, [], ids, positions(mask)
        for column in [*tokens.T, None]:
            seen = longer.clone()
            if hidden is not None:
                seen[:, : hidden.shape[1]][hidden] = 0
            out = model(part, attention_mask=seen, position_ids=at, **{caches.NAME: cache})
            logits.append(out.logits[:, -1])
            if column is not None:
                longer, cache, part = whole(longer, 1), caches.find(out), column[:, None]
                at = positions(longer)[:, -1:]
    return torch.stack(logits[:-1])


def columns(spans, width):
    table = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, sections in enumerate(spans):
        for start, stop in sections:
            table[row, start:stop] = True
    return table


def generate(model, methods, spans, ids, mask=None, **options):
    with steerlens.steer(model, methods, spans):
        return greedy(model, ids, mask, **options)


def check_scores(model, method, spans, got, mask):
    """Teacher-forced scores of what was generated are those of its logits."""
    inputs = {"input_ids": got.sequences, "attention_mask": whole(mask, 8)}
    with steerlens.steer(model, method, spans, prompt_lengths=mask.sum(1).tolist()) as steered:
        scores = method.score(model, inputs, steered.spans)
    expected = torch.stack(got.logits, 1).log_softmax(-1).gather(2, got.sequences[:, 20:, None])[..., 0]
    assert apart(scores[:, 19:], expected) < 1e-4


class TestSPA:
    @pytest.mark.parametrize(("modulate", "second"), [(False, 0.85), (True, 0.944818)])
    def test_oracle(self, modulate, second):
        """methods/core.md §5.5."""
        got = SPA(1.3, modulate).mix(torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.5, 0.0]]))
        assert (got - torch.tensor([2.3, second, 0.0])).abs().max() < 2e-6

    def test_clamps(self):
        logits = torch.tensor([[50.0, 950.0], [0.0, 0.0]])
        assert SPA(5, False).mix(logits).tolist() == [150.0, 1000.0]
        assert SPA(0).mix(logits).tolist() == [0.0, 850.0]

    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
    @pytest.mark.parametrize("native", ["sdpa", "eager"])
    @pytest.mark.parametrize("side", [None, "left"])
    def test_is_the_prompt_without_its_anchor(self, side, native, options, model_of, prompts):
        model, (ids, mask), method = model_of("llama-gqa", native), prompts(side), SPA(2.0)
        got = generate(model, method, SPANS, ids, mask if side else None, **options)
        tokens = got.sequences[:, 20:]
        given = alone(model, ids, mask, tokens)
        without = alone(model, ids, mask, tokens, hidden=columns(SPANS, 20))
        expected = method.mix(torch.stack([given, without]))
        assert apart(got.logits, expected) < 1e-4 and apart(given, without) > 1e-3
        if not options:
            check_scores(model, method, SPANS, got, mask)

    def test_the_anchors_own_text_does_not_matter_to_the_other_branch(self, model, row):
        method, other = SPA(0.0), row.clone()
        other[0, 9:12] = 5
        got, changed = (generate(model, method, [[(9, 12)]], x, max_new_tokens=2) for x in (row, other))
        assert apart(got.logits, changed.logits) < 1e-6

    def test_other_methods_steer_both_branches(self, model, prompts):
        (ids, mask), outer = prompts("left"), ZeroTuning(3.0)
        got = generate(model, [outer, SPA(2.0)], SPANS, ids, mask)
        hidden, tokens = columns(SPANS, 20), got.sequences[:, 20:]
        parts = [alone(model, ids, mask, tokens, [outer], hidden=h) for h in (None, hidden)]
        assert apart(got.logits, SPA(2.0).mix(torch.stack(parts))) < 1e-4

    @pytest.mark.parametrize("outer", [ZeroTuning(4.0), ACT(0.0, 0.08)], ids=lambda m: m.name)
    def test_hidden_tokens_are_tokens(self, outer, model, row):
        """Where the anchor comes first: with and without a mask, padded, uncached and scored, one result."""
        methods, ones = [outer, SPA(3.0)], torch.ones_like(row)
        got = generate(model, methods, [[(0, 4)]], row)
        padded = [torch.nn.functional.pad(x, (3, 0)) for x in (row, ones)]
        for other in (
            generate(model, methods, [[(0, 4)]], row, ones),
            generate(model, methods, [[(0, 4)]], row, use_cache=False),
            generate(model, methods, [[(3, 7)]], *padded),
        ):
            assert apart(got.logits, other.logits) < 1e-4
        expected = torch.stack(got.logits, 1).log_softmax(-1).gather(2, got.sequences[:, 20:, None])[..., 0]
        with steerlens.steer(model, methods, [[(0, 4)]], prompt_lengths=[20]) as steered:
            for mask in ({}, {"attention_mask": whole(ones, 8)}):
                scores = methods[1].score(model, {"input_ids": got.sequences} | mask, steered.spans)
                assert apart(scores[:, 19:], expected) < 1e-4

    @pytest.mark.parametrize("gated", [False, True])
    def test_score_knows_the_inputs_of_encoded_spans(self, gated, model, prompts):
        ids, mask = prompts("left")
        method = PlausibilityGate([SPA(2.0)]) if gated else SPA(2.0)
        spans = Spans({"emphasis": tuple(map(tuple, SPANS))}, digests(ids, mask))
        got = generate(model, method, spans, ids, mask)
        check_scores(model, method, spans, got, mask)
        wrong = ids.clone()
        wrong[0, 5] += 1
        steered = steerlens.steer(model, method, spans, prompt_lengths=mask.sum(1).tolist())
        with steered, pytest.raises(SpanError, match="row 0 of the inputs"):
            method.score(model, {"input_ids": wrong, "attention_mask": mask}, steered.spans)

    @pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}], ids=str)
    def test_something_must_be_left(self, options, model, prompts):
        ids, mask = prompts("left")
        everything = [SPANS[0], [(5, 20)], SPANS[2]]
        with pytest.raises(SpanError, match="row 1: the emphasised text is the whole prompt"):
            generate(model, SPA(2.0), everything, ids, mask, **options)
        assert "forward" not in vars(model) and "_steerlens_engine" not in vars(model.model)
        generate(model, SPA(2.0), [SPANS[0], [(7, 19)], SPANS[2]], ids, mask, **options)
        longer = {"input_ids": torch.cat([ids, ids[:, -3:]], 1), "attention_mask": whole(mask, 3)}
        steered = steerlens.steer(model, SPA(2.0), everything, prompt_lengths=[20, 13, 17])
        with steered, pytest.raises(SpanError, match="row 1: the emphasised text is the whole prompt"):
            steered.methods[0].score(model, longer, steered.spans)

    def test_neutral_is_native(self, model, row):
        got, expected = generate(model, SPA(1), [[(9, 12)]], row), greedy(model, row)
        assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))

    def test_needs_an_anchor(self, model, row):
        with pytest.raises(SpanError, match="spa needs spans for emphasis"):
            generate(model, SPA(2.0), None, row)


class TestPlausibilityGate:
    def test_oracle(self):
        """methods/core.md §5.4: the steered token is taken at 0.35 of 0.60, not at 0.05."""
        raw = torch.tensor([0.60, 0.35, 0.05]).log()
        gate = PlausibilityGate([ZeroTuning(2.0)])
        for top, accepted in ((1, True), (2, False), (0, True)):
            steered = torch.nn.functional.one_hot(torch.tensor(top), 3).float()
            assert torch.equal(gate.mix(torch.stack([raw, steered])), steered if accepted else raw)

    @pytest.mark.parametrize("name", GATED)
    def test_is_either_branch(self, name, model, prompts):
        threshold = 0.9 if name == "two" else 0.3
        (ids, mask), method = prompts("left"), PlausibilityGate(GATED[name], threshold)
        got = generate(model, method, SPANS, ids, mask)
        tokens = got.sequences[:, 20:]
        raw = alone(model, ids, mask, tokens)
        steered = alone(model, ids, mask, tokens, GATED[name], SPANS)
        p = raw.softmax(-1)
        accepted = p.gather(-1, steered.argmax(-1, keepdim=True)) > threshold * p.amax(-1, keepdim=True)
        assert apart(got.logits, torch.where(accepted, steered, raw)) < 1e-4
        assert accepted.any() and not accepted.all()
        check_scores(model, method, SPANS, got, mask)

    @pytest.mark.parametrize("inner", [DeCoRe({0: [1, 2], 2: "*"}), SPA(3.0), AttentionBuckets((2e4, 5e4))])
    def test_around_a_decoding_method(self, inner, model, prompts):
        (ids, mask), method = prompts("left"), PlausibilityGate([ZeroTuning(3.0), inner], 0.9)
        got = generate(model, method, SPANS, ids, mask)
        tokens = got.sequences[:, 20:]
        raw = alone(model, ids, mask, tokens)
        own = [n for n, (a, b) in enumerate(zip(got.logits, raw, strict=True)) if apart(a, b) > 1e-4]
        assert own  # what is not the unsteered model is the inner method
        with steerlens.steer(model, [ZeroTuning(3.0), inner], SPANS):
            first = greedy(model, ids, mask, max_new_tokens=1).logits[0]
        accepted = raw[0].softmax(-1).gather(1, first.argmax(-1, keepdim=True)) > 0.9 * raw[0].softmax(-1).amax(
            -1, keepdim=True
        )
        assert apart(got.logits[0], torch.where(accepted, first, raw[0])) < 1e-4

    def test_the_ends_of_the_threshold(self, model, prompts):
        ids, mask = prompts("left")
        got = generate(model, PlausibilityGate(GATED["pasta"], 1), SPANS, ids, mask)
        assert torch.equal(torch.stack(got.logits), torch.stack(greedy(model, ids, mask).logits))
        got = generate(model, PlausibilityGate(GATED["pasta"], 0), SPANS, ids, mask)
        assert_same(got, generate(model, GATED["pasta"], SPANS, ids, mask))

    def test_description(self, tmp_path):
        gate = PlausibilityGate([PASTA(0.1, heads={1: [3]}), SPA(2.0)], 0.4)
        assert from_dict(gate.to_dict()) == gate and gate.needs == ("emphasis",)
        assert not PlausibilityGate([ACT()]).causal and gate.causal
        file = tmp_path / "gate.yaml"
        file.write_text(
            "schema: 1\nname: gate\nmodel: {id: tiny}\nmethods:\n"
            "  - {method: plausibility_gate, methods: [{method: pasta, alpha: 0.1, heads: {1: [3]}}, "
            "{method: spa, omega: 2}], threshold: 0.4}\n"
        )
        recipe = steerlens.load_recipe(file)
        assert recipe.methods == [gate]
        assert steerlens.load_recipe(recipe.save(tmp_path / "saved.yaml")).methods == [gate]

    @pytest.mark.parametrize(
        ("methods", "message"),
        [
            ([], "no list of methods"),
            ("pasta", "no list of methods"),
            ([{"method": "pata"}], "did you mean 'pasta'"),
            ([PerRow([None])], "cannot gate per_row"),
            ([SPA(), SPA()], "two decoding methods"),
        ],
    )
    def test_what_it_cannot_gate(self, methods, message):
        with pytest.raises(MethodError, match=message):
            PlausibilityGate(methods)

    def test_needs_spans_of_its_methods(self, model, row):
        with pytest.raises(SpanError, match="needs spans for emphasis"):
            generate(model, PlausibilityGate(GATED["pasta"]), None, row)


def of_base(model, ratio):
    """The model with its RoPE base scaled; gemma3 has two."""
    config = copy.deepcopy(model.config)
    kinds = config.rope_parameters
    for parameters in [kinds] if "rope_theta" in kinds else kinds.values():
        parameters["rope_theta"] *= ratio
    scaled = type(model)(config).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


class TestAttentionBuckets:
    BASES = (10000.0, 30000.0, 90000.0)

    def test_oracle(self):
        """methods/context.md §3h."""
        logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.0], [1.0, 1.5, 2.5, 0.0]])
        got = AttentionBuckets(self.BASES).mix(logits)
        assert (got - torch.tensor([0.679843, 2.166559, 1.274470, -0.186324])).abs().max() < 2e-6
        assert (got.softmax(-1) - torch.tensor([0.130626, 0.577698, 0.236740, 0.054936])).abs().max() < 2e-6

    @pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma3"])
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 7}], ids=str)
    def test_is_models_of_each_base(self, options, family, model_of, prompts):
        model, (ids, mask), method = model_of(family), prompts("left"), AttentionBuckets(self.BASES)
        got = generate(model, method, None, ids, mask, **options)
        tokens = got.sequences[:, 20:]
        parts = torch.stack([alone(of_base(model, base / 1e4), ids, mask, tokens) for base in self.BASES])
        assert apart(got.logits, method.mix(parts)) < 1e-4 and apart(parts[0], parts[1]) > 1e-3
        if not options:
            check_scores(model, method, None, got, mask)

    def test_scaled_rope_keeps_its_scaling(self, prompts):
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        model, (ids, mask) = build("llama-gqa", rope_parameters=rope), prompts("left")
        got = generate(model, AttentionBuckets(self.BASES), None, ids, mask, max_new_tokens=2)
        parts = [alone(of_base(model, base / 1e4), ids, mask, got.sequences[:, 20:]) for base in self.BASES]
        assert apart(got.logits, AttentionBuckets(self.BASES).mix(torch.stack(parts))) < 1e-4
        absolute = generate(model, AttentionBuckets((5e5, 1.5e6, 4.5e6), False), None, ids, mask, max_new_tokens=2)
        assert_same(absolute, got)

    def test_another_base_alone(self, model, prompts):
        ids, mask = prompts("left")
        got = generate(model, AttentionBuckets((30000.0,)), None, ids, mask)
        assert_same(got, greedy(of_base(model, 3), ids, mask))

    def test_steered_and_left_as_it_was(self, model, prompts):
        (ids, mask), outer = prompts("left"), PASTA(0.05)
        got = generate(model, [outer, AttentionBuckets(self.BASES)], SPANS, ids, mask)
        tokens = got.sequences[:, 20:]
        parts = [alone(of_base(model, base / 1e4), ids, mask, tokens, [outer], SPANS) for base in self.BASES]
        assert apart(got.logits, AttentionBuckets(self.BASES).mix(torch.stack(parts))) < 1e-4
        assert "forward" not in vars(model.model.rotary_emb)

    def test_its_own_base_is_native(self, model, row):
        for method in (AttentionBuckets((10000,)), AttentionBuckets((10000, 10000), relative=False)):
            got, expected = generate(model, method, None, row), greedy(model, row)
            assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))

    def test_what_it_cannot_run_on(self, model_of, row):
        with pytest.raises(UnsupportedError, match="GPT2Model has no module"):
            generate(model_of("gpt2"), AttentionBuckets(), None, row)
        with pytest.raises(MethodError, match="relative=False needs"):
            generate(model_of("gpt2"), AttentionBuckets(relative=False), None, row)

    @pytest.mark.parametrize("bases", [[], "10000", [1], [math.inf], [True]])
    def test_bad_bases(self, bases):
        with pytest.raises(MethodError, match="bases"):
            AttentionBuckets(bases)

    def test_description(self):
        assert from_dict(AttentionBuckets().to_dict()) == AttentionBuckets()
        assert AttentionBuckets().to_dict()["bases"][1] == 17500.0


@pytest.mark.parametrize("name", ["decore", "spa", "plausibility_gate", "attention_buckets"])
def test_shipped_recipe_through_the_command_line(name):
    facts = ["The code of the harbor office is 4417.", "The code of the harbor office is 9032."]
    prompt = f"{facts[0]} {facts[1]} Question: What is the code of the harbor office? Answer:"
    given = ["run", "--recipe", f"{name}-tiny", "--prompt", prompt, "--emphasize", facts[1], "--max-new-tokens", "8"]
    done = CliRunner().invoke(app, [*given, "--compare", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [from_dict(m) for m in found["methods"]] == steerlens.load_recipe(f"{name}-tiny").methods
    assert set(found["results"][0]) == {"prompt", "baseline", "steered"}
    if name == "spa":
        assert found["results"][0] == {"prompt": prompt, "baseline": " 4417", "steered": " 9032"}


def test_two_decoding_methods_are_refused_in_nested_contexts_too(model, row):
    found = r"decore and spa cannot both be in force"
    with steerlens.steer(model, DeCoRe("0:1")):
        with pytest.raises(MethodError, match=found), steerlens.steer(model, SPA(2.0), [[(9, 12)]]):
            pass
        greedy(model, row)
    with pytest.raises(MethodError, match=found):
        steerlens.steer(model, [DeCoRe("0:1"), SPA(2.0)], [[(9, 12)]])
    assert "_steerlens_engine" not in vars(model.model)
