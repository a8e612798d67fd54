"""Networks: Table 4 of the paper, an independent forward pass in float64, initial weights, policies, divergences."""

import importlib

import numpy as np
import pytest
import torch
from helpers import CASES, assert_close, by_case, forward, make_teacher, skip_evaluation
from torch.distributions import Categorical

SIZES = {  # kind, widths, thousands of parameters of the actor: Table 4; of the smaller CNN, the text's
    ("mlp", "smaller"): ([128, 64], {"continuous": 22.7}),
    ("mlp", "same"): ([256, 256], {"continuous": 95.8}),
    ("mlp", "larger"): ([512, 512], {"continuous": 322.7}),
    ("nature", "smaller"): ([32, 32, 32, 128], {"atari": 236, "procgen": 99}),
    ("impala", "same"): ([16, 32, 32, 256], {"atari": 1.1e3, "procgen": 626}),
    ("impala", "larger"): ([32, 64, 64, 1024], {"atari": 8.3e3, "procgen": 4.6e3}),
}
SPACES = {  # observations and numbers of actions of the paper's environments
    "continuous": [([27], 8), ([17], 6), ([11], 3), ([376], 17)],
    "atari": [([4, 84, 84], n) for n in (3, 4, 6, 6, 6, 9, 9, 9, 9, 18, 18)],
    "procgen": [([3, 64, 64], 15)],
}


def make(case, kind, widths, obs_shape, action_dim):
    network = dict(kind=kind, activation="relu", actor_hidden=widths, critic_hidden=widths)
    network.update(obs_shape=obs_shape, action_dim=action_dim)
    prefix = "Mlp" if case.suite == "continuous" else "Cnn"
    return getattr(case.module, f"{prefix}Actor")(network), getattr(case.module, f"{prefix}Critic")(network)


def observations(suite, shape, n=3):
    generator = torch.Generator().manual_seed(1)
    if suite == "continuous":
        return torch.randn((n, *shape), generator=generator)
    return torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", ["smaller", "same", "larger"])
@by_case([case for case in CASES if case.name.startswith("ppd")])
def test_table_4_and_forward_pass(case, size):
    ((kind, widths, table),) = [(k, *v) for (k, s), v in SIZES.items() if s == size and case.suite in v[1]]
    counts = []
    for obs_shape, action_dim in SPACES[case.suite]:
        with torch.device("meta"):
            actor, _ = make(case, kind, widths, obs_shape, action_dim)
        counts.append(sum(p.numel() for name, p in actor.named_parameters() if name != "logstd"))
    assert np.mean(counts) / 1000 == pytest.approx(table[case.suite], abs=0.5 if counts[0] < 1e6 else 50)
    obs = observations(case.suite, obs_shape)
    actor, critic = make(case, kind, widths, obs_shape, action_dim)
    for network in (actor, critic):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        found, expected = network(obs), forward(kind, network.state_dict(), obs)
        assert found.dtype == torch.float32 and found.shape == ((3, action_dim) if network is actor else (3,))
        assert_close(found.view(expected.shape), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@by_case([case for case in CASES if "_distill" not in case.name or case.suite == "continuous"])
def test_sizes_of_the_scripts(folder, monkeypatch, case):
    make_teacher(case.suite)
    skip_evaluation(monkeypatch, case)
    for (kind, size), (widths, table) in SIZES.items():
        if case.suite in table and (size != "same" or not case.distills):
            sizes = dict(num_steps=2, minibatch_size=4, total_timesteps=4, size=size, student_size=size)
            network = case.policy(**sizes)["network"]
            assert (network["kind"], network["actor_hidden"], network["critic_hidden"]) == (kind, widths, widths)


@by_case([case for case in CASES if case.name.startswith("ppd")])
def test_initial_weights(case):
    """Orthogonal, of gain √2 in the body, 0.01 for the policy and 1 for the value; biases and log std are 0."""
    for kind in ["mlp"] if case.suite == "continuous" else ["nature", "impala"]:
        obs_shape, action_dim = SPACES[case.suite][0]
        widths = [64, 32] if kind == "mlp" else [8, 16, 16, 64]
        for network, gain in zip(make(case, kind, widths, obs_shape, action_dim), (0.01, 1), strict=True):
            weights = [w.detach().flatten(1) for w in network.parameters() if w.dim() > 1]
            assert len(weights) == {"mlp": 3, "nature": 5, "impala": 17}[kind]
            for weight in weights:
                weight = weight if len(weight) <= weight.shape[1] else weight.T
                square = (gain if weight.shape == weights[-1].shape else 2**0.5) ** 2 * torch.eye(len(weight))
                assert_close(weight @ weight.T, square, rtol=1e-4, atol=1e-5)
            assert all((p == 0).all() for p in network.parameters() if p.dim() == 1)


def gaussian_kl(p, q):
    (mean_p, std_p), (mean_q, std_q) = p, q
    return (np.log(std_q / std_p) + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5).sum(1)


def test_gaussian_policy():
    """Log-probability, entropy and both divergences by their formulas."""
    module, rng = importlib.import_module("ppd_continuous"), np.random.default_rng(0)
    policies = []
    for _ in range(2):
        actor = module.MlpActor(dict(activation="relu", actor_hidden=[8], obs_shape=[3], action_dim=4)).double()
        actor.logstd.data = torch.from_numpy(rng.normal(size=4) * 0.5)
        means = rng.normal(size=(20, 4))
        policies.append((actor.policy(torch.from_numpy(means)), (means, actor.logstd.detach().exp().numpy())))
    (p, (mean, std)), (q, _) = policies
    actions = rng.normal(size=(20, 4))
    logprob = -((actions - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
    assert_close(p.log_prob(torch.from_numpy(actions)), logprob.sum(1), rtol=1e-10)
    assert_close(p.entropy(), np.full(20, np.log(std * np.sqrt(2 * np.pi * np.e)).sum()), rtol=1e-10)
    assert_close(module.kl_divergence(p, q), gaussian_kl(policies[0][1], policies[1][1]), rtol=1e-10)
    assert_close(module.kl_divergence(q, p), gaussian_kl(policies[1][1], policies[0][1]), rtol=1e-10)


@by_case([case for case in CASES if hasattr(case.module, "categorical_kl")])
def test_categorical_divergence(case):
    """By its formula; where a probability underflows, the divergence and its gradient are finite."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 20, 6)) * 3
    p, q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    policies = [Categorical(logits=torch.from_numpy(x)) for x in logits]
    assert_close(case.module.categorical_kl(*policies), (p * np.log(p / q)).sum(-1), rtol=1e-10)
    extreme = torch.tensor([[0.0, 200.0], [0.0, 1.0]], requires_grad=True)
    for x, y in (extreme, extreme.flip(0)):
        kl = case.module.categorical_kl(Categorical(logits=x), Categorical(logits=y))
        kl.backward(retain_graph=True)
        assert kl.isfinite() and kl > 0 and extreme.grad.isfinite().all()
