"""What several test files need."""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F


def make_policy_file(path, module, env_id="InvertedPendulum-v4", seed=0, hidden=(16, 16), activation="relu", **changes):
    """Write a valid policy file with random networks, which depend on `seed`, and made-up statistics, which do not, by
    the functions of `module` (a script). `changes` replace top-level fields; None deletes one, but stands as it is in
    return_rms, where it means that there are none. Returns the path, a str."""
    env = module.make_env(env_id)
    (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    env.close()
    generator = torch.Generator().manual_seed(seed)
    network = dict(kind="mlp", activation=activation, actor_hidden=list(hidden), critic_hidden=list(hidden))
    network |= dict(obs_shape=[obs_dim], action_dim=action_dim)
    actor, critic = module.MlpActor(network, generator), module.MlpCritic(network, generator)
    return_rms = module.RunningMeanStd()
    with torch.no_grad():
        actor.mean[-1].weight *= 50  # actions that differ from state to state
        actor.logstd += torch.linspace(-1, -0.5, action_dim)
    statistics = torch.Generator().manual_seed(123)
    actor.obs_rms.update(torch.randn((100, obs_dim), generator=statistics, dtype=torch.float64) * 0.5 + 0.1)
    return_rms.update(torch.randn(100, generator=statistics, dtype=torch.float64) * 3)
    policy = dict(format=module.FORMAT, suite="continuous", env_id=env_id, network=network, actor=module.plain(actor))
    policy |= dict(critic=module.plain(critic), return_rms=module.plain(return_rms), global_step=0)
    policy |= dict(args=dataclasses.asdict(module.Args(env_id=env_id)), versions=module.versions())
    policy |= changes
    policy = {name: value for name, value in policy.items() if value is not None or name == "return_rms"}
    module.save_atomically(path, lambda file: torch.save(policy, file))
    return str(path)


def make_game_file(path, module, env_id="BreakoutNoFrameskip-v4", seed=0, kind="nature", widths=(4, 4, 4, 16)):
    """The same for a game of Atari or Procgen, with small random networks whose policy differs from state to state."""
    suite = "procgen" if "-" not in env_id else "atari"
    envs = (module.ProcgenEnvs if suite == "procgen" else module.AtariEnvs)(env_id, 1)
    network = dict(kind=kind, activation="relu", actor_hidden=list(widths), critic_hidden=list(widths))
    network |= dict(obs_shape=list(envs.obs_shape), action_dim=envs.action_dim)
    envs.close()
    actor, critic = module.make_networks(network, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        actor.logits.head.weight *= 100
    policy = dict(format=module.FORMAT, suite=suite, env_id=env_id, network=network, actor=module.plain(actor))
    policy |= dict(critic=module.plain(critic), return_rms=None, global_step=0, versions=module.versions())
    policy |= dict(args=dataclasses.asdict(module.Args(env_id=env_id)))
    module.save_atomically(path, lambda file: torch.save(policy, file))
    return str(path)


def independent_cnn(kind, weights, obs):
    """The outputs of the paper's networks in float64, from their definition."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    convolutions = [name[: -len(".weight")] for name, tensor in weights.items() if tensor.dim() == 4]
    linear = [name[: -len(".weight")] for name, tensor in weights.items() if tensor.dim() == 2]
    x = obs.double() / 255

    def convolve(x, stride=1, padding=0):
        name = convolutions.pop(0)
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)

    if kind == "nature":
        for stride in (4, 2, 1):
            x = convolve(x, stride).clamp(min=0)
    else:
        for _ in range(3):
            x = F.max_pool2d(F.pad(convolve(x, padding=1), (1, 1, 1, 1), value=-torch.inf), 3, 2)
            for _ in range(2):
                x = x + convolve(convolve(x.clamp(min=0), padding=1).clamp(min=0), padding=1)
        x = x.clamp(min=0)
    assert not convolutions
    x = x.reshape(len(x), -1)
    for name in linear:
        x = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        x = x.clamp(min=0) if name != linear[-1] else x
    return x


def run(module, arguments):
    """Run a script in this process and in the working directory; the path of the folder that it makes."""
    before = set(pathlib.Path(".").glob("runs/*"))
    module.main(module.parse_args([str(argument) for argument in arguments]))
    (made,) = set(pathlib.Path(".").glob("runs/*")) - before
    return made


def result_of(made):
    """The result.json in the folder of a run, a dict."""
    return json.loads((made / "result.json").read_text())


def check_refused(capsys, module, arguments, *words):
    """A command line ends with exit code 2 and one line on stderr that holds the words, and nothing is created."""
    before = sorted(pathlib.Path(".").rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args([str(argument) for argument in arguments]))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert sorted(pathlib.Path(".").rglob("*")) == before


def train_briefly(module, **changes):
    """A small run of a script in this process and in the working directory; the policy that it writes, a dict."""
    args = dict(env_id="InvertedPendulum-v4", total_timesteps=192, num_envs=4, num_steps=16, minibatch_size=20)
    args |= dict(update_epochs=2, eval_episodes=0, env_threads=1, cuda=False, save_path="policy.pt", overwrite=True)
    args |= changes
    module.main(module.Args(**args))
    return module.read_file(args["save_path"])


def same_bits(first, second):
    """Whether two dicts of tensors, such as state dicts, are equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def strike(monkeypatch, owner, name, count, action):
    """Do `action` in the count-th call of the function."""
    calls, original = itertools.count(1), getattr(owner, name)

    def struck(*arguments, **options):
        if next(calls) == count:
            action()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, struck)


def kill_at_random_moments(module, arguments, times):
    """Kill a run of a script in a process of its own, by SIGKILL, after it has saved, then so the run that resumes it,
    …; the path of its folder and the step that it has reached. Each of them gets further than the last."""
    environment, reached = os.environ | {"OMP_NUM_THREADS": "1"}, 0
    for _ in range(times):
        line = [sys.executable, module.__file__, *map(str, arguments)]
        process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until, saved = time.time() + 120, reached
        while saved <= reached:
            assert process.poll() is None and time.time() < until
            time.sleep(0.02)
            for checkpoint in pathlib.Path(".").glob("runs/*/checkpoint.pt"):
                saved = module.read_file(checkpoint)["progress"]["global_step"]
        time.sleep(random.random() / 2)
        process.kill()
        process.wait()
        (made,) = pathlib.Path("runs").iterdir()
        reached, arguments = module.read_file(made / "checkpoint.pt")["progress"]["global_step"], ["--resume", made]
    return made, reached
