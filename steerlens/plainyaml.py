"""The part of YAML that recipes and `--set` use: mappings, lists, text, numbers, true/false and null.

YAML 1.1 reads `1e-2` as text, `3:17` as the number 197 and `no` as false; here they are 0.01, text and text.
Repeated keys, anchors, aliases and tags are refused, so no input can name code or grow when it is read.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
Lines = dict[tuple[str | int, ...], int]

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z")
_TAG = "tag:yaml.org,2002:"


class PlainYamlError(ValueError):
    """Text that is not the plain YAML described above; the message starts with the line where known."""


class _Loader(yaml.SafeLoader):
    # every untagged scalar stays text until `_scalar`
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _error(event, "anchors and aliases (& and *) are not read; write the value out, or quote the text")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what this reader or a YAML 1.1 reader would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # line separators such as U+0085 survive only as escapes
    return dumper.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def read(text: str | bytes) -> tuple[Any, Lines]:
    """The value of a YAML text and the line of each place in it.

    Args:
        text: at most `MAX_BYTES` long; bytes are UTF-8.

    Returns:
        Plain Python data, and `{path: line}` with paths such as `("methods", 0, "alpha")` and lines from 1.

    Raises:
        PlainYamlError: if it cannot be read.
    """
    if len(text) > MAX_BYTES:
        raise PlainYamlError(f"larger than {MAX_BYTES // 1024} KiB, which no recipe needs")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PlainYamlError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    lines: Lines = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return (None if node is None else _build(node, (), lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.context, error.problem)))
        raise PlainYamlError(f"line {mark.line + 1}: {what}" if mark else what) from None
    except yaml.YAMLError as error:
        raise PlainYamlError(" ".join(str(error).split())) from None
    except RecursionError:
        raise PlainYamlError("nested too deeply") from None
    except (ValueError, OverflowError) as error:  # PyYAML converts escapes such as "\\UFFFFFFFF" unchecked
        raise PlainYamlError(str(error)) from None


def scalar(text: str) -> Any:
    """A command-line value: `{…}`, `[…]` and quoted text as YAML, else a number, true/false, null or text."""
    stripped = text.strip()
    if stripped[:1] in ("{", "[", '"', "'"):
        return read(stripped)[0]
    return plain(stripped)


def plain(text: str) -> Any:
    """What an unquoted YAML scalar means."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return _int(text)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.lower().replace(".", ""))
    return text


def dump(data: Any) -> str:
    """YAML text that `read` reads back to the same data; lists of scalars stay on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def _int(text: str) -> int:
    if len(text) > 1000:
        raise PlainYamlError(f"a number with {len(text)} digits is not read")
    return int(text)


def _build(node: yaml.Node, path: tuple[str | int, ...], lines: Lines) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_build(item, (*path, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        built: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error(key_node, "a list or mapping cannot be a key")
            key = _scalar(key_node)
            if key in built:
                raise _error(key_node, f"the key {key!r:.80} appears twice")
            built[key] = _build(value_node, (*path, key), lines)
        return built
    raise _error(
        node, f"the tag {node.tag!r:.80} is not read; allowed: mappings, lists, text, numbers, true/false, null"
    )


def _scalar(node: yaml.ScalarNode) -> Any:
    if node.tag != f"{_TAG}str":
        raise _error(node, f"the tag {node.tag!r:.80} is not read; write the value without a tag")
    if node.style is not None:
        return node.value
    try:
        return plain(node.value)
    except PlainYamlError as error:
        raise _error(node, str(error)) from None


def _error(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
