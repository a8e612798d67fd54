"""Atari: the games against gymnasium's and stable-baselines3's wrappers, the networks, the losses, runs and refusals.
What Atari shares to the letter with the other scripts is tested there."""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from helpers import make_atari_file, make_policy_file, same_bits
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, MaxAndSkipEnv
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

import ppd_atari
import ppd_continuous
import train_teacher

BREAKOUT = "BreakoutNoFrameskip-v4"
GAMES = {  # name: (ALE's, actions, that which means FIRE)
    "Atlantis": ("atlantis", 4, 1),
    "BeamRider": ("beam_rider", 9, 1),
    "Breakout": ("breakout", 4, 1),
    "CrazyClimber": ("crazy_climber", 9, None),
    "DemonAttack": ("demon_attack", 6, 1),
    "Enduro": ("enduro", 9, 1),
    "Freeway": ("freeway", 3, None),
    "MsPacman": ("ms_pacman", 9, None),
    "Pong": ("pong", 6, 1),
    "Qbert": ("qbert", 6, 1),
    "Seaquest": ("seaquest", 18, 1),
    "Zaxxon": ("zaxxon", 18, 1),
}
SCRIPTS = {"teach": train_teacher, "distill": ppd_atari}
FILES = {"teach": "teacher.pt", "distill": "student.pt"}
BATCH = 32  # of the runs here, 2 environments by 16 steps, in 4 minibatches and 2 epochs
SMALL = "--num-envs 2 --num-steps 16 --minibatch-size 8 --update-epochs 2 --eval-episodes 0 --env-threads 1".split()
by_script = pytest.mark.parametrize("script", SCRIPTS)
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)


@pytest.fixture
def no_noops(monkeypatch):
    """Games start at once, and end after the frames that the test sets, which are the usual 108,000 else."""
    made, limits = ppd_atari.AtariVectorEnv, dict(noop_max=1)
    for module in SCRIPTS.values():
        monkeypatch.setattr(module, "AtariVectorEnv", lambda *args, **kwargs: made(*args, **(kwargs | limits)))
    return limits


def command(script, *arguments):
    what = ["--env-id", BREAKOUT, "--size", "smaller"] if script == "teach" else ["--teacher", "t.pt"]
    return [*what, *SMALL, *map(str, arguments)]


def main(script, arguments):
    SCRIPTS[script].main(SCRIPTS[script].parse_args([str(argument) for argument in arguments]))


def run(script, *arguments):
    """A run in this process; the path of its folder."""
    before = set(pathlib.Path(".").glob("runs/*"))
    main(script, command(script, *arguments))
    (made,) = set(pathlib.Path(".").glob("runs/*")) - before
    return made


def load(path):
    return ppd_atari.read_file(path)


def result_of(made):
    return json.loads((made / "result.json").read_text())


# --- GAMES ---


@pytest.mark.parametrize("game", GAMES)
def test_games_and_actions(game):
    rom, actions, fire = GAMES[game]
    for env_id in (f"{game}NoFrameskip-v4", f"ALE/{game}-v5"):
        envs = ppd_atari.AtariEnvs(env_id, 1)
        assert gym.spec(env_id).kwargs["game"] == rom
        assert (envs.action_dim, envs.fire) == (actions, fire)
        obs = envs.reset([0])
        assert obs.shape == (1, *envs.obs_shape) and obs.dtype == np.uint8
        for bad in (-1, actions):
            with pytest.raises(ValueError, match=f"0 and {actions - 1}"):
                envs.step(np.array([bad]))
        envs.close()


def play(env_id, seeds, steps=60, threads=1, actions_seed=0):
    envs, rng = ppd_atari.AtariEnvs(env_id, len(seeds), threads), np.random.default_rng(actions_seed)
    frames = [envs.reset(seeds)]
    for _ in range(steps):
        frames.append(envs.step(rng.integers(0, envs.action_dim, len(seeds)))[0])
    envs.close()
    return np.array(frames)


def test_seeds_and_threads_and_sticky_actions():
    first = play(BREAKOUT, [1, 2, 3, 2**32 - 1])
    np.testing.assert_array_equal(first, play(BREAKOUT, [1, 2, 3, 2**32 - 1], threads=3))
    assert not (first == play(BREAKOUT, [4, 5, 6, 7])).all()
    sticky = [play("ALE/Seaquest-v5", [seed, seed]) for seed in (1, 1, 2)]
    plain = play("SeaquestNoFrameskip-v4", [1, 1])
    assert (sticky[0] == sticky[1]).all() and not (sticky[0] == plain).all()


@pytest.mark.parametrize("game", GAMES)
def test_frames_and_rewards_of_gymnasium(game, no_noops):
    """Its own preprocessing, for the same actions, over 300 steps or up to the first lost life."""
    env_id, rng = f"{game}NoFrameskip-v4", np.random.default_rng(1)
    envs = ppd_atari.AtariEnvs(env_id, 1)
    reference = FrameStackObservation(AtariPreprocessing(gym.make(env_id), noop_max=0), 4, padding_type="zero")
    obs, _ = envs.reset([5]), reference.reset(seed=5)
    ale = reference.unwrapped.ale
    if envs.fire is not None:
        reference.unwrapped.step(envs.fire)  # one frame
    differences, lives = [], ale.lives()
    for _ in range(300):
        action = rng.integers(envs.action_dim)
        obs, reward, terminated, *_ = envs.step(np.array([action]))
        expected, expected_reward, over, *_ = reference.step(action)
        assert reward[0] == expected_reward
        if over or ale.lives() < lives:
            assert terminated[0]
            break
        assert not terminated[0]
        differences.append(np.abs(obs[0, -1].astype(float) - expected[-1]).mean())
    assert len(differences) > 20 and max(differences) <= (0.6 if game == "Zaxxon" else 0.06)
    envs.close()


@pytest.mark.parametrize("game", ["Atlantis", "Breakout", "Pong", "Seaquest", "Enduro"])
def test_lives_game_over_and_score_of_stable_baselines3(game, no_noops):
    """Its wrappers, with FIRE after a lost life, over two whole games."""
    no_noops["max_num_frames_per_episode"] = 16_000 if game == "Enduro" else 108_000  # a game of Enduro is long
    env_id, rng = f"{game}NoFrameskip-v4", np.random.default_rng(2)
    envs = ppd_atari.AtariEnvs(env_id, 1)
    raw = gym.make(env_id, max_num_frames_per_episode=no_noops["max_num_frames_per_episode"])
    lived = EpisodicLifeEnv(MaxAndSkipEnv(raw, 4))
    envs.reset([5])
    raw.reset(seed=5)

    def start():
        if envs.fire is not None:
            raw.unwrapped.step(envs.fire)
        lived.lives, lived.was_real_done = raw.unwrapped.ale.lives(), False

    start()
    score, length, games, lost, fire = 0.0, 0, [], 0, False
    while len(games) < 2:
        action = int(rng.integers(envs.action_dim))
        _, reward, terminated, truncated, _, finished = envs.step(np.array([action]))
        _, expected, done, cut, _ = lived.step(envs.fire if fire and envs.fire is not None else action)
        score, length = score + expected, length + 1
        assert (reward[0], terminated[0], truncated[0]) == (expected, done, cut)
        over = done and lived.was_real_done or cut
        fire = done and not over
        lost += fire
        assert bool(finished) == over
        if over:
            games.append(score)
            assert finished == [(0, score, length)]
            score, length = 0.0, 0
            raw.reset()
            start()
    assert lost == dict(Atlantis=12, Breakout=8, Seaquest=6).get(game, 0)
    assert any(games) or game == "Enduro"  # where who drives at random passes nobody
    envs.close()


def test_the_ball_is_back_after_a_lost_life(monkeypatch):
    """The player of a whole game of Breakout never fires: the environment does, or the game would stand still."""

    def lost_lives(steps, fire):
        envs, rng, lost, over = ppd_atari.AtariEnvs(BREAKOUT, 1), np.random.default_rng(0), 0, 0
        envs.fire = fire
        envs.reset([0])
        for _ in range(steps):
            _, _, terminated, _, _, finished = envs.step(rng.choice([0, 2, 3], 1))
            lost, over = lost + terminated[0], over + len(finished)
            if over:
                break
        envs.close()
        return lost, over

    assert lost_lives(1000, 1) == (5, 1)
    assert lost_lives(3000, None) == (1, 0)


def test_truncation(no_noops):
    no_noops["max_num_frames_per_episode"] = 80
    cut = ppd_atari.AtariEnvs(BREAKOUT, 2)
    first = cut.reset([3, 4])
    no_noops["max_num_frames_per_episode"] = 108_000
    whole = ppd_atari.AtariEnvs(BREAKOUT, 2)
    whole.reset([3, 4])
    for step in range(1, 21):
        actions = np.array([step % 4, 0])
        obs, _, terminated, truncated, last_obs, finished = cut.step(actions, np.array([True, False]))
        expected = whole.step(actions)[0]
        assert not terminated.any() and truncated.all() == (step == 20)
        np.testing.assert_array_equal(last_obs[:, :3], expected[:, :3])
        if step < 20:  # of the very last 4 frames of a game ALE leaves out one
            np.testing.assert_array_equal(last_obs, expected)
    assert np.abs(last_obs.astype(float) - expected).mean() < 0.1
    np.testing.assert_array_equal(obs[:, -1], first[:, -1])  # that of a new game
    assert [(i, length) for i, _, length in finished] == [(0, 20)]  # of the active ones
    assert (cut.lengths == 0).all() and (cut.returns == 0).all()


@by_script
def test_truncation_bootstraps_from_the_last_frame(folder, no_noops, monkeypatch, script):
    no_noops["max_num_frames_per_episode"] = 320  # 80 steps
    module, steps, networks = SCRIPTS[script], [], []
    make_atari_file("t.pt", ppd_atari)
    step, make_networks = module.AtariEnvs.step, module.make_networks

    def recorded_step(envs, actions, active=True):
        steps.append(step(envs, actions, active))
        return steps[-1]

    def recorded_networks(*arguments):
        networks.append(make_networks(*arguments))
        return networks[-1]

    class Stop(Exception):
        pass

    def check(rewards, values, next_values, ended, gamma, gae_lambda):
        critic = networks[-1][1]
        successors = np.array([np.where(np.array(s[3])[:, None, None, None], s[4], s[0]) for s in steps])
        with torch.no_grad():
            expected = critic(torch.from_numpy(successors).flatten(0, 1)).view(values.shape)
        terminated, truncated = (torch.from_numpy(np.array([s[n] for s in steps])) for n in (2, 3))
        expected[terminated] = 0
        assert truncated[79].all() and terminated.any() and torch.equal(ended, terminated | truncated)
        torch.testing.assert_close(next_values, expected, rtol=1e-4, atol=1e-5)
        raise Stop

    monkeypatch.setattr(module.AtariEnvs, "step", recorded_step)
    monkeypatch.setattr(module, "make_networks", recorded_networks)
    monkeypatch.setattr(module, "compute_advantages", check)
    with pytest.raises(Stop):
        run(script, "--total-timesteps", 1, "--num-steps", 90, "--num-envs", 3)


@by_script
def test_lost_lives_end_the_discounted_return(folder, monkeypatch, script):
    """Rewards are divided by the deviation of the returns so far, which start again at every lost life; λ is PPO's."""
    make_atari_file("t.pt", ppd_atari)
    module, played, scaled = SCRIPTS[script], [], []
    step, compute_advantages = module.AtariEnvs.step, module.compute_advantages

    def recorded_step(envs, actions, active=True):
        played.append(step(envs, actions, active))
        return played[-1]

    def recorded_advantages(rewards, *rest):
        scaled.append(rewards.clone())
        return compute_advantages(rewards, *rest)

    monkeypatch.setattr(module.AtariEnvs, "step", recorded_step)
    monkeypatch.setattr(module, "compute_advantages", recorded_advantages)
    run(script, "--total-timesteps", 1600, "--num-steps", 200, "--num-envs", 4, "--minibatch-size", 400)
    from stable_baselines3.common.running_mean_std import RunningMeanStd

    statistics, returns, expected = RunningMeanStd(shape=()), np.zeros(4), []
    for _, rewards, terminated, truncated, _, _ in played:
        returns = returns * 0.99 + rewards
        statistics.update(returns)
        returns[terminated | truncated] = 0
        expected.append(np.clip(rewards / np.sqrt(statistics.var + 1e-8), -10, 10))
    assert np.count_nonzero(expected) > 3
    assert_close(torch.cat(scaled), np.array(expected), rtol=1e-5)


# --- SCORES ---


def test_human_normalized_scores():
    assert len(ppd_atari.HUMAN_SCORES) == 57 and ppd_atari.HUMAN_SCORES == train_teacher.HUMAN_SCORES
    assert {rom for rom, _, _ in GAMES.values()} <= ppd_atari.HUMAN_SCORES.keys()
    for game, random_score, human in [  # the paper's library's
        ("Atlantis", 12850, 29028.1),
        ("BeamRider", 363.9, 16926),
        ("CrazyClimber", 10780.5, 35829),
        ("DemonAttack", 152, 1971),
        ("Enduro", 0, 860.5),
        ("Freeway", 0, 29.6),
        ("MsPacman", 307.3, 6951),
        ("Pong", -20.7, 14.6),
        ("Qbert", 163.9, 13455),
        ("Seaquest", 68.4, 42054.7),
        ("Zaxxon", 32.5, 9173.3),
        ("Breakout", 1.7, 30.5),
    ]:
        ours = ppd_atari.HUMAN_SCORES[GAMES[game][0]]
        assert abs(ours[0] - random_score) < 1 and abs(ours[1] - human) < 1
        for env_id in (f"{game}NoFrameskip-v4", f"ALE/{game}-v5"):
            assert ppd_atari.normalize_score(ours[0], env_id) == 0
            assert ppd_atari.normalize_score(ours[1], env_id) == 1
            assert ppd_atari.normalize_score(2 * ours[1] - ours[0], env_id) == pytest.approx(2)
    gym.register_envs(ale_py)
    roms = {gym.spec(name).kwargs["game"] for name in gym.registry if name.startswith("ALE/")}
    assert ppd_atari.HUMAN_SCORES.keys() <= roms
    assert ppd_atari.normalize_score(100, "ALE/Tetris-v5") is None


def test_ratios():
    def scores(teacher, student):
        return dict(teacher=dict(human_normalized=teacher), student=dict(human_normalized=student))

    assert ppd_atari.compute_ratios(scores(2.0, 3.0), "human_normalized") == dict(ratio=1.5)
    for teacher, word in ((0.0, "not positive"), (-1.0, "not positive"), (None, "unknown")):
        ratios = ppd_atari.compute_ratios(scores(teacher, teacher), "human_normalized")
        assert ratios["ratio"] is None and f"the teacher's human-normalized score is {word}" == ratios["ratio_reason"]


# --- NETWORKS ---


def independent_cnn(kind, weights, obs):
    """The outputs of the paper's networks in float64, from their definition."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    convolutions = [name[: -len(".weight")] for name, tensor in weights.items() if tensor.dim() == 4]
    linear = [name[: -len(".weight")] for name, tensor in weights.items() if tensor.dim() == 2]
    x = obs.double() / 255

    def convolve(x, stride=1, padding=0):
        name = convolutions.pop(0)
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)

    if kind == "nature":
        for stride in (4, 2, 1):
            x = convolve(x, stride).clamp(min=0)
    else:
        for _ in range(3):
            x = F.max_pool2d(F.pad(convolve(x, padding=1), (1, 1, 1, 1), value=-torch.inf), 3, 2)
            for _ in range(2):
                x = x + convolve(convolve(x.clamp(min=0), padding=1).clamp(min=0), padding=1)
        x = x.clamp(min=0)
    assert not convolutions
    x = x.reshape(len(x), -1)
    for name in linear:
        x = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        x = x.clamp(min=0) if name != linear[-1] else x
    return x


def make_network(kind, widths, action_dim=6):
    network = dict(kind=kind, activation="relu", actor_hidden=widths, critic_hidden=widths)
    return network | dict(obs_shape=[4, 84, 84], action_dim=action_dim)


@pytest.mark.parametrize("size", ["smaller", "same", "larger"])
def test_networks_against_their_definition(size):
    kind, widths = train_teacher.SIZES["atari"][size]
    assert ppd_atari.SIZES.get(size, (kind, widths)) == (kind, widths)
    actor, critic = ppd_atari.make_networks(make_network(kind, widths), torch.Generator().manual_seed(0))
    obs = torch.randint(256, (3, 4, 84, 84), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for network, cnn in ((actor, actor.logits), (critic, critic.value)):
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        expected = independent_cnn(kind, cnn.state_dict(), obs)
        found = network(obs).reshape(expected.shape)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(actor.mode(obs), actor(obs).argmax(1))


def test_parameter_counts_of_table_4():
    """Means over the paper's 11 games; of the smaller network the text's, for the table has other figures than it."""
    counts = {}
    for size, (kind, widths) in train_teacher.SIZES["atari"].items():
        per_game = []
        for game in GAMES.keys() - {"Breakout"}:
            with torch.device("meta"):
                actor, critic = ppd_atari.make_networks(make_network(kind, widths, GAMES[game][1]))
            per_game.append(sum(parameter.numel() for parameter in actor.parameters()))
            assert sum(parameter.numel() for parameter in critic.parameters()) < per_game[-1]
            assert not {id(p) for p in actor.parameters()} & {id(p) for p in critic.parameters()}
        counts[size] = np.mean(per_game)
    assert round(counts["same"] / 1e6, 1) == 1.1 and round(counts["larger"] / 1e6, 1) == 8.3
    assert round(counts["smaller"] / 1e3) == 236


@pytest.mark.parametrize("kind", ["nature", "impala"])
def test_initial_networks(kind):
    actor, critic = ppd_atari.make_networks(make_network(kind, [8, 16, 16, 64]), torch.Generator().manual_seed(0))
    for cnn, output_gain in ((actor.logits, 0.01), (critic.value, 1)):
        layers = [layer for layer in cnn.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
        assert len(layers) == (5 if kind == "nature" else 17)
        for layer in layers:
            weight, gain = layer.weight.flatten(1), output_gain if layer is layers[-1] else np.sqrt(2)
            weight = weight if len(weight) <= weight.shape[1] else weight.T
            torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=1e-4, atol=1e-5)
            assert (layer.bias == 0).all()


def test_amp_is_close(monkeypatch):
    actor, _ = ppd_atari.make_networks(make_network("impala", [16, 32, 32, 256]), torch.Generator().manual_seed(0))
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8)
    exact = actor(obs)
    monkeypatch.setattr(ppd_atari.Cnn, "amp", True)
    rough = actor(obs)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


# --- LOSSES ---


def test_categorical_functions():
    generator = torch.Generator().manual_seed(0)
    logits, others = (3 * torch.randn((50, 6), generator=generator, dtype=torch.float64) for _ in range(2))
    actions = torch.randint(6, (50,), generator=generator)
    ours, theirs = Categorical(logits=logits), Categorical(logits=others)
    torch.testing.assert_close(ppd_atari.categorical_logprob(actions, logits), ours.log_prob(actions))
    torch.testing.assert_close(ppd_atari.categorical_entropy(logits), ours.entropy())
    torch.testing.assert_close(ppd_atari.categorical_kl(logits, others), kl_divergence(ours, theirs))
    forward = ppd_atari.categorical_teacher_kl(logits, others, "forward")
    torch.testing.assert_close(forward, kl_divergence(ours, theirs))
    reverse = ppd_atari.categorical_teacher_kl(logits, others, "reverse")
    torch.testing.assert_close(reverse, kl_divergence(theirs, ours))
    for direction in ("forward", "reverse"):
        student = logits.clone().requires_grad_()
        kl = ppd_atari.categorical_teacher_kl(logits, student, direction)
        kl.sum().backward()
        assert kl.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12
    shaped = ppd_atari.categorical_logprob(actions.view(5, 10), logits.view(5, 10, 6))
    torch.testing.assert_close(shaped, ours.log_prob(actions).view(5, 10))


def test_policies_of_both_suites():
    generator = torch.Generator().manual_seed(0)
    logits, logstd = torch.randn((9, 4), generator=generator), torch.randn(4, generator=generator)
    actions = torch.arange(9) % 4
    expected = Categorical(logits=logits)
    torch.testing.assert_close(train_teacher.policy_logprob(actions, logits), expected.log_prob(actions))
    torch.testing.assert_close(train_teacher.policy_entropy(logits), expected.entropy().mean())
    gaussian = train_teacher.gaussian_logprob(logits + 1, logits, logstd)
    assert torch.equal(train_teacher.policy_logprob(logits + 1, (logits, logstd)), gaussian)
    assert train_teacher.policy_entropy((logits, logstd)) == train_teacher.gaussian_entropy(logstd)


@pytest.mark.parametrize("kl_mode", ["none", "forward", "reverse"])
def test_gradient_of_the_whole_update(folder, monkeypatch, kl_mode):
    """The gradients in the midst of a run are those of the formulas in float64, by networks of another making."""
    script = "teach" if kl_mode == "none" else "distill"
    module, calls, kind, rollouts = SCRIPTS[script], {}, "impala", []
    more = ["--ent-coef", 0.03, "--vf-coef", 0.4, "--learning-rate", 0.003]
    if script == "distill":
        teacher = load(make_atari_file("t.pt", ppd_atari, kind=kind))
        more += ["--distill-lambda", 0.7, "--kl", kl_mode]
    monkeypatch.setitem(train_teacher.SIZES["atari"], "smaller", (kind, [4, 4, 4, 16]))
    logprob, advantages = module.categorical_logprob, module.compute_advantages
    cnn_forward, clip = module.Cnn.forward, torch.nn.utils.clip_grad_norm_

    def recorded_logprob(actions, logits):
        if logits.requires_grad:
            calls["actions"] = actions
        else:
            rollouts.append((actions.flatten(), logits.flatten(0, 1).double()))
        return logprob(actions, logits)

    def recorded_advantages(rewards, values, *rest):
        found = advantages(rewards, values, *rest)
        calls["rollout"] = found.flatten().double(), (found + values).flatten().double()
        return found

    def recorded_forward(cnn, obs):
        if torch.is_grad_enabled():
            calls["obs"] = obs
        elif obs.shape[0] == 8:
            calls.setdefault("inferred", []).append(obs.clone())
        return cnn_forward(cnn, obs)

    def recorded_clip(parameters, max_norm, **kwargs):
        calls["weights"] = [parameter.detach().clone() for parameter in parameters]
        calls["gradients"] = [parameter.grad.clone() for parameter in parameters]
        return clip(parameters, max_norm, **kwargs)

    monkeypatch.setattr(module, "categorical_logprob", recorded_logprob)
    monkeypatch.setattr(module, "compute_advantages", recorded_advantages)
    monkeypatch.setattr(module.Cnn, "forward", recorded_forward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
    made = run(script, "--total-timesteps", 4 * BATCH, *more)
    policy = load(made / FILES[script])

    # the minibatch's samples, found by their frames in the rollout
    inferred = torch.cat(calls["inferred"])
    batches = {"teach": 1, "distill": 2}[script] * BATCH  # of the last rollout: critic, and teacher
    rollout_obs = inferred[-batches:][:BATCH]
    obs = calls["obs"]
    same = (obs[:, None] == rollout_obs[None]).flatten(2).all(2)
    samples = same.int().argmax(1)
    assert same.any(1).all()
    unique = same.sum(1) == 1
    assert unique.all()
    actions, (old_actions, old_logits) = calls["actions"], rollouts[-1]
    assert torch.equal(actions, old_actions[samples])

    weights = [weight.double().requires_grad_() for weight in calls["weights"]]
    names = [f"actor.{name}" for name in policy["actor"]] + [f"critic.{name}" for name in policy["critic"]]
    named = dict(zip(names, weights, strict=True))
    actor = {name[len("actor.logits.") :]: w for name, w in named.items() if name.startswith("actor.")}
    critic = {name[len("critic.value.") :]: w for name, w in named.items() if name.startswith("critic.")}
    student = Categorical(logits=independent_cnn(kind, actor, obs))
    values = independent_cnn(kind, critic, obs).flatten()
    old_logprob = Categorical(logits=old_logits).log_prob(old_actions)[samples]
    advantage, target = calls["rollout"][0][samples], calls["rollout"][1][samples]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = torch.exp(student.log_prob(actions) - old_logprob)
    surrogate = torch.min(advantage * ratio, advantage * torch.clamp(ratio, 0.8, 1.2))
    loss = -surrogate.mean() - 0.03 * student.entropy().mean() + 0.4 * ((values - target) ** 2).mean()
    if script == "distill":
        teacher_weights = {name[len("logits.") :]: tensor for name, tensor in teacher["actor"].items()}
        theirs = Categorical(logits=independent_cnn(kind, teacher_weights, obs))
        pair = (theirs, student) if kl_mode == "forward" else (student, theirs)
        loss = loss + 0.7 * torch.mean(torch.clamp(ratio, min=0.8) * kl_divergence(*pair))
    loss.backward()
    assert (ratio - 1).abs().max() > 0.01
    for weight, gradient in zip(weights, calls["gradients"], strict=True):
        atol = 1e-4 * weight.grad.abs().max().item()
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-3, atol=atol)


# --- RUNS ---


def test_the_users_lines(folder):
    """Train and distill with full games at the end, in processes of their own; the student is a teacher, too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launch(script, *arguments):
        line = [sys.executable, SCRIPTS[script].__file__, *command(script, *arguments, "--eval-episodes", 2)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr and "Traceback" not in done.stderr and "ALE" not in done.stderr
        return done.stdout

    taught = launch("teach", "--save-path", "t.pt", "--total-timesteps", 40)
    assert f"python ppd_atari.py --env-id {BREAKOUT} --teacher t.pt" in taught
    distilled = launch("distill", "--total-timesteps", 40, "--student-size", "smaller", "--amp")
    (made,) = pathlib.Path("runs").glob("*ppd_atari*")
    result = result_of(made)
    assert dict(script="ppd_atari.py", suite="atari", env_id=BREAKOUT, global_step=64).items() <= result.items()
    assert result["args"]["gamma"] == 0.999 and result["args"]["amp"] is True
    for name in ("teacher", "student"):
        score = result[name]
        assert score["episodes"] == len(score["returns"]) == 2
        assert score["human_normalized"] == pytest.approx((score["mean"] - 1.7) / 28.8)
        assert f"{name}: {score['mean']:.1f} ± {score['std']:.1f} over 2 episodes, human-normalized" in distilled
    positive = result["teacher"]["human_normalized"] > 0
    assert (result["ratio"] is None) != positive and "student / teacher: " in distilled
    assert load("t.pt")["score"] == result["teacher"]  # the same games
    student = load(made / "student.pt")
    assert student["network"]["kind"] == "nature" and student["network"]["actor_hidden"] == [32, 32, 32, 128]
    os.replace(made / "student.pt", "t.pt")
    only = launch("distill", "--total-timesteps", 0)
    assert f"teacher: {result['student']['mean']:.1f} ± " in only


@by_script
def test_same_seed_same_bits_for_any_threads(folder, script):
    make_atari_file("t.pt", ppd_atari)
    policies = {}
    for name, more in {"a": [], "b": ["--env-threads", 3], "c": ["--seed", 7]}.items():
        run(script, "--total-timesteps", 3 * BATCH, "--save-path", name, *more)
        policies[name] = load(name)
    assert same_bits(policies["a"]["actor"], policies["b"]["actor"])
    assert same_bits(policies["a"]["critic"], policies["b"]["critic"])
    assert not same_bits(policies["a"]["actor"], policies["c"]["actor"])


def test_first_ratio_of_every_rollout_is_one(folder, monkeypatch):
    make_atari_file("t.pt", ppd_atari)
    for script, module in SCRIPTS.items():
        ratios, loss = [], module.ppo_loss

        def recorded_loss(logratio, *rest, loss=loss, ratios=ratios):
            ratios.append(logratio.detach().exp())
            return loss(logratio, *rest)

        monkeypatch.setattr(module, "ppo_loss", recorded_loss)
        run(script, "--total-timesteps", 3 * BATCH, "--learning-rate", 0.003)
        assert len(ratios) == 24
        assert max((ratio - 1).abs().max() for ratio in ratios[::8]) < 1e-5
        assert min((ratio - 1).abs().max() for ratio in ratios[7::8]) > 1e-4


def test_actions_are_samples_of_the_policy(folder, monkeypatch):
    """Their frequencies, by a χ² test, are those of the probabilities at which they were drawn."""
    make_atari_file("t.pt", ppd_atari)
    seen, logprob = [], ppd_atari.categorical_logprob

    def recorded(actions, logits):
        if not logits.requires_grad:
            seen.append((actions.flatten().clone(), logits.flatten(0, 1).softmax(-1)))
        return logprob(actions, logits)

    monkeypatch.setattr(ppd_atari, "categorical_logprob", recorded)
    run("distill", "--total-timesteps", 4000, "--num-steps", 100, "--minibatch-size", 200, "--learning-rate", 0.001)
    actions, probabilities = (torch.cat(parts) for parts in zip(*seen, strict=True))
    counts = torch.bincount(actions, minlength=4).double()
    expected, variance = probabilities.sum(0), (probabilities * (1 - probabilities)).sum(0)
    assert len(actions) == 4000 and ((counts - expected).abs() < 4 * variance.sqrt()).all()


def test_teacher_runs_once_per_rollout_without_gradient(folder, monkeypatch):
    make_atari_file("t.pt", ppd_atari)
    loaded, calls, load_policy = [], [], ppd_atari.load_policy

    def recorded_load(*arguments):
        loaded.append(load_policy(*arguments))
        loaded[-1][0].register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
        return loaded[-1]

    monkeypatch.setattr(ppd_atari, "load_policy", recorded_load)
    run("distill", "--total-timesteps", 2 * BATCH)
    ((actor, critic, _),) = loaded
    assert sum(calls) == 2 * BATCH and max(calls) == 8  # in minibatches
    for module, name in ((actor, "actor"), (critic, "critic")):
        assert not any(parameter.grad is not None for parameter in module.parameters())
        assert same_bits(module.state_dict(), load("t.pt")[name])


@by_script
def test_evaluation_changes_no_bit_and_plays_full_games(folder, script):
    make_atari_file("t.pt", ppd_atari)
    run(script, "--total-timesteps", 3 * BATCH, "--save-path", "a")
    evaluations = ["--eval-interval", BATCH, "--eval-episodes", 2]
    made = run(script, "--total-timesteps", 3 * BATCH, "--save-path", "b", *evaluations)
    assert same_bits(load("a")["actor"], load("b")["actor"])
    assert [point[0] for point in result_of(made)["eval_curve"]] == [BATCH, 2 * BATCH, 3 * BATCH]


@pytest.mark.parametrize("number, owner, name, count, saved", [
    (signal.SIGINT, "AtariEnvs", "step", 2 * 16 + 9, 2 * BATCH),
    (signal.SIGTERM, None, "ppo_loss", 2 * 8 + 4, 2 * BATCH),
    (signal.SIGTERM, None, "ppo_loss", 3, 0),
])  # fmt: skip
@by_script
def test_signal_and_resume(folder, capsys, monkeypatch, script, number, owner, name, count, saved):
    make_atari_file("t.pt", ppd_atari)
    module, calls = SCRIPTS[script], []
    owner = getattr(module, owner) if owner else module
    original = getattr(owner, name)

    def struck(*arguments):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        with pytest.raises(SystemExit) as stop:
            run(script, "--total-timesteps", 4 * BATCH)
    assert stop.value.code == 128 + number
    (made,) = pathlib.Path("runs").iterdir()
    assert f"  python {module.SCRIPT} --resume {made}\n" in capsys.readouterr().err
    assert load(made / "checkpoint.pt")["progress"]["global_step"] == saved
    os.remove("t.pt")  # the training state keeps the teacher
    main(script, ["--resume", made])
    assert load(made / FILES[script])["global_step"] == result_of(made)["global_step"] == 4 * BATCH
    state = load(made / "checkpoint.pt")
    assert {entry["step"].item() for entry in state["optimizer"].values()} == {32.0}
    assert state["policy"]["return_rms"]["count"].item() == pytest.approx(4 * BATCH, abs=0.01)


def test_kill_9_and_resume(folder):
    make_atari_file("t.pt", ppd_atari)
    environment, reached = os.environ | {"OMP_NUM_THREADS": "1"}, 0
    arguments = command("distill", "--total-timesteps", 10**8, "--checkpoint-interval", BATCH)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, ppd_atari.__file__, *map(str, arguments)], env=environment)
        until = time.time() + 120
        while process.poll() is None and time.time() < until:
            checkpoints = list(pathlib.Path(".").glob("runs/*/checkpoint.pt"))
            if checkpoints and load(checkpoints[0])["progress"]["global_step"] > reached:
                break
            time.sleep(0.02)
        time.sleep(random.random() / 2)
        process.kill()
        process.wait()
        (made,) = pathlib.Path("runs").iterdir()
        assert load(made / "checkpoint.pt")["progress"]["global_step"] > reached
        reached, arguments = load(made / "checkpoint.pt")["progress"]["global_step"], ["--resume", made]
    main("distill", ["--resume", made, "--total-timesteps", reached + BATCH])
    assert result_of(made)["global_step"] == reached + BATCH


# --- REFUSALS ---


def check_refused(capsys, script, arguments, *words):
    """Exit code 2, one line on stderr that holds the words, nothing created."""
    before = sorted(pathlib.Path(".").rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(script, arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert sorted(pathlib.Path(".").rglob("*")) == before


@pytest.mark.parametrize("env_id, words", [
    ("Hopper-v4", ["not among the Atari games"]),
    ("Breakout-v4", ["not among the Atari games", BREAKOUT]),
    ("BreakoutNoFrameskip-v5", ["not among the Atari games", BREAKOUT]),
    ("ALE/Brekout-v5", ["not among the Atari games", "ALE/Breakout-v5"]),
    ("", ["not among the Atari games"]),
])  # fmt: skip
def test_no_atari_game(folder, capsys, env_id, words):
    make_atari_file("t.pt", ppd_atari)
    check_refused(capsys, "distill", command("distill", "--env-id", env_id), "--env-id", *words)


@pytest.mark.parametrize("env_id, words", [
    ("Breakout-v4", ["not among the Atari games", BREAKOUT]),
    ("BreakoutNoFrameskip-v5", ["not among the Atari games", BREAKOUT]),
    ("BreakoutNoFrameskip", ["not among the Atari games", BREAKOUT]),
    ("ALE/Brekout-v5", ["not among the Atari games", "ALE/Breakout-v5"]),
])  # fmt: skip
def test_teacher_of_no_game(folder, capsys, env_id, words):
    check_refused(capsys, "teach", command("teach", "--env-id", env_id), "--env-id", *words)


def test_teachers_that_do_not_fit(folder, capsys):
    make_policy_file("mujoco.pt", ppd_continuous)
    refused = functools.partial(check_refused, capsys, "distill")
    refused(["--teacher", "mujoco.pt", *SMALL], "mujoco.pt", "suite", "continuous")
    refused(["--teacher", "mujoco.pt", "--env-id", BREAKOUT, *SMALL], "mujoco.pt", "suite", "continuous")
    make_atari_file("pong.pt", ppd_atari, "PongNoFrameskip-v4")
    refused(["--teacher", "pong.pt", "--env-id", BREAKOUT, *SMALL], "pong.pt", "action_dim", "6", "4")
    refused(["--env-id", BREAKOUT, *SMALL], "--teacher")
    policy = load(make_atari_file("t.pt", ppd_atari))
    for field, value in dict(kind="mlp", activation="tanh", actor_hidden=[4, 4, 16], critic_hidden=[]).items():
        changed = policy | dict(network=policy["network"] | {field: value})
        ppd_atari.save_atomically("d.pt", lambda file, changed=changed: torch.save(changed, file))
        refused(["--teacher", "d.pt", *SMALL], "d.pt", "network")
    with pytest.raises(SystemExit) as stop:
        ppd_continuous.main(ppd_continuous.Args(teacher="t.pt"))
    assert stop.value.code == 2 and "suite" in capsys.readouterr().err


def test_teacher_of_another_game_with_equal_actions_warns(folder, capsys):
    make_atari_file("t.pt", ppd_atari, "QbertNoFrameskip-v4")
    run("distill", "--env-id", "PongNoFrameskip-v4", "--total-timesteps", BATCH)
    assert "warning: the teacher was trained on QbertNoFrameskip-v4" in capsys.readouterr().err
