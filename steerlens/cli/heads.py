"""`steerlens heads`: one sub-command per measure; its docstring is the help, its parameters are its own options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from steerlens.cli.guard import UsageError
from steerlens.cli.measuring import DataRun, Run, app, command, numbers
from steerlens.cli.scores import contextual, importance, lookback, maps, sra
from steerlens.measures.base import HeadScores

__all__ = ["app", "contextual", "importance", "lookback", "maps", "sra"]


@command(samples=40)
def retrieval(
    run: DataRun,
    count: Annotated[
        bool,
        typer.Option("--count/--set", help="Rank by the published code's count, or by the paper's set of tokens."),
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="N,…",
            help="Prompt lengths in the model's tokens. Default: four up to 4096, or to half of the model's room.",
        ),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option("--depths", metavar="P,…", help="Places of the needle in percent. Default: 0,25,50,75,100."),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Per length and depth. Default: 2.")] = None,
    haystack: Annotated[
        Path | None,
        typer.Option("--haystack", metavar="F.txt", help="Text to hide the needles in. Default: generated."),
    ] = None,
    needles: Annotated[
        Path | None,
        typer.Option("--needles", metavar="F.jsonl", help="'needle', 'question', 'answer'. Default: generated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest response.")] = 50,
) -> HeadScores:
    """Retrieval heads: they copy the answer from where it stands in the prompt (Wu et al. 2024).

    Default prompts: needles in filler, over a grid of lengths and depths.
    """
    grid, other = ("lengths", "depths", "trials", "haystack", "needles"), ("samples", "length")
    given = [f"--{name}" for name in (grid if run.task or run.data else other) if name in run.given]
    if given and (run.task or run.data):
        raise UsageError(
            f"{', '.join(given)} shape needles in a haystack; leave out {'--task' if run.task else '--data'}"
        )
    if given:
        raise UsageError(
            f"{', '.join(given)}: of the prompts of --task and --data; needles in a haystack are shaped by --lengths, "
            "--depths and --trials"
        )
    wanted = None if lengths is None else numbers(lengths, "--lengths", 1, 10_000_000)
    places = numbers(depths or "0,25,50,75,100", "--depths", 0, 100)
    from steerlens.measures import needles as hidden
    from steerlens.measures import retrieval as retrieving

    hay = None if haystack is None else hidden.sentences(haystack)
    texts = None if needles is None else hidden.read(needles)
    examples = run.examples("needle") if run.task or run.data else None
    model, tokenizer = run.load()
    if examples is None:
        wanted = wanted or retrieving.lengths(model)
        cells, world = len(wanted) * len(places) * (trials or 2), run.world
        run.drawn.update(lengths=wanted, depths=places, trials=trials or 2, seed=run.seed)
        run.drawn.update({"haystack": str(haystack or "generated"), "needles": str(needles or "generated")})
        examples = hidden.grid(
            tokenizer,
            texts or world().needles(cells, run.seed),
            hay or world().haystack(max(wanted) // 4 + 1, run.seed),
            wanted,
            places,
            trials or 2,
            tail=hidden.BOOK if hay else hidden.QUESTION,
            seed=run.seed,
        )
    with run.progress(len(examples)) as advance:
        return retrieving.measure(
            model,
            tokenizer,
            examples,
            count=count,
            batch_size=run.batch_size,
            max_new_tokens=max_new_tokens,
            advance=advance,
        )


@command(samples=20)
def sinks(
    run: DataRun,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens that are read of each prompt.")] = 64,
    epsilon: Annotated[
        float, typer.Option("--epsilon", min=0, max=1, help="A metric above it counts in the summary.")
    ] = 0.3,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=1, help="A mean weight above it makes a hidden sink (ACT).")
    ] = 0.1,
) -> HeadScores:
    """Attention sinks: the mean attention that the first token receives (Gu et al. 2024).

    Beside it the share of other tokens that are sinks, as ACT looks for. Default prompts: look-up.
    """
    from steerlens.measures import sinks as sinking

    examples = run.examples("lookup")
    model, tokenizer = run.load()
    with run.progress(len(examples)) as advance:
        return sinking.measure(
            model,
            tokenizer,
            examples,
            tokens=tokens,
            epsilon=epsilon,
            threshold=threshold,
            batch_size=run.batch_size,
            advance=advance,
        )


@command(samples=20)
def qada(
    run: DataRun,
    sink: Annotated[int, typer.Option("--sink", min=0, help="First keys that count as near.")] = 16,
    local: Annotated[
        int, typer.Option("--local", min=1, help="Recent keys that count as near, at most half of a prompt.")
    ] = 1024,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.01, max=0.99, help="A head is local where near keys hold this share.")
    ] = 0.6,
) -> HeadScores:
    """Far attention: the share of far keys behind the prompt, estimated from moments of keys (arXiv 2502.09647).

    Beside it the true share, and how often QAdA's gate calls the head local. Default prompts: look-up.
    """
    from steerlens.measures import qada as gating

    examples = run.examples("lookup")
    model, tokenizer = run.load()
    with run.progress(len(examples)) as advance:
        return gating.measure(
            model,
            tokenizer,
            examples,
            sink=sink,
            local=local,
            threshold=threshold,
            batch_size=run.batch_size,
            advance=advance,
        )


Length = Annotated[int, typer.Option("--length", min=2, help="Random tokens that are repeated once.")]
Sequences = Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Sequences.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Sequences per forward.")]


@command()
def induction(run: Run, length: Length = 50, samples: Sequences = 20, batch_size: BatchSize = 4) -> HeadScores:
    """Induction heads: on repeated random tokens they look at what followed the same token (Olsson et al. 2022)."""
    return _repeated(run, "induction", length, samples, batch_size)


@command()
def previous(run: Run, length: Length = 50, samples: Sequences = 20, batch_size: BatchSize = 4) -> HeadScores:
    """Previous-token heads: they look at the token before."""
    return _repeated(run, "previous", length, samples, batch_size)


def _repeated(
    run: Run, kind: Literal["induction", "previous"], length: int, samples: int, batch_size: int
) -> HeadScores:
    from steerlens.measures import repeated

    model, tokenizer = run.load()
    with run.progress(samples, "sequences") as advance:
        return repeated.measure(
            model,
            tokenizer,
            kind,
            length=length,
            samples=samples,
            seed=run.seed,
            batch_size=batch_size,
            advance=advance,
        )
