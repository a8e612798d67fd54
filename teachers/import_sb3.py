"""Write a policy file of this repository from a stable-baselines3 model.

    pip install stable-baselines3==2.9.2
    python teachers/import_sb3.py MODEL.zip --env-id Hopper-v4 --vec-normalize FILE.pkl --output runs/teacher.pt
    python ppd_continuous.py --teacher runs/teacher.pt

It reads PPO and A2C models (--algorithm) with an MlpPolicy, tanh or ReLU, for flat Box observations and actions. Give
--vec-normalize if the model was trained with VecNormalize: that file holds the statistics of observations and rewards.
It does not read CNN policies, discrete actions, gSDE, or a features extractor of your own. Loading a stable-baselines3
file runs Python code that is pickled in it: only load files that you trust.
"""

import argparse
import os
import pickle
import sys

import stable_baselines3
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

ACTIVATIONS = {nn.Tanh: "tanh", nn.ReLU: "relu"}
NOT_NEEDED = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": 0.2}  # unpickling these can fail


def mlp_tensors(name, body, head):
    """The tensors of a network under the names of the policy file: layers are at 0, 2, 4, ..., activations between."""
    layers = nn.Sequential(*body, head)
    return {f"{name}.{key}": tensor for key, tensor in layers.state_dict().items()}


def convert(model, env_id, vec_normalize=None):
    """The content of a policy file, from a model and the VecNormalize that it was trained with."""
    policy, body, obs_shape = model.policy, model.policy.mlp_extractor, model.observation_space.shape
    is_gaussian = type(getattr(policy, "action_dist", None)) is DiagGaussianDistribution
    is_plain = type(policy.features_extractor) is FlattenExtractor and policy.activation_fn in ACTIVATIONS
    if not (is_gaussian and is_plain and len(obs_shape) == 1 and body.policy_net and body.value_net):
        sys.exit("error: not an MlpPolicy with tanh or ReLU, for flat Box observations and actions, without gSDE")
    actor = mlp_tensors("mean", body.policy_net, policy.action_net)
    actor["logstd"] = policy.log_std.detach()
    mean, var, clip, epsilon = [0.0] * obs_shape[0], [1.0] * obs_shape[0], 1e30, 0.0  # observations as they are
    if vec_normalize and vec_normalize.norm_obs:
        mean, var = vec_normalize.obs_rms.mean, vec_normalize.obs_rms.var
        clip, epsilon = vec_normalize.clip_obs, vec_normalize.epsilon
    statistics = {"obs_rms.mean": mean, "obs_rms.var": var, "obs_rms.count": 0.0}
    for name, value in {**statistics, "obs_clip": clip, "obs_epsilon": epsilon}.items():
        actor[name] = torch.tensor(value, dtype=torch.float64)
    return_rms = None
    if vec_normalize and vec_normalize.norm_reward:
        rms = vars(vec_normalize.ret_rms)
        return_rms = {name: torch.tensor(rms[name], dtype=torch.float64) for name in ("mean", "var", "count")}
    network = {
        "kind": "mlp",
        "activation": ACTIVATIONS[policy.activation_fn],
        "actor_hidden": [layer.out_features for layer in body.policy_net[::2]],
        "critic_hidden": [layer.out_features for layer in body.value_net[::2]],
        "obs_shape": list(obs_shape),
        "action_dim": model.action_space.shape[0],
    }
    content = dict(format=1, suite="continuous", env_id=env_id, network=network, actor=actor)
    content["critic"] = mlp_tensors("value", body.value_net, policy.value_net)
    versions = {"stable-baselines3": stable_baselines3.__version__}
    return dict(content, return_rms=return_rms, global_step=model.num_timesteps, args={}, score=None, versions=versions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.zip", help="a file that model.save() wrote")
    parser.add_argument("--algorithm", choices=["ppo", "a2c"], default="ppo", help="of the model (default: ppo)")
    parser.add_argument("--env-id", required=True, help="the environment: Hopper-v4")
    parser.add_argument("--vec-normalize", metavar="FILE.pkl", help="a file that VecNormalize.save() wrote")
    parser.add_argument("--output", required=True, help="path of the policy file; it must not exist")
    args = parser.parse_args()
    if os.path.exists(args.output):
        sys.exit(f"--output {args.output}: this file exists")
    model = {"ppo": PPO, "a2c": A2C}[args.algorithm].load(args.model, device="cpu", custom_objects=NOT_NEEDED)
    vec_normalize = None
    if args.vec_normalize:
        with open(args.vec_normalize, "rb") as file:
            vec_normalize = pickle.load(file)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    torch.save(convert(model, args.env_id, vec_normalize), args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
