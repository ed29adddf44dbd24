"""What each of two processes sees of a steered model: tensor parallel, DDP and FSDP. Run by torchrun.

parallel_ranks.py MODEL_DIR OUTPUT_DIR
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import steerlens
from steerlens.errors import UnsupportedError
from steerlens.methods import ACT, PASTA, HeadMask, PerRow, ZeroTuning

SPANS = [[(4, 7)], [(8, 11)]]
CASES = {
    "zerotuning": ZeroTuning(9.0, heads={0: [1, 6], 1: [2], 2: [5]}),
    "pasta": PASTA(0.05, heads={0: "*", 1: [0, 1, 7]}),
    "act": ACT(0.3, 0.08),
    "act-few": ACT(0.0, 0.08, heads={0: [3, 4], 2: [7]}),
    "headmask": HeadMask({0: [2, 5], 1: [6]}),
    "zero": HeadMask({0: [0, 7]}, mode="zero"),
    "per_row": PerRow([ZeroTuning(9.0, heads={0: [1, 6]}), HeadMask({1: [3, 4]})]),
    "composed": [ZeroTuning(4.0), ACT(0.2, 0.08, heads={1: [2, 5]}), PASTA(0.1, heads={2: [6]})],
}
CAPTURED = {0: [1, 2, 6], 1: [0]}
STATS = ("mass", "entropy", "argmax", "lse", "column_mean")


def inputs(seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (2, 18), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def load(folder: Path, name: str, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def everything(model):
    """Logits, tokens, Δψ and captures of every case."""
    found = {"native": model(**inputs()).logits}
    for name, methods in CASES.items():
        for backend in ("sdpa", "reference"):
            with steerlens.steer(model, methods, SPANS, backend=backend, report="mass") as steered:
                found[name, backend] = model(**inputs()).logits
                mass = {layer: found.get("delta_mass") for layer, found in steered.report().items()}
            with steerlens.steer(model, methods, SPANS, backend=backend):
                tokens = model.generate(**inputs(), max_new_tokens=4, do_sample=False)
            found[name, backend, "more"] = mass, tokens
    with (
        steerlens.steer(model, CASES["zerotuning"]),
        steerlens.capture(model, SPANS, heads=CAPTURED, stats=STATS) as record,
    ):
        model(**inputs())
    found["capture"] = {n: (record[n].heads, {s: getattr(record[n], s) for s in STATS}) for n in CAPTURED}
    return found


def tensor_parallel(folder: Path):
    model = load(folder, "gqa", tp_plan="auto")
    found = everything(model)
    q_proj = model.model.layers[0].self_attn.q_proj
    weight = q_proj.weight
    found["local rows"] = len(weight.to_local() if hasattr(weight, "to_local") else weight)
    model.model.layers[0].self_attn.k_proj = torch.nn.Linear(64, 8)
    with steerlens.steer(model, CASES["zerotuning"]):
        try:
            model(**inputs())
        except UnsupportedError as error:
            found["refused"] = str(error)
    return found


def data_parallel(folder: Path, rank: int):
    """Each rank has a batch of its own; the gradient is the mean over ranks."""
    found = {}
    ddp = torch.nn.parallel.DistributedDataParallel(load(folder, "gqa"))
    with steerlens.steer(ddp, CASES["composed"], SPANS):
        found["logits"] = ddp(**inputs(rank)).logits
        found["logits"].square().mean().backward()
    found["gradient"] = ddp.module.model.layers[0].self_attn.q_proj.weight.grad
    return found


@torch.no_grad()
def sharded(folder: Path, rank: int):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    found = {}
    mesh = dist.init_device_mesh("cpu", (2,))
    model = load(folder, "gqa")
    for layer in model.model.layers:
        fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    with steerlens.steer(model, CASES["composed"], SPANS):
        found["fully_shard"] = model(**inputs(rank)).logits
    model = load(folder, "gqa", attn_implementation="eager")
    for layer in model.model.layers:
        fully_shard(layer.self_attn, mesh=mesh)
    with steerlens.steer(model, ()), steerlens.capture(model):
        found["captured"] = model(**inputs(rank)).logits
    outer = load(folder, "gqa")
    try:
        outer = FullyShardedDataParallel(outer, device_id=torch.device("cpu"))
        with steerlens.steer(outer, CASES["composed"], SPANS):
            found["fsdp"] = outer(**inputs(rank)).logits
    except Exception as error:
        found["fsdp"] = repr(error)
    return found


def main():
    torch.set_num_threads(1)
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    found = {
        "tp": tensor_parallel(folder),
        "ddp": data_parallel(folder, rank),
        "fsdp": sharded(folder, rank),
    }
    torch.save(found, output / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
