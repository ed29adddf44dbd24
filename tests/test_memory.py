"""DESIGN §5.7: a steered forward needs at most twice one layer's q, k and v more than the native one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import build
from steerlens.kernels import attention, column_sums, key_index, prefix_mean

import steerlens
from steerlens.bench import memory
from steerlens.methods import ACT, PASTA, DecodingMethod, HeadMask, SpotLight, ZeroTuning
from steerlens.methods.focusicl import FocusICL
from steerlens.methods.selective_context import SelectiveContext

ROOT = Path(__file__).parents[1]
STATIC, PUBLISHED = ZeroTuning(2.0), PASTA(0.1, sections="published")
SINKS = ACT(0.4, 3, "relative")
SPOTLIGHT = SpotLight(0.6)
MASKED = [HeadMask({0: [1]}), ZeroTuning(0.5)]
BLOCKS = [[(400 + 100 * k, 500 + 100 * k) for k in range(16)]] * 2
SPANS = {"emphasis": [[(9, 40), (90, 99)], [(400, 420)]], "documents": BLOCKS, "demos": BLOCKS}


def peak(run) -> int:
    run()
    most = memory.peak(run)[1]
    assert most > 1 << 20
    return most


def extra(family, method, T, heads, kv_heads, head_dim, padded, layers=2, batch=2, backend="auto"):
    """Bytes over the native run, and the bound."""
    native = "eager" if family == "gemma2" else "sdpa"
    window = {"sliding_window": 256} if family in ("mistral", "gemma2") else {}
    model = build(
        family,
        native,
        hidden_size=heads * head_dim,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=T,
        **window,
    )
    ids = torch.randint(3, 97, (batch, T))
    mask = torch.ones_like(ids)
    mask[-1, : T // 6 if padded else 0] = 0

    def run():
        with torch.no_grad():
            if isinstance(method, DecodingMethod):
                model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
            else:
                model(ids, attention_mask=mask, logits_to_keep=1)

    before = peak(run)
    if native == "eager":  # holds weights [B, H, T, T] several times over, behind which steering's own would hide
        before = min(before, batch * heads * T * T * 4)
    spans = {group: rows[-batch:] for group, rows in SPANS.items()}
    with steerlens.steer(model, method, spans, backend=backend) as steered:
        found = peak(run) - before
        assert all(layer["calls"] for layer in steered.report().values())
    return found, 2 * batch * T * head_dim * 4 * (heads + 2 * kv_heads)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("family", "kv_heads", "method"),
    [
        ("llama-gqa", 2, STATIC),
        ("llama-gqa", 2, PUBLISHED),
        ("llama-gqa", 2, SINKS),
        ("llama-gqa", 2, MASKED),
        ("mistral", 2, STATIC),
        ("mistral", 2, SINKS),
        ("gemma2", 4, PASTA(0.1)),
        ("gemma2", 4, SINKS),
        ("llama-gqa", 2, SPOTLIGHT),
        ("llama-gqa", 2, [SPOTLIGHT, ZeroTuning(2.0)]),
        ("mistral", 2, SPOTLIGHT),
        ("gemma2", 4, SPOTLIGHT),
        ("llama-gqa", 2, SelectiveContext()),
        ("llama-gqa", 8, SelectiveContext(None)),
        ("mistral", 2, SelectiveContext(pool="none")),
        ("llama-gqa", 1, FocusICL(0.1, 1)),
        ("llama-gqa", 2, FocusICL(0.1, 1)),
        ("llama-gqa", 2, FocusICL(0.1, 1, "all")),
    ],
    ids=[
        *("zerotuning", "pasta", "act", "headmask", "window", "window-act", "softcap", "softcap-act"),
        *("spotlight", "spotlight-first", "window-spotlight", "softcap-spotlight"),
        *("documents", "documents-parallel", "window-documents", "batches-mqa", "batches", "batches-all"),
    ],
)
def test_extra_memory(family, kv_heads, method, padded):
    found, bound = extra(family, method, 1024 if family == "gemma2" else 2048, 8, kv_heads, 32, padded)
    assert found <= bound


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("family", "method"),
    [("llama-gqa", STATIC), ("llama-gqa", SINKS), ("llama-gqa", MASKED), ("mistral", SINKS), ("gemma2", PASTA(0.1))],
    ids=["zerotuning", "act", "headmask", "window-act", "softcap"],
)
def test_extra_memory_beside_the_kernels(family, method, padded, monkeypatch):
    """Kernels allocate nothing themselves, so that all there is to see is there without running them."""

    class Idle:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid)

    launched = []
    for module in (attention, column_sums, key_index, prefix_mean):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Idle())
    found, bound = extra(family, method, 1024 if family == "gemma2" else 2048, 8, 4, 32, padded, backend="triton")
    assert launched and found <= bound


@pytest.mark.parametrize(
    ("family", "method", "padded"),
    [
        ("llama-gqa", STATIC, False),
        ("llama-gqa", PUBLISHED, False),
        ("llama-gqa", SINKS, False),
        ("llama-gqa", MASKED, False),
        ("llama-gqa", [SINKS, PUBLISHED], False),
        ("llama-gqa", STATIC, True),
        ("llama-gqa", SINKS, True),
        ("mistral", STATIC, False),
        ("mistral", SINKS, False),
    ],
    ids=["zerotuning", "pasta", "act", "headmask", "act+pasta", "padded", "padded-act", "window", "window-act"],
)
def test_extra_memory_at_8k(family, method, padded):
    found, bound = extra(family, method, 8192, 2, 1, 32, padded, layers=1, batch=2 if padded else 1)
    assert found <= bound


@pytest.mark.parametrize("method", [STATIC, SINKS], ids=["zerotuning", "act"])
def test_extra_memory_at_32k(method):
    found, bound = extra("llama-gqa", method, 32768, 2, 1, 16, False, layers=1, batch=1)
    assert found <= bound


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "method", "padded"),
    [
        ("llama-gqa", PUBLISHED, False),
        ("llama-gqa", MASKED, False),
        ("llama-gqa", [SINKS, PUBLISHED], False),
        ("llama-gqa", STATIC, True),
        ("llama-gqa", SINKS, True),
        ("mistral", STATIC, False),
        ("mistral", SINKS, False),
    ],
    ids=["pasta", "headmask", "act+pasta", "padded", "padded-act", "window", "window-act"],
)
def test_extra_memory_at_32k_needs_gigabytes(family, method, padded):
    found, bound = extra(family, method, 32768, 2, 1, 32, padded, layers=1, batch=2 if padded else 1)
    assert found <= bound


def test_the_bound_is_twice_q_k_and_v():
    config = build("llama-gqa", num_hidden_layers=1).config  # 8 query heads, 2 key/value heads, head dim 8
    assert memory.bound(config, 3, 10, 100, 2) == 2 * 3 * 2 * (10 * 8 * 8 + 2 * 100 * 2 * 8)
    assert memory.peak(lambda: torch.ones(1000).sum() + torch.ones(500).sum())[1] in range(4000, 6000)


def capture_extra(T):
    """Bytes that a capture of all statistics of the attention holds over the native run, and the bound."""
    model = build("llama-gqa", num_hidden_layers=1, max_position_embeddings=T)  # 8 query heads, head dim 8
    ids = torch.randint(3, 97, (1, T))

    def run():
        with torch.no_grad():
            model(ids, logits_to_keep=1)

    before = peak(run)
    with steerlens.capture(model, [[(9, 40), (90, 99)]]):
        return peak(run) - before, memory.bound(model.config, 1, T, T, 4)


def test_extra_memory_of_capture():
    found, bound = capture_extra(2048)
    assert found <= bound


CAPTURE = """
import resource, sys
import torch
from small_models import build
import steerlens
from steerlens.recording import KNOWN

torch.set_num_threads(1)
T = int(sys.argv[1])
size = {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
model = build("llama-gqa", num_hidden_layers=1, max_position_embeddings=T, **size)
ids = torch.randint(3, 97, (1, T))
most = []
for stats, heads in (((), {}), (KNOWN, "all")):
    with torch.no_grad(), steerlens.capture(model, [[(9, 40)]], stats, heads=heads) as record:
        model(ids, logits_to_keep=1)
    most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
assert record[0].entropy.shape == (1, 2, T) and not record[0].column_mean.isnan().any()
print(most[1] - most[0])
"""


@pytest.mark.parametrize("T", [16384, pytest.param(32768, marks=pytest.mark.full)])
def test_capture_of_long_prompts_is_linear_in_memory(T):
    """The process grows by far less than one T×T map of one head: 1 GiB at 16k, 4 GiB at 32k."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", CAPTURE, str(T)], env=os.environ | paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= T * 4096
