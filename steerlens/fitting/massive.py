"""Massive activations of a model and their means over texts: what `MassiveActivations` sets and sets them to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from steerlens import decoder
from steerlens.massive import median_magnitude
from steerlens.measures.base import MeasureError
from steerlens.methods.massive_activations import MassiveActivations


@torch.no_grad()
def massive_activations(
    model: Any,
    texts: Iterable[Mapping[str, torch.Tensor]],
    *,
    layer: int | None = None,
    least: float = 100.0,
    ratio: float = 1000.0,
    advance: Callable[[int], None] = lambda done: None,
) -> MassiveActivations:
    """The method that sets a model's massive activations after a layer to what they are on average.

    A token's activation is massive if |x| is above `least` and at least `ratio` times the median of its |x|. Channels
    are those that hold one in any text; each has two means, over first tokens and over other tokens that hold one. If
    no other token does, it has the first tokens' means for both.

    Args:
        model: a transformers decoder model, unsteered.
        texts: inputs of forwards, `input_ids` [B, T] and for padded ones `attention_mask`; published, ten long texts.
        layer: after which; `None` for the first layer where there are any.
        least: of the definition.
        ratio: of the definition.
        advance: told how many texts each forward held.

    Raises:
        MeasureError: if no activation is massive.
        UnsupportedError: if the layers are out of reach.
    """
    base = decoder.find(model)
    wanted = decoder.read(base)[0].attention_layers if layer is None else (layer,)
    seen: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[number] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    found: dict[int, list[tuple[bool, torch.Tensor, torch.Tensor]]] = {number: [] for number in wanted}
    modules = decoder.layers(base, wanted, "fit on another model")
    hooks = [module.register_forward_hook(keep(number)) for number, module in modules.items()]
    try:
        for text in texts:
            model(**text)
            real = text.get("attention_mask", torch.ones_like(text["input_ids"])).bool()
            for number, hidden in seen.items():
                size = hidden.float().abs()
                massive = (size > least) & (size >= ratio * median_magnitude(hidden)[..., None])
                for row, token in (massive.any(-1) & real.to(hidden.device)).nonzero().tolist():
                    first = token == int(real[row].long().argmax())
                    found[number].append((first, hidden[row, token].float().cpu(), massive[row, token].cpu()))
            seen.clear()
            advance(len(real))
    finally:
        for hook in hooks:
            hook.remove()
    chosen = next((n for n in sorted(found) if found[n]), None)
    if chosen is None:
        raise MeasureError(
            f"no activation is above {least:g} and {ratio:g} times the median after "
            f"{'any layer' if layer is None else f'layer {layer}'}: lower least and ratio, or give other texts"
        )
    where = torch.stack([massive for _, _, massive in found[chosen]]).any(0)
    means = {}
    for first in (True, False):
        values = [hidden[where] for kind, hidden, _ in found[chosen] if kind == first]
        means[first] = tuple(torch.stack(values).mean(0).tolist()) if values else None
    channels = tuple(where.nonzero()[:, 0].tolist())
    means[True], means[False] = means[True] or means[False], means[False] or means[True]
    return MassiveActivations(chosen, channels, means[True], means[False], least=least, ratio=ratio)
