"""Which model families can be steered: the support page, made by running a tiny model of each.

`python -m steerlens.evals.support` writes it to `evals/records/support.md`.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from steerlens.evals.families import families, tiny, vision
from transformers import PreTrainedModel
from transformers.utils import logging

import steerlens
from steerlens import caches, decoder
from steerlens.errors import SteerlensError, UnsupportedError
from steerlens.facts import TESTED
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning
from steerlens.methods.base import EditMethod

PAGE = Path(__file__).parent / "records" / "support.md"
METHODS: tuple[EditMethod, ...] = (
    ZeroTuning(3.0),
    PASTA(0.05, heads="*:0,1"),
    ACT(0.3, 0.08),
    ACT(0.0, 0.05, heads="*:1,3"),
    HeadMask("all"),
)
SPANS = [[(6, 9)], [(8, 12)]]
LENGTH, PADS = 24, 5


@dataclass(frozen=True)
class Row:
    """A line of the page.

    Attributes:
        family: `model_type`.
        decoder: `model_type` of its text decoder.
        tier: "tested", "self-check", "refused" or "not built".
        attention: layers with attention of the tiny model, of all its layers.
        note: the reason of a refusal, else what is left out.
    """

    family: str
    decoder: str
    tier: str
    attention: str
    note: str

    def line(self) -> str:
        """As Markdown."""
        return f"| {self.family} | {self.decoder} | {self.tier} | {self.attention} | {self.note} |"


def row(family: str) -> Row:
    """Build a tiny model of a family, and steer it.

    A family that is steered passed: `steerlens.selfcheck`; `METHODS` on a left-padded batch and a cached step, where
    the backend that `auto` takes equals `reference` to 1e-4 of the largest logit and every method moves it; and a
    greedy `generate`.
    """
    try:
        model = tiny(family)
    except ValueError as error:
        return Row(family, "", "not built", "", str(error).partition(": ")[2])
    try:
        base = decoder.find(model)
        facts, _ = decoder.read(base)
        with steerlens.steer(model, METHODS[0]):
            pass
    except UnsupportedError as refused:
        reason = re.sub(r"^model family '[^']*' ", "", str(refused).split(". Steer ")[0])
        return Row(family, "", "refused", "", reason)
    tier = "tested" if facts.family in TESTED else "self-check"
    layers = f"{len(facts.attention_layers)} of {facts.layers}"
    return Row(family, facts.family, tier, layers, _steer(model) or "")


@torch.no_grad()
def _steer(model: PreTrainedModel) -> str:
    """What of the checks fails, or nothing."""
    ids = torch.randint(30, 90, (2, LENGTH), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    ids[1, :PADS] = mask[1, :PADS] = 0

    def logits(method: EditMethod | list[EditMethod], backend: str = "auto") -> torch.Tensor:
        with steerlens.steer(model, method, SPANS, backend=backend):
            first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
            found = [first.logits[mask[:, :-1].bool()]]
            if (cache := caches.find(first)) is not None:
                step = model(input_ids=ids[:, -1:], attention_mask=mask, use_cache=True, **{caches.NAME: cache})
                found.append(step.logits[:, 0])
        return torch.cat(found)

    native, found = logits([]), []
    for method in METHODS:
        try:
            auto, truth = logits(method), logits(method, "reference")
        except SteerlensError as error:
            found.append(f"{method.name}: {error}")
            continue
        if not _apart(auto, truth) <= 1e-4 or not _apart(truth, native) > 1e-4:
            found.append(f"{method.name}: off by {_apart(auto, truth):.1e}, moves {_apart(truth, native):.1e}")
    try:
        with steerlens.steer(model, METHODS[0]):
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    except Exception as error:  # whatever generate of this family raises
        found.append(f"generate: {type(error).__name__}: {error}")
    return "; ".join(found)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def page(rows: list[Row]) -> str:
    """The support page."""
    count = Counter(row.tier for row in rows)
    lines = [
        "# Which models can be steered",
        "",
        f"Every family that `AutoModelForCausalLM` of transformers {transformers.__version__} builds, and some "
        "vision-language ones, each as a tiny random model. Made by `python -m steerlens.evals.support`; a test runs "
        "it again and fails when this page is out of date.",
        "",
        f"- **tested** ({count['tested']}): the tests hold every invariant of steering on it: identity, both backends, "
        "padding, caches, chunks, beams, grouped heads, windows.",
        f"- **self-check** ({count['self-check']}): steered after a check at first use, on the model itself: an edit "
        "that changes nothing must leave every attention call as it was. For this page it also passed four methods on "
        "a left-padded batch and a cached step, on two backends that must agree, and `generate`.",
        f"- **refused** ({count['refused']}): an error says why. The way out is a model of another family.",
        f"- **not built** ({count['not built']}): no tiny model could be made here; the check at first use decides.",
        "",
        "Of a vision-language model the text tower is steered. `attention` counts the layers that have attention.",
        "",
        "| family | text decoder | tier | attention | note |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row.line() for row in rows)]) + "\n"


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    PAGE.write_text(page([row(family) for family in [*families(), *vision()]]), encoding="utf-8")
    sys.stderr.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
