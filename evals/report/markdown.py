"""`report.md`: the same figures as tables and sentences, as GitHub shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from steerlens.evals.report import figures, view, words

from steerlens.paired import UNSETTLED, unsettled

SHOWN_SAMPLES = 3
LONGEST = 400
# an interval such as [+1.5, +2.0] and an underscore inside a word are no markup
_MARKUP = re.compile(r"(?P<interval>\[[-+.e\d]+, [-+.e\d]+\](?![(\[:]))|(?<![^\W_])_|_(?![^\W_])|[\\`*\[\]|~#$]")
NOTE = (
    "Steered minus unsteered on the same samples, with its {level} interval; differences of percentages are in points. "
    "p: exact McNemar test for outcomes of 0 and 1, else a paired sign-flip test. Holm: corrected for the number of "
    "tasks; verdicts use it. Detectable: the smallest difference that such samples show with 80\u00a0% probability."
)


def render(report: view.Report) -> str:
    """The text."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(_lines(report))) + "\n"


def escape(text: object) -> str:
    """Text that Markdown shows as it is, on one line: also inside a table."""
    marked = _MARKUP.sub(lambda found: found["interval"] or "\\" + found[0], str(text))
    marked = marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[ \t]*\n[ \t]*", " ⏎ ", marked.strip("\n"))


def _lines(report: view.Report) -> Iterator[str]:
    yield f"# {escape(report.name)}"
    yield ""
    yield f"Steering evaluation · {escape(' · '.join(filter(None, [', '.join(report.models), report.date])))}"
    yield ""
    yield "## Summary"
    for heading, text in words.sentences(report):
        yield from ("", f"**{heading}:** {escape(text)}")
    if report.primary:
        yield from _heading("Effect per task")
        yield from (NOTE.format(level=report.level), "")
        yield from _figures(report, report.primary)
    if report.secondary:
        yield from _heading("Other metrics")
        yield from _figures(report, report.secondary)
    if report.control_runs:
        yield from _heading("Control runs")
        yield from _figures(report, report.control_runs)
    if report.curves:
        yield from _heading("Dose–response")
        for curve in report.curves:
            yield from (f"**{escape(curve.task)}**, {escape(curve.metric)}, over `{curve.parameter}`:", "")
            rows = [
                (f"{p.dose:g}", p.unit.score(p.baseline), p.unit.score(p.steered), p.difference, p.verdict)
                for p in curve.points
            ]
            yield from _table(("strength", "unsteered", "steered", f"difference [{report.level}]", "verdict"), rows)
    if report.grids:
        yield from _heading("Where in the prompt")
        for grids in report.grids:
            for grid in (grids.before, *grids.after, *grids.swept):
                unit = ", %" if grids.unit.percent else ""
                per_cell = words.samples_per_cell(grid)
                yield f"**{escape(grids.task)}, {escape(grid.title)}** ({escape(grids.metric)}{unit}; {per_cell})"
                yield ""
                names = [f"{grid.y or ''} \\ {grid.x}", *map(str, grid.columns)]
                scores = [
                    [str(row) if grid.y else "", *(grids.unit.number(grid.values.get((c, row))) for c in grid.columns)]
                    for row in grid.rows
                ]
                yield from _table(names, scores)
    if report.controls:
        yield from _heading("Controls")
        columns = ("steering", "task", "metric", "unsteered", "steered", "random heads", "steered minus random", "p")
        yield from _table(
            (*columns, "verdict", "neutral parameters"),
            [
                (
                    *(c.of, c.task, c.metric, c.unit.score(c.baseline), c.unit.score(c.steered)),
                    f"{c.unit.score(c.random)} ({c.unit.number(c.low)} to {c.unit.number(c.high)}, {c.sets or 0} sets)",
                    *(c.difference, figures.p_value(c.p), c.verdict or figures.MISSING),
                    {True: "same outputs", False: "OUTPUTS DIFFER", None: "not run"}[c.neutral],
                )
                for c in report.controls
            ],
        )
    if report.published:
        yield from _heading("Published and measured")
        yield from _table(
            ("steering", "task", "metric", "model", "published", "measured here", "agreement", "source", "note"),
            [
                (
                    *(p.steering, p.task, p.metric, p.model, f"{p.baseline} → {p.steered} ({p.change})"),
                    f"{p.measured_baseline} → {p.measured_steered} ({p.measured_change} {p.interval})"
                    if p.measured
                    else figures.MISSING,
                    *(p.agrees, p.source, p.note),
                )
                for p in report.published
            ],
        )
    if report.samples:
        yield from _heading("Samples that changed")
        also = f", also those of {words.count(report.unshown, 'more comparison')}" if report.unshown else ""
        which = "Samples whose score changed, gains and losses in turn; words that differ are bold."
        yield from (f"{which} The samples files hold every sample{also}.", "")
        for group in report.samples:
            yield from _samples(report, group)
    if report.skipped:
        yield from _heading("Not run")
        for pair in report.skipped:
            yield f"- {escape(pair[0])}: {escape(pair[1])}"
    if report.failures:
        yield from _heading(f"{words.count(report.failed, 'sample')} failed")
        for f in report.failures[: view.SHOWN_ERRORS]:
            yield f"- {escape(f.steering)} on {escape(f.task)} ({escape(f.model)}), {f.where}: {escape(f.error)}"
        if len(report.failures) > view.SHOWN_ERRORS:
            yield f"- {len(report.failures) - view.SHOWN_ERRORS} more kinds of failure are in the samples files"
    if report.notes:
        yield from _heading("Notes")
        yield from (f"- {escape(note)}" for note in report.notes)
    yield from _heading("How it was made")
    for label, text in report.made:
        yield f"- {label}: {escape(text)}"
    yield "- Made from `summary.json` by steerlens. With charts: `report.html`."
    if report.job:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", report.job)), default=0))
        yield from ("", "The job:", "", f"{fence}json", report.job, fence)


def _heading(text: str) -> tuple[str, ...]:
    return "", f"## {text}", ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(escape(cell) for cell in row) + " |"
    yield ""


def _figures(report: view.Report, effects: Sequence[figures.Effect]) -> Iterator[str]:
    model = ("model",) if len(report.models) > 1 else ()
    columns = (*model, "task", "steering", "metric", "n", "unsteered", "steered", f"difference [{report.level}]", "p")
    rows = [
        (
            *((e.model,) if model else ()),
            *(e.task, e.steering, e.measure),
            f"{e.n}" + (f" ({e.errors} failed)" if e.errors else ""),
            *(e.unit.score(e.baseline), e.unit.score(e.steered), e.difference, figures.p_value(e.p)),
            *(figures.p_value(e.p_holm), e.unit.size(e.detectable), e.verdict),
        )
        for e in effects
    ]
    yield from _table((*columns, "p (Holm)", "detectable", "verdict"), rows)
    if any(unsettled(e.verdict, e.low, e.high) for e in effects):
        yield from (UNSETTLED, "")


def _samples(report: view.Report, group: figures.Samples) -> Iterator[str]:
    shown = group.shown[:SHOWN_SAMPLES]
    yield f"**{escape(report.named(group.effect))}**, {escape(group.effect.metric)}: {group.count(len(shown))}"
    yield ""
    yield from (
        "| sample | prompt ends | right answer | unsteered | steered | score |",
        "|" + " --- |" * 6,
    )
    for s in shown:
        cells = (s.doc_id, _end(s.prompt), _start(s.target))
        sides = (_pieces(s.before), _pieces(s.after))
        score = f"{s.before_score} → {s.after_score}"
        yield "| " + " | ".join([*map(escape, cells), *sides, score]) + " |"
    yield ""


def _pieces(pieces: Sequence[tuple[str, bool]]) -> str:
    found, room = [], LONGEST
    for text, differs in pieces:
        part, room = text[:room], room - len(text)
        inner = escape(part.strip())
        if inner and differs:
            inner = f"**{inner}**"
        # blanks stay outside the marks: Markdown takes ** only beside a word
        found.append((" " if part[:1].isspace() else "") + inner + (" " if inner and part[-1:].isspace() else ""))
        if room <= 0:
            found.append("…")
            break
    return re.sub(" +", " ", "".join(found)).strip() or "(nothing)"


def _start(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _end(text: str) -> str:
    return text if len(text) <= LONGEST else "… " + text[-LONGEST:]
