"""What the runs of this folder share: one model and one process that has imported everything."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def worker():
    """`worker(function, *arguments)` in a process of its own: a run needs process groups and an engine to itself."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The demo's policy with random weights."""
    from tools.make_demo_model import make_demo_model

    folder = tmp_path_factory.mktemp("model")
    make_demo_model(folder, seed=0)
    return folder
