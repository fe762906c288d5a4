import os

import pytest
import torch

# Workers of pytest-xdist take turns at the GPUs; each still sees them all, its own first.
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and "CUDA_VISIBLE_DEVICES" not in os.environ and (count := torch.cuda.device_count()) > 1:
    first = int(worker.removeprefix("gw")) % count
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str((first + i) % count) for i in range(count))


def pytest_collection_modifyitems(items):
    here = [item for item in items if "tests/gpu" in item.nodeid]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()
