"""`steerlens influence`: documents in, AttentionInfluence scores out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from steerlens.cli import guard, jsonl, options, show
from steerlens.cli.guard import UsageError
from steerlens.cli.session import Answer, Row


@dataclass(frozen=True)
class Scored(Answer):
    """What a document came to: its scores, or an error."""

    scores: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Its scores, or what is wrong with it."""
        return {"error": self.error} if self.error is not None else self.scores


def influence(
    data: Annotated[Path, typer.Option("--data", metavar="F.jsonl", help="Documents: rows with 'text'.")],
    heads: Annotated[
        str, typer.Option("--heads", metavar="SPEC", help='Heads to take out, such as "retrieval.json:top16".')
    ],
    model: options.Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT.jsonl", help="Where the scores go. Default: stdout.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Documents per forward.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, metavar="N", help="Tokens that are read of each document.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an --output that was stopped; the same settings are needed.")
    ] = False,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    model_arg: options.ModelArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    backend: options.BackendOption = options.Backend.auto,
) -> int:
    """Score documents by how much worse they are predicted without some heads (AttentionInfluence).

    A line per document: index, influence = (masked_loss - loss) / loss, both losses in nats per token, tokens.
    For example: steerlens influence --data corpus.jsonl --heads retrieval.json:top16 --output scores.jsonl
    """
    from steerlens.methods.attention_influence import AttentionInfluence

    if resume and output is None:
        raise UsageError("--resume needs --output")
    method = AttentionInfluence(options.value_of(heads, "--heads"))
    rows, digest = _documents(data)
    chosen = options.ModelOptions.of(
        model,
        None,
        device=device,
        device_map=device_map,
        dtype=dtype,
        revision=revision,
        model_args=model_arg or [],
        trust_remote_code=trust_remote_code,
    )
    settings = {
        "data": digest,
        "method": method.to_dict(),
        "model": chosen.name,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "backend": backend.value,
        **{key: getattr(chosen, key) for key in ("dtype", "revision", "model_args")},
    }
    results = jsonl.Results(output, settings, resume) if output else None
    done: dict[int, bool] = results.done if results else {}
    loaded = chosen.load() if len(done) < len(rows) else None
    try:
        with show.progress(len(rows), len(done), "documents") as advance:
            # a batch that was written in part runs again whole, as documents of one batch share its padding
            for number in range(0, len(rows), batch_size):
                batch = rows[number : number + batch_size]
                missing = [row for row in batch if row.index not in done]
                if not missing or loaded is None:
                    continue
                scored = _score(*loaded, batch, method, max_tokens, backend.value)
                if results:
                    results.add(scored)
                else:
                    typer.echo("\n".join(jsonl.record(one) for one in scored))
                done |= {one.row.index: one.error is not None for one in scored}
                advance(len(missing))
                guard.check_stop()
    except guard.Stopped:
        if results:
            show.note(f"stopped after {len(done)} of {len(rows)} documents; run again with --resume to go on")
        raise
    if results:
        results.close()
    failed = sum(done.values())
    if results or failed:
        show.note(f"{len(rows)} documents, {failed} with errors{f', in {output}' if output else ''}")
    return guard.SAMPLE_ERRORS if failed else 0


def _score(
    model: Any, tokenizer: Any, batch: list[Row], method: Any, max_tokens: int | None, backend: str
) -> list[Scored]:
    from steerlens import influence
    from steerlens.examples import ExampleError

    errors = {row.index: row.error for row in batch if row.error is not None}
    for row in batch:
        if row.index not in errors:
            try:
                influence.check(model, tokenizer, row.prompt, max_tokens)
            except ExampleError as error:
                errors[row.index] = str(error)
    good = [row for row in batch if row.index not in errors]
    texts = [row.prompt for row in good]
    found = influence.score(
        model, tokenizer, texts, method, batch_size=len(batch), max_tokens=max_tokens, backend=backend
    )
    scores = {
        row.index: {"influence": one.score, "loss": one.loss, "masked_loss": one.masked_loss, "tokens": one.tokens}
        for row, one in zip(good, found, strict=True)
    }
    return [Scored(row, error=errors.get(row.index), scores=scores.get(row.index, {})) for row in batch]


def _documents(path: Path) -> tuple[list[Row], str]:
    """The documents of a JSONL file and its digest; what is wrong with a line is kept as its row's error."""
    import hashlib

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data {path} cannot be read: {error.strerror or error}") from None
    lines = [line for line in content.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--data {path} is empty; it needs one JSON object per line with 'text'")
    rows = []
    for index, line in enumerate(lines):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as problem:
            rows.append(Row(index, None, error=f"not JSON: {problem}"))
            continue
        text = document.get("text") if isinstance(document, dict) else None
        wrong = None if isinstance(text, str) and text.strip() else f"'text' is {text!r:.80}; it must be a text"
        if wrong is None and text is not None and text != text.encode(errors="ignore").decode():
            wrong = "the text holds half of a surrogate pair, which is no character"
        rows.append(Row(index, text, error=wrong))
    return rows, hashlib.blake2b(content, digest_size=16).hexdigest()
