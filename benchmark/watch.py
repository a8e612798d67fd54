"""Watch a policy play: print its scores, and film it if asked.

    python benchmark/watch.py teachers/Hopper-v4.pt --episodes 3
    python benchmark/watch.py teachers/BreakoutNoFrameskip-v4.pt --output breakout.mp4

The policy plays as when it is scored: with deterministic actions, on Procgen with stochastic actions on unseen levels.
A film runs in real time, games at 15 steps per second. A .mp4 file needs the packages of benchmark/requirements.txt.
MuJoCo draws with OpenGL: it needs a display, or the library of EGL or of OSMesa.
"""

import argparse
import functools
import os
import subprocess
import sys
from fractions import Fraction
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_teacher  # noqa: E402


def choose_opengl():
    """Set MUJOCO_GL to the first of MuJoCo's ways to OpenGL that works. Each is tried in a process of its own: in the
    same process a failure would break the next one too."""
    backends = [os.environ["MUJOCO_GL"]] if os.environ.get("MUJOCO_GL") else ["glfw", "egl", "osmesa"]
    attempt = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
    for backend in backends:
        os.environ["MUJOCO_GL"] = backend
        if subprocess.run([sys.executable, "-c", attempt], capture_output=True).returncode == 0:
            return
    tried = ", ".join(f"MUJOCO_GL={backend}" for backend in backends)
    sys.exit(
        f"--output: MuJoCo cannot draw here (tried: {tried}); without a display: apt install libegl1 or libosmesa6"
    )


def make_envs_with(args, owner, name, **options):
    """Make the environment as for a score, but call the function or class owner.name with these options too."""
    with mock.patch.object(owner, name, functools.partial(getattr(owner, name), **options)):
        return train_teacher.make_envs(args, 1, unseen=True)


def make_drawing_envs(envs, args):
    """Make the gymnasium environment of `envs` anew, so that it can draw itself."""
    env = envs.envs[0]
    if "rgb_array" not in env.metadata.get("render_modes", []):
        sys.exit(f"--output: {args.env_id} cannot be filmed: it has no render mode rgb_array")
    is_mujoco = hasattr(env.unwrapped, "mujoco_renderer")
    if is_mujoco:
        choose_opengl()
    envs.close()
    envs = make_envs_with(args, gym, "make", render_mode="rgb_array")
    if is_mujoco:  # gymnasium's camera stands still, and the robot runs out of the picture
        env = envs.envs[0].unwrapped
        cameras = [env.model.camera(number).name for number in range(env.model.ncam)]
        if "track" in cameras:
            env.mujoco_renderer.camera_id = cameras.index("track")
    try:
        envs.reset([args.seed])
        envs.envs[0].render()
    except gym.error.DependencyNotInstalled as error:  # pygame, which draws some environments
        sys.exit(f"--output: {args.env_id} cannot be filmed: {error}")
    return envs


class Film:
    """An environment for train_teacher.evaluate that keeps pictures of the states in which the policy acts."""

    num_envs = 1

    def __init__(self, envs, args, seconds, fps, width):
        self.envs, self.colour_envs = envs, None
        suite = train_teacher.suite_of(args.env_id)
        steps_per_second = 15
        if suite == "continuous":
            steps_per_second = envs.envs[0].metadata.get("render_fps", 30)
            self.envs = make_drawing_envs(envs, args)
            self.draw = self.envs.envs[0].render
        elif suite == "atari":  # the same game in colour: it gets the same seed and the same actions
            full_size = {"grayscale": False, "img_height": 210, "img_width": 160}
            self.colour_envs = make_envs_with(args, train_teacher.ale_py, "AtariVectorEnv", **full_size)
            self.draw = lambda: self.colour_obs[0, -1]
        else:
            import procgen

            envs.close()
            self.envs = make_envs_with(args, procgen, "ProcgenGym3Env", render_mode="rgb_array")
            self.draw = lambda: self.envs.envs.get_info()[0]["rgb"]
        self.every = max(1, round(steps_per_second / fps))  # steps per picture
        self.fps = Fraction(round(steps_per_second), self.every)
        self.frames, self.width = [], width
        self.num_steps, self.max_steps = 0, seconds * steps_per_second

    def reset(self, seed):
        if self.colour_envs:
            self.colour_obs = self.colour_envs.reset(seed)
        return self.envs.reset(seed)

    def step(self, actions):
        if self.num_steps < self.max_steps and self.num_steps % self.every == 0:
            frame = Image.fromarray(self.draw())
            width = self.width or frame.width
            height = round(frame.height * width / frame.width)
            frame = frame.resize((width // 2 * 2, height // 2 * 2))  # .mp4 wants even numbers
            self.frames.append(np.array(frame))
        self.num_steps += 1
        if self.colour_envs:
            self.colour_obs = self.colour_envs.step(actions)[0]
        return self.envs.step(actions)

    def close(self):
        self.envs.close()
        if self.colour_envs:
            self.colour_envs.close()

    def save(self, path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        height, width, _ = self.frames[0].shape
        if path.endswith(".gif"):  # 64 colours for the whole film make a small file; an octree keeps the rare ones
            some_pixels = Image.fromarray(np.concatenate([frame[::4, ::4] for frame in self.frames]))
            palette = some_pixels.quantize(64, method=Image.Quantize.FASTOCTREE)
            first, *others = [Image.fromarray(frame).quantize(palette=palette, dither=0) for frame in self.frames]
            milliseconds = 10 * round(100 / self.fps)  # the format counts hundredths of a second
            first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
        else:
            import av

            with av.open(path, "w") as file:
                stream = file.add_stream("libx264", self.fps)
                stream.width, stream.height = width, height
                for frame in self.frames:
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
                file.mux(stream.encode())  # what is still in the encoder
        print(f"saved {path}: {len(self.frames)} frames, {width} x {height}, {round(self.fps)} per second")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="a policy file, teacher or student")
    parser.add_argument("--episodes", type=int, default=1, help="number of episodes (default: 1)")
    parser.add_argument("--seed", type=int, default=100, help="seed of the episodes (default: 100)")
    parser.add_argument("--output", help="film to write, a .mp4 or .gif file")
    parser.add_argument("--seconds", type=float, default=20, help="length of the film at most (default: 20)")
    parser.add_argument("--fps", type=float, default=25, help="about so many frames per second (default: 25)")
    parser.add_argument("--width", type=int, help="width of the film in pixels (default: the environment's)")
    arguments = parser.parse_args()
    output = arguments.output
    if min(arguments.episodes, arguments.seconds, arguments.fps) <= 0 or (arguments.width or 16) < 16:
        sys.exit("--episodes, --seconds, --fps: more than 0; --width: at least 16")
    if output and not output.endswith((".mp4", ".gif")):
        sys.exit(f"--output {output}: the name must end in .mp4 or .gif")
    if output and os.path.exists(output):
        sys.exit(f"--output {output}: this file exists")
    if output and output.endswith(".mp4"):
        try:
            import av  # noqa: F401
        except ImportError as error:
            sys.exit(
                f"--output {output}: no ffmpeg ({error}): pip install -r benchmark/requirements.txt, or write a .gif"
            )
    policy = train_teacher.load("policy", arguments.policy, "a policy file", format=1)
    args = train_teacher.Args(env_id=policy["env_id"], seed=arguments.seed, eval_episodes=arguments.episodes)
    args.distribution_mode = policy["args"].get("distribution_mode", "easy")
    actor, _ = train_teacher.make_networks(policy["network"])
    actor.load_state_dict(policy["actor"])
    torch.set_num_threads(1)
    try:
        envs = train_teacher.make_envs(args, 1, unseen=True)
    except gym.error.UnregisteredEnv as error:
        sys.exit(f"policy {arguments.policy}: {error}")
    if output:
        envs = Film(envs, args, arguments.seconds, arguments.fps, arguments.width)
    is_deterministic = policy["suite"] != "procgen"
    scored = train_teacher.evaluate(actor, envs, args, is_deterministic)
    for number, episode_return in enumerate(scored["returns"], 1):
        print(f"episode {number}: {episode_return:.2f}")
    print(f"mean: {scored['mean']:.2f} ± {scored['std']:.2f} over {arguments.episodes} episodes")
    if output:
        envs.save(output)


if __name__ == "__main__":
    main()
