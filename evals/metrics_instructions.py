"""Instructions whose following can be verified, by lm-eval's registry of IFEval's."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from steerlens.evals.doc import Doc, Output
from steerlens.evals.metrics import MetricError, degenerate, field, library, metric

from steerlens.errors import nearest

SENTENCES = frozenset(("length_constraints:number_sentences", "change_case:capital_word_frequency"))
"""What needs nltk's sentence model, the only data that a download has to fetch."""


def _ready(name: str) -> Callable[..., None]:
    def ready(**_: Any) -> None:
        _registry(name)
        _sentences(name)

    return ready


@metric("ifeval_strict", ready=_ready("ifeval_strict"))
def ifeval_strict(doc: Doc, output: Output) -> float:
    """1 if the text follows all instructions: IFEval's strict accuracy per prompt.

    The document's data hold IFEval's columns `prompt`, `instruction_id_list` and `kwargs`.
    """
    return all(_followed(doc, output.text, False, "ifeval_strict"))


@metric("ifeval_loose", ready=_ready("ifeval_loose"))
def ifeval_loose(doc: Doc, output: Output) -> float:
    """As `ifeval_strict`, where each instruction may be followed by the text without its first or last line or `*`."""
    return all(_followed(doc, output.text, True, "ifeval_loose"))


@metric("ifeval_strict_share", ready=_ready("ifeval_strict_share"))
def ifeval_strict_share(doc: Doc, output: Output) -> float:
    """Share of the document's instructions that the text follows.

    The mean is over documents; IFEval's accuracy per instruction is over all instructions.
    """
    return _share(_followed(doc, output.text, False, "ifeval_strict_share"))


@metric("ifeval_loose_share", ready=_ready("ifeval_loose_share"))
def ifeval_loose_share(doc: Doc, output: Output) -> float:
    """As `ifeval_strict_share`, loosely as in `ifeval_loose`."""
    return _share(_followed(doc, output.text, True, "ifeval_loose_share"))


@metric("constraints", guarded=False, ready=lambda **_: _registry("constraints") and None)
def constraints(doc: Doc, output: Output, *, field: str = "constraints", loose: bool = False) -> float:
    """Share of a chat's turns whose text obeys all constraints of the system message.

    Args:
        doc: the document.
        output: its texts, one per turn.
        field: which holds the constraints, a list of {"id": IFEval's name of an instruction, "kwargs": {…}}.
        loose: as in `ifeval_loose`.
    """
    return _share(_obeyed(doc, output, field, loose, "constraints"))


@metric("constraints_first", guarded=False, ready=lambda **_: _registry("constraints_first") and None)
def constraints_first(doc: Doc, output: Output, *, field: str = "constraints", loose: bool = False) -> float:
    """1 if the first turn's text obeys all constraints; arguments as in `constraints`."""
    return _obeyed(doc, output, field, loose, "constraints_first")[0]


@metric("constraints_last", guarded=False, ready=lambda **_: _registry("constraints_last") and None)
def constraints_last(doc: Doc, output: Output, *, field: str = "constraints", loose: bool = False) -> float:
    """1 if the last turn's text obeys all constraints; arguments as in `constraints`."""
    return _obeyed(doc, output, field, loose, "constraints_last")[-1]


@metric("drift", guarded=False, ready=lambda **_: _registry("drift") and None)
def drift(doc: Doc, output: Output, *, field: str = "constraints", loose: bool = False) -> float:
    """`constraints_last` minus `constraints_first`: -1 where the system message was obeyed and then forgotten.

    To be read beside `constraints_first`: what was never obeyed cannot drift. Arguments as in `constraints`.
    """
    obeyed = _obeyed(doc, output, field, loose, "drift")
    return float(obeyed[-1]) - float(obeyed[0])


def _share(followed: Sequence[bool]) -> float:
    return sum(followed) / len(followed) if followed else 0.0


def _obeyed(doc: Doc, output: Output, name: str, loose: bool, metric: str) -> list[bool]:
    wanted = field(doc, name, metric)
    valid = isinstance(wanted, list) and wanted
    if not valid or not all(isinstance(one, Mapping) and isinstance(one.get("id"), str) for one in wanted):
        raise MetricError(
            f"metric {metric!r}: field {name!r} is {wanted!r:.80}; it must be a list of "
            "{'id': an instruction of IFEval, 'kwargs': {…}}, not empty"
        )
    ids, kwargs = [one["id"] for one in wanted], [one.get("kwargs") or {} for one in wanted]
    texts = output.texts or ("",)
    return [not degenerate(text) and all(_verdicts(ids, kwargs, "", text, loose, metric)) for text in texts]


def _followed(doc: Doc, text: str, loose: bool, metric: str) -> list[bool]:
    ids = list(field(doc, "instruction_id_list", metric))
    kwargs = list(field(doc, "kwargs", metric))
    if not ids or len(ids) != len(kwargs):
        raise MetricError(f"metric {metric!r}: {len(ids)} instructions with {len(kwargs)} kwargs; it must be as many")
    return _verdicts(ids, kwargs, str(field(doc, "prompt", metric)), text, loose, metric)


def _verdicts(
    ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], prompt: str, text: str, loose: bool, metric: str
) -> list[bool]:
    known = _registry(metric).INSTRUCTION_DICT
    for name in ids:
        if name not in known:
            raise MetricError(
                f"metric {metric!r}: unknown instruction {name!r}; known: {', '.join(known)}{nearest(name, known)}"
            )
        if name in SENTENCES:
            _sentences(metric)
    judge = library("lm_eval.tasks.ifeval.utils", metric)
    asked = judge.InputExample(0, list(ids), prompt, [dict(one) for one in kwargs])
    test = judge.test_instruction_following_loose if loose else judge.test_instruction_following_strict
    try:
        return list(test(asked, text).follow_instruction_list)
    except (KeyError, TypeError, ValueError) as error:
        given = f"{', '.join(ids)} with {list(kwargs)!r:.200}"
        raise MetricError(f"metric {metric!r}: {given}: {type(error).__name__}: {error}") from error


def _registry(metric: str) -> ModuleType:
    # On import lm-eval tries to fetch nltk's sentence model where it is not there, and prints that it failed and then
    # that it succeeded; `_sentences` says what is so.
    with contextlib.redirect_stdout(io.StringIO()):
        found = library("lm_eval.tasks.ifeval.instructions_registry", metric)
        library("langdetect", metric).DetectorFactory.seed = 0  # it draws samples of a text
    return found


def _sentences(metric: str) -> None:
    try:
        library("nltk", metric).data.find("tokenizers/punkt_tab")
    except LookupError:
        raise MetricError(
            f"metric {metric!r} needs nltk's sentence model for {' and '.join(sorted(SENTENCES))}; fetch it once, with "
            f"network: python -m nltk.downloader punkt_tab"
        ) from None
