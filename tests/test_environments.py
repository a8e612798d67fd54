"""Environments against what is known: a scripted one, gymnasium's and stable-baselines3's Atari wrappers, Procgen
itself; and evaluation."""

import multiprocessing
import threading

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import original_init
from envs import Scripted, observe, outcome
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from helpers import ENV_IDS, NETWORKS, Case, by_case, record
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, MaxAndSkipEnv

SUITES = CONTINUOUS, ATARI, PROCGEN = [Case(f"ppd_{suite}", suite) for suite in ENV_IDS]  # copies: see test_copies.py
LEVELS = dict(num_levels=50, start_level=7, distribution_mode="easy")


def make(case, env_id, num_envs):
    return case.Envs(env_id, num_envs, **(LEVELS if case.suite == "procgen" else {}))


def play(envs, steps=40, seed=(1, 2)):
    """What a reset and steps with actions that depend on nothing return."""
    rng, found = np.random.default_rng(0), [[envs.reset(list(seed))]]
    for _ in range(steps):
        if hasattr(envs, "action_space"):
            actions = rng.normal(size=(envs.num_envs, envs.action_dim)).astype(np.float32)
        else:
            actions = rng.integers(envs.action_dim, size=envs.num_envs)
        found.append([*envs.step(actions), actions])
    envs.close()
    return found


def same_play(first, second):
    pairs = zip(sum(first, []), sum(second, []), strict=True)
    return all(x == y if isinstance(x, dict) else np.array_equal(x, y) for x, y in pairs)


@by_case(SUITES)
def test_number_of_workers_and_seed(monkeypatch, case):
    """The workers change no bit, the seed does; what a step returned stays as it was."""
    env_id = {"continuous": "Hopper-v4"}.get(case.suite, case.env_id)
    plays = {}
    for name, cores, seed in (("one", 1, 1), ("many", 3, 1), ("other", 1, 2)):
        monkeypatch.setattr(case.module, "NUM_CORES", cores)
        plays[name] = play(make(case, env_id, 5), seed=(seed,))
    assert same_play(plays["one"], plays["many"]) and not same_play(plays["one"], plays["other"])
    assert len({obs.tobytes() for obs, *_ in plays["one"]}) > 20


@by_case(SUITES)
def test_scores_are_sums_of_true_rewards(case):
    """Those of whole games: a lost life is no end. Environments that end in the same step keep their own."""
    found, returns, lengths, episodes = play(make(case, case.env_id, 8), 200), np.zeros(8), np.zeros(8, int), 0
    for _, rewards, terminated, truncated, finished, _ in found[1:]:
        returns, lengths = returns + rewards, lengths + 1
        assert rewards.shape == terminated.shape == truncated.shape == (8,)
        assert finished == {i: (pytest.approx(returns[i]), lengths[i]) for i in finished}
        assert set(finished) <= set(np.flatnonzero(terminated | truncated))
        if case.suite != "atari":
            assert len(finished) == (terminated | truncated).sum()
        for i in finished:
            returns[i], lengths[i], episodes = 0, 0, episodes + 1
    assert episodes > 8


# --- CONTINUOUS CONTROL ---


@pytest.mark.parametrize("cores", [1, 3])
def test_scripted_environments(monkeypatch, cores):
    """Resets in the same step, ends of every kind, last observations, clipped actions."""
    monkeypatch.setattr(CONTINUOUS.module, "NUM_CORES", cores)
    envs, rng = CONTINUOUS.Envs("envs:Scripted-v0", 5), np.random.default_rng(0)
    obs = envs.reset([3])
    numbers, episodes, times, kept = obs[:, 0].copy(), np.zeros(5), np.zeros(5), []
    assert len(set(numbers)) == 5
    for _ in range(30):
        actions = rng.normal(size=(5, 2)).astype(np.float32)
        before = actions.copy()
        result = envs.step(actions)
        kept.append((result[0], result[0].copy()))
        times += 1
        clipped = np.clip(actions, Scripted.action_space.low, Scripted.action_space.high)
        for i, position in enumerate(zip(numbers, episodes, times, strict=True)):
            obs, *expected = (array[i] for array in result[:4])
            assert expected == [pytest.approx(x) for x in outcome(*position, clipped[i])]
            ended = expected[1] or expected[2]
            np.testing.assert_array_equal(envs.final_obs[i], observe(*position))
            if ended:
                episodes[i], times[i] = episodes[i] + 1, 0
            np.testing.assert_array_equal(obs, observe(numbers[i], episodes[i], times[i]))
        np.testing.assert_array_equal(actions, before)
    envs.close()
    assert all(np.array_equal(*pair) for pair in kept) and episodes.sum() > 20


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_start_methods(monkeypatch, method):
    monkeypatch.setattr(CONTINUOUS.module, "NUM_CORES", 2)
    multiprocessing.set_start_method(method, force=True)
    found = play(CONTINUOUS.Envs("envs:TorchInStep-v0", 4), 5)
    monkeypatch.setattr(CONTINUOUS.module, "NUM_CORES", 1)
    assert same_play(found, play(CONTINUOUS.Envs("envs:TorchInStep-v0", 4), 5))


def test_global_randomness(monkeypatch):
    """No environment is the copy of another, and the same seed gives the same bits."""
    monkeypatch.setattr(CONTINUOUS.module, "NUM_CORES", 2)
    first = play(CONTINUOUS.Envs("envs:GlobalRandomness-v0", 4))
    assert len(np.unique([obs for obs, *_ in first])) == 2 * 4 * 41 + 1
    assert same_play(first, play(CONTINUOUS.Envs("envs:GlobalRandomness-v0", 4)))


def test_error_in_a_worker(monkeypatch, capfd):
    """The run ends, and shows the author's traceback."""
    monkeypatch.setattr(CONTINUOUS.module, "NUM_CORES", 2)
    envs = CONTINUOUS.Envs("envs:Scripted-v0", 2)
    envs.reset([0])
    envs.action_space = gym.spaces.Box(-9, 9, (2,))  # so that nothing is clipped
    with pytest.raises(SystemExit, match="its error is above"):
        envs.step(np.float32([[0, 0], [9, 9]]))
    envs.close()
    assert "AssertionError: [9. 9.] is out of bounds" in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_close_of_workers_that_lose_the_signal(monkeypatch):
    """They end where their pipes do, though later workers have copies of the earlier ones' pipes."""
    monkeypatch.setattr(CONTINUOUS.module, "NUM_CORES", 3)
    envs = CONTINUOUS.Envs("envs:Scripted-v0", 3)
    for process in envs.processes:
        monkeypatch.setattr(process, "terminate", lambda: None)
    closing = threading.Thread(target=envs.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive() and not multiprocessing.active_children()


def test_mistake_in_a_constructor():
    """The author's own error is shown."""
    with pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        CONTINUOUS.Envs("envs:BadInit-v0", 1)


# --- ATARI ---

GAMES = {  # name: ALE's name, number of actions, that which means FIRE, scores of random play and humans in the paper
    "Atlantis": ("atlantis", 4, 1, 12850, 29028.1),
    "BeamRider": ("beam_rider", 9, 1, 363.9, 16926),
    "Breakout": ("breakout", 4, 1, 1.7, 30.5),
    "CrazyClimber": ("crazy_climber", 9, None, 10780.5, 35829),
    "DemonAttack": ("demon_attack", 6, 1, 152, 1971),
    "Enduro": ("enduro", 9, 1, 0, 860.5),
    "Freeway": ("freeway", 3, None, 0, 29.6),
    "MsPacman": ("ms_pacman", 9, None, 307.3, 6951),
    "Pong": ("pong", 6, 1, -20.7, 14.6),
    "Qbert": ("qbert", 6, 1, 163.9, 13455),
    "Seaquest": ("seaquest", 18, 1, 68.4, 42054.7),
    "Zaxxon": ("zaxxon", 18, 1, 32.5, 9173.3),
}


@pytest.fixture
def whole_games(monkeypatch):
    """Games of the usual length, which start at once, without no-ops. Returns the options, which can be changed."""
    options = dict(noop_max=1)
    monkeypatch.setattr(AtariVectorEnv, "__init__", lambda envs, *a, **k: original_init(envs, *a, **{**k, **options}))
    return options


@pytest.mark.parametrize("game", GAMES)
def test_games_are_those_of_gymnasium(whole_games, game):
    """Actions, frames and rewards, for 300 steps or up to the first lost life. The first action of a game is FIRE."""
    rom, num_actions, fire, *_ = GAMES[game]
    env_id, rng = f"{game}NoFrameskip-v4", np.random.default_rng(1)
    envs = ATARI.Envs(env_id, 1)
    assert (envs.game, envs.action_dim) == (rom, num_actions)
    reference = FrameStackObservation(AtariPreprocessing(gym.make(env_id), noop_max=0), 4, padding_type="zero")
    obs, _ = envs.reset([5]), reference.reset(seed=5)
    assert obs.shape == (1, *envs.obs_shape) == (1, 4, 84, 84) and obs.dtype == np.uint8
    ale, differences = reference.unwrapped.ale, []
    for step in range(300):
        lives = ale.lives()
        action = rng.integers(num_actions)
        obs, reward, terminated, *_ = envs.step(np.array([action]))
        expected, expected_reward, over, *_ = reference.step(fire if fire and step == 0 else action)
        assert reward[0] == expected_reward
        if over or ale.lives() < lives:
            assert terminated[0]
            break
        assert not terminated[0]
        differences.append(np.abs(obs[0, -1].astype(float) - expected[-1]).mean())
    assert len(differences) > 20 and max(differences) <= (0.6 if game == "Zaxxon" else 0.06)
    envs.close()


@pytest.mark.parametrize("game", ["Atlantis", "Breakout", "Seaquest"])
def test_lives_and_ends_are_those_of_stable_baselines3(whole_games, game):
    """Over two games: a lost life terminates, but the game goes on, after FIRE; the score is the whole game's."""
    whole_games["max_num_frames_per_episode"] = frames = 4_000 if game == "Atlantis" else 108_000
    env_id, rng, fire = f"{game}NoFrameskip-v4", np.random.default_rng(2), GAMES[game][2]
    envs = ATARI.Envs(env_id, 1)
    raw = gym.make(env_id, max_num_frames_per_episode=frames)
    lived = EpisodicLifeEnv(MaxAndSkipEnv(raw, 4))
    envs.reset([5])
    lived.reset(seed=5)
    score, length, games, lost, fires = 0.0, 0, [], 0, True
    while len(games) < 2:
        action = int(rng.integers(envs.action_dim))
        _, reward, terminated, truncated, finished = envs.step(np.array([action]))
        _, expected, done, cut, _ = lived.step(fire if fires else action)
        score, length = score + expected, length + 1
        assert (reward[0], terminated[0], truncated[0]) == (expected, done, cut)
        over = done and lived.was_real_done or cut
        fires = done or cut
        lost += done and not over
        assert finished == ({0: (score, length)} if over else {})
        if over:
            games.append(score)
            score, length, lived.was_real_done = 0.0, 0, True
            lived.reset()
    assert lost == dict(Breakout=8, Seaquest=6).get(game, lost) and lost > 2 and any(games)
    envs.close()


def test_cut_off_games_have_their_last_observation(whole_games):
    whole_games["max_num_frames_per_episode"] = 80
    cut = ATARI.Envs("BreakoutNoFrameskip-v4", 2)
    first = cut.reset([3])
    del whole_games["max_num_frames_per_episode"]
    whole = ATARI.Envs("BreakoutNoFrameskip-v4", 2)
    whole.reset([3])
    for step in range(1, 21):
        cut.lives = 9 * (step == 20) + cut.lives  # as after bonus lives: a new game has less
        actions = np.array([step % 4, 0])
        obs, _, terminated, truncated, finished = cut.step(actions)
        expected = whole.step(actions)[0]
        assert not terminated.any() and truncated.all() == (step == 20)
    assert np.abs(cut.final_obs.astype(float) - expected).mean() < 0.1  # of the last 4 frames ALE leaves out one
    assert set(finished) == {0, 1} and finished[0][1] == 20
    np.testing.assert_array_equal(obs[:, -1], first[:, -1])  # that of a new game


def test_sticky_actions(whole_games):
    """Those of ALE/…-v5, and not of the others."""
    plays = [play(ATARI.Envs(f"{name}-v{n}", 1), 60) for name, n in (("ALE/Seaquest", 5), ("SeaquestNoFrameskip", 4))]
    assert not same_play(*plays)


def test_human_scores():
    """The values of the paper's library, which are rounded in places."""
    assert len(ATARI.module.HUMAN_SCORES) == len(GAMES)
    for game, _, _, *expected in GAMES.values():
        assert ATARI.module.HUMAN_SCORES[game] == pytest.approx(expected, abs=1)


# --- PROCGEN ---


@pytest.mark.parametrize("game", ["coinrun", "starpilot"])
def test_procgen_itself(monkeypatch, game):
    """Pixels, rewards and ends are Procgen's for the same seed, with channels first. Rewards that come with `first` are
    those of the level that has ended."""
    import procgen

    original, made = procgen.ProcgenGym3Env, []
    monkeypatch.setattr(
        procgen, "ProcgenGym3Env", lambda *a, **options: made.append(options) or original(*a, **options)
    )
    found = play(make(PROCGEN, game, 8), 800)
    reference, ends = original(8, game, **{**made[-1], "num_threads": 1}), 0
    assert LEVELS.items() <= made[-1].items()
    for step, (obs, *rest) in enumerate(found):
        rewards, expected, first = reference.observe()
        for i, channel in np.ndindex(8, 3):
            np.testing.assert_array_equal(obs[i, channel], expected["rgb"][i, :, :, channel])
        if step:
            for x, y in zip(rest[:3], (rewards, first, first & False), strict=True):
                np.testing.assert_array_equal(x, y)
            ends += first.sum()
        if step < 800:
            reference.act(found[step + 1][-1])
    assert ends > (game == "starpilot")


def levels_of(envs, steps=300):
    seeds = set()
    envs.reset([11])
    for _ in range(steps):
        seeds |= {int(info["level_seed"]) for info in envs.envs.get_info()}
        envs.step(np.full(envs.num_envs, 8))
    envs.close()
    return seeds


def test_procgen_levels_of_training_and_unseen_ones():
    args = PROCGEN.args(env_id="coinrun", distribution_mode="easy")
    assert (args.num_levels, args.start_level) == (200, 0)
    training, unseen = (levels_of(PROCGEN.module.make_envs(args, 16, unseen=unseen)) for unseen in (False, True))
    assert len(training) > 40 and training <= set(range(200))
    assert len(unseen) > 40 and not unseen & set(range(200))
    args.num_levels, args.start_level = 3, 1000
    assert levels_of(PROCGEN.module.make_envs(args, 16)) == {1000, 1001, 1002}


# --- EVALUATION ---


@pytest.mark.parametrize("episodes", [1, 3, 20])
def test_every_environment_plays_its_quota(monkeypatch, episodes):
    """However short its episodes are. Actions are the means, and all is closed."""
    actor = CONTINUOUS.Actor(dict(activation="relu", actor_hidden=[8], obs_shape=[3], action_dim=2))
    envs, closed = CONTINUOUS.Envs("envs:Scripted-v0", min(7, episodes)), []
    steps = record(monkeypatch, CONTINUOUS.Envs, "step")
    monkeypatch.setattr(envs, "close", lambda: closed.append(True))
    score = CONTINUOUS.module.evaluate(actor, envs, CONTINUOUS.args(eval_episodes=episodes))
    assert closed
    returns = [[] for _ in range(envs.num_envs)]
    for _, (*_, finished) in steps:
        for i, (episode_return, _) in finished.items():
            returns[i].append(episode_return)
    quotas = [episodes // envs.num_envs + (i < episodes % envs.num_envs) for i in range(envs.num_envs)]
    counted = [each[:quota] for each, quota in zip(returns, quotas, strict=True)]
    assert sorted(score["returns"]) == sorted(sum(counted, []))
    assert score["mean"] == np.mean(score["returns"]) and score["std"] == np.std(score["returns"])
    assert min(len(each) - quota for each, quota in zip(returns, quotas, strict=True)) == 0
    first_obs = torch.tensor(np.array([observe(n, 0, 0) for n in envs.reset([100, 2])[:, 0]]))
    with torch.no_grad():
        means = actor(actor.normalize(first_obs)).numpy()
    np.testing.assert_array_equal(steps[0][0][1], means)


@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_of_an_evaluation_of_procgen(monkeypatch, deterministic):
    """The likeliest ones, or samples of the policy, the same each time."""
    actor = PROCGEN.Actor(NETWORKS["procgen"])
    args = PROCGEN.args(eval_episodes=8, env_id="starpilot", distribution_mode="easy")
    actor.logits.head.weight.data *= 100  # else probabilities round to the same
    logits, steps = record(monkeypatch, PROCGEN.Actor, "forward"), record(monkeypatch, PROCGEN.Envs, "step")
    for _ in range(2):
        envs = PROCGEN.module.make_envs(args, 8)
        PROCGEN.module.evaluate(actor, envs, args, deterministic=deterministic)
    actions = torch.tensor(np.array([arguments[1] for arguments, _ in steps])).flatten()
    logits = torch.cat([output for _, output in logits])
    assert torch.equal(*actions.chunk(2)) and len(actions) > 800
    if deterministic:
        assert torch.equal(actions, logits.argmax(1))
    else:
        counts, expected = torch.bincount(actions, minlength=15), logits.softmax(1).sum(0)
        assert ((counts - expected).abs() < 2 * 4 * expected.sqrt()).all()  # each action counts twice
