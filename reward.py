'''r_θ: reward functions that an LLM writes, restricted to arithmetic and run as vectorised numpy.

    import numpy as np
    from reward import Reward

    reward = Reward("""
    def reward(distance, force, reach_weight=1.0, force_threshold=1.0):
        contact = np.where(force > force_threshold, 1.0, 0.0)
        return {"reach": reach_weight * np.exp(-distance / 0.1), "contact": contact}
    """, features=["distance", "force"])
    print(reward.total({"distance": np.zeros(3), "force": np.ones(3)}, {"force_threshold": 0.1}))

Only what `_Checked` lists ever runs. It sees no builtins, and in `np` FUNCTIONS, e and pi alone.
'''

from __future__ import annotations  # `compile` inherits it: a reward's annotations never run

import ast
import warnings
from types import SimpleNamespace

import numpy as np

# Each with its number of arguments. All work element by element, so no array can grow.
ONE = "abs arctan ceil cos exp expm1 float64 floor log log10 log1p log2 logical_not sign sin sqrt"
TWO = "arctan2 hypot logical_and logical_or maximum minimum power"
FUNCTIONS = dict.fromkeys(f"{ONE} square tan tanh".split(), 1)
FUNCTIONS |= dict.fromkeys(TWO.split(), 2) | {"clip": 3, "where": 3}
OPERATORS = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow
OPERATORS |= ast.Lt | ast.LtE | ast.Gt | ast.GtE | ast.Eq | ast.NotEq
LANGUAGE = "there are + - * / **, comparisons of two, (a) & (b) for and, (a) | (b) for or, ~(a), "
LANGUAGE += "np.where(condition, a, b) for if, " + ", ".join(f"np.{name}" for name in FUNCTIONS)
HEADER = "from __future__ import annotations\n\nimport numpy as np\n\n\n"
MAX_CHARS, MAX_PARAMS, BOUND = 8000, 12, 1e4  # the critic learns in single precision
PYTHON, NUMPY, CONDITION = "PYTHON", "NUMPY", "CONDITION"
WRAP = None  # an edit that puts np.float64(...) around an expression; other edits are texts


class RewardError(ValueError):
    """A reward is outside the language or not finite. The message says where and why."""


def _is_heading(node):
    """Whether it is a docstring or an import of numpy."""
    match node:
        case ast.Expr(ast.Constant(str())):
            return True
    return ast.unparse(node) in HEADER.splitlines()


class _Checked:
    """A function within the language, and the edits that give its text numpy's meaning.

    Python raises an error for 1 / 0, where numpy gives infinity. So where both operands are
    Python's numbers, the first is wrapped in np.float64(...). A condition used as a number is
    wrapped too, because numpy's sum of two conditions means "or".
    """

    def __init__(self, source, inputs):
        if len(source) > MAX_CHARS:
            raise RewardError(f"{len(source)} characters are more than the {MAX_CHARS} allowed")
        try:
            module = ast.parse(source)
            body = [node for node in module.body if not _is_heading(node)]
            self.edits = [(node, "") for node in module.body if node not in body]
            match body:
                case [ast.FunctionDef(name, decorator_list=[]) as tree] if name != "np":
                    self._function(tree, tree.args, inputs)
                case _:
                    raise RewardError("write one function below 'import numpy as np', and no more")
            self.code = compile(ast.Module(body, []), "<reward>", "exec")
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise RewardError(f"not readable: {type(error).__name__}: {error}") from None

    def _function(self, tree, args, inputs):
        self.name, names = tree.name, [argument.arg for argument in args.args]
        self.kinds = dict.fromkeys(names, PYTHON)
        self.features = names[: len(names) - len(args.defaults)]
        self.defaults = dict(zip(names[len(self.features) :], args.defaults, strict=False))
        others = args.vararg or args.kwarg or args.posonlyargs or args.kwonlyargs or "np" in names
        if others or not self.features or {*names} & {*inputs} != {*self.features}:
            words = f"arguments without default must be among {', '.join(inputs)}; no * or /"
            self._refuse(tree, words)
        self.params = {name: self._float(node) for name, node in self.defaults.items()}
        if not 1 <= len(self.params) <= MAX_PARAMS or min(self.params.values()) <= 0:
            self._refuse(tree, f"1 to {MAX_PARAMS} parameters need positive numbers as default")
        for statement in tree.body:
            match statement:
                case ast.Assign([ast.Name(name)]) | ast.AnnAssign(ast.Name(name)) if name != "np":
                    self.kinds[name] = self._kind(statement.value or statement)
                case ast.Return(ast.Dict([_, *_] as keys, values)) if statement is tree.body[-1]:
                    names = {getattr(key, "value", None) for key in keys}
                    if len(names) < len(keys) or not all(isinstance(name, str) for name in names):
                        self._refuse(statement, "each term needs a name of its own, in quotes")
                    self._numbers(values)
                    return
                case ast.Expr(ast.Constant(str())):
                    continue  # a docstring
                case _:
                    break
        self._refuse(statement, 'write lines "name = ..." and, last, return {"a_term": ..., ...}')

    def _refuse(self, node, reason):
        raise RewardError(f"line {node.lineno}: {reason}")

    def _float(self, node):
        value = getattr(node, "value", None)
        if type(value) not in (int, float) or abs(value) > 1.7e308:
            self._refuse(node, f"not a plain finite number: {ast.unparse(node):.40}")
        return float(value)

    def _kind(self, node):
        """Whether an expression gives a CONDITION, a number of NUMPY's or one of PYTHON's own."""
        operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        match node:
            case ast.Name(name) if name in self.kinds:
                return self.kinds[name]
            case ast.Attribute(ast.Name("np"), "e" | "pi"):
                return PYTHON
            case ast.Constant():
                self.edits.append((node, repr(self._float(node))))
                return PYTHON
            case ast.UnaryOp(ast.UAdd() | ast.USub()):
                return self._numbers(operands)
            case ast.BinOp(_, op) | ast.Compare(_, [op]) if isinstance(op, OPERATORS):
                if self._numbers(operands) == PYTHON:
                    self.edits.append((operands[0], WRAP))
                return CONDITION if isinstance(node, ast.Compare) else NUMPY
            case ast.UnaryOp(ast.Invert()) | ast.BinOp(_, ast.BitAnd() | ast.BitOr()):
                if {self._kind(operand) for operand in operands} != {CONDITION}:
                    self._refuse(node, "& | ~ need conditions, as in (a > 1) & ~(b > 1)")
                return CONDITION
            case ast.Call(ast.Attribute(ast.Name("np"), name), args, []):
                if FUNCTIONS.get(name) == len(args):
                    self._numbers(args, free=args[0] if name in ("float64", "where") else None)
                    return CONDITION if name.startswith("logical_") else NUMPY
        self._refuse(node, f"{ast.unparse(node):.40} is not known; {LANGUAGE}")

    def _numbers(self, nodes, free=None):
        kinds = {node: self._kind(node) for node in nodes}
        self.edits += [(n, WRAP) for n in nodes if kinds[n] == CONDITION and n is not free]
        return PYTHON if {*kinds.values()} == {PYTHON} else NUMPY


class Reward:
    """A compiled reward. inputs: names that it may read. Raises RewardError.

    Attributes: features, the inputs that it reads; params, θ as the LLM wrote it.
    """

    def __init__(self, source: str, features: list[str]):
        plain = "".join(c if c.isprintable() or c in "\n\t" else " " for c in source)
        self.source, self.inputs = plain.lstrip(" "), list(features)  # a byte-order mark is gone
        self._checked = checked = _Checked(self.source, self.inputs)
        self.name, self.features, self.params = checked.name, checked.features, checked.params
        available = {name: getattr(np, name) for name in [*FUNCTIONS, "e", "pi"]}
        namespace = {"np": SimpleNamespace(**available), "__builtins__": {}}
        exec(_Checked(self.python({}), self.inputs).code, namespace)  # noqa: S102
        self._function = namespace[self.name]

    @np.errstate(all="ignore")
    def terms(self, features: dict, params: dict | None = None) -> dict[str, np.ndarray]:
        """The terms by name: (N,) for features (N,), (C, N) if params have the shape (C, 1)."""
        given = {name: features[name] for name in self.features} | self.params | (params or {})
        arrays = {name: np.asarray(value, float) for name, value in given.items()}
        shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
        return {name: np.broadcast_to(t, shape) for name, t in self._function(**arrays).items()}

    @np.errstate(all="ignore")
    def total(self, features: dict, params: dict | None = None) -> np.ndarray:
        """r_θ(f): the sum of the terms, in their shape."""
        return sum(self.terms(features, params).values())

    def check(self, features: dict) -> None:
        """Raises RewardError naming the terms that are not finite on `features`."""
        bad = [name for name, term in self.terms(features).items() if not np.isfinite(term).all()]
        if bad or not np.isfinite(self.total(features)).all():
            raise RewardError(f"not finite on real features: {', '.join(bad) or 'the sum'}")

    def returns(self, taus: list[np.ndarray]):
        """The function R: θ ↦ Σ_t r_θ(f_t) of K trajectories (T, F), to (K,) or (C, K)."""
        if len(taus) > 16:  # small arrays stay in the cache
            parts = [self.returns(taus[i : i + 16]) for i in range(0, len(taus), 16)]
            return lambda params=None: np.concatenate([R(params) for R in parts], axis=-1)
        features, starts = self.named(np.concatenate(taus)), np.cumsum([0, *map(len, taus[:-1])])
        return lambda params=None: np.add.reduceat(self.total(features, params), starts, axis=-1)

    def named(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Features (N, F) as {name: (N,)}."""
        return dict(zip(self.inputs, np.ascontiguousarray(features.T), strict=True))

    def source_with(self, params: dict[str, float], edits=()) -> str:
        """The source with `params` as defaults."""
        text, values, pieces = self.source.encode(), self.params | params, []
        starts = np.cumsum([0, *map(len, text.splitlines(keepends=True))])
        defaults = [(node, repr(float(values[p]))) for p, node in self._checked.defaults.items()]
        for node, new in [*defaults, *edits]:
            i = starts[node.lineno - 1] + node.col_offset
            j = starts[node.end_lineno - 1] + node.end_col_offset
            pieces += [(i, i, "np.float64("), (j, j, ")")] if new is WRAP else [(i, j, new)]
        for i, j, new in sorted(pieces, reverse=True):
            text = text[:i] + new.encode() + text[j:]
        return text.decode()

    def python(self, params: dict[str, float]) -> str:
        """A file of the same function with `params` as defaults, which takes arrays or floats."""
        return HEADER + self.source_with(params, self._checked.edits).lstrip()


class RTheta:
    """r_θ(f) as the critic sees it: the total less `centre`, within ±BOUND, and 0 for NaN.

    The critic starts at 0. If all rewards were positive, tried actions would look better than
    untried ones. So the mean of random behaviour, `random_features` (N, F), is subtracted. Give
    none if episodes terminate, because then a constant changes which policy is best.
    """

    def __init__(self, reward: Reward, theta: dict, random_features: np.ndarray | None = None):
        self.reward, self.theta, self.centre, self._warned = reward, dict(theta), 0.0, set()
        if random_features is not None:
            total = reward.total(reward.named(random_features), theta)
            self.centre = float(np.ma.filled(np.ma.masked_invalid(total).mean(), 0.0))

    @np.errstate(all="ignore")
    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Rewards (N,) of features (N, F). Warns once of each term that leaves the bounds."""
        terms = self.reward.terms(self.reward.named(features), self.theta)
        for name, term in terms.items():
            outside = term[~(np.abs(term) <= BOUND)]
            if outside.size and name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"term {name} is {outside[0]:.4g}, outside ±{BOUND:g}", stacklevel=2)
        total = sum(terms.values()) - self.centre
        return np.clip(np.nan_to_num(total, nan=0.0), -BOUND, BOUND)
