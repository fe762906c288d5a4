"""The engine's float32 sums: what products add themselves is what autograd's gradients would add."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.fixtures import TINY_ZAMBA, TINY_ZAMBA2, small_run, write_run
from tests.train.ranks import call

MODELS = {"zamba": TINY_ZAMBA, "zamba2": TINY_ZAMBA2}


def sum_gradients(file: str, compute: str, out: str) -> None:
    """Three micro-batches through an engine as it is, and through one whose sums only autograd's gradients reach."""
    from model import linear
    from train import distributed
    from train.config import load_run
    from train.engine import Engine
    from train.start import build_model

    run = load_run(file, [f"precision.compute={compute}"])
    layout = distributed.start(1, False, 60)
    products = []
    original = linear._add_product
    linear._add_product = lambda *given: products.append(1) or original(*given)  # type: ignore
    found = []
    for sums in (True, False):
        products.clear()
        model = build_model(run, layout)
        engine = Engine(model, run.config.optimizer, layout)
        totals = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
        assert not any(total.any() for total in totals.values())
        kept = {name: parameter.main_grad for name, parameter in model.named_parameters()}
        flat = {buffer.data_ptr() for buffer in (t.untyped_storage() for t in kept.values())}
        assert flat == {g.untyped_storage().data_ptr() for g in engine._zero.fp32_groups_gradients_flat}
        if not sums:
            for parameter in model.parameters():
                del parameter.main_grad
        generator = torch.Generator().manual_seed(3)
        for count in range(3):
            tokens = torch.randint(0, 256, (2, 33), generator=generator)
            engine.backward(model(tokens[:, :-1], tokens[:, 1:]).sum() / 64)
            assert all(parameter.grad is None for parameter in model.parameters())
            totals = {name: total.clone() for name, total in kept.items()}
            assert all(total.any() for name, total in totals.items()), count
        # Weights that are multiplied as one lie side by side in DeepSpeed's flat buffers: one product adds to all.
        calls = run.config.model.num_calls
        once = run.config.model.num_layers * 2 + calls * 5 + 1
        adapters = calls if run.config.model.adapters else 0
        assert len(products) == (3 * (once + adapters) if sums else 0)
        found.append((totals, engine.reduce_gradients()))
    torch.save(found, out)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_sums_are_those_of_autograds_gradients(tmp_path: Path, model: str, compute: str) -> None:
    file = write_run(tmp_path, small_run(tmp_path, MODELS[model]))
    call(sum_gradients, str(file), compute, str(tmp_path / "sums.pt"), folder=tmp_path)
    (ours, norm), (theirs, expected) = torch.load(tmp_path / "sums.pt")
    for name, total in ours.items():
        # A weight that is used once has the same bits; more uses are added in float32, not in the compute type.
        shared = name.startswith(("blocks.", "embedding."))
        limit = (1e-6 if compute == "float32" else 2e-2) if shared else 0.0
        assert (total - theirs[name]).norm() <= limit * theirs[name].norm(), name
    assert norm == pytest.approx(expected, rel=1e-6 if compute == "float32" else 1e-3)
