"""What the games of Atari and Procgen have in common: networks and losses against float64 definitions, whole runs."""

import os
import pathlib
import signal

import numpy as np
import pytest
import torch
from helpers import independent_cnn, kill_at_random_moments, make_game_file, result_of, run, same_bits, strike
from torch.distributions import Categorical, kl_divergence

import ppd_atari
import ppd_procgen
import train_teacher

ENVS = {"atari": "BreakoutNoFrameskip-v4", "procgen": "starpilot"}
OBS_SHAPES = {"atari": [4, 84, 84], "procgen": [3, 64, 64]}
DISTILL = {"atari": ppd_atari, "procgen": ppd_procgen}
BATCH = 32  # of the runs here, 2 environments by 16 steps, in 4 minibatches and 2 epochs
SMALL = "--num-envs 2 --num-steps 16 --minibatch-size 8 --update-epochs 2 --eval-episodes 0 --env-threads 1".split()
by_suite = pytest.mark.parametrize("suite", ENVS)


class Case:
    """A script that plays the games of a suite."""

    def __init__(self, suite, teaches):
        self.suite, self.teaches = suite, teaches
        self.module = train_teacher if teaches else DISTILL[suite]
        self.envs = getattr(self.module, {"atari": "AtariEnvs", "procgen": "ProcgenEnvs"}[suite])
        self.file = "teacher.pt" if teaches else "student.pt"

    def make_teacher(self, **changes):
        """The file t.pt, which a script that distills takes for its teacher."""
        return load(make_game_file("t.pt", DISTILL[self.suite], ENVS[self.suite], **changes))

    def command(self, *arguments):
        what = ["--env-id", ENVS[self.suite], "--size", "smaller"] if self.teaches else ["--teacher", "t.pt"]
        return [*what, *SMALL, *map(str, arguments)]

    def run(self, *arguments):
        return run(self.module, self.command(*arguments))

    def resume(self, *arguments):
        self.module.main(self.module.parse_args(["--resume", *map(str, arguments)]))


CASES = [Case(suite, teaches) for suite in ENVS for teaches in (True, False)]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.module.__name__}-{case.suite}")


def load(path):
    return ppd_atari.read_file(path)


# --- NETWORKS ---


def make_networks(suite, kind, widths, action_dim=6):
    network = dict(kind=kind, activation="relu", actor_hidden=widths, critic_hidden=widths)
    network |= dict(obs_shape=OBS_SHAPES[suite], action_dim=action_dim)
    return DISTILL[suite].make_networks(network, torch.Generator().manual_seed(0))


def random_obs(suite, count):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, *OBS_SHAPES[suite]), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", ["smaller", "same", "larger"])
@by_suite
def test_networks_against_their_definition(suite, size):
    kind, widths = train_teacher.SIZES["games"][size]
    assert DISTILL[suite].SIZES.get(size, (kind, widths)) == (kind, widths)
    (actor, critic), obs = make_networks(suite, kind, widths), random_obs(suite, 3)
    for network, cnn in ((actor, actor.logits), (critic, critic.value)):
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        expected = independent_cnn(kind, cnn.state_dict(), obs)
        found = network(obs).reshape(expected.shape)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(actor.mode(obs), actor(obs).argmax(1))


def test_parameter_counts_of_table_4():
    """Means over the paper's games; of the smaller network the text's, for the table has other figures than it."""
    actions = dict(atari=[3, 4, 6, 6, 6, 9, 9, 9, 9, 18, 18], procgen=[15])
    tables = dict(atari=dict(smaller=236e3, same=1.1e6, larger=8.3e6))
    tables |= dict(procgen=dict(smaller=99e3, same=626e3, larger=4.6e6))
    for suite, table in tables.items():
        for size, (kind, widths) in train_teacher.SIZES["games"].items():
            counts = []
            for action_dim in actions[suite]:
                actor, critic = make_networks(suite, kind, widths, action_dim)
                counts.append(sum(parameter.numel() for parameter in actor.parameters()))
                assert sum(parameter.numel() for parameter in critic.parameters()) < counts[-1]
                assert not {id(p) for p in actor.parameters()} & {id(p) for p in critic.parameters()}
            assert np.mean(counts) == pytest.approx(table[size], abs=500 if table[size] < 1e6 else 5e4)


@pytest.mark.parametrize("kind", ["nature", "impala"])
@by_suite
def test_initial_networks(suite, kind):
    actor, critic = make_networks(suite, kind, [8, 16, 16, 64])
    for cnn, output_gain in ((actor.logits, 0.01), (critic.value, 1)):
        layers = [layer for layer in cnn.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
        assert len(layers) == (5 if kind == "nature" else 17)
        for layer in layers:
            weight, gain = layer.weight.flatten(1), output_gain if layer is layers[-1] else np.sqrt(2)
            weight = weight if len(weight) <= weight.shape[1] else weight.T
            torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=1e-4, atol=1e-5)
            assert (layer.bias == 0).all()


def test_amp_is_close(monkeypatch):
    (actor, _), obs = make_networks("atari", "impala", [16, 32, 32, 256]), random_obs("atari", 8)
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
@by_suite
def test_gradient_of_the_whole_update(folder, monkeypatch, suite, kl_mode):
    """The gradients in the midst of a run are those of the formulas in float64, by networks of another making."""
    case = Case(suite, teaches=kl_mode == "none")
    module, calls, kind, rollouts = case.module, {}, "impala", []
    more = ["--ent-coef", 0.03, "--vf-coef", 0.4, "--learning-rate", 0.003]
    if not case.teaches:
        teacher = case.make_teacher(kind=kind)
        more += ["--distill-lambda", 0.7, "--kl", kl_mode]
    monkeypatch.setitem(train_teacher.SIZES["games"], "smaller", (kind, [4, 4, 4, 16]))
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
    made = case.run("--total-timesteps", 4 * BATCH, *more)
    policy = load(made / case.file)

    # the minibatch's samples, found by their frames in the rollout
    inferred = torch.cat(calls["inferred"])
    batches = (1 if case.teaches else 2) * BATCH  # of the last rollout: critic, and teacher
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
    if not case.teaches:
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


@by_case
def test_same_seed_same_bits_for_any_threads(folder, case):
    case.make_teacher()
    policies = {}
    for name, more in {"a": [], "b": ["--env-threads", 3], "c": ["--seed", 7]}.items():
        case.run("--total-timesteps", 3 * BATCH, "--save-path", name, *more)
        policies[name] = load(name)
    assert same_bits(policies["a"]["actor"], policies["b"]["actor"])
    assert same_bits(policies["a"]["critic"], policies["b"]["critic"])
    assert not same_bits(policies["a"]["actor"], policies["c"]["actor"])


@by_case
def test_first_ratio_of_every_rollout_is_one(folder, monkeypatch, case):
    case.make_teacher()
    ratios, loss = [], case.module.ppo_loss

    def recorded_loss(logratio, *rest):
        ratios.append(logratio.detach().exp())
        return loss(logratio, *rest)

    monkeypatch.setattr(case.module, "ppo_loss", recorded_loss)
    case.run("--total-timesteps", 3 * BATCH, "--learning-rate", 0.003)
    assert len(ratios) == 24
    assert max((ratio - 1).abs().max() for ratio in ratios[::8]) < 1e-5
    assert min((ratio - 1).abs().max() for ratio in ratios[7::8]) > 1e-4


@by_suite
def test_actions_are_samples_of_the_policy(folder, monkeypatch, suite):
    """Their frequencies are those of the probabilities at which they were drawn, to four standard deviations."""
    case, seen = Case(suite, teaches=False), []
    case.make_teacher()
    logprob = case.module.categorical_logprob

    def recorded(actions, logits):
        if not logits.requires_grad:
            seen.append((actions.flatten().clone(), logits.flatten(0, 1).softmax(-1)))
        return logprob(actions, logits)

    monkeypatch.setattr(case.module, "categorical_logprob", recorded)
    sizes = ["--num-steps", 100, "--minibatch-size", 200, "--learning-rate", 0.001]
    case.run("--total-timesteps", 4000, *sizes)
    actions, probabilities = (torch.cat(parts) for parts in zip(*seen, strict=True))
    counts = torch.bincount(actions, minlength=probabilities.shape[1]).double()
    expected, variance = probabilities.sum(0), (probabilities * (1 - probabilities)).sum(0)
    assert len(actions) == 4000 and ((counts - expected).abs() < 4 * variance.sqrt()).all()


@by_suite
def test_teacher_runs_once_per_rollout_without_gradient(folder, monkeypatch, suite):
    case, loaded, calls = Case(suite, teaches=False), [], []
    teacher, load_policy = case.make_teacher(), case.module.load_policy

    def recorded_load(*arguments):
        loaded.append(load_policy(*arguments))
        loaded[-1][0].register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
        return loaded[-1]

    monkeypatch.setattr(case.module, "load_policy", recorded_load)
    case.run("--total-timesteps", 2 * BATCH)
    ((actor, critic, _),) = loaded
    assert sum(calls) == 2 * BATCH and max(calls) == 8  # in minibatches
    for module, name in ((actor, "actor"), (critic, "critic")):
        assert not any(parameter.grad is not None for parameter in module.parameters())
        assert same_bits(module.state_dict(), teacher[name])


@by_case
def test_evaluation_changes_no_bit(folder, case):
    case.make_teacher()
    case.run("--total-timesteps", 3 * BATCH, "--save-path", "a")
    evaluations = ["--eval-interval", BATCH, "--eval-episodes", 2]
    made = case.run("--total-timesteps", 3 * BATCH, "--save-path", "b", *evaluations)
    assert same_bits(load("a")["actor"], load("b")["actor"])
    assert [point[0] for point in result_of(made)["eval_curve"]] == [BATCH, 2 * BATCH, 3 * BATCH]


@pytest.mark.parametrize("number, name, count, saved", [
    (signal.SIGINT, "step", 2 * 16 + 9, 2 * BATCH),
    (signal.SIGTERM, "ppo_loss", 2 * 8 + 4, 2 * BATCH),
    (signal.SIGTERM, "ppo_loss", 3, 0),
])  # fmt: skip
@by_case
def test_signal_and_resume(folder, capsys, monkeypatch, case, number, name, count, saved):
    case.make_teacher()
    owner = case.envs if name == "step" else case.module
    with monkeypatch.context() as patch:
        strike(patch, owner, name, count, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            case.run("--total-timesteps", 4 * BATCH)
    assert stop.value.code == 128 + number
    (made,) = pathlib.Path("runs").iterdir()
    assert f"  python {case.module.SCRIPT} --resume {made}\n" in capsys.readouterr().err
    assert load(made / "checkpoint.pt")["progress"]["global_step"] == saved
    os.remove("t.pt")  # the training state keeps the teacher
    case.resume(made)
    assert load(made / case.file)["global_step"] == result_of(made)["global_step"] == 4 * BATCH
    state = load(made / "checkpoint.pt")
    assert {entry["step"].item() for entry in state["optimizer"].values()} == {32.0}
    assert state["policy"]["return_rms"]["count"].item() == pytest.approx(4 * BATCH, abs=0.01)


@by_suite
def test_kill_9_and_resume(folder, suite):
    case = Case(suite, teaches=False)
    case.make_teacher()
    arguments = case.command("--total-timesteps", 10**8, "--checkpoint-interval", BATCH)
    made, reached = kill_at_random_moments(case.module, arguments, 2)
    case.resume(made, "--total-timesteps", reached + BATCH)
    assert result_of(made)["global_step"] == reached + BATCH
