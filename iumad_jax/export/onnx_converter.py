"""Conversion of a JAX function to an ONNX model, by one rule in `RULES` per primitive of its jaxpr.

Shapes are fixed, except that the batch size ANY, a large prime number, stands for any number of images: sizes that it
divides vary with the batch. (With the symbolic sizes of `jax.export`, JAX would turn slices into gathers.)

A rule takes (graph, equation, *inputs), adds nodes to the graph and returns the equation's outputs. Equations that do
not depend on the model's inputs are evaluated at once. Broadcasting is left to ONNX's elementwise operators: a value
may keep length 1 along a broadcast axis until an operator needs its full shape.
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
ANY = 1_000_003


class Tensor(NamedTuple):
    """A value that depends on the model's inputs."""

    name: str
    shape: tuple[int, ...]  # actual shape; an axis of length 1 may be broadcast to any length


Value = Tensor | np.ndarray
Operand = Any  # input of a node: the name of another node's output, a value, or integers
Rule = Callable[..., list[Value]]


def convert(
    function: Callable[..., Any], inputs: dict[str, jax.ShapeDtypeStruct], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Convert a function of arrays that returns a flat tuple of arrays to an ONNX model.

    Args:
        function: Function to convert. It is called once, with tracers.
        inputs: Shape and dtype of each argument by name, in order.
        outputs: Names of the results, in order.

    Raises:
        NotImplementedError: If no rule translates an operation of the function.
    """
    closed_jaxpr = jax.make_jaxpr(function)(*inputs.values())
    graph = _Graph(itertools.count(), [], {}, next(iter(inputs)))
    results = _translate(graph, closed_jaxpr, [Tensor(name, spec.shape) for name, spec in inputs.items()])
    for name, value, variable in zip(outputs, results, closed_jaxpr.jaxpr.outvars, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name(graph.expand(value, variable))], [name]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "detector",
            _value_infos(inputs, closed_jaxpr.jaxpr.invars),
            _value_infos(outputs, closed_jaxpr.jaxpr.outvars),
            [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="iumad_jax",
    )
    onnx.checker.check_model(model)
    return model


class _Graph(NamedTuple):
    """Graph under construction. The body of a loop has its own list of nodes and shares everything else."""

    numbers: Any  # counter for unique names
    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    input: str  # name of an input, whose first axis has the batch size

    def add(self, operator: str, *operands: Operand, **attributes: Any) -> str:
        """Add a node with one output and return the name of the output."""
        return self.add_all(operator, operands, 1, **attributes)[0]

    def add_all(self, operator: str, operands: Sequence[Operand], outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        names = [f"{operator}_{next(self.numbers)}" for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, [*map(self.name, operands)], names, **attributes))
        return names

    def name(self, operand: Operand) -> str:
        """Return the name of an operand. A constant is added to the graph under a new name."""
        if isinstance(operand, str):
            return operand
        if isinstance(operand, Tensor):
            return operand.name
        name = f"constant_{next(self.numbers)}"
        self.constants[name] = np.asarray(operand, None if hasattr(operand, "dtype") else np.int64)
        return name

    def expand(self, value: Value, variable: Any) -> Value:
        """Expand a value to the full shape of its variable."""
        shape = variable.aval.shape
        return value if value.shape == shape else Tensor(self.add("Expand", value, self.sizes(shape)), shape)

    def sizes(self, shape: Sequence[int]) -> Operand:
        """Return a shape as an operand, computed in the graph if it varies with the batch size."""
        if None not in (fixed := _fix(shape, None)):
            return shape
        batch = self.add("Shape", self.input, start=0, end=1)
        sizes = ([size] if size in fixed else self.add("Mul", batch, [size // ANY]) for size in shape)
        return self.add("Concat", *sizes, axis=0)


def _fix(shape: Iterable[int], varying: Any) -> list[Any]:
    """Replace the sizes of a shape that vary with the batch size."""
    return [varying if size and size % ANY == 0 else size for size in shape]


def _reshape(graph: _Graph, x: Operand, shape: Sequence[int]) -> str:
    """Reshape to a shape of which at most one size is -1 or varies with the batch size."""
    return graph.add("Reshape", x, _fix(shape, -1))


def _translate(graph: _Graph, closed_jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
    """Translate the equations of a jaxpr and return its results."""
    values: dict[Any, Value] = dict(
        zip(closed_jaxpr.jaxpr.constvars, map(np.asarray, closed_jaxpr.consts), strict=True)
    )
    values |= dict(zip(closed_jaxpr.jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in closed_jaxpr.jaxpr.eqns:
        rule = RULES.get(equation.primitive.name, _evaluate)
        outputs = rule(graph, equation, *map(read, equation.invars))
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in closed_jaxpr.jaxpr.outvars]


def _depends_on_inputs(inputs: Sequence[Value]) -> bool:
    return any(isinstance(value, Tensor) for value in inputs)


def _evaluate(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
    """Evaluate an equation whose inputs are all constants. This is the rule of primitives that `RULES` lacks."""
    if _depends_on_inputs(inputs):
        raise NotImplementedError(f"the primitive {equation.primitive.name} is not translated to ONNX: {equation}")
    return [np.asarray(array) for array in jax.tree.leaves(equation.primitive.bind(*inputs, **equation.params))]


def _elementwise(operator: str | Callable[..., str]) -> Rule:
    """Make a broadcasting rule from an ONNX operator or a function (graph, equation, *inputs) -> output name."""

    def rule(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
        if not _depends_on_inputs(inputs):
            return _evaluate(graph, equation, *inputs)
        inputs = tuple(map(_compact, inputs))
        name = graph.add(operator, *inputs) if isinstance(operator, str) else operator(graph, equation, *inputs)
        return [Tensor(name, np.broadcast_shapes(*(value.shape for value in inputs)))]

    return rule


def _compact(value: Value) -> Value:
    """Undo the broadcasting of a constant, so that repeated values are stored once."""
    if isinstance(value, Tensor):
        return value
    return value[tuple(slice(None) if stride else slice(1) for stride in value.strides)]


def _with_full_inputs(function: Callable[..., Operand | list[str]]) -> Rule:
    """Make a rule that expands its inputs, from a function (graph, equation, *inputs) -> output or list of outputs."""

    def rule(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
        if not _depends_on_inputs(inputs):
            return _evaluate(graph, equation, *inputs)
        outputs = function(graph, equation, *map(graph.expand, inputs, equation.invars))
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return [
            Tensor(graph.name(output), variable.aval.shape)
            for output, variable in zip(outputs, equation.outvars, strict=True)
        ]

    return rule


def _custom_vjp_call(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
    inner_jaxpr = equation.params["call_jaxpr"]
    if inner_jaxpr.jaxpr.debug_info.func_name == "depthwise_conv" and _depends_on_inputs(inputs):
        return _depthwise_conv(graph, equation, *inputs)
    return _translate(graph, inner_jaxpr, inputs)


@_with_full_inputs
def _depthwise_conv(graph: _Graph, equation: Any, x: Value, kernel: Value) -> str:
    """Translate `models.layers.depthwise_conv` to Conv, as sums of shifted images are slow in ONNX runtimes."""
    (size, _, channels), body = kernel.shape, equation.params["call_jaxpr"].jaxpr
    image_slices = [e for e in body.eqns if e.primitive.name == "slice" and e.invars[0] is body.invars[0]]
    slice_strides = image_slices[0].params["strides"]
    strides = slice_strides[-3:-1] if slice_strides else (1, 1)
    channels_first = _transpose(graph, _reshape(graph, x, (-1, *x.shape[-3:])), (0, 3, 1, 2))
    weights = graph.add("Reshape", _transpose(graph, kernel, (2, 0, 1)), (channels, 1, size, size))
    y = graph.add("Conv", channels_first, weights, strides=strides, group=channels)
    return _reshape_to_result(graph, equation, _transpose(graph, y, (0, 2, 3, 1)))


def _broadcast_in_dim(graph: _Graph, equation: Any, value: Value) -> list[Value]:
    sizes = dict(zip(equation.params["broadcast_dimensions"], value.shape, strict=True))
    shape = tuple(sizes.get(axis, 1) for axis in range(len(equation.params["shape"])))
    if isinstance(value, Tensor):
        return [Tensor(_reshape(graph, value, shape), shape)]
    return [np.broadcast_to(value.reshape(shape), _fix(equation.params["shape"], 1))]


@_with_full_inputs
def _gather(graph: _Graph, equation: Any, x: Value, indices: Value) -> str:
    """Translate `jnp.take` along one axis, with constant indices or mode="clip"."""
    numbers = equation.params["dimension_numbers"]
    if len(numbers.start_index_map) == 1:
        (axis,) = numbers.start_index_map
        last = x.shape[axis] - 1
        sizes = tuple(1 if i == axis else size for i, size in enumerate(x.shape))
        end = axis + len(indices.shape) - 1
        kept_axes = [i for i in range(len(x.shape) + len(indices.shape) - 2) if not axis <= i < end]
        take = lax.GatherDimensionNumbers(tuple(kept_axes), collapsed_slice_dims=(axis,), start_index_map=(axis,))
        in_bounds = equation.params["mode"] == lax.GatherScatterMode.CLIP or (
            isinstance(indices, np.ndarray) and indices.min() >= 0 and indices.max() <= last
        )
        if (numbers, equation.params["slice_sizes"]) == (take, sizes) and in_bounds:
            positions = graph.add("Cast", graph.add("Squeeze", indices, [-1]), to=_onnx_type(np.int64))
            positions = graph.add("Max", graph.add("Min", positions, np.int64(last)), np.int64(0))
            return graph.add("Gather", x, positions, axis=axis)
    raise NotImplementedError(f"only a take with constant or clipped indices is translated to ONNX: {equation}")


@_with_full_inputs
def _scan(graph: _Graph, equation: Any, *inputs: Value) -> list[str]:
    params, body = equation.params, equation.params["jaxpr"]
    if "ft_in" in params:  # JAX 0.11 and newer
        constants, carried, scanned = (len(list(part)) for part in params["ft_in"].unpack())
    else:
        constants, carried = params["num_consts"], params["num_carry"]
        scanned = len(inputs) - constants - carried
    if not scanned:
        raise NotImplementedError(f"a loop without scanned arrays is not translated to ONNX: {equation}")
    variables, results = body.jaxpr.invars[constants:], body.jaxpr.outvars
    arguments = [Tensor(f"step_{next(graph.numbers)}", variable.aval.shape) for variable in variables]
    body_graph = graph._replace(nodes=[])
    values = map(body_graph.expand, _translate(body_graph, body, [*inputs[:constants], *arguments]), results)
    names = [body_graph.add("Identity", value) for value in values]
    body_inputs = _value_infos([argument.name for argument in arguments], variables)
    body_outputs = _value_infos(names, results)
    return graph.add_all(
        "Scan",
        inputs[constants:],
        len(names),
        body=helper.make_graph(body_graph.nodes, f"step_{next(graph.numbers)}", body_inputs, body_outputs),
        num_scan_inputs=scanned,
        scan_input_directions=[int(params["reverse"])] * scanned,
        scan_output_directions=[int(params["reverse"])] * (len(names) - carried),
    )


@_with_full_inputs
def _dot_general(graph: _Graph, equation: Any, left: Value, right: Value) -> str:
    """Translate a contraction to a matrix product of (batch, free, contracted) and (batch, contracted, free)."""
    contracted, batch = equation.params["dimension_numbers"]
    free = [
        [i for i in range(len(x.shape)) if i not in (*contracted[side], *batch[side])]
        for side, x in enumerate((left, right))
    ]
    outer, inner = [left.shape[i] for i in batch[0]], math.prod(left.shape[i] for i in contracted[0])
    rows_, columns_ = (math.prod(x.shape[i] for i in axes) for x, axes in zip((left, right), free, strict=True))
    rows = _transpose(graph, left, [*batch[0], *free[0], *contracted[0]])
    columns = _transpose(graph, right, [*batch[1], *contracted[1], *free[1]])
    factors = _reshape(graph, rows, [*outer, rows_, inner]), _reshape(graph, columns, [*outer, inner, columns_])
    return _reshape_to_result(graph, equation, graph.add("MatMul", *factors))


@_with_full_inputs
def _conv_general_dilated(graph: _Graph, equation: Any, x: Value, kernel: Value) -> str:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise NotImplementedError(f"a transposed convolution is not translated to ONNX: {equation}")
    y = graph.add(
        "Conv",
        _transpose(graph, x, numbers.lhs_spec),
        _transpose(graph, kernel, numbers.rhs_spec),
        strides=params["window_strides"],
        pads=[low for low, _ in params["padding"]] + [high for _, high in params["padding"]],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return _transpose(graph, y, np.argsort(numbers.out_spec).tolist())


@_with_full_inputs
def _reduce_window(graph: _Graph, equation: Any, x: Value) -> str:
    """Translate the sum or maximum over windows of rows and columns of an array (b, h, w, c)."""
    params = equation.params
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    plain = {*params["base_dilation"], *params["window_dilation"]} == {1} and not np.any([padding[0], padding[-1]])
    if len(window) != 4 or not plain or (window[0], window[3], strides[0], strides[3]) != (1, 1, 1, 1):
        raise NotImplementedError(f"only windows of rows and columns are translated to ONNX: {equation}")
    channels_first = _transpose(graph, x, (0, 3, 1, 2))
    pads = [low for low, _ in padding[1:3]] + [high for _, high in padding[1:3]]
    shape = {"kernel_shape": window[1:3], "strides": strides[1:3], "pads": pads}
    if equation.primitive.name == "reduce_window_max":
        return _transpose(graph, graph.add("MaxPool", channels_first, **shape), (0, 2, 3, 1))
    mean = graph.add("AveragePool", channels_first, **shape, count_include_pad=1)
    return _transpose(graph, graph.add("Mul", mean, np.float32(window[1] * window[2])), (0, 2, 3, 1))


@_with_full_inputs
def _slice(graph: _Graph, equation: Any, x: Value) -> Operand:
    starts, ends, steps = (equation.params[name] for name in ("start_indices", "limit_indices", "strides"))
    steps = steps or [1] * len(starts)
    axes = [i for i, n in enumerate(x.shape) if (starts[i], ends[i], steps[i]) != (0, n, 1)]
    bounds = [[values[i] for i in axes] for values in (starts, ends, range(len(starts)), steps)]
    return graph.add("Slice", x, *bounds) if axes else x


@_with_full_inputs
def _pad(graph: _Graph, equation: Any, x: Value, value: Value) -> str:
    config = equation.params["padding_config"]
    if any(inner or low < 0 or high < 0 for low, high, inner in config):
        raise NotImplementedError(f"interior or negative padding is not translated to ONNX: {equation}")
    return graph.add("Pad", x, [low for low, _, _ in config] + [high for _, high, _ in config], value)


def _reduce(operator: str) -> Rule:
    return _with_full_inputs(lambda graph, equation, x: graph.add(operator, x, equation.params["axes"], keepdims=0))


def _extreme(operator: str) -> Rule:
    @_with_full_inputs
    def rule(graph: _Graph, equation: Any, x: Value) -> str:
        index = graph.add(operator, x, axis=equation.params["axes"][0], keepdims=0)
        return graph.add("Cast", index, to=_onnx_type(equation.params["index_dtype"]))

    return rule


@_with_full_inputs
def _top_k(graph: _Graph, equation: Any, x: Value) -> list[str]:
    """Translate `lax.top_k` along the last axis."""
    values, indices = graph.add_all("TopK", [x, [equation.params["k"]]], 2, axis=-1)
    return [values, graph.add("Cast", indices, to=_onnx_type(equation.outvars[1].aval.dtype))]


@_with_full_inputs
def _stack(graph: _Graph, equation: Any, *parts: Value) -> str:
    axis = equation.params["axis"]
    return graph.add("Concat", *(graph.add("Unsqueeze", part, [axis]) for part in parts), axis=axis)


def _transpose(graph: _Graph, x: Operand, order: Sequence[int]) -> Operand:
    return x if list(order) == sorted(order) else graph.add("Transpose", x, perm=order)


def _reshape_to_result(graph: _Graph, equation: Any, x: Operand) -> str:
    return _reshape(graph, x, equation.outvars[0].aval.shape)


def _value_infos(names: Iterable[str], variables: Sequence[Any]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, _onnx_type(variable.aval.dtype), _fix(variable.aval.shape, "batch"))
        for name, variable in zip(names, variables, strict=True)
    ]


def _onnx_type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _pass_through(graph: _Graph, equation: Any, *inputs: Value) -> list[Value]:
    return list(inputs)


ONE = np.float32(1)
_SAME_NAMES = (
    "abs add and ceil cos div erf exp floor log max min mul neg not or pow sign sin sqrt sub tanh".split()  # noqa: SIM905
)
RULES: dict[str, Rule] = {
    **{name: _elementwise(name.capitalize()) for name in _SAME_NAMES},
    "argmax": _extreme("ArgMax"),
    "argmin": _extreme("ArgMin"),
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _elementwise(lambda g, e, low, x, high: g.add("Min", g.add("Max", x, low), high)),
    "concatenate": _with_full_inputs(lambda g, e, *parts: g.add("Concat", *parts, axis=e.params["dimension"])),
    "conv_general_dilated": _conv_general_dilated,
    "convert_element_type": _elementwise(lambda g, e, x: g.add("Cast", x, to=_onnx_type(e.params["new_dtype"]))),
    "copy": _pass_through,
    "custom_jvp_call": lambda g, e, *inputs: _translate(g, e.params["call_jaxpr"], inputs),
    "custom_vjp_call": _custom_vjp_call,
    "dot_general": _dot_general,
    "eq": _elementwise("Equal"),
    "erfc": _elementwise(lambda g, e, x: g.add("Sub", ONE, g.add("Erf", x))),
    "expm1": _elementwise(lambda g, e, x: g.add("Sub", g.add("Exp", x), ONE)),
    "gather": _gather,
    "ge": _elementwise("GreaterOrEqual"),
    "gt": _elementwise("Greater"),
    "integer_pow": _elementwise(lambda g, e, x: g.add("Pow", x, np.float32(e.params["y"]))),
    "jit": lambda g, e, *inputs: _translate(g, e.params["jaxpr"], inputs),
    "le": _elementwise("LessOrEqual"),
    "log1p": _elementwise(lambda g, e, x: g.add("Log", g.add("Add", x, ONE))),
    "logistic": _elementwise("Sigmoid"),
    "lt": _elementwise("Less"),
    "ne": _elementwise(lambda g, e, x, y: g.add("Not", g.add("Equal", x, y))),
    "optimization_barrier": _pass_through,
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "reshape": _with_full_inputs(_reshape_to_result),
    "rsqrt": _elementwise(lambda g, e, x: g.add("Reciprocal", g.add("Sqrt", x))),
    "scan": _scan,
    "select_n": _elementwise(lambda g, e, condition, no, yes: g.add("Where", condition, yes, no)),
    "slice": _slice,
    "split": _with_full_inputs(
        lambda g, e, x: g.add_all("Split", [x, s := e.params["sizes"]], len(s), axis=e.params["axis"])
    ),
    "square": _elementwise(lambda g, e, x: g.add("Mul", x, x)),
    "squeeze": _with_full_inputs(_reshape_to_result),
    "stack": _stack,
    "stop_gradient": _pass_through,
    "top_k": _top_k,
    "transpose": _with_full_inputs(lambda g, e, x: _transpose(g, x, e.params["permutation"])),
}
