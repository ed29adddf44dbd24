"""Training-free attention steering for Hugging Face LLMs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# kernels/, evals/ and recipes/ lie beside this package in a checkout, inside it in a wheel.
_repo = _Path(__file__).resolve().parents[1]
if (_repo / "pyproject.toml").is_file() and (_repo / "kernels").is_dir():
    __path__.append(str(_repo))

if TYPE_CHECKING:
    from steerlens.attach import Steering, steer
    from steerlens.encoding import encode
    from steerlens.keysentence import key_sentences
    from steerlens.methods.base import PerRow
    from steerlens.recipe import Recipe, load_recipe
    from steerlens.recording import Record, capture
    from steerlens.spans import Spans

__version__ = "0.1.0"
_HOMES = {
    "PerRow": "methods.base",
    "Recipe": "recipe",
    "Record": "recording",
    "Spans": "spans",
    "Steering": "attach",
    "capture": "recording",
    "encode": "encoding",
    "key_sentences": "keysentence",
    "load_recipe": "recipe",
    "steer": "attach",
}
__all__ = [
    "PerRow",
    "Recipe",
    "Record",
    "Spans",
    "Steering",
    "capture",
    "encode",
    "key_sentences",
    "load_recipe",
    "steer",
]


def __getattr__(name: str) -> Any:
    # torch and transformers load only with the first name that needs them, so that the command line starts fast.
    if name not in _HOMES:
        raise AttributeError(f"module 'steerlens' has no attribute {name!r}")
    value = getattr(import_module(f"steerlens.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
