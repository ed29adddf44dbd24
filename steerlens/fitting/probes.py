"""Directions of truth in head outputs, and how well single heads tell it: ITI (arXiv 2306.03341), NL-ITI (2403.18680).

An example with an answer and alternatives gives one true text and as many false ones: the prompt with each behind it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steerlens import decoder
from steerlens.encoding import encode
from steerlens.errors import UnsupportedError
from steerlens.examples import Example, ExampleError
from steerlens.measures.base import describe, forward, require
from steerlens.measures.responses import answer_ids, check_room
from steerlens.observing import Observer
from steerlens.vectors import VectorFile
from steerlens.wrapping import unwrap

if TYPE_CHECKING:
    from steerlens.passes import Pass

PROBE_BATCH = 64


@dataclass(frozen=True)
class Activations:
    """Head outputs of labelled texts.

    Attributes:
        values: fp32 [N, H, D] per layer, on the CPU.
        true: bool [N].
        example: which example a text is of, int64 [N].
    """

    values: dict[int, torch.Tensor]
    true: torch.Tensor
    example: torch.Tensor


class Outputs(Observer):
    """Keeps the mean of head outputs over the last real rows of each batch row, as many as `counts` says."""

    name = "steerlens.fitting"

    def __init__(self, model: Any, counts: Sequence[int]) -> None:
        super().__init__(model)
        self._counts = counts
        self.found: dict[int, torch.Tensor] = {}

    def output(self, layer: int, output: torch.Tensor, now: Pass) -> None:
        """Keep what an attention call gives."""
        facts = self._engine.facts
        if layer in self.found or output.shape[2] != facts.heads[layer]:
            raise UnsupportedError(
                f"layer {layer} of {facts.name} gives {output.shape[2]} of its {facts.heads[layer]} heads here, or "
                "gives them twice (tensor parallelism, differential attention): directions of heads cannot be fitted"
            )
        rows = zip(output.detach().float(), self._counts, strict=True)
        self.found[layer] = torch.stack([last_mean(row, count) for row, count in rows]).cpu()


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] over their L2 norms; a zero vector stays."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, vectors / norm.clamp(min=torch.finfo(vectors.dtype).tiny), vectors)


def mass_mean(values: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """From the mean of false to the mean of true activations, unit vectors [H, D] of [N, H, D] and bool [N]."""
    return unit(values[true].mean(0) - values[~true].mean(0))


def deviation(values: torch.Tensor, directions: torch.Tensor, ddof: int = 0) -> torch.Tensor:
    """Standard deviation of activations [N, H, D] along directions [H, D], [H]."""
    return (values * directions).sum(-1).std(0, correction=ddof)


def last_mean(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Mean over the last `count` of tokens [T, ...], or over all of them where there are fewer."""
    return tokens[-count:].mean(0)


def activations(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    last: int,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
    what: str = "iti",
) -> Activations:
    """Head outputs of each example's answer and alternatives, mean over the `last` answer tokens or all there are.

    Raises:
        ExampleError: for an example without an answer or an alternative, or one that is too long.
    """
    require(what, examples, answer=True)
    for number, example in enumerate(examples, 1):
        if not example.alternatives:
            raise ExampleError(f"{what} needs 'alternatives', wrong answers, in every example; {number} has none")
    base = decoder.find(unwrap(model))
    shared = decoder.read(base)[0].keys_of
    found: dict[int, list[torch.Tensor]] = {}
    true: list[bool] = []
    of: list[int] = []
    texts = list(_texts(model, tokenizer, examples))
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        width = max(len(tokens) for _, _, tokens, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (_, _, tokens, _) in enumerate(batch):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        counts = [min(last, answer) for _, _, _, answer in batch]
        with torch.no_grad(), Outputs(model, counts) as outputs:
            forward(model, ids.to(model.device), mask.to(model.device), None if shared else 1)
        for layer, means in outputs.found.items():
            found.setdefault(layer, []).append(means)
        true += [label for _, label, _, _ in batch]
        of += [number for number, _, _, _ in batch]
        advance(len({number for number, label, _, _ in batch if label}))
    values = {layer: torch.cat(parts) for layer, parts in sorted(found.items())}
    return Activations(values, torch.tensor(true), torch.tensor(of))


def _texts(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Iterator[tuple[int, bool, list[int], int]]:
    """Per text: the number of its example, whether it is true, its tokens, and how many are the answer's."""
    for number, example in enumerate(examples):
        prompt = encode(tokenizer, [example.prompt])[0]["input_ids"][0].tolist()
        for place, answer in enumerate((example.answer, *example.alternatives)):
            ids = answer_ids(tokenizer, Example(example.prompt, answer), prompt)
            check_room(model, [prompt], [ids], number)
            yield number, place == 0, [*prompt, *ids], len(ids)


def split(found: Activations, validation: float, seed: int) -> torch.Tensor:
    """Which texts are for validation, bool [N]: all those of a share of the examples."""
    numbers = sorted(set(found.example.tolist()))
    held = random.Random(seed).sample(numbers, max(1, round(validation * len(numbers))))
    if len(held) == len(numbers):
        raise ExampleError(f"a fit with validation needs at least two examples; there are {len(numbers)}")
    return torch.isin(found.example, torch.tensor(held))


def logistic(
    train: torch.Tensor, true: torch.Tensor, held: torch.Tensor, held_true: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probe directions, unit vectors [H, D], and validation accuracies [H] of one logistic regression per head."""
    try:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnsupportedError(
            "fitting iti's probes needs scikit-learn, which is not installed: pip install 'steerlens[eval]'"
        ) from error
    directions, accuracies = [], []
    for head in range(train.shape[1]):
        probe = LogisticRegression(max_iter=1000).fit(train[:, head].numpy(), true.numpy())
        directions.append(torch.tensor(probe.coef_[0], dtype=torch.float32))
        accuracies.append(float(probe.score(held[:, head].numpy(), held_true.numpy())))
    return unit(torch.stack(directions)), torch.tensor(accuracies)


def perceptron(
    train: torch.Tensor,
    true: torch.Tensor,
    held: torch.Tensor,
    held_true: torch.Tensor,
    *,
    epochs: int = 10,
    seed: int = 0,
) -> torch.Tensor:
    """Validation accuracies [H] of a perceptron D-16-1 with batch norm per head: the best of all epochs.

    All heads of a layer learn at once, as groups of one network that share nothing.
    """
    heads, width = train.shape[1:]
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Conv1d(heads * width, heads * 16, 1, groups=heads),
            torch.nn.BatchNorm1d(heads * 16),
            torch.nn.ReLU(),
            torch.nn.Conv1d(heads * 16, heads, 1, groups=heads),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-4, weight_decay=1e-4)
        flat, target = train.reshape(len(train), -1, 1), true.float()[:, None].expand(-1, heads)
        best = torch.zeros(heads)
        for _ in range(epochs):
            network.train()
            for rows in torch.randperm(len(flat)).split(PROBE_BATCH):
                if len(rows) == 1:
                    continue  # batch norm has no variance of one
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    network(flat[rows])[..., 0], target[rows], reduction="none"
                )
                optimizer.zero_grad()
                loss.mean(0).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            network.eval()
            with torch.no_grad():
                said = network(held.reshape(len(held), -1, 1))[..., 0] > 0
            best = torch.maximum(best, (said == held_true[:, None]).float().mean(0))
    return best


def iti(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    validation: float = 0.2,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> VectorFile:
    """Fit ITI's directions on the head outputs at the last token of true and of false answers.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with an answer and alternatives.
        validation: share of the examples that the probes' accuracy is measured on, in (0, 1).
        batch_size: texts per forward.
        seed: of the split.
        advance: told how many examples are done.

    Returns:
        Per layer the unit directions `mean.<layer>` (from false to true means, over all texts) and `probe.<layer>`
        (coefficients of the logistic regression on the training texts), [H, D]; the standard deviations along them
        over all texts, `mean_deviation.<layer>` and `probe_deviation.<layer>`, [H], with ddof 0; `score.<layer>` [H],
        the probes' validation accuracy. The metadata's "texts" is their number.

    Raises:
        ExampleError: for examples that lack something. UnsupportedError: without scikit-learn.
    """
    found = activations(model, tokenizer, examples, last=1, batch_size=batch_size, advance=advance, what="iti")
    held = split(found, validation, seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer, values in found.values.items():
        probe, accuracy = logistic(values[~held], found.true[~held], values[held], found.true[held])
        mean = mass_mean(values, found.true)
        tensors |= {
            f"mean.{layer}": mean,
            f"mean_deviation.{layer}": deviation(values, mean),
            f"probe.{layer}": probe,
            f"probe_deviation.{layer}": deviation(values, probe),
            f"score.{layer}": accuracy,
        }
    return _file("iti", model, examples, found, tensors, {"validation": validation, "seed": seed})


def nl_iti(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    probe_tokens: int = 4,
    tokens: int = 6,
    validation: float = 0.2,
    epochs: int = 10,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> VectorFile:
    """Fit NL-ITI's directions and rank heads by a small perceptron, on means over the last answer tokens.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with an answer and alternatives.
        probe_tokens: answer tokens that the perceptrons' inputs are means of, >= 1.
        tokens: answer tokens that the directions are fitted on the means of, >= 1. Published for the paper's first
            table: 4 and 6; defaults of the code: 2 and 2.
        validation: share of the examples that the perceptrons' accuracy is measured on, in (0, 1).
        epochs: of the perceptrons; the best one counts.
        batch_size: texts per forward.
        seed: of the split and the perceptrons.
        advance: told how many examples are done.

    Returns:
        `mean.<layer>`, `mean_deviation.<layer>` and `score.<layer>` as of `iti`.
    """
    found = activations(model, tokenizer, examples, last=tokens, batch_size=batch_size, advance=advance, what="nl_iti")
    probed = found
    if probe_tokens != tokens:
        probed = activations(model, tokenizer, examples, last=probe_tokens, batch_size=batch_size, what="nl_iti")
    held = split(found, validation, seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer, values in found.values.items():
        mean, inputs = mass_mean(values, found.true), probed.values[layer]
        tensors |= {
            f"mean.{layer}": mean,
            f"mean_deviation.{layer}": deviation(values, mean),
            f"score.{layer}": perceptron(
                inputs[~held], found.true[~held], inputs[held], found.true[held], epochs=epochs, seed=seed
            ),
        }
    settings = {"validation": validation, "seed": seed, "tokens": tokens, "probe_tokens": probe_tokens}
    return _file("nl_iti", model, examples, found, tensors, settings)


def _file(
    method: str,
    model: Any,
    examples: Sequence[Example],
    found: Activations,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, float],
) -> VectorFile:
    metadata = {
        "method": method,
        "model": describe(model)["id"],
        "examples": len(examples),
        "texts": len(found.true),
        **settings,
    }
    return VectorFile(method, tensors, {key: str(value) for key, value in metadata.items()})
