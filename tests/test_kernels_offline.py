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
from unittest import mock
import torch
import steerlens
from steerlens.kernels import _configs, offline
from steerlens.kernels.attention import Law, attention
from steerlens.kernels.column_sums import column_sums
from steerlens.kernels.key_index import Labels
from steerlens.kernels.prefix_mean import prefix_mean

def tensors(rows):
    return [torch.zeros(1, h, n, 128, dtype=torch.bfloat16) for h, n in ((32, rows), (8, 2048), (8, 2048))]

term = torch.zeros(1, 1, 2048, dtype=torch.bool)
beta = torch.zeros(1, 32)
group = torch.zeros(1, 32, 2048, dtype=torch.int)
static = lambda: {"labels": Labels.of(terms=[term]), "bias": torch.zeros(1, 32, 1, 1)}
keep = lambda: {"labels": Labels.of(group=group), "law": Law.keep(beta)}
cut = lambda: {"cut": torch.ones(1, 32, 1, dtype=torch.int8)}
def in_their_tiles():
    with mock.patch.dict(_configs._H100, {"plain": _configs._H100["labels"]}):
        attention(*tensors(2048))

mask = torch.zeros(1, 1, 1, 1).expand(1, 1, 2048, 2048)
calls = {
    "masked keep": lambda: attention(*tensors(2048), mask=mask, **keep()),
    "masked columns": lambda: column_sums(*tensors(2048)[:2], torch.zeros(1, 32, 2048), mask=mask),
    "plain": lambda: attention(*tensors(2048)),
    "plain in their tiles": in_their_tiles,
    "static": lambda: attention(*tensors(2048), **static()),
    "keep": lambda: attention(*tensors(2048), **keep()),
    "decode static": lambda: attention(*tensors(1), **static()),
    "decode keep": lambda: attention(*tensors(1), **keep()),
    "columns": lambda: column_sums(*tensors(2048)[:2], torch.zeros(1, 32, 2048)),
    "cut": lambda: attention(*tensors(2048), **cut()),
}
def wide(dtype):
    # beside a mask in fp32, and beside none
    out, value = (torch.zeros(1, 2, 256, 256, dtype=dtype) for _ in range(2))
    for mask in (torch.zeros(1, 1, 256, 256), None):
        prefix_mean(out, value, mask, None, torch.ones(1, 2, 1, dtype=torch.int8), 1, None, 0, 0)

calls |= {"wide bf16": lambda: wide(torch.bfloat16), "wide fp32": lambda: wide(torch.float32)}
made = {}
for capability, names in json.loads(sys.argv[1]):
    for name in names:
        with offline.compiled(capability) as found:
            calls[name]()
        fields = ("name", "warps", "stages", "registers", "spilled", "shared", "matrix")
        made[f"{capability} {name}"] = [
            {field: getattr(k, field) for field in fields} | {"loops": [dataclasses.asdict(x) for x in k.loops()]}
            for k in found
        ]
print(json.dumps(made))
"""
MATRIX = ("steered_prefill_kernel", "steered_decode_kernel", "column_sums_kernel", "prefix_mean_kernel")
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
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


def test_on_sm_90_every_kernel_uses_the_tensor_cores_and_fits(tmp_path):
    made = compiled(
        tmp_path,
        (90, ("plain", "plain in their tiles", "static", "keep", "decode static", "decode keep", "columns", "cut")),
    )
    for name, kernels in made.items():
        # what does not fit beside two accumulators is kept on the stack between the loops
        fits(90, kernels, spilled=96 if name in ("90 static", "90 keep", "90 cut") else 0)
    names = {key: [kernel["name"] for kernel in kernels] for key, kernels in made.items()}
    assert names["90 keep"] == ["count_kernel", "fill_kernel", "steered_prefill_kernel"]
    assert names["90 decode keep"] == ["steered_decode_kernel", "steered_merge_kernel"]
    assert names["90 columns"] == ["column_sums_kernel"]
    assert names["90 cut"][-1] == "prefix_mean_kernel"
    # tiles without labels cost what plain attention costs: the first loop is as long but for the number of the tile
    names = ("plain in their tiles", "static", "keep")
    plain, static, keep = (made[f"90 {name}"][-1]["loops"][0] for name in names)
    for loop in (static, keep):
        assert loop["instructions"] <= 1.02 * plain["instructions"] and loop["matrix"] == plain["matrix"]
        assert loop["spills"] == plain["spills"] == 0


def test_sm_80_in_the_same_process_is_compiled_anew(tmp_path):
    made = compiled(tmp_path, (90, ("decode static",)), (80, ("decode static", "static", "keep", "decode keep")))
    assert made["80 decode static"] != made["90 decode static"]
    for name in ("static", "decode static", "decode keep", "keep"):
        fits(80, made[f"80 {name}"], spilled=96 if name == "keep" else 0)
    assert made["80 keep"][-1]["loops"][0]["spills"] == 0


def test_means_of_the_widest_heads_and_masks_fit_the_smallest_gpus(tmp_path):
    made = compiled(tmp_path, (89, ("wide bf16", "wide fp32", "masked keep", "masked columns")))
    for kernels in made.values():
        for kernel in kernels:
            # fp32 products are IEEE: no matrix instructions
            assert kernel["shared"] <= SHARED[89], kernel


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
def test_the_interpreter_has_nothing_to_compile():
    from steerlens.kernels import offline

    with (
        pytest.raises(RuntimeError, match="TRITON_INTERPRET is set, so there is nothing to compile"),
        offline.compiled(),
    ):
        pass
