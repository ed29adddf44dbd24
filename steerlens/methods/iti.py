"""ITI, inference-time intervention: shift the outputs of heads that tell truth from falsehood (arXiv 2306.03341)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from steerlens.edits import AddOutput, Plan
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans


@dataclass(frozen=True)
class HeadShift(EditMethod):
    """o' = o + α·σ·θ per head, where the output projection reads it; see `ITI` for the parameters."""

    vectors: str
    alpha: float = 15.0
    top: int = 48
    rows: Literal["decode", "all"] = "decode"
    ddof: Literal[0, 1] = 0
    heads: Heads | str | dict[int, list[int]] | None = None

    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {
        "alpha": Search((1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0), neutral=0.0, log=False)
    }

    def __post_init__(self) -> None:
        self._number("alpha", -math.inf)
        self._file("vectors")
        self._count("top")
        self._choice("rows", ("decode", "all"))
        if self.ddof not in (0, 1) or isinstance(self.ddof, bool):
            raise MethodError(f"{self.name}: ddof={self.ddof!r} is unknown; allowed: 0, 1")
        if self.heads is not None:
            self._parse_heads()

    @property
    def along(self) -> str:
        """What the file calls the directions."""
        return "mean"

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.alpha == 0 or (isinstance(self.heads, Heads) and self.heads.empty):
            return {}
        file = self.load_vectors(self.along)
        correction = 1.0
        if self.ddof:
            texts = file.metadata.get("texts", "")
            if not texts.isdecimal() or int(texts) < 2:
                raise MethodError(
                    f"{self.name}: ddof=1 needs the number of texts that {file.name} was fitted on; its metadata say "
                    f"texts={texts!r}: give ddof=0, or fit it again"
                )
            correction = math.sqrt(int(texts) / (int(texts) - 1))
        plan: dict[int, tuple[AddOutput, ...]] = {}
        for layer, heads in file.choose(self.heads, self.top, facts).items():  # type: ignore[arg-type]
            deviation = file.get(f"{self.along}_deviation", layer, facts, ndim=1)
            shift = file.vectors(self.along, layer, facts, deviation * correction)
            plan[layer] = (AddOutput(tuple(heads), shift, self.alpha, self.rows),)
        return plan


@dataclass(frozen=True)
class ITI(HeadShift):
    """o' = o + α·σ·θ in the heads whose outputs best tell true from false answers (§3).

    θ is a unit vector, σ the standard deviation of the head's output along it; both are fitted by
    `steerlens.fitting.iti`. `steerlens.fitting.bake` turns the shift into a bias of the output projection, W_O·shift
    (published `edit_weight.py` puts the shift itself there, which is not the same).

    Args:
        vectors: safetensors file with `<along>.<layer>` [H, D], `<along>_deviation.<layer>` [H], `score.<layer>` [H].
        alpha: strength in standard deviations; 0 is neutral. Published: 15.
        top: how many heads, the best by the file's scores (published: 48), where `heads` does not say which.
        rows: `decode`, the last prompt row and all later ones, those that produce an answer, as published generation
            does step by step; `all`, the prompt too, as its CE and KL evaluations do.
        ddof: of σ; 0 in the published legacy code, 1 in its current one.
        heads: which query heads.
        direction: `mass_mean`, from the mean of false to that of true activations ("center of mass"), or `probe`,
            the coefficients of the logistic regression.
    """

    direction: Literal["mass_mean", "probe"] = "mass_mean"

    name: ClassVar[str] = "iti"
    source: ClassVar[str] = "Li et al. 2023, Inference-Time Intervention, arXiv 2306.03341, §3"
    summary: ClassVar[str] = "shift the outputs of heads that tell true from false along that direction"
    fit: ClassVar[str] = "steerlens.fitting.iti(model, tokenizer, examples).save(FILE)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("direction", ("mass_mean", "probe"))

    @property
    def along(self) -> str:
        """What the file calls the directions."""
        return "probe" if self.direction == "probe" else "mean"
