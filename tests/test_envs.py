"""The physics and what the tasks promise, Gymnasium's contract, and what is refused."""

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from conftest import example, run_alone

import envs
from envs import EPISODE_STEPS, TASKS, WORKSPACE, Feature, PandaEnv, Space, Task, check_env

STILL = np.zeros(4)


@pytest.fixture
def make():
    """Makes environments and closes them after the test."""
    made = []

    def make(task="touch", *args, **kwargs):
        made.append(PandaEnv(task, *args, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.fixture(params=list(TASKS))
def env(request, make):
    return make(request.param)


def trace(env, actions, **reset):
    """All that an episode returns, as bytes."""
    obs, info = env.reset(**reset)
    seen = [obs.tobytes(), repr(info)]
    for action in actions:
        obs, *rest = env.step(action)
        seen += [obs.tobytes(), repr(rest)]
    return seen


def aim(env, point, gain=33):
    return np.clip((np.asarray(point) - env._target) * gain, -1, 1)


def play(env, policy, seed=0, options=None):
    """The infos of an episode; reward and success of each step are checked against the task."""
    env.reset(seed=seed, options=options)
    steps = [env.step(policy(t)) for t in range(env.task.horizon)]
    compare = {">": float.__gt__, ">=": float.__ge__, "<=": float.__le__}
    held, done, failed = 0, False, False
    for t, (_, reward, terminated, truncated, info) in enumerate(steps):
        f = info["features"]
        failed |= any(compare[sign](f[name], value) for name, sign, value in env.task.limits)
        holds = all(compare[sign](f[name], value) for name, sign, value in env.task.success)
        held = held + 1 if holds else 0
        done |= held >= env.task.steps
        assert reward == float(held >= env.task.steps and not failed) and type(reward) is float
        assert info["success"] is info["is_success"] is (done and not failed)
        assert not terminated and truncated == (t == env.task.horizon - 1)
    return [step[-1] for step in steps]


def series(infos, name):
    return np.array([info["features"][name] for info in infos])


# The contract


def test_example_runs_alone(tmp_path):
    assert run_alone(envs, example(envs), tmp_path) == "0.0\nFalse\n"  # PyBullet adds nothing


def test_same_seed_same_bytes(env, make):
    rng = np.random.default_rng(0)
    episodes = [rng.uniform(-1, 1, (EPISODE_STEPS, 4)) - (0, 0, 0.3, 0) for _ in range(3)]
    fresh = [trace(make(env.task), actions, seed=seed) for seed, actions in enumerate(episodes)]
    other = make(env.task)
    other.reset(seed=9)
    for seed in (2, 0, 1, 0):
        trace(env, episodes[1][:17], seed=5)  # left in the middle
        other.step(STILL)
        assert trace(env, episodes[seed], seed=seed) == fresh[seed]
    side = {"hand": (0.455, 0.0, 0.03), "block": (0.5, 0.0)}
    push = [[0.3, 0, -0.3, -1]] * 30
    first = trace(make(env.task), push, seed=0, options=side)
    trace(env, [[0, 0, -1, -1]] * 12, options={"hand": (0.5, 0.0, 0.06)})  # left in contact
    assert trace(env, push, seed=0, options=side) == first


def test_observations_and_features(env):
    assert env.action_space == (-1, 1, (4,), np.float32)
    assert env.observation_space == (-10, 10, (24,), np.float32)
    blocks = set()
    for seed in range(20):
        obs, info = env.reset(seed=seed)
        blocks.add(tuple(env._block_position))
        assert obs.shape == (24,) and obs.dtype == np.float32
        assert math.dist(env._hand, env._target) < 2e-3
        assert not info["success"] and not info["is_success"]
        assert list(info["features"]) == list(env.task.features)
        assert all(type(value) is float for value in info["features"].values())
    assert len(blocks) == 20


def test_steps_that_are_refused(make):
    env = make(replace(TASKS["push"], horizon=7))
    for begin in (lambda: None, lambda: play(env, lambda t: STILL)):
        begin()
        with pytest.raises(RuntimeError, match="reset"):
            env.step(STILL)
    for action in ([0, 0, 0], [0, 0, 0, math.nan], [STILL], [math.inf, 0, 0, 0]):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"task": "fly"}, "'fly'.* touch, grasp, push"),
        ({"obs": "sound"}, "state or pixels"),
        ({"render_mode": "film"}, "rgb_array"),
        ({"dt": 0.1}, "lasts 0.05 s here, not 0.1 s"),
        ({"start": None}, "needs its `start`"),
        ({"features": {**TASKS["push"].features, "wind": None}}, "FEATURES, not wind"),
        ({"success": (("block_height", ">", 0.1),)}, "block_height > 0.1 must .* hand_to_block"),
        ({"limits": (("hand_speed", "==", 0.1),)}, "== 0.1 must .* by one of >, >=, <="),
        ({"stages": (("wind", ">", 1),)}, "wind > 1"),
        ({"steps": 4}, 'goal must say "4 consecutive"'),
    ],
)
def test_bad_tasks_and_arguments(parts, words):
    with pytest.raises(ValueError, match=words):
        if parts.keys() & {"task", "obs", "render_mode"}:
            PandaEnv(**{"task": "push", **parts})
        else:
            PandaEnv(replace(TASKS["push"], **parts))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sun": (0, 0)}, r"sun \(0, 0\): give hand \(x, y, z\), block"),
        ({"block": (0.5, 0, 0.02)}, "block .* give hand"),
        ({"hand": (0.5, 0, math.nan)}, "hand .*nan.* outside the workspace"),
        ({"goal": (math.inf, 0)}, "goal .*inf.* outside"),
        ({"hand": (1.5, 0, 0.1)}, "0.75 m outside"),
        ({"hand": (0.5, 0, -0.1)}, "outside the workspace"),
        ({"block": (0.0, 0.0)}, "0.30 m outside"),
        ({"hand": (0.75, 0.25, 0.35)}, "hand cannot start there: it ends 0.0[1-9] m away"),
    ],
)
def test_impossible_starts(make, options, words):
    env = make("push")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=words):
        env.reset(seed=0, options=options)
    if "cannot" in words:
        with pytest.raises(RuntimeError, match="call reset"):
            env.step(STILL)
    env.reset(seed=0)
    env.step(STILL)


def test_closed_stays_closed(make):
    env = make("touch")
    env.close()
    other = make("touch")  # PyBullet gives it the closed one's number
    before = trace(other, [STILL] * 3, seed=1)
    for method, *args in ((env.step, STILL), (env.reset,), (env.render,)):
        with pytest.raises(RuntimeError, match="closed"):
            method(*args)
    env.close()
    del env, method
    assert trace(other, [STILL] * 3, seed=1) == before


def test_copies(make):
    env = make("touch")
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="PandaEnv cannot be copied"):
            copying(env)
    for task in TASKS.values():  # goes to the worker processes
        assert pickle.loads(pickle.dumps(task)) == task


def test_gymnasium(env, tmp_path):
    gymnasium = pytest.importorskip("gymnasium")
    from gym_panda import GymPanda
    from gymnasium.utils import env_checker

    wrapped = GymPanda(env.task, render_mode="rgb_array")
    env_checker.check_env(wrapped)
    rows = check_env(wrapped, env.task)
    assert rows.shape == (2 * EPISODE_STEPS, len(env.task.features))
    assert len(np.unique(rows, axis=0)) == len(rows)  # the two episodes differ
    vector = gymnasium.vector.AsyncVectorEnv([lambda: GymPanda(env.task)] * 2)
    alone = [env.reset(seed=seed)[0] for seed in (1, 2)]
    np.testing.assert_array_equal(vector.reset(seed=[1, 2])[0], alone)
    vector.close()
    if env.task.name == "touch":
        pytest.importorskip("moviepy")
        limited = gymnasium.wrappers.TimeLimit(wrapped, 3)
        film = gymnasium.wrappers.RecordVideo(limited, str(tmp_path), disable_logger=True)
        film.reset(seed=0)
        assert [film.step(STILL)[3] for _ in range(3)] == [False, False, True]
        film.close()
        assert [path.stat().st_size > 1000 for path in tmp_path.glob("*.mp4")] == [True]
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(GymPanda(env.task))


# An environment of one's own


class Cart:
    """Brakes a point; each test spoils one attribute, or one part of what step 3 returns."""

    v = Feature("m/s", 0, 1, "speed")
    task = Task("brake", "Stop.", {"x": Feature("m", 0, 1, "place"), "v": v}, (), horizon=5)
    action_space = Space(-1.0, 1.0, (1,), np.float32)
    observation_space = Space(-9.0, 9.0, (2,), np.float32)
    length, terminates, first = 5, False, np.zeros(2, np.float32)

    def __init__(self, **spoilt):
        self.spoilt = spoilt
        for name in spoilt.keys() & vars(Cart).keys():
            setattr(self, name, spoilt[name])

    def reset(self, seed=None, options=None):
        self.t = 0
        return self.first, {}

    def step(self, action):
        assert action.shape == (1,) and action.dtype == np.float32 and abs(action[0]) <= 1
        self.t += 1
        over = self.t >= self.length
        parts = {"obs": np.full_like(self.first, self.t), "reward": 0.0}
        parts |= {"terminated": over and self.terminates, "truncated": over and not self.terminates}
        parts |= {"features": {"x": float(self.t), "v": np.float32(0.5)}, "success": np.bool_(0)}
        if self.t == 3:
            parts |= {name: self.spoilt[name] for name in self.spoilt.keys() & parts.keys()}
        info = {name: parts.pop(name) for name in ("features", "success")}
        return (*parts.values(), info)


@pytest.mark.parametrize("terminates", [False, True])
@pytest.mark.parametrize("length", [1, 4, 12, 50])
def test_check_env_takes_episodes_of_any_length(length, terminates):
    rows = check_env(Cart(length=length, terminates=terminates), Cart.task)
    assert rows.dtype == float
    np.testing.assert_array_equal(rows, [[t + 1, 0.5] for t in range(length)] * 2)


def images(*shape):
    return {"observation_space": Space(0, 255, shape, np.uint8), "first": np.zeros(shape, np.uint8)}


def test_check_env_takes_small_images_and_arrays_as_bounds():
    actions = Space(np.full(1, -1.0), np.full(1, 1.0), (1,), np.float32)
    cart = Cart(action_space=actions, **images(9, 23, 23))
    assert check_env(cart, Cart.task).shape == (10, 2)


@pytest.mark.parametrize(
    "spoilt, words",
    [
        ({"action_space": Space(0.0, 1.0, (1,), np.float32)}, "from -1 to 1: see .*RescaleAction"),
        ({"action_space": Space(-1.0, [1.0, 2.0], (2,), np.float32)}, "from -1 to 1"),
        ({"action_space": Space(-1.0, 1.0, (1, 1), np.float32)}, "Box"),
        ({"action_space": Space(None, None, (), np.int64)}, "Box"),
        ({"observation_space": Space(-9, 9, (2,), np.int64)}, "floats .n,. or uint8"),
        ({"observation_space": Space(-9, 9, (2, 1), np.float32)}, "floats .n,. or uint8"),
        (images(9, 84, 80), "9, H, H"),
        (images(9, 22, 22), "H >= 23, not uint8 .9, 22, 22"),
        ({"first": np.zeros(3, np.float32)}, r"reset .* float32 \(2,\), not float32 \(3,\)"),
        ({"first": np.float32([0, math.inf])}, "reset holds NaN"),
        ({"obs": [0.0, 0.0]}, "step 3 must be a numpy array.* not list"),
        ({"obs": np.zeros(2, np.uint8)}, "step 3 .* not uint8"),
        ({"obs": np.float32([0, math.nan])}, "step 3 holds NaN"),
        ({"reward": math.nan}, "reward must be a finite number, not nan"),
        ({"truncated": None}, "must be bools"),
        ({"success": 1.0}, "success must be bools"),
        ({"features": None}, "must hold .*'x', 'v'.* in this order, not None"),
        ({"features": {"v": 0.0, "x": 0.0}}, "in this order"),
        ({"features": {"x": 0.0, "v": 0.0, "w": 0.0}}, "must hold"),
        ({"features": {"x": 0.0, "v": math.nan}}, "v must be a finite number, not nan"),
        ({"features": {"x": "0", "v": 0.0}}, "x must be a finite number, not '0'"),
        ({"length": 51}, "goes on after 50 steps"),
        ({"reset": lambda seed: np.zeros(2, np.float32)}, r"reset must return \(obs, info\)"),
    ],
)
def test_check_env_names_the_fault(spoilt, words):
    with pytest.raises(ValueError, match=words):
        check_env(Cart(**spoilt), Cart.task)


# The physics


def test_rest(env):
    env.reset(seed=1)
    block, hand = env._block_position, env._hand
    for _ in range(EPISODE_STEPS):
        env.step([0, 0, 0, 1])
    np.testing.assert_allclose(env._block_position, block, atol=2e-4)
    np.testing.assert_allclose(env._hand, hand, atol=2e-3)


def test_friction_and_compliance(make):
    # A slow push takes no more than Coulomb friction, 0.25 N; an arm without caps presses with 190.
    env = make("touch")
    side = {"hand": (0.44, 0.0, 0.03), "block": (0.5, 0.0)}
    infos = play(env, lambda t: [0.1, 0, 0, 0], options=side)
    force = series(infos, "contact_force")
    assert series(infos, "block_displacement")[-1] > 0.005
    assert 0.05 < np.median(force[force > 0]) < 1.2 * envs.BLOCK_FRICTION * envs.BLOCK_MASS * 9.81
    above = {"hand": (0.5, 0.0, 0.1), "block": (0.5, 0.0)}
    infos = play(env, lambda t: [0, 0, -1, 0], options=above)
    assert 2 < np.median(series(infos, "contact_force")[-20:]) < 20
    assert not infos[-1]["success"]


@pytest.mark.parametrize("axis, sign", [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1)])
def test_actions_move_the_hand(make, axis, sign):
    env, action, hands, velocities, speeds = make("touch"), np.zeros(4), [], [], []
    env.reset(seed=0, options={"hand": (0.5, 0.0, 0.15), "block": (0.5, 0.1)})
    action[axis] = sign
    for _ in range(12):
        obs, *_, info = env.step(action)
        hands.append(env._hand)
        velocities.append(obs[14:17] / 10)
        speeds.append(info["features"]["hand_speed"])
    moved = (hands[-1] - hands[3]) / (8 * 0.05)
    velocity = np.mean(velocities[4:], axis=0)
    assert 0.1 < sign * moved[axis] < 0.35
    assert velocity[axis] == pytest.approx(moved[axis], rel=0.3)  # the hand slows within a step
    assert np.mean(speeds[4:]) == pytest.approx(abs(moved[axis]), rel=0.3)
    assert np.abs(np.delete(velocity, axis)).max() < 0.05
    np.testing.assert_allclose(obs[11:14], 100 * (env._target - env._hand), atol=1e-4)
    assert sign * obs[11 + axis] > 0.1  # the target leads
    seen = {size: trace(env, [size * action], seed=0) for size in (0.8, 1.0, 5.0)}
    assert seen[1.0] == seen[5.0] != seen[0.8]


def test_target_stays_near_and_in_the_workspace(env):
    env.reset(seed=0)
    for t in range(EPISODE_STEPS):
        hand, target = env._hand, env._target
        env.step([1, 1, -1, 0] if t < 25 else [-1, -1, 1, 0])
        assert (WORKSPACE[0] <= env._target).all() and (env._target <= WORKSPACE[1]).all()
        assert np.abs(env._target - target).max() <= 0.01 + 1e-9 or (target < WORKSPACE[0]).any()
        assert np.abs(env._target - hand).max() <= 0.03 + 1e-9


def pose(env, hand=(0.44, 0.05, 0.04), block=(0.5, 0.02, 0.02), start=None, goal=(0.6, -0.1)):
    """State and features of a scene, without a step of physics."""
    yaw = 0.1
    env.reset(seed=0, options={"hand": hand, "block": start or block[:2], "goal": goal})
    turned = (0, 0, math.sin(yaw), math.cos(yaw))
    env._sim.resetBasePositionAndOrientation(env._block, block, turned)
    env._sim.resetBaseVelocity(env._block, (0.1, -0.2, 0.05))
    env._observe()
    return env._state, env._features


def test_posed_scene(make):
    state, features = pose(make("push"), start=(0.47, -0.02))
    lengths = [-0.06, 0.05, -0.06, 0.06, -0.03, -0.02, 0.03, 0.04, 0.1, -0.12, 0]
    speeds = [0, 0, 0, 1, -2, 0.5]
    expected = [20 * x for x in lengths] + [0] * 3 + speeds + [math.cos(0.8), math.sin(0.8), 0, 0]
    near = [20 * 2e-3] * 11 + [0.2] * 3 + [1e-3] * 10  # inverse kinematics misses by up to 2 mm
    assert (np.abs(state - expected) < near).all()
    values = [math.hypot(0.06, 0.03, 0.02), math.hypot(0.06, 0.03), 0.02, 0.04, 0, 0, 0.05]
    values += [math.sqrt(0.0525), math.hypot(0.1, 0.12)]
    assert list(features.values())[:9] == pytest.approx(values, abs=2e-3)
    grasp = make("grasp")
    state, features = pose(grasp, block=(0.5, 0.02, 0.09))
    assert features["block_height"] == pytest.approx(0.07)
    assert features["gripper_opening"] == pytest.approx(0.08, abs=1e-4)
    assert state[10] == pytest.approx(20 * 0.08, abs=2e-3)
    assert pose(grasp, block=(0.5, 0.02, 0.0199))[1]["block_height"] == 0
    obs, _ = grasp.reset(seed=0)
    assert not obs[8:10].any()  # without a goal of its own, it is where the block starts
    x, y, *_ = grasp._sim.getLinkState(grasp._panda, envs.HAND)[1]
    assert 1 - 2 * (x * x + y * y) == pytest.approx(-1, abs=1e-3)  # the hand points down


@pytest.mark.parametrize(
    "hand, cosine", [((0.44, 0.02), 1), ((0.5, 0.08), 0), ((0.56, 0.02), -1), ((0.44, 0.08), 0.71)]
)
def test_push_alignment(make, hand, cosine):
    features = pose(make("push"), (*hand, 0.03), goal=(0.6, 0.02))[1]
    assert features["push_alignment"] == pytest.approx(cosine, abs=0.05)


@pytest.mark.parametrize(
    "task, lowest, highest",
    [
        ("touch", [0.48, -0.08, 0.36, -0.08, 0.05], [0.56, 0.08, 0.42, 0.08, 0.12]),
        ("grasp", [0.45, -0.06, 0.45, -0.06, 0.12], [0.55, 0.06, 0.55, 0.06, 0.16]),
        (
            "push",
            [0.42, -0.06, 0.36, -0.08, 0.03, 0.52, -0.1],
            [0.48, 0.06, 0.39, 0.08, 0.03, 0.64, 0.1],
        ),
    ],
)
def test_starts(task, lowest, highest):
    """`start` draws by uniform(low, high): min and max in its place give the ends."""
    for end, expected in ((min, lowest), (max, highest)):
        start = TASKS[task].start(end)
        places = [start[place] for place in ("block", "hand", "goal") if place in start]
        assert np.concatenate(places) == pytest.approx(expected)


def test_readings_lie_in_their_ranges(env):
    moves = iter(np.random.default_rng(0).uniform(-1, 1, (6 * EPISODE_STEPS, 4)))
    infos = [info for seed in range(6) for info in play(env, lambda t: next(moves), seed)]
    for name, feature in env.task.features.items():
        values = series(infos, name)
        inside = (feature.low - 1e-6 <= values) & (values <= feature.high + 1e-6)
        assert inside.mean() > 0.9, name


# The tasks


def test_tasks_mean_what_their_goals_say():
    for task, steps, *numbers in (
        ("touch", 10, "0.5 s", "2 N", "0.05 m"),
        ("grasp", 5, "0.25 s", "0.08 m"),
        ("push", 3, "0.15 s", "0.03 m"),
    ):
        task = TASKS[task]
        conditions = [condition for condition in task.limits or task.success if condition[2]]
        assert task.steps == steps and f"{steps * task.dt:g} s" == numbers[0]
        assert [value for _, _, value in conditions] == [float(n.split()[0]) for n in numbers[1:]]
        assert all(words in task.goal for words in numbers)


def test_touch(make):
    env, outcomes = make("touch"), []

    def press(t):
        up = [-0.5, 0, 1, 0] if t < 30 else [*aim(env, (*env._block_position[:2], 0.08)), 0]
        return up if t < 38 else [0, 0, -1, 0]

    options = {"hand": (0.458, 0.0, 0.03), "block": (0.5, 0.0)}
    for later in (lambda t: [-1, 0, 0.5, 0], lambda t: [1, 0, 0, 0], press):
        moves = [lambda t: [0.1, 0, 0, 0]] * 25 + [later] * 25
        infos = play(env, lambda t, moves=moves: moves[t](t), options=options)
        assert infos[24]["success"]
        force, moved = series(infos, "contact_force"), series(infos, "block_displacement")
        outcomes.append((infos[-1]["success"], force.max() > 2, moved.max() > 0.05))
    assert outcomes[:2] == [(True, False, False), (False, False, True)]  # let go, shoved
    assert outcomes[2][:2] == (False, True)  # pressed


def test_grasp(make):
    env = make("grasp")

    def grasp(t):
        height = 0.10 if t < 10 else 0.02
        down = [*aim(env, (*env._block_position[:2], height)), 1]
        return down if t < 22 else [0, 0, 0 if t < 28 else 1, -1]

    info = play(env, grasp)[-1]
    left, right = np.expm1(env._state[22:]) / 10
    assert info["success"] and info["features"]["gripper_opening"] == pytest.approx(0.04, abs=4e-3)
    assert min(left, right) == pytest.approx(info["features"]["grip_force"], rel=1e-3)
    assert left + right == pytest.approx(info["features"]["contact_force"], rel=1e-3)
    assert left == pytest.approx(right, rel=0.5) and 0.5 < left < 1.2 * envs.FINGER_FORCE
    env.t = 0
    for _ in range(15):
        _, reward, _, _, info = env.step([0, 0, 0, 1])  # let the block fall
    assert info["features"]["block_height"] < 0.01 and info["features"]["grip_force"] == 0
    assert reward == 0.0 and info["success"]


def test_fingers(make):
    env = make("grasp")
    for beside in (0.012, -0.012):
        env.reset(seed=0, options={"hand": (0.5, beside, 0.02), "block": (0.5, 0.0)})
        left, right = (env._sim.getLinkState(env._panda, link)[0][1] for link in envs.FINGERS)
        obs, *_, info = env.step([0, 0, 0, -1])
        assert 0.06 < info["features"]["gripper_opening"] < 0.07  # a finger's target leads by 1 cm
        while not obs[22:].any():
            obs, *_ = env.step([0, 0, 0, -1])
        assert (obs[22] > obs[23]) == (abs(left) < abs(right))  # the nearer finger touches first


@pytest.mark.parametrize("limits", [(), (("hand_speed", ">", 0.2),)])
def test_steps_in_a_row_and_limits_that_break_once(make, limits):
    goal, quick = "Move for 3 consecutive steps.", (("hand_speed", ">", 0.1),)
    env = make(replace(TASKS["touch"], goal=goal, success=quick, steps=3, limits=limits))
    moves = iter(np.random.default_rng(0).choice([0, 0.4, 0.8], (150, 1)) * [[0, 1, 1, 0]])
    infos = [info for seed in range(3) for info in play(env, lambda t: next(moves), seed)]
    assert any(info["success"] for info in infos)
    assert infos[-1]["success"] == (not limits)


def test_push(make):
    env = make("push")

    def push(t):
        block, ahead = env._block_position[:2], env._goal - env._block_position[:2]
        far = np.linalg.norm(ahead)
        return STILL if far < 0.015 else [*aim(env, (*(block + 0.01 * ahead / far), 0.03), 20), 0]

    assert sum(play(env, push, seed)[-1]["success"] for seed in range(5)) >= 4
    options = {"block": (0.5, 0.0), "goal": (0.51, 0.0)}
    for _ in range(2):  # each episode counts its steps anew
        success = [info["success"] for info in play(env, lambda t: STILL, options=options)]
        assert success == [False] * 2 + [True] * (EPISODE_STEPS - 2)


# Images


def test_frames(make):
    env, shown = make("push", "pixels"), make("push", "pixels", "rgb_array")
    obs, _ = env.reset(seed=0)
    assert env.observation_space == (0, 255, obs.shape, obs.dtype) and obs.shape == (9, 84, 84)
    np.testing.assert_array_equal(obs[:3], obs[6:])
    assert (obs[6].astype(int) - obs[7] > 60).sum() > 20  # the red block
    new = env.step([1, 0, 0, 0])[0]
    np.testing.assert_array_equal(new[:6], obs[3:])
    assert (new[6:] != obs[6:]).any() and new.dtype == np.uint8
    np.testing.assert_array_equal(shown.reset(seed=0)[0], obs)
    np.testing.assert_array_equal(shown.step([1, 0, 0, 0])[0], new)
    assert shown.render().shape == (480, 480, 3) and shown.render().std() > 10
    assert env.render() is None
    assert len(check_env(env, env.task)) == 2 * EPISODE_STEPS
    nicer = make("push", "state", "rgb_array")  # people see the visual meshes
    nicer.reset(seed=0)
    nicer.step([1, 0, 0, 0])
    assert (nicer.render() != shown.render()).any()


@pytest.mark.parametrize("task, disc", [("touch", True), ("grasp", False), ("push", True)])
def test_disc_marks_goal_or_start(make, task, disc):
    env = make(task, "pixels")
    env.reset(seed=0)
    x, y, z = env._block_position
    env._sim.resetBasePositionAndOrientation(env._block, (x + 0.1, y + 0.1, z), (0, 0, 0, 1))
    red, green, blue = env.step(STILL)[0][6:].astype(int)
    assert (((green > red + 40) & (green > blue + 40)).sum() > 15) == disc
