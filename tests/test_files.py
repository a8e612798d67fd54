"""Policy files and training states, and every refusal: one line, an exit code that is not 0, nothing made."""

import multiprocessing
import os
import pathlib
import pickle
import random
import sys
import time

import pytest
import torch
from helpers import CASES, DISTILLING, NETWORKS, PPD, QUICK, by_case, load, make_teacher, refused
from stable_baselines3 import PPO

import ppd_continuous


class Hostile:
    """Pickles as a call that makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


FOREIGN = {  # functions that write a file which is none of ours
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"some words\n" * 100),
    "folder": lambda path: path.mkdir(),
    "damaged": lambda path: path.write_bytes(pathlib.Path(make_teacher(path=str(path))).read_bytes()[:-3000]),
    "stable-baselines3": lambda path: PPO("MlpPolicy", "InvertedPendulum-v4", device="cpu").save(path),
    "CleanRL": lambda path: torch.save({"actor_mean.0.weight": torch.zeros(2, 2)}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "hostile": lambda path: torch.save({"format": 1, "suite": "continuous", "actor": Hostile()}, path),
    "hostile pickle": lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=2)),
}


@pytest.mark.parametrize("kind", FOREIGN)
@by_case(DISTILLING)
def test_foreign_teachers(folder, capsys, case, kind):
    FOREIGN[kind](folder / "foreign.pt")
    with refused(capsys, "--teacher foreign.pt", "train_teacher.py", "import_sb3.py"):
        case.run(teacher="foreign.pt")
    assert not os.path.exists("hostile")


@by_case(DISTILLING)
def test_no_teacher(folder, capsys, case):
    with refused(capsys, "--teacher", "teachers/", "train_teacher.py"):
        case.run(teacher=None)


@pytest.mark.parametrize("kind", ["missing", "damaged", "text", "hostile", "policy", "another script's"])
@by_case(QUICK)
def test_foreign_training_states(folder, capsys, case, kind):
    make_teacher(case.suite)
    path = folder / "run" / "checkpoint.pt"
    path.parent.mkdir()
    if kind == "policy":
        make_teacher(case.suite, path=str(path))
    elif kind == "another script's":
        torch.save({"script": "ppd.py", "args": {}, "global_step": 0}, path)
    else:
        FOREIGN[kind](path)
    with refused(capsys, "--resume run/checkpoint.pt", case.module.SCRIPT):
        case.run(resume="run")
    assert not os.path.exists("hostile")


TEACHERS = {suite: dict(suite=suite) for suite in NETWORKS}
TEACHERS["other spaces"] = dict(suite="continuous", obs_shape=[4])
TEACHERS["other actions"] = dict(suite="atari", env_id="PongNoFrameskip-v4", action_dim=6)


@pytest.mark.parametrize("kind", TEACHERS)
@by_case([case for case in CASES if case.distills])
def test_teachers_that_do_not_fit(folder, capsys, case, kind):
    if kind != case.suite:
        make_teacher(path="other.pt", **TEACHERS[kind])
        with refused(capsys, "other.pt"):
            case.run(teacher="other.pt")


@by_case([case for case in CASES if case.distills])
def test_weights_that_do_not_fit_their_network(folder, case):
    make_teacher(case.suite, path="other.pt")
    teacher = load("other.pt")
    teacher["actor"].popitem()
    torch.save(teacher, "other.pt")
    with pytest.raises(RuntimeError, match="Missing key"):  # as after a change of the networks in a copy
        case.run(teacher="other.pt")


REFUSALS = {
    "minibatch larger than rollout": (dict(minibatch_size=49), ["--minibatch-size", "48"]),
    "existing file": (dict(save_path="teacher.pt"), ["--save-path teacher.pt", "exists"]),
    "no episodes": (dict(eval_episodes=0), ["--eval-episodes"]),
    "unknown environment": (dict(env_id="Hoper-v4"), ["--env-id Hoper-v4: "]),
    "old environment": (dict(env_id="Hopper-v1"), ["--env-id Hopper-v1: "]),
    "an old name of a game": (dict(env_id="Breakout-v4"), ["--env-id Breakout-v4"]),
    "discrete actions": (dict(env_id="envs:Discrete-v0"), ["--env-id envs:Discrete-v0"]),
}


@pytest.mark.parametrize("kind", REFUSALS)
@by_case(QUICK)
def test_refused_arguments(folder, capsys, case, kind):
    make_teacher(case.suite)
    changes, words = REFUSALS[kind]
    if case.is_ppo or kind != "minibatch larger than rollout":
        with refused(capsys, *words):
            case.run(**changes)


@by_case(DISTILLING)
def test_the_file_of_a_student_is_a_teacher(folder, case):
    """With all fields of the format. The default is a network like the teacher's."""
    teacher = load(make_teacher(case.suite))
    student = case.policy()
    fields = "format suite env_id network actor critic return_rms global_step args score versions"
    assert set(student) == set(fields.split()) == set(teacher)
    assert (student["format"], student["suite"], student["env_id"]) == (1, case.suite, case.env_id)
    assert student["network"] == teacher["network"]
    case.run(student_size="smaller", save_path="new/smaller.pt", total_timesteps=48)
    again = case.policy(teacher="new/smaller.pt", total_timesteps=48)
    assert again["network"] == load("new/smaller.pt")["network"] != teacher["network"]
    assert os.listdir("new") == ["smaller.pt"]  # no temporary files


@by_case([case for case in CASES if case.suite == "procgen" and case.distills])
def test_levels_are_as_difficult_as_the_teachers(folder, case):
    teacher = load(make_teacher("procgen"))
    for of_teacher, flag, expected in ("hard", None, "hard"), ("hard", "easy", "easy"), (None, None, "easy"):
        torch.save({**teacher, "args": {"distribution_mode": of_teacher} if of_teacher else {}}, "teacher.pt")
        assert case.policy(distribution_mode=flag, total_timesteps=48)["args"]["distribution_mode"] == expected


def save_for_ever():
    for i in range(10**9):
        ppd_continuous.save("state.pt", {"i": i, "x": torch.full((2_000_000,), float(i))})


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_while_saving(folder):
    """The file is whole at any moment."""
    moments, reached = random.Random(0), set()
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        process.start()
        while not os.path.exists("state.pt"):
            time.sleep(0.01)
        time.sleep(0.1 + moments.random() / 2)
        process.kill()
        process.join()
        content = load("state.pt")
        assert (content["x"] == content["i"]).all()
        reached.add(content["i"])
    assert max(reached) > 1


def test_a_resumed_run_overwrites_only_its_own_policy(folder, capsys):
    make_teacher()
    made = str(PPD.run(save_path="mine.pt"))
    with refused(capsys, "--save-path teacher.pt", "exists"):
        PPD.run(resume=made, save_path="teacher.pt")
    PPD.run(resume=made, save_path="mine.pt", total_timesteps=144)
    assert load("mine.pt")["global_step"] == 144


@by_case([case for case in CASES if case.suite == "procgen"])
def test_without_procgen(folder, capsys, monkeypatch, case):
    make_teacher("procgen")
    monkeypatch.setitem(sys.modules, "procgen", None)
    with refused(capsys, "--env-id starpilot", "procgen needs Python 3.10 to 3.12", "Linux"):
        case.run()
