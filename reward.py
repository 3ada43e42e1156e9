"""R_θ: reward functions that an LLM wrote, compiled from a restricted language into vectorised numpy.

    reward = Reward('''
    def reward(distance, force, reach_weight=1.0, force_threshold=1.0):
        near = np.exp(-distance / 0.1)
        return {"reach": reach_weight * near, "contact": np.where(force > force_threshold, 1.0, 0.0)}
    ''', features=["distance", "force"])
    reward.params                                     # {"reach_weight": 1.0, "force_threshold": 1.0}, the initial θ
    reward.terms({"distance": d, "force": f})         # {"reach": array, "contact": array}
    reward.total({"distance": d, "force": f}, {"force_threshold": 0.1})

The function's arguments without default are features, those with a default are θ with its initial values, and
it returns a dict of named terms, whose sum is the reward. The language is what elementwise arithmetic needs and
no more. Safety comes from construction: source is parsed, never executed as it stands; every node of its tree
must be on a whitelist; and what is compiled sees no builtins, only the functions below, as attributes of an `np` that
holds nothing else.
"""

import ast
import copy
import difflib
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import numpy as np

# Name and number of arguments. All are elementwise: an array keeps its shape, so memory and time are bounded by the
# source's length, and the same code scores one step, a whole buffer or many chains of parameters.
FUNCTIONS = {name: arity for arity, names in (
    (1, "abs arctan ceil cos exp expm1 floor log log10 log1p log2 logical_not sign sin sqrt square tan tanh"),
    (2, "hypot logical_and logical_or maximum minimum power"), (3, "clip where")) for name in names.split()}
NUMBERS = ("e", "pi")                       # np.NAME that are no functions
JOINS = (ast.BitAnd, ast.BitOr)             # of truth values
ANNOTATION = (ast.Name, ast.Attribute, ast.Subscript, ast.Tuple, ast.BinOp, ast.BitOr, ast.Constant, ast.Load)

NODES = (ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Expr, ast.Dict, ast.Name,
         ast.AnnAssign, ast.Load, ast.Store, ast.Constant, ast.Call, ast.BinOp, ast.UnaryOp, ast.Compare,
         ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.BitAnd, ast.BitOr, ast.Invert, ast.UAdd, ast.USub,
         ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
HINTS = {
    ast.Import: "imports are not allowed; the listed functions are there already",
    ast.ImportFrom: "imports are not allowed; the listed functions are there already",
    ast.IfExp: "write np.where(condition, a, b) instead of 'a if condition else b'",
    ast.If: "write np.where(condition, a, b) instead of an if statement",
    ast.BoolOp: "write (a) & (b) or (a) | (b) instead of and/or",
    ast.Not: "write ~(a) instead of not",
    ast.AugAssign: "assign to a new name instead of using += and the like",
    ast.Subscript: "features and parameters are arguments, used by their bare names",
    ast.Attribute: "the only attributes are np.NAME with NAME from the list of functions",
    ast.For: "no loops: the features are arrays already",
    ast.While: "no loops: the features are arrays already",
}
THERE_ARE = "there are " + ", ".join(f"np.{name}" for name in FUNCTIONS)
MAX_CHARS, MAX_NODES, MAX_PARAMS = 8000, 700, 12
BOUND = 1e4                                 # of what the critic gets from RTheta: it learns in single precision


def printable(text: str) -> str:
    """The text without what steers a terminal or hides what is written: such characters become ?, line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text.replace("\r\n", "\n"))


class RewardError(ValueError):
    """A reward source that is not in the language or cannot be used; the message says where and why."""


def _fail(node, reason):
    raise RewardError(f"line {node.lineno}: {reason}" if hasattr(node, "lineno") else reason)


class Reward:
    """A compiled reward.

    features: the names that it may read, kept as `offered`, in the order of the columns of trajectories.
    `source` and `name` as written; `features`, the names it reads; `params`, names to initial values, all positive;
    `term_names`.

    Raises RewardError for source outside the language.
    """

    def __init__(self, source: str, features: Iterable[str]):
        self.source, self.offered = printable(source), list(features)
        function = _parse(self.source)
        _check_nodes(function)
        self.name = function.name
        self.features, self.params = _signature(function, self.offered)
        self.term_names = _body(function, {*self.features, *self.params})
        self.strange = {}               # terms that have not stayed finite or in bounds: name to value, see RTheta
        self._compiled = _Numbers(_truths(function)).visit(function)
        tree = ast.Module([self._compiled], type_ignores=[])
        available = {name: getattr(np, name) for name in (*FUNCTIONS, *NUMBERS, "float64")}
        namespace = {"np": SimpleNamespace(**available), "__builtins__": {}}
        try:
            exec(compile(ast.fix_missing_locations(tree), "<reward>", "exec"), namespace)
        except (SyntaxError, ValueError, RecursionError) as error:     # what only a compiler sees: a repeated argument
            raise RewardError(f"the source cannot be compiled: {error}") from None
        self._function = namespace[self.name]

    def terms(self, features: dict[str, np.ndarray], params: dict | None = None) -> dict[str, np.ndarray]:
        """Named terms as float arrays of the common shape of `features` and `params`.

        features: dict of arrays (...,), at least those in `self.features`. params: dict that overrides initial
        values; values of shape (C, 1) against features of shape (N,) give terms of shape (C, N).
        Raises RewardError when the arithmetic itself fails, never for results that are not finite.
        """
        arguments = {name: np.asarray(features[name], dtype=float) for name in self.features}
        for name, value in {**self.params, **(params or {})}.items():
            arguments[name] = np.asarray(value, dtype=float)
        shape = np.broadcast_shapes(*(a.shape for a in arguments.values()))
        try:
            with np.errstate(all="ignore"):
                values = self._function(**arguments)
                return {name: np.broadcast_to(np.asarray(value, dtype=float), shape) for name, value in values.items()}
        except (ArithmeticError, TypeError, ValueError) as error:
            raise RewardError(f"the reward cannot be computed: {type(error).__name__}: {error}") from None

    def total(self, features: dict[str, np.ndarray], params: dict | None = None) -> np.ndarray:
        """r_θ(f): the sum of the terms, same shapes as `terms`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return sum(self.terms(features, params).values())

    def check(self, features: dict[str, np.ndarray]) -> None:
        """Raises RewardError naming every term that is not finite on `features` (dict of (N,) arrays), as is their sum."""
        terms = self.terms(features)
        bad = [name for name, value in terms.items() if not np.isfinite(value).all()]
        if bad:
            raise RewardError(f"not finite (NaN or infinity) on real features: term {', '.join(bad)}")
        with np.errstate(over="ignore"):
            if not np.isfinite(sum(terms.values())).all():
                raise RewardError("the terms are finite, but not their sum: make them smaller")

    def returns(self, trajectories: list[np.ndarray]) -> Callable:
        """R: θ ↦ (R_θ(τ_1), …, R_θ(τ_K)) with R_θ(τ) = Σ_t r_θ(f_t), for K trajectories.

        trajectories: (T, F) arrays of the features offered to this reward, in their order; T may differ. What is returned
        maps params as in `terms` to shape (K,), and values of shape (C, 1) to (C, K).
        """
        features = self.named(np.concatenate(trajectories))
        starts = np.cumsum([0] + [len(trajectory) for trajectory in trajectories[:-1]])
        return lambda params=None: np.add.reduceat(self.total(features, params), starts, axis=-1)

    def named(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Features (N, F) as {name: (N,) array}."""
        return dict(zip(self.offered, np.ascontiguousarray(features.T)))

    def source_with(self, params: dict[str, float]) -> str:
        """The source with the defaults replaced by `params`; comments and layout are kept."""
        lines = self.source.encode().splitlines(keepends=True)   # ast counts columns in bytes
        defaults = {arg.arg: node for arg, node in _defaults(_parse(self.source).args)}
        # From the end backwards, so that a replacement does not move the ones still to come.
        for name, node in sorted(defaults.items(), key=lambda item: (item[1].lineno, item[1].col_offset), reverse=True):
            line = lines[node.lineno - 1]
            value = f"{params.get(name, self.params[name]):.6g}".encode()
            lines[node.lineno - 1] = line[:node.col_offset] + value + line[node.end_col_offset:]
        return b"".join(lines).decode()

    def python(self, params: dict[str, float]) -> str:
        """A Python file with the reward as it is compiled and `params` as its defaults: the same values with numpy alone.

        What the LLM wrote stands above it as a comment. Python's own numbers would differ from numpy's where a division by
        zero or a power of a negative number comes up, so all arguments become numpy's first.
        """
        function = copy.deepcopy(self._compiled)
        for arg, default in _defaults(function.args):
            default.value = float(f"{params.get(arg.arg, self.params[arg.arg]):.6g}")
        first = 1 if ast.get_docstring(function) is not None else 0
        function.body[first:first] = ast.parse("\n".join(f"{name} = np.float64({name})" for name in (*self.features, *self.params))).body
        written = "\n".join(f"# {line}".rstrip() for line in self.source.strip().split("\n"))
        return f"# As it was written:\n#\n{written}\n\nimport numpy as np\n\n\n{ast.unparse(ast.fix_missing_locations(function))}\n"


class RTheta:
    """r_θ(f_t) as the critic sees it: (Σ terms − centre) / scale, within ±BOUND, and 0 where that is no number.

    The critic starts at 0: were all rewards above that, whatever is tried first would look better than what is not, and the
    actor would saturate there for good. So the random behaviour in `features`, (N, F), earns 0 on average to begin with. As
    long as nothing terminates, a constant and a factor change nothing about which policy is best.
    """

    def __init__(self, reward: Reward, features: np.ndarray):
        self.reward, self.theta, self.scale = reward, dict(reward.params), 1.0
        self.centre = reward.total(reward.named(features)).mean()

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Of one step, (F,), or of many, (N, F)."""
        named = dict(zip(self.reward.offered, features.T))
        value = (self.reward.total(named, self.theta) - self.centre) / self.scale
        if not np.all(np.abs(value) <= BOUND):
            self._name_strange_terms(named)
        return np.clip(np.nan_to_num(value, nan=0.0, posinf=BOUND, neginf=-BOUND), -BOUND, BOUND)

    def _name_strange_terms(self, features):
        """Says once of each term that it leaves the bounds; a failure analysis is told so, too."""
        for name, term in self.reward.terms(features, self.theta).items():
            strange = np.atleast_1d(term)[~(np.abs(np.atleast_1d(term)) <= BOUND * self.scale)]
            if len(strange) and name not in self.reward.strange:
                self.reward.strange[name] = float(strange[0])
                print(f"\n  The reward's term {name} has become {strange[0]:.4g} in a step. The critic gets {BOUND:g} at most, and 0 for "
                      "what is no number; a failure analysis is told so.\n", flush=True)

    def state_dict(self) -> dict:
        return {"source": self.reward.source, "theta": self.theta, "centre": float(self.centre), "scale": self.scale,
                "strange": dict(self.reward.strange)}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave, code included. Raises RewardError where that cannot be compiled."""
        self.reward = Reward(state["source"], self.reward.offered)
        self.theta, self.centre, self.scale = state["theta"], state["centre"], state["scale"]
        self.reward.strange.update(state["strange"])

    def change(self, theta: dict[str, float], episodes: list[np.ndarray], source: str | None = None) -> None:
        """A new θ; centre and scale keep the mean and the spread that rewards had on `episodes`, the last ones lived.

        source: the code that θ belongs to, where that is another.
        """
        features = self.reward.named(np.concatenate(episodes))
        old = self.reward.total(features, self.theta)
        if source is not None and source != self.reward.source:
            self.reward = Reward(source, self.reward.offered)
        new = self.reward.total(features, theta)
        self.theta, (self.centre, self.scale) = theta, match_level(old, new, self.centre, self.scale)


def match_level(old, new, centre, scale):
    """The centre and scale that give r_θ's new values the mean and spread that the old had, all arrays (N,).

    Rankings fix how r_θ's terms compare, but no constant and hardly their common scale; the critic is used to one.
    Values that are not finite do not count; a spread that changes a thousandfold or more (a reward as good as constant
    before or after) leaves the scale as it is.
    """
    old, new = np.ma.masked_invalid(old), np.ma.masked_invalid(new)
    spreads = new.std(), old.std()
    if not 1e-3 * spreads[1] < spreads[0] < 1e3 * spreads[1]:
        spreads = 1.0, 1.0
    shifted = new.mean() - (old.mean() - centre) * spreads[0] / spreads[1]
    return (float(shifted), scale * float(spreads[0] / spreads[1])) if np.isfinite(shifted) else (centre, scale)


def _parse(source):
    """The one function in `source`, as a tree."""
    if len(source) > MAX_CHARS:
        raise RewardError(f"the source has {len(source)} characters, more than the {MAX_CHARS} allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(source)
    except SyntaxError as error:
        raise RewardError(f"line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise RewardError(f"the source cannot be parsed: {type(error).__name__}") from None
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    for node in module.body:
        if not isinstance(node, ast.FunctionDef):
            _fail(node, HINTS.get(type(node), "only one function definition is allowed, nothing beside it"))
    if len(functions) != 1:
        raise RewardError(f"expected exactly one function definition, found {len(functions)}")
    return functions[0]


def _check_nodes(function):
    """Every node is on the whitelist; there are not too many; nothing hangs on the function itself."""
    if _reserved(function.name):
        _fail(function, f"{function.name:.40} is reserved: give the function another name")
    if function.decorator_list or getattr(function, "type_params", None):
        _fail(function, "decorators and type parameters are not allowed")
    for place, name in _annotations(function):           # they say nothing that matters here
        note = getattr(place, name)
        if not all(isinstance(node, ANNOTATION) for node in ast.walk(note)):
            _fail(note, "an annotation can only name a type, such as float or np.ndarray")
        setattr(place, name, ast.Constant(None) if isinstance(place, ast.AnnAssign) else None)
    nodes = [(function, 0)]
    for count, (node, depth) in enumerate(nodes):    # grows while it is walked: breadth first, no recursion
        if count > MAX_NODES:
            raise RewardError(f"the source is too long: more than {MAX_NODES} syntax nodes")
        if depth > 60:
            _fail(node, "expressions are nested too deeply")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
            if node.attr not in FUNCTIONS and node.attr not in NUMBERS and node.attr != "float64":
                close = difflib.get_close_matches(node.attr, FUNCTIONS, 1)
                hint = f"is np.{close[0]} meant?" if close else THERE_ARE
                _fail(node, f"np.{node.attr:.40} is not available; {hint}")
            continue                         # np.NAME is fine where it is called, which _check_expression sees to
        if _is_float_cast(node):
            nodes.append((node.func.value, depth + 1))
            continue
        if not isinstance(node, NODES):
            _fail(node, HINTS.get(type(node), f"{type(node).__name__} is not part of the language"))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            _fail(node, HINTS[ast.Not])
        if isinstance(node, ast.Compare) and len(node.ops) > 1:
            _fail(node, "write (a < b) & (b < c) instead of a < b < c")
        if isinstance(node, ast.FunctionDef) and node is not function:
            _fail(node, "functions inside the function are not allowed")
        nodes += [(child, depth + 1) for child in ast.iter_child_nodes(node)]


def _annotations(function):
    """(node, attribute) of each annotation."""
    args = function.args
    places = [(arg, "annotation") for arg in args.posonlyargs + args.args + args.kwonlyargs] + [(function, "returns")]
    places += [(statement, "annotation") for statement in function.body if isinstance(statement, ast.AnnAssign)]
    return [(place, name) for place, name in places if getattr(place, name) is not None]


def _reserved(name):
    return name == "np" or name.startswith("__")


def _defaults(args):
    """(argument, default) of each argument that has one."""
    positional = args.posonlyargs + args.args
    pairs = list(zip(positional[len(positional) - len(args.defaults):], args.defaults))
    return pairs + [(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults) if default is not None]


def _signature(function, offered):
    """(features, params): the arguments without and with a default."""
    args = function.args
    if args.vararg or args.kwarg:
        _fail(function, "*args and **kwargs are not allowed: name each feature and parameter")
    if args.posonlyargs:
        _fail(function, "the / marker is not allowed: arguments are passed by name")
    params = {}
    for arg, default in _defaults(args):
        if not isinstance(default, ast.Constant) or type(default.value) not in (int, float) or default.value <= 0:
            _fail(default, f"the default of parameter {arg.arg:.40} must be a plain positive number; put signs into the code")
        params[arg.arg] = _number(default)
        if arg.arg in offered:
            _fail(arg, f"{arg.arg} is a feature: it cannot have a default value")
    features = [arg.arg for arg in args.args + args.kwonlyargs if arg.arg not in params]
    for arg in args.args + args.kwonlyargs:
        if _reserved(arg.arg):
            _fail(arg, f"{arg.arg} is reserved: give the argument another name")
        if arg.arg in features and arg.arg not in offered:
            _fail(arg, f"{arg.arg} is not a feature of this task (they are: {', '.join(offered)}); a parameter needs "
                  "a default value")
    if not params:
        _fail(function, "there are no parameters: give each tunable number a name and a default in the signature")
    if not features:
        _fail(function, f"there are no features among the arguments: name some of {', '.join(offered)}")
    if len(params) > MAX_PARAMS:
        _fail(function, f"{len(params)} parameters are more than the {MAX_PARAMS} allowed")
    return features, params


def _body(function, arguments):
    """Assignments, then one return of a dict of named terms: checks names and gives those of the terms."""
    known = set(arguments)
    # What `Reward.python` writes first: name = np.float64(name).
    body = function.body[:] = [statement for statement in function.body if not any(
        ast.unparse(statement) == f"{name} = np.float64({name})" for name in arguments)]
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
        body = body[1:]                                # a docstring
    for position, statement in enumerate(body):
        if isinstance(statement, ast.Return):
            if position != len(body) - 1:
                _fail(statement, "return must be the last statement")
            if not isinstance(statement.value, ast.Dict) or not statement.value.keys:
                _fail(statement, 'return a dict of named terms, such as {"reach": reach, "contact": contact}')
            names = []
            for key, value in zip(statement.value.keys, statement.value.values):
                if not isinstance(key, ast.Constant) or not isinstance(key.value, str) or not key.value.isidentifier():
                    _fail(statement, "each key of the returned dict must be a term's name in quotes")
                if key.value in names:
                    _fail(statement, f"term {key.value} is returned twice")
                names.append(key.value)
                _check_expression(value, known)
            return names
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
            _fail(statement, HINTS.get(type(statement), "only assignments and one return are allowed"))
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        target = targets[0]
        if len(targets) > 1 or not isinstance(target, ast.Name):
            _fail(statement, "assign to one plain name at a time")
        if target.id in arguments or _reserved(target.id):
            _fail(statement, f"{target.id} already has a meaning: assign to another name")
        _check_expression(statement.value, known)
        known.add(target.id)
    _fail(function, "the function does not return anything")


def _check_expression(expression, known):
    """Names are known, calls are to the listed functions with the right number of arguments, constants numbers."""
    called, nodes = set(), [expression]
    for node in nodes:                               # grows while it is walked
        if _is_float_cast(node):
            nodes.append(node.func.value)
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Attribute) or node.func.attr in NUMBERS:
                _fail(node, "only functions of the form np.NAME can be called; " + THERE_ARE)
            arity = FUNCTIONS.get(node.func.attr, 1)         # 1: float64, which changes nothing
            if node.keywords or any(isinstance(a, ast.Starred) for a in node.args) or len(node.args) != arity:
                _fail(node, f"np.{node.func.attr} takes {arity} plain argument{'s' * (arity > 1)}")
            called |= {node.func, node.func.value}
            if node.func.attr == "clip":             # None is no bound
                called |= {side for side in node.args[1:] if isinstance(side, ast.Constant) and side.value is None}
        elif isinstance(node, ast.Attribute) and node not in called:
            if node.attr not in NUMBERS:
                _fail(node, f"np.{node.attr} must be called")
            called.add(node.value)
        elif isinstance(node, ast.Name) and node not in called and node.id not in known:
            close = difflib.get_close_matches(node.id, known, 1)
            _fail(node, f"unknown name {node.id:.40}" + (f"; is {close[0]} meant?" if close else ""))
        elif isinstance(node, ast.Constant) and node not in called:
            _number(node)
        elif isinstance(node, (ast.Dict, ast.Expr)):
            _fail(node, "a dict can only be returned")


def _is_float_cast(node):
    """Whether it is (...).astype(float), which changes nothing here."""
    return (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "astype"
            and not node.keywords and len(node.args) == 1 and isinstance(node.args[0], ast.Name) and node.args[0].id == "float")


def _names(expression):
    return [node for node in ast.walk(expression) if isinstance(node, ast.Name) and node.id != "np"]


def _truths(function):
    """The expressions that are truth values where a number is wanted, in the order of the source.

    Python counts True as 1, numpy does not always: -(a > b) is an error, (a > b) + (c > d) an "or". Raises RewardError for
    numbers where a truth value is wanted.
    """
    found, known = [], set()                         # names that stand for truth values

    def is_truth(node):
        """Whether the value of `node` is true or false; notes what has to become a number in it."""
        if isinstance(node, ast.Name):
            return node.id in known
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                number(side)
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, JOINS):
            return all([truth(side) for side in (node.left, node.right)])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return truth(node.operand)
        if _is_float_cast(node):
            number(node.func.value)
        elif isinstance(node, ast.Call) and node.func.attr.startswith("logical_"):
            for argument in node.args:
                is_truth(argument)
            return True
        elif isinstance(node, ast.Call):
            for position, argument in enumerate(node.args):
                is_truth(argument) if (node.func.attr, position) == ("where", 0) else number(argument)
        elif isinstance(node, (ast.BinOp, ast.UnaryOp)):
            for side in ast.iter_child_nodes(node):
                number(side)
        return False

    def number(node):
        if is_truth(node):
            found.append(node)

    def truth(node):
        if not is_truth(node):
            _fail(node, "&, | and ~ are for truth values: compare first, as in (a > 1) & (b > 1)")
        return True

    for statement in function.body:
        if isinstance(statement, ast.Return):
            for value in statement.value.values:
                number(value)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            (known.add if is_truth(statement.value) else known.discard)(target.id)
    return found


def _number(constant):
    """A constant as a finite float."""
    value = constant.value
    if type(value) not in (int, float):
        _fail(constant, f"{value!r:.40} is not a number")
    try:
        value = float(value)
    except OverflowError:
        value = float("inf")
    if not np.isfinite(value):
        _fail(constant, "the number is too large")
    return value


class _Numbers(ast.NodeTransformer):
    """Constants become floats, so that no integer can grow without bound; so do the truth values given, and the left side of a
    power of constants, which is NaN then where Python would go on with complex numbers."""

    def __init__(self, truths):
        self.truths = {id(node) for node in truths}

    def visit(self, node):
        truth = id(node) in self.truths
        node = super().visit(node)
        return ast.BinOp(ast.Constant(1.0), ast.Mult(), node) if truth else node

    def visit_UnaryOp(self, node):
        node = self.generic_visit(node)
        if not isinstance(node.op, ast.Invert):
            return node
        return ast.Call(ast.Attribute(ast.Name("np", ast.Load()), "logical_not", ast.Load()), [node.operand], [])

    def visit_BinOp(self, node):
        names = _names(node.left)
        node = self.generic_visit(node)
        if isinstance(node.op, ast.Pow) and not names:
            node.left = ast.Call(ast.Attribute(ast.Name("np", ast.Load()), "float64", ast.Load()), [node.left], [])
        return node

    def visit_Call(self, node):
        if _is_float_cast(node):
            return self.visit(node.func.value)
        return self.generic_visit(node)

    def visit_Constant(self, node):
        return ast.Constant(float(node.value)) if type(node.value) in (int, float) else node
