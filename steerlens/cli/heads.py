"""`steerlens heads`: one sub-command per measure; its docstring is the help, its parameters are its own options."""

from __future__ import annotations

from steerlens.cli.measuring import DataRun, app, command
from steerlens.cli.scores import contextual, importance, lookback, maps, sra
from steerlens.measures.base import HeadScores

__all__ = ["app", "contextual", "importance", "lookback", "maps", "sra"]


@command(samples=20)
def sinks(run: DataRun) -> HeadScores:
    """Attention sinks: the mean attention that the first token receives (Gu et al. 2025).

    Default prompts: look-up.
    """
    from steerlens.measures.sinks import measure

    examples = run.examples("lookup")
    model, tokenizer = run.load()
    with run.progress(len(examples)) as advance:
        return measure(model, tokenizer, examples, batch_size=run.batch_size, advance=advance)
