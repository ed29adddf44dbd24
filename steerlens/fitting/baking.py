"""Vectors on head outputs as biases of the output projections: the steering without the library."""

from __future__ import annotations

from typing import Any

import torch

from steerlens.edits import AddOutput
from steerlens.errors import MethodError, UnsupportedError
from steerlens.methods.base import EditMethod
from steerlens.projections import Projections


def output_bias(model: Any, method: EditMethod) -> dict[int, torch.Tensor]:
    """What a method adds to each layer's attention output, fp32 [hidden] per layer: the sum over heads of W_O·shift.

    Args:
        model: a transformers model of a family whose projections are known.
        method: one that adds vectors to head outputs and does nothing else, as `iti` and `nl_iti` do.

    Raises:
        MethodError: if the method does anything else. UnsupportedError: if a gate lies between heads and projection,
            or the family is not known.
    """
    projections = Projections(model)
    facts = projections.facts
    if projections.form.gated:
        raise UnsupportedError(
            f"model family {facts.family!r}: a gate lies between its heads and their projection, so vectors on head "
            "outputs are no bias"
        )
    found: dict[int, torch.Tensor] = {}
    for layer, edits in method.plan(facts, None).items():
        for edit in edits:
            if not isinstance(edit, AddOutput) or edit.batch is not None:
                raise MethodError(f"{method.name} does more than add vectors to head outputs: it is no bias")
            for head in edit.heads:
                weight = projections.output(layer, head).float()
                shift = edit.scale * edit.vectors.values[head].to(weight.device)
                if len(shift) != len(weight):
                    raise MethodError(
                        f"{edit.vectors.source} has vectors of {len(shift)} numbers; head outputs of layer {layer} of "
                        f"{facts.name} have {len(weight)}: it was fitted on another model"
                    )
                found[layer] = found.get(layer, torch.zeros_like(weight[0])) + shift @ weight
    return found


def bake(model: Any, method: EditMethod) -> list[str]:
    """Add `output_bias` to the model's output projections, in place; returns the names of the parameters.

    A bias acts in every row, of the prompt too: the baked model is the one steered with `rows="all"`. A projection
    without a bias gets one, which its class does not load back unless its config asks for that bias.
    """
    biases = output_bias(model, method)
    projections = Projections(model)
    names = {id(module): name for name, module in model.named_modules()}
    changed = []
    for layer, bias in biases.items():
        module = projections.projection(layer)
        with torch.inference_mode(False), torch.no_grad():
            added = bias.to(module.weight.device, module.weight.dtype)
            if module.bias is None:
                module.bias = torch.nn.Parameter(added.clone(), requires_grad=module.weight.requires_grad)
            else:
                module.bias += added
        changed.append(f"{names[id(module)]}.bias")
    return changed
