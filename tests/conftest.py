"""The scripts are imported from the repository's root; torch has one thread; no test leaves its signal handlers."""

import importlib
import pathlib
import signal
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["train_teacher", "ppd_continuous"])
def script(request):
    """Each script as a module, for what stands in all of them."""
    return importlib.import_module(request.param)
