"""Projections of single heads against what attention modules compute, and MAPS; methods/heads.md §7.3."""

import json

import pytest
import torch
from small_models import FAMILIES, build
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from steerlens import decoder, models
from steerlens.errors import MethodError, UnsupportedError
from steerlens.examples import ExampleError
from steerlens.measures import maps
from steerlens.observing import Observer
from steerlens.projections import FORMS, Projections

MORE = {
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "olmo": ("olmo", {"num_key_value_heads": 4}),
    "cohere": ("cohere", {"num_key_value_heads": 4}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "stablelm": ("stablelm", {"num_key_value_heads": 4}),
    "starcoder2": ("starcoder2", {"num_key_value_heads": 2}),
}
COVERED = [*FAMILIES, *MORE]


class Seen(Observer):
    """Values [B, G, Tk, D] and outputs [B, Tq, H, D] of each layer."""

    def __init__(self, model):
        super().__init__(model)
        self.values, self.outputs = {}, {}

    def observe(self, layer, call, now):
        self.values[layer] = call.value

    def output(self, layer, output, now):
        self.outputs[layer] = output


@pytest.fixture
def any_model(model_of, monkeypatch):
    def get(family):
        if family in FAMILIES:
            return model_of(family, "eager")
        monkeypatch.setitem(FAMILIES, family, MORE[family])
        return build(family, "eager")

    return get


@pytest.mark.parametrize("family", COVERED)
@torch.no_grad()
def test_heads_add_up_to_their_module(family, any_model, prompts):
    model, (ids, _) = any_model(family), prompts()
    found, (facts, modules) = Projections(model), decoder.read(decoder.find(model))
    given, given_out, gave, hooks = {}, {}, {}, []
    for layer, module in modules.items():

        def keep(m, args, kwargs, result, layer=layer):
            given[layer] = args[0] if args else kwargs["hidden_states"]
            gave[layer] = result[0]

        def keep_out(m, args, layer=layer):
            given_out[layer] = args[0]

        hooks.append(module.register_forward_hook(keep, with_kwargs=True))
        hooks.append(getattr(module, found.form.output).register_forward_pre_hook(keep_out))
    with Seen(model) as seen:
        model(ids)
    for hook in hooks:
        hook.remove()
    for layer in facts.attention_layers:
        module, heads = modules[layer], facts.heads[layer]
        parts = seen.outputs[layer]
        if found.form.indirect and "gate" in found.form.indirect:
            parts = given_out[layer].view(parts.shape)
        total = sum(parts[:, :, h] @ found.output(layer, h) for h in range(heads))
        bias = getattr(module, found.form.output).bias
        total = total if bias is None else total + bias
        assert (total - gave[layer]).abs().max() <= 1e-5 * gave[layer].abs().max()
        if found.form.indirect:
            with pytest.raises(UnsupportedError, match="has no W_V W_O"):
                found.value(layer, 0)
            continue
        values = seen.values[layer].repeat_interleave(heads // facts.kv_heads[layer], 1)
        for h in range(heads):
            # biases are the same for every token
            ours = given[layer] @ found.value(layer, h)
            apart = values[:, h] - ours
            assert (apart - apart[:1, :1]).abs().max() <= 1e-5 * values.abs().max()


@pytest.mark.parametrize("family", [f for f in COVERED if f not in ("deepseek_v3", "qwen3_next")])
@torch.no_grad()
def test_the_first_mlp_is_what_the_layer_adds(family, any_model, monkeypatch):
    """With attention taken out, the first layer adds its MLP, but for a norm or a factor behind it."""
    model = any_model(family)
    base = decoder.find(model)
    _, modules = decoder.read(base)
    layer = next(m for m in base.modules() if any(child is modules[0] for child in m.children()))
    x = torch.randn(1, 6, 64)
    monkeypatch.setattr(modules[0], "forward", lambda *a, **k: (torch.zeros_like(x), None))
    out = layer(x, attention_mask=None)
    added = (out[0] if isinstance(out, tuple) else out) - x
    ours = Projections(model).mlp()(x[0])
    if norm := getattr(layer, "post_feedforward_layernorm", None):
        ours = norm(ours)
    assert (added[0] - ours * getattr(layer, "residual_multiplier", 1)).abs().max() <= 1e-4 * added.abs().max()


def test_every_form_is_tested():
    assert set(FORMS) == {(FAMILIES | MORE)[name][0] for name in COVERED}


def test_what_is_not_known_is_refused(model_of, monkeypatch):
    model = model_of("llama-gqa")
    monkeypatch.delitem(FORMS, "llama")
    with pytest.raises(UnsupportedError, match=r"'llama': where .* is not known; known: cohere, .*gpt_neox"):
        Projections(model)


def test_weights_that_are_no_matrices_are_refused():
    class Linear4bit(torch.nn.Linear):
        pass

    model = build("llama-gqa")
    attention = model.model.layers[1].self_attn
    attention.v_proj = Linear4bit(64, 16)
    with pytest.raises(UnsupportedError, match=r"layer 1 of llama: v_proj is .*Linear4bit.*load the model unquantised"):
        Projections(model).value(1, 0)
    attention.o_proj.to("meta")
    with pytest.raises(UnsupportedError, match=r"o_proj is offloaded: .*without --device-map"):
        Projections(model).output(1, 0)


class TestMaps:
    E = torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 1]])
    VO = torch.tensor([[0, 1], [1, 0.5]])
    U = torch.tensor([[1.0, 0, 2, -1], [0, 1, 1, 2]])

    @pytest.mark.parametrize(("k", "score", "suppression"), [(1, 0.5, 0), (2, 1.0, 0.25)])
    def test_oracle(self, k, score, suppression):
        rows, targets = (self.E @ self.VO @ self.U), torch.tensor([1, 2, 2, 0])
        expected = [[0, 1, 1, 2], [1, 0.5, 2.5, 0], [1, 1.5, 3.5, 2], [1, -0.5, 1.5, -2]]
        assert torch.equal(rows, torch.tensor(expected))
        assert maps.hits(rows, targets, k).float().mean() == score
        assert maps.hits(-rows, targets, k).float().mean() == suppression

    def test_of_equal_tokens_the_lower_index_comes_first(self):
        rows = torch.tensor([[1.0, 2, 2, 2]] * 4)
        assert maps.ranks(rows, torch.tensor([1, 2, 3, 0])).tolist() == [0, 1, 2, 3]

    def test_salience(self):
        found = maps.salience(self.E, self.E @ self.VO)
        assert (found - torch.tensor([1, 1.118034, 1.274755, 0.790569])).abs().max() < 1e-6

    @pytest.mark.parametrize("embedding", ["mlp", "raw"])
    def test_measure_is_the_definition(self, embedding, model_of, monkeypatch):
        model = model_of("llama-gqa")
        monkeypatch.setattr(maps, "BLOCK", 97 * 5)  # several blocks
        pairs = {"next": [(n, n + 1) for n in range(3, 30)], "copying": [(n, n) for n in range(40, 47)]}
        found = maps.measure(model, pairs, k=20, embedding=embedding)
        weights = model.get_input_embeddings().weight.detach()
        first = model.model.layers[0]
        with torch.no_grad():
            later = weights if embedding == "raw" else first.mlp(first.post_attention_layernorm(weights))
        for (layer, head), got in found.scores.items():
            attention, g = model.model.layers[layer].self_attn, head // 4
            vo = attention.v_proj.weight[8 * g : 8 * g + 8].T @ attention.o_proj.weight[:, 8 * head : 8 * head + 8].T
            m = (weights if layer == 0 else later) @ vo.detach() @ model.lm_head.weight.T.detach()
            for name, sign, values in (("score", 1, got), ("off", -1, found.other["suppression"][layer, head])):
                top = (sign * m).topk(20, dim=-1).indices
                share = [sum(bool((top[s] == t).any()) for s, t in ids) / len(ids) for ids in pairs.values()]
                assert values == pytest.approx(share, abs=1e-5), name
        one = maps.measure(model, pairs, k=20, embedding=embedding, relation="copying")
        assert one.scores[1, 2] == (found.scores[1, 2][1],)
        assert found.summary["pairs"] == {"next": 27, "copying": 7}

    def test_refusals(self, model_of):
        pairs = {"copying": [(3, 3)]}
        with pytest.raises(UnsupportedError, match="a gate lies between"):
            maps.measure(model_of("qwen3_next"), pairs)
        with pytest.raises(UnsupportedError, match="has no unembedding"):
            maps.measure(model_of("llama-gqa").model, pairs)
        with pytest.raises(MethodError, match=r"no relation 'x'; the pairs have: copying"):
            maps.measure(model_of("llama-gqa"), pairs, relation="x")

    def test_pairs(self, tmp_path):
        _, tokenizer = models.load("tiny", "cpu")
        file = tmp_path / "pairs.jsonl"
        rows = [("color", "red", "blue"), ("color", "red", "notaword"), ("none", "notaword", "red")]
        file.write_text(
            "\n".join(json.dumps(dict(zip(("relation", "source", "target"), r, strict=True))) for r in rows)
        )
        texts = maps.read(file)
        found = maps.single_tokens(tokenizer, texts)
        assert list(found) == ["color"] and len(found["color"]) == 1
        assert tokenizer.convert_ids_to_tokens(list(found["color"][0])) == ["Ġred", "Ġblue"]
        with pytest.raises(ExampleError, match="none of the 1 pairs"):
            maps.single_tokens(tokenizer, {"none": texts["none"]})
        file.write_text('{"relation": "color", "source": "red"}')
        with pytest.raises(ExampleError, match=r"pairs.jsonl:1: .*three texts"):
            maps.read(file)
        everything = {token for token, _ in maps.copying(tokenizer, 10**6, 0)["copying"]}
        assert everything | set(tokenizer.all_special_ids) == set(tokenizer.get_vocab().values())
        assert not everything & set(tokenizer.all_special_ids)
        one, other = (maps.copying(tokenizer, 20, seed) for seed in (0, 1))
        assert one != other and all(s == t for s, t in one["copying"]) and len(one["copying"]) == 20

    def test_pairs_of_a_tokenizer_that_puts_a_space_in_front(self):
        pieces = [(piece, -1.0) for piece in ("<unk>", "▁", "▁red", "▁blue", "red", "x")]
        inner = Tokenizer(Unigram(pieces, unk_id=0))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        assert maps.single_tokens(tokenizer, {"r": [("red", "blue"), ("red", "x")]}) == {"r": [(2, 3)]}
