"""Head importance against its definition: the derivative of the loss by a factor on a head's output."""

import gc

import pytest
import torch
from small_models import FAMILIES, build
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerlens import decoder, models
from steerlens.errors import MethodError
from steerlens.examples import Example, ExampleError
from steerlens.measures import importance
from steerlens.measures.responses import Forced

CTX = torch.tensor([[[1, 2], [0.5, -1]], [[-1, 1], [2, 0]]])
GRAD = torch.tensor([[[0.1, -0.2], [0.4, -0.3]], [[0.2, 0.1], [0.3, 0.5]]])
OUTPUT = {"gpt2": "c_proj", "gpt_neox": "dense", "opt": "out_proj"}


class TestFormulas:
    @pytest.mark.parametrize(("sign", "batch"), [(1, 0.35), (-1, 0.15)])
    def test_estimators(self, sign, batch):
        products = (CTX * GRAD * torch.tensor([1, sign])[:, None, None]).sum(-1)
        found = importance.sums(products)
        assert found["token"].item() / 4 == pytest.approx(0.375)
        assert found["example"].item() / 2 == pytest.approx(0.35)
        assert found["batch"].item() / 2 == pytest.approx(batch)

    def test_layer_norm(self):
        found = importance.layer_norm(torch.tensor([0.3, 0.4, 0, 1.2]))
        assert (found - torch.tensor([0.230769, 0.307692, 0, 0.923077])).abs().max() < 1e-6


@pytest.fixture
def batch(prompts):
    ids = prompts(None, lengths=(20,))[0][0].tolist()
    return Forced.of([ids[:15], ids[3:12]], [ids[15:19], ids[12:14]], {})


def by_definition(model, batch, layer, facts_heads=8):
    """dL/dxi [B, T, H], xi a factor on each head's part of what the output projection is given."""
    _, modules = decoder.read(decoder.find(model))
    family = model.config.model_type
    projection = getattr(modules[layer], OUTPUT.get(family, "o_proj"))
    xi = torch.ones(*batch.ids.shape, facts_heads, 1, requires_grad=True)

    def scale(module, args):
        x = args[0].view(*args[0].shape[:2], facts_heads, -1) if args[0].ndim == 3 else args[0]
        return ((x.view(*batch.ids.shape, facts_heads, -1) * xi).reshape(args[0].shape),)

    hook = projection.register_forward_pre_hook(scale)
    logits = batch.run(model).logits.log_softmax(-1)
    hook.remove()
    loss = 0
    for row, response in enumerate(batch.responses):
        for place, token in enumerate(response, batch.ids.shape[1] - len(response)):
            loss = loss - logits[row, place, token]
    return torch.autograd.grad(loss, xi)[0][..., 0]


@pytest.mark.parametrize(
    ("family", "native"),
    [
        ("llama-mha", "sdpa"),
        ("llama-gqa", "eager"),
        ("gemma2", "eager"),
        ("mistral", "sdpa"),
        ("gpt2", "sdpa"),
        ("gpt_neox", "sdpa"),
        ("opt", "sdpa"),
        ("gpt_oss", "eager"),
        ("deepseek_v3", "sdpa"),
        ("qwen3_next", "sdpa"),
    ],
)
def test_products_are_derivatives(family, native, model_of, batch):
    model = model_of(family, native)
    found = importance.products(model, batch)
    for layer, got in found.items():
        expected = by_definition(model, batch, layer).transpose(1, 2)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert not got[1, :, :8].any()


def test_a_layer_that_attends_twice(batch, monkeypatch):
    """diffllama, to each half of its values: both count, in the first layer too."""
    monkeypatch.setitem(FAMILIES, "diffllama", ("diffllama", {"num_key_value_heads": 4}))
    model, native = build("diffllama"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not decoder.uses_interface(type(model.model.layers[0].self_attn)):
        pytest.skip("older transformers compute diffllama's attention in code of its own")
    found = importance.products(model, batch)
    factors = {layer: torch.ones(*batch.ids.shape, 8, 1, requires_grad=True) for layer in found}

    def scaled(module, *args, **kwargs):
        output, weights = native(module, *args, **kwargs)
        return output * factors[module.layer_idx], weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", scaled)
    logits, loss = batch.run(model).logits.log_softmax(-1), 0
    for row, response in enumerate(batch.responses):
        for place, token in enumerate(response, batch.ids.shape[1] - len(response)):
            loss = loss - logits[row, place, token]
    for layer, expected in zip(found, torch.autograd.grad(loss, factors.values()), strict=True):
        expected = expected[..., 0].transpose(1, 2)
        assert (found[layer] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_nothing_is_left_on_the_model(batch):
    model = build("llama-gqa")
    model.train()
    model.lm_head.weight.requires_grad_(False)
    importance.products(model, batch)
    assert model.training and all(p.grad is None for p in model.parameters())
    asking = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not asking.pop("lm_head.weight") and all(asking.values())
    model.lm_head.weight.requires_grad_(True)
    model.eval()
    assert "_steerlens_engine" not in model.model.__dict__


def test_dropout_is_off(batch):
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = importance.products(model, batch)
    model.train()
    for layer, got in importance.products(model, batch).items():
        assert torch.equal(got, expected[layer])


def test_no_memory_is_kept(model_of, batch):
    model, held = model_of("llama-gqa"), []
    importance.products(model, batch)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            importance.products(model, batch)
            held.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert held[0] == held[1]


def test_a_padded_row_is_the_row_alone(model_of, batch):
    model = model_of("llama-gqa")
    both = importance.products(model, batch)
    alone = importance.products(model, Forced.of([batch.ids[1, 8:17].tolist()], [batch.responses[1]], {}))
    for layer in range(3):
        assert (both[layer][1, :, 8:] - alone[layer][0]).abs().max() <= 1e-4 * alone[layer].abs().max()


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", "cpu")


class TestTiny:
    def test_measure(self, tiny):
        from steerlens.evals.examples import generate

        examples = generate("lookup", 6, first_seed=200_000, length=64)
        one = importance.measure(*tiny, examples, batch_size=1)
        other = importance.measure(*tiny, examples, batch_size=6, estimator="batch", normalize=True)
        assert one.other["batch"] == one.scores  # a batch of one example
        assert one.summary["predicted_tokens"] >= 6 and len(one.scores) == 48
        for layer in range(6):
            assert sum(other.means()[layer, h] ** 2 for h in range(8)) == pytest.approx(1, abs=1e-4)

    def test_batches_do_not_matter(self, tiny):
        from steerlens.evals.examples import generate

        examples = [e for n in (40, 64) for e in generate("capitals", 2, first_seed=200_000, length=n)]
        one, other = (importance.measure(*tiny, examples, estimator="token", batch_size=n) for n in (1, 4))
        assert one.summary == other.summary
        for head, values in one.scores.items():
            assert other.scores[head] == pytest.approx(values, rel=1e-3, abs=1e-6)
            assert other.other["example"][head] == pytest.approx(one.other["example"][head], rel=1e-3, abs=1e-6)

    def test_all_tokens(self, tiny):
        example = Example("The mascot of Elmford is a fox.")
        with pytest.raises(ExampleError, match="importance needs an 'answer'"):
            importance.measure(*tiny, [example])
        found = importance.measure(*tiny, [example], all_tokens=True)
        assert found.summary["predicted_tokens"] == found.summary["tokens"]
        with pytest.raises(MethodError, match="allowed: token, example, batch"):
            importance.measure(*tiny, [example], estimator="tokens")

    def test_no_room_for_the_answer(self, tiny):
        long = Example("the " * 1000, "fox " * 40)
        for options in ({}, {"all_tokens": True}):
            with pytest.raises(ExampleError, match=r"example 2 has 1\d+ tokens with its answer.*room for 1024"):
                importance.measure(*tiny, [Example("What?", "fox"), long], **options)
