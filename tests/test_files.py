"""Policy files and training states, and every refusal: one line, an exit code that is not 0, nothing made."""

import multiprocessing
import os
import pathlib
import pickle
import random
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    DISTILLING,
    NETWORKS,
    PPD,
    QUICK,
    assert_close,
    by_case,
    load,
    make_teacher,
    refused,
    run_command,
)
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

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
def test_weights_that_do_not_fit_their_network(folder, capsys, case):
    make_teacher(case.suite, path="other.pt")
    teacher = load("other.pt")
    teacher["actor"].popitem()
    torch.save(teacher, "other.pt")
    with refused(capsys, "--teacher other.pt", "Missing key"):
        case.run(teacher="other.pt")


REFUSALS = {
    "minibatch larger than rollout": (dict(minibatch_size=49), ["--minibatch-size", "48"]),
    "existing file": (dict(save_path="teacher.pt"), ["--save-path teacher.pt", "exists"]),
    "no episodes": (dict(eval_episodes=0), ["--eval-episodes"]),
    "unknown environment": (dict(env_id="Hoper-v4"), ["--env-id Hoper-v4: "]),
}


@pytest.mark.parametrize("kind", REFUSALS)
@by_case(QUICK)
def test_refused_arguments(folder, capsys, case, kind):
    make_teacher(case.suite)
    changes, words = REFUSALS[kind]
    if case.is_ppo or kind not in ("minibatch larger than rollout", "no episodes"):
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


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("normalized", [True, False])
def test_teachers_of_stable_baselines3(folder, monkeypatch, activation, normalized):
    """teachers/import_sb3.py keeps inputs, policy, values and the scale of rewards."""
    envs = make_vec_env("InvertedPendulum-v4", n_envs=2, seed=1)
    envs = VecNormalize(envs, clip_obs=5.0) if normalized else envs
    kwargs = dict(activation_fn=activation, net_arch=dict(pi=[20, 10], vf=[30]))
    model = PPO("MlpPolicy", envs, n_steps=32, batch_size=32, policy_kwargs=kwargs, seed=1, device="cpu").learn(64)
    model.save("model.zip")
    line = ["teachers/import_sb3.py", "model.zip", "--env-id", "InvertedPendulum-v4", "--output", "t.pt"]
    if normalized:
        envs.save("statistics.pkl")
        line += ["--vec-normalize", "statistics.pkl"]
    run_command(monkeypatch, line)
    policy = load("t.pt")
    actor, critic = (net(policy["network"]) for net in (ppd_continuous.MlpActor, ppd_continuous.MlpCritic))
    actor.load_state_dict(policy["actor"])
    critic.load_state_dict(policy["critic"])
    obs = np.random.default_rng(0).normal(size=(50, 4)) * 3
    seen = torch.as_tensor(envs.normalize_obs(obs) if normalized else obs, dtype=torch.float32)
    inputs = actor.normalize(torch.from_numpy(obs))
    theirs = model.policy.get_distribution(seen).distribution
    assert_close(inputs, seen)
    assert_close(actor(inputs), theirs.mean, rtol=1e-4, atol=1e-6)
    assert_close(actor.policy(actor(inputs)).base_dist.stddev, theirs.stddev)
    assert_close(critic(inputs), model.policy.predict_values(seen)[:, 0], rtol=1e-4, atol=1e-5)
    assert bool(policy["return_rms"]) == normalized
    assert not normalized or policy["return_rms"]["var"] == pytest.approx(envs.ret_rms.var)
    sizes = dict(total_timesteps=48)
    [case] = [case for case in CASES if case.name == "ppd_continuous"]
    assert case.policy(teacher="t.pt", env_id=None, **sizes)["network"] == policy["network"]


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
