"""From a JAX function of fixed shapes to an ONNX model: its jaxpr is translated primitive by primitive.

What does not depend on the inputs is computed at once. Broadcasting is left to ONNX's own elementwise operators: a
value may be smaller than its shape says along axes of 1, until an operator needs it whole.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

OPSET, IR_VERSION = 18, 10


class Tensor(NamedTuple):
    """A value that depends on the inputs."""

    name: str
    shape: tuple[int, ...]  # of the tensor; an axis of 1 may stand for one of any length


Value = Tensor | np.ndarray


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
    arguments = [Tensor(name, spec.shape) for name, spec in inputs.items()]
    results = _translate(graph, closed.jaxpr, closed.consts, arguments)
    for name, variable, value in zip(outputs, closed.jaxpr.outvars, results, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.whole(value, variable.aval.shape)], [name]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "detector",
            [_info(name, spec) for name, spec in inputs.items()],
            [_info(name, variable.aval) for name, variable in zip(outputs, closed.jaxpr.outvars, strict=True)],
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

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output, and its name."""
        return self.add_all(operator, inputs, 1, **attributes)[0]

    def add_all(self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        names = [f"{operator}_{next(self.numbers)}" for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def constant(self, array: Any) -> str:
        name = f"constant_{next(self.numbers)}"
        self.constants[name] = np.ascontiguousarray(array).reshape(np.shape(array))
        return name

    def part(self, value: Value) -> str:
        """The name of a value for an operator that broadcasts."""
        small = _small(value)
        return small.name if isinstance(small, Tensor) else self.constant(small)

    def whole(self, value: Value, shape: Sequence[int]) -> str:
        """The name of a value in its whole shape."""
        if not isinstance(value, Tensor):
            return self.constant(value)
        if value.shape == tuple(shape):
            return value.name
        return self.add("Expand", [value.name, self.constant(np.array(shape, np.int64))])


def _translate(graph: _Graph, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs, name = [read(atom) for atom in equation.invars], equation.primitive.name
        if inner := _inner(equation):
            found = _translate(graph, inner.jaxpr, inner.consts, inputs)
        elif name == "broadcast_in_dim":
            found = [_broadcast(graph, equation, inputs[0])]
        elif not any(isinstance(value, Tensor) for value in inputs):
            computed = equation.primitive.bind(*inputs, **equation.params)
            found = [np.asarray(array) for array in (computed if equation.primitive.multiple_results else [computed])]
        elif name in _ELEMENTWISE:
            result = _ELEMENTWISE[name](graph, equation, *map(graph.part, inputs))
            found = [Tensor(result, np.broadcast_shapes(*(_small(value).shape for value in inputs)))]
        elif name in _RULES:
            names = [graph.whole(v, a.aval.shape) for v, a in zip(inputs, equation.invars, strict=True)]
            result = _RULES[name](graph, equation, *names)
            found = [
                Tensor(one, variable.aval.shape)
                for one, variable in zip([result] if isinstance(result, str) else result, equation.outvars, strict=True)
            ]
        elif name == "scan":
            found = _scan(graph, equation, inputs)
        elif name == "gather":
            found = [_gather(graph, equation, *inputs)]
        else:
            raise NotImplementedError(f"the primitive {name} is not translated to ONNX: {equation}")
        values |= dict(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _small(value: Value) -> Value:
    """A constant without its repetitions."""
    if isinstance(value, Tensor):
        return value
    return value[tuple(slice(None) if stride else slice(1) for stride in value.strides)]


def _inner(equation: Any) -> Any:
    """The jaxpr of a function that is called, with its constants; None for all else."""
    if equation.primitive.name == "scan":
        return None
    for key in ("jaxpr", "call_jaxpr", "call"):
        if isinstance(inner := equation.params.get(key), core.ClosedJaxpr):
            return inner
    return None


def _broadcast(graph: _Graph, equation: Any, value: Value) -> Value:
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    sizes = [1] * len(shape)
    for place, size in zip(places, value.shape, strict=True):
        sizes[place] = size
    if isinstance(value, np.ndarray):
        return np.broadcast_to(value.reshape(sizes), shape)
    return Tensor(_reshape(graph, value.name, sizes), tuple(sizes))


def _gather(graph: _Graph, equation: Any, value: Value, indices: Value) -> Value:
    """What `jnp.take` along one axis does, at fixed places."""
    numbers, shape = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    if not isinstance(indices, np.ndarray) or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        raise NotImplementedError(f"only a take at fixed places is translated to ONNX: {equation}")
    (axis,) = numbers.start_index_map
    places = indices[..., 0].astype(np.int64)
    sizes = tuple(1 if i == axis else size for i, size in enumerate(shape))
    result = (*shape[:axis], *places.shape, *shape[axis + 1 :])
    rest = tuple(i for i in range(len(result)) if not axis <= i < axis + places.ndim)
    taken = numbers.collapsed_slice_dims == (axis,) and numbers.offset_dims == rest
    if equation.params["slice_sizes"] != sizes or not taken or places.min() < 0 or places.max() >= shape[axis]:
        raise NotImplementedError(f"only a take at fixed places is translated to ONNX: {equation}")
    name = graph.add("Gather", [graph.whole(value, shape), graph.constant(places)], axis=axis)
    return Tensor(name, result)


def _scan(graph: _Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    params, body = equation.params, equation.params["jaxpr"]
    fixed, carried = params["num_consts"], params["num_carry"]
    outside = zip(inputs[fixed:], equation.invars[fixed:], strict=True)
    names = [graph.whole(value, variable.aval.shape) for value, variable in outside]
    inside = graph._replace(nodes=[])
    variables = body.jaxpr.invars[fixed:]
    arguments = [Tensor(f"step_{next(graph.numbers)}", variable.aval.shape) for variable in variables]
    results = _translate(inside, body.jaxpr, body.consts, [*inputs[:fixed], *arguments])
    infos = []
    for variable, value in zip(body.jaxpr.outvars, results, strict=True):
        name = inside.add("Identity", [inside.whole(value, variable.aval.shape)])
        infos.append(_info(name, variable.aval))
    starts = [_info(one.name, variable.aval) for one, variable in zip(arguments, variables, strict=True)]
    step = helper.make_graph(inside.nodes, f"step_{next(graph.numbers)}", starts, infos)
    scanned, collected = len(names) - carried, len(results) - carried
    if not scanned:
        raise NotImplementedError(f"a loop over nothing is not translated to ONNX: {equation}")
    found = graph.add_all(
        "Scan",
        names,
        len(results),
        body=step,
        num_scan_inputs=scanned,
        scan_input_directions=[int(params["reverse"])] * scanned,
        scan_output_directions=[int(params["reverse"])] * collected,
    )
    return [Tensor(name, variable.aval.shape) for name, variable in zip(found, equation.outvars, strict=True)]


def _info(name: str, of: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _type(of.dtype), of.shape)


def _type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _reshape(graph: _Graph, x: str, shape: Sequence[int]) -> str:
    return graph.add("Reshape", [x, graph.constant(np.array(shape, np.int64))])


def _to_shape_of_result(graph: _Graph, equation: Any, x: str) -> str:
    return _reshape(graph, x, equation.outvars[0].aval.shape)


def _transpose(graph: _Graph, x: str, order: Sequence[int]) -> str:
    return x if list(order) == sorted(order) else graph.add("Transpose", [x], perm=list(order))


def _dot_general(graph: _Graph, equation: Any, left: str, right: str) -> str:
    """A matrix product of (batch, free, contracted) and (batch, contracted, free)."""
    (contracted, batch), shapes = equation.params["dimension_numbers"], [v.aval.shape for v in equation.invars]
    free = [
        [i for i in range(len(shape)) if i not in (*c, *b)]
        for shape, c, b in zip(shapes, contracted, batch, strict=True)
    ]
    a, _ = shapes
    inner = int(np.prod([a[i] for i in contracted[0]]))
    outer = [a[i] for i in batch[0]]
    rows, columns = (int(np.prod([shape[i] for i in own])) for shape, own in zip(shapes, free, strict=True))
    left = _reshape(graph, _transpose(graph, left, [*batch[0], *free[0], *contracted[0]]), [*outer, rows, inner])
    right = _reshape(graph, _transpose(graph, right, [*batch[1], *contracted[1], *free[1]]), [*outer, inner, columns])
    return _to_shape_of_result(graph, equation, graph.add("MatMul", [left, right]))


def _convolution(graph: _Graph, equation: Any, x: str, kernel: str) -> str:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise NotImplementedError(f"a transposed convolution is not translated to ONNX: {equation}")
    y = graph.add(
        "Conv",
        [_transpose(graph, x, numbers.lhs_spec), _transpose(graph, kernel, numbers.rhs_spec)],
        strides=list(params["window_strides"]),
        pads=[low for low, _ in params["padding"]] + [high for _, high in params["padding"]],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return _transpose(graph, y, np.argsort(numbers.out_spec).tolist())


def _window_sum(graph: _Graph, equation: Any, x: str) -> str:
    """Over rows and columns of (b, h, w, c)."""
    params = equation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    plain = not np.any(params["padding"]) and {*params["base_dilation"], *params["window_dilation"]} == {1}
    if len(window) != 4 or not plain or (window[0], window[3], strides[0], strides[3]) != (1, 1, 1, 1):
        raise NotImplementedError(f"only a window over rows and columns is translated to ONNX: {equation}")
    first = _transpose(graph, x, (0, 3, 1, 2))
    mean = graph.add("AveragePool", [first], kernel_shape=list(window[1:3]), strides=list(strides[1:3]))
    total = graph.add("Mul", [mean, graph.constant(np.float32(window[1] * window[2]))])
    return _transpose(graph, total, (0, 2, 3, 1))


def _slice(graph: _Graph, equation: Any, x: str) -> str:
    params = equation.params
    starts, ends = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or [1] * len(starts)
    shape = equation.invars[0].aval.shape
    axes = [i for i, n in enumerate(shape) if (starts[i], ends[i], steps[i]) != (0, n, 1)]
    if not axes:
        return x
    bounds = ([own[i] for i in axes] for own in (starts, ends, range(len(shape)), steps))
    return graph.add("Slice", [x, *(graph.constant(np.array(bound, np.int64)) for bound in bounds)])


def _pad(graph: _Graph, equation: Any, x: str, value: str) -> str:
    config = equation.params["padding_config"]
    if any(inner or low < 0 or high < 0 for low, high, inner in config):
        raise NotImplementedError(f"padding within or below nothing is not translated to ONNX: {equation}")
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    return graph.add("Pad", [x, graph.constant(np.array(pads, np.int64)), value])


def _reduce(operator: str) -> Callable[..., str]:
    def rule(graph: _Graph, equation: Any, x: str) -> str:
        axes = graph.constant(np.array(equation.params["axes"], np.int64))
        return graph.add(operator, [x, axes], keepdims=0)

    return rule


def _extreme(operator: str) -> Callable[..., str]:
    def rule(graph: _Graph, equation: Any, x: str) -> str:
        (axis,) = equation.params["axes"]
        found = graph.add(operator, [x], axis=axis, keepdims=0)
        return graph.add("Cast", [found], to=_type(equation.params["index_dtype"]))

    return rule


def _split(graph: _Graph, equation: Any, x: str) -> list[str]:
    sizes = equation.params["sizes"]
    return graph.add_all(
        "Split", [x, graph.constant(np.array(sizes, np.int64))], len(sizes), axis=equation.params["axis"]
    )


def _stack(graph: _Graph, equation: Any, *parts: str) -> str:
    axis = equation.params["axis"]
    where = graph.constant(np.array([axis], np.int64))
    return graph.add("Concat", [graph.add("Unsqueeze", [part, where]) for part in parts], axis=axis)


def _plain(operator: str) -> Callable[..., str]:
    return lambda graph, equation, *inputs: graph.add(operator, inputs)


def _one(graph: _Graph) -> str:
    return graph.constant(np.float32(1))


_ELEMENTWISE: dict[str, Callable[..., str]] = {
    "abs": _plain("Abs"),
    "add": _plain("Add"),
    "and": _plain("And"),
    "ceil": _plain("Ceil"),
    "clamp": lambda g, e, low, x, high: g.add("Min", [g.add("Max", [x, low]), high]),
    "convert_element_type": lambda g, e, x: g.add("Cast", [x], to=_type(e.params["new_dtype"])),
    "copy": _plain("Identity"),
    "div": _plain("Div"),
    "eq": _plain("Equal"),
    "erf": _plain("Erf"),
    "exp": _plain("Exp"),
    "expm1": lambda g, e, x: g.add("Sub", [g.add("Exp", [x]), _one(g)]),
    "floor": _plain("Floor"),
    "ge": _plain("GreaterOrEqual"),
    "gt": _plain("Greater"),
    "integer_pow": lambda g, e, x: g.add("Pow", [x, g.constant(np.float32(e.params["y"]))]),
    "le": _plain("LessOrEqual"),
    "log": _plain("Log"),
    "log1p": lambda g, e, x: g.add("Log", [g.add("Add", [x, _one(g)])]),
    "logistic": _plain("Sigmoid"),
    "lt": _plain("Less"),
    "max": _plain("Max"),
    "min": _plain("Min"),
    "mul": _plain("Mul"),
    "ne": lambda g, e, x, y: g.add("Not", [g.add("Equal", [x, y])]),
    "neg": _plain("Neg"),
    "not": _plain("Not"),
    "or": _plain("Or"),
    "pow": _plain("Pow"),
    "rsqrt": lambda g, e, x: g.add("Reciprocal", [g.add("Sqrt", [x])]),
    "select_n": lambda g, e, which, no, yes: g.add("Where", [which, yes, no]),
    "sign": _plain("Sign"),
    "sqrt": _plain("Sqrt"),
    "square": lambda g, e, x: g.add("Mul", [x, x]),
    "stop_gradient": _plain("Identity"),
    "sub": _plain("Sub"),
    "tanh": _plain("Tanh"),
}
_RULES: dict[str, Callable[..., Any]] = {
    "argmax": _extreme("ArgMax"),
    "argmin": _extreme("ArgMin"),
    "concatenate": lambda g, e, *parts: g.add("Concat", parts, axis=e.params["dimension"]),
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "expand_dims": _to_shape_of_result,
    "optimization_barrier": lambda g, e, *inputs: list(inputs),
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_sum": _window_sum,
    "reshape": _to_shape_of_result,
    "slice": _slice,
    "split": _split,
    "stack": _stack,
    "squeeze": _to_shape_of_result,
    "transpose": lambda g, e, x: _transpose(g, x, e.params["permutation"]),
}
