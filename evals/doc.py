"""What an evaluation is made of: documents, steerings, and what the model gave for a document."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from steerlens.examples import Example

if TYPE_CHECKING:
    from steerlens.methods.base import Method

BASELINE = "baseline"
Role = Literal["baseline", "method", "sweep", "random_heads", "neutral"]


@dataclass(frozen=True)
class Doc:
    """One document of a task: what is asked, what is right, and where it lies.

    Attributes:
        task: name of its task.
        seed: of the draw it belongs to.
        doc_id: its number in that draw, from 0.
        example: prompt or chat, answer, alternatives and span groups.
        choices: continuations whose log-likelihoods are compared; `target` is the right one's index.
        target: see `choices`.
        turns: user messages that follow the model's answers, for a chat of several turns.
        data: what else metrics need, plain JSON types.
        cell: its place in the task's grid, such as {"length": 256, "depth": 0.5}.
    """

    task: str
    seed: int
    doc_id: int
    example: Example
    choices: tuple[str, ...] = ()
    target: int | None = None
    turns: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    cell: Mapping[str, Any] = field(default_factory=dict)

    @property
    def doc_hash(self) -> str:
        """Of everything but its place in the draw: what two runs are paired by."""
        e = self.example
        content = [e.prompt, e.answer, e.alternatives, self.choices, self.target, self.turns, self.data, self.cell]
        groups = {name: [repr(selector) for selector in found] for name, found in e.groups.items()}
        return _digest([*content, groups])

    @property
    def prompt_hash(self) -> str:
        """Of the prompt and the turns that follow."""
        return _digest([self.example.prompt, self.turns])

    @property
    def target_hash(self) -> str:
        """Of the right answer."""
        return _digest([self.example.answer, self.choices, self.target])


@dataclass(frozen=True)
class Output:
    """What the model gave for a document.

    Attributes:
        texts: generated text per turn, cut at the stop; empty for `choices`.
        logprobs: log-likelihood of each choice, a sum in nats; empty for texts.
        lengths: tokens of each choice or text.
        greedy: whether each choice is what greedy decoding gives.
        logprob: of the generated tokens, or of the right choice; a sum in nats. NaN where unknown.
    """

    texts: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    greedy: tuple[bool, ...] = ()
    logprob: float = float("nan")

    @property
    def text(self) -> str:
        """The last turn's text."""
        return self.texts[-1] if self.texts else ""


@dataclass(frozen=True)
class Outcome:
    """A document's output under one steering, or why there is none."""

    output: Output | None = None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Steering:
    """How a run is steered.

    Attributes:
        label: unique in a job.
        methods: in order of composition; none for the baseline.
        role: what it is in the job.
        of: the label that a control belongs to, or that a sweep varies.
        dose: parameter and value of a sweep, as ("pasta.alpha", 0.1).
    """

    label: str
    methods: tuple[Method, ...] = ()
    role: Role = "method"
    of: str | None = None
    dose: tuple[str, float] | None = None

    @property
    def fingerprint(self) -> str:
        """Of the methods and their parameters, whatever the label."""
        return _digest([method.to_dict() for method in self.methods])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        dose = None if self.dose is None else {"parameter": self.dose[0], "value": self.dose[1]}
        described = [method.to_dict() for method in self.methods]
        return {
            "label": self.label,
            "role": self.role,
            "of": self.of,
            "dose": dose,
            "methods": described,
            "fingerprint": self.fingerprint,
        }


def sample_row(
    model: str,
    steering: str,
    doc: Doc,
    outcome: Outcome,
    scores: Mapping[str, float],
    settings: Mapping[str, Any],
    batch: int,
) -> dict[str, Any]:
    """One sample as a JSON object with lm-eval's keys and ours.

    Args:
        model: name of the model in the job.
        steering: label.
        doc: the document.
        outcome: what came of it.
        scores: a number per metric; empty for an error.
        settings: how it was generated (`max_new_tokens`, `stop`), as lm-eval's `arg_1`.
        batch: the planned batch it came in.
    """
    output, prompt = outcome.output, doc.example.prompt
    shown = prompt if isinstance(prompt, str) else list(prompt)
    if doc.choices:
        arguments = {f"gen_args_{i}": {"arg_0": shown, "arg_1": choice} for i, choice in enumerate(doc.choices)}
        responses: list[Any] = [] if output is None else list(zip(output.logprobs, output.greedy, strict=True))
    else:
        arguments = {"gen_args_0": {"arg_0": shown, "arg_1": dict(settings)}}
        responses = [] if output is None else list(output.texts)
    row: dict[str, Any] = {
        "model": model,
        "steering": steering,
        "task": doc.task,
        "seed": doc.seed,
        "doc_id": doc.doc_id,
        "doc": {**doc.data, "turns": list(doc.turns)} if doc.turns else dict(doc.data),
        "target": doc.example.answer if doc.target is None else doc.target,
        "arguments": arguments,
        "resps": [[r] for r in responses],
        "filtered_resps": responses,
        "filter": "none",
        "metrics": list(scores),
        "doc_hash": doc.doc_hash,
        "prompt_hash": doc.prompt_hash,
        "target_hash": doc.target_hash,
        "cell": dict(doc.cell),
        "logprob": None if output is None or output.logprob != output.logprob else output.logprob,
        **scores,
        "batch": batch,
        "seconds": outcome.seconds,
    }
    if outcome.error is not None:
        row["error"] = outcome.error
    return json.loads(json.dumps(row))


def slug(name: str) -> str:
    """A name as part of a path, as lm-eval makes it."""
    found = re.sub(r"[^\w.=+-]+", "_", name).strip("_")
    # dots alone would be this folder, or the one above
    return found if found.strip(".") else "_"


def _digest(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()
