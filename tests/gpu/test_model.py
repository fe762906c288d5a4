"""Whole models on GPUs: the fused path against plain torch and float64, borders, TP 2 + SP, the released sizes."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.step import random_model
from model.config import load_model_config
from model.kernels.registry import reference_only
from model.parallel import initialize_parallel, placement_of, sum_partial_gradients
from model.placement import placements
from model.zamba import Zamba
from tests.model import tiny

# The four released structures with few layers and their own head sizes, states and groups.
FEW = {"num_layers": 4, "hybrid_layers": [1, 2, 3], "vocab_size": 512, "intermediate_size": 512}
STRUCTURES = {
    "zamba-7b": {
        **FEW,
        "family": "zamba",
        "hidden_size": 928,
        "num_attention_heads": 4,
        "mamba": {"d_state": 16, "num_heads": 2, "dt_rank": 58},
    },
    "zamba2-1.2b": {
        **FEW,
        "family": "zamba2",
        "hidden_size": 512,
        "num_attention_heads": 8,
        "rope": True,
        "adapters": ["mlp", "attention"],
        "mamba": {"d_state": 128, "num_heads": 16, "ngroups": 1},
    },
    "zamba2-2.7b": {
        **FEW,
        "family": "zamba2",
        "hidden_size": 640,
        "num_shared_blocks": 2,
        "num_attention_heads": 8,
        "adapters": ["mlp"],
        "mamba": {"d_state": 64, "num_heads": 20, "ngroups": 1},
    },
    "zamba2-7b": {
        **FEW,
        "family": "zamba2",
        "hidden_size": 896,
        "num_shared_blocks": 2,
        "num_attention_heads": 8,
        "rope": True,
        "adapters": ["mlp"],
        "mamba": {"d_state": 64, "num_heads": 28, "ngroups": 2},
    },
}
TIME = 519


def structure(name):
    return load_model_config(STRUCTURES[name])


def batch(device="cuda"):
    inputs, targets = tiny.tokens(2, TIME)
    documents = (torch.arange(TIME) >= 201).int().expand(2, TIME).contiguous()
    return inputs.to(device), targets.to(device), documents.to(device)


def built(config, dtype, **options):
    """A model on the GPU whose weights were rounded to bfloat16, so that all types compute the same function."""
    model = Zamba(config, dtype=dtype, device="cuda", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            placement = placement_of(parameter)
            value = tiny.weights(placement, matrices=0.0)[placement.local_slice(model.layout.size, model.layout.rank)]
            parameter.copy_(value.bfloat16())
    return model


def overall(found, exact):
    """Relative error of the whole gradient."""
    norm = lambda tensors: torch.stack([tensor.norm() for tensor in tensors]).norm().item()
    gradients = exact.keys() - {"loss"}
    return norm(found[n].double() - exact[n] for n in gradients) / norm(exact[n] for n in gradients)


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "borders"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_fused_path_is_as_exact_as_plain_torch(name, dtype, documents):
    config, arguments = structure(name), batch()
    found = tiny.gradients(built(config, dtype, document_reset=documents), *arguments)
    with reference_only():
        plain = tiny.gradients(built(config, dtype, document_reset=documents), *arguments)
        exact = tiny.gradients(built(config, torch.float64, document_reset=documents), *arguments)
    assert overall(plain, exact) < 0.1, "these gradients are noise"
    errors = {n: [tiny.relative(side[n].double(), exact[n]) for side in (found, plain)] for n in exact}
    floor = torch.finfo(dtype).eps
    bad = {n: e for n, e in errors.items() if not e[0] <= max(2 * e[1], floor)}
    worst = max(errors, key=lambda n: errors[n][0])
    print(f"\n{name} {dtype}: worst {worst} fused {errors[worst][0]:.1e}, plain {errors[worst][1]:.1e}")
    assert not bad


@pytest.mark.parametrize("name", STRUCTURES)
def test_documents_are_apart(name):
    """Another first document leaves the second one's logits bit-equal."""
    model = built(structure(name), torch.bfloat16, document_reset=True)
    inputs, _, documents = batch()
    other = inputs.clone()
    other[:, :201] = other[:, :201].flip(1)
    one, two = (model.logits(value, documents)[:, 201:] for value in (inputs, other))
    assert torch.equal(one, two)


def _rank(rank, world, folder, name, dtype):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    initialize_parallel(world)
    model = built(structure(name), dtype, sequence_parallel=True)
    found = tiny.gradients(model, *(value[:, :512].contiguous() for value in batch(rank)))
    sum_partial_gradients(model.parameters(), model.layout)
    torch.save({n: g.cpu() for n, g in found.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_two_gpus_agree_with_one(name, dtype, tmp_path):
    """TP 2 + SP through NCCL: in float32 to 1e-4, in bfloat16 to twice what one GPU is from float64."""
    config = structure(name)
    arguments = [value[:, :512].contiguous() for value in batch()]
    one = tiny.gradients(built(config, dtype), *arguments)
    with reference_only():
        exact = tiny.gradients(built(config, torch.float64), *arguments)
    torch.multiprocessing.spawn(_rank, args=(2, str(tmp_path), name, dtype), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    table = placements(config, 2)
    for key, value in exact.items():
        parts = [rank[key] for rank in ranks]
        dim = table[key].shard_dim if key in table else None
        if dim is None:
            assert torch.equal(*parts), key
        joined = parts[0] if dim is None else torch.cat(parts, dim)
        error = tiny.relative(joined.to(value.device).double(), value)
        noise = tiny.relative(one[key].double(), value)
        assert error < max(1e-4 if dtype == torch.float32 else 2e-2, 2 * noise), (key, error, noise)


@pytest.mark.xdist_group("whole GPU")
@pytest.mark.parametrize("name", ["zamba-7b", "zamba2-1.2b", "zamba2-2.7b", "zamba2-7b"])
def test_released_size_at_4096(name):
    """One forward and backward at full size, batch 1; prints tokens/s and memory."""
    if torch.cuda.mem_get_info()[1] < 75 * 2**30:
        pytest.skip("needs 80 GB")
    config = load_model_config(f"configs/model/{name}.yaml")
    model = random_model(config)
    ids = torch.randint(1, config.vocab_size, (1, 4097), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(int(os.environ.get("STEPS", "3"))):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"\n{name}: {4096 / min(seconds):,.0f} tokens/s, {memory:.1f} GiB, loss {loss.item():.3f}")
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss.item() - 10.37) < 1.5
