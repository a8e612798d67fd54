"""Student-distill (SD), a baseline of Proximal Policy Distillation (PPD, https://arxiv.org/abs/2407.15134): the student
acts, and imitates what the teacher would have done in the states that the student visits.

    python student_distill.py --env-id Hopper-v4 --teacher teachers/Hopper-v4.pt
    python student_distill.py --teacher teachers/coinrun.pt --student-size smaller --seed 200

After every 5 steps of the student in each environment, one gradient step on all of them

    minimizes E[ KL(π_teacher ‖ π_student) + vf_coef · (V_teacher - V_student)² ]

Rewards play no part. The lines of the method are marked `# SD:`. As in the reference library, the critic is fitted to
the teacher's values. The teacher's observation statistics are frozen.
"""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import time
from collections import deque
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
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


@dataclasses.dataclass
class Args:
    exp_name: str = SCRIPT.removesuffix(".py")
    """name of the experiment"""
    seed: int = 100
    """seed of all that is random (the paper: 100, 200, 300, 400, 500)"""
    torch_deterministic: bool = True
    """make cuDNN deterministic"""
    cuda: bool = True
    """use the GPU, where there is one"""
    track: bool = False
    """also log to Weights and Biases (project and entity: WANDB_PROJECT, WANDB_ENTITY)"""

    # Distillation
    teacher: str | None = None
    """policy file of the teacher, as train_teacher.py writes it"""
    student_size: Literal["smaller", "same", "larger"] = "same"
    """size of the student (the paper, Table 4); same: the teacher's network"""
    teacher_logstd: bool = False
    """continuous control: start with the teacher's log standard deviation (the paper: with 0)"""
    teacher_noise: float = 0.0
    """add Gaussian noise of this standard deviation to the teacher's parameters (the paper: 0.05)"""

    # Algorithm
    env_id: str | None = None
    """id of the environment (default: the teacher's)"""
    num_levels: int = 200
    """Procgen: number of training levels; 0: all there are"""
    start_level: int = 0
    """Procgen: number of the first training level"""
    distribution_mode: Literal["easy", "hard"] = "easy"
    """Procgen: difficulty of the levels"""
    total_timesteps: int = 2_000_000
    """environment steps, rounded up to whole rollouts"""
    learning_rate: float = 3e-4
    """learning rate of Adam"""
    num_envs: int = 18
    """number of parallel environments"""
    num_steps: int = 5
    """steps of each environment between two gradient steps"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient of actor and critic together"""
    compile: bool = False
    """compile the student's networks"""
    amp: bool = False
    """compute convolutional networks in bfloat16"""

    # Evaluation and saving
    eval_episodes: int | None = None
    """episodes at the end of the run (default: the paper's, 50; Procgen: 200 on unseen and 200 on training levels)"""
    eval_interval: int = 0
    """also evaluate the student every so many steps; 0: only at the end"""
    save_path: str | None = None
    """path of the student's policy file (default: student.pt in the run folder)"""
    save_interval: float = 60.0
    """seconds between saves of the training state"""
    resume: str | None = None
    """run folder to continue, with its arguments; those given on the command line replace them"""


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
        steps.append((obs, float(reward), terminated, truncated, final_obs))
    return [np.array(column) for column in zip(*steps, strict=True)]


def receive(pipe):
    """Wait for a message. Stay awake for the first 3 ms: waking up takes as long as a step of Hopper."""
    awake_until = time.perf_counter() + 0.003
    while not pipe.poll() and time.perf_counter() < awake_until:
        if hasattr(os, "sched_yield"):
            os.sched_yield()
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        sys.exit("error: a process with environments has ended; its error is above, if it had one")


def work(pipe, parent_pipe, env_id, num_envs):
    """A worker process: call the functions that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # sent by ContinuousEnvs.close
    torch.set_num_threads(1)  # torch's threads are lost in a fork: an environment that uses torch would hang
    parent_pipe.close()  # else the end of the parent would not be seen
    envs = [gym.make(env_id, disable_env_checker=True) for _ in range(num_envs)]
    try:
        while True:
            function, argument = receive(pipe)
            pipe.send(function(envs, argument))
    finally:
        for env in envs:
            env.close()


class ContinuousEnvs:
    """Gymnasium environments with flat Box observations and actions, split into one share per core. This process steps
    the first share, a worker process each of the others. Their number changes no result, unless environments draw from
    the global generators."""

    def __init__(self, env_id, num_envs):
        self.num_envs = num_envs
        first_size, *sizes = [len(share) for share in np.array_split(range(num_envs), min(num_envs, NUM_CORES))]
        self.envs = [gym.make(env_id, disable_env_checker=True) for _ in range(first_size)]  # the checker takes time
        self.action_space, obs_space = self.envs[0].action_space, self.envs[0].observation_space
        for space in (obs_space, self.action_space):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                sys.exit(f"--env-id {env_id}: this script needs flat Box observations and actions, not {space}")
        self.obs_shape, self.action_dim = obs_space.shape, self.action_space.shape[0]
        self.workers = []  # process and pipe to it
        for size in sizes:
            pipe, worker_pipe = multiprocessing.Pipe()
            process = multiprocessing.Process(target=work, args=(worker_pipe, pipe, env_id, size), daemon=True)
            process.start()
            worker_pipe.close()
            self.workers.append((process, pipe))

    def call(self, function, argument):
        """Call a function for each share with its part of the argument, and join the arrays that come back."""
        first_part, *parts = np.array_split(argument, len(self.workers) + 1)
        for (_, pipe), part in zip(self.workers, parts, strict=True):
            pipe.send((function, part))
        results = [function(self.envs, first_part), *(receive(pipe) for _, pipe in self.workers)]
        return [np.concatenate(arrays) for arrays in zip(*results, strict=True)]

    def reset(self, seed):
        """Start new episodes; seed: a list of ints. Returns observations (num_envs, *obs_shape)."""
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        return self.call(reset_envs, np.random.SeedSequence(seed).generate_state(self.num_envs))[0]

    def step(self, actions):
        """actions: (num_envs, action_dim). Returns observations (num_envs, *obs_shape), rewards, terminated, truncated
        (num_envs,), and {environment: (return, length)} of the episodes that have ended. There, the observation is the
        first of the next episode, and final_obs (num_envs, *obs_shape) has the last."""
        actions = np.clip(actions, self.action_space.low, self.action_space.high)
        obs, rewards, terminated, truncated, self.final_obs = self.call(step_envs, actions)
        self.returns += rewards
        self.lengths += 1
        ended = np.flatnonzero(terminated | truncated)
        finished = {int(i): (float(self.returns[i]), int(self.lengths[i])) for i in ended}
        self.returns[ended], self.lengths[ended] = 0, 0
        return obs, rewards, terminated, truncated, finished

    def close(self):
        for process, pipe in self.workers:
            process.terminate()
            process.join()
            pipe.close()
        for env in self.envs:
            env.close()


class AtariEnvs:
    """Atari games in ALE's vector environment: up to 30 no-ops at the start, every action for 4 frames, the maximum of
    the last two, grey, 84x84, 4 frames stacked. A lost life ends an episode for learning, but not the game. Many games
    wait for FIRE at their start and after a lost life, so FIRE is played there, whatever the action."""

    obs_shape = (4, 84, 84)  # uint8, the newest frame last

    def __init__(self, env_id, num_envs):
        self.num_envs = num_envs
        gym.register_envs(ale_py)
        spec = gym.spec(env_id).kwargs
        if not env_id.startswith("ALE/") and not env_id.endswith("NoFrameskip-v4"):
            sys.exit(f"--env-id {env_id}: the Atari games are called ...NoFrameskip-v4 and ALE/...-v5")
        self.game = spec["game"]
        self.envs = ale_py.AtariVectorEnv(
            self.game,
            num_envs,
            num_threads=min(num_envs, NUM_CORES),
            repeat_action_probability=spec["repeat_action_probability"],  # 0.25 in ALE/...-v5
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            use_fire_reset=False,
            reward_clipping=False,
        )
        meanings = list(self.envs.ale.get_action_set())
        self.action_dim = len(meanings)
        self.fire = meanings.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in meanings else None

    def reset(self, seed):
        """Start new games; seed: a list of ints. Returns observations (num_envs, *obs_shape)."""
        seeds = np.random.SeedSequence(seed).generate_state(self.num_envs)
        obs, info = self.envs.reset(seed=seeds.astype(int) % 2**31)
        self.lives, self.needs_fire = info["lives"], np.ones(self.num_envs, bool)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        return obs

    def step(self, actions):
        """actions: (num_envs,). Returns observations (num_envs, *obs_shape), those of the next game where one has
        ended; rewards, terminated (also by a lost life), truncated (num_envs,); {environment: (score, length)} of the
        games that have ended. The last observations of truncated games are in final_obs (num_envs, *obs_shape)."""
        if self.fire is not None:
            actions = np.where(self.needs_fire, self.fire, actions)
        obs, rewards, game_over, truncated, info = self.envs.step(actions)
        self.final_obs = info.get("final_obs")
        life_lost = (0 < info["lives"]) & (info["lives"] < self.lives)
        self.lives, self.needs_fire = info["lives"], life_lost | game_over | truncated
        self.returns += rewards
        self.lengths += 1
        ended = np.flatnonzero(game_over | truncated)
        finished = {int(i): (float(self.returns[i]), int(self.lengths[i])) for i in ended}
        self.returns[ended], self.lengths[ended] = 0, 0
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
        num_threads = min(num_envs, NUM_CORES)
        self.make = lambda seed: ProcgenGym3Env(num_envs, env_id, rand_seed=seed, num_threads=num_threads, **levels)
        self.envs = self.make(0)

    def reset(self, seed):
        """Start new episodes; seed: a list of ints. Returns observations (num_envs, *obs_shape)."""
        self.envs.close()
        self.envs = self.make(int(np.random.SeedSequence(seed).generate_state(1)[0]) % 2**31)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        return self.envs.observe()[1]["rgb"].transpose(0, 3, 1, 2)

    def step(self, actions):
        """actions: (num_envs,). Returns observations (num_envs, *obs_shape), those of the next episode where one has
        ended; rewards, terminated, truncated (num_envs,); {environment: (return, length)} of the episodes that have
        ended."""
        self.envs.act(actions)
        rewards, obs, first = self.envs.observe()  # where first is set, the rewards are still those of the last episode
        self.returns += rewards
        self.lengths += 1
        ended = np.flatnonzero(first)
        finished = {int(i): (float(self.returns[i]), int(self.lengths[i])) for i in ended}
        self.returns[ended], self.lengths[ended] = 0, 0
        return obs["rgb"].transpose(0, 3, 1, 2), rewards.astype(float), first, np.zeros_like(first), finished

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
    """Mean and variance of a stream of batches, in float64 (Chan et al., 1979)."""

    def __init__(self, shape=()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, batch):
        """Take in a batch, (n, *shape) float64."""
        var, mean = torch.var_mean(batch, dim=0, correction=0)
        weight = len(batch) / (self.count + len(batch))
        self.var += weight * (var - self.var + (1 - weight) * (mean - self.mean) ** 2)
        self.mean += weight * (mean - self.mean)
        self.count += len(batch)


def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(network, hidden, num_outputs, output_std):
    """A multilayer perceptron. `network` is the description of the networks in a policy file."""
    activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[network["activation"]]
    sizes = [*network["obs_shape"], *hidden]
    layers = []
    for num_inputs, num_units in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [layer_init(nn.Linear(num_inputs, num_units)), activation()]
    return nn.Sequential(*layers, layer_init(nn.Linear(sizes[-1], num_outputs), output_std))


class MlpActor(nn.Module):
    """Gaussian policy, whose log standard deviation is the same in all states, with its observation statistics."""

    def __init__(self, network):
        super().__init__()
        self.mean = mlp(network, network["actor_hidden"], network["action_dim"], 0.01)
        self.logstd = nn.Parameter(torch.zeros(network["action_dim"]))
        self.obs_rms = RunningMeanStd(network["obs_shape"])
        self.register_buffer("obs_clip", torch.tensor(10.0, dtype=torch.float64))
        self.register_buffer("obs_epsilon", torch.tensor(1e-8, dtype=torch.float64))

    def normalize(self, obs):
        """Raw observations to the networks' inputs, float64 to float32. Called where observations are collected, not in
        forward, because train_teacher.py updates the statistics between a rollout and its update."""
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
        self.value = mlp(network, network["critic_hidden"], 1, 1.0)

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
    """Categorical policy."""

    def __init__(self, network):
        super().__init__()
        self.logits = Cnn(network, network["actor_hidden"], network["action_dim"], 0.01)

    def normalize(self, obs):
        """Raw observations to the networks' inputs: pixels stay bytes until they are in the network."""
        return obs

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
    """Read a file of this project, a dict of tensors and plain values with these fields. Nothing in it is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if fields.items() <= content.items():
            return content
    except Exception:  # torch has many kinds of errors for a foreign file
        pass
    sys.exit(f"{flag} {path}: missing, damaged, or not {wanted}")


@torch.no_grad()
def evaluate(actor, envs, args, device, deterministic=True):
    """Play args.eval_episodes episodes; return {"mean", "std", "returns"}. Each environment plays a fixed number of
    them: the first ones to end would be the short ones. The environments are closed."""
    quotas = [len(part) for part in np.array_split(range(args.eval_episodes), envs.num_envs)]
    returns = [[] for _ in quotas]
    bar = tqdm(desc="evaluation", unit=" steps", leave=False)
    with contextlib.closing(envs), bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        obs = envs.reset([args.seed, 2])  # training: [args.seed, 1, global_step]
        while sum(map(len, returns)) < args.eval_episodes:
            obs = actor.normalize(torch.as_tensor(obs, device=device))
            policy = actor.policy(actor(obs))
            actions = policy.mode if deterministic else policy.sample()
            obs, _, _, _, finished = envs.step(actions.cpu().numpy())
            for i, (episode_return, _) in finished.items():
                if len(returns[i]) < quotas[i]:
                    returns[i].append(episode_return)
            bar.set_postfix_str(f"{sum(map(len, returns))} of {args.eval_episodes} episodes", refresh=False)
            bar.update(envs.num_envs)
    returns = sum(returns, [])
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "returns": returns}


def score(actor, args, device):
    """The score of a policy: on Procgen one on unseen levels ("test") and one on those of training ("train"), with
    stochastic actions; elsewhere with deterministic actions, on Atari also human-normalized."""
    num_envs = min(args.num_envs, args.eval_episodes)
    if suite_of(args.env_id) == "procgen":
        envs = {"test": make_envs(args, num_envs, unseen=True), "train": make_envs(args, num_envs)}
        return {levels: evaluate(actor, envs[levels], args, device, deterministic=False) for levels in envs}
    envs = make_envs(args, num_envs)
    scored = evaluate(actor, envs, args, device)
    if suite_of(args.env_id) == "atari" and envs.game in HUMAN_SCORES:
        random_score, human_score = HUMAN_SCORES[envs.game]
        scored["human_normalized"] = (scored["mean"] - random_score) / (human_score - random_score)
    return scored


def categorical_kl(p, q):
    """KL(p ‖ q) in each state, (n,). torch's own is infinite where a probability underflows."""
    return (p.probs * (p.logits - q.logits)).sum(-1)


def main(args):
    # SETUP
    wanted = "a teacher: see teachers/Hopper-v4.pt, train_teacher.py, teachers/import_sb3.py"
    teacher = load("--teacher", args.teacher, wanted, format=1)
    network = teacher["network"]
    state = args.resume and load("--resume", f"{args.resume}/checkpoint.pt", f"a run of {SCRIPT}", script=SCRIPT)
    args = dataclasses.replace(args, env_id=args.env_id or teacher["env_id"])
    suite = suite_of(args.env_id)
    if args.eval_episodes is None:
        args.eval_episodes = 200 if suite == "procgen" else 50
    if args.eval_episodes < 1:
        sys.exit("--eval-episodes: at least 1")
    batch_size = args.num_envs * args.num_steps
    if os.path.exists(args.save_path or "") and not (state and state["args"]["save_path"] == args.save_path):
        sys.exit(f"--save-path {args.save_path}: this file exists")
    try:
        envs = make_envs(args, args.num_envs)
    except gym.error.UnregisteredEnv as error:
        sys.exit(f"--env-id {args.env_id}: {error}")
    if suite == "continuous" and envs.envs[0].spec.max_episode_steps is None:
        print(f"warning: {args.env_id} has no time limit; an evaluation ends only if its episodes do")
    spaces, teacher_spaces = [[*envs.obs_shape], envs.action_dim], [network["obs_shape"], network["action_dim"]]
    if spaces != teacher_spaces:  # no two suites have the same
        sys.exit(f"--teacher {args.teacher}: obs_shape, action_dim {teacher_spaces}; {args.env_id} has {spaces}")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)
    Cnn.amp = args.amp
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":  # keep freed memory: saves half of a CNN's time
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    torch.set_num_threads(1 if suite == "continuous" else NUM_CORES)  # waiting threads take the environments' cores

    teacher_actor, teacher_critic = make_networks(network)  # SD: the teacher
    original_teacher, _ = make_networks(network)  # SD: without noise, to score it
    teacher_actor.load_state_dict(teacher["actor"])
    teacher_critic.load_state_dict(teacher["critic"])
    original_teacher.load_state_dict(teacher["actor"])
    noise_generator = torch.Generator().manual_seed(args.seed)
    for parameter in [*teacher_actor.parameters(), *teacher_critic.parameters()]:  # SD: imperfect with --teacher-noise
        parameter.data += args.teacher_noise * torch.randn(parameter.shape, generator=noise_generator)
    student_network = network  # SD: the student's size
    if args.student_size != "same":
        kind, hidden = SIZES[args.student_size]["continuous" if suite == "continuous" else "games"]
        student_network = dict(network, kind=kind, activation="relu", actor_hidden=hidden, critic_hidden=hidden)
    actor, critic = make_networks(student_network)
    for name, statistics in teacher_actor.named_buffers():  # SD: the teacher's observation statistics, frozen
        actor.get_buffer(name).copy_(statistics)
    if args.teacher_logstd and suite == "continuous":  # SD: ours, start with the teacher's standard deviation
        actor.logstd.data.copy_(teacher_actor.logstd)
    for module in (teacher_actor, teacher_critic, original_teacher, actor, critic):
        module.to(device)
    policy_kl = kl_divergence if suite == "continuous" else categorical_kl  # SD: KL(p ‖ q), (n,)
    if args.compile:
        actor.compile()
        critic.compile()
        policy_kl = torch.compile(policy_kl)  # kl_divergence stays as it is: torch cannot compile it
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    trained = {"actor": actor, "critic": critic, "optimizer": optimizer}
    global_step, train_seconds, eval_curve = 0, 0.0, []
    if state:
        for name, part in trained.items():
            part.load_state_dict(state[name])
        optimizer.param_groups[0]["lr"] = args.learning_rate
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
        global_step, train_seconds, eval_curve = state["global_step"], state["train_seconds"], state["eval_curve"]

    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time() * 1000)}"
    run_folder = args.resume or "runs/" + run_name.replace("/", "-").replace(":", "-")
    if args.track:
        import wandb

        wandb.init(name=run_name, config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(run_folder, purge_step=global_step + 1 if state else None)
    writer.add_text("hyperparameters", "".join(f"    {name}: {value}\n" for name, value in vars(args).items()))
    print(f"run folder: {run_folder}")

    episodes = deque(maxlen=100)  # return and length
    last_save = 0.0
    bar = tqdm(total=args.total_timesteps, initial=global_step, mininterval=1)
    try:
        raw_obs = envs.reset([args.seed, 1, global_step])  # evaluation: [args.seed, 2]
        next_obs = actor.normalize(torch.as_tensor(raw_obs, device=device))
        while global_step < args.total_timesteps:
            start_time = time.time()

            # COLLECT: the student acts
            obs = []
            for _ in range(args.num_steps):
                obs.append(next_obs)
                with torch.no_grad():
                    actions = actor.policy(actor(next_obs)).sample()  # SD: the student
                raw_obs, _, _, _, finished = envs.step(actions.cpu().numpy())
                next_obs = actor.normalize(torch.as_tensor(raw_obs, device=device))
                episodes.extend(finished.values())
            global_step += batch_size

            # UPDATE: one gradient step
            b_obs = torch.cat(obs)
            with torch.no_grad():
                teacher_policy = teacher_actor.policy(teacher_actor(b_obs))  # SD: in the same states
                teacher_values = teacher_critic(b_obs)  # SD: the critic's target
            student_policy = actor.policy(actor(b_obs))
            kl_loss = policy_kl(teacher_policy, student_policy).mean()  # SD: KL(teacher ‖ student)
            v_loss = nn.functional.mse_loss(critic(b_obs), teacher_values)  # SD: no rewards
            entropy = student_policy.entropy().mean()
            loss = kl_loss + args.vf_coef * v_loss - args.ent_coef * entropy  # SD: no policy gradient

            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()

            train_seconds += time.time() - start_time
            bar.update(batch_size)

            # LOG: the last losses, every 50 iterations and before a save
            is_evaluation = args.eval_interval and global_step % args.eval_interval < batch_size
            is_save = time.time() - last_save > args.save_interval or global_step >= args.total_timesteps
            if global_step // batch_size % 50 and not is_evaluation and not is_save:
                continue
            losses = {"distill_kl": kl_loss, "value_loss": v_loss, "entropy": entropy, "grad_norm": grad_norm}
            logs = {f"losses/{name}": value.item() for name, value in losses.items()}
            if not np.isfinite(list(logs.values())).all():
                sys.exit(f"error: loss or gradient is not finite at step {global_step}: {logs}")
            logs["charts/SPS"] = global_step / train_seconds
            if episodes:
                logs["charts/episodic_return"], logs["charts/episodic_length"] = np.mean(episodes, axis=0)
            if is_evaluation:
                scored = score(actor, args, device)
                scored = scored.get("test", scored)
                eval_curve.append([global_step, scored["mean"], scored["std"]])
                logs["charts/eval_return"] = scored["mean"]
            for name, value in logs.items():
                writer.add_scalar(name, value, global_step)
            mean_return = logs.get("charts/episodic_return", np.nan)
            bar.set_postfix_str(f"return {mean_return:.1f}, KL {logs['losses/distill_kl']:.4f}", refresh=False)

            # SAVE
            if is_save:
                state = {name: part.state_dict() for name, part in trained.items()}
                state.update(script=SCRIPT, args=vars(args), global_step=global_step, train_seconds=train_seconds)
                state.update(eval_curve=eval_curve, rng=torch.get_rng_state())
                state["cuda_rng"] = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
                save(f"{run_folder}/checkpoint.pt", state)
                last_save = time.time()

        # RESULT
        bar.close()
        scores = {"teacher": score(original_teacher, args, device), "student": score(actor, args, device)}
        if args.teacher_noise:
            scores["corrupted_teacher"] = score(teacher_actor, args, device)
        ratio = {}
        for levels in ("test", "train") if suite == "procgen" else ("all",):
            means, label = {}, f", {levels} levels" if suite == "procgen" else ""
            for name, scored in scores.items():
                scored = scored.get(levels, scored)
                means[name] = scored.get("human_normalized", scored["mean"])
                print(f"{name}{label}: {scored['mean']:.2f} ± {scored['std']:.2f} over {args.eval_episodes} episodes")
            ratio[levels] = means["student"] / means["teacher"] if means["teacher"] > 0 else None
            print(f"student / teacher{label}: {ratio[levels] and round(ratio[levels], 3)}")
        ratio = ratio.get("all", ratio)
        for name, tag in (("teacher", "charts/teacher_return"), ("student", "charts/eval_return")):
            writer.add_scalar(tag, scores[name].get("test", scores[name])["mean"], global_step)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco", "ale-py")}
        facts = dict(env_id=args.env_id, global_step=global_step, args=vars(args), versions=versions)
        result = dict(script=SCRIPT, seed=args.seed, sps=round(global_step / train_seconds), **scores, ratio=ratio)
        with open(f"{run_folder}/result.json", "w") as file:
            json.dump({**result, "eval_curve": eval_curve, **facts}, file, indent=2)
        policy = dict(format=1, suite=suite, actor=actor.cpu().state_dict(), critic=critic.cpu().state_dict(), **facts)
        policy.update(network=student_network, return_rms=teacher["return_rms"], score=scores["student"])
        save_path = args.save_path or f"{run_folder}/student.pt"
        save(save_path, policy)
        print(f"saved {save_path} and {run_folder}/result.json")
    except KeyboardInterrupt:
        sys.exit(f"stopped; to continue from the last save: python {sys.argv[0]} --resume {run_folder}")
    finally:
        bar.close()
        envs.close()
        writer.close()
        torch.set_num_threads(NUM_CORES)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is treated as Ctrl-C
    args = tyro.cli(Args)
    if args.resume:  # the saved arguments are the defaults
        saved = load("--resume", f"{args.resume}/checkpoint.pt", f"a run of {SCRIPT}", script=SCRIPT)["args"]
        args = tyro.cli(Args, default=Args(**saved))
    main(args)
