"""Print the commands of the paper's experiments (https://arxiv.org/abs/2407.15134) that have no result yet, one a line.

    python benchmark/reproduce.py --suite mujoco | xargs -P 2 -I{} sh -c '{}'
    python benchmark/reproduce.py --suite procgen --env-ids coinrun --teacher 'teachers/{env_id}.pt' --methods ppd

Run the same line again, in the same folder, until it says that all students are done. A command that comes back each
time has failed; run it alone to see why.

* A run is done if it has a result.json. It is looked for in runs/, by its script and its flags.
* A run with a checkpoint.pt and no result.json was interrupted. Its command continues it with --resume.
* A student needs its teacher. While the teacher's file is missing, the command that trains it is printed instead.

Run it only when its commands have ended: one that still runs looks like an interrupted one. What follows `--` is passed
on to the students, for example `--methods ppd -- --distill-lambda 2`.
"""

import argparse
import glob
import itertools
import json
import os
import shlex
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
import train_teacher  # noqa: E402

ATARI = "Atlantis BeamRider CrazyClimber DemonAttack Enduro Freeway MsPacman Pong Qbert Seaquest Zaxxon".split()
IMPERFECT_ATARI = "BeamRider CrazyClimber MsPacman Qbert".split()  # the paper, Table 2
ENV_IDS = {
    "mujoco": ["Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Humanoid-v4"],
    "atari": [f"{game}NoFrameskip-v4" for game in ATARI],
    "procgen": ["coinrun", "jumper", "miner", "ninja"],
}
PPD_SCRIPTS = {"mujoco": "ppd_continuous.py", "atari": "ppd_atari.py", "procgen": "ppd_procgen.py"}
METHODS = ["ppd", "student", "teacher", "ppo"]
SIZES = ["smaller", "same", "larger"]
SEEDS = [100, 200, 300, 400, 500]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=ENV_IDS, required=True)
    add("--env-ids", nargs="+", metavar="ID", help="environments (default: the paper's)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="ppo has the larger size only (default: all)")
    add("--sizes", nargs="+", choices=SIZES, default=SIZES, help="sizes of the student (default: all)")
    add("--seeds", nargs="+", type=int, metavar="SEED", default=SEEDS, help="default: 100 200 300 400 500")
    imperfect_help = "distill teachers with noise S (default: 0.05) into the larger student, instead; without ppo"
    add("--imperfect", nargs="?", type=float, const=0.05, metavar="S", help=imperfect_help)
    teachers_help = "folder of the teachers ENV-SEED.pt, one for each seed (default: %(default)s)"
    add("--teachers", metavar="DIR", default="runs/teachers", help=teachers_help)
    add("--teacher", metavar="PATH", help="one teacher for all seeds, such as 'teachers/{env_id}.pt'")
    add("--total-timesteps", type=int, metavar="N", default=2_000_000, help="steps of a student (default: 2 M)")
    add("--teacher-timesteps", type=int, metavar="N", help="steps of a teacher (default: 10 M, on Procgen 30 M)")
    add("--eval-episodes", type=int, metavar="N", help="episodes of an evaluation (default: 50, on Procgen 200)")
    interval_help = "evaluate a student every N steps, for its curve; 0: only at the end (default: 200,000)"
    add("--eval-interval", type=int, metavar="N", default=200_000, help=interval_help)
    add("--threads", type=int, metavar="N", default=1, help="OMP_NUM_THREADS, the cores of each run (default: 1)")
    add("further_flags", nargs="*", metavar="-- FLAGS", help="further flags of the students")
    options = parser.parse_args()

    is_procgen = options.suite == "procgen"
    options.eval_episodes = options.eval_episodes or (200 if is_procgen else 50)
    options.teacher_timesteps = options.teacher_timesteps or (30_000_000 if is_procgen else 10_000_000)
    if options.suite == "atari" and options.imperfect:
        ENV_IDS["atari"] = [f"{game}NoFrameskip-v4" for game in IMPERFECT_ATARI]
    options.env_ids = options.env_ids or ENV_IDS[options.suite]
    further_flags = [word.split("=")[0].replace("_", "-") for word in options.further_flags]
    if options.methods != ["ppd"] and "--distill-lambda" in further_flags:
        sys.exit("-- --distill-lambda: only with --methods ppd; SD and TD have no λ, and PPO is λ = 0")
    own_flags = "env-id seed teacher student-size total-timesteps eval-episodes eval-interval exp-name"
    for flag in own_flags.split():
        if f"--{flag}" in further_flags:
            sys.exit(f"-- --{flag}: this is for reproduce.py to choose; its options are before the -- (see --help)")
    suite = "continuous" if options.suite == "mujoco" else options.suite
    for env_id in options.env_ids:
        if train_teacher.suite_of(env_id) != suite:
            sys.exit(f"--env-ids {env_id}: not an environment of --suite {options.suite}")
    return options


def read_runs():
    """What is in runs/: a list of dicts."""
    runs = []
    for folder in sorted(glob.glob("runs/*")):
        result, checkpoint = f"{folder}/result.json", f"{folder}/checkpoint.pt"
        run = {"folder": folder, "is_done": False, "has_checkpoint": os.path.exists(checkpoint)}
        try:
            with open(result) as file:
                run.update(json.load(file), is_done=True)
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):  # the last: stopped while writing it
            if run["has_checkpoint"]:
                run.update(train_teacher.load("interrupted run:", checkpoint, "a training state; move its folder away"))
        runs.append(run)
    return runs


def list_students(options):
    """The script and the flags of each student, without environment, seed and teacher."""
    students = []
    for method in options.methods:
        if method == "ppo" and options.imperfect:
            continue  # it has no teacher
        for size in ["larger"] if method == "ppo" or options.imperfect else options.sizes:
            script = PPD_SCRIPTS[options.suite] if method in ("ppd", "ppo") else f"{method}_distill.py"
            flags = {"exp_name": f"{method}-{size}", "student_size": size}
            if method == "ppo":
                flags["distill_lambda"] = 0.0
            if options.imperfect:
                flags["exp_name"] += f"-noise{options.imperfect}"
                flags["teacher_noise"] = options.imperfect
            for word in options.further_flags:  # named, because a run with other flags is another experiment
                flags["exp_name"] += "-" + word.lstrip("-")
            flags["total_timesteps"] = options.total_timesteps
            flags["eval_interval"] = options.eval_interval
            students.append((script, flags))
    return students


def main():
    options = parse()
    runs, students = read_runs(), list_students(options)
    teacher_lines, student_lines = [], []
    num_done, num_resumed = 0, 0
    for seed, env_id in itertools.product(options.seeds, options.env_ids):
        file_name = env_id.replace("/", "-").replace(":", "-")
        teacher = os.path.normpath(f"{options.teachers}/{file_name}-{seed}.pt")
        if options.teacher:
            teacher = os.path.normpath(options.teacher.replace("{env_id}", file_name))
        has_teacher = os.path.exists(teacher)
        if options.teacher and not has_teacher:
            sys.exit(f"--teacher {teacher}: no such file; without this flag, teachers are trained")
        experiments = students
        if not has_teacher:
            flags = {"exp_name": "train_teacher", "save_path": teacher, "total_timesteps": options.teacher_timesteps}
            experiments = [("train_teacher.py", flags)]

        for script, flags in experiments:
            flags = {"env_id": env_id, "seed": seed, "eval_episodes": options.eval_episodes, **flags}
            if has_teacher:
                flags["teacher"] = teacher
            same = [run for run in runs if run.get("script") == script and flags.items() <= run["args"].items()]
            if has_teacher and any(run["is_done"] for run in same):
                num_done += 1
                continue
            words = ["python", os.path.relpath(f"{ROOT}/{script}")]
            interrupted = [run["folder"] for run in same if run["has_checkpoint"]]
            if interrupted:
                words += ["--resume", interrupted[-1]]
                num_resumed += 1
            else:
                for name, value in flags.items():
                    words += [f"--{name.replace('_', '-')}", str(value)]
                words += options.further_flags if has_teacher else []
            lines = student_lines if has_teacher else teacher_lines
            lines.append(f"OMP_NUM_THREADS={options.threads} {shlex.join(words)}")

    if teacher_lines or student_lines:
        print("\n".join([*teacher_lines, *student_lines]))
    total = len(options.seeds) * len(options.env_ids) * len(students)
    summary = f"{num_done} of {total} students are done"
    if num_resumed:
        summary += f", {num_resumed} interrupted runs go on"
    if teacher_lines:
        summary += f"; run this line again for the students of {len(teacher_lines)} teachers"
    print(summary, file=sys.stderr)


if __name__ == "__main__":
    main()
