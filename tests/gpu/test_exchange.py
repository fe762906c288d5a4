"""Rows written into another GPU's memory: nothing is read before it is there, and nothing is written over too soon."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from model.exchange import Collectives, exchange_of, others_first
from model.peer_memory import PeerMemory

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ROUNDS, REPLAYS = 20, 6
DELAYED = 2_000_000
"""Clock cycles, about a millisecond, by which one rank is late."""


def _start(rank, folder, seconds=60):
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", 2)
    timeout = dist.distributed_c10d.timedelta(seconds=seconds)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2, timeout=timeout)
    torch.cuda.set_stream(torch.cuda.Stream())
    return dist.group.WORLD, torch.device("cuda", rank)


def _operations(exchange, ranks, inputs, bad):
    """Gathers and scatters as a sublayer has them, one rank late now and then; counts wrong values in `bad`."""
    size, rank = ranks.size(), ranks.rank()
    for number, (rows, sums) in enumerate(inputs):
        late = number % 3 - 1
        if late == rank:
            torch.cuda._sleep(DELAYED)
        gathered, scatter = exchange.gather(rows[rank]), exchange.scatter(sums[rank])
        for other in others_first(ranks):
            scatter.send(other)
        whole = gathered()
        if late == 1 - rank:
            torch.cuda._sleep(DELAYED)  # its reading is late, and the next operation of the other rank must wait
        bad += (whole != rows.flatten(0, 1)).sum()
        total = scatter.finish()
        bad += (total != sums.sum(0).unflatten(0, (size, -1))[rank]).sum()
        bad += (exchange.all_reduce(rows[rank, :, 0].float()) != rows[..., 0].float().sum(0)).sum()


def _late_ranks(rank, folder):
    ranks, device = _start(rank, folder)
    exchange = exchange_of(ranks, device)
    assert isinstance(exchange, PeerMemory)
    torch.manual_seed(3)  # all ranks know all inputs: whole numbers, whose sums are exact
    draw = lambda *shape: torch.randint(-60, 60, shape, device=device).bfloat16()
    inputs = [(draw(2, 100 + 64 * i, 512), draw(2, 2 * (100 + 64 * i), 256)) for i in range(ROUNDS)]
    bad = torch.zeros((), dtype=torch.int64, device=device)
    _operations(exchange, ranks, inputs, bad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        _operations(exchange, ranks, inputs, bad)
    for _ in range(REPLAYS):
        for rows, sums in inputs:
            rows += 1
            sums -= 1
        graph.replay()
    _operations(exchange, ranks, inputs, bad)
    torch.save(bad.cpu(), f"{folder}/{rank}.pt")
    graph.reset()
    dist.destroy_process_group()


def test_late_ranks(tmp_path):
    """One by one and in a replayed graph, with inboxes that grow; the next operation begins where one ends."""
    torch.multiprocessing.spawn(_late_ranks, args=(str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt").item() for rank in range(2)] == [0, 0]


def _as_collectives(rank, folder):
    ranks, device = _start(rank, folder)
    exchange, nccl = exchange_of(ranks, device), Collectives(ranks)
    assert isinstance(exchange, PeerMemory)
    torch.manual_seed(rank)
    rows = torch.randn(192, 640, device=device, dtype=torch.bfloat16)
    values = torch.randn(384, device=device)

    def results(way):
        scatter = way.scatter(rows)
        for other in others_first(ranks):
            scatter.send(other)
        return [scatter.finish().clone(), way.gather(rows)().clone(), way.all_reduce(values).clone()]

    def others(way):
        """The other rank's rows, of a gather that may leave out one's own."""
        return way.gather(rows, own=False)().view(2, *rows.shape)[1 - rank].clone()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        captured = [*results(exchange), others(exchange)]
    same = []
    for size in (1, 8):  # the second time round the inboxes grow between two replays
        rows.normal_()
        values.normal_()
        exchange.gather(torch.empty(size * rows.shape[0], rows.shape[1], device=device))()
        graph.replay()
        wanted = [*results(nccl), others(nccl)]
        same += [torch.equal(found, by) for found, by in zip(captured, wanted, strict=True)]
        same += [torch.equal(found, by) for found, by in zip(results(exchange), wanted, strict=False)]
    torch.save(same, f"{folder}/{rank}.pt")
    graph.reset()
    dist.destroy_process_group()


def test_the_collectives_results_bit_for_bit(tmp_path):
    """Also of a graph that is replayed after the inboxes grew, and where one's own rows are not asked for."""
    torch.multiprocessing.spawn(_as_collectives, args=(str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [[True] * 14] * 2


def _lone_rank(rank, folder):
    ranks, device = _start(rank, folder, seconds=20)
    exchange = exchange_of(ranks, device)
    rows = torch.ones(64, 64, device=device)
    exchange.gather(rows)()
    torch.cuda.synchronize()
    if rank == 1:
        os._exit(0)  # as by a kill
    open(f"{folder}/waits", "w").close()
    exchange.gather(rows)()
    torch.cuda.synchronize()


def test_a_dead_rank_ends_the_wait(tmp_path):
    """By an error after the time-out of the collectives; a GPU does not wait for ever."""
    ranks = torch.multiprocessing.spawn(_lone_rank, args=(str(tmp_path),), nprocs=2, join=False).processes
    ranks[1].join(60)
    begin = time.monotonic()
    ranks[0].join(60)
    ended, seconds = not ranks[0].is_alive(), time.monotonic() - begin
    ranks[0].kill()
    assert ended and 15 < seconds < 40 and ranks[0].exitcode != 0
    assert (tmp_path / "waits").exists() and ranks[1].exitcode == 0
