"""Train a teacher with Proximal Policy Optimization (PPO, arXiv 1707.06347), in the settings of Proximal Policy
Distillation (PPD, arXiv 2407.15134), for the scripts that distill it.

    python train_teacher.py --env-id Hopper-v4 --save-path runs/teacher.pt
    python train_teacher.py --env-id BreakoutNoFrameskip-v4 --seed 200
    python train_teacher.py --env-id coinrun --size smaller

Atari and Procgen games, and any gymnasium environment with a flat Box observation and a flat Box action. Ctrl-C saves
the training state, `--resume runs/...` goes on from there, and with `--total-timesteps 0` only evaluates. Where the
paper is silent, this is stable-baselines3's PPO, which it used. What departs from that changes nothing but rounding and
random streams: processes and threads step the environments, values and log-probabilities of a rollout are computed in
batches after it, and noise and shuffles come from one generator, whose state is saved. On Atari, ALE's own vector
environment replaces the usual wrappers: after a lost life the stacked frames stay, and FIRE is played in place of one
action.
"""

import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import pickletools
import platform
import signal
import sys
import time
import warnings
import weakref
import zipfile
from dataclasses import dataclass
from multiprocessing import connection
from typing import Literal, get_args

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of the experiment, a part of the run folder's name"""
    seed: int = 100
    """seed of networks, noise, shuffles and environments (the paper: 100, 200, 300, 400, 500)"""
    torch_deterministic: bool = True
    """deterministic algorithms, also on the GPU where torch has them (it warns where not)"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""
    wandb_project_name: str = "ppd"
    """the project's name in Weights and Biases"""
    save_path: str | None = None
    """where the teacher goes (default: teacher.pt in the run folder); an existing file is refused"""
    overwrite: bool = False
    """replace an existing file at --save-path"""
    resume: str | None = None
    """a run folder or its checkpoint.pt to go on from, with its arguments; only total_timesteps, eval_*, cuda, compile,
    env_threads, checkpoint_interval, track and overwrite may be given anew"""

    # environment
    env_id: str = "Hopper-v4"
    """id of the environment: …NoFrameskip-v4 or ALE/…-v5, a game of Procgen, or any with continuous control"""
    num_envs: int = 18
    """parallel environments"""
    num_levels: int = 200
    """of Procgen: how many levels it trains on; 0 is all there are, and then none is unseen"""
    start_level: int = 0
    """of Procgen: number of the first of these levels; without effect where num_levels is 0"""
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] = "easy"
    """of Procgen: its kind of levels; `extreme` and `memory` are those of some games"""

    # algorithm (paper, Table 3; what the paper varies by environment stands in PAPER_SETTINGS)
    total_timesteps: int | None = None
    """environment steps, rounded up to whole rollouts (default: the paper's, 10 M, for Procgen 30 M); 0 trains nothing
    and evaluates what --resume names"""
    size: Literal["smaller", "same", "larger"] = "same"
    """size of the networks; the paper's teachers are `same`"""
    learning_rate: float = 3e-4
    """Adam's learning rate, constant"""
    num_steps: int | None = None
    """steps per environment and rollout (default: the paper's, 256 for Atari, Hopper and Swimmer, else 512)"""
    gamma: float = 0.995
    """discount factor"""
    gae_lambda: float = 0.9
    """lambda of generalized advantage estimation"""
    minibatch_size: int = 512
    """samples per gradient step; the last minibatch of an epoch may be smaller"""
    update_epochs: int = 4
    """passes over each rollout"""
    norm_adv: bool = True
    """normalize advantages in each minibatch"""
    clip_coef: float = 0.2
    """epsilon, the clip range of the importance ratio"""
    ent_coef: float | None = None
    """weight of the entropy bonus (default: the paper's, 0.01 for Atari, Procgen, Hopper and Swimmer, else 0)"""
    vf_coef: float = 0.5
    """weight of the critic's loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, of actor and critic together"""

    # evaluation
    eval_episodes: int | None = None
    """full episodes at the end (default: the paper's, 50 with deterministic actions; on Procgen, with stochastic ones,
    200 on unseen levels and as many on those of training); 0 skips the evaluation"""
    eval_interval: int = 0
    """also evaluate every so many environment steps, on Procgen on unseen levels; 0 never does"""

    # runtime
    cuda: bool = True
    """use the GPU where there is one"""
    compile: bool = False
    """torch.compile the networks"""
    amp: bool = False
    """compute the convolutional networks in bfloat16"""
    env_threads: int = 0
    """processes, for games threads, that step the environments, 0 for one per core; changes no result"""
    checkpoint_interval: int = 100_000
    """environment steps between saves of the training state"""


SCRIPT = os.path.basename(__file__)
KINDS = {"continuous": ["mlp relu", "mlp tanh"]}  # kinds of network in a policy file of each suite of this script
KINDS |= {suite: ["nature relu", "impala relu"] for suite in ("atari", "procgen")}
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "ale-py", "procgen", "procgen-mirror")  # what results depend on
PAPER_SETTINGS = {  # Table 3: what the paper varies by environment
    "procgen": dict(num_steps=512, ent_coef=0.01, total_timesteps=30_000_000, eval_episodes=200),
    "atari": dict(num_steps=256, ent_coef=0.01, total_timesteps=10_000_000, eval_episodes=50),
    "Hopper": dict(num_steps=256, ent_coef=0.01, total_timesteps=10_000_000, eval_episodes=50),
    "Swimmer": dict(num_steps=256, ent_coef=0.01, total_timesteps=10_000_000, eval_episodes=50),
    "other": dict(num_steps=512, ent_coef=0.0, total_timesteps=10_000_000, eval_episodes=50),
}
SIZES = {  # Table 4: kind of network and its widths, for actor and critic alike
    "continuous": {"smaller": ("mlp", [128, 64]), "same": ("mlp", [256, 256]), "larger": ("mlp", [512, 512])},
    "games": {
        "smaller": ("nature", [32, 32, 32, 128]),
        "same": ("impala", [16, 32, 32, 256]),
        "larger": ("impala", [32, 64, 64, 1024]),
    },
}
HUMAN_SCORES = dict(  # of random play and of a human, by game (Agent57, arXiv 2003.13350)
    alien=(227.8, 7127.7), amidar=(5.8, 1719.5), assault=(222.4, 742), asterix=(210, 8503.3),
    asteroids=(719.1, 47388.7), atlantis=(12850, 29028.1), bank_heist=(14.2, 753.1), battle_zone=(2360, 37187.5),
    beam_rider=(363.9, 16926.5), berzerk=(123.7, 2630.4), bowling=(23.1, 160.7), boxing=(0.1, 12.1),
    breakout=(1.7, 30.5), centipede=(2090.9, 12017), chopper_command=(811, 7387.8), crazy_climber=(10780.5, 35829.4),
    defender=(2874.5, 18688.9), demon_attack=(152.1, 1971), double_dunk=(-18.6, -16.4), enduro=(0, 860.5),
    fishing_derby=(-91.7, -38.7), freeway=(0, 29.6), frostbite=(65.2, 4334.7), gopher=(257.6, 2412.5),
    gravitar=(173, 3351.4), hero=(1027, 30826.4), ice_hockey=(-11.2, 0.9), jamesbond=(29, 302.8), kangaroo=(52, 3035),
    krull=(1598, 2665.5), kung_fu_master=(258.5, 22736.3), montezuma_revenge=(0, 4753.3), ms_pacman=(307.3, 6951.6),
    name_this_game=(2292.3, 8049), phoenix=(761.4, 7242.6), pitfall=(-229.4, 6463.7), pong=(-20.7, 14.6),
    private_eye=(24.9, 69571.3), qbert=(163.9, 13455), riverraid=(1338.5, 17118), road_runner=(11.5, 7845),
    robotank=(2.2, 11.9), seaquest=(68.4, 42054.7), skiing=(-17098.1, -4336.9), solaris=(1236.3, 12326.7),
    space_invaders=(148, 1668.7), star_gunner=(664, 10250), surround=(-10, 6.5), tennis=(-23.8, -8.3),
    time_pilot=(3568, 5229.2), tutankham=(11.4, 167.6), up_n_down=(533.4, 11693.2), venture=(0, 1187.5),
    video_pinball=(16256.9, 17667.9), wizard_of_wor=(563.5, 4756.5), yars_revenge=(3092.9, 54576.9),
    zaxxon=(32.5, 9173.3),
)
PROCGEN_GAMES = "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze".split()
PROCGEN_GAMES += "miner ninja plunder starpilot".split()
PROCGEN_MODES = {"extreme": "chaser dodgeball leaper starpilot"}  # the games with such levels
PROCGEN_MODES |= {"memory": "caveflyer dodgeball heist jumper maze miner"}
RUNTIME_FLAGS = ("total_timesteps", "eval_episodes", "eval_interval", "cuda", "compile", "env_threads")
RUNTIME_FLAGS += ("checkpoint_interval", "track", "overwrite", "resume")  # what --resume lets one give anew


def fail(message):
    """End the program as a command line does for its user's mistake: one line on stderr, exit code 2."""
    print(f"{SCRIPT}: error: {' '.join(message.split())[:1500]}", file=sys.stderr)  # a file may hold line breaks
    raise SystemExit(2)


def parse_args(argv=None):
    """The command line (default: this process's) as `Args`; with --resume, on top of the arguments saved there."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.resume is None:
        return args
    saved = Args(**read_training_state(args.resume)[1]["args"])
    saved = dataclasses.replace(saved, resume=args.resume, overwrite=False)
    if ":" in saved.env_id and args.env_id != saved.env_id:  # gymnasium imports what stands before the colon
        fail(f"{args.resume}: field args.env_id names a module to import; allow that with --env-id {saved.env_id}")
    args = tyro.cli(Args, args=argv, default=saved)
    for name, value in vars(saved).items():
        if name not in RUNTIME_FLAGS and getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} cannot be changed with --resume: the run was started with {value}")
    return args


def check_numbers(args):
    """Refuse arguments that no run can have, before anything is created."""
    limits = [
        ("num_envs num_steps minibatch_size update_epochs checkpoint_interval", lambda x: x >= 1, "at least 1"),
        ("seed total_timesteps eval_episodes eval_interval env_threads", lambda x: x >= 0, "0 or more"),
        ("num_levels start_level", lambda x: 0 <= x < 2**30, "0 or more, and less than 2**30"),
        ("learning_rate max_grad_norm clip_coef", lambda x: 0 < x < math.inf, "a positive number"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("ent_coef vf_coef teacher_noise", lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
        ("distill_lambda distill_lambda_end", lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    ]
    for names, is_valid, wanted in limits:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not is_valid(value):
                fail(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    if getattr(args, "minibatch_size", 1) > args.num_envs * args.num_steps:
        batch = f"--num-envs {args.num_envs} x --num-steps {args.num_steps} = {args.num_envs * args.num_steps}"
        fail(f"--minibatch-size {args.minibatch_size} is larger than the rollout, {batch}")
    if args.eval_interval and not args.eval_episodes:
        fail(f"--eval-interval {args.eval_interval} needs --eval-episodes of at least 1")


def derive_seeds(seed, stream, count, step=0):
    """`count` independent 32-bit seeds for a stream of randomness ("training", "environments", …) of a run, and for
    the step at which it was resumed, as a list of ints."""
    entropy = [seed, int.from_bytes(stream.encode(), "big"), step]
    return [int(s) for s in np.random.SeedSequence(entropy).generate_state(count)]


def keep_freed_memory():
    """Have the C library (glibc) keep the large blocks that are freed. It gives them back to the system at once, and on
    the CPU getting their pages again takes up to half of a convolutional network's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


# --- ENVIRONMENT ---

IDLE, STEP, RESET, END = range(4)  # what a process is told to do with an environment


def make_env(env_id):
    """One gymnasium environment with a flat Box observation and a flat Box action; any other id ends the program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium calls every MuJoCo -v4 outdated: they are the paper's ids
            env = gym.make(env_id, disable_env_checker=True)  # the checker costs time at every step
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        near = difflib.get_close_matches(env_id, set(gym.registry) - {env_id}, n=3, cutoff=0.5)
        hint = f"; nearest known ids: {', '.join(near)}" if near else ""
        reason = "unknown id" if isinstance(error, gym.error.UnregisteredEnv) else " ".join(str(error).split())
        fail(f"--env-id {env_id}: {reason}{hint}")
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"--env-id {env_id}: its {name} space is {space}; this script needs a flat Box")
    return env


def do_tasks(envs, table):
    """Do with each of the environments, a dict of number and environment, the task in its row of the table: a step, and
    a reset in the very step that ends an episode; a reset with a seed; or nothing. The table, a dict of arrays with a
    row for each environment, is shared by all processes: actions and seeds come from it, what follows goes there."""
    tasks = table["task"].tolist()
    for i, env in envs.items():
        if tasks[i] == STEP:
            obs, table["reward"][i], terminated, truncated, _ = env.step(table["action"][i].copy())
            table["last_obs"][i], table["terminated"][i], table["truncated"][i] = obs, terminated, truncated
            if terminated or truncated:
                obs, _ = env.reset()  # goes on with the environment's own random stream
            table["obs"][i] = obs
        elif tasks[i] == RESET:
            table["obs"][i], _ = env.reset(seed=int(table["seed"][i]))


def set_tasks(table, tasks, starts):
    """Write one task for all environments or one for each, (num_envs,), and start the processes on them."""
    table["task"][:] = tasks
    for start in starts:
        start.release()


def acquire(semaphore, is_alive):
    """Wait until another process releases the semaphore; False if it has died instead. To fall asleep and be woken
    takes about as long as Hopper's step, so for 3 milliseconds this stays awake, and only gives way to a process that
    needs the core."""
    awake_until = time.perf_counter() + 3e-3
    while time.perf_counter() < awake_until:
        if semaphore.acquire(False):
            return True
        os.sched_yield()
    while not semaphore.acquire(timeout=1):
        if not is_alive():
            return False
    return True


def serve_envs(env_id, share, memory, columns, start, done, parent):
    """The life of a process of `ParallelEnvs`: it does the tasks of its share of the environments whenever `start` is
    released, until it is told to end or its parent has died, and leaves all signals to its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    envs = {i: make_env(env_id) for i in share}
    table = {name: np.frombuffer(memory, columns)[name][0] for name in columns.names}
    while acquire(start, lambda: os.getppid() == parent) and table["task"][share[0]] != END:
        do_tasks(envs, table)
        done.release()


def end_processes(table, starts, processes):
    """Tell the processes to end and wait until they have: the memory of the table is free after that."""
    set_tasks(table, END, starts)
    for process in processes:
        process.join()


class ParallelEnvs:
    """`num_envs` gymnasium environments, stepped by `processes` processes (0: one per core), of which this one is the
    first; threads would wait for Python's lock half of their time. Each environment has its own state, so the number of
    processes changes no result."""

    def __init__(self, env_id, num_envs, processes=0):
        processes = min(processes or os.cpu_count(), num_envs)
        shares = [share.tolist() for share in np.array_split(range(num_envs), processes)]
        self.envs = {i: make_env(env_id) for i in shares[0]}
        self.action_space, self.obs_shape = self.envs[0].action_space, self.envs[0].observation_space.shape
        (self.action_dim,) = self.action_space.shape
        action = np.result_type(np.float32, self.action_space.dtype), self.action_space.shape
        columns = [("obs", float, self.obs_shape), ("last_obs", float, self.obs_shape), ("action", *action)]
        columns += [("reward", float, ()), ("terminated", bool, ()), ("truncated", bool, ())]
        columns += [("task", np.uint8, ()), ("seed", np.uint32, ())]
        columns = np.dtype([(name, dtype, (num_envs, *shape)) for name, dtype, shape in columns], align=True)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        memory = context.RawArray("b", columns.itemsize)
        self.table = {name: np.frombuffer(memory, columns)[name][0] for name in columns.names}
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        self.processes, self.starts, self.dones = [], [], []
        self.end = weakref.finalize(self, end_processes, self.table, self.starts, self.processes)
        for share in shares[1:]:
            start, done = context.Semaphore(0), context.Semaphore(0)
            arguments = env_id, share, memory, columns, start, done, os.getpid()
            process = context.Process(target=serve_envs, args=arguments)
            process.start()
            self.processes.append(process)
            self.starts.append(start)
            self.dones.append(done)

    def run(self, tasks):
        """Have every process do these tasks with its environments, and wait until all have."""
        set_tasks(self.table, tasks, self.starts)
        do_tasks(self.envs, self.table)
        for process, done in zip(self.processes, self.dones, strict=True):
            # process.is_alive() would not see the death where SIGCHLD is ignored
            if not acquire(done, lambda sentinel=process.sentinel: not connection.wait([sentinel], 0)):
                raise SystemExit(f"{SCRIPT}: error: a process that steps environments has died; try --resume")

    def reset(self, seeds):
        """Start new episodes, environment i with seeds[i]; the observations, (num_envs, obs_dim) float64."""
        self.returns[:], self.lengths[:], self.table["seed"][:] = 0, 0, seeds
        self.run(RESET)
        if not np.isfinite(self.table["obs"]).all():
            raise FloatingPointError("observation")
        return self.table["obs"].copy()

    def step(self, actions, active=True):
        """Act in every environment, or in those where the bool array `active` is set.

        actions: (num_envs, action_dim) float32, clipped here to the action bounds: MuJoCo's dynamics would clip them
        too, but its control cost would not. Returns obs (num_envs, obs_dim) float64, the next observations, those of a
        new episode where one has ended; rewards (num_envs,) float64; terminated and truncated (num_envs,) bool, which
        can both be set; last_obs (num_envs, obs_dim) float64, the observations before any reset; finished, a list of
        (environment, return, length) of the episodes that ended. FloatingPointError where a number is not finite."""
        table = self.table
        np.clip(actions, self.action_space.low, self.action_space.high, out=table["action"])
        self.run(np.where(active, STEP, IDLE))
        if not (np.isfinite(table["last_obs"]).all() and np.isfinite(table["obs"]).all()):
            raise FloatingPointError("observation")
        if not np.isfinite(table["reward"]).all():
            raise FloatingPointError("reward")
        self.returns += table["reward"] * active
        self.lengths += active
        ended = np.flatnonzero((table["terminated"] | table["truncated"]) & active)
        finished = [(int(i), float(self.returns[i]), int(self.lengths[i])) for i in ended]
        self.returns[ended], self.lengths[ended] = 0, 0
        names = "obs", "reward", "terminated", "truncated", "last_obs"
        return *(table[name].copy() for name in names), finished

    def close(self):
        self.end()  # as does the end of this program
        for env in self.envs.values():
            env.close()


class AtariEnvs:
    """`num_envs` Atari games in ALE's own vector environment: its `threads` (0: one per core) repeat every action for 4
    frames, take the maximum of the last two, grey it, scale it to 84×84 and stack the last 4. The number of threads
    changes no result.

    A lost life, but the last, ends an episode for learning, `terminated`, while the game goes on. Many games then wait
    for FIRE, so the step after a lost life plays it, whatever the action. The return of an episode is the score of a
    whole game, to its end or to 108,000 frames, where it is truncated."""

    obs_shape = (4, 84, 84)  # uint8, the newest frame last

    def __init__(self, env_id, num_envs, threads=0):
        gym.register_envs(ale_py)
        games = [name for name in gym.registry if name.endswith("NoFrameskip-v4") or name.startswith("ALE/")]
        if env_id not in games:
            near = difflib.get_close_matches(env_id, games, n=3, cutoff=0.4)
            hint = f"; nearest known ids: {', '.join(near)}" if near else ""
            fail(f"--env-id {env_id}: not among the Atari games, which are …NoFrameskip-v4 and ALE/…-v5{hint}")
        spec = gym.spec(env_id).kwargs
        self.envs = AtariVectorEnv(
            spec["game"],
            num_envs,
            num_threads=threads,
            repeat_action_probability=spec["repeat_action_probability"],  # sticky actions: 0.25 in ALE/…-v5, else 0
            max_num_frames_per_episode=spec["max_num_frames_per_episode"],
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            episodic_life=False,  # True starts the whole game again at every lost life
            reward_clipping=False,
        )
        meanings = list(self.envs.ale.get_action_set())
        self.action_dim = len(meanings)  # the game's minimal set of actions
        self.fire = meanings.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in meanings else None

    def reset(self, seeds):
        """Start new games, environment i with seeds[i]; the observations, (num_envs, 4, 84, 84) uint8."""
        obs, info = self.envs.reset(seed=np.array(seeds) % 2**31)  # ALE takes a negative seed for none
        self.lives, self.life_lost = info["lives"], np.zeros(len(obs), bool)
        self.returns, self.lengths = np.zeros(len(obs)), np.zeros(len(obs), int)
        return obs

    def step(self, actions, active=True):
        """Act in every environment.

        actions: (num_envs,) int64. Returns obs (num_envs, 4, 84, 84) uint8, the next observations, those of a new game
        where one has ended; rewards (num_envs,) float64, unclipped; terminated, by a lost life or the end of the game,
        and truncated, (num_envs,) bool; last_obs like obs, to be used where truncated: the game's last observations;
        finished, a list of (environment, score, length) of the games that ended, where the bool array `active` is set.
        """
        if not ((actions >= 0) & (actions < self.action_dim)).all():  # ALE would wait for ever
            raise ValueError(f"actions have to be within 0 and {self.action_dim - 1}: {actions}")
        if self.fire is not None:
            actions = np.where(self.life_lost, self.fire, actions)
        obs, rewards, game_over, truncated, info = self.envs.step(actions)
        self.returns += rewards
        self.lengths += 1
        ended = game_over | truncated
        # the lives are those of the new game where one has ended; some games (Atlantis) play on with 0
        self.life_lost = (info["lives"] < self.lives) & (info["lives"] > 0) & ~ended
        self.lives = info["lives"]
        where = np.flatnonzero(ended & active)
        finished = [(int(i), float(self.returns[i]), int(self.lengths[i])) for i in where]
        self.returns[ended], self.lengths[ended] = 0, 0
        return obs, rewards.astype(float), game_over | self.life_lost, truncated, info.get("final_obs", obs), finished

    def close(self):
        self.envs.close()


class ProcgenEnvs:
    """`num_envs` games of Procgen, stepped by its own `threads` (0: one per core), whose number changes no result. The
    levels are `num_levels` from number `start_level` on, or all there are where num_levels is 0. Procgen does not tell
    a time-out (after 1,000 steps in most games) from other ends, so every end of an episode is `terminated`."""

    obs_shape, action_dim = (3, 64, 64), 15  # uint8: red, green, blue

    def __init__(self, env_id, num_envs, threads=0, num_levels=0, start_level=0, distribution_mode="easy"):
        if env_id not in PROCGEN_GAMES:
            near = difflib.get_close_matches(env_id.lower(), PROCGEN_GAMES, n=3, cutoff=0.4)
            hint = f"nearest: {', '.join(near)}" if near else f"which are {', '.join(PROCGEN_GAMES)}"
            fail(f"--env-id {env_id}: not among the games of Procgen; {hint}")
        if distribution_mode in PROCGEN_MODES and env_id not in PROCGEN_MODES[distribution_mode].split():
            games = PROCGEN_MODES[distribution_mode].replace(" ", ", ")
            fail(f"--distribution-mode {distribution_mode}: {env_id} has no such levels; the games that do: {games}")
        options = dict(num_threads=min(threads or os.cpu_count(), num_envs), distribution_mode=distribution_mode)
        options |= dict(num_levels=num_levels, start_level=start_level)
        try:
            from gym_notices import notices

            notices.notices.clear()  # the old gym, which procgen imports, prints them
            from procgen import ProcgenGym3Env

            self.make_envs = functools.partial(ProcgenGym3Env, num_envs, env_id, **options)
            self.envs = self.make_envs(rand_seed=0)  # finds out whether its library loads; `reset` makes them anew
        except ImportError as error:
            package = "procgen" if sys.version_info < (3, 11) else "procgen-mirror"
            fail(f"--env-id {env_id}: Procgen cannot be imported ({error}); pip install {package}")
        except OSError as error:  # its library needs two of the system's
            fail(f"--env-id {env_id}: Procgen cannot be loaded ({error}); on Debian: apt install libgl1 libglib2.0-0")

    def reset(self, seeds):
        """Start new levels; the observations, (num_envs, 3, 64, 64) uint8. Procgen seeds all its environments by one
        number: the first of the seeds is that."""
        self.close()
        self.envs = self.make_envs(rand_seed=seeds[0] % 2**31)
        self.returns, self.lengths = np.zeros(self.envs.num), np.zeros(self.envs.num, int)
        return self.envs.observe()[1]["rgb"].transpose(0, 3, 1, 2)

    def step(self, actions, active=True):
        """Act in every environment.

        actions: (num_envs,) int64. Returns obs (num_envs, 3, 64, 64) uint8, the next observations, those of a new level
        where an episode has ended; rewards (num_envs,) float64; terminated and truncated, (num_envs,) bool, of which
        the second is never set; last_obs, never to be used, for Procgen gives no last observation; finished, a list of
        (environment, return, length) of the episodes that ended, where the bool array `active` is set."""
        if not ((actions >= 0) & (actions < self.action_dim)).all():  # Procgen would take -1 for a reset
            raise ValueError(f"actions have to be within 0 and {self.action_dim - 1}: {actions}")
        self.envs.act(actions)
        rewards, obs, ended = self.envs.observe()  # where one has ended, the rewards are its last, obs the next one's
        obs = obs["rgb"].transpose(0, 3, 1, 2)
        self.returns += rewards
        self.lengths += 1
        where = np.flatnonzero(ended & active)
        finished = [(int(i), float(self.returns[i]), int(self.lengths[i])) for i in where]
        self.returns[ended], self.lengths[ended] = 0, 0
        return obs, rewards.astype(float), ended, np.zeros_like(ended), obs, finished

    def close(self):
        self.envs.close()


def procgen_game(env_id):
    """Procgen's own name of a game, of which procgen-coinrun-v0 and procgen:procgen-coinrun-v0 are other spellings."""
    name = env_id.removeprefix("procgen:").removeprefix("procgen-").removesuffix("-v0")
    return name if env_id.startswith("procgen") and name in PROCGEN_GAMES else env_id


def procgen_maker(args, unseen=False):
    """A function of env_id, num_envs and threads that makes Procgen's environments: with the levels of training, or, if
    unseen, with all that there are, of which 200 levels of training are a vanishing part."""
    num_levels = 0 if unseen else args.num_levels
    levels = dict(start_level=args.start_level, distribution_mode=args.distribution_mode)
    return functools.partial(ProcgenEnvs, num_levels=num_levels, **levels)


def find_suite(env_id):
    """The suite that an environment belongs to. A misspelt id belongs to the one that will say so, with a hint."""
    gym.register_envs(ale_py)
    spec, game = gym.registry.get(env_id), env_id.lower().removeprefix("procgen-").removesuffix("-v0")
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id or spec and str(spec.entry_point).startswith("ale_py"):
        return "atari"
    near = [] if spec or ":" in env_id else difflib.get_close_matches(game, PROCGEN_GAMES, cutoff=0.7)
    return "procgen" if near or env_id.lower().startswith("procgen") else "continuous"


# --- NETWORKS ---


def mlp(sizes, activation, output_gain, generator=None):
    """A multilayer perceptron with the layer widths `sizes`, its activation "relu" or "tanh". With a generator, weights
    start orthogonal, with gain √2 in the body and output_gain in the last layer, and biases at 0."""
    layers = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]()]
    layers.pop()  # no activation after the last layer
    for layer in layers[::2] if generator else []:
        nn.init.orthogonal_(layer.weight, output_gain if layer is layers[-1] else math.sqrt(2), generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class RunningMeanStd(nn.Module):
    """Mean and variance of a stream of batches, by the parallel update of Chan et al. (1979), as float64 buffers."""

    def __init__(self, shape=()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))  # stable-baselines3's start

    def update(self, batch):
        """Take in a batch, (n, *shape) float64."""
        var, mean = torch.var_mean(batch, dim=0, correction=0)
        delta, weight = mean - self.mean, len(batch) / (self.count + len(batch))
        self.mean += weight * delta
        self.var.lerp_(var + (1 - weight) * delta**2, weight)
        self.count += len(batch)


class MlpActor(nn.Module):
    """Gaussian policy: a multilayer perceptron for the mean, and a log standard deviation that is the same in every
    state. It carries the statistics that its observations are normalized with."""

    def __init__(self, network, generator=None):
        super().__init__()
        sizes = [*network["obs_shape"], *network["actor_hidden"], network["action_dim"]]
        self.mean = mlp(sizes, network["activation"], 0.01, generator)
        self.logstd = nn.Parameter(torch.zeros(network["action_dim"]))
        self.obs_rms = RunningMeanStd(network["obs_shape"])
        self.register_buffer("obs_clip", torch.tensor(10.0, dtype=torch.float64))
        self.register_buffer("obs_epsilon", torch.tensor(1e-8, dtype=torch.float64))

    def normalize(self, obs):
        """Observations as the networks see them, by the statistics as they stand: (…, obs_dim) float64 to float32.
        Called where observations are collected and not in `forward`: else statistics that move on between collection
        and update would change the importance ratio."""
        obs = (obs - self.obs_rms.mean) / torch.sqrt(self.obs_rms.var + self.obs_epsilon)
        return torch.clamp(obs, -self.obs_clip, self.obs_clip).float()

    def forward(self, obs):
        """Mean (n, action_dim) and log standard deviation (action_dim,) of the actions in normalized observations."""
        return self.mean(obs), self.logstd

    def mode(self, obs):
        """The most probable actions, (n, action_dim), in observations as the environments give them."""
        return self.mean(self.normalize(obs))


class MlpCritic(nn.Module):
    """State value: a multilayer perceptron of its own."""

    def __init__(self, network, generator=None):
        super().__init__()
        self.value = mlp([*network["obs_shape"], *network["critic_hidden"], 1], network["activation"], 1.0, generator)

    def forward(self, obs):
        """Values (n,) of normalized observations (n, obs_dim)."""
        return self.value(obs).squeeze(-1)


class ResidualUnit(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))), two 3×3 convolutions that keep the shape."""

    def __init__(self, filters):
        super().__init__()
        self.conv0 = nn.Conv2d(filters, filters, 3, padding=1)
        self.conv1 = nn.Conv2d(filters, filters, 3, padding=1)

    def forward(self, x):
        return x + self.conv1(torch.relu_(self.conv0(torch.relu(x))))  # in place: less memory


class Cnn(nn.Module):
    """IMPALA-CNN (arXiv 1802.01561, figure 3, without its LSTM) or Nature-CNN (doi 10.1038/nature14236), and a linear
    layer on top. widths: three numbers of filters, then the units of the fully connected layer. With a generator,
    weights start orthogonal, with gain √2 in the body and output_gain in the last layer, and biases at 0."""

    amp = False  # of all networks: compute the body in bfloat16

    def __init__(self, kind, obs_shape, widths, outputs, output_gain, generator=None):
        super().__init__()
        *filters, units = widths
        channels, size, _ = obs_shape  # square
        layers = []
        if kind == "nature":
            for width, (kernel, stride) in zip(filters, [(8, 4), (4, 2), (3, 1)], strict=True):
                layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU(inplace=True)]
                channels, size = width, (size - kernel) // stride + 1
        else:
            for width in filters:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
                layers += [ResidualUnit(width), ResidualUnit(width)]
                channels, size = width, (size + 1) // 2
            layers += [nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, units), nn.ReLU())
        self.head = nn.Linear(units, outputs)
        for layer in self.modules() if generator else []:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, output_gain if layer is self.head else math.sqrt(2), generator)
                nn.init.zeros_(layer.bias)

    def forward(self, obs):
        """Outputs (n, outputs) float32 for pixels (n, channels, size, size) uint8."""
        pixels = obs.to(torch.float32, memory_format=torch.channels_last) / 255  # takes a third less time
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.amp):
            features = self.body(pixels)
        return self.head(features.float())


class CnnActor(nn.Module):
    """Categorical policy over a game's actions."""

    def __init__(self, network, generator=None):
        super().__init__()
        sizes = network["obs_shape"], network["actor_hidden"], network["action_dim"]
        self.logits = Cnn(network["kind"], *sizes, 0.01, generator)

    def normalize(self, obs):
        """Observations as the networks see them: bytes, which are pixels / 255 only within the networks."""
        return obs

    def forward(self, obs):
        """Logits (n, action_dim) of the actions in observations (n, *obs_shape) uint8."""
        return self.logits(obs)

    def mode(self, obs):
        """The most probable actions, (n,) int64."""
        return self(obs).argmax(-1)


class CnnCritic(nn.Module):
    """State value: a network of its own."""

    def __init__(self, network, generator=None):
        super().__init__()
        self.value = Cnn(network["kind"], network["obs_shape"], network["critic_hidden"], 1, 1.0, generator)

    def forward(self, obs):
        """Values (n,) of observations (n, *obs_shape) uint8."""
        return self.value(obs).squeeze(-1)


def make_networks(network, generator=None):
    """Actor and critic as the `network` of a policy file describes them; with a generator, newly initialized."""
    if network["kind"] == "mlp":
        return MlpActor(network, generator), MlpCritic(network, generator)
    return CnnActor(network, generator), CnnCritic(network, generator)


# --- CHECKPOINT ---

FORMAT = 1  # of policy files and training states
PICKLED = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}  # all that a file may call, or name
PICKLED |= {f"torch {kind}Storage" for kind in ("Float", "Double", "Long", "Byte")}


def save_atomically(path, write):
    """Let `write(file)` fill a new file and put that at `path`: at any moment, even in a crash, `path` is the whole old
    file or the whole new one."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_file(path):
    """The dict of tensors and plain values in a file of ours. Nothing in it is executed, and whatever is wrong with it
    (missing, damaged, foreign, inflated, not finite) ends the program with one line that names file and field."""
    if not os.path.isfile(path):
        fail(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            data = file.read()
        archive, copied = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)  # torch inflates without bound
        if not stored or sum(entry.file_size for entry in entries) > len(data):
            raise ValueError
        with zipfile.ZipFile(copied, "w") as clean:  # what torch gets is what was checked here
            for entry in entries:
                clean.writestr(entry.filename, archive.read(entry))  # finds a flipped byte: torch itself does not
        (pickled,) = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        opcodes = pickletools.genops(archive.read(pickled))
        named = {str(argument) for code, argument, _ in opcodes if code.name in ("GLOBAL", "STACK_GLOBAL", "INST")}
        if named - PICKLED:
            fail(f"{path}: not a file of this project: it names {', '.join(sorted(named - PICKLED))}")
        copied.seek(0)
        content = torch.load(copied, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}")
    except Exception:  # a hostile file can bring about any of them
        fail(f"{path}: damaged, or not a file of this project")
    if type(content) is not dict or type(content.get("format")) is not int or content["format"] != FORMAT:
        fail(f"{path}: not a file of this project, or of another version: field format has to be {FORMAT}")
    pending, seen, claimed = [((), content)], set(), 0
    while pending:  # look at every value once; a loop, for nesting can be deep
        names, value = pending.pop()
        field = ".".join(map(str, names))
        if id(value) in seen:
            continue
        seen.add(id(value))
        if len(names) > 20:
            fail(f"{path}: field {field}: nested too deeply")
        if type(value) is dict:
            if not all(type(key) is int or type(key) is str and len(key) < 200 for key in value):
                fail(f"{path}: field {field}: a key is no short text or whole number")
            pending += [((*names, key), item) for key, item in value.items()]
        elif type(value) in (list, tuple):
            pending += [((*names, i), item) for i, item in enumerate(value)]
        elif type(value) is torch.Tensor:
            claimed += value.numel() * value.element_size()
            if claimed > len(data) or not value.is_contiguous():
                fail(f"{path}: field {field}: claims more numbers than the file holds")
            if value.requires_grad:
                fail(f"{path}: field {field}: has to be saved without its gradient")
            if not torch.isfinite(value).all():
                fail(f"{path}: field {field}: holds numbers that are not finite")
        elif type(value) not in (str, int, float, bool, type(None)):
            fail(f"{path}: field {field}: unexpected {type(value).__name__}")
        elif type(value) is float and not math.isfinite(value):
            fail(f"{path}: field {field}: {value} is not finite")
    return content


def check_fields(content, path, **types):
    """Refuse a dict in which one of the named fields is missing or of another type."""
    for field, kind in types.items():
        if type(content.get(field)) is not kind:
            fail(f"{path}: field {field} is missing, or not of type {kind.__name__}")


def check_tensors(tensors, expected, path, field):
    """Refuse tensors whose names, shapes and types are not exactly the expected ones."""
    if type(tensors) is not dict:
        fail(f"{path}: field {field} is missing, or not of type dict")
    for name in sorted(expected.keys() ^ tensors.keys(), key=str):
        fail(f"{path}: field {field}.{name} is {'missing' if name in expected else 'unexpected'}")
    for name, tensor in expected.items():
        found = tensors[name]
        if type(found) is not torch.Tensor or found.shape != tensor.shape or found.dtype != tensor.dtype:
            fail(f"{path}: field {field}.{name}: has to be {tensor.dtype} of shape {list(tensor.shape)}")
        if name.split(".")[-1] in ("var", "count", "obs_clip", "obs_epsilon", "exp_avg_sq") and (found < 0).any():
            fail(f"{path}: field {field}.{name}: negative")


def fill_module(module, tensors, path, field):
    """Give a module that was built on the meta device the tensors of a file, which have to be exactly the module's. So
    no memory is taken that the file does not fill."""
    check_tensors(tensors, module.state_dict(), path, field)
    module.load_state_dict(tensors, assign=True)
    return module


def check_policy(policy, path):
    """Refuse what is no policy dict of a suite of this script."""
    if "policy" in policy:
        fail(f"{path}: a training state; the policy file of its run is teacher.pt or student.pt")
    check_fields(policy, path, suite=str, env_id=str, network=dict, actor=dict, critic=dict, global_step=int, args=dict)
    if policy["suite"] not in KINDS:
        fail(f"{path}: field suite: a policy for {policy['suite']}, and this script is for {', '.join(KINDS)}")


def load_policy(policy, path, suite, obs_shape, action_dim):
    """Actor, critic and return statistics (None where it brings none) of a policy dict that `read_file` read from
    `path`. It is refused unless it fits the environment's suite, observations and actions."""
    check_policy(policy, path)
    if policy["suite"] != suite:
        fail(f"{path}: field suite: a policy for {policy['suite']}, but the environment is one of {suite}")
    network = policy["network"]
    check_fields(network, path, kind=str, activation=str, actor_hidden=list, critic_hidden=list, obs_shape=list)
    check_fields(network, path, action_dim=int)
    hidden = network["actor_hidden"] + network["critic_hidden"]
    kind = f"{network['kind']} {network['activation']}"
    if kind not in KINDS[suite]:
        fail(f"{path}: field network: kind and activation are {kind!r}, known are {', '.join(KINDS[suite])}")
    if len(hidden) > 64 or not all(type(width) is int and 0 < width < 2**20 for width in hidden):
        fail(f"{path}: field network: hidden widths have to be positive integers")
    if not all(type(n) is int for n in network["obs_shape"]) or network["obs_shape"] != list(obs_shape):
        fail(f"{path}: field network.obs_shape: {network['obs_shape']}, but the environment's is {list(obs_shape)}")
    if network["action_dim"] != action_dim:
        fail(f"{path}: field network.action_dim: {network['action_dim']}, but the environment's is {action_dim}")
    try:
        with torch.device("meta"):
            (actor, critic), return_rms = make_networks(network), RunningMeanStd()
    except ValueError:
        fail(f"{path}: field network: no {kind} network has the hidden widths {hidden}")
    fill_module(actor, policy["actor"], path, "actor")
    fill_module(critic, policy["critic"], path, "critic")
    if policy.get("return_rms") is None:
        return actor, critic, None
    check_fields(policy, path, return_rms=dict)
    return actor, critic, fill_module(return_rms, policy["return_rms"], path, "return_rms")


def read_training_state(path):
    """The path of a checkpoint, which may be named by its run folder, and the training state in it."""
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    state = read_file(path)
    if "policy" not in state:
        fail(f"{path}: a policy file, not a training state; --resume takes a run folder or its checkpoint.pt")
    check_fields(state, path, script=str, policy=dict, optimizer=dict, generator=torch.Tensor, args=dict, progress=dict)
    if state["script"] != SCRIPT:
        fail(f"{path}: field script: a training state of {state['script']}; resume it with that script")
    for name in sorted(state["args"].keys() ^ {field.name for field in dataclasses.fields(Args)}, key=str):
        fail(f"{path}: field args.{name} is {'unexpected' if name in state['args'] else 'missing'}")
    for field in dataclasses.fields(Args):  # an int; or a union, `int | None`; or a Literal, whose values are texts
        value, allowed = state["args"][field.name], get_args(field.type) or (field.type,)
        if type(value) not in allowed and not (type(value) is str and value in allowed):
            fail(f"{path}: field args.{field.name}: a {type(value).__name__} that the flag could not be")
    check_fields(state["args"], path, env_id=str)
    progress, point = state["progress"], [int, float, float]  # of the curve: step, mean, standard deviation
    check_fields(progress, path, global_step=int, train_seconds=float, wall_seconds=float)
    check_fields(progress, path, last_returns=list, eval_curve=list)
    valid = dict(global_step=progress["global_step"] >= 0)
    valid |= dict(last_returns=all(type(value) is float for value in progress["last_returns"]))
    valid |= dict(eval_curve=all(type(p) is list and [*map(type, p)] == point for p in progress["eval_curve"]))
    for field in (field for field, is_valid in valid.items() if not is_valid):
        fail(f"{path}: field progress.{field}: nothing that a run could have written")
    return path, state


def load_optimizer(optimizer, state, path):
    """Give Adam the momenta of a training state, which has none before the first step."""
    momenta = {}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"] if state["progress"]["global_step"] else []):
        momenta[i] = state["optimizer"].get(i)
        expected = dict(step=torch.zeros(()), exp_avg=parameter, exp_avg_sq=parameter)
        check_tensors(momenta[i], expected, path, f"optimizer.{i}")
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=momenta))


def check_save_path(args, path, teacher=None):
    """Refuse a path for the policy that cannot be written, or where that would cost the user a file."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(path):
        fail(f"--save-path {path}: {'is a folder' if os.path.isdir(path) else f'{folder} is no writable folder'}")
    if args.save_path and os.path.exists(path) and os.path.exists(teacher or "") and os.path.samefile(path, teacher):
        fail(f"--save-path {path}: the teacher's own file; name another")
    if args.save_path and os.path.lexists(path) and not args.overwrite:
        policy = read_file(path) if args.resume else {}  # what a resumed run wrote itself it may write again
        written_by = policy["args"] if type(policy.get("args")) is dict else {}
        if any(written_by.get(name) != value for name, value in vars(args).items() if name not in RUNTIME_FLAGS):
            fail(f"--save-path {path}: exists; name another, or replace it with --overwrite")


def make_run_folder(args):
    """A new folder runs/{env_id}__{exp_name}__{seed}__{unix time}, with a suffix where that exists."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    name = "runs/" + "".join("-" if character in "/\\:" else character for character in name)
    for suffix in itertools.count():
        try:
            folder = f"{name}-{suffix}" if suffix else name
            os.makedirs(folder)
            return folder
        except FileExistsError:
            pass


def plain(module):
    """A module's state dict, as tensors of their own on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in module.state_dict().items()}


@functools.cache
def versions():
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Signals:
    """Remembers signals until the loop asks. SIGINT (Ctrl-C) and SIGTERM: save and exit; a second one quits at once.
    SIGUSR1: save and go on."""

    def __init__(self):
        self.stop, self.save = None, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if number == signal.SIGUSR1:
            self.save = True
        else:
            self.stop = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


# --- MATH ---


def compute_advantages(rewards, values, next_values, ended, gamma, gae_lambda):
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16), all of shape (num_steps, num_envs).

    values: V(s_t). next_values: V(s_t+1) of the true successor, the last observation of an episode that was truncated,
    and 0 where it terminated. ended: bool, an episode ended with step t, so later steps do not count.
    A_t = δ_t + γ λ (1 - ended_t) A_t+1 with δ_t = r_t + γ V(s_t+1) - V(s_t)."""
    deltas = rewards + gamma * next_values - values
    decay = gamma * gae_lambda * (~ended).to(rewards.dtype)
    advantages = torch.empty_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + decay[t] * advantage
        advantages[t] = advantage
    return advantages


def gaussian_logprob(actions, mean, logstd):
    """log π(a|s), summed over action dimensions: actions, mean (…, action_dim), logstd (action_dim,) to (…)."""
    return -(0.5 * ((actions - mean) * torch.exp(-logstd)) ** 2 + logstd + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(logstd):
    """Entropy of the policy in nats, the same in every state: (action_dim,) to ()."""
    return (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def categorical_logprob(actions, logits):
    """log π(a|s): actions (…,) int64, logits (…, action_dim) to (…)."""
    return torch.log_softmax(logits, -1).gather(-1, actions[..., None]).squeeze(-1)


def categorical_entropy(logits):
    """Entropy of the policy in nats: (…, action_dim) to (…)."""
    logprobs = torch.log_softmax(logits, -1)
    return -(logprobs.exp() * logprobs).sum(-1)


def policy_logprob(actions, policy):
    """log π(a|s) of what an actor returns: mean and log standard deviation, or logits."""
    return gaussian_logprob(actions, *policy) if type(policy) is tuple else categorical_logprob(actions, policy)


def policy_entropy(policy):
    """Mean entropy over the states of what an actor returns: mean and log standard deviation, or logits."""
    return gaussian_entropy(policy[1]) if type(policy) is tuple else categorical_entropy(policy).mean()


def ppo_loss(logratio, advantages, clip_coef, norm_adv):
    """The clipped surrogate objective (arXiv 1707.06347, eq. 7) as a loss: -mean min(ρ Â, clip(ρ, 1-ε, 1+ε) Â).

    logratio: log ρ = log π_θ(a|s) - log π_θk(a|s), (n,). advantages: (n,), normalized here if norm_adv."""
    if norm_adv and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = logratio.exp()
    return -torch.min(ratio * advantages, torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef) * advantages).mean()


def ratio_metrics(logratio, clip_coef):
    """For the log: approximate KL(π_θk ‖ π_θ) (Schulman's k3 estimator) and the fraction of clipped ratios."""
    ratio = logratio.exp()
    return (ratio - 1 - logratio).mean(), ((ratio - 1).abs() > clip_coef).float().mean()


# --- EVALUATION ---


@torch.no_grad()
def evaluate(choose, make_envs, args, device, on_step=lambda: None):
    """The returns of args.eval_episodes full episodes of args.env_id, a list of floats. choose: the actions for
    observations on `device` as the environments give them, such as an actor's `mode`. make_envs: makes environments of
    id, number and threads, such as their class. on_step: called before every step.

    Every environment plays a quota fixed beforehand: among the first to end, short episodes would be too many. Seeds
    are evaluation's own, and nothing of training's randomness is used."""
    num_envs = min(args.eval_episodes, 25)
    quotas = [args.eval_episodes // num_envs + (i < args.eval_episodes % num_envs) for i in range(num_envs)]
    envs = make_envs(args.env_id, num_envs, args.env_threads)
    obs = envs.reset(derive_seeds(args.seed, "evaluation", num_envs))
    torch_threads = torch.get_num_threads()
    if obs.dtype != np.uint8:  # small networks: waiting threads of torch would take the cores from the environments
        torch.set_num_threads(1)
    returns = [[] for _ in range(num_envs)]
    while (active := np.array([len(done) < quota for done, quota in zip(returns, quotas, strict=True)])).any():
        on_step()
        chosen = choose(torch.from_numpy(obs[active]).to(device)).cpu().numpy()
        actions = np.zeros((num_envs, *chosen.shape[1:]), chosen.dtype)  # what a finished environment does is ignored
        actions[active] = chosen
        obs, _, _, _, _, finished = envs.step(actions, active)
        for i, episode_return, _ in finished:
            returns[i].append(episode_return)
    envs.close()
    torch.set_num_threads(torch_threads)
    return [episode_return for done in returns for episode_return in done]


def make_sampler(actor, seed):
    """Stochastic actions for `evaluate`: samples of a categorical policy, with a random stream of their own."""
    generator = torch.Generator().manual_seed(derive_seeds(seed, "evaluation's actions", 1)[0])

    def sample(obs):
        logits = actor(obs)
        gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log().to(logits.device)
        return (logits + gumbel).argmax(-1)

    return sample


def evaluate_levels(actor, args, device, on_step):
    """A policy's scores on Procgen, with stochastic actions: on unseen levels ("test") and on those of training
    ("train"), args.eval_episodes each, and how much worse it is on the unseen ones ("gap")."""
    scores = {}
    for name, make_envs in (("test", procgen_maker(args, unseen=True)), ("train", procgen_maker(args))):
        scores[name] = summarize(evaluate(make_sampler(actor, args.seed), make_envs, args, device, on_step))
    return scores | dict(gap=scores["train"]["mean"] - scores["test"]["mean"])


def summarize(returns):
    """Mean, standard deviation, number and list of episodic returns, for result.json."""
    return dict(mean=float(np.mean(returns)), std=float(np.std(returns)), episodes=len(returns), returns=returns)


def normalize_score(score, env_id):
    """The human-normalized score of an Atari game, 0 for random play and 1 for a human's; None without a human's."""
    random, human = HUMAN_SCORES.get(gym.spec(env_id).kwargs["game"], (None, None))
    return None if random is None else (score - random) / (human - random)


def score_policy(actor, suite, make_envs, args, device, on_step):
    """A policy's score as the paper measures it in the suite, for result.json."""
    if suite == "procgen":
        return evaluate_levels(actor, args, device, on_step)
    score = summarize(evaluate(actor.mode, make_envs, args, device, on_step))
    return score | dict(human_normalized=normalize_score(score["mean"], args.env_id)) if suite == "atari" else score


def describe_score(score):
    """A score of result.json in words."""
    text = "{mean:.1f} ± {std:.1f} over {episodes} episodes".format(**score.get("test", score))
    if "test" in score:
        text += " on unseen levels, {mean:.1f} ± {std:.1f} on those of training".format(**score["train"])
        return f"{text}, gap {score['gap']:.1f}"
    human = score.get("human_normalized")
    return text if human is None else f"{text}, human-normalized {human:.3f}"


def main(args):
    # SETUP: whatever can be wrong is found before anything is created
    resumed, run_folder, suite = None, None, find_suite(args.env_id)
    if suite == "procgen":
        args = dataclasses.replace(args, env_id=procgen_game(args.env_id))
    family = args.env_id.split("-")[0] if suite == "continuous" else suite
    settings = PAPER_SETTINGS.get(family, PAPER_SETTINGS["other"])
    settings = {name: value for name, value in settings.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **settings)
    last_step = args.total_timesteps
    if args.resume:
        checkpoint_path, resumed = read_training_state(args.resume)
        run_folder = os.path.dirname(checkpoint_path) or "."
        args = dataclasses.replace(args, total_timesteps=last_step or resumed["args"]["total_timesteps"])
    elif last_step == 0:
        fail("--total-timesteps 0 only evaluates: name a run with --resume")
    save_path = args.save_path or os.path.join(run_folder or "runs", "teacher.pt")
    check_save_path(args, save_path)
    check_numbers(args)
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs Weights and Biases: pip install wandb")
    discrete = suite != "continuous"  # pixels and a few actions, not numbers
    make_envs = {"atari": AtariEnvs, "procgen": procgen_maker(args), "continuous": ParallelEnvs}[suite]
    probe = make_envs(args.env_id, 1)
    obs_shape, action_dim = probe.obs_shape, probe.action_dim
    probe.close()
    Cnn.amp = args.amp
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if discrete and device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":  # on the CPU all that is used here is deterministic anyway
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    update_threads = torch.get_num_threads()

    generator = torch.Generator().manual_seed(derive_seeds(args.seed, "training", 1)[0])  # on the CPU, for any device
    progress = dict(global_step=0, train_seconds=0.0, wall_seconds=0.0, last_returns=[], eval_curve=[])
    if resumed:
        actor, critic, return_rms = load_policy(resumed["policy"], checkpoint_path, suite, obs_shape, action_dim)
        network = resumed["policy"]["network"]
        return_rms, progress = return_rms or RunningMeanStd(), resumed["progress"]
    else:
        kind, widths = SIZES["games" if discrete else suite][args.size]
        network = dict(kind=kind, activation="relu", actor_hidden=widths, critic_hidden=widths)
        network |= dict(obs_shape=list(obs_shape), action_dim=action_dim)
        (actor, critic), return_rms = make_networks(network, generator), RunningMeanStd()
    actor, critic = actor.to(device), critic.to(device)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    if resumed:
        load_optimizer(optimizer, resumed, checkpoint_path)
        try:
            generator.set_state(resumed["generator"])
        except (RuntimeError, TypeError):
            fail(f"{checkpoint_path}: field generator: not the state of torch's generator")
    if args.compile:
        actor.compile()  # in place: the names of the parameters, and so the files, stay as they are
        critic.compile()

    run_folder = run_folder or make_run_folder(args)
    save_path = args.save_path or os.path.join(run_folder, "teacher.pt")
    os.makedirs(os.path.dirname(os.path.abspath(save_path)), exist_ok=True)
    if args.track:
        wandb.init(project=args.wandb_project_name, name=run_folder, config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(run_folder, purge_step=progress["global_step"] + 1 if resumed else None)
    table = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + table)
    print(f"run folder: {run_folder} (device: {device})")
    if settings:
        print(f"settings for {args.env_id}: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    signals, start_time = Signals(), time.time() - progress["wall_seconds"]

    def make_policy():
        policy = dict(format=FORMAT, suite=suite, env_id=args.env_id, network=network, actor=plain(actor))
        policy |= dict(critic=plain(critic), return_rms=plain(return_rms), global_step=progress["global_step"])
        return policy | dict(args=dataclasses.asdict(args), versions=versions())

    def make_training_state():
        progress["wall_seconds"] = time.time() - start_time
        state = dict(format=FORMAT, script=SCRIPT, args=dataclasses.asdict(args))
        state |= dict(policy=make_policy(), generator=generator.get_state())
        return state | copy.deepcopy(dict(optimizer=optimizer.state_dict()["state"], progress=progress))

    def save_training_state():
        writer.flush()  # the curves on disk reach as far as the state, or further
        save_atomically(os.path.join(run_folder, "checkpoint.pt"), lambda file: torch.save(state, file))

    def stop_on_signal():
        if signals.stop:
            if state["progress"]["global_step"] > saved_step or not resumed:  # else it is what the file holds
                save_training_state()
            bar.close()
            writer.close()
            print(f"stopped at step {state['progress']['global_step']}; go on with:", file=sys.stderr)
            print(f"  python {SCRIPT} --resume {run_folder}", file=sys.stderr)
            raise SystemExit(128 + signals.stop)

    # TRAINING
    T, N, A = args.num_steps, args.num_envs, action_dim
    obs_b = torch.zeros((T, N, *obs_shape), dtype=torch.uint8 if discrete else torch.float32, device=device)
    outputs_b = torch.zeros((T, N, A), device=device)  # the actor's: logits, or means
    actions_b = torch.zeros((T, N), dtype=torch.int64, device=device) if discrete else torch.zeros_like(outputs_b)
    rewards_b, return_vars_b = torch.zeros((T, N), dtype=torch.float64), torch.zeros((T, 1), dtype=torch.float64)
    ended_b = torch.zeros((T, N), dtype=torch.bool)
    start_step = saved_step = global_step = progress["global_step"]
    state = make_training_state()  # that of the iteration's start: what a signal in the midst of it saves
    envs = make_envs(args.env_id, N, args.env_threads)
    running_return = torch.zeros(N, dtype=torch.float64)  # of the episodes under way, discounted by 0.99 for any gamma
    pace = dict(mininterval=0.5 if sys.stderr.isatty() else 30, disable=global_step >= last_step)
    bar = tqdm(total=math.ceil(last_step / (T * N)) * T * N, initial=global_step, unit="step", **pace)
    try:
        raw_obs = torch.from_numpy(envs.reset(derive_seeds(args.seed, "environments", N, global_step))).to(device)
        if global_step < last_step and not discrete:
            actor.obs_rms.update(raw_obs)
        obs = actor.normalize(raw_obs)
        while global_step < last_step:
            iteration_start = time.time()

            # COLLECT: only the actor runs; values and log-probabilities of the rollout follow in batches
            if discrete:  # the largest of logits plus Gumbel noise is a sample of their softmax
                noise = -torch.empty((T, N, A)).exponential_(generator=generator).log().to(device)
            else:
                torch.set_num_threads(1)  # torch's waiting threads would take the cores from the environments
                noise = actor.logstd.detach().exp() * torch.randn((T, N, A), generator=generator).to(device)
            returns_b, lengths_b = [], []  # of the episodes that end in this rollout
            final_obs = {}  # (step, environment): last observation of an episode that was truncated there
            for step in range(T):
                stop_on_signal()
                with torch.no_grad():
                    output = actor(obs) if discrete else actor(obs)[0]
                    action = (output + noise[step]).argmax(-1) if discrete else output + noise[step]
                obs_b[step], actions_b[step], outputs_b[step] = obs, action, output
                raw_obs, reward, terminated, truncated, last_obs, finished = envs.step(action.cpu().numpy())
                global_step += N
                raw_obs = torch.from_numpy(raw_obs).to(device)
                if not discrete:
                    actor.obs_rms.update(raw_obs)
                obs = actor.normalize(raw_obs)
                for i in np.flatnonzero(truncated & ~terminated):
                    final_obs[step, int(i)] = actor.normalize(torch.from_numpy(last_obs[i]).to(device))
                ended_b[step], rewards_b[step] = torch.from_numpy(terminated | truncated), torch.from_numpy(reward)
                running_return = running_return * 0.99 + rewards_b[step]
                return_rms.update(running_return)
                running_return[ended_b[step]] = 0
                return_vars_b[step] = return_rms.var
                for _, episode_return, episode_length in finished:
                    returns_b.append(episode_return)
                    lengths_b.append(episode_length)

            # ADVANTAGE
            torch.set_num_threads(update_threads)
            with torch.no_grad():
                logprobs = policy_logprob(actions_b, outputs_b if discrete else (outputs_b, actor.logstd))
                batches = obs_b.flatten(0, 1).split(args.minibatch_size)  # a whole rollout of pixels is too much
                values = torch.cat([critic(batch) for batch in batches]).view(T, N)
                next_values = torch.cat([values[1:], critic(obs)[None]])
                rewards = torch.clamp(rewards_b / torch.sqrt(return_vars_b + 1e-8), -10, 10).float().to(device)
                ended = ended_b.to(device)
                next_values[ended] = 0
                if final_obs:  # truncated: what would have followed still counts
                    next_values[tuple(zip(*final_obs, strict=True))] = critic(torch.stack(list(final_obs.values())))
                advantages = compute_advantages(rewards, values, next_values, ended, args.gamma, args.gae_lambda)
                returns = advantages + values

            # UPDATE
            b_obs, b_actions, b_logprobs = obs_b.flatten(0, 1), actions_b.flatten(0, 1), logprobs.flatten()
            b_advantages, b_returns = advantages.flatten(), returns.flatten()
            metrics = []
            for _ in range(args.update_epochs):
                for mb in torch.randperm(T * N, generator=generator).to(device).split(args.minibatch_size):
                    stop_on_signal()
                    mb_obs = b_obs[mb]
                    policy = actor(mb_obs)
                    logratio = policy_logprob(b_actions[mb], policy) - b_logprobs[mb]
                    pg_loss = ppo_loss(logratio, b_advantages[mb], args.clip_coef, args.norm_adv)
                    entropy = policy_entropy(policy)
                    optimizer.zero_grad()
                    (pg_loss - args.ent_coef * entropy).backward()  # one network after the other: less memory
                    v_loss = nn.functional.mse_loss(critic(mb_obs), b_returns[mb])
                    (args.vf_coef * v_loss).backward()
                    if not nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).isfinite():
                        raise FloatingPointError("loss or gradient")
                    optimizer.step()
                    losses = pg_loss.detach(), v_loss.detach(), entropy.detach()
                    metrics.append(torch.stack([*losses, *ratio_metrics(logratio.detach(), args.clip_coef)]))
            progress["global_step"] = global_step
            progress["last_returns"] = [*progress["last_returns"], *returns_b][-100:]
            progress["train_seconds"] += time.time() - iteration_start

            # LOG
            names = ["losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"]
            logged = dict(zip(names, torch.stack(metrics).mean(0).tolist(), strict=True))
            logged["losses/explained_variance"] = (1 - (returns - values).var() / returns.var()).item()
            logged["charts/SPS"] = int(global_step / progress["train_seconds"])
            if returns_b:
                logged |= {"charts/episodic_return": np.mean(returns_b), "charts/episodic_length": np.mean(lengths_b)}
            for name, value in logged.items():
                writer.add_scalar(name, value, global_step)
            bar.update(T * N)
            bar.set_postfix_str(f"return {np.mean(progress['last_returns'] or [math.nan]):.1f}", refresh=False)
            if args.eval_interval and global_step % args.eval_interval < T * N:
                if suite == "procgen":
                    choose, make_eval_envs = make_sampler(actor, args.seed), procgen_maker(args, unseen=True)
                else:
                    choose, make_eval_envs = actor.mode, make_envs
                evaluated = summarize(evaluate(choose, make_eval_envs, args, device, stop_on_signal))
                progress["eval_curve"].append([global_step, evaluated["mean"], evaluated["std"]])
                writer.add_scalar("charts/eval_return", evaluated["mean"], global_step)
            state = make_training_state()

            # SAVE
            if global_step >= min(saved_step + args.checkpoint_interval, last_step) or signals.save:
                signals.save = False
                save_training_state()
                saved_step = global_step

        # RESULT
        policy, scores, trained = make_policy(), {}, global_step > start_step or not resumed
        kept = not trained and os.path.exists(save_path) and read_file(save_path).get("global_step") == global_step
        if not kept:
            save_atomically(save_path, lambda file: torch.save(policy, file))
        if args.eval_episodes:
            print(f"evaluating {args.eval_episodes} episodes")
            scores["teacher"] = score_policy(actor, suite, make_envs, args, device, stop_on_signal)
            policy["score"] = scores["teacher"]
            save_atomically(save_path, lambda file: torch.save(policy, file))
    except FloatingPointError as error:
        raise SystemExit(f"{SCRIPT}: error: non-finite {error} at step {global_step}") from None
    finally:
        bar.close()
        envs.close()
        writer.close()
    result = dict(script=SCRIPT, suite=suite, env_id=args.env_id, seed=args.seed, size=args.size)
    result |= dict(global_step=global_step, sps=round(global_step / max(progress["train_seconds"], 1e-9)))
    result |= dict(wall_seconds=time.time() - start_time, **scores, eval_curve=progress["eval_curve"])
    result |= dict(args=dataclasses.asdict(args), versions=versions())
    report = json.dumps(result, indent=2).encode()
    if trained or scores:
        save_atomically(os.path.join(run_folder, "result.json"), lambda file: file.write(report))
    if args.eval_episodes:
        print(f"teacher: {describe_score(scores['teacher'])}")
    print(f"the teacher is {save_path}; distill it:")
    command = f"  python ppd_{suite}.py --env-id {args.env_id} --teacher {save_path}"
    for name in ("num_levels", "start_level", "distribution_mode") if suite == "procgen" else ():
        if getattr(args, name) != getattr(Args, name):
            command += f" --{name.replace('_', '-')} {getattr(args, name)}"
    print(command)


if __name__ == "__main__":
    main(parse_args())
