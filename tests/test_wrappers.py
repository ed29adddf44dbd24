"""Steering through what models come wrapped in: PEFT, data and tensor parallelism, torch.compile, quantised weights."""

import copy
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import parallel_ranks
import pytest
import torch
import transformers
from small_models import build
from transformers import CompileConfig

import steerlens
from steerlens import shards
from steerlens.errors import UnsupportedError
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning

try:
    import peft
except ImportError:
    peft = None

STRONG = ZeroTuning(9.0)
SPANS = [[(4, 7)], [(9, 12)], [(8, 11)]]
METHODS = {
    "zerotuning": STRONG,
    "pasta": PASTA(0.05),
    "act": ACT(0.3, 0.08),
    "decode": HeadMask("0-2:*", phase="decode"),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@torch.no_grad()
def run(model, ids, mask=None, **options):
    return model(input_ids=ids, attention_mask=mask, **options).logits


def decode(model, ids, mask):
    """Logits of every step, [steps, B, V]."""
    return torch.stack(model.generate(input_ids=ids, attention_mask=mask, **GREEDY).logits)


def close(one, other, bound=1e-4):
    return (one - other).abs().max() <= bound * other.abs().max()


@pytest.mark.skipif(peft is None, reason="peft is not installed (steerlens[dev])")
class TestPeft:
    def adapted(self):
        """A LoRA model whose adapter does something, and the same weights without PEFT."""
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(build("llama-gqa"), config).eval()
        return model, copy.deepcopy(model).merge_and_unload()

    @pytest.mark.parametrize("way", ["wrapper", "tuner", "base"])
    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_lora(self, prompts, way, method):
        ids, mask = prompts("left")
        model, merged = self.adapted()
        base = model.get_base_model()
        before = (set(base.__dict__), set(base.model.__dict__), run(model, ids, mask))
        assert (before[2] - run(build("llama-gqa"), ids, mask)).abs().max() > 0.1  # the adapter counts
        target = {"wrapper": model, "tuner": model.base_model, "base": base}[way]
        with steerlens.steer(merged, method, SPANS):
            expected, steps = run(merged, ids, mask), decode(merged, ids, mask)
        with steerlens.steer(target, method, SPANS) as steered:
            assert close(run(model, ids, mask), expected) and close(decode(model, ids, mask), steps)
            assert steered.report()[1]["calls"] == 1 + 6
        assert not close(steps, decode(merged, ids, mask), 1e-2)
        assert (set(base.__dict__), set(base.model.__dict__)) == before[:2] or set(base.__dict__) - before[0] == {
            "prepare_inputs_for_generation"  # which PEFT leaves behind
        }
        assert torch.equal(run(model, ids, mask), before[2])

    def test_merged_and_disabled(self, prompts):
        ids, mask = prompts("left")
        model, merged = self.adapted()
        plain = build("llama-gqa")
        with steerlens.steer(model, METHODS["pasta"], SPANS), steerlens.steer(merged, METHODS["pasta"], SPANS):
            expected = run(merged, ids, mask)
            model.merge_adapter()
            assert close(run(model, ids, mask), expected)
            model.unmerge_adapter()
            assert close(run(model, ids, mask), expected)
            with model.disable_adapter():
                disabled = run(model, ids, mask)
        with steerlens.steer(plain, METHODS["pasta"], SPANS):
            assert close(disabled, run(plain, ids, mask)) and not close(disabled, expected, 1e-2)

    def test_adapter_of_transformers_own_integration(self, prompts):
        ids, mask = prompts("left")
        torch.manual_seed(1)
        model = build("llama-gqa")
        with steerlens.steer(model, METHODS["pasta"], SPANS):
            plain = run(model, ids, mask)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
            except ValueError as error:
                pytest.skip(f"transformers {transformers.__version__} and PEFT {peft.__version__}: {error}")
        model.eval()
        with steerlens.steer(model, METHODS["pasta"], SPANS, backend="reference"):
            expected, steps = run(model, ids, mask), decode(model, ids, mask)
        with steerlens.steer(model, METHODS["pasta"], SPANS):
            assert close(run(model, ids, mask), expected) and close(decode(model, ids, mask), steps)
        assert not close(expected, plain, 1e-2)

    def test_capture(self, prompts):
        ids, mask = prompts("left")
        model, merged = self.adapted()
        with steerlens.capture(model, SPANS) as one, steerlens.capture(merged, SPANS) as other:
            run(model, ids, mask), run(merged, ids, mask)
        assert (one[2].mass - other[2].mass).nan_to_num().abs().max() < 1e-5

    @pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
    def test_virtual_tokens_are_refused(self, prompts, kind):
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
        model = peft.get_peft_model(build("llama-gqa"), config)
        for use in (lambda m: steerlens.steer(m, STRONG), steerlens.capture):
            with pytest.raises(UnsupportedError, match=rf"{kind}.* 5 virtual tokens.*get_base_model"):
                use(model)
        base = model.get_base_model()
        with steerlens.steer(base, STRONG):
            with pytest.raises(UnsupportedError, match="5 virtual tokens"):
                model.generate(input_ids=prompts()[0], max_new_tokens=2)
            base.generate(input_ids=prompts()[0], max_new_tokens=2)


class TestDataParallel:
    def test_one_process(self, model_of, prompts, tmp_path):
        ids, mask = prompts("left")
        model = model_of("llama-gqa")
        with steerlens.steer(model, PASTA(0.05), SPANS):
            expected, steps = run(model, ids, mask), decode(model, ids, mask)
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            ddp = torch.nn.parallel.DistributedDataParallel(model)
            for wrapped in (ddp, torch.nn.DataParallel(model)):
                native = run(wrapped, ids, mask)
                with steerlens.steer(wrapped, PASTA(0.05), SPANS):
                    assert torch.equal(run(wrapped, ids, mask), expected)
                    assert torch.equal(decode(wrapped.module, ids, mask), steps)
                assert torch.equal(run(wrapped, ids, mask), native) and not close(native, expected, 1e-2)
        finally:
            torch.distributed.destroy_process_group()

    def test_threads_are_refused(self, model_of):
        wrapped = torch.nn.DataParallel(model_of("llama-gqa"))
        wrapped.device_ids = [0, 1]  # as with two GPUs
        for use in (lambda m: steerlens.steer(m, STRONG), steerlens.capture):
            with pytest.raises(UnsupportedError, match=r"DataParallel.*\[0, 1\].*DistributedDataParallel"):
                use(wrapped)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build("llama-gqa").save_pretrained(folder / "gqa")
    return folder


@pytest.fixture(scope="module")
def ranks(model_folder, tmp_path_factory):
    """What each of two gloo processes found."""
    output = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(root / "tests" / "parallel_ranks.py"), str(model_folder), str(output)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(output / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(model_folder):
    return parallel_ranks.everything(parallel_ranks.load(model_folder, "gqa"))


class TestTwoProcesses:
    @pytest.mark.parametrize("backend", ["sdpa", "reference"])
    @pytest.mark.parametrize("case", parallel_ranks.CASES)
    def test_tensor_parallel_heads(self, ranks, alone, case, backend):
        expected = alone[case, backend]
        mass, tokens = alone[case, backend, "more"]
        assert not close(expected, alone["native"], 1e-2)
        for rank, found in enumerate(r["tp"] for r in ranks):
            assert found["local rows"] == 32  # 4 of 8 heads of 8
            assert close(found[case, backend], expected)
            found_mass, found_tokens = found[case, backend, "more"]
            assert torch.equal(found_tokens, tokens)
            own = slice(4 * rank, 4 * rank + 4)
            for layer, change in mass.items():
                if change is not None:
                    assert (found_mass[layer][own] - change[own]).abs().max() < 1e-5
                    assert found_mass[layer].count_nonzero() == found_mass[layer][own].count_nonzero()

    def test_tensor_parallel_capture(self, ranks, alone):
        """Each process records the heads that it holds, under their numbers in the model."""
        for layer, heads in parallel_ranks.CAPTURED.items():
            assert [r["tp"]["capture"][layer][0] for r in ranks] == [
                tuple(h for h in heads if h // 4 == rank) for rank in (0, 1)
            ]
            for stat, expected in alone["capture"][layer][1].items():
                parts = [found for r in ranks if (found := r["tp"]["capture"][layer][1][stat]) is not None]
                assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5, equal_nan=True)

    def test_sharding_that_cannot_be_read(self, ranks):
        for found in ranks:
            assert "layer 0" in found["tp"]["refused"] and "cannot be told" in found["tp"]["refused"]

    def test_distributed_data_parallel(self, ranks, model_folder):
        model = parallel_ranks.load(model_folder, "gqa")
        weight = model.model.layers[0].self_attn.q_proj.weight
        with steerlens.steer(model, parallel_ranks.CASES["composed"], parallel_ranks.SPANS):
            for rank, found in enumerate(r["ddp"] for r in ranks):
                logits = model(**parallel_ranks.inputs(rank)).logits
                assert close(found["logits"], logits, 1e-5)
                (logits.square().mean() / 2).backward()
        for found in ranks:
            assert close(found["ddp"]["gradient"], weight.grad)

    def test_fully_sharded(self, ranks, model_folder):
        model = parallel_ranks.load(model_folder, "gqa")
        for rank, found in enumerate(r["fsdp"] for r in ranks):
            inputs = parallel_ranks.inputs(rank)
            native = run(model, inputs["input_ids"], inputs["attention_mask"])
            with steerlens.steer(model, parallel_ranks.CASES["composed"], parallel_ranks.SPANS):
                expected = run(model, inputs["input_ids"], inputs["attention_mask"])
            assert close(found["fully_shard"], expected) and close(found["fsdp"], expected)
            assert close(found["captured"][0], native[0]) and not close(native, expected, 1e-2)


class TestShards:
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 1, 3, 8)

    def module(self, q_plan="colwise", k_plan="colwise", size=2, rows=32):
        mesh = SimpleNamespace(get_local_rank=lambda: 1, size=lambda: size)

        def linear(plan, rows):
            return SimpleNamespace(weight=torch.zeros(rows, 64), _hf_tp_plan=plan, _hf_device_mesh=mesh)

        return SimpleNamespace(q_proj=linear(q_plan, rows), k_proj=linear(k_plan, 8))

    def test_plain_shards(self):
        assert shards.first_head(self.module(), "layer 0", 8, 2, self.query, self.key) == 4

    @pytest.mark.parametrize(
        ("options", "heads", "message"),
        [
            ({"q_plan": "packed_colwise", "k_plan": "packed_colwise"}, (8, 2), "cannot be told"),
            ({"k_plan": "colwise_gather_output"}, (8, 2), "cannot be told"),
            ({"rows": 16}, (8, 2), "cannot be told"),
            ({}, (8, 1), "2 tensor-parallel processes do not split both evenly.*divides 1"),
            ({"size": 3}, (8, 2), "3 tensor-parallel processes"),
        ],
    )
    def test_refused(self, options, heads, message):
        with pytest.raises(UnsupportedError, match=f"4 query heads over 1 .*{message}"):
            shards.first_head(self.module(**options), "layer 0", *heads, self.query, self.key)


def by_wrapper(model):
    return torch.compile(model, backend="eager")


def by_method(model):
    model.compile(backend="eager")
    return model


def by_forward(model):
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def by_decoder(model):
    model.model.compile(backend="eager")
    return model


def by_decoder_forward(model):
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    return model


def by_layer(model):
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    return model


def by_layer_wrapper(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


class TestCompile:
    WAYS = (by_wrapper, by_method, by_forward, by_decoder, by_decoder_forward, by_layer, by_layer_wrapper)

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def compilations(self):
        return dict(torch._dynamo.utils.counters["frames"]), torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @pytest.mark.parametrize("way", WAYS)
    def test_compiled_and_run_before(self, prompts, caplog, way):
        """A graph made before the steering is left while it is on, and used again after it."""
        ids, mask = prompts("left")
        model, plain = build("llama-gqa"), build("llama-gqa")
        with steerlens.steer(plain, PASTA(0.05), SPANS):
            expected, steps = run(plain, ids, mask), decode(plain, ids, mask)
        compiled = way(model)
        native, own = run(compiled, ids, mask), model.model.__dict__.get("forward")
        assert self.compilations()[1] and close(native, run(plain, ids, mask), 1e-5)
        counts = []
        for _ in range(3):
            caplog.clear()
            with (
                caplog.at_level(logging.WARNING, "steerlens"),
                steerlens.steer(compiled, PASTA(0.05), SPANS) as steered,
            ):
                assert close(run(compiled, ids, mask), expected, 1e-5)
                assert close(decode(compiled, ids, mask), steps, 1e-5)
                assert [layer["calls"] for layer in steered.report().values()] == [1 + 6] * 3
            assert [r.message for r in caplog.records if r.name == "steerlens"] == [
                "steer(llama, pasta): the steered decoder runs eagerly, torch.compile is left out meanwhile"
            ]
            assert torch.equal(run(compiled, ids, mask), native) and model.model.__dict__.get("forward") is own
            counts.append(self.compilations())
        assert counts[1] == counts[2] and not close(native, expected, 1e-2)

    @pytest.mark.parametrize("way", [way for way in WAYS if way is not by_layer])
    def test_compiled_while_steered(self, prompts, way):
        ids, mask = prompts("left")
        plain = build("llama-gqa")
        native = run(plain, ids, mask)
        with steerlens.steer(plain, STRONG):
            expected = run(plain, ids, mask)
        model = build("llama-gqa")
        with steerlens.steer(model, STRONG):
            compiled = way(model)
            assert close(run(compiled, ids, mask), expected, 1e-5)
        assert close(run(compiled, ids, mask), native, 1e-5)

    def test_a_wrapper_that_steer_never_saw(self, prompts):
        ids, mask = prompts("left")
        model = build("llama-gqa")
        compiled = by_wrapper(model)
        native = run(compiled, ids, mask)
        with steerlens.steer(model.model, STRONG):
            expected = run(model, ids, mask)
            assert close(run(compiled, ids, mask), expected, 1e-5) and not close(native, expected, 1e-2)
        with steerlens.capture(compiled) as record:
            assert close(run(compiled, ids, mask), native, 1e-5)
        assert record[2].mass.shape[2] == ids.shape[1]

    @pytest.mark.parametrize("way", [by_wrapper, by_method, by_layer])
    @pytest.mark.parametrize("cache", [None, "static"])
    def test_no_compilation_per_decode_step(self, prompts, way, cache):
        ids, mask = prompts("left")
        compiled, counts = way(build("llama-gqa")), []

        def count(ids, scores):
            counts.append(self.compilations())
            return scores

        with steerlens.steer(compiled, STRONG) as steered:
            compiled.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=14,
                do_sample=False,
                cache_implementation=cache,
                logits_processor=[count],
            )
            assert steered.report()[0]["calls"] == len(counts) == 14
        # Prompt, first step, and a step whose lengths torch.compile takes for dynamic.
        assert counts[3] == counts[-1]
        if way is by_method:
            assert counts[-1][0]["ok"] > 0

    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_generate_that_compiles_its_decode_steps(self, prompts, caplog, fullgraph):
        """As with a static cache on an accelerator."""
        ids, mask = prompts("left")
        model, plain = build("llama-gqa"), build("llama-gqa")
        settings = CompileConfig(backend="eager", mode=None, fullgraph=fullgraph)
        settings._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": settings, **GREEDY}
        with steerlens.steer(plain, PASTA(0.05), SPANS):
            steps = decode(plain, ids, mask)
        native = torch.stack(model.generate(ids, attention_mask=mask, **options).logits)
        before = self.compilations()
        assert before[1], "transformers no longer compiles here: this test shows nothing"
        with caplog.at_level(logging.WARNING, "steerlens"), steerlens.steer(model, PASTA(0.05), SPANS):
            found = torch.stack(model.generate(ids, attention_mask=mask, **options).logits)
        assert close(found, steps) and self.compilations() == before
        assert len([r for r in caplog.records if r.name == "steerlens"]) == 1
        assert torch.equal(torch.stack(model.generate(ids, attention_mask=mask, **options).logits), native)
        assert self.compilations() == before and not close(native, steps, 1e-2)

    def test_fullgraph_is_refused(self, prompts):
        ids, mask = prompts("left")
        model = build("llama-gqa")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        native = run(compiled, ids, mask)
        for use in (lambda m: steerlens.steer(m, STRONG), steerlens.capture):
            with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM.*fullgraph=True"):
                use(compiled)
        with steerlens.steer(model, STRONG), pytest.raises(Exception, match=r"steerlens.*fullgraph=False"):
            run(compiled, ids, mask)
        assert torch.equal(run(compiled, ids, mask), native)

    def test_nothing_is_said_of_a_model_that_is_not_compiled(self, model_of, prompts, caplog):
        with caplog.at_level(logging.DEBUG, "steerlens"), steerlens.steer(model_of("llama-gqa"), STRONG):
            model_of("llama-gqa").generate(prompts()[0], max_new_tokens=2)
        assert not [r for r in caplog.records if r.name == "steerlens"]
