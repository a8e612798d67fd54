"""benchmark/reproduce.py: its commands are right, wait for their teachers, and are printed until they have a result."""

import importlib
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
import tyro
from helpers import make_teacher, refused, run_command

SIZES = ["smaller", "same", "larger"]
SHORT = "--suite mujoco --env-ids envs:Scripted-v0 --seeds 100 --total-timesteps 96 --eval-episodes 1"


def reproduce(monkeypatch, capsys, words):
    """Run reproduce.py. Returns the commands that it prints, and its line on stderr."""
    run_command(monkeypatch, f"benchmark/reproduce.py {words}")
    out, err = capsys.readouterr()
    return out.splitlines(), err


def parse(line):
    """The name of a command's script, and its Args as a dict."""
    environment, python, script, *words = shlex.split(line)
    assert (environment, python) == ("OMP_NUM_THREADS=1", "python")
    name = os.path.basename(script).removesuffix(".py")
    return name, vars(tyro.cli(importlib.import_module(name).Args, args=words))


@pytest.mark.parametrize(
    "case", ["mujoco Hopper-v4 continuous", "atari PongNoFrameskip-v4 atari", "procgen ninja procgen"]
)
def test_experiments_of_the_paper(folder, monkeypatch, capsys, case):
    suite, env_id, script = case.split()
    lines, _ = reproduce(monkeypatch, capsys, f"--suite {suite} --teacher {make_teacher()} --seeds 100 200")
    assert len(lines) == {"mujoco": 4, "atari": 11, "procgen": 4}[suite] * 2 * 10
    found = []
    for name, args in map(parse, lines):
        assert (args["total_timesteps"], args["eval_episodes"]) == (2_000_000, 200 if suite == "procgen" else 50)
        if (args["env_id"], args["seed"], args["teacher"]) == (env_id, 200, "teacher.pt"):
            found.append((name, args["student_size"], args.get("distill_lambda", 1.0)))
    names = [f"ppd_{script}", "student_distill", "teacher_distill"]
    assert found == [*[(name, size, 1.0) for name in names for size in SIZES], (names[0], "larger", 0.0)]


def test_imperfect_teachers_and_further_flags(folder, monkeypatch, capsys):
    words = f"--suite atari --teacher {make_teacher()} --imperfect --seeds 100 -- --learning-rate 1e-4 --no-cuda"
    runs = [args for _, args in map(parse, reproduce(monkeypatch, capsys, words)[0])]
    assert len(runs) == 4 * 3 and {args["student_size"] for args in runs} == {"larger"}
    assert {(args["teacher_noise"], args["learning_rate"], args["cuda"]) for args in runs} == {(0.05, 1e-4, False)}
    assert runs[0]["exp_name"] == "ppd-larger-noise0.05-learning-rate-1e-4-no-cuda"


def test_students_wait_for_their_teachers(folder, monkeypatch, capsys):
    words = "--suite procgen --env-ids coinrun --methods ppd --seeds 100 200 --teachers runs/teachers/"
    lines, summary = reproduce(monkeypatch, capsys, words)
    name, args = parse(lines[0])
    assert (len(lines), name, args["total_timesteps"]) == (2, "train_teacher", 30_000_000)
    assert "again for the students of 2 teachers" in summary
    make_teacher(path=args["save_path"])
    lines, summary = reproduce(monkeypatch, capsys, words)
    assert [parse(line)[0] for line in lines] == ["train_teacher", *["ppd_procgen"] * 3]
    assert {parse(line)[1]["teacher"] for line in lines[1:]} == {"runs/teachers/coinrun-100.pt"}


def test_finished_and_interrupted_runs(folder, monkeypatch, capsys):
    words = f"{SHORT} --teacher {make_teacher()} --methods student"
    lines, _ = reproduce(monkeypatch, capsys, words)
    for number, line in enumerate([lines[0], lines[1].replace("96", "48"), lines[2]]):  # 48 steps: another experiment
        (folder / f"runs/{number}").mkdir(parents=True)
        content = {"script": "student_distill.py", "args": parse(line)[1]}
        (folder / f"runs/{number}/result.json").write_text(json.dumps(content))
    torch.save(content, "runs/2/checkpoint.pt")
    os.truncate("runs/2/result.json", 20)  # stopped while it wrote its result
    left, summary = reproduce(monkeypatch, capsys, words)
    assert left[0] == lines[1] and left[1].endswith("student_distill.py --resume runs/2") and len(left) == 2
    assert summary == "1 of 3 students are done, 1 interrupted runs go on\n"


MISTAKES = {"atari --env-ids Hopper-v4": "Hopper-v4", "mujoco --teacher no/{env_id}.pt": "--teacher no/"}
MISTAKES.update({"mujoco -- --seed 1": "--seed", "mujoco -- --eval-interval=5": "--eval-interval"})
MISTAKES["mujoco -- --distill_lambda=2"] = "--methods ppd"


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(folder, monkeypatch, capsys, words):
    with refused(capsys, MISTAKES[words]):
        run_command(monkeypatch, f"benchmark/reproduce.py --suite {words}")


def test_a_printed_command_runs_and_its_result_is_reported(folder, monkeypatch, capsys):
    words = f"{SHORT} --teacher {make_teacher()} --methods ppd --sizes smaller -- --num-envs 2 --minibatch-size 20"
    (line,), _ = reproduce(monkeypatch, capsys, words)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    subprocess.run(["sh", "-c", line], check=True, capture_output=True)
    assert reproduce(monkeypatch, capsys, words) == ([], "1 of 1 students are done\n")
    run_command(monkeypatch, "benchmark/report.py runs")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| envs:Scripted-v0")]
    assert rows[2][1:3] == ["smaller", "PPD"] and rows[2][4:6] == ["1", "1"]  # one seed, one episode
