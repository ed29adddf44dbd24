"""Templates of task files: Jinja in a sandbox, where an unknown name is an error."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steerlens.errors import nearest


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and all(isinstance(side, int | float) for side in (left, right)):
            return left * right
        raise SecurityError(f"{operator} is allowed in templates only to multiply numbers")


@pass_eval_context
def _printed(context: EvalContext, value: Any) -> Any:
    if value is None or isinstance(value, list | tuple | dict):
        told = "nothing (null)" if value is None else f"{value!r:.80}, which is no text; pick a part, or write | tojson"
        raise TemplateRuntimeError(f"it puts in {told}")
    return value


# Jinja computes constants while it compiles, unless they are printed by what needs a context: no template may take
# forever to load.
_ENVIRONMENT = _Environment(undefined=StrictUndefined, keep_trailing_newline=True, optimized=False, finalize=_printed)


@functools.lru_cache(maxsize=4096)
def compiled(text: str) -> Template:
    """The template of a text.

    Raises:
        ValueError: with the line in the template.
    """
    try:
        return _ENVIRONMENT.from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"{text!r:.80} is no template: {error.message} (its line {error.lineno})") from None
    except Exception as error:  # what Python's compiler says of what Jinja let through
        raise ValueError(f"{text!r:.80} is no template: {type(error).__name__}: {error}") from None


def render(text: str, values: Mapping[str, Any]) -> str:
    """A template with its values put in.

    Raises:
        ValueError: for an unknown name, with those there are, or for what the template does with a value.
    """
    try:
        return compiled(text).render(values)
    except TemplateError as error:
        unknown = sorted(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) - values.keys())
        hint = nearest(unknown[0], values) if unknown else ""
        raise ValueError(f"template {text!r:.80}: {error}; there are {', '.join(values)}{hint}") from None
    except Exception as error:  # a filter or an operator that does not take the value
        raise ValueError(f"template {text!r:.80}: {type(error).__name__}: {error}") from None


def listed(text: str) -> list[str]:
    """The texts of a rendered template that gives a JSON list, or its text alone."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        if isinstance(found, list) and all(isinstance(one, str | int | float) for one in found):
            return [str(one) for one in found]
    return [text]
