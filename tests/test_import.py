"""teachers/import_sb3.py: a policy file acts as the model did, and what it cannot hold is refused in one line."""

import os

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import NETWORKS, PPD, QUICK, assert_close, by_case, load, refused, result_of, run_command
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import train_teacher

PENDULUM, BREAKOUT = "InvertedPendulum-v4", "BreakoutNoFrameskip-v4"
gym.register("Images-v0", FakeImageEnv, kwargs=dict(action_dim=4, n_channels=4, screen_height=84, screen_width=84))


class Stage(nn.ModuleDict):  # ConvSequence of CleanRL's ppo_procgen.py
    def __init__(self, channels, filters):
        convs = [nn.Conv2d(width, filters, 3, padding=1) for width in (channels, *[filters] * 4)]
        blocks = [nn.ModuleDict({"conv0": convs[i], "conv1": convs[i + 1]}) for i in (1, 3)]
        super().__init__({"conv": convs[0], "res_block0": blocks[0], "res_block1": blocks[1]})

    def forward(self, x):
        x = nn.functional.max_pool2d(self["conv"](x), kernel_size=3, stride=2, padding=1)
        for block in (self["res_block0"], self["res_block1"]):
            x = x + block["conv1"](torch.relu(block["conv0"](torch.relu(x))))
        return x


def make_agent(suite, num_actions):
    """The networks of CleanRL's ppo_continuous_action.py, ppo_atari.py or ppo_procgen.py."""
    agent, relu = nn.Module(), nn.ReLU()
    if suite == "continuous":
        for name, outputs in (("critic", 1), ("actor_mean", num_actions)):
            layers = [nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
            agent.add_module(name, nn.Sequential(*layers))
        agent.actor_logstd = nn.Parameter(torch.linspace(-1, 0, num_actions)[None])
        return agent
    layers = [Stage(3, 16), Stage(16, 32), Stage(32, 32), nn.Flatten(), relu, nn.Linear(32 * 8 * 8, 256), relu]
    if suite == "atari":
        layers = [nn.Conv2d(4, 32, 8, 4), relu, nn.Conv2d(32, 64, 4, 2), relu, nn.Conv2d(64, 64, 3, 1), relu]
        layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 512), relu]
    agent.network = nn.Sequential(*layers)
    agent.actor, agent.critic = (nn.Linear(layers[-2].out_features, outputs) for outputs in (num_actions, 1))
    return agent


def import_model(monkeypatch, model, env_id, *more):
    """The policy file of a model, and its networks."""
    run_command(monkeypatch, ["teachers/import_sb3.py", model, "--env-id", env_id, "--output", "t.pt", *more])
    policy = load("t.pt")
    actor, critic = train_teacher.make_networks(policy["network"])
    actor.load_state_dict(policy["actor"])
    critic.load_state_dict(policy["critic"])
    return policy, actor, critic


class Hostile:
    def __reduce__(self):  # unpickling calls this function
        return os.mkdir, ("hostile",)


MODELS = [  # of stable-baselines3
    ("MlpPolicy", dict(net_arch=dict(pi=[20, 10], vf=[30]))),  # its default is tanh
    ("MlpPolicy", dict(activation_fn=nn.Tanh, net_arch=[])),
    ("MlpPolicy", dict(activation_fn=nn.ReLU, log_std_init=-1)),
    ("CnnPolicy", {}),
    ("CnnPolicy", dict(share_features_extractor=False, features_extractor_kwargs=dict(features_dim=64))),
]


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("policy, options", MODELS)
@pytest.mark.parametrize("statistics", [["--vec-normalize", "stats.pkl"], []])
def test_stable_baselines3(folder, monkeypatch, algorithm, policy, options, statistics):
    """Inputs, policy, values and the scale of rewards are kept. Of the pickles in the files, nothing is executed."""
    random = np.random.default_rng(0)
    train_id, env_id, obs = "Images-v0", BREAKOUT, random.integers(0, 256, (30, 4, 84, 84), np.uint8)
    if policy == "MlpPolicy":
        train_id, env_id, obs = PENDULUM, PENDULUM, random.normal(size=(30, 4)) * 9
    use = dict(norm_obs=bool(statistics) and policy == "MlpPolicy", norm_reward=bool(statistics))
    envs = VecNormalize(make_vec_env(train_id, seed=1), clip_obs=5.0, **use)
    envs.observation_space.seed(1)
    model = algorithm(policy, envs, n_steps=16, policy_kwargs=options, seed=1, device="cpu").learn(16)
    nn.init.orthogonal_(model.policy.action_net.weight)  # else it acts alike in all states
    model.hostile = envs.hostile = Hostile()
    model.save("model.zip")
    envs.save("stats.pkl")
    content, actor, critic = import_model(monkeypatch, "model.zip", env_id, *statistics)
    inputs, seen = actor.normalize(torch.from_numpy(obs)), envs.normalize_obs(obs)
    assert_close(inputs, seen)
    ours, theirs = actor.policy(actor(inputs)), model.policy.get_distribution(inputs)
    actions = torch.as_tensor(np.array([envs.action_space.sample() for _ in obs]))
    assert_close(ours.mode.clamp(-3, 3), model.predict(seen, deterministic=True)[0], rtol=1e-4, atol=1e-5)  # bounds
    assert_close(ours.log_prob(actions), theirs.log_prob(actions), rtol=1e-4, atol=1e-4)
    assert_close(critic(inputs), model.policy.predict_values(inputs)[:, 0], rtol=1e-4, atol=1e-5)
    assert content["return_rms"]["var"] == envs.ret_rms.var if statistics else content["return_rms"] is None
    assert not os.path.exists("hostile")


def test_mlp_of_cleanrl(folder, monkeypatch, capsys):
    """With statistics that are saved as --help says. Without them, a line says that they may be missing."""
    agent = make_agent("continuous", 2)
    torch.save(agent.state_dict(), "agent.cleanrl_model")
    env = gym.wrappers.NormalizeObservation(gym.make("envs:Scripted-v0", disable_env_checker=True))
    env.reset(seed=1)
    env.step(np.zeros(2))
    np.savez("stats.npz", **vars(env.get_wrapper_attr("obs_rms")))
    env.update_running_mean, obs = False, np.array([1.0, -50.0, 0.1])
    seen = torch.as_tensor(env.observation(obs)).clamp(-10, 10)
    model = ["agent.cleanrl_model", "envs:Scripted-v0"]
    _, actor, critic = import_model(monkeypatch, *model, "--obs-stats", "stats.npz")
    assert_close(actor.normalize(torch.from_numpy(obs)), seen)
    assert_close(actor(seen), agent.actor_mean(seen))
    assert_close(actor.policy(actor(seen)).base_dist.stddev, agent.actor_logstd[0].exp())
    assert_close(critic(seen), agent.critic(seen)[0])
    import_model(monkeypatch, *model, "--output", "other.pt")
    assert "NormalizeObservation, give --obs-stats" in capsys.readouterr().out


@by_case([case for case in QUICK if case.suite != "continuous"])
def test_cnn_of_cleanrl(folder, monkeypatch, case):
    obs_shape, num_actions = NETWORKS[case.suite]["obs_shape"], NETWORKS[case.suite]["action_dim"]
    agent = make_agent(case.suite, num_actions)
    torch.save(agent.state_dict(), "agent.cleanrl_model")
    _, actor, critic = import_model(monkeypatch, "agent.cleanrl_model", case.env_id)
    obs = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, *obs_shape), np.uint8))
    hidden = agent.network(obs / 255.0)
    assert_close(actor(obs), agent.actor(hidden), rtol=1e-4, atol=1e-5)
    assert_close(critic(obs), agent.critic(hidden)[:, 0], rtol=1e-4, atol=1e-5)


def sb3(algorithm=PPO, policy="MlpPolicy", env=PENDULUM, weights=None, **options):
    model = algorithm(policy, env, policy_kwargs=options, device="cpu")
    if weights:
        model.get_parameters = lambda: {"policy": weights}
    model.save("model.zip")


def cnn(**options):
    sb3(policy="CnnPolicy", env="Images-v0", **options)


REFUSALS = {  # functions that write model.zip, --env-id and more, words of the refusal
    "text": (lambda: np.savetxt("model.zip", [1.0]), PENDULUM, "MODEL model.zip: missing, damaged, or not"),
    "hostile": (lambda: torch.save({"actor.bias": Hostile()}, "model.zip"), BREAKOUT, "not a PPO or A2C model"),
    "hostile weights": (lambda: sb3(weights={"a": Hostile()}), PENDULUM, "not a PPO or A2C model"),
    "SAC": (lambda: sb3(SAC), PENDULUM, "stable_baselines3.sac.policies"),
    "DQN": (lambda: sb3(DQN, env="CartPole-v1"), PENDULUM, "stable_baselines3.dqn.policies"),
    "gSDE": (lambda: PPO("MlpPolicy", PENDULUM, use_sde=True).save("model.zip"), PENDULUM, "gSDE"),
    "ELU": (lambda: sb3(activation_fn=nn.ELU), PENDULUM, "activation.ELU"),
    "discrete": (lambda: sb3(env="CartPole-v1"), PENDULUM, "Discrete"),
    "extractor": (lambda: cnn(features_extractor_class=type("Own", (NatureCNN,), {})), BREAKOUT, "Own"),
    "raw pixels": (lambda: cnn(normalize_images=False), BREAKOUT, "not divided by 255"),
    "hidden layers": (lambda: cnn(net_arch=[16]), BREAKOUT, "unknown ['mlp_extractor.policy_net.0.bias'"),
    "CNN for an MLP": (cnn, PENDULUM, "needs mlp, MODEL model.zip is nature"),
    "MLP for a CNN": (sb3, BREAKOUT, "needs nature or impala, MODEL model.zip is mlp"),
    "other spaces": (sb3, "Hopper-v4", "does not fit Hopper-v4, obs_shape [11], action_dim 3"),
    "unknown id": (sb3, "Hoper-v4", "--env-id Hoper-v4: "),
    "normalized pixels": (cnn, f"{BREAKOUT} --vec-normalize stats.pkl", "its pixels are normalized"),
    "foreign .pkl": (cnn, f"{BREAKOUT} --vec-normalize model.zip", "not a file of VecNormalize.save()"),
    "foreign .npz": (cnn, f"{BREAKOUT} --obs-stats model.zip", "not a file of np.savez"),
    "existing": (cnn, f"{BREAKOUT} --output model.zip", "--output model.zip: this file exists"),
}


@pytest.mark.parametrize("write, arguments, words", REFUSALS.values(), ids=REFUSALS)
def test_refusals(folder, monkeypatch, capsys, write, arguments, words):
    write()
    VecNormalize(make_vec_env("Images-v0")).save("stats.pkl")
    with refused(capsys, words):
        import_model(monkeypatch, "model.zip", *arguments.split())


def test_distill_a_trained_model(folder, monkeypatch):
    """A real run: a model that stable-baselines3 trains here scores 1000, the maximum, and so does its student."""
    envs = VecNormalize(make_vec_env(PENDULUM, n_envs=8, seed=1))
    settings = dict(n_steps=64, batch_size=128, n_epochs=5, learning_rate=1e-3, gae_lambda=0.9, gamma=0.98)
    PPO("MlpPolicy", envs, **settings, seed=1, device="cpu").learn(14_000).save("model.zip")
    envs.save("stats.pkl")
    import_model(monkeypatch, "model.zip", PENDULUM, "--vec-normalize", "stats.pkl")
    sizes = dict(num_envs=8, num_steps=64, minibatch_size=128, update_epochs=4, total_timesteps=15_000, eval_episodes=4)
    result = result_of(PPD.run(teacher="t.pt", env_id=None, student_size="smaller", learning_rate=1e-3, **sizes))
    assert result["teacher"]["mean"] > 950 and result["ratio"] > 0.95
