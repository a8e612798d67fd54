"""Steps per second and peak memory of a script, beside those of another program.

    python benchmark/speed.py ppd_continuous.py --teacher teachers/Hopper-v4.pt --total-timesteps 100000
    python benchmark/speed.py --against runs/before ppd_continuous.py --teacher teachers/Hopper-v4.pt
    python benchmark/speed.py --repeats 5 --rival "python benchmark/rival.py runs/sb3_distill --env-id Hopper-v4" \
        ppd_continuous.py --teacher teachers/Hopper-v4.pt --total-timesteps 100000 --eval-episodes 1

What follows the script are its own arguments. It runs as it stands, in a temporary folder. Its speed is the `sps` of
result.json, that of training without evaluation. The other program runs in turn with it, and is one of

    --against FOLDER    the same script with the same arguments, in another checkout of this repository
    --rival COMMAND     any command that prints "steps/s X"

The ratio is that of the medians. Peak memory is that of the largest process. Measure on a quiet machine.
"""

import argparse
import glob
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile


def run(command, folder):
    """Run a command in a folder. Returns what it printed, and its peak memory in bytes."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if process.returncode:
        sys.exit(f"{printed[-2000:]}\nerror: {shlex.join(command)} ended with {process.returncode}")
    return printed, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_script(path, arguments):
    """Run a script of this repository. Returns steps per second, peak memory in bytes, and its result.json."""
    with tempfile.TemporaryDirectory() as folder:
        _, memory = run([sys.executable, path, *arguments], folder)
        with open(glob.glob(f"{folder}/runs/*/result.json")[0]) as file:
            result = json.load(file)
    return result["sps"], memory, result


def measure_rival(command):
    """Run a rival's command. Returns steps per second and peak memory in bytes."""
    printed, memory = run(shlex.split(command), ".")
    speeds = re.findall(r"steps/s ([\d.]+)", printed)
    if not speeds:
        sys.exit(f'{printed[-2000:]}\nerror: {command} did not print "steps/s X"')
    return float(speeds[-1]), memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program (default: 3)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--rival", metavar="COMMAND", help='a command that prints "steps/s X"')
    other.add_argument("--against", metavar="FOLDER", help="another checkout of this repository")
    parser.add_argument("--output", metavar="FILE", help="also write all values to this JSON file")
    parser.add_argument("script", help="the script to measure")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args()
    arguments = [os.path.abspath(word) if os.path.exists(word) else word for word in args.arguments]

    speeds, memories = {"script": []}, {"script": []}
    if args.rival or args.against:
        speeds["other"], memories["other"] = [], []
    for i in range(args.repeats):
        for name in speeds:
            if name == "script":
                speed, memory, result = measure_script(os.path.abspath(args.script), arguments)
            elif args.against:
                path = os.path.join(os.path.abspath(args.against), os.path.basename(args.script))
                speed, memory, _ = measure_script(path, arguments)
            else:
                speed, memory = measure_rival(args.rival)
            speeds[name].append(speed)
            memories[name].append(memory)
            print(f"run {i + 1} of {args.repeats}, {name}: {speed:.0f} steps/s, {memory / 2**20:.0f} MiB", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        print(f"{name}: median {median:.0f} steps/s, peak memory {max(memories[name]) / 2**20:.0f} MiB")
    ratio = medians["script"] / medians["other"] if "other" in medians else None
    if ratio:
        print(f"script / other: {ratio:.2f}")
    if args.output:
        content = {
            "script": os.path.basename(args.script),
            "arguments": args.arguments,
            "other": args.rival or args.against,
            "steps_per_second": speeds,
            "peak_memory_bytes": memories,
            "ratio": ratio,
            "versions": {"python": platform.python_version(), **result["versions"]},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        }
        with open(args.output, "w") as file:
            json.dump(content, file, indent=2)


if __name__ == "__main__":
    main()
