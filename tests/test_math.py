"""Advantages, losses, divergences and statistics against independent computations in float64."""

import importlib

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import NAMES, assert_close
from stable_baselines3.common import running_mean_std
from stable_baselines3.common.buffers import RolloutBuffer
from torch.distributions import Independent, Normal, kl_divergence

CLIP = 0.2
MODULES = {name: importlib.import_module(name) for name in NAMES}
by_script = pytest.mark.parametrize("script", [m for n, m in MODULES.items() if not n.endswith("_distill")])
by_ppd = pytest.mark.parametrize("script", [m for n, m in MODULES.items() if n.startswith("ppd")])


def finite_differences(function, x, h=1e-6):
    """The gradient of a function of a float64 vector, by central differences."""
    return np.array([(function(x + step) - function(x - step)) / (2 * h) for step in np.eye(len(x)) * h])


def random_rollout(dtype=np.float64, num_steps=12, num_envs=40):
    rng = np.random.default_rng(5)
    rewards, values = rng.normal(size=(2, num_steps, num_envs)).astype(dtype)
    return rewards, values, rng.normal(size=num_envs).astype(dtype), rng.random((num_steps, num_envs)) < 0.3


@pytest.mark.parametrize("gae_lambda", [0, 0.9, 1])
@by_script
def test_advantages_from_the_definition(script, gae_lambda):
    """(1-λ) Σ λ^(n-1) times the n-step advantages, of which the last, where episode or rollout ends, takes the rest."""
    rewards, values, next_value, dones = random_rollout()
    gamma, (num_steps, num_envs) = 0.97, rewards.shape
    expected = np.zeros_like(rewards)
    for t in range(num_steps):
        for i in range(num_envs):
            discounted = 0
            for n in range(1, num_steps - t + 1):
                last = t + n - 1
                discounted += gamma ** (n - 1) * rewards[last, i]
                over = dones[last, i] or last == num_steps - 1
                following = values[last + 1, i] if last < num_steps - 1 else next_value[i]
                bootstrap = 0 if dones[last, i] else following
                weight = gae_lambda ** (n - 1) * (1 if over else 1 - gae_lambda)
                expected[t, i] += weight * (discounted + gamma**n * bootstrap - values[t, i])
                if over:
                    break
    inputs = [torch.as_tensor(array, dtype=torch.float64) for array in (rewards, values, next_value, dones)]
    assert_close(script.compute_gae(*inputs, gamma, gae_lambda), expected, rtol=1e-10, atol=1e-12)


@by_script
def test_advantages_of_stable_baselines3(script):
    rewards, values, next_value, dones = random_rollout(np.float32)
    num_steps, num_envs = rewards.shape
    space = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(num_steps, space, space, "cpu", gae_lambda=0.9, gamma=0.995, n_envs=num_envs)
    starts, nothing = np.ones(num_envs), np.zeros((num_envs, 1))
    for t in range(num_steps):
        buffer.add(nothing, nothing, rewards[t], starts, torch.from_numpy(values[t]), torch.zeros(num_envs))
        starts = dones[t]
    buffer.compute_returns_and_advantage(torch.from_numpy(next_value), dones[-1])
    inputs = [torch.as_tensor(array, dtype=torch.float32) for array in (rewards, values, next_value, dones)]
    assert_close(script.compute_gae(*inputs, 0.995, 0.9), buffer.advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 64])
@by_script
def test_ppo_loss(script, n):
    rng = np.random.default_rng(3)
    logratio, advantages = rng.normal(size=n) * 0.3, rng.normal(size=n) + 0.5
    if n > 1:  # above, below and within the clip range, with both signs of the advantage
        ranges = np.digitize(np.exp(logratio), [1 - CLIP, 1 + CLIP])
        assert len(set(zip(ranges, advantages > 0, strict=True))) == 6

    def objective(x):
        a = (advantages - advantages.mean()) / advantages.std(ddof=1) if n > 1 else advantages
        return -np.minimum(np.exp(x) * a, np.clip(np.exp(x), 1 - CLIP, 1 + CLIP) * a).mean()

    x = torch.tensor(logratio, requires_grad=True)
    loss = script.ppo_loss(x, torch.from_numpy(advantages), CLIP)
    loss.backward()
    assert_close(loss, objective(logratio), rtol=1e-7)
    assert_close(x.grad, finite_differences(objective, logratio))


@by_ppd
def test_distill_loss(script):
    """The gradient flows through the ratio as through the divergence."""
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.normal(size=50) * 0.3, rng.random(50)])  # log-ratios and divergences
    assert 5 < (np.exp(x[:50]) < 1 - CLIP).sum() < 45

    def objective(x):
        return (x[50:] * np.maximum(np.exp(x[:50]), 1 - CLIP)).mean()

    inputs = torch.tensor(x, requires_grad=True)
    loss = script.distill_loss(inputs[:50], inputs[50:], CLIP)
    loss.backward()
    assert_close(loss, objective(x), rtol=1e-10)
    assert_close(inputs.grad, finite_differences(objective, x))


def test_the_gradient_through_the_ratio_has_mean_zero():
    """So --no-ratio-grad has, before the clip, the same mean over actions as the paper's gradient, and less noise."""
    torch.manual_seed(0)
    distill_loss = MODULES["ppd_continuous"].distill_loss
    parameters = torch.randn(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)  # means, log std
    means, logstd = [parameter.requires_grad_() for parameter in parameters]
    student = Independent(Normal(means, logstd.exp()), 1)
    actions = student.sample([1_000_000])

    def gradient(actions, keeps_ratio):
        student = Independent(Normal(means, logstd.exp()), 1)
        kl = kl_divergence(Independent(Normal(torch.ones(3), 0.5), 1), student).expand(len(actions))
        logprobs = student.log_prob(actions)
        logratio = logprobs - logprobs.detach()  # ρ is 1, and the clip of max(ρ, 1-ε) does not act
        loss = distill_loss(logratio if keeps_ratio else logratio.detach(), kl, CLIP)
        return torch.cat(torch.autograd.grad(loss, parameters))

    mean = gradient(actions, False)
    assert_close(gradient(actions, True), mean, rtol=0, atol=0.03)
    assert (gradient(actions[:1], True) - mean).abs().max() > 0.5
    assert_close(gradient(actions[:1], False), mean, rtol=1e-9)


@pytest.mark.parametrize("script", MODULES.values())
def test_running_statistics(script):
    """Those of numpy and of stable-baselines3: all numbers so far, and 1e-4 of a number of mean 0 and variance 1."""
    rng = np.random.default_rng(0)
    ours, theirs, rows = script.RunningMeanStd([3]), running_mean_std.RunningMeanStd(shape=(3,)), np.zeros((0, 3))
    for n in (18, 1, 5, 18):
        batch = rng.normal(3, [1, 50, 0.1], size=(n, 3))
        rows = np.concatenate([rows, batch])
        ours.update(torch.from_numpy(batch))
        theirs.update(batch)
        count = len(rows) + 1e-4
        mean = rows.sum(0) / count
        var = (((rows - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)) / count
        for found, *expected in ((ours.mean, mean, theirs.mean), (ours.var, var, theirs.var)):
            assert found.dtype == torch.float64
            for value in expected:
                assert_close(found, value, rtol=1e-9)
