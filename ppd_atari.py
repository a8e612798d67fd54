"""Proximal Policy Distillation (PPD, https://arxiv.org/abs/2407.15134) for Atari: distill a teacher into a smaller,
same-sized or larger student.

    python ppd_atari.py --env-id BreakoutNoFrameskip-v4 --teacher runs/teacher.pt
    python ppd_atari.py --teacher teachers/BreakoutNoFrameskip-v4.pt --student-size smaller --total-timesteps 500000

The student learns by PPO from its own rollouts, and is drawn to the teacher in the states that it visits:

    maximize E[ min(ρ Â, clip(ρ, 1-ε, 1+ε) Â) - λ · KL(π_teacher ‖ π_student) · max(ρ, 1-ε) ]

`# PPD:` marks what is not plain PPO. Unlike CleanRL's PPO, and like stable-baselines3's, this one bootstraps games that
a time limit cuts off; its value loss is a plain mean squared error, its learning rate constant. Rewards are scaled by a
running standard deviation instead of clipped; actor and critic are two networks.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
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
from torch.distributions import Categorical, Distribution
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = os.path.basename(__file__)
NUM_CORES = torch.get_num_threads()  # follows OMP_NUM_THREADS
Distribution.set_default_validate_args(False)  # saves time
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
    """seed of all that is random (the paper: 100 to 500)"""
    torch_deterministic: bool = True
    """make cuDNN deterministic"""
    cuda: bool = True
    """use the GPU, where there is one"""
    track: bool = False
    """also log to Weights and Biases"""

    teacher: str | None = None
    """policy file of the teacher, as train_teacher.py writes it"""
    student_size: Literal["smaller", "same", "larger"] = "same"
    """smaller: Nature-CNN; larger: wide IMPALA-CNN (the paper, Table 4); same: the teacher's network"""
    distill_lambda: float = 1.0
    """weight λ of the distillation loss; 0: plain PPO"""
    distill_lambda_end: float | None = None
    """anneal λ linearly to this value (default: λ is constant)"""
    kl: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher ‖ student), the paper's; reverse: KL(student ‖ teacher)"""
    ratio_grad: bool = True
    """let the gradient of the distillation loss flow through ρ too, as in the paper"""
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
    gamma: float = 0.999
    """discount factor"""
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
    amp: bool = False
    """compute the networks in bfloat16"""

    eval_episodes: int = 50
    """games of an evaluation"""
    eval_interval: int = 0
    """steps between evaluations of the student; 0: only at the end"""
    save_path: str | None = None
    """path of the student's policy file (default: student.pt in the run folder)"""
    save_interval: float = 60.0
    """seconds between saves of the training state"""
    resume: str | None = None
    """run folder to continue, with its arguments as the defaults"""


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


def categorical_kl(p, q):
    """KL(p ‖ q) in each state, (n,). torch's own is infinite where a probability underflows."""
    return (p.probs * (p.logits - q.logits)).sum(-1)


def distill_loss(logratio, kl, clip_coef):  # PPD: the distillation loss
    """E[KL · max(ρ, 1-ε)]. logratio: log ρ; all are (n,). Gradients flow through both factors."""
    return (kl * logratio.exp().clamp(min=1 - clip_coef)).mean()


def main(args):
    # SETUP
    wanted = "a teacher for Atari: see teachers/BreakoutNoFrameskip-v4.pt, train_teacher.py, teachers/import_sb3.py"
    teacher = load("--teacher", args.teacher, wanted, format=1, suite="atari")  # PPD: its policy file
    args = dataclasses.replace(args, env_id=args.env_id or teacher["env_id"])
    batch_size = args.num_envs * args.num_steps
    if args.minibatch_size > batch_size or args.eval_episodes < 1:
        sys.exit(f"--minibatch-size: at most num_envs * num_steps = {batch_size}; --eval-episodes: at least 1")
    if not args.env_id.startswith("ALE/") and not args.env_id.endswith("NoFrameskip-v4"):
        sys.exit(f"--env-id {args.env_id}: the Atari games are called ...NoFrameskip-v4 and ALE/...-v5")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    Cnn.amp = args.amp
    if device.type == "cpu" and sys.platform == "linux":  # keep freed memory: saves half of a CNN's time
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD

    teacher_actor = CnnActor(teacher["network"]).requires_grad_(False)  # PPD: the teacher
    teacher_actor.load_state_dict(teacher["actor"])
    torch.manual_seed(args.seed)
    for parameter in teacher_actor.parameters():  # PPD: an imperfect teacher with --teacher-noise
        parameter += args.teacher_noise * torch.randn_like(parameter)  # drawn for 0 too: the student's weights are next
    teacher_actor.to(device)
    network = teacher["network"]
    if args.student_size != "same":  # PPD: the student's size
        sizes = {"smaller": ("nature", [32, 32, 32, 128]), "larger": ("impala", [32, 64, 64, 1024])}
        kind, hidden = sizes[args.student_size]
        network = dict(network, kind=kind, actor_hidden=hidden, critic_hidden=hidden)
    actor, critic, return_rms = CnnActor(network).to(device), CnnCritic(network).to(device), RunningMeanStd()
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

    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time() * 1000)}"
    run_folder = args.resume or "runs/" + run_name.replace("/", "-").replace(":", "-").replace(" ", "-")
    if args.track:
        import wandb

        wandb.init(name=run_folder, config=vars(args), sync_tensorboard=True)

    try:
        envs = AtariEnvs(args.env_id, args.num_envs)
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        sys.exit(f"--env-id {args.env_id}: {error}")
    if [*envs.obs_shape, envs.action_dim] != [*network["obs_shape"], network["action_dim"]]:
        envs.close()
        sys.exit(f"--teacher {args.teacher}: its observations or actions are not those of --env-id {args.env_id}")

    writer = SummaryWriter(run_folder, purge_step=global_step + 1)  # drops what came after the save
    writer.add_text("hyperparameters", "".join(f"    {name}: {value}\n" for name, value in vars(args).items()))
    print(f"run folder: {run_folder}")

    lambda_end = args.distill_lambda if args.distill_lambda_end is None else args.distill_lambda_end  # PPD: default
    num_eval_envs = min(args.num_envs, args.eval_episodes)
    running_return, episodes, last_save = np.zeros(args.num_envs), [], 0.0
    steps = range(global_step + batch_size, args.total_timesteps + batch_size, batch_size)
    bar = tqdm(steps, unit=" steps", unit_scale=batch_size, mininterval=1)
    try:
        next_obs = envs.reset([args.seed, 1, global_step])  # evaluation: [args.seed, 2]
        for global_step in bar:
            # COLLECT: the student acts
            start_time = time.time()
            torch.manual_seed(hash((args.seed, global_step)))  # the same draws with evaluations and --resume
            obs, actions, student_logits, rewards, dones, timeouts, final_obs = [], [], [], [], [], [], []
            with torch.no_grad():
                for _ in range(args.num_steps):
                    obs.append(actor.normalize(next_obs))
                    student_logits.append(actor(obs[-1]))
                    actions.append(actor.policy(student_logits[-1]).sample())
                    next_obs, reward, terminated, truncated, finished = envs.step(actions[-1].cpu().numpy())
                    dones.append(terminated | truncated)
                    timeouts.append(truncated & ~terminated)
                    final_obs.append(envs.final_obs[timeouts[-1]])
                    running_return = 0.99 * running_return + reward  # 0.99 as in stable-baselines3, not gamma
                    return_rms.update(running_return)
                    running_return[dones[-1]] = 0
                    rewards.append(np.clip(reward / np.sqrt(return_rms.var.item() + 1e-8), -10, 10))
                    episodes += finished.values()

            # ADVANTAGE
            with torch.no_grad():
                b_obs, b_actions = torch.cat(obs), torch.cat(actions)
                b_logprobs = actor.policy(torch.cat(student_logits)).log_prob(b_actions)
                chunks = b_obs.split(args.minibatch_size)
                b_teacher_logits = torch.cat([teacher_actor(chunk) for chunk in chunks])  # PPD: asked once per state
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
                    teacher_policy = teacher_actor.policy(b_teacher_logits[mb])  # PPD: in the same states
                    kl = categorical_kl(teacher_policy, student_policy)  # PPD: KL(teacher ‖ student), (n,)
                    if args.kl == "reverse":  # PPD: an option of the paper's library
                        kl = categorical_kl(student_policy, teacher_policy)  # PPD: KL(student ‖ teacher), (n,)
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
                score = evaluate(actor, AtariEnvs(args.env_id, num_eval_envs), args)
                eval_curve.append([global_step, score["mean"], score["std"]])
                writer.add_scalar("charts/eval_return", score["mean"], global_step)

            # SAVE
            if time.time() - last_save > args.save_interval or global_step >= args.total_timesteps:
                state = {name: part.state_dict() for name, part in trained.items()}
                state.update(script=SCRIPT, args=vars(args), global_step=global_step, train_seconds=train_seconds)
                save(f"{run_folder}/checkpoint.pt", {**state, "eval_curve": eval_curve})
                last_save = time.time()

        # RESULT
        scores = {"student": evaluate(actor, AtariEnvs(args.env_id, num_eval_envs), args)}
        if args.teacher_noise:
            scores["corrupted_teacher"] = evaluate(teacher_actor, AtariEnvs(args.env_id, num_eval_envs), args)
            teacher_actor.load_state_dict(teacher["actor"])
        scores["teacher"] = evaluate(teacher_actor, AtariEnvs(args.env_id, num_eval_envs), args)
        for name, score in scores.items():
            print(f"{name}: {score['mean']:.1f} ± {score['std']:.1f} over {args.eval_episodes} episodes")
        measure = "mean"
        if envs.game in HUMAN_SCORES:
            measure = "human_normalized"
            random_score, human_score = HUMAN_SCORES[envs.game]
            for score in scores.values():
                score[measure] = (score["mean"] - random_score) / (human_score - random_score)
        ratio = scores["student"][measure] / scores["teacher"][measure] if scores["teacher"][measure] > 0 else None
        print(f"student / teacher: {ratio and round(ratio, 3)} ({measure})")
        writer.add_scalar("charts/teacher_return", scores["teacher"]["mean"], global_step)
        writer.add_scalar("charts/eval_return", scores["student"]["mean"], global_step)
        versions = {name: metadata.version(name) for name in ("torch", "gymnasium", "ale-py")}
        facts = dict(env_id=args.env_id, global_step=global_step, args=vars(args), versions=versions)
        policy = {name: trained[name].cpu().state_dict() for name in ("actor", "critic", "return_rms")}
        policy.update(format=1, suite="atari", network=network, score=scores["student"], **facts)
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
