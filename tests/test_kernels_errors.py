"""What the kernels do not have is refused by name, with what is allowed."""

import pytest
import torch
from kernel_cases import DEVICE, Labels, Make
from steerlens.kernels.attention import Law, attention
from steerlens.kernels.column_sums import column_sums

M = Make(2, 4, 2, 5, 9, 16)
BITS = torch.zeros(1, 1, 9, dtype=torch.bool, device=DEVICE)
TERM = Labels.of(terms=[BITS])
PAIR = Labels.of(group=BITS.int())


def zeros(*size, dtype=torch.float32, device=DEVICE):
    return torch.zeros(size, dtype=dtype, device=device)


def query(*size, **more):
    return {"query": zeros(*(size or (2, 4, 5, 16)), **more)}


def mask(*size, **more):
    return {"mask": zeros(*size, **more)}


SHARED = [
    (query(2, 4, 5), r"shape of query is \(2, 4, 5\); allowed: \[B, heads, T, head dim\]"),
    ({"key": zeros(9, 16)}, r"shape of key is \(9, 16\)"),
    ({"key": zeros(3, 2, 9, 16)}, r"shape of key .* allowed: \[2, a divisor of 4, Tk, 16\]"),
    ({"key": zeros(2, 3, 9, 16)}, r"shape of key .* a divisor of 4"),
    ({"key": zeros(2, 2, 9, 8)}, r"shape of key .* Tk, 16\]"),
    (query(2, 4, 5, 257), r"head dim of query is 257; allowed: 1 to 256"),
    (query(2, 4, 0, 16), r"number of rows or keys is \(0, 9\); allowed: at least 1"),
    (query(dtype=torch.float64), r"dtype of query is torch.float64; allowed: bfloat16, float16, float32"),
    (
        {"key": zeros(2, 2, 9, 16, dtype=torch.float16)},
        r"key \(torch.float16 on .*\) is not like query; allowed: torch.float32",
    ),
    (query(device="meta"), r"device of query is meta; allowed: cuda; or cpu with TRITON_INTERPRET=1"),
    ({"scaling": 0.0}, r"scaling is 0.0; allowed: a finite number > 0"),
    ({"scaling": float("inf")}, r"scaling is inf"),
    ({"window": 0}, r"window is 0; allowed: at least 1"),
    ({"softcap": 0.0}, r"softcap is 0.0; allowed: > 0, or None"),
    (mask(2, 4, 5, 8, dtype=torch.bool), r"shape of mask is \(2, 4, 5, 8\); allowed: \[2, 4, 5, 9\]"),
    (mask(5, 9, dtype=torch.bool), r"shape of mask is \(5, 9\)"),
    (mask(1, 1, 1, 9), r"shape of mask is \(1, 1, 1, 9\); allowed: \[B or 1, H or 1, 5, 9\]"),
    (mask(1, 1, 5, 9, dtype=torch.int64), r"dtype of mask is torch.int64; allowed: torch.bool"),
    (mask(1, 1, 5, 9, device="meta"), r"device of mask is meta; allowed: (cpu|cuda:0), as query"),
    ({**mask(1, 1, 5, 9), "window": 3}, r"window beside a mask is 3; allowed: None"),
    ({"labels": Labels.of(hidden=BITS[..., :8])}, r"shape of labels is \(1, 1, 8\); allowed: \[2, 4, 9\]"),
    ({"labels": Labels.of(hidden=BITS[..., :1])}, r"number of labels is 1; allowed: 9, one for each key"),
    ({"labels": Labels.of(hidden=BITS.expand(3, 1, 9))}, r"shape of labels is \(3, 1, 9\)"),
    ({"labels": Labels(BITS.int().long())}, r"dtype of labels is torch.int64; allowed: torch.uint8, torch.int32"),
    ({"labels": Labels.of(hidden=BITS.to("meta"))}, r"device of labels is meta"),
    ({"labels": TERM, "bias": zeros(1, 1, 1, 2)}, r"number of biases is 2; allowed: 1, one for each term"),
    ({"bias": zeros(1, 1, 1, 1)}, r"number of biases is 1; allowed: 0"),
    ({"labels": TERM, "bias": zeros(1, 4, 4, 1)}, r"shape of bias is \(1, 4, 4, 1\); allowed: \[2, 4, 5, -1\]"),
    ({"labels": TERM, "bias": zeros(1, 1, 1, 1, dtype=torch.float16)}, r"dtype of bias .* allowed: torch.float32"),
    ({"heads": zeros(2)}, r"dtype of heads is torch.float32; allowed: torch.int32"),
    ({"heads": zeros(1, 2, dtype=torch.int32)}, r"shape of heads is \(1, 2\)"),
    ({"heads": zeros(2, dtype=torch.int32, device="meta")}, r"device of heads is meta"),
]
ATTENTION = [
    ({"value": zeros(2, 2, 8, 16)}, r"shape of value is \(2, 2, 8, 16\); allowed: \[2, 2, 9\] and a head dim"),
    ({"value": zeros(2, 2, 9, 300)}, r"head dim of value is 300; allowed: 1 to 256"),
    ({"sinks": zeros(2)}, r"shape of sinks is \(2,\); allowed: \[4\]"),
    ({"sinks": zeros(1)}, r"shape of sinks is \(1,\); allowed: \[4\]"),
    ({"sinks": zeros(4, device="meta")}, r"device of sinks is meta"),
    ({"labels": TERM}, r"bias is None; allowed: a table for the 1 terms"),
    ({"cut": zeros(1, 4, 1)}, r"dtype of cut is torch.float32; allowed: torch.int8"),
    ({"cut": zeros(1, 3, 1, dtype=torch.int8)}, r"shape of cut is \(1, 3, 1\); allowed: \[2, 4, 5\]"),
    ({"stats": ("lse", "maximum")}, r"stat is 'maximum'; allowed: lse, lse_before, entropy, argmax, mass"),
    ({"output": False}, r"output is False; allowed: True, unless statistics are wanted"),
    ({"labels": PAIR}, r"law is None; allowed: a law for the 2 groups of the labels"),
    ({"law": Law("transfer", zeros(1, 1, 2, 2))}, r"groups of the labels is 1; allowed: 2 to 4 for the law 'transfer'"),
    ({"labels": PAIR, "law": Law("move")}, r"kind of law is 'move'; allowed: transfer, reach, spotlight, raw"),
    ({"labels": PAIR, "law": Law("reach")}, r"table of the law is None; allowed: fp32 parameters"),
    ({"labels": PAIR, "law": Law("raw")}, r"law 'raw' with groups, terms is \(2, 0\)"),
    ({"law": Law("raw")}, r"law 'raw' with groups, terms is \(1, 0\); allowed: one group, some terms"),
    (
        {"labels": PAIR, "law": Law("transfer", zeros(1, 4, 3, 3))},
        r"shape of table of the law 'transfer' is \(1, 4, 3, 3\); allowed: \[2, 4, 2, 2\]",
    ),
    (
        {"labels": PAIR, "law": Law("transfer", zeros(1, 4, 1, 2))},
        r"table of the law 'transfer' is \(1, 4, 1, 2\); allowed: \[B or 1, H or 1, 2, 2\]",
    ),
    ({"labels": PAIR, "law": Law("reach", zeros(1, 3))}, r"shape of table of the law 'reach' is \(1, 3\)"),
    ({"labels": PAIR, "law": Law("reach", zeros(1, 1, dtype=torch.float16))}, r"dtype of table of the law 'reach'"),
    ({"labels": PAIR, "law": Law("reach", zeros(1, 1, device="meta"))}, r"device of table of the law 'reach' is meta"),
    (
        {"labels": PAIR, "law": Law("reach", zeros(1, 1), rows=zeros(2, 4, dtype=torch.bool))},
        r"shape of rows of the law is \(2, 4\); allowed: \[2, 5\]",
    ),
    (
        {"labels": PAIR, "law": Law("reach", zeros(1, 1), rows=zeros(2, 5))},
        r"dtype of rows of the law is torch.float32",
    ),
    (
        {
            "labels": Labels.of(group=BITS.int(), terms=[BITS]),
            "bias": zeros(1, 1, 1, 1),
            "law": Law("reach", zeros(1, 1)),
            "stats": ("lse_before",),
        },
        r"stat 'lse_before' with groups is 2; allowed: one group, or no terms",
    ),
]
COLUMNS = [
    ({"lse": zeros(2, 4, 4)}, r"lse is torch.float32 \(2, 4, 4\); allowed: float32 \[2, 4, 5\]"),
    ({"lse": zeros(2, 4, 5, dtype=torch.float64)}, r"lse is torch.float64"),
    ({"lse": zeros(2, 4, 5, device="meta")}, r"device of lse is meta"),
    ({"counted": zeros(2, 4, dtype=torch.bool)}, r"shape of counted rows is \(2, 4\); allowed: \[2, 5\]"),
    ({"counted": zeros(2, 5)}, r"dtype of counted rows is torch.float32; allowed: torch.bool"),
]


def ids(cases):
    return [said[:40] for _, said in cases]


@pytest.mark.parametrize(("changed", "said"), SHARED + ATTENTION, ids=ids(SHARED + ATTENTION))
def test_attention_names_the_tensor_and_the_limit(changed, said):
    query, key, value = M.qkv()
    with pytest.raises(ValueError, match=said):
        attention(**{"query": query, "key": key, "value": value, **changed})


@pytest.mark.parametrize(("changed", "said"), SHARED + COLUMNS, ids=ids(SHARED + COLUMNS))
def test_column_sums_name_the_tensor_and_the_limit(changed, said):
    query, key, _ = M.qkv()
    lse = zeros(2, changed["heads"].shape[0] if "heads" in changed else 4, changed.get("query", query).shape[2])
    with pytest.raises(ValueError, match=said):
        column_sums(**{"query": query, "key": key, "lse": lse, **changed})


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_gradients_are_refused(which):
    tensors = dict(zip(("query", "key", "value"), M.qkv(), strict=True))
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward: call them without gradients, or use 'sdpa'"):
        attention(**tensors)
    with torch.no_grad():
        assert not attention(**tensors).output.requires_grad


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU computes bfloat16 rightly")
def test_the_interpreter_refuses_bfloat16():
    tensors = [x.bfloat16() for x in M.qkv()]
    with pytest.raises(ValueError, match=r"dtype of query is torch.bfloat16; .*interpreter computes bfloat16 wrongly"):
        attention(*tensors)
    with pytest.raises(ValueError, match="bfloat16 wrongly"):
        column_sums(*tensors[:2], zeros(2, 4, 5))


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels run on this GPU")
def test_a_cpu_needs_the_interpreter(monkeypatch):
    from steerlens.kernels import _launch

    monkeypatch.setattr(_launch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="device of query is cpu; allowed: cuda; or cpu with TRITON_INTERPRET=1"):
        attention(*M.qkv())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({}, "labels need a group table, a table of hidden keys or a term"),
        ({"hidden": BITS[0]}, r"a label table is \(1, 9\); allowed: \[B or 1, H or 1, Tk\]"),
        ({"group": BITS.int(), "groups": 5}, "groups is 5; allowed: 1 to 4; more groups: measure masses"),
        ({"group": BITS.int(), "groups": 0}, "groups is 0; allowed: 1 to 4"),
        ({"terms": [BITS] * 29}, "number of terms is 29; allowed: up to 28"),
    ],
    ids=["nothing", "axes", "groups", "no groups", "terms"],
)
def test_labels_that_do_not_fit_their_bits_are_refused(made, said):
    with pytest.raises(ValueError, match=said):
        Labels.of(**made)
