"""A teacher learns, PPD brings a student to its score in a fifth of the steps, and a broken loss does not."""

import json

import pytest
import torch

import ppd_continuous
import train_teacher

TEACHER_STEPS = 150_000
ENVIRONMENT = ["--env-id", "InvertedPendulum-v4", "--eval-episodes", "20", "--env-threads", "1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("teacher") / "teacher.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        steps = ["--num-steps", "64", "--total-timesteps", str(TEACHER_STEPS)]
        train_teacher.main(train_teacher.parse_args([*ENVIRONMENT, *steps, "--save-path", path]))
    return path


def distill(teacher, folder, monkeypatch):
    monkeypatch.chdir(folder)
    steps = ["--total-timesteps", str(TEACHER_STEPS // 5)]
    ppd_continuous.main(ppd_continuous.parse_args([*ENVIRONMENT, *steps, "--teacher", teacher]))
    (result,) = folder.glob("runs/*/result.json")
    return json.loads(result.read_text())


def test_teacher_and_student_learn(teacher, tmp_path, monkeypatch):
    result = distill(teacher, tmp_path, monkeypatch)
    assert result["teacher"]["mean"] >= 950
    assert result["ratio"] >= 0.95


@pytest.mark.parametrize("fault", ["shuffled", "sign"])
def test_broken_distillation_does_not_learn(teacher, tmp_path, monkeypatch, fault):
    kl, loss = ppd_continuous.teacher_kl, ppd_continuous.distillation_loss
    if fault == "shuffled":  # the teacher's answers to other states
        monkeypatch.setattr(
            ppd_continuous, "teacher_kl", lambda mean, *rest: kl(mean[torch.randperm(len(mean))], *rest)
        )
    else:
        monkeypatch.setattr(ppd_continuous, "distillation_loss", lambda *arguments: -loss(*arguments))
    assert distill(teacher, tmp_path, monkeypatch)["ratio"] < 0.5
