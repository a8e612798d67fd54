"""benchmark/report.py: its tables equal numbers computed by hand; results that do not belong together are refused."""

import csv
import json
import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import ROOT, refused, run_command

FRACTIONS = {"Hopper-v4": [0.9, 1.0, 1.1], "HalfCheetah-v4": [0.5, 0.8, 2.0]}
ARGS = dict(student_size="larger", distill_lambda=1.0, distill_lambda_end=None, kl="forward", teacher_noise=0.0)
CONFLICTS = dict(scores={"student": 51}, learning_rate={"learning_rate": 1, "seed": 2})
CONFLICTS["one number of steps"] = {"total_timesteps": 9, "script": "student_distill.py"}


def score(mean, **more):
    return {"mean": mean, "std": 1.0, "returns": [mean] * 50, **more}


def write(name, student, teacher=100.0, env_id="Hopper-v4", script="ppd_continuous.py", seed=100, **args):
    """Write runs/NAME/result.json. An imperfect teacher scores 30."""
    student, teacher = (value if isinstance(value, dict) else score(value) for value in (student, teacher))
    result = dict(script=script, env_id=env_id, seed=seed, global_step=2004, eval_curve=[[1002, 1.0 * seed, 2.0]])
    args = {"total_timesteps": 2000, "learning_rate": 3e-4, "seed": seed, **ARGS, **args}
    result.update(args=args, versions={"torch": "2.13.0"}, student=student, teacher=teacher)
    if args["teacher_noise"]:
        result["corrupted_teacher"] = score(30.0, origin=name)
    path = pathlib.Path(f"runs/{name}/result.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


def report(monkeypatch, capsys, words="runs"):
    """Run report.py. Returns {table: {first three cells of a row: the others}}."""
    run_command(monkeypatch, f"benchmark/report.py {words}")
    tables = {}
    for title, text in re.findall(r"## Tables? (\d).*\n\n((?:\|.*\n)+)", capsys.readouterr().out):
        rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
        tables[title] = {tuple(row[:3]): row[3:] for row in rows}
    return tables


def test_tables_by_hand(folder, monkeypatch, capsys):
    for env_id, fractions in FRACTIONS.items():
        for seed, fraction in enumerate(fractions):
            write(f"{env_id}{seed}", 50 * fraction, 50.0, env_id, seed=seed)
    write("sd", 80.0, script="student_distill.py")
    tables = report(monkeypatch, capsys)
    *cells, interval, _ = tables["1"]["MuJoCo", "larger", "PPD"]
    assert cells == ["2 environments", "3", "50", f"{(0.8 * 0.9 * 1.0 * 1.1) ** (1 / 4):.3f}"]  # without 0.5 and 2.0
    generator = np.random.default_rng(1)
    drawn = np.sort(np.hstack([generator.choice(values, (20_000, 3)) for values in FRACTIONS.values()]))
    expected = np.quantile(drawn[:, 1:-1].prod(1) ** (1 / 4), [0.025, 0.975])
    assert [float(bound) for bound in interval.split(" to ")] == pytest.approx(expected, abs=0.01)
    row = ["50.00 of 50.00", "3", "50", f"{0.99 ** (1 / 3):.3f}", "0.900 to 1.100", "2527 of 2510"]
    assert tables["5"]["Hopper-v4", "larger", "PPD"] == row
    assert tables["5"]["Hopper-v4", "larger", "SD"] == ["80.00 of 100.00", "1", "50", "0.800", "–", "2540 of 2510"]
    assert tables["5"]["Hopper-v4", "same", "TD"] == ["missing", "–", "–", "–", "–", "2489 of 2510"]


@pytest.mark.parametrize(("scores", "mean"), [((-3, 90, 90), "0.000"), ((-3, 90, 90, 90), "0.900")])
def test_scores_below_0(folder, monkeypatch, capsys, scores, mean):
    for seed, student in enumerate(scores):
        write(seed, student, seed=seed)
    assert report(monkeypatch, capsys)["1"]["MuJoCo", "larger", "PPD"][3] == mean


def test_imperfect_teachers_and_ppo(folder, monkeypatch, capsys):
    write("noise1", 60.0, teacher_noise=0.05)
    write("noise2", 61.0, teacher_noise=0.05, script="student_distill.py")
    write("ppo", 40.0, distill_lambda=0.0)
    write("ppd", 95.0)
    write("other", 96.0, env_id="Ant-v4")  # not in Table 7: there is no PPO
    tables = report(monkeypatch, capsys)
    assert tables["2"]["MuJoCo,noise=0.05", "teacher", "imperfect"][:4] == ["30.00 of 100.00", "1", "50", "0.300"]
    assert tables["2"]["MuJoCo,noise=0.05", "larger", "SD"][:4] == ["61.00 of 100.00", "1", "50", "0.610"]
    assert [cells[0] for cells in tables["7"].values()] == ["40.00 of 100.00", "95.00 of 100.00"]
    run_command(monkeypatch, "benchmark/report.py runs")
    assert "| Hopper-v4,noise=0.05 | larger | PPD | 1 | 1 | 1 | 2.000 | – |" in capsys.readouterr().out


def test_games(folder, monkeypatch, capsys):
    student, teacher = (dict(test=score(mean), train=score(12.0)) for mean in (5.0, 10.0))
    write("coinrun", student, teacher, "coinrun")
    write("pong", score(9.0, human_normalized=0.3), score(15.0, human_normalized=0.6), "PongNoFrameskip-v4")
    tables = report(monkeypatch, capsys, "runs --output out")
    fractions = [tables["1"][suite, "larger", "PPD"][3] for suite in ("Atari", "Procgen", "Procgen-train")]
    assert fractions == ["0.500", "0.500", "1.000"]
    assert tables["5"]["coinrun-train", "larger", "PPD"][0] == "12.00 of 12.00"
    assert tables["5"]["Pong", "larger", "PPD"][0] == "0.30 of 0.60"
    points = re.findall(r"(coinrun.*),PPD.*,100,(\d+)", (folder / "out/curves.csv").read_text())
    assert points == [("coinrun", "1002"), ("coinrun", "2004"), ("coinrun-train", "2004")]


def test_figures_and_curves(folder, monkeypatch, capsys):
    for seed in (100, 200):
        write(seed, 3.0 * seed, seed=seed)
        write(f"lambda{seed}", 2.0 * seed, seed=seed, distill_lambda=2.0)
    report(monkeypatch, capsys, "runs --output out")
    rows = list(csv.DictReader((folder / "out/curves.csv").open(encoding="utf-8")))
    curve = [(row["seed"], row["step"], row["return"]) for row in rows if row["method"] == "PPD"]
    assert curve[1:3] == [("100", "2004", "300.0"), ("200", "1002", "200.0")] and len(curve) == 4
    for name, label in {"figure1-larger": "million steps", "figure2": "λ (0: PPO)"}.items():
        assert plt.imread(folder / f"out/{name}.png").shape[1] == 1600
        assert label in (folder / f"out/{name}.svg").read_text(encoding="utf-8")


def test_results_of_this_repository(folder, monkeypatch, capsys):
    files = " ".join(map(str, ROOT.glob("benchmark/results/*.json")))
    tables = report(monkeypatch, capsys, f"--total-timesteps 2000000 --output out {files}")
    assert tables["5"]["Hopper-v4", "smaller", "PPD"][:4] == ["3733.02 of 3710.84", "3", "50", "1.006"]
    assert tables["7"]["MuJoCo", "larger", "PPO"][3] == "0.846"
    assert (folder / "out/curves.csv").read_text().count("Hopper-v4,PPD,smaller,0.0,100,") == 40


@pytest.mark.parametrize("word", CONFLICTS)
def test_results_that_do_not_belong_together(folder, monkeypatch, capsys, word):
    write("first", 50.0)
    write("second", **{"student": 50.0, **CONFLICTS[word]})
    with refused(capsys, word, "runs/first/result.json", "runs/second/result.json"):
        run_command(monkeypatch, "benchmark/report.py runs")


@pytest.mark.parametrize("content", [None, "", "[1]", '{"a": 1}'])
def test_files_that_are_no_results(folder, monkeypatch, capsys, content):
    (folder / "runs").mkdir()
    if content is not None:
        (folder / "runs/result.json").write_text(content)
    with refused(capsys, "runs"):
        run_command(monkeypatch, "benchmark/report.py runs")
    write("first", 50.0)
    with refused(capsys, "--output runs"):
        run_command(monkeypatch, "benchmark/report.py runs/first --output runs")


def test_steps_to_a_share_of_the_teachers_score(folder, monkeypatch, capsys):
    """Variants of ours have rows of their own, and are in none of the paper's tables."""
    for seed in (49, 50, 60):  # the first evaluation, of a teacher's 100
        write(seed, 95.0, seed=seed, ratio_grad=False)
    write("mine", 95.0, script="my_ppd.py")
    run_command(monkeypatch, "benchmark/report.py runs")
    output = capsys.readouterr().out
    row = "| Hopper-v4 | larger | PPD --no-ratio-grad | 3 | 1 (1 to 2) | 2 (2 to 2) | 0.950 | 0.950 to 0.950 |"
    assert row in output and "| MuJoCo | larger | PPD | missing" in output and "| larger | my_ppd | 1 |" in output


def test_results_of_different_commits(folder, monkeypatch, capsys):
    """One warning, which names two of them."""
    for seed in (1, 2, 3):
        write(seed, 95.0, seed=seed, **({"new_flag": 1} if seed > 1 else {}))
    run_command(monkeypatch, "benchmark/report.py runs")
    (line,) = capsys.readouterr().err.splitlines()
    assert "different commits" in line and "runs/1/result.json" in line
