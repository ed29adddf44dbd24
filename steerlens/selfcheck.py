"""The self-check of families that no test covers: an identity edit, forced through the routed path, changes nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steerlens import caches
from steerlens.edits import FirstToken, Plan, Reweight, Scale
from steerlens.errors import NotReachedError, UnsupportedError
from steerlens.facts import TESTED, ModelFacts, refuse
from steerlens.methods.base import EditMethod

if TYPE_CHECKING:
    from steerlens.engine import Engine, Site

COLUMNS, PADS = 24, 5
_passed: set[tuple[Any, ...]] = set()


class Identity(EditMethod):
    """Scales the first token's weight by one, in every head."""

    name: ClassVar[str] = "identity"

    def plan(self, facts: ModelFacts, spans: Any) -> Plan:
        """One edit per layer that changes nothing."""
        return {n: (Reweight(tuple(range(facts.heads[n])), FirstToken(), Scale(0.0)),) for n in facts.attention_layers}


class Witness:
    """Compares every attention call with the native one, and hands the native one on.

    Attributes:
        worst: largest difference over the largest native value, per layer, over real rows; NaN if any is.
    """

    def __init__(self) -> None:
        self.worst: dict[int, float] = {}

    def __call__(self, site: Site, ours: torch.Tensor, native: torch.Tensor, real: torch.Tensor | None) -> None:
        """`ours` and `native` [B, Tq, H, Dv]; `real` rows, bool [B, Tq], or `None` for all."""
        ours, native = ours.float(), native.float()
        if real is not None:
            ours, native = ours[real], native[real]
        scale = native.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        apart = ((ours - native).abs().max() / scale).item()
        if math.isnan(apart) or apart > self.worst.setdefault(site.layer, 0.0):
            self.worst[site.layer] = apart


def verify(engine: Engine) -> None:
    """Check a family that is not in `TESTED` once per class, config, attention and dtype.

    A left-padded probe of two rows and one cached step run twice, natively and routed: each attention call must equal
    the native one to 1e-5 of its largest value (16 bit: 8 units in the last place), every attention layer must be
    called, and the decoder's output must stay as it was.

    Raises:
        UnsupportedError: naming what differs.
    """
    base, facts = engine.base, engine.facts
    if facts.family in TESTED:
        return
    parameter = next(base.parameters())
    config: Any = base.config
    key = (type(base), str(config.to_dict()), config._attn_implementation, parameter.dtype, parameter.device.type)
    if key in _passed:
        return
    training = [module for module in base.modules() if module.training]
    try:
        base.eval()
        _probe(base, facts, parameter)
    finally:
        for module in training:
            module.training = True
    _passed.add(key)


@torch.no_grad()
def _probe(base: Any, facts: ModelFacts, parameter: torch.Tensor) -> None:
    from steerlens.attach import steer
    from steerlens.engine import Engine

    what, device = f"model family {facts.family!r}", _device(base)
    try:
        expected = _forwards(base, device)
    except Exception as error:
        why = f"does not run the self-check's probe unsteered ({type(error).__name__}: {error})"
        raise refuse(what, why) from error
    engine = base.__dict__["_steerlens_engine"] = Engine(base)
    witness = engine.witness = Witness()
    try:
        with steer(base, Identity()):
            found = _forwards(base, device)
    except NotReachedError as error:
        raise refuse(what, f"fails the self-check: {error}") from error
    except Exception as error:
        kind = "" if isinstance(error, UnsupportedError) else f"{type(error).__name__}: "
        raise refuse(what, f"fails the self-check ({kind}{error})") from error
    finally:
        base.__dict__.pop("_steerlens_engine", None)
    eps = torch.finfo(parameter.dtype).eps
    bound = 1e-5 if eps < 1e-6 else 8 * eps
    wrong = {layer: worst for layer, worst in witness.worst.items() if not worst <= bound}
    moved = [_apart(one, other) for one, other in zip(found, expected, strict=True)]
    if wrong or not all(one <= bound for one in moved):
        seen = (
            ", ".join(f"layer {layer}: {worst:.1e}" for layer, worst in wrong.items())
            or f"its output: {max(moved):.1e}"
        )
        why = f"fails the self-check: an edit that changes nothing moves {seen} of the largest value (<= {bound:.0e})"
        raise refuse(what, why)


def _device(base: torch.nn.Module) -> torch.device:
    """Where the model takes its inputs: offloaded weights are on `meta` until accelerate's hooks fetch them."""
    for module in base.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if (device := getattr(part, "execution_device", None)) is not None:
                return torch.device(device)
    return next(base.parameters()).device


def _forwards(base: Any, device: torch.device) -> list[torch.Tensor]:
    """Hidden states (or logits) of the real tokens of a padded prefill and of one cached step."""
    text = base.config.get_text_config(decoder=True)
    vocabulary, columns = text.vocab_size, min(COLUMNS, (getattr(text, "max_position_embeddings", None) or 2048) - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, columns + 1), generator=generator)
    mask = torch.ones(2, columns + 1, dtype=torch.long)
    mask[1, :PADS] = 0
    ids, mask = ids.to(device), mask.to(device)
    first = base(input_ids=ids[:, :columns], attention_mask=mask[:, :columns], use_cache=True)
    cache, prefill = caches.find(first), first[0].clone()
    prefill[1, :PADS] = 0
    if cache is None:
        return [prefill]
    step = base(input_ids=ids[:, columns:], attention_mask=mask, **{caches.NAME: cache}, use_cache=True)
    return [prefill, step[0]]


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()
