"""Rows between tensor-parallel ranks, by collectives and by peer memory, and which of the two is taken."""

import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from model import exchange
from model.exchange import Collectives, check_exchange, exchange_of
from model.parallel import Layout
from model.zamba import Zamba
from tests.model import tiny
from tests.model.emulated_peers import emulate
from tests.model.processes import run

F64 = torch.float64
CPU = torch.device("cpu")


def mistakes(folder):
    """Every operation against its definition, in an order and with sizes that change, two at once as in backward."""
    if folder is not None:
        emulate(folder)
    layout = Layout.current(True)
    size, rank, found = layout.size, layout.rank, []
    given = exchange_of(layout.ranks, CPU)
    draw = lambda rank, step, rows: torch.randn(rows, 3, generator=torch.Generator().manual_seed(10 * step + rank))
    check = lambda name, ours, wanted: found.append(name) if not torch.allclose(ours, wanted, atol=1e-5) else None
    for step in range(12):
        height = 2 + step % 3 * 5
        mine = [draw(other, step, height) for other in range(size)]
        sums = [draw(other, step + 50, size * height) for other in range(size)]
        gathered, scatter = given.gather(mine[rank]), given.scatter(sums[rank])
        for other in exchange.others_first(layout.ranks):
            scatter.send(other)
        check(f"gather {step}", gathered(), torch.cat(mine))
        check(f"scatter {step}", scatter.finish(), sum(sums)[layout.part(rank, size * height)])
        check(f"all_reduce {step}", given.all_reduce(mine[rank]), sum(mine))
        others = given.gather(mine[rank], own=False)().unflatten(0, (size, -1))
        rest = [other for other in range(size) if other != rank]
        check(f"others {step}", others[rest], torch.stack(mine)[rest])
    check_exchange(given, layout.ranks, CPU)
    return type(given).__name__, found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("peers", [False, True], ids=["collectives", "peers"])
def test_operations(peers, size, tmp_path):
    kind = "PeerMemory" if peers else "Collectives"
    assert run(size, size, mistakes, str(tmp_path) if peers else None) == [(kind, [])] * size


def gradients(folder, recompute):
    if folder is not None:
        emulate(folder)
    model = tiny.randomize(Zamba(tiny.zamba2(), recompute=recompute, sequence_parallel=True, dtype=F64))
    return tiny.gradients(model, *tiny.tokens(2, 40))


@pytest.mark.parametrize("size", [2, 4])
def test_a_model_is_the_same_by_both(size, tmp_path):
    """Four ranks too, which no GPU test has: rows before and after a rank's own, sums of more than two parts."""
    ours, theirs = run(size, size, gradients, str(tmp_path), ["mlp"]), run(size, size, gradients, None, ["mlp"])
    for rank in range(size):
        assert ours[rank].keys() == theirs[rank].keys()
        assert all(tiny.relative(ours[rank][name], theirs[rank][name]) < 1e-12 for name in ours[rank])


class Peers(Collectives):
    """In the place of peer memory."""


class Wrong(Peers):
    """Loses what is written to it."""

    def gather(self, rows, own=True):
        return super().gather(torch.zeros_like(rows), own)


class Failing(Peers):
    def all_reduce(self, values):
        raise ValueError("such shapes")


def chosen(case):
    """How ranks on GPUs would exchange rows, and what they were told."""
    layout, told = Layout.current(True), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    exchange.logger.addHandler(handler)

    def peers(ranks, device):
        if case == "a GPU without a way to the other" and layout.rank == 1:
            raise RuntimeError("no peer access\nat some line")
        if case == "a torch that has changed":
            raise TypeError
        if case == "memory that fails":
            return Failing(ranks)
        return Wrong(ranks) if case == "memory that forgets" else Peers(ranks)

    sys.modules["model.peer_memory"] = SimpleNamespace(PeerMemory=peers)
    exchange.check_exchange = lambda given, ranks, device: check_exchange(given, ranks, CPU)
    if case == "two machines":
        exchange._machine = lambda: (f"boot {layout.rank}", "")
    if case == "switched off" and layout.rank == 1:
        os.environ[exchange.SWITCH] = "off"
    return type(exchange._connect(layout.ranks, torch.device("cuda"))).__name__, told


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("all is well", None),
        ("switched off", None),
        ("two machines", "across machines"),
        ("a GPU without a way to the other", "no peer access"),
        ("a torch that has changed", "TypeError"),
        ("memory that forgets", "not what another reads"),
        ("memory that fails", "ValueError: such shapes"),
    ],
)
def test_all_ranks_choose_alike_and_say_why(case, words):
    for kind, told in run(2, 2, chosen, case):
        assert kind == ("Peers" if case == "all is well" else "Collectives")
        assert len(told) == (words is not None) and all(words in line and "\n" not in line for line in told)
