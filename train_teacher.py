"""Train a teacher with Proximal Policy Optimization (PPO, arXiv 1707.06347), with the settings of
Proximal Policy Distillation (PPD, arXiv 2407.15134), to be distilled by the other scripts.

    python train_teacher.py --env-id Hopper-v4 --save-path runs/teacher.pt
    python train_teacher.py --env-id HalfCheetah-v4 --seed 200 --total-timesteps 1000000

Any gymnasium environment with a flat Box observation and a Box action. Actor and critic are two separate networks.
Ctrl-C saves the training state; `--resume runs/...` goes on from there; `--total-timesteps 0 --resume runs/...` only
evaluates. The numbers follow stable-baselines3's PPO, which the paper was made with. It departs from that in what changes
no result: environments are stepped by threads; values and log-probabilities of a rollout are computed in one batch after
it; noise and shuffles come from one generator, whose state is saved.
"""

import copy
import dataclasses
import difflib
import importlib.metadata
import io
import json
import math
import os
import pickle
import platform
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
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
    """deterministic algorithms, also on the GPU"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""
    wandb_project_name: str = "ppd"
    """the project's name in Weights and Biases"""
    save_path: str | None = None
    """where the teacher goes (default: teacher.pt in the run folder); an existing file is refused"""
    overwrite: bool = False
    """replace an existing file at --save-path"""
    resume: str | None = None
    """a run folder or its checkpoint.pt to go on from; all arguments come from there, and only total_timesteps, cuda,
    compile, env_threads, eval_*, checkpoint_interval, track and overwrite may be given anew"""

    # environment
    env_id: str = "Hopper-v4"
    """id of the environment"""
    num_envs: int = 18
    """parallel environments"""

    # algorithm (paper, Table 3; what the paper varies by environment stands in PAPER_SETTINGS)
    total_timesteps: int = 10_000_000
    """environment steps, rounded up to whole rollouts; 0 trains nothing and evaluates what --resume names"""
    size: Literal["smaller", "same", "larger"] = "same"
    """size of the networks; the paper's teachers are `same`"""
    learning_rate: float = 3e-4
    """Adam's learning rate, constant"""
    num_steps: int | None = None
    """steps per environment and rollout (default: the paper's, 256 for Hopper and Swimmer, else 512)"""
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
    """weight of the entropy bonus (default: the paper's, 0.01 for Hopper and Swimmer, else 0)"""
    vf_coef: float = 0.5
    """weight of the critic's loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient, of actor and critic together"""

    # evaluation
    eval_episodes: int = 50
    """full episodes with deterministic actions at the end; 0 skips the evaluation"""
    eval_interval: int = 0
    """also evaluate every so many environment steps; 0 never does"""

    # runtime
    cuda: bool = True
    """use the GPU where there is one"""
    compile: bool = False
    """torch.compile the networks"""
    env_threads: int = 0
    """threads that step the environments, 0 for one per core; changes no result"""
    checkpoint_interval: int = 500_000
    """environment steps between saves of the training state"""


SUITE = "continuous"  # the suite of a policy file; Atari and Procgen join here
PAPER_SETTINGS = {  # Table 3: what the paper varies by environment
    "Hopper": dict(num_steps=256, ent_coef=0.01),
    "Swimmer": dict(num_steps=256, ent_coef=0.01),
    "other": dict(num_steps=512, ent_coef=0.0),
}
HIDDEN = {"smaller": [128, 64], "same": [256, 256], "larger": [512, 512]}  # Table 4: hidden units of actor and of critic
RUNTIME_FLAGS = """total_timesteps cuda compile env_threads eval_episodes eval_interval checkpoint_interval track
    overwrite resume""".split()  # what --resume lets one give anew


def fail(message):
    """End the program as a command line does for its user's mistake: one line on stderr, exit code 2."""
    print(f"{os.path.basename(__file__)}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    """The command line (default: this process's) as `Args`; with --resume, on top of the arguments saved there."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.resume is None:
        return args
    _, state = read_training_state(args.resume)
    saved = Args(**{field.name: state["args"][field.name] for field in dataclasses.fields(Args)})
    saved = dataclasses.replace(saved, resume=args.resume, overwrite=False)
    args = tyro.cli(Args, args=argv, default=saved)
    for field in dataclasses.fields(Args):
        if field.name not in RUNTIME_FLAGS and getattr(args, field.name) != getattr(saved, field.name):
            flag = f"--{field.name.replace('_', '-')}"
            fail(f"{flag} cannot be changed with --resume: this run was started with {getattr(saved, field.name)}")
    return args


def check_numbers(args):
    """Refuse arguments that no run can have, before anything is created."""
    limits = [
        ("num_envs num_steps minibatch_size update_epochs checkpoint_interval", lambda x: x >= 1, "at least 1"),
        ("seed total_timesteps eval_episodes eval_interval env_threads", lambda x: x >= 0, "0 or more"),
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
    if args.minibatch_size > args.num_envs * args.num_steps:
        batch = f"--num-envs {args.num_envs} x --num-steps {args.num_steps} = {args.num_envs * args.num_steps}"
        fail(f"--minibatch-size {args.minibatch_size} is larger than the rollout, {batch}")
    if args.eval_interval and not args.eval_episodes:
        fail(f"--eval-interval {args.eval_interval} needs --eval-episodes of at least 1")


def derive_seeds(seed, stream, count, step=0):
    """`count` independent 32-bit seeds for a stream of randomness ("training", "environments", …) of a run, and for
    the step at which it was resumed, as a list of ints."""
    entropy = [seed, int.from_bytes(stream.encode(), "big"), step]
    return [int(s) for s in np.random.SeedSequence(entropy).generate_state(count)]


# --- ENVIRONMENT ---


def make_env(env_id):
    """One gymnasium environment with a flat Box observation and a flat Box action; any other id ends the program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium calls every MuJoCo -v4 outdated: they are the paper's ids
            env = gym.make(env_id, disable_env_checker=True)  # the checker costs time at every step
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.5)
        hint = f"; nearest known ids: {', '.join(near)}" if near else ""
        reason = "unknown id" if isinstance(error, gym.error.UnregisteredEnv) else " ".join(str(error).split())
        fail(f"--env-id {env_id}: {reason}; this script takes gymnasium's continuous control{hint}")
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"--env-id {env_id}: its {name} space is {space}; this script needs a flat Box")
    return env


class ThreadedEnvs:
    """`num_envs` gymnasium environments, stepped by `threads` threads (0: one per core), each reset in the very step
    that ends its episode. MuJoCo releases Python's lock while it computes, so threads bring speed; each environment has
    its own state, so they change no result."""

    def __init__(self, env_id, num_envs, threads=0):
        self.envs = [make_env(env_id) for _ in range(num_envs)]
        self.action_space = self.envs[0].action_space
        shape = (num_envs, *self.envs[0].observation_space.shape)
        self.obs, self.last_obs = np.zeros(shape), np.zeros(shape)
        self.rewards, self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs), np.zeros(num_envs, int)
        self.terminated, self.truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        threads = min(threads or len(os.sched_getaffinity(0)), num_envs)
        self.shares = [range(first, num_envs, threads) for first in range(threads)]
        self.pool = ThreadPoolExecutor(threads)

    def reset(self, seeds):
        """Start new episodes, environment i with seeds[i]; the observations, (num_envs, obs_dim) float64."""
        for i, env in enumerate(self.envs):
            self.obs[i], _ = env.reset(seed=seeds[i])
        self.returns[:], self.lengths[:] = 0, 0
        return self.obs.copy()

    def step(self, actions, active=None):
        """Act in every environment, or in those where the bool array `active` is set.

        actions: (num_envs, action_dim) float32, clipped here to the action bounds: MuJoCo's dynamics would clip them
        too, but its control cost would not. Returns obs (num_envs, obs_dim) float64, the next observations, those of a
        new episode where one has ended; rewards (num_envs,) float64; terminated and truncated (num_envs,) bool, which
        can both be set; last_obs (num_envs, obs_dim) float64, the observations before any reset; finished, a list of
        (environment, return, length) of the episodes that ended. FloatingPointError at a non-finite number."""
        actions = np.clip(actions, self.action_space.low, self.action_space.high)
        jobs = [self.pool.submit(self._step_share, share, actions, active) for share in self.shares]
        for job in jobs:
            job.result()
        if not np.isfinite(self.last_obs).all():
            raise FloatingPointError("observation")
        if not np.isfinite(self.rewards).all():
            raise FloatingPointError("reward")
        ended = np.flatnonzero((self.terminated | self.truncated) & (True if active is None else active))
        finished = [(int(i), float(self.returns[i]), int(self.lengths[i])) for i in ended]
        self.returns[ended], self.lengths[ended] = 0, 0
        flags = self.terminated.copy(), self.truncated.copy()
        return self.obs.copy(), self.rewards.copy(), *flags, self.last_obs.copy(), finished

    def _step_share(self, share, actions, active):
        for i in share:
            if active is not None and not active[i]:
                continue
            obs, self.rewards[i], self.terminated[i], self.truncated[i], _ = self.envs[i].step(actions[i])
            self.returns[i] += self.rewards[i]
            self.lengths[i] += 1
            self.last_obs[i] = obs
            if self.terminated[i] or self.truncated[i]:
                obs, _ = self.envs[i].reset()  # goes on with the environment's own random stream
            self.obs[i] = obs

    def close(self):
        self.pool.shutdown()
        for env in self.envs:
            env.close()


# --- NETWORKS ---


def layer_init(layer, gain, generator):
    """Orthogonal weights (gain √2 in the body, 0.01 for the policy's output, 1 for the value) and zero biases."""
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)


def mlp(sizes, activation, output_gain, generator):
    """A multilayer perceptron with the layer widths `sizes`; `activation` is "relu" or "tanh"."""
    layers = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(inputs, outputs), {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]()]
    layers.pop()  # no activation after the output
    if generator is not None:
        for layer in layers[::2]:
            layer_init(layer, output_gain if layer is layers[-1] else math.sqrt(2), generator)
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
        delta, total = mean - self.mean, self.count + len(batch)
        squares = self.var * self.count + var * len(batch) + delta**2 * self.count * len(batch) / total
        self.mean += delta * len(batch) / total
        self.var.copy_(squares / total)
        self.count.copy_(total)


class Actor(nn.Module):
    """Gaussian policy: a multilayer perceptron for the mean, a log standard deviation that does not depend on the state.
    It carries the statistics that its observations are normalized with."""

    def __init__(self, network, generator=None):
        super().__init__()
        sizes = [*network["obs_shape"], *network["actor_hidden"], network["action_dim"]]
        self.mean = mlp(sizes, network["activation"], 0.01, generator)
        self.logstd = nn.Parameter(torch.zeros(network["action_dim"]))
        self.obs_rms = RunningMeanStd(network["obs_shape"])
        self.register_buffer("obs_clip", torch.tensor(10.0, dtype=torch.float64))
        self.register_buffer("obs_epsilon", torch.tensor(1e-8, dtype=torch.float64))

    def normalize(self, obs):
        """Observations as the networks see them, by the statistics as they stand: (n, obs_dim) float64 to float32.
        Called where observations are collected and not in `forward`: else statistics that move on between collection
        and update would change the importance ratio."""
        obs = (obs - self.obs_rms.mean) / torch.sqrt(self.obs_rms.var + self.obs_epsilon)
        return torch.clamp(obs, -self.obs_clip, self.obs_clip).float()

    def forward(self, obs):
        """Mean (n, action_dim) and log standard deviation (action_dim,) of the actions, from normalized observations."""
        return self.mean(obs), self.logstd


class Critic(nn.Module):
    """State value: a multilayer perceptron of its own."""

    def __init__(self, network, generator=None):
        super().__init__()
        self.value = mlp([*network["obs_shape"], *network["critic_hidden"], 1], network["activation"], 1.0, generator)

    def forward(self, obs):
        """Values (n,) of normalized observations (n, obs_dim)."""
        return self.value(obs).squeeze(-1)


# --- CHECKPOINT ---

FORMAT = 1  # of policy files and training states


def save_atomically(path, content):
    """Write bytes so that at any moment, even after a crash, `path` holds the whole old file or the whole new one."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder_descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(folder_descriptor)
    os.close(folder_descriptor)


def serialize(content):
    """A dict of tensors and plain Python values as the bytes of a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_file(path):
    """The dict of tensors and plain values in a file of ours. Nothing in the file is executed, and every fault (missing,
    damaged, foreign, inflated, non-finite) ends the program with one line that names the file and the field."""
    if not os.path.isfile(path):
        fail(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}")
    try:  # torch itself loads a flipped byte and inflates a small archive without bound: the zip's own checks first
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = archive.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
        if not stored or sum(e.file_size for e in entries) > len(data):
            fail(f"{path}: compressed or overlapping entries; files of this project have none")
        damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError):
        fail(f"{path}: damaged, or not a file of this project (no intact torch archive)")
    if damaged:
        fail(f"{path}: damaged: wrong checksum of {damaged}")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError):
        fail(f"{path}: not a file of this project (it holds more than tensors and plain values)")
    if not isinstance(content, dict) or "format" not in content:
        fail(f"{path}: not a file of this project (no field format)")
    if content["format"] != FORMAT or type(content["format"]) is not int:
        fail(f"{path}: format {content['format']!r} is unknown; this script reads format {FORMAT}")
    pending, seen = [("", content)], set()
    while pending:  # every value, once; a loop, because nesting can be deep
        field, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is dict:
            if not all(type(key) in (str, int) for key in value):
                fail(f"{path}: field {field or 'keys'}: keys must be text or integers")
            pending += [(f"{field}.{key}" if field else str(key), item) for key, item in value.items()]
        elif type(value) in (list, tuple):
            pending += [(field, item) for item in value]
        elif type(value) is torch.Tensor:
            if value.layout != torch.strided or value.device.type != "cpu" or not value.is_contiguous():
                fail(f"{path}: field {field}: not a plain contiguous tensor")
            if value.numel() * value.element_size() > len(data):
                fail(f"{path}: field {field}: claims more numbers than the file has")
            if not torch.isfinite(value).all():
                fail(f"{path}: field {field}: holds numbers that are not finite")
        elif type(value) not in (str, int, float, bool, type(None)):
            fail(f"{path}: field {field}: unexpected {type(value).__name__}")
    return content


def check_fields(content, path, **types):
    """Refuse a dict that lacks one of the named fields or holds another type there."""
    for name, wanted in types.items():
        if name not in content:
            fail(f"{path}: field {name} is missing")
        if type(content[name]) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            fail(f"{path}: field {name}: unexpected {type(content[name]).__name__}")


def check_network(network, path):
    """Refuse a description of networks that this script cannot build."""
    check_fields(network, path, kind=str, activation=str, actor_hidden=list, critic_hidden=list, obs_shape=list, action_dim=int)
    if network["kind"] != "mlp" or network["activation"] not in ("relu", "tanh"):
        fail(f"{path}: field network: unknown kind {network['kind']!r} or activation {network['activation']!r}")
    widths = [network["action_dim"], *network["obs_shape"], *network["actor_hidden"], *network["critic_hidden"]]
    if not all(type(w) is int and 1 <= w <= 2**20 for w in widths) or len(network["obs_shape"]) != 1 or len(widths) > 64:
        fail(f"{path}: field network: widths must be positive integers, and the observation flat")


def fill_module(module, tensors, path, field):
    """Fill a module that was built on the meta device with the tensors of a file, whose names, shapes and types have to
    be exactly the module's. Returns the module."""
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        fail(f"{path}: field {field}.{name} is {'missing' if name in expected else 'unexpected'}")
    for name, tensor in expected.items():
        shape, found = tuple(tensor.shape), tensors[name]
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape or found.dtype != tensor.dtype:
            fail(f"{path}: field {field}.{name}: has to be {tensor.dtype} of shape {shape}")
        if name.split(".")[-1] in ("var", "count", "obs_clip", "obs_epsilon") and (found < 0).any():
            fail(f"{path}: field {field}.{name}: negative")
    module.load_state_dict(tensors, assign=True)  # no memory is taken that the file does not fill
    return module


def load_policy(policy, path, obs_shape, action_dim):
    """Actor, critic and return statistics (None if the file has none) of a policy dict from `read_file`, which is
    refused where it does not fit the environment's observations (obs_shape) and actions (action_dim)."""
    if "policy" in policy:
        fail(f"{path}: a training state, not a policy file; the policy of a finished run is teacher.pt or student.pt")
    check_fields(policy, path, suite=str, env_id=str, network=dict, actor=dict, critic=dict, return_rms=(dict, type(None)))
    check_fields(policy, path, global_step=int, args=dict, versions=dict)
    if policy["suite"] != SUITE:
        fail(f"{path}: field suite: a policy for {policy['suite']}, but this script is for {SUITE}")
    network = policy["network"]
    check_network(network, path)
    if network["obs_shape"] != list(obs_shape):
        fail(f"{path}: field network: made for observations of shape {network['obs_shape']}, not {list(obs_shape)}")
    if network["action_dim"] != action_dim:
        fail(f"{path}: field network: made for {network['action_dim']} action dimensions, not {action_dim}")
    with torch.device("meta"):
        actor, critic, return_rms = Actor(network), Critic(network), RunningMeanStd()
    fill_module(actor, policy["actor"], path, "actor")
    fill_module(critic, policy["critic"], path, "critic")
    if policy["return_rms"] is None:
        return actor, critic, None
    return actor, critic, fill_module(return_rms, policy["return_rms"], path, "return_rms")


def read_training_state(path):
    """The path of a checkpoint, named by itself or by its run folder, and the training state in it."""
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    state = read_file(path)
    if "policy" not in state:
        fail(f"{path}: a policy file, not a training state; --resume takes a run folder or its checkpoint.pt")
    check_fields(state, path, script=str, policy=dict, optimizer=dict, generator=torch.Tensor, args=dict, global_step=int)
    check_fields(state, path, train_seconds=float, wall_seconds=float, eval_curve=list, last_returns=list)
    if state["script"] != os.path.basename(__file__):
        fail(f"{path}: a training state of {state['script']}, not of {os.path.basename(__file__)}")
    fields = {field.name for field in dataclasses.fields(Args)}
    for name in sorted(fields ^ state["args"].keys()):
        fail(f"{path}: field args.{name} is {'missing' if name in fields else 'unexpected'}")
    return path, state


def check_save_path(args, teacher=None):
    """Refuse a --save-path that cannot be written or that would cost the user a file."""
    path = args.save_path
    if path is None or not os.path.lexists(path):
        folder = os.path.abspath(os.path.dirname(path or "runs/run"))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            fail(f"{folder}: not a folder that can be written to")
        return
    if os.path.isdir(path):
        fail(f"--save-path {path} is a folder; name a file")
    if teacher and os.path.exists(teacher) and os.path.samefile(path, teacher):
        fail(f"--save-path {path} is the teacher's own file; name another")
    if args.overwrite:
        return
    if args.resume:  # the run itself may have written it
        started_with = read_file(path).get("args", {})
        if all(started_with.get(k) == v for k, v in dataclasses.asdict(args).items() if k not in RUNTIME_FLAGS):
            return
    fail(f"--save-path {path} exists; name another or give --overwrite")


def make_run_folder(args):
    """A new folder runs/{env_id}__{exp_name}__{seed}__{unix time}, with a suffix where that exists."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    name = "".join("-" if c in '/\\:' else c for c in name)
    for suffix in ["", *(f"-{i}" for i in range(1, 1000))]:
        try:
            os.makedirs(f"runs/{name}{suffix}")
            return f"runs/{name}{suffix}"
        except FileExistsError:
            pass


def plain(module):
    """A module's state dict as a dict of tensors of their own on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def versions():
    """The versions of what a result depends on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    return {"python": platform.python_version(), **packages}


class Signals:
    """Remembers signals until the loop asks for them. SIGINT (Ctrl-C) and SIGTERM: save and exit; a second one quits at
    once. SIGUSR1: save and go on."""

    def __init__(self):
        self.stop, self.save = None, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if number == signal.SIGUSR1:
            self.save = True
            return
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


def ppo_loss(logratio, advantages, clip_coef, norm_adv):
    """The clipped surrogate objective (arXiv 1707.06347, eq. 7) as a loss: -mean min(ρ Â, clip(ρ, 1-ε, 1+ε) Â).

    logratio: log ρ = log π_θ(a|s) - log π_θk(a|s), (n,). advantages: (n,), normalized here if norm_adv."""
    if norm_adv and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = logratio.exp()
    return -torch.min(ratio * advantages, torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(values, returns):
    """Mean squared error of the critic, (n,) and (n,) to ()."""
    return ((values - returns) ** 2).mean()


# --- EVALUATION ---


@torch.no_grad()
def evaluate(actor, env_id, episodes, seed, threads=0, on_step=lambda: None):
    """The returns of `episodes` full episodes with deterministic actions, a list of floats.

    Every environment plays a quota fixed beforehand (short episodes would be over-represented among the first to end).
    Seeds are evaluation's own, and nothing of the training's randomness is used. on_step is called at every step."""
    torch.set_num_threads(1)  # torch's waiting threads would take the cores from the environments
    num_envs = min(episodes, 25)
    quotas = [episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)]
    envs = ThreadedEnvs(env_id, num_envs, threads)
    device = actor.logstd.device
    returns = [[] for _ in range(num_envs)]
    obs = envs.reset(derive_seeds(seed, "evaluation", num_envs))
    while (active := np.array([len(done) < quota for done, quota in zip(returns, quotas)])).any():
        on_step()
        mean, _ = actor(actor.normalize(torch.from_numpy(obs).to(device)))
        obs, _, _, _, _, finished = envs.step(mean.cpu().numpy(), active)
        for i, episode_return, _ in finished:
            returns[i].append(episode_return)
    envs.close()
    return [episode_return for done in returns for episode_return in done]


def score(returns):
    """Mean, standard deviation, number and list of episodic returns, for result.json."""
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "episodes": len(returns), "returns": returns}


def main(args):
    # SETUP: everything that can be wrong is found before anything is created
    resumed = None
    if args.resume:
        checkpoint_path, resumed = read_training_state(args.resume)
    elif args.total_timesteps == 0:
        fail("--total-timesteps 0 evaluates a run: name it with --resume")
    settings = PAPER_SETTINGS.get(args.env_id.split("-")[0], PAPER_SETTINGS["other"])
    filled = {name: value for name, value in settings.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **filled)
    check_numbers(args)
    check_save_path(args)
    probe = make_env(args.env_id)
    (obs_dim,), (action_dim,) = probe.observation_space.shape, probe.action_space.shape
    probe.close()
    wandb = None
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs Weights and Biases: pip install wandb")

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    update_threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(derive_seeds(args.seed, "training", 1)[0])  # on the CPU on every device
    if resumed:
        network = resumed["policy"]["network"] if "network" in resumed["policy"] else None
        actor, critic, return_rms = load_policy(resumed["policy"], checkpoint_path, [obs_dim], action_dim)
    else:
        network = dict(kind="mlp", activation="relu", actor_hidden=HIDDEN[args.size], critic_hidden=HIDDEN[args.size])
        network.update(obs_shape=[obs_dim], action_dim=action_dim)
        actor, critic, return_rms = Actor(network, generator), Critic(network, generator), RunningMeanStd()
    actor.to(device), critic.to(device)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    global_step, train_seconds, wall_seconds, eval_curve, last_returns = 0, 0.0, 0.0, [], []
    if resumed:
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            generator.set_state(resumed["generator"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{checkpoint_path}: field optimizer or generator does not fit: {error}")
        global_step, train_seconds, wall_seconds = (resumed[k] for k in ("global_step", "train_seconds", "wall_seconds"))
        eval_curve, last_returns = resumed["eval_curve"], resumed["last_returns"]
    if args.compile:
        actor.compile(), critic.compile()  # in place, so that the names of the parameters stay

    run_folder = os.path.dirname(checkpoint_path) or "." if resumed else make_run_folder(args)
    checkpoint_path = os.path.join(run_folder, "checkpoint.pt")
    save_path = args.save_path or os.path.join(run_folder, "teacher.pt")
    os.makedirs(os.path.dirname(os.path.abspath(save_path)), exist_ok=True)
    if wandb:
        wandb.init(project=args.wandb_project_name, name=os.path.basename(run_folder), config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(run_folder, purge_step=global_step + 1 if resumed else None)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
    print(f"run folder: {run_folder} (device: {device})")
    if filled:
        print(f"the paper's settings for {args.env_id}: " + ", ".join(f"{k} {v}" for k, v in filled.items()))
    start_time, signals = time.time(), Signals()

    def policy_dict():
        return {
            "format": FORMAT,
            "suite": SUITE,
            "env_id": args.env_id,
            "network": network,
            "actor": plain(actor),
            "critic": plain(critic),
            "return_rms": plain(return_rms),
            "global_step": global_step,
            "args": dataclasses.asdict(args),
            "versions": versions(),
        }

    def training_state():
        return {
            "format": FORMAT,
            "script": os.path.basename(__file__),
            "policy": policy_dict(),
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "generator": generator.get_state(),
            "args": dataclasses.asdict(args),
            "global_step": global_step,
            "train_seconds": train_seconds,
            "wall_seconds": wall_seconds + time.time() - start_time,
            "eval_curve": list(eval_curve),
            "last_returns": list(last_returns),
        }

    def save_state():
        writer.flush()  # the curves on disk reach at least as far as the state
        save_atomically(checkpoint_path, serialize(state))

    def check_signals():
        if signals.stop:
            save_state()
            bar.close()
            writer.close()
            print(f"stopped by {signal.Signals(signals.stop).name} at step {state['global_step']}", file=sys.stderr)
            print(f"go on with: python {os.path.basename(__file__)} --resume {run_folder}", file=sys.stderr)
            raise SystemExit(128 + signals.stop)

    # TRAINING
    T, N = args.num_steps, args.num_envs
    envs = ThreadedEnvs(args.env_id, N, args.env_threads)
    raw_obs = torch.from_numpy(envs.reset(derive_seeds(args.seed, "environments", N, global_step))).to(device)
    actor.obs_rms.update(raw_obs)
    obs = actor.normalize(raw_obs)
    running_return = torch.zeros(N, dtype=torch.float64)  # discounted, of the running episodes: sets the reward's scale
    b_obs = torch.zeros((T, N, obs_dim), device=device)
    b_actions, b_means = (torch.zeros((T, N, action_dim), device=device) for _ in range(2))
    b_rewards, b_terminated, b_ended = torch.zeros((T, N)), torch.zeros((T, N), dtype=torch.bool), torch.zeros((T, N), dtype=torch.bool)
    saved_step, state = global_step, training_state()
    total = math.ceil(args.total_timesteps / (T * N)) * T * N
    bar = tqdm(total=total, initial=global_step, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)
    try:
        while global_step < args.total_timesteps:
            iteration_start = time.time()

            # COLLECT a rollout; only the actor runs, values and log-probabilities follow in one batch
            torch.set_num_threads(1)  # torch's waiting threads would take the cores from the environments
            noise = torch.randn((T, N, action_dim), generator=generator).to(device)
            final_obs = {}  # (step, environment): the last observation of an episode that was truncated
            for step in range(T):
                check_signals()
                with torch.no_grad():
                    mean, logstd = actor(obs)
                b_obs[step], b_means[step] = obs, mean
                b_actions[step] = mean + logstd.detach().exp() * noise[step]
                raw_obs, reward, terminated, truncated, last_obs, finished = envs.step(b_actions[step].cpu().numpy())
                raw_obs, reward = torch.from_numpy(raw_obs).to(device), torch.from_numpy(reward)
                actor.obs_rms.update(raw_obs)
                obs = actor.normalize(raw_obs)
                for i in np.flatnonzero(truncated & ~terminated):
                    final_obs[step, int(i)] = actor.normalize(torch.from_numpy(last_obs[i]).to(device))
                running_return = running_return * 0.99 + reward  # 0.99 whatever gamma is: stable-baselines3's default
                return_rms.update(running_return)
                b_rewards[step] = torch.clamp(reward / torch.sqrt(return_rms.var + 1e-8), -10, 10)
                b_terminated[step], b_ended[step] = torch.from_numpy(terminated), torch.from_numpy(terminated | truncated)
                running_return[b_ended[step]] = 0
                for _, episode_return, episode_length in finished:
                    writer.add_scalar("charts/episodic_return", episode_return, global_step + (step + 1) * N)
                    writer.add_scalar("charts/episodic_length", episode_length, global_step + (step + 1) * N)
                    last_returns = [*last_returns[-99:], episode_return]

            # ADVANTAGE
            torch.set_num_threads(update_threads)
            with torch.no_grad():
                logprobs = gaussian_logprob(b_actions, b_means, actor.logstd)
                values = critic(b_obs.flatten(0, 1)).view(T, N)
                next_values = torch.cat([values[1:], critic(obs)[None]])
                next_values[b_terminated.to(device)] = 0
                if final_obs:
                    next_values[tuple(zip(*final_obs))] = critic(torch.stack(list(final_obs.values())))
                ended, rewards = b_ended.to(device), b_rewards.to(device)
                advantages = compute_advantages(rewards, values, next_values, ended, args.gamma, args.gae_lambda)
                returns = advantages + values

            # UPDATE
            flat_obs, flat_actions, flat_logprobs = b_obs.flatten(0, 1), b_actions.flatten(0, 1), logprobs.flatten()
            flat_advantages, flat_returns = advantages.flatten(), returns.flatten()
            metrics = []
            for _ in range(args.update_epochs):
                for mb in torch.randperm(T * N, generator=generator).to(device).split(args.minibatch_size):
                    check_signals()
                    mean, logstd = actor(flat_obs[mb])
                    logratio = gaussian_logprob(flat_actions[mb], mean, logstd) - flat_logprobs[mb]
                    pg_loss = ppo_loss(logratio, flat_advantages[mb], args.clip_coef, args.norm_adv)
                    entropy = gaussian_entropy(logstd)
                    v_loss = value_loss(critic(flat_obs[mb]), flat_returns[mb])
                    optimizer.zero_grad()
                    (pg_loss - args.ent_coef * entropy).backward()  # disjoint networks: one after the other, less memory
                    (args.vf_coef * v_loss).backward()
                    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, error_if_nonfinite=True)
                    optimizer.step()
                    with torch.no_grad():
                        ratio = logratio.exp()
                        approx_kl, clipfrac = (ratio - 1 - logratio).mean(), ((ratio - 1).abs() > args.clip_coef).float().mean()
                        metrics.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac]))
            global_step += T * N
            train_seconds += time.time() - iteration_start

            # LOG
            names = ["losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"]
            logged = dict(zip(names, torch.stack(metrics).mean(0).tolist()))
            logged["losses/explained_variance"] = (1 - (returns - values).var() / returns.var()).item()
            logged["charts/learning_rate"] = args.learning_rate
            logged["charts/SPS"] = int(global_step / train_seconds)
            for name, value in logged.items():
                writer.add_scalar(name, value, global_step)
            bar.update(T * N)
            bar.set_postfix(returns=f"{np.mean(last_returns):.1f}" if last_returns else "-", refresh=False)
            if args.eval_interval and global_step // args.eval_interval > (global_step - T * N) // args.eval_interval:
                eval_returns = evaluate(actor, args.env_id, args.eval_episodes, args.seed, args.env_threads, check_signals)
                writer.add_scalar("charts/eval_return", np.mean(eval_returns), global_step)
                eval_curve.append([global_step, float(np.mean(eval_returns)), float(np.std(eval_returns))])

            # SAVE
            state = training_state()
            if global_step - saved_step >= args.checkpoint_interval or signals.save or global_step >= args.total_timesteps:
                save_state()
                saved_step, signals.save = global_step, False

        # RESULT
        bar.close()
        envs.close()
        save_atomically(save_path, serialize(policy_dict()))
        result = {"script": os.path.basename(__file__), "suite": SUITE, "env_id": args.env_id, "seed": args.seed, "size": args.size}
        result.update(global_step=global_step, sps=round(global_step / train_seconds) if train_seconds else None)
        if args.eval_episodes:
            print(f"evaluating {args.eval_episodes} episodes …")
            result["teacher"] = score(evaluate(actor, args.env_id, args.eval_episodes, args.seed, args.env_threads, check_signals))
            save_atomically(save_path, serialize({**policy_dict(), "score": result["teacher"]}))
            writer.add_scalar("charts/final_return", result["teacher"]["mean"], global_step)
    except (FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "non-finite" not in str(error):
            raise
        what = error if isinstance(error, FloatingPointError) else "loss or gradient"
        bar.close()
        print(f"{os.path.basename(__file__)}: error: non-finite {what} after step {global_step}; the last checkpoint is good", file=sys.stderr)
        raise SystemExit(1) from None
    wall_seconds += time.time() - start_time
    result.update(wall_seconds=round(wall_seconds, 1), eval_curve=eval_curve, args=dataclasses.asdict(args), versions=versions())
    save_atomically(os.path.join(run_folder, "result.json"), json.dumps(result, indent=2).encode())
    writer.close()

    # SUMMARY
    if args.eval_episodes:
        print(f"teacher: {result['teacher']['mean']:.1f} ± {result['teacher']['std']:.1f} over {args.eval_episodes} episodes")
    print(f"saved {save_path}; distill it with:\n  python ppd_continuous.py --env-id {args.env_id} --teacher {save_path}")


if __name__ == "__main__":
    main(parse_args())
