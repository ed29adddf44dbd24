"""`steerlens doctor`: what is installed, and which backends work here, by running them."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import typer

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "huggingface_hub", "triton", "bitsandbytes")
_TOLERANCE = 1e-4


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Check this installation: versions, devices, and a self-check of each backend; exit 1 if one fails."""
    from steerlens import __version__
    from steerlens.models import devices

    versions = {"steerlens": __version__, "python": platform.python_version()} | {p: _version(p) for p in _PACKAGES}
    available = devices()
    checks = self_check(available[0])
    failed = any(check["status"] == "fails" for check in checks)
    if as_json:
        typer.echo(json.dumps({"versions": versions, "devices": available, "checks": checks, "ok": not failed}))
        return int(failed)
    for name, version in versions.items():
        typer.echo(f"{name:<16} {version or 'not installed'}")
    typer.echo(f"{'devices':<16} {', '.join(available)}")
    for check in checks:
        typer.echo(f"{check['name']:<16} {check['status']}{': ' + check['detail'] if check['detail'] else ''}")
    return int(failed)


def self_check(device: str) -> list[dict[str, str]]:
    """Steer a small random Llama: neutral steering is native, each backend agrees with the definition.

    Returns:
        Per check its name, its status ("works", "fails", or "not here" where something is not installed),
        and the detail.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().to(device)
        inputs = {"input_ids": torch.randint(64, (2, 16), device=device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :5] = 0
        native = model(**inputs).logits
        checks = [_run("neutral", lambda: _neutral(model, inputs, native))]
        reference: dict[str, Any] = {}
        for backend in ("reference", "sdpa", "triton"):
            checks.append(_run(backend, lambda backend=backend: _backend(model, inputs, native, backend, reference)))
    return checks


def _run(name: str, check: Any) -> dict[str, str]:
    from steerlens.errors import UnsupportedError

    try:
        return {"name": name, "status": "works", "detail": check()}
    except UnsupportedError as error:
        # the definition and the default backend must work everywhere
        status = "not here" if name == "triton" else "fails"
        return {"name": name, "status": status, "detail": str(error)}
    except Exception as error:  # a doctor reports whatever is wrong, and goes on
        return {"name": name, "status": "fails", "detail": f"{type(error).__name__}: {error}"}


def _neutral(model: Any, inputs: Any, native: Any) -> str:
    import torch

    import steerlens
    from steerlens.methods import ACT, PASTA, ZeroTuning

    with steerlens.steer(model, [ZeroTuning(gamma=1), ACT(beta=1), PASTA(alpha=1)], spans=[[(2, 4)], [(8, 9)]]):
        steered = model(**inputs).logits
    if not torch.equal(steered, native):
        raise AssertionError(f"neutral steering changes logits by {float((steered - native).abs().max()):.2g}")
    return "neutral steering is bit-identical to the native model"


def _backend(model: Any, inputs: Any, native: Any, backend: str, reference: dict[str, Any]) -> str:
    import steerlens
    from steerlens.methods import ACT, PASTA

    methods = [PASTA(alpha=0.1, heads={0: [1, 2], 1: [0]}), ACT(beta=0.4, threshold=0.05, heads={1: [3]})]
    with steerlens.steer(model, methods, spans=[[(2, 4)], [(8, 9)]], backend=backend) as steered:
        logits = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    moved = float((logits - native)[real].abs().max())
    if not moved > 0:
        raise AssertionError(f"steering changed nothing; calls: {steered.report()}")
    error = float((logits - reference.setdefault("logits", logits))[real].abs().max() / logits[real].abs().max())
    if not error <= _TOLERANCE:
        raise AssertionError(f"differs from the reference by {error:.2g} of the largest logit; allowed: {_TOLERANCE:g}")
    return (
        "the definition" if backend == "reference" else f"agrees with the reference to {error:.1e} of the largest logit"
    )


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
