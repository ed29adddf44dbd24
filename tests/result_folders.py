"""Result folders as `steerlens eval` leaves them, made by hand."""

import json
from pathlib import Path
from typing import Any

from steerlens.evals.doc import Doc, Outcome, Output, Steering, sample_row, slug

from steerlens.examples import Example

DATE = "2026-11-26T10-20-30.123456"


def document(task: str, number: int, *, seed: int = 0, cell: dict[str, Any] | None = None, choices=()) -> Doc:
    """A document that is the same for equal task, number and cell, whatever the seed."""
    example = Example(f"{task} question {number}?", None if choices else f"answer {number}")
    target = 0 if choices else None
    return Doc(task, seed, number, example, choices, target, data={"number": number}, cell=cell or {})


def row(doc: Doc, label: str, scores: dict[str, float], text: str = "a text", *, model="tiny", logprobs=()):
    """A sample; without scores one that failed."""
    output = Output(() if logprobs else (text,), logprobs, greedy=(False,) * len(logprobs), logprob=-1.5)
    outcome = Outcome(output, seconds=0.1) if scores else Outcome(error="CUDA out of memory")
    found = sample_row(model, label, doc, outcome, scores, {"max_new_tokens": 4}, batch=0)
    del found["batch"]
    return found


def write(
    folder: Path,
    rows: list[dict[str, Any]],
    steering: Steering | None = None,
    *,
    date: str = DATE,
    higher: dict[str, bool] | None = None,
    **results: Any,
) -> Path:
    """The results file and one samples file per task; `results` takes the place of what the results file would hold."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    metrics = {task: list(dict.fromkeys(m for r in rows if r["task"] == task for m in r["metrics"])) for task in tasks}
    config = {"model": "steerlens"} | ({} if steering is None else {"steering": steering.to_dict()})
    described = {"summary": "What it asks.", "output": "generate"}
    content = {
        "results": {task: {f"{m},none": 0.5 for m in metrics[task]} for task in tasks},
        "configs": {task: described | {"metrics": metrics[task]} for task in tasks},
        "versions": {task: 1 for task in tasks},
        "higher_is_better": {task: {m: (higher or {}).get(m, True) for m in metrics[task]} for task in tasks},
        "config": config,
        "model_name": "tiny",
        **results,
    }
    (folder / f"results_{date}.json").write_text(json.dumps(content), "utf-8")
    for task in tasks:
        lines = [json.dumps(r) + "\n" for r in rows if r["task"] == task]
        (folder / f"samples_{task}_{date}.jsonl").write_text("".join(lines), "utf-8")
    return folder


def write_job(
    folder: Path, runs: list[tuple[Steering, list[dict[str, Any]]]], *, model: str = "tiny", **kwargs
) -> Path:
    """The folder of a job: one run per steering."""
    for steering, rows in runs:
        write(folder / slug(model) / slug(steering.label), rows, steering, **kwargs)
    return folder
