"""A run's numbers and weights against plain formulas in float64: AdamW, clipping, decay groups, loss per source."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.faults import bad_gradients
from tests.train.fixtures import metrics, small_run, write_run
from tests.train.ranks import call, train
from tests.train.runs import newest, tensors

SPOILED = 3
CLIP = 1.6
NOT_DECAYED = re.compile(r"(norm\.weight|bias|A_log|\.D)$")


def small_adamw(folder: Path, clip: float) -> dict[str, Any]:
    """Six steps in which every setting shows: some gradients are clipped, eps is as large as the moments."""
    settings = {"betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.5, "clip_grad_norm": clip}
    mapping = small_run(folder, optimizer=settings, evaluation={"sequences": 0})
    mapping["phases"][0]["steps"], mapping["phases"][1]["steps"] = 3, 3
    return mapping


def expect(file: str, out: str) -> None:
    """Trains as the run does, with the model in float64 and AdamW written out."""
    from model.parallel import initialize_parallel
    from model.zamba import Zamba
    from train.config import load_run
    from train.inputs import open_data

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    initialize_parallel(1)
    config = load_run(file).config
    data = open_data(config)
    single, model = (Zamba(config.model, dtype=kind) for kind in (torch.float32, torch.float64))
    single.initialize(config.seed)
    model.load_state_dict({name: value.double() for name, value in single.state_dict().items()})
    text = {
        name: np.concatenate([np.fromfile(f"{shard}.bin", np.uint16) for shard in stream.shards]).astype(np.int64)
        for name, stream in data.streams.items()
    }
    weights = dict(model.named_parameters())
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    clip = config.optimizer.clip_grad_norm
    (beta1, beta2), eps, length = config.optimizer.betas, config.optimizer.eps, config.sequence_length
    rows, updates = [], 0
    for step in range(1, data.order.table.total_steps + 1):
        names = [data.order.sources[s] for s in data.order.step(step)[:, 0]]
        begins = data.order.step(step)[:, 2] * length
        windows = torch.from_numpy(np.stack([text[n][a : a + length + 1] for n, a in zip(names, begins, strict=True)]))
        losses = model(windows[:, :-1], windows[:, 1:])
        model.zero_grad()
        losses.mean().backward()
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in weights.values()))
        rate, each = data.order.table.learning_rate(step), losses.detach().mean(dim=1).tolist()
        sources = {n: float(np.mean([x for x, m in zip(each, names, strict=True) if m == n])) for n in set(names)}
        rows.append({"loss": float(losses.mean()), "source_loss": sources, "grad_norm": norm, "learning_rate": rate})
        if step == SPOILED:
            continue
        updates += 1
        for name, weight in weights.items():
            gradient = weight.grad * (min(1.0, clip / norm) if clip else 1.0)
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            mean, square = first[name] / (1 - beta1**updates), second[name] / (1 - beta2**updates)
            decay = 0.0 if NOT_DECAYED.search(name) else config.optimizer.weight_decay
            with torch.no_grad():
                weight *= 1 - rate * decay
                weight -= rate * mean / (square.sqrt() + eps)
    kinds = {"master": weights, "exp_avg": first, "exp_avg_sq": second}
    torch.save({f"{k}/{n}": t.detach() for k, found in kinds.items() for n, t in found.items()}, f"{out}/state.pt")
    Path(out, "rows.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("clip", [CLIP, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_run_is_adamw_by_its_formulas(tmp_path: Path, clip: float) -> None:
    file = write_run(tmp_path, small_adamw(tmp_path, clip))
    train(1, file, log=tmp_path / "log", before=bad_gradients, at={SPOILED: "nan"})
    call(expect, str(file), str(tmp_path), folder=tmp_path)
    expected = json.loads((tmp_path / "rows.json").read_text())
    norms = [row["grad_norm"] for row in expected]
    assert min(norms) < CLIP < max(norms)
    for row, wanted in zip(metrics(tmp_path / "run"), expected, strict=True):
        if row["step"] == SPOILED:
            assert row["skipped"] and row["grad_norm"] is None
            wanted["grad_norm"] = None
        assert {key: row[key] for key in wanted} == {
            "loss": pytest.approx(wanted["loss"], rel=1e-6),
            "source_loss": pytest.approx(wanted["source_loss"], rel=1e-6),
            "grad_norm": wanted["grad_norm"] and pytest.approx(wanted["grad_norm"], rel=1e-5),
            "learning_rate": wanted["learning_rate"],
        }
    found, state = tensors(newest(tmp_path / "run")), torch.load(tmp_path / "state.pt")
    assert found.keys() == state.keys()
    worst = {k: float((found[k].double() - state[k]).norm() / state[k].norm().clamp(min=1e-12)) for k in state}
    assert max(worst.values()) < 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:5]
