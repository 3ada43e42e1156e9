"""Three physical skills for a Franka Panda arm in PyBullet: touch, grasp, push.

Gymnasium's call signatures without the dependency; needs numpy and pybullet only. One instance owns one
physics client, so any number of environments can live in one process.

    env = PandaEnv("touch")
    obs, info = env.reset(seed=1)
    obs, reward, terminated, truncated, info = env.step([0, 0, -1, 0])
    info["features"]["contact_force"]       # newtons; what a reward function may read
    info["success"]                         # the task's own test

A skill is one `Task`: an entry in TASKS, at the end of the descriptions below, is all that another one takes.

The arm is compliant, as a real one is in impedance mode: the joint motors pull the hand towards a target
that leads it by MAX_LEAD at most, and their torques are capped at MAX_TORQUE. Gravity acts on the block
only, as if the arm's controller compensated its own weight.
"""

import math
import operator
import os
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pybullet
import pybullet_data
from pybullet_utils.bullet_client import BulletClient

SUBSTEPS = 12                  # 240 Hz physics, 20 Hz control
DT = SUBSTEPS / 240.0          # control step, s
EPISODE_STEPS = 50             # 2.5 s, then truncated
MAX_DELTA = 0.01               # displacement of the commanded target per control step for an action of 1, m
MAX_LEAD = 0.03                # how far the commanded target may lead the hand along each axis, m
MAX_TORQUE = 5.0               # cap of each arm joint's motor, N·m
FINGER_FORCE = 3.0             # cap of each finger's motor, N
FINGER_LEAD = 0.01             # how far a finger's target may lead it, m
FINGER_MAX = 0.04              # a finger's travel, m; the opening between both is twice that
BLOCK_HALF = 0.02              # half the block's edge, m
BLOCK_MASS = 0.05              # kg
BLOCK_FRICTION = 0.5           # the table's and the fingers' are 1.0; Bullet multiplies the pair
WORKSPACE = np.array([[0.30, -0.25, 0.025], [0.75, 0.25, 0.35]])   # of the commanded target, m
POINT_DOWN = (1.0, 0.0, 0.0, 0.0)                                 # hand orientation, quaternion xyzw
HOME = (0.0, 0.3, 0.0, -2.2, 0.0, 2.5, 0.785)                     # joint angles that IK starts from, rad
ARM = tuple(range(7))                                             # joint and link indices in panda.urdf
LEFT_FINGER, RIGHT_FINGER, HAND = 9, 10, 11                       # HAND is the point between the fingertips
FINGERS = LEFT_FINGER, RIGHT_FINGER
CONTACT_LINK, CONTACT_FORCE = 3, 9                                # fields of a contact point: robot's link, normal force

Feature = namedtuple("Feature", "unit low high text")
Space = namedtuple("Space", "low high shape dtype")               # as gymnasium.spaces.Box(*space) takes it
COMPARE = {">": operator.gt, ">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Task:
    """All that makes a skill, in one place: what the LLM is told, what is measured, what success is, how episodes start.

    A condition is (feature, comparison, value), the comparison one of ">", ">=" and "<=". A task is done once all
    conditions of `success` have held for `steps` consecutive control steps. It has succeeded if it is done and no condition
    of `limits` held at any step of the episode, before or after. This one meaning serves the success test, the prompts and
    the descriptions of trajectories.

    start and opens concern PandaEnv alone. Everything else is what `selfalign.train` asks about any environment. Raises ValueError
    where the parts contradict each other.
    """

    name: str
    goal: str                                # success in words
    features: dict[str, Feature]             # what rewards may read, in the order of `info["features"]`
    success: tuple                           # conditions
    steps: int = 1
    stages: tuple = ()                       # conditions on the way to success, for the descriptions
    limits: tuple = ()
    robot: str = "a robot"                   # what is there, for the prompts
    details: str = "."                       # the end of that sentence, and what else a reward's author should know
    dt: float = DT                           # s a step
    horizon: int = EPISODE_STEPS             # steps an episode
    discount: float = 0.97                   # of the return that the agent maximises
    start: Callable | None = None            # maps a generator's `uniform` to where "hand", "block" and, if any, "goal" begin, m
    opens: bool = False                      # the gripper starts open and follows the action; else it stays closed

    def __post_init__(self):
        for name, sign, _ in (*self.stages, *self.success, *self.limits):
            if name not in self.features or sign not in COMPARE:
                raise ValueError(f"task {self.name}: a condition reads {name!r} {sign!r}; it takes one of its features "
                                 f"({', '.join(self.features)}) and one of {', '.join(COMPARE)}")
        if self.steps > 1 and f"{self.steps} consecutive" not in self.goal:
            raise ValueError(f"task {self.name}: success takes {self.steps} steps running, and its goal does not say \"{self.steps} "
                             "consecutive\": the LLM and its stand-in know that from the goal alone")


FEATURES = {      # what PandaEnv measures; low and high: between them readings mostly lie
    "hand_to_block": Feature("m", 0.0, 0.25, "distance from the point between the fingertips to the block's centre; 0.03 to "
                             "0.04 when closed fingers touch the block's side, below 0.015 when open ones are around it"),
    "hand_beside_block": Feature("m", 0.0, 0.25, "the horizontal part of that distance"),
    "hand_above_block": Feature("m", -0.02, 0.2, "its vertical part: height of that point above the block's centre"),
    "hand_height": Feature("m", 0.0, 0.3, "height of the point between the fingertips above the table; 0.02 to 0.03 beside "
                           "a block on the table"),
    "hand_speed": Feature("m/s", 0.0, 0.4, "speed of the hand; usually 0.1 to 0.3 on the way, below 0.1 at rest"),
    "contact_force": Feature("N", 0.0, 20.0, "total normal force between hand and block, mean over the step; a light "
                             "touch reads 0.02 to 0.5, a knock 5 to 50"),
    "gripper_opening": Feature("m", 0.0, 0.08, "distance between the two fingers; the block is 0.04 m wide"),
    "grip_force": Feature("N", 0.0, 10.0, "the smaller of the two fingers' forces on the block; 0 unless both touch it; about "
                          "3 in a full grip"),
    "block_height": Feature("m", 0.0, 0.3, "height of the block's underside above the table"),
    "block_displacement": Feature("m", 0.0, 0.25, "horizontal distance of the block from where the episode began"),
    "block_speed": Feature("m/s", 0.0, 0.4, "speed of the block; about 0.1 while it is pushed"),
    "block_to_goal": Feature("m", 0.0, 0.25, "horizontal distance from the block's centre to the goal"),
    "push_alignment": Feature("", -1.0, 1.0, "cosine of the angle between hand-to-block and block-to-goal, seen from "
                              "above; 1 when the hand is right behind the block"),
}


def _measured(names):
    return {name: FEATURES[name] for name in names.split()}


def _start_touch(uniform):
    return {"block": (uniform(0.48, 0.56), uniform(-0.08, 0.08)),
            "hand": (uniform(0.36, 0.42), uniform(-0.08, 0.08), uniform(0.05, 0.12))}


def _start_grasp(uniform):
    return {"block": (uniform(0.45, 0.55), uniform(-0.06, 0.06)),
            "hand": (uniform(0.45, 0.55), uniform(-0.06, 0.06), uniform(0.12, 0.16))}


def _start_push(uniform):
    x, y = uniform(0.42, 0.48), uniform(-0.06, 0.06)
    return {"block": (x, y), "hand": (x - uniform(0.06, 0.09), y + uniform(-0.02, 0.02), 0.03),
            "goal": (x + uniform(0.10, 0.16), y + uniform(-0.04, 0.04))}


PANDA = dict(
    robot="a Franka Panda arm with a two-finger gripper over a table, and one block, a cube of 0.04 m and 50 g",
    details=" with a\nfriction coefficient of 0.5. The arm is compliant: it pushes with newtons, not with hundreds of newtons. "
            "The robot acts\n20 times per second: it moves its hand's target by up to 0.01 m along each axis, at 0.3 m/s at "
            "most, and opens or closes\nthe gripper, which takes about 5 steps to grip a block.")

TASKS = {task.name: task for task in (
    Task(
        name="touch",
        goal="Touch the block and keep contact with it for 10 consecutive control steps (0.5 s), gently: the contact "
             "force must never exceed 2 N and the block must never be further than 0.05 m from where it started, at "
             "any time of the attempt. The gripper stays closed and starts 0.1 to 0.23 m from the block.",
        features=_measured("hand_to_block hand_beside_block hand_above_block hand_height hand_speed contact_force "
                           "block_displacement block_speed"),
        stages=(("hand_to_block", "<=", 0.05),),
        success=(("contact_force", ">", 0.01),), steps=10,
        limits=(("contact_force", ">", 2.0), ("block_displacement", ">", 0.05)),
        start=_start_touch, **PANDA),
    Task(
        name="grasp",
        goal="Grasp the block and lift it: hold it between both fingers with its underside 0.08 m or more above the "
             "table for 5 consecutive control steps (0.25 s). The gripper starts open, about 0.12 m higher than the block and up to 0.12 m, mostly "
             "0.06 m, beside it.",
        features=_measured("hand_to_block hand_beside_block hand_above_block hand_height gripper_opening contact_force grip_force "
                           "block_height block_displacement"),
        stages=(("hand_to_block", "<=", 0.02), ("grip_force", ">", 0.0)),
        success=(("grip_force", ">", 0.0), ("block_height", ">=", 0.08)), steps=5,
        start=_start_grasp, opens=True, **PANDA),
    Task(
        name="push",
        goal="Push the block over the table to the goal: bring its centre within 0.03 m of the goal, which lies 0.10 to "
             "0.16 m ahead of it, and keep it there for 3 consecutive control steps (0.15 s). The gripper stays closed "
             "and starts behind the block, 0.06 to 0.09 m from its centre.",
        features=_measured("hand_to_block hand_beside_block hand_above_block hand_height hand_speed contact_force "
                           "block_displacement block_speed block_to_goal push_alignment"),
        stages=(("contact_force", ">", 0.01),),
        success=(("block_to_goal", "<=", 0.03),), steps=3,
        start=_start_push, **PANDA),
)}


class PandaEnv:
    """One Panda, one block, and a task: a `Task`, or the name of one in TASKS.

    Actions, shape (4,) in [-1, 1]: the displacement of the hand's target along x, y, z in units of MAX_DELTA, then
    the wanted opening of the gripper, from closed (-1) to open (1), which only tasks that open it obey.

    Observations: `obs="state"`, float32 of shape (24,) (what it holds: see `_state`); or
    `obs="pixels"`, uint8 of shape (9, 84, 84): the last three RGB frames, channels first, oldest first.

    `step` returns as reward the sparse 1.0 at each step by which success has held for `task.steps` steps and no limit has
    been broken yet, else 0.0: it depends on counters that the observation does not show. `info` holds `success` (bool: the
    task has been fulfilled by now) and `features` (dict of floats, SI units, the names in `task.features`). Episodes last
    `task.horizon` steps and end `truncated`; nothing ever terminates.

    render_mode: None, "rgb_array" (`render()` returns an (480, 480, 3) uint8 frame) or "human" (a window, in
    real time).
    """

    def __init__(self, task: Task | str, obs: str = "state", render_mode: str | None = None):
        if not isinstance(task, Task) and task not in TASKS:
            raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
        if obs not in ("state", "pixels"):
            raise ValueError(f"unknown obs {obs!r}: choose state or pixels")
        if render_mode not in (None, "rgb_array", "human"):
            raise ValueError(f"unknown render_mode {render_mode!r}: choose None, 'rgb_array' or 'human'")
        self.task = task if isinstance(task, Task) else TASKS[task]
        if self.task.dt != DT:
            raise ValueError(f"task {self.task.name}: a step of PandaEnv lasts {DT} s, not {self.task.dt} s")
        self.obs, self.render_mode = obs, render_mode
        self.action_space = Space(-1.0, 1.0, (4,), np.float32)
        self.observation_space = (Space(-10.0, 10.0, (24,), np.float32) if obs == "state" else
                                  Space(0, 255, (9, 84, 84), np.uint8))
        self.np_random = np.random.default_rng()
        self.t = self.task.horizon      # step() before reset() is an error
        self._sim = BulletClient(pybullet.GUI if render_mode == "human" else pybullet.DIRECT)
        if not self._sim.isConnected():
            raise RuntimeError("PyBullet could not open a window: is there a display? Use render_mode='rgb_array'")
        # BulletClient looks a function up and wraps it at every call; these are called in every step.
        for name in ("stepSimulation", "getBasePositionAndOrientation", "applyExternalForce", "getContactPoints", "getBaseVelocity",
                     "getLinkState", "getJointStates", "setJointMotorControlArray", "calculateInverseKinematics"):
            setattr(self._sim, name, getattr(self._sim, name))
        self._build()

    def _build(self):
        data = pybullet_data.getDataPath()
        # Without this, the order in which contacts are solved depends on what happened in earlier episodes.
        self._sim.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        if self.render_mode == "human":
            self._sim.configureDebugVisualizer(pybullet.COV_ENABLE_GUI, 0)
            self._sim.resetDebugVisualizerCamera(0.8, 60, -25, (0.5, 0.0, 0.05))
        self._sim.loadURDF(os.path.join(data, "plane.urdf"))
        # The collision meshes are the same shapes in a hundredth of the triangles: shown instead of the visual meshes, they make
        # a frame of the software renderer several times faster and loading ten times. People see the visual ones, but for
        # policies from pixels, which see what they have learnt from.
        with open(os.path.join(data, "franka_panda", "panda.urdf")) as file:
            urdf = file.read()
        if self.render_mode is None or self.obs == "pixels":
            urdf = urdf.replace("meshes/visual/", "meshes/collision/")
        urdf = urdf.replace("package://", os.path.join(data, "franka_panda") + "/")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "panda.urdf")
            with open(path, "w") as file:
                file.write(urdf)
            self._panda = self._sim.loadURDF(path, useFixedBase=True)
        box = [BLOCK_HALF] * 3
        self._block = self._sim.createMultiBody(
            BLOCK_MASS, self._sim.createCollisionShape(pybullet.GEOM_BOX, halfExtents=box),
            self._sim.createVisualShape(pybullet.GEOM_BOX, halfExtents=box, rgbaColor=(0.9, 0.2, 0.1, 1.0)))
        self._sim.changeDynamics(self._block, -1, lateralFriction=BLOCK_FRICTION)
        # A flat green disc without collision shape marks the goal; in images of a task whose limits are on the block's displacement
        # it marks where the block started, which states tell, and nothing else in an image does.
        shown = self.obs == "pixels" and "block_displacement" in [name for name, *_ in self.task.limits]
        self._has_marker = shown or "goal" in self.task.start(self.np_random.uniform)
        if self._has_marker:
            self._marker = self._sim.createMultiBody(0, -1, self._sim.createVisualShape(
                pybullet.GEOM_CYLINDER, radius=0.03, length=0.002, rgbaColor=(0.1, 0.7, 0.2, 1.0)))
        self._projection = self._sim.computeProjectionMatrixFOV(fov=38.0, aspect=1.0, nearVal=0.1, farVal=3.0)
        self._view = self._sim.computeViewMatrix((1.05, 0.45, 0.45), (0.5, 0.0, 0.07), (0.0, 0.0, 1.0))
        self._wide_view = self._sim.computeViewMatrix((1.6, 0.75, 0.6), (0.33, 0.0, 0.26), (0.0, 0.0, 1.0))    # for people
        self._pristine = self._sim.saveState()

    def close(self):
        """Disconnects the physics client; safe to call twice."""
        if self._sim.isConnected():
            self._sim.disconnect()

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode: returns (obs, info).

        seed (int or None): reseeds the environment's generator; None goes on with it.
        options (dict or None): fixed starts instead of drawn ones, metres: "hand" (x, y, z), "block" (x, y),
            "goal" (x, y). Raises ValueError for any other key.
        """
        if seed is not None:
            self.np_random = np.random.default_rng(seed)
        for key in options or {}:
            if key not in ("hand", "block", "goal"):
                raise ValueError(f"unknown reset option {key!r}: choose from hand, block, goal")
        start = {**self.task.start(self.np_random.uniform), **(options or {})}
        start = {key: np.array(value, dtype=float) for key, value in {"goal": start["block"], **start}.items()}
        # Restoring drops cached contacts and motor states, so that an episode depends on its start alone.
        self._sim.restoreState(self._pristine)
        finger = FINGER_MAX if self.task.opens else 0.0
        for joint, angle in zip(ARM, HOME):
            self._sim.resetJointState(self._panda, joint, angle)
        for joint in FINGERS:
            self._sim.resetJointState(self._panda, joint, finger)
        for _ in range(5):
            for joint, angle in zip(ARM, self._inverse_kinematics(start["hand"], 100)):
                self._sim.resetJointState(self._panda, joint, angle)
        self._sim.resetBasePositionAndOrientation(self._block, (*start["block"], BLOCK_HALF), (0, 0, 0, 1))
        self._goal, self._block_start = start["goal"], start["block"]
        if self._has_marker:
            self._sim.resetBasePositionAndOrientation(self._marker, (*self._goal, 0.001), (0, 0, 0, 1))
        self._target = start["hand"].copy()
        self.t, self._held, self._done, self._broken = 0, 0, False, False
        self._forces = np.zeros(3)
        self._observe()
        if self.obs == "pixels":
            self._frames = [self._frame(84, self._view)] * 3
        return self._observation(), {"success": False, "features": self._features()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Runs one control step of 50 ms: returns (obs, reward, terminated, truncated, info).

        action: shape (4,), clipped to [-1, 1]. Raises ValueError for another shape or a non-finite number, and
        RuntimeError when the episode is over.
        """
        action = np.asarray(action, dtype=float)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers, got {action!r}")
        if self.t >= self.task.horizon:
            raise RuntimeError("the episode is over: call reset() first")
        started = time.perf_counter()
        action = np.clip(action, -1.0, 1.0)
        target = np.clip(self._target + MAX_DELTA * action[:3], self._hand - MAX_LEAD, self._hand + MAX_LEAD)
        self._target = np.clip(target, *WORKSPACE)
        if self.task.opens:
            wanted, now = FINGER_MAX * (action[3] + 1) / 2, self._opening / 2
            finger = min(max(wanted, now - FINGER_LEAD), now + FINGER_LEAD)
        else:
            finger = 0.0
        self._sim.setJointMotorControlArray(
            self._panda, ARM, pybullet.POSITION_CONTROL, self._inverse_kinematics(self._target, 20),
            forces=(MAX_TORQUE,) * 7)
        self._sim.setJointMotorControlArray(
            self._panda, FINGERS, pybullet.POSITION_CONTROL, (finger,) * 2, forces=(FINGER_FORCE,) * 2)
        # Contacts flicker from one substep to the next; the mean over the step is what a filtered sensor reads.
        self._forces = np.zeros(3)        # other links, left finger, right finger
        for _ in range(SUBSTEPS):
            position, _ = self._sim.getBasePositionAndOrientation(self._block)
            self._sim.applyExternalForce(self._block, -1, (0, 0, -9.81 * BLOCK_MASS), position, pybullet.WORLD_FRAME)
            self._sim.stepSimulation()
            for contact in self._sim.getContactPoints(self._panda, self._block):
                part = {LEFT_FINGER: 1, RIGHT_FINGER: 2}.get(contact[CONTACT_LINK], 0)
                self._forces[part] += contact[CONTACT_FORCE] / SUBSTEPS
        self.t += 1
        self._observe()
        features = self._features()
        holds, success = self._success()
        if self.obs == "pixels":
            self._frames = self._frames[1:] + [self._frame(84, self._view)]
        if self.render_mode == "human":
            time.sleep(max(0.0, DT - (time.perf_counter() - started)))
        info = {"success": success, "features": features}
        return self._observation(), float(holds), False, self.t >= self.task.horizon, info

    def render(self) -> np.ndarray | None:
        """An RGB frame, uint8 of shape (480, 480, 3), in mode "rgb_array"; None otherwise (the window shows it)."""
        return self._frame(480, self._wide_view, shadow=1).transpose(1, 2, 0) if self.render_mode == "rgb_array" else None

    def _frame(self, size, view, shadow=0):
        image = self._sim.getCameraImage(size, size, view, self._projection, shadow=shadow,
                                       renderer=pybullet.ER_TINY_RENDERER, flags=pybullet.ER_NO_SEGMENTATION_MASK)
        return np.ascontiguousarray(np.reshape(image[2], (size, size, 4))[:, :, :3].transpose(2, 0, 1), dtype=np.uint8)

    def _inverse_kinematics(self, position, iterations):
        return self._sim.calculateInverseKinematics(
            self._panda, HAND, position, POINT_DOWN, maxNumIterations=iterations)[:7]

    def _observe(self):
        """Reads the simulator once per control step; everything else is derived from what it leaves here."""
        link = self._sim.getLinkState(self._panda, HAND, computeLinkVelocity=1, computeForwardKinematics=1)
        self._hand, self._hand_velocity = np.array(link[0]), np.array(link[6])
        position, orientation = self._sim.getBasePositionAndOrientation(self._block)
        self._block_position = np.array(position)
        self._block_velocity = np.array(self._sim.getBaseVelocity(self._block)[0])
        x, y, z, w = orientation
        self._block_yaw = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        self._opening = sum(state[0] for state in self._sim.getJointStates(self._panda, FINGERS))

    def _features(self):
        block, hand = self._block_position, self._hand
        ahead, behind = self._goal - block[:2], block[:2] - hand[:2]
        values = {
            "hand_to_block": math.dist(hand, block),
            "hand_beside_block": math.hypot(*behind),
            "hand_above_block": float(hand[2] - block[2]),
            "hand_height": float(hand[2]),
            "hand_speed": math.hypot(*self._hand_velocity),
            "contact_force": float(self._forces.sum()),
            "gripper_opening": self._opening,
            "grip_force": float(min(self._forces[1:])),
            "block_height": max(0.0, float(block[2]) - BLOCK_HALF),
            "block_displacement": math.dist(block[:2], self._block_start),
            "block_speed": math.hypot(*self._block_velocity),
            "block_to_goal": math.hypot(*ahead),
            "push_alignment": float(ahead @ behind) / max(math.hypot(*ahead) * math.hypot(*behind), 1e-9),
        }
        self._values = values
        return {name: values[name] for name in self.task.features}

    def _success(self):
        """The task's own test: (whether it is done as of this step, whether it ever was). Both are False once a limit is
        broken."""
        def met(conditions):
            return [COMPARE[sign](self._values[name], value) for name, sign, value in conditions]

        self._broken |= any(met(self.task.limits))
        self._held = self._held + 1 if all(met(self.task.success)) else 0
        self._done |= self._held >= self.task.steps
        return self._held >= self.task.steps and not self._broken, self._done and not self._broken

    def _observation(self):
        return np.concatenate(self._frames) if self.obs == "pixels" else self._state()

    def _state(self):
        """float32 (24,), scaled so that what matters for contact is of the order of 1, and clipped to ±10.

        Lengths in units of 5 cm: hand (3, from the middle of the workspace), block minus hand (3), block minus its
        start (2), goal minus block (2), gripper opening (1). Target minus hand (3) in cm. Speeds in dm/s: hand (3),
        block (3). Cosine and sine of four times the block's yaw (2). log(1 + 10 F) of the left and the right finger's
        force F in N (2).
        """
        block, hand = self._block_position, self._hand
        lengths = np.concatenate([hand - (0.5, 0.0, 0.1), block - hand, block[:2] - self._block_start,
                                  self._goal - block[:2], [self._opening]])
        state = np.concatenate([
            20 * lengths, 100 * (self._target - hand), 10 * self._hand_velocity, 10 * self._block_velocity,
            (math.cos(4 * self._block_yaw), math.sin(4 * self._block_yaw)), np.log1p(10 * self._forces[1:])])
        return np.clip(state, -10.0, 10.0).astype(np.float32)


def _measure_speed(task, steps=2000):
    """Milliseconds of a control step with random actions, and of the bare substeps of physics in it."""
    env, rng = PandaEnv(task), np.random.default_rng(0)
    started = time.perf_counter()
    for step in range(steps):
        if step % EPISODE_STEPS == 0:
            env.reset(seed=step)
        env.step(rng.uniform(-1, 1, 4))
    whole = time.perf_counter() - started
    env.reset(seed=0)
    started = time.perf_counter()
    for _ in range(steps * SUBSTEPS):
        env._sim.stepSimulation()
    physics = time.perf_counter() - started
    env.close()
    return 1e3 * whole / steps, 1e3 * physics / steps


if __name__ == "__main__":
    for name in TASKS:
        whole, physics = _measure_speed(name)
        print(f"{name}: {1e3 / whole:.0f} control steps/s, {whole:.2f} ms each, of which {SUBSTEPS} bare substeps of physics take "
              f"{physics:.2f} ms")
    env = PandaEnv("touch", obs="pixels")
    env.reset(seed=0)
    started = time.perf_counter()
    for _ in range(200):
        env.step(np.zeros(4)) if env.t < EPISODE_STEPS else env.reset()
    print(f"a step with a frame of 84x84 pixels: {(time.perf_counter() - started) / 200 * 1e3:.1f} ms")
