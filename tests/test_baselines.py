"""student_distill.py and teacher_distill.py on all three suites: their loss in float64, who acts and how often the
teacher is asked, whole runs, refusals. What they share to the letter with the other scripts is tested there."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    check_refused,
    independent_cnn,
    kill_at_random_moments,
    make_game_file,
    make_policy_file,
    result_of,
    run,
    same_bits,
    strike,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import student_distill
import teacher_distill

ENVS = {"continuous": "InvertedPendulum-v4", "atari": "BreakoutNoFrameskip-v4", "procgen": "starpilot"}
BATCH = 6  # of the runs here, 2 environments by 3 steps
SMALL = "--num-envs 2 --num-steps 3 --eval-episodes 0 --eval-interval 0 --env-threads 1 --teacher t.pt".split()


class Case:
    """A script in an environment of a suite."""

    def __init__(self, module, suite):
        self.module, self.suite, self.student_acts = module, suite, module is student_distill
        self.continuous = suite == "continuous"
        names = {"continuous": "ParallelEnvs", "atari": "AtariEnvs", "procgen": "ProcgenEnvs"}
        self.envs = getattr(module, names[suite])

    def make_teacher(self, **changes):
        """The file t.pt."""
        make = make_policy_file if self.continuous else make_game_file
        return load(make("t.pt", self.module, ENVS[self.suite], **changes))

    def run(self, *arguments):
        return run(self.module, [*SMALL, *arguments])

    def resume(self, *arguments):
        self.module.main(self.module.parse_args(["--resume", *map(str, arguments)]))


CASES = [Case(*case) for case in itertools.product((student_distill, teacher_distill), ENVS)]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.module.__name__}-{case.suite}")
SMALL_CASES = [case for case in CASES if case.continuous]
by_script = pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.module.__name__)  # continuous only


def load(path):
    return student_distill.read_file(path)


class Recorder:
    """What a run does: the passes of its networks, the actions of its environments, its gradient steps, in order."""

    def __init__(self, monkeypatch, case):
        self.events, self.loaded = [], []
        module = case.module
        load_policy, step, clip = module.load_policy, case.envs.step, torch.nn.utils.clip_grad_norm_
        adam_step = torch.optim.Adam.step

        def recorded_load(*arguments):
            self.loaded.append(load_policy(*arguments))
            return self.loaded[-1]

        def recorded_step(envs, actions, active=True):
            self.events.append(("act", actions.copy()))
            return step(envs, actions, active)

        def recorded_clip(parameters, *rest, **kwargs):
            weights = [parameter.detach().clone() for parameter in parameters]
            self.events.append(("gradients", weights, [parameter.grad.clone() for parameter in parameters]))
            return clip(parameters, *rest, **kwargs)

        def recorded_adam(*arguments, **kwargs):
            self.events.append(("optimize",))
            return adam_step(*arguments, **kwargs)

        for name in ("MlpActor", "MlpCritic", "CnnActor", "CnnCritic"):
            network_class = getattr(module, name)

            def recorded_forward(network, obs, forward=network_class.forward):
                output = forward(network, obs)
                self.events.append(("pass", network, obs.clone(), output, torch.is_grad_enabled()))
                return output

            monkeypatch.setattr(network_class, "forward", recorded_forward)
        monkeypatch.setattr(module, "load_policy", recorded_load)
        monkeypatch.setattr(case.envs, "step", recorded_step)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
        monkeypatch.setattr(torch.optim.Adam, "step", recorded_adam)

    def passes(self, network=None, gradient=None):
        """(obs, output) of the passes of a network: of the student's, where None."""
        teachers = [id(part) for part in self.loaded[0][:2]]
        found = []
        for event in self.events:
            if event[0] == "pass" and (gradient is None or event[4] == gradient):
                is_it = event[1] is network if network else id(event[1]) not in teachers
                found += [event[1:4]] * is_it
        return found


# --- LOSS ---


@by_case
def test_gradient_of_the_update(folder, monkeypatch, case):
    """In the midst of a run it is that of the formula in float64, by networks of another making."""
    teacher, recorder = case.make_teacher(), Recorder(monkeypatch, case)
    made = case.run("--total-timesteps", 5 * BATCH, "--ent-coef", 0.03, "--vf-coef", 0.4, "--learning-rate", 0.01)
    student = load(made / "student.pt")
    statistics = [name for name in student["actor"] if name.startswith("obs_")]
    assert len(statistics) == (5 if case.continuous else 0)
    assert all(torch.equal(student["actor"][name], teacher["actor"][name]) for name in statistics)
    _, weights, gradients = [event for event in recorder.events if event[0] == "gradients"][-1]
    names = [("actor", name) for name in student["actor"] if name not in statistics]
    names += [("critic", name) for name in student["critic"]]
    weights = [weight.double().requires_grad_() for weight in weights]
    student = dict(zip(names, weights, strict=True))
    theirs = {(part, name): tensor.double() for part in ("actor", "critic") for name, tensor in teacher[part].items()}
    (_, obs, _) = recorder.passes(gradient=True)[-1]
    assert len(obs) == BATCH

    def policy_and_value(parameters):
        def part(which, prefix):
            return {
                name[len(prefix) + 1 :]: tensor
                for (owner, name), tensor in parameters.items()
                if owner == which and name.startswith(prefix)
            }

        if not case.continuous:
            logits = independent_cnn("nature", part("actor", "logits"), obs)
            return Categorical(logits=logits), independent_cnn("nature", part("critic", "value"), obs).flatten()
        outputs = []
        for layers in (part("actor", "mean"), part("critic", "value")):
            x, numbers = obs.double(), sorted({int(name.split(".")[0]) for name in layers})
            for i in numbers:
                x = x @ layers[f"{i}.weight"].T + layers[f"{i}.bias"]
                x = x.clamp(min=0) if i != numbers[-1] else x
            outputs.append(x)
        std = parameters["actor", "logstd"].exp().expand(outputs[0].shape)
        return Independent(Normal(outputs[0], std), 1), outputs[1].flatten()

    (policy, values), (teacher_policy, teacher_values) = policy_and_value(student), policy_and_value(theirs)
    kl = kl_divergence(teacher_policy, policy).mean()
    loss = kl - 0.03 * policy.entropy().mean() + 0.4 * ((values - teacher_values) ** 2).mean()
    loss.backward()
    assert kl > 1e-4
    for weight, gradient in zip(weights, gradients, strict=True):
        atol = 1e-4 * weight.grad.abs().max().item()
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-3, atol=atol)


@by_case
def test_student_that_equals_its_teacher_does_not_move(folder, monkeypatch, case):
    teacher = case.make_teacher()
    make_networks = case.module.make_networks

    def make_equal_networks(network, generator=None):
        actor, critic = made = make_networks(network, generator)
        if generator:
            actor.load_state_dict(teacher["actor"])
            critic.load_state_dict(teacher["critic"])
        return made

    monkeypatch.setattr(case.module, "make_networks", make_equal_networks)
    made = case.run("--total-timesteps", BATCH)
    student, logged = load(made / "student.pt"), curves(made)
    assert abs(logged["losses/distill_kl"][-1][1]) < 1e-5 and logged["losses/value_loss"][-1][1] < 1e-10
    for part in ("actor", "critic"):  # a gradient moves a weight by 3e-4, the learning rate, and its rounding by less
        for name, tensor in student[part].items():
            torch.testing.assert_close(tensor, teacher[part][name], rtol=0, atol=3e-5)


@by_script
def test_student_learns(folder, case):
    """KL to the teacher falls tenfold, and the value error, too."""
    case.make_teacher(hidden=[8, 8])
    arguments = ["--num-envs", 18, "--num-steps", 5, "--learning-rate", 0.002, "--total-timesteps", 40_000]
    logged = curves(case.run(*arguments))
    for name in ("losses/distill_kl", "losses/value_loss"):
        values = [value for _, value in logged[name]]
        assert values[-1] < 0.1 * values[0]


# --- WHO ACTS ---


@by_case
def test_order_of_a_run(folder, monkeypatch, case):
    """Rollout, one gradient step, rollout, …; the teacher is asked once for each observation, and has no gradient."""
    teacher, recorder = case.make_teacher(), Recorder(monkeypatch, case)
    case.run("--total-timesteps", 4 * BATCH)
    kinds = [event[0] for event in recorder.events if event[0] != "pass"]
    assert kinds == (["act"] * 3 + ["gradients", "optimize"]) * 4
    teacher_actor, teacher_critic, _ = recorder.loaded[0]
    seen = {}
    for network, part in ((teacher_actor, "actor"), (teacher_critic, "critic")):
        passes = recorder.passes(network)
        assert sum(len(obs) for _, obs, _ in passes) == 4 * BATCH
        seen[part] = torch.cat([obs for _, obs, _ in passes])
        assert not any(output[0].requires_grad for _, _, output in passes)
        assert not any(parameter.grad is not None for parameter in network.parameters())
        assert same_bits(network.state_dict(), teacher[part])
    assert torch.equal(seen["actor"], seen["critic"])
    trained = [obs for network, obs, _ in recorder.passes(gradient=True) if "Actor" in type(network).__name__]
    assert torch.equal(torch.cat(trained), seen["actor"])
    acted = sum(len(obs) for _, obs, _ in recorder.passes(gradient=False))
    assert acted == (4 * BATCH if case.student_acts else 0)


@by_case
def test_who_acts(folder, monkeypatch, case):
    """The actions of a teacher that is sure of them are those of teacher_distill, and not those of student_distill."""
    teacher = case.make_teacher()
    if case.continuous:
        teacher["actor"]["logstd"][:] = -15
    else:
        teacher["actor"]["logits.head.weight"] *= 1e4
    case.module.save_atomically("t.pt", lambda file: torch.save(teacher, file))
    recorder = Recorder(monkeypatch, case)
    case.run("--total-timesteps", 10 * BATCH)
    actions = torch.from_numpy(np.concatenate([event[1] for event in recorder.events if event[0] == "act"]))
    _, obs, outputs = zip(*recorder.passes(recorder.loaded[0][0]), strict=True)
    outputs = torch.cat([output[0] if case.continuous else output for output in outputs])
    sure = outputs if case.continuous else outputs.argmax(-1)
    if case.student_acts:
        assert not torch.isclose(actions, sure, atol=1e-3).all(-1).all()
        if case.continuous:  # a new student's standard deviation is 1
            means = torch.cat([output[0] for _, _, output in recorder.passes(gradient=False)])
            assert 0.7 < (actions - means).std() < 1.3
        else:  # and its actions are nearly equally probable
            assert torch.bincount(actions).min() > 0
    else:
        torch.testing.assert_close(actions, sure, rtol=0, atol=1e-4)


@by_case
def test_actions_are_samples(folder, monkeypatch, case):
    """Of the policy of the one who acts: to four standard deviations of their mean or frequencies."""
    case.make_teacher()
    recorder = Recorder(monkeypatch, case)
    case.run("--total-timesteps", 2000, "--num-steps", 50)
    actions = torch.from_numpy(np.concatenate([event[1] for event in recorder.events if event[0] == "act"]))
    passes = recorder.passes(gradient=False) if case.student_acts else recorder.passes(recorder.loaded[0][0])
    outputs = [output for _, _, output in passes]
    if case.continuous:
        means, logstd = torch.cat([mean for mean, _ in outputs]), torch.stack([logstd for _, logstd in outputs])
        noise = (actions - means) / logstd.repeat_interleave(2, 0).exp()
        assert noise.mean().abs() < 4 / 2000**0.5 and (noise.std() - 1).abs() < 4 / 4000**0.5
    else:
        probabilities = torch.cat(outputs).softmax(-1).double()
        counts = torch.bincount(actions, minlength=probabilities.shape[1])
        variance = (probabilities * (1 - probabilities)).sum(0)
        assert ((counts - probabilities.sum(0)).abs() < 4 * variance.sqrt()).all()


@by_case
def test_teacher_noise(folder, monkeypatch, case):
    """It reaches the teacher's actor and critic, and is the same for the same seed."""
    teacher = case.make_teacher()
    noisy = []
    for seed in (1, 1, 2):
        recorder = Recorder(monkeypatch, case)
        case.run("--total-timesteps", BATCH, "--teacher-noise", 0.5, "--seed", seed)
        originals = [id(part) for part in recorder.loaded[0][:2]]
        networks = [event[1] for event in recorder.events if event[0] == "pass" and not event[4]]
        networks = [network for network in networks if id(network) not in originals]
        parts = {"Actor" in type(network).__name__: network.state_dict() for network in networks}
        if case.student_acts:  # whose own passes come before its teacher's
            assert len({id(network) for network in networks}) == 3
        noisy.append(parts)
    assert same_bits(noisy[0][False], noisy[1][False]) and not same_bits(noisy[0][False], noisy[2][False])
    for part, is_actor in (("actor", True), ("critic", False)):
        name = next(name for name in noisy[0][is_actor] if name.endswith("weight"))
        assert 0.3 < (noisy[0][is_actor][name] - teacher[part][name]).std() < 0.7


@by_script
def test_scores_with_teacher_noise(folder, case):
    """The noisy and the original teacher are both measured, and there is a ratio for each."""
    case.make_teacher(hidden=[100, 100])
    clean = result_of(case.run("--total-timesteps", 0, "--eval-episodes", 2))
    result = result_of(case.run("--total-timesteps", BATCH, "--eval-episodes", 2, "--teacher-noise", 0.05))
    assert result["original_teacher"] == clean["teacher"] != result["teacher"]
    assert result["ratio"] == result["student"]["mean"] / result["teacher"]["mean"]
    assert result["ratio_original"] == result["student"]["mean"] / result["original_teacher"]["mean"]


# --- RUNS ---


def curves(made):
    accumulator = EventAccumulator(str(made), size_guidance={"scalars": 0}).Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


@by_case
def test_the_users_lines(folder, case):
    """Distill in a process of its own, with episodes at the end; the student is a teacher, too."""
    case.make_teacher()

    def launch(*arguments):
        line = [sys.executable, case.module.__file__, *SMALL, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for word in ("Warning", "Traceback", "Gym"):
            assert word not in done.stderr + done.stdout
        return done.stdout

    more = ["--student-size", "smaller", "--amp", "--eval-episodes", 2, "--eval-interval", 10]
    distilled = launch("--env-id", ENVS[case.suite], "--total-timesteps", 20, *more)
    (made,) = pathlib.Path("runs").iterdir()
    result, script = result_of(made), case.module.SCRIPT
    assert made.name.startswith(f"{ENVS[case.suite]}__{script[:-3]}__100__")
    assert dict(script=script, suite=case.suite, student_size="smaller", global_step=24).items() <= result.items()
    own = result["student"]["test"] if case.suite == "procgen" else result["student"]
    assert [step for step, _, _ in result["eval_curve"]] == [12, 24] and result["eval_curve"][1][1] == own["mean"]
    for name in ("teacher", "student"):
        score = result[name]["test"] if case.suite == "procgen" else result[name]
        assert score["episodes"] == len(score["returns"]) == 2
        assert f"{name}: {score['mean']:.1f} ± {score['std']:.1f} over 2 episodes" in distilled
    assert "student / teacher: " in distilled
    student = load(made / "student.pt")
    assert student["score"] == result["student"] and student["suite"] == case.suite
    assert student["network"]["actor_hidden"] == ([128, 64] if case.continuous else [32, 32, 32, 128])
    os.replace(made / "student.pt", "t.pt")
    launch("--total-timesteps", 0, "--eval-episodes", 2)
    (only,) = set(pathlib.Path("runs").iterdir()) - {made}
    assert result_of(only)["teacher"] == result["student"] and "student" not in result_of(only)


@by_script
def test_log(folder, case):
    """Every 50 gradient steps, and at the end; the returns of teacher_distill are named the teacher's."""
    case.make_teacher()
    made = case.run("--num-envs", 1, "--num-steps", 10, "--total-timesteps", 1230)
    logged, who = curves(made), "" if case.student_acts else "teacher_"
    assert [step for step, _ in logged["losses/distill_kl"]] == [500, 1000, 1230]
    names = {"losses/distill_kl", "losses/value_loss", "losses/entropy", "charts/SPS"}
    assert logged.keys() == names | {f"charts/{who}episodic_return", f"charts/{who}episodic_length"}


@by_script
def test_teacher_distill_evaluates_by_default(folder, case):
    case.make_teacher()
    arguments, intervals = ["--num-envs", 2, "--num-steps", 3, "--teacher", "t.pt", "--total-timesteps", BATCH], []
    for episodes in (0, 1):
        made = run(case.module, [*arguments, "--eval-episodes", episodes])
        intervals.append(result_of(made)["args"]["eval_interval"])
    case.resume(made, "--eval-episodes", 0)
    assert intervals == ([0, 0] if case.student_acts else [0, 250_000])


@by_case
def test_same_seed_same_bits(folder, case):
    """For any number of threads, and with evaluations on the way."""
    case.make_teacher()
    policies = {}
    evaluations = ["--eval-interval", 3 * BATCH, "--eval-episodes", 2]
    runs = {"a": [], "b": ["--env-threads", 2], "c": evaluations, "d": ["--seed", 7]}
    for name, more in runs.items():
        made = case.run("--total-timesteps", 8 * BATCH, "--save-path", name, *more)
        policies[name] = load(name)
        if more is evaluations:
            assert [step for step, _, _ in result_of(made)["eval_curve"]] == [3 * BATCH, 6 * BATCH]
    for part in ("actor", "critic"):
        assert same_bits(policies["a"][part], policies["b"][part])
        assert same_bits(policies["a"][part], policies["c"][part])
        assert not same_bits(policies["a"][part], policies["d"][part])


@pytest.mark.parametrize("number, place", [(signal.SIGINT, "step"), (signal.SIGTERM, "policy_kl")])
@by_case
def test_signal_and_resume(folder, capsys, monkeypatch, case, number, place):
    """What was begun is finished, which takes a moment, and saved."""
    case.make_teacher()
    owner, count = (case.envs, 2 * 3 + 2) if place == "step" else (case.module, 3)
    with monkeypatch.context() as patch:
        strike(patch, owner, place, count, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            case.run("--total-timesteps", 6 * BATCH)
    assert stop.value.code == 128 + number
    (made,) = pathlib.Path("runs").iterdir()
    assert f"  python {case.module.SCRIPT} --resume {made}\n" in capsys.readouterr().err
    assert load(made / "checkpoint.pt")["progress"]["global_step"] == 3 * BATCH
    os.remove("t.pt")  # the training state keeps the teacher
    case.resume(made)
    assert load(made / "student.pt")["global_step"] == result_of(made)["global_step"] == 6 * BATCH
    state = load(made / "checkpoint.pt")
    assert {entry["step"].item() for entry in state["optimizer"].values()} == {6.0}


@by_script
def test_signal_during_an_evaluation(folder, monkeypatch, case):
    """The resumed run makes up for it, and its curve is that of a run without a stop."""
    case.make_teacher()
    evaluations = ["--eval-interval", 2 * BATCH, "--eval-episodes", 2, "--total-timesteps", 6 * BATCH]
    whole = result_of(case.run(*evaluations))["eval_curve"]
    before = set(pathlib.Path("runs").iterdir())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        strike(patch, case.module, "evaluate", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        case.run(*evaluations)
    (made,) = set(pathlib.Path("runs").iterdir()) - before
    progress = load(made / "checkpoint.pt")["progress"]
    assert progress["global_step"] == 4 * BATCH and len(progress["eval_curve"]) == 1
    case.resume(made)
    for total in (6, 8):
        time.sleep(1.1)  # TensorBoard reads the files in the order of their names, which have the second
        case.resume(made, "--total-timesteps", total * BATCH)
    curve = result_of(made)["eval_curve"]
    assert [point[0] for point in whole] == [2 * BATCH, 4 * BATCH, 6 * BATCH] and curve[:2] == whole[:2]
    assert [point[0] for point in curve] == [2 * BATCH, 4 * BATCH, 6 * BATCH, 8 * BATCH]
    assert curves(made)["charts/eval_return"] == [(step, pytest.approx(mean)) for step, mean, _ in curve]


@by_script
def test_signal_during_the_final_evaluation(folder, monkeypatch, case):
    """Training is over and saved; the resumed run only evaluates."""
    case.make_teacher()
    arguments = ["--total-timesteps", 2 * BATCH, "--eval-episodes", 2]
    with monkeypatch.context() as patch:
        strike(patch, case.envs, "step", 2 * 3 + 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            case.run(*arguments)
    (made,) = pathlib.Path("runs").iterdir()
    trained = load(made / "student.pt")
    assert stop.value.code == 128 + signal.SIGINT and "score" not in trained and not (made / "result.json").exists()
    check_only_evaluates(monkeypatch, case, made, trained)


@by_script
def test_resume_of_a_finished_run_only_evaluates(folder, monkeypatch, case):
    case.make_teacher()
    made = case.run("--total-timesteps", 2 * BATCH)
    check_only_evaluates(monkeypatch, case, made, load(made / "student.pt"))


def check_only_evaluates(monkeypatch, case, made, trained):
    state = (made / "checkpoint.pt").read_bytes()
    strike(monkeypatch, torch.optim.Adam, "step", 1, lambda: pytest.fail("it trains"))
    case.resume(made, "--eval-episodes", 2)
    student, result = load(made / "student.pt"), result_of(made)
    for part in ("actor", "critic"):
        assert same_bits(student[part], trained[part])
    assert student["score"] == result["student"] and result["global_step"] == 2 * BATCH
    assert (made / "checkpoint.pt").read_bytes() == state


@by_script
def test_sigusr1_saves_and_goes_on(folder, monkeypatch, case):
    case.make_teacher()
    saves, save = [], case.module.save_atomically

    def recorded_save(path, write):
        save(path, write)
        if path.endswith("checkpoint.pt"):
            saves.append(load(path)["progress"]["global_step"])

    monkeypatch.setattr(case.module, "save_atomically", recorded_save)
    strike(monkeypatch, case.module, "policy_kl", 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    made = case.run("--total-timesteps", 4 * BATCH)
    assert saves == [2 * BATCH, 4 * BATCH] and result_of(made)["global_step"] == 4 * BATCH


@by_script
def test_resumed_optimizer_and_generator(folder, monkeypatch, case):
    """They go on where they were: the noise of a run in two parts is that of one in a single part."""
    case.make_teacher()
    whole = load(case.run("--total-timesteps", 5 * BATCH) / "checkpoint.pt")
    made = case.run("--total-timesteps", 2 * BATCH)
    state, seen = load(made / "checkpoint.pt"), []
    step = torch.optim.Adam.step

    def recorded_step(optimizer, *arguments):
        if not seen:
            parameters = optimizer.param_groups[0]["params"]
            seen.extend({name: tensor.clone() for name, tensor in optimizer.state[p].items()} for p in parameters)
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded_step)
    case.resume(made, "--total-timesteps", 5 * BATCH)
    for i, entry in enumerate(seen):
        assert entry["step"] == 2 and same_bits(entry, state["optimizer"][i])
    assert torch.equal(load(made / "checkpoint.pt")["generator"], whole["generator"])
    assert not torch.equal(state["generator"], whole["generator"])


@by_script
@pytest.mark.parametrize("quantity", ["observation", "loss or gradient"])
def test_non_finite_stops_the_run(folder, monkeypatch, case, quantity):
    """In the fourth iteration; the training state of the third stays as it is."""
    case.make_teacher()
    arguments, kept = ["--total-timesteps", 6 * BATCH, "--checkpoint-interval", BATCH], []
    policy_kl, do_tasks, calls = case.module.policy_kl, case.module.do_tasks, itertools.count(1)

    def keep():
        kept.extend(path.read_bytes() for path in pathlib.Path("runs").glob("*/checkpoint.pt"))

    def faulty_kl(*policies):
        return policy_kl(*policies) * (np.nan if next(calls) == 4 else 1)

    def faulty_tasks(envs, table):
        do_tasks(envs, table)
        table["obs"][1] *= np.nan if next(calls) == 1 + 3 * 3 + 2 else 1  # after the reset

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        names = ("do_tasks", faulty_tasks) if quantity == "observation" else ("policy_kl", faulty_kl)
        patch.setattr(case.module, *names)
        strike(patch, case.envs, "step", 3 * 3 + 1, keep)
        case.run(*arguments)
    at = 3 * BATCH + 2 if quantity == "observation" else 4 * BATCH
    assert stop.value.code == f"{case.module.SCRIPT}: error: non-finite {quantity} at step {at}"
    (made,) = pathlib.Path("runs").iterdir()
    assert [(made / "checkpoint.pt").read_bytes()] == kept
    assert load(made / "checkpoint.pt")["progress"]["global_step"] == 3 * BATCH
    assert not (made / "student.pt").exists() and not (made / "result.json").exists()
    case.resume(made)  # the cause is gone
    assert result_of(made)["global_step"] == 6 * BATCH


@by_script
def test_kill_9_and_resume(folder, case):
    case.make_teacher()
    arguments = [*SMALL, "--total-timesteps", 10**8, "--checkpoint-interval", 60]
    made, reached = kill_at_random_moments(case.module, arguments, 3)
    time.sleep(1.1)  # TensorBoard reads the files in the order of their names, which have the second
    case.resume(made, "--total-timesteps", reached + 3 * BATCH)
    assert result_of(made)["global_step"] == reached + 3 * BATCH
    steps = [step for step, _ in curves(made)["losses/distill_kl"]]
    assert steps[-1] == reached + 3 * BATCH and steps[:-1] == list(range(50 * BATCH, steps[-1], 50 * BATCH))


# --- REFUSALS ---


@by_script
def test_bad_input(folder, capsys, case):
    case.make_teacher()
    make_game_file("pong.pt", case.module, "PongNoFrameskip-v4")
    for arguments, *words in [
        (["--teacher", "none.pt"], "none.pt", "no such file"),
        (["--num-steps", 0], "--num-steps 0"),
        (["--num-levels", -1], "--num-levels"),
        (["--eval-interval", 5, "--eval-episodes", 0], "--eval-interval"),
        (["--env-id", "Hoper-v4"], "Hoper-v4", "Hopper-v4"),
        (["--env-id", "BreakoutNoFrameskip-v5"], "BreakoutNoFrameskip-v4"),
        (["--env-id", "coinrum"], "coinrun"),
        (["--env-id", "coinrun"], "t.pt", "suite"),
        (["--env-id", "Hopper-v4"], "t.pt", "obs_shape"),
        (["--env-id", "BreakoutNoFrameskip-v4", "--teacher", "pong.pt"], "pong.pt", "action_dim"),
        (["--save-path", "t.pt", "--overwrite"], "teacher's own"),
    ]:
        check_refused(capsys, case.module, [*SMALL, *arguments], *words)
    check_refused(capsys, case.module, ["--env-id", ENVS[case.suite]], "--teacher")


@by_script
def test_training_state_of_another_script(folder, capsys, case):
    case.make_teacher()
    made = case.run("--total-timesteps", BATCH)
    other = teacher_distill if case.student_acts else student_distill
    check_refused(capsys, other, ["--resume", made], "checkpoint.pt", case.module.SCRIPT)
