"""Massive activations set to their mean or to zero (methods/context.md §9A)."""

import pytest
import torch
from method_checks import apart, keeps_its_promises
from small_models import build

import steerlens
from steerlens.edits import SetActivations
from steerlens.errors import MethodError
from steerlens.fitting import massive_activations
from steerlens.measures.base import MeasureError
from steerlens.methods import MassiveActivations, PerRow, from_dict
from steerlens.stream import set_activations

X = (0.05, -0.1, 150.0, 0.1, 0.08, -0.05, 0.12, 0.2)
CHANNELS = (7, 40)


@pytest.fixture(scope="module")
def massive():
    """A model whose hidden states hold 400 and -250, or 300, at two channels of some tokens."""
    model = build("llama-gqa")
    with torch.no_grad():
        model.model.embed_tokens.weight[3::3, CHANNELS] = torch.tensor([400.0, -250.0])
        model.model.embed_tokens.weight[::9, CHANNELS] = torch.tensor([300.0, 5.0])
    return model


def after(hidden, edit, first=0, rows=None):
    columns = torch.arange(hidden.shape[1])[None]
    return set_activations(hidden, edit, columns == first, rows)


def test_what_is_massive():
    """|x| = 150 is 1500 times the median of the eight, .1."""
    hidden = torch.tensor([[X, X]])
    expected = hidden.clone()
    expected[0, :, 2] = torch.tensor([-3.0, 8.0])
    assert torch.equal(after(hidden, SetActivations((2,), (-3.0,), (8.0,), 100, 1500)), expected)
    for least, ratio in ((100, 1501), (150, 1000)):
        assert torch.equal(after(hidden, SetActivations((2,), (-3.0,), (8.0,), least, ratio)), hidden)
    assert torch.equal(after(hidden, SetActivations((7,), (-3.0,), (8.0,), 100, 1000)), hidden)
    both = after(hidden, SetActivations((7, 2), (1.0, 2.0), (3.0, 4.0), 100, 1000, 0.5))
    assert torch.allclose(both[0, :, [7, 2]], torch.tensor([[0.6, 76.0], [1.6, 77.0]]))


@pytest.mark.parametrize(("first", "others", "strength"), [(None, None, 1.0), ((380, -200), (310, 4), 0.8)])
def test_is_its_definition(massive, prompts, first, others, strength):
    """Against a hook on the layer, in a padded batch."""
    ids, mask = prompts("left")
    layer, method = 1, MassiveActivations(1, CHANNELS, first, others, strength, 100, 50)
    count = 0

    def edit(module, args, output):
        nonlocal count
        output = output.clone()
        for row in range(ids.shape[0]):
            start = int(mask[row].argmax())
            for token in range(start, ids.shape[1]):
                x = output[row, token]
                most = x[list(CHANNELS)].abs().max()
                if most > 100 and most >= 50 * x.abs().median():
                    count += 1
                    values = torch.tensor((first if token == start else others) or (0, 0)).float()
                    x[list(CHANNELS)] += strength * (values - x[list(CHANNELS)])
        return output

    with torch.no_grad():
        base = massive(ids, attention_mask=mask).logits[mask.bool()]
        with steerlens.steer(massive, method):
            got = massive(ids, attention_mask=mask).logits[mask.bool()]
        hook = massive.model.layers[layer].register_forward_hook(edit)
        expected = massive(ids, attention_mask=mask).logits[mask.bool()]
        hook.remove()
    assert 5 < count < mask.sum() - 5
    assert apart(got, expected) < 1e-6 and apart(got, base) > 1e-3


def test_promises(massive, prompts):
    zeros = MassiveActivations(0, CHANNELS, least=100, ratio=50)
    keeps_its_promises(massive, zeros, MassiveActivations(0, CHANNELS, strength=0), prompts)
    assert not massive.model.layers[0]._forward_hooks


def test_some_rows_of_a_batch(massive, prompts):
    ids, mask = prompts("left")
    zeros = MassiveActivations(0, CHANNELS, least=100, ratio=50)
    with torch.no_grad():
        base = massive(ids, attention_mask=mask).logits
        with steerlens.steer(massive, zeros):
            all_rows = massive(ids, attention_mask=mask).logits
        with steerlens.steer(massive, PerRow([None, zeros, None])):
            got = massive(ids, attention_mask=mask).logits
    assert torch.equal(got[[0, 2]], base[[0, 2]]) and torch.equal(got[1], all_rows[1])


def test_a_capture_sees_what_the_next_layer_reads(massive, row):
    zeros = MassiveActivations(0, CHANNELS, least=100, ratio=50)
    for first in (0, 1):
        contexts = [steerlens.capture(massive, stats="massive"), steerlens.steer(massive, zeros)]
        with torch.no_grad(), contexts[first] as a, contexts[1 - first] as b:
            massive(row)
        record = (a, b)[first]
        assert not record[0].massive.find(100, 50) and not record[1].massive.find(100, 50)
    with torch.no_grad(), steerlens.capture(massive, stats="massive") as record:
        massive(row)
    assert record[0].massive.find(100, 50)


class TestFit:
    def test_channels_and_means(self, massive, prompts):
        ids, mask = prompts("left")
        method = massive_activations(massive, [{"input_ids": ids, "attention_mask": mask}] * 2, least=100, ratio=50)
        with torch.no_grad():
            hidden = massive(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
        size = hidden.abs()
        found = (size > 100) & (size >= 50 * size.median(-1, keepdim=True).values) & mask[..., None].bool()
        tokens, first = found.any(-1), torch.arange(20) == mask.argmax(1)[:, None]
        assert (method.layer, method.channels) == (0, CHANNELS) and (method.least, method.ratio) == (100, 50)
        for values, where in ((method.first, tokens & first), (method.others, tokens & ~first)):
            expected = hidden[where] if where.any() else hidden[tokens]
            assert torch.allclose(torch.tensor(values), expected[:, list(CHANNELS)].mean(0), atol=1e-3)

    def test_its_means_change_less_than_zeros(self, massive, prompts):
        ids, mask = prompts("left")
        text = {"input_ids": ids, "attention_mask": mask}
        method = massive_activations(massive, [text], least=100, ratio=50)
        logits = []
        for methods in ([], method, MassiveActivations(0, method.channels, least=100, ratio=50)):
            with torch.no_grad(), steerlens.steer(massive, methods):
                logits.append(massive(**text).logits[mask.bool()])
        assert apart(logits[1], logits[0]) < apart(logits[2], logits[0])

    def test_a_model_without_any(self, model, row):
        with pytest.raises(MeasureError, match="no activation is above 100 and 1000 times the median after any layer"):
            massive_activations(model, [{"input_ids": row}])


def test_parameters(massive, row):
    method = MassiveActivations(1, [3, 2], [1, 2.5])
    assert from_dict(method.to_dict()) == method and method.channels == (3, 2)
    for wrong in ({"channels": [2, 2]}, {"channels": []}, {"channels": [1], "first": [1, 2]}, {"others": ["a"]}):
        with pytest.raises(MethodError, match=r"channels|first|others"):
            MassiveActivations(1, **{"channels": [1]} | wrong)
    with pytest.raises(MethodError, match=r"layer=3 is out of range; .* attention in layers 0, 1, 2"):
        steerlens.steer(massive, MassiveActivations(3, [1]))
    with steerlens.steer(massive, MassiveActivations(1, [64])), pytest.raises(MethodError, match=r"channels 0\.\.63"):
        massive(row)
