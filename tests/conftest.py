"""One thread a worker, so that `pytest -n 2` does not make two cores fight."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
