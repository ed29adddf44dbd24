"""What DeCoRe costs: `python -m steerlens.evals.branch_cost --output evals/records/branch-cost.json`.

Seconds until the first token, and of a later step, of one prompt in four ways:

    unsteered        transformers' own greedy generation
    one batch        DeCoRe as steerlens runs it: the prompt read once, then both branches as two rows of one batch
    copied prompt    two passes a step, each one row, on copies of one prompt's cache: how the published code runs
    two passes       two passes of everything, each one row

The last two are bare loops without transformers' `generate` around them, whose work the first two have on top.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

import steerlens
from steerlens import caches, files, models
from steerlens.bench import machine, timing
from steerlens.bench.model import share
from steerlens.methods import HeadMask
from steerlens.methods.decore import DeCoRe

Run = Callable[[], tuple[list[float], list[int]]]
"""Generates once: the times at which it began and had each token, and the tokens."""


def shapes() -> dict[str, Any]:
    """The models: `tiny`, and random ones whose answers mean nothing."""
    found = {"tiny": models.load("tiny")[0]}
    for layers, width, heads in ((12, 512, 8), (16, 1024, 16)):
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        found[f"{layers} layers, {heads} heads, width {width}"] = LlamaForCausalLM(config).eval()
    return found


def ways(model: Any, ids: torch.Tensor, steps: int, heads: dict[int, list[int]]) -> dict[str, Run]:
    """The four ways to generate `steps` tokens behind a prompt [1, T]."""
    method, masked = DeCoRe(heads), share(model)

    def whole(methods: Any) -> tuple[list[float], list[int]]:
        times: list[float] = []

        def note(tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        with steerlens.steer(model, methods):
            times.append(time.perf_counter())
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([note]),
            )
        return times, found[0, ids.shape[1] :].tolist()

    def apart(copied: bool) -> tuple[list[float], list[int]]:
        tokens: list[int] = []
        with steerlens.steer(masked, HeadMask(heads, phase="decode"), prompt_lengths=ids.shape[1]):
            times, kept, part = [time.perf_counter()], [None, None], ids
            if copied:
                prompt = caches.find(model(ids[:, :-1], use_cache=True, logits_to_keep=1))
                kept, part = [copy.deepcopy(prompt), copy.deepcopy(prompt)], ids[:, -1:]
            for _ in range(steps):
                outputs = [
                    one(part, use_cache=True, logits_to_keep=1, **{caches.NAME: cache})
                    for one, cache in zip((model, masked), kept, strict=True)
                ]
                kept = [caches.find(output) for output in outputs]
                part = method.mix(torch.stack([output.logits[:, -1] for output in outputs])).argmax(-1)[:, None]
                tokens.append(int(part))
                times.append(time.perf_counter())
        return times, tokens

    return {
        "unsteered": lambda: whole([]),
        "one batch": lambda: whole(method),
        "copied prompt": lambda: apart(True),
        "two passes": lambda: apart(False),
    }


@torch.inference_mode()
def measure(model: Any, tokens: int, steps: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, and one batch over the other ways, run by run."""
    config = model.config
    ids = torch.randint(3, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    heads = {layer: [0, 3] for layer in range(1, config.num_hidden_layers, 2)}
    runs = ways(model, ids, steps, heads)
    texts = {way: run()[1] for way, run in runs.items()}
    if not texts["one batch"] == texts["copied prompt"] == texts["two passes"]:
        raise SystemExit(f"the ways give different texts: {texts}")
    first: dict[str, list[float]] = {way: [] for way in runs}
    later: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(repeats):
        order = list(runs) if number % 2 else list(runs)[::-1]
        for way in order:
            times, _ = runs[way]()
            first[way].append(times[1] - times[0])
            later[way].append(statistics.median(b - a for a, b in pairwise(times[1:])))
    found: dict[str, Any] = {"tokens": tokens, "steps": steps, "heads": sum(map(len, heads.values()))}
    for part, seconds in (("first_token", first), ("step", later)):
        found[part] = {"ms": {way: round(statistics.median(values) * 1e3, 3) for way, values in seconds.items()}}
        found[part]["one batch over"] = {
            way: timing.spread([a / b for a, b in zip(seconds["one batch"], values, strict=True)])
            for way, values in seconds.items()
            if way != "one batch"
        }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    record: dict[str, Any] = {**machine.describe("cpu"), "dtype": "float32", "models": {}}
    for shape, model in shapes().items():
        for tokens in options.tokens:
            if tokens + options.steps > model.config.max_position_embeddings:
                continue
            found = measure(model, tokens, options.steps, options.repeats)
            record["models"].setdefault(shape, []).append(found)
            for part in ("first_token", "step"):
                medians = {way: spread["median"] for way, spread in found[part]["one batch over"].items()}
                sys.stderr.write(f"{shape}, {tokens} tokens, {part}: one batch over {medians}\n")
    record["load_after"] = machine.load()
    files.write(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
