"""Environments, observation and reward statistics, what a rollout holds, and evaluation, against an environment whose
every number is known, numpy and stable-baselines3."""

import copy
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import make_policy_file, same_bits, train_briefly
from stable_baselines3.common.running_mean_std import RunningMeanStd

import ppd_continuous
import train_teacher

LOW, HIGH = np.float32([-0.5, -0.2]), np.float32([0.3, 0.4])
MUJOCO = [f"{name}-v{v}" for name in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer") for v in (4, 5)]


def observation(env, episode, t):
    """What environment number `env` shows at step t of an episode."""
    return np.array([np.sin(1 + env + 3 * episode + 0.7 * t), 5 * env - episode + t, 100 + 0.1 * t])


def reward(env, step):
    """The reward of environment number `env`'s step, counted over all its episodes; one is far larger than the rest."""
    return -80.0 if (env, step) == (2, 4) else np.cos(env + 2.0 * step) * (1 + env) + 0.5


class Scripted(gym.Env):
    """An environment whose episodes end where its `schedule` says: (number, step) -> "terminated", "truncated" or
    "both". `made` holds all that were made since it was last emptied, in their order, which is their number."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(LOW, HIGH)
    made, schedule, faults = [], {}, {}

    def __init__(self):
        self.number, self.step_count, self.episode, self.actions, self.seeds = len(self.made), -1, -1, [], []
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.episode, self.t = self.episode + 1, 0
        return self.faults.get((self.number, self.step_count, "reset"), self.observe()), {}

    def observe(self):
        return observation(self.number, self.episode, self.t)

    def step(self, action):
        self.step_count, self.t = self.step_count + 1, self.t + 1
        self.actions.append(np.array(action))
        end = self.schedule.get((self.number, self.step_count))
        obs = self.faults.get((self.number, self.step_count, "observation"), self.observe())
        value = self.faults.get((self.number, self.step_count, "reward"), reward(self.number, self.step_count))
        return obs, value, end in ("terminated", "both"), end in ("truncated", "both"), {}


class Spaces(gym.Env):
    """An environment of which no more is looked at than its spaces."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


FLAT = gym.spaces.Box(-1, 1, (2,))
gym.register("Scripted-v0", Scripted)
gym.register("Image-v0", lambda: Spaces(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), FLAT))
gym.register("DictObservation-v0", lambda: Spaces(gym.spaces.Dict(a=FLAT), FLAT))
gym.register("MatrixAction-v0", lambda: Spaces(FLAT, gym.spaces.Box(-1, 1, (2, 2))))


@pytest.fixture
def scripted(monkeypatch):
    """The class, with nothing in its schedule and none made yet."""
    for name, empty in (("made", []), ("schedule", {}), ("faults", {})):
        monkeypatch.setattr(Scripted, name, empty)
    return Scripted


# --- MAKING ---


@pytest.mark.parametrize("env_id", MUJOCO)
def test_mujoco_without_warnings(script, env_id, folder, recwarn, capfd):
    env = script.make_env(env_id)
    env.reset(seed=1)
    env.step(env.action_space.sample())
    env.close()
    assert [str(warning.message) for warning in recwarn] == []
    assert capfd.readouterr() == ("", "")
    assert list(folder.iterdir()) == []  # mujoco writes its warnings to a file, too


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("Hoper-v4", ["unknown id", "Hopper-v4"]),
        ("hopper", ["unknown id", "Hopper-v4"]),
        ("Hopper-v99", ["unknown id", "Hopper-v5"]),
        ("", ["Malformed environment ID"]),
        (":Hopper-v4", []),
        ("no_such_module:Hopper-v4", ["no_such_module"]),
        ("CartPole-v1", ["action space", "Discrete(2)"]),
        ("MatrixAction-v0", ["action space", "flat Box"]),
        ("Image-v0", ["observation space", "flat Box"]),
        ("DictObservation-v0", ["observation space", "flat Box"]),
        ("BreakoutNoFrameskip-v4", []),
        ("ALE/Breakout-v5", []),
        ("coinrun", []),
    ],
)
def test_refused_ids(script, env_id, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.make_env(env_id)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith(f"{script.SCRIPT}: error: --env-id {env_id}: ")
    assert all(word in line for word in words)


# --- STEPPING ---


@pytest.mark.parametrize("processes", [1, 2])
def test_reset_in_the_same_step(script, scripted, processes):
    """Several episodes end in step 1, each in its way, and one of them again in step 2."""
    scripted.schedule |= {(0, 1): "terminated", (1, 1): "truncated", (2, 1): "both", (1, 2): "terminated"}
    envs = script.ParallelEnvs("Scripted-v0", 4, processes)
    np.testing.assert_array_equal(envs.reset([7, 8, 9, 2**32 - 1]), [observation(i, 0, 0) for i in range(4)])
    assert [env.seeds for env in scripted.made] == [[7], [8], [9], [2**32 - 1]][: 4 // processes]
    actions = np.zeros((4, 2), np.float32)
    steps = [envs.step(actions) for _ in range(4)]  # kept: a step must not write into what an earlier one returned
    envs.close()
    seen = [[(0, 1), (0, 1), (0, 1), (0, 1)], [(1, 0), (1, 0), (1, 0), (0, 2)]]  # episode, t
    seen += [[(1, 1), (2, 0), (1, 1), (0, 3)], [(1, 2), (2, 1), (1, 2), (0, 4)]]
    last_seen = copy.deepcopy(seen)
    last_seen[1][:3], last_seen[2][1] = [(0, 2)] * 3, (1, 1)
    for k, (obs, rewards, terminated, truncated, last_obs, finished) in enumerate(steps):
        np.testing.assert_array_equal(obs, [observation(i, *seen[k][i]) for i in range(4)])
        np.testing.assert_array_equal(last_obs, [observation(i, *last_seen[k][i]) for i in range(4)])
        np.testing.assert_array_equal(rewards, [reward(i, k) for i in range(4)])
        assert np.flatnonzero(terminated).tolist() == [[], [0, 2], [1], []][k]
        assert np.flatnonzero(truncated).tolist() == [[], [1, 2], [], []][k]
        expected = [[], [(i, reward(i, 0) + reward(i, 1), 2) for i in range(3)], [(1, reward(1, 2), 1)], []][k]
        assert finished == [(i, pytest.approx(total), length) for i, total, length in expected]
    seeds = [[7, None], [8, None, None], [9, None], [2**32 - 1]]
    assert [env.seeds for env in scripted.made] == seeds[: 4 // processes]  # the others are in another process


def test_only_active_environments_are_stepped(script, scripted):
    scripted.schedule |= {(0, 0): "terminated", (1, 0): "terminated"}
    envs = script.ParallelEnvs("Scripted-v0", 3, 1)
    envs.reset([0, 1, 2])
    actions = np.zeros((3, 2), np.float32)
    assert [i for i, _, _ in envs.step(actions)[-1]] == [0, 1]
    obs, *_, finished = envs.step(actions, np.array([False, True, True]))
    envs.close()
    assert finished == []  # and not environment 0 once more
    assert [env.step_count for env in scripted.made] == [0, 1, 1]
    np.testing.assert_array_equal(obs, [observation(0, 1, 0), observation(1, 1, 1), observation(2, 0, 2)])


def test_returns_of_active_environments_since_the_reset(script, scripted):
    """What came before the reset, or while an environment was not stepped, counts for nothing."""
    scripted.schedule[0, 3] = scripted.schedule[1, 2] = "terminated"
    envs = script.ParallelEnvs("Scripted-v0", 2, 1)
    actions = np.zeros((2, 2), np.float32)
    for seeds, active in (([0, 1], True), ([2, 3], True), (None, np.array([True, False])), (None, True)):
        if seeds:
            envs.reset(seeds)
        *_, finished = envs.step(actions, active)
    envs.close()
    returns = sum(reward(0, k) for k in (1, 2, 3)), sum(reward(1, k) for k in (1, 2))
    assert finished == [(0, pytest.approx(returns[0]), 3), (1, pytest.approx(returns[1]), 2)]


def test_actions_are_clipped(script, scripted):
    envs = script.ParallelEnvs("Scripted-v0", 2, 1)
    envs.reset([0, 1])
    actions = np.float32([[-9, 9], [0.1, -0.1]])
    envs.step(actions)
    envs.close()
    np.testing.assert_array_equal([env.actions[0] for env in scripted.made], np.float32([[-0.5, 0.4], [0.1, -0.1]]))
    assert actions[0, 0] == -9


def test_processes_change_no_result(script):
    rollouts = []
    for processes in (1, 2, 5):
        envs = script.ParallelEnvs("Hopper-v4", 5, processes)
        rng = np.random.default_rng(0)
        rollout = [envs.reset([1, 2, 3, 4, 5])]
        for _ in range(40):
            *arrays, finished = envs.step(rng.normal(size=(5, 3)).astype(np.float32))
            rollout += [*arrays, np.array(finished)]
        envs.close()
        rollouts.append(rollout)
    assert sum(len(finished) for finished in rollouts[0][6::6]) > 5
    for rollout in rollouts[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(rollouts[0], rollout, strict=True))


def test_processes_end(script):
    """With the environments, or where nobody closes them."""
    for forget in (False, True):
        envs = script.ParallelEnvs("InvertedPendulum-v4", 3, 3)
        envs.reset([0, 1, 2])
        processes = envs.processes
        assert len(processes) == 2 and all(process.is_alive() for process in processes)
        if forget:
            del envs
        else:
            envs.close()
        assert [process.exitcode for process in processes] == [0, 0]  # at once: their memory may be given to others now


def test_processes_end_with_their_parent(script):
    """Where it is killed right after a step, while they wait awake, or later, when they sleep."""
    program = f"import os, signal, time\nfrom {script.__name__} import ParallelEnvs\n"
    program += "envs = ParallelEnvs('InvertedPendulum-v4', 3, 3)\nenvs.reset([0, 1, 2])\n"
    program += "print(len(envs.processes), flush=True)\ntime.sleep({})\nos.kill(os.getpid(), signal.SIGKILL)\n"
    for pause in (0, 0.2):
        command = [sys.executable, "-c", program.format(pause)]
        parent = subprocess.Popen(command, cwd=os.path.dirname(script.__file__), stdout=subprocess.PIPE, text=True)
        out, _ = parent.communicate(timeout=60)  # until the last process that writes there has ended
        assert out == "2\n" and parent.returncode == -signal.SIGKILL


def test_processes_leave_signals_to_their_parent(script):
    envs = script.ParallelEnvs("InvertedPendulum-v4", 2, 2)
    envs.reset([0, 1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(envs.processes[0].pid, number)
    envs.step(np.zeros((2, 1), np.float32))
    envs.close()


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_death_of_a_process(script, handler):
    """Also where the program was started with SIGCHLD ignored, and cannot ask the system for its children's end."""
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        envs = script.ParallelEnvs("InvertedPendulum-v4", 2, 2)
        envs.reset([0, 1])
        envs.processes[0].kill()
        with pytest.raises(SystemExit, match=f"^{script.SCRIPT}: error: a process that steps environments has died"):
            for _ in range(3):
                envs.step(np.zeros((2, 1), np.float32))
        envs.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_processes_end_where_another_cannot_start(script, monkeypatch):
    started, start = [], multiprocessing.context.ForkProcess.start

    def limited_start(process):
        if started:
            raise BlockingIOError("no more processes")
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", limited_start)
    with pytest.raises(BlockingIOError):
        script.ParallelEnvs("InvertedPendulum-v4", 3, 3)
    gc.collect()
    assert [process.exitcode for process in started] == [0]


@pytest.mark.parametrize("quantity", ["observation", "reward"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("end", [None, "terminated", "truncated"])
def test_non_finite_numbers(script, scripted, quantity, number, end):
    scripted.schedule[1, 1] = end
    scripted.faults[1, 1, quantity] = number if quantity == "reward" else np.array([0, number, 0])
    envs = script.ParallelEnvs("Scripted-v0", 3, 1)
    envs.reset([0, 1, 2])
    actions = np.zeros((3, 2), np.float32)
    envs.step(actions)
    with pytest.raises(FloatingPointError, match=quantity):
        envs.step(actions)
    envs.close()


@pytest.mark.parametrize("step", [-1, 0])
def test_non_finite_observation_of_a_reset(script, scripted, step):
    scripted.schedule[1, 0] = "terminated"
    scripted.faults[1, step, "reset"] = np.array([0, np.nan, 0])
    envs = script.ParallelEnvs("Scripted-v0", 3, 1)
    with pytest.raises(FloatingPointError, match="observation"):
        envs.reset([0, 1, 2])
        for _ in range(2):
            envs.step(np.zeros((3, 2), np.float32))
    envs.close()


# --- STATISTICS ---


def test_running_statistics(script):
    """Those of stable-baselines3, and of the definition: all numbers so far, and 1e-4 of a number of mean 0 and
    variance 1."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, [1, 50, 0.1], size=(n, 3)) for n in (18, 1, 5, 18)]
    ours, reference = script.RunningMeanStd([3]), RunningMeanStd(shape=(3,))
    for k, batch in enumerate(batches):
        ours.update(torch.from_numpy(batch))
        reference.update(batch)
        mean, var = numpy_statistics(batches[: k + 1])
        for found, *expected in ((ours.mean, mean, reference.mean), (ours.var, var, reference.var)):
            np.testing.assert_allclose([found.numpy()] * 2, expected, rtol=1e-9)
        assert ours.count.item() == pytest.approx(reference.count)
    assert ours.mean.dtype == torch.float64


def numpy_statistics(batches):
    """Mean and variance of all rows, and of 1e-4 of a row of mean 0 and variance 1."""
    rows = np.concatenate(batches)
    count = len(rows) + 1e-4
    mean = rows.sum(0) / count
    return mean, (((rows - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)) / count


def numpy_normalize(obs, mean, var):
    return np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10).astype(np.float32)


def test_normalized_observations(script):
    network = dict(obs_shape=[3], actor_hidden=[4], action_dim=2, activation="relu")
    actor = script.MlpActor(network)
    rng = np.random.default_rng(0)
    batches = [rng.normal([0, 100, 5], [1, 20, 0], size=(18, 3)) for _ in range(3)]
    obs = rng.normal([0, 100, 5], [8, 20, 1], size=(500, 3))
    for k, batch in enumerate(batches):
        actor.obs_rms.update(torch.from_numpy(batch))
        expected = numpy_normalize(obs, *numpy_statistics(batches[: k + 1]))
        found = actor.normalize(torch.from_numpy(obs))
        assert found.dtype == torch.float32 and (np.abs(expected) == 10).any()
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


# --- A ROLLOUT ---

SCHEDULE = {  # of 4 environments, in two rollouts of 6 steps
    (0, 1): "terminated", (1, 1): "truncated", (2, 1): "both",  # three in one step
    (1, 2): "truncated", (2, 3): "truncated", (3, 3): "terminated",  # an episode of one step
    (0, 5): "truncated", (1, 5): "terminated", (2, 5): "both",  # in a rollout's last step; number 3 goes on
    (0, 6): "terminated", (3, 7): "truncated", (1, 9): "both",
    (0, 11): "terminated", (2, 11): "truncated",
}  # fmt: skip
STEPS, ENVS, ROLLOUTS = 6, 4, 2


def statistics(frozen, shown):
    """Mean and variance of observations: those of a policy file, or of all that was shown."""
    if frozen:
        return frozen["actor"]["obs_rms.mean"].numpy(), frozen["actor"]["obs_rms.var"].numpy()
    return numpy_statistics(shown)


@pytest.mark.parametrize("case", ["teacher", "student", "student, running rewards"])
def test_what_a_rollout_holds(case, scripted, folder, monkeypatch):
    """Rewards, ends, values and the values of true successors, all recomputed here from the script of the environment.
    The teacher's statistics move; a student has the teacher's, unless that brings none for the rewards."""
    script, changes, frozen = train_teacher, {}, None
    if case != "teacher":
        script = ppd_continuous
        none = dict(return_rms=None) if case.endswith("running rewards") else {}
        changes = dict(teacher=make_policy_file("teacher.pt", script, "Scripted-v0", **none))
        frozen = script.read_file(changes["teacher"])
    scripted.made.clear()
    numbers = range(1, ENVS + 1)  # number 0 is the one that main makes to see its spaces
    scripted.schedule |= {(i + 1, k): end for (i, k), end in SCHEDULE.items()}
    critics, rollouts, collected = [], [], []
    compute_advantages, gaussian_logprob = script.compute_advantages, script.gaussian_logprob

    class RecordedCritic(script.MlpCritic):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            critics.append(self)

    def recorded_advantages(*arguments):
        rollouts.append([*copy.deepcopy(arguments), copy.deepcopy(critics[-1])])
        return compute_advantages(*arguments)

    def recorded_logprob(actions, mean, logstd):
        if not mean.requires_grad:
            collected.append((actions.clone(), mean.clone(), logstd.detach().clone()))
        return gaussian_logprob(actions, mean, logstd)

    monkeypatch.setattr(script, "MlpCritic", RecordedCritic)
    monkeypatch.setattr(script, "compute_advantages", recorded_advantages)
    monkeypatch.setattr(script, "gaussian_logprob", recorded_logprob)
    sizes = dict(num_envs=ENVS, num_steps=STEPS, total_timesteps=ROLLOUTS * STEPS * ENVS, minibatch_size=10)
    train_briefly(script, env_id="Scripted-v0", gamma=0.9, gae_lambda=0.8, **sizes, **changes)

    # what each environment shows, and what the networks should get to see of it
    position = {i: (0, 0) for i in numbers}  # episode, t
    shown = [np.array([observation(i, 0, 0) for i in numbers])]
    inputs, last_inputs, rewards, ends = [], [], [], []
    running_returns, running_return = [], np.zeros(ENVS)
    normalized = numpy_normalize(shown[0], *statistics(frozen, shown))
    for k in range(ROLLOUTS * STEPS):
        inputs.append(normalized)
        ends.append([scripted.schedule.get((i, k)) for i in numbers])
        last = np.array([observation(i, position[i][0], position[i][1] + 1) for i in numbers])
        for i, end in zip(numbers, ends[-1], strict=True):
            position[i] = (position[i][0] + 1, 0) if end else (position[i][0], position[i][1] + 1)
        shown.append(np.array([observation(i, *position[i]) for i in numbers]))
        normalized = numpy_normalize(shown[-1], *statistics(frozen, shown))
        last_inputs.append(numpy_normalize(last, *statistics(frozen, shown)))
        reward_k = np.array([reward(i, k) for i in numbers])
        running_return = running_return * 0.99 + reward_k
        running_returns.append(running_return)
        if frozen and frozen["return_rms"]:
            var = frozen["return_rms"]["var"].item()
        else:
            _, var = numpy_statistics(running_returns)
        rewards.append(np.clip(reward_k / np.sqrt(var + 1e-8), -10, 10))
        running_return = np.where([end is not None for end in ends[-1]], 0, running_return)
    after = [inputs[STEPS], normalized]  # what follows each rollout

    assert len(rollouts) == len(collected) == ROLLOUTS
    for n, (found_rewards, values, next_values, ended, gamma, gae_lambda, critic) in enumerate(rollouts):
        part = slice(n * STEPS, (n + 1) * STEPS)

        def value(obs, critic=critic):
            with torch.no_grad():
                return critic(torch.from_numpy(np.array(obs))).numpy()

        assert (gamma, gae_lambda) == (0.9, 0.8)
        kinds = np.array(ends[part], dtype=object)
        np.testing.assert_allclose(found_rewards, rewards[part], rtol=1e-5)
        np.testing.assert_array_equal(ended, kinds != None)  # noqa: E711
        np.testing.assert_allclose(values, value(inputs[part]), rtol=1e-4, atol=1e-5)
        expected = value([*inputs[part][1:], after[n]])
        expected[(kinds == "terminated") | (kinds == "both")] = 0
        expected[kinds == "truncated"] = value(last_inputs[part])[kinds == "truncated"]
        np.testing.assert_allclose(next_values, expected, rtol=1e-4, atol=1e-5)

        actions, means, logstd = collected[n]
        played = np.array([scripted.made[i].actions[part] for i in numbers]).transpose(1, 0, 2)
        np.testing.assert_array_equal(played, np.clip(actions, LOW, HIGH))
        noise = (actions - means) / logstd.exp()  # the actions as sampled, not as played
        assert (actions.numpy() != played).mean() > 0.2 and 0.7 < noise.std() < 1.3


# --- EVALUATION ---


def choose_linearly(obs):
    """In place of an actor's mode: the action is a part of the observation."""
    assert not torch.is_grad_enabled()
    return obs[:, :2].float() / 100


@pytest.mark.parametrize("episodes", [1, 3, 30, 50])
def test_every_environment_plays_its_quota(script, scripted, episodes):
    """However short its episodes are: number i's take 1 + i % 7 steps."""
    lengths = {i: 1 + i % 7 for i in range(25)}
    for i, length in lengths.items():
        scripted.schedule |= {(i, k): ("terminated", "truncated")[i % 2] for k in range(length - 1, 99, length)}
    calls = []
    args = script.Args(env_id="Scripted-v0", eval_episodes=episodes, env_threads=1)
    device = torch.device("cpu")
    returns = script.evaluate(choose_linearly, script.ParallelEnvs, args, device, lambda: calls.append(None))
    num_envs = min(episodes, 25)
    quotas = {i: episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)}
    assert len(returns) == sum(quotas.values()) == episodes and len(scripted.made) == num_envs
    steps = {i: quotas[i] * lengths[i] for i in quotas}
    assert {env.number: env.step_count + 1 for env in scripted.made} == steps  # no step more
    assert len(calls) == max(steps.values())
    played = [range(e * lengths[i], (e + 1) * lengths[i]) for i in quotas for e in range(quotas[i])]
    owners = [i for i in quotas for _ in range(quotas[i])]
    expected = [sum(reward(i, k) for k in steps) for i, steps in zip(owners, played, strict=True)]
    assert returns == pytest.approx(expected)
    assert all(type(episode_return) is float for episode_return in returns)
    env = scripted.made[-1]
    first_action = np.clip(observation(env.number, 0, 0)[:2] / 100, LOW, HIGH)
    np.testing.assert_allclose(env.actions[0], first_action, rtol=1e-6)


def test_evaluation_repeats_and_takes_no_global_randomness(script):
    network = dict(obs_shape=[4], actor_hidden=[8], action_dim=1, activation="tanh")
    actor = script.MlpActor(network, torch.Generator().manual_seed(0))
    args = script.Args(env_id="InvertedPendulum-v4", eval_episodes=6, env_threads=1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def evaluate():
        return script.evaluate(actor.mode, script.ParallelEnvs, args, torch.device("cpu"))

    first, second = evaluate(), evaluate()
    args.seed = 200
    other = evaluate()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert first == second != other and len(set(first)) > 1


def test_evaluation_changes_nothing_of_training(script, folder):
    changes = dict(teacher=make_policy_file("teacher.pt", script)) if script is ppd_continuous else {}
    policies, generators = [], []
    for interval in (0, 64):
        changes |= dict(exp_name=f"every-{interval}", eval_interval=interval, eval_episodes=2)
        policies.append(train_briefly(script, **changes))
        (path,) = folder.glob(f"runs/*every-{interval}*/checkpoint.pt")
        state = script.read_file(path)
        generators.append(state["generator"])
        assert len(state["progress"]["eval_curve"]) == (3 if interval else 0)
    assert torch.equal(*generators)
    assert all(same_bits(policies[0][part], policies[1][part]) for part in ("actor", "critic", "return_rms"))


# --- SEEDS ---


def test_derived_seeds_are_distinct(script):
    derived = {}
    for seed in (0, 1, 100, 200, 2**32, 2**32 + 1):
        for stream in ("training", "environments", "evaluation", "teacher noise"):
            for step in (0, 1, 4608, 10_000_000):
                derived[seed, stream, step] = script.derive_seeds(seed, stream, 25, step)
    assert derived == {key: script.derive_seeds(*key[:2], 25, key[2]) for key in derived}
    seeds = [seed for seeds in derived.values() for seed in seeds]
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    assert script.derive_seeds(100, "training", 1) == derived[100, "training", 0][:1]
