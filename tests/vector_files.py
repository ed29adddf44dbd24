"""Files of random vectors that fit a model, and greedy generation, for tests of methods that read such files."""

import torch

import steerlens
from steerlens import decoder
from steerlens.observing import Observer
from steerlens.vectors import VectorFile


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
