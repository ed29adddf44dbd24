"""Vectors of single heads, as safetensors files hold them: directions to steer along, and the scores of their heads.

A tensor is named `"<kind>.<layer>"`. Vectors are [H, D] with one row for every query head of the layer (key/value head
where a method says so), scores [H]. Fits write such files (`steerlens.fitting`), methods read them when they plan.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlens import files
from steerlens.errors import MethodError
from steerlens.heads import Heads, rank

if TYPE_CHECKING:
    import torch

    from steerlens.facts import ModelFacts


@dataclass(frozen=True, eq=False)
class HeadVectors:
    """One vector or matrix per head of a layer; equal to itself alone.

    Attributes:
        values: fp32 [H, D] or [H, D, D] on the CPU.
        source: names them in messages.
    """

    values: torch.Tensor
    source: str
    _tables: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)

    def table(self, heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """`values` on a device, in fp32, zeros for heads that are not in `heads`."""
        import torch

        if (heads, device) not in self._tables:
            with torch.inference_mode(False):  # it outlives the forward, and a later one may need gradients
                chosen = torch.zeros_like(self.values)
                chosen[list(heads)] = self.values[list(heads)]
                self._tables[heads, device] = chosen.to(device)
        return self._tables[heads, device]


@dataclass(frozen=True, eq=False)
class VectorFile:
    """What a file of vectors holds.

    Attributes:
        name: the file, for messages.
        tensors: by `"<kind>.<layer>"`, fp32.
        metadata: texts that the fit wrote down.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]

    @property
    def kinds(self) -> str:
        """What it holds, for messages."""
        return ", ".join(sorted({name.rpartition(".")[0] or name for name in self.tensors})) or "nothing"

    def layers(self, kind: str) -> list[int]:
        """Layers that have tensors of this kind."""
        found = [name.rpartition(".") for name in self.tensors]
        return sorted(int(layer) for prefix, _, layer in found if prefix == kind and layer.isdecimal())

    def get(self, kind: str, layer: int, facts: ModelFacts, *, ndim: int = 2, kv: bool = False) -> torch.Tensor:
        """The tensor of a layer, its first dimension checked against the model.

        Args:
            kind: what it is.
            layer: decoder layer.
            facts: of the model.
            ndim: dimensions that it must have.
            kv: whether it has one entry per key/value head, not per query head.

        Raises:
            MethodError: naming the file, the layer and both shapes.
        """
        tensor = self.tensors.get(f"{kind}.{layer}")
        if tensor is None:
            known = self.layers(kind)
            raise MethodError(
                f"{self.name} has no {kind!r} of layer {layer}; it has {kind!r} of layers {known}"
                if known
                else f"{self.name} has no {kind!r} vectors; it holds {self.kinds}"
            )
        heads = (facts.kv_heads if kv else facts.heads)[layer]
        if tensor.ndim != ndim or tensor.shape[0] != heads:
            wanted = [heads, *["D"] * (ndim - 1)]
            raise MethodError(
                f"{self.name}: {kind!r} of layer {layer} is {list(tensor.shape)}; layer {layer} of {facts.name} has "
                f"{heads} {'key/value' if kv else 'query'} heads, so [{', '.join(map(str, wanted))}] is needed: it was "
                "fitted on another model"
            )
        return tensor

    def expect(self, layer: int, facts: ModelFacts) -> None:
        """Raise `MethodError` if the model has no attention in a layer of the file."""
        if layer not in facts.attention_layers:
            raise MethodError(
                f"{self.name} has heads of layer {layer}; {facts.name} has attention in layers "
                f"{', '.join(map(str, facts.attention_layers))}: it was fitted on another model"
            )

    def vectors(self, kind: str, layer: int, facts: ModelFacts, factor: torch.Tensor | None = None) -> HeadVectors:
        """A layer's vectors, each times its head's `factor` [H] where that is given."""
        values = self.get(kind, layer, facts)
        values = values if factor is None else values * factor[:, None]
        return HeadVectors(values, f"{self.name}: {kind!r} of layer {layer}")

    def choose(self, heads: Heads | None, top: int, facts: ModelFacts, kind: str = "score") -> dict[int, list[int]]:
        """`{layer: query heads}`: those of a specification, or without one the `top` best of the file's scores.

        Raises:
            MethodError: if the file scores no, or fewer, heads, or those of another model.
        """
        if heads is not None:
            return {layer: list(found) for layer, found in heads.resolve(facts).items()}
        scored: dict[str, object] = {}
        for layer in self.layers(kind):
            self.expect(layer, facts)
            for head, value in enumerate(self.get(kind, layer, facts, ndim=1).tolist()):
                scored[f"{layer}-{head}"] = value
        if top > len(scored):
            raise MethodError(
                f"top={top} asks for more heads than the {len(scored)} that {self.name} scores; give fewer, or heads="
            )
        found: dict[int, list[int]] = {}
        for layer, head in sorted(rank(scored, self.name)[:top]):
            found.setdefault(layer, []).append(head)
        return found

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write them to a safetensors file, whole or not at all; returns its path."""
        from safetensors.torch import save

        kept = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.tensors.items()}
        path = Path(file)
        files.write(path, save(kept, dict(self.metadata)))
        return path


def load(file: str) -> VectorFile:
    """The vectors of a safetensors file: one here, else one that ships beside the recipes.

    Raises:
        MethodError: naming the file, if it cannot be read or is not such a file.
    """
    try:
        path = files.here_or_shipped(file)
        status = path.stat()
        return _read(path, file, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:
        if isinstance(error, MethodError):
            raise
        raise MethodError(f"vectors: cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


@lru_cache(maxsize=8)
def _read(path: Path, name: str, changed: int, size: int) -> VectorFile:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with torch.inference_mode(False), safe_open(path, "pt") as opened:
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata() or {})
    except SafetensorError as error:
        raise MethodError(f"vectors: {name} is no safetensors file: {error}") from error
    broken = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise MethodError(f"vectors: {name}: {', '.join(sorted(broken))} holds values that are not finite")
    return VectorFile(name, tensors, metadata)
