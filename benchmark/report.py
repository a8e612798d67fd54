"""The paper's tables and figures (https://arxiv.org/abs/2407.15134) from result files, beside the paper's own numbers.

    python benchmark/report.py runs > report.md
    python benchmark/report.py runs/*/result.json --output report > report.md

It prints Tables 1, 2, 5, 6 and 7 as Markdown, and how many steps the students need. With --output it draws Figures 1
and 2 (PNG, SVG) and writes all training curves to curves.csv. Folders are searched for result.json. It needs
`pip install -r benchmark/requirements.txt`.

A fraction is a student's score divided by its teacher's, in Table 2 the original one's. A negative fraction counts as
0. A teacher that scores 0 or less gives no fraction. The mean of the fractions of all seeds and environments is their
geometric mean without the lowest and the highest quarter (geometric interquartile mean; of fewer than four, all count).
The 95% interval is a percentile bootstrap that draws seeds anew within each environment; with one seed there is none.
Scores are means over seeds, human-normalized on Atari, on unseen levels on Procgen (Procgen-train: training levels).
PPD has λ = 1, except in Figure 2. Runs with --kl reverse, --no-ratio-grad or --teacher-logstd, and of scripts of your
own, are not the paper's. They are in the tables of training and in the figures.
"""

import argparse
import csv
import glob
import json
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

STUDENTS = [(size, method) for size in ("smaller", "same", "larger") for method in ("TD", "SD", "PPD")]
COLORS = {"TD": "#009E73", "SD": "#E69F00", "PPD": "#0072B2", "PPO": "#CC79A7"}  # Okabe and Ito's, for the colour-blind
COLORS.update(smaller="#D55E00", same="#56B4E9", larger="#0072B2")
NO_SETTINGS = {"seed", "exp_name", "teacher", "save_path", "save_interval", "resume", "eval_interval", "track", "cuda"}
NO_SETTINGS |= {"overwrite", "env_threads", "checkpoint_interval"}  # of the first edition
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "paper.csv")) as file:  # its Tables 1, 2, 5
    PAPER = {row["name"]: row for row in csv.DictReader(file)}
PAPER_PPO = {  # its Table 7
    "Atari": {"larger PPO": "0.38", "larger PPD": "1.16"},
    "Procgen": {"larger PPO": "0.71", "larger PPD": "1.04"},
    "Procgen-train": {"larger PPO": "0.44", "larger PPD": "0.95"},
}
# What goes beyond the paper: field of Args, its default, what to type, and how its line is drawn
VARIANTS = [
    ("kl", "forward", "--kl reverse"),
    ("ratio_grad", True, "--no-ratio-grad"),
    ("teacher_logstd", False, "--teacher-logstd"),
]
LINE_STYLES = {"": "-", "--no-ratio-grad": ":", "--teacher-logstd": "--", "--no-ratio-grad --teacher-logstd": "-."}
LINE_STYLES.update({"--kl reverse": "--", "--kl reverse --no-ratio-grad": "-."})


def points(score):
    return score.get("human_normalized", score["mean"])


def read(path):
    """The student of a result file, and its teacher if that is imperfect; on Procgen for each kind of levels."""
    try:
        with open(path) as file:
            result = json.load(file)
        script, args = result["script"], result.get("args", {})
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"{path}: there is no result.json of a run")
    if "student" not in result:  # a teacher's, or of speed.py
        return []
    env_id, noise, distill_lambda = result["env_id"], args["teacher_noise"], args.get("distill_lambda")
    is_changing = args.get("distill_lambda_end") is not None
    if is_changing or (noise and "corrupted_teacher" not in result):
        print(f"left out: {path} has a changing λ, or is of an older edition", file=sys.stderr)
        return []
    is_atari = env_id.startswith("ALE/") or env_id.endswith("NoFrameskip-v4")
    suite = "MuJoCo" if env_id in PAPER else "other"
    suite = "Procgen" if "test" in result["student"] else "Atari" if is_atari else suite
    method = {"student_distill.py": "SD", "teacher_distill.py": "TD"}.get(script, script.removesuffix(".py"))
    if script in ("ppd_atari.py", "ppd_continuous.py", "ppd_procgen.py"):
        method = {0: "PPO", 1: "PPD"}.get(distill_lambda, f"PPD λ={distill_lambda}")
    flags = [flag for name, default, flag in VARIANTS if args.get(name, default) != default]
    method = " ".join([method, *flags])
    runs = []
    for levels, suffix in [("test", ""), ("train", "-train")] if suite == "Procgen" else [("all", "")]:
        run = {**args, "args": args, "path": path, "versions": result["versions"], "method": method}
        run.update(size=args["student_size"], suite=suite + suffix)
        run["size_and_flags"] = " ".join([args["student_size"], *flags])
        run["environment"] = env_id.removesuffix("NoFrameskip-v4") + suffix
        for name in {"student", "teacher", "corrupted_teacher"} & result.keys():
            run[name] = result[name].get(levels, result[name])
        last = [result["global_step"], run["student"]["mean"], run["student"]["std"]]
        curve = [] if levels == "train" else result["eval_curve"]  # evaluations in training are on unseen levels
        run["curve"] = [point for point in curve if point[0] < last[0]] + [last]
        runs.append(run)
        if noise:
            run["suite"] += f",noise={noise}"
            run["environment"] += f",noise={noise}"
            imperfect = {"method": "imperfect", "size": "teacher", "student": run["corrupted_teacher"]}
            runs.append({**run, **imperfect, "args": {}, "versions": {}, "curve": []})
    return runs


def select(runs, **wanted):
    return [run for run in runs if wanted.items() <= run.items()]


def check(runs):
    """Stop where results do not belong together. Returns them without copies."""
    firsts, kept, mixed = {}, {}, ""
    for run in sorted(runs, key=lambda run: -len(run["curve"])):
        experiment = run["environment"], run["method"], run["size"]
        first = firsts.setdefault(experiment, run)
        twin = kept.setdefault((experiment, run["seed"]), run)
        names = (run["args"].keys() & first["args"].keys()) - NO_SETTINGS
        changed = sorted(name for name in names if run[name] != first[name])
        if run["args"].keys() != first["args"].keys() or run["versions"] != first["versions"]:
            mixed = f"{first['path']}, {run['path']}"
        if not changed and run["args"] and run["student"] != twin["student"]:
            first, changed = twin, ["scores"]
        if changed:
            sys.exit(f"{first['path']}, {run['path']}: same experiment, other {', '.join(changed)}; move one away")
    if mixed:
        print(f"warning: results of different commits or packages are together, such as {mixed}", file=sys.stderr)
    return [kept[key] for key in sorted(kept)]


def geometric_iqm(*strata, axis=-1):
    return np.exp(scipy.stats.trim_mean(np.log(np.concatenate(strata, axis)), 0.25, axis))


def estimate(runs):
    """The fractions of each environment, their mean, and the bounds of its interval; nan where there are none."""
    strata, interval = {}, (np.nan, np.nan)
    for run in runs:
        student, teacher = points(run["student"]), points(run["teacher"])
        if teacher > 0:  # 1e-300 is as good as 0, and has a logarithm
            strata.setdefault(run["environment"], []).append(max(student / teacher, 1e-300))
    samples = list(strata.values())
    mean = geometric_iqm(*samples) if samples else np.nan
    if min(map(len, samples), default=1) > 1:  # scipy draws from each sample by itself: the bootstrap is stratified
        interval = scipy.stats.bootstrap(samples, geometric_iqm, method="percentile", rng=0).confidence_interval
    return samples, mean, interval


def print_table(title, runs, key, kinds, paper):
    """A row for each suite or environment, and each kind of run, a pair of size and method."""
    print(f"\n## {title}\n\n| suite or environment | student | method | score of teacher's", end=" | ")
    print(f"seeds | episodes | fraction | 95% interval | paper |\n{'|---' * 9}|")
    for name in sorted({run[key] for run in runs}):
        for size, method in kinds:
            number = paper.get(name, {}).get(f"{size} {method}" if method != "imperfect" else "teacher") or "–"
            found = select(runs, **{key: name}, size=size, method=method)
            samples, mean, (low, high) = estimate(found)
            cells = ["no fraction" if found else "missing", "–", "–", "–", "–"]
            if samples:
                counted = [run for run in found if points(run["teacher"]) > 0]
                score, teacher = (np.mean([points(run[who]) for run in counted]) for who in ("student", "teacher"))
                cells = [
                    f"{score:.2f} of {teacher:.2f}" if len(samples) == 1 else f"{len(samples)} environments",
                    " or ".join(map(str, sorted({*map(len, samples)}))),
                    " or ".join(sorted({str(len(run["student"]["returns"])) for run in found})),
                    f"{mean:.3f}",
                    "–" if np.isnan(low) else f"{low:.3f} to {high:.3f}",
                ]
            number += f" of {paper[name]['teacher']}" if key == "environment" and name in paper else ""
            print(f"| {' | '.join([name, size, method, *cells, number])} |")


def steps_to(run, share):
    """Steps until an evaluation first reaches this share of the teacher's (raw) score; infinite if none does."""
    wanted = share * run["teacher"]["mean"]
    return min((step for step, mean, _ in run["curve"] if mean >= wanted > 0), default=np.inf)


def print_progress(runs, teacher):
    """A row for each environment, size and method: how fast the students learn."""
    print(f"\n## Training: steps until an evaluation reaches a share of the {teacher}'s score, and the end\n")
    print("Steps in thousands: the median over seeds, the fastest and the slowest; inf: never; –: not evaluated.\n")
    print("| environment | student | method | seeds | steps to 50% | steps to 90% | final fraction | 95% interval |")
    print("|---" * 8 + "|")
    for kind in sorted({(run["environment"], run["size"], run["method"]) for run in runs}):
        found = select(runs, **dict(zip(("environment", "size", "method"), kind, strict=True)))
        cells = []
        for share in (0.5, 0.9):
            steps = np.array([steps_to(run, share) for run in found]) / 1000
            cell = f"{np.median(steps):.0f}" + f" ({steps.min():.0f} to {steps.max():.0f})" * (len(steps) > 1)
            cells.append(cell if len(found[0]["curve"]) > 1 else "–")
        _, mean, (low, high) = estimate(found)
        cells += ["–" if np.isnan(mean) else f"{mean:.3f}", "–" if np.isnan(low) else f"{low:.3f} to {high:.3f}"]
        print(f"| {' | '.join([*kind, str(len(found)), *cells])} |")


def training_curve(runs):
    """Steps in millions, mean return over seeds, lowest and highest seed."""
    curves = [{step: mean for step, mean, _ in run["curve"]} for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    returns = np.array([[curve[step] for step in steps] for curve in curves])
    return np.array(steps) / 1e6, returns.mean(0), returns.min(0), returns.max(0)


def lambda_curve(runs):
    """λ, mean fraction of the teacher's score, bounds of its interval."""
    lambdas = sorted({run["distill_lambda"] for run in runs})
    _, means, bounds = zip(*(estimate(select(runs, distill_lambda=value)) for value in lambdas), strict=True)
    return lambdas, means, *np.transpose(bounds)


def draw(path, runs, key, curve, title, xlabel, ylabel, teacher=None):
    """A figure with a panel for each environment, and in it a line with a band for each method or size."""
    environments = sorted({run["environment"] for run in runs})
    num_rows, num_columns = -(-len(environments) // 3), min(3, len(environments))
    figure = plt.figure(figsize=(8, 2.5 * num_rows + 1.3), layout="constrained")
    for index, environment in enumerate(environments, 1):
        axis = figure.add_subplot(num_rows, num_columns, index, title=environment, xlabel=xlabel, ylabel=ylabel)
        axis.locator_params("x", nbins=4)
        found = select(runs, environment=environment)
        for name in sorted({run[key] for run in found}):
            kind, _, flags = name.partition(" ")
            if flags in LINE_STYLES:
                x, y, low, high = curve(select(found, **{key: name}))
                color = COLORS.get(kind, "gray")
                axis.plot(x, y, LINE_STYLES[flags], marker=".", markersize=3, color=color, label=name)
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        level = teacher or np.mean([run["teacher"]["mean"] for run in found])
        axis.axhline(level, color="black", linestyle="--", linewidth=1, label="teacher")
    lines = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title)
    figure.savefig(f"{path}.png", dpi=200)
    figure.savefig(f"{path}.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="result files, or folders with result.json files")
    parser.add_argument("--total-timesteps", type=int, metavar="N", help="use only the results of runs of N steps")
    parser.add_argument("--output", metavar="DIR", help="new folder for the figures and curves.csv")
    options = parser.parse_args()
    if os.path.exists(options.output or ""):
        sys.exit(f"--output {options.output}: it exists; name a new folder")
    runs = []
    for path in options.results:
        for file in glob.glob(f"{path}/**/result.json", recursive=True) or [path]:
            runs += read(os.path.normpath(file))
    if options.total_timesteps:
        runs = select(runs, total_timesteps=options.total_timesteps)
    steps = {run["total_timesteps"]: run["path"] for run in runs}
    if len(steps) != 1:
        sys.exit(f"students with one number of steps are needed, here are {steps or 'none'}; see --total-timesteps")
    runs = check(runs)
    clean = select(runs, teacher_noise=0)
    noisy = [run for run in runs if run["teacher_noise"]]
    with_ppo = {run["environment"] for run in select(clean, method="PPO")}
    same = [run for run in clean if run["environment"] in with_ppo]
    packages = sorted({f"{name} {version}" for run in runs for name, version in run["versions"].items()})
    environments = [name for name in PAPER if PAPER[name]["teacher"] and "noise" not in name and "-train" not in name]
    missing = [name for name in environments if not select(runs, environment=name)]
    print("# Results beside the paper's\n\n" + __doc__.split("\n\n")[-1])
    print(f"* Steps: {[*steps][0]:,} (the paper: 2,000,000)\n* Packages: {', '.join(packages)}")
    print(f"* Environments of the paper without results: {', '.join(missing) or 'none'}")
    print_table("Table 1: fraction of the teacher's score", clean, "suite", STUDENTS, PAPER)
    print_table("Table 2: imperfect teachers", noisy, "suite", [("teacher", "imperfect"), *STUDENTS[6:]], PAPER)
    print_table("Tables 5 and 6: scores (6: Procgen-train)", clean, "environment", STUDENTS, PAPER)
    print_table("Table 7: PPO beside PPD", same, "suite", [("larger", "PPO"), ("larger", "PPD")], PAPER_PPO)
    print_progress(runs, "teacher")
    students = [run for run in noisy if run["size"] != "teacher"]
    if students:
        print_progress([{**run, "teacher": run["corrupted_teacher"]} for run in students], "imperfect teacher")
    if not options.output:
        return
    os.makedirs(options.output)
    unseen = [run for run in clean if not run["suite"].endswith("-train")]
    for size in {run["size"] for run in unseen}:
        title = f"{size} student: mean over seeds, band from the lowest to the highest seed"
        found, path = select(unseen, size=size), f"{options.output}/figure1-{size}"
        draw(path, found, "method", training_curve, title, "million steps", "return")
    with_lambdas = {run["environment"] for run in unseen if "λ" in run["method"]}
    ppd = [run for run in unseen if run["environment"] in with_lambdas and run["method"].startswith(("PPD", "PPO"))]
    if ppd:
        title, path = "geometric interquartile mean of the seeds, band: 95% interval", f"{options.output}/figure2"
        draw(path, ppd, "size_and_flags", lambda_curve, title, "λ (0: PPO)", "fraction of teacher's score", teacher=1)
    with open(f"{options.output}/curves.csv", "w", encoding="utf-8") as file:
        columns = ["environment", "method", "size", "teacher_noise", "seed"]
        print(*columns, "step", "return", "standard_deviation", "teacher", sep=",", file=file)
        for run in runs:
            for point in run["curve"]:
                print(*(run[name] for name in columns), *point, run["teacher"]["mean"], sep=",", file=file)


if __name__ == "__main__":
    main()
