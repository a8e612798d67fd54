"""Losses, advantages, divergences and initial networks against independent computations: numpy in float64 with finite
differences, torch.distributions, stable-baselines3, and the paper's formulas."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import make_policy_file, same_bits, train_briefly
from stable_baselines3.common import distributions
from stable_baselines3.common.buffers import RolloutBuffer
from torch.distributions import Independent, Normal, kl_divergence

import ppd_continuous
import train_teacher

CLIP = 0.2


def assert_close(actual, expected, rtol=1e-5, atol=1e-8):
    np.testing.assert_allclose(torch.as_tensor(actual).detach().numpy(), expected, rtol=rtol, atol=atol)


def finite_differences(function, x, h=1e-6):
    """The gradient of a function of a float64 vector, by central differences."""
    return np.array([(function(x + step) - function(x - step)) / (2 * h) for step in np.eye(len(x)) * h])


# --- ADVANTAGES ---


def random_rollout(num_steps=12, num_envs=40, dtype=np.float64):
    """Made-up rewards, values, values of last observations, values after the rollout, terminated, truncated."""
    rng = np.random.default_rng(5)
    rewards, values, final_values = rng.normal(size=(3, num_steps, num_envs)).astype(dtype)
    last_values = rng.normal(size=num_envs).astype(dtype)
    terminated, truncated = rng.random((2, num_steps, num_envs)) < 0.25
    kinds = terminated + 2 * truncated  # each occurs after each other, and in the rollout's last step
    assert len(set(zip(kinds[:-1].flat, kinds[1:].flat, strict=True))) == 16 and len(set(kinds[-1])) == 4
    return rewards, values, final_values, last_values, terminated, truncated


def true_successors(values, final_values, last_values, terminated, truncated):
    """V(s_t+1) as the scripts build it."""
    next_values = np.concatenate([values[1:], last_values[None]])
    next_values[terminated] = 0
    only_truncated = truncated & ~terminated
    next_values[only_truncated] = final_values[only_truncated]
    return next_values


@pytest.mark.parametrize("gae_lambda", [0, 0.9, 1])
def test_advantages_from_the_definition(script, gae_lambda):
    """(1-λ) Σ λ^(n-1) times the n-step advantages, of which the last, where episode or rollout ends, takes the rest."""
    rewards, values, final_values, last_values, terminated, truncated = random_rollout()
    gamma, (num_steps, num_envs) = 0.97, rewards.shape
    expected = np.zeros_like(rewards)
    for t in range(num_steps):
        for i in range(num_envs):
            discounted = 0
            for n in range(1, num_steps - t + 1):
                last = t + n - 1
                discounted += gamma ** (n - 1) * rewards[last, i]
                if terminated[last, i]:
                    bootstrap, over = 0, True
                elif truncated[last, i]:
                    bootstrap, over = final_values[last, i], True
                else:
                    over = last == num_steps - 1
                    bootstrap = last_values[i] if over else values[last + 1, i]
                weight = gae_lambda ** (n - 1) * (1 if over else 1 - gae_lambda)
                expected[t, i] += weight * (discounted + gamma**n * bootstrap - values[t, i])
                if over:
                    break
    next_values = true_successors(values, final_values, last_values, terminated, truncated)
    inputs = [torch.from_numpy(array) for array in (rewards, values, next_values, terminated | truncated)]
    assert_close(script.compute_advantages(*inputs, gamma, gae_lambda), expected, rtol=1e-10, atol=1e-12)


def test_advantages_of_stable_baselines3(script):
    rewards, values, final_values, last_values, terminated, truncated = random_rollout(dtype=np.float32)
    gamma, gae_lambda, (num_steps, num_envs) = 0.995, 0.9, rewards.shape
    ended = terminated | truncated
    space = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(num_steps, space, space, "cpu", gae_lambda, gamma, num_envs)
    starts = np.ones(num_envs)
    for t in range(num_steps):
        reward = rewards[t] + gamma * final_values[t] * (truncated[t] & ~terminated[t])  # its collect_rollouts
        nothing = np.zeros((num_envs, 1))
        buffer.add(nothing, nothing, reward, starts, torch.from_numpy(values[t]), torch.zeros(num_envs))
        starts = ended[t]
    buffer.compute_returns_and_advantage(torch.from_numpy(last_values), ended[-1])
    next_values = true_successors(values, final_values, last_values, terminated, truncated)
    inputs = [torch.from_numpy(array) for array in (rewards, values, next_values, ended)]
    advantages = script.compute_advantages(*inputs, gamma, gae_lambda)
    assert_close(advantages, buffer.advantages, rtol=1e-4, atol=1e-5)
    assert_close(advantages + inputs[1], buffer.returns, rtol=1e-4, atol=1e-5)


# --- LOSSES ---


def surrogate(ratio, advantages, norm_adv):
    if norm_adv and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    return np.minimum(ratio * advantages, np.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("n", [1, 64])
def test_ppo_loss(script, norm_adv, n):
    rng = np.random.default_rng(3)
    logratio, advantages = rng.normal(size=n) * 0.3, rng.normal(size=n) + 0.5
    if n > 1:  # above and below the clip range, and within, with both signs of the advantage
        ranges = np.digitize(np.exp(logratio), [1 - CLIP, 1 + CLIP])
        assert {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)} == set(zip(ranges, advantages > 0, strict=True))

    def objective(x):
        return -surrogate(np.exp(x), advantages, norm_adv).mean()

    x = torch.tensor(logratio, requires_grad=True)
    loss = script.ppo_loss(x, torch.from_numpy(advantages), CLIP, norm_adv)
    loss.backward()
    assert_close(loss, objective(logratio), rtol=1e-10)
    assert_close(x.grad, finite_differences(objective, logratio))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_ppd_objective(direction):
    """PPD's objective as the paper writes it, and its gradient in the student's mean and log standard deviation."""
    rng = np.random.default_rng(4)
    n, dim, weight = 150, 3, 1.7
    old_mean, teacher_mean, noise = rng.normal(size=(3, n, dim))
    old_logstd, teacher_logstd = np.array([[0.1, -0.4, -0.2], [-0.6, 0.3, -0.1]])
    mean, logstd = old_mean + 0.2 * rng.normal(size=(n, dim)), old_logstd + [-0.1, 0.05, 0.1]
    actions, advantages = old_mean + np.exp(old_logstd) * noise, rng.normal(size=n)

    def logprob(mean, logstd):
        std = np.exp(logstd)
        return np.log(np.exp(-((actions - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)).sum(1)

    def kl(mean_p, std_p, mean_q, std_q):
        return (np.log(std_q / std_p) + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 1 / 2).sum(1)

    def objective(x):
        mean, logstd = x[:-dim].reshape(n, dim), x[-dim:]
        ratio = np.exp(logprob(mean, logstd) - logprob(old_mean, old_logstd))
        policies = [(teacher_mean, np.exp(teacher_logstd)), (mean, np.exp(logstd))]
        (p, q) = policies if direction == "forward" else policies[::-1]
        return -(surrogate(ratio, advantages, True) - weight * kl(*p, *q) * np.maximum(ratio, 1 - CLIP)).mean()

    inputs = (actions, old_mean, old_logstd, teacher_mean, teacher_logstd, advantages)
    actions_, old_mean_, old_logstd_, teacher_mean_, teacher_logstd_, advantages_ = map(torch.from_numpy, inputs)
    x = torch.tensor(np.concatenate([mean.ravel(), logstd]), requires_grad=True)
    student = x[:-dim].view(n, dim), x[-dim:]
    old_logprob = ppd_continuous.gaussian_logprob(actions_, old_mean_, old_logstd_)
    logratio = ppd_continuous.gaussian_logprob(actions_, *student) - old_logprob
    bound = (logratio.exp() < 1 - CLIP).double().mean()
    assert 0.2 < bound < 0.8  # the clip of the distillation term binds in some states, and not in others
    divergence = ppd_continuous.teacher_kl(teacher_mean_, teacher_logstd_, *student, direction)
    loss = ppd_continuous.ppo_loss(logratio, advantages_, CLIP, True)
    loss = loss + weight * ppd_continuous.distillation_loss(logratio, divergence, CLIP)
    loss.backward()
    assert_close(loss, objective(x.detach().numpy()), rtol=1e-10)
    assert_close(x.grad, finite_differences(objective, x.detach().numpy()))


@pytest.mark.parametrize("kl_mode", ["none", "forward", "reverse"])
def test_gradient_of_the_whole_update(folder, monkeypatch, kl_mode):
    """The gradients in the midst of a run are those of sb3_distill's formulas (and, without a teacher, of
    stable-baselines3's PPO) in float64."""
    script = train_teacher if kl_mode == "none" else ppd_continuous
    coefficients = dict(env_id="Swimmer-v4", minibatch_size=32, ent_coef=0.03, vf_coef=0.4, learning_rate=0.01)
    if kl_mode != "none":
        teacher_path = make_policy_file("teacher.pt", script, "Swimmer-v4")
        coefficients |= dict(teacher=teacher_path, distill_lambda=0.7, kl=kl_mode)
    calls, originals = {}, {name: getattr(script, name) for name in ("gaussian_logprob", "compute_advantages")}
    forward, clip_grad_norm = script.MlpActor.forward, torch.nn.utils.clip_grad_norm_

    def recorded_logprob(actions, mean, logstd):
        if mean.requires_grad:
            calls["minibatch actions"] = actions
        else:
            calls["rollout"] = tuple(x.detach().clone().flatten(0, -2).double() for x in (actions, mean, logstd[None]))
        return originals["gaussian_logprob"](actions, mean, logstd)

    def recorded_advantages(rewards, values, *rest):
        advantages = originals["compute_advantages"](rewards, values, *rest)
        calls["advantages"], calls["returns"] = advantages.flatten().double(), (advantages + values).flatten().double()
        return advantages

    def recorded_forward(actor, obs):
        if torch.is_grad_enabled():
            calls["obs"] = obs.double()
        return forward(actor, obs)

    def recorded_clip(parameters, max_norm, **kwargs):
        calls["weights"] = [parameter.detach().clone() for parameter in parameters]
        calls["gradients"] = [parameter.grad.clone() for parameter in parameters]
        return clip_grad_norm(parameters, max_norm, **kwargs)

    monkeypatch.setattr(script, "gaussian_logprob", recorded_logprob)
    monkeypatch.setattr(script, "compute_advantages", recorded_advantages)
    monkeypatch.setattr(script.MlpActor, "forward", recorded_forward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
    policy = train_briefly(script, **coefficients)  # each record is left with the last rollout, or minibatch

    actor, critic = script.MlpActor(policy["network"]).double(), script.MlpCritic(policy["network"]).double()
    parameters = [*actor.parameters(), *critic.parameters()]
    for parameter, weight in zip(parameters, calls["weights"], strict=True):
        parameter.data.copy_(weight)
    obs, (actions, *old_policy) = calls["obs"], calls["rollout"]
    chosen, samples = (calls["minibatch actions"][:, None] == actions.float()).all(2).nonzero().T
    assert chosen.tolist() == list(range(32))  # each action of the minibatch is that of one sample of the rollout
    actions, advantages, returns = actions[samples], calls["advantages"][samples], calls["returns"][samples]

    def distribution(mean, logstd):
        return distributions.DiagGaussianDistribution(2).proba_distribution(mean, logstd)

    student, clip_range = distribution(*actor(obs)), 0.2
    old_logprob = distribution(*old_policy).log_prob(calls["rollout"][0])[samples]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = torch.exp(student.log_prob(actions) - old_logprob)
    assert ratio.min() < 0.8 < 1.2 < ratio.max()
    policy_loss_1 = advantages * ratio
    policy_loss_2 = advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    loss = -torch.min(policy_loss_1, policy_loss_2).mean()
    loss += -0.03 * student.entropy().mean() + 0.4 * torch.nn.functional.mse_loss(returns, critic(obs))
    if kl_mode != "none":
        file = script.read_file(teacher_path)
        teacher = distribution(*script.load_policy(file, teacher_path, "continuous", [8], 2)[0].double()(obs))
        pair = (teacher, student) if kl_mode == "forward" else (student, teacher)
        divergence = distributions.sum_independent_dims(distributions.kl_divergence(*pair))
        loss += 0.7 * torch.mean(torch.clamp(ratio, 1 - clip_range, None) * divergence)
    loss.backward()
    for parameter, gradient in zip(parameters, calls["gradients"], strict=True):
        assert parameter.grad.abs().max() > 0
        assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5 * parameter.grad.abs().max().item())


def test_ratio_metrics(script):
    ratio = np.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21])
    approx_kl, clipfrac = script.ratio_metrics(torch.tensor(np.log(ratio)), CLIP)
    assert approx_kl.item() == pytest.approx(np.mean(ratio - 1 - np.log(ratio)))
    assert clipfrac.item() == pytest.approx(3 / 6)


# --- GAUSSIANS ---


def random_gaussian(seed, n=20, dim=4):
    generator = torch.Generator().manual_seed(seed)
    mean, logstd = torch.randn((n, dim), generator=generator), torch.randn(dim, generator=generator) * 0.5
    return mean, logstd, Independent(Normal(mean, logstd.exp()), 1)


def test_gaussian_logprob_and_entropy(script):
    mean, logstd, distribution = random_gaussian(1)
    actions = mean + 3 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(script.gaussian_logprob(actions, mean, logstd), distribution.log_prob(actions))
    entropy = script.gaussian_entropy(logstd)
    assert entropy.shape == ()
    torch.testing.assert_close(entropy.expand(len(mean)), distribution.entropy())


def test_kl_and_its_direction():
    (*teacher, teacher_distribution), (*student, student_distribution) = random_gaussian(1), random_gaussian(2)
    forward = kl_divergence(teacher_distribution, student_distribution)
    torch.testing.assert_close(ppd_continuous.gaussian_kl(*teacher, *student), forward)
    torch.testing.assert_close(ppd_continuous.teacher_kl(*teacher, *student, "forward"), forward)
    reverse = kl_divergence(student_distribution, teacher_distribution)
    torch.testing.assert_close(ppd_continuous.teacher_kl(*teacher, *student, "reverse"), reverse)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_of_equal_policies(direction):
    mean, logstd, _ = random_gaussian(1)
    student = mean.clone().requires_grad_(), logstd.clone().requires_grad_()
    kl = ppd_continuous.teacher_kl(mean, logstd, *student, direction)
    kl.sum().backward()
    for tensor in (kl, student[0].grad, student[1].grad):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-5)


# --- NETWORKS ---


@pytest.mark.parametrize("size, thousands", [("smaller", 22.7), ("same", 95.8), ("larger", 322.7)])
def test_parameter_counts_of_table_4(size, thousands):
    """Means over Ant, HalfCheetah, Hopper and Humanoid."""
    hidden = train_teacher.SIZES["continuous"][size][1]
    assert ppd_continuous.HIDDEN.get(size, hidden) == hidden
    counts = []
    for obs_dim, action_dim in [(27, 8), (17, 6), (11, 3), (376, 17)]:
        network = dict(obs_shape=[obs_dim], actor_hidden=hidden, action_dim=action_dim, activation="relu")
        with torch.device("meta"):
            counts.append(sum(parameter.numel() for parameter in train_teacher.MlpActor(network).mean.parameters()))
    assert round(np.mean(counts) / 1000, 1) == thousands


def test_initial_networks(script):
    network = dict(obs_shape=[11], actor_hidden=[64, 32], critic_hidden=[20, 48], action_dim=3, activation="relu")
    generator = torch.Generator().manual_seed(0)
    actor, critic = script.MlpActor(network, generator), script.MlpCritic(network, generator)
    assert (actor.logstd == 0).all()
    for network, output_gain in ((actor.mean, 0.01), (critic.value, 1)):
        linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        assert all(isinstance(layer, torch.nn.ReLU) for layer in network[1::2]) and len(network) == 5
        for layer, gain in zip(linear, [math.sqrt(2), math.sqrt(2), output_gain], strict=True):
            weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=1e-4, atol=1e-6)
            assert (layer.bias == 0).all()


# --- RUNS ---


def test_first_ratio_of_every_rollout_is_one(script, folder, monkeypatch):
    changes = dict(teacher=make_policy_file("teacher.pt", script)) if script is ppd_continuous else {}
    ratios, statistics, loss, normalize = [], [], script.ppo_loss, script.MlpActor.normalize

    def recorded_loss(logratio, *rest):
        ratios.append(logratio.detach().exp())
        return loss(logratio, *rest)

    def recorded_normalize(actor, obs):
        statistics.append(actor.obs_rms.mean.clone())
        return normalize(actor, obs)

    monkeypatch.setattr(script, "ppo_loss", recorded_loss)
    monkeypatch.setattr(script.MlpActor, "normalize", recorded_normalize)
    train_briefly(script, learning_rate=0.01, total_timesteps=5 * 64, **changes)
    first = ratios[::8]  # of 2 epochs of 4 minibatches
    assert len(ratios) == 40 and [len(ratio) for ratio in ratios[:4]] == [20, 20, 20, 4]
    assert max((ratio - 1).abs().max() for ratio in first) < 1e-5
    assert min((ratio - 1).abs().max() for ratio in ratios[7::8]) > 0.01
    assert torch.equal(statistics[0], statistics[-1]) == (script is ppd_continuous)  # the teacher's move, here frozen


def test_teacher_runs_once_per_rollout_without_gradient(folder, monkeypatch):
    loaded, calls, load_policy = [], [], ppd_continuous.load_policy

    def recorded_load(*arguments):
        loaded.append(load_policy(*arguments))
        loaded[-1][0].register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
        return loaded[-1]

    monkeypatch.setattr(ppd_continuous, "load_policy", recorded_load)
    path = make_policy_file("teacher.pt", ppd_continuous)
    train_briefly(ppd_continuous, teacher=path, total_timesteps=3 * 64)
    ((actor, critic, return_rms),) = loaded
    assert calls == [64, 64, 64]
    file = ppd_continuous.read_file(path)
    for module, name in ((actor, "actor"), (critic, "critic"), (return_rms, "return_rms")):
        assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == []
        assert same_bits(module.state_dict(), file[name])


def test_lambda_zero_is_ppo(folder):
    """With λ = 0 a teacher matters by its statistics alone, to the bit."""
    teachers = [make_policy_file(f"{seed}.pt", ppd_continuous, seed=seed) for seed in range(2)]
    runs = {}
    for weight in (0.0, 1.0):
        for teacher in teachers:
            runs[weight, teacher] = train_briefly(ppd_continuous, teacher=teacher, distill_lambda=weight)
    first, second = (ppd_continuous.read_file(teacher) for teacher in teachers)
    assert same_bits(first["return_rms"], second["return_rms"]) and not same_bits(first["actor"], second["actor"])
    for part in ("actor", "critic"):
        assert same_bits(runs[0.0, teachers[0]][part], runs[0.0, teachers[1]][part])
    for teacher in teachers:
        assert not same_bits(runs[0.0, teacher]["actor"], runs[1.0, teacher]["actor"])
    assert not same_bits(runs[1.0, teachers[0]]["actor"], runs[1.0, teachers[1]]["actor"])
