"""The kernels compile for GPUs that are not there: matrix instructions, no spills, shared memory that fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
CODE = """
import dataclasses, json, sys
import torch
import steerlens
from steerlens.kernels import offline
from steerlens.kernels.attention import Law, attention
from steerlens.kernels.column_sums import column_sums
from steerlens.kernels.key_index import Labels

def tensors(rows):
    return [torch.zeros(1, h, n, 128, dtype=torch.bfloat16) for h, n in ((32, rows), (8, 2048), (8, 2048))]

term = torch.zeros(1, 1, 2048, dtype=torch.bool)
beta = torch.zeros(1, 32)
group = torch.zeros(1, 32, 2048, dtype=torch.int)
static = lambda: {"labels": Labels.of(terms=[term]), "bias": torch.zeros(1, 32, 1, 1)}
keep = lambda: {"labels": Labels.of(group=group), "law": Law.keep(beta)}
cut = lambda: {"cut": torch.ones(1, 32, 1, dtype=torch.int8)}
calls = {
    "static": lambda: attention(*tensors(2048), **static()),
    "keep": lambda: attention(*tensors(2048), **keep()),
    "decode static": lambda: attention(*tensors(1), **static()),
    "decode keep": lambda: attention(*tensors(1), **keep()),
    "columns": lambda: column_sums(*tensors(2048)[:2], torch.zeros(1, 32, 2048)),
    "cut": lambda: attention(*tensors(2048), **cut()),
}
made = {}
for capability, names in json.loads(sys.argv[1]):
    for name in names:
        with offline.compiled(capability) as found:
            calls[name]()
        made[f"{capability} {name}"] = [dataclasses.asdict(kernel) for kernel in found]
print(json.dumps(made))
"""
MATRIX = ("steered_prefill_kernel", "steered_decode_kernel", "column_sums_kernel", "prefix_mean_kernel")
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may use."""


def compiled(tmp_path, *wanted):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-W", "ignore", "-c", CODE, json.dumps(wanted)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fits(capability, kernels, spilled=0):
    assert kernels, "nothing was launched"
    for kernel in kernels:
        assert kernel["spilled"] <= spilled, kernel
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["matrix"] > 0 or kernel["name"] not in MATRIX, kernel


def test_on_sm_90_every_kernel_uses_the_tensor_cores_without_spills(tmp_path):
    made = compiled(tmp_path, (90, ("static", "keep", "decode static", "decode keep", "columns", "cut")))
    for kernels in made.values():
        fits(90, kernels)
    names = {key: [kernel["name"] for kernel in kernels] for key, kernels in made.items()}
    assert names["90 keep"] == ["count_kernel", "fill_kernel", "steered_prefill_kernel"]
    assert names["90 decode keep"] == ["steered_decode_kernel", "steered_merge_kernel"]
    assert names["90 columns"] == ["column_sums_kernel"]
    assert names["90 cut"][-1] == "prefix_mean_kernel"


def test_sm_80_in_the_same_process_is_compiled_anew(tmp_path):
    made = compiled(tmp_path, (90, ("decode static",)), (80, ("decode static", "static", "keep", "decode keep")))
    assert made["80 decode static"] != made["90 decode static"]
    for name in ("static", "decode static", "decode keep"):
        fits(80, made[f"80 {name}"])
    # two accumulators of 128 columns: 16 registers of a thread go to the stack, without wgmma
    fits(80, made["80 keep"], spilled=64)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
def test_the_interpreter_has_nothing_to_compile():
    from steerlens.kernels import offline

    with (
        pytest.raises(RuntimeError, match="TRITON_INTERPRET is set, so there is nothing to compile"),
        offline.compiled(),
    ):
        pass
