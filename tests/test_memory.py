"""DESIGN §5.7: a steered forward needs at most twice one layer's q, k and v more than the native one."""

import pytest
import torch
from small_models import build
from torch.profiler import ProfilerActivity, profile

import steerlens
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning

T = 2048


def peak(run) -> int:
    """Largest number of bytes held at once, over what was held before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 1 << 20
    return most


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama-gqa", ZeroTuning(2.0)),
        ("llama-gqa", PASTA(0.1, sections="published")),
        ("llama-gqa", ACT(0.4, 3, "relative")),
        ("llama-gqa", [HeadMask({0: [1]}), ZeroTuning(0.5)]),
        ("mistral", ZeroTuning(2.0)),
        ("gemma2", PASTA(0.1)),
    ],
    ids=["zerotuning", "pasta", "act", "headmask", "window", "softcap"],
)
def test_extra_memory(family, method, padded):
    native = "eager" if family == "gemma2" else "sdpa"
    window = {"sliding_window": 256} if family in ("mistral", "gemma2") else {}
    model = build(
        family, native, hidden_size=256, head_dim=32, num_hidden_layers=2, max_position_embeddings=T, **window
    )
    ids = torch.randint(3, 97, (2, T))
    mask = torch.ones_like(ids)
    mask[1, : 300 if padded else 0] = 0
    q, k, v = (2 * T * h * 32 * 4 for h in (8, *(2 * [model.config.num_key_value_heads])))

    def run():
        with torch.no_grad():
            model(ids, attention_mask=mask, logits_to_keep=1)

    before = peak(run)
    with steerlens.steer(model, method, [[(9, 40), (90, 99)], [(400, 420)]]) as steered:
        extra = peak(run) - before
        assert all(layer["calls"] for layer in steered.report().values())
    assert extra <= 2 * (q + k + v)
