"""Write a policy file of this repository from a model of stable-baselines3 or CleanRL.

    python teachers/import_sb3.py MODEL.zip --env-id Hopper-v4 --vec-normalize FILE.pkl --output runs/teacher.pt
    python teachers/import_sb3.py agent.cleanrl_model --env-id PongNoFrameskip-v4 --output runs/teacher.pt

stable-baselines3: a model that PPO or A2C saved, with an MlpPolicy (any widths, tanh or ReLU, continuous
actions) or a CnnPolicy (discrete actions). If it was trained with VecNormalize, give the file that
VecNormalize.save() wrote.

CleanRL: the agent of ppo_continuous_action.py (tanh), ppo_atari.py or ppo_procgen.py, as the first of these
lines saves it at the end of the script. For ppo_continuous_action.py, add the second line too and give
--obs-stats: it trains with NormalizeObservation, whose statistics are not in the agent.

    torch.save(agent.state_dict(), "agent.cleanrl_model")
    np.savez("stats.npz", **vars(envs.envs[0].get_wrapper_attr("obs_rms")))

The observations must be those of this repository. Atari: 84x84 grey pixels of four frames, the newest last,
as from make_atari_env (...NoFrameskip-v4) and VecFrameStack, or from ppo_atari.py. Procgen: 64x64 RGB pixels.

A policy file has no place for other algorithms (SAC, TD3, DQN), discrete actions of an MLP, gSDE, recurrent
policies, other activations, features extractors of your own, and normalized pixels. Nothing in any of the
files is executed.
"""

import argparse
import io
import json
import math
import os
import pickle
import sys
import zipfile

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_teacher  # noqa: E402

TANH, RELU = "<class 'torch.nn.modules.activation.Tanh'>", "<class 'torch.nn.modules.activation.ReLU'>"
EXTRACTORS = [f"<class 'stable_baselines3.common.torch_layers.{name}'>" for name in ("FlattenExtractor", "NatureCNN")]
ARRAY_PARTS = {  # what arrays in a pickle are made of: names in each module of numpy
    "numpy": ["ndarray", "dtype"],
    "numpy.core.multiarray": ["_reconstruct", "scalar"],
    "numpy._core.multiarray": ["_reconstruct", "scalar"],
    "numpy.core.numeric": ["_frombuffer"],
    "numpy._core.numeric": ["_frombuffer"],
}


class Record:
    """An object in a pickle, of whatever class: only its attributes."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            vars(self).update(state)


class RecordUnpickler(pickle.Unpickler):
    """Reads numbers and arrays. Every other class or function becomes a Record: no code of the file is executed."""

    def find_class(self, module, name):
        return super().find_class(module, name) if name in ARRAY_PARTS.get(module, []) else Record


def read_model(path):
    """The state dict of a model, and the settings of stable-baselines3; CleanRL has none ({}). Settings that are not
    JSON are there twice, as pickles, which are not opened, and as text."""
    try:
        with zipfile.ZipFile(path) as archive:
            settings = json.loads(archive.read("data"))
            settings["version"] = archive.read("_stable_baselines3_version").decode().strip()
            weights = torch.load(io.BytesIO(archive.read("policy.pth")), map_location="cpu", weights_only=True)
    except Exception:  # zipfile and torch have many kinds of errors for a foreign file
        wanted = "a PPO or A2C model of stable-baselines3 or CleanRL: see --help"
        return train_teacher.load("MODEL", path, wanted), {}
    for name in [name for name in weights if name.startswith("features_extractor.")]:
        shared = weights.pop(name)  # 1.x has only this one; 2.x has all three
        weights.setdefault(f"pi_{name}", shared)
        weights.setdefault(f"vf_{name}", shared)
    return weights, settings


def read_vec_normalize(path):
    """The statistics of observations and of rewards, each under the names of the policy file, or None if not used."""
    obs_stats, reward_stats = None, None
    try:
        with open(path, "rb") as file:
            saved = RecordUnpickler(file).load()
        if saved.norm_obs:
            obs_stats = {"obs_rms.mean": saved.obs_rms.mean, "obs_rms.var": saved.obs_rms.var}
            obs_stats.update(obs_clip=saved.clip_obs, obs_epsilon=saved.epsilon)
        if saved.norm_reward:
            rms = {"mean": saved.ret_rms.mean, "var": saved.ret_rms.var, "count": saved.ret_rms.count}
            reward_stats = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in rms.items()}
    except Exception:  # pickle has many kinds of errors for a foreign file
        sys.exit(f"--vec-normalize {path}: missing, damaged, or not a file of VecNormalize.save()")
    return obs_stats, reward_stats


def read_obs_stats(path):
    """The statistics of gymnasium's NormalizeObservation, under the names of the policy file. CleanRL clips at 10."""
    try:
        with np.load(path) as arrays:
            obs_stats = {"obs_rms.mean": arrays["mean"], "obs_rms.var": arrays["var"]}
    except Exception:  # numpy has many kinds of errors for a foreign file
        sys.exit(f"--obs-stats {path}: missing, damaged, or not a file of np.savez with mean and var: see --help")
    return {**obs_stats, "obs_clip": 10, "obs_epsilon": 1e-8}


def sequential(weights, prefix):
    """Names of the layers of an MLP. They are at 0, 2, 4, ..., the activations between them."""
    count = sum(name.startswith(f"{prefix}.") and name.endswith(".weight") for name in weights)
    return [f"{prefix}.{2 * i}" for i in range(count)]


def layers_of(weights):
    """The kind of the networks, and the names of the layers of actor and critic, in the order of our networks."""
    if "actor_mean.0.weight" in weights:  # CleanRL's ppo_continuous_action.py
        return "mlp", sequential(weights, "actor_mean"), sequential(weights, "critic")
    if "network.0.weight" in weights:  # CleanRL's ppo_atari.py
        body = ["network.0", "network.2", "network.4", "network.7"]
        return "nature", [*body, "actor"], [*body, "critic"]
    if "network.0.conv.weight" in weights:  # CleanRL's ppo_procgen.py
        stage = ["conv", "res_block0.conv0", "res_block0.conv1", "res_block1.conv0", "res_block1.conv1"]
        body = [*(f"network.{i}.{layer}" for i in range(3) for layer in stage), "network.5"]
        return "impala", [*body, "actor"], [*body, "critic"]
    if "pi_features_extractor.cnn.0.weight" in weights:  # stable-baselines3's CnnPolicy
        body = ["features_extractor.cnn.0", "features_extractor.cnn.2", "features_extractor.cnn.4"]
        body.append("features_extractor.linear.0")
        actor, critic = ([f"{owner}_{layer}" for layer in body] for owner in ("pi", "vf"))
        return "nature", [*actor, "action_net"], [*critic, "value_net"]
    actor, critic = (sequential(weights, f"mlp_extractor.{name}") for name in ("policy_net", "value_net"))
    return "mlp", [*actor, "action_net"], [*critic, "value_net"]


def why_not(settings, kind):
    """Why a policy file cannot hold a model with these settings of stable-baselines3; None if it can."""
    module, options = settings["policy_class"]["__module__"], settings["policy_kwargs"]
    if module != "stable_baselines3.common.policies":
        return f"its policy is from {module}; those of PPO and A2C are from stable_baselines3.common.policies"
    if options.get("features_extractor_class", EXTRACTORS[0]) not in EXTRACTORS:
        return f"its features extractor is {options['features_extractor_class']}"
    if not options.get("normalize_images", True):
        return "its pixels are not divided by 255 (normalize_images=False)"
    if options.get("activation_fn", TANH) not in (TANH, RELU):
        return f"its activation is {options['activation_fn']}, not tanh or ReLU"
    if settings["use_sde"]:
        return "the standard deviations of its actions depend on the state (gSDE)"
    space, wanted = settings["action_space"][":type:"], "Box" if kind == "mlp" else "Discrete"
    if not space.endswith(f".{wanted}'>"):
        return f"its actions are {space}; with {kind} they must be {wanted}"


def fill(network, weights, layers, others):
    """Load the weights and biases of these layers into a network, in its order, and others by their names."""
    state = network.state_dict()
    names = [name for name in state if name.endswith((".weight", ".bias"))]
    tensors = [weights[f"{layer}.{part}"] for layer in layers for part in ("weight", "bias")]
    network.load_state_dict({**state, **dict(zip(names, tensors, strict=True)), **others})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a file of model.save(), or of torch.save(agent.state_dict())")
    parser.add_argument("--env-id", required=True, help="the environment: Hopper-v4, PongNoFrameskip-v4, coinrun")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--vec-normalize", metavar="FILE.pkl", help="a file of VecNormalize.save()")
    group.add_argument("--obs-stats", metavar="FILE.npz", help="a file of np.savez with mean and var: see above")
    parser.add_argument("--output", required=True, help="path of the policy file; it must not exist")
    args = parser.parse_args()
    if os.path.exists(args.output):
        sys.exit(f"--output {args.output}: this file exists")

    weights, settings = read_model(args.model)
    kind, actor_layers, critic_layers = layers_of(weights)
    reason = settings and why_not(settings, kind)
    if reason:
        sys.exit(f"MODEL {args.model}: a policy file has no place for it: {reason}")
    logstd = "log_std" if settings else "actor_logstd"
    wanted = {f"{layer}.{part}" for layer in actor_layers + critic_layers for part in ("weight", "bias")}
    if kind == "mlp":
        wanted.add(logstd)
    if set(weights) != wanted:
        unknown, missing = sorted(set(weights) - wanted), sorted(wanted - set(weights))
        sys.exit(f"MODEL {args.model}: none of the networks in --help: unknown {unknown[:3]}, missing {missing[:3]}")
    obs_stats, reward_stats = None, None
    if args.vec_normalize:
        obs_stats, reward_stats = read_vec_normalize(args.vec_normalize)
    if args.obs_stats:
        obs_stats = read_obs_stats(args.obs_stats)
    if obs_stats and kind != "mlp":
        sys.exit(f"MODEL {args.model}: a policy file has no place for it: its pixels are normalized")

    suite = train_teacher.suite_of(args.env_id)
    if (suite == "continuous") != (kind == "mlp"):
        needed = "mlp" if suite == "continuous" else "nature or impala"
        sys.exit(f"--env-id {args.env_id}: a policy for {suite} needs {needed}, MODEL {args.model} is {kind}")
    try:
        envs = train_teacher.make_envs(train_teacher.Args(env_id=args.env_id), 1)
    except gym.error.UnregisteredEnv as error:
        sys.exit(f"--env-id {args.env_id}: {error}")
    envs.close()

    is_tanh = kind == "mlp" and settings.get("policy_kwargs", {}).get("activation_fn", TANH) == TANH
    step = 5 if kind == "impala" else 1  # a stage of IMPALA-CNN has five convolutions of one width
    widths = {name: len(weights[f"{name}.bias"]) for name in actor_layers + critic_layers}
    network = {
        "kind": kind,
        "activation": "tanh" if is_tanh else "relu",
        "actor_hidden": [widths[name] for name in actor_layers[:-1:step]],
        "critic_hidden": [widths[name] for name in critic_layers[:-1:step]],
        "obs_shape": list(envs.obs_shape),
        "action_dim": envs.action_dim,
    }
    actor, critic = train_teacher.make_networks(network)
    others = {}
    if kind == "mlp":
        statistics = obs_stats or {"obs_clip": math.inf, "obs_epsilon": 0.0}  # observations as they are
        others = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in statistics.items()}
        others["logstd"] = weights[logstd].flatten()
    try:
        fill(actor, weights, actor_layers, others)
        fill(critic, weights, critic_layers, {})
    except RuntimeError as error:
        spaces = f"obs_shape {network['obs_shape']}, action_dim {network['action_dim']}"
        sys.exit(f"MODEL {args.model}: it does not fit {args.env_id}, {spaces}: {' '.join(str(error).split())}")
    policy = {"format": 1, "suite": suite, "env_id": args.env_id, "network": network, "return_rms": reward_stats}
    policy.update(actor=actor.state_dict(), critic=critic.state_dict(), global_step=settings.get("num_timesteps"))
    policy.update(score=None, args={}, versions={"stable-baselines3": settings["version"]} if settings else {})
    if kind == "mlp" and not obs_stats:
        flag = "VecNormalize, give --vec-normalize" if settings else "NormalizeObservation, give --obs-stats"
        print(f"warning: observations are not normalized; if the model was trained with {flag}, and another --output")
    train_teacher.save(args.output, policy)
    print(f"saved {args.output}: {kind}, {network['activation']}, {network['actor_hidden']}")


if __name__ == "__main__":
    main()
