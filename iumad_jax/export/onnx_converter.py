"""From a JAX function of fixed shapes to an ONNX model: each primitive of its jaxpr has one rule, in `RULES`.

A rule takes (graph, equation, *inputs), adds nodes to the graph and returns the equation's outputs. What does not
depend on the model's inputs is computed at once. Broadcasting is left to ONNX's own elementwise operators: a value may
be smaller than its shape says along axes of 1, until an operator needs it whole.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax import lax
from jax.extend import core
from onnx import helper, numpy_helper

OPSET, IR_VERSION = 18, 10


class Tensor(NamedTuple):
    """A value that depends on the model's inputs."""

    name: str
    shape: tuple[int, ...]  # of the tensor; an axis of 1 may stand for one of any length


Value = Tensor | np.ndarray
Operand = Any  # of a node: the name of another one's output, a value, or whole numbers
Rule = Callable[..., list[Value]]


def convert(
    function: Callable[..., Any], inputs: dict[str, jax.ShapeDtypeStruct], outputs: Sequence[str]
) -> onnx.ModelProto:
    """An ONNX model of a function of arrays that returns a flat tuple of arrays.

    Args:
        function: what to convert; called once, with tracers.
        inputs: names, shapes and types of its arguments, in order.
        outputs: names of what it returns, in order.

    Raises:
        NotImplementedError: it does something that is not translated here.
    """
    closed = jax.make_jaxpr(function)(*inputs.values())
    graph = _Graph(itertools.count(), [], {})
    results = _translate(graph, closed, [Tensor(name, spec.shape) for name, spec in inputs.items()])
    for name, value, variable in zip(outputs, results, closed.jaxpr.outvars, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name(graph.whole(value, variable))], [name]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "detector",
            _infos(inputs, closed.jaxpr.invars),
            _infos(outputs, closed.jaxpr.outvars),
            [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="iumad_jax",
    )
    onnx.checker.check_model(model)
    return model


class _Graph(NamedTuple):
    """A graph under construction; the body of a loop has nodes of its own, all else is shared."""

    numbers: Any
    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]

    def add(self, operator: str, *operands: Operand, **attributes: Any) -> str:
        """Adds a node with one output, and returns its name."""
        return self.add_all(operator, operands, 1, **attributes)[0]

    def add_all(self, operator: str, operands: Sequence[Operand], outputs: int, **attributes: Any) -> list[str]:
        """Adds a node with so many outputs, and returns their names."""
        names = [f"{operator}_{next(self.numbers)}" for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, [*map(self.name, operands)], names, **attributes))
        return names

    def name(self, operand: Operand) -> str:
        """Its name; a constant gets one."""
        if isinstance(operand, str):
            return operand
        if isinstance(operand, Tensor):
            return operand.name
        name = f"constant_{next(self.numbers)}"
        self.constants[name] = np.asarray(operand, None if hasattr(operand, "dtype") else np.int64)
        return name

    def whole(self, value: Value, variable: Any) -> Value:
        """A value in the whole shape of its variable."""
        shape = variable.aval.shape
        return value if value.shape == shape else Tensor(self.add("Expand", value, shape), shape)


def _translate(graph: _Graph, closed: Any, arguments: Sequence[Value]) -> list[Value]:
    """What a jaxpr returns, its equations translated by their rules."""
    values: dict[Any, Value] = dict(zip(closed.jaxpr.constvars, map(np.asarray, closed.consts), strict=True))
    values |= dict(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        rule = RULES.get(equation.primitive.name, _computed)
        outputs = rule(graph, equation, *map(read, equation.invars))
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _dependent(inputs: Sequence[Value]) -> bool:
    return any(isinstance(value, Tensor) for value in inputs)


def _computed(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
    """The rule of what does not depend on the model's inputs."""
    if _dependent(inputs):
        raise NotImplementedError(f"the primitive {equation.primitive.name} is not translated to ONNX: {equation}")
    return [np.asarray(array) for array in jax.tree.leaves(equation.primitive.bind(*inputs, **equation.params))]


def _elementwise(operator: str | Callable[..., str]) -> Rule:
    """The rule of what broadcasts: ONNX's operator, or a function (graph, equation, *inputs) -> output."""

    def rule(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
        if not _dependent(inputs):
            return _computed(graph, equation, *inputs)
        inputs = tuple(map(_small, inputs))
        name = graph.add(operator, *inputs) if isinstance(operator, str) else operator(graph, equation, *inputs)
        return [Tensor(name, np.broadcast_shapes(*(value.shape for value in inputs)))]

    return rule


def _small(value: Value) -> Value:
    """A constant without its repetitions."""
    if isinstance(value, Tensor):
        return value
    return value[tuple(slice(None) if stride else slice(1) for stride in value.strides)]


def _whole(function: Callable[..., Operand | list[str]]) -> Rule:
    """The rule of what takes whole inputs: a function (graph, equation, *inputs) -> output or list of outputs."""

    def rule(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
        if not _dependent(inputs):
            return _computed(graph, equation, *inputs)
        found = function(graph, equation, *map(graph.whole, inputs, equation.invars))
        outputs = zip(found if isinstance(found, list) else [found], equation.outvars, strict=True)
        return [Tensor(graph.name(output), variable.aval.shape) for output, variable in outputs]

    return rule


def _custom_vjp_call(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
    called = equation.params["call_jaxpr"]
    if called.jaxpr.debug_info.func_name == "depthwise_conv" and _dependent(inputs):  # it has its own operator
        return _depthwise_conv(graph, equation, *inputs)
    return _translate(graph, called, inputs)


@_whole
def _depthwise_conv(graph: _Graph, equation: Any, x: Value, kernel: Value) -> str:
    """`efficientnet.depthwise_conv`: its sum of shifted images is fast in XLA, but not in ONNX runtimes."""
    (size, _, channels), body = kernel.shape, equation.params["call_jaxpr"].jaxpr
    shifts = [e.params["strides"] for e in body.eqns if e.primitive.name == "slice" and e.invars[0] is body.invars[0]]
    strides = shifts[0][-3:-1] if shifts[0] else (1, 1)
    first = _transposed(graph, graph.add("Reshape", x, (-1, *x.shape[-3:])), (0, 3, 1, 2))
    weights = graph.add("Reshape", _transposed(graph, kernel, (2, 0, 1)), (channels, 1, size, size))
    y = graph.add("Conv", first, weights, strides=strides, group=channels)
    return _as_result(graph, equation, _transposed(graph, y, (0, 2, 3, 1)))


def _broadcast_in_dim(graph: _Graph, equation: Any, value: Value) -> list[Value]:
    sizes = dict(zip(equation.params["broadcast_dimensions"], value.shape, strict=True))
    small = tuple(sizes.get(axis, 1) for axis in range(len(equation.params["shape"])))
    if isinstance(value, Tensor):
        return [Tensor(graph.add("Reshape", value, small), small)]
    return [np.broadcast_to(value.reshape(small), equation.params["shape"])]


@_whole
def _gather(graph: _Graph, equation: Any, x: Value, indices: Value) -> str:
    """What `jnp.take` along one axis does, at fixed places."""
    numbers = equation.params["dimension_numbers"]
    if isinstance(indices, np.ndarray) and len(numbers.start_index_map) == 1:
        (axis,) = numbers.start_index_map
        places = indices[..., 0].astype(np.int64)
        sizes = tuple(1 if i == axis else size for i, size in enumerate(x.shape))
        rest = [i for i in range(len(x.shape) - 1 + places.ndim) if not axis <= i < axis + places.ndim]
        take = lax.GatherDimensionNumbers(tuple(rest), collapsed_slice_dims=(axis,), start_index_map=(axis,))
        inside = places.min() >= 0 and places.max() < x.shape[axis]
        if (numbers, equation.params["slice_sizes"]) == (take, sizes) and inside:
            return graph.add("Gather", x, places, axis=axis)
    raise NotImplementedError(f"only a take at fixed places is translated to ONNX: {equation}")


@_whole
def _scan(graph: _Graph, equation: Any, *inputs: Value) -> list[str]:
    params, body = equation.params, equation.params["jaxpr"]
    if "ft_in" in params:  # JAX 0.11 and newer
        fixed, carried, scanned = (len(list(part)) for part in params["ft_in"].unpack())
    else:
        fixed, carried = params["num_consts"], params["num_carry"]
        scanned = len(inputs) - fixed - carried
    if not scanned:
        raise NotImplementedError(f"a loop over nothing is not translated to ONNX: {equation}")
    moving, returned = body.jaxpr.invars[fixed:], body.jaxpr.outvars
    arguments = [Tensor(f"step_{next(graph.numbers)}", variable.aval.shape) for variable in moving]
    inside = graph._replace(nodes=[])
    results = map(inside.whole, _translate(inside, body, [*inputs[:fixed], *arguments]), returned)
    names = [inside.add("Identity", value) for value in results]
    starts, ends = _infos([argument.name for argument in arguments], moving), _infos(names, returned)
    return graph.add_all(
        "Scan",
        inputs[fixed:],
        len(names),
        body=helper.make_graph(inside.nodes, f"step_{next(graph.numbers)}", starts, ends),
        num_scan_inputs=scanned,
        scan_input_directions=[int(params["reverse"])] * scanned,
        scan_output_directions=[int(params["reverse"])] * (len(names) - carried),
    )


@_whole
def _dot_general(graph: _Graph, equation: Any, left: Value, right: Value) -> str:
    """A matrix product of (batch, free, contracted) and (batch, contracted, free)."""
    contracted, batch = equation.params["dimension_numbers"]
    free = [
        [i for i in range(len(x.shape)) if i not in (*contracted[side], *batch[side])]
        for side, x in enumerate((left, right))
    ]
    outer, inner = [left.shape[i] for i in batch[0]], math.prod(left.shape[i] for i in contracted[0])
    rows = _transposed(graph, left, [*batch[0], *free[0], *contracted[0]])
    columns = _transposed(graph, right, [*batch[1], *contracted[1], *free[1]])
    factors = graph.add("Reshape", rows, [*outer, -1, inner]), graph.add("Reshape", columns, [*outer, inner, -1])
    return _as_result(graph, equation, graph.add("MatMul", *factors))


@_whole
def _conv_general_dilated(graph: _Graph, equation: Any, x: Value, kernel: Value) -> str:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise NotImplementedError(f"a transposed convolution is not translated to ONNX: {equation}")
    y = graph.add(
        "Conv",
        _transposed(graph, x, numbers.lhs_spec),
        _transposed(graph, kernel, numbers.rhs_spec),
        strides=params["window_strides"],
        pads=[low for low, _ in params["padding"]] + [high for _, high in params["padding"]],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return _transposed(graph, y, np.argsort(numbers.out_spec).tolist())


@_whole
def _reduce_window_sum(graph: _Graph, equation: Any, x: Value) -> str:
    """Over rows and columns of (b, h, w, c)."""
    params = equation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    plain = not np.any(params["padding"]) and {*params["base_dilation"], *params["window_dilation"]} == {1}
    if len(window) != 4 or not plain or (window[0], window[3], strides[0], strides[3]) != (1, 1, 1, 1):
        raise NotImplementedError(f"only a window over rows and columns is translated to ONNX: {equation}")
    first = _transposed(graph, x, (0, 3, 1, 2))
    mean = graph.add("AveragePool", first, kernel_shape=window[1:3], strides=strides[1:3])
    return _transposed(graph, graph.add("Mul", mean, np.float32(window[1] * window[2])), (0, 2, 3, 1))


@_whole
def _slice(graph: _Graph, equation: Any, x: Value) -> Operand:
    starts, ends, steps = (equation.params[name] for name in ("start_indices", "limit_indices", "strides"))
    steps = steps or [1] * len(starts)
    axes = [i for i, n in enumerate(x.shape) if (starts[i], ends[i], steps[i]) != (0, n, 1)]
    bounds = [[own[i] for i in axes] for own in (starts, ends, range(len(starts)), steps)]
    return graph.add("Slice", x, *bounds) if axes else x


@_whole
def _pad(graph: _Graph, equation: Any, x: Value, value: Value) -> str:
    config = equation.params["padding_config"]
    if any(inner or low < 0 or high < 0 for low, high, inner in config):
        raise NotImplementedError(f"padding within or below nothing is not translated to ONNX: {equation}")
    return graph.add("Pad", x, [low for low, _, _ in config] + [high for _, high, _ in config], value)


def _reduce(operator: str) -> Rule:
    return _whole(lambda graph, equation, x: graph.add(operator, x, equation.params["axes"], keepdims=0))


def _extreme(operator: str) -> Rule:
    @_whole
    def rule(graph: _Graph, equation: Any, x: Value) -> str:
        place = graph.add(operator, x, axis=equation.params["axes"][0], keepdims=0)
        return graph.add("Cast", place, to=_type(equation.params["index_dtype"]))

    return rule


@_whole
def _stack(graph: _Graph, equation: Any, *parts: Value) -> str:
    axis = equation.params["axis"]
    return graph.add("Concat", *(graph.add("Unsqueeze", part, [axis]) for part in parts), axis=axis)


def _transposed(graph: _Graph, x: Operand, order: Sequence[int]) -> Operand:
    return x if list(order) == sorted(order) else graph.add("Transpose", x, perm=order)


def _as_result(graph: _Graph, equation: Any, x: Operand) -> str:
    return graph.add("Reshape", x, equation.outvars[0].aval.shape)


def _infos(names: Iterable[str], variables: Sequence[Any]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, _type(variable.aval.dtype), variable.aval.shape)
        for name, variable in zip(names, variables, strict=True)
    ]


def _type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _same(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
    return list(inputs)


ONE = np.float32(1)
RULES: dict[str, Rule] = {
    "abs": _elementwise("Abs"),
    "add": _elementwise("Add"),
    "and": _elementwise("And"),
    "argmax": _extreme("ArgMax"),
    "argmin": _extreme("ArgMin"),
    "broadcast_in_dim": _broadcast_in_dim,
    "ceil": _elementwise("Ceil"),
    "clamp": _elementwise(lambda g, e, low, x, high: g.add("Min", g.add("Max", x, low), high)),
    "concatenate": _whole(lambda g, e, *parts: g.add("Concat", *parts, axis=e.params["dimension"])),
    "conv_general_dilated": _conv_general_dilated,
    "convert_element_type": _elementwise(lambda g, e, x: g.add("Cast", x, to=_type(e.params["new_dtype"]))),
    "copy": _same,
    "custom_jvp_call": lambda g, e, *inputs: _translate(g, e.params["call_jaxpr"], inputs),
    "custom_vjp_call": _custom_vjp_call,
    "div": _elementwise("Div"),
    "dot_general": _dot_general,
    "eq": _elementwise("Equal"),
    "erf": _elementwise("Erf"),
    "erfc": _elementwise(lambda g, e, x: g.add("Sub", ONE, g.add("Erf", x))),
    "exp": _elementwise("Exp"),
    "expm1": _elementwise(lambda g, e, x: g.add("Sub", g.add("Exp", x), ONE)),
    "floor": _elementwise("Floor"),
    "gather": _gather,
    "ge": _elementwise("GreaterOrEqual"),
    "gt": _elementwise("Greater"),
    "integer_pow": _elementwise(lambda g, e, x: g.add("Pow", x, np.float32(e.params["y"]))),
    "jit": lambda g, e, *inputs: _translate(g, e.params["jaxpr"], inputs),
    "le": _elementwise("LessOrEqual"),
    "log": _elementwise("Log"),
    "log1p": _elementwise(lambda g, e, x: g.add("Log", g.add("Add", x, ONE))),
    "logistic": _elementwise("Sigmoid"),
    "lt": _elementwise("Less"),
    "max": _elementwise("Max"),
    "min": _elementwise("Min"),
    "mul": _elementwise("Mul"),
    "ne": _elementwise(lambda g, e, x, y: g.add("Not", g.add("Equal", x, y))),
    "neg": _elementwise("Neg"),
    "not": _elementwise("Not"),
    "optimization_barrier": _same,
    "or": _elementwise("Or"),
    "pad": _pad,
    "pow": _elementwise("Pow"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_sum": _reduce_window_sum,
    "reshape": _whole(_as_result),
    "rsqrt": _elementwise(lambda g, e, x: g.add("Reciprocal", g.add("Sqrt", x))),
    "scan": _scan,
    "select_n": _elementwise(lambda g, e, which, no, yes: g.add("Where", which, yes, no)),
    "sign": _elementwise("Sign"),
    "slice": _slice,
    "split": _whole(lambda g, e, x: g.add_all("Split", [x, s := e.params["sizes"]], len(s), axis=e.params["axis"])),
    "sqrt": _elementwise("Sqrt"),
    "square": _elementwise(lambda g, e, x: g.add("Mul", x, x)),
    "squeeze": _whole(_as_result),
    "stack": _stack,
    "stop_gradient": _same,
    "sub": _elementwise("Sub"),
    "tanh": _elementwise("Tanh"),
    "transpose": _whole(lambda g, e, x: _transposed(g, x, e.params["permutation"])),
}
