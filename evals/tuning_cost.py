"""What it costs to try every head alone: `python -m steerlens.evals.tuning_cost --output evals/records/tune-cost.json`.

Seconds of one head on one prompt, for the same heads and prompts, in five ways:

    generate, 1      a run a head and prompt: generate the answer (how published head searches run)
    generate, N      a run a head over batches of N prompts
    forward, 1       a forward over prompt and answer per head and prompt
    candidates, N    N candidates of one prompt in a batch (`PerRow`)
    shared, N        the same from shared lower layers and a shared prefix: what `steerlens tune` does

`forwards` says how many of all (head, prompt) pairs successive halving computes with two fifths of them as its budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from steerlens.evals.examples import generate
from transformers import LlamaConfig, LlamaForCausalLM

import steerlens
from steerlens import files, models
from steerlens.bench import machine
from steerlens.examples import Example
from steerlens.methods import ACT, PASTA, EditMethod, ZeroTuning
from steerlens.spans import Spans
from steerlens.tuning import halving
from steerlens.tuning.scoring import Row, Scorer

METHODS: dict[str, Callable[[Any], EditMethod]] = {
    "pasta": lambda heads: PASTA(0.1, heads=heads),
    "zerotuning": lambda heads: ZeroTuning(2.0, heads=heads),
    "act": lambda heads: ACT(heads=heads),
}
TASKS = {"pasta": "conflict", "zerotuning": "classify", "act": "contradiction"}
N = 32


def shapes(tokenizer: Any) -> dict[str, Any]:
    """The models: `tiny`, and a random one of 30 times its size, whose answers mean nothing."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return {"tiny": models.load("tiny")[0], "12 layers, 8 heads, width 512": LlamaForCausalLM(config).eval()}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@torch.no_grad()
def answer(model: Any, rows: Sequence[Row], method: EditMethod, pad: int) -> None:
    """Generate as many tokens as the longest answer has."""
    width = max(row.prompt for row in rows)
    pads = [width - row.prompt for row in rows]
    ids = torch.tensor([[pad] * n + row.ids[: row.prompt] for n, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * row.prompt for n, row in zip(pads, rows, strict=True)])
    spans = Spans.of(
        [[(a + n, b + n) for a, b in row.groups.get("emphasis", ())] for n, row in zip(pads, rows, strict=True)]
    )
    new = max(len(row.ids) - row.prompt for row in rows)
    with steerlens.steer(model, method, spans):
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=pad,
        )


def measure(model: Any, tokenizer: Any, name: str, examples: Sequence[Example], repeats: int) -> dict[str, Any]:
    """Seconds per head and prompt in each way."""
    layers, count = model.config.num_hidden_layers, model.config.num_attention_heads
    candidates = [METHODS[name]({layer: [h]}) for layer in range(layers) for h in range(count)]
    # the ways that take long run on every fourth head: all heads of a layer cost the same
    some = candidates[::4]
    alone, shared = (Scorer(model, tokenizer, end=True, batch_size=N, share=share) for share in (False, True))
    rows = [alone.row(example) for example in examples]
    pad = tokenizer.pad_token_id

    def batched(scorer: Scorer) -> None:
        pairs = [(c, e) for e in examples for c in candidates]
        for batch in scorer.plan(pairs):
            scorer.score([pairs[i] for i in batch])

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "generate, 1": (lambda: [answer(model, [row], c, pad) for c in some for row in rows], len(some)),
        f"generate, {len(rows)}": (lambda: [answer(model, rows, c, pad) for c in some], len(some)),
        "forward, 1": (lambda: [alone.score([(c, e)]) for c in some for e in examples], len(some)),
        f"candidates, {N}": (lambda: batched(alone), len(candidates)),
        f"shared, {N}": (lambda: batched(shared), len(candidates)),
    }
    for run, _ in ways.values():
        run()
    found = {way: seconds(run, repeats) / heads / len(examples) for way, (run, heads) in ways.items()}
    return {
        "heads": len(candidates),
        "tokens": round(statistics.fmean(len(row.ids) for row in rows)),
        "seconds": {way: round(value, 6) for way, value in found.items()},
        "factor": {way: round(found["generate, 1"] / value, 2) for way, value in found.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    _, tokenizer = models.load("tiny")
    record: dict[str, Any] = {**machine.describe("cpu"), "dtype": "float32", "prompts": options.prompts, "models": {}}
    for shape, model in shapes(tokenizer).items():
        count = options.prompts if shape == "tiny" else 2
        for name, task in TASKS.items():
            examples = generate(task, count, first_seed=900_000)
            found = measure(model, tokenizer, name, examples, options.repeats if shape == "tiny" else 1)
            record["models"].setdefault(shape, {})[name] = found
            sys.stderr.write(f"{shape}, {name}: {found['factor']}\n")
    record["forwards"] = {
        f"{heads} heads, {prompts} prompts": {
            "all": heads * prompts,
            "halving": halving.cost(halving.schedule(heads, prompts, heads * prompts * 2 // 5, heads // 8)),
        }
        for heads, prompts in ((48, 60), (1024, 60))
    }
    record["load_after"] = machine.load()
    files.write(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
