"""Three physical skills for a Franka Panda arm in PyBullet: touch, grasp, push.

Gymnasium's call signatures without the dependency; needs numpy and pybullet only. One instance owns one
physics client, so any number of environments can live in one process.

    env = PandaEnv("touch")
    obs, info = env.reset(seed=1)
    obs, reward, terminated, truncated, info = env.step([0, 0, -1, 0])
    info["features"]["contact_force"]       # newtons; what a reward function may read
    info["success"]                         # the task's own test

The arm is compliant, as a real one is in impedance mode: the joint motors pull the hand towards a target
that leads it by MAX_LEAD at most, and their torques are capped at MAX_TORQUE. Gravity acts on the block
only, as if the arm's controller compensated its own weight.
"""

import functools
import math
import operator
import os
import tempfile
import time
from collections import namedtuple

import numpy as np
import pybullet
import pybullet_data

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
ARM, FINGERS, HAND = tuple(range(7)), (9, 10), 11                 # joint and link indices in panda.urdf

Feature = namedtuple("Feature", "unit low high text")
FEATURES = {      # low and high: between them lie all but a few in a thousand readings
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

# A condition is (feature, comparison, value). A task is done once all of its `success` conditions have held for `steps`
# consecutive control steps, and it has succeeded if it is done and no condition of `limits` held at any step of the
# episode, before or after. This one meaning serves the success test, the prompts and the descriptions of trajectories.
# goal: its words, for prompts. features: the names that rewards may read. stages: conditions on the way, for descriptions.
Task = namedtuple("Task", "goal features stages success steps limits")
COMPARE = {">": operator.gt, ">=": operator.ge, "<=": operator.le}
TASKS = {
    "touch": Task(
        goal="Touch the block and keep contact with it for 10 consecutive control steps (0.5 s), gently: the contact "
             "force must never exceed 2 N and the block must never be further than 0.05 m from where it started, at "
             "any time of the attempt. The gripper stays closed and starts 0.1 to 0.23 m from the block.",
        features=("hand_to_block", "hand_beside_block", "hand_above_block", "hand_height", "hand_speed", "contact_force",
                  "block_displacement", "block_speed"),
        stages=(("hand_to_block", "<=", 0.05),),
        success=(("contact_force", ">", 0.01),), steps=10,
        limits=(("contact_force", ">", 2.0), ("block_displacement", ">", 0.05))),
    "grasp": Task(
        goal="Grasp the block and lift it: hold it between both fingers with its underside 0.08 m or more above the "
             "table for 5 consecutive control steps (0.25 s). The gripper starts open, about 0.12 m higher than the block and up to 0.12 m, mostly "
             "0.06 m, beside it.",
        features=("hand_to_block", "hand_beside_block", "hand_above_block", "hand_height", "gripper_opening",
                  "contact_force", "grip_force", "block_height", "block_displacement"),
        stages=(("hand_to_block", "<=", 0.02), ("grip_force", ">", 0.0)),
        success=(("grip_force", ">", 0.0), ("block_height", ">=", 0.08)), steps=5,
        limits=()),
    "push": Task(
        goal="Push the block over the table to the goal: bring its centre within 0.03 m of the goal, which lies 0.10 to "
             "0.16 m ahead of it, and keep it there for 3 consecutive control steps (0.15 s). The gripper stays closed "
             "and starts behind the block, 0.06 to 0.09 m from its centre.",
        features=("hand_to_block", "hand_beside_block", "hand_above_block", "hand_height", "hand_speed", "contact_force",
                  "block_displacement", "block_speed", "block_to_goal", "push_alignment"),
        stages=(("contact_force", ">", 0.01),),
        success=(("block_to_goal", "<=", 0.03),), steps=3,
        limits=()),
}


def describe_features(task):
    """The features that rewards for `task` may read: one line each with unit and usual range, for prompts."""
    rows = ((name, FEATURES[name]) for name in TASKS[task].features)
    return "\n".join(f"- {name} [{f.unit or 'no unit'}, mostly {f.low:g} to {f.high:g}]: {f.text}" for name, f in rows)


class PandaEnv:
    """One Panda, one block, one of the tasks in TASKS.

    Actions, shape (4,) in [-1, 1]: the displacement of the hand's target along x, y, z in units of MAX_DELTA, then
    the wanted opening of the gripper, from closed (-1) to open (1); touch and push keep it closed.

    Observations: `obs="state"`, float32 of shape (24,) (what it holds: see `_state`); or
    `obs="pixels"`, uint8 of shape (9, 84, 84): the last three RGB frames, channels first, oldest first.

    `step` returns as reward the sparse 1.0 while the success condition holds, else 0.0. `info` holds `success`
    (bool) and `features` (dict of floats, SI units, the names in `TASKS[task].features`). Episodes last
    EPISODE_STEPS and end `truncated`; nothing ever terminates.

    render_mode: None, "rgb_array" (`render()` returns an (480, 480, 3) uint8 frame) or "human" (a window, in
    real time).
    """

    def __init__(self, task, obs="state", render_mode=None):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
        if obs not in ("state", "pixels"):
            raise ValueError(f"unknown obs {obs!r}: choose state or pixels")
        if render_mode not in (None, "rgb_array", "human"):
            raise ValueError(f"unknown render_mode {render_mode!r}: choose None, 'rgb_array' or 'human'")
        self.task, self.obs, self.render_mode = task, obs, render_mode
        self._task = TASKS[task]
        self.feature_names = self._task.features
        self.action_shape, self.action_low, self.action_high = (4,), -1.0, 1.0
        if obs == "state":
            self.obs_shape, self.obs_dtype, self.obs_low, self.obs_high = (24,), np.float32, -10.0, 10.0
        else:
            self.obs_shape, self.obs_dtype, self.obs_low, self.obs_high = (9, 84, 84), np.uint8, 0, 255
        self.rng = np.random.default_rng()
        self.t = EPISODE_STEPS          # step() before reset() is an error
        self._client = pybullet.connect(pybullet.GUI if render_mode == "human" else pybullet.DIRECT)
        if self._client < 0:
            raise RuntimeError("PyBullet could not open a window: is there a display? Use render_mode='rgb_array'")
        self._build()

    def __getattr__(self, name):
        # self._p_stepSimulation(...) is pybullet.stepSimulation(..., physicsClientId=ours), bound once per name.
        if not name.startswith("_p_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        bound = functools.partial(getattr(pybullet, name[3:]), physicsClientId=self._client)
        setattr(self, name, bound)
        return bound

    def _build(self):
        data = pybullet_data.getDataPath()
        # Without this, the order in which contacts are solved depends on what happened in earlier episodes.
        self._p_setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        if self.render_mode == "human":
            self._p_configureDebugVisualizer(pybullet.COV_ENABLE_GUI, 0)
            self._p_resetDebugVisualizerCamera(0.8, 60, -25, (0.5, 0.0, 0.05))
        self._p_loadURDF(os.path.join(data, "plane.urdf"))
        # The collision meshes are the same shapes in a hundredth of the triangles: shown instead of the visual
        # meshes they make a frame of the software renderer several times faster and loading ten times.
        with open(os.path.join(data, "franka_panda", "panda.urdf")) as file:
            urdf = file.read().replace("meshes/visual/", "meshes/collision/")
        urdf = urdf.replace("package://", os.path.join(data, "franka_panda") + "/")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "panda.urdf")
            with open(path, "w") as file:
                file.write(urdf)
            self._panda = self._p_loadURDF(path, useFixedBase=True)
        box = [BLOCK_HALF] * 3
        self._block = self._p_createMultiBody(
            BLOCK_MASS, self._p_createCollisionShape(pybullet.GEOM_BOX, halfExtents=box),
            self._p_createVisualShape(pybullet.GEOM_BOX, halfExtents=box, rgbaColor=(0.9, 0.2, 0.1, 1.0)))
        self._p_changeDynamics(self._block, -1, lateralFriction=BLOCK_FRICTION)
        if self.task == "push":   # a flat green disc without collision shape
            self._goal_marker = self._p_createMultiBody(0, -1, self._p_createVisualShape(
                pybullet.GEOM_CYLINDER, radius=0.03, length=0.002, rgbaColor=(0.1, 0.7, 0.2, 1.0)))
        self._projection = self._p_computeProjectionMatrixFOV(fov=38.0, aspect=1.0, nearVal=0.1, farVal=3.0)
        self._view = self._p_computeViewMatrix((1.05, 0.45, 0.45), (0.5, 0.0, 0.07), (0.0, 0.0, 1.0))
        self._pristine = self._p_saveState()

    def close(self):
        """Disconnects the physics client; safe to call twice."""
        if self._client >= 0 and pybullet.isConnected(self._client):
            self._p_disconnect()
        self._client = -1

    def reset(self, seed=None, options=None):
        """Starts an episode: returns (obs, info).

        seed (int or None): reseeds the environment's generator; None goes on with it.
        options (dict or None): fixed starts instead of drawn ones, metres: "hand" (x, y, z), "block" (x, y),
            "goal" (x, y). Raises ValueError for any other key.
        """
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        start = self._draw_start()
        for key, value in (options or {}).items():
            if key not in start:
                raise ValueError(f"unknown reset option {key!r}: choose from {', '.join(start)}")
            start[key] = np.asarray(value, dtype=float)
        # Restoring drops cached contacts and motor states, so that an episode depends on its start alone.
        self._p_restoreState(self._pristine)
        finger = FINGER_MAX if self.task == "grasp" else 0.0
        for joint, angle in zip(ARM, HOME):
            self._p_resetJointState(self._panda, joint, angle)
        for joint in FINGERS:
            self._p_resetJointState(self._panda, joint, finger)
        for _ in range(5):
            for joint, angle in zip(ARM, self._inverse_kinematics(start["hand"], 100)):
                self._p_resetJointState(self._panda, joint, angle)
        self._p_resetBasePositionAndOrientation(self._block, (*start["block"], BLOCK_HALF), (0, 0, 0, 1))
        self._goal, self._block_start = start["goal"], start["block"]
        if self.task == "push":
            self._p_resetBasePositionAndOrientation(self._goal_marker, (*self._goal, 0.001), (0, 0, 0, 1))
        self._target = start["hand"].copy()
        self.t, self._held, self._done, self._broken = 0, 0, False, False
        self._forces = np.zeros(3)
        self._observe()
        if self.obs == "pixels":
            self._frames = [self._frame(84)] * 3
        return self._observation(), {"success": False, "features": self._features()}

    def _draw_start(self):
        draw = self.rng.uniform
        if self.task == "push":
            block = np.array([draw(0.42, 0.48), draw(-0.06, 0.06)])
            hand = np.array([block[0] - draw(0.06, 0.09), block[1] + draw(-0.02, 0.02), 0.03])
            goal = block + (draw(0.10, 0.16), draw(-0.04, 0.04))
        elif self.task == "touch":
            block = np.array([draw(0.48, 0.56), draw(-0.08, 0.08)])
            hand = np.array([draw(0.36, 0.42), draw(-0.08, 0.08), draw(0.05, 0.12)])
            goal = block.copy()
        else:
            block = np.array([draw(0.45, 0.55), draw(-0.06, 0.06)])
            hand = np.array([draw(0.45, 0.55), draw(-0.06, 0.06), draw(0.12, 0.16)])
            goal = block.copy()
        return {"hand": hand, "block": block, "goal": goal}

    def step(self, action):
        """Runs one control step of 50 ms: returns (obs, reward, terminated, truncated, info).

        action: shape (4,), clipped to [-1, 1]. Raises ValueError for another shape or a non-finite number, and
        RuntimeError when the episode is over.
        """
        action = np.asarray(action, dtype=float)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers, got {action!r}")
        if self.t >= EPISODE_STEPS:
            raise RuntimeError("the episode is over: call reset() first")
        started = time.perf_counter()
        action = np.clip(action, -1.0, 1.0)
        target = np.clip(self._target + MAX_DELTA * action[:3], self._hand - MAX_LEAD, self._hand + MAX_LEAD)
        self._target = np.clip(target, *WORKSPACE)
        if self.task == "grasp":
            wanted, now = FINGER_MAX * (action[3] + 1) / 2, self._opening / 2
            finger = min(max(wanted, now - FINGER_LEAD), now + FINGER_LEAD)
        else:
            finger = 0.0
        self._p_setJointMotorControlArray(
            self._panda, ARM, pybullet.POSITION_CONTROL, self._inverse_kinematics(self._target, 20),
            forces=(MAX_TORQUE,) * 7)
        self._p_setJointMotorControlArray(
            self._panda, FINGERS, pybullet.POSITION_CONTROL, (finger,) * 2, forces=(FINGER_FORCE,) * 2)
        # Contacts flicker from one substep to the next; the mean over the step is what a filtered sensor reads.
        self._forces = np.zeros(3)        # other links, left finger, right finger
        for _ in range(SUBSTEPS):
            position, _ = self._p_getBasePositionAndOrientation(self._block)
            self._p_applyExternalForce(self._block, -1, (0, 0, -9.81 * BLOCK_MASS), position, pybullet.WORLD_FRAME)
            self._p_stepSimulation()
            for contact in self._p_getContactPoints(self._panda, self._block):
                self._forces[max(contact[3] - 8, 0)] += contact[9] / SUBSTEPS
        self.t += 1
        self._observe()
        features = self._features()
        holds, success = self._success()
        if self.obs == "pixels":
            self._frames = self._frames[1:] + [self._frame(84)]
        if self.render_mode == "human":
            time.sleep(max(0.0, DT - (time.perf_counter() - started)))
        info = {"success": success, "features": features}
        return self._observation(), float(holds), False, self.t >= EPISODE_STEPS, info

    def render(self):
        """An RGB frame, uint8 of shape (480, 480, 3), in mode "rgb_array"; None otherwise (the window shows it)."""
        return self._frame(480, shadow=1).transpose(1, 2, 0) if self.render_mode == "rgb_array" else None

    def _frame(self, size, shadow=0):
        image = self._p_getCameraImage(size, size, self._view, self._projection, shadow=shadow,
                                       renderer=pybullet.ER_TINY_RENDERER, flags=pybullet.ER_NO_SEGMENTATION_MASK)
        return np.ascontiguousarray(np.reshape(image[2], (size, size, 4))[:, :, :3].transpose(2, 0, 1), dtype=np.uint8)

    def _inverse_kinematics(self, position, iterations):
        return self._p_calculateInverseKinematics(
            self._panda, HAND, position, POINT_DOWN, maxNumIterations=iterations)[:7]

    def _observe(self):
        """Reads the simulator once per control step; everything else is derived from what it leaves here."""
        link = self._p_getLinkState(self._panda, HAND, computeLinkVelocity=1, computeForwardKinematics=1)
        self._hand, self._hand_velocity = np.array(link[0]), np.array(link[6])
        position, orientation = self._p_getBasePositionAndOrientation(self._block)
        self._block_position = np.array(position)
        self._block_velocity = np.array(self._p_getBaseVelocity(self._block)[0])
        x, y, z, w = orientation
        self._block_yaw = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        self._opening = sum(state[0] for state in self._p_getJointStates(self._panda, FINGERS))

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
        return {name: values[name] for name in self.feature_names}

    def _success(self):
        """The task's own test: (whether it is done as of this step, whether it ever was). Both are False once a limit is
        broken."""
        def met(conditions):
            return [COMPARE[sign](self._values[name], value) for name, sign, value in conditions]

        self._broken |= any(met(self._task.limits))
        self._held = self._held + 1 if all(met(self._task.success)) else 0
        self._done |= self._held >= self._task.steps
        return self._held >= self._task.steps and not self._broken, self._done and not self._broken

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
    """Milliseconds of a control step with random actions: (in all, of these in the physics, in the rest of PyBullet)."""
    env, rng, spent = PandaEnv(task), np.random.default_rng(0), {"step": 0.0, "physics": 0.0, "rest": 0.0}

    def clocked(call, kind):
        def run(*args, **kwargs):
            started = time.perf_counter()
            result = call(*args, **kwargs)
            spent[kind] += time.perf_counter() - started
            return result
        return run

    env.reset(seed=0)
    env.step(np.zeros(4))      # by now every call of PyBullet that a step makes is bound to the instance
    plain = {name: call for name, call in vars(env).items() if name.startswith("_p_")}
    clocks = {name: clocked(call, "physics" if name == "_p_stepSimulation" else "rest") for name, call in plain.items()}
    for step in range(steps):
        if step % EPISODE_STEPS == 0:
            vars(env).update(plain)
            env.reset(seed=step)
            vars(env).update(clocks)
        clocked(env.step, "step")(rng.uniform(-1, 1, 4))
    env.close()
    return [1e3 * spent[kind] / steps for kind in ("step", "physics", "rest")]


if __name__ == "__main__":
    for task in TASKS:
        total, physics, rest = _measure_speed(task)
        print(f"{task}: {1e3 / total:.0f} control steps/s, {total:.2f} ms each: {SUBSTEPS} substeps of physics {physics:.2f} ms, "
              f"PyBullet's other calls {rest:.2f} ms, Python {total - physics - rest:.2f} ms")
    env = PandaEnv("touch", obs="pixels")
    env.reset(seed=0)
    started = time.perf_counter()
    for _ in range(200):
        env._frame(84)
    print(f"a frame of 84x84 pixels: {(time.perf_counter() - started) / 200 * 1e3:.1f} ms")
