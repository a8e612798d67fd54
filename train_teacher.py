"""Train a teacher with Proximal Policy Optimization (PPO, https://arxiv.org/abs/1707.06347) in the settings of Proximal
Policy Distillation (PPD, https://arxiv.org/abs/2407.15134), on MuJoCo, Atari or Procgen.

    python train_teacher.py --env-id Hopper-v4 --save-path runs/hopper.pt
    python train_teacher.py --env-id BreakoutNoFrameskip-v4 --save-path runs/teacher.pt
    python train_teacher.py --env-id coinrun --size smaller --seed 200

PPO is that of stable-baselines3, as in the paper. It differs from CleanRL's: episodes cut off by a time limit are
bootstrapped, the value loss is a plain mean squared error, the learning rate is constant, log-probabilities and values
are computed after the rollout, and on games too, rewards are scaled by a running standard deviation, and actor and
critic are two networks. SETTINGS has the paper's hyperparameters, and the field's usual ones for Breakout, which is not
in the paper.
"""

import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from importlib import metadata
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = os.path.basename(__file__)
NUM_CORES = torch.get_num_threads()  # follows OMP_NUM_THREADS
Distribution.set_default_validate_args(False)  # saves time
SIZES = {  # the paper, Table 4: kind of network, filters and hidden units
    "smaller": {"continuous": ("mlp", [128, 64]), "games": ("nature", [32, 32, 32, 128])},
    "same": {"continuous": ("mlp", [256, 256]), "games": ("impala", [16, 32, 32, 256])},
    "larger": {"continuous": ("mlp", [512, 512]), "games": ("impala", [32, 64, 64, 1024])},
}
HUMAN_SCORES = {  # of random play and of humans (Agent57, https://arxiv.org/abs/2003.13350)
    "atlantis": (12850, 29028.1), "beam_rider": (363.9, 16926.5), "breakout": (1.7, 30.5),
    "crazy_climber": (10780.5, 35829.4), "demon_attack": (152.1, 1971), "enduro": (0, 860.5),
    "freeway": (0, 29.6), "ms_pacman": (307.3, 6951.6), "pong": (-20.7, 14.6),
    "qbert": (163.9, 13455), "seaquest": (68.4, 42054.7), "zaxxon": (32.5, 9173.3),
}  # fmt: skip
SETTINGS = {  # the paper's (Table 3), but Breakout's: PPO does not learn it with the paper's
    "all": {"minibatch_size": 512, "gamma": 0.995, "gae_lambda": 0.9, "clip_coef": 0.2, "eval_episodes": 50},
    "atari": {"total_timesteps": 10_000_000, "num_steps": 256, "ent_coef": 0.01},
    "procgen": {"total_timesteps": 30_000_000, "num_steps": 512, "ent_coef": 0.01, "eval_episodes": 200},
    "continuous": {"total_timesteps": 10_000_000, "num_steps": 512, "ent_coef": 0.0},
    "Hopper": {"num_steps": 256, "ent_coef": 0.01},
    "Swimmer": {"num_steps": 256, "ent_coef": 0.01},
    "Breakout": {"num_steps": 128, "minibatch_size": 256, "gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.1},
}


@dataclasses.dataclass
class Args:
    exp_name: str = SCRIPT.removesuffix(".py")
    """name of the experiment"""
    seed: int = 100
    """seed of all that is random (the paper: 100 to 500)"""
    torch_deterministic: bool = True
    """make cuDNN deterministic"""
    cuda: bool = True
    """use the GPU, where there is one"""
    track: bool = False
    """also log to Weights and Biases"""

    env_id: str = "Hopper-v4"
    """MuJoCo or another gymnasium environment with flat Box spaces, Atari (...NoFrameskip-v4, ALE/...-v5), Procgen"""
    num_levels: int = 200
    """Procgen: number of training levels; 0: all there are"""
    start_level: int = 0
    """Procgen: number of the first training level"""
    distribution_mode: Literal["easy", "hard"] = "easy"
    """Procgen: difficulty of the levels"""
    size: Literal["smaller", "same", "larger"] = "same"
    """size of the networks (the paper, Table 4); its teachers are `same`"""
    total_timesteps: int | None = None
    """environment steps, rounded up to whole rollouts (default: SETTINGS)"""
    learning_rate: float = 3e-4
    """learning rate of Adam"""
    num_envs: int = 18
    """number of parallel environments"""
    num_steps: int | None = None
    """steps of each environment in a rollout (default: SETTINGS)"""
    gamma: float | None = None
    """discount factor (default: SETTINGS)"""
    gae_lambda: float | None = None
    """lambda of generalized advantage estimation (default: SETTINGS)"""
    minibatch_size: int | None = None
    """samples in a minibatch; the last of an epoch can be smaller (default: SETTINGS)"""
    update_epochs: int = 4
    """passes over each rollout"""
    clip_coef: float | None = None
    """clip range ε of the importance ratio (default: SETTINGS)"""
    ent_coef: float | None = None
    """coefficient of the entropy bonus (default: SETTINGS)"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    compile: bool = False
    """compile networks and loss"""
    amp: bool = False
    """compute convolutional networks in bfloat16"""

    eval_episodes: int | None = None
    """episodes of an evaluation (default: the paper's, 50; Procgen: 200 on unseen, 200 on training levels)"""
    eval_interval: int = 0
    """steps between evaluations; 0: only at the end"""
    save_path: str | None = None
    """path of the teacher's policy file (default: teacher.pt in the run folder)"""
    save_interval: float = 60.0
    """seconds between saves of the training state"""
    resume: str | None = None
    """run folder to continue, with its arguments as the defaults"""


def reset_envs(envs, seeds):
    random.seed(int(seeds[0]))  # for environments that draw from the global generators
    np.random.seed(seeds[0])
    return [np.array([env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)])]


def step_envs(envs, actions):
    steps = []
    for env, action in zip(envs, actions, strict=True):
        final_obs, reward, terminated, truncated, _ = env.step(action)
        final_obs = np.array(final_obs)  # a copy: reset may write into it
        obs = env.reset()[0] if terminated or truncated else final_obs
        steps.append((obs, float(reward), bool(terminated), bool(truncated), final_obs))
    return [np.array(column) for column in zip(*steps, strict=True)]


def receive(pipe):
    """Wait for a message; None: the other process has ended. Stay awake for 3 ms, as waking up takes long."""
    awake_until = time.perf_counter() + 0.003
    with contextlib.suppress(EOFError, ConnectionError):
        while not pipe.poll() and time.perf_counter() < awake_until:
            if hasattr(os, "sched_yield"):
                os.sched_yield()
        return pipe.recv()


def work(pipe, parent_pipe, env_id, num_envs):
    """A worker process: call the functions that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    # ContinuousEnvs.close sends SIGTERM. A second one must not stop the closing of the environments.
    signal.signal(signal.SIGTERM, lambda *_: (signal.signal(signal.SIGTERM, signal.SIG_IGN), sys.exit()))
    torch.set_num_threads(1)  # torch's threads are lost in a fork: an environment that uses torch would hang
    parent_pipe.close()  # else the end of the parent would not be seen
    with contextlib.ExitStack() as stack:  # closes the environments
        envs = [stack.enter_context(gym.make(env_id, disable_env_checker=True)) for _ in range(num_envs)]
        while call := receive(pipe):
            function, argument = call
            pipe.send(function(envs, argument))


class ContinuousEnvs:
    """Environments with flat Box observations and actions, split into one share per core: this process steps the first
    share, a worker process each of the others."""

    def __init__(self, env_id, num_envs):
        self.num_envs, self.pipes, self.processes = num_envs, [], []
        own_share, *other_shares = np.array_split(range(num_envs), min(num_envs, NUM_CORES))
        self.envs = [gym.make(env_id, disable_env_checker=True) for _ in own_share]
        self.action_space, self.obs_shape = self.envs[0].action_space, self.envs[0].observation_space.shape
        self.action_dim = gym.spaces.flatdim(self.action_space)
        for share in other_shares:
            pipe, worker_pipe = multiprocessing.Pipe()
            process = multiprocessing.Process(target=work, args=(worker_pipe, pipe, env_id, len(share)), daemon=True)
            process.start()
            worker_pipe.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def call(self, function, argument):
        """Call a function with each share and its part of the argument. Joins the arrays that come back."""
        part, *others = np.array_split(argument, len(self.pipes) + 1)
        for pipe, other in zip(self.pipes, others, strict=True):
            with contextlib.suppress(ConnectionError):  # its process has ended
                pipe.send((function, other))
        results = [function(self.envs, part), *map(receive, self.pipes)]
        if None in results:
            sys.exit("\nerror: a process with environments has ended; its error is above, if it had one")
        return [np.concatenate(arrays) for arrays in zip(*results, strict=True)]

    def reset(self, seed):
        """Start new episodes. Returns observations (num_envs, *obs_shape). seed: a list of ints."""
        self.returns, self.lengths = np.zeros((2, self.num_envs))
        return self.call(reset_envs, np.random.SeedSequence(seed).generate_state(self.num_envs))[0]

    def step(self, actions):
        """Returns observations (num_envs, *obs_shape), rewards, terminated, truncated (num_envs,), and {environment:
        (return, length)} of the episodes that ended. Where one did, its last observation is in final_obs."""
        actions = np.clip(actions, self.action_space.low, self.action_space.high)
        obs, rewards, terminated, truncated, self.final_obs = self.call(step_envs, actions)
        self.returns += rewards
        self.lengths += 1
        ended = terminated | truncated
        finished = {i: (self.returns[i], self.lengths[i]) for i in np.flatnonzero(ended)}
        self.returns[ended] = self.lengths[ended] = 0
        return obs, rewards, terminated, truncated, finished

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            process.terminate()
            pipe.close()
        for process in self.processes:  # only now: a worker has copies of the pipes of those before it
            process.join()
        for env in self.envs:
            env.close()


class AtariEnvs:
    """Atari games in ALE's vector environment: up to 30 no-ops at the start, every action for 4 frames, the maximum of
    the last two, grey, 84x84, 4 frames stacked. A lost life ends an episode for learning, but not the game. Where a
    game has FIRE, it is played at the start and after a lost life, whatever the action: many games wait for it."""

    obs_shape = (4, 84, 84)  # uint8, the newest frame last

    def __init__(self, env_id, num_envs):
        self.num_envs = num_envs
        options = gym.spec(env_id).kwargs
        self.game = options["game"]
        self.envs = ale_py.AtariVectorEnv(
            self.game,
            num_envs,
            num_threads=min(num_envs, NUM_CORES),
            repeat_action_probability=options["repeat_action_probability"],  # 0.25 in ALE/...-v5
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            use_fire_reset=False,
            reward_clipping=False,
        )
        game_actions = list(self.envs.ale.get_action_set())
        self.action_dim = len(game_actions)
        self.fire = game_actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in game_actions else None

    def reset(self, seed):
        """Start new games. Returns observations (num_envs, *obs_shape). seed: a list of ints."""
        seeds = np.random.SeedSequence(seed).generate_state(self.num_envs)
        obs, info = self.envs.reset(seed=seeds.astype(int) % 2**31)
        self.lives, self.needs_fire = info["lives"], np.ones(self.num_envs, bool)
        self.returns, self.lengths = np.zeros((2, self.num_envs))
        return obs

    def step(self, actions):
        """Returns observations (num_envs, *obs_shape), rewards, terminated (a lost life too), truncated (num_envs,),
        {environment: (score, length)} of the games that ended. The last observations of these are in final_obs."""
        if self.fire is not None:
            actions = np.where(self.needs_fire, self.fire, actions)
        obs, rewards, game_over, truncated, info = self.envs.step(actions)
        self.final_obs = info.get("final_obs", obs)
        life_lost = (0 < info["lives"]) & (info["lives"] < self.lives) & ~truncated
        self.lives, self.needs_fire = info["lives"], life_lost | game_over | truncated
        self.returns += rewards
        self.lengths += 1
        ended = game_over | truncated
        finished = {i: (self.returns[i], self.lengths[i]) for i in np.flatnonzero(ended)}
        self.returns[ended] = self.lengths[ended] = 0
        return obs, rewards.astype(float), game_over | life_lost, truncated, finished

    def close(self):
        self.envs.close()


class ProcgenEnvs:
    """Procgen games on num_levels levels from number start_level, or on all levels where num_levels is 0. Procgen does
    not tell time limits from other ends, so no episode is truncated."""

    obs_shape, action_dim = (3, 64, 64), 15  # uint8

    def __init__(self, env_id, num_envs, num_levels, start_level, distribution_mode):
        self.num_envs = num_envs
        sys.modules["gym_notices"] = None  # silences the old gym, which procgen imports
        try:
            from procgen import ProcgenGym3Env
            from procgen.env import ENV_NAMES
        except (ImportError, OSError) as error:
            sys.exit(f"--env-id {env_id}: procgen needs Python 3.10 to 3.12, Linux on x86-64, and libGL: {error}")
        if env_id not in ENV_NAMES:
            sys.exit(f"--env-id {env_id}: the games of Procgen are {', '.join(ENV_NAMES)}")
        levels = {"num_levels": num_levels, "start_level": start_level, "distribution_mode": distribution_mode}
        self.make = lambda seed: ProcgenGym3Env(num_envs, env_id, rand_seed=seed, num_threads=NUM_CORES, **levels)
        self.envs = self.make(0)

    def reset(self, seed):
        """Start new episodes. Returns observations (num_envs, *obs_shape). seed: a list of ints."""
        self.envs.close()
        self.envs = self.make(int(np.random.SeedSequence(seed).generate_state(1)[0]) % 2**31)
        self.returns, self.lengths = np.zeros((2, self.num_envs))
        return self.envs.observe()[1]["rgb"].transpose(0, 3, 1, 2)

    def step(self, actions):
        """Returns observations (num_envs, *obs_shape), rewards, terminated, truncated (num_envs,), and {environment:
        (return, length)} of the episodes that ended."""
        self.envs.act(actions)
        rewards, obs, first = self.envs.observe()  # where first is set, the rewards are still those of the last episode
        self.final_obs = obs = obs["rgb"].transpose(0, 3, 1, 2)  # nothing is truncated
        self.returns += rewards
        self.lengths += 1
        finished = {i: (self.returns[i], self.lengths[i]) for i in np.flatnonzero(first)}
        self.returns[first] = self.lengths[first] = 0
        return obs, rewards.astype(float), first, np.zeros_like(first), finished

    def close(self):
        self.envs.close()


def suite_of(env_id):
    if env_id.isalpha() and env_id.islower():  # such as coinrun; the ids of other environments have a version
        return "procgen"
    return "atari" if env_id.startswith("ALE/") or env_id.endswith("NoFrameskip-v4") else "continuous"


def make_envs(args, num_envs, unseen=False):
    suite = suite_of(args.env_id)
    if suite == "procgen":
        num_levels = 0 if unseen else args.num_levels  # of all levels, those of training are a vanishing part
        return ProcgenEnvs(args.env_id, num_envs, num_levels, args.start_level, args.distribution_mode)
    return AtariEnvs(args.env_id, num_envs) if suite == "atari" else ContinuousEnvs(args.env_id, num_envs)


class RunningMeanStd(nn.Module):
    """Mean and variance of a stream of batches, (n, *shape) float64 (Chan et al., 1979)."""

    def __init__(self, shape=()):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
        self.var = nn.Buffer(torch.ones(shape, dtype=torch.float64))
        self.count = nn.Buffer(torch.tensor(1e-4, dtype=torch.float64))

    def update(self, batch):
        batch = torch.as_tensor(batch, device=self.mean.device)
        var, mean = torch.var_mean(batch, dim=0, correction=0)
        weight = len(batch) / (self.count + len(batch))
        self.var += weight * (var - self.var + (1 - weight) * (mean - self.mean) ** 2)
        self.mean += weight * (mean - self.mean)
        self.count += len(batch)


def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes, activation, output_std):
    layers = []
    for num_inputs, num_units in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [layer_init(nn.Linear(num_inputs, num_units)), {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]()]
    return nn.Sequential(*layers, layer_init(nn.Linear(*sizes[-2:]), output_std))


class MlpActor(nn.Module):
    """Gaussian policy with its observation statistics. `network` is the description in a policy file."""

    def __init__(self, network):
        super().__init__()
        sizes = [*network["obs_shape"], *network["actor_hidden"], network["action_dim"]]
        self.mean = mlp(sizes, network["activation"], output_std=0.01)
        self.logstd = nn.Parameter(torch.zeros(network["action_dim"]))  # the same in all states
        self.obs_rms = RunningMeanStd(network["obs_shape"])
        self.obs_clip = nn.Buffer(torch.tensor(10.0, dtype=torch.float64))
        self.obs_epsilon = nn.Buffer(torch.tensor(1e-8, dtype=torch.float64))

    def normalize(self, obs):
        """Observations to the networks' inputs. Called at collection: while a teacher trains, its statistics change."""
        obs = torch.as_tensor(obs, device=self.logstd.device)
        obs = (obs - self.obs_rms.mean) / torch.sqrt(self.obs_rms.var + self.obs_epsilon)
        return torch.clamp(obs, -self.obs_clip, self.obs_clip).float()

    def forward(self, obs):
        """Means (n, action_dim) of the policy for normalized observations (n, obs_dim)."""
        return self.mean(obs)

    def policy(self, means):
        return Independent(Normal(means, self.logstd.exp()), 1)


class MlpCritic(nn.Module):
    def __init__(self, network):
        super().__init__()
        sizes = [*network["obs_shape"], *network["critic_hidden"], 1]
        self.value = mlp(sizes, network["activation"], output_std=1.0)

    def forward(self, obs):
        """Values (n,) of normalized observations (n, obs_dim)."""
        return self.value(obs).squeeze(-1)


class ResidualUnit(nn.Module):
    def __init__(self, filters):
        super().__init__()
        self.conv0 = layer_init(nn.Conv2d(filters, filters, 3, padding=1))
        self.conv1 = layer_init(nn.Conv2d(filters, filters, 3, padding=1))

    def forward(self, x):
        return x + self.conv1(torch.relu_(self.conv0(torch.relu(x))))


class Cnn(nn.Module):
    """Nature-CNN (https://doi.org/10.1038/nature14236) or IMPALA-CNN (https://arxiv.org/abs/1802.01561, figure 3) for
    the observations of `network`, the description of the networks in a policy file. widths: filters of each stage, and
    units of the hidden layer."""

    amp = False  # of all networks

    def __init__(self, network, widths, num_outputs, output_std):
        super().__init__()
        *filters, units = widths
        channels, size, _ = network["obs_shape"]
        layers = []
        if network["kind"] == "nature":
            for width, kernel, stride in zip(filters, (8, 4, 3), (4, 2, 1), strict=True):
                layers += [layer_init(nn.Conv2d(channels, width, kernel, stride)), nn.ReLU()]
                channels, size = width, (size - kernel) // stride + 1
        else:
            for width in filters:
                layers += [layer_init(nn.Conv2d(channels, width, 3, padding=1)), nn.MaxPool2d(3, 2, padding=1)]
                layers += [ResidualUnit(width), ResidualUnit(width)]
                channels, size = width, (size + 1) // 2
            layers += [nn.ReLU()]
        layers += [nn.Flatten(), layer_init(nn.Linear(channels * size * size, units)), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = layer_init(nn.Linear(units, num_outputs), output_std)

    def forward(self, obs):
        pixels = obs.to(torch.float32, memory_format=torch.channels_last) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.amp):
            features = self.body(pixels)
        return self.head(features.float())


class CnnActor(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.logits = Cnn(network, network["actor_hidden"], network["action_dim"], 0.01)

    def normalize(self, obs):
        """Observations to the networks' inputs: pixels stay bytes until they are in the network."""
        return torch.as_tensor(obs, device=self.logits.head.weight.device)

    def forward(self, obs):
        """Logits (n, action_dim) of the policy for observations (n, *obs_shape) uint8."""
        return self.logits(obs)

    def policy(self, logits):
        return Categorical(logits=logits)


class CnnCritic(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.value = Cnn(network, network["critic_hidden"], 1, 1.0)

    def forward(self, obs):
        """Values (n,) of observations (n, *obs_shape) uint8."""
        return self.value(obs).squeeze(-1)


def make_networks(network):
    """Actor and critic as `network` describes them, the description in a policy file."""
    if network["kind"] == "mlp":
        return MlpActor(network), MlpCritic(network)
    return CnnActor(network), CnnCritic(network)


def save(path, content):
    """Write a file that is whole or not there, whenever the program stops."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load(flag, path, wanted, **fields):
    """Read a file of this project, a dict with these fields. Nothing in it is executed."""
    with contextlib.suppress(Exception):  # torch has many kinds of errors for a foreign file
        content = torch.load(path, map_location="cpu", weights_only=True)
        if fields.items() <= content.items():
            return content
    sys.exit(f"{flag} {path}: missing, damaged, or not {wanted}")


@torch.no_grad()
def evaluate(actor, envs, args, deterministic=True):
    """Play args.eval_episodes episodes, and close the environments. Each environment plays a fixed number of them: the
    first ones to end would be the short ones."""
    episodes_left = np.bincount(np.arange(args.eval_episodes) % envs.num_envs)  # for each environment
    returns = []
    torch.manual_seed(args.seed)
    with contextlib.closing(envs), tqdm(desc="evaluation", total=args.eval_episodes, leave=False) as bar:
        obs = envs.reset([args.seed, 2])  # training: [args.seed, 1, global_step]
        while episodes_left.any():
            policy = actor.policy(actor(actor.normalize(obs)))
            actions = policy.mode if deterministic else policy.sample()
            obs, _, _, _, finished = envs.step(actions.cpu().numpy())
            for i, (episode_return, _) in finished.items():
                if episodes_left[i]:
                    episodes_left[i] -= 1
                    returns.append(float(episode_return))
                    bar.update()
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "returns": returns}


def score_policy(actor, args):
    """The score of a policy: on Procgen one on unseen levels ("test") and one on those of training ("train"), with
    stochastic actions; elsewhere with deterministic actions, on Atari also human-normalized."""
    num_envs = min(args.num_envs, args.eval_episodes)
    envs = make_envs(args, num_envs, unseen=True)
    if isinstance(envs, ProcgenEnvs):
        test = evaluate(actor, envs, args, deterministic=False)
        return {"test": test, "train": evaluate(actor, make_envs(args, num_envs), args, deterministic=False)}
    score = evaluate(actor, envs, args)
    if isinstance(envs, AtariEnvs) and envs.game in HUMAN_SCORES:
        random_score, human_score = HUMAN_SCORES[envs.game]
        score["human_normalized"] = (score["mean"] - random_score) / (human_score - random_score)
    return score


def compute_gae(rewards, values, next_value, dones, gamma, gae_lambda):
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438, eq. 16), (num_steps, num_envs).

    rewards, values, dones: (num_steps, num_envs) float32; next_value: (num_envs,), of the observations that follow."""
    next_values = torch.cat([values[1:], next_value[None]])
    deltas = rewards + gamma * next_values * (1 - dones) - values
    advantages, advantage = torch.zeros_like(rewards), 0
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * advantage
    return advantages


def ppo_loss(logratio, advantages, clip_coef):
    """-E[min(ρ Â, clip(ρ, 1-ε, 1+ε) Â)] (https://arxiv.org/abs/1707.06347, eq. 7). logratio: log ρ; all are (n,)."""
    if len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = logratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def main(args):
    # SETUP
    suite = suite_of(args.env_id)
    env_name = args.env_id.removeprefix("ALE/").split("-")[0].removesuffix("NoFrameskip")
    settings = {**SETTINGS["all"], **SETTINGS[suite], **SETTINGS.get(env_name, {})}
    args = dataclasses.replace(args, **{key: value for key, value in settings.items() if getattr(args, key) is None})
    batch_size = args.num_envs * args.num_steps
    if args.minibatch_size > batch_size or args.eval_episodes < 1:
        sys.exit(f"--minibatch-size: at most num_envs * num_steps = {batch_size}; --eval-episodes: at least 1")
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time() * 1000)}"
    run_folder = args.resume or "runs/" + run_name.replace("/", "-").replace(":", "-").replace(" ", "-")
    if args.track:
        import wandb

        wandb.init(name=run_folder, config=vars(args), sync_tensorboard=True)

    try:
        envs = make_envs(args, args.num_envs)
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        sys.exit(f"--env-id {args.env_id}: {error}")
    if suite == "continuous":
        for space in (envs.envs[0].observation_space, envs.action_space):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                envs.close()
                sys.exit(f"--env-id {args.env_id}: this script needs flat Box observations and actions, not {space}")
        if envs.envs[0].spec.max_episode_steps is None:
            print(f"warning: {args.env_id} has no time limit; an evaluation ends only if its episodes do")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    Cnn.amp = args.amp
    if device.type == "cpu" and sys.platform == "linux":  # keep freed memory: saves half of a CNN's time
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD

    kind, hidden = SIZES[args.size]["continuous" if suite == "continuous" else "games"]
    network = {"kind": kind, "activation": "relu", "actor_hidden": hidden, "critic_hidden": hidden}
    network.update(obs_shape=list(envs.obs_shape), action_dim=envs.action_dim)
    torch.manual_seed(args.seed)
    actor, critic = (module.to(device) for module in make_networks(network))
    return_rms = RunningMeanStd()
    if args.compile:
        actor.compile()
        critic.compile()
        global ppo_loss
        ppo_loss = torch.compile(ppo_loss)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    trained = {"actor": actor, "critic": critic, "return_rms": return_rms, "optimizer": optimizer}
    global_step, train_seconds, eval_curve, own_save_path = 0, 0.0, [], None
    if args.resume:
        state = load("--resume", f"{args.resume}/checkpoint.pt", f"a run of {SCRIPT}", script=SCRIPT)
        global_step, train_seconds, eval_curve = state["global_step"], state["train_seconds"], state["eval_curve"]
        own_save_path = state["args"]["save_path"]
        for name, part in trained.items():
            part.load_state_dict(state[name])
        optimizer.param_groups[0]["lr"] = args.learning_rate
    if args.save_path not in (None, own_save_path) and os.path.exists(args.save_path):
        envs.close()
        sys.exit(f"--save-path {args.save_path}: this file exists")

    writer = SummaryWriter(run_folder, purge_step=global_step + 1)  # drops what came after the save
    writer.add_text("hyperparameters", "".join(f"    {name}: {value}\n" for name, value in vars(args).items()))
    print(f"run folder: {run_folder}")

    running_return, episodes, last_save = np.zeros(args.num_envs), [], 0.0
    steps = range(global_step + batch_size, args.total_timesteps + batch_size, batch_size)
    bar = tqdm(steps, unit=" steps", unit_scale=batch_size, mininterval=1)
    collect_threads = 1 if suite == "continuous" else NUM_CORES  # waiting threads take the cores from the environments
    torch.set_num_threads(collect_threads)
    try:
        next_obs = envs.reset([args.seed, 1, global_step])  # evaluation: [args.seed, 2]
        if hasattr(actor, "obs_rms") and global_step < args.total_timesteps:  # not of pixels, or of a finished run
            actor.obs_rms.update(next_obs)
        for global_step in bar:
            # COLLECT
            start_time = time.time()
            torch.manual_seed(hash((args.seed, global_step)))  # the same draws with evaluations and --resume
            obs, actions, means_or_logits, rewards, dones, timeouts, final_obs = [], [], [], [], [], [], []
            with torch.no_grad():
                for _ in range(args.num_steps):
                    obs.append(actor.normalize(next_obs))
                    means_or_logits.append(actor(obs[-1]))
                    actions.append(actor.policy(means_or_logits[-1]).sample())
                    next_obs, reward, terminated, truncated, finished = envs.step(actions[-1].cpu().numpy())
                    if hasattr(actor, "obs_rms"):
                        actor.obs_rms.update(next_obs)
                    dones.append(terminated | truncated)
                    timeouts.append(truncated & ~terminated)
                    final_obs.append(actor.normalize(envs.final_obs[timeouts[-1]]))
                    running_return = 0.99 * running_return + reward  # 0.99 as in stable-baselines3, not gamma
                    return_rms.update(running_return)
                    running_return[dones[-1]] = 0
                    rewards.append(np.clip(reward / np.sqrt(return_rms.var.item() + 1e-8), -10, 10))
                    episodes += finished.values()

            # ADVANTAGE
            torch.set_num_threads(NUM_CORES)
            with torch.no_grad():
                b_obs, b_actions = torch.cat(obs), torch.cat(actions)
                b_logprobs = actor.policy(torch.cat(means_or_logits)).log_prob(b_actions)
                b_values = torch.cat([critic(chunk) for chunk in b_obs.split(args.minibatch_size)])
                rewards = torch.as_tensor(np.float32(rewards), device=device)
                dones = torch.as_tensor(np.float32(dones), device=device)
                last_values = critic(torch.cat([actor.normalize(next_obs), *final_obs]))
                next_value, final_values = last_values.tensor_split([args.num_envs])
                # A time limit is not the end: add the value of what would follow
                rewards[np.nonzero(timeouts)] += args.gamma * final_values
                values = b_values.view_as(rewards)
                b_advantages = compute_gae(rewards, values, next_value, dones, args.gamma, args.gae_lambda).flatten()
                b_returns = b_advantages + b_values

            # UPDATE
            for _ in range(args.update_epochs):
                for mb in torch.randperm(batch_size, device=device).split(args.minibatch_size):
                    policy = actor.policy(actor(b_obs[mb]))
                    logratio = policy.log_prob(b_actions[mb]) - b_logprobs[mb]

                    pg_loss = ppo_loss(logratio, b_advantages[mb], args.clip_coef)
                    entropy = policy.entropy().mean()
                    v_loss = nn.functional.mse_loss(critic(b_obs[mb]), b_returns[mb])
                    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss

                    optimizer.zero_grad()
                    loss.backward()
                    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
            torch.set_num_threads(collect_threads)

            # LOG: the losses are those of the last minibatch
            if not np.isfinite((loss + grad_norm).item()):
                sys.exit(f"\nerror: the loss or its gradient is not finite at step {global_step}")
            train_seconds += time.time() - start_time
            ratio = logratio.exp()
            writer.add_scalar("losses/policy_loss", pg_loss, global_step)
            writer.add_scalar("losses/value_loss", v_loss, global_step)
            writer.add_scalar("losses/entropy", entropy, global_step)
            writer.add_scalar("losses/approx_kl", (ratio - 1 - logratio).mean(), global_step)
            writer.add_scalar("losses/clipfrac", ((ratio - 1).abs() > args.clip_coef).float().mean(), global_step)
            writer.add_scalar("losses/explained_variance", 1 - b_advantages.var() / b_returns.var(), global_step)
            writer.add_scalar("losses/grad_norm", grad_norm, global_step)
            writer.add_scalar("charts/SPS", global_step / train_seconds, global_step)
            if episodes:
                mean_return, mean_length = np.mean(episodes[-100:], axis=0)
                writer.add_scalar("charts/episodic_return", mean_return, global_step)
                writer.add_scalar("charts/episodic_length", mean_length, global_step)
                bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
            if args.eval_interval and global_step % args.eval_interval < batch_size:
                eval_envs = make_envs(args, min(args.num_envs, args.eval_episodes), unseen=True)
                score = evaluate(actor, eval_envs, args, deterministic=suite != "procgen")
                eval_curve.append([global_step, score["mean"], score["std"]])
                writer.add_scalar("charts/eval_return", score["mean"], global_step)

            # SAVE
            if time.time() - last_save > args.save_interval or global_step >= args.total_timesteps:
                state = {name: part.state_dict() for name, part in trained.items()}
                state.update(script=SCRIPT, args=vars(args), global_step=global_step, train_seconds=train_seconds)
                save(f"{run_folder}/checkpoint.pt", {**state, "eval_curve": eval_curve})
                last_save = time.time()

        # RESULT
        teacher_score = score_policy(actor, args)
        for name, score in (teacher_score if suite == "procgen" else {"teacher": teacher_score}).items():
            human = f", human-normalized {score['human_normalized']:.3f}" if "human_normalized" in score else ""
            print(f"{name}: {score['mean']:.2f} ± {score['std']:.2f} over {args.eval_episodes} episodes{human}")
        writer.add_scalar("charts/eval_return", teacher_score.get("test", teacher_score)["mean"], global_step)
        versions = {name: metadata.version(name) for name in ("torch", "gymnasium", "mujoco", "ale-py")}
        facts = dict(env_id=args.env_id, global_step=global_step, args=vars(args), versions=versions)
        policy = {name: trained[name].cpu().state_dict() for name in ("actor", "critic", "return_rms")}
        policy.update(format=1, suite=suite, network=network, score=teacher_score, **facts)
        save_path = args.save_path or f"{run_folder}/teacher.pt"
        save(save_path, policy)
        result = dict(script=SCRIPT, seed=args.seed, sps=round(global_step / train_seconds), teacher=teacher_score)
        with open(f"{run_folder}/result.json", "w") as file:
            json.dump({**result, "eval_curve": eval_curve, **facts}, file, indent=2)
        print(f"saved {save_path} and {run_folder}/result.json")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; to continue from the last save, if any: python {sys.argv[0]} --resume {run_folder}")
    finally:
        envs.close()
        writer.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is treated as Ctrl-C
    args = tyro.cli(Args)
    if args.resume:  # the saved arguments are the defaults
        saved = load("--resume", f"{args.resume}/checkpoint.pt", f"a run of {SCRIPT}", script=SCRIPT)["args"]
        args = tyro.cli(Args, default=Args(**saved))
    main(args)
