"""Micro-batches as CUDA graphs: bit for bit what they are kernel by kernel, in no more memory; what cannot be one."""

import json
import logging

import pytest
import torch
import yaml
from torch import nn

from tests.gpu.test_training import steps
from tests.train.fixtures import ROOT, small_run, write_run
from tests.train.runs import assert_same
from train.graph import Graphed

GIB = 2**30


class Hungry(nn.Module):
    """Keeps a GiB for the backward pass; asks the GPU for a number in the middle of it where it is told to."""

    def __init__(self, asks=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1024, device="cuda"))
        self.total = torch.zeros(1024, device="cuda")
        self.asks = asks

    def step(self, x):
        kept = (self.weight * x).exp()  # (2^18, 1024)
        if self.asks:
            kept.register_hook(lambda grad: grad * float(grad[0, 0]))
        loss = kept.square().mean()
        loss.backward()
        self.total += self.weight.grad
        self.weight.grad = None
        return loss.detach()


def assert_equal(graphed, model):
    plain = Hungry(model.asks)
    plain.total.copy_(model.total)
    for seed in range(5):
        x = torch.randn(2**18, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        # What is compared with has no memory beside the graph's.
        found = graphed(x)
        torch.cuda.empty_cache()
        assert torch.equal(found, plain.step(x)) and torch.equal(model.total, plain.total)
        del x
        torch.cuda.empty_cache()


@pytest.mark.whole_gpu
def test_activations_are_held_once_and_given_back():
    torch.cuda.empty_cache()
    model = Hungry()
    before = torch.cuda.memory_reserved()
    x = torch.randn(2**18, 1024, device="cuda")
    model.step(x)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.step(x)
    alone = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    graphed = Graphed(model.step, model)
    for _ in range(4):
        graphed(x)
    assert graphed._captured is not None
    # The static input, workspaces.
    assert torch.cuda.max_memory_reserved() < alone + 1.3 * GIB
    assert torch.cuda.memory_reserved() > before + 2 * GIB
    graphed.release()
    del x
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + GIB / 4
    assert_equal(graphed, model)
    assert graphed._captured is not None


@pytest.mark.whole_gpu
def test_what_cannot_be_captured_runs_kernel_by_kernel(caplog):
    """A number is asked for in the middle of the backward pass: a warning says so, no gradient is lost or added twice,
    and the allocator is as before."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = Hungry(asks=True)
    graphed = Graphed(model.step, model)
    assert_equal(graphed, model)
    assert graphed._failed
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "captur" in record.message, record.message
    assert torch.randn(3, device="cuda").isfinite().all()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + GIB / 4
    other = Hungry()
    again = Graphed(other.step, other)
    assert_equal(again, other)
    assert again._captured is not None


def engines(rank, file, overrides, out):
    """Three steps of four micro-batches, kernel by kernel and through a graph: losses, norms, final weights."""
    from train import distributed
    from train.config import load_run
    from train.engine import Engine
    from train.start import build_model

    run = load_run(file, ["precision.compute=bfloat16", *overrides])
    distributed.be_deterministic()
    layout = distributed.start(1, False, 60)
    length, size = run.config.sequence_length, run.config.micro_batch_size
    found = []
    for graphs in (False, True):
        model = build_model(run, layout)
        engine = Engine(model, run.config.optimizer, layout)

        def micro_batch(tokens, targets, documents, model=model, engine=engine):
            losses = model(tokens, targets, documents)
            sums = losses.detach().double().sum(dim=1)
            engine.backward(losses.sum() / losses.numel())
            return sums

        graphed = Graphed(micro_batch, model)
        draw, losses, norms = torch.Generator().manual_seed(5), [], []
        for step in range(3):
            for _ in range(4):
                ids = torch.randint(0, run.config.model.vocab_size, (size, length + 1), generator=draw).cuda()
                documents = None
                if run.config.document_reset:
                    documents = (torch.rand(size, length, generator=draw) < 0.02).int().cumsum(1, dtype=torch.int32)
                    documents = documents.cuda()
                losses.append((graphed if graphs else micro_batch)(ids[:, :-1], ids[:, 1:], documents).cpu())
            norms.append(engine.reduce_gradients())
            engine.update(1e-3, norms[-1])
            if step == 1:  # as around an evaluation
                graphed.release()
                with torch.no_grad():
                    losses.append(model(ids[:, :-1], ids[:, 1:], documents).cpu())
        assert graphs == (graphed._captured is not None) and not graphed._failed
        graphed.release()
        found.append((losses, norms, {name: weight.detach().cpu() for name, weight in model.named_parameters()}))
    torch.save(found, out)


VARIANTS = {
    "plain": [],
    "documents": ["document_reset=true"],
    "recompute": ["recompute=[mamba,attention,mlp]", "document_reset=true"],
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["zamba-tiny", "zamba2-tiny"])
def test_replays_are_bit_equal(model, variant, tmp_path):
    config = yaml.safe_load((ROOT / f"configs/model/{model}.yaml").read_text())
    run = write_run(tmp_path, small_run(tmp_path, config, sequence_length=256, micro_batch_size=4))
    torch.multiprocessing.spawn(engines, args=(str(run), VARIANTS[variant], str(tmp_path / "found.pt")), nprocs=1)
    (losses, norms, weights), (graph_losses, graph_norms, graph_weights) = torch.load(tmp_path / "found.pt")
    assert not [i for i, pair in enumerate(zip(losses, graph_losses, strict=True)) if not torch.equal(*pair)]
    assert norms == graph_norms
    assert not [name for name in weights if not torch.equal(weights[name], graph_weights[name])]


RUNS = {
    "zamba": ("zamba-tiny", 1, []),
    "zamba2": ("zamba2-tiny", 1, ["document_reset=true", "recompute=[mamba]"]),
    "two GPUs": ("zamba2-tiny", 2, ["recompute=[attention,mlp]"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_graphs_is_the_same(name, tmp_path):
    """Records and final states bit for bit, evaluations and a phase border included."""
    model, processes, options = RUNS[name]
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    config = yaml.safe_load((ROOT / f"configs/model/{model}.yaml").read_text())
    run = write_run(tmp_path, small_run(tmp_path, config, sequence_length=128, micro_batch_size=2))
    options = [*options, "precision.compute=bfloat16", "precision.deterministic=true"]
    options += [f"parallel.tensor={processes}", f"parallel.sequence={'true' if processes > 1 else 'false'}"]
    steps(tmp_path / "eager", run, processes, *options, "cuda_graph=false")
    steps(tmp_path / "graph", run, processes, *options, "profile={steps: [6, 7]}")
    assert_same(tmp_path / "graph", tmp_path / "eager")
    told = (tmp_path / "graph" / "logs" / "train.log").read_text()
    assert "micro-batches are a CUDA graph from now on" in told and "kernel by kernel" not in told
    for folder, graph in (("eager", False), ("graph", True)):
        assert json.loads((tmp_path / folder / "starts.jsonl").read_text())["cuda_graph"] is graph
    assert list((tmp_path / "graph" / "profile").glob("steps-6-7-rank0.json.gz"))
