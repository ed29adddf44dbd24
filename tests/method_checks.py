"""What every method's test asks: the weights of an oracle through each backend, and the promises of DESIGN §5."""

import pytest
import torch
from steerlens.kernels import attention as kernels

import steerlens
from steerlens import backends
from steerlens.backends import sdpa
from steerlens.backends.call import Call
from steerlens.errors import UnsupportedError
from steerlens.facts import ModelFacts
from steerlens.lower import Placed, lower
from steerlens.passes import Pass, Prompt
from steerlens.spans import Spans

BACKENDS = ["reference", "sdpa", "sdpa-channels", "triton", "triton-prefill"]
SPANS = [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]]
"""Of the fixture `prompts("left")`: rows of 20, 13 and 17 tokens."""


def compute(backend, call):
    """Attention; `sdpa-channels` and `triton-prefill` take the path of long prefills, which few rows would not."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "sdpa-channels":
            patch.setattr(sdpa, "FEW_ROWS", 0)
        if backend == "triton-prefill":
            patch.setattr(kernels, "DECODE_ROWS", 0)
        return backends.attention(backend.partition("-")[0], call)


def attend(weights, method, backend, *, spans=None, prompt=None, layers=1, layer=0, peaks=None):
    """Weights [H, Tq, Tk] after a method, of a layer where they are `weights` before it.

    The query rows are the last Tq of Tk columns, of which the first `prompt` (by default all) are the prompt. `peaks`
    are those of `Prompt.peaks`, by channels.
    """
    x = torch.tensor(weights, dtype=torch.float32).log()
    H, Tq, Tk = x.shape
    facts = ModelFacts("oracle", "llama", layers, (H,) * layers, (1,) * layers)
    now = Pass(Prompt.start(prompt or Tk, None, 1, x.device), Tk - Tq, Tq, None, True, {layer: (Tk, 0)})
    now.prompt.peaks = {(layer, channels): torch.tensor([row]) for channels, row in (peaks or {}).items()}
    spans = None if spans is None else Spans.of(spans)
    placed = [Placed(e, spans, i, None) for i, e in enumerate(method.plan(facts, spans).get(layer, ()))]
    eye = torch.eye(Tk)[None, None]
    # A weight of 0 is that of a key behind its row; elsewhere it would be one that no finite logit has.
    call = Call(x.clamp(min=-60)[None], eye, eye, None, 1.0, None, Tk - Tq, None, True)
    call.edits = lower(placed, now, layer, H)
    return compute(backend, call)[0]


def close(got, expected, tolerance=2e-6):
    """Assert that values agree with an oracle of six digits."""
    assert (got - torch.tensor(expected)).abs().max() < tolerance


def apart(got, expected):
    """Largest difference over the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def generate(model, method, spans, ids, mask, backend="auto", **options):
    """Logits of greedy steps, [B, steps, V]."""
    with steerlens.steer(model, method, spans, backend=backend):
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **{"max_new_tokens": 4, "min_new_tokens": 4, **options},
        )
    return torch.stack(found.logits, 1)


def keeps_its_promises(model, method, neutral, prompts, spans=SPANS):
    """Assert DESIGN §5.1 and §5.3 for a method on left-padded prompts, and that it does something.

    `spans` are a list per row, or such lists by group.
    """
    ids, mask = prompts("left")
    base = generate(model, [], None, ids, mask)
    assert torch.equal(generate(model, neutral, spans, ids, mask), base)
    found = generate(model, method, spans, ids, mask)
    assert apart(found, base) > 1e-3
    assert apart(generate(model, method, spans, ids, mask, backend="reference"), found) < 1e-4
    row, pads = 1, 7
    groups = spans if isinstance(spans, dict) else {"emphasis": spans}
    own = {group: [[(a - pads, b - pads) for a, b in rows[row]]] for group, rows in groups.items()}
    alone = generate(model, method, own, ids[row : row + 1, pads:], mask[row : row + 1, pads:])
    assert apart(found[row : row + 1], alone) < 1e-4
    if method.cache_exact:
        assert apart(generate(model, method, spans, ids, mask, use_cache=False), found) < 1e-4
    if method.chunk_exact:
        assert apart(generate(model, method, spans, ids, mask, prefill_chunk_size=7), found) < 1e-4
    else:
        with pytest.raises(UnsupportedError, match=r"whole prompt|rows of the prompt"):
            generate(model, method, spans, ids, mask, prefill_chunk_size=7)
    if method.causal:
        changed = ids.clone()
        changed[:, 17:] = 5
        with torch.no_grad(), steerlens.steer(model, method, spans):
            one, two = (model(input_ids=t, attention_mask=mask).logits[:, 7:17] for t in (ids, changed))
        assert apart(two, one) < 1e-5
