"""What several test files need."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import pathlib
import runpy
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ["train_teacher", "ppd_atari", "ppd_continuous", "ppd_procgen", "student_distill", "teacher_distill"]
ENV_IDS = {"continuous": "envs:Scripted-v0", "atari": "BreakoutNoFrameskip-v4", "procgen": "starpilot"}
NETWORKS = {
    "continuous": dict(kind="mlp", actor_hidden=[16, 16], critic_hidden=[16, 16], obs_shape=[3], action_dim=2),
    "atari": dict(kind="nature", actor_hidden=[4, 4, 4, 16], critic_hidden=[4, 4, 4, 16], action_dim=4),
    "procgen": dict(kind="nature", actor_hidden=[4, 4, 4, 16], critic_hidden=[4, 4, 4, 16], action_dim=15),
}
NETWORKS["atari"]["obs_shape"], NETWORKS["procgen"]["obs_shape"] = [4, 84, 84], [3, 64, 64]
SMALL = dict(num_envs=2, num_steps=24, minibatch_size=20, update_epochs=2, total_timesteps=96, eval_episodes=1)
EXPERIMENTS = itertools.count()


class Case:
    """A script in one suite. Runs are small, in this process and in the working directory, and take teacher.pt."""

    def __init__(self, name, suite):
        self.name, self.suite = name, suite
        self.module = importlib.import_module(name)
        self.is_ppo = not name.endswith("_distill")
        self.distills = name != "train_teacher"
        self.env_id = ENV_IDS[suite]
        self.Envs = getattr(self.module, {"atari": "AtariEnvs", "procgen": "ProcgenEnvs"}.get(suite, "ContinuousEnvs"))
        self.Actor = getattr(self.module, "MlpActor" if suite == "continuous" else "CnnActor")
        self.policy_file = "student.pt" if self.distills else "teacher.pt"

    def args(self, **changes):
        """Args of a small run. What the script does not know is left out."""
        values = {**SMALL, "env_id": self.env_id, "teacher": "teacher.pt", "size": "smaller", "cuda": False}
        if not self.is_ppo:
            values.update(num_steps=6, total_timesteps=48, eval_interval=0)
        values.update(exp_name=f"{self.name}{next(EXPERIMENTS)}")
        values.update(changes)
        known = {field.name for field in dataclasses.fields(self.module.Args)}
        return self.module.Args(**{name: value for name, value in values.items() if name in known})

    @property
    def batch(self):
        return 48 if self.is_ppo else 12

    def run(self, **changes):
        """Run main, and return the run's folder."""
        before = set(pathlib.Path(".").glob("runs/*"))
        self.module.main(self.args(**changes))
        (made,) = set(pathlib.Path(".").glob("runs/*")) - before or {pathlib.Path(str(changes.get("resume")))}
        return made

    def policy(self, **changes):
        """Run main, and return the content of its policy file."""
        return load(self.run(**changes) / self.policy_file)


SUITES = {name: list(ENV_IDS) if "ppd" not in name else [name.removeprefix("ppd_")] for name in NAMES}
CASES = [Case(name, suite) for name, suites in SUITES.items() for suite in suites]
QUICK = [case for case in CASES if case.suite == "continuous" or "ppd" in case.name]  # each script once
PPD = next(case for case in CASES if case.name == "ppd_continuous")
DISTILLING = [case for case in QUICK if case.distills]


def by_case(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case.name}-{case.suite}")


by_script = by_case([case for case in CASES if case.suite == "continuous"])


def make_teacher(suite="continuous", path="teacher.pt", seed=0, rewards=True, env_id=None, **changes):
    """Write a policy file with random networks, which depend on `seed`, and made-up statistics, which do not."""
    module = importlib.import_module(f"ppd_{suite}")
    network = {**NETWORKS[suite], "activation": "relu", **changes}
    torch.manual_seed(seed)
    kind = "Mlp" if suite == "continuous" else "Cnn"
    actor, critic = getattr(module, f"{kind}Actor")(network), getattr(module, f"{kind}Critic")(network)
    return_rms = module.RunningMeanStd()
    with torch.no_grad():
        head = [layer for layer in actor.modules() if isinstance(layer, nn.Linear)][-1]
        head.weight *= dict(continuous=50, atari=2000, procgen=400)[suite]  # else it acts alike in all states
        if suite == "continuous":
            actor.logstd += torch.linspace(-1, -0.5, len(actor.logstd)) + 0.1 * seed
            numbers = torch.linspace(0, 9, 3 * 100, dtype=torch.float64).view(-1, 3)
            actor.obs_rms.update(numbers[:, :1].expand(-1, *network["obs_shape"]) + 0.1)
    return_rms.update(torch.linspace(-3, 4, 50, dtype=torch.float64))
    policy = dict(format=1, suite=suite, env_id=env_id or ENV_IDS[suite], network=network, actor=actor.state_dict())
    policy.update(critic=critic.state_dict(), return_rms=return_rms.state_dict() if rewards else None)
    policy.update(global_step=0, args={}, score=None, versions={})
    module.save(path, policy)
    return path


def load(path):
    return torch.load(path, weights_only=True)


def result_of(made):
    return json.loads((made / "result.json").read_text())


def curves(made):
    """{tag: [(step, value), …]} of a run's TensorBoard files."""
    accumulator = EventAccumulator(str(made), size_guidance={"scalars": 0}).Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def same(first, second):
    """Whether two nested dicts of tensors are equal to the last bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def same_networks(first, second):
    return same(first["actor"], second["actor"]) and same(first["critic"], second["critic"])


def skip_evaluation(monkeypatch, case):
    monkeypatch.setattr(case.module, "evaluate", lambda *_, **__: {"mean": 1.0, "std": 0.0, "returns": [1.0]})


def record(monkeypatch, owner, name):
    """Record the calls of a function or method: the list of (arguments, result)."""
    calls, original = [], getattr(owner, name)

    def recorded(*arguments, **options):
        result = original(*arguments, **options)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(owner, name, recorded)
    return calls


def strike(monkeypatch, owner, name, count, action):
    """Do `action` before the count-th call of a function."""
    calls, original = itertools.count(1), getattr(owner, name)

    def struck(*arguments, **options):
        if next(calls) == count:
            action()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, struck)


def run_command(monkeypatch, line):
    """Run a command line, `python SCRIPT …` or its words, in this process."""
    words = line.split() if isinstance(line, str) else [str(word) for word in line]
    script, *arguments = words[1:] if words[0] == "python" else words
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")


@contextlib.contextmanager
def refused(capsys, *words):
    """The run ends with one line on stderr that holds the words and an exit code that is not 0; nothing is made."""
    before = sorted(pathlib.Path(".").rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    lines = [*capsys.readouterr().err.splitlines(), *str(stop.value.code).splitlines()]
    assert len(lines) == 1 and stop.value.code != 0, lines
    for word in words:
        assert word in lines[0]
    assert sorted(pathlib.Path(".").rglob("*")) == before


def forward(kind, weights, x, activation="relu"):
    """The outputs of a network in float64, from the paper's definition; weights: all those of actor or critic."""
    act = {"relu": torch.relu, "tanh": torch.tanh}[activation]
    tensors = [tensor.double() for name, tensor in weights.items() if name.endswith((".weight", ".bias"))]
    layers = list(zip(tensors[::2], tensors[1::2], strict=True))
    x = x.double()
    if kind == "nature":
        for stride in (4, 2, 1):
            x = (x if stride < 4 else x / 255).contiguous()
            x = act(F.conv2d(x, *layers.pop(0), stride))
        x = x.flatten(1)
    elif kind == "impala":
        x = x / 255
        for _ in range(3):
            x = F.max_pool2d(F.conv2d(x, *layers.pop(0), padding=1), 3, 2, padding=1)
            for _ in range(2):
                inner = F.conv2d(act(x), *layers.pop(0), padding=1)
                x = x + F.conv2d(act(inner), *layers.pop(0), padding=1)
        x = act(x.flatten(1))
    for weight, bias in layers[:-1]:
        x = act(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


def policy_of(suite, weights, outputs):
    if suite == "continuous":
        return Independent(Normal(outputs, weights["logstd"].double().exp()), 1)
    return Categorical(logits=outputs)


def assert_close(actual, expected, rtol=1e-5, atol=1e-8):
    actual, expected = (torch.as_tensor(x).detach().double().numpy() for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)
