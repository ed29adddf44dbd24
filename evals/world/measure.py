"""Measure `tiny` on held-out prompts: `python -m steerlens.evals.world.measure --output evals/records/tiny.json`.

Writes one JSON record; `--heads FILE` also writes the retrieval scores in the form `heads="FILE:top8"` reads.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from steerlens.evals.examples import of
from steerlens.evals.world import probe
from steerlens.evals.world.tasks import TASKS
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerlens
from steerlens.measures import retrieval, sinks
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning

# First seeds of the sample sets; no set is used for two purposes.
SEEDS = {"accuracy": 100_000, "scores": 200_000, "masking": 300_000, "steering": 400_000, "sinks": 500_000}
GAMMAS = (0.3, 0.5, 1.5, 2.0, 4.0)
Head = tuple[int, int]


def table(heads: Sequence[Head]) -> dict[int, list[int]]:
    """(layer, head) pairs as `{layer: [heads]}`."""
    layers: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        layers.setdefault(layer, []).append(head)
    return layers


class Measurement:
    """One model, one number of samples per cell, and the sections of the record."""

    def __init__(self, path: Path, limit: int) -> None:
        """Load the model at `path` in fp32; every share below is over `limit` samples."""
        self.path, self.limit = path, limit
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        config = self.model.config
        self.all_heads = [
            (layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)
        ]

    def rows(self, task: str, purpose: str, length: int, count: int | None = None) -> list[probe.Sample]:
        """Samples of `task` from the seeds of `purpose`."""
        return probe.rows(task, SEEDS[purpose], count or self.limit, length)

    def ask(self, rows: Sequence[probe.Sample], methods: Any = None) -> tuple[list[bool], list[str]]:
        """Per sample whether the answer is right, and the texts."""
        texts = probe.answers(self.model, self.tokenizer, rows, methods)
        return probe.hits(texts, rows), texts

    def accuracy(self) -> dict[str, Any]:
        """Unsteered: share of `answer` and of the alternatives, per task and prompt length."""
        found: dict[str, Any] = {}
        for task in TASKS:
            for length in (64, 256, 512):
                # The number that the model is required to reach gets a narrower interval.
                count = self.limit * 5 if (task, length) == ("lookup", 256) else self.limit
                rows = self.rows(task, "accuracy", length, count)
                flags, texts = self.ask(rows)
                cell: dict[str, float] = {"answer": probe.share(flags), "n": count}
                if any(row.alternatives for row in rows):
                    cell["alternative"] = probe.others(texts, rows)
                found.setdefault(task, {})[str(length)] = cell
        return found

    def chat(self) -> dict[str, float]:
        """Unsteered share of right answers at 128 tokens through the chat template."""
        found = {}
        for task in ("lookup", "capitals", "json"):
            rows = []
            for row in self.rows(task, "accuracy", 128):
                text = self.tokenizer.apply_chat_template(
                    list(row.messages), tokenize=False, add_generation_prompt=True
                )
                # The tokenizer adds BOS itself; spans belong to the plain prompt.
                rows.append(replace(row, prompt=str(text).removeprefix(self.tokenizer.bos_token), spans=()))
            found[task] = probe.share(self.ask(rows)[0])
        return found

    def masking(self, ranked: Sequence[Head]) -> dict[str, Any]:
        """Look-up at 256 tokens with the top k retrieval heads ablated, and with ten random sets of other heads."""
        rows = self.rows("lookup", "masking", 256)
        before, _ = self.ask(rows)
        curve, chosen, after = {"0": probe.share(before)}, None, before
        for k in range(1, len(self.all_heads) // 4 + 1):
            flags, _ = self.ask(rows, HeadMask(heads=table(ranked[:k]), mode="uniform"))
            curve[str(k)] = probe.share(flags)
            if curve[str(k)] < 0.3 and chosen is None:
                chosen, after = k, flags
            if chosen is not None and k == chosen + 2:
                break
        found: dict[str, Any] = {"task": "lookup", "length": 256, "curve": curve, "k": chosen}
        if chosen is None:
            return found
        rest = [head for head in self.all_heads if head not in ranked[:chosen]]
        rng = random.Random(0)
        sets = [sorted(rng.sample(rest, chosen)) for _ in range(10)]
        shares = [probe.share(self.ask(rows, HeadMask(heads=table(heads), mode="uniform"))[0]) for heads in sets]
        return found | {
            "heads": table(ranked[:chosen]),
            "interval": probe.gain_interval(before, after),
            "random": [{"heads": table(heads), "lookup": value} for heads, value in zip(sets, shares, strict=True)],
            "random_mean": round(sum(shares) / 10, 4),
        }

    def pasta(self, ranked: Sequence[Head]) -> dict[str, Any]:
        """Share of answers that follow the emphasised statement, per task, head set and alpha."""
        few, some, all_heads = ranked[:3], ranked[:8], self.all_heads
        grid = [
            (name, heads, alpha)
            for name, heads in (("top3", few), ("top8", some), ("all", all_heads))
            for alpha in (0.5, 0.1, 0.01)
        ]
        found: dict[str, Any] = {}
        for task in ("conflict", "contradiction", "maybe_capitals", "maybe_json", "capitals", "json"):
            rows = self.rows(task, "steering", 128)
            before, texts = self.ask(rows)
            cells: dict[str, Any] = {
                "baseline": {"follows": probe.share(before), "alternative": probe.others(texts, rows)}
            }
            for name, heads, alpha in grid if task.startswith("con") else (grid[4], grid[7]):
                after, texts = self.ask(rows, PASTA(alpha=alpha, heads=table(heads)))
                cells[f"{name} alpha={alpha}"] = {
                    "follows": probe.share(after),
                    "alternative": probe.others(texts, rows),
                    "interval": probe.gain_interval(before, after),
                }
            found[task] = cells
        return found

    def masked_tasks(self, ranked: Sequence[Head], k: int) -> dict[str, Any]:
        """What else ablating the top k retrieval heads does, at 128 tokens."""
        found = {}
        for task in ("memory", "contradiction", "classify", "needle"):
            rows = self.rows(task, "steering", 128)
            _, before = self.ask(rows)
            _, after = self.ask(rows, HeadMask(heads=table(ranked[:k]), mode="uniform"))
            found[task] = {
                name: {"answer": probe.share(probe.hits(texts, rows)), "alternative": probe.others(texts, rows)}
                for name, texts in (("baseline", before), ("masked", after))
            }
        return found

    def whole(self, methods: dict[str, Any]) -> dict[str, Any]:
        """Accuracy per method that needs no span, per task, with intervals of the paired gain."""
        found: dict[str, Any] = {}
        for task, length in (("dense", 256), ("classify", 128), ("contradiction", 128)):
            rows = self.rows(task, "steering", length)
            before, _ = self.ask(rows)
            cells: dict[str, Any] = {"baseline": {"answer": probe.share(before)}}
            for name, method in methods.items():
                after, _ = self.ask(rows, method)
                cells[name] = {"answer": probe.share(after), "interval": probe.gain_interval(before, after)}
            found[f"{task}-{length}"] = cells
        return found


def measure(path: Path, limit: int, command: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The whole record, and the retrieval scores."""
    run = Measurement(path, limit)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "versions": {
            "steerlens": steerlens.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": {
            "sha256": hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest(),
            "parameters": sum(p.numel() for p in run.model.parameters()),
        },
        "n": limit,
        "first_seeds": SEEDS,
    }

    def report(name: str, value: Any) -> None:
        record[name] = value
        sys.stderr.write(f"{name} done\n")

    report("accuracy", run.accuracy())
    report("chat_accuracy", run.chat())
    needles = [of(row) for row in run.rows("needle", "scores", 256, 60)]
    found = retrieval.measure(run.model, run.tokenizer, needles, count=True)
    ranked, means = found.ranked(), found.means()
    scores = {f"{layer}-{head}": round(means[layer, head], 3) for layer, head in ranked}
    report("retrieval", {"trials": found.summary["accepted"], "scores": scores})
    report("masking", run.masking(ranked))
    report("masked_tasks", run.masked_tasks(ranked, record["masking"]["k"] or 8))
    report("pasta", run.pasta(ranked))
    lookups = [of(row) for row in run.rows("lookup", "sinks", 256, 20)]
    strength = sinks.measure(run.model, run.tokenizer, lookups, tokens=256).means()
    config = run.model.config
    report(
        "bos_sink",
        [
            [round(strength[layer, head], 3) for head in range(config.num_attention_heads)]
            for layer in range(config.num_hidden_layers)
        ],
    )
    report("zerotuning", run.whole({f"gamma={gamma}": ZeroTuning(gamma=gamma) for gamma in GAMMAS}))
    acts = {
        "absolute 0.1": ACT(beta=0.4),
        "relative 5": ACT(beta=0.4, threshold=5.0, threshold_mode="relative"),
        "absolute 0.1, first sink spared": ACT(beta=0.4, spare="first_sink"),
    }
    report("act", run.whole(acts))
    return record, found.to_dict()["scores"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path(steerlens.__file__).parent / "tiny")
    parser.add_argument("--heads", type=Path, help="also write the retrieval scores here")
    parser.add_argument("--limit", type=int, default=200, help="samples per cell")
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "steerlens.evals.world.measure", *sys.argv[1:]])
    record, scores = measure(options.model, options.limit, command)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.heads:
        options.heads.write_text(json.dumps(scores) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
