"""Generation that samples several continuations of each text and keeps one, chunk by chunk: `LookbackLens`.

transformers prepares the inputs, the cache, the logits processors and the stopping criteria; the loop is here. B texts
are B rows of the prefill; from then on each is `candidates` rows next to each other, k in shapes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from steerlens import caches
from steerlens.backends import reference
from steerlens.backends.call import Call
from steerlens.engine import Engine
from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.facts import ModelFacts
from steerlens.measures.lookback import ratio
from steerlens.methods.lookback_lens import GROUP, LookbackLens
from steerlens.observing import Observer, joined
from steerlens.passes import Pass
from steerlens.spans import Spans
from steerlens.wrapping import unwrap

_REFUSED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "assistant_model": None,
    "assistant_early_exit": None,
    "prompt_lookup_num_tokens": None,
    "custom_generate": None,
    "inputs_embeds": None,
    "prefill_chunk_size": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


class Detector:
    """P(factual) of a chunk: σ(w·v + b), v the mean lookback ratios of all heads, layer by layer.

    Raises:
        MethodError: if the file's weights are not those of this model's heads.
    """

    def __init__(self, method: LookbackLens, facts: ModelFacts) -> None:
        found = method.load_vectors("weight")
        further = sorted(set(found.layers("weight")) - set(facts.attention_layers))
        bias = found.tensors.get("bias")
        if further or bias is None or bias.numel() != 1:
            what = f"has weights of layers {further}" if further else "has no 'bias' of one number"
            raise MethodError(
                f"lookback_lens: {found.name} {what}, {facts.name} has attention in the layers "
                f"{list(facts.attention_layers)}: fit a detector on this model ({method.fit})"
            )
        self.weight = torch.cat([found.get("weight", layer, facts, ndim=1) for layer in facts.attention_layers])
        self.bias = bias.reshape(())

    def probability(self, features: torch.Tensor) -> torch.Tensor:
        """Of features [..., F], fp32 [...]."""
        return torch.sigmoid(features @ self.weight.to(features.device) + self.bias.to(features.device))


class Lookback(Observer):
    """Reads the lookback ratios of the last row of each forward.

    Attributes:
        stops: column behind the context, per prompt row.
    """

    name = "lookback_lens"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.stops: list[int] = []
        self._found: dict[int, torch.Tensor] = {}

    def observe(self, layer: int, call: Call, now: Pass) -> None:
        """Keep the ratios of one attention call, fp32 [B, H]."""
        facts = self._engine.facts
        if call.query.shape[1] != facts.heads[layer]:
            raise UnsupportedError(
                f"lookback_lens needs the heads of layer {layer} of {facts.name} in one process: load the model "
                "without tensor parallelism"
            )
        last = slice(call.query.shape[2] - 1, call.query.shape[2])
        weights = reference.weights(call, reference.resolve(call), last)[:, :, 0]
        start = now.keys[layer][1]
        columns = torch.arange(start, start + weights.shape[2], device=weights.device)
        stop = now.prompt.expand(torch.tensor(self.stops))[:, None]
        context = (weights * (columns < stop)[:, None]).sum(-1)
        new = (weights * (columns >= stop)[:, None]).sum(-1)
        self._found[layer] = ratio(
            context, (stop - now.prompt.first[:, None]).float(), new, (now.columns - stop).float()
        )

    def take(self, device: torch.device) -> torch.Tensor:
        """Features of the forward's last row, layer by layer, fp32 [B, F]."""
        found = torch.cat([self._found[layer].to(device) for layer in sorted(self._found)], 1)
        self._found.clear()
        return found


def generate(method: LookbackLens, model: Any, inputs: Mapping[str, Any], spans: Spans | None, options: Any) -> Any:
    """`LookbackLens.generate`."""
    config = options.get("generation_config") or model.generation_config
    for name, neutral in _REFUSED.items():
        value = {**inputs, **options}.get(name)
        value = getattr(config, name, None) if value is None else value
        if value is not None and value is not False and value != neutral:
            shown = type(value).__name__ if isinstance(value, torch.nn.Module | torch.Tensor) else repr(value)
            raise UnsupportedError(
                f"lookback_lens keeps one of several sampled continuations, which {name}={shown} does not go with: "
                "generate without it"
            )
    reader = Lookback(model)
    engine = reader._engine
    if engine.records:
        raise UnsupportedError(
            f"lookback_lens runs its candidates as further rows, which {engine.describe()} cannot hold: capture a "
            "forward on the text that it gives"
        )
    detector = Detector(method, engine.facts)
    # transformers keeps a streamer from a loop that is not its own
    stream = options.get("streamer")
    loop = functools.partial(
        _loop, method=method, reader=reader, engine=engine, detector=detector, spans=spans, stream=stream
    )
    with joined(reader):
        return model.generate(**inputs, **{**options, "custom_generate": loop})


def _stops(method: LookbackLens, engine: Engine, spans: Spans | None, ids: torch.Tensor) -> list[int]:
    """The column behind the context of each row; the spans are the context's own where a prompt was rewritten."""
    known = next((context.spans for context in engine.contexts if method in context.methods), spans)
    if known is None or GROUP not in known.groups or known.rows != len(ids):
        raise SpanError(
            f"lookback_lens needs the span group {GROUP!r} for each of {len(ids)} rows: pass spans= from "
            'steerlens.encode(…, groups={"context": [texts]})'
        )
    stops = [max((stop for _, stop in row), default=0) for row in known.groups[GROUP]]
    for row, stop in enumerate(stops):
        if not 0 < stop < ids.shape[1]:
            raise SpanError(
                f"lookback_lens: row {row}: "
                + (f"the context ends at column {stop} of {ids.shape[1]}" if stop else f"no {GROUP!r} is named")
                + "; name a context that ends before the prompt does, so that a question or a cue is left behind it"
            )
    return stops


def _cache(given: Mapping[str, Any], facts: ModelFacts) -> Cache:
    cache, known = caches.find(given), (DynamicLayer, DynamicSlidingWindowLayer)
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError("lookback_lens reads the whole prompt: generate without a cache of earlier turns")
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise UnsupportedError(
            f"lookback_lens repeats and selects the rows of its cache, which {type(cache).__name__} cannot do: "
            "generate with use_cache=True and a dynamic cache that is not offloaded"
        )
    if others := {n: type(x).__name__ for n, x in enumerate(cache.layers) if type(x) not in known}:
        raise UnsupportedError(
            f"lookback_lens repeats and selects the rows of its cache, and the states of layers {list(others)} of "
            f"{facts.name} ({', '.join(sorted(set(others.values())))}) cannot be: use a model of attention layers alone"
        )
    return cache


@torch.no_grad()
def _loop(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    method: LookbackLens,
    reader: Lookback,
    engine: Engine,
    detector: Detector,
    spans: Spans | None,
    stream: Any,
    **model_kwargs: Any,
) -> Any:
    """What stands in for transformers' sampling loop."""
    reader.stops = _stops(method, engine, spans, input_ids)
    rows, cache, device = _Rows(model, input_ids, model_kwargs), _cache(model_kwargs, engine.facts), input_ids.device
    B, k = len(input_ids), method.candidates
    pad = generation_config.pad_token_id
    pad = next((i for i in (pad, generation_config.eos_token_id) if isinstance(i, int)), 0)
    draws = [torch.Generator(device).manual_seed(method.seed) for _ in range(B)]
    logits = rows.prefill()
    ratios = reader.take(device).repeat_interleave(k, 0)
    logits = logits.repeat_interleave(k, 0)
    cache.batch_repeat_interleave(k)
    rows.repeat(k)
    ids = input_ids.repeat_interleave(k, 0)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    lengths = torch.full((B,), ids.shape[1], device=device)
    while not bool(done.all()):
        ended = done.repeat_interleave(k)
        sums, counts = torch.zeros_like(ratios), torch.zeros(B * k, device=device)
        for _ in range(method.chunk):
            live = ~ended
            odds = logits_processor(ids, logits).softmax(-1)
            drawn = [torch.multinomial(odds[b * k : (b + 1) * k], 1, generator=draws[b])[:, 0] for b in range(B)]
            ids = torch.cat([ids, torch.where(live, torch.cat(drawn), pad)[:, None]], 1)
            sums += torch.where(live[:, None], ratios, 0)
            counts += live
            ended = ended | stopping_criteria(ids, None)
            if bool(ended.all()):
                break
            logits = rows.step(ids[:, -1:])
            ratios = reader.take(device)
        chances = detector.probability(sums / counts.clamp(min=1)[:, None]).view(B, k)
        # argmax does not promise the first of equal ones
        best = torch.where(chances == chances.amax(1, keepdim=True), torch.arange(k, device=device), k).amin(1)
        kept = torch.arange(B, device=device) * k + best
        lengths += counts[kept].long()
        if stream is not None:
            stream.put(ids[kept[0], int(lengths[0] - counts[kept[0]]) : int(lengths[0])].cpu())
        done = done | ended[kept]
        index = kept.repeat_interleave(k)
        ids, logits, ratios = ids[index], logits[index], ratios[index]
        cache.batch_select_indices(index)
    if stream is not None:
        stream.end()
    sequences = ids[::k, : int(lengths.max())]
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences)  # type: ignore[arg-type]
    return sequences


class _Rows:
    """The model's forwards on one cache, each text's positions counted from its first token."""

    def __init__(self, model: Any, ids: torch.Tensor, given: Mapping[str, Any]) -> None:
        self.model, self.ids = model, ids
        self.takes = inspect.signature(unwrap(model).forward).parameters
        self.given = {name: value for name, value in given.items() if name not in ("use_cache", "logits_to_keep")}
        self.mask = self.given.pop("attention_mask", None)
        positions = self.given.pop("position_ids", None)
        if positions is not None and positions.ndim != 2:
            raise UnsupportedError(
                f"lookback_lens counts positions along the text, not in {positions.ndim} dimensions (text, image, "
                "video): use a model of text"
            )
        whole = torch.ones_like(ids) if self.mask is None else self.mask
        self.positions = (whole.long().cumsum(1) - 1).clamp(min=0) if positions is None else positions
        self.cache = caches.find(given)
        self.given.pop(caches.NAME, None), self.given.pop(caches.OLD, None)

    def prefill(self) -> torch.Tensor:
        """Logits [B, V] behind the prompt, fp32."""
        return self._run(self.ids, self.positions[:, -self.ids.shape[1] :], self.given)

    def repeat(self, times: int) -> None:
        """Each row is so many rows from now on."""
        self.mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        self.positions = self.positions[:, -1:].repeat_interleave(times, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits behind one more token [B, 1] of each row."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(tokens, dtype=self.mask.dtype)], 1)
        self.positions = self.positions[:, -1:] + 1
        return self._run(tokens, self.positions, {})

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, further: Mapping[str, Any]) -> torch.Tensor:
        given = {**further, "input_ids": ids, "attention_mask": self.mask, "use_cache": True, caches.NAME: self.cache}
        given |= {"position_ids": positions} if "position_ids" in self.takes else {}
        given |= {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        return self.model(**given).logits[:, -1].to(torch.float32)  # type: ignore[no-any-return]
