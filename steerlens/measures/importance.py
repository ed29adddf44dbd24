"""Head importance: how much the loss depends on a head's output (Michel et al. 2019, arXiv 1905.10650).

<ctx, dL/dctx> per query row, at the attention function's output, is the derivative of the loss by a factor on that
output. Three estimators that differ in where absolute values are taken have all been published under this name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from steerlens.errors import MethodError, UnsupportedError
from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, MeasureError, batches, describe, require
from steerlens.measures.responses import Forced, answer_ids, check_room
from steerlens.observing import Observer
from steerlens.passes import Pass

Estimator = Literal["token", "example", "batch"]
ESTIMATORS: tuple[Estimator, ...] = ("token", "example", "batch")


def sums(products: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each estimator adds up over batches, [..., B, T] -> [...]; T only real rows, others 0.

    Divide `token` by the number of tokens, `example` and `batch` by that of examples.
    """
    per_example = products.sum(-1)
    return {
        "token": products.abs().sum((-2, -1)),  # the authors' code
        "example": per_example.abs().sum(-1),  # the paper's formula
        "batch": per_example.sum(-1).abs(),  # the gradient of a head mask
    }


def layer_norm(scores: torch.Tensor) -> torch.Tensor:
    """A layer's scores [H] over their L2 norm."""
    return scores / (scores.square().sum().sqrt() + 1e-20)


class Products(Observer):
    """Collects <ctx, dL/dctx> of every attention layer during a backward pass.

    Attributes:
        found: fp32 [B, H, Tq] per layer, pads 0.
        asked: outputs that gradients are asked for, so that no parameter needs one: those that nothing before needs.
    """

    name = "steerlens heads importance"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.found: dict[int, torch.Tensor] = {}
        self.asked: list[torch.Tensor] = []

    def output(self, layer: int, output: torch.Tensor, now: Pass) -> None:
        """Have the gradient of an attention output come by."""
        facts = self._engine.facts
        if output.shape[2] != facts.heads[layer]:
            raise UnsupportedError(
                f"importance: layer {layer} of {facts.name} gives {output.shape[2]} of its {facts.heads[layer]} heads "
                "here (tensor parallelism): load the model without tp_plan"
            )
        if not output.requires_grad:
            self.asked.append(output.requires_grad_())
        elif not self.asked:
            self.asked.append(output)
        real, context = now.real_rows(), output.detach()

        def store(gradient: torch.Tensor) -> None:
            products = (context.float() * gradient.float()).sum(-1).transpose(1, 2)
            if real is not None:
                # not a product: what a row of pads holds may be NaN
                products = torch.where(real[:, None].to(products.device), products, 0.0)
            # diffllama attends twice in a layer, to each half of its values
            self.found[layer] = self.found[layer] + products if layer in self.found else products

        output.register_hook(store)


def products(model: Any, batch: Forced) -> dict[int, torch.Tensor]:
    """<ctx, dL/dctx> per layer, fp32 [B, H, T], pads 0; L is the sum of the responses' negative log-likelihoods."""
    with torch.enable_grad(), _frozen(model), Products(model) as watched:
        logits = batch.run(model, keep=batch.most).logits[:, -batch.most :]
        targets = torch.full((len(batch.responses), batch.most), -100)
        for row, response in enumerate(batch.responses):
            targets[row, batch.most - len(response) :] = torch.tensor(response)
        loss = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets.to(logits.device), ignore_index=-100, reduction="sum"
        )
        # its hook holds `watched`: held by it in turn, both would stay until the next garbage collection
        asked, watched.asked = watched.asked, []
        torch.autograd.grad(loss, asked)
    return watched.found


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    estimator: Estimator = "example",
    normalize: bool = False,
    all_tokens: bool = False,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by how much the loss on the examples depends on them.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with answers.
        estimator: "token": mean over tokens of |<ctx, grad>|; "example": mean over examples of |sum over tokens|;
            "batch": |sum over a batch| over its examples, so it depends on the batches. All three are in the result.
        normalize: divide each layer's scores by their L2 norm.
        all_tokens: the loss is that of every token but the first, not of the answer; no answer is needed.
        batch_size: examples per forward and backward.
        advance: told how many examples are done.
    """
    if estimator not in ESTIMATORS:
        raise MethodError(f"importance: estimator={estimator!r} is unknown; allowed: {', '.join(ESTIMATORS)}")
    require("importance", examples, answer=not all_tokens)
    totals: dict[int, dict[str, torch.Tensor]] = {}
    rows_seen = targets_seen = 0
    for batch in _batches(model, tokenizer, examples, all_tokens, batch_size, advance):
        rows_seen += int(batch.mask.sum())
        targets_seen += sum(map(len, batch.responses))
        for layer, found in products(model, batch).items():
            for name, value in sums(found.transpose(0, 1)).items():
                before = totals.setdefault(layer, {}).get(name)
                totals[layer][name] = value.cpu() if before is None else before + value.cpu()
    if not totals:
        raise MeasureError("importance: no example has a token to predict; give longer texts")
    counts = {"token": rows_seen, "example": len(examples), "batch": len(examples)}
    scores: dict[str, dict[Head, list[float]]] = {name: {} for name in ESTIMATORS}
    for layer, sides in totals.items():
        for name, value in sides.items():
            found = value / counts[name]
            for head, score in enumerate((layer_norm(found) if normalize else found).tolist()):
                scores[name][layer, head] = [score]
    return HeadScores(
        "importance",
        describe(model),
        scores[estimator],
        other={name: values for name, values in scores.items() if name != estimator},
        settings={
            "examples": len(examples),
            "estimator": estimator,
            "normalize": normalize,
            "all_tokens": all_tokens,
            "batch_size": batch_size,
        },
        summary={"tokens": rows_seen, "predicted_tokens": targets_seen},
    )


def _batches(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    all_tokens: bool,
    size: int,
    advance: Callable[[int], None],
) -> Iterator[Forced]:
    number = 0
    for rows, inputs, _ in batches(model, tokenizer, examples, size):
        mask = inputs["attention_mask"].bool()
        prompts = [ids[real].tolist() for ids, real in zip(inputs["input_ids"], mask, strict=True)]
        answers = [
            answer_ids(tokenizer, row, ids) if row.answer else [] for row, ids in zip(rows, prompts, strict=True)
        ]
        check_room(model, prompts, answers, number)
        number += len(rows)
        if all_tokens:
            texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
            prompts, answers = [ids[:1] for ids in texts], [ids[1:] for ids in texts]
        kept = [i for i, answer in enumerate(answers) if answer]
        if kept:
            device = inputs["input_ids"].device
            yield Forced.of([prompts[i] for i in kept], [answers[i] for i in kept], {}, device=device)
        advance(len(rows))


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter asks for a gradient and no dropout is on, until exit."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
