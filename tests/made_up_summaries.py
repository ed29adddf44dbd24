"""Summaries of evaluations that never ran: made-up outcomes, real statistics."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from steerlens.paired import difference, sign

DEPTHS, LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0), (64, 128, 256, 512)
TASKS = {
    "needle": ("Look one fact up among filler.", 0.86, "exact"),
    "conflict": ("Two statements disagree; the emphasised one is to be followed.", 0.50, "follows"),
    "memory": ("The context contradicts what the model memorised.", 0.30, "follows"),
    "json": ("Answer in JSON, as the instruction asks.", 0.61, "json_valid"),
    "classification": ("Sentiment from four demonstrations.", 0.445, "acc"),
    "multiple-choice-questions-about-long-documents": ("Pick one of four answers.", 0.72, "acc"),
}
GAINS = {
    "pasta-tiny": {"conflict": 0.49, "json": 0.14, "needle": 0.02},
    "act-tiny": {"needle": -0.42, "memory": 0.55, "json": -0.08},
    "zerotuning": {"classification": 0.01},
}
NASTY = {
    "script": '<script>alert("x")</script> & <img src=x onerror=alert(1)> | a pipe\nand a line\x00\x1b[31m',
    "unicode": "naïve 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 مرحبا \u202eright-to-left 👩‍👩‍👧 \ud800 z̷̢͎a̵l̶g̴o",
    "long": "W" * 900,
}


def outcomes(rng: np.random.Generator, model: str, task: str, n: int, gain: float) -> tuple[list[float], list[float]]:
    """Zeros and ones: the unsteered model's are the same for every steering; some samples change."""
    old = (np.random.default_rng([len(model), len(task)]).random(n) < TASKS[task][1]).astype(float)
    new = np.where(rng.random(n) < 0.02 + abs(gain) * 1.6, float(gain > 0), old)
    return old.tolist(), new.tolist()


def comparison(
    rng: np.random.Generator, task: str, label: str, gain: float, *, n: int = 200, model: str = "tiny", **more: Any
) -> dict[str, Any]:
    before, after = outcomes(rng, model, task, n, gain)
    found = difference(before, after, resamples=500)
    holm = min(1.0, found.p * len(TASKS))
    verdict = sign(replace(found, p=holm))
    entry: dict[str, Any] = {
        "model": model,
        "task": task,
        "metric": TASKS[task][2],
        "higher_is_better": True,
        "primary": True,
        "before": "baseline",
        "after": label,
        "role": "method",
        "of": None,
        "dose": None,
        "n": n,
        "errors": 0,
        "baseline": float(np.mean(before)),
        "steered": float(np.mean(after)),
        "difference": found.to_dict(),
        "p_holm": holm,
        "minimum_detectable": 0.0712,
        "verdict": verdict,
        "sentence": f"{label} on {task}: {100 * found.mean:+.1f}, {verdict}",
        "cells": [],
        "changed": [],
    }
    if task == "needle":
        entry["cells"] = [
            {
                "length": length,
                "depth": depth,
                "n": 10,
                "before": round(float(np.clip(1.02 - length / 900 - 0.3 * (depth == 0.5), 0, 1)), 1),
                "after": round(float(np.clip(1.02 - length / 900 - 0.3 * (depth == 0.5) + gain, 0, 1)), 1),
            }
            for length in LENGTHS
            for depth in DEPTHS
        ]
    changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    entry["changed"] = [
        {
            "doc_id": i,
            "prompt": f"Mara keeps the {i} silver keys in the harbour office. " * 4 + "Where are the keys?",
            "target": "in the harbour office",
            "before": "The keys are in the old mill, as Tom said." if not before[i] else "in the harbour office",
            "after": "The keys are in the harbour office, as Mara said." if after[i] else "in the old mill",
            "before_score": before[i],
            "after_score": after[i],
        }
        for i in changed
    ]
    return entry | more


def everything(models: tuple[str, ...] = ("tiny",)) -> dict[str, Any]:
    """Many tasks, a sweep, cells, controls, published figures, other metrics, skipped pairs, errors, nasty texts."""
    return json.loads(_everything(models))


@cache
def _everything(models: tuple[str, ...]) -> str:
    rng = np.random.default_rng(0)
    comparisons, controls, runs = [], [], []
    for model in models:
        runs.append({"model": model, "label": "baseline", "role": "baseline", "of": None, "dose": None})
        for label, gains in GAINS.items():
            runs.append({"model": model, "label": label, "role": "method", "of": None, "dose": None})
            for task in TASKS:
                found = comparison(np.random.default_rng(1), task, label, gains.get(task, 0.0), model=model)
                comparisons.append(found)
                before, after = outcomes(np.random.default_rng(1), model, task, 200, gains.get(task, 0.0))
                drawn = [np.where(rng.random(200) < 0.03, rng.random(200) < 0.6, before) for _ in range(3)]
                random = np.mean(drawn, axis=1)
                against = difference(np.mean(drawn, axis=0).tolist(), after, resamples=500)
                controls.append(
                    {
                        "model": model,
                        "task": task,
                        "metric": found["metric"],
                        "of": label,
                        "random_heads": {
                            "mean": float(random.mean()),
                            "low": float(random.min()),
                            "high": float(random.max()),
                            "sets": 3,
                        },
                        "against_random": against.to_dict(),
                        "verdict": sign(against),
                        "neutral_identical": True,
                    }
                )
        found = comparison(
            rng, "conflict", "pasta-tiny random 1", 0.02, model=model, role="random_heads", of="pasta-tiny"
        )
        comparisons.append(found | {"changed": []})
        for alpha, share in ((1.0, 0.0), (0.3, 0.5), (0.1, 0.9), (0.03, 1.0), (0.01, 1.0)):
            for task in ("conflict", "json", "needle"):
                gain = GAINS["pasta-tiny"][task] * share if task != "needle" else -0.1 * share**4
                comparisons.append(
                    comparison(
                        rng,
                        task,
                        f"pasta alpha={alpha:g}",
                        gain,
                        model=model,
                        role="sweep",
                        of="pasta",
                        dose={"parameter": "pasta.alpha", "value": alpha},
                    )
                )
        other = comparison(rng, "conflict", "pasta-tiny", 0.3, model=model)
        before, after = rng.normal(-9, 2, 200), rng.normal(-6, 2, 200)
        found = difference(before, after, resamples=500)
        comparisons.append(
            other
            | {"metric": "logprob", "primary": False, "p_holm": None, "minimum_detectable": None, "changed": []}
            | {"baseline": before.mean(), "steered": after.mean(), "difference": found.to_dict(), "verdict": "better"}
        )
    for number, text in enumerate(NASTY.values()):
        comparisons[1]["changed"].insert(0, dict(comparisons[1]["changed"][0], before=text, after=text[::-1]))
        comparisons[1]["changed"][0] |= {"doc_id": 900 + number, "prompt": [{"role": "user", "content": text}]}
    comparisons[2]["errors"] = 2
    summary = {
        "schema": 1,
        "name": "tiny-all",
        "date": "2026-11-26T06-27-31.388834",
        "models": list(models),
        "tasks": [
            {
                "task": task,
                "summary": text,
                "primary": metric,
                "metrics": [metric, "logprob"],
                "output": "generate",
                "cells": ["length", "depth"] if task == "needle" else [],
            }
            for task, (text, _, metric) in TASKS.items()
        ],
        "runs": [run | {"folder": f"{run['model']}/{run['label']}"} for run in runs],
        "comparisons": comparisons,
        "controls": controls,
        "published": [
            {
                "steering": "zerotuning",
                "task": "classification",
                "metric": "acc",
                "model": "meta-llama/Llama-3.1-8B-Instruct",
                "baseline": 60.1,
                "steered": 82.5,
                "unit": "percent",
                "source": "Han et al. 2025, Table 1",
                "measured_baseline": 59.5,
                "measured_steered": 81.0,
                "interval": [17.0, 26.0],
                "agrees": "the published gain lies in the measured interval",
                "note": "500 documents of another split",
            },
            {
                "steering": "act-tiny",
                "task": "memory",
                "metric": "follows",
                "model": "meta-llama/Llama-2-7b-chat-hf",
                "baseline": 0.61,
                "steered": 0.66,
                "unit": "share",
                "source": "Yu et al. 2024, Table 2",
                "measured_baseline": None,
                "measured_steered": None,
                "interval": None,
                "agrees": "not measured",
            },
        ],
        "skipped": [
            {
                "steering": "pasta-tiny",
                "task": "classification",
                "why": "its prompts have no span group 'emphasis', which pasta steers",
            }
        ],
        "notes": ["tiny, act-tiny: the samples of seed 1 are in one run only and are left out"],
        "errors": [
            {
                "model": models[0],
                "steering": "pasta-tiny",
                "task": "memory",
                "doc_id": i,
                "error": "CUDA out of memory at batch size 1 (1200 tokens)",
            }
            for i in (17, 163)
        ],
        "job": {"name": "tiny-all", "seeds": [0], "limit": 200, "tasks": [*TASKS], "note": "```"},
        "command": "steerlens eval --config tiny-all.yaml --output results/tiny-all",
        "versions": {"steerlens": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "python": "3.12.3"},
        "fingerprint": "9f2d1c7a0b6e4f35",
    }
    return json.dumps(summary)


def smallest() -> dict[str, Any]:
    """One comparison of two samples, nothing else that a summary may hold."""
    found = difference([1.0, 0.0], [1.0, 0.0])
    return {
        "schema": 1,
        "name": "small",
        "date": "2026-11-26",
        "models": ["tiny"],
        "tasks": [
            {"task": "conflict", "summary": "", "primary": "follows", "metrics": ["follows"], "output": "generate"}
        ],
        "runs": [],
        "comparisons": [
            {
                "model": "tiny",
                "task": "conflict",
                "metric": "follows",
                "primary": True,
                "before": "baseline",
                "after": "pasta",
                "role": "method",
                "n": 2,
                "errors": 0,
                "baseline": 0.5,
                "steered": 0.5,
                "difference": found.to_dict(),
                "p_holm": 1.0,
                "minimum_detectable": None,
                "verdict": "within noise",
                "sentence": "no difference",
                "cells": [],
                "changed": [],
            }
        ],
        "controls": [],
        "published": [],
        "skipped": [],
        "errors": [],
    }
