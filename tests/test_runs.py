"""Whole runs: the user's two lines, what a run leaves behind, the same seed the same bits, signals, kills, --resume."""

import collections
import hashlib
import itertools
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from helpers import kill_at_random_moments, make_policy_file, result_of, strike
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import ppd_continuous
import train_teacher

ENV = "InvertedPendulum-v4"
SCRIPTS = {"teach": train_teacher, "distill": ppd_continuous}
FILES = {"teach": "teacher.pt", "distill": "student.pt"}
BATCH = 64  # of the runs here, 2 environments by 32 steps, in 4 minibatches and 2 epochs
SMALL = "--num-envs 2 --num-steps 32 --minibatch-size 16 --update-epochs 2 --eval-episodes 2 --env-threads 1".split()
LOSSES = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
by_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """Event files are read in the order of their names; those of one second and process end in a counter, as text."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


@pytest.fixture
def teacher(folder):
    return make_policy_file("t.pt", ppd_continuous)


def command(script, *arguments):
    what = ["--env-id", ENV, "--size", "smaller"] if script == "teach" else ["--teacher", "t.pt"]
    return [*what, *SMALL, *map(str, arguments)]


def main(script, arguments):
    SCRIPTS[script].main(SCRIPTS[script].parse_args([str(argument) for argument in arguments]))


def run(script, *arguments):
    return helpers.run(SCRIPTS[script], command(script, *arguments))


def launch(script, arguments, **options):
    """A run in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, SCRIPTS[script].__file__, *map(str, arguments)]
    return subprocess.Popen(line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def load(path):
    return ppd_continuous.read_file(path)


def step_of(made):
    return load(made / "checkpoint.pt")["progress"]["global_step"]


def digest(policy):
    sha = hashlib.sha256()
    for part in ("actor", "critic"):
        for name, tensor in policy[part].items():
            sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def curves(made):
    accumulator = EventAccumulator(str(made), size_guidance={"scalars": 0}).Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def steps(made, tag="losses/value_loss"):
    return [event.step for event in curves(made)[tag]]


def send(number):
    return lambda: os.kill(os.getpid(), number)


# --- WHAT A RUN LEAVES ---


def test_the_users_lines(folder, capsys):
    """Train, distill: each script alone in an empty folder. Then the student as a teacher, and an evaluation only."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    output = {}
    for script, arguments in (("teach", ["--save-path", "../t.pt"]), ("distill", ["--student-size", "larger"])):
        os.mkdir(script)
        shutil.copy(SCRIPTS[script].__file__, script)
        arguments = command(script, *arguments, "--total-timesteps", 100)
        arguments = ["../t.pt" if argument == "t.pt" else argument for argument in arguments]
        line = [sys.executable, os.path.basename(SCRIPTS[script].__file__), *arguments]
        done = subprocess.run(line, cwd=script, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr and "Traceback" not in done.stderr
        output[script] = done.stdout
    (taught,), (distilled,) = folder.glob("teach/runs/*"), folder.glob("distill/runs/*")
    assert re.fullmatch(rf"{ENV}__train_teacher__100__\d+", taught.name)
    assert re.fullmatch(rf"{ENV}__ppd_continuous__100__\d+", distilled.name)
    for made, files in ((taught, []), (distilled, ["student.pt"])):
        names = sorted(path.name for path in made.iterdir())
        assert [name for name in names if not name.startswith("events.")] == ["checkpoint.pt", "result.json", *files]
    assert sorted(os.listdir("distill")) == ["ppd_continuous.py", "runs"]
    assert "python ppd_continuous.py --env-id InvertedPendulum-v4 --teacher ../t.pt" in output["teach"]

    result, student, sha = result_of(distilled), load(distilled / "student.pt"), hashlib.sha256()
    sha.update(pathlib.Path("t.pt").read_bytes())
    expected = dict(script="ppd_continuous.py", suite="continuous", env_id=ENV, seed=100, student_size="larger")
    expected |= dict(global_step=128, teacher_sha256=sha.hexdigest(), eval_curve=[])  # 100, to whole rollouts
    assert expected.items() <= result.items()
    assert result["sps"] > 0 and result["wall_seconds"] > 0
    assert result["args"]["num_envs"] == 2 and result["args"]["gamma"] == 0.999
    assert result["versions"]["torch"] == torch.__version__
    for name in ("teacher", "student"):
        score = result[name]
        assert set(score) == {"mean", "std", "episodes", "returns"}
        assert score["episodes"] == len(score["returns"]) == 2
        assert score["mean"] == pytest.approx(np.mean(score["returns"]))
        assert score["std"] == pytest.approx(np.std(score["returns"]))
        assert f"{name}: {score['mean']:.1f} ± {score['std']:.1f} over 2 episodes" in output["distill"]
    assert result["ratio"] == result["student"]["mean"] / result["teacher"]["mean"]
    assert f"student / teacher: {result['ratio']:.3f}" in output["distill"]
    assert student["score"] == result["student"] and student["global_step"] == 128
    assert student["network"]["actor_hidden"] == [512, 512]
    assert result_of(taught)["teacher"] == load("t.pt")["score"] and result_of(taught)["size"] == "smaller"

    (own,) = [float(line.split()[1]) for line in output["teach"].splitlines() if line.startswith("teacher: ")]
    assert own == pytest.approx(result["teacher"]["mean"], abs=0.05)  # the same seed, the same evaluation
    os.chdir(folder)
    shutil.copy(distilled / "student.pt", "t.pt")
    again = run("distill", "--total-timesteps", 64)
    assert load(again / "student.pt")["network"] == student["network"]
    assert result_of(again)["teacher"] == result["student"]
    only = run("distill", "--total-timesteps", 0)
    assert sorted(path.name.split(".")[0] for path in only.iterdir()) == ["events", "result"]
    assert result_of(only)["teacher"] == result["student"]
    assert not {"student", "ratio"} & set(result_of(only)) and result_of(only)["global_step"] == 0


@by_script
def test_curves(teacher, script):
    made = run(script, "--total-timesteps", 5 * BATCH, "--eval-interval", 2 * BATCH)
    read = curves(made)
    names = {f"losses/{name}" for name in LOSSES} | {"charts/SPS"}
    names |= {"losses/distill_kl", "charts/distill_lambda"} if script == "distill" else set()
    events = {"charts/episodic_return", "charts/episodic_length", "charts/eval_return"}
    assert set(read) == names | events
    for name in names:
        assert [event.step for event in read[name]] == [BATCH * i for i in range(1, 6)]
        assert np.isfinite([event.value for event in read[name]]).all()
    episodes = [event.step for event in read["charts/episodic_return"]]
    assert episodes == [BATCH * i for i in range(1, 6)]  # the mean of the episodes that end in a rollout
    assert episodes == [event.step for event in read["charts/episodic_length"]]
    curve = result_of(made)["eval_curve"]
    assert [point[0] for point in curve] == [event.step for event in read["charts/eval_return"]] == [128, 256]
    assert [point[1] for point in curve] == pytest.approx([event.value for event in read["charts/eval_return"]])


def test_lambda_is_annealed(teacher):
    made = run("distill", "--total-timesteps", 4 * BATCH, "--distill-lambda", 2, "--distill-lambda-end", 0.5)
    read = curves(made)["charts/distill_lambda"]
    assert [event.value for event in read] == pytest.approx([1.625, 1.25, 0.875, 0.5])


def test_no_ratio_of_negative_scores(folder, capsys):
    path = make_policy_file("t.pt", ppd_continuous, env_id="Pendulum-v1")
    main("distill", ["--teacher", path, *SMALL, "--total-timesteps", BATCH])
    (made,) = folder.glob("runs/*")
    result, output = result_of(made), capsys.readouterr().out
    assert result["teacher"]["mean"] < 0 and result["ratio"] is None and "positive" in result["ratio_reason"]
    assert "not positive" in output and "_reason" not in output


def test_teacher_noise(folder, monkeypatch):
    make_policy_file("t.pt", ppd_continuous, hidden=[100, 100])
    noisy, original = [], ppd_continuous.add_noise
    monkeypatch.setattr(ppd_continuous, "add_noise", lambda *rest: noisy.append(original(*rest)) or noisy[-1])
    clean = result_of(run("distill", "--total-timesteps", 0))
    for seed in (100, 100, 200):
        last = run("distill", "--total-timesteps", BATCH, "--teacher-noise", 0.05, "--seed", seed)
        if seed == 100:
            result = result_of(last)
    assert result["original_teacher"] == clean["teacher"] != result["teacher"]
    assert result["ratio"] == result["student"]["mean"] / result["teacher"]["mean"]
    assert result["ratio_original"] == result["student"]["mean"] / result["original_teacher"]["mean"]
    before, (first, second, other) = load("t.pt")["actor"], [ppd_continuous.plain(actor) for actor in noisy]
    noise = torch.cat([(first[name] - before[name]).flatten() for name in first if "obs_" not in name])
    assert len(noise) > 10_000
    assert noise.std().item() == pytest.approx(0.05, rel=0.03) and abs(noise.mean()) < 0.002
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], before[name]) for name in first if "obs_" in name)
    assert not torch.equal(first["mean.0.weight"], other["mean.0.weight"])
    assert torch.equal(load(last / "student.pt")["actor"]["obs_rms.mean"], before["obs_rms.mean"])


# --- THE SAME SEED ---


def busy():
    while True:
        pass


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_same_seed_same_bits(teacher):
    """In two processes, while another keeps a core busy, with and without evaluations, by one thread and by two."""
    loop = multiprocessing.get_context("fork").Process(target=busy)
    loop.start()
    try:
        for name, more in (("a", []), ("b", ["--env-threads", "2", "--eval-interval", BATCH])):
            process = launch("distill", command("distill", "--total-timesteps", 4 * BATCH, "--save-path", name, *more))
            assert process.wait() == 0, process.communicate()[1]
            process.communicate()
    finally:
        loop.kill()
    assert digest(load("a")) == digest(load("b"))
    assert load("a")["score"] == load("b")["score"]


@by_script
def test_seed_and_evaluations(teacher, script):
    digests = {}
    for name, more in {"plain": [], "evals": ["--eval-interval", BATCH], "seed": ["--seed", 7]}.items():
        run(script, "--total-timesteps", 3 * BATCH, "--save-path", name, *more)
        digests[name] = digest(load(name))
    assert digests["plain"] == digests["evals"] != digests["seed"]


# --- SIGNALS ---

MOMENTS = {  # (owner of a function, its name, the call in which the signal comes, steps of the state that is saved)
    "first rollout": ("ParallelEnvs", "step", 5, 0),
    "first update": (None, "ppo_loss", 3, 0),
    "rollout": ("ParallelEnvs", "step", 2 * 32 + 20, 2 * BATCH),
    "last step of a rollout": ("ParallelEnvs", "step", 3 * 32, 2 * BATCH),
    "update": (None, "ppo_loss", 2 * 8 + 4, 2 * BATCH),
    "last minibatch": (None, "ppo_loss", 3 * 8, 3 * BATCH),
    "final evaluation": ("ParallelEnvs", "step", 4 * 32 + 2, 4 * BATCH),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@by_script
def test_signal_and_resume(teacher, capsys, monkeypatch, script, number, moment):
    owner, name, count, saved = MOMENTS[moment]
    total = 4 * BATCH
    with monkeypatch.context() as patch:
        module = SCRIPTS[script]
        strike(patch, getattr(module, owner) if owner else module, name, count, send(number))
        with pytest.raises(SystemExit) as stop:
            run(script, "--total-timesteps", total)
    assert stop.value.code == 128 + number
    (made,) = pathlib.Path("runs").iterdir()
    assert f"  python {module.SCRIPT} --resume {made}\n" in capsys.readouterr().err
    assert step_of(made) == saved and not (made / "result.json").exists()
    interrupted = time.time()
    os.remove("t.pt")  # the training state keeps the teacher
    main(script, ["--resume", made])
    assert len(list(pathlib.Path("runs").iterdir())) == 1
    assert result_of(made)["global_step"] == load(made / FILES[script])["global_step"] == step_of(made) == total
    read = curves(made)
    for tag in ("losses/value_loss", "charts/SPS"):
        assert [event.step for event in read[tag]] == list(range(BATCH, total + 1, BATCH))
    episodes = read["charts/episodic_return"]
    assert [event.step for event in episodes] == sorted(event.step for event in episodes)
    for event in episodes:  # none of a dropped rollout is left, none of a kept one is lost
        assert (event.wall_time < interrupted) == (event.step <= saved)
    assert bool(saved) == any(event.step <= saved for event in episodes)


def test_signal_during_an_evaluation(teacher, monkeypatch):
    """The evaluation is not lost: the curve has no gap."""
    with monkeypatch.context() as patch:
        strike(patch, ppd_continuous.ParallelEnvs, "step", 2 * 32 + 3, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("distill", "--total-timesteps", 4 * BATCH, "--eval-interval", 2 * BATCH)
    (made,) = pathlib.Path("runs").iterdir()
    assert step_of(made) <= 2 * BATCH
    main("distill", ["--resume", made])
    assert steps(made) == [BATCH * i for i in range(1, 5)]
    assert steps(made, "charts/eval_return") == [2 * BATCH, 4 * BATCH]
    assert [point[0] for point in result_of(made)["eval_curve"]] == [2 * BATCH, 4 * BATCH]


def test_signal_during_the_evaluation_of_a_teacher(teacher, monkeypatch):
    """There is no student then, and none after --resume."""
    with monkeypatch.context() as patch:
        strike(patch, ppd_continuous.ParallelEnvs, "step", 3, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("distill", "--total-timesteps", 0)
    (made,) = pathlib.Path("runs").iterdir()
    main("distill", ["--resume", made])
    assert "teacher" in result_of(made) and not {"student", "ratio"} & set(result_of(made))
    assert not (made / "student.pt").exists()


@by_script
def test_sigusr1_saves_and_goes_on(teacher, monkeypatch, script):
    module, saves, original = SCRIPTS[script], [], SCRIPTS[script].save_atomically

    def save(path, write):
        original(path, write)
        if path.endswith("checkpoint.pt"):
            saves.append(load(path)["progress"]["global_step"])

    monkeypatch.setattr(module, "save_atomically", save)
    strike(monkeypatch, module, "ppo_loss", 12, send(signal.SIGUSR1))
    made = run(script, "--total-timesteps", 4 * BATCH)
    assert saves == [2 * BATCH, 4 * BATCH]
    assert result_of(made)["global_step"] == 4 * BATCH


@by_script
def test_second_signal_quits(script):
    signals = SCRIPTS[script].Signals()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.stop == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def wait_for(condition, process):
    until = time.time() + 120
    while not condition():
        assert process.poll() is None and time.time() < until, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.parametrize("script, number", [("teach", signal.SIGTERM), ("distill", signal.SIGINT)])
def test_signal_at_a_random_moment(teacher, script, number):
    process = launch(script, command(script, "--total-timesteps", 10**8, "--checkpoint-interval", 10**7))
    wait_for(lambda: list(pathlib.Path(".").glob("runs/*/events.*")), process)
    time.sleep(1 + random.random())
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error and "--resume runs/" in error
    (made,) = pathlib.Path("runs").iterdir()
    saved = step_of(made)
    main(script, ["--resume", made, "--total-timesteps", saved + 2 * BATCH, "--eval-episodes", 1])
    assert steps(made) == list(range(BATCH, saved + 2 * BATCH + 1, BATCH))


def test_kill_9_at_random_moments(teacher):
    arguments = command("distill", "--total-timesteps", 10**8, "--checkpoint-interval", BATCH)
    made, reached = kill_at_random_moments(ppd_continuous, arguments, 3)
    time.sleep(1)  # so that the next event file's name is later
    main("distill", ["--resume", made, "--total-timesteps", reached + BATCH, "--eval-episodes", 1])
    assert steps(made) == list(range(BATCH, reached + BATCH + 1, BATCH))
    episodes = collections.Counter(steps(made, "charts/episodic_return"))
    assert max(episodes.values()) <= 2  # environments


# --- RESUME ---


@by_script
def test_resume_with_other_arguments(teacher, capsys, script):
    made = run(script, "--total-timesteps", 2 * BATCH, "--eval-interval", 0)
    before = {path: path.read_bytes() for path in made.iterdir()}
    for flag, value in (("--seed", 1), ("--num-envs", 3), ("--save-path", "x.pt"), ("--learning-rate", 0.1)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(script, ["--resume", made, flag, value])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and flag in error
    assert {path: path.read_bytes() for path in made.iterdir()} == before
    main(script, ["--resume", made / "checkpoint.pt", "--seed", 100, "--total-timesteps", 4 * BATCH])
    assert result_of(made)["global_step"] == step_of(made) == 4 * BATCH
    assert steps(made) == [BATCH * i for i in range(1, 5)]


@by_script
def test_resume_of_a_finished_run_only_evaluates(teacher, monkeypatch, script):
    made = run(script, "--total-timesteps", 2 * BATCH)
    policy, result, state = load(made / FILES[script]), result_of(made), (made / "checkpoint.pt").read_bytes()
    strike(monkeypatch, torch.optim.Adam, "step", 1, lambda: pytest.fail("it trains"))
    for more in ([], ["--total-timesteps", 0]):
        main(script, ["--resume", made, "--eval-episodes", 2, *more])
        assert digest(load(made / FILES[script])) == digest(policy)
        assert load(made / FILES[script])["score"] == policy["score"]
        again = result_of(made)
        assert all(again[name] == result[name] for name in ("global_step", "teacher", "env_id", "eval_curve"))
        assert (made / "checkpoint.pt").read_bytes() == state
    assert steps(made) == [BATCH, 2 * BATCH]


@by_script
def test_resume_writes_a_policy_that_lags_behind(teacher, script):
    """The run was stopped between its last training state and its policy file, which is that of an earlier end."""
    made = run(script, "--total-timesteps", 2 * BATCH)
    old = (made / FILES[script]).read_bytes()
    main(script, ["--resume", made, "--total-timesteps", 4 * BATCH])
    policy = load(made / FILES[script])
    (made / FILES[script]).write_bytes(old)
    main(script, ["--resume", made, "--total-timesteps", 0, "--eval-episodes", 0])
    assert digest(load(made / FILES[script])) == digest(policy) and policy["global_step"] == 4 * BATCH


def test_evaluation_of_a_teacher_writes_no_policy(teacher):
    pathlib.Path("there.pt").write_text("precious")
    for path in ("there.pt", "new/student.pt"):
        run("distill", "--total-timesteps", 0, "--save-path", path)
    assert pathlib.Path("there.pt").read_text() == "precious" and not os.path.exists("new")


def test_resume_without_the_teachers_file_writes_its_own(teacher):
    """The run has written its --save-path already, and the teacher is gone."""
    made = run("distill", "--total-timesteps", 2 * BATCH, "--save-path", "s.pt")
    os.remove("t.pt")
    main("distill", ["--resume", made, "--total-timesteps", 3 * BATCH])
    assert load("s.pt")["global_step"] == 3 * BATCH
    assert result_of(made)["teacher_sha256"]


@by_script
def test_resumed_optimizer_and_statistics(teacher, monkeypatch, script):
    """The state goes on where it was: momenta, statistics, generator, counters of the log."""
    made = run(script, "--total-timesteps", 2 * BATCH)
    state, seen = load(made / "checkpoint.pt"), []
    original = torch.optim.Adam.step

    def step(self, *arguments):
        if not seen:
            seen.append([self.state[parameter]["step"].item() for parameter in self.param_groups[0]["params"]])
            seen.append(self.state[self.param_groups[0]["params"][1]]["exp_avg"].clone())
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    main(script, ["--resume", made, "--total-timesteps", 3 * BATCH])
    assert set(seen[0]) == {16.0}  # 2 rollouts of 8 minibatches
    assert torch.equal(seen[1], state["optimizer"][1]["exp_avg"])
    after = load(made / "checkpoint.pt")
    assert after["progress"]["train_seconds"] > state["progress"]["train_seconds"] > 0
    assert not torch.equal(after["generator"], state["generator"])
    if script == "teach":
        counts = [load_["policy"]["actor"]["obs_rms.count"].item() for load_ in (state, after)]
        assert counts[0] == pytest.approx(2 + 2 * BATCH, abs=0.01) and counts[1] >= counts[0] + BATCH


# --- NUMBERS THAT ARE NOT FINITE ---


class Faulty(gym.Wrapper):
    """From the count-th step of all of these together, one that is NaN."""

    calls, count, quantity = 0, 0, ""

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        Faulty.calls += 1
        if Faulty.calls == Faulty.count:
            obs, reward = (obs, np.nan) if Faulty.quantity == "reward" else (obs * np.nan, reward)
        return obs, reward, *rest


@pytest.mark.parametrize("quantity", ["observation", "reward", "loss or gradient", "weight"])
@by_script
def test_non_finite_stops_the_run(teacher, capsys, script, quantity):
    """In the third rollout, or the third update; the training state of the step before stays as it is."""
    module, in_rollout, kept = SCRIPTS[script], quantity in ("observation", "reward"), []

    def keep():
        kept.extend(path.read_bytes() for path in pathlib.Path(".").glob("runs/*/checkpoint.pt"))

    with pytest.MonkeyPatch.context() as patch:
        if in_rollout:
            make_env = module.make_env
            patch.setattr(module, "make_env", lambda env_id: Faulty(make_env(env_id)))
            Faulty.calls, Faulty.count, Faulty.quantity = 0, 2 * BATCH + 11, quantity
            strike(patch, module.ParallelEnvs, "step", 2 * 32 + 1, keep)
        else:
            loss, calls = module.ppo_loss, itertools.count(1)
            strike(patch, module, "ppo_loss", 2 * 8 + 1, keep)
        if quantity == "loss or gradient":
            patch.setattr(module, "ppo_loss", lambda *a: loss(*a) * (np.nan if next(calls) == 2 * 8 + 3 else 1))
            strike(patch, module, "ppo_loss", 2 * 8 + 1, keep)
        elif quantity == "weight":
            original = torch.optim.Adam.step

            def step(self, *arguments):
                original(self, *arguments)
                if next(calls) == 2 * 8 + 3:
                    self.param_groups[0]["params"][1].data[0, 0] = torch.nan

            patch.setattr(torch.optim.Adam, "step", step)
        with pytest.raises(SystemExit) as stop:
            run(script, "--total-timesteps", 6 * BATCH, "--checkpoint-interval", BATCH)
    code, error = stop.value.code, capsys.readouterr().err
    if isinstance(code, str):  # Python prints it and exits with 1
        code, error = 1, error + code
    assert code == 1
    errors = [line for line in error.splitlines() if "error" in line]
    at = f"at step {2 * BATCH + 10}" if in_rollout else f"at step {3 * BATCH}"
    assert len(errors) == 1 and f"non-finite {'loss or gradient' if quantity == 'weight' else quantity}" in errors[0]
    assert at in errors[0] and "Traceback" not in error
    (made,) = pathlib.Path("runs").iterdir()
    assert step_of(made) == 2 * BATCH and (made / "checkpoint.pt").read_bytes() == kept[0]
    assert not (made / FILES[script]).exists() and not (made / "result.json").exists()
    main(script, ["--resume", made, "--total-timesteps", 4 * BATCH])  # the cause is gone
    assert steps(made) == [BATCH * i for i in range(1, 5)]
