"""Found by pytest first, so that every test file below can ``import oracles``."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors are small here: a second thread only makes them wait for a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
