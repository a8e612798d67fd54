"""Small environments as people write them, some with what has broken other libraries. Their ids: envs:Scripted-v0, …"""

import random
import subprocess
import time

import gymnasium as gym
import numpy as np
import torch


def observe(number, episode, t):
    """What environment `number` shows at step t of an episode. The first two numbers tell which it is."""
    return np.array([number, 5.0 * episode, np.sin(number + 3 * episode + t)])


def outcome(number, episode, t, action):
    """Reward, terminated and truncated of the step that leads to t. Episodes take 2 to 6 steps and end in every way."""
    ended = t == 2 + (number + 2 * episode) % 5
    kind = (number + episode) % 3
    reward = float(np.cos(number + 2 * t) * 3 + action.sum())
    return reward, bool(ended and kind != 1), bool(ended and kind != 0)


class Scripted(gym.Env):
    """An environment whose every number is known. It takes only actions within its bounds, which are not symmetric,
    writes all observations into the same array, and tells the end of an episode by an int."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.float32([0, -0.1]), np.float32([2, 0.3]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.number, self.episode, self.obs = seed % 1000, -1, np.zeros(3)
        self.episode, self.t = self.episode + 1, 0
        self.obs[:] = self.observe()
        return self.obs, {}

    def observe(self):
        return observe(self.number, self.episode, self.t)

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), f"{action} is out of bounds"
        self.t += 1
        self.obs[:] = self.observe()
        reward, terminated, truncated = outcome(self.number, self.episode, self.t, action)
        return self.obs, reward, int(terminated), truncated, {}


class TorchInStep(Scripted):
    """A learned reward: torch runs inside of step, with as many threads as it likes."""

    def __init__(self):
        self.net = torch.nn.Conv2d(3, 16, 5)

    def step(self, action):
        with torch.no_grad():
            self.net(torch.zeros(1, 3, 96, 96))
        return super().step(action)


class ExternalProgram(TorchInStep):
    """A simulator in a program of its own, which only close ends."""

    def __init__(self):
        super().__init__()
        self.program = subprocess.Popen(["sleep", "4321"], start_new_session=True)

    def close(self):
        time.sleep(0.1)
        self.program.kill()
        self.program.wait()


class GlobalRandomness(Scripted):
    """Draws from the global generators instead of its own."""

    def observe(self):
        return np.array([np.random.normal(), random.random(), 0])


class BadInit(Scripted):
    """A mistake of its author's in the constructor."""

    def __init__(self):
        self.gain = {}.get("config")["gain"]


class Discrete(Scripted):
    action_space = gym.spaces.Discrete(3)


for kind in (Scripted, TorchInStep, ExternalProgram, GlobalRandomness, BadInit, Discrete):
    gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=100)
gym.register("NoTimeLimit-v0", Scripted)
