"""The scripts are imported from the repository's root, and one core is used: results do not depend on the machine."""

import multiprocessing
import os
import pathlib
import platform
import signal
import sys

TESTS = pathlib.Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # also for processes
os.environ["PYTHONPATH"] = str(TESTS)  # so that they find `--env-id envs:Scripted-v0`

import pytest  # noqa: E402
import torch  # noqa: E402
from ale_py.vector_env import AtariVectorEnv  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

torch.set_num_threads(1)
original_init = AtariVectorEnv.__init__
HAS_PROCGEN = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 13)


def short_init(envs, *arguments, **options):
    """Games of 30 steps, so that some are cut off in a small run and none takes minutes."""
    original_init(envs, *arguments, **{**options, "max_num_frames_per_episode": 120})


def pytest_runtest_setup(item):
    """Tests that play Procgen have "procgen" in their name, or a case of it."""
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    needs_procgen = "procgen" in item.originalname or getattr(case, "suite", None) == "procgen"
    if needs_procgen and not HAS_PROCGEN and item.originalname != "test_without_procgen":
        pytest.skip("procgen has wheels for Linux on x86-64 and Python 3.10 to 3.12 only")


@pytest.fixture(autouse=True)
def clean_state(monkeypatch):
    """No test leaves its signal handlers or its start method of processes to the next."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    method = multiprocessing.get_start_method(allow_none=True)
    # TensorBoard reads event files in the order of their names, which end in a counter, as text
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    monkeypatch.setattr(AtariVectorEnv, "__init__", short_init)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    multiprocessing.set_start_method(method, force=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
