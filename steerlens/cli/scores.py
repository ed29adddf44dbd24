"""Sub-commands of `steerlens heads` that score by responses, gradients and weights."""

from __future__ import annotations

import dataclasses
import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from steerlens.cli.guard import UsageError
from steerlens.cli.measuring import DataRun, Run, command
from steerlens.measures.base import HeadScores, require

TeacherForced = Annotated[
    bool,
    typer.Option("--teacher-forced", help="Rows that produce the data's answers, not the model's own greedy ones."),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer of the model's own.")
]


class Estimator(StrEnum):
    """Where importance takes absolute values."""

    token = "token"
    example = "example"
    batch = "batch"


class Embedding(StrEnum):
    """What later layers' heads map."""

    mlp = "mlp"
    raw = "raw"


@command(samples=50)
def lookback(
    run: DataRun,
    teacher_forced: TeacherForced = False,
    exclude: Annotated[
        bool, typer.Option("--exclude-sink-and-self", help="Leave out the first token and each row's own key.")
    ] = False,
    max_new_tokens: MaxNewTokens = 32,
) -> HeadScores:
    """Lookback ratio: attention per context token against that per newer token (Chuang et al. 2024).

    Needs the group "context"; it counts from the first token on. Default prompts: contradiction, where a statement
    stands against the model's memory.
    """
    return _on_responses("lookback", run, "contradiction", teacher_forced, max_new_tokens, exclude=exclude)


@command(samples=50)
def contextual(run: DataRun, teacher_forced: TeacherForced = False, max_new_tokens: MaxNewTokens = 32) -> HeadScores:
    """Contextual heads: attention to what holds the answer, while it is given (Zhu et al. 2025).

    Needs the group "gold". Default prompts: look-up.
    """
    return _on_responses("contextual", run, "lookup", teacher_forced, max_new_tokens)


@command(samples=50)
def sra(run: DataRun, teacher_forced: TeacherForced = False, max_new_tokens: MaxNewTokens = 32) -> HeadScores:
    """Strategy-relevant attention: attention per token of what is to be followed (arXiv 2402.10453).

    Needs the group "emphasis" ('emphasize' in --data). Default prompts: conflict, two statements that disagree.
    """
    return _on_responses("sra", run, "conflict", teacher_forced, max_new_tokens)


@command(samples=50)
def importance(
    run: DataRun,
    estimator: Annotated[
        Estimator,
        typer.Option("--estimator", help="Ranks by: absolute per token, per example (the paper), or per batch."),
    ] = Estimator.example,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide each layer's scores by their norm.")] = False,
    all_tokens: Annotated[
        bool, typer.Option("--all-tokens", help="The loss is every token's, not the answer's: for texts without one.")
    ] = False,
) -> HeadScores:
    """Importance: how much the loss depends on a head's output, by gradients (Michel et al. 2019).

    Needs answers, or --all-tokens. Default prompts: look-up.
    """
    examples = run.examples("lookup")
    require("importance", examples, answer=not all_tokens)
    from steerlens.measures.importance import measure

    model, tokenizer = run.load()
    with run.progress(len(examples)) as advance:
        return measure(
            model,
            tokenizer,
            examples,
            estimator=estimator.value,
            normalize=normalize,
            all_tokens=all_tokens,
            batch_size=run.batch_size,
            advance=advance,
        )


@command()
def maps(
    run: Run,
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", metavar="F.jsonl", help="'relation', 'source', 'target'. Default: copying."),
    ] = None,
    relation: Annotated[
        str | None, typer.Option("--relation", metavar="R", help="Rank by this relation. Default: the mean over all.")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", min=1, metavar="K", help="Targets in the top K count. Default: 10, for copying 1."),
    ] = None,
    embedding: Annotated[
        Embedding,
        typer.Option("--embedding", help="What layers behind the first map: the first MLP's output, or embeddings."),
    ] = Embedding.mlp,
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Tokens drawn for copying.")] = 500,
) -> HeadScores:
    """MAPS: what heads do to tokens by their weights alone, without a prompt (Elhelo and Geva 2024).

    The share of pairs whose target is among the tokens that a head makes most likely from the source.
    """
    from steerlens.measures import maps as mapping

    if pairs is not None and "tokens" in run.given:
        raise UsageError("--tokens are drawn for copying; leave it out with --pairs")
    texts = None if pairs is None else mapping.read(pairs)
    if texts is not None and relation is not None and relation not in texts:
        raise UsageError(f"--relation {relation!r}: {pairs} has {', '.join(texts)}")
    if texts is None and relation not in (None, mapping.COPYING):
        raise UsageError(f"--relation {relation!r} needs --pairs; without it there is {mapping.COPYING!r} alone")
    model, tokenizer = run.load()
    if texts is None:
        ids = mapping.copying(tokenizer, tokens, run.seed)
        run.drawn.update(tokens=tokens, seed=run.seed)
    else:
        ids = mapping.single_tokens(tokenizer, texts)
        run.drawn["pairs"] = str(pairs)
        if relation is not None and relation not in ids:
            raise UsageError(f"--relation {relation!r}: none of its pairs is of single tokens for {run.model}")
    wanted = k if k is not None else 1 if texts is None else 10
    with run.progress(model.config.get_text_config(decoder=True).num_hidden_layers, "layers") as advance:
        found = mapping.measure(model, ids, k=wanted, embedding=embedding.value, relation=relation, advance=advance)
    if texts is None:
        return found
    skipped = {name: len(rows) - len(ids.get(name, ())) for name, rows in texts.items()}
    return dataclasses.replace(found, summary={**found.summary, "skipped_pairs": skipped})


def _on_responses(
    name: str, run: DataRun, task: str, teacher_forced: bool, max_new_tokens: int, **own: Any
) -> HeadScores:
    group = {"lookback": "context", "contextual": "gold", "sra": "emphasis"}[name]
    examples = run.examples(task)
    require(name, examples, answer=teacher_forced, groups=(group,))
    measure = importlib.import_module(f"steerlens.measures.{name}").measure
    model, tokenizer = run.load()
    with run.progress(len(examples)) as advance:
        found: HeadScores = measure(
            model,
            tokenizer,
            examples,
            teacher_forced=teacher_forced,
            max_new_tokens=max_new_tokens,
            batch_size=run.batch_size,
            advance=advance,
            **own,
        )
    return found
