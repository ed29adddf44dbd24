"""Loading a model and its tokenizer by alias, Hub id or local path, ready to be steered."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import steerlens
from steerlens.errors import SteerlensError, nearest

TINY = "tiny"
ALIASES: dict[str, str] = {
    TINY: "the trained model that ships with steerlens, offline",
    "deepseek": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "gemma": "google/gemma-2-9b-it",
    "gemma-small": "google/gemma-2-2b-it",
    "gpt2": "openai-community/gpt2",
    "llama": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-small": "meta-llama/Llama-3.2-1B-Instruct",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "phi": "microsoft/Phi-3.5-mini-instruct",
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
    "qwen-small": "Qwen/Qwen2.5-0.5B-Instruct",
    "smollm": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
_WAY_OUT = "try --model tiny, which ships with steerlens, or a local path"
_DEVICES = ("cuda", "xpu", "mps", "cpu")
_QUANTIZATION = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
)
_LOADING = (
    "attn_implementation",
    "cache_dir",
    "code_revision",
    "force_download",
    "gguf_file",
    "local_files_only",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "proxies",
    "quantization_config",
    "subfolder",
    "token",
    "tp_plan",
    "tp_size",
    "use_safetensors",
    "variant",
    "weights_only",
    "experts_implementation",
    "generation_config",
)


class ModelOptionError(SteerlensError, ValueError):
    """A model option that does not exist or has an impossible value."""

    exit_code = 2


class ModelLoadError(SteerlensError, RuntimeError):
    """A model that could not be fetched or read."""


def resolve(name: str) -> str:
    """The Hub id or path behind an alias; another name, or a folder called like an alias, stays as it is."""
    if name == TINY:
        return str(Path(steerlens.__file__).parent / "tiny")
    return name if Path(name).is_dir() else ALIASES.get(name, name)


def hub_is_reachable() -> bool:
    """One short try: the Hub client's own retries take half a minute to say no."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of requests or httpx, by the Hub client's version
        return False
    return True


def devices() -> list[str]:
    """The kinds of device that work here, the preferred one first."""
    import torch

    found = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return [kind for kind in _DEVICES if found.get(kind, True)]


def load(
    name: str,
    device: str | None = None,
    device_map: Any = None,
    dtype: str = "auto",
    revision: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model in eval mode, and its tokenizer with left padding and a pad token.

    Args:
        name: an alias (see `ALIASES`), a Hub id or a local path.
        device: `cuda`, `cuda:1`, `xpu`, `mps` or `cpu`; None takes the first of these that works here.
        device_map: passed on to `from_pretrained`, for example "auto"; excludes `device`.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        revision: commit, tag or branch on the Hub.
        model_args: further `from_pretrained` arguments and config values; `load_in_4bit=True` and the other
            bitsandbytes options make a `BitsAndBytesConfig`.
        trust_remote_code: run code from the Hub repository.

    Raises:
        ModelOptionError: an option that does not exist or cannot be used here.
        ModelLoadError: the model cannot be fetched or read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    target = resolve(name)
    arguments: dict[str, Any] = dict(model_args or {})
    placed = _placement(device, device_map)
    if dtype not in DTYPES:
        raise ModelOptionError(f"dtype {dtype!r} is unknown; allowed: {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    _check_name(name, target)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    source |= {key: arguments[key] for key in ("cache_dir", "subfolder", "token") if key in arguments}
    if not Path(target).is_dir() and not hub_is_reachable():
        source["local_files_only"] = True
    try:
        config = AutoConfig.from_pretrained(target, **source)
        _check_arguments(arguments, config)
        arguments |= _quantized(arguments)
        quantized = "quantization_config" in arguments or getattr(config, "quantization_config", None) is not None
        if device_map is not None or quantized:
            arguments["device_map"] = device_map if device_map is not None else {"": placed}
        model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=DTYPES[dtype], **{**source, **arguments})
        tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left", **source)
        if "device_map" not in arguments:
            model.to(torch.device(placed))
    except SteerlensError:
        raise
    except Exception as error:  # transformers and the Hub client raise some ten kinds for "not there"
        raise ModelLoadError(_reason(name, target, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return model.eval(), tokenizer


def _placement(device: str | None, device_map: Any) -> str:
    import torch

    available = devices()
    if device is None:
        return available[0]
    if device_map is not None:
        raise ModelOptionError(f"device {device!r} and device_map {device_map!r} exclude each other; give one of them")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ModelOptionError(
            f"device {device!r} is unknown; here: {', '.join(available)}{nearest(device, _DEVICES)}"
        ) from None
    if kind not in available:
        raise ModelOptionError(f"device {device!r} is not available; here: {', '.join(available)}")
    return device


def _check_name(name: str, target: str) -> None:
    if Path(target).is_dir():
        if name == TINY and not (Path(target) / "model.safetensors").is_file():
            raise ModelLoadError(f"model 'tiny' is missing from this installation ({target}); install steerlens again")
        return
    if not name.strip():
        raise ModelOptionError("the model's name is empty; give an alias, a Hub id or a local path")
    if name not in ALIASES and name.startswith((".", "/", "~")):
        raise ModelLoadError(f"model {name!r}: there is no such folder; {_WAY_OUT}")


def _check_arguments(arguments: Mapping[str, Any], config: Any) -> None:
    own = {"revision", "trust_remote_code", "device_map", "dtype", "torch_dtype"}
    values = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    for key in arguments:
        if key in own:
            raise ModelOptionError(
                f"model option {key!r} has its own option, --{key.removeprefix('torch_').replace('_', '-')}"
            )
        if key not in _QUANTIZATION and key not in _LOADING and key not in values:
            known = [*_QUANTIZATION, *_LOADING, *sorted(values)]
            raise ModelOptionError(
                f"model option {key!r} is unknown; allowed: {', '.join((*_LOADING, *_QUANTIZATION))}, "
                f"or a value of the model's config{nearest(key, known)}"
            )


def _quantized(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the bitsandbytes options out of `arguments`; the `quantization_config` that they mean, if any."""
    wanted = {key: arguments.pop(key) for key in _QUANTIZATION if key in arguments}
    if not (wanted.get("load_in_4bit") or wanted.get("load_in_8bit")):
        if any(wanted.values()):
            raise ModelOptionError(f"{', '.join(wanted)} need load_in_4bit=true or load_in_8bit=true")
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelLoadError(
            "4-bit and 8-bit loading need bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**wanted)}


def _reason(name: str, target: str, error: Exception) -> str:
    shown = name if name in (target, TINY) else f"{name} ({target})"
    text = " ".join(str(error).split())
    first = text.split(". ")[0][:300] or type(error).__name__
    if Path(target).is_dir():
        return f"model {shown} cannot be loaded: {first}; {_WAY_OUT}"
    token = "" if os.environ.get("HF_TOKEN") else "; a gated or private model needs HF_TOKEN"
    alias = nearest(name, ALIASES) if "/" not in name and name not in ALIASES else ""
    return f"model {shown} cannot be fetched: {first}; {_WAY_OUT}{token}{alias}"
