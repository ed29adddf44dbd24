"""SEKA: keys of emphasised tokens edited before the position encoding, and its projections (core.md §5.3)."""

import json

import pytest
import torch
from small_models import FAMILIES, NO_SDPA
from steerlens.evals.examples import generate as examples_of
from typer.testing import CliRunner
from vector_files import Keys, apart, experts_of, generate, projections_of

import steerlens
from steerlens import fitting, inlets, models
from steerlens.cli import app
from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.examples import Example, ExampleError
from steerlens.facts import ModelFacts
from steerlens.fitting import keys as fit
from steerlens.methods import ACT, PerRow, ZeroTuning, from_dict, get
from steerlens.spans import Spans
from steerlens.vectors import VectorFile

AdaSEKA, SEKA = get("adaseka"), get("seka")
SPANS = [[(6, 9)], [(7, 9), (11, 12)]]
ALONE = [[(2, 4), (6, 7)]]
KNOWN = [family for family, (kind, _) in FAMILIES.items() if kind in inlets.INLETS]


def native(family):
    return "eager" if family in NO_SDPA else "sdpa"


@pytest.mark.parametrize(
    ("positive", "negative", "key", "logit"),
    [(0.8, None, (1, 3.6), 2.899138), (1.0, 0.2, (1.1, 3.0), 2.510229), (0.8, 0.0, (1, 2.8), None)],
)
def test_oracle(positive, negative, key, logit, tmp_path):
    tensors = {"positive.0": torch.diag(torch.tensor([0.0, 1]))[None], "shift.0": torch.ones(1)}
    tensors["negative.0"] = torch.diag(torch.tensor([1.0, 0]))[None]
    file = str(VectorFile("oracle", tensors, {}).save(tmp_path / "v.safetensors"))
    facts = ModelFacts("oracle", "llama", 1, (1,), (1,))
    ((edit,),) = SEKA(file, positive, negative).plan(facts, Spans.of(SPANS)).values()
    k = torch.tensor([1.0, 2])
    k = k + edit.scale * edit.vectors.values[0] @ k
    assert k.tolist() == pytest.approx(key)
    if logit:
        assert (k @ torch.tensor([0.5, 1]) / 2**0.5).item() == pytest.approx(logit, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", KNOWN)
def test_keys_of_the_span_alone_are_edited_before_the_position_encoding(family, model_of, prompts, tmp_path):
    """A multiple of the identity goes through every rotation: in the first layer the keys are that multiple."""
    model, (ids, mask) = model_of(family, native(family)), prompts("left", lengths=(14, 9))
    path = projections_of(model, tmp_path / "v.safetensors", torch.eye)
    with Keys(model) as plain:
        model(ids, attention_mask=mask)
    with steerlens.steer(model, SEKA(path, 0.5, None), SPANS), Keys(model) as steered:
        model(ids, attention_mask=mask)
    layer = min(plain.found)
    before, after = plain.found[layer], steered.found[layer]
    chosen = torch.zeros(2, 14, dtype=torch.bool)
    chosen[0, 6:9] = chosen[1, 7:9] = chosen[1, 11:12] = True
    where = chosen[:, None, :, None]
    normed = family == "llama4"  # it normalises keys after their rotation
    assert normed or apart(after, torch.where(where, before * 1.5, before)) < 1e-5
    assert torch.equal(after.masked_fill(where, 0), before.masked_fill(where, 0))


@pytest.mark.parametrize("family", KNOWN)
def test_on_every_family(family, model_of, prompts, tmp_path):
    """Backends agree, cached decode is recomputation, chunked prefill one shot, a padded row the row alone."""
    model, (ids, mask) = model_of(family, native(family)), prompts("left", lengths=(14, 9))
    path = projections_of(model, tmp_path / "v.safetensors")
    hooks = [len(module._forward_hooks) for module in model.modules()]  # transformers leaves some for hidden states
    plain = generate(model, [], SPANS, ids, mask)
    for method in (SEKA(path, 1.5, 0.5), [SEKA(path, -1.0, None, layers=2), ZeroTuning(2.0)]):
        got = generate(model, method, SPANS, ids, mask)
        assert apart(got.logits, plain.logits) > 1e-3
        for other in ({"backend": "reference"}, {"use_cache": False}, {"prefill_chunk_size": 5}):
            assert apart(generate(model, method, SPANS, ids, mask, **other).logits, got.logits) < 1e-4, other
        alone = generate(model, method, ALONE, ids[1:, 5:], mask[1:, 5:])
        assert apart(torch.stack(alone.logits)[:, 0], torch.stack(got.logits)[:, 1]) < 1e-4
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@torch.no_grad()
def test_a_key_head_moves_with_all_its_query_heads_and_no_other(model, row, tmp_path):
    path = projections_of(model, tmp_path / "v.safetensors")
    held = VectorFile("x", dict(steerlens.vectors.load(path).tensors), {})
    held.tensors["shift.0"][1] = 0.1
    path = str(held.save(tmp_path / "w.safetensors"))
    with Keys(model) as plain:
        model(row)
    with steerlens.steer(model, SEKA(path, layers=3), [[(3, 7)]]) as steered, Keys(model) as found:
        model(row)
        assert steered.plan[0][0].heads == (0,) and steered.plan[1][0].heads == (0, 1)
    moved = (found.found[0] - plain.found[0]).abs().amax((0, 3))
    assert moved[0, 3:7].min() > 0 and not moved[1].any() and not moved[0, 7:].any() and not moved[0, :3].any()


@torch.no_grad()
def test_neutral_is_native_bit_for_bit(model, row, tmp_path):
    path = projections_of(model, tmp_path / "v.safetensors", shift=0.15)
    expected = model(row).logits
    methods = [SEKA(path, 0, None), SEKA(path, 0, 0), SEKA(path, 2.0), SEKA(path, min_shift=0.1, distance="frobenius")]
    with steerlens.steer(model, methods, [[(3, 7)]]) as steered:
        assert torch.equal(model(row).logits, expected) and steered.plan == {}


@torch.no_grad()
def test_rows_beams_and_composition(model, prompts, tmp_path):
    (ids, mask), path = prompts("left", lengths=(14, 9)), projections_of(model, tmp_path / "v.safetensors")
    method = SEKA(path, 2.0)
    with steerlens.steer(model, PerRow([None, method]), SPANS):
        found = model(ids, attention_mask=mask).logits
    for row, one in enumerate([[], method]):
        with steerlens.steer(model, one, SPANS):
            assert apart(found[row, 5:], model(ids, attention_mask=mask).logits[row, 5:]) < 1e-5
    once = generate(model, method, SPANS, ids, mask, num_beams=2, max_new_tokens=4)
    again = generate(model, method, SPANS, ids, mask, num_beams=2, max_new_tokens=4, use_cache=False)
    assert torch.equal(once.sequences, again.sequences)
    with steerlens.steer(model, [method, ACT(0.3, 0.08)], SPANS) as steered:
        model(ids, attention_mask=mask)
        assert set(steered.report()) == {0, 1, 2}


@pytest.mark.parametrize("family", KNOWN)
def test_adaseka_on_every_family(family, model_of, prompts, tmp_path):
    model, (ids, mask) = model_of(family, native(family)), prompts("left", lengths=(14, 9))
    method = AdaSEKA(experts_of(model, tmp_path / "v.safetensors"), 2.0)
    plain, got = (generate(model, one, SPANS, ids, mask) for one in ([], method))
    assert apart(got.logits, plain.logits) > 1e-3
    for other in ({"backend": "reference"}, {"use_cache": False}):
        assert apart(generate(model, method, SPANS, ids, mask, **other).logits, got.logits) < 1e-4, other
    alone = generate(model, method, ALONE, ids[1:, 5:], mask[1:, 5:])
    assert apart(torch.stack(alone.logits)[:, 0], torch.stack(got.logits)[:, 1]) < 1e-4
    with pytest.raises(UnsupportedError, match="the query of the last prompt token"):
        generate(model, method, SPANS, ids, mask, prefill_chunk_size=5)


@torch.no_grad()
def test_adaseka_by_definition(model, row, tmp_path):
    """P = Σ α_m U_m U_mᵀ of the first layer, put together from its weights."""
    path = experts_of(model, tmp_path / "v.safetensors")
    layer, states = model.model.layers[0], model.model.embed_tokens(row)
    states = layer.input_layernorm(states)
    query = layer.self_attn.q_proj(states)[0, -1].view(2, 4, 8).mean(1)
    before = layer.self_attn.k_proj(states)[0].view(20, 2, 8)
    experts = steerlens.vectors.load(path).tensors["experts.0"]
    expected = before.clone()
    for head in range(2):
        alpha = torch.stack([sum(query[head] @ experts[head, m, k] for k in range(3)) for m in range(2)])
        alpha = alpha / alpha.abs().max()
        projection = torch.zeros(8, 8)
        for m in range(2):
            directions = experts[head, m, :3] / experts[head, m, :3].norm(dim=-1, keepdim=True)
            projection += alpha[m] * directions.T @ directions
        expected[3:7, head] += 0.7 * before[3:7, head] @ projection.T
    seen = []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with steerlens.steer(model, AdaSEKA(path, 0.7, layers=3), [[(3, 7)]]):
        second = layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
        model(row)
    hook.remove(), second.remove()
    assert apart(seen[0][0], before.flatten(1)) < 1e-6 and apart(seen[1][0], expected.flatten(1)) < 1e-5


@torch.no_grad()
def test_adaseka_neutral_and_refusals(model, row, tmp_path):
    path, expected = experts_of(model, tmp_path / "v.safetensors"), model(row).logits
    with steerlens.steer(model, [AdaSEKA(path, 0), AdaSEKA(path, 1.0, min_shift=2)], [[(3, 7)]]) as steered:
        assert torch.equal(model(row).logits, expected) and steered.plan == {}
    assert not AdaSEKA.causal and not AdaSEKA.chunk_exact
    with pytest.raises(MethodError, match="gain='x'"):
        AdaSEKA(path, "x")


class TestErrors:
    def test_parameters_and_files(self, model, model_of, row, tmp_path):
        for parameters, message in (
            ({"layers": 0}, "layers=0"),
            ({"min_shift": -1}, "min_shift=-1"),
            ({"distance": "l1"}, "allowed: mean, frobenius"),
            ({"negative": "x"}, "negative='x'"),
        ):
            with pytest.raises(MethodError, match=message):
                SEKA("v.safetensors", **parameters)
        method = SEKA("v.safetensors", negative=None)
        assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
        path = projections_of(model, tmp_path / "v.safetensors")
        with pytest.raises(SpanError, match="seka needs"):
            steerlens.steer(model, SEKA(path))
        with pytest.raises(MethodError, match=r"'shift' of layer 0 is \[2\].* has 8 key/value heads"):
            steerlens.steer(model_of("llama-mha"), SEKA(path), [[(3, 7)]])
        wide = projections_of(model_of("qwen3"), tmp_path / "wide.safetensors")
        with (
            steerlens.steer(model, SEKA(wide), [[(3, 7)]]),
            pytest.raises(MethodError, match=r"matrices \[2, 16, 16\]; the keys of layer 0 of .* are 2 heads of 8"),
        ):
            model(row)

    def test_families_whose_keys_are_out_of_reach(self, model_of, row, tmp_path):
        model = model_of("phi3")
        plain = model(row).logits
        method = SEKA(projections_of(model, tmp_path / "v.safetensors"))
        with pytest.raises(UnsupportedError, match="'phi3': where its keys are"), steerlens.steer(model, method, SPANS):
            pass
        assert torch.equal(model(row).logits, plain)


class TestFit:
    def test_projections(self):
        """Orthogonal axes of known singular values: 8, 1 and 1 of 10 in sum."""
        plain = torch.diag(torch.tensor([3.0, 3, 3]))[:, None]
        other = torch.diag(torch.tensor([8.0, 1, 1]))[:, None]
        for share, leading in ((0.7, [1, 0, 0]), (0.85, [1, 1, 0]), (0.95, [1, 1, 1])):
            lead, tail = fit.projections(plain, other, share)
            assert lead.shape == (1, 3, 3) and torch.allclose(lead @ lead, lead, atol=1e-6)
            assert lead[0].trace().item() == pytest.approx(sum(leading)) and lead[0, 0, 0].item() == pytest.approx(1)
            assert torch.allclose(lead + tail, torch.eye(3), atol=1e-6)

    def test_texts(self):
        examples = [
            Example("The key is red. Which key?", groups={"context": ("The key is red.",), "gold": ("red",)}),
            Example("The cup is old. Which cup?", groups={"context": ("The cup is old.",), "gold": ("old",)}),
        ]
        (versions, (start, stop)), _ = fit.texts(examples)
        assert versions == ("The key is red.", "Which key? The key is red.", "Which cup? The key is red.")
        assert versions[0][start:stop] == "red"
        with pytest.raises(ExampleError, match="needs examples with different questions"):
            fit.texts(examples[:1])
        with pytest.raises(ExampleError, match="'gold' must lie inside 'context'"):
            fit.texts([Example("A b. C?", groups={"context": ("A b.",), "gold": ("C",)})])

    def test_experts(self):
        generator = torch.Generator().manual_seed(0)
        plain, other = (torch.randn(40, 2, 4, generator=generator) for _ in range(2))
        found, (lead, _) = fit.basis(plain, other, 0.7), fit.projections(plain, other, 0.7)
        norms = found.norm(dim=-1)
        kept = norms > 0
        directions = torch.where(kept[..., None], found / norms.clamp(min=1e-9)[..., None], 0)
        assert torch.allclose(directions.transpose(-1, -2) @ directions, lead, atol=1e-5)
        values = torch.linalg.svdvals(torch.einsum("nga,ngb->gab", plain, other) / 40)
        assert torch.allclose(norms, values * kept, atol=1e-5)

    def test_learned_on_tiny_it_emphasises(self, tmp_path):
        model, tokenizer = models.load("tiny", "cpu")
        found = fitting.seka(model, tokenizer, examples_of("lookup", 24, first_seed=200_000, length=64))
        path = str(found.save(tmp_path / "seka.safetensors"))
        for layer in range(6):
            projection = found.tensors[f"positive.{layer}"]
            assert projection.shape == (4, 16, 16) and torch.allclose(projection @ projection, projection, atol=1e-5)
        sets = {task: examples_of(task, 6, first_seed=200_000, length=64) for task in ("lookup", "contradiction")}
        experts = fitting.adaseka(model, tokenizer, sets)
        assert experts.tensors["experts.3"].shape == (4, 2, 16, 16)
        assert experts.metadata["experts"] == "lookup, contradiction"
        said = "The code of the harbor office is"
        prompt = f"{said} 4417. {said} 9032. Question: What is the code of the harbor office? Answer:"
        inputs, spans = steerlens.encode(tokenizer, prompt, [f"{said} 9032."])
        masses = []
        for method in ([], SEKA(path, 1.5, None, min_shift=0)):
            with torch.no_grad(), steerlens.steer(model, method, spans), steerlens.capture(model, spans) as record:
                model(**inputs)
            masses.append(torch.stack([record[layer].mass[0, :, -1, 0] for layer in (0, 1, 2)]).mean())
        assert masses[1] > masses[0] + 0.02
        command = ["run", "--method", "seka", "--set", f"vectors={path}", "--set", "positive=1.5", "--prompt", prompt]
        done = CliRunner().invoke(app, [*command, "--emphasize", f"{said} 9032.", "--json", "--max-new-tokens", "6"])
        assert done.exit_code == 0 and json.loads(done.stdout)["methods"][0]["positive"] == 1.5, done.output
