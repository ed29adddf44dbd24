"""QAdA's gate (methods/heads.md §6)."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from steerlens.cli import app
from steerlens.errors import UnsupportedError
from steerlens.examples import Example
from steerlens.measures import qada
from steerlens.measures.base import MeasureError
from steerlens.observing import joined

FAR = torch.tensor([[0.5, 1], [1.5, 0], [0, 0.5], [1, 1.5], [-0.5, 0.5], [0.5, -0.5]])
NEAR = torch.tensor([[3.0, 0], [1, 2], [2, -1]])


@pytest.mark.parametrize(
    ("query", "share", "true"), [((1, -0.5), 0.650797, 0.649363), ((0.2, 0.1), 0.378933, 0.378931)]
)
def test_oracle(query, share, true):
    query, scaling = torch.tensor(query), 2**-0.5
    mean, covariance = qada.moments(FAR)
    assert mean.tolist() == [0.5, 0.5]
    assert torch.allclose(covariance, 0.416667 * torch.eye(2), atol=1e-6)
    far = qada.log_far_mass(query, mean, covariance, 6, scaling)
    held = (NEAR @ query * scaling).logsumexp(-1)
    assert (held - far).sigmoid().item() == pytest.approx(share, abs=1e-6)
    assert (held - (FAR @ query * scaling).logsumexp(-1)).sigmoid().item() == pytest.approx(true, abs=1e-6)
    if share > 0.6:
        assert far.exp().item() == pytest.approx(8.155924, abs=1e-5)
        assert held.exp().item() == pytest.approx(15.199903, abs=1e-5)
        assert (held - far).item() == pytest.approx(0.622545, abs=1e-6)


def test_one_far_key_is_invisible_to_moments():
    """By design: a needle far back is what the estimate misses."""
    far = torch.zeros(1000, 2)
    far[500, 0] = 20
    mean, covariance = qada.moments(far)
    estimate = qada.log_far_mass(torch.tensor([1.0, 0]), mean, covariance, 1000, 1.0)
    assert estimate < math.log(1000) + 1 < far[:, 0].logsumexp(0)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "mistral"])
def test_shares_of_a_model(model_of, prompts, family):
    """The true share is that of the dense maps, in a padded batch too; query heads of a group are told apart."""
    model = model_of(family, "eager")
    ids, mask = prompts("left")
    gate = qada.Gate(model, 2, 4)
    with torch.no_grad(), joined(gate):
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        maps = model(ids, **given, output_attentions=True).attentions
    for layer, rows in gate.found.items():
        for row, (near, true) in enumerate(rows):
            weights = maps[layer][row, :, -1]
            seen = (weights[0] > 0).nonzero()[:, 0]
            far = seen[2 : len(seen) - 4]
            assert (1 - true - weights[:, far].sum(-1)).abs().max() < 1e-5
            assert near.unique().numel() == near.numel()


def test_bad_settings(model_of):
    with pytest.raises(MeasureError, match="threshold=1"):
        qada.measure(None, None, [Example("a")], threshold=1)
    capped = model_of("gemma2", "eager")
    with torch.no_grad(), joined(qada.Gate(capped, 2, 4)), pytest.raises(UnsupportedError, match="caps"):
        capped(torch.arange(3, 23)[None])


def test_the_command(tmp_path):
    file = tmp_path / "heads.json"
    found = CliRunner().invoke(app, ["heads", "qada", "--samples", "4", "--length", "64", "--output", str(file)])
    assert found.exit_code == 0, found.output
    saved = json.loads(file.read_text())
    assert set(saved["other"]) == {"true", "local"}
    assert len(saved["scores"]) == 48
    assert 0 <= saved["summary"]["local_share"] <= 1
    none = CliRunner().invoke(app, ["heads", "qada", "--samples", "2", "--length", "64", "--sink", "400"])
    assert none.exit_code == 1
    assert "longer prompts" in none.output
