"""Lookback Lens (methods/heads.md §3): the ratio of the published code, the detector, and guided decoding."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from vector_files import detector_of

import steerlens
from steerlens import caches, choosing, decoder
from steerlens.cli import app
from steerlens.edits import HIDE, Reweight, Scale, SpanKeys
from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.fitting import lookback as fitting
from steerlens.measures import lookback
from steerlens.measures.base import MeasureError
from steerlens.measures.responses import Forced
from steerlens.methods import PASTA, EditMethod
from steerlens.methods.attention_sorting import AttentionSorting
from steerlens.methods.lookback_lens import LookbackLens
from steerlens.observing import joined
from steerlens.vectors import VectorFile

ROOT = Path(__file__).parent / "golden"
CASES = {case["case"]: case for case in json.loads((ROOT / "lookback_cases.json").read_text())["cases"]}
BOUND = 1e-4


@pytest.fixture(scope="module")
def golden():
    """`golden(case)`: the case, its tensors and its model."""
    models = {}

    def get(name):
        case = CASES[name]
        if case["model"] not in models:
            models[case["model"]] = AutoModelForCausalLM.from_pretrained(ROOT / "models" / case["model"]).eval()
        return case, load_file(ROOT / case["file"]), models[case["model"]]

    return get


class TestPublishedRatios:
    @pytest.mark.parametrize("name", [n for n in CASES if "greedy" in n or "teacher" in n])
    def test_while_decoding(self, golden, name):
        case, data, model = golden(name)
        forced, stop = data["generated_ids"], case["settings"]["context_length"]
        reader = choosing.Lookback(model)
        reader.stops = [stop]
        found, cache = [], None
        with torch.no_grad(), joined(reader):
            for step in range(forced.shape[1]):
                ids = data["input_ids"] if step == 0 else forced[:, step - 1 : step]
                cache = caches.find(model(ids, use_cache=True, **{caches.NAME: cache}))
                found.append(reader.take(ids.device))
        ratios = torch.stack(found, -1)[0]
        assert (ratios - data["lookback_ratio"].flatten(0, 1)).abs().max() < BOUND

    @pytest.mark.parametrize("name", [n for n in CASES if "teacher" in n])
    def test_in_one_forward(self, golden, name):
        case, data, model = golden(name)
        context = [[(0, case["settings"]["context_length"])]]
        batch = Forced.of(data["input_ids"].tolist(), data["generated_ids"].tolist(), {"context": context})
        ratios = lookback.ratios(model, batch)
        for layer, expected in enumerate(data["lookback_ratio"]):
            assert (ratios[layer][0] - expected).abs().max() < BOUND


@dataclass(frozen=True)
class Context(EditMethod):
    """What the fork calls attn_steer_factor: per layer and head a factor on the context, in rows that decode."""

    factors: tuple[tuple[float, ...], ...] = ()
    name: ClassVar[str] = "context_factor"
    needs: ClassVar[tuple[str, ...]] = ("context",)

    def plan(self, facts, spans):
        return {
            layer: tuple(
                Reweight((head,), SpanKeys("context"), Scale(math.log(f) if f else HIDE), "decode")
                for head, f in enumerate(row)
                if f != 1
            )
            for layer, row in enumerate(self.factors)
            if any(f != 1 for f in row)
        }


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in CASES
        for backend in ("reference", "sdpa", "triton")
        if "fork" in name and (backend != "triton" or "gqa" in name)  # interpreted, that takes its time
    ],
)
def test_dormant_steering_of_the_fork(golden, name, backend):
    """The fork's token_importance is PASTA with one section; its attn_steer_factor a law on the rows that decode."""
    case, data, model = golden(name)
    s, forced = case["settings"], data["generated_ids"]
    method, spans = [], None
    if "important_columns" in s:
        method = [PASTA(s["factor_on_the_rest"], heads={layer: s["heads"] for layer in s["layers"]})]
        spans = [[tuple(s["important_columns"])]]
    elif "context_columns" in s:
        method = [Context(tuple(map(tuple, s["factor_per_layer_head"])))]
        spans = {"context": [[tuple(s["context_columns"])]]}
    with torch.no_grad(), steerlens.steer(model, method, spans, backend=backend):
        out = model(data["input_ids"], use_cache=True)
        steps, cache = [out.logits[:, -1]], caches.find(out)
        for step in range(forced.shape[1] - 1):
            out_step = model(forced[:, step : step + 1], use_cache=True, **{caches.NAME: cache})
            steps.append(out_step.logits[:, -1])
    assert (out.logits - data["prefill_logits"]).abs().max() < BOUND
    assert (torch.stack(steps, 1) - data["step_logits"]).abs().max() < BOUND


# --- the detector ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file_of(tmp_path):
    """`file_of(model, seed, scale)`: a detector with random weights."""

    def make(model, seed=0, scale=40.0):
        return detector_of(model, tmp_path / f"detector-{seed}-{scale}.safetensors", seed, scale)

    return make


def test_probabilities_and_choice(tmp_path):
    path = tmp_path / "d.safetensors"
    VectorFile("d", {"weight.0": torch.tensor([2.0, -1.0]), "bias": torch.tensor([0.1])}, {}).save(path)
    facts = steerlens.facts.ModelFacts("oracle", "llama", 1, (2,), (2,))
    detector = choosing.Detector(LookbackLens(str(path)), facts)
    found = detector.probability(torch.tensor([[0.5, 0.7], [0.62, 0.4], [0.3, 0.2]]))
    assert found.tolist() == pytest.approx([0.598688, 0.719100, 0.622459], abs=1e-6)


def test_spans_of_a_text():
    ratios = {1: torch.arange(8.0).view(2, 4), 0: torch.tensor([[0.538462, 0.529412, 0.0, 1.0]])}
    whole = fitting.spans({0: ratios[0][:, :2]})
    assert whole.tolist() == [[pytest.approx(0.533937)]]
    windows = fitting.spans(ratios, 3)
    assert windows.shape == (2, 3)
    assert windows[1].tolist() == pytest.approx([1.529412 / 3, 2.0, 6.0])
    assert fitting.spans(ratios, 9).shape == (1, 3)


def test_a_fit_tells_spans_apart(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(400, generator=generator) < 0.5
    features = torch.rand(400, 5, generator=generator)
    features[:, 3] += labels * 0.8
    found = fitting.fit(features, labels.tolist(), {2: 4, 0: 1}, {"examples": "400"})
    assert {name: tuple(t.shape) for name, t in found.tensors.items()} == {
        "weight.0": (1,), "weight.2": (4,), "bias": (1,),
    }  # fmt: skip
    assert found.tensors["weight.2"].argmax() == 2
    weight = torch.cat([found.tensors["weight.0"], found.tensors["weight.2"]])
    right = ((features @ weight + found.tensors["bias"] > 0) == labels).float().mean()
    assert right > 0.9
    with pytest.raises(MeasureError, match="same label"):
        fitting.fit(features, [True] * 400, {0: 5}, {})
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UnsupportedError, match="needs scikit-learn"):
        fitting.fit(features, labels.tolist(), {0: 5}, {})


# --- guided decoding ------------------------------------------------------------------------------------------------


def spelled_out(model, method, ids, stop, steps, steering=()):
    """The same for one row, from dense maps of whole texts: no cache, no batch."""
    facts = decoder.read(decoder.find(model))[0]
    detector = choosing.Detector(method, facts)
    draw = torch.Generator().manual_seed(method.seed)
    text, prompt = ids[0].tolist(), ids.shape[1]

    def look(tokens):
        steer = steerlens.steer(model, list(steering), [[(2, 5)]] if steering else None, prompt_lengths=prompt)
        with (
            torch.no_grad(),
            steer,
            steerlens.capture(model, stats=(), maps="all", map_rows=[len(tokens) - 1]) as record,
        ):
            logits = model(torch.tensor([tokens])).logits[0, -1].float()
        rows = torch.cat([record[layer].map[0, :, 0] for layer in facts.attention_layers])
        one, other = rows[:, :stop].mean(1), rows[:, stop:].mean(1)
        return logits, one / (one + other)

    while steps > 0:
        size, seen = min(method.chunk, steps), [[] for _ in range(method.candidates)]
        candidates = [list(text) for _ in range(method.candidates)]
        for _ in range(size):
            logits = []
            for tokens, features in zip(candidates, seen, strict=True):
                one, feature = look(tokens)
                logits.append(one)
                features.append(feature)
            drawn = torch.multinomial(torch.stack(logits).softmax(-1), 1, generator=draw)[:, 0].tolist()
            for tokens, token in zip(candidates, drawn, strict=True):
                tokens.append(token)
        chances = [float(detector.probability(torch.stack(features).mean(0))) for features in seen]
        text, steps = candidates[chances.index(max(chances))], steps - size
    return text


OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "mistral", "gemma2", "gpt2"])
def test_guided_decoding_spelled_out(model_of, row, file_of, family):
    model = model_of(family, "eager")
    method = LookbackLens(file_of(model), chunk=3, candidates=3, seed=5)
    with steerlens.steer(model, method, {"context": [[(0, 14)]]}):
        found = model.generate(row, max_new_tokens=7, **OPTIONS)
    assert found[0].tolist() == spelled_out(model, method, row, 14, 7)
    assert "generate" not in model.__dict__


def test_steered_candidates(model, row, file_of):
    method, pasta = LookbackLens(file_of(model), chunk=3, candidates=3), PASTA(1e-3)
    spans = {"context": [[(0, 14)]], "emphasis": [[(2, 5)]]}
    with steerlens.steer(model, [method, pasta], spans):
        found = model.generate(row, max_new_tokens=6, **OPTIONS)
    expected = spelled_out(model, method, row, 14, 6, [pasta])
    assert found[0].tolist() == expected != spelled_out(model, method, row, 14, 6)


def test_a_row_in_a_padded_batch_is_the_row_alone(model, prompts, file_of):
    ids, mask = prompts("left")
    method = LookbackLens(file_of(model), chunk=4, candidates=4)
    context = [[(pad, pad + 9)] for pad in (0, 7, 3)]
    with steerlens.steer(model, method, {"context": context}):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=10, **OPTIONS)
    for i, pad in enumerate((0, 7, 3)):
        with steerlens.steer(model, method, {"context": [[(0, 9)]]}):
            alone = model.generate(ids[i : i + 1, pad:], max_new_tokens=10, **OPTIONS)
        assert torch.equal(alone[0], together[i, pad:])


def test_ends_and_streams(model, prompts, file_of):
    """A kept candidate that ends ends its row alone; what is cut off nobody sees."""

    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    ids, mask = prompts("left")
    method, streamer = LookbackLens(file_of(model), chunk=4, candidates=2), Streamer()
    context = {"context": [[(pad, pad + 9)] for pad in (0, 7, 3)]}
    ends = list(range(3, 97, 5))
    options = {"do_sample": False, "eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 18}
    with steerlens.steer(model, method, context):
        found = model.generate(ids, attention_mask=mask, **options)
        again = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options)
    lengths = []
    for row in found[:, ids.shape[1] :].tolist():
        tokens = [token for token in row if token != 0]
        assert [token for token in tokens[:-1] if token in ends] == []
        assert row == tokens + [0] * (len(row) - len(tokens))
        assert len(tokens) == 18 or tokens[-1] in ends
        lengths.append(len(tokens))
    assert len(set(lengths)) > 1
    assert found.shape[1] == ids.shape[1] + max(lengths)
    assert torch.equal(again.sequences, found)
    with steerlens.steer(model, method, {"context": [[(0, 9)]]}):
        one = model.generate(ids[:1], streamer=streamer, **options)
    assert (streamer.seen, streamer.ended) == (one[0].tolist(), True)


def test_sampling_options_shape_the_candidates(model, row, file_of):
    with steerlens.steer(model, LookbackLens(file_of(model), candidates=3), {"context": [[(0, 14)]]}):
        found = model.generate(row, max_new_tokens=6, **{**OPTIONS, "do_sample": True, "top_k": 1})
    assert torch.equal(found, model.generate(row, max_new_tokens=6, **OPTIONS))


def test_one_candidate_is_the_native_model(model, row, file_of):
    method = LookbackLens(file_of(model), candidates=1)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with steerlens.steer(model, method, {"context": [[(0, 14)]]}):
        found = model.generate(row, **options)
    assert torch.equal(torch.stack(found.logits), torch.stack(model.generate(row, **options).logits))


def test_context_of_a_rewritten_prompt(model, row, file_of):
    """Sorting moves the end of the context; the lens must look from where it is then."""
    spans = steerlens.Spans.of({"documents": [[(1, 3), (3, 12)]], "context": [[(1, 3)]]})
    moved_inputs, moved = AttentionSorting(1, "first").prepare_on(model, {"input_ids": row}, spans)
    method = LookbackLens(file_of(model), chunk=3, candidates=3)
    assert moved.groups["context"] != spans.groups["context"]
    with steerlens.steer(model, method, moved):
        expected = model.generate(**moved_inputs, max_new_tokens=6, **OPTIONS)
    with steerlens.steer(model, [AttentionSorting(1, "first"), method], spans):
        assert torch.equal(model.generate(row, max_new_tokens=6, **OPTIONS), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache=True"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
    ],
)
def test_modes_that_do_not_fit(model, row, file_of, options, message):
    with (
        steerlens.steer(model, LookbackLens(file_of(model)), {"context": [[(0, 14)]]}),
        pytest.raises(UnsupportedError, match=message),
    ):
        model.generate(row, **{"max_new_tokens": 2, "do_sample": False, **options})


def test_refusals(model, model_of, row, file_of, tmp_path):
    method = LookbackLens(file_of(model))
    with pytest.raises(SpanError, match="context"):
        steerlens.steer(model, method)
    for context in ([], [(0, 20)]):
        with steerlens.steer(model, method, {"context": [context]}), pytest.raises(SpanError, match="row 0"):
            model.generate(row, max_new_tokens=2)
    with steerlens.steer(model, method, {"context": [[(0, 9)]]}), pytest.raises(UnsupportedError, match="no text"):
        method.score(model, {"input_ids": row}, None)
    with (
        steerlens.steer(model, method, {"context": [[(0, 9)]]}),
        steerlens.capture(model),
        pytest.raises(UnsupportedError, match="further rows"),
    ):
        model.generate(row, max_new_tokens=2)
    other = LookbackLens(file_of(model_of("qwen3_next"), 1))
    with steerlens.steer(model, other, {"context": [[(0, 9)]]}), pytest.raises(MethodError, match="fit a detector"):
        model.generate(row, max_new_tokens=2)
    with pytest.raises(MethodError, match="chunk=0"):
        LookbackLens("d.safetensors", chunk=0)
    with pytest.raises(MethodError, match="no file"):
        LookbackLens("d.pkl")


def test_the_shipped_detector_follows_the_context():
    """On prompts that its fit never saw, where tiny's memory says otherwise."""
    from steerlens.evals.examples import generate

    from steerlens.models import load

    model, tokenizer = load("tiny")
    examples = list(generate("contradiction", 24, first_seed=9000, length=96))
    context = {"context": [list(e.groups["context"]) for e in examples]}
    inputs, spans = steerlens.encode(tokenizer, [e.prompt for e in examples], groups=context)

    def right(methods):
        with steerlens.steer(model, methods, spans):
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(text.strip() == e.answer for text, e in zip(texts, examples, strict=True))

    steered = right([m for m in steerlens.load_recipe("lookback_lens-tiny").methods])
    assert steered >= right([]) + 5
    found = fitting.lookback_lens(model, tokenizer, examples[:6], window=1)
    assert found.metadata.pop("model")
    assert found.metadata == {"method": "lookback_lens", "spans": "24", "examples": "6", "window": "1"}


def test_the_command_line_asks_for_the_context():
    found = CliRunner().invoke(app, ["run", "--recipe", "lookback_lens-tiny", "--prompt", "The letter was cold."])
    assert found.exit_code == 2
    assert "--span context=TEXT" in found.output
