"""Prompts and what to emphasise in them, as left-padded inputs and token spans."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import BatchEncoding

from steerlens import selectors as sel
from steerlens.errors import SpanError
from steerlens.selectors import Chars, Occurrence, Regex, Role, Selector, Substring, Tokens
from steerlens.spans import Range, Spans, digests

__all__ = ["Chars", "Regex", "Role", "Selector", "Substring", "Tokens", "encode"]

Chat = Sequence[Mapping[str, Any]]
Selectors = Selector | Sequence[Selector] | Sequence[Sequence[Selector]]

logger = logging.getLogger("steerlens")


def encode(
    tokenizer: Any,
    prompts: str | Chat | Sequence[str | Chat],
    emphasize: Selectors | None = None,
    *,
    groups: Mapping[str, Selectors] | None = None,
    chat: bool = False,
    system: str | None = None,
    tags: str | Mapping[str, str] | None = None,
    on_missing: Literal["error", "ignore", "warn"] = "error",
    occurrence: Occurrence = "all",
    add_special_tokens: bool = True,
    device: torch.device | str | None = None,
) -> tuple[BatchEncoding, Spans]:
    r"""Prompts as left-padded inputs, and the token ranges of what to act on.

        inputs, spans = steerlens.encode(tokenizer, "List three towns in JSON.", emphasize=["in JSON"])
        inputs, spans = steerlens.encode(tokenizer, [chat, text], [[Role("system")], [re.compile(r"\d+")]])

    Selectors are a `str` (a substring), a `re.Pattern`, or `Substring`, `Regex`, `Role`, `Chars`, `Tokens`.
    They are looked up in the final text: tags removed, chat template rendered. In a chat, texts and
    expressions are looked up inside the messages' contents only, so "user" never selects the template's own
    words; `Chars` and `Tokens` reach everything. A range takes the tokens from the first to the last one that
    shares a character with it, with a leading space that is part of such a token; tokens without characters
    (BOS, pads) belong to no range.

    A text that begins with the BOS token gets no special tokens added. A chat whose template writes no BOS
    gets one in front if the tokenizer puts one before plain text, and nothing (such as an EOS) behind it.

    Args:
        tokenizer: a transformers tokenizer, a fast one if anything is to be selected. It is not changed.
        prompts: a text, a chat (a list of `{"role", "content"}`, always rendered, with the generation
            prompt), or a list of these, one per row.
        emphasize: selectors of the group "emphasis": one or a list for every row, or a list of lists, one per
            row.
        groups: `{group: selectors}`, the same for other groups ("documents", "query", …).
        chat: render plain texts as one user message.
        system: a system message put before a text (with `chat`) or before a chat that has none.
        tags: `{group: tag}`, or a tag for "emphasis": `<tag>…</tag>` in the prompts is removed and what it
            enclosed is selected; a row without one is a missing span.
        on_missing: what to do with a selector that finds nothing, or nothing that a token carries: "error",
            "ignore" (the row gets no section for it) or "warn" (the same, logged).
        occurrence: of texts and expressions that name none: "all", "first", "last", "only" (several are an
            error), or an index from 0, negative from the end.
        add_special_tokens: False adds none, neither to texts nor to chats.
        device: where the tensors go.

    Returns:
        `input_ids` and `attention_mask`, [B, T] int64, left-padded (with the EOS, else 0, if there is no pad
        token), and the spans: half-open in padded columns, in the order of the selectors, equal ranges once.

    Raises:
        SpanError: missing or ambiguous spans, unbalanced tags, no chat template, no tokens, a slow tokenizer.
    """
    if on_missing not in ("error", "ignore", "warn"):
        raise SpanError(f'on_missing={on_missing!r}; allowed: "error", "ignore", "warn"')
    rows = _rows(prompts)
    tags = {"emphasis": tags} if isinstance(tags, str) else dict(tags or {})
    for tag in tags.values():
        if not isinstance(tag, str) or not tag or set(tag) & set("<>/"):
            raise SpanError(f"tags: {tag!r} is not a tag's name; give it without brackets, as in tags='em'")
    wanted = _wanted(emphasize, groups or {}, tags, len(rows))
    if wanted and not getattr(tokenizer, "is_fast", False):
        raise SpanError(
            f"{type(tokenizer).__name__} is a slow tokenizer: it does not say which characters tokens carry; "
            "load a fast one (AutoTokenizer, with a tokenizer.json), or give steer(spans=…) token ranges"
        )
    texts, ids, offsets = [], [], []
    for row, prompt in enumerate(rows):
        try:
            text = _text(tokenizer, prompt, chat, system, sorted(set(tags.values())))
        except (SpanError, TemplateError) as error:
            raise SpanError(f"row {row}: {error}") from error
        row_ids, row_offsets = _tokenize(tokenizer, text, add_special_tokens, bool(wanted))
        if not row_ids:
            raise SpanError(f"row {row}: the prompt {text.text!r} has no tokens; give some text")
        texts.append(text)
        ids.append(row_ids)
        offsets.append(row_offsets)

    width = max(map(len, ids))
    found: dict[str, list[tuple[Range, ...]]] = {group: [] for group in wanted}
    for group, per_row in wanted.items():
        for row, mine in enumerate(per_row):
            ranges: list[Range] = []
            for selector in mine:
                try:
                    ranges += sel.resolve(selector, texts[row], offsets[row], occurrence)
                except sel.Missing as error:
                    if on_missing == "error":
                        fix = "or different selectors per row, a list for each, " if len(rows) > 1 else ""
                        fix = f'give text that is there, {fix}or on_missing="ignore"'
                        raise SpanError(f"row {row}, group {group!r}: {error}; {fix}") from error
                    if on_missing == "warn":
                        logger.warning("row %d, group %r: %s; the row goes without it", row, group, error)
                except SpanError as error:
                    raise SpanError(f"row {row}, group {group!r}: {error}") from error
            pads = width - len(ids[row])
            found[group].append(tuple((start + pads, stop + pads) for start, stop in dict.fromkeys(ranges)))

    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    spans = Spans({g: tuple(r) for g, r in found.items()}, fingerprint=digests(input_ids, attention_mask))
    inputs = BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask})
    return inputs if device is None else inputs.to(device), spans


def _rows(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple) or not prompts:
        raise SpanError(f"prompts={prompts!r}; give a text, a chat (a list of messages), or a list of these")
    return [prompts] if isinstance(prompts[0], Mapping) else list(prompts)


def _wanted(
    emphasize: Any, groups: Mapping[str, Any], tags: Mapping[str, str], rows: int
) -> dict[str, list[list[Any]]]:
    """The selectors per group and row."""
    wanted: dict[str, list[list[Any]]] = {}
    asked = [("emphasis", emphasize)] if emphasize is not None else []
    for group, value in [*asked, *groups.items(), *((group, sel.Tag(tag)) for group, tag in tags.items())]:
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not any(isinstance(v, list | tuple) for v in values):
            values = [values] * rows
        elif len(values) != rows or not all(isinstance(v, list | tuple) for v in values):
            raise SpanError(
                f"group {group!r}: {value!r} is not one list of selectors per prompt row ({rows} rows); give "
                "one list for all rows, a list for each row ([] for none), or Tokens(start, stop)"
            )
        so_far = wanted.setdefault(group, [[] for _ in range(rows)])
        for mine, more in zip(so_far, values, strict=True):
            mine.extend(more)
    return wanted


def _text(tokenizer: Any, prompt: Any, chat: bool, system: str | None, tags: Sequence[str]) -> sel.Text:
    """The final text of a row: tags removed, chats rendered."""
    if isinstance(prompt, str) and not chat:
        if system is not None:
            raise SpanError("system= needs a chat: give messages, or chat=True")
        clean, ranges = sel.strip_tags(prompt, tags)
        return sel.Text(clean, [("", 0, len(clean))], ranges)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = [dict(m) for m in prompt if isinstance(m, Mapping)] if isinstance(prompt, list | tuple) else []
    if not messages or len(messages) < len(prompt) or not all("role" in message for message in messages):
        raise SpanError(f'{prompt!r} is neither a text nor a chat (a list of {{"role": …, "content": …}})')
    if system is not None:
        if messages[0]["role"] == "system":
            raise SpanError("system= is given, but the chat has a system message: leave one out")
        messages.insert(0, {"role": "system", "content": system})
    if not getattr(tokenizer, "chat_template", None):
        raise SpanError(
            f"this {type(tokenizer).__name__} has no chat template: take the tokenizer of an instruct model, "
            "set tokenizer.chat_template, or give plain text with chat=False"
        )
    tagged_in = []
    for message in messages:
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            kind = type(content).__name__
            raise SpanError(f"a message's content is a {kind}, it must be text: join its text parts")
        clean, inside = sel.strip_tags(content or "", tags)
        tagged_in.append(inside)
        message.update({"content": clean} if content else {})
    text = _render(tokenizer, messages)
    contents: list[tuple[str, int, int]] = []
    tagged: dict[str, list[Range]] = {tag: [] for tag in tags}
    for i, message in enumerate(messages):
        for start, stop in _places(tokenizer, messages, i, text):
            contents.append((str(message["role"]), start, stop))
            for tag, found in tagged_in[i].items():
                shift = start - _cut(message["content"], text[start:stop]) if found else 0
                clipped = [(max(start, a + shift), min(stop, b + shift)) for a, b in found]
                tagged[tag] += [(a, b) for a, b in clipped if a < b]
    contents.sort(key=lambda content: content[1])
    return sel.Text(text, contents, {tag: sorted(ranges) for tag, ranges in tagged.items()}, chat=True)


def _places(tokenizer: Any, messages: list[dict[str, Any]], index: int, text: str) -> list[Range]:
    """Where one message's content lies in the rendered text, in characters; templates trim, move or drop it.

    The chat is rendered again with a mark in place of the content: what is around the mark is around it.
    """
    content, mark = messages[index].get("content"), "steerlensmark"
    if not content:
        return []
    while mark in text:
        mark += "k"
    try:
        marked = [*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]]
        pieces = _render(tokenizer, marked).split(mark)
        if len(pieces) == 1:
            return []
        length, rest = divmod(len(text) - sum(map(len, pieces)), len(pieces) - 1)
        starts = [sum(map(len, pieces[:i])) + (i - 1) * length for i in range(1, len(pieces))]
        if rest == 0 <= length and text[starts[0] : starts[0] + length].join(pieces) == text:
            return [(start, start + length) for start in starts if length]
    except TemplateError:
        pass
    # The template looks into contents, so the mark changed more than its place: only a unique one is sure.
    content = content.strip()
    start = text.find(content)
    return [(start, start + len(content))] if content and text.count(content) == 1 else []


def _cut(content: str, rendered: str) -> int:
    """How many characters of a content the template cut off in front."""
    if rendered == content.strip():
        return len(content) - len(content.lstrip())
    if content.count(rendered) != 1:
        raise SpanError(f"the chat template rewrites {content[:60]!r}, so its tags are lost: use a selector")
    return content.index(rendered)


def _render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _tokenize(tokenizer: Any, text: sel.Text, special: bool, offsets: bool) -> tuple[list[int], list[Range]]:
    """Token ids of one row and the characters of each (none without `offsets`)."""

    def call(string: str, special: bool) -> Any:
        plain = {"padding": False, "truncation": False, "return_offsets_mapping": offsets}
        return tokenizer(string, add_special_tokens=special, **plain)

    bos = tokenizer.bos_token
    special = special and not (bos and text.text.lstrip().startswith(bos))
    encoded = call(text.text, special and not text.chat)
    ids = list(encoded["input_ids"])
    characters = [(a, b) for a, b in encoded["offset_mapping"]] if offsets else []
    if special and text.chat and bos and call("a", True)["input_ids"][:1] == [tokenizer.bos_token_id]:
        ids, characters = [tokenizer.bos_token_id, *ids], [(0, 0), *characters]
    return ids, characters
