"""What the kernels are measured against: SDPA by backend, FlexAttention, extra channels through flash, eager."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from steerlens.kernels.benching.timing import Call, cuda_only, room
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sdpa(inputs: Tensors, backend: str = "flash", causal: bool = True, scale: float | None = None) -> Call:
    """SDPA pinned to a backend, with `enable_gqa`; on the CPU to whatever it has."""
    q, k, v = inputs

    def call() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    return _pinned(call, q, backend)


def packed(inputs: Tensors, backend: str = "flash") -> Call:
    """One-row decode with the query heads of a key/value head as its rows: [B, G, H/G, D], no GQA, nothing masked."""
    q, k, v = inputs
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return _pinned(lambda: scaled_dot_product_attention(rows, k, v).reshape(*q.shape[:3], -1), q, backend)


def repeated(inputs: Tensors, backend: str, causal: bool = True) -> Call:
    """SDPA on key/value heads that were repeated beforehand, untimed."""
    q, k, v = inputs
    heads = q.shape[1] // k.shape[1]
    return sdpa((q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)), backend, causal)


def masked(inputs: Tensors, seen: torch.Tensor) -> Call:
    """SDPA on visible keys, bool [B, H, Tq, Tk]: by the memory-efficient kernel, which keeps weights in 16 bit too."""
    q, k, v = inputs
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    return _pinned(lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen), q, "efficient", "math")


def _pinned(call: Call, q: torch.Tensor, *backends: str) -> Call:
    if q.device.type == "cpu":
        return call

    def run() -> object:
        with sdpa_kernel([BACKENDS[name] for name in backends]):
            return call()

    return run


@functools.lru_cache(1)
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Tensors, keys: torch.Tensor, nats: torch.Tensor) -> Call:
    """FlexAttention compiled, causal, with a bias `nats` [H] on the keys `keys`, bool [Tk]."""
    q, k, v = inputs
    cuda_only(q.device)
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b, h, row, column):
        return row >= column

    def biased(score, b, h, row, column):
        return score + torch.where(keys[column], nats[h], 0.0)

    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=q.device)
    call = _compiled_flex()
    return lambda: call(q, k, v, score_mod=biased, block_mask=mask, enable_gqa=True)


def channels(inputs: Tensors, keys: torch.Tensor, nats: torch.Tensor) -> Call:
    """The bias as extra channels of q and k through SDPA, as the `sdpa` backend has it; widening is timed."""
    from steerlens.backends.channels import Term, widen, with_terms

    q, k, v = inputs
    scale = q.shape[-1] ** -0.5
    term = Term(nats[None, :, None], keys[None, None])

    def call() -> torch.Tensor:
        wide_q, wide_k = with_terms(q, k, [term], scale)
        wide = (wide_q, wide_k, widen(v, [], wide_q.shape[-1]))
        return sdpa(wide, scale=scale)()[..., : v.shape[-1]]

    return call


def eager(inputs: Tensors, keys: torch.Tensor, nats: torch.Tensor) -> Call:
    """Attention with its weights written out, softmax in fp32, the bias on the logits."""
    q, k, v = inputs
    heads, rows, columns = q.shape[1], q.shape[2], k.shape[2]
    room(q.device, q.shape[0] * heads * rows * columns * (3 * q.dtype.itemsize + 8), "eager")
    scale = q.shape[-1] ** -0.5
    shown = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    mask = torch.where(shown, 0.0, torch.finfo(q.dtype).min).to(q.dtype)

    def call() -> torch.Tensor:
        repeat = heads // k.shape[1]
        weights = (q @ k.repeat_interleave(repeat, 1).mT) * scale + mask
        weights = weights + torch.where(keys, nats[:, None, None], 0.0).to(q.dtype)
        weights = torch.softmax(weights, -1, dtype=torch.float32).to(q.dtype)
        return weights @ v.repeat_interleave(repeat, 1)

    return call
