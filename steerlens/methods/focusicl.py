"""FocusICL: many demonstrations in batches that do not see each other, trivial tokens left out (arXiv 2408.13987)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steerlens.edits import Around, DropLowest, Edit, MassLaw, Redistribute, Reweight, Scale, SpanKeys
from steerlens.errors import MethodError
from steerlens.methods.prompted import PromptedMethod

if TYPE_CHECKING:
    from torch import Tensor

    from steerlens.prompted import Prompts, Setting
    from steerlens.spans import Range

GROUP = "demos"


@dataclass(frozen=True)
class ByDemos(MassLaw):
    """A row's attention over each batch and the rest, mixed in proportion to the batches' masses.

    With S_i the mass of batch i and Q that outside all of them, batch i's weights are multiplied by
    c_i = S_i / (S_i + Q) and all others by Σ c, up to a common factor. One batch alone stays as it is.
    """

    def log_weights(self, mass: Tensor, row: Tensor, real: Tensor) -> Tensor:
        seen = mass > 0
        mass = mass.masked_fill(~seen, 1)  # what is not used must be finite, for gradients
        rest = (1 - mass.masked_fill(~seen, 0).sum(-1, keepdim=True)).clamp(min=0)
        return (mass / (mass + rest)).log().masked_fill(~seen, -1e30).log_softmax(-1)


@dataclass(frozen=True)
class FocusICL(PromptedMethod):
    """Read demonstrations in batches that do not see each other, and ignore the tokens that matter least (§3).

    Hierarchy: the sections of the span group "demos" form batches of `batch` consecutive ones. No token of a batch sees
    another batch; what precedes the demonstrations is seen by all. Positions make each batch end where the question
    begins. A row behind the demonstrations attends to each batch together with all that is in none, and the outputs are
    mixed in proportion to the batches' attention scores. With `weights="all"` these count what is in no batch, too; the
    mix is then one attention with log T nats on that, T batches.

    Filter: in the last prompt row and all later ones, each head gives no weight to the `fraction` of the
    demonstrations' tokens with the lowest scores (rounded down). The source filters in the demonstrations' responses,
    too, which is not done here.

    What stands between two demonstrations belongs to the first one. The source leaves open, and here is: scores are
    filtered head by head; scores of a batch are those of its own tokens. `steerlens.fitting.focusicl` searches both
    parameters.

    With `weights="demos"` a layer holds what every row and head gives each batch, several times over: from about as
    many batches as half a head's width on, prefill takes more than twice a layer's queries, keys and values in memory.

    Args:
        fraction: of the demonstrations' tokens that is ignored, in [0, 1). Published: 0.1 to 0.4, by search.
        batch: demonstrations per batch; `None`: all in one. Published: 2 to 224, by search.
        weights: what a batch's share of the mix is measured by: its own attention (`demos`), as published, or that and
            what is in no batch (`all`).
    """

    fraction: float = 0.1
    batch: int | None = 8
    weights: Literal["demos", "all"] = "demos"

    name: ClassVar[str] = "focusicl"
    source: ClassVar[str] = "Yuan et al. 2024, Focused ICL, arXiv 2408.13987, §3"
    summary: ClassVar[str] = "demonstrations in batches that do not see each other, trivial tokens ignored"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    fit: ClassVar[str] = "steerlens.fitting.focusicl(model, tokenizer, examples)"
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._number("fraction", 0, 1)
        if self.fraction == 1:
            raise MethodError("focusicl: fraction=1 is out of range; allowed: a number >= 0 and < 1")
        if self.batch is not None:
            self._count("batch")
        self._choice("weights", ("demos", "all"))

    def batches(self, demos: Sequence[Range]) -> list[Range]:
        """The batches' columns: each from its first demonstration to the next batch's."""
        firsts = [a for a, _ in demos[:: self.batch or len(demos)]]
        return list(zip(firsts, [*firsts[1:], demos[-1][1]], strict=True))

    def edits(self, heads: tuple[int, ...], counts: Sequence[int]) -> tuple[Edit | Around, ...]:
        """A layer's edits for rows of so many batches."""
        from steerlens import blocks

        found: list[Edit | Around] = []
        if self.fraction > 0:
            found.append(DropLowest(heads, SpanKeys(GROUP), self.fraction))
        most = max(counts)
        found += blocks.apart(heads, "batches", most)
        if self.weights == "demos" and most > 1:
            found.append(Redistribute(heads, tuple(SpanKeys("batches", k) for k in range(most)), ByDemos()))
        for count in sorted(set(counts) - {1}) if self.weights == "all" else ():
            law, rows = Scale(-math.log(count)), tuple(row for row, n in enumerate(counts) if n == count)
            found.append(Reweight(heads, SpanKeys(GROUP), law, "prefill", rows, SpanKeys("behind")))
            found.append(Reweight(heads, SpanKeys(GROUP), law, "decode", rows))
        return tuple(found)

    def find(self, model: Any, prompts: Prompts) -> Setting | None:
        """The batches of each row of the prompts.

        Raises:
            SpanError: for a prompt that ends with its demonstrations.
            UnsupportedError: for a model without position ids, or with layers that no mask reaches.
        """
        from steerlens import blocks, decoder
        from steerlens.prompted import Setting
        from steerlens.wrapping import unwrap

        facts, _ = decoder.read(decoder.find(unwrap(model)))
        demos, width = prompts.behind(self.name, GROUP), prompts.ids.shape[1]
        batches = [self.batches(ranges) for ranges in demos]
        counts = [len(row) for row in batches]
        if self.fraction == 0 and max(counts) == 1:
            return None
        positions = None
        if max(counts) > 1:
            blocks.check(self.name, model, facts)
            positions = blocks.aligned(prompts.first, batches, width).to(prompts.ids.device)
        groups: dict[str, Sequence[Sequence[Range]]] = {
            GROUP: [[(row[0][0], row[-1][1])] for row in batches],
            **blocks.groups("batches", batches),
            "behind": [[(row[-1][1], width)] for row in batches],
        }
        plan = {n: self.edits(tuple(range(facts.heads[n])), counts) for n in facts.attention_layers}
        return Setting(self.name, plan, groups, positions)
