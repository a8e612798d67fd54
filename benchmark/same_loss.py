"""Loss and gradients of PPD beside those of the paper's own library, sb3_distill, with the same networks and rollouts.

    git clone https://github.com/spiglerg/sb3_distill runs/sb3_distill
    python benchmark/same_loss.py runs/sb3_distill

sb3_distill plays a rollout, its weights are changed a little, and it takes one gradient step on the whole rollout. The
lines of ppd_continuous.py and ppd_atari.py from `student_policy = ` to `loss = ` then run on the same rollout, with the
weights before that step. For each setting the program prints the relative difference of the losses, and that of the
gradients of actor and critic (the norm of the difference by the norm of the gradient), all in float32. Our convolutions
have another memory format and round differently: now and then the input of a ReLU falls on the other side of 0, which
changes the gradient. The number of these ReLUs is printed too. It needs the packages of tests/requirements.txt.
"""

import itertools
import os
import sys
import textwrap
import types

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, f"{ROOT}/teachers", *sys.argv[1:2]]
import import_sb3  # noqa: E402

import ppd_atari  # noqa: E402
import ppd_continuous  # noqa: E402

NUM_SAMPLES = 256
SUITES = {  # policy of sb3_distill, and the spaces
    "continuous": ("MlpPolicy", gym.spaces.Box(-2, 2, (11,)), gym.spaces.Box(-1, 1, (3,))),
    "atari": ("CnnPolicy", gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6)),
}


class RandomEnv(gym.Env):
    """Observations, rewards and the ends of episodes are random."""

    def __init__(self, _, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(np.random.randn()), np.random.rand() < 0.1, False, {}


def fill(network, policy, suite, part):
    """Load the weights of a policy of stable-baselines3 into an actor (part 0) or a critic (part 1)."""
    weights = {name: weight.detach().clone() for name, weight in policy.state_dict().items()}
    logstd = {"logstd": weights["log_std"]} if suite == "continuous" and part == 0 else {}
    import_sb3.fill(network, weights, import_sb3.layers_of(weights)[1 + part], logstd)
    return network


def count_flips(network, pixels):
    """ReLUs of a CNN whose input has another sign in the memory format of stable-baselines3 than in ours."""
    ours = pixels.to(torch.float32, memory_format=torch.channels_last) / 255
    theirs, flips = pixels.float() / 255, 0
    for layer in network.body:
        ours, theirs = layer(ours), layer(theirs)
        flips += ((ours > 0) != (theirs > 0)).sum().item() * isinstance(layer, nn.ReLU)
    return flips


def compare(PPD, suite, kl, distill_lambda, seed):
    """The relative differences of loss and gradients, the ReLUs with inputs of other signs, and the share of samples in
    which max(ρ, 1-ε) is 1-ε."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    policy, *spaces = SUITES[suite]
    for space in spaces:
        space.seed(seed)
    networks = {"activation_fn": nn.ReLU, "share_features_extractor": False}
    networks["net_arch"] = [64, 64] if suite == "continuous" else []
    options = {"policy_kwargs": networks, "device": "cpu", "seed": seed}
    rollout = {"n_steps": NUM_SAMPLES, "batch_size": NUM_SAMPLES, "n_epochs": 1}
    coefficients = {"clip_range": 0.2, "ent_coef": 0.03, "vf_coef": 0.4, "max_grad_norm": 1e9}
    model = PPD(policy, RandomEnv(*SUITES[suite]), **rollout, **coefficients, **options)
    model.set_teacher(PPO(policy, RandomEnv(*SUITES[suite]), **options), distill_lambda=distill_lambda, kl_mode=kl)
    with torch.no_grad():
        for head in (model.policy.action_net, model.teacher_model.policy.action_net):
            head.weight *= 50  # as they come, they act alike in all states
    model.train = lambda: None  # the rollout alone
    model.learn(NUM_SAMPLES)
    del model.train
    with torch.no_grad():
        for parameter in model.policy.parameters():
            noise = 0.05 if suite == "continuous" else 0.01  # for ratios beyond 1±ε
            parameter += noise * torch.randn_like(parameter)

    script, kind = (ppd_continuous, "Mlp") if suite == "continuous" else (ppd_atari, "Cnn")
    network = {"kind": "mlp" if suite == "continuous" else "nature", "activation": "relu"}
    hidden = [64, 64] if suite == "continuous" else [32, 64, 64, 512]
    network.update(actor_hidden=hidden, critic_hidden=hidden, obs_shape=spaces[0].shape)
    network["action_dim"] = 3 if suite == "continuous" else 6
    Actor, Critic = getattr(script, f"{kind}Actor"), getattr(script, f"{kind}Critic")
    actor, critic = fill(Actor(network), model.policy, suite, 0), fill(Critic(network), model.policy, suite, 1)
    teacher_actor = fill(Actor(network), model.teacher_model.policy, suite, 0).requires_grad_(False)

    model.train()
    their_loss = model.logger.name_to_value["train/loss"]
    with torch.no_grad():  # a gradient is compared as weights of the same networks
        for parameter in model.policy.parameters():
            parameter.copy_(parameter.grad)
    their_gradients = fill(Actor(network), model.policy, suite, 0), fill(Critic(network), model.policy, suite, 1)

    samples = next(model.rollout_buffer.get())
    actions = samples.actions if suite == "continuous" else samples.actions.long().flatten()
    names = {"b_obs": samples.observations, "b_actions": actions, "b_logprobs": samples.old_log_prob}
    names.update(b_advantages=samples.advantages, b_returns=samples.returns, mb=slice(None))
    outputs = teacher_actor(samples.observations)
    names.update(b_teacher_means=outputs, b_teacher_logits=outputs, distill_lambda=distill_lambda)
    names.update(actor=actor, critic=critic, teacher_actor=teacher_actor)
    names["args"] = types.SimpleNamespace(kl=kl, clip_coef=0.2, ent_coef=0.03, vf_coef=0.4, ratio_grad=True)
    with open(script.__file__) as file:
        update = file.read().split("# UPDATE")[1].split("optimizer.zero_grad()")[0]
    lines = update[update.index("student_policy = ") :]
    exec(textwrap.dedent(" " * 20 + lines), {**vars(script), **names}, names)
    names["loss"].backward()

    ours = torch.cat([parameter.grad.flatten() for part in (actor, critic) for parameter in part.parameters()])
    theirs = torch.cat([gradient.flatten() for part in their_gradients for gradient in part.parameters()])
    cnns = [] if suite == "continuous" else [actor.logits, critic.value]
    flips = sum(count_flips(cnn, samples.observations) for cnn in cnns)
    clipped = (names["logratio"].exp() < 0.8).float().mean().item()
    return abs(names["loss"].item() / their_loss - 1), ((ours - theirs).norm() / theirs.norm()).item(), flips, clipped


def main():
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        sys.exit(__doc__)
    from sb3_distill.ppd import ProximalPolicyDistillation

    worst = []
    settings = itertools.product(SUITES, ("forward", "reverse"), (1.0, 5.0), (100, 200))
    for suite, kl, distill_lambda, seed in settings:
        loss, gradient, flips, clipped = compare(ProximalPolicyDistillation, suite, kl, distill_lambda, seed)
        setting = f"{suite}, {kl} KL, λ {distill_lambda:g}, seed {seed}"
        print(f"{setting}: loss {loss:.1e}, gradient {gradient:.1e}, {flips} ReLUs; ρ < 1-ε in {clipped:.0%}")
        worst.append((loss, gradient))
    print("largest: loss {:.1e}, gradient {:.1e}".format(*np.max(worst, axis=0)))


if __name__ == "__main__":
    main()
