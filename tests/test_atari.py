"""Atari: the games against gymnasium's and stable-baselines3's wrappers, scores, the user's lines and refusals."""

import functools
import os
import pathlib
import subprocess
import sys

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from helpers import check_refused, make_game_file, make_policy_file, result_of, run
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, MaxAndSkipEnv
from stable_baselines3.common.running_mean_std import RunningMeanStd

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


def load(path):
    return ppd_atari.read_file(path)


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
    make_game_file("t.pt", ppd_atari)
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
        run(module, command(script, "--total-timesteps", 1, "--num-steps", 90, "--num-envs", 3))


@by_script
def test_lost_lives_end_the_discounted_return(folder, monkeypatch, script):
    """Rewards are divided by the deviation of the returns so far, which start again at every lost life; λ is PPO's."""
    make_game_file("t.pt", ppd_atari)
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
    sizes = ["--num-steps", 200, "--num-envs", 4, "--minibatch-size", 400]
    run(module, command(script, "--total-timesteps", 1600, *sizes))
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


# --- REFUSALS ---


@pytest.mark.parametrize("env_id, words", [
    ("Hopper-v4", ["not among the Atari games"]),
    ("Breakout-v4", ["not among the Atari games", BREAKOUT]),
    ("BreakoutNoFrameskip-v5", ["not among the Atari games", BREAKOUT]),
    ("ALE/Brekout-v5", ["not among the Atari games", "ALE/Breakout-v5"]),
    ("", ["not among the Atari games"]),
])  # fmt: skip
def test_no_atari_game(folder, capsys, env_id, words):
    make_game_file("t.pt", ppd_atari)
    check_refused(capsys, ppd_atari, command("distill", "--env-id", env_id), "--env-id", *words)


@pytest.mark.parametrize("env_id, words", [
    ("Breakout-v4", ["not among the Atari games", BREAKOUT]),
    ("BreakoutNoFrameskip-v5", ["not among the Atari games", BREAKOUT]),
    ("BreakoutNoFrameskip", ["not among the Atari games", BREAKOUT]),
    ("ALE/Brekout-v5", ["not among the Atari games", "ALE/Breakout-v5"]),
])  # fmt: skip
def test_teacher_of_no_game(folder, capsys, env_id, words):
    check_refused(capsys, train_teacher, command("teach", "--env-id", env_id), "--env-id", *words)


def test_teachers_that_do_not_fit(folder, capsys):
    make_policy_file("mujoco.pt", ppd_continuous)
    refused = functools.partial(check_refused, capsys, ppd_atari)
    refused(["--teacher", "mujoco.pt", *SMALL], "mujoco.pt", "suite", "continuous")
    refused(["--teacher", "mujoco.pt", "--env-id", BREAKOUT, *SMALL], "mujoco.pt", "suite", "continuous")
    make_game_file("pong.pt", ppd_atari, "PongNoFrameskip-v4")
    refused(["--teacher", "pong.pt", "--env-id", BREAKOUT, *SMALL], "pong.pt", "action_dim", "6", "4")
    refused(["--env-id", BREAKOUT, *SMALL], "--teacher")
    policy = load(make_game_file("t.pt", ppd_atari))
    for field, value in dict(kind="mlp", activation="tanh", actor_hidden=[4, 4, 16], critic_hidden=[]).items():
        changed = policy | dict(network=policy["network"] | {field: value})
        ppd_atari.save_atomically("d.pt", lambda file, changed=changed: torch.save(changed, file))
        refused(["--teacher", "d.pt", *SMALL], "d.pt", "network")
    with pytest.raises(SystemExit) as stop:
        ppd_continuous.main(ppd_continuous.Args(teacher="t.pt"))
    assert stop.value.code == 2 and "suite" in capsys.readouterr().err


def test_teacher_of_another_game_with_equal_actions_warns(folder, capsys):
    make_game_file("t.pt", ppd_atari, "QbertNoFrameskip-v4")
    run(ppd_atari, command("distill", "--env-id", "PongNoFrameskip-v4", "--total-timesteps", 32))
    assert "warning: the teacher was trained on QbertNoFrameskip-v4" in capsys.readouterr().err
