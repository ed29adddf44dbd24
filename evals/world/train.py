"""Train `tiny` from scratch: `python -m steerlens.evals.world.train --output DIR [--resume] [--device cuda]`.

The stages: (1) loss only on predictable tokens, while the document length doubles from 64 up to `--length`, each time
held-out look-up among many facts passes 90 %; (2) a small weight on every other token, and head dropout; (3) for the
last fifth of `--tokens`, predictable tokens only and no dropout. Batches are a function of (seed, step), so a resumed
run continues exactly where its checkpoint was written.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from steerlens.evals.world import headdrop, tokenizer
from steerlens.evals.world.corpus import batch
from steerlens.evals.world.tasks import TASKS, sample
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on."""

    seed: int = 0
    tokens: int = 24_000_000
    length: int = 512
    tokens_per_batch: int = 4096
    learning_rate: float = 2e-3
    background: float = 0.1
    drop: float = 0.1
    drop_spare: int = 1
    layers: int = 6
    width: int = 128
    heads: int = 8
    key_value_heads: int = 4
    mlp: int = 384


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    step: int = 0
    tokens: int = 0
    length: int = 64
    all_tokens_from: int = -1


def new_model(settings: Settings, vocabulary: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of the run's shape."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.SPECIAL.index(tokenizer.BOS),
        eos_token_id=tokenizer.SPECIAL.index(tokenizer.EOS),
        pad_token_id=tokenizer.SPECIAL.index(tokenizer.PAD),
    )
    return LlamaForCausalLM(config)


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW; norms are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, averaged over tokens by weight; the head runs only where the weight is positive."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    weights, targets = weights[:, 1:], ids[:, 1:]
    chosen = weights > 0
    losses = functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights[chosen].sum().clamp_min(1)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, fast: PreTrainedTokenizerFast, task: str, length: int, count: int = 32) -> float:
    """Share of held-out samples whose answer, end token included, is the greedy continuation (teacher-forced)."""
    model.eval()
    rows = [sample(task, seed, length) for seed in range(count)]
    prompts = [fast(row.prompt)["input_ids"] for row in rows]
    answers = [fast(f" {row.answer}", add_special_tokens=False)["input_ids"] + [fast.eos_token_id] for row in rows]
    longest = max(len(a) + len(b) for a, b in zip(prompts, answers, strict=True))
    pad = fast.pad_token_id
    ids = torch.tensor([a + b + [pad] * (longest - len(a) - len(b)) for a, b in zip(prompts, answers, strict=True)]).to(
        model.device
    )
    best = model(input_ids=ids, use_cache=False).logits.argmax(-1).tolist()
    hits = [row[len(a) - 1 : len(a) + len(b) - 1] == b for row, a, b in zip(best, prompts, answers, strict=True)]
    model.train()
    return sum(hits) / count


def advance(
    model: LlamaForCausalLM, fast: PreTrainedTokenizerFast, settings: Settings, progress: Progress
) -> tuple[Progress, dict[str, float]]:
    """Measure held-out look-up among many facts and move the curriculum on when it passes 90 %."""
    scores = {"dense": accuracy(model, fast, "dense", progress.length, 128)}
    if scores["dense"] >= 0.9:
        if progress.length < settings.length:
            progress = replace(progress, length=progress.length * 2)
        elif progress.all_tokens_from < 0:
            progress = replace(progress, all_tokens_from=progress.tokens)
    if progress.length >= 128:
        scores |= {task: accuracy(model, fast, task, 128) for task in TASKS if task != "dense"}
    return progress, scores


def learning_rate(settings: Settings, progress: Progress) -> float:
    """Warm-up over 200 steps, flat for the first 40 % of the tokens, then linear to a twentieth."""
    left = 1 - progress.tokens / settings.tokens
    return settings.learning_rate * min(1.0, (progress.step + 1) / 200, max(0.05, left / 0.6))


def every_token(settings: Settings, progress: Progress) -> bool:
    """Whether this step belongs to stage 2."""
    return progress.all_tokens_from >= 0 and progress.tokens < 0.8 * settings.tokens


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


def export(model: LlamaForCausalLM, fast: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model and tokenizer as `from_pretrained` reads them."""
    model.generation_config = GenerationConfig(
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(output)
    fast.save_pretrained(output)


def next_batch(
    raw: Tokenizer, settings: Settings, progress: Progress, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of this step: ids and weights, each [rows, length]."""
    rng = random.Random(f"{settings.seed}|{progress.step}")
    # The next shorter length counts most.
    shorter = [size for size in (64, 128, 256, 256) if size < progress.length]
    length = rng.choice(shorter) if shorter and rng.random() < 0.3 else progress.length
    background = settings.background if every_token(settings, progress) else 0.0
    # Repeated segments make induction heads form; once look-up works, a reminder is enough.
    repeated = 0.22 if progress.length == Progress.length else 0.05
    rows = settings.tokens_per_batch // length
    ids, weights = batch(raw, rng, rows, length, background=background, repeated=repeated)
    return torch.tensor(ids, device=device), torch.tensor(weights, device=device)


def run(settings: Settings, output: Path, *, resume: bool, device: str, every: int) -> None:
    """Train until `settings.tokens`, writing `checkpoint.pt` and `log.jsonl` to `output`, then export."""
    output.mkdir(parents=True, exist_ok=True)
    fast = tokenizer.build()
    model = new_model(settings, len(fast)).to(device)
    headdrop.install(model)
    optimizer = new_optimizer(model)
    progress, checkpoint = Progress(), output / "checkpoint.pt"
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
    model.train()
    started, total = time.monotonic(), 0.0
    while progress.tokens < settings.tokens:
        ids, weights = next_batch(fast.backend_tokenizer, settings, progress, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, progress)
        headdrop.clear(model)
        if every_token(settings, progress):
            headdrop.draw(model, settings, progress.step, rows=ids.shape[0])
        loss = weighted_loss(model, ids, weights)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        progress = replace(progress, step=progress.step + 1, tokens=progress.tokens + ids.numel())
        if progress.step % every == 0:
            headdrop.clear(model)
            progress, scores = advance(model, fast, settings, progress)
            row = {**asdict(progress), "loss": total / every, **scores, "seconds": time.monotonic() - started}
            total = 0.0
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            sys.stderr.write(json.dumps(row) + "\n")
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _write(checkpoint, {**states, "progress": asdict(progress), "settings": asdict(settings)})
    headdrop.clear(model)
    export(model, fast, output / "model")


def main() -> None:
    """Command line: one option for each field of `Settings`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations and checkpoints")
    for name, value in asdict(Settings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    options = vars(parser.parse_args())
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    where = {name: options.pop(name) for name in ("output", "resume", "device", "every")}
    run(Settings(**options), **where)


if __name__ == "__main__":
    main()
