"""Procgen: levels, seeds, ends of episodes and pixels against Procgen itself, evaluation, a user's lines, refusals."""

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import check_refused, make_game_file, make_policy_file, result_of, run
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES

import ppd_atari
import ppd_continuous
import ppd_procgen
import train_teacher

SCRIPTS = {"teach": train_teacher, "distill": ppd_procgen}
SMALL = "--num-envs 2 --num-steps 16 --minibatch-size 8 --update-epochs 2 --eval-episodes 0 --env-threads 1".split()
by_script = pytest.mark.parametrize("script", SCRIPTS)


def command(script, *arguments):
    what = ["--env-id", "coinrun", "--size", "smaller"] if script == "teach" else ["--teacher", "t.pt"]
    return [*what, *SMALL, *map(str, arguments)]


def load(path):
    return ppd_procgen.read_file(path)


# --- GAMES ---


def play(envs, seed=3, steps=150):
    """Observations, rewards, ends of episodes and finished episodes of random actions that depend on nothing."""
    rng, obs = np.random.default_rng(0), [envs.reset([seed] * envs.envs.num)]
    rest = []
    for _ in range(steps):
        new_obs, *others = envs.step(rng.integers(0, 15, envs.envs.num))
        obs.append(new_obs)
        rest.append(others)
    rewards, terminated, truncated, _, finished = zip(*rest, strict=True)
    assert not np.array(truncated).any()
    return np.array(obs), np.array(rewards), np.array(terminated), finished


def test_all_games_and_their_names():
    assert sorted(ppd_procgen.PROCGEN_GAMES) == sorted(ENV_NAMES) and len(ENV_NAMES) == 16
    for game in ppd_procgen.PROCGEN_GAMES:
        for env_id in (game, f"procgen-{game}-v0", f"procgen:procgen-{game}-v0", f"procgen-{game}"):
            assert ppd_procgen.procgen_game(env_id) == game and train_teacher.find_suite(env_id) == "procgen"
        envs = ppd_procgen.ProcgenEnvs(game, 2, 1)
        obs = envs.reset([0, 0])
        assert obs.shape == (2, *envs.obs_shape) and obs.dtype == np.uint8
        assert envs.envs.ac_space.eltype.n == envs.action_dim == 15
        envs.close()


@pytest.mark.parametrize("game", ["coinrun", "starpilot"])
def test_observations_rewards_and_ends_of_procgen(game):
    """Those of Procgen itself for the same seed and actions, in the order that PyTorch wants: no pixel is mixed."""
    envs = ppd_procgen.ProcgenEnvs(game, 4, 2, num_levels=50, start_level=7)
    obs, rewards, terminated, finished = play(envs, seed=2**31 + 5, steps=700)
    plain = dict(num_levels=50, start_level=7, distribution_mode="easy", rand_seed=5)
    reference, rng = ProcgenGym3Env(4, game, **plain), np.random.default_rng(0)
    returns, lengths, episodes = np.zeros(4), np.zeros(4, int), 0
    for step in range(701):
        reward, expected, first = reference.observe()
        for i in range(4):
            for channel in range(3):
                np.testing.assert_array_equal(obs[step, i, channel], expected["rgb"][i, :, :, channel])
        if step:
            np.testing.assert_array_equal(rewards[step - 1], reward)
            np.testing.assert_array_equal(terminated[step - 1], first)
            returns, lengths = returns + reward, lengths + 1
            ended = [(int(i), returns[i], lengths[i]) for i in np.flatnonzero(first)]
            assert finished[step - 1] == ended
            episodes += len(ended)
            returns[first], lengths[first] = 0, 0
        reference.act(rng.integers(0, 15, 4))
    assert episodes > 3 and np.count_nonzero(rewards) > 3


def test_the_last_reward_belongs_to_the_episode_that_ended():
    """The coin of coinrun ends its level: the reward of 10 comes with the end, and the next level begins at 0."""
    envs, coins = ppd_procgen.ProcgenEnvs("coinrun", 8, 2), 0
    envs.reset([0])
    for _ in range(600):
        _, rewards, terminated, _, _, finished = envs.step(np.full(8, 8))  # right and up
        info = envs.envs.get_info()
        assert ((rewards == 10) <= terminated).all()
        for i, episode_return, _ in finished:
            assert episode_return == rewards[i] == 10 * info[i]["prev_level_complete"]
            assert info[i]["level_seed"] != info[i]["prev_level_seed"]
            coins += rewards[i] == 10
    assert coins > 3


def levels_of(envs, steps=400):
    seeds = set()
    envs.reset([11])
    for _ in range(steps):
        seeds |= {int(info["level_seed"]) for info in envs.envs.get_info()}
        envs.step(np.full(envs.envs.num, 8))
    return seeds


def test_levels_of_training_and_unseen_ones():
    args = ppd_procgen.Args()
    assert (args.num_levels, args.start_level, args.distribution_mode) == (200, 0, "easy")
    training = levels_of(ppd_procgen.procgen_maker(args)("coinrun", 16, 1))
    assert len(training) > 60 and max(training) < 200 and min(training) >= 0
    unseen = levels_of(ppd_procgen.procgen_maker(args, unseen=True)("coinrun", 16, 1))
    assert len(unseen) > 60 and not unseen & set(range(200))
    args = ppd_procgen.Args(num_levels=3, start_level=1000)
    assert levels_of(ppd_procgen.procgen_maker(args)("coinrun", 16, 1), 100) == {1000, 1001, 1002}
    assert max(levels_of(ppd_procgen.procgen_maker(args, unseen=True)("coinrun", 16, 1), 10)) > 10**6


def test_seeds_and_threads_and_modes():
    plays = {}
    for name, (mode, seed, threads) in dict(
        first=("easy", 3, 1), again=("easy", 3, 1), threads=("easy", 3, 5), other=("easy", 4, 1), hard=("hard", 3, 1)
    ).items():
        envs = ppd_procgen.ProcgenEnvs("coinrun", 5, threads, distribution_mode=mode)
        plays[name] = play(envs, seed)
        if name == "again":  # the same object once more
            plays["reset"] = play(envs, seed)
        envs.close()
    for name in ("again", "reset", "threads"):
        assert all((a == b).all() for a, b in zip(plays["first"][:3], plays[name][:3], strict=True))
        assert plays["first"][3] == plays[name][3]
    for name in ("other", "hard"):
        assert not (plays["first"][0][0] == plays[name][0][0]).all()


def test_actions_out_of_range():
    envs = ppd_procgen.ProcgenEnvs("coinrun", 2, 1)
    envs.reset([0])
    for bad in (-1, 15, 99):
        with pytest.raises(ValueError, match="0 and 14"):
            envs.step(np.array([0, bad]))


@by_script
def test_no_bootstrapping_across_the_end_of_an_episode(folder, monkeypatch, script):
    """Nothing of the next level's value counts, and the discounted return that scales rewards starts again."""
    make_game_file("t.pt", ppd_procgen, "coinrun")
    module, played, networks = SCRIPTS[script], [], []
    step, make_networks = module.ProcgenEnvs.step, module.make_networks

    def recorded_step(envs, actions, active=True):
        played.append(step(envs, actions, active))
        return played[-1]

    def recorded_networks(*arguments):
        networks.append(make_networks(*arguments))
        return networks[-1]

    class Stop(Exception):
        pass

    def check(rewards, values, next_values, ended, gamma, gae_lambda):
        expected_ends = torch.from_numpy(np.array([result[2] for result in played]))
        with torch.no_grad():
            successors = torch.from_numpy(np.array([result[0] for result in played]))
            expected = networks[-1][1](successors.flatten(0, 1)).view(values.shape)
        expected[expected_ends] = 0
        assert expected_ends.any() and torch.equal(ended, expected_ends)
        torch.testing.assert_close(next_values, expected, rtol=1e-4, atol=1e-5)
        statistics, returns = module.RunningMeanStd(), torch.zeros(values.shape[1], dtype=torch.float64)
        for t, (_, reward, terminated, *_) in enumerate(played):
            returns = returns * 0.99 + torch.from_numpy(reward)
            statistics.update(returns)
            returns[torch.from_numpy(terminated)] = 0
            scaled = (torch.from_numpy(reward) / (statistics.var + 1e-8).sqrt()).clamp(-10, 10)
            torch.testing.assert_close(rewards[t], scaled.float())
        raise Stop

    monkeypatch.setattr(module.ProcgenEnvs, "step", recorded_step)
    monkeypatch.setattr(module, "make_networks", recorded_networks)
    monkeypatch.setattr(module, "compute_advantages", check)
    with pytest.raises(Stop):
        run(module, command(script, "--total-timesteps", 1, "--num-steps", 300, "--num-envs", 8))


# --- EVALUATION ---


def make_actor(seed=0):
    network = dict(kind="nature", activation="relu", actor_hidden=[4, 4, 4, 16], critic_hidden=[4, 4, 4, 16])
    network |= dict(obs_shape=[3, 64, 64], action_dim=15)
    return ppd_procgen.make_networks(network, torch.Generator().manual_seed(seed))[0]


def test_evaluation_plays_its_quota_on_both_kinds_of_levels(monkeypatch):
    made, finished = [], []
    original, step = ppd_procgen.ProcgenEnvs.__init__, ppd_procgen.ProcgenEnvs.step

    def recorded_init(envs, env_id, num_envs, threads, **levels):
        made.append(levels)
        original(envs, env_id, num_envs, threads, **levels)

    def recorded_step(envs, actions, active):
        found = step(envs, actions, active)
        finished.append((len(made), found[-1]))
        return found

    monkeypatch.setattr(ppd_procgen.CnnActor, "mode", None)  # actions are stochastic
    monkeypatch.setattr(ppd_procgen.ProcgenEnvs, "__init__", recorded_init)
    monkeypatch.setattr(ppd_procgen.ProcgenEnvs, "step", recorded_step)
    args = ppd_procgen.Args(env_id="coinrun", eval_episodes=30, env_threads=1, num_levels=100)
    actor, states = make_actor(), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    calls = []
    scores = ppd_procgen.evaluate_levels(actor, args, torch.device("cpu"), lambda: calls.append(None))
    assert [levels["num_levels"] for levels in made] == [0, 100]
    assert len(calls) == len(finished)
    for number, name in ((1, "test"), (2, "train")):
        returns = [[] for _ in range(25)]
        for which, episodes in finished:
            for i, episode_return, _ in episodes if which == number else []:
                returns[i].append(episode_return)
        assert [len(each) for each in returns] == [2] * 5 + [1] * 20
        assert scores[name]["returns"] == [value for each in returns for value in each]
        assert scores[name]["episodes"] == 30 and scores[name]["mean"] == np.mean(scores[name]["returns"])
    assert scores["gap"] == scores["train"]["mean"] - scores["test"]["mean"]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()
    again = ppd_procgen.evaluate_levels(actor, args, torch.device("cpu"), lambda: None)
    assert again == scores


def test_evaluation_acts_at_random():
    """Each action as often as the policy says, and another seed acts otherwise."""
    actor = make_actor()
    obs = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8).expand(4000, -1, -1, -1)
    with torch.no_grad():
        actor.logits.head.bias += torch.linspace(-2, 1, 15)
        probabilities = actor(obs[:1]).softmax(-1)[0].double()
        first, again = (ppd_procgen.make_sampler(actor, 1)(obs) for _ in range(2))
        other = ppd_procgen.make_sampler(actor, 2)(obs)
    assert torch.equal(first, again) and not torch.equal(first, other)
    counts = torch.bincount(first, minlength=15) / 4000
    assert ((counts - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / 4000).sqrt()).all()


# --- RUNS ---


def test_the_users_lines(folder):
    """Train and distill with episodes at the end, in processes of their own; the student is a teacher, too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launch(script, *arguments):
        line = [sys.executable, SCRIPTS[script].__file__, *command(script, *arguments, "--eval-episodes", 3)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for word in ("Warning", "Traceback", "Gym", "unmaintained"):
            assert word not in done.stderr + done.stdout
        return done.stdout

    taught = launch("teach", "--save-path", "t.pt", "--total-timesteps", 40, "--env-id", "procgen:procgen-coinrun-v0")
    assert "python ppd_procgen.py --env-id coinrun --teacher t.pt" in taught
    (made,) = pathlib.Path("runs").glob("coinrun__train_teacher__100__*")
    assert result_of(made)["env_id"] == load("t.pt")["env_id"] == "coinrun"
    more = ["--student-size", "smaller", "--amp", "--teacher-noise", 0.01, "--eval-interval", 32]
    distilled = launch("distill", "--total-timesteps", 40, *more)
    (made,) = pathlib.Path("runs").glob("coinrun__ppd_procgen__100__*")
    result = result_of(made)
    assert dict(script="ppd_procgen.py", suite="procgen", env_id="coinrun", global_step=64).items() <= result.items()
    assert result["args"]["gamma"] == 0.999 and result["args"]["amp"] is True
    assert [step for step, _, _ in result["eval_curve"]] == [32, 64]
    for name in ("teacher", "original_teacher", "student"):
        score = result[name]
        assert score["gap"] == score["train"]["mean"] - score["test"]["mean"]
        text = "{mean:.1f} ± {std:.1f} over 3 episodes on unseen levels".format(**score["test"])
        text += ", {mean:.1f} ± {std:.1f} on those of training".format(**score["train"])
        assert f"{name.replace('_', ' ')}: {text}, gap {score['gap']:.1f}" in distilled
    for name, teacher in (("ratio", "teacher"), ("ratio_original", "original_teacher")):
        for levels in ("test", "train"):
            theirs, ratio = result[teacher][levels]["mean"], result[name][levels]
            if theirs > 0:
                assert ratio == result["student"][levels]["mean"] / theirs
            else:
                assert ratio is None and "not positive" in result[f"{name}_reason"][levels]
    assert load("t.pt")["score"] == result["original_teacher"]  # the same episodes
    student = load(made / "student.pt")
    assert student["score"] == result["student"]
    assert student["network"]["kind"] == "nature" and student["network"]["actor_hidden"] == [32, 32, 32, 128]
    os.replace(made / "student.pt", "t.pt")
    only = launch("distill", "--total-timesteps", 0)
    assert "teacher: {mean:.1f} ± ".format(**result["student"]["test"]) in only


@by_script
def test_the_curve_is_that_of_unseen_levels(folder, monkeypatch, script):
    make_game_file("t.pt", ppd_procgen, "bigfish")
    monkeypatch.setattr(SCRIPTS[script].CnnActor, "mode", None)  # actions are stochastic
    more = ["--total-timesteps", 32, "--eval-episodes", 8, "--eval-interval", 32]
    result = result_of(run(SCRIPTS[script], command(script, "--env-id", "bigfish", *more)))
    score = result["teacher" if script == "teach" else "student"]
    assert score["test"]["returns"] != score["train"]["returns"]
    assert result["eval_curve"] == [[32, score["test"]["mean"], score["test"]["std"]]]


@by_script
def test_seeds_reach_the_environments(folder, monkeypatch, script):
    """That of the run, of the step at which it was resumed, and evaluation's own."""
    make_game_file("t.pt", ppd_procgen, "coinrun")
    module, seeds = SCRIPTS[script], []
    reset = module.ProcgenEnvs.reset

    def recorded_reset(envs, given):
        seeds.append(given)
        return reset(envs, given)

    monkeypatch.setattr(module.ProcgenEnvs, "reset", recorded_reset)
    made = run(module, command(script, "--total-timesteps", 32, "--seed", 7))
    resumed = ["--resume", made, "--total-timesteps", 64, "--eval-episodes", 3]
    module.main(module.parse_args([str(argument) for argument in resumed]))
    assert seeds[:2] == [module.derive_seeds(7, "environments", 2), module.derive_seeds(7, "environments", 2, 32)]
    assert len(seeds[2:]) == (2 if script == "teach" else 4)
    assert all(given == module.derive_seeds(7, "evaluation", 3) for given in seeds[2:])


@by_script
def test_settings_of_the_paper(folder, script):
    """Table 3, in what a run is told nothing of."""
    made = make_game_file("t.pt", ppd_procgen, "coinrun")
    sizes = ["--total-timesteps", 1, "--num-envs", 2, "--minibatch-size", 2, "--eval-episodes", 0]
    what = ["--env-id", "coinrun", "--size", "smaller"] if script == "teach" else ["--teacher", made]
    args = result_of(run(SCRIPTS[script], [*what, *sizes]))["args"]
    common = dict(learning_rate=3e-4, gae_lambda=0.9, update_epochs=4, clip_coef=0.2, vf_coef=0.5, max_grad_norm=0.5)
    if script == "teach":
        settings = dict(num_steps=512, gamma=0.995, ent_coef=0.01)
        totals = dict(total_timesteps=30_000_000, eval_episodes=200)
        assert totals.items() <= train_teacher.PAPER_SETTINGS["procgen"].items()
    else:
        settings = dict(num_steps=64, gamma=0.999, ent_coef=0.0, distill_lambda=1.0, kl="forward")
        defaults = ppd_procgen.Args()
        assert (defaults.total_timesteps, defaults.eval_episodes) == (2_000_000, 200)
    assert (common | settings | dict(num_levels=200, start_level=0, distribution_mode="easy")).items() <= args.items()
    assert (SCRIPTS[script].Args().num_envs, SCRIPTS[script].Args().minibatch_size) == (18, 512)


def test_other_levels_than_the_teachers_warn(folder, capsys):
    """And the command that train_teacher.py prints has the levels of its own run."""
    levels = ["--num-levels", 5, "--distribution-mode", "hard"]
    run(train_teacher, command("teach", "--save-path", "t.pt", "--total-timesteps", 32, *levels))
    assert "--teacher t.pt --num-levels 5 --distribution-mode hard\n" in capsys.readouterr().out
    run(ppd_procgen, command("distill", "--total-timesteps", 32, "--num-levels", 5))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: the teacher was trained with --distribution-mode hard, not easy"]
    run(ppd_procgen, command("distill", "--total-timesteps", 32, *levels))
    assert "warning" not in capsys.readouterr().err


def test_levels_reach_the_run(folder, capsys, monkeypatch):
    """Training sees the levels that the flags say, and a resumed run sees them, too."""
    make_game_file("t.pt", ppd_procgen, "coinrun")
    seeds, step = set(), ppd_procgen.ProcgenEnvs.step

    def recorded_step(envs, actions, active=True):
        seeds.update(int(info["level_seed"]) for info in envs.envs.get_info())
        return step(envs, actions, active)

    monkeypatch.setattr(ppd_procgen.ProcgenEnvs, "step", recorded_step)
    made = run(ppd_procgen, command("distill", "--num-levels", 2, "--start-level", 55, "--total-timesteps", 64))
    assert seeds == {55, 56}
    arguments = ["--resume", made, "--total-timesteps", 96]
    ppd_procgen.main(ppd_procgen.parse_args([str(argument) for argument in arguments]))
    assert seeds == {55, 56} and result_of(made)["global_step"] == 96
    check_refused(capsys, ppd_procgen, [*arguments, "--num-levels", 3], "--num-levels", "cannot be changed")


# --- REFUSALS ---


@pytest.mark.parametrize("env_id, words", [
    ("coinrum", ["not among the games of Procgen", "coinrun"]),
    ("COINRUN", ["not among the games of Procgen", "coinrun"]),
    ("procgen-coin-v0", ["not among the games of Procgen", "coinrun"]),
    ("procgen:starpiolt", ["not among the games of Procgen", "starpilot"]),
])  # fmt: skip
@by_script
def test_no_game_of_procgen(folder, capsys, script, env_id, words):
    if script == "distill":
        make_game_file("t.pt", ppd_procgen, "coinrun")
    check_refused(capsys, SCRIPTS[script], [*command(script), "--env-id", env_id], f"--env-id {env_id}", *words)


def test_other_environments_are_refused(folder, capsys):
    make_game_file("t.pt", ppd_procgen, "coinrun")
    for env_id in ("Hopper-v4", "BreakoutNoFrameskip-v4", ""):
        check_refused(capsys, ppd_procgen, command("distill", "--env-id", env_id), "--env-id", "Procgen")
    suites = {"Hopper-v4": "continuous", "ALE/Pong-v5": "atari", "a:jumper-v0": "continuous", "Maze-v0": "procgen"}
    for env_id, suite in suites.items():
        assert train_teacher.find_suite(env_id) == suite


@pytest.mark.parametrize("arguments, words", [
    (["--num-levels", -1], ["--num-levels"]),
    (["--start-level", -1], ["--start-level"]),
    (["--start-level", 2**31], ["--start-level"]),
    (["--distribution-mode", "memory"], ["--distribution-mode", "jumper"]),
    (["--distribution-mode", "extreme"], ["--distribution-mode", "starpilot"]),
])  # fmt: skip
@by_script
def test_levels_that_cannot_be(folder, capsys, script, arguments, words):
    make_game_file("t.pt", ppd_procgen, "coinrun")
    check_refused(capsys, SCRIPTS[script], command(script, *arguments), *words)


def test_modes_of_some_games():
    for mode, games in ppd_procgen.PROCGEN_MODES.items():
        for game in games.split():
            envs = ppd_procgen.ProcgenEnvs(game, 1, 1, distribution_mode=mode)
            assert envs.reset([0]).any()
            envs.close()


def test_teachers_that_do_not_fit(folder, capsys):
    refused = functools.partial(check_refused, capsys, ppd_procgen)
    make_policy_file("mujoco.pt", ppd_continuous)
    make_game_file("atari.pt", ppd_atari)
    for path, suite in (("mujoco.pt", "continuous"), ("atari.pt", "atari")):
        refused(["--teacher", path, *SMALL], path, "suite", suite)
        refused(["--teacher", path, "--env-id", "coinrun", *SMALL], path, "suite", suite)
    refused(["--env-id", "coinrun", *SMALL], "--teacher")
    policy = load(make_game_file("t.pt", ppd_procgen, "coinrun"))
    check_refused(capsys, ppd_atari, ["--teacher", "t.pt", *SMALL], "t.pt", "suite", "procgen")
    for field, value in dict(kind="mlp", obs_shape=[4, 84, 84], action_dim=6).items():
        changed = policy | dict(network=policy["network"] | {field: value})
        ppd_procgen.save_atomically("d.pt", lambda file, changed=changed: torch.save(changed, file))
        refused(["--teacher", "d.pt", *SMALL], "d.pt", "network")


def test_teacher_of_another_game_warns(folder, capsys):
    make_game_file("t.pt", ppd_procgen, "ninja")
    run(ppd_procgen, command("distill", "--env-id", "procgen-jumper-v0", "--total-timesteps", 32))
    assert "warning: the teacher was trained on ninja, not on jumper" in capsys.readouterr().err


@by_script
def test_without_procgen_or_its_libraries(folder, capsys, monkeypatch, script):
    """One line that says what to install; and what is no Procgen needs none of it."""
    make_game_file("t.pt", ppd_procgen, "coinrun")
    module = SCRIPTS[script]

    def missing(*arguments, **options):
        raise OSError("libGL.so.1: cannot open shared object file: No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr("procgen.ProcgenGym3Env", missing)
        check_refused(capsys, module, command(script), "libGL.so.1", "apt install libgl1 libglib2.0-0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "procgen", None)
        check_refused(capsys, module, command(script), "Procgen", "pip install procgen")
        if script == "teach":
            run(module, ["--env-id", "InvertedPendulum-v4", "--total-timesteps", 1, *SMALL])
