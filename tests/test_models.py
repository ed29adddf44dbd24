import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from steerlens import models
from steerlens.models import ALIASES, ModelLoadError, ModelOptionError, load, resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({"</s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(path)
    return str(path)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(models, "hub_is_reachable", lambda: False)


def test_loads_ready_to_steer(folder):
    model, tokenizer = load(folder)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "</s>")
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    assert str(model.device).startswith(models.devices()[0])


@pytest.mark.parametrize(
    ("dtype", "found"), [("fp32", torch.float32), ("float16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_dtype(folder, dtype, found):
    assert load(folder, device="cpu", dtype=dtype)[0].dtype == found


def test_model_args_reach_the_loader_and_the_config(folder):
    model, _ = load(folder, model_args={"attn_implementation": "eager", "rms_norm_eps": 0.5})
    assert model.config._attn_implementation == "eager"
    assert model.config.rms_norm_eps == 0.5


def test_device_map_is_passed_on_and_nothing_moved(folder, monkeypatch):
    seen = {}
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: seen.update(kwargs) or original(*args, **kwargs),
    )
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda *args: pytest.fail("moved"))
    load(folder, device_map={"": "cpu"}, revision=None)
    assert seen["device_map"] == {"": "cpu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "flaot16"}, r"dtype 'flaot16' is unknown; allowed: .*did you mean 'float16'"),
        ({"device": "cdua"}, r"device 'cdua' is unknown; here: .*did you mean 'cuda'"),
        ({"device": "meta"}, r"device 'meta' is not available; here: .*cpu"),
        ({"device": "cpu", "device_map": "auto"}, r"exclude each other"),
        (
            {"model_args": {"load_in_4bits": True}},
            r"model option 'load_in_4bits' is unknown.*did you mean 'load_in_4bit'",
        ),
        ({"model_args": {"dtype": "x"}}, r"'dtype' has its own option, --dtype"),
        ({"model_args": {"bnb_4bit_quant_type": "nf4"}}, r"need load_in_4bit=true"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ModelOptionError, match=message):
        load(folder, **options)


def test_4bit_without_bitsandbytes_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install bitsandbytes"):
        load(folder, model_args={"load_in_4bit": True})


def test_4bit_makes_a_quantization_config(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "subfolder": "x"}
    config = models._quantized(arguments)["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert arguments == {"subfolder": "x"}


def test_unreachable_model_names_the_way_out(offline, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelLoadError) as caught:
        load("llama")
    text = str(caught.value)
    assert "\n" not in text
    assert all(
        part in text for part in ("llama (meta-llama/Llama-3.1-8B-Instruct)", "--model tiny", "local path", "HF_TOKEN")
    )


def test_mistyped_alias_names_the_nearest(offline):
    with pytest.raises(ModelLoadError, match="did you mean 'mistral'"):
        load("mistrall")


def test_missing_folder_and_empty_name(offline):
    with pytest.raises(ModelLoadError, match=r"'\./nowhere': there is no such folder.*--model tiny"):
        load("./nowhere")
    with pytest.raises(ModelOptionError, match="empty"):
        load(" ")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelLoadError, match=r"cannot be loaded.*--model tiny"):
        load(str(tmp_path))


def test_aliases(tmp_path, monkeypatch):
    assert {"llama", "qwen", "mistral", "deepseek", "gemma", "phi", "gpt2", "tiny"} <= set(ALIASES)
    assert resolve("qwen") == "Qwen/Qwen2.5-7B-Instruct"
    assert resolve("someone/model") == "someone/model"
    assert resolve("tiny").endswith("steerlens/tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen").mkdir()
    assert resolve("qwen") == "qwen"


def test_hub_probe_is_quick_and_honours_offline_mode(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert models.hub_is_reachable() is False
