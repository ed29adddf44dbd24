"""Random sequences of attach, forward, crop, reorder, copy and detach, against one-shot forwards of the definition.

The model has one layer, so that its cache does not depend on the steering: whatever happened before, the next logits
are those of the whole sequence at once under the contexts now in force. Each method has heads of its own.
"""

import copy
import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from small_models import build
from test_invariants import apart

import steerlens
from steerlens.attach import Steering
from steerlens.errors import UnsupportedError
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning

METHODS = [
    ZeroTuning(5.0, heads={0: [0, 4]}),
    PASTA(0.05, heads={0: [1]}),
    ACT(0.0, 0.1, heads={0: [2, 5]}),
    HeadMask({0: [3]}, phase="decode"),
    HeadMask({0: [6]}, mode="zero", phase="prefill"),
]
SPANS = [[(1, 3)], [(0, 2), (3, 4)]]
MODEL = build("llama-gqa", num_hidden_layers=1)
TWIN = build("llama-gqa", num_hidden_layers=1)


@dataclasses.dataclass(eq=False)
class Known:
    """A cache and what steering should know of it.

    Attributes:
        ids: [2, C].
        prompt: width of its prompt, or `None` before its first steered forward.
        origin: the row of the first steered forward that each row comes from.
        sinks: the contexts that found their sinks in it.
    """

    cache: object
    ids: torch.Tensor
    prompt: int | None = None
    origin: list[int] = dataclasses.field(default_factory=lambda: [0, 1])
    sinks: set[int] = dataclasses.field(default_factory=set)

    def forget(self):
        self.prompt, self.origin, self.sinks = None, [0, 1], set()


class Machine(RuleBasedStateMachine):
    contexts = Bundle("contexts")
    caches = Bundle("caches")

    def __init__(self):
        super().__init__()
        self.attached: list[tuple[int, Steering]] = []
        self.known: list[Known] = []
        self.number = 0
        self.before = fingerprint()

    # --- contexts ---

    @precondition(lambda self: len(self.attached) < 4)
    @rule(target=contexts, method=st.sampled_from(METHODS))
    def attach(self, method):
        if isinstance(method, ACT) and any(isinstance(context.methods[0], ACT) for _, context in self.attached):
            return multiple()  # the second finds its sinks in what the first left
        self.number += 1
        self.attached.append((self.number, steerlens.steer(MODEL, method, SPANS).attach()))
        return self.number

    @rule(number=consumes(contexts))
    def detach(self, number):
        next(context for n, context in self.attached if n == number).detach()
        self.attached = [(n, context) for n, context in self.attached if n != number]
        for known in self.known:
            known.sinks.discard(number)
            if not self.attached:
                known.forget()

    # --- caches ---

    @rule(target=caches, width=st.integers(4, 9), seed=st.integers(0, 99))
    def prefill(self, width, seed):
        ids = torch.randint(3, 97, (2, width), generator=torch.Generator().manual_seed(seed))
        known = Known(None, ids[:, :0])
        self.known.append(known)
        self.forward(known, ids)
        return known

    @rule(known=caches, length=st.integers(1, 3), seed=st.integers(0, 99))
    def step(self, known, length, seed):
        if known.cache is not None:
            self.forward(known, torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(seed)))

    @rule(known=caches, count=st.integers(1, 6))
    def crop(self, known, count):
        if known.cache is not None and count < known.ids.shape[1] - 3:
            known.cache.crop(-count)
            known.ids = known.ids[:, :-count]
            if known.prompt is not None and known.ids.shape[1] < known.prompt:
                known.forget()

    @rule(known=caches, rows=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def reorder(self, known, rows):
        if known.cache is not None:
            known.cache.reorder_cache(torch.tensor(rows))
            known.ids = known.ids[rows]
            if known.prompt is not None:
                known.origin = [known.origin[row] for row in rows]

    @rule(target=caches, known=caches)
    def duplicate(self, known):
        twin = Known(copy.deepcopy(known.cache), known.ids, known.prompt, list(known.origin), set(known.sinks))
        self.known.append(twin)
        return twin

    @rule(known=consumes(caches))
    def release(self, known):
        self.known.remove(known)

    # --- what must hold ---

    @torch.no_grad()
    def forward(self, known, ids):
        whole = known.ids.shape[1] == 0
        acting = [n for n, context in self.attached if isinstance(context.methods[0], ACT)]
        if not whole and any(n not in known.sinks for n in acting):
            with pytest.raises(UnsupportedError, match="whole prompt"):
                MODEL(ids, past_key_values=known.cache)
            known.cache = None  # half written
            return
        output = MODEL(ids, past_key_values=known.cache)
        known.cache, known.ids = output.past_key_values, torch.cat([known.ids, ids], 1)
        if self.attached and known.prompt is None:
            known.prompt = known.ids.shape[1]
            known.sinks = set(acting)
        methods = [context.methods[0] for _, context in self.attached]
        for row in range(2):
            spans = [SPANS[known.origin[row]]]
            lengths = known.prompt if methods else None
            with steerlens.steer(TWIN, methods, spans, backend="reference", prompt_lengths=lengths):
                expected = TWIN(known.ids[row : row + 1]).logits[0, -ids.shape[1] :]
            assert apart(output.logits[row], expected) < 1e-4

    @invariant()
    def the_model_knows_its_contexts(self):
        engine = vars(MODEL.model).get("_steerlens_engine")
        assert [context for _, context in self.attached] == (engine.contexts if engine else [])
        if not self.attached:
            assert fingerprint() == self.before
        else:
            assert sum(known.prompt is not None and known.cache is not None for known in self.known) <= len(
                engine.prompts
            )

    def teardown(self):
        for _, context in self.attached:
            context.detach()
        assert fingerprint() == self.before


def fingerprint():
    attention = MODEL.model.layers[0].self_attn
    return set(vars(MODEL)), set(vars(MODEL.model)), id(attention.config), set(vars(attention))


Machine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRandomSequences = Machine.TestCase


def test_a_released_cache_takes_its_state_along():
    ids = torch.arange(5, 13)[None]
    with torch.no_grad(), steerlens.steer(MODEL, METHODS[2]) as steered:
        kept = [MODEL(ids).past_key_values for _ in range(3)]
        prompts = steered._engine.prompts
        assert len(prompts) == 3
        with pytest.raises(TypeError, match="without its cache"):
            copy.deepcopy(vars(kept[0])["reorder_cache"])
        del kept[1:]
        assert len(prompts) == 1


@pytest.mark.parametrize("phase", ["attach", "detach"])
def test_ctrl_c_at_any_line_of_attaching_and_detaching(phase, model_of):
    model, names = model_of("llama-gqa"), ("_route", "__init__", "route", "install", "release")
    owners = [model, model.model, model.model.layers[0].self_attn]
    before, count, stop = [set(owner.__dict__) for owner in owners], 0, 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_name not in names or Path(frame.f_code.co_filename).parent.name != "steerlens":
            return None
        if event == "line":
            count += 1
            if count == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    while count >= stop:  # until there is no further line
        count, stop = 0, stop + 1
        steered = steerlens.steer(model, [ZeroTuning(2.0), ACT(0.3, 0.08)])
        try:
            for name in ("attach", "detach"):
                sys.settrace(trace if name == phase else None)
                getattr(steered, name)()
                sys.settrace(None)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert [set(owner.__dict__) for owner in owners] == before, stop
        assert model.model.layers[0].self_attn.config is model.config
    assert stop > 30
