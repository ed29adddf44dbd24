"""Files of random vectors that fit a model, and greedy generation, for tests of methods that read such files."""

import torch

import steerlens
from steerlens import decoder
from steerlens.observing import Observer
from steerlens.vectors import VectorFile


class Keys(Observer):
    """Keys of every layer as attention sees them."""

    def __init__(self, model):
        super().__init__(model)
        self.found = {}

    def observe(self, layer, call, now):
        self.found[layer] = call.key.clone()


class Widths(Observer):
    """Head dims of queries and of outputs, per layer."""

    def __init__(self, model):
        super().__init__(model)
        self.found = {}

    def observe(self, layer, call, now):
        self.found[layer] = [call.query.shape[-1]]

    def output(self, layer, output, now):
        self.found[layer].append(output.shape[-1])


def file_of(model, path, scale=1.0):
    """Random unit directions for every head of every layer, of length `scale`."""
    facts, _ = decoder.read(decoder.find(model))
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    with torch.no_grad(), Widths(model) as widths:
        model(torch.arange(5, 9)[None])
    for layer, (query, output) in widths.found.items():
        for kind, width in (("query", query), ("mean", output), ("probe", output)):
            vectors = torch.randn(facts.heads[layer], width, generator=generator)
            tensors[f"{kind}.{layer}"] = vectors / vectors.norm(dim=-1, keepdim=True) * scale
        tensors[f"score.{layer}"] = torch.rand(facts.heads[layer], generator=generator)
        for kind in ("mean", "probe"):
            tensors[f"{kind}_deviation.{layer}"] = torch.rand(facts.heads[layer], generator=generator) + 0.5
    return str(VectorFile("test", tensors, {"texts": "20"}).save(path))


def projections_of(model, path, matrix=None, shift=1.0):
    """Random projections of every layer's keys, or the same matrix for all."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer, (groups, width) in _keys(model).items():
        for kind in ("positive", "negative"):
            basis = torch.linalg.qr(torch.randn(groups, width, width, generator=generator))[0][..., : width // 2]
            own = basis @ basis.transpose(-1, -2)
            tensors[f"{kind}.{layer}"] = own if matrix is None else matrix(width).expand(groups, -1, -1)
        tensors[f"shift.{layer}"] = torch.full((groups,), shift)
        tensors[f"shift_frobenius.{layer}"] = torch.full((groups,), shift / 10)
    return str(VectorFile("test", tensors, {}).save(path))


def experts_of(model, path, experts=2):
    """Random experts of three directions for every layer's keys."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for layer, (groups, width) in _keys(model).items():
        basis = torch.linalg.qr(torch.randn(groups, experts, width, width, generator=generator))[0][:, :, :4]
        tensors[f"experts.{layer}"] = basis * torch.tensor([3.0, 2, 1, 0])[:, None]
        tensors[f"shift.{layer}"] = torch.ones(groups)
    return str(VectorFile("test", tensors, {}).save(path))


def detector_of(model, path, seed=0, scale=40.0):
    """A detector of Lookback Lens with random weights."""
    facts, _ = decoder.read(decoder.find(model))
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"weight.{n}": scale * torch.randn(facts.heads[n], generator=generator) for n in facts.attention_layers}
    return str(VectorFile("test", tensors | {"bias": torch.tensor([0.1])}, {}).save(path))


def factors_of(model, path, anchors=2, scale=3.0):
    """Random factors of every layer's heads on so many anchors."""
    facts, _ = decoder.read(decoder.find(model))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"beta.{n}": scale * torch.randn(facts.heads[n], anchors, generator=generator) for n in facts.attention_layers
    }
    return str(VectorFile("test", tensors, {}).save(path))


def _keys(model):
    """Key/value heads and head dim of every layer with attention."""
    facts, _ = decoder.read(decoder.find(model))
    with torch.no_grad(), Keys(model) as keys:
        model(torch.arange(5, 9)[None])
    assert sorted(keys.found) == list(facts.attention_layers)
    return {layer: (found.shape[1], found.shape[-1]) for layer, found in keys.found.items()}


def generate(model, methods, spans, ids, mask, backend="auto", **options):
    with steerlens.steer(model, methods, spans, backend=backend):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **{"max_new_tokens": 5, **options},
        )


def apart(got, expected):
    """Largest difference over the largest value; tuples are stacked."""
    got, expected = (torch.stack(x) if isinstance(x, tuple) else x for x in (got, expected))
    return ((got - expected).abs().max() / expected.abs().max()).item()
