"""The loop on environments that nobody here made: three of panda-gym, two of MuJoCo.

    python experiments/others.py reach selfalign --llm chat --model NAME
    python experiments/others.py reach fixed --llm replay:runs/others/reach-selfalign-1/llm.jsonl
    python experiments/others.py reach sparse  # 1 on success
    python experiments/others.py reach dense   # the environment's own reward

The same command continues a run that was stopped. No episode ends early.
"""

import argparse
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import panda_gym  # noqa: F401, it registers its environments
import study  # noqa: F401, it finds the modules
import torch

from envs import Feature, Space, Task
from run import Run
from selfalign import Config, choose_llm, train, update_theta

ARM = "a Franka Panda arm with a two-finger gripper over a table at height 0"
MOVES = ". The robot acts\n25 times per second: it moves its hand by up to 0.05 m along each axis"
HAND = {
    "hand_height": Feature("m", 0.0, 0.3, "height of the hand above the table"),
    "hand_speed": Feature("m/s", 0.0, 2.0, "speed of the hand"),
}
OBJECT = {
    "hand_to_object": Feature("m", 0.0, 0.3, "distance from the hand to the cube's centre"),
    "object_to_goal": Feature("m", 0.0, 0.3, "distance from the cube's centre to the goal"),
    "object_height": Feature("m", 0.0, 0.3, "height of the cube's centre; 0.02 on the table"),
    "object_speed": Feature("m/s", 0.0, 1.0, "speed of the cube"),
    **HAND,
}


def panda(obs, action):
    """Features of panda-gym's observation: hand 3, its velocity 3, (fingers 1), object 12."""
    x, goal = obs["observation"], obs["desired_goal"]
    features = {"hand_height": x[2], "hand_speed": np.linalg.norm(x[3:6])}
    if len(x) == 6:
        return {"hand_to_goal": np.linalg.norm(x[:3] - goal), **features}
    cube, speed = x[-12:-9], np.linalg.norm(x[-6:-3])
    features |= {"hand_to_object": np.linalg.norm(cube - x[:3]), "object_height": cube[2]}
    features |= {"object_to_goal": np.linalg.norm(cube - goal), "object_speed": speed}
    return {**features, "gripper_opening": x[6]}  # of a gripper that moves


def reacher(obs, action):
    speed, effort = np.linalg.norm(obs[6:8]), np.linalg.norm(action)
    return {"tip_to_target": np.linalg.norm(obs[8:10]), "joint_speed": speed, "effort": effort}


def pusher(obs, action):
    tip, cube, goal = obs[14:17], obs[17:20], obs[20:23]
    features = {"tip_to_object": np.linalg.norm(tip - cube), "effort": np.linalg.norm(action)}
    return {**features, "object_to_goal": np.linalg.norm((cube - goal)[:2])}


# fmt: off
REACH = Task(
    "reach",
    "Move the hand to the goal, a point up to 0.15 m from the middle of the space above the table: "
    "bring it within 0.05 m and keep it there for 5 consecutive control steps (0.2 s).",
    {"hand_to_goal": Feature("m", 0.0, 0.3, "distance from the hand to the goal"), **HAND},
    success=(("hand_to_goal", "<=", 0.05),), steps=5,
    robot=ARM, details=f"{MOVES}.", dt=0.04,
)
PUSH = Task(
    "push",
    "Push the cube, 0.04 m wide, over the table to the goal: bring its centre within 0.05 m of the "
    "goal and keep it there for 5 consecutive control steps (0.2 s).",
    OBJECT,
    success=(("object_to_goal", "<=", 0.05),), steps=5, stages=(("hand_to_object", "<=", 0.06),),
    robot=ARM, details=f"{MOVES}. The gripper stays closed.", dt=0.04,
)
FINGERS = Feature("m", 0.0, 0.08, "distance between the fingers; 0.04 when they hold the cube")
PICK = Task(
    "pick",
    "Take the cube, 0.04 m wide, to the goal, a point on the table or up to 0.2 m above it: bring "
    "its centre within 0.05 m of the goal and keep it there for 5 consecutive control steps (0.2 "
    "s).",
    {**OBJECT, "gripper_opening": FINGERS},
    success=(("object_to_goal", "<=", 0.05),), steps=5, stages=(("hand_to_object", "<=", 0.03),),
    robot=ARM, details=f"{MOVES}, and\nopens or closes the gripper.", dt=0.04,
)
REACHER = Task(
    "reacher",
    "Move the tip of the arm to the target: bring it within 0.02 m and keep it there for 10 "
    "consecutive control steps (0.2 s).",
    {
        "tip_to_target": Feature("m", 0.0, 0.4, "distance from the arm's tip to the target"),
        "joint_speed": Feature("rad/s", 0.0, 30.0, "norm of the two joints' speeds"),
        "effort": Feature("", 0.0, 1.4, "norm of the two torques, each between -1 and 1"),
    },
    success=(("tip_to_target", "<=", 0.02),), steps=10,
    robot="an arm with two joints in a plane, 0.2 m long, simulated in MuJoCo",
    details=". It acts 50 times per second, by the torques of its joints.", dt=0.02,
)
PUSHER = Task(
    "pusher",
    "Push the object over the table to the goal: bring it within 0.1 m of the goal and keep it "
    "there for 10 consecutive control steps (0.5 s).",
    {
        "tip_to_object": Feature("m", 0.0, 1.0, "distance from the arm's tip to the object"),
        "object_to_goal": Feature("m", 0.0, 0.5, "horizontal distance from object to goal"),
        "effort": Feature("", 0.0, 2.6, "norm of the seven torques, each between -1 and 1"),
    },
    success=(("object_to_goal", "<=", 0.1),), steps=10, stages=(("tip_to_object", "<=", 0.15),),
    robot="an arm with seven joints over a table, and an object, a cylinder 0.1 m wide, simulated "
    "in MuJoCo",
    details=". It acts 20 times per second, by the torques of its joints.", dt=0.05, horizon=100,
)
# fmt: on
# The environment, its task, and how its observation is read and scaled.
OTHERS = {
    "reach": ("PandaReach-v3", REACH, panda, 10.0),
    "push": ("PandaPush-v3", PUSH, panda, 10.0),
    "pick": ("PandaPickAndPlace-v3", PICK, panda, 10.0),
    "reacher": ("Reacher-v5", REACHER, reacher, 1.0),
    "pusher": ("Pusher-v5", PUSHER, pusher, 1.0),
}


class Other:
    """One of OTHERS with named features. own: its own reward instead of 1 on success."""

    def __init__(self, name: str, own: bool = False):
        make, self.task, self.measure, self.scale = OTHERS[name]
        kind = {"reward_type": "dense"} if "Panda" in make else {}
        self.env, self.own = gymnasium.make(make, disable_env_checker=True, **kind).unwrapped, own
        self.most = self.env.action_space.high
        self.action_space = Space(-1.0, 1.0, self.most.shape, np.float32)
        size = len(self.flat(self.env.reset(seed=0)[0]))
        self.observation_space = Space(-np.inf, np.inf, (size,), np.float32)

    def flat(self, obs):
        parts = [obs["observation"], obs["desired_goal"]] if isinstance(obs, dict) else [obs]
        return (self.scale * np.concatenate(parts)).astype(np.float32)

    def reset(self, seed=None, options=None):
        self.t, self.held, self.done = 0, 0, False
        return self.flat(self.env.reset(seed=seed)[0]), {}

    def step(self, action):
        obs, reward, *_ = self.env.step(action * self.most)
        measured, self.t = self.measure(obs, action), self.t + 1
        features = {name: float(measured[name]) for name in self.task.features}
        (name, _, value) = self.task.success[0]
        self.held = self.held + 1 if features[name] <= value else 0
        self.done |= self.held >= self.task.steps
        info = {"features": features, "success": self.done}
        reward = float(reward) if self.own else float(self.held >= self.task.steps)
        return self.flat(obs), reward, False, self.t == self.task.horizon, info


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=OTHERS)
    parser.add_argument("method", choices=("selfalign", "fixed", "sparse", "dense"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--llm", default="chat", help="see selfalign.py (default: chat)")
    parser.add_argument("--model", default="", help="see selfalign.py")
    args = parser.parse_args()
    own, given = args.method == "dense", {"workers": False, **vars(args)}
    name, method = given.pop("name"), given.pop("method")
    c = Config(task=name, reward="sparse" if own else method, **given)
    folder = Path(f"runs/others/{name}-{method}-{c.seed}")
    run = Run(folder, resume=folder.exists())
    llm = None if c.reward == "sparse" else choose_llm(c, run)
    torch.set_num_threads(1)
    update = update_theta if method == "selfalign" else None
    train(partial(Other, name, own), OTHERS[name][1], llm, run, c, update)


if __name__ == "__main__":
    main()
