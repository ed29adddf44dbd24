"""What a checked `steerlens run` does: one prompt, or a file of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from steerlens.cli import guard, jsonl, options, show
from steerlens.cli.session import Answer, Row, Sampling, Session

if TYPE_CHECKING:
    from steerlens.methods.base import Method
    from steerlens.recipe import Recipe


@dataclasses.dataclass
class Job:
    """One call of `steerlens run`, checked."""

    model: options.ModelOptions
    methods: list[Method]
    recipe: Recipe | None
    backend: str
    compare: bool
    chat: bool
    system: str | None
    sampling: Sampling
    as_json: bool
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def session(self) -> Session:
        """The loaded model with the methods."""
        model, tokenizer = self.model.load()
        return Session(
            model,
            tokenizer,
            self.methods,
            recipe=self.recipe,
            backend=self.backend,
            chat=self.chat,
            system=self.system,
            sampling=self.sampling,
        )

    def single(self, prompt: str, emphasize: list[str], stream: bool) -> None:
        """Answer one prompt."""
        row = Row.of(0, prompt, emphasize, self.groups)
        session = self.session()
        if stream:
            from transformers import TextStreamer

            streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
            session.sides([row], compare=self.compare, streamer=streamer, before=show.heading if self.compare else None)
            return
        sides = session.sides([row], compare=self.compare)
        answer = Answer(row, sides["steered"][0], sides["baseline"][0] if self.compare else None)
        if self.as_json:
            self.document([answer.to_dict()])
        else:
            show.answer(sides["steered"][0], answer.baseline)

    def file(self, path: Path, emphasize: list[str], output: Path | None, batch_size: int, resume: bool) -> int:
        """Answer the rows of a file in batches; 3 if some ended in an error."""
        rows, digest = jsonl.read_rows(path, emphasize, self.groups)
        results = jsonl.Results(output, self.settings(digest, emphasize, batch_size), resume) if output else None
        done = results.done if results else {}
        session = self.session() if len(done) < len(rows) else None
        kept: list[dict[str, Any]] = []
        try:
            with show.progress(len(rows), len(done)) as advance:
                # a batch that was written in part runs again whole: the same padding, the same random numbers
                for number in range(0, len(rows), batch_size):
                    batch = rows[number : number + batch_size]
                    missing = [row for row in batch if row.index not in done]
                    if not missing or session is None:
                        continue
                    answers = session.answer(batch, compare=self.compare, seed_offset=number // batch_size)
                    if results:
                        results.add(answers)
                    elif self.as_json:
                        kept += [answer.to_dict() for answer in answers]
                    else:
                        typer.echo("\n".join(jsonl.record(answer) for answer in answers))
                    done |= {answer.row.index: answer.error is not None for answer in answers}
                    advance(len(missing))
                    guard.check_stop()
        except guard.Stopped:
            if results:
                show.note(f"stopped after {len(done)} of {len(rows)} prompts; run again with --resume to go on")
            raise
        if results:
            results.close()
        if self.as_json:
            self.document(results.records() if results else kept)
        failed = sum(done.values())
        if results or failed:
            show.note(f"{len(rows)} prompts, {failed} with errors{f', in {output}' if output else ''}")
        return guard.SAMPLE_ERRORS if failed else 0

    def settings(self, digest: str, emphasize: list[str], batch_size: int) -> dict[str, Any]:
        """What shapes the results of a file, to be compared by `--resume`; where it runs may change."""
        model = dataclasses.asdict(self.model)
        return {
            "prompt_file": digest,
            "emphasize": emphasize,
            "groups": {name: _digest(texts) for name, texts in self.groups.items()},
            "batch_size": batch_size,
            "compare": self.compare,
            "methods": [method.to_dict() for method in self.methods],
            "backend": self.backend,
            "chat": self.chat,
            "system": self.system,
            **dataclasses.asdict(self.sampling),
            "model": model.pop("name"),
            **{key: model[key] for key in ("dtype", "revision", "model_args")},
        }

    def document(self, results: list[dict[str, Any]]) -> None:
        """Print the JSON of `--json`."""
        methods = [method.to_dict() for method in self.methods]
        typer.echo(
            jsonl.to_json({"model": self.model.name, "methods": methods, "backend": self.backend, "results": results})
        )


def _digest(texts: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(list(texts)).encode(), digest_size=16).hexdigest()
