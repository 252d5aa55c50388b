"""Checks the shapes that annotations give, and nothing else, whenever a function is called.

This is for jaxtyping's import hook. Whether an array is JAX's or NumPy's, and of which type, is left open.
"""

import functools
import inspect
import operator
import types
from typing import Any, Union, get_args, get_origin

from jaxtyping import AbstractArray, Shaped

TELL_THEMSELVES = {"Detector.__call__", "Detector.prepare"}  # functions that say in a sentence what is wrong


def checked(function):
    """The function, which raises TypeError where an array that it is given or returns is not as annotated."""
    hints = {name: _shaped(hint) for name, hint in function.__annotations__.items()}
    hints = {name: hint for name, hint in hints.items() if hint is not None}
    if not hints or inspect.isgeneratorfunction(function) or function.__qualname__ in TELL_THEMSELVES:
        return function
    signature = inspect.signature(function)
    several = {name for name, parameter in signature.parameters.items() if parameter.kind == parameter.VAR_POSITIONAL}

    @functools.wraps(function)
    def with_checks(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            for one in value if name in several else (value,):
                _check(f"{function.__qualname__}: {name}", one, hints.get(name))
        result = function(*args, **kwargs)
        _check(f"{function.__qualname__}: what it returns", result, hints.get("return"))
        return result

    return with_checks


def _shaped(hint: Any) -> Any:
    """A hint less all that says nothing of shapes; None if that leaves nothing."""
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
    """Raises TypeError for an array that is not as the hint says; None and what has no shape may be anywhere."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in (None, Any) or value is None:
        return
    if origin in (Union, types.UnionType):
        if not any(_is(value, part) for part in parts):
            _refuse(name, value, hint)
    elif origin is dict:
        for key, of_key in value.items():
            _check(f"{name}[{key!r}]", of_key, parts[1])
    elif origin is tuple:
        each = parts[:1] * len(value) if ... in parts else parts
        for number, (of_place, part) in enumerate(zip(value, each, strict=True)):
            _check(f"{name}[{number}]", of_place, part)
    elif not _is(value, hint):
        _refuse(name, value, hint)


def _is(value: Any, hint: Any) -> bool:
    return not hasattr(value, "shape") or not hasattr(value, "dtype") or isinstance(value, hint)


def _refuse(name: str, value: Any, hint: Any) -> None:
    raise TypeError(f"{name} is {value.dtype} of shape {value.shape}, and not {hint}")
