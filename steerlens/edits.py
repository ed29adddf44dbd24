"""The closed vocabulary of edits. Methods compose them, backends carry them out; neither knows the other.

An edit says *which query heads*, *which keys*, *which query rows* and *which law*. Keys are symbolic here
and become key columns of a concrete forward in `steerlens.passes`.

Rows: with P prompt tokens, the prompt rows are 0..P-1, and the decode rows, those that produce generated tokens,
are P-1 (the last real prompt row) and every later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from steerlens.vectors import HeadVectors

HIDE = -1000.0
"""Nats that leave nothing of a key beside any other; a row whose every visible key is hidden stays as it is."""

Phase = Literal["all", "prefill", "decode", "prompt"]
"""`all` rows; `decode` rows; `prefill`: those before the decode rows; `prompt`: every prompt row."""


@dataclass(frozen=True)
class FirstToken:
    """The first real (non-pad) token of each row."""


@dataclass(frozen=True)
class PromptKeys:
    """Every prompt token, in rows that have at least `sections` sections of `group` (0: in every row)."""

    group: str = "emphasis"
    sections: int = 0


@dataclass(frozen=True)
class SpanKeys:
    """The tokens of a span group, or of its `section`-th range alone."""

    group: str
    section: int | None = None


@dataclass(frozen=True)
class OutsideSpan:
    """Prompt tokens outside `SpanKeys(group, section)`; no key at all in a row without such a section.

    As the `queries` of an edit, generated tokens too.
    """

    group: str
    section: int | None = None


@dataclass(frozen=True)
class UntilSpan:
    """Prompt tokens from the first to the end of the last range of a span group; none in a row without a range."""

    group: str


@dataclass(frozen=True)
class Sinks:
    """Keys whose column mean over the prompt rows that see them exceeds a threshold; found per row and head.

    Attributes:
        threshold: attention probability, or with `relative` a multiple of 1/N, N real prompt keys.
        spare: leave out the `first_token`, or the `first_sink` found (as the published ACT code does).
        running: renew the column means with every decode row instead of freezing the set after the prompt.
    """

    threshold: float
    relative: bool = False
    spare: Literal["first_token", "first_sink"] = "first_token"
    running: bool = False


@dataclass(frozen=True)
class Outliers:
    """Prompt tokens, or those of a span group, with max_c |x_c| / rms(x) > `threshold` where the layer reads them.

    x is a token's hidden state at the input of the decoder layer, before its norm, and rms(x)² = mean(x²) + 1e-6.

    Attributes:
        channels: the c of the hidden state.
    """

    channels: tuple[int, ...]
    threshold: float
    group: str | None = None


Keys = FirstToken | PromptKeys | SpanKeys | OutsideSpan | UntilSpan | Sinks | Outliers


@dataclass(frozen=True)
class Scale:
    """ψ' = wψ / (1 + (w-1)ψ): weights times w, renormalised; equal to adding `log_weight` = log w to the logits."""

    log_weight: float


@dataclass(frozen=True)
class Keep:
    """ψ' = βψ: keep the `fraction` β of the mass; the rest goes to the other keys in proportion to their weights."""

    fraction: float


Law = Scale | Keep


@dataclass(frozen=True)
class Reweight:
    """Move attention mass onto or off `keys` by `law`.

    Attributes:
        heads: query heads of the layer.
        batch: prompt rows it applies to; `None` for all.
        queries: only the query rows that are these prompt tokens; `None` for all rows of the phase.
    """

    heads: tuple[int, ...]
    keys: Keys
    law: Law
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None
    queries: Keys | None = None


class MassLaw:
    """What the weights of a few groups of keys are multiplied by, given the attention mass that each of them holds.

    A law is a frozen dataclass, equal to laws that do the same.

    Class attributes:
        raw: weights times factors, not renormalised: a row sums to 1 + Σ(m_g - 1)·ψ_g. Edits that follow see the
            renormalised weights, and the sum stays as a factor on the output.
        pooled: what a head and row gets depends on the masses of others, so all heads must be in one process and the
            prompt in one forward.
    """

    raw: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def log_weights(self, mass: Tensor, row: Tensor, real: Tensor) -> Tensor:
        """Nats that the logits of each group are raised by, fp32 [B, h, Tq, G]; 0 leaves a group alone.

        What it gives for a group that holds no mass in a row is not used.

        Args:
            mass: of G disjoint groups, fp32 [B, h, Tq, G]; 0 where a row sees none of it.
            row: prompt row of each batch row, int64 [B].
            real: query rows that are tokens, bool [B, Tq].
        """
        raise NotImplementedError

    def floor(self) -> tuple[str, float] | None:
        """Kind and τ of a law that raises the mass ψ of one group where it is below τ; `None` for any other law.

        `reach`: to τ; `spotlight`: to τ/(1+τ-ψ); τ in [0, 1). The kernels have these in one pass.
        """
        return None

    def select(self, places: tuple[int, ...]) -> MassLaw:
        """The law for these of the edit's heads alone, by their place among them."""
        return self


@dataclass(frozen=True)
class Redistribute:
    """Move mass by what groups of keys hold, row by row and head by head.

    Attributes:
        heads: query heads of the layer.
        groups: keys of each group, `Outliers` among them; a key of two groups belongs to the first.
        law: from the groups' masses to factors on their weights.
        batch: prompt rows it applies to; `None` for all.
        queries: only the query rows that are these prompt tokens; `None` for all rows of the phase.
    """

    heads: tuple[int, ...]
    groups: tuple[Keys, ...]
    law: MassLaw
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None
    queries: Keys | None = None


@dataclass(frozen=True)
class Ablate:
    """Replace a head's output by the mean of V over the visible keys (`uniform`) or by zeros (`zero`)."""

    heads: tuple[int, ...]
    mode: Literal["uniform", "zero"]
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


Edit = Reweight | Redistribute | Ablate


@dataclass(frozen=True)
class ShiftQuery:
    """q' = q + `scale`·vector in each of `heads`, after the position encoding; all that follows sees q'."""

    heads: tuple[int, ...]
    vectors: HeadVectors
    scale: float
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AddOutput:
    """o' = o + `scale`·vector in each of `heads`, where the output projection reads it: after every other edit."""

    heads: tuple[int, ...]
    vectors: HeadVectors
    scale: float
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LiftLogits:
    """x' = x + `fraction`·|x| for the scaled and capped logits x of `keys`, before every other edit."""

    heads: tuple[int, ...]
    keys: SpanKeys
    fraction: float
    phase: Phase = "decode"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DropLowest:
    """Of the `keys` that a row sees, the `fraction` with the lowest logits, rounded down, get no weight.

    Each head and row by itself, after lifts and before every other edit; of equal logits the earlier key goes first.
    """

    heads: tuple[int, ...]
    keys: SpanKeys
    fraction: float
    phase: Phase = "decode"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KeepTop:
    """Of some groups of keys those with the highest scores stay, and the keys of the others get no weight.

    A group's score is the sum of its `top` largest weights, before every other edit of the layer. Of equal scores the
    earlier group stays.

    Attributes:
        heads: query heads of the layer.
        groups: disjoint.
        keep: how many groups stay.
        rows: prompt rows it applies to, beside all decode rows.
        pool: scores of each head and row (`none`), of a row over its heads (`heads`), or over heads and the prompt's
            `rows`, the same for all later rows (`rows`).
    """

    heads: tuple[int, ...]
    groups: tuple[SpanKeys, ...]
    keep: int
    rows: SpanKeys
    top: int = 5
    pool: Literal["none", "heads", "rows"] = "rows"
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ProjectKeys:
    """k' = k + `scale`·M k on `keys`, before any position encoding, once: what a cache holds stays as it is.

    Attributes:
        heads: key/value heads of the layer.
        vectors: M of every key/value head, [G, D, D].
    """

    heads: tuple[int, ...]
    keys: SpanKeys
    vectors: HeadVectors
    scale: float = 1.0
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RouteKeys:
    """k' = k + `scale`·Σ α_m U_m U_mᵀ k on `keys`, before any position encoding, once.

    α_m = Σ_k (q·u_mk)·σ_mk over the `leading` first directions, divided by the largest |α|; q is the last prompt row's
    query before its position encoding, the mean over the query heads of a key/value head.

    Attributes:
        heads: key/value heads of the layer.
        keys: what is edited.
        vectors: σ_mk·u_mk of every key/value head, [G, M·K, D], K directions of each of M experts, zeros where fewer.
        experts: M.
        leading: how many first directions of an expert decide.
    """

    heads: tuple[int, ...]
    keys: SpanKeys
    vectors: HeadVectors
    experts: int
    scale: float = 1.0
    leading: int = 3
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ScaleChannel:
    """x'_c = `factor`·x_c, c the `channel`, for what decode rows make queries of and all rows they see made keys of.

    Other rows attend unscaled queries to unscaled keys. The scaled keys are those that a cache holds; values stay.

    Attributes:
        channel: of the attention module's input.
        start: tokens before this position of their row are never scaled.
    """

    channel: int
    factor: float
    start: int = 0
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SetActivations:
    """x'_c = x_c + `strength`·(v_c - x_c) for tokens with a massive activation, x the hidden state after the layer.

    Such a token has m > `least` and m >= `ratio` times the median of |x|; m is the largest |x_c|, c in `channels`.

    Attributes:
        channels: the c of the hidden state.
        first: v_c for the first token of a row.
        others: v_c for every other one.
    """

    channels: tuple[int, ...]
    first: tuple[float, ...]
    others: tuple[float, ...]
    least: float
    ratio: float
    strength: float = 1.0
    phase: Phase = "all"
    batch: tuple[int, ...] | None = None


Around = (
    ShiftQuery | AddOutput | LiftLogits | DropLowest | KeepTop | ProjectKeys | RouteKeys | ScaleChannel | SetActivations
)
"""Edits of what goes into an attention call and comes out of it, or of its layer: no backend knows them."""
Plan = Mapping[int, tuple[Edit | Around, ...]]
"""`{layer: edits in order}`; a layer without edits is absent."""
