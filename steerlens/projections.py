"""Value and output projections of single heads, for families whose weights are known to lie as below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.pytorch_utils import Conv1D

from steerlens import decoder
from steerlens.errors import UnsupportedError
from steerlens.wrapping import unwrap


@dataclass(frozen=True)
class Form:
    """Where a family keeps its projections.

    Attributes:
        value: the attention module's projection that gives the values.
        output: the attention module's projection of all heads' outputs.
        layout: how `value` orders what it gives: values alone; queries, keys and values one after the other; or these
            three per head.
        norm: the decoder layer's norm before its MLP, if it has one.
        mlp: the decoder layer's modules that are the MLP, in order.
        indirect: why values and output are not linear in the layer's input, if they are not.
        gated: whether a gate lies between the heads' outputs and their projection.
    """

    value: str = "v_proj"
    output: str = "o_proj"
    layout: Literal["values", "after", "per_head"] = "values"
    norm: str | None = "post_attention_layernorm"
    mlp: tuple[str, ...] = ("mlp",)
    indirect: str | None = None
    gated: bool = False


FORMS: dict[str, Form] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen3",
            "qwen3_moe",
            "gemma",
            "olmo",
            "granite",
            "smollm3",
            "gpt_oss",
            "starcoder2",
            "stablelm",
        ),
        Form(),
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), Form(norm="pre_feedforward_layernorm")),
    **dict.fromkeys(("cohere", "cohere2"), Form(norm="input_layernorm")),
    "olmo2": Form(norm=None),
    "llama4_text": Form(mlp=("feed_forward",)),
    "phi": Form(output="dense", norm="input_layernorm"),
    "phi3": Form(value="qkv_proj", layout="after"),
    "opt": Form(output="out_proj", norm="final_layer_norm", mlp=("fc1", "activation_fn", "fc2")),
    "gpt2": Form(value="c_attn", output="c_proj", layout="after", norm="ln_2"),
    "gpt_neox": Form(value="query_key_value", output="dense", layout="per_head"),
    "deepseek_v3": Form(indirect="its values come through a norm in a low-rank bottleneck"),
    "qwen3_next": Form(indirect="a gate lies between its heads and their projection", gated=True),
}
"""By `model_type`; tests compare each with what its attention modules compute."""


class Projections:
    """The value and output projections of a model's heads, as views of its weights.

    Args:
        model: a transformers decoder model.

    Raises:
        UnsupportedError: for a family that is not in `FORMS`.
    """

    def __init__(self, model: Any) -> None:
        self.base: Any = decoder.find(unwrap(model))
        self.facts, self._modules = decoder.read(self.base)
        if self.facts.family not in FORMS:
            raise UnsupportedError(
                f"model family {self.facts.family!r}: where its heads' value and output projections lie is not known; "
                f"known: {', '.join(sorted(FORMS))}"
            )
        self.form = FORMS[self.facts.family]

    def value(self, layer: int, head: int) -> torch.Tensor:
        """W_V of a query head, [hidden, D]: that of its key/value head.

        Raises:
            UnsupportedError: if the values are not linear in the layer's input, or the weight is no plain matrix.
        """
        if self.form.indirect:
            raise UnsupportedError(
                f"model family {self.facts.family!r}: {self.form.indirect}, so a head has no W_V W_O"
            )
        weight = self._weight(layer, self.form.value)
        heads, groups = self.facts.heads[layer], self.facts.kv_heads[layer]
        group = head // (heads // groups)
        if self.form.layout == "per_head":
            width = weight.shape[1] // heads // 3
            return weight[:, (3 * head + 2) * width : (3 * head + 3) * width]
        before, others = (0, groups) if self.form.layout == "values" else (heads + groups, heads + 2 * groups)
        width = weight.shape[1] // others
        return weight[:, (before + group) * width : (before + group + 1) * width]

    def output(self, layer: int, head: int) -> torch.Tensor:
        """W_O of a query head, [D, hidden]: what its output adds to the layer's, biases aside.

        Raises:
            UnsupportedError: if the weight is no plain matrix.
        """
        weight = self._weight(layer, self.form.output)
        width = weight.shape[0] // self.facts.heads[layer]
        return weight[head * width : (head + 1) * width]

    def projection(self, layer: int) -> Any:
        """The module that projects a layer's head outputs."""
        return getattr(self._modules[layer], self.form.output)

    def mlp(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The first layer's MLP behind its norm, [N, hidden] -> [N, hidden]."""
        inside = {id(module) for module in self._modules[min(self._modules)].modules()}
        layer = next(
            module
            for module in self.base.modules()
            if any(id(child) in inside for child in module.children()) and hasattr(module, self.form.mlp[0])
        )
        steps = [getattr(layer, name) for name in self.form.mlp]
        if self.form.norm is not None and getattr(layer, "do_layer_norm_before", True):
            steps.insert(0, getattr(layer, self.form.norm))

        def apply(x: torch.Tensor) -> torch.Tensor:
            x = x[None]
            for step in steps:
                x = step(x)
                x = x[0] if isinstance(x, tuple) else x
            return x.reshape(-1, x.shape[-1])

        return apply

    def _weight(self, layer: int, name: str) -> torch.Tensor:
        """A projection's matrix, [in, out]."""
        module = getattr(self._modules[layer], name)
        where = f"layer {layer} of {self.facts.name}: {name}"
        if type(module) not in (torch.nn.Linear, Conv1D) or not module.weight.is_floating_point():
            kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
            raise UnsupportedError(
                f"{where} is {kind}, whose weight is no plain matrix: load the model unquantised, and merge adapters"
            )
        weight = module.weight.detach()
        if weight.is_meta or hasattr(weight, "device_mesh"):
            kind = "offloaded" if weight.is_meta else "spread over processes"
            raise UnsupportedError(f"{where} is {kind}: load the model whole, without --device-map or tp_plan")
        return weight.T if isinstance(module, torch.nn.Linear) else weight
