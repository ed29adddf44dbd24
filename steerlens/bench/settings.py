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
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_oss", "deepseek_v3")
BACKENDS = ("auto", "reference", "sdpa", "triton")
DTYPES = ("bfloat16", "float16", "float32")


class BenchError(SteerlensError, ValueError):
    """Settings that cannot be measured."""

    exit_code = 2


@dataclass(frozen=True)
class Settings:
    """One benchmark; the defaults are the setting of the CPU budgets.

    Attributes:
        families: among `FAMILIES`, each a model of its own; one that cannot be steered is reported as such.
        layers, heads, kv_heads: of the random models (gpt2 and deepseek_v3 have as many key/value heads as heads).
        head_dims: head dims, each a model of its own; the hidden size is heads x head dim.
        window: keys that a sliding-window layer sees (mistral, gemma2, gemma3, gpt_oss).
        mlp: width of the feed-forward part over the hidden size (3.5 in Llama 3).
        lengths: prompt tokens of the prefill rows.
        decode_lengths: cached tokens of the decode rows.
        decode_steps: single-token steps per repeat.
        batch_size: sequences.
        padding: fraction of the last row that is left padding; rows before it have less, the first none.
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

    families: tuple[str, ...] = ("llama",)
    layers: int = 4
    heads: int = 16
    kv_heads: int = 4
    head_dims: tuple[int, ...] = (64, 128)
    mlp: float = 3.5
    window: int = 1024
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    decode_lengths: tuple[int, ...] = (1024, 4096, 8192)
    decode_steps: int = 32
    batch_size: int = 1
    padding: float = 0.0
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
        for name, known in (
            ("families", FAMILIES),
            ("methods", METHODS),
            ("backends", BACKENDS),
            ("peers", PEERS),
        ):
            for value in getattr(self, name):
                if value not in known:
                    raise BenchError(f"bench: {name}: {_unknown(value, known)}")
        if self.dtype not in DTYPES:
            raise BenchError(f"bench: dtype: {_unknown(self.dtype, DTYPES)}")
        for name in ("layers", "heads", "kv_heads", "batch_size", "decode_steps", "repeats", "peer_repeats"):
            if getattr(self, name) < 1:
                raise BenchError(f"bench: {name}={getattr(self, name)}; allowed: a number >= 1")
        if not 0 <= self.padding <= 0.5:
            raise BenchError(f"bench: padding={self.padding}; allowed: a fraction of the prompt, 0 to 0.5")
        if self.padding and self.batch_size < 2:
            raise BenchError(
                f"bench: padding={self.padding} with batch_size=1; a padded batch has an unpadded row beside it: "
                "batch_size >= 2"
            )
        if self.window < 1:
            raise BenchError(f"bench: window={self.window}; allowed: a number >= 1")
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

    def pads(self, length: int) -> list[int]:
        """Left pads of each row of a batch of this length: none in the first, `padding` of it in the last."""
        last = max(self.batch_size - 1, 1)
        return [round(self.padding * length * row / last) for row in range(self.batch_size)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _unknown(value: str, known: Iterable[str]) -> str:
    return f"{value!r} is unknown; known: {', '.join(known)}{nearest(value, known)}"


_RECORD: Mapping[str, Any] = MappingProxyType({"decode_steps": 16, "repeats": 3, "threads": 2, "device": "cpu"})
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cpu-budget": {},
        "cpu-d64": {**_RECORD, "head_dims": (64,), "peer_limit": 2048},
        "cpu-d128": {**_RECORD, "head_dims": (128,), "peers": ()},
        "gpu": {
            "device": "cuda",
            "heads": 32,
            "kv_heads": 8,
            "head_dims": (128,),
            "lengths": (4096, 8192, 16384),
            "backends": ("triton", "sdpa"),
            "peers": (),
        },
        "cpu-long": {
            **_RECORD,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dims": (64,),
            "lengths": (8192, 16384, 32768),
            "decode_lengths": (8192, 32768),
            "backends": ("sdpa",),
            "peers": (),
        },
        "cpu-families": {
            **_RECORD,
            "families": ("mistral", "gemma2", "gemma3", "gpt2", "gpt_oss", "deepseek_v3"),
            "layers": 2,
            "heads": 8,
            "kv_heads": 2,
            "head_dims": (64,),
            "lengths": (2048,),
            "decode_lengths": (1024,),
            "backends": ("auto",),
            "peers": (),
        },
        "cpu-padded": {
            **_RECORD,
            "heads": 8,
            "kv_heads": 2,
            "head_dims": (64,),
            "lengths": (2048, 4096),
            "decode_lengths": (1024, 4096),
            "batch_size": 4,
            "padding": 0.25,
            "backends": ("sdpa",),
            "peers": ("eager",),
            "peer_limit": 2048,
        },
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
            "window": 24,
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
"""Settings by name: the CPU budgets and, `cpu-…`, what the committed records measure (minutes each on two cores);
a minute on a laptop, seconds (for tests), Llama-3.1-8B's shape."""
