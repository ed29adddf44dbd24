"""Parallel context encoding with a shared sink and selective attention (arXiv 2412.16545)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steerlens.edits import Around, Edit, KeepTop, SpanKeys
from steerlens.methods.prompted import PromptedMethod

if TYPE_CHECKING:
    from steerlens.prompted import Prompts, Setting
    from steerlens.spans import Range

GROUP = "documents"
BLOCKS, BEHIND = "blocks", "behind"


@dataclass(frozen=True)
class SelectiveContext(PromptedMethod):
    """Read documents side by side behind one shared prefix, and attend to the few that matter.

    The documents, sections of the span group "documents", do not see each other; all see what precedes the first of
    them, which serves them as a common sink (a BOS token or a short instruction; without any, each grows its own).
    What stands between two documents belongs to the first one.

    Rows behind the documents then attend, in each layer, to the `keep` documents with the highest scores and to all
    that is in no document. A document's score is the sum of its `top` largest weights. With `pool="rows"` scores are
    summed over the layer's heads and the prompt's rows behind the documents, and what is chosen stays for the answer:
    the prompt must be prefilled in one forward. `heads` sums over heads alone and `none` lets each head choose, row by
    row.

    The source leaves open, and here is: where documents stand. With `positions="shared"` each begins where the prefix
    ends, and the question behind the longest of them; `sequential` leaves the positions of the text.

    Args:
        keep: documents that stay; `None` keeps all, which is parallel encoding alone. Published: 5 for demonstrations
            and retrieved passages, 2 for retrieval of one fact.
        top: weights that a score sums. Published: 5.
        pool: what scores are summed over. Published: `rows` for tasks with a question, `none` for language modelling.
        positions: see above.
    """

    keep: int | None = 5
    top: int = 5
    pool: Literal["none", "heads", "rows"] = "rows"
    positions: Literal["shared", "sequential"] = "shared"

    name: ClassVar[str] = "selective_context"
    source: ClassVar[str] = "Zhang et al. 2024, Attention Entropy and Parallel Context Encoding, arXiv 2412.16545"
    summary: ClassVar[str] = "read documents side by side behind a shared prefix, attend to the best few"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            self._count("keep")
        self._count("top")
        self._choice("pool", ("none", "heads", "rows"))
        self._choice("positions", ("shared", "sequential"))
        if self.keep is not None and self.pool == "rows":
            object.__setattr__(self, "chunk_exact", False)

    def edits(self, heads: tuple[int, ...], most: int) -> tuple[Edit | Around, ...]:
        """A layer's edits for at most so many documents."""
        from steerlens import blocks

        found: list[Edit | Around] = []
        if self.keep is not None and self.keep < most:
            groups = tuple(SpanKeys(BLOCKS, k) for k in range(most))
            found.append(KeepTop(heads, groups, self.keep, SpanKeys(BEHIND), self.top, self.pool))
        return (*found, *blocks.apart(heads, BLOCKS, most))

    def find(self, model: Any, prompts: Prompts) -> Setting | None:
        """The documents of each row of the prompts as blocks; a single one is read as ever.

        Raises:
            SpanError: for a prompt that ends with its documents.
            UnsupportedError: for a model without position ids, or with layers that no mask reaches.
        """
        from steerlens import blocks, decoder
        from steerlens.prompted import Setting
        from steerlens.wrapping import unwrap

        facts, _ = decoder.read(decoder.find(unwrap(model)))
        documents: list[Sequence[Range]] = [blocks.adjacent(row) for row in prompts.behind(self.name, GROUP)]
        width, most = prompts.ids.shape[1], max(map(len, documents))
        if most == 1:
            return None
        blocks.check(self.name, model, facts)
        positions = None
        if self.positions == "shared":
            positions = blocks.aligned(prompts.first, documents, width, "start").to(prompts.ids.device)
        groups = blocks.groups(BLOCKS, documents) | {BEHIND: [[(row[-1][1], width)] for row in documents]}
        plan = {n: self.edits(tuple(range(facts.heads[n])), most) for n in facts.attention_layers}
        return Setting(self.name, plan, groups, positions)
