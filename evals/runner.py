"""Runs documents through a model under several steerings."""

from __future__ import annotations

import bisect
import contextlib
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # type: ignore[import-untyped]
from steerlens.evals import batch as batches
from steerlens.evals.batch import Batch, Encoder, Item, describe
from steerlens.evals.doc import Doc, Outcome, Output, Steering
from steerlens.evals.prefix import Prefix
from transformers import LogitsProcessor, StoppingCriteria

import steerlens
from steerlens import caches, decoder
from steerlens.errors import SpanError, SteerlensError, UnsupportedError
from steerlens.examples import ExampleError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import DecodingMethod, Method, PromptMethod
from steerlens.tuning.scoring import Row

if TYPE_CHECKING:
    from steerlens.evals.task import Task

logger = logging.getLogger("steerlens")

Found = dict[str, list[Outcome]]


class RunnerError(SteerlensError, ValueError):
    """Steerings and a task that do not fit each other."""

    exit_code = 2


def validate(task: Task, steerings: Sequence[Steering], facts: ModelFacts | None = None) -> None:
    """Check, before anything runs, that the steerings can act on the task and on the model.

    Args:
        task: of which `name` and `groups` are asked.
        steerings: to be run on it.
        facts: of the model; None checks no heads.

    Raises:
        RunnerError: for a method that needs a span group which the task's documents do not have.
        HeadError: for heads that the model does not have.
    """
    for steering in steerings:
        for method in steering.methods:
            lacking = [group for group in method.needs if group not in task.groups]
            if lacking:
                has = f"it has {', '.join(sorted(task.groups))}" if task.groups else "it has none"
                raise RunnerError(
                    f"steering {steering.label!r}: {method.name} needs the span group {lacking[0]!r}, which task "
                    f"{task.name!r} does not have ({has}): leave that pair out, or give the task such spans"
                )
            if facts is not None and isinstance(heads := getattr(method, "heads", None), Heads):
                heads.resolve(facts)


class Runner:
    """Runs batches of documents on one model.

    Args:
        model, tokenizer: as loaded.
        backend: as of `steerlens.steer`.
        share: let steered runs start from the unsteered run's cache where that is exact.

    Attributes:
        limit: positions that the model has; None if it has no limit.
        facts: of the model.
    """

    def __init__(self, model: Any, tokenizer: Any, *, backend: str = "auto", share: bool = True) -> None:
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        self.facts, _ = decoder.read(decoder.find(model))
        self.limit: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
        self.prefix = Prefix(model) if share else None

    @property
    def saved(self) -> int:
        """Prompt tokens that steered runs took over from the unsteered one."""
        return 0 if self.prefix is None else self.prefix.saved

    def length(self, task: Task, doc: Doc) -> int:
        """Tokens of a document's prompt, for planning; see `steerlens.evals.batch.length`."""
        return batches.length(self.tokenizer, task, doc)

    def run(self, task: Task, docs: Sequence[Doc], steerings: Sequence[Steering], *, seed: int = 0) -> Found:
        """What the model gives for each document under each steering.

        A document that cannot be run, alone or for lack of memory, has an error instead of an output. Texts are decoded
        greedily by the model's own generation config, and end with a stop string, or the EOS of tokenizer or config. Of
        a choice that a decoding method scores itself, only tokens above one half are known to be greedy.

        Args:
            task: what to do with the documents (`output`, `max_new_tokens`, `stop`, `chat`).
            docs: one batch.
            steerings: with labels of their own; one without methods is the unsteered model.
            seed: of what decoding methods may draw.

        Returns:
            Outcomes per label, in the order of `docs`.

        Raises:
            UnsupportedError, HeadError, MethodError, SteeringStateError: for a steering that this model cannot have.
        """
        encoder, groups = Encoder(self.tokenizer, self.limit), _needs(m for s in steerings for m in s.methods)
        items = [encoder.item(task, doc, groups) for doc in docs]
        good = [i for i, item in enumerate(items) if item.error is None]
        found: Found = {s.label: [Outcome(error=item.refused(())) for item in items] for s in steerings}
        if good:
            job = _Job(self, task, encoder, seed)
            for label, outcomes in self._halve(job, [items[i] for i in good], list(steerings)).items():
                for i, outcome in zip(good, outcomes, strict=True):
                    found[label][i] = outcome
        return found

    def _halve(self, job: _Job, items: list[Item], steerings: list[Steering]) -> Found:
        """All steerings on all items, or if that fails on halves of them, down to one item under one steering."""
        try:
            return job.run(items, steerings)
        except Exception as error:
            if isinstance(error, SteerlensError) and not isinstance(error, SpanError | ExampleError):
                raise
            memory = _lacks_memory(error)
            if not memory and isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise  # the device computes nothing after it
            said = batches.why(error)
        # behind the handler, whose traceback holds what is to be freed
        if len(items) > 1:
            logger.warning("%s: a batch of %d documents failed (%s): trying halves", job.task.name, len(items), said)
        if memory:
            clear_device_cache(garbage_collection=True)
        if len(items) > 1:
            middle = len(items) // 2
            left, right = (self._halve(job, half, steerings) for half in (items[:middle], items[middle:]))
            return {label: left[label] + right[label] for label in left}
        if len(steerings) > 1:
            return {label: o for s in steerings for label, o in self._halve(job, items, [s]).items()}
        if memory:
            said = f"out of memory for this document alone ({said}): use a smaller model, dtype or document"
        return {steerings[0].label: [Outcome(error=f"{describe(items[0].doc)}: {said}")]}


@dataclass(frozen=True)
class _Part:
    """One turn's text: its tokens up to the end, and the sum of their log-probabilities."""

    text: str
    tokens: int
    logprob: float


@dataclass(frozen=True)
class _Turn:
    """One steering's turn at a batch.

    Attributes:
        chosen: items that it can be run on.
        rows: their rows in the whole batch.
        batch: these rows.
        columns: how many it leaves as they are, to be taken over from the unsteered run.
    """

    steering: Steering
    chosen: list[int]
    rows: list[int]
    batch: Batch
    columns: int


class _Job:
    """One task on one model."""

    def __init__(self, runner: Runner, task: Task, encoder: Encoder, seed: int) -> None:
        self.runner, self.task, self.encoder, self.seed = runner, task, encoder, seed
        self.model, self.tokenizer = runner.model, runner.tokenizer
        added, stops = self.tokenizer.get_added_vocab(), [stop for stop in task.stop if stop]
        given = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = [*given] if isinstance(given, list | tuple) else [given]
        ends += [self.tokenizer.eos_token_id, *(added.get(stop) for stop in stops)]
        self.stops, self.ends = stops, sorted({end for end in ends if isinstance(end, int)})

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as the model is given them."""
        return Batch(rows, self.runner.pad, self.model.device)

    def run(self, items: list[Item], steerings: list[Steering]) -> Found:
        """All steerings on all items, as one batch."""
        owners = [i for i, item in enumerate(items) for _ in item.rows]
        whole, prefix = self.batch([row for item in items for row in item.rows]), self.runner.prefix
        # the unsteered run first, which the others may start from
        order = sorted(steerings, key=lambda s: len(s.methods) > 0)
        turns = [self._turn(steering, items, owners, whole) for steering in order]
        share = any(turn.columns for turn in turns)
        found: Found = {}
        try:
            for turn in turns:
                found[turn.steering.label] = self._outcomes(turn, items, share and not turn.steering.methods)
        finally:
            if prefix is not None:
                prefix.drop()
        return {s.label: found[s.label] for s in steerings}

    def _turn(self, steering: Steering, items: list[Item], owners: list[int], whole: Batch) -> _Turn:
        needs = _needs(steering.methods)
        chosen = [i for i, item in enumerate(items) if item.refused(needs) is None]
        rows = [row for row, owner in enumerate(owners) if owner in chosen]
        batch = whole if len(rows) == len(owners) else whole.select(rows)
        prefix = self.runner.prefix
        columns = prefix.columns(steering.methods, batch) if prefix is not None and rows else 0
        return _Turn(steering, chosen, rows, batch, columns)

    def _outcomes(self, turn: _Turn, items: list[Item], keep: bool) -> list[Outcome]:
        prefix, needs = self.runner.prefix, _needs(turn.steering.methods)
        outcomes = [Outcome(error=item.refused(needs)) for item in items]
        if turn.chosen:
            begun = time.perf_counter()
            cache = prefix.start(turn.columns, turn.batch, turn.rows) if prefix is not None else None
            torch.manual_seed(self.seed)
            run = self._choices if self.task.output == "choices" else self._texts
            results = run([items[i] for i in turn.chosen], turn.steering, turn.batch, cache, keep)
            seconds = (time.perf_counter() - begun) / len(results)
            for i, outcome in zip(turn.chosen, results, strict=True):
                outcomes[i] = replace(outcome, seconds=seconds)
        return outcomes

    def _steered(self, methods: Sequence[Method], batch: Batch, prompts: list[int] | None = None) -> Any:
        if not methods:
            return contextlib.nullcontext()
        backend = self.runner.backend
        return steerlens.steer(self.model, list(methods), batch.spans, backend=backend, prompt_lengths=prompts)

    # --- texts -------------------------------------------------------------------------------------------------------

    def _texts(self, items: list[Item], steering: Steering, batch: Batch, cache: Any, keep: bool) -> list[Outcome]:
        parts: list[list[_Part]] = [[] for _ in items]
        errors: dict[int, str] = {}
        going = list(range(len(items)))
        while going:
            for i, part in zip(going, self._generate(steering, batch, cache, keep), strict=True):
                if isinstance(part, str):
                    errors[i] = part
                else:
                    parts[i].append(part)
            rows = {}
            for i in going:
                doc, texts = items[i].doc, [part.text for part in parts[i]]
                if i in errors or len(texts) > len(doc.turns):
                    continue
                try:
                    rows[i] = self.encoder.turn(self.task, doc, texts, _needs(steering.methods))
                except Exception as error:
                    errors[i] = f"turn {len(texts) + 1}: {batches.why(error)}"
            going, cache, keep = list(rows), None, False
            if going:
                batch = self.batch(list(rows.values()))
        return [
            Outcome(error=f"{describe(item.doc)}: {errors[i]}") if i in errors else Outcome(_joined(parts[i]))
            for i, item in enumerate(items)
        ]

    def _generate(self, steering: Steering, batch: Batch, cache: Any, keep: bool) -> list[_Part | str]:
        """A text per row, or why there is none."""
        likelihood, stopping = _Likelihood(), _Stopping(self.tokenizer, self.stops)
        options: dict[str, Any] = {} if cache is None else {caches.NAME: cache}
        with self._steered(steering.methods, batch):
            output = self.model.generate(
                **batch.inputs,
                **options,
                max_new_tokens=self.task.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,
                eos_token_id=self.ends or None,
                pad_token_id=self.runner.pad,
                logits_processor=[likelihood],
                stopping_criteria=[stopping] if self.stops else [],
                return_dict_in_generate=True,
            )
        if keep and self.runner.prefix is not None:
            self.runner.prefix.keep(caches.find(output))
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        rewritten = any(isinstance(method, PromptMethod) for method in steering.methods)
        width = likelihood.width if rewritten and likelihood.width is not None else batch.width
        return self._parts(sequences[:, width:].tolist(), *likelihood.gathered())

    def _parts(self, rows: list[list[int]], picked: list[list[int]], logprobs: list[list[float]]) -> list[_Part | str]:
        parts: list[_Part | str] = []
        for i, tokens in enumerate(rows):
            count = self._count(tokens)
            known = i < len(picked) and picked[i][:count] == tokens[:count]
            total = sum(logprobs[i][:count]) if known else float("nan")
            if known and total != total:
                parts.append(self._no_numbers())
                continue
            text = self._text(tokens[:count])
            cuts = [at for stop in self.stops if (at := text.find(stop)) >= 0]
            parts.append(_Part(text[: min(cuts, default=None)], count, total))
        return parts

    def _count(self, tokens: list[int]) -> int:
        """How many tokens there are up to the first end or stop, that one included."""
        count = next((n for n, token in enumerate(tokens, 1) if token in self.ends), len(tokens))
        if not self.stops:
            return count
        stopped = bisect.bisect_left(range(count), True, key=lambda n: self._stops(tokens[: n + 1])) + 1
        return min(count, stopped)

    def _stops(self, tokens: list[int]) -> bool:
        text = self._text(tokens)
        return any(stop in text for stop in self.stops)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    # --- choices -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _choices(self, items: list[Item], steering: Steering, batch: Batch, cache: Any, keep: bool) -> list[Outcome]:
        prompting = [m for m in steering.methods if isinstance(m, PromptMethod)]
        decoding = next((m for m in steering.methods if isinstance(m, DecodingMethod)), None)
        for method in prompting:
            batch = self._prepared(method, batch)
        others = [m for m in steering.methods if not isinstance(m, PromptMethod)]
        with self._steered(others, batch, batch.prompts) as steered:
            if decoding is not None:
                # its own forwards are for it to steer
                steered.inside = True
                scores = decoding.score(self.model, batch.inputs, batch.spans)
                picks = [_picked(scores[i], row) for i, row in enumerate(batch.rows)]
            else:
                logits = self._forward(batch, cache, keep)
                picks = [_likely(logits[i], row) for i, row in enumerate(batch.rows)]
        outcomes = []
        for item in items:
            mine, picks = picks[: len(item.rows)], picks[len(item.rows) :]
            outcomes.append(self._compared(item, mine))
        return outcomes

    def _forward(self, batch: Batch, cache: Any, keep: bool) -> torch.Tensor:
        """Logits [B, n, V] of the last columns, those that predict each row's choice."""
        seen = 0 if cache is None else int(cache.get_seq_length())
        mask = batch.inputs["attention_mask"]
        output = self.model(
            input_ids=batch.inputs["input_ids"][:, seen:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, seen:],
            logits_to_keep=max(len(row.ids) - row.prompt for row in batch.rows) + 1,
            use_cache=keep or cache is not None,
            **({} if cache is None else {caches.NAME: cache}),
        )
        if keep and self.runner.prefix is not None:
            self.runner.prefix.keep(caches.find(output))
        return output.logits

    def _prepared(self, method: PromptMethod, batch: Batch) -> Batch:
        """The batch with its prompts as a method rewrites them, each choice behind its prompt."""
        prompts = self.batch([Row(row.ids[: row.prompt], row.prompt, row.groups) for row in batch.rows])
        inputs, spans = method.prepare_on(self.model, dict(prompts.inputs), prompts.spans)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor) or len(ids) != len(batch.rows):
            raise UnsupportedError(
                f"{method.name} does not rewrite each prompt into token ids with a mask, so that no choice can be put "
                "behind it: use it on tasks that generate"
            )
        rows = []
        for i, row in enumerate(batch.rows):
            real = mask[i].nonzero()[:, 0]
            first, prompt = int(real[0]), ids[i][real[0] : real[-1] + 1].tolist()
            groups = {} if spans is None else spans.groups
            moved = {name: tuple((a - first, b - first) for a, b in per_row[i]) for name, per_row in groups.items()}
            rows.append(Row([*prompt, *row.ids[row.prompt :]], len(prompt), moved))
        return self.batch(rows)

    def _compared(self, item: Item, picks: list[tuple[float, bool]]) -> Outcome:
        logprobs = tuple(logprob for logprob, _ in picks)
        if any(logprob != logprob for logprob in logprobs):
            return Outcome(error=f"{describe(item.doc)}: {self._no_numbers()}")
        lengths = tuple(len(row.ids) - row.prompt for row in item.rows)
        target = item.doc.target
        right = float("nan") if target is None else logprobs[target]
        return Outcome(Output((), logprobs, lengths, tuple(greedy for _, greedy in picks), right))

    def _no_numbers(self) -> str:
        return f"logits that are no numbers in {self.model.dtype}: load the model with --dtype float32 or bfloat16"


def _likely(logits: torch.Tensor, row: Row) -> tuple[float, bool]:
    """The log-likelihood of what stands behind a row's prompt, and if it is greedy, from the last logits [n, V]."""
    targets = torch.tensor(row.ids[row.prompt :], device=logits.device)
    logs = logits[-len(targets) - 1 : -1].float().log_softmax(-1)
    greedy = bool((logs.argmax(-1) == targets).all())
    return float(logs.gather(1, targets[:, None]).sum()), greedy


def _picked(logprobs: torch.Tensor, row: Row) -> tuple[float, bool]:
    """The same from the log-probabilities [T-1] of a row's tokens, which are surely greedy above one half."""
    mine = logprobs[-(len(row.ids) - row.prompt) :].float()
    return float(mine.sum()), bool((mine > -math.log(2)).all())


class _Likelihood(LogitsProcessor):
    """Notes the log-probability of each token that greedy decoding picks, of the scores that it picks from.

    Attributes:
        width: columns of the prompt, as the first step shows them.
    """

    def __init__(self) -> None:
        self.width: int | None = None
        self._tokens: list[torch.Tensor] = []
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.width = input_ids.shape[1] if self.width is None else self.width
        best = scores.argmax(-1)
        self._tokens.append(best)
        self._logprobs.append(scores.gather(1, best[:, None])[:, 0] - scores.logsumexp(-1))
        return scores

    def gathered(self) -> tuple[list[list[int]], list[list[float]]]:
        """Per row the tokens and their log-probabilities; none where steps were of different rows."""
        if len({len(tokens) for tokens in self._tokens}) != 1:
            return [], []
        return torch.stack(self._tokens, 1).tolist(), torch.stack(self._logprobs, 1).tolist()


class _Stopping(StoppingCriteria):
    """Ends a row where its text comes to hold a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        # a token carries a byte at least; some more, for those that carry none and a first one that is cut
        self.window = max((len(stop.encode()) for stop in stops), default=0) + 8
        self._prompt = self._columns = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        columns = input_ids.shape[1]
        if columns != self._columns + 1:  # the first token of this prompt
            self._prompt = columns - 1
        self._columns = columns
        tails = input_ids[:, max(self._prompt, columns - self.window) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _lacks_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
    return known or (isinstance(error, RuntimeError) and "CUDA error: out of memory" in str(error))


def _needs(methods: Iterable[Method]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(group for method in methods for group in method.needs))


def _joined(parts: Sequence[_Part]) -> Output:
    return Output(
        tuple(part.text for part in parts),
        lengths=tuple(part.tokens for part in parts),
        logprob=sum(part.logprob for part in parts),
    )
