"""Check annotated array shapes whenever a function is called, for the import hook of jaxtyping.

Only shapes are checked: neither dtypes, nor whether an array belongs to JAX or NumPy.
"""

import functools
import inspect
import operator
import types
from typing import Any, Union, get_args, get_origin

from jaxtyping import AbstractArray, Shaped

UNCHECKED = {"Detector.__call__", "Detector.prepare", "Detector.process"}  # they report wrong shapes themselves


def checked(function):
    """Wrap a function so that it raises TypeError when an argument or the result does not have its annotated shape."""
    hints = {name: _shaped(hint) for name, hint in function.__annotations__.items()}
    hints = {name: hint for name, hint in hints.items() if hint is not None}
    if not hints or inspect.isgeneratorfunction(function) or function.__qualname__ in UNCHECKED:
        return function
    signature = inspect.signature(function)
    variadic = {name for name, parameter in signature.parameters.items() if parameter.kind == parameter.VAR_POSITIONAL}

    @functools.wraps(function)
    def with_checks(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            for argument in value if name in variadic else (value,):
                _check(f"{function.__qualname__}: {name}", argument, hints.get(name))
        result = function(*args, **kwargs)
        _check(f"{function.__qualname__}: result", result, hints.get("return"))
        return result

    return with_checks


def _shaped(hint: Any) -> Any:
    """Reduce a hint to its shapes. Return None if it has no shapes."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return Shaped[Any, hint.dim_str]
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        alternatives = [_shaped(part) for part in parts if part is not type(None)]
        return functools.reduce(operator.or_, alternatives) if alternatives and None not in alternatives else None
    if origin is dict:
        return dict[str, values] if (values := _shaped(parts[1])) is not None else None
    if origin is tuple and parts and any(_shaped(part) is not None for part in parts if part is not ...):
        return tuple[tuple(part if part is ... else _shaped(part) or Any for part in parts)]
    return None


def _check(name: str, value: Any, hint: Any) -> None:
    """Raise TypeError for an array that does not match the hint. None and values without shape are accepted."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in (None, Any) or value is None:
        return
    if origin in (Union, types.UnionType):
        if not any(_matches(value, part) for part in parts):
            _refuse(name, value, hint)
    elif origin is dict:
        for key, item in value.items():
            _check(f"{name}[{key!r}]", item, parts[1])
    elif origin is tuple:
        hints = parts[:1] * len(value) if ... in parts else parts
        for index, (item, part) in enumerate(zip(value, hints, strict=True)):
            _check(f"{name}[{index}]", item, part)
    elif not _matches(value, hint):
        _refuse(name, value, hint)


def _matches(value: Any, hint: Any) -> bool:
    return not hasattr(value, "shape") or not hasattr(value, "dtype") or isinstance(value, hint)


def _refuse(name: str, value: Any, hint: Any) -> None:
    raise TypeError(f"{name} is {value.dtype} of shape {value.shape}, not {hint}")
