"""Proximal Policy Distillation (PPD, https://arxiv.org/abs/2407.15134) for continuous control: distill a teacher into a
smaller, same-sized or larger student.

    python ppd_continuous.py --teacher teachers/Hopper-v4.pt --student-size larger --total-timesteps 300000
    python ppd_continuous.py --env-id Hopper-v4 --teacher runs/teacher.pt --seed 200

The student learns by PPO from its own rollouts, and is drawn to the teacher in the states that it visits:

    maximize E[ min(ρ Â, clip(ρ, 1-ε, 1+ε) Â) - λ · KL(π_teacher ‖ π_student) · max(ρ, 1-ε) ]

`# PPD:` marks what is not plain PPO. Unlike CleanRL's PPO, and like stable-baselines3's, this one bootstraps episodes
that a time limit cuts off; its value loss is a plain mean squared error, its learning rate constant. The teacher's
statistics scale observations and rewards, and stay fixed (the paper speaks of observations only; if the teacher has
none of rewards, the student keeps its own).
"""

import contextlib
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

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = os.path.basename(__file__)
NUM_CORES = torch.get_num_threads()  # follows OMP_NUM_THREADS
Distribution.set_default_validate_args(False)  # saves time


@dataclasses.dataclass
class Args:
    exp_name: str = SCRIPT.removesuffix(".py")
    """name of the experiment"""
    seed: int = 100
    """seed of all that is random (the paper: 100 to 500)"""
    cuda: bool = True
    """use the GPU, where there is one"""
    track: bool = False
    """also log to Weights and Biases"""

    teacher: str | None = None
    """policy file of the teacher, as train_teacher.py writes it"""
    student_size: Literal["smaller", "same", "larger"] = "same"
    """hidden units: smaller 128, 64; larger 512, 512; same: the teacher's"""
    distill_lambda: float = 1.0
    """weight λ of the distillation loss; 0: PPO, with the teacher's statistics"""
    distill_lambda_end: float | None = None
    """anneal λ linearly to this value (default: λ is constant)"""
    kl: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher ‖ student), the paper's; reverse: KL(student ‖ teacher)"""
    ratio_grad: bool = True
    """let the gradient of the distillation loss flow through ρ too, as in the paper"""
    teacher_logstd: bool = False
    """start with the teacher's log standard deviation (the paper: 0)"""
    teacher_noise: float = 0.0
    """standard deviation of noise on the teacher's parameters (the paper: 0.05)"""

    env_id: str | None = None
    """id of the environment (default: the teacher's)"""
    total_timesteps: int = 2_000_000
    """environment steps, rounded up to whole rollouts"""
    learning_rate: float = 3e-4
    """learning rate of Adam"""
    num_envs: int = 18
    """number of parallel environments"""
    num_steps: int = 64
    """steps of each environment in a rollout"""
    gamma: float | None = None
    """discount factor (default: 0.995 for Hopper and Swimmer, else 0.999)"""
    gae_lambda: float = 0.9
    """lambda of generalized advantage estimation"""
    minibatch_size: int = 512
    """samples in a minibatch"""
    update_epochs: int = 4
    """passes over each rollout"""
    clip_coef: float = 0.2
    """clip range ε of the importance ratio ρ"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    compile: bool = False
    """compile the student's networks and the losses"""

    eval_episodes: int = 50
    """episodes of an evaluation"""
    eval_interval: int = 0
    """steps between evaluations of the student; 0: only at the end"""
    save_path: str | None = None
    """path of the student's policy file (default: student.pt in the run folder)"""
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


def distill_loss(logratio, kl, clip_coef):  # PPD: the distillation loss
    """E[KL · max(ρ, 1-ε)]. logratio: log ρ; all are (n,). Gradients flow through both factors."""
    return (kl * logratio.exp().clamp(min=1 - clip_coef)).mean()


def main(args):
    # SETUP
    wanted = "a teacher for continuous control: see teachers/Hopper-v4.pt, train_teacher.py, teachers/import_sb3.py"
    teacher = load("--teacher", args.teacher, wanted, format=1, suite="continuous")  # PPD: its policy file
    args = dataclasses.replace(args, env_id=args.env_id or teacher["env_id"])
    if args.gamma is None:
        args.gamma = 0.995 if args.env_id.startswith(("Hopper", "Swimmer")) else 0.999
    batch_size = args.num_envs * args.num_steps
    if args.minibatch_size > batch_size or args.eval_episodes < 1:
        sys.exit(f"--minibatch-size: at most num_envs * num_steps = {batch_size}; --eval-episodes: at least 1")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    teacher_actor = MlpActor(teacher["network"]).requires_grad_(False)  # PPD: the teacher
    teacher_actor.load_state_dict(teacher["actor"])
    torch.manual_seed(args.seed)
    for parameter in teacher_actor.parameters():  # PPD: an imperfect teacher with --teacher-noise
        parameter += args.teacher_noise * torch.randn_like(parameter)  # drawn for 0 too: the student's weights are next
    teacher_actor.to(device)
    network = teacher["network"]
    if args.student_size != "same":  # PPD: the student's size
        hidden = {"smaller": [128, 64], "larger": [512, 512]}[args.student_size]
        network = dict(network, activation="relu", actor_hidden=hidden, critic_hidden=hidden)
    actor, critic, return_rms = MlpActor(network).to(device), MlpCritic(network).to(device), RunningMeanStd()
    if args.teacher_logstd:  # PPD: ours, start with the teacher's standard deviation
        actor.logstd.data.copy_(teacher_actor.logstd)
    if args.compile:
        actor.compile()
        critic.compile()
        global ppo_loss, distill_loss
        ppo_loss, distill_loss = torch.compile(ppo_loss), torch.compile(distill_loss)
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
        sys.exit(f"--save-path {args.save_path}: this file exists")
    actor.load_state_dict(dict(teacher_actor.named_buffers()), strict=False)  # PPD: observation statistics, frozen
    if teacher["return_rms"]:  # PPD: reward statistics, frozen, if the teacher has any
        return_rms.load_state_dict(teacher["return_rms"])

    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time() * 1000)}"
    run_folder = args.resume or "runs/" + run_name.replace("/", "-").replace(":", "-").replace(" ", "-")
    if args.track:
        import wandb

        wandb.init(name=run_folder, config=vars(args), sync_tensorboard=True)

    try:
        envs = ContinuousEnvs(args.env_id, args.num_envs)
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        sys.exit(f"--env-id {args.env_id}: {error}")
    if [*envs.obs_shape, envs.action_dim] != [*network["obs_shape"], network["action_dim"]]:
        envs.close()
        sys.exit(f"--teacher {args.teacher}: its observations or actions are not those of --env-id {args.env_id}")
    if envs.envs[0].spec.max_episode_steps is None:
        print(f"warning: {args.env_id} has no time limit; an evaluation ends only if its episodes do")

    writer = SummaryWriter(run_folder, purge_step=global_step + 1)  # drops what came after the save
    writer.add_text("hyperparameters", "".join(f"    {name}: {value}\n" for name, value in vars(args).items()))
    print(f"run folder: {run_folder}")

    lambda_end = args.distill_lambda if args.distill_lambda_end is None else args.distill_lambda_end  # PPD: default
    num_eval_envs = min(args.num_envs, args.eval_episodes)
    running_return, episodes, last_save = np.zeros(args.num_envs), [], 0.0
    steps = range(global_step + batch_size, args.total_timesteps + batch_size, batch_size)
    bar = tqdm(steps, unit=" steps", unit_scale=batch_size, mininterval=1)
    torch.set_num_threads(1)  # but for updates: torch's waiting threads take the cores from the environments
    try:
        next_obs = envs.reset([args.seed, 1, global_step])  # evaluation: [args.seed, 2]
        for global_step in bar:
            # COLLECT: the student acts
            start_time = time.time()
            torch.manual_seed(hash((args.seed, global_step)))  # the same draws with evaluations and --resume
            obs, actions, student_means, rewards, dones, timeouts, final_obs = [], [], [], [], [], [], []
            with torch.no_grad():
                for _ in range(args.num_steps):
                    obs.append(actor.normalize(next_obs))
                    student_means.append(actor(obs[-1]))
                    actions.append(actor.policy(student_means[-1]).sample())
                    next_obs, reward, terminated, truncated, finished = envs.step(actions[-1].cpu().numpy())
                    dones.append(terminated | truncated)
                    timeouts.append(truncated & ~terminated)
                    final_obs.append(envs.final_obs[timeouts[-1]])
                    if not teacher["return_rms"]:  # PPD: the teacher's reward statistics are frozen
                        running_return = 0.99 * running_return + reward  # 0.99 as in stable-baselines3, not gamma
                        return_rms.update(running_return)
                        running_return[dones[-1]] = 0
                    rewards.append(np.clip(reward / np.sqrt(return_rms.var.item() + 1e-8), -10, 10))
                    episodes += finished.values()

            # ADVANTAGE
            torch.set_num_threads(NUM_CORES)
            with torch.no_grad():
                b_obs, b_actions = torch.cat(obs), torch.cat(actions)
                b_logprobs = actor.policy(torch.cat(student_means)).log_prob(b_actions)
                chunks = b_obs.split(args.minibatch_size)
                b_teacher_means = torch.cat([teacher_actor(chunk) for chunk in chunks])  # PPD: asked once per state
                b_values = torch.cat([critic(chunk) for chunk in chunks])
                rewards = torch.as_tensor(np.float32(rewards), device=device)
                dones = torch.as_tensor(np.float32(dones), device=device)
                last_values = critic(actor.normalize(np.concatenate([next_obs, *final_obs])))
                next_value, final_values = last_values.tensor_split([args.num_envs])
                # A time limit is not the end: add the value of what would follow
                rewards[np.nonzero(timeouts)] += args.gamma * final_values
                values = b_values.view_as(rewards)
                b_advantages = compute_gae(rewards, values, next_value, dones, args.gamma, args.gae_lambda).flatten()
                b_returns = b_advantages + b_values

            # UPDATE
            progress = min(global_step / args.total_timesteps, 1)
            distill_lambda = args.distill_lambda + progress * (lambda_end - args.distill_lambda)  # PPD: λ
            for _ in range(args.update_epochs):
                for mb in torch.randperm(batch_size, device=device).split(args.minibatch_size):
                    student_policy = actor.policy(actor(b_obs[mb]))
                    teacher_policy = teacher_actor.policy(b_teacher_means[mb])  # PPD: in the same states
                    kl = kl_divergence(teacher_policy, student_policy)  # PPD: KL(teacher ‖ student), (n,)
                    if args.kl == "reverse":  # PPD: an option of the paper's library
                        kl = kl_divergence(student_policy, teacher_policy)  # PPD: KL(student ‖ teacher), (n,)
                    logratio = student_policy.log_prob(b_actions[mb]) - b_logprobs[mb]

                    pg_loss = ppo_loss(logratio, b_advantages[mb], args.clip_coef)
                    kl_logratio = logratio if args.ratio_grad else logratio.detach()  # PPD: ours, with --no-ratio-grad
                    kl_loss = distill_loss(kl_logratio, kl, args.clip_coef)  # PPD: E[KL · max(ρ, 1-ε)]
                    entropy = student_policy.entropy().mean()
                    v_loss = nn.functional.mse_loss(critic(b_obs[mb]), b_returns[mb])
                    loss = pg_loss + distill_lambda * kl_loss - args.ent_coef * entropy + args.vf_coef * v_loss  # PPD:

                    optimizer.zero_grad()
                    loss.backward()
                    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
            torch.set_num_threads(1)

            # LOG: the losses are those of the last minibatch
            if not np.isfinite((loss + grad_norm).item()):
                sys.exit(f"\nerror: the loss or its gradient is not finite at step {global_step}")
            train_seconds += time.time() - start_time
            ratio = logratio.exp()
            writer.add_scalar("losses/policy_loss", pg_loss, global_step)
            writer.add_scalar("losses/value_loss", v_loss, global_step)
            writer.add_scalar("losses/entropy", entropy, global_step)
            writer.add_scalar("losses/distill_kl", kl.mean(), global_step)  # PPD: in the log
            writer.add_scalar("losses/approx_kl", (ratio - 1 - logratio).mean(), global_step)
            writer.add_scalar("losses/clipfrac", ((ratio - 1).abs() > args.clip_coef).float().mean(), global_step)
            writer.add_scalar("losses/explained_variance", 1 - b_advantages.var() / b_returns.var(), global_step)
            writer.add_scalar("losses/grad_norm", grad_norm, global_step)
            writer.add_scalar("charts/distill_lambda", distill_lambda, global_step)  # PPD: in the log
            writer.add_scalar("charts/SPS", global_step / train_seconds, global_step)
            if episodes:
                mean_return, mean_length = np.mean(episodes[-100:], axis=0)
                writer.add_scalar("charts/episodic_return", mean_return, global_step)
                writer.add_scalar("charts/episodic_length", mean_length, global_step)
                bar.set_postfix_str(f"return {mean_return:.1f}, KL {kl.mean().item():.4f}", refresh=False)
            if args.eval_interval and global_step % args.eval_interval < batch_size:
                score = evaluate(actor, ContinuousEnvs(args.env_id, num_eval_envs), args)
                eval_curve.append([global_step, score["mean"], score["std"]])
                writer.add_scalar("charts/eval_return", score["mean"], global_step)

            # SAVE
            if time.time() - last_save > args.save_interval or global_step >= args.total_timesteps:
                state = {name: part.state_dict() for name, part in trained.items()}
                state.update(script=SCRIPT, args=vars(args), global_step=global_step, train_seconds=train_seconds)
                save(f"{run_folder}/checkpoint.pt", {**state, "eval_curve": eval_curve})
                last_save = time.time()

        # RESULT
        scores = {"student": evaluate(actor, ContinuousEnvs(args.env_id, num_eval_envs), args)}
        if args.teacher_noise:
            scores["corrupted_teacher"] = evaluate(teacher_actor, ContinuousEnvs(args.env_id, num_eval_envs), args)
            teacher_actor.load_state_dict(teacher["actor"])
        scores["teacher"] = evaluate(teacher_actor, ContinuousEnvs(args.env_id, num_eval_envs), args)
        for name, score in scores.items():
            print(f"{name}: {score['mean']:.1f} ± {score['std']:.1f} over {args.eval_episodes} episodes")
        teacher_return, student_return = scores["teacher"]["mean"], scores["student"]["mean"]
        ratio = student_return / teacher_return if teacher_return > 0 else None
        print(f"student / teacher: {ratio and round(ratio, 3)}")
        writer.add_scalar("charts/teacher_return", teacher_return, global_step)
        writer.add_scalar("charts/eval_return", student_return, global_step)
        versions = {name: metadata.version(name) for name in ("torch", "gymnasium", "mujoco")}
        facts = dict(env_id=args.env_id, global_step=global_step, args=vars(args), versions=versions)
        policy = {name: trained[name].cpu().state_dict() for name in ("actor", "critic", "return_rms")}
        policy.update(format=1, suite="continuous", network=network, score=scores["student"], **facts)
        save_path = args.save_path or f"{run_folder}/student.pt"
        save(save_path, policy)
        result = dict(script=SCRIPT, seed=args.seed, sps=round(global_step / train_seconds), **scores, ratio=ratio)
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
