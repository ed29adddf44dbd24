"""How attention is steered without steerlens, for comparison in the same run.

Every peer but `eager` does what `PASTA(alpha=ALPHA)` does on all heads: log α on the prompt outside one span.
Masks are built outside the timed part, in the peers' favour.
Shapes: B batch rows, H query heads, Tq query rows, Tk keys.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

from steerlens.bench.cases import ALPHA, span
from steerlens.bench.model import share
from steerlens.bench.timing import Extra, nothing

EDIT = "steerlens-bench-eager-edit"


@dataclass
class Prepared:
    """A model made ready; `prefill()` and `step(seen)` give the arguments of its forwards."""

    model: Any
    prefill: Callable[[], dict[str, Any]] = dict
    step: Extra = nothing


class NotRunnableError(Exception):
    """Why a peer cannot run here."""


@contextlib.contextmanager
def prepare(name: str, model: Any, prompt: int, batch: int, padded: bool = False) -> Iterator[Prepared]:
    """Make a peer ready for a prompt of `prompt` tokens, left-padded or not.

    Raises:
        NotRunnableError: if it is not installed or does not work with this model.
    """
    family = model.config.model_type
    if name != "eager" and family != "llama":
        raise NotRunnableError(f"written for llama, not for {family}")
    if name != "eager" and padded:
        raise NotRunnableError("knows no left padding")
    with _MAKERS[name](model, prompt, batch) as prepared:
        yield prepared


def memory(name: str, batch: int, heads: int, tokens: int, itemsize: int) -> int:
    """Bytes that a peer's T×T tensors of one layer take in prefill."""
    matrices = {"eager": 3 * itemsize + 4, "eager-edit": 4 * itemsize + 8, "additive-mask": 2 * itemsize}
    return batch * heads * tokens * tokens * matrices.get(name, 5 * itemsize + 4)


@contextlib.contextmanager
def _eager(model: Any, prompt: int, batch: int) -> Iterator[Prepared]:
    yield Prepared(share(model, "eager"))


@contextlib.contextmanager
def _eager_edit(model: Any, prompt: int, batch: int) -> Iterator[Prepared]:
    twin = share(model, EDIT)
    factor = torch.full((prompt,), ALPHA, device=model.device)
    factor[slice(*span(prompt))] = 1
    for module in twin.modules():
        if type(module).__name__ == "LlamaAttention":
            module.bench_factor = factor
    yield Prepared(twin)


def _edit(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention with the weights [B, H, Tq, Tk] edited after the softmax, as published code does it."""
    groups = query.shape[1] // key.shape[1]
    weights = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, -1, dtype=torch.float32)
    factor: torch.Tensor = module.bench_factor  # type: ignore[assignment]
    weights[..., : len(factor)] *= factor
    weights = (weights / weights.sum(-1, keepdim=True)).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value, groups)).transpose(1, 2).contiguous(), weights


AttentionInterface.register(EDIT, _edit)
AttentionMaskInterface.register(EDIT, eager_mask)


@contextlib.contextmanager
def _additive(model: Any, prompt: int, batch: int) -> Iterator[Prepared]:
    heads, dtype, device = model.config.num_attention_heads, model.dtype, model.device
    row = torch.full((prompt,), math.log(ALPHA), dtype=dtype, device=device)
    row[slice(*span(prompt))] = 0

    def square() -> dict[str, Any]:
        hidden = torch.ones(prompt, prompt, dtype=torch.bool, device=device).triu(1)
        mask = row.expand(prompt, prompt).masked_fill(hidden, torch.finfo(dtype).min)
        # Published code holds the mask per head, since each head may be steered differently.
        return {"attention_mask": mask.expand(batch, heads, prompt, prompt).contiguous()}

    def step(seen: int) -> dict[str, Any]:
        mask = torch.nn.functional.pad(row, (0, seen + 1 - prompt))
        return {"attention_mask": mask.expand(batch, heads, 1, -1).contiguous()}

    yield Prepared(share(model), square, step)


@contextlib.contextmanager
def _pastalib(model: Any, prompt: int, batch: int) -> Iterator[Prepared]:
    if importlib.util.find_spec("pastalib") is None:
        raise NotRunnableError("not installed")
    try:
        from pastalib.pasta import PASTA
    except Exception as error:  # a package of others may fail in any way
        raise NotRunnableError(f"its import fails: {type(error).__name__}: {error}") from error
    # It needs a float 4-D mask in every layer, which transformers makes for eager attention only.
    twin = share(model, "eager")
    start, stop = span(prompt)
    # It finds the span by its text: token i is character 2i of a text of letters and blanks.
    text = "".join("b " if start <= i < stop else "a " for i in range(prompt))
    offsets = [[(2 * i, 2 * i + 1) for i in range(prompt)]] * batch
    ids = torch.zeros(batch, prompt, dtype=torch.long)
    with contextlib.ExitStack() as stack:
        try:
            pasta = PASTA(twin, None, list(range(model.config.num_hidden_layers)), ALPHA, "exclude")
            marked = [text[2 * start : 2 * stop - 1]] * batch
            stack.enter_context(pasta.apply_steering(twin, [text] * batch, marked, {"input_ids": ids}, offsets))
            with torch.inference_mode():
                twin(ids[:, :8].to(model.device), logits_to_keep=1)
        except Exception as error:
            why = " ".join(str(error).split())
            raise NotRunnableError(f"steering fails: {type(error).__name__}: {why}") from error
        yield Prepared(twin)


_MAKERS = {"eager": _eager, "eager-edit": _eager_edit, "additive-mask": _additive, "pastalib": _pastalib}
