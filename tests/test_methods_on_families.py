"""Every method on every family that is tested: it steers, in cached generation of a left-padded batch, or says why not.

What each method does is in its own test; this is that none of them is wrong or silent on a family.
"""

import dataclasses
import functools

import pytest
import torch
from small_models import FAMILIES, NO_SDPA, WINDOWED, build
from vector_files import apart, detector_of, experts_of, factors_of, file_of, projections_of

import steerlens
from steerlens.errors import UnsupportedError
from steerlens.methods import PromptMethod, from_dict, get, names

LENGTHS, PADS = (20, 15), 5
HEADS = "*:0,3,6"
SPANS = {
    "emphasis": [[(8, 10), (12, 15)], [(9, 10), (12, 15)]],
    "documents": [[(8, 10), (10, 12), (12, 15), (15, 17)], [(7, 9), (9, 11), (11, 14), (14, 17)]],
    "demos": [[(8, 11), (11, 14), (14, 17)], [(7, 10), (10, 13), (13, 17)]],
    "context": [[(0, 14)], [(PADS, 14)]],
}
ONE = {group: [[(9, 14)]] * 2 for group in SPANS}
"""One section in each row."""

# The description of a method that moves every row of the prompts here, and what makes it neutral: parameters, or spans
# for methods that have no neutral parameters. A string ending in `_of` is the helper that makes the method's file.
METHODS = {
    "act": ({"beta": 0.0, "threshold": 0.06}, {"beta": 1}),
    "adaseka": ({"vectors": experts_of, "gain": 3.0}, {"gain": 0}),
    "anchor_reweighting": ({"vectors": factors_of}, {"heads": {}}),
    "attention_buckets": ({"bases": [10000, 30000, 90000]}, {"bases": [10000]}),
    "attention_influence": ({"heads": HEADS}, {"heads": {}}),
    "attention_sorting": ({}, {"iterations": 0}),
    "context_awareness": ({"alpha": 0.05}, {"alpha": 1}),
    "decore": ({"heads": HEADS}, {"mode": "static", "alpha": 0}),
    "focus_directions": ({"vectors": file_of, "alpha": 1.0}, {"alpha": 0}),
    "focusicl": ({"fraction": 0.3, "batch": 1}, {"fraction": 0, "batch": None}),
    "found_in_the_middle": ({"temperature": 1e-3}, ONE),
    "guide": ({"delta": 3.0}, {"delta": 0}),
    "headmask": ({"heads": HEADS}, {"heads": {}}),
    "instaboost": ({"multiplier": 9.0}, {"multiplier": 1}),
    "iti": ({"vectors": file_of, "alpha": 3.0, "top": 5}, {"alpha": 0}),
    "knockout": ({}, {"heads": {}}),
    "lookback_lens": ({"vectors": detector_of, "chunk": 3, "candidates": 4}, {"candidates": 1}),
    "massive_activations": ({"layer": 1, "channels": [3, 7], "least": 0, "ratio": 0}, {"strength": 0}),
    "nl_iti": ({"vectors": file_of, "alpha": 3.0, "top": 5}, {"alpha": 0}),
    "pai": ({"alpha": 0.7, "first_layer": 0}, {"alpha": 0}),
    "pasta": ({"alpha": 0.05, "heads": HEADS}, {"alpha": 1}),
    "plausibility_gate": ({"methods": [{"method": "pasta", "alpha": 0.05}], "threshold": 0.0}, {"threshold": 1}),
    "positional_scaling": ({"channel": 5, "factor": -4.0, "first_layer": 1, "last_layer": 2}, {"factor": 1}),
    "seka": ({"vectors": projections_of, "positive": 3.0}, {"positive": 0, "negative": None}),
    "selective_context": ({"keep": 1, "top": 2}, ONE),
    "spa": ({"omega": 3.0}, {"omega": 1}),
    "spotlight": ({"target": 0.6}, {"target": 0}),
    "var": (
        {"channels": list(range(64)), "threshold": 2.6, "share": 0.0, "least": 0.0, "first_layer": 0}
        | {"group": "emphasis"},
        {"moved": 0},
    ),
    "zerotuning": ({"gamma": 9.0, "heads": HEADS}, {"gamma": 1}),
}
FUSED = ("phi3", "gpt2", "gpt_neox", "deepseek_v3")
"""Families that make keys by no module of their own."""
REFUSED = {
    "adaseka": dict.fromkeys(FUSED, "model family '{kind}': where its keys are before the position encoding"),
    "seka": dict.fromkeys(FUSED, "model family '{kind}': where its keys are before the position encoding"),
    "positional_scaling": dict.fromkeys(FUSED, "layer 1 of .*{kind}.* by modules q_proj, k_proj and v_proj of its own")
    | {"qwen3_next": "layer 1 of .*{kind}.* gives more than queries"},  # a gate
    # their positions are learned, not rotated
    "attention_buckets": {"gpt2": "GPT2Model has no module", "opt": "OPTDecoder has no module"},
    # a gate lies between its heads and their projection
    "iti": {"qwen3_next": "model family '{kind}': something lies between"},
    "nl_iti": {"qwen3_next": "model family '{kind}': something lies between"},
    # its first layer has linear attention: no mask holds there, and its states cannot be repeated
    "focusicl": {"qwen3_next": r"layers \[0\] of {kind} mix tokens without it"},
    "selective_context": {"qwen3_next": r"layers \[0\] of {kind} mix tokens without it"},
    "lookback_lens": {"qwen3_next": r"states of layers \[0\] of {kind} \(LinearAttentionLayer\)"},
}
"""Method, family, and what the error says of it."""


def native(family):
    return "eager" if family in NO_SDPA else "sdpa"


@pytest.fixture(scope="module")
def method_of(tmp_path_factory):
    """`method_of(name, model, family, **more)`: the method, with its file for that model."""
    folder = tmp_path_factory.mktemp("vectors")

    @functools.cache
    def written(make, family):
        return make(models[family], folder / f"{make.__name__}-{family}.safetensors")

    models = {}

    def get(name, model, family, **more):
        models[family] = model
        made = {k: written(v, family) if callable(v) else v for k, v in METHODS[name][0].items()}
        return from_dict({"method": name} | made | more)

    return get


def generate(model, methods, spans, ids, mask, **options):
    """Tokens [B, 3] and logits [B, 3, V] of greedy generation; no logits of a method that gives none."""
    with steerlens.steer(model, methods, spans):
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            output_logits=getattr(methods, "candidates", 1) == 1,
            return_dict_in_generate=True,
            **{"max_new_tokens": 3} | options,
        )
    logits = found.get("logits")
    return found.sequences[:, ids.shape[1] :], None if logits is None else torch.stack(logits, 1)


@pytest.fixture(scope="module")
def unsteered(model_of):
    """`unsteered(family)`: the prompts, and what the model makes of them."""

    @functools.cache
    def get(family):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 97, (2, LENGTHS[0]), generator=generator)
        mask = torch.ones_like(ids)
        ids[1, :PADS] = mask[1, :PADS] = 0
        return ids, mask, *generate(model_of(family, native(family)), [], None, ids, mask)

    return get


def test_every_method_is_here():
    assert set(METHODS) == set(names()), "a new method needs a row in METHODS"
    assert set(REFUSED) <= set(METHODS) and all(set(refused) <= set(FAMILIES) for refused in REFUSED.values())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("family", FAMILIES)
def test_steers_or_refuses(family, name, model_of, method_of, unsteered):
    model = model_of(family, native(family))
    ids, mask, tokens, logits = unsteered(family)
    method = method_of(name, model, family)
    if (message := REFUSED.get(name, {}).get(family)) is not None:
        with pytest.raises(UnsupportedError, match=message.format(kind=FAMILIES[family][0])):
            generate(model, method, SPANS, ids, mask)
        return
    found, steered = generate(model, method, SPANS, ids, mask)
    alone = {group: [[(a - PADS, b - PADS) for a, b in rows[1]]] for group, rows in SPANS.items()}
    own, own_steered = generate(model, method, alone, ids[1:, PADS:], mask[1:, PADS:])
    assert torch.equal(found[1], own[0])
    if steered is None:
        assert not torch.equal(found, tokens)
        return
    assert steered.isfinite().all()
    moved = [apart(steered[row], logits[row]) > 1e-3 for row in range(2)]
    # documents of a row may stand in order already
    assert all(moved) or (isinstance(method, PromptMethod) and any(moved))
    assert apart(own_steered[0], steered[1]) < 1e-4


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt_oss"])
def test_neutral_is_native_bit_for_bit(family, name, model_of, method_of, unsteered):
    model = model_of(family, native(family))
    ids, mask, _, logits = unsteered(family)
    neutral = METHODS[name][1]
    parameters, spans = ({}, neutral) if neutral is ONE else (neutral, SPANS)
    _, found = generate(model, method_of(name, model, family, **parameters), spans, ids, mask)
    assert torch.equal(found, logits)


WITH_HEADS = [name for name in names() if "heads" in {field.name for field in dataclasses.fields(get(name))}]


@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_head_and_not_the_others_of_its_group(name, model, method_of, prompts):
    """Heads 0 to 3 of a layer share keys and values: what is steered in head 1, or in 1 and 2, is theirs alone."""
    ids, outputs = prompts(None)[0][:2], []
    for heads in ({}, {1: [1]}, {1: [1, 2]}):
        rows = []
        hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(args[0][:, -1].unflatten(-1, (8, -1)))
        )
        try:
            generate(model, method_of(name, model, "llama-gqa", heads=heads), SPANS, ids, None, max_new_tokens=1)
        finally:
            hook.remove()
        outputs.append(rows[-1][1::2] if len(rows[-1]) > 2 else rows[-1])  # of two branches the second
    none, *found = outputs
    for heads, steered in zip(([1], [1, 2]), found, strict=True):
        others = [head for head in range(8) if head not in heads]
        assert apart(steered[:, others], none[:, others]) < 1e-5
        assert all(apart(steered[:, head], none[:, head]) > 1e-3 for head in heads)


BEHIND = {group: [[(2, 4), (5, 8)], [(1, 4), (6, 10)]] for group in SPANS}
"""Spans that the last of 30 rows do not see through a window of 12."""
WITH_SPANS = [name for name in names() if get(name).needs and name != "lookback_lens"]  # which samples
WITH_SPANS += ["knockout", "plausibility_gate"]
REST = ("context_awareness", "pasta", "plausibility_gate")
"""Methods that scale what is in no span: beside a learned sink, which is no key of the prompt, that is something."""
one_layer = functools.cache(lambda family: build(family, native(family), **WINDOWED[family]))


@pytest.mark.parametrize("name", WITH_SPANS)
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "llama4"])
def test_spans_outside_the_window_do_nothing(family, name, method_of, prompts):
    model, (ids, mask) = one_layer(family), prompts(None, lengths=(30, 30))
    method = method_of(name, model, f"one layer of {family}")
    _, logits = generate(model, [], None, ids, mask, max_new_tokens=2)
    _, found = generate(model, method, BEHIND, ids, mask, max_new_tokens=2)
    assert found.isfinite().all()
    assert apart(found[:, 0], logits[:, 0]) < 1e-5 or (family == "gpt_oss" and name in REST)
