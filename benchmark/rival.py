"""Steps per second of the paper's own library, sb3_distill, and of stable-baselines3's PPO, with the paper's settings.

    git clone https://github.com/spiglerg/sb3_distill runs/sb3_distill
    python benchmark/rival.py runs/sb3_distill --env-id Hopper-v4 --student-size larger
    python benchmark/rival.py runs/sb3_distill --env-id Hopper-v4 --method ppo
    python benchmark/rival.py runs/sb3_distill --env-id Hopper-v4 --method student-distill
    python benchmark/rival.py runs/sb3_distill --env-id BreakoutNoFrameskip-v4 --student-size smaller

It measures MuJoCo and Atari, and needs the packages of tests/requirements.txt. The teacher is an untrained network of
the paper's size; with `--method ppo` there is none. The first rollouts are warm-up and are not counted. It prints
"steps/s X" at its end, as benchmark/speed.py expects of a rival.
"""

import argparse
import os
import sys
import time

import ale_py
import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize
from torch import nn

gymnasium.register_envs(ale_py)  # at import: the processes of SubprocVecEnv need the games, too

NUM_ENVS = 18
HIDDEN = {"smaller": [128, 64], "same": [256, 256], "larger": [512, 512]}


class SmallerCnn(BaseFeaturesExtractor):
    """The paper's smaller student: Nature-CNN with 32 filters in each layer and 128 units."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 128)
        layers = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 32, 4, 2), nn.ReLU()]
        layers += [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, obs: torch.Tensor):
        return self.body(obs)


class Clock(BaseCallback):
    """Note when each rollout begins."""

    def __init__(self):
        super().__init__()
        self.times = []

    def _on_rollout_start(self):
        self.times.append(time.perf_counter())

    def _on_step(self):
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkout of sb3_distill")
    parser.add_argument("--env-id", default="Hopper-v4")
    parser.add_argument("--method", choices=["ppd", "ppo", "student-distill", "teacher-distill"], default="ppd")
    parser.add_argument("--student-size", choices=HIDDEN, default="same")
    parser.add_argument("--seconds", type=float, default=20, help="of training, about (default: 20)")
    options = parser.parse_args()
    sys.path[:0] = [options.folder, os.path.join(options.folder, "examples")]
    from common import IMPALA_CNN
    from sb3_distill.ppd import ProximalPolicyDistillation
    from sb3_distill.student_distill import StudentDistill
    from sb3_distill.teacher_distill import TeacherDistill

    atari = "NoFrameskip" in options.env_id
    short = atari or options.env_id.startswith(("Hopper", "Swimmer"))  # rollouts of a teacher
    if atari:
        wrappers = dict(clip_reward=False, terminal_on_life_loss=True)
        env = make_atari_env(options.env_id, NUM_ENVS, 100, vec_env_cls=SubprocVecEnv, wrapper_kwargs=wrappers)
        env = VecFrameStack(VecNormalize(env, norm_obs=False), 4)
    else:
        env = VecNormalize(make_vec_env(options.env_id, NUM_ENVS, seed=100))  # DummyVecEnv, the faster one here
    settings = dict(gae_lambda=0.9, learning_rate=3e-4, device="cpu", seed=100)
    minibatches = dict(batch_size=512, n_epochs=4)

    def networks(size):
        if not atari:
            return dict(net_arch=dict(pi=HIDDEN[size], vf=HIDDEN[size]), activation_fn=nn.ReLU)
        apart = dict(net_arch=[], share_features_extractor=False)
        if size == "smaller":
            return dict(features_extractor_class=SmallerCnn, **apart)
        filters, units = {"same": ([16, 32, 32], 256), "larger": ([32, 64, 64], 1024)}[size]
        extractor = dict(conv_filters=filters, features_dim=units)
        return dict(features_extractor_class=IMPALA_CNN, features_extractor_kwargs=extractor, **apart)

    steps = dict(ppd=64, ppo=256 if short else 512).get(options.method, 5)
    policy, student = "CnnPolicy" if atari else "MlpPolicy", networks(options.student_size)
    settings |= dict(n_steps=steps, gamma=0.995 if options.method == "ppo" or short and not atari else 0.999)
    if options.method == "ppo":
        model = PPO(policy, env, policy_kwargs=student, ent_coef=0.01 if short else 0.0, **settings, **minibatches)
    else:
        teacher = PPO(policy, env, policy_kwargs=networks("same"), **settings, **minibatches)
        if options.method == "ppd":
            model = ProximalPolicyDistillation(policy, env, policy_kwargs=student, **settings, **minibatches)
        else:
            method = {"student-distill": StudentDistill, "teacher-distill": TeacherDistill}[options.method]
            model = method(policy, env, policy_kwargs=student, ent_coef=0.0, **settings)
        model.set_teacher(teacher)

    samples, clock = NUM_ENVS * steps, Clock()
    warm_up = samples if options.method in ("ppd", "ppo") else 20 * samples  # short ones need more to be warm
    begin = time.perf_counter()
    model.learn(warm_up, callback=clock)
    rollouts = max(1, round(options.seconds / (time.perf_counter() - begin) * warm_up / samples))
    clock.times.clear()
    model.learn(rollouts * samples, callback=clock, reset_num_timesteps=False)
    seconds = time.perf_counter() - clock.times[0]
    print(f"{options.method} {options.env_id} {options.student_size} steps/s {rollouts * samples / seconds:.1f}")


if __name__ == "__main__":
    main()
