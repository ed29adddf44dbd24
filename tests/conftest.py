"""Fixtures: small random models and padded prompts; without a GPU, Triton's interpreter."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available() and find_spec("triton") is not None:
    # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
    import fast_interpreter

    fast_interpreter.install()

from small_models import build

torch.set_num_threads(1)
# For processes that tests start: threads for every core would wait for the cores of the other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def model_of():
    """`model_of(family, native)`: a cached fp32 model."""
    cache = {}

    def get(family: str, native: str = "sdpa"):
        if (family, native) not in cache:
            cache[family, native] = build(family, native)
        return cache[family, native]

    return get


@pytest.fixture
def prompts():
    """`prompts(side, lengths)`: token ids and mask, padded left or right."""

    def make(side: str | None = None, lengths=(20, 13, 17), seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        width = max(lengths)
        ids, mask = (
            torch.zeros(len(lengths), width, dtype=torch.long),
            torch.zeros(len(lengths), width, dtype=torch.long),
        )
        for row, length in enumerate(lengths if side else [width] * len(lengths)):
            at = slice(width - length, width) if side == "left" else slice(0, length)
            ids[row, at] = torch.randint(3, 97, (length,), generator=generator)
            mask[row, at] = 1
        return ids, mask

    return make


@pytest.fixture
def model(model_of):
    return model_of("llama-gqa")


@pytest.fixture
def row(prompts):
    """One prompt of 20 tokens."""
    return prompts(None, lengths=(20,))[0]
