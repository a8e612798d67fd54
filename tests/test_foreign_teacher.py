"""The README's snippet writes a policy file from a stable-baselines3 model: the same actions, values and inputs."""

import pathlib
import re

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import ppd_continuous

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("normalized", [True, False])
def test_snippet(tmp_path, monkeypatch, activation, normalized):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(snippet, names)
    envs = make_vec_env("InvertedPendulum-v4", n_envs=2, seed=1)
    envs = VecNormalize(envs, clip_obs=5.0) if normalized else envs
    kwargs = dict(activation_fn=activation, net_arch=dict(pi=[20, 10], vf=[30]))
    model = PPO("MlpPolicy", envs, n_steps=32, batch_size=32, policy_kwargs=kwargs, seed=1, device="cpu").learn(64)
    monkeypatch.chdir(tmp_path)
    names["export"](model, "InvertedPendulum-v4", "foreign.pt", envs if normalized else None)

    file = ppd_continuous.read_file("foreign.pt")
    actor, critic, return_rms = ppd_continuous.load_policy(file, "foreign.pt", "continuous", [4], 1)
    obs = np.random.default_rng(0).normal(size=(50, 4)) * 3
    seen = torch.as_tensor(envs.normalize_obs(obs) if normalized else obs, dtype=torch.float32)
    with torch.no_grad():
        inputs = actor.normalize(torch.from_numpy(obs))
        torch.testing.assert_close(inputs, seen)
        torch.testing.assert_close(actor(inputs)[0], model.policy.get_distribution(seen).distribution.mean)
        torch.testing.assert_close(critic(inputs), model.policy.predict_values(seen)[:, 0])
    torch.testing.assert_close(actor.logstd, model.policy.log_std)
    assert (return_rms is not None) == normalized
    if normalized:
        assert return_rms.var.item() == pytest.approx(envs.ret_rms.var)

    args = ["--teacher", "foreign.pt", "--total-timesteps", "64", "--num-envs", "2", "--num-steps", "32"]
    ppd_continuous.main(ppd_continuous.parse_args([*args, "--minibatch-size", "64", "--eval-episodes", "2"]))
    (student,) = tmp_path.glob("runs/*/student.pt")
    assert ppd_continuous.read_file(student)["network"] == file["network"]
