"""benchmark/speed.py measures scripts of every kind, and its parts add up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "benchmark" / "speed.py"


SCRIPTS = ["ppd_continuous.py", "train_teacher.py", "student_distill.py", "teacher_distill.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_speed(script, tmp_path):
    command = [sys.executable, SPEED, "--repeats", "1", "--seconds", "4", "--rival", "echo steps/s 10"]
    command += ["--output", "result.json"]
    command += [SPEED.parents[1] / script, "--env-id", "Hopper-v4", "--num-steps", "16"]
    command += [] if "_distill" in script else ["--minibatch-size", "144"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more than one waits long where something else runs, too
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    measured, floor = result["seconds_per_rollout"], result["floor"]
    for parts in (measured, floor):
        assert min(parts.values()) > 0
        assert sum(value for name, value in parts.items() if name != "total") == pytest.approx(parts["total"])
    assert result["steps_per_second"] == pytest.approx(18 * 16 / measured["total"])
    assert result["ratio_to_rival"] == pytest.approx(result["steps_per_second"] / 10)
    assert result["peak_memory_bytes"] > 2**26 and f"{result['steps_per_second']:.0f} steps/s" in done.stdout
