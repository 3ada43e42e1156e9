"""The reward language: what it computes, what it refuses, and that nothing else can run."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import example, run_alone
from numpy.testing import assert_allclose, assert_array_equal

import reward as module
from reward import BOUND, FUNCTIONS, Reward, RewardError, RTheta

REPLIES = Path(__file__).parent.parent / "experiments" / "replies"
pytestmark = pytest.mark.filterwarnings("error")
FEATURES = ["distance", "force", "height"]
SOURCE = '''
def reward(distance, force, reach_weight=1.0, reach_scale=0.1,
           contact_weight=2, contact_threshold=1.0):   # guesses ≤ 2
    """Reach, then touch."""
    near = np.exp(-distance / reach_scale)
    touching = (force > contact_threshold) & (distance < 0.1)
    return {"reach": reach_weight * near, "contact": contact_weight * touching,
            "effort": -0.5 * np.where(force > 2, force - 2, 0.0) ** 2}
'''
PARAMS = {"reach_weight": 1, "reach_scale": 0.1, "contact_weight": 2, "contact_threshold": 1}


def one(expression, signature="distance, force, w=1.0", before=""):
    """A source with one term."""
    return f"def reward({signature}):\n{before}    return {{'term': {expression}}}"


def by_hand(distance, force, theta):
    contact = theta["contact_weight"] * (force > theta["contact_threshold"] and distance < 0.1)
    reach = theta["reach_weight"] * np.exp(-distance / theta["reach_scale"])
    return reach + contact - 0.5 * max(force - 2, 0) ** 2


def from_file(text, name, features):
    """The terms that the function in a Python file gives for plain floats, step by step."""
    namespace = {}
    exec(text, namespace)
    steps = np.transpose(list(features.values())).tolist()
    with np.errstate(all="ignore"):
        terms = [namespace[name](**dict(zip(features, step, strict=True))) for step in steps]
    return {key: np.array([float(term[key]) for term in terms]) for key in terms[0]}


def value(expression, before="", **features):
    """The term of `one`, after a check that the file of the reward agrees and can be read back."""
    features = {name: np.array(column, float) for name, column in features.items()}
    reward = Reward(one(expression, f"{', '.join(features)}, w=1.0", before), FEATURES)
    term, text = reward.terms(features)["term"], reward.python({})
    assert_allclose(from_file(text, "reward", features)["term"], term, rtol=1e-12)
    again = Reward(text, FEATURES)
    assert_array_equal(again.terms(features)["term"], term)
    assert again.python({}) == text
    return term


def test_docstring_example(tmp_path):
    assert run_alone(module, example(module), tmp_path) == "[2. 2. 2.]\n"


def test_steps_buffers_and_chains_score_alike():
    reward = Reward(SOURCE, FEATURES)
    assert reward.params == PARAMS and reward._function.__builtins__ == {}
    rng = np.random.default_rng(0)
    features = {"distance": rng.uniform(0, 0.3, 50), "force": rng.uniform(0, 4, 50)}
    thetas = [PARAMS, {**PARAMS, "contact_threshold": 0.1, "reach_weight": 5.0}]
    steps = list(zip(*features.values(), strict=True))
    expected = [[by_hand(d, f, theta) for d, f in steps] for theta in thetas]
    chains = {name: np.array([[theta[name]] for theta in thetas]) for name in PARAMS}
    assert_allclose(reward.total(features, chains), expected, rtol=1e-12)
    assert_allclose(reward.total(features), expected[0], rtol=1e-12)
    step = reward.total({"distance": steps[7][0], "force": steps[7][1]}, thetas[1])
    assert step == pytest.approx(expected[1][7]) and np.shape(step) == ()
    assert list(reward.terms(features)) == ["reach", "contact", "effort"]


def test_terms_have_the_full_shape_and_totals_are_new():
    reward = Reward('def r(distance, w=2):\n    return {"alive": w, "one": 1}', FEATURES)
    theta, distance = {"w": np.array([[1.0], [3.0]])}, np.zeros(7)
    terms = reward.terms({"distance": distance}, theta)
    assert terms["alive"].shape == terms["one"].shape == (2, 7)
    total = Reward(one("distance", "distance, w=1"), FEATURES).total({"distance": distance})
    total += 1
    assert not distance.any()


@pytest.mark.parametrize("K", [1, 40])
def test_returns_add_up_the_steps(K):
    rng = np.random.default_rng(0)
    reward = Reward("def r(a, b, w=2.0):\n    return {'a': w * a, 'b': -b}", ["b", "a"])
    taus = [rng.uniform(0, 0.5, (length, 2)) for length in rng.integers(1, 60, K)]
    R = reward.returns(taus)
    expected = [[w * tau[:, 1].sum() - tau[:, 0].sum() for tau in taus] for w in (2.0, 3.0, 0.0)]
    assert_allclose([R(), R({"w": 3.0}), R({"w": 0.0})], expected)
    assert_allclose(R({"w": np.array([[3.0], [0.0]])}), expected[1:])
    with pytest.raises(ValueError):
        reward.named(np.zeros((2, 3)))


def test_functions_are_numpys():
    x = np.array([[0.2, 0.7, 1.3]])
    for name, arity in FUNCTIONS.items():
        source = one(f"0 + np.{name}({', '.join(['distance'] * arity)})", "distance, w=1.0")
        result = Reward(source, FEATURES).total({"distance": x})
        assert_array_equal(result, getattr(np, name)(*[x] * arity))


def test_new_defaults_keep_comments_and_layout():
    reward = Reward(SOURCE, FEATURES)
    theta = {**PARAMS, "reach_weight": 1 / 3, "contact_threshold": np.float64(0.127)}
    source, file = reward.source_with(theta), reward.python(theta)
    assert "reach_weight=0.3333333333333333," in source and "old=0.127):   # guesses ≤ 2" in source
    assert re.sub("=[0-9.]+", "=", source) == re.sub("=[0-9.]+", "=", SOURCE)
    assert "import numpy as np\n" in file and "# guesses ≤ 2" in file and '"""Reach, then' in file
    for text in (source, file):
        again = Reward(text, FEATURES)
        assert again.params == theta and again.python(theta) == file


def test_numpys_meaning():
    before = "    half = -0.5\n    root: float = half ** 0.5\n    none = 1 / (half + 0.5)\n"
    for expression, expected in {
        "(force > 1) + -(distance > 0)": [-1, 0, 0],
        "(force > 1) ** -1 + w": [np.inf, np.inf, 2],
        "np.where(force > 1, 2, 1) ** -1": [1, 1, 0.5],
        "np.where(force > 1, force > 2, distance > 1) + (force > 1)": [0, 0, 2],
        "np.exp(force > 1)": [1, 1, np.exp(1.0)],
        "~(2 > 1) + (2 > 1) * 5 + force * 0": [5, 5, 5],
        "~np.logical_and(force, distance > 0) + np.logical_not(force > 0)": [0, 2, 0],
        "(-8) ** 0.5 + 1 / 0 + force": [np.nan] * 3,
        "-9 ** 9 ** 9 / (w - 1)": [-np.inf] * 3,
        "np.pi * force + 0 * np.e": [np.pi / 2, -np.pi, 3 * np.pi],
        "0x10 + 1_0 + .5e1 + 0 * force": [31, 31, 31],
        "1 / distance ** 0.5": [1, np.inf, 1],
        "root * w": [np.nan] * 3,
        "none + force": [np.inf] * 3,
    }.items():
        got = value(expression, before, distance=[1, 0, 1], force=[0.5, -1, 3])
        assert_array_equal(got, expected, expression)


def table(text):
    cases = " | ".join(text.strip().split("\n")).split(" | ")
    return [case.replace("; ", "\n") for case in cases]


EXPRESSIONS = r"""
__import__('os').system('touch pwned') | open('pwned', 'w') | print(w) | getattr(w, 'shape')
w.__class__.__mro__ | ().__class__ | force.tofile('pwned') | w.real | np.save('pwned', w) | np.os
np.exp.__globals__ | np.__dict__ | np.exp.outer(w, w) | '{0.__class__}'.format(w) | f'{w.__class__}'
'a' * 10**9 | b'a' | 'a' | -'a' | 1j | 1 << 10 ** 9 | w % 2 | w // 2 | w ^ w | w @ w | True | None
... | 1e999 | [w] | (w, w) | {1, 2} | {'a': w} | [0 for _ in w] | (x for x in w) | w[0] | lambda: 1
(lambda f: f(f))(lambda f: f(f)) | (y := w) | *w | (yield 1) | (yield from w) | await w
np.exp(*w) | np.exp(x=w) | np.exp(w, out=w) | np.exp(w, w) | np.where(w > 1)
np.where(w > 1, w, **{}) | np.clip(w, 0) | np.exp() | np.tile(w, 10**9) | np.zeros(10**12)
reward(w) | w is w | w in (1, 2) | 0 < w < 1 | w and w | not w | w if w > 1 else 0 | ~w
w & (w > 0) | (w > 0)|w | w > 1 & w > 1 | np | np.exp | np.inf | np.e() | reward | abs | height
"""
STATEMENTS = """
import os | import numpy as np | global x | while w: pass | for x in w: pass | pass | w | del w
with w: x = 1 | w[0] = 1 | w.x = 1 | x += 1 | np = w | a, b = w, w | x = y = w | def f(): pass
class A: pass | x: float | if w: x = 1 | return {'a': w} | __debug__ = w | x: (yield) = 1
"""
SIGNATURES = """
force, w=print(1) | force, w='1' | force, w=-1.0 | force, w=0 | force, w=1e999 | force, w=True
force, w=1, height=1 | force | w=1 | force, w=1, *a | force, w=1, **k | force, /, height, w=1
force, w=1, *, v=1 | x, w=1 | force=1, w=1 | force, w=1, np=1 | force, w=1, w=2 | force, force, w=1
"""
MODULES = """
import os; {} | from os import *; {} | import numpy as np, os; {} | {}; w | {}; import os | {}; {}
@print; {} | x = 1; {} | async {} | class A: pass | def r( | lambda: 1 | with w:;  pass; {} | \0
"""
RETURNS = "w | {{}} | {{force: w}} | {{1: w}} | {{**w}} | {{'a': w, 'a': w}} | {{'a': w, **w}}"
SIZES = ["-" * 7500 + "w", "(" * 5000, "+".join("w" * 2000), "9" * 5000]
HOSTILE = [one(case) for case in table(EXPRESSIONS) + SIZES]
HOSTILE += [one("w", before=f"    {case}\n") for case in table(STATEMENTS)]
HOSTILE += [one("w", case) for case in [*table(SIGNATURES), "", "force, w=1" + "0" * 400]]
HOSTILE += [case.replace("{}", one("w")) for case in table(MODULES)]
HOSTILE += [one("w").replace("{'term': w}", case.format()) for case in RETURNS.split(" | ")]
HOSTILE += [one("w").replace("return", "x ="), one("w").replace("reward", "np")]
HOSTILE += ["", "\ud800", one("w") + "#" * 8000]
HOSTILE += [one("w0", ", ".join(["force", *(f"w{i}=1" for i in range(13))]))]


def test_hostile_sources(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for source in HOSTILE:
        with pytest.raises(RewardError) as error:
            pytest.fail(f"accepted: {Reward(source, FEATURES).source}")
        assert 5 < len(str(error.value)) < 900, source
    assert not os.listdir(tmp_path) and capfd.readouterr() == ("", "")


def test_messages():
    for source, message in {
        one("w if force > 1 else 0"): r"line 2.*\(a\) & \(b\) for and.*np.where\(.* for if",
        one("np.foo(w)", before="    x = w\n"): "line 3: np.foo.*np.abs, np.arctan",
        one("forse"): "line 2: forse is not known",
        one("x", "speed, w=1"): "line 1.*distance, force, height",
        one("w", "force, w=-1"): "line 1.*not a plain finite number: -1",
        "import os\n" + one("w"): "below 'import numpy as np'",
    }.items():
        with pytest.raises(RewardError, match=message):
            Reward(source, FEATURES)


@pytest.mark.parametrize(
    "change", ["\ufeff{}", "{}\n\n", "\n\n{}", "# mine\nimport numpy as np\n{}"]
)
def test_marks_spaces_annotations(change):
    source = "def r(x: print(1), w: float = 1.0) -> quit():\n    y: print(2) = x\xa0*\u202fw\n"
    source = change.format(source + "    return {'a': y}").replace("\n", "\r\n")
    reward = Reward(source, ["x"])
    assert reward.total({"x": 3.0}) == 3 and reward.source.isascii()
    assert from_file(reward.python({}), "r", {"x": np.ones(2)})["a"].tolist() == [1, 1]


@pytest.mark.parametrize("path", sorted(REPLIES.glob("propose-*.md")), ids=lambda path: path.stem)
def test_real_proposals(path):
    source = re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)[-1]
    names = re.findall(r"\w+", source[source.index("(") : source.index("=")])[:-1]
    columns = np.random.default_rng(0).uniform(0, 1, (len(names), 20))
    reward, features = Reward(source, names), dict(zip(names, columns, strict=True))
    exec(source, namespace := {"np": np})
    file = from_file(reward.python({}), reward.name, features)
    for name, term in namespace[reward.name](**features).items():
        assert_array_equal(reward.terms(features)[name], term)
        assert_allclose(file[name], term, rtol=1e-12)


def test_check_names_what_is_not_finite():
    terms = "{'fine': w * force, 'bad': np.log(distance), 'worse': w / distance}"
    reward = Reward(f"def r(distance, force, w=1.0):\n    return {terms}", FEATURES)
    reward.check({"distance": np.ones(3), "force": np.ones(3)})
    with pytest.raises(RewardError, match="features: bad, worse$"):
        reward.check({"distance": np.array([1.0, 0.0]), "force": np.ones(2)})
    reward = Reward("def r(force, w=1):\n    return {'a': 1e308 * force, 'b': 1e308 * w}", FEATURES)
    with pytest.raises(RewardError, match="sum"):
        reward.check({"force": np.ones(3)})


def test_the_critic_gets_finite_bounded_rewards():
    terms = "{'steep': np.exp(x / w), 'root': np.sqrt(y), 'fine': x, 'flat': w}"
    reward = Reward(f"def r(x, y, w=1.0):\n    return {terms}", ["x", "y"])
    tried, theta = np.array([[0.0, 4.0], [0.0, 0.0], [0.0, -1.0]]), {"w": 2.0}
    r_theta = RTheta(reward, theta, tried)
    assert (r_theta.reward, r_theta.theta, r_theta.centre) == (reward, theta, 4.0)
    assert RTheta(reward, theta).centre == RTheta(reward, theta, tried[2:]).centre == 0
    assert r_theta(tried[:2]).tolist() == [1.0, -1.0]
    rows = np.array([[0.0, 0.0], [3000.0, 0.0], [0.0, -1.0], [2.0, 0.0], [-1e6, 0.0]])
    with pytest.warns(UserWarning) as caught:
        values = [r_theta(rows), r_theta(rows)]
    assert_allclose(values, [[-1, BOUND, 0, np.e, -BOUND]] * 2)
    said = sorted(str(warning.message).split(",")[0] for warning in caught)
    assert said == ["term fine is -1e+06", "term root is nan", "term steep is inf"]


def test_a_file_may_have_a_docstring_with_an_example():
    text = '"""Mine.\n\n```python\ndef other(x, w=1.0):\n    return {"b": w * x}\n```\n"""\n'
    text += "import numpy as np\n\ndef mine(d, w=2.0):\n    return {'a': -w * d}\n"
    reward = Reward(text, ["d"])
    assert reward.name == "mine" and Reward(reward.python({"w": 3.0}), ["d"]).params == {"w": 3.0}
    for heading in ('x = "a"', '"a".join(d)', '"a" + open("x")'):
        with pytest.raises(RewardError, match="one function"):
            Reward(heading + "\n" + text, ["d"])
