"""Steering wherever the weights are: several devices, offloaded, quantised, on devices without float64."""

import importlib.util

import pytest
import torch
from small_models import build
from steerlens.evals.families import tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import steerlens
from steerlens import lower, selfcheck
from steerlens.methods import ACT, PASTA, VAR, HeadMask, MassiveActivations, PerRow, ZeroTuning
from steerlens.passes import Prompt

SPANS = [[(8, 10)], [(9, 12)], [(8, 11)]]
METHODS = {
    "zerotuning": ZeroTuning(9.0),
    "pasta": PASTA(0.05),
    "act": ACT(0.3, 0.08),
    "act-relative": ACT(0.3, 2.0, threshold_mode="relative"),
    "act-running": ACT(0.3, 0.08, decode="running"),
    "uniform": HeadMask("0-2:1,5"),
    "zero": HeadMask("0-2:1,5", mode="zero"),
    "decode": HeadMask("0-2:*", phase="decode"),
    "per_row": PerRow([ZeroTuning(9.0), PASTA(0.05), None]),
    "composed": [ACT(0.3, 0.08), ZeroTuning(4.0), HeadMask("1:2")],
    "var": VAR([*range(64)], 2.5, 0.6, 0.0, 0.0, 0, group="emphasis"),
    "massive_activations": MassiveActivations(1, (3, 7), (2.0, -2.0), (-2.0, 2.0), least=1e-3, ratio=1e-3),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@torch.no_grad()
def both(model, ids, mask):
    """Logits of the prompt, and of every generated token."""
    steps = torch.stack(model.generate(ids, attention_mask=mask, **GREEDY).logits)
    return model(ids, attention_mask=mask).logits, steps


def real_close(one, other, mask, bound=1e-4):
    """A pad row sees nothing, and what it holds means nothing."""
    prompt = ((one[0] - other[0]) * mask[..., None]).abs().max() <= bound * other[0].abs().max()
    return prompt and (one[1] - other[1]).abs().max() <= bound * other[1].abs().max()


class TestOffload:
    WAYS = ("cpu", "disk", "from_pretrained", "layers")

    def placed(self, way, tmp_path):
        from accelerate import cpu_offload, disk_offload, dispatch_model

        model = build("llama-gqa")
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        if way == "cpu":
            return cpu_offload(model, execution_device="cpu")
        if way == "disk":
            return disk_offload(model, tmp_path / "offload", execution_device="cpu")
        if way == "layers":
            return dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True)
        model.save_pretrained(tmp_path / "model")
        found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        ).eval()
        found.generation_config.eos_token_id = None
        return found

    @pytest.mark.parametrize("method", ["pasta", "act", "composed"])
    @pytest.mark.parametrize("way", WAYS)
    def test_offloaded_layers(self, model_of, prompts, tmp_path, way, method):
        ids, mask = prompts("left")
        plain, model = model_of("llama-gqa"), self.placed(way, tmp_path)
        assert any(p.device.type == "meta" for p in model.parameters())
        native, forward = both(model, ids, mask), model.model.__dict__.get("forward")
        with steerlens.steer(plain, METHODS[method], SPANS):
            expected = both(plain, ids, mask)
        with steerlens.steer(model, METHODS[method], SPANS) as steered, steerlens.capture(model, SPANS) as record:
            model(ids, attention_mask=mask)
        assert steered.report()[1]["calls"] == 1 and record[2].mass.shape[:3] == (3, 8, 20)
        with steerlens.steer(model, METHODS[method], SPANS):
            assert real_close(both(model, ids, mask), expected, mask)
        assert torch.equal(both(model, ids, mask)[0], native[0]) and model.model.__dict__.get("forward") is forward
        assert not real_close(native, expected, mask, 1e-2)


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_offloaded_models_pass_the_self_check(way, prompts, tmp_path, monkeypatch):
    from accelerate import cpu_offload, disk_offload

    monkeypatch.setattr(selfcheck, "_passed", set())
    (ids, mask), found = prompts("left"), []
    for model in (tiny("starcoder2"), tiny("starcoder2")):
        if found:
            places = {"execution_device": "cpu"}
            cpu_offload(model, **places) if way == "cpu" else disk_offload(model, tmp_path, **places)
        with torch.no_grad(), steerlens.steer(model, METHODS["act"]):
            found.append(model(ids, attention_mask=mask).logits[mask.bool()])
        selfcheck._passed.clear()
    assert next(model.parameters()).device.type == "meta" and torch.equal(*found)


class Answers(TorchDispatchMode):
    """What fake tensors cannot answer: `all` is False, `any` True, counts 4 and masses 0.3."""

    last = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default:
            if args[0].dtype == torch.bool:
                return self.last is aten.any.default
            return 0.3 if args[0].is_floating_point() else 4
        if function in (aten.any.default, aten.all.default):
            self.last = function
        return function(*args, **(kwargs or {}))


FIRST, SECOND = torch.device("cpu"), torch.device("cpu:1")
"""Fake tensors keep the two apart and refuse to mix them; real ones know one CPU only."""


def place(module, device):
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)

    def moved(x):
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def enter(module, args, kwargs):
        return moved(args), {name: moved(x) for name, x in kwargs.items()}

    module.register_forward_pre_hook(enter, with_kwargs=True)


class TestSeveralDevices:
    @pytest.fixture
    def fake(self, monkeypatch):
        """Fake tensors, among which `torch.tensor` respects the device too."""
        make = torch.tensor

        def tensor(*args, device=None, **kwargs):
            found = make(*args, **kwargs)
            return found if device is None else torch.empty(found.shape, dtype=found.dtype, device=device)

        lower._tensor.cache_clear()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            monkeypatch.setattr(torch, "tensor", tensor)
            yield
        lower._tensor.cache_clear()

    def spread(self, family):
        model = build(family, "eager" if family == "gemma2" else "sdpa")
        for layer in model.model.layers[1:]:
            place(layer, SECOND)
        place(model.model.norm, FIRST)
        return model

    def test_devices_are_told_apart(self, fake):
        """Without this the tests below show nothing."""
        with pytest.raises(RuntimeError, match="device"):
            torch.zeros(3, device=FIRST) + torch.zeros(3, device=SECOND)

    @pytest.mark.parametrize(
        ("family", "backend"),
        [("llama-gqa", "auto"), ("llama-gqa", "reference"), ("mistral", "auto"), ("gemma2", "auto")],
    )
    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_no_tensor_on_another_device(self, fake, family, backend, method):
        model = self.spread(family)
        ids = torch.ones(3, 20, dtype=torch.long)
        with (
            Answers(),
            steerlens.steer(model, method, SPANS, backend=backend, report="mass") as steered,
            steerlens.capture(model, SPANS) as record,
        ):
            for mask in (torch.ones(3, 21, dtype=torch.long), None):
                output = model(ids, attention_mask=None if mask is None else mask[:, :20])
                cache = output.past_key_values
                assert model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits.device == FIRST
        assert [record[n].mass.device for n in range(3)] == [FIRST, SECOND, SECOND]
        assert all(layer["calls"] == 4 for layer in steered.report().values())

    @pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma2"])
    def test_masks_copied_for_every_layer(self, prompts, family):
        """Layers on a further device get copies of the masks, whose addresses are those of copies freed before."""
        ids, mask = prompts("left")
        model, spread = build(family, "eager"), build(family, "eager")
        for layer in spread.model.layers:
            copies = {"hook": lambda module, args, kwargs: (args, {k: copied(x) for k, x in kwargs.items()})}
            layer.register_forward_pre_hook(copies["hook"], with_kwargs=True)

        def copied(x):
            return x.clone() if isinstance(x, torch.Tensor) else x

        for method in ("zerotuning", "act"):
            with steerlens.steer(model, METHODS[method], SPANS), steerlens.steer(spread, METHODS[method], SPANS):
                assert real_close(both(spread, ids, mask), both(model, ids, mask), mask, 1e-6)

    def test_a_mask_of_its_own_for_one_layer(self, prompts):
        ids, mask = prompts("left")
        model = build("llama-gqa")

        def hide(module, args, kwargs):
            hidden = kwargs["attention_mask"].clone()
            hidden[..., 9] = False
            return args, kwargs | {"attention_mask": hidden}

        model.model.layers[1].register_forward_pre_hook(hide, with_kwargs=True)
        with torch.no_grad(), steerlens.capture(model, [[(9, 10)]] * 3, stats=("mass",)) as record:
            model(ids, attention_mask=mask)
        assert record[1].mass[:, :, 10:].max() == 0 and record[2].mass[:, :, 10:].min() > 0

    def test_rows_that_move(self):
        """After beams reorder the rows, the copy on the second device is of the new rows."""
        prompt = Prompt.start(4, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool(), 2, FIRST)
        meta = torch.device("meta")
        assert prompt.on(meta) is prompt.on(meta) and prompt.on(meta).first.device == meta
        assert prompt.on(meta).sinks is prompt.sinks
        moved = prompt.select(torch.tensor([1, 1, 0]))
        assert moved.on(meta).batch == 3 and moved.on(meta).origin.device == meta


class TestQuantized:
    @pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (steerlens[dev])"
    )
    @pytest.mark.parametrize("bits", [8, 4])
    def test_quantized_weights(self, prompts, tmp_path, bits):
        ids, mask = prompts("left")
        plain = build("llama-gqa", num_key_value_heads=4, intermediate_size=128)
        plain.save_pretrained(tmp_path)
        wanted = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = BitsAndBytesConfig(**wanted, bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
        model.generation_config.eos_token_id = None
        assert model.model.layers[0].self_attn.q_proj.weight.dtype != torch.float32

        @torch.no_grad()
        def forced(model):
            """Prompt, then two given tokens; the layers round to 8 or 16 bits, which may tip a greedy one."""
            longer = torch.cat([mask, torch.ones_like(mask[:, :2])], 1)
            output = model(ids, attention_mask=mask)
            found = [output.logits]
            for step in (1, 2):
                output = model(
                    ids[:, :1] * 0 + 5, attention_mask=longer[:, : 20 + step], past_key_values=output.past_key_values
                )
                found.append(output.logits)
            return found[0], torch.cat(found[1:], 1)

        native = forced(model)
        assert not real_close(native, forced(plain), mask, 1e-3)
        for method in METHODS.values():
            found = []
            for backend in ("reference", "sdpa"):
                with steerlens.steer(model, method, SPANS, backend=backend):
                    found.append(forced(model))
            assert real_close(*found, mask, 2e-2)
            assert not real_close(native, found[0], mask, 5e-2)
        with steerlens.steer(model, [ZeroTuning(1.0), ACT(1.0)]):
            assert all(map(torch.equal, forced(model), native))


class NoFloat64(TorchDispatchMode):
    """As on mps and on many an xpu."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{function} made a {tensor.dtype} tensor; mps has none")
        return output


class TestNoFloat64:
    def test_it_is_noticed(self):
        with NoFloat64(), pytest.raises(TypeError, match="float64"):
            torch.zeros(3).double()

    @pytest.mark.parametrize(
        ("family", "dtype", "backend"),
        [
            ("llama-gqa", torch.float32, "sdpa"),
            ("llama-gqa", torch.float16, "reference"),
            ("mistral", torch.bfloat16, "sdpa"),
            ("gemma2", torch.bfloat16, "auto"),
        ],
    )
    def test_methods_and_capture(self, prompts, family, dtype, backend):
        ids, mask = prompts("left")
        model = build(family, "eager" if family == "gemma2" else "sdpa", dtype)
        for method in METHODS.values():
            with (
                NoFloat64(),
                torch.no_grad(),
                steerlens.steer(model, method, SPANS, backend=backend, report="mass") as steered,
                steerlens.capture(model, SPANS),
            ):
                model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
                steered.report()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_after_inference_mode(model_of, prompts, method):
    """What is kept between forwards was not made of inference tensors, which autograd refuses."""
    ids, mask = prompts("left")
    model = model_of("llama-gqa")
    lower._tensor.cache_clear()
    with steerlens.steer(model, method, SPANS):
        with torch.inference_mode():
            model(ids, attention_mask=mask)
        model(ids, attention_mask=mask).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    model.zero_grad()
