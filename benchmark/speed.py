"""Steps per second and peak memory of a script, where its time goes, and how far that is from the least it could be.

    python benchmark/speed.py ppd_continuous.py --env-id Hopper-v4 --student-size larger
    python benchmark/speed.py --repeats 5 --rival "python rival.py …" train_teacher.py --env-id Hopper-v4

What follows the script's name are the script's own arguments; where it needs a teacher and none is named, it gets an
untrained one. The script is trained for some seconds as it stands, with a stopwatch around its environments' `step`:

    environments   inside `step`
    inference      between two steps of one rollout
    update         from the last step of a rollout to the first of the next

The floor is measured after it in the same process: the same environments take the recorded actions once more with
nothing between the steps, and networks of the same shapes make as many forward and backward passes on random tensors:
no losses, no optimizer, no statistics, no log. With --rival, a command that prints "steps/s X" as its last words runs
in turn with ours; the ratio is that of the medians. Measure on a quiet machine.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))


class Stopwatch:
    """Stands in for a script's class of vector environments: notes when each step began and ended, its actions and
    torch's threads, and after `seconds` sends the signal that makes the script save its state and stop."""

    def __init__(self, envs_class, seconds):
        self.envs_class, self.seconds = envs_class, seconds
        self.times, self.actions, self.threads = [], [], None

    def __call__(self, *args, **kwargs):
        self.make = lambda: self.envs_class(*args, **kwargs)
        envs = self.make()
        reset, step = envs.reset, envs.step

        def timed_reset(*reset_args):
            self.reset_args = reset_args
            return reset(*reset_args)

        def timed_step(actions):
            start = time.perf_counter()
            result = step(actions)
            self.times.append((start, time.perf_counter()))
            self.actions.append(actions.copy())
            self.threads = torch.get_num_threads()
            if start - self.times[0][0] > self.seconds:
                signal.raise_signal(signal.SIGTERM)
                self.seconds = float("inf")
            return result

        envs.reset, envs.step = timed_reset, timed_step
        return envs

    def replay(self):
        """Seconds of every step, when the same environments do the same once more and nothing else happens."""
        envs, seconds = self.make(), []
        envs.reset(*self.reset_args)
        for actions in self.actions:
            start = time.perf_counter()
            envs.step(actions)
            seconds.append(time.perf_counter() - start)
        envs.close()
        return seconds


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_passes(module, obs_shape, batch_sizes, device, backward):
    """Seconds of one forward pass (and one backward pass) for each of `batch_sizes`, on random observations: the median
    over repetitions, after some that do not count."""
    batches = []
    for n in batch_sizes:
        obs = torch.randint(256, (n, *obs_shape), dtype=torch.uint8) if len(obs_shape) == 3 else None
        batches.append((torch.randn((n, *obs_shape)) if obs is None else obs).to(device))
    seconds, begin = [], time.perf_counter()
    while len(seconds) < 8 or (time.perf_counter() - begin < 1 and len(seconds) < 100):
        synchronize(device)
        start = time.perf_counter()
        for obs in batches:
            with torch.set_grad_enabled(backward):
                outputs = module(obs)
            if backward:
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                sum(output.float().sum() for output in outputs).backward()
                module.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def measure_networks(script, state, checkpoint, rollout_threads, device):
    """The floor of inference and update, in seconds per rollout: as many passes of networks of the same shapes."""
    args, shape = state["args"], state["policy"]["network"]["obs_shape"]
    steps, num_envs = args["num_steps"], args["num_envs"]

    def load(policy):
        spaces = policy["suite"], shape, policy["network"]["action_dim"]
        actor, critic, _ = script.load_policy(policy, checkpoint, *spaces)
        return actor.to(device), critic.to(device)

    actor, critic = load(state["policy"])
    samples, epochs, minibatches = steps * num_envs, args.get("update_epochs", 1), [steps * num_envs]
    asked, acting = [], actor  # networks that are asked once about each observation; and the one that acts
    if "minibatch_size" in args:
        size = args["minibatch_size"]
        minibatches = [min(size, samples - first) for first in range(0, samples, size)]
        asked = [(critic, [*minibatches, num_envs])]
        asked += [(load(state["teacher"])[0], minibatches)] if "teacher" in state else []
    else:
        teacher_actor, teacher_critic = load(state["teacher"])
        asked = [(teacher_critic, minibatches)]
        if state["script"] == "teacher_distill.py":
            acting = teacher_actor
        else:
            asked += [(teacher_actor, minibatches)]
    update_threads = torch.get_num_threads() if "minibatch_size" in args else rollout_threads
    torch.set_num_threads(rollout_threads)
    inference = steps * time_passes(acting, shape, [num_envs], device, False)
    torch.set_num_threads(update_threads)
    update = sum(time_passes(module, shape, sizes, device, False) for module, sizes in asked)
    for module in (actor, critic):
        update += epochs * time_passes(module, shape, minibatches, device, True)
    return inference, update


def load_script(path):
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure(path, argv, seconds):
    """Train with the script for some seconds, in a temporary folder, then measure the floor; a dict for `--output`."""
    argv = [os.path.abspath(word) if os.path.isfile(word) else word for word in argv]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if os.path.basename(path) != "train_teacher.py" and "--teacher" not in argv:
            command = [sys.executable, os.path.join(HERE, "..", "train_teacher.py"), "--total-timesteps", "1"]
            command += ["--num-envs", "1", "--num-steps", "2", "--minibatch-size", "2", "--eval-episodes", "0"]
            command += ["--env-id", argv[argv.index("--env-id") + 1], "--save-path", "../teacher.pt"]
            os.mkdir("untrained")  # its run stays out of the way of the measured one
            subprocess.run(command, check=True, capture_output=True, cwd="untrained")
            argv += ["--teacher", "teacher.pt"]
        script, watches = load_script(path), []
        for name, value in list(vars(script).items()):
            if isinstance(value, type) and value.__module__ == script.__name__ and hasattr(value, "step"):
                watches.append(Stopwatch(value, seconds))
                setattr(script, name, watches[-1])
        update_threads = torch.get_num_threads()
        try:
            stop_never = ["--total-timesteps", str(10**9), "--eval-episodes", "0", "--eval-interval", "0"]
            script.main(script.parse_args([*argv, *stop_never]))
        except SystemExit as stop:
            if stop.code != 128 + signal.SIGTERM:
                raise
        (watch,) = [watch for watch in watches if watch.times]  # that of the environment's suite
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        torch.set_num_threads(update_threads)
        checkpoint = os.path.join("runs", os.listdir("runs")[0], "checkpoint.pt")
        state = script.read_training_state(checkpoint)[1]
        args = state["args"]
        device = torch.device("cuda" if args["cuda"] and torch.cuda.is_available() else "cpu")

        steps = args["num_steps"]
        starts = range(0, len(watch.times) - steps, steps)
        rollouts = [watch.times[first : first + steps + 1] for first in starts]  # with the first step of the next one
        warm_up = max(1, len(rollouts) // 20)
        if len(rollouts) < warm_up + 2:
            raise SystemExit(f"speed.py: error: --seconds {seconds}: only {len(rollouts)} rollouts; give it more time")
        parts = dict(environments=[], inference=[], update=[], total=[])
        for times in rollouts[warm_up:]:
            gaps = [after[0] - before[1] for before, after in zip(times[:-1], times[1:], strict=True)]
            first_gap = statistics.mean(gaps[:-1]) if steps > 1 else 0.0  # inference before the rollout's first step
            parts["environments"].append(sum(end - start for start, end in times[:-1]))
            parts["inference"].append(sum(gaps[:-1]) + first_gap)
            parts["update"].append(gaps[-1] - first_gap)
            parts["total"].append(times[-1][0] - times[0][0])
        measured = {name: statistics.mean(values) for name, values in parts.items()}
        replayed = watch.replay()[warm_up * steps : len(rollouts) * steps]
        floor = dict(environments=sum(replayed) / len(parts["total"]))
        floor["inference"], floor["update"] = measure_networks(script, state, checkpoint, watch.threads, device)
        floor["total"] = sum(floor.values())
        os.chdir(HERE)
    samples = steps * args["num_envs"]
    result = dict(script=os.path.basename(path), arguments=argv, env_id=args["env_id"], device=str(device))
    result |= dict(threads=update_threads, rollouts=len(parts["total"]), steps_per_rollout=samples)
    result |= dict(steps_per_second=samples / measured["total"], seconds_per_rollout=measured, floor=floor)
    result |= dict(total_over_floor=measured["total"] / floor["total"], peak_memory_bytes=peak_memory)
    if device.type == "cuda":
        result |= dict(gpu=torch.cuda.get_device_name(), peak_gpu_memory_bytes=torch.cuda.max_memory_allocated())
    return result | dict(versions=script.versions(), machine=platform.processor() or platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of training in each measurement (default: 20)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, each a process of its own (default: 3)")
    parser.add_argument("--rival", help='a command to run in turn with ours, whose last words are "steps/s X"')
    parser.add_argument("--output", help="a JSON file for the result")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("script", help="the script to measure")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    if not os.path.isfile(options.script):
        parser.error(f"{options.script}: no such file")
    if "--env-id" not in options.arguments:
        parser.error("the script's arguments have to name an environment: --env-id ID")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    if options.in_process:
        print(json.dumps(measure(os.path.abspath(options.script), options.arguments, options.seconds)))
        return
    ours, rivals = [], []
    command = [sys.executable, __file__, "--seconds", str(options.seconds), "--in-process", options.script]
    for _ in range(options.repeats):
        for runs, words in ((ours, command + options.arguments), (rivals, shlex.split(options.rival or ""))):
            if words:
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{done.stderr[-2000:]}\nspeed.py: error: {shlex.join(words)} failed")
                last_line = done.stdout.strip().splitlines()[-1]
                runs.append(json.loads(last_line) if runs is ours else float(last_line.split("steps/s")[1]))
    ours.sort(key=lambda run: run["steps_per_second"])
    result = dict(ours[(len(ours) - 1) // 2], all_steps_per_second=[run["steps_per_second"] for run in ours])
    print(f"{result['script']} {' '.join(options.arguments)}: {result['steps_per_second']:.0f} steps/s", end="")
    print(f" (median of {len(ours)}), peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB")
    print(f"{'ms per rollout':>16} {'measured':>10} {'floor':>10} {'ratio':>7}")
    for name, measured in result["seconds_per_rollout"].items():
        floor = result["floor"][name]
        print(f"{name:>16} {1000 * measured:10.1f} {1000 * floor:10.1f} {measured / floor:7.2f}")
    if rivals:
        ratio = result["steps_per_second"] / statistics.median(rivals)
        result |= dict(rival=options.rival, rival_steps_per_second=rivals, ratio_to_rival=ratio)
        print(f"rival: {statistics.median(rivals):.0f} steps/s; ours / rival: {ratio:.2f}")
    if options.output:
        with open(options.output, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
