"""The reward language: what it computes, what it refuses, and that nothing outside it can run."""

import ast
import os
import time

import numpy as np
import pytest

from reward import BOUND, FUNCTIONS, Reward, RewardError, RTheta, match_level

FEATURES = ["distance", "force", "height"]
SOURCE = '''
def reward(distance, force, reach_weight=1.0, reach_scale=0.1,
           contact_weight=2.0, contact_threshold=1.0):   # the weights are guesses
    """Reach, then touch."""
    near = np.exp(-distance / reach_scale)
    touching = (force > contact_threshold) & (distance < 0.1)
    return {"reach": reach_weight * near, "contact": contact_weight * touching,
            "effort": -0.5 * np.where(force > 2, force - 2, 0.0) ** 2}
'''


def by_hand(distance, force, theta):
    """The same reward for one step, in plain Python."""
    import math
    contact = theta["contact_weight"] if force > theta["contact_threshold"] and distance < 0.1 else 0.0
    return (theta["reach_weight"] * math.exp(-distance / theta["reach_scale"]) + contact
            - 0.5 * (max(force - 2, 0)) ** 2)


def test_scores_steps_buffers_and_chains_alike():
    reward = Reward(SOURCE, FEATURES)
    assert reward.features == ["distance", "force"] and reward.term_names == ["reach", "contact", "effort"]
    assert reward.params == {"reach_weight": 1.0, "reach_scale": 0.1, "contact_weight": 2.0, "contact_threshold": 1.0}
    rng = np.random.default_rng(0)
    distance, force = rng.uniform(0, 0.3, 50), rng.uniform(0, 4, 50)
    buffer = reward.total({"distance": distance, "force": force})
    steps = [reward.total({"distance": d, "force": f}) for d, f in zip(distance, force)]
    expected = [by_hand(d, f, reward.params) for d, f in zip(distance, force)]
    np.testing.assert_allclose(buffer, expected, rtol=1e-12)
    np.testing.assert_array_equal(buffer, steps)

    thetas = [{**reward.params, "contact_threshold": t, "reach_weight": w} for t, w in ((0.1, 1.0), (3.0, 5.0))]
    stacked = {name: np.array([[theta[name]] for theta in thetas]) for name in reward.params}
    chains = reward.total({"distance": distance, "force": force}, stacked)
    assert chains.shape == (2, 50)
    for row, theta in zip(chains, thetas):
        np.testing.assert_allclose(row, [by_hand(d, f, theta) for d, f in zip(distance, force)], rtol=1e-12)


def test_powers_of_conditions_are_numbers_whatever_the_values():
    reward = Reward("def r(force, w=1.0):\n    d = (force > 5) ** (force > -1)\n    return {'a': w * d ** (-d)}", FEATURES)
    assert reward.total({"force": np.array([0.0, 6.0])}) == pytest.approx([1.0, 1.0])


def test_terms_have_the_full_shape_even_when_constant():
    reward = Reward('def r(distance, w=2.0):\n    return {"alive": w, "one": 1}', FEATURES)
    terms = reward.terms({"distance": np.zeros(7)}, {"w": np.array([[1.0], [3.0]])})
    assert {name: term.shape for name, term in terms.items()} == {"alive": (2, 7), "one": (2, 7)}


def test_features_are_never_changed():
    reward = Reward('def r(distance, w=2.0):\n    x = np.abs(distance) * w\n    return {"x": x}', FEATURES)
    distance = np.array([-1.0, 1.0])
    reward.total({"distance": distance})
    np.testing.assert_array_equal(distance, [-1.0, 1.0])


def test_source_with_new_parameters_keeps_comments_and_runs_elsewhere():
    reward = Reward(SOURCE.replace("guesses", "guesses \u2264 1"), FEATURES)
    theta = {"reach_weight": 0.5, "contact_threshold": 0.127, "reach_scale": 0.1, "contact_weight": 21.05}
    source = reward.source_with(theta)
    assert "# the weights are guesses \u2264 1" in source
    assert Reward(source, FEATURES).params == theta
    namespace = {"np": np}
    exec(source, namespace)                                          # as a person who pastes it would
    np.testing.assert_allclose(sum(namespace["reward"](np.array([0.05]), np.array([0.5])).values()),
                               reward.total({"distance": 0.05, "force": 0.5}, theta))


def test_check_names_the_terms_that_are_not_finite():
    reward = Reward('def r(distance, force, w=1.0):\n    return {"fine": w * force, "bad": np.log(distance), '
                    '"worse": w / distance}', FEATURES)
    reward.check({"distance": np.ones(3), "force": np.ones(3)})
    with pytest.raises(RewardError, match="bad, worse"):
        reward.check({"distance": np.array([1.0, 0.0]), "force": np.ones(2)})


def wrap(expression):
    return f'def reward(distance, force, w=1.0):\n    return {{"term": {expression}}}'


@pytest.mark.parametrize("expression, hint", [
    ("w if force > 1 else 0", "np.where"), ("force > 1 and distance < 1", "&"), ("not force", "~"),
    ("0 < force < 1", "(a < b) & (b < c)"), ("np.foo(force)", "np.foo is not available"),
    ("np.maximun(force, 1)", "np.maximum meant"), ("forse", "force meant"), ("np.clip(force, 0)", "takes 3"),
    ("np.exp", "must be called"), ("np.max(force, 0)", "np.maximum meant"), ("max(force, 0)", "form np.NAME"), ("height * w", "unknown name"), ("weight", "unknown name")])
def test_common_slips_get_a_line_and_a_way_out(expression, hint):
    with pytest.raises(RewardError, match="line 2") as error:
        Reward(wrap(expression), FEATURES)
    assert hint in str(error.value)


@pytest.mark.parametrize("signature, hint", [
    ("distance, w=1.0, *args", "args"), ("speed, w=1.0", "speed is not a feature"), ("distance", "no parameters"),
    ("distance, w='1'", "plain positive number"), ("distance, w=-1.0", "plain positive number"), ("distance, w=0", "positive"),
    ("w=1.0", "no features"), ("distance, distance, w=1.0", "duplicate argument"), ("distance=1.0, w=1.0", "distance is a feature"),
    ("distance, np=1.0", "reserved"), ("distance, __w=1.0", "reserved"), ("distance, w=1e999", "too large")])
def test_signatures_are_checked(signature, hint):
    with pytest.raises(RewardError, match=hint):
        Reward(f'def reward({signature}):\n    return {{"a": distance}}', FEATURES)


BUILTIN = "().__class__.__base__.__subclasses__()"
HOSTILE = [wrap(e) for e in (
    "__import__('os').system('touch pwned')", "open('pwned', 'w')", "eval('1')", "exec('1')", "compile('1','','eval')",
    "globals()", "locals()", "vars()", "dir()", "getattr(force, 'shape')", "force.__class__", "().__class__", BUILTIN,
    "force.tofile('pwned')", "force.dump('pwned')", "np.save('pwned', force)", "np.load('x')", "np.ctypeslib", "np.os",
    "np.core.numeric.os", "np.exp.__globals__", "np.exp.__class__", "w.__class__.__mro__", "np.__dict__",
    "'{0.__class__}'.format(force)", "f'{force.__class__}'", "f'{force!r}'", "'a' * 10**9", "b'a'", "'%s' % force",
    "9**9**9**9", "10.0 ** 10 ** 10 ** 10", "2 ** 10 ** 9", "(-1) ** 0.5", "1 << 10 ** 9", "1 / 0", "force % 0", "1e308 * 10",
    "9" * 5000, "1j", "True", "None", "...", "[force] * 10 ** 9", "[0 for _ in force]", "(x for x in force)",
    "{x: x for x in (1,)}", "{1, 2}", "(force, w)", "force[0]", "force[None, :, None]", "force[::-1]", "lambda: 1",
    "(lambda f: f(f))(lambda f: f(f))", "(y := force)", "*force", "await_", "(yield 1)", "(yield from force)",
    "np.exp(*force)", "np.exp(x=force)", "np.exp(force, out=force)", "np.where(force > 1, w, **{})", "np.tile(force, 10**9)",
    "np.zeros(10**12)", "np.ones((10**6, 10**6))", "np.broadcast_to(force, (10**9,))", "np.outer(force, force)",
    "np.frompyfunc(print, 1, 1)", "np.vectorize(print)(force)", "np.fromfile('/etc/passwd')", "breakpoint()", "exit()",
    "quit()", "input()", "print(force)", "help()", "type(force)", "super()", "object()", "memoryview(b'')", "force @ force",
    "force is w", "force in (1, 2)", "~w", "-" * 5000 + "force", "(" * 180 + "force" + ")" * 180, "(" * 5000,
    "+".join(["force"] * 3000), "np.exp(" * 80 + "force" + ")" * 80, "reward(force)", "__builtins__", "__name__",
    "{'a': force}", "force if 1 else w", "np.exp(np)", "np", "abs", "force.real", "w.real", "force // w", "force ^ w")]
HOSTILE += [
    "import os\n" + wrap("force"), "from os import *\n" + wrap("force"), wrap("force") + "\nimport os",
    "@print\n" + wrap("force"), wrap("force") + "\nprint('pwned')", wrap("force") + "\n" + wrap("w"), "x = 1\n" + wrap("w"),
    "class A: pass", "", "\0", "def reward(", "lambda: 1", "async " + wrap("force"),
    "def reward(force: print('pwned'), w=1.0):\n    return {'a': force}",
    "def reward(force, w=1.0) -> print('pwned'):\n    return {'a': force}",
    "def reward(force, w=print('pwned')):\n    return {'a': force}",
    "def reward(force, w=[].append):\n    return {'a': force}",
    "def reward(force, w=1.0):\n    import os\n    return {'a': force}",
    "def reward(force, w=1.0):\n    global x\n    x = 1\n    return {'a': force}",
    "def reward(force, w=1.0):\n    nonlocal x\n    return {'a': force}",
    "def reward(force, w=1.0):\n    while True: pass", "def reward(force, w=1.0):\n    for _ in force: pass",
    "def reward(force, w=1.0):\n    try:\n        1 / 0\n    except Exception as e:\n        x = e\n    return {'a': force}",
    "def reward(force, w=1.0):\n    raise SystemExit", "def reward(force, w=1.0):\n    assert force\n    return {'a': w}",
    "def reward(force, w=1.0):\n    del force\n    return {'a': w}", "def reward(force, w=1.0):\n    with force: pass",
    "def reward(force, w=1.0):\n    force[0] = 1\n    return {'a': w}",
    "def reward(force, w=1.0):\n    force.flags = 1\n    return {'a': w}",
    "def reward(force, w=1.0):\n    force += 1\n    return {'a': force}",
    "def reward(force, w=1.0):\n    force = w\n    return {'a': force}",
    "def reward(force, w=1.0):\n    np = w\n    return {'a': np.exp(force)}",
    "def reward(force, w=1.0):\n    a, b = force, w\n    return {'a': a}",
    "def reward(force, w=1.0):\n    x: print('pwned') = 1\n    return {'a': force}",
    "def reward(force, w=1.0):\n    def f(): return 1\n    return {'a': force}",
    "def reward(force, w=1.0):\n    class A: pass\n    return {'a': force}",
    "def reward(force, w=1.0):\n    return {**force}", "def reward(force, w=1.0):\n    return {force: w}",
    "def reward(force, w=1.0):\n    return {'a': force, 'a': w}", "def reward(force, w=1.0):\n    return force",
    "def reward(force, w=1.0):\n    pass", "def reward(force, w=1.0):\n    return {'__class__': yield_}",
    "def reward(f\u043erce, w=1.0):\n    return {'a': f\u043erce}", "def reward(force, w=1.0):\n    return {'a': \uff57}",
    "def reward(force, w=1.0):\n    return {'a': np.\uff45xp(\uff46orce) * \u017f}", "\ud800", "# \u202e\n" + wrap("f\u200dorce"),
    "# " + "x" * 2_000_000, "def reward(" + ", ".join(f"w{i}=1.0" for i in range(500)) + "):\n    return {'a': w1}",
    "def reward(force, w=1.0):\n" + "".join(f"    x{i} = force\n" for i in range(2000)) + "    return {'a': w}",
    "def reward(force, w=1.0, w=2.0):\n    return {'a': force}", "def __debug__(force, w=1.0):\n    return {'a': force}",
    "def np(force, w=1.0):\n    return {'a': np.exp(force)}", "def __builtins__(force, w=1.0):\n    return {'a': force}",
    "def reward(force, w=1.0):\n    x = force\n" + "".join("    x = x ** w\n" for _ in range(300)) + "    return {'a': x}",
    "match force:\n    case _: pass", "type X = int\n" + wrap("force"), "def reward[T](force, w=1.0):\n    return {'a': force}"]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_source_is_refused_or_harmless(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    try:
        terms = Reward(source, FEATURES).terms({name: np.ones(1000) for name in FEATURES})
    except RewardError as error:
        assert str(error) and len(str(error)) < 1000
    else:
        # It is in the language, so all it can have done is arithmetic on these arrays.
        assert all(term.shape == (1000,) and term.dtype == float for term in terms.values())
    assert time.monotonic() - started < 1
    assert not os.listdir(tmp_path) and capsys.readouterr().out == ""


def test_there_are_enough_hostile_sources_and_few_are_harmless():
    assert len(HOSTILE) >= 60
    accepted = []
    for source in HOSTILE:
        try:
            Reward(source, FEATURES)
            accepted.append(source)
        except RewardError:
            pass
    # Arithmetic that overflows or fails only when computed, a feature in 180 pairs of parentheses, a full-width w.
    assert {ast.unparse(ast.parse(s).body[0].body[0].value.values[0]) for s in accepted} == {
        "9 ** 9 ** 9 ** 9", "10.0 ** 10 ** 10 ** 10", "2 ** 10 ** 9", "(-1) ** 0.5", "1 / 0", "1e+308 * 10", "force", "w"}


def test_functions_are_elementwise_and_numpys():
    x = np.array([[0.2, 0.7, 1.3]])
    for name, arity in FUNCTIONS.items():
        reward = Reward(f"def r(distance, w=1.0):\n    return {{'a': 0 + np.{name}({', '.join(['distance'] * arity)})}}", FEATURES)
        result = reward.total({"distance": x})
        assert result.shape == x.shape
        np.testing.assert_array_equal(result, getattr(np, name)(*[x] * arity))


def test_returns_agree_with_adding_up_steps():
    rng = np.random.default_rng(0)
    reward = Reward("def r(a, b, w=2.0):\n    return {'a': w * a, 'b': -b}", ["b", "a"])
    taus = [rng.uniform(0, 0.5, (length, 2)) for length in (50, 7, 1)]
    expected = [sum(3 * a - b for b, a in tau) for tau in taus]
    np.testing.assert_allclose(reward.returns(taus)({"w": 3.0}), expected)
    chains = reward.returns(taus)({"w": np.array([[3.0], [0.0]])})
    np.testing.assert_allclose(chains, [expected, [-tau[:, 0].sum() for tau in taus]])


@pytest.mark.parametrize("statement", ["x = y = a", "x, y = a, a", "x += a", "a[0] = 1.0"])
def test_assignments_are_to_one_plain_name(statement):
    with pytest.raises(RewardError, match="line 2"):
        Reward(f"def r(a, w=1.0):\n    {statement}\n    return {{'a': w * a}}", ["a"])


@pytest.mark.parametrize("body, reason", [
    ("x = force", "line 1: the function does not return anything"), ("force = np.float64(force)", "line 1: the function does not return anything"),
    ("x = {'a': force}\n    return {'a': w}", "line 2: a dict can only be returned"),
    ("return {force: w}", "line 2: each key of the returned dict must be a term's name in quotes"),
    ("return {'a b': w}", "line 2: each key"), ("return {'a': w, 'a': force}", "line 2: term a is returned twice"),
    ("return w", "line 2: return a dict of named terms"), ("return {}", "line 2: return a dict of named terms"),
    ("return {'a': w}\n    x = 1", "line 2: return must be the last statement"),
    ("w = 2.0\n    return {'a': w}", "line 2: w already has a meaning"),
    ("force\n    return {'a': w}", "line 2: only assignments and one return are allowed"),
    ("def f(force, w=1.0): return {'a': w}\n    return {'a': w}", "line 2: functions inside the function"), ("for i in x: pass", "line 2"), ("return {'a': w * 'x'}", "line 2: 'x' is not a number")])
def test_bodies_are_checked(body, reason):
    with pytest.raises(RewardError) as error:
        Reward(f"def r(force, w=1.0):\n    {body}", FEATURES)
    assert str(error.value).startswith(reason)


@pytest.mark.parametrize("beside", ["print(1)", "with open('x') as f: pass", "x = 1"])
def test_nothing_stands_beside_the_function(beside):
    with pytest.raises(RewardError, match="line 1: ") as error:
        Reward(f"{beside}\ndef r(force, w=1.0):\n    return {{'a': w * force}}", FEATURES)
    assert "only one function" in str(error.value) or "import" in str(error.value)


def test_features_go_by_name_whatever_their_order():
    reward = Reward("def r(b, a, w=1.0):\n    return {'a': w * a - 10 * b}", ["a", "b"])
    rows = np.array([[1.0, 2.0], [3.0, 5.0]])
    named = reward.named(rows)
    np.testing.assert_array_equal(named["a"], [1, 3])
    np.testing.assert_array_equal(named["b"], [2, 5])
    np.testing.assert_array_equal(reward.total(named), [-19, -47])


def both(source, **features):
    """The values of a reward's one term, compiled and as the Python file that a run leaves."""
    reward = Reward(source, FEATURES)
    namespace = {}
    with np.errstate(all="ignore"):
        exec(reward.python(reward.params), namespace)
        file = namespace[reward.name](**features, **reward.params)["term"]
    compiled = reward.terms(features)["term"]
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(file, float), compiled.shape), compiled)
    return compiled


@pytest.mark.parametrize("expression, value", [
    ("-(force > 2.0) * w", [0, 0, -1]), ("(force > 1) + (distance > 0)", [1, 0, 2]), ("(force > 1) - (distance > 0)", [-1, 0, 0]),
    ("(force > 1) + (distance > 0) + w", [2, 1, 3]), ("((force > 1) | (distance > 0)) * 2", [2, 0, 2]),
    ("1 - ~(force > 1)", [0, 0, 1]), ("np.clip(force, 0, None)", [0.5, 0, 3]), ("np.clip(force, None, 1)", [0.5, -1, 1]),
    ("np.pi * force", [np.pi / 2, -np.pi, 3 * np.pi]), ("np.e + 0 * force", [np.e] * 3), ("(force > 1).astype(float)", [0, 0, 1]),
    ("((force > 1) + (distance > 0)).astype( float ) * 2", [2, 0, 4]), ("np.abs((force > 1) - (distance > 0))", [1, 0, 0]),
    ("np.where(force > 1, force > 2, distance > 1) * w", [0, 0, 1]), ("np.power(2, -1) * w + 0 * force", [0.5] * 3),
    ("(-8) ** 0.5 + force", [np.nan] * 3), ("((2 > 1) + (2 > 1)) ** 30 * w + 0 * force", [2.0 ** 30] * 3),
    ("((force > 1) == (distance > 0)) + 0", [0, 1, 1]), ("(force > 1) ** 2 / 2", [0, 0, 0.5]), ("-((force > 1) & (force > 2))", [0, 0, -1])])
def test_truth_values_count_as_in_python_and_the_file_agrees(expression, value):
    got = both(f"def r(distance, force, w=1.0):\n    return {{'term': {expression}}}", distance=np.array([1.0, 0.0, 1.0]),
               force=np.array([0.5, -1.0, 3.0]))
    np.testing.assert_array_equal(got, value)


def test_names_stand_for_truth_values_and_annotations_say_nothing():
    source = ("def r(distance: np.ndarray, force: 'array', w: float = 1.0) -> dict[str, float]:\n"
              "    near: float = distance < 0.5   # true or false\n    held = near & (force > 1)\n"
              "    near = near * 2.0\n    return {'term': -near + held + w}")
    got = both(source, distance=np.array([0.1, 0.1, 1.0]), force=np.array([0.0, 2.0, 2.0]))
    np.testing.assert_array_equal(got, [-1, 0, 1])


@pytest.mark.parametrize("expression, hint", [
    ("force & (w > 0)", "compare first"), ("~force", "compare first"), ("(force > 1) | distance", "compare first"),
    ("np.clip(None, 0, 1)", "None is not a number"), ("np.maximum(force, None)", "None is not a number"), ("np.pi()", "np.NAME"),
    ("force.astype(int)", "the only attributes"), ("np.inf", "not available")])
def test_what_is_no_number_or_truth_value_is_refused(expression, hint):
    with pytest.raises(RewardError, match="line 2") as error:
        Reward(wrap(expression), FEATURES)
    assert hint in str(error.value)


def test_terms_whose_sum_is_infinite_are_refused():
    reward = Reward("def r(force, w=1.0):\n    return {'a': 1e308 + 0 * force, 'b': 1e308 * w}", FEATURES)
    with pytest.raises(RewardError, match="not their sum"):
        reward.check({"force": np.ones(3)})


class Program:
    """Random programs of the language beside the same arithmetic, carried out step by step in plain Python."""

    def __init__(self, rng):
        self.rng, self.values = rng, {"distance": 0.3, "force": float(rng.choice([0.0, 0.7, 2.5, -1.0])), "w": 1.7}
        self.truths = {}
        self.lines = []
        for name in ("s", "t")[:rng.integers(3)]:
            text, value = self.truth(2)
            self.lines.append(f"    {name} = {text}\n")
            self.truths[name] = bool(value)

    def number(self, depth):
        """(text, value) of an expression that is a number; truth values among its parts count 0 and 1."""
        kind = self.rng.integers(11 if depth else 3)
        if kind == 0:
            value = float(self.rng.choice([0, 1, 2, 0.5, 3]))
            return (f"{value:g}", value)
        if kind in (1, 2):
            known = {**self.values, **self.truths}
            name = str(self.rng.choice(list(known)))
            return name, float(known[name])
        if kind == 3:
            text, value = self.truth(depth - 1)
            return f"({text})" + ".astype(float)" * int(self.rng.integers(2)), float(value)
        a, b = self.number(depth - 1), self.number(depth - 1)
        if kind == 4:
            return f"(-{a[0]})", -a[1]
        if kind == 5:
            name, of = [("maximum", max), ("minimum", min)][self.rng.integers(2)]
            return f"np.{name}({a[0]}, {b[0]})", of(a[1], b[1])
        if kind == 6:
            text, value = self.truth(depth - 1)
            return f"np.where({text}, {a[0]}, {b[0]})", a[1] if value else b[1]
        if kind == 7:
            return f"({a[0]}) ** 2", a[1] * a[1]
        sign = str(self.rng.choice(["+", "-", "*"]))
        return f"({a[0]} {sign} {b[0]})", {"+": a[1] + b[1], "-": a[1] - b[1], "*": a[1] * b[1]}[sign]

    def truth(self, depth):
        kind = self.rng.integers(5 if depth > 0 else 1)
        if kind == 4:
            name = str(self.rng.choice([*self.truths, "(force > 1)"]))
            return name, self.truths.get(name, self.values["force"] > 1)
        if kind == 0:
            a, b = self.number(max(0, depth - 1)), self.number(max(0, depth - 1))
            sign = str(self.rng.choice(["<", "<=", ">", ">=", "==", "!="]))
            return f"({a[0]} {sign} {b[0]})", eval(f"{a[1]!r} {sign} {b[1]!r}")
        a, b = self.truth(depth - 1), self.truth(depth - 1)
        return [None, (f"(~{a[0]})", not a[1]), (f"({a[0]} & {b[0]})", a[1] and b[1]), (f"({a[0]} | {b[0]})", a[1] or b[1])][kind]


@pytest.mark.parametrize("expression, p, q", [
    ("p * 2 ** -d", 2.0, 1.0), ("p * (~(d > 1)).astype(float)", 2.0, 1.0), ("p * (~t).astype(float)", 2.0, 1.0), ("p ** t", 2.0, 1.0),
    ("p ** ~t", 2.0, 1.0), ("q / t", 2.0, 1.0), ("p * ((d > t)).astype(float)", 2.0, 1.0), ("np.power(p, -q)", 2.0, 3.0), ("np.sqrt(p ** q)", 10.0, 24.0),
    ("np.minimum(d, 1 / (p - q))", 2.0, 2.0), ("np.tanh(p ** q)", 10.5, 400.5), ("np.where(d > 5, (p - q) ** 0.5, 1)", 1.0, 2.0)])
@pytest.mark.parametrize("number", [np.array, float])
def test_the_file_agrees_where_python_and_numpy_do_not(expression, p, q, number):
    source = f"def r(d, p={p}, q={q}):\n    t = d > 0.2\n    return {{'term': {expression}}}  # as it was"
    reward, namespace = Reward(source, ["d"]), {}
    text = reward.python({"p": p, "q": q})
    for d in ([0.0, 0.3, 2.0] if number is float else [[0.0, 0.3, 2.0]]):
        with np.errstate(all="ignore"):
            exec(text, namespace)
            value = namespace["r"](number(d))["term"]
        np.testing.assert_array_equal(np.broadcast_to(value, np.shape(d)), reward.terms({"d": d})["term"])
    # What a run leaves is a reward that the next one can begin with, and it says what was written.
    again = Reward(text[text.rindex("def r("):], ["d"])
    np.testing.assert_array_equal(again.total({"d": 2.0}), reward.total({"d": 2.0}))
    assert again.params == reward.params and "# def r(" in text and "# as it was" in text


@pytest.mark.parametrize("seed", range(10))
def test_random_programs_have_the_values_of_the_same_arithmetic(seed, count=40):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        program = Program(rng)
        text, value = program.number(4)
        got = both(f"def r(distance, force, w=1.7):\n{''.join(program.lines)}    x = {text}\n    return {{'term': x}}", distance=np.array([0.3]),
                   force=np.array([program.values["force"]]))
        assert got[0] == value, text


def test_arithmetic_warns_of_nothing(recwarn):
    reward = Reward("def r(force, w=1.0):\n    return {'a': np.log(force) / force, 'b': np.exp(1000 * w) * force}", FEATURES)
    assert not np.isfinite(reward.total({"force": np.array([0.0, -1.0])})).any() and not recwarn.list


def test_a_new_theta_keeps_the_level_of_rewards():
    rng = np.random.default_rng(0)
    old, new = rng.normal(5, 2, 1000), rng.normal(-300, 40, 1000)
    centre, scale = match_level(old, new, 4.0, 0.5)
    assert ((new - centre) / scale).mean() == pytest.approx(((old - 4) / 0.5).mean())
    assert ((new - centre) / scale).std() == pytest.approx((old / 0.5).std())
    holes = np.where(np.arange(1000) % 7 == 0, -np.inf, new)
    centre, scale = match_level(old, holes, 4.0, 0.5)
    assert ((new - centre) / scale)[np.isfinite(holes)].mean() == pytest.approx(((old - 4) / 0.5).mean())
    # As good as constant, before or after: only the mean can be kept. Nothing finite: nothing changes.
    flat = np.full(1000, 0.1 * 3) + 1e-15 * rng.standard_normal(1000)
    for before, after in ((old, flat), (flat, new)):
        centre, scale = match_level(before, after, 4.0, 0.5)
        assert scale == 0.5 and (after - centre).mean() == pytest.approx((before - 4).mean())
    assert match_level(old, np.full(1000, np.nan), 4.0, 0.5) == (4.0, 0.5)


def test_the_critic_gets_finite_bounded_rewards_of_which_random_behaviour_earns_nothing(capsys):
    reward = Reward("def r(x, y, w=1.0):\n    return {'steep': np.exp(x / w), 'root': np.sqrt(y), 'fine': x}", ["x", "y"])
    tried = np.array([[0.0, 4.0], [0.0, 0.0]])                        # rewards 3 and 1
    r_theta = RTheta(reward, tried)
    assert r_theta.centre == 2.0 and r_theta(tried).tolist() == [1.0, -1.0] and r_theta(tried[0]) == 1.0
    assert not capsys.readouterr().out
    for features, expected in (([1000.0, 0.0], BOUND), ([1.0, -1.0], 0.0)):
        assert r_theta(np.array(features)) == expected
    np.testing.assert_array_equal(r_theta(np.array([[0.0, 0.0], [1000.0, 0.0], [0.0, -1.0]])), [-1, BOUND, 0])
    said = capsys.readouterr().out                                    # once of each term
    assert said.count("term steep has become inf") == 1 and said.count("term root has become nan") == 1 and "fine" not in said
    assert reward.strange["steep"] == np.inf and np.isnan(reward.strange["root"])


def test_a_changed_theta_counts_and_keeps_the_level_that_the_last_episodes_had():
    reward = Reward("def r(x, w=1.0):\n    return {'a': w * x}", ["x"])
    r_theta = RTheta(reward, np.zeros((1, 1)))
    lived = [np.array([[1.0], [2.0]]), np.array([[5.0]])]
    before = r_theta(np.concatenate(lived))
    r_theta.change({"w": 10.0}, lived)
    np.testing.assert_allclose(r_theta(np.concatenate(lived)), before)
    assert r_theta.theta == {"w": 10.0} and reward.params == {"w": 1.0}
    again = RTheta(Reward(reward.source, ["x"]), np.ones((1, 1)))
    again.load_state_dict(r_theta.state_dict())
    assert (again.theta, again.centre, again.scale) == (r_theta.theta, r_theta.centre, r_theta.scale)


@pytest.mark.filterwarnings("error")
def test_sums_without_bound_and_of_opposite_infinities_warn_nobody():
    reward = Reward("def r(x, a=1.0):\n    return {'up': np.exp(a * x), 'down': -np.exp(a * x)}", ["x"])
    total = reward.total({"x": np.array([0.0, 1e6])})
    assert total[0] == 0 and np.isnan(total[1])


def test_more_parameters_than_allowed_are_counted():
    def source(count):
        return f"def r(x, {', '.join(f'w{i}=1.0' for i in range(count))}):\n    return {{'a': x * w0}}"
    assert len(Reward(source(12), ["x"]).params) == 12
    with pytest.raises(RewardError, match="^line 1: 13 parameters are more than the 12 allowed$"):
        Reward(source(13), ["x"])
