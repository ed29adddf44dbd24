"""The hidden states that a decoder layer reads and gives: probes of the one, edits of the other.

Shapes: B batch rows, T tokens of a forward, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from steerlens import around, decoder
from steerlens.edits import Outliers, Redistribute, SetActivations
from steerlens.errors import MethodError, UnsupportedError
from steerlens.massive import median_magnitude
from steerlens.passes import Pass

if TYPE_CHECKING:
    from steerlens.engine import Engine
    from steerlens.lower import Placed

EPSILON = 1e-6


class Stream:
    """The hidden states around one routed layer."""

    def __init__(self, engine: Engine, layer: int) -> None:
        self._engine, self._layer = engine, layer
        self._probed: list[tuple[int, ...]] = []
        self._set: list[around.Placed] = []
        self._hooks: list[RemovableHandle] = []

    def place(self, placed: list[Placed], around_: list[around.Placed]) -> None:
        """Find what these edits need to know of the layer's input, set what they set of its output, nothing else."""
        groups = [keys for p in placed if isinstance(p.edit, Redistribute) for keys in p.edit.groups]
        probed = list(dict.fromkeys(keys.channels for keys in groups if isinstance(keys, Outliers)))
        wanted = [p for p in around_ if isinstance(p.edit, SetActivations)]
        if probed == self._probed and wanted == self._set:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._probed, self._set = [], [], []
        if not probed and not wanted:
            return
        module = decoder.layers(self._engine.base, [self._layer], "steer other layers")[self._layer]
        if probed:
            self._hooks.append(module.register_forward_pre_hook(self._probe, with_kwargs=True))
        if wanted:
            # first, so that a capture sees what the next layer reads
            self._hooks.append(module.register_forward_hook(self._edit, prepend=True))
        self._probed, self._set = probed, wanted

    def _now(self, hidden: torch.Tensor) -> Pass | None:
        """The forward that a hidden state belongs to; `None` if it is left native."""
        engine = self._engine
        if engine.current is None or (engine.scope is not None and engine.scope.native):
            return None
        now = engine.current.on(hidden.device)
        if hidden.ndim != 3 or hidden.shape[1] != now.q_len:
            raise UnsupportedError(
                f"{engine.describe()}: layer {self._layer} of {engine.facts.name} has hidden states of shape "
                f"{list(hidden.shape)} for {now.q_len} tokens, where [batch, tokens, channels] is known: leave it out"
            )
        return now

    def _probe(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        now = self._now(hidden)
        if now is None or now.q_offset >= now.prompt.width:
            return
        hidden = hidden.detach()[:, : now.prompt.width - now.q_offset]
        for channels in self._probed:
            self._check(channels, hidden)
            known = now.prompt.peaks.get((self._layer, channels))
            if now.q_offset and (known is None or known.shape[1] < now.q_offset):
                continue  # what asks for it refuses what lacks the columns before
            found = peaks(hidden, channels)
            if now.q_offset and known is not None:
                found = torch.cat([known[:, : now.q_offset], found], 1)
            now.prompt.peaks[self._layer, channels] = found

    def _edit(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        now = self._now(hidden)
        if now is None:
            return None
        columns = torch.arange(now.q_offset, now.columns, device=hidden.device)
        first = columns == now.prompt.first[:, None]
        for item in self._set:
            edit = item.edit
            assert isinstance(edit, SetActivations)
            self._check(edit.channels, hidden)
            hidden = set_activations(hidden, edit, first, around.rows_of(item, now))
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    def _check(self, channels: tuple[int, ...], hidden: torch.Tensor) -> None:
        if max(channels) >= hidden.shape[-1]:
            raise MethodError(
                f"channel {max(channels)} is out of range; the hidden state of {self._engine.facts.name} has "
                f"channels 0..{hidden.shape[-1] - 1}"
            )


def peaks(hidden: torch.Tensor, channels: tuple[int, ...]) -> torch.Tensor:
    """max_c |x_c| / rms(x) of hidden states [B, T, D], rms(x)² = mean(x²) + 1e-6, fp32 [B, T]."""
    rms = (hidden.float().square().mean(-1) + EPSILON).sqrt()
    return hidden[..., list(channels)].float().abs().amax(-1) / rms


def set_activations(
    hidden: torch.Tensor, edit: SetActivations, first: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """Hidden states [B, T, D] after an edit, in their dtype.

    Args:
        hidden: as the layer gives them.
        edit: the edit; its channels exist.
        first: the first token of each row, bool [B, T].
        rows: the tokens it is for, bool [B or 1, T or 1]; `None` for all.
    """
    channels = torch.tensor(edit.channels, device=hidden.device)
    x = hidden[..., channels].float()
    most = x.abs().amax(-1)
    massive = (most > edit.least) & (most >= edit.ratio * median_magnitude(hidden.detach()))
    if rows is not None:
        massive = massive & rows
    own, other = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (edit.first, edit.others))
    target = torch.where(first[..., None], own, other)
    x = torch.where(massive[..., None], x + edit.strength * (target - x), x)
    return hidden.index_copy(-1, channels, x.to(hidden.dtype))
