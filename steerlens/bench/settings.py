"""What a benchmark measures, and at which sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from steerlens.errors import SteerlensError, nearest

PEERS = ("eager", "eager-edit", "additive-mask", "pastalib")
METHODS = ("neutral", "zerotuning", "pasta", "headmask", "act")
BACKENDS = ("auto", "reference", "sdpa", "triton")
DTYPES = ("bfloat16", "float16", "float32")


class BenchError(SteerlensError, ValueError):
    """Settings that cannot be measured."""

    exit_code = 2


@dataclass(frozen=True)
class Settings:
    """One benchmark; the defaults are the setting of the CPU budgets.

    Attributes:
        layers, heads, kv_heads: of the random Llama-shaped model.
        head_dims: head dims, each a model of its own; the hidden size is heads x head dim.
        mlp: width of the feed-forward part over the hidden size (3.5 in Llama 3).
        lengths: prompt tokens of the prefill rows.
        decode_lengths: cached tokens of the decode rows.
        decode_steps: single-token steps per repeat.
        batch_size: sequences.
        dtype: of weights and activations.
        methods: among `METHODS`; each may stand for several rows.
        backends: among `BACKENDS`; `reference` is measured at `reference_length` only.
        peers: among `PEERS`; what is not installed or cannot run here is reported as such.
        repeats: timed pairs per prefill row, and passes over the steps per decode row.
        peer_repeats: the same for peers, which are slow.
        peer_limit: longest prompt of the peers' prefill rows.
        reference_length: prompt tokens of the `reference` rows.
        threads: CPU threads; `None` for torch's choice.
        device: torch device; `None` for the first of cuda, xpu, mps, cpu that works.
        seed: of weights and tokens.
    """

    layers: int = 4
    heads: int = 16
    kv_heads: int = 4
    head_dims: tuple[int, ...] = (64, 128)
    mlp: float = 3.5
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    decode_lengths: tuple[int, ...] = (1024, 4096, 8192)
    decode_steps: int = 32
    batch_size: int = 1
    dtype: str = "bfloat16"
    methods: tuple[str, ...] = METHODS
    backends: tuple[str, ...] = ("sdpa", "reference")
    peers: tuple[str, ...] = PEERS
    repeats: int = 5
    peer_repeats: int = 3
    peer_limit: int = 4096
    reference_length: int = 512
    threads: int | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("methods", METHODS), ("backends", BACKENDS), ("peers", PEERS)):
            for value in getattr(self, name):
                if value not in known:
                    raise BenchError(f"bench: {name}: {_unknown(value, known)}")
        if self.dtype not in DTYPES:
            raise BenchError(f"bench: dtype: {_unknown(self.dtype, DTYPES)}")
        for name in ("layers", "heads", "kv_heads", "batch_size", "decode_steps", "repeats", "peer_repeats"):
            if getattr(self, name) < 1:
                raise BenchError(f"bench: {name}={getattr(self, name)}; allowed: a number >= 1")
        for name in ("head_dims", "lengths", "decode_lengths"):
            if any(value < 8 for value in getattr(self, name)):
                raise BenchError(f"bench: {name}={getattr(self, name)}; allowed: numbers >= 8")
        if self.heads % self.kv_heads:
            raise BenchError(f"bench: {self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.threads is not None and self.threads < 1:
            raise BenchError(f"bench: threads={self.threads}; allowed: a number >= 1")

    @classmethod
    def of(cls, size: str, **given: Any) -> Settings:
        """A preset with what is given (not `None`) put in."""
        if size not in PRESETS:
            raise BenchError(f"bench: size: {_unknown(size, PRESETS)}")
        return cls(**(dict(PRESETS[size]) | {k: v for k, v in given.items() if v is not None}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _unknown(value: str, known: Iterable[str]) -> str:
    return f"{value!r} is unknown; known: {', '.join(known)}{nearest(value, known)}"


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cpu-budget": {},
        "small": {
            "layers": 2,
            "heads": 8,
            "kv_heads": 2,
            "head_dims": (64,),
            "lengths": (512, 1024),
            "decode_lengths": (1024,),
            "decode_steps": 16,
            "repeats": 5,
            "reference_length": 256,
        },
        "quick": {
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dims": (16,),
            "lengths": (64,),
            "decode_lengths": (32,),
            "decode_steps": 2,
            "repeats": 2,
            "peer_repeats": 1,
            "reference_length": 32,
        },
        "8b": {"layers": 32, "heads": 32, "kv_heads": 8, "head_dims": (128,)},
    }
)
"""Settings by name: the CPU budgets, a minute on a laptop, seconds (for tests), Llama-3.1-8B's shape."""
