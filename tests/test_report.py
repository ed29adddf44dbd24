"""Reports of made-up summaries: every figure is there, nothing in them is markup, and a phone can read them."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_summaries import NASTY, comparison, everything, smallest
from markdown_it import MarkdownIt
from PIL import Image
from steerlens.evals import report
from steerlens.evals.report import charts, markdown, view
from steerlens.evals.report.view import ReportError

from steerlens.cli.eval import _show as show_table
from steerlens.paired import UNSETTLED

SCREENS = {"phone": (390, 844), "desk": (1440, 900)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "link", "br", "img", "col", "hr", "input"}
ARTEFACTS = Path(os.environ.get("STEERLENS_ARTEFACTS") or Path(__file__).parent / "artefacts")


class Page(HTMLParser):
    """Tags in order, table rows as texts, and the whole text; a tag that does not close what is open is an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            if "tr" in self.open:
                self.rows[-1] += data + " "


def made(folder: Path, summary: dict) -> tuple[Page, str]:
    files = report.write(folder, summary)
    assert files == [folder / "report.md", folder / "report.html"]
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md"]
    return Page(files[1].read_text(encoding="utf-8")), files[0].read_text(encoding="utf-8")


def interval(difference: dict, share: bool = True) -> str:
    """Mean and interval, in points or as they are."""

    def change(value):
        text = f"{100 * value:+.1f}" if share else f"{value:+.3g}"
        return "0.0" if share and float(text) == 0 else text

    low, high = difference["interval"]
    return f"{change(difference['mean'])} [{change(low)}, {change(high)}]"


def figures(entry: dict) -> list[str]:
    """What a table shows of a comparison, written here again from what the report promises."""
    share = entry["metric"] != "logprob"
    texts = [entry["after"], str(entry["n"]), entry["verdict"], interval(entry["difference"], share)]
    texts += [f"{100 * v:.1f}\u00a0%" if share else f"{v:.4g}" for v in (entry["baseline"], entry["steered"])]
    texts += [f"{p:.2g}" for p in (entry["difference"]["p"], entry["p_holm"]) if p is not None]
    texts += [f"{100 * entry['minimum_detectable']:.1f}"] if entry["minimum_detectable"] is not None else []
    return texts + ([f"({entry['errors']} failed)"] if entry["errors"] else [])


def flat(text: str) -> str:
    return re.sub(r"[ \n]+", " ", text)


@pytest.fixture(scope="module", params=[("tiny",), ("tiny", "meta-llama/Llama-3.1-8B-Instruct")], ids=["one", "two"])
def full(request, tmp_path_factory):
    summary = everything(request.param)
    return summary, *made(tmp_path_factory.mktemp("report"), summary)


class TestContents:
    def test_every_figure_of_every_comparison_stands_in_a_row_of_both(self, full):
        summary, page, text = full
        lines = [line.replace("\\", "") for line in text.splitlines() if line.startswith("|")]
        rows = [flat(row) for row in page.rows]
        assert len(summary["comparisons"]) > 30
        for entry in summary["comparisons"]:
            wanted = figures(entry)
            assert any(all(part in row for part in wanted) for row in rows), wanted
            wanted += [entry["task"], entry["metric"], *([entry["model"]] if len(summary["models"]) > 1 else [])]
            assert any(all(part in line for part in wanted) for line in lines), wanted

    def test_noise_whose_interval_excludes_0_is_explained(self, capsys):
        """By the table of the command line and by that of report.md, and only then."""
        plain, summary = smallest(), smallest()
        summary["comparisons"][0]["difference"] |= {"mean": 1.0, "interval": [0.07, 1.0]}
        for one, told in ((plain, False), (summary, True)):
            show_table(one)
            assert (UNSETTLED in capsys.readouterr().out) is told
            assert (UNSETTLED in markdown.render(view.Report(one))) is told

    def test_the_words_on_top(self, full):
        summary, page, text = full
        primary = [e for e in summary["comparisons"] if e["primary"] and e["role"] in ("method", "sweep")]
        for verdict in ("better", "worse", "within noise"):
            count = sum(e["verdict"] == verdict for e in primary)
            assert count and f"{count} {verdict}" in flat(page.text)
        strongest = max(primary, key=lambda e: (e["role"] == "method", e["difference"]["mean"]))
        for shown in (flat(page.text), text.replace("\\", "")):
            helped = re.search(r"Helped:?\*{0,2} ?(.*?)Hurt", shown, re.S)[1]
            assert strongest["after"] in helped and f"{100 * strongest['difference']['mean']:+.1f}" in helped
            assert "act-tiny on needle" in re.search(r"Hurt:?\*{0,2} ?(.*?)Within noise", shown, re.S)[1]
            assert "Better than random heads too" in shown and "Neutral parameters changed no output." in shown
            assert "2 samples failed" in shown and "1 pair of steering and task could not be run" in shown

    def test_everything_else_of_the_summary(self, full):
        summary, page, text = full
        plain = text.replace("\\", "")
        for shown in (flat(page.text), plain):
            for entry in summary["published"]:
                assert entry["source"] in shown and entry["agrees"] in shown and entry.get("note", "") in shown
            assert "59.5\u00a0% → 81.0\u00a0%" in shown and "[+17.0, +26.0]" in shown and "+22.4" in shown
            assert summary["skipped"][0]["why"] in shown and summary["notes"][0] in shown
            assert "CUDA out of memory at batch size 1" in shown and "17, 163" in shown
            assert "2026-11-26 06:27" in shown and '"limit": 200' in shown
            assert summary["command"] in shown and "transformers 5.24.0" in shown
        for control in summary["controls"]:
            wanted = f"{100 * control['random_heads']['mean']:.1f}\u00a0%", interval(control["against_random"])
            assert any(all(part in row for part in wanted) for row in map(flat, page.rows))
            assert any(all(part in line for part in wanted) for line in plain.splitlines())

    def test_heat_maps_hold_their_cells_and_share_a_scale(self, full):
        summary, page, _ = full
        cells = [e["cells"] for e in summary["comparisons"] if e["cells"]]
        shades = [a for tag, a in page.tags if tag == "td" and "background" in (a.get("style") or "")]
        baselines = len(summary["models"])
        assert len(shades) == len(cells[0]) * (len(cells) + baselines)
        assert charts.shade(1.0, 0.0, 1.0) in {a["style"] for a in shades}

    def test_the_same_summary_gives_the_same_bytes(self, tmp_path):
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        summary = everything()
        for one, other in zip(
            report.write(tmp_path / "a", summary),
            report.write(tmp_path / "b", json.loads(json.dumps(summary))),
            strict=True,
        ):
            assert one.read_bytes() == other.read_bytes()


class TestSafety:
    def test_the_page_needs_nothing_and_runs_nothing(self, full):
        _, page, _ = full
        assert not {"script", "img", "iframe", "object", "embed", "base", "form", "use", "image"} & {
            tag for tag, _ in page.tags
        }
        ids = {a["id"] for _, a in page.tags if "id" in a}
        for tag, attributes in page.tags:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            for name in ("src", "href", "xlink:href", "srcset", "action"):
                value = attributes.get(name)
                assert value is None or value == "data:," or value.removeprefix("#") in ids, (tag, value)
            if tag == "svg" and "aria-hidden" not in attributes and "x" not in attributes:
                assert attributes["role"] == "img" and attributes["aria-label"]
        style = (Path(report.__file__).parent / "style.css").read_text(encoding="utf-8")
        assert not re.search(r"url\(|@import|https?:", style)

    def test_samples_are_shown_as_they_are(self, full):
        _, page, text = full
        rendered = Page(MarkdownIt("commonmark").enable("table").render(text).replace("<hr />", ""))
        assert not {"script", "img", "a"} & {tag for tag, _ in rendered.tags}
        for name in ("script", "unicode"):
            wanted = view.clean(NASTY[name])
            assert "\ufffd" in wanted and wanted in page.text
            assert flat(wanted.replace("\n", " ⏎ ")) in flat(rendered.text)
        assert NASTY["long"] in page.text

    def test_labels_are_text_too(self, tmp_path):
        summary = everything()
        evil = '"><script>alert(1)</script>|\n# a & b {{ 7 * 7 }} \ud83d'
        for entry in summary["comparisons"]:
            entry["after"] = evil if entry["after"] == "pasta-tiny" else entry["after"]
        summary["name"] = summary["models"][0] = summary["skipped"][0]["why"] = evil
        page, text = made(tmp_path, summary)
        assert "script" not in {tag for tag, _ in page.tags}
        assert view.clean(evil) in page.text and r"{{ 7 \* 7 }}" in text and "<script" not in text

    @given(st.text(max_size=60))
    def test_markdown_gives_a_cell_back(self, text):
        text = view.clean(text)
        cell = markdown.escape(f"x{text}x")
        shown = MarkdownIt("commonmark").enable("table").render(f"| a | b |\n| --- | --- |\n| {cell} | y |\n")
        found = re.findall(r"<td>(.*?)</td>", shown, re.S)
        assert len(found) == 2 and "<" not in found[0]
        assert "".join(html.unescape(found[0]).split()) == "".join(f"x{text}x".replace("\n", "⏎").split())


class TestSmall:
    def test_one_comparison_within_noise(self, tmp_path):
        page, text = made(tmp_path, smallest())
        for shown in (flat(page.text), text):
            assert shown.count("Nothing beyond noise.") == 2 and "pasta on conflict" in shown
            assert not re.search(r"\b(nan|None|inf)\b", shown)
        assert "Samples that changed" not in page.text and "Dose" not in page.text
        links = {a["href"] for tag, a in page.tags if tag == "a"}
        assert links == {"#effects", "#figures", "#made"}

    def test_nothing_compared(self, tmp_path):
        page, text = made(tmp_path, smallest() | {"comparisons": [], "tasks": [], "models": []})
        assert "Nothing with the unsteered model." in text and "Nothing with the unsteered model." in page.text

    @pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
    def test_a_number_that_is_none_is_a_dash(self, tmp_path, value):
        summary = smallest()
        entry = summary["comparisons"][0]
        entry |= {
            "p_holm": value,
            "minimum_detectable": value,
            "cells": [{"length": n, "n": 1, "before": value} for n in "ab"],
        }
        entry["difference"] |= {"interval": [value, value], "p": value}
        page, text = made(tmp_path, summary)
        assert "–" in page.text and not re.search(r"\b(nan|None|inf)\b", page.text + text)

    def test_lower_is_better(self, tmp_path):
        summary = smallest()
        entry = comparison(np.random.default_rng(0), "conflict", "act", -0.4) | {"higher_is_better": False}
        summary["comparisons"] = [entry | {"verdict": "better"}]
        page, text = made(tmp_path, summary)
        assert "lower is better" in page.text and "lower is better" in text
        assert (
            "1 better" in flat(page.text) and "act on conflict" in re.search(r"Helped:(.*)", text.replace("*", ""))[1]
        )

    def test_a_large_summary_stays_usable(self, tmp_path):
        rng = np.random.default_rng(0)
        every = [comparison(rng, "conflict", "pasta", 0.4) for _ in range(8)]
        summary = smallest() | {
            "comparisons": [dict(every[i % 8], task=f"task {i // 12}", after=f"steering {i % 12}") for i in range(600)]
        }
        page, _ = made(tmp_path, summary)
        shown = sum(a.get("class") == "change" for _, a in page.tags)
        assert shown == view.SHOWN_IN_ALL
        assert f"also those of {600 - view.SHOWN_IN_ALL // view.SHOWN_SAMPLES} more comparisons" in page.text
        assert f"5, {len(every[0]['changed']) - 5} more in summary.json" in page.text
        summary["comparisons"][0]["changed_total"] = 4321
        assert "5 of 4321" in made(tmp_path, summary)[0].text
        assert (tmp_path / "report.html").stat().st_size < 6_000_000


class TestErrors:
    @pytest.mark.parametrize(
        ("summary", "says"),
        [
            ({"schema": 2}, "has schema 2, this version reads 1"),
            ([], r"has schema \[\]"),
            ({"schema": 1, "name": "n"}, "'n' lacks what a report shows.*comparisons"),
            ({"schema": 1, "comparisons": [{"task": "t", "metric": "m"}]}, "model"),
        ],
    )
    def test_a_summary_that_is_none(self, tmp_path, summary, says):
        with pytest.raises(ReportError, match=says) as raised:
            report.write(tmp_path, summary)
        assert raised.value.exit_code == 2 and not list(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written_keeps_the_old_report(self, tmp_path):
        (tmp_path / "report.md").write_text("old")
        (tmp_path / "report.html").mkdir()
        with pytest.raises(IsADirectoryError, match=r"report\.html"):
            report.write(tmp_path, smallest())
        assert (tmp_path / "report.md").read_text() == "old"
        with pytest.raises(FileNotFoundError):
            report.write(tmp_path / "nowhere", smallest())


def lines(svg: str, name: str) -> list[dict[str, str]]:
    found = ElementTree.fromstring(svg).iter("line")
    return [line.attrib for line in found if line.get("class", "").split()[0] == name]


def percent(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1])


class TestCharts:
    def test_an_interval_lies_where_its_numbers_are(self):
        effect = view.Report(everything()).primary[1]
        axis = charts.Axis.over([effect.low, effect.high, 0.0])
        span = lines(charts.effect(effect, axis), "interval")[0]
        zero = lines(charts.effect(effect, axis), "zero")[0]
        low, high, origin = percent(span["x1"]), percent(span["x2"]), percent(zero["x1"])
        assert (high - origin) / (low - origin) == pytest.approx(effect.high / effect.low, rel=0.01)
        assert 0 < origin < low < high < 100

    def test_a_dose_response_curve_is_logarithmic_and_knows_the_baseline(self):
        curve = next(c for c in view.Report(everything()).curves if c.task == "conflict")
        svg = charts.curve(curve)
        series = lines(svg, "series")
        places = [percent(s["x1"]) for s in series] + [percent(series[-1]["x2"])]
        assert len(places) == 5
        steps = np.diff(places) / np.diff(np.log([p.dose for p in curve.points]))
        assert steps == pytest.approx(steps[0], rel=0.01)
        baseline = percent(lines(svg, "baseline")[0]["y1"])
        heights = [percent(s["y1"]) for s in series] + [percent(series[-1]["y2"])]
        for point, height in zip(curve.points, heights, strict=True):
            assert (height < baseline) == (point.steered > point.baseline)

    @pytest.mark.parametrize(
        ("doses", "log"),
        [([0.01, 0.03, 0.1, 0.3, 1.0], True), ([0.0, 0.5, 1.0], False), ([1, 2, 3, 4], False), ([-1, 1], False)],
    )
    def test_the_axis_of_doses(self, doses, log):
        axis = charts.Axis.of_doses(doses)
        assert axis.log is log
        places = [axis.at(dose) for dose in doses]
        assert places == sorted(places) and len(set(places)) == len(doses) and places[0] > 0 and places[-1] < 100

    @given(st.lists(st.floats(-1e6, 1e6), max_size=8))
    def test_an_axis_holds_its_values_and_ticks(self, values):
        axis = charts.Axis.over(values)
        assert axis.low < axis.high
        assert all(axis.low <= v <= axis.high for v in (*values, *axis.ticks))

    def test_cells_can_be_read_in_every_shade(self):
        for value in np.linspace(0, 1, 101):
            red, green, blue, text = re.fullmatch(
                r"background:rgb\((\d+),(\d+),(\d+)\);color:(#\w+)", charts.shade(value, 0, 1)
            ).groups()
            assert contrast((int(red), int(green), int(blue)), rgb(text)) >= 4.5

    def test_words_can_be_read_in_both_themes(self):
        style = (Path(report.__file__).parent / "style.css").read_text(encoding="utf-8")
        light, dark = (
            dict(re.findall(r"--([a-z]+): (#\w+);", block)) for block in re.findall(r":root {(.*?)}", style, re.S)
        )
        for theme in (light, dark):
            for name in ("ink", "soft", "better", "worse", "noise", "link"):
                for ground in ("page", "card"):
                    assert contrast(rgb(theme[name]), rgb(theme[ground])) >= 4.5, (name, ground)
            assert contrast(rgb(theme["ink"]), rgb(theme["mark"])) >= 4.5

    @given(st.text(max_size=40), st.text(max_size=40))
    def test_marked_words_leave_the_texts_whole(self, before, after):
        sides = view.words(before, after)
        assert ["".join(piece for piece, _ in side) for side in sides] == [before, after]
        same = ["".join(piece for piece, differs in side if not differs) for side in sides]
        assert same[0] == same[1]


def rgb(colour: str) -> tuple[int, ...]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def contrast(one, other) -> float:
    """WCAG 2 contrast ratio."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


MEASURE = """<script>
document.querySelectorAll("details").forEach(d => d.open = true);
const sizes = [], over = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const holder = walk.currentNode.parentElement;
  if (walk.currentNode.data.trim() && !["SCRIPT", "title"].includes(holder.tagName))
    sizes.push(parseFloat(getComputedStyle(holder).fontSize));
}
document.querySelectorAll("body *").forEach(e => {
  const scrolls = e.closest(".heat, thead"), box = e.getBoundingClientRect();
  if (!scrolls && box.width && box.right > innerWidth + 1) over.push(e.outerHTML.slice(0, 200));
});
const plots = [...document.querySelectorAll("svg.effect, svg.curve")].map(e => e.getBoundingClientRect().width);
const found = {width: innerWidth, scroll: document.documentElement.scrollWidth, smallest: Math.min(...sizes),
  body: parseFloat(getComputedStyle(document.querySelector(".prose dd")).fontSize), over: over.slice(0, 5),
  plots: Math.min(...plots), height: document.documentElement.scrollHeight};
parent.document.querySelector("output").textContent = JSON.stringify(found);
</script>"""


class TestBrowser:
    @pytest.fixture
    def browser(self, tmp_path_factory):
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
        home = tmp_path_factory.mktemp("browser")

        def run(page: Path, size: tuple[int, int], *options: str) -> str:
            flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
            window = f"--window-size={size[0]},{size[1]}"
            command = [found, *flags, f"--user-data-dir={home}", window, *options, page.as_uri()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return done.stdout

        return run

    @pytest.mark.parametrize("screen", SCREENS)
    def test_a_phone_and_a_desk_can_read_it(self, browser, screen, tmp_path):
        size = SCREENS[screen]
        file = report.write(tmp_path, everything())[1]
        page = html.escape(file.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"))
        # a window has a least width, a frame has none
        frame = (
            f'<output></output><iframe width="{size[0]}" height="{size[1]}" style="border:0" srcdoc="{page}"></iframe>'
        )
        (tmp_path / "frame.html").write_text(f'<!DOCTYPE html><meta charset="utf-8">{frame}', encoding="utf-8")
        dumped = browser(tmp_path / "frame.html", (2000, 1000), "--dump-dom")
        found = json.loads(html.unescape(re.search("<output>(.*?)</output>", dumped)[1]))
        assert found["width"] == size[0]
        assert found["scroll"] <= size[0] and not found["over"], found["over"]
        assert found["smallest"] >= 12 and found["body"] >= 16
        assert found["plots"] >= 200
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        for name, height in ((screen, size[1]), (f"{screen}-whole", min(8000, found["height"]))):
            picture = ARTEFACTS / f"report-{name}.png"
            picture.unlink(missing_ok=True)
            browser(file, (size[0], height), f"--screenshot={picture}")
            with Image.open(picture) as image:
                assert image.size == (size[0], height)
                assert len(image.convert("RGB").getcolors(1 << 24)) > 100

    def test_the_colours_follow_the_theme(self, browser, tmp_path):
        file = report.write(tmp_path, smallest())[1]
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        grounds = {}
        for theme, number in (("dark", 0), ("light", 1)):
            picture = ARTEFACTS / f"report-small-{theme}.png"
            picture.unlink(missing_ok=True)
            browser(
                file, SCREENS["phone"], f"--blink-settings=preferredColorScheme={number}", f"--screenshot={picture}"
            )
            with Image.open(picture) as image:
                grounds[theme] = sum(image.convert("RGB").getpixel((2, 2)))
        assert grounds["dark"] < 150 and grounds["light"] > 700
