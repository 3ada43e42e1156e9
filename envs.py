"""Three physical skills for a Franka Panda arm in PyBullet: touch, grasp and push.

    from envs import PandaEnv

    env = PandaEnv("touch")
    obs, info = env.reset(seed=1)
    obs, reward, terminated, truncated, info = env.step([0, 0, -1, 0])  # the hand moves down
    print(info["features"]["contact_force"])  # N; what a reward function may read
    print(info["success"])  # the task's own test

The call signatures are Gymnasium's, but only numpy and pybullet are needed. Seen from the robot, x
points forward, y left and z up, in metres from the foot of the arm.
"""

import inspect
import math
import operator
import tempfile
import time
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pybullet
import pybullet_data

SUBSTEPS = 12  # of physics, at 240 Hz, in a control step
DT = SUBSTEPS / 240.0  # s per control step
EPISODE_STEPS = 50
LONGEST_EPISODE = 10  # check_env refuses episodes of more horizons than this
COMPARE = {">": operator.gt, ">=": operator.ge, "<=": operator.le}

Feature = namedtuple("Feature", "unit low high text")  # most readings lie between low and high
Space = namedtuple("Space", "low high shape dtype")  # as gymnasium.spaces.Box(*space) takes it


def _require(fulfilled, words):
    if not fulfilled:
        raise ValueError(words)


@dataclass(frozen=True)
class Task:
    """A skill: what the LLM is told, what is measured, and when the robot has succeeded.

    A condition is (feature, comparison, value), with a comparison from COMPARE. A task is done once
    all conditions of `success` have held for `steps` steps in a row. It has succeeded if it is done
    and no condition of `limits` has held at any step of the episode.
    """

    name: str
    goal: str  # success in words
    features: dict[str, Feature]  # what a reward may read, in the order of info["features"]
    success: tuple  # conditions
    steps: int = 1
    stages: tuple = ()  # conditions on the way to success, for the stand-in's score alone
    limits: tuple = ()  # conditions that fail the episode
    robot: str = "a robot"  # what is there, for the prompts
    details: str = "."  # text that follows `robot` where the LLM writes or analyses a reward
    dt: float = DT  # s per step
    horizon: int = EPISODE_STEPS  # steps per episode
    discount: float = 0.97  # of the return that the agent maximises
    start: Callable | None = None  # PandaEnv: maps rng.uniform to reset's `options`
    opens: bool = False  # PandaEnv: the gripper starts open and obeys actions, else it stays closed

    def __post_init__(self):
        for name, sign, value in (*self.stages, *self.success, *self.limits):
            known = name in self.features and sign in COMPARE
            choices = f"one of {', '.join(self.features)} by one of {', '.join(COMPARE)}"
            _require(known, f"task {self.name}: {name} {sign} {value} must compare {choices}")
        # The LLM learns the number of steps from the goal alone.
        said = self.steps == 1 or f"{self.steps} consecutive" in self.goal
        _require(said, f'task {self.name}: the goal must say "{self.steps} consecutive" steps')


# What PandaEnv measures.
# fmt: off
FEATURES = {
    "hand_to_block": Feature("m", 0.0, 0.25, "distance from the point between the fingertips to "
        "the block's centre; 0.03 to 0.04 when closed fingers touch the block's side, below 0.015 "
        "when open ones are around it"),
    "hand_beside_block": Feature("m", 0.0, 0.25, "the horizontal part of that distance"),
    "hand_above_block": Feature("m", -0.02, 0.2, "its vertical part: height of that point above "
        "the block's centre"),
    "hand_height": Feature("m", 0.0, 0.3, "height of the point between the fingertips above the "
        "table; 0.02 to 0.03 beside a block on the table"),
    "hand_speed": Feature("m/s", 0.0, 0.4, "speed of the hand; usually 0.1 to 0.3 on the way, "
        "below 0.1 at rest"),
    "contact_force": Feature("N", 0.0, 20.0, "total normal force between hand and block, mean over "
        "the step; a light touch reads 0.02 to 0.5, a knock 5 to 50"),
    "gripper_opening": Feature("m", 0.0, 0.08, "distance between the two fingers; the block is "
        "0.04 m wide"),
    "grip_force": Feature("N", 0.0, 10.0, "the smaller of the two fingers' forces on the block; "
        "0 unless both touch it; about 3 in a full grip"),
    "block_height": Feature("m", 0.0, 0.3, "height of the block's underside above the table"),
    "block_displacement": Feature("m", 0.0, 0.25, "horizontal distance of the block from where the "
        "episode began"),
    "block_speed": Feature("m/s", 0.0, 0.4, "speed of the block; about 0.1 while it is pushed"),
    "block_to_goal": Feature("m", 0.0, 0.25, "horizontal distance from the block's centre to the "
        "goal"),
    "push_alignment": Feature("", -1.0, 1.0, "cosine of the angle between hand-to-block and "
        "block-to-goal, seen from above; 1 when the hand is right behind the block"),
}
# fmt: on


def _start_touch(uniform):
    block = uniform(0.48, 0.56), uniform(-0.08, 0.08)
    hand = uniform(0.36, 0.42), uniform(-0.08, 0.08), uniform(0.05, 0.12)
    return {"block": block, "hand": hand}


def _start_grasp(uniform):
    block = uniform(0.45, 0.55), uniform(-0.06, 0.06)
    hand = uniform(0.45, 0.55), uniform(-0.06, 0.06), uniform(0.12, 0.16)
    return {"block": block, "hand": hand}


def _start_push(uniform):
    x, y = uniform(0.42, 0.48), uniform(-0.06, 0.06)
    hand = x - uniform(0.06, 0.09), y + uniform(-0.02, 0.02), 0.03
    goal = x + uniform(0.10, 0.16), y + uniform(-0.04, 0.04)
    return {"block": (x, y), "hand": hand, "goal": goal}


def _panda_task(name, goal, features, **rest):
    robot = "a Franka Panda arm with a two-finger gripper over a table, and one block, "
    robot += "a cube of 0.04 m and 50 g"
    details = (
        " with a\nfriction coefficient of 0.5. The arm is compliant: it pushes with newtons, not "
        "with hundreds of newtons. The robot acts\n20 times per second: it moves its hand's target "
        "by up to 0.01 m along each axis, at 0.3 m/s at most, and opens or closes\nthe gripper, "
        "which takes about 5 steps to grip a block."
    )
    measured = {feature: FEATURES[feature] for feature in features.split()}
    return Task(name, goal, measured, robot=robot, details=details, **rest)


TOUCH = _panda_task(
    "touch",
    "Touch the block and keep contact with it for 10 consecutive control steps (0.5 s), gently: "
    "the contact force must never exceed 2 N and the block must never be further than 0.05 m from "
    "where it started, at any time of the attempt. The gripper stays closed and starts mostly "
    "0.1 to 0.23 m from the block.",
    "hand_to_block hand_beside_block hand_above_block hand_height hand_speed contact_force "
    "block_displacement block_speed",
    stages=(("hand_to_block", "<=", 0.05),),
    success=(("contact_force", ">", 0.01),),
    steps=10,
    limits=(("contact_force", ">", 2.0), ("block_displacement", ">", 0.05)),
    start=_start_touch,
)
GRASP = _panda_task(
    "grasp",
    "Grasp the block and lift it: hold it between both fingers with its underside 0.08 m or more "
    "above the table for 5 consecutive control steps (0.25 s). The gripper starts open, about "
    "0.12 m higher than the block and up to 0.15 m, mostly 0.06 m, beside it.",
    "hand_to_block hand_beside_block hand_above_block hand_height gripper_opening contact_force "
    "grip_force block_height block_displacement",
    stages=(("hand_to_block", "<=", 0.02), ("grip_force", ">", 0.0)),
    success=(("grip_force", ">", 0.0), ("block_height", ">=", 0.08)),
    steps=5,
    start=_start_grasp,
    opens=True,
)
PUSH = _panda_task(
    "push",
    "Push the block over the table to the goal: bring its centre within 0.03 m of the goal, which "
    "lies 0.10 to 0.16 m ahead of it, and keep it there for 3 consecutive control steps (0.15 s). "
    "The gripper stays closed and starts behind the block, 0.06 to 0.09 m from its centre.",
    "hand_to_block hand_beside_block hand_above_block hand_height hand_speed contact_force "
    "block_displacement block_speed block_to_goal push_alignment",
    stages=(("contact_force", ">", 0.01),),
    success=(("block_to_goal", "<=", 0.03),),
    steps=3,
    start=_start_push,
)
TASKS = {task.name: task for task in (TOUCH, GRASP, PUSH)}


# The arm is compliant, like a real one in impedance mode: its motors pull the hand towards a target
# just ahead of it, with capped torques. Gravity acts on the block alone, as if the arm's controller
# compensated for the arm's weight.
MAX_DELTA = 0.01  # m that an action of 1 moves the hand's target
MAX_LEAD = 0.03  # m by which the target may lead the hand along each axis
FINGER_FORCE = 3.0  # N per finger
FINGER_MAX = 0.04  # m that a finger travels; the gripper opens by twice that
BLOCK_HALF = 0.02  # half the block's edge, m
BLOCK_MASS = 0.05  # kg
BLOCK_FRICTION = 0.5  # 1.0 for table and fingers; Bullet multiplies the two
WORKSPACE = np.array([[0.30, -0.25, 0.025], [0.75, 0.25, 0.35]])  # of the hand's target, m
START_ERROR = 0.01  # m by which a start may lie outside the workspace, or the hand miss its start
ARM, FINGERS, HAND = tuple(range(7)), (9, 10), 11  # in panda.urdf; HAND is between the fingertips
VIEW = pybullet.computeViewMatrix((1.05, 0.45, 0.45), (0.5, 0, 0.07), (0, 0, 1))  # for policies
WIDE_VIEW = pybullet.computeViewMatrix((1.6, 0.75, 0.6), (0.33, 0, 0.26), (0, 0, 1))  # for people
PROJECTION = pybullet.computeProjectionMatrixFOV(fov=38.0, aspect=1.0, nearVal=0.1, farVal=3.0)
RENDERER = {"renderer": pybullet.ER_TINY_RENDERER, "flags": pybullet.ER_NO_SEGMENTATION_MASK}


class PandaEnv:
    """One Panda, one block and a task: a `Task`, or the name of one in TASKS.

    Actions, (4,), clipped to [-1, 1]: how far the hand's target moves along x, y and z, in units of
    MAX_DELTA; how far the gripper opens, from closed (-1) to open (1), if the task opens it.
    Observations: "pixels", uint8 (9, 84, 84), the last three RGB frames, oldest first; or "state",
    float32 (24,) in [-10, 10], listed in `_observe`.

    The reward is 1.0 at each step at which success has held for `task.steps` steps and no limit has
    been broken yet, else 0.0. `info` holds `features`, `success` (whether the task has succeeded so
    far) and `is_success`, the same for Stable-Baselines3. Episodes last `task.horizon` steps.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": round(1 / DT)}

    def __init__(self, task: Task | str, obs: str = "state", render_mode: str | None = None):
        self.task = task = TASKS.get(task, task) if isinstance(task, str) else task
        _require(isinstance(task, Task), f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
        _require(task.dt == DT, f"task {task.name}: a step lasts {DT} s here, not {task.dt} s")
        _require(task.start is not None, f"task {task.name}: PandaEnv needs its `start`")
        unknown = ", ".join(set(task.features) - set(FEATURES))
        _require(not unknown, f"task {task.name}: PandaEnv measures FEATURES, not {unknown}")
        _require(obs in ("state", "pixels"), f"unknown obs {obs!r}: choose state or pixels")
        modes = (None, *self.metadata["render_modes"])
        _require(render_mode in modes, f"unknown render_mode {render_mode!r}: choose from {modes}")
        self.obs, self.render_mode = obs, render_mode
        self.action_space = Space(-1.0, 1.0, (4,), np.float32)
        self.observation_space = Space(-10.0, 10.0, (24,), np.float32)
        if obs == "pixels":
            self.observation_space = Space(0, 255, (9, 84, 84), np.uint8)
        self.np_random = np.random.default_rng()
        self.t = task.horizon  # no episode has begun
        client = pybullet.connect(pybullet.GUI if render_mode == "human" else pybullet.DIRECT)
        functions = inspect.getmembers(pybullet, inspect.isbuiltin)
        bound = {name: partial(call, physicsClientId=client) for name, call in functions}
        self._sim = SimpleNamespace(**bound)
        # Disconnects only once, because PyBullet gives the number to another client then.
        self._end = weakref.finalize(self, self._sim.disconnect)
        self._build()

    def reset(self, seed: int | None = None, options: dict | None = None):
        """Starts an episode: returns (obs, info).

        options: where to start instead of at random, in m: "hand" (x, y, z), "block" (x, y),
        "goal" (x, y; by default the block's). Raises ValueError for places out of reach.
        """
        self._check_open()
        sim = self._sim
        if seed is not None:
            self.np_random = np.random.default_rng(seed)
        places = {**self.task.start(self.np_random.uniform), **(options or {})}
        places.setdefault("goal", places["block"])
        for name, place in places.items():
            point = places[name] = np.array(place, dtype=float)
            fits = point.shape == {"hand": (3,), "block": (2,), "goal": (2,)}.get(name)
            _require(fits, f"{name} {place}: give hand (x, y, z), block (x, y), goal (x, y) in m")
            off = math.dist(point, np.clip(point, *WORKSPACE[:, : point.size]))
            _require(off < START_ERROR, f"{name} {place} lies {off:.2f} m outside the workspace")
        self._target, self._goal = places["hand"], places["goal"]
        self._block_start = places["block"]
        self.t = self.task.horizon  # no episode has begun until the hand is there
        # Contacts and motors are restored too, so that an episode depends on its start alone.
        sim.restoreState(self._pristine)
        finger = FINGER_MAX if self.task.opens else 0.0
        angles = (0.0, 0.3, 0.0, -2.2, 0.0, 2.5, 0.785, finger, finger)  # rad, m
        for _ in range(6):  # inverse kinematics continues from the last pose
            for joint, angle in zip(ARM + FINGERS, angles):
                sim.resetJointState(self._panda, joint, angle)
            angles = self._inverse_kinematics(100)
        place = sim.resetBasePositionAndOrientation
        place(self._block, (*self._block_start, BLOCK_HALF), (0, 0, 0, 1))
        if self._marker is not None:
            place(self._marker, (*self._goal, 0.001), (0, 0, 0, 1))
        self._forces = np.zeros(3)
        self._observe()
        off = math.dist(self._hand, self._target)
        _require(off < START_ERROR, f"the hand cannot start there: it ends {off:.2f} m away")
        self.t, self._held, self._done, self._broken, self._frames = 0, 0, False, False, []
        return self._outcome()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Runs one control step. Raises RuntimeError when the episode is over."""
        self._check_open()
        started = time.perf_counter()
        action = np.asarray(action, dtype=float)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers, not {action}")
        if self.t >= self.task.horizon:
            raise RuntimeError("the episode is over: call reset() first")
        self._move(np.clip(action, -1.0, 1.0))
        self._observe()
        self.t += 1
        self._held = self._held + 1 if all(self._met(self.task.success)) else 0
        done = self._held >= self.task.steps
        self._done |= done
        self._broken |= any(self._met(self.task.limits))
        reward = float(done and not self._broken)
        obs, info = self._outcome()
        if self.render_mode == "human":
            time.sleep(max(0.0, DT - (time.perf_counter() - started)))
        return obs, reward, False, self.t >= self.task.horizon, info

    def render(self) -> np.ndarray | None:
        """An RGB frame, uint8 (480, 480, 3), in mode "rgb_array"; None in other modes."""
        self._check_open()
        if self.render_mode == "rgb_array":
            return self._frame(480, WIDE_VIEW, shadow=1).transpose(1, 2, 0)

    def close(self):
        """Ends the simulation."""
        self._end()

    def _check_open(self):
        if not self._end.alive:
            raise RuntimeError("this environment is closed: make another PandaEnv")

    def __reduce__(self):
        raise TypeError("a PandaEnv cannot be copied or pickled: make another one")

    def _move(self, action):
        """Sets the motors' targets, runs the physics of a control step and measures forces."""
        target = self._target + MAX_DELTA * action[:3]
        target = np.clip(target, self._hand - MAX_LEAD, self._hand + MAX_LEAD)
        self._target = np.clip(target, *WORKSPACE)
        finger = 0.0
        if self.task.opens:
            wanted, now = FINGER_MAX * (action[3] + 1) / 2, self._opening / 2
            finger = np.clip(wanted, now - 0.01, now + 0.01)
        sim, position = self._sim, pybullet.POSITION_CONTROL
        angles = self._inverse_kinematics(20)
        drive = sim.setJointMotorControlArray
        drive(self._panda, ARM, position, angles, forces=[5.0] * 7)  # N·m
        drive(self._panda, FINGERS, position, [finger] * 2, forces=[FINGER_FORCE] * 2)
        # Contacts flicker between substeps; the mean over the step is what a filtered sensor reads.
        self._forces = np.zeros(3)  # N, of the rest of the arm, the left and the right finger
        weight = (0, 0, -9.81 * BLOCK_MASS)
        for _ in range(SUBSTEPS):
            centre, _ = sim.getBasePositionAndOrientation(self._block)
            sim.applyExternalForce(self._block, -1, weight, centre, pybullet.WORLD_FRAME)
            sim.stepSimulation()
            for contact in sim.getContactPoints(self._panda, self._block):
                link, force = contact[3], contact[9]
                part = 1 + FINGERS.index(link) if link in FINGERS else 0
                self._forces[part] += force / SUBSTEPS

    def _observe(self):
        """Reads the simulation and derives the features and the state from it."""
        link = self._sim.getLinkState(self._panda, HAND, 1, 1)  # with velocities, and up to date
        hand, hand_velocity = np.array(link[0]), np.array(link[6])
        position, (x, y, z, w) = self._sim.getBasePositionAndOrientation(self._block)
        block, block_velocity = np.array(position), self._sim.getBaseVelocity(self._block)[0]
        yaw = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        left, right = self._sim.getJointStates(self._panda, FINGERS)
        opening = left[0] + right[0]
        self._hand, self._block_position, self._opening = hand, block, opening
        moved, ahead = block[:2] - self._block_start, self._goal - block[:2]
        behind = block[:2] - hand[:2]
        to_goal, beside = math.hypot(*ahead), math.hypot(*behind)
        features = {
            "hand_to_block": math.dist(hand, block),
            "hand_beside_block": beside,
            "hand_above_block": float(hand[2] - block[2]),
            "hand_height": float(hand[2]),
            "hand_speed": math.hypot(*hand_velocity),
            "contact_force": float(self._forces.sum()),
            "gripper_opening": opening,
            "grip_force": float(min(self._forces[1:])),
            "block_height": max(0.0, float(block[2]) - BLOCK_HALF),
            "block_displacement": math.hypot(*moved),
            "block_speed": math.hypot(*block_velocity),
            "block_to_goal": to_goal,
            "push_alignment": float(ahead @ behind) / max(to_goal * beside, 1e-9),
        }
        self._features = {name: features[name] for name in self.task.features}
        lengths = np.concatenate((hand - (0.5, 0.0, 0.1), block - hand, moved, ahead, [opening]))
        lead, speeds = self._target - hand, np.concatenate((hand_velocity, block_velocity))
        turn = math.cos(4 * yaw), math.sin(4 * yaw)  # a cube looks the same every 90 degrees
        grip = np.log1p(10 * self._forces[1:])  # of the left and the right finger
        # Lengths in units of 5 cm, the target's lead in cm, speeds in dm/s.
        state = np.concatenate((20 * lengths, 100 * lead, 10 * speeds, turn, grip))
        self._state = np.clip(state, -10.0, 10.0).astype(np.float32)

    def _met(self, conditions):
        return [COMPARE[sign](self._features[name], value) for name, sign, value in conditions]

    def _outcome(self):
        success = self._done and not self._broken
        info = {"features": self._features, "success": success, "is_success": success}
        if self.obs == "state":
            return self._state, info
        frame = self._frame(84, VIEW)
        self._frames = [*self._frames[1:], frame] if self._frames else [frame] * 3
        return np.concatenate(self._frames), info

    def _frame(self, size, view, shadow=0):
        image = self._sim.getCameraImage(size, size, view, PROJECTION, shadow=shadow, **RENDERER)
        frame = np.reshape(image[2], (size, size, 4))[:, :, :3].transpose(2, 0, 1)
        return np.ascontiguousarray(frame, dtype=np.uint8)

    def _inverse_kinematics(self, iterations):
        down = (1.0, 0.0, 0.0, 0.0)  # quaternion xyzw: the hand points down
        solve, target = self._sim.calculateInverseKinematics, self._target
        return solve(self._panda, HAND, target, down, maxNumIterations=iterations)[:7]

    def _build(self):
        sim, data = self._sim, pybullet_data.getDataPath()
        # Otherwise the order in which contacts are solved depends on earlier episodes.
        sim.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        sim.configureDebugVisualizer(pybullet.COV_ENABLE_GUI, 0)
        sim.resetDebugVisualizerCamera(0.8, 60, -25, (0.5, 0.0, 0.05))
        sim.loadURDF(f"{data}/plane.urdf")
        urdf = Path(f"{data}/franka_panda/panda.urdf").read_text()
        urdf = urdf.replace("package://", f"{data}/franka_panda/")
        # People see the visual meshes. Policies see the collision meshes, of the same shape but
        # with a hundredth of the triangles, which load and render several times faster.
        if self.render_mode is None or self.obs == "pixels":
            urdf = urdf.replace("meshes/visual/", "meshes/collision/")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "panda.urdf")
            path.write_text(urdf)
            self._panda = sim.loadURDF(str(path), useFixedBase=True)
        box = {"shapeType": pybullet.GEOM_BOX, "halfExtents": [BLOCK_HALF] * 3}
        red = sim.createVisualShape(**box, rgbaColor=(0.9, 0.2, 0.1, 1.0))
        self._block = sim.createMultiBody(BLOCK_MASS, sim.createCollisionShape(**box), red)
        sim.changeDynamics(self._block, -1, lateralFriction=BLOCK_FRICTION)
        # A flat disc that touches nothing marks the goal. In images of a task that limits the
        # block's displacement it marks where the block started, as nothing else in them does.
        limited = "block_displacement" in [name for name, *_ in self.task.limits]
        self._marker = None
        if "goal" in self.task.start(self.np_random.uniform) or (limited and self.obs == "pixels"):
            disc = {"shapeType": pybullet.GEOM_CYLINDER, "radius": 0.03, "length": 0.002}
            green = sim.createVisualShape(**disc, rgbaColor=(0.1, 0.7, 0.2, 1.0))
            self._marker = sim.createMultiBody(0, -1, green)
        self._pristine = sim.saveState()


def check_env(env, task) -> np.ndarray:
    """Checks that `train` can use `env`; returns the features (N, F) of two random episodes.

    env: an environment with Gymnasium's signatures. task: an object with the fields of `Task`.
    Raises ValueError, which names what `env` has to change.
    """
    actions, space, names = env.action_space, env.observation_space, list(task.features)
    low, high = (np.asarray(getattr(actions, bound, None)) for bound in ("low", "high"))
    fits = len(actions.shape or ()) == 1 and np.all(low == -1) and np.all(high == 1)
    _require(fits, "actions must be a Box (n,) from -1 to 1: see gymnasium.wrappers.RescaleAction")
    shape, dtype = tuple(space.shape or ()), np.dtype(space.dtype)
    # The convolutions of the encoder, with the strides of run.py, need 23 pixels.
    image = dtype == np.uint8 and len(shape) == 3 and shape[0] == 9 and shape[1] == shape[2] >= 23
    words = f"observations must be floats (n,) or uint8 (9, H, H), H >= 23, not {dtype} {shape}"
    _require(image or (dtype.kind == "f" and len(shape) == 1), words)

    def check_obs(obs, when):
        found = f"{obs.dtype} {obs.shape}" if isinstance(obs, np.ndarray) else type(obs).__name__
        words = f"the observation of {when} must be a numpy array, {dtype} {shape}, not {found}"
        _require(found == f"{dtype} {shape}", words)
        _require(np.isfinite(obs).all(), f"the observation of {when} holds NaN or infinity")

    rows, limit = [], LONGEST_EPISODE * task.horizon
    for seed in (0, 1):
        rng, steps, over = np.random.default_rng(seed), 0, False
        try:
            answer = env.reset(seed=seed)
        except TypeError as error:
            raise ValueError(f"reset(seed={seed}) fails: {error}") from error
        _require(isinstance(answer, tuple) and len(answer) == 2, "reset must return (obs, info)")
        check_obs(answer[0], "reset")
        while not over:
            steps += 1
            _require(steps <= limit, f"an episode goes on after {limit} steps: truncate it")
            action = rng.uniform(-1, 1, actions.shape).astype(np.float32)
            answer = env.step(action)
            five = len(answer) == 5 and isinstance(answer[4], dict)
            _require(five, "step must return (obs, reward, terminated, truncated, info)")
            obs, reward, terminated, truncated, info = answer
            check_obs(obs, f"step {steps}")
            bools = {type(terminated), type(truncated), type(info.get("success"))}
            _require(bools <= {bool, np.bool_}, "terminated, truncated, success must be bools")
            features = info.get("features")
            same = isinstance(features, dict) and list(features) == names
            _require(same, f"info['features'] must hold {names} in this order, not {features}")
            for name, value in {"the reward": reward, **features}.items():
                finite = isinstance(value, Real) and math.isfinite(value)
                _require(finite, f"{name} must be a finite number, not {value!r}")
            rows.append(list(features.values()))
            over = terminated or truncated
    return np.array(rows, dtype=float)
