"""End to end: a random model of Llama-3.1-8B's shape, steered through the public API, beside its unsteered twin."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from steerlens.kernels.benching import decode, prefill
from steerlens.kernels.benching.record import Failed, Task, Values

TIME, MEMORY = 1.03, 1.01
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
}  # fmt: skip
TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Of the model and of what is timed."""

    shape: dict[str, int]
    dtype: torch.dtype
    prompt: int
    steps: int
    repeats: int
    threshold: float


FULL = Size(LLAMA_8B, torch.bfloat16, 8192, 128, 5, 5.0)
SMOKE = Size(TINY, torch.float32, 48, 2, 1, 1.5)
METHODS = ("zerotuning", "pasta", "act", "spotlight")
SMOKED = METHODS[2:]
BUSY_STEPS = 8
BACKENDS = ("triton", "sdpa")


def tasks(device: torch.device, smoke: bool) -> list[Task]:
    """Every method on every backend; the first row builds the model."""
    runs = Runs(device, SMOKE if smoke else FULL)
    return [
        Task(
            "model", f"{name} {backend}", functools.partial(runs.method, name, backend), 1 + number, 3 if smoke else 35
        )
        for number, backend in enumerate(BACKENDS)
        for name in (SMOKED if smoke else METHODS)
    ]


def build(size: Size, device: torch.device) -> Any:
    """The model on its device in its dtype from the start: no copy in fp32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**size.shape, dtype=size.dtype, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=size.dtype)
    finally:
        torch.set_default_dtype(before)
    if model.dtype != size.dtype or model.device.type != device.type:
        raise RuntimeError(f"the model came out as {model.dtype} on {model.device}")
    return model.eval().requires_grad_(False)


class Runs:
    """All rows, on one model and a twin that shares its weights."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.size = device, size
        self._models: tuple[Any, Any] | None = None

    def method(self, name: str, backend: str) -> Values:
        """Prefill, decode steps and peak memory of a method over the unsteered model.

        Raises:
            Failed: if steering left the logits as they were, or made them NaN.
        """
        import steerlens
        from steerlens.bench import cases, timing

        model, twin = self._built()
        method, size = self._made(name), self.size
        ids = self._ids()
        spans = [[cases.span(size.prompt)]]
        row: Values = {"method": cases.describe(method), "backend": backend, "prompt": size.prompt, "steps": size.steps}
        native, most = self._peak(model, ids)
        with steerlens.steer(twin, method, spans=spans, backend=backend):
            own, most_own = self._peak(twin, ids)
            row |= {"moved": _difference(own, native)}
            if not 0 < row["moved"] < float("inf"):
                raise Failed("the logits are unsteered or not finite", **row)
            one, other = timing.Prefill(model, ids, {}), timing.Prefill(twin, ids, {})
            row["prefill"] = timing.summary(timing.pairs(one, other, count=size.repeats, warmup=1))
            one, other = timing.Decode(model, ids, size.steps), timing.Decode(twin, ids, size.steps)
            row["decode"] = timing.summary(timing.pairs(one, other, count=size.steps, warmup=min(8, size.steps)))
            if self.device.type == "cuda":
                busy, busy_own = self._busy(one), self._busy(other)
                row["decode_busy"] = {"unsteered_ms": busy, "steered_ms": busy_own, "ratio": busy_own / busy}
        del one, other
        if backend != "sdpa":
            with steerlens.steer(twin, method, spans=spans, backend="sdpa"):
                row["difference_to_sdpa_backend"] = _difference(own, self._peak(twin, ids)[0])
        row["peak_memory_ratio"] = most_own / most if most and most_own else None
        return row | self._met(row)

    @torch.inference_mode()
    def _busy(self, step: Callable[[], float]) -> float:
        """Milliseconds of a step in which the GPU works; a step of one sequence waits for Python most of the time."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(BUSY_STEPS):
                step()
        return sum(event.self_device_time_total for event in found.key_averages()) / BUSY_STEPS / 1e3

    def _met(self, row: Values) -> Values:
        ratios = {"prefill": TIME, "decode": TIME}
        met = {f"{phase}_met": row[phase]["ratio"]["median"] <= bound for phase, bound in ratios.items()}
        memory = row["peak_memory_ratio"]
        return met | {"memory_met": None if memory is None else memory <= MEMORY, "bounds": ratios | {"memory": MEMORY}}

    def _built(self) -> tuple[Any, Any]:
        if self._models is None:
            from steerlens.bench import timing
            from steerlens.bench.model import share

            prefill.release()
            decode.release()
            model = build(self.size, self.device)
            self._models = model, share(model)
            # Each step makes larger tensors than the last: the first to make them waits for their memory.
            step = timing.Decode(model, self._ids(), self.size.steps)
            with torch.inference_mode():
                for _ in range(self.size.steps):
                    step()
        return self._models

    def _ids(self) -> torch.Tensor:
        generator, size = torch.Generator().manual_seed(1), self.size
        return torch.randint(size.shape["vocab_size"], (1, size.prompt), generator=generator).to(self.device)

    def _made(self, name: str) -> Any:
        from steerlens.bench import cases
        from steerlens.methods import ACT, PASTA, SpotLight, ZeroTuning

        if name == "zerotuning":
            return ZeroTuning(gamma=1.5)
        if name == "pasta":
            return PASTA(alpha=cases.ALPHA)
        if name == "spotlight":
            return SpotLight(target=0.3)
        # Attention of random weights is near uniform: only a threshold relative to that finds keys to steer.
        few = cases.few_heads(self.size.shape["num_hidden_layers"], self.size.shape["num_attention_heads"])
        return ACT(threshold=self.size.threshold, threshold_mode="relative", heads=few)

    @torch.inference_mode()
    def _peak(self, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """Logits of the last token, and `torch.cuda.max_memory_allocated` over the forward."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        logits = model(ids, use_cache=True, logits_to_keep=1).logits
        return logits, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())
