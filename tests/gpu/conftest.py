import pytest
import torch


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
