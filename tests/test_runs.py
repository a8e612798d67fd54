"""Whole runs: what they leave, the same seed, resuming, kills, the teacher's part, numbers that are not finite."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from envs import Scripted
from helpers import CASES, DISTILLING, PPD, QUICK, by_case, by_script, load, make_teacher, record, result_of, same


def launch(*line):
    """A command line in a process of its own, as a user starts it, with one worker."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, str(helpers.ROOT / line[0]), *map(str, line[1:])]
    options = dict(env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    return subprocess.Popen(line, **options)


def wait_for_state(process):
    """Wait until the run has saved a training state, and return its folder."""
    until = time.time() + 120
    while not (paths := list(pathlib.Path(".").glob("runs/*/checkpoint.pt"))):
        if time.time() > until:
            process.kill()
        assert process.poll() is None, process.communicate(timeout=10)
        time.sleep(0.05)
    return paths[0].parent


def interrupt(*_, **__):
    raise KeyboardInterrupt


def sleeping_programs():
    programs = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            programs += [path] * (path.read_bytes() == b"sleep\x004321\x00")
    return programs


@by_case(CASES)
def test_what_a_run_leaves(folder, monkeypatch, capsys, case):
    """Files, scores, the ratio, curves in TensorBoard, among them the final scores."""
    make_teacher(case.suite)
    evaluations = record(monkeypatch, case.module, "evaluate")
    made = case.run(eval_interval=2 * case.batch, total_timesteps=2 * case.batch + 1, eval_episodes=2)
    output, result, policy = capsys.readouterr().out, result_of(made), load(made / case.policy_file)
    steps = 3 * case.batch
    assert {path.name for path in made.glob("[!e]*")} == {"checkpoint.pt", "result.json", case.policy_file}
    expected = dict(script=case.module.SCRIPT, env_id=case.env_id, seed=100, global_step=steps)
    assert expected.items() <= result.items() and result["sps"] > 0
    assert torch.__version__.startswith(result["versions"]["torch"]) and result["args"]["num_envs"] == 2
    who = ["teacher", "student"] if case.distills else ["teacher"]
    levels = ["test", "train"] if case.suite == "procgen" else [None]
    assert len(evaluations) == 1 + len(who) * len(levels)
    for name, level in itertools.product(who, levels):
        score = result[name][level] if level else result[name]
        assert len(score["returns"]) == 2
        assert (score["mean"], score["std"]) == (np.mean(score["returns"]), np.std(score["returns"]))
        assert f": {score['mean']:.1f} ± " in output or f": {score['mean']:.2f} ± " in output
        if case.suite == "atari":
            assert score["human_normalized"] == pytest.approx((score["mean"] - 1.7) / 28.8)
    for level in levels if case.distills else []:
        scores = [result[name][level] if level else result[name] for name in ("student", "teacher")]
        student, teacher = (score.get("human_normalized", score["mean"]) for score in scores)
        ratio = result["ratio"][level] if level else result["ratio"]
        assert ratio == (pytest.approx(student / teacher) if teacher > 0 else None)
    assert policy["score"] == result[who[-1]] and policy["global_step"] == steps
    read, own = helpers.curves(made), result[who[-1]]
    own = own.get("test", own)
    ((step, mean, _),) = result["eval_curve"]
    assert step == 2 * case.batch
    assert read["charts/eval_return"] == [(step, pytest.approx(mean)), (steps, pytest.approx(own["mean"]))]
    if case.distills:
        teacher_score = result["teacher"].get("test", result["teacher"])
        assert read["charts/teacher_return"] == [(steps, pytest.approx(teacher_score["mean"]))]
        assert "losses/distill_kl" in read
    assert read["charts/SPS"][-1][0] == steps and {"losses/value_loss", "losses/entropy"} <= read.keys()
    assert all(np.isfinite(value) for events in read.values() for _, value in events)


def test_no_time_limit(folder, capsys):
    make_teacher()
    for env_id, warnings in (("envs:NoTimeLimit-v0", 1), ("envs:Scripted-v0", 0)):
        PPD.run(env_id=env_id)
        assert capsys.readouterr().out.count(f"warning: {env_id} has no time limit") == warnings


@by_case(CASES)
def test_settings_of_the_paper(folder, monkeypatch, case):
    """Table 3, in what a run is told nothing of."""
    common = dict(learning_rate=3e-4, num_envs=18, vf_coef=0.5, max_grad_norm=0.5)
    ppo = dict(gae_lambda=0.9, update_epochs=4, clip_coef=0.2, minibatch_size=512, **common)
    env_id = dict(continuous="InvertedPendulum-v4", atari="PongNoFrameskip-v4", procgen="miner")[case.suite]
    dims = dict(continuous=dict(obs_shape=[4], action_dim=1), atari=dict(action_dim=6), procgen={})[case.suite]
    make_teacher(case.suite, path=f"{case.suite}.pt", **dims)
    args = dict(total_timesteps=2_000_000, gamma=0.999, ent_coef=0.0, num_steps=64, **ppo)
    if case.name == "train_teacher":
        args.update(gamma=0.995, num_steps=256 if case.suite == "atari" else 512)
        args.update(total_timesteps=30_000_000 if case.suite == "procgen" else 10_000_000)
        args.update(ent_coef=0.0 if case.suite == "continuous" else 0.01)
    elif not case.is_ppo:
        args = dict(total_timesteps=2_000_000, num_steps=5, ent_coef=0.0, **common)
    args.update(eval_episodes=200 if case.suite == "procgen" else 50)
    given = dict(teacher=f"{case.suite}.pt") if case.distills else {}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        found = record(patch, case.module.dataclasses, "replace")
        patch.setattr(case.module, "SummaryWriter", interrupt)
        case.module.main(case.module.Args(env_id=env_id, **given))
    assert args.items() <= vars(found[-1][1]).items()


@by_case(CASES)
def test_one_update_on_another_device(folder, monkeypatch, case):
    """In place of a GPU, "meta": its tensors have shapes and types but no numbers, and come back as zeros. An operation
    on tensors of two devices is an error. In a rollout, the device is waited for once a step, for the actions."""
    make_teacher(case.suite)
    helpers.skip_evaluation(monkeypatch, case)
    monkeypatch.setattr(case.module, "save", lambda *_: None)
    changes = {"device": lambda kind: torch.device("meta"), "autocast": lambda *_, **__: contextlib.nullcontext()}
    monkeypatch.setattr(case.module, "torch", types.SimpleNamespace(**{**vars(torch), **changes}))
    cpu, tolist, backward, Adam = torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.backward, torch.optim.Adam
    losses, waits = [], []

    def recorded_cpu(tensor):
        if tensor.is_meta:
            waits.append(len(losses))
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", recorded_cpu)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: tolist(t.cpu()))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: tolist(t.cpu()))
    monkeypatch.setattr(torch.Tensor, "backward", lambda t: losses.append(t.device.type) or backward(t))
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused, **options: Adam(parameters, **options))
    case.run(total_timesteps=case.batch)
    assert set(losses) == {"meta"} and set(waits) == {0, len(losses)}
    assert waits.count(0) == case.args().num_steps


OTHER_SYSTEM = """# Read by every Python process at its start.
import multiprocessing, os
for name in ("fork", "forkpty", "sched_yield", "sched_getaffinity", "wait4"):
    delattr(os, name)
multiprocessing.set_start_method("spawn")
"""
STARTS = {"this system": "", "forkserver": "import multiprocessing\nmultiprocessing.set_start_method('forkserver')"}


def test_start_methods_and_other_systems(folder, monkeypatch):
    """A command line with a worker does the same under forkserver (Python 3.14), and as on macOS and Windows: spawned
    workers, and none of what only Linux has."""
    policies = []
    make_teacher("continuous")
    for kind, text in {**STARTS, "other system": OTHER_SYSTEM}.items():
        pathlib.Path("sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
        flags = "--teacher teacher.pt --num-envs 4 --minibatch-size 99 --total-timesteps 300 --eval-episodes 2".split()
        process = launch("ppd_continuous.py", *flags, "--save-path", f"{kind}.pt")
        assert process.wait(120) == 0, process.communicate()
        policies.append(load(f"{kind}.pt"))
    assert all(helpers.same_networks(policies[0], policy) for policy in policies[1:])


@by_case(QUICK)
def test_same_seed_same_bits(folder, monkeypatch, case):
    """For any number of workers, with and without evaluations on the way. Another seed gives another run."""
    make_teacher(case.suite)
    runs = dict(first={}, evaluated=dict(eval_interval=case.batch), other=dict(seed=7))
    policies = {name: case.policy(**changes) for name, changes in runs.items()}
    assert helpers.same_networks(policies["first"], policies["evaluated"])
    assert not helpers.same_networks(policies["first"], policies["other"])
    if case.suite == "continuous":
        monkeypatch.setattr(case.module, "NUM_CORES", 2)
        workers = case.policy()
        torch.set_num_threads(1)
        assert helpers.same_networks(policies["first"], workers) and workers["score"] == policies["first"]["score"]


# --- RESUME ---


@by_case(QUICK)
def test_resume(folder, monkeypatch, case):
    """A run in two parts: optimizer, statistics, random numbers and curves go on where they were, and the environments'
    seeds do not repeat."""
    make_teacher(case.suite)
    half, total, learning_rates, moments, step = 2 * case.batch, 4 * case.batch, set(), [], torch.optim.Adam.step
    torch_seeds = record(monkeypatch, torch, "manual_seed")
    case.run(total_timesteps=total)
    whole = [seed for (seed,), _ in torch_seeds if seed != 100]  # that of an evaluation
    torch_seeds.clear()
    resets = record(monkeypatch, case.Envs, "reset")
    made = case.run(total_timesteps=half, eval_interval=half)
    state, first_resets = load(made / "checkpoint.pt"), len(resets)

    def recorded_step(optimizer, *arguments):
        learning_rates.add(optimizer.param_groups[0]["lr"])
        if not moments:
            moments.append({i: {k: v.clone() for k, v in x.items()} for i, x in enumerate(optimizer.state.values())})
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded_step)
    changes = dict(total_timesteps=total, eval_interval=half, learning_rate=1e-3)
    assert case.run(resume=str(made), **changes) == made
    after, policy, read = load(made / "checkpoint.pt"), load(made / case.policy_file), helpers.curves(made)
    assert same(moments[0], state["optimizer"]["state"]) and learning_rates == {1e-3}
    assert whole == [seed for (seed,), _ in torch_seeds if seed != 100] and len(set(whole)) == 4
    assert after["global_step"] == result_of(made)["global_step"] == policy["global_step"] == total
    assert after["train_seconds"] > state["train_seconds"] > 0
    assert [point[0] for point in after["eval_curve"]] == [half, total]
    assert [step for step, _ in read["charts/eval_return"]] == [half, half, total, total]  # also at the end of a run
    assert len({step for step, _ in read["losses/value_loss"]}) == len(read["losses/value_loss"])
    seeds = [str(arguments[1]) for arguments, _ in resets]
    training, evaluation, resumed = dict.fromkeys(seeds)
    assert seeds == [training, *[evaluation] * (first_resets - 1), resumed, *[evaluation] * (first_resets - 1)]
    if case in DISTILLING and case.suite == "continuous":  # another teacher brings its own statistics
        mean, teacher = torch.full((3,), 7.0, dtype=torch.float64), load("teacher.pt")
        torch.save({**teacher, "actor": {**teacher["actor"], "obs_rms.mean": mean}}, "other.pt")
        policy = case.policy(resume=str(made), teacher="other.pt", total_timesteps=total + 1)
        assert same(policy["actor"]["obs_rms.mean"], mean)


@by_script
def test_ctrl_c_prints_the_command_that_continues(folder, monkeypatch, case):
    """In the third rollout, in the evaluation at the end, or between policy and result; with an environment of one's
    own. What was typed stays, and what came after the last save is done again."""
    make_teacher()
    total = 4 * case.batch
    places = {"rollout": (Scripted, "step", 4 + 2 * case.batch), "evaluation": (Scripted, "step", 4 + total)}
    for place, where in {**places, "result": (json, "dump", 1)}.items():
        line = f"{case.name}.py --env-id envs:Scripted-v0 --exp-name {place} --num-envs 2 --learning-rate 0.002".split()
        line += f"--num-steps {case.batch // 2} --total-timesteps {total} --eval-episodes 2 --no-cuda --seed 5".split()
        line += ["--minibatch-size", 20] if case.is_ppo else []
        line += ["--teacher", "teacher.pt"] if case.distills else ["--size", "smaller"]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            helpers.strike(patch, *where, interrupt)
            helpers.run_command(patch, line)
        (made,) = pathlib.Path("runs").glob(f"*__{place}__*")
        assert f"--resume {made}" in stop.value.code
        assert load(made / "checkpoint.pt")["global_step"] == (case.batch if place == "rollout" else total)
        assert (made / case.policy_file).exists() == (place == "result")
        helpers.run_command(monkeypatch, stop.value.code[stop.value.code.index("python") :])
        result = result_of(made)
        assert (result["global_step"], result["seed"], result["args"]["learning_rate"]) == (total, 5, 0.002)
        steps = [step for step, _ in helpers.curves(made)["losses/value_loss"]]
        assert steps[-1] == total and len(set(steps)) == len(steps)


def test_kill_9(folder, monkeypatch):
    """At any moment; a later start goes on. The workers end with their parent."""
    make_teacher(env_id="InvertedPendulum-v4", obs_shape=[4], action_dim=1)
    line = ["--num-envs", 4, "--num-steps", 8, "--minibatch-size", 32, "--eval-episodes", 2, "--save-interval", 0.3]
    line = ["ppd_continuous.py", "--teacher", "teacher.pt", *line, "--total-timesteps", 10**8]
    for _ in range(2):
        process = launch(*line)
        made = wait_for_state(process)
        time.sleep(0.5)
        process.kill()
        process.communicate()  # ends when the last process that writes there has ended
        reached = load(made / "checkpoint.pt")["global_step"]
        line = ["ppd_continuous.py", "--resume", made]
    helpers.run_command(monkeypatch, [*line, "--total-timesteps", reached + 64])
    assert result_of(made)["global_step"] == reached + 64


def test_external_programs_end(folder):
    """After a kill in training and after a whole run. Torch inside of step hangs in a fork unless it has one thread."""
    make_teacher()
    line = ["--env-id", "envs:ExternalProgram-v0", "--num-envs", 4, "--num-steps", 8, "--minibatch-size", 32]
    line = ["ppd_continuous.py", "--teacher", "teacher.pt", *line, "--eval-episodes", 3, "--save-interval", 0]
    before = sleeping_programs()
    process = launch(*line, "--total-timesteps", 10**8)
    made = wait_for_state(process)
    os.killpg(process.pid, signal.SIGTERM)  # the workers get it twice
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and f"--resume {made}" in error and "Traceback" not in error
    assert sleeping_programs() == before
    reached = load(made / "checkpoint.pt")["global_step"]
    process = launch("ppd_continuous.py", "--resume", made, "--total-timesteps", reached + 32)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 0 and "Warning" not in output and "Traceback" not in output, output
    assert sleeping_programs() == before and result_of(made)["global_step"] == reached + 32


def test_an_error_or_a_refusal_closes_the_environments(folder, monkeypatch):
    make_teacher()
    before = sleeping_programs()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="not those of"):
        patch.setattr(PPD.module, "NUM_CORES", 1)  # a worker is stopped while it starts, perhaps between its programs
        patch.setattr(gym.spaces, "flatdim", lambda _: 99)
        PPD.run(env_id="envs:ExternalProgram-v0")
    monkeypatch.setattr(PPD.module, "NUM_CORES", 2)
    helpers.strike(monkeypatch, PPD.module, "ppo_loss", 2, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PPD.run(env_id="envs:ExternalProgram-v0")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError):
        PPD.run(env_id="envs:ExternalProgram-v0", track=True)
    torch.set_num_threads(1)
    assert sleeping_programs() == before


@by_case(QUICK)
def test_a_thread_leaves_no_signal_handlers(folder, monkeypatch, case):
    """With workers, as in a notebook."""
    make_teacher(case.suite)
    monkeypatch.setattr(case.module, "NUM_CORES", 2)
    handlers = [signal.getsignal(number) for number in signal.Signals]
    thread = threading.Thread(target=case.run)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert len(list(pathlib.Path(".").glob("runs/*/result.json"))) == 1
    assert [signal.getsignal(number) for number in signal.Signals] == handlers


@by_case(QUICK)
def test_numbers_that_are_not_finite(folder, monkeypatch, case):
    """The run ends before the next save."""
    make_teacher(case.suite)
    count, original = itertools.count(1), torch.nn.functional.mse_loss
    bad = 2 * helpers.SMALL["update_epochs"] * 3 + 2 if case.is_ppo else 3
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="not finite"):
        patch.setattr(torch.nn.functional, "mse_loss", lambda *x: original(*x) * (np.nan if next(count) == bad else 1))
        case.run(total_timesteps=4 * case.batch, save_interval=0)
    (made,) = pathlib.Path("runs").iterdir()
    state = load(made / "checkpoint.pt")
    assert state["global_step"] == 2 * case.batch and not (made / "result.json").exists()
    assert all(tensor.isfinite().all() for part in ("actor", "critic") for tensor in state[part].values())


# --- THE TEACHER ---


@by_case(DISTILLING)
def test_teacher_is_asked_once_per_observation(folder, monkeypatch, case):
    """And gets no gradient. After the run it is what it was."""
    teacher, calls, forward = load(make_teacher(case.suite)), [], case.Actor.forward

    def recorded(actor, obs):
        return calls.append((actor, len(obs), torch.is_grad_enabled())) or forward(actor, obs)

    monkeypatch.setattr(case.Actor, "forward", recorded)
    helpers.skip_evaluation(monkeypatch, case)
    case.run()
    asked = [call for call in calls if same(call[0].state_dict(), teacher["actor"])]
    assert sum(n for _, n, _ in asked) == case.args().total_timesteps and not any(grad for *_, grad in asked)
    assert all(parameter.grad is None for actor, *_ in asked for parameter in actor.parameters())


@by_case([case for case in DISTILLING if case.is_ppo and case.suite != "atari"])  # a copy, and slow
def test_lambda_zero_is_ppo(folder, case):
    """The teacher matters by its statistics alone, to the bit."""
    make_teacher(case.suite, path="a.pt")
    make_teacher(case.suite, path="b.pt", seed=1)
    runs = {(t, x): case.policy(teacher=f"{t}.pt", distill_lambda=x) for t in "ab" for x in (0.0, 1.0)}
    assert helpers.same_networks(runs["a", 0.0], runs["b", 0.0])
    assert not any(helpers.same_networks(runs["a", 1.0], runs[other]) for other in (("b", 1.0), ("a", 0.0)))


def test_lambda_is_annealed(folder):
    make_teacher()
    made = PPD.run(total_timesteps=4 * 48 - 1, distill_lambda=2.0, distill_lambda_end=0.5)
    logged = [value for _, value in helpers.curves(made)["charts/distill_lambda"]]
    assert logged == pytest.approx([2 - 1.5 * min(1, 48 * k / 191) for k in range(1, 5)])


@by_case([case for case in DISTILLING if case.suite == "continuous"])
def test_teacher_logstd(folder, case):
    teacher = load(make_teacher())
    logstds = [case.policy(learning_rate=0.0, teacher_logstd=flag)["actor"]["logstd"] for flag in (True, False)]
    assert torch.equal(logstds[0], teacher["actor"]["logstd"]) and not logstds[1].any()


def record_actors(patch, case):
    """Copies of the actors that a run evaluates, at that time."""
    evaluate, states = case.module.evaluate, []

    def recorded(actor, *more):
        states.append({name: tensor.clone() for name, tensor in actor.state_dict().items()})
        return evaluate(actor, *more)

    patch.setattr(case.module, "evaluate", recorded)
    return states


def test_teacher_noise(folder, monkeypatch):
    """The same for every method and resumed run, whatever the student, of the size that is asked for, and scored."""
    teacher = load(make_teacher(actor_hidden=[100, 100]))
    noisy = []
    for case in [case for case in DISTILLING if case.suite == "continuous"]:
        with monkeypatch.context() as patch:
            actors = record_actors(patch, case)
            made = case.run(teacher_noise=0.05, student_size="smaller")
            case.run(teacher_noise=0.05, resume=str(made), student_size="smaller", total_timesteps=192)
        teachers = [actor for actor in actors if len(actor["mean.0.weight"]) == 100]
        noisy += [actor for actor in teachers if not same(actor, teacher["actor"])]
        result = result_of(made)
        assert result["corrupted_teacher"]["returns"] != result["teacher"]["returns"]
        assert result["ratio"] == pytest.approx(result["student"]["mean"] / result["teacher"]["mean"])
    assert len(noisy) == 6 and all(same(noisy[0], actor) for actor in noisy)
    for name, tensor in teacher["actor"].items():
        difference = noisy[0][name] - tensor
        assert "obs_" in name and not difference.any() or difference.abs().min() > 0
        assert tensor.numel() < 1000 or 0.045 < difference.std() < 0.055


@by_case([case for case in CASES if case.suite == "continuous" or not case.is_ppo and case.suite == "procgen"])
def test_compile_compiles(folder, monkeypatch, case):
    """Graphs of actor, critic and the losses; the files are those of plain networks."""
    make_teacher(case.suite)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = ["ppo_loss", "distill_loss"][: 1 + case.distills]
    if not case.is_ppo:
        losses = ["kl_divergence" if case.suite == "continuous" else "categorical_kl"]
    for name in losses:
        monkeypatch.setattr(case.module, name, getattr(case.module, name))  # restored after the test
    compiled, compile = [], torch.compile

    def recorded_compile(function, **options):
        compiled.append(type(function.__self__).__name__ if hasattr(function, "__self__") else function.__name__)
        return compile(function, backend="eager", **options)  # to save time

    monkeypatch.setattr(torch, "compile", recorded_compile)
    policy = case.policy(compile=True)
    assert compiled[2:] == losses and [name[3:] for name in compiled[:2]] == ["Actor", "Critic"]
    graphs = len(compiled) - ("kl_divergence" in losses)  # torch cannot compile that, and calls it as it is
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= graphs
    assert helpers.same_networks(policy, case.policy())


@by_case([case for case in CASES if case.suite == "procgen" and case.name == "ppd_procgen"])
def test_amp_is_close(folder, case):
    make_teacher(case.suite)
    rough, exact = (case.policy(amp=amp) for amp in (True, False))
    case.module.Cnn.amp = False
    assert not helpers.same_networks(rough, exact)
    for name, tensor in exact["actor"].items():
        assert tensor.dtype == torch.float32 and (rough["actor"][name] - tensor).abs().max() < 0.01
