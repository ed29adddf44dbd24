"""A steered model for lm-evaluation-harness: `--model steerlens`.

What is prompt. A log-likelihood's context is the prompt and its continuation counts as generated, whatever the batch.
In `loglikelihood_rolling` a window's first token (the prefix token, later the last token of the window before) is the
prompt and all text behind it counts as generated; methods that act on or learn from a prompt are refused there.

Truncation. lm-eval cuts what is too long on the left. Methods on the first token then act on the first token that is
left. A span that lost a token is a sample error: nothing is scored in its place.

Tags. With `tags`, `<em>…</em>` in contexts, few-shot examples and chats included, is removed after the chat template
and what it enclosed is the span group; without, markup in data stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from steerlens.evals.doc import Steering
from steerlens.evals.harness_options import HarnessError, steering_of, tags_of
from steerlens.evals.harness_record import FailedScore, FailedSum, FailedText, recording
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import steerlens
from steerlens import backends, caches, decoder, models, selectors
from steerlens.edits import Reweight, Sinks
from steerlens.errors import MethodError, SpanError, nearest
from steerlens.methods.base import DecodingMethod, EditMethod, Method, PromptMethod
from steerlens.recipe import Recipe, load_recipe
from steerlens.spans import Range, Spans

FIRST = 8
"""So many documents of a task are looked at for tags before a run."""
_CACHE_KEY = "steerlens"
_HFLM_BACKENDS = ("default", "causal", "seq2seq")

Located = tuple[tuple[str, tuple[Range, ...]], ...]
"""Per span group its token ranges, hashable."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A text to score.

    Attributes:
        ids: its tokens, truncated on the left as lm-eval does.
        start: the first token that is scored.
        prompt: how many tokens are prompt.
        spans: per group its token ranges.
        request: what lm-eval caches it under.
    """

    ids: tuple[int, ...]
    start: int
    prompt: int
    spans: Located = ()
    request: tuple[str, str] | None = None


@register_model("steerlens")
class SteerlensLM(HFLM):
    """A Hugging Face model whose every forward and `generate` is steered.

    Without a method it is lm-eval's own `HFLM` and gives its numbers.

    Args:
        pretrained: an alias of `steerlens.models`, a Hub id, a path, or a loaded model.
        method: names of methods, joined by "+"; their parameters are further arguments, `gamma=1.5` or
            `zerotuning.gamma=1.5`.
        methods: methods with their parameters: a list of `{"method": name, …}`, the same as JSON text, or `Method`s.
        recipe: a file, a shipped name or a Hub repository; its methods come first.
        steering: all three at once, with a label.
        tags: `em:emphasis` (several joined by ";"), `{"emphasis": "em"}`, or True for that one.
        backend: of `steerlens.steer`, or of HFLM where it is one of HFLM's.
        arguments: of HFLM, of `from_pretrained`, and parameters of the methods.

    Raises:
        HarnessError, MethodError, HeadError, RecipeError, SpanError: before anything is run.
    """

    def __init__(
        self,
        pretrained: Any = None,
        method: str | None = None,
        methods: Any = None,
        recipe: str | Recipe | None = None,
        steering: Steering | None = None,
        tags: Any = None,
        backend: str = "auto",
        **arguments: Any,
    ) -> None:
        if pretrained is None:
            raise HarnessError("no model: give pretrained=, an alias such as tiny, a Hub id or a path")
        loaded = None if recipe is None else load_recipe(recipe)
        if steering is None:
            steering, arguments = steering_of(method, methods, loaded, arguments)
        elif method or methods or recipe:
            raise HarnessError("steering= is given, and so is method=, methods= or recipe=: give one of them")
        self.steering, self.methods = steering, list(steering.methods)
        self.tags = tags_of(tags)
        for needed, group in self._needs():
            if group not in self.tags:
                raise HarnessError(
                    f"{needed.name} needs spans for {group!r}, and no tag marks them: give tags=em:{group} and put "
                    "<em>…</em> into the task's templates"
                )
        if backend in _HFLM_BACKENDS:
            arguments["backend"], backend = backend, "auto"
        elif backend not in backends.NAMES:
            known = (*backends.NAMES, *_HFLM_BACKENDS)
            raise HarnessError(f"backend={backend!r}; allowed: {', '.join(known)}{nearest(backend, known)}")
        self.attention_backend = backends.check(backend)
        self._decoding = next((m for m in self.methods if isinstance(m, DecodingMethod)), None)
        if self._decoding is not None and str(arguments.get("batch_size", "")).startswith("auto"):
            raise HarnessError(
                f"batch_size=auto tries forwards, which {self._decoding.name} does not run alone: give a number"
            )
        placing = ("batch_size", "max_batch_size", "device")
        self._arguments = {key: str(value) for key, value in arguments.items() if key not in placing}
        self._batch: Spans | None = None
        self._lengths: tuple[int, ...] | None = None
        self._mask: torch.Tensor | None = None
        self._ends: dict[str, Located] = {}
        self.name = pretrained if isinstance(pretrained, str) else str(pretrained.config._name_or_path)
        if isinstance(pretrained, str):
            pretrained = models.resolve(pretrained)
        try:
            super().__init__(pretrained, **arguments)
        except TypeError as error:
            if (unknown := re.search(r"unexpected keyword argument '(.+?)'", str(error))) is None:
                raise
            parameters = [f.name for m in self.methods for f in dataclasses.fields(m)]
            owner = " + ".join(m.name for m in self.methods) or "a method, as none is given"
            hint = nearest(unknown[1], parameters)
            raise MethodError(
                f"{unknown[1]!r} is no argument of the model and no parameter of {owner}{hint}"
            ) from error
        if hasattr(self, "accelerator"):
            # lm-eval counts GPUs: processes on CPUs, or on nodes of one GPU, would each run everything.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._row_by_row = False
        if self.methods:
            if loaded is not None:
                loaded.check(decoder.read(decoder.find(self.model))[0])
            with self._steered(self._stand_in(1)) as steered:
                edits = [edit for found in steered.plan.values() for edit in found]
            keys = [edit.keys for edit in edits if isinstance(edit, Reweight)]
            self._row_by_row = any(isinstance(key, Sinks) and key.running for key in keys)
        if (run := recording.get()) is not None:
            run.lm = self

    # --- before the run ----------------------------------------------------------------------------------------------

    def expect(self, task: str, requests: Sequence[Any]) -> None:
        """Look at a task's requests before any is run.

        Raises:
            HarnessError: if this steering cannot be what it says on them.
        """
        for kind in dict.fromkeys(request.request_type for request in requests):
            self._refuse(kind, f" in task {task!r}")
        first: dict[Any, str] = {}
        for request in requests:
            first.setdefault(request.doc_id, str(request.args[0]))
            if len(first) == FIRST:
                break
        for method, group in self._needs():
            tag = self.tags[group]
            if first and not any(f"<{tag}>" in context for context in first.values()):
                raise HarnessError(
                    f"{method.name} needs spans for {group!r}, but none of the first {len(first)} prompts of task "
                    f"{task!r} has a <{tag}>…</{tag}>: put it into the task's templates, or leave this task out"
                )

    def _refuse(self, kind: str, where: str = "") -> None:
        for method in self.methods:
            if kind != "generate_until" and isinstance(method, PromptMethod):
                raise HarnessError(
                    f"{method.name} rewrites prompts, for which there is only generate_until: {kind}{where}"
                )
            if kind != "loglikelihood_rolling":
                continue
            if method.needs:
                why = f"acts on spans for {', '.join(method.needs)}"
            elif isinstance(method, EditMethod) and (not method.causal or _prompt_only(method, self.model)):
                why = "acts on what it finds in the prompt"
            else:
                continue
            raise HarnessError(
                f"{method.name} {why}, and texts in loglikelihood_rolling{where} have no prompt: leave it out"
            )

    def _needs(self) -> list[tuple[Method, str]]:
        return [(method, group) for method in self.methods for group in method.needs]

    # --- log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's; a request that cannot be steered as asked gets a `FailedScore`."""
        if not self.methods and not self.tags:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._refuse("loglikelihood")
        found: list[Any] = [None] * len(requests)
        rows: dict[int, Row] = {}
        for index, request in enumerate(requests):
            try:
                rows[index] = self._row(*request.args)
            except SpanError as error:
                found[index] = self._failed(FailedScore, error)
        for index, score in zip(rows, self._scores(list(rows.values()), disable_tqdm), strict=True):
            found[index] = score
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As HFLM's, on the texts without their tags."""
        self._refuse("loglikelihood_rolling")
        found: list[Any] = [None] * len(requests)
        good = []
        for index, request in enumerate(requests):
            try:
                self._strip(request.args[0])
                good.append(index)
            except SpanError as error:
                found[index] = self._failed(FailedSum, error)
        sums = super().loglikelihood_rolling([requests[i] for i in good], disable_tqdm=disable_tqdm) if good else []
        for index, total in zip(good, sums, strict=True):
            found[index] = total
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self.methods:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        rows = []
        for request, context, continuation in requests:
            ids = tuple(context + continuation)[-(self.max_length + 1) :]
            start = len(ids) - len(continuation)
            rows.append(Row(ids, start, start if request is not None else 1, request=request))
        return self._scores(rows, disable_tqdm, override_bs)

    @property
    def max_length(self) -> int:
        """As HFLM's; one less under a method that passes the last scored token through the model too."""
        return int(super().max_length) - (self._decoding is not None)

    def _row(self, context: str, continuation: str) -> Row:
        clean, tagged = self._strip(context)
        if self._strip(continuation, strict=False)[0] != continuation:
            raise SpanError(f"the continuation {continuation[:60]!r} holds a tag, but only prompts are emphasised")
        if clean:
            prompt, rest = self._encode_pair(clean, continuation)
            spans = self._locate(clean.rstrip(), tagged, prompt)
        else:
            prompt, rest = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if rest[:1] == prompt and len(rest) > 1:
                rest = rest[1:]
            spans = self._locate("", tagged, prompt)
        if not prompt:
            raise SpanError(f"the prompt {context[:60]!r} has no tokens")
        if not 0 < len(rest) <= self.max_length:
            raise SpanError(
                f"the continuation {continuation[:60]!r} has {len(rest)} tokens; allowed: 1 to {self.max_length}"
            )
        ids = tuple(prompt + rest)[-(self.max_length + 1) :]
        cut = len(prompt) + len(rest) - len(ids)
        start = len(prompt) - cut
        return Row(ids, start, start, self._shift(spans, cut), (context, continuation))

    def _scores(
        self, rows: Sequence[Row], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each row's tokens from `start` on, and whether greedy decoding gives them."""
        if not self.methods:
            parts = [(row.request, list(row.ids[: row.start]), list(row.ids[row.start :])) for row in rows]
            return super()._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm, override_bs=override_bs)
        # Rows that differ in their last token, which is only scored, share a forward.
        share = self._decoding is None and self.logits_cache
        forwards: dict[Any, list[int]] = {}
        for index, row in enumerate(rows):
            forwards.setdefault((row.ids[:-1], row.start, row.prompt, row.spans) if share else index, []).append(index)
        order = sorted(forwards.values(), key=lambda indices: (-len(rows[indices[0]].ids), rows[indices[0]].ids))
        size, schedule = override_bs or self.batch_size, None
        if self.batch_size == "auto" and not override_bs:
            self.batch_sizes: dict[Any, int] = {}
            firsts = [rows[indices[0]] for indices in order]
            parts = [(None, list(row.ids[: row.start]), list(row.ids[row.start :])) for row in firsts]
            size, schedule = 0, lambda place, _: self._batch_scheduler(place, parts)
        found: list[Any] = [None] * len(rows)
        bar = tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for chunk in Collator.get_chunks(order, n=int(size), fn=schedule):
            firsts = [rows[indices[0]] for indices in chunk]
            if self._decoding is not None:
                scores = [[score] for score in self._score_by_method(firsts)]
            else:
                logprobs = self._score_by_forward(firsts)
                scores = [[_score(one, rows[i]) for i in each] for one, each in zip(logprobs, chunk, strict=True)]
            for index, score in zip(itertools.chain(*chunk), itertools.chain(*scores), strict=True):
                found[index] = score
                if rows[index].request is not None:
                    self.cache_hook.add_partial("loglikelihood", rows[index].request, score)
                bar.update(1)
        bar.close()
        return found

    def _score_by_forward(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Log-probabilities [T, V] after each token but the last, per row."""
        if self._row_by_row:
            return [self._score_in_steps(row) for row in rows]
        inputs = pad_sequence([torch.tensor(row.ids[:-1]) for row in rows], batch_first=True).to(self.device)
        with self._meaning(rows):
            return list(torch.nn.functional.log_softmax(self._model_call(inputs), dim=-1, dtype=self.softmax_dtype))

    def _score_in_steps(self, row: Row) -> torch.Tensor:
        """As `_score_by_forward`, one generated token at a time: for edits that every generated row renews."""
        ids = torch.tensor([row.ids[:-1]], device=self.device)
        lengths = [row.prompt] + [1] * (ids.shape[1] - row.prompt)
        found, cache = [], None
        with self._steered(_spans([row]), (row.prompt,)), self._computing():
            for part in ids.split(lengths, dim=1):
                output = self.model(part, use_cache=True, **{caches.NAME: cache})
                cache = caches.find(output)
                found.append(output.logits[0])
        return torch.nn.functional.log_softmax(torch.cat(found), dim=-1, dtype=self.softmax_dtype)

    def _score_by_method(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        assert self._decoding is not None
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(self.device)
        lengths = torch.tensor([len(row.ids) for row in rows], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        with self._meaning(rows), self._steered(self._batch, self._lengths) as steered, self._computing():
            steered.inside = True
            logprobs = self._decoding.score(self.model, inputs, steered.spans)
        found = []
        for place, row in enumerate(rows):
            scored = logprobs[place, row.start - 1 : len(row.ids) - 1].float()
            # More than half of the probability is the most; below, only decoding tells.
            greedy = bool((scored > math.log(0.5)).all()) or self._begins(row)
            found.append((float(scored.sum()), greedy))
        return found

    def _begins(self, row: Row) -> bool:
        """Whether greedy decoding of the row's prompt gives what is scored."""
        prompt, rest = torch.tensor([row.ids[: row.start]], device=self.device), list(row.ids[row.start :])
        with self._steered(_spans([row])), self._computing():
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(rest),
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return bool(output[0, prompt.shape[1] :].tolist() == rest)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if not self.methods:
            return super()._model_call(inps, attn_mask, labels)
        spans, lengths, mask = self._batch, self._lengths, None
        if lengths is None:  # lm-eval tries how many rows fit
            spans = self._stand_in(len(inps))
        elif not all(method.causal for method in self.methods):
            # Pads follow a row's last token: nothing that is causal sees them.
            mask = self._mask
        with self._steered(spans, lengths), self._computing():
            return self.model(inps, attention_mask=mask).logits

    @contextlib.contextmanager
    def _meaning(self, rows: Sequence[Row]) -> Iterator[None]:
        """Say which rows the forward inside is for."""
        self._batch, self._lengths = _spans(rows), tuple(row.prompt for row in rows)
        lengths = torch.tensor([len(row.ids) - 1 for row in rows])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        self._mask = None if bool(real.all()) else real.long().to(self.device)
        try:
            yield
        finally:
            self._batch = self._lengths = self._mask = None

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """As HFLM computes: without gradients, in its mixed precision."""
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def _steered(self, spans: Spans | None, lengths: tuple[int, ...] | None = None) -> steerlens.Steering:
        return steerlens.steer(self.model, self.methods, spans, backend=self.attention_backend, prompt_lengths=lengths)

    def _stand_in(self, rows: int) -> Spans | None:
        groups = dict.fromkeys(group for _, group in self._needs())
        return Spans({group: (((0, 1),),) * rows for group in groups}) if groups else None

    # --- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's; a request that cannot be steered as asked gets a `FailedText`."""
        if not self.methods and not self.tags:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        found: list[Any] = [None] * len(requests)
        good = []
        for index, request in enumerate(requests):
            context, options = request.args
            room = self.max_length - normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            try:
                self._ends[context] = self._from_the_end(context, room)
                good.append(index)
            except SpanError as error:
                found[index] = self._failed(FailedText, error)
        texts = super().generate_until([requests[i] for i in good], disable_tqdm=disable_tqdm) if good else []
        self._ends.clear()
        for index, text in zip(good, texts, strict=True):
            found[index] = text
        return found

    def _from_the_end(self, context: str, room: int) -> Located:
        """A context's spans, counted back from its end: where left padding and left truncation change nothing."""
        clean, tagged = self._strip(context)
        ids = super().tok_encode(clean)
        spans = self._locate(clean, tagged, ids)
        if self.truncation and len(ids) > self.tokenizer.model_max_length and spans:
            raise SpanError(
                f"truncation=True cuts the prompt of {len(ids)} tokens to {self.tokenizer.model_max_length}"
            )
        self._shift(spans, max(len(ids) - room, 0))
        return self._shift(spans, len(ids), inside=False)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """As HFLM's, without the tags."""
        return super().tok_encode(self._strip(string)[0], add_special_tokens, left_truncate_len, **options)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As HFLM's, without the tags; what they enclosed is remembered for the `generate` that follows."""
        clean = [self._strip(string)[0] for string in strings]
        ids, mask = super().tok_batch_encode(clean, padding_side, left_truncate_len, truncation)
        rows = [Row((), 0, 0, self._shift(self._ends.get(s, ()), -ids.shape[1])) for s in strings]
        self._batch = _spans(rows)
        return ids, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        if not self.methods:
            return super()._model_generate(context, max_length, stop, **options)
        spans, self._batch = self._batch, None
        with self._steered(spans):
            return super()._model_generate(context, max_length, stop, **options)

    # --- tags --------------------------------------------------------------------------------------------------------

    def _strip(self, text: str, strict: bool = True) -> tuple[str, dict[str, list[Range]]]:
        """The text without its tags, and per tag the characters it enclosed."""
        if not self.tags:
            return text, {}
        try:
            return selectors.strip_tags(text, sorted(set(self.tags.values())))
        except SpanError:
            if strict:
                raise
            return "", {}

    def _locate(self, text: str, tagged: Mapping[str, Sequence[Range]], ids: list[int]) -> Located:
        """The tokens of each group that a method needs, in `ids`, the encoded text."""
        groups = dict.fromkeys(group for _, group in self._needs())
        if not groups:
            return ()
        inside = {tag: [(a, min(b, len(text))) for a, b in found if a < len(text)] for tag, found in tagged.items()}
        whole = selectors.Text(text, [("", 0, len(text))], inside)
        offsets = self._offsets(text, ids) if text else [(0, 0)] * len(ids)
        found = []
        for group in groups:
            ranges = selectors.resolve(selectors.Tag(self.tags[group]), whole, offsets, "all")
            found.append((group, tuple(dict.fromkeys(ranges))))
        return tuple(found)

    def _offsets(self, text: str, ids: list[int]) -> list[Range]:
        if not getattr(self.tokenizer, "is_fast", False):
            raise HarnessError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer, which does not say which characters tokens "
                "carry: load a fast one for methods that need spans"
            )
        for special in (True, False):
            encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            if encoded["input_ids"] == ids:
                return [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
        raise HarnessError(f"{type(self.tokenizer).__name__} encodes {text[:60]!r} in two ways; spans cannot be told")

    def _shift(self, spans: Located, cut: int, inside: bool = True) -> Located:
        """Spans after `cut` tokens are gone on the left; `inside` refuses those that lost one."""
        for group, ranges in spans:
            if inside and any(start < cut for start, _ in ranges):
                raise SpanError(f"left truncation takes {cut} tokens, some of them of a span for {group!r}")
        return tuple((group, tuple((a - cut, b - cut) for a, b in ranges)) for group, ranges in spans)

    # --- records -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _failed(kind: Any, error: SpanError) -> Any:
        if recording.get() is None:
            raise error
        return kind(str(error))

    @property
    def identity(self) -> dict[str, Any]:
        """What its responses depend on, plain JSON types."""
        return {
            "pretrained": self.name,
            "arguments": self._arguments,
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "steering": self.steering.to_dict(),
            "tags": self.tags,
            "backend": self.attention_backend,
        }

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, and the steering with its parameters and fingerprint."""
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "steering": self.steering.to_dict(),
            "tags": self.tags,
            "attention_backend": self.attention_backend,
            "steerlens_version": steerlens.__version__,
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's response cache if it holds responses of this model under this steering alone.

        Raises:
            HarnessError: if they are of another.
        """
        responses = cache_hook.dbdict
        if responses is not None:
            mine = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
            known = responses.get(_CACHE_KEY, None if len(responses) else mine)
            if known != mine:
                raise HarnessError(
                    f"use_cache: {responses.filename} holds responses of another model or steering than "
                    f"{self.steering.label!r} on {self.name}: give each its own use_cache"
                )
            responses[_CACHE_KEY] = mine
        super().set_cache_hook(cache_hook)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """As HFLM's; a process whose samples of a task all failed has no values, and says so."""
        gathered = super().gather_object(obj, dst)
        for rank in gathered or ():
            for task, values in rank.items() if isinstance(rank, dict) else ():
                if isinstance(values, dict):
                    for other in gathered:
                        values.update({metric: [] for metric in other[task] if metric not in values})
        return gathered


def _score(logprobs: torch.Tensor, row: Row) -> tuple[float, bool]:
    here = logprobs[row.start - 1 : len(row.ids) - 1]
    wanted = torch.tensor(row.ids[row.start :], device=here.device)
    return float(here.gather(1, wanted[:, None]).sum()), bool((here.argmax(-1) == wanted).all())


def _spans(rows: Sequence[Row]) -> Spans | None:
    groups = dict.fromkeys(group for row in rows for group, _ in row.spans)
    return Spans({group: tuple(dict(row.spans).get(group, ()) for row in rows) for group in groups}) if groups else None


def _prompt_only(method: EditMethod, model: Any) -> bool:
    facts, _ = decoder.read(decoder.find(model))
    edits = [edit for found in method.plan(facts, None).values() for edit in found]
    return bool(edits) and all(edit.phase in ("prompt", "prefill") for edit in edits)
