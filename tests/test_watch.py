"""benchmark/watch.py: its scores are those of train_teacher.score_policy, and its films show what was played."""

import os
import subprocess
import sys

import cv2
import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from envs import Scripted
from helpers import CASES, ROOT, by_case, load, make_teacher, record, refused, run_command

import train_teacher

GAMES = {"atari": ROOT / "teachers/BreakoutNoFrameskip-v4.pt", "procgen": ROOT / "teachers/coinrun.pt"}


class Drawn(Scripted):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def render(self):
        return np.full((33, 41, 3), 40 + 30 * self.t, np.uint8)  # the later the step, the brighter


gym.register("Drawn-v0", lambda render_mode=None: Drawn(), max_episode_steps=100)


def watch(monkeypatch, line):
    monkeypatch.setenv("MUJOCO_GL", "")  # so that what the program chooses does not outlive the test
    run_command(monkeypatch, ["benchmark/watch.py", *line.split()])
    return imageio.imread(line.split()[-1], plugin="pillow" if line.endswith(".gif") else "pyav").astype(float)


def assert_scored(capsys, path, num_episodes):
    policy = load(path)
    args = train_teacher.Args(env_id=policy["env_id"], eval_episodes=num_episodes, num_envs=1)
    actor, _ = train_teacher.make_networks(policy["network"])
    actor.load_state_dict(policy["actor"])
    scored = train_teacher.score_policy(actor, args)
    scored = scored.get("test", scored)  # on Procgen: unseen levels
    *episodes, mean, _ = capsys.readouterr().out.splitlines()
    assert episodes == [f"episode {i}: {score:.2f}" for i, score in enumerate(scored["returns"], 1)]
    assert mean == f"mean: {scored['mean']:.2f} ± {scored['std']:.2f} over {num_episodes} episodes"


@pytest.mark.parametrize("extension, package", [("gif", "PIL"), ("mp4", "av")])
def test_continuous(folder, monkeypatch, capsys, extension, package):
    pytest.importorskip(package, reason="pip install -r benchmark/requirements.txt")
    make_teacher(env_id="Drawn-v0")
    film = watch(monkeypatch, f"teacher.pt --episodes 4 --seconds 0.2 --width 21 --output new/film.{extension}")
    assert_scored(capsys, "teacher.pt", 4)
    number = np.random.SeedSequence([100, 2]).generate_state(1)[0] % 1000
    levels = [40 + 30 * t for episode in range(4) for t in range(2 + (number + 2 * episode) % 5)]
    assert film.shape == (5, 16, 20, 3)  # of ten steps, at 25 frames per second, with even numbers of pixels
    np.testing.assert_allclose(film.mean((1, 2, 3)), levels[:10:2], atol=5)


@by_case([case for case in CASES if case.name == "train_teacher" and case.suite in GAMES])
def test_games(folder, monkeypatch, capsys, case):
    path = GAMES[case.suite]
    calls = record(monkeypatch, case.Envs, "step")
    film = watch(monkeypatch, f"{path} --episodes 3 --seconds 1 --output film.gif")
    seen = [result[0][0] for _, result in calls if result[0].shape[1:] == case.Envs.obs_shape]
    assert_scored(capsys, path, 3)
    assert film.shape == (15, *dict(atari=(210, 160, 3), procgen=(512, 512, 3))[case.suite])
    for frame, obs in zip(film[1:], seen, strict=False):  # the picture is what the policy sees
        small, obs = cv2.resize(frame, obs.shape[1:], interpolation=cv2.INTER_AREA), obs.transpose(1, 2, 0)
        if case.suite == "atari":
            small, obs = small @ [0.299, 0.587, 0.114], obs[..., -1]
        assert np.abs(small - obs).mean() < dict(atari=0.1, procgen=6)[case.suite] and frame.std() > 20


def test_mujoco(folder, monkeypatch, capsys):
    attempt = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
    environments = [{**os.environ, "MUJOCO_GL": backend} for backend in ("glfw", "egl", "osmesa")]
    if all(subprocess.run([sys.executable, "-c", attempt], env=env).returncode for env in environments):
        pytest.skip("MuJoCo finds no OpenGL here: apt install libegl1 or libosmesa6")
    film = watch(monkeypatch, f"{ROOT}/teachers/Hopper-v4.pt --fps 1 --output film.gif")
    assert_scored(capsys, ROOT / "teachers/Hopper-v4.pt", 1)
    assert film.shape == (8, 480, 480, 3)
    is_brown = (film[..., 0] > 2 * film[..., 2]) & (film[..., 0] > 80)
    assert is_brown.sum((1, 2)).min() > 500  # the robot stays in the picture


REFUSALS = [  # environment of teacher.pt, command line, what it says
    ("Drawn-v0", "foreign.pt", "policy foreign.pt: missing, damaged, or not a policy file"),
    ("Nothing-v0", "teacher.pt", "policy teacher.pt: Environment `Nothing` doesn't exist"),
    ("Drawn-v0", "teacher.pt --episodes 0", "--episodes"),
    ("Drawn-v0", "teacher.pt --output x.avi", "--output x.avi: the name must end in .mp4 or .gif"),
    ("Drawn-v0", "teacher.pt --output old.gif", "--output old.gif: this file exists"),
    ("Drawn-v0", "teacher.pt --output x.mp4", "pip install -r benchmark/requirements.txt, or write a .gif"),
    ("envs:Scripted-v0", "teacher.pt --output x.gif", "envs:Scripted-v0 cannot be filmed"),
    ("Pendulum-v1", "teacher.pt --output x.gif", "Pendulum-v1 cannot be filmed: pygame is not installed"),
    ("Hopper-v4", "teacher.pt --output x.gif", "MUJOCO_GL=egl, MUJOCO_GL=osmesa"),
]


@pytest.mark.parametrize("env_id, line, words", REFUSALS)
def test_refusals(folder, monkeypatch, capsys, env_id, line, words):
    make_teacher(env_id=env_id)
    torch.save({"actor": {}}, "foreign.pt")
    (folder / "old.gif").touch()
    for package in ("av", "pygame"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with refused(capsys, words):
        watch(monkeypatch, line)
