"""Graphs of a module's own forward, by torch.fx, refused wherever they would not say all that the forward does.

Symbolic tracing runs a forward once on stand-ins for its tensors and writes down what is called. It does not see what
happens beside that: attributes that are set, lists that are appended to, random numbers drawn, contexts such as
torch.no_grad() and checkpointing, questions about the state of autograd. All of these are looked for here, and refused.
"""

from __future__ import annotations

import builtins
import gc
import inspect
import logging
import operator
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.convert.state import Globals, attributes, same


class Untraceable(Exception):
    """A forward that no graph tells the whole of; the message says why."""


class Traced(NamedTuple):
    """A forward's graph, the names that its code reads, attributes of the module among them, and globals by modules."""

    graph: fx.Graph
    names: frozenset[str]
    globals: frozenset[tuple[str, str]]


def trace(module: nn.Module, training: bool, inlined: Collection[nn.Module] = ()) -> Traced:
    """What `module.forward` does, in training mode or not, with Tensors for required arguments, others at their defaults.

    `module` and what it holds may come out changed: hand in a copy. All modules that it calls are leaves of the graph, but
    for those `inlined` and those that its forward makes.

    Raises:
        Untraceable: the graph would not be all that forward does, or there is none.
    """
    if "forward" in vars(module):
        raise Untraceable("a forward was set on the instance")
    names = required(type(module).forward)
    # Those of its children may differ from its own, and are not to be asked for.
    modes = [(child, vars(child).pop("training")) for child in module.modules()]
    module.training = training
    before = attributes(module)
    tracer = Tracer({id(child) for child in inlined}, names)
    try:
        with _LOCK, _watching() as (seen, names_read, globals_), _passing_for_tensors(tracer.asked):
            graph = tracer.trace(module)
        after = attributes(module)
    except Untraceable:
        raise
    except Exception as error:  # whatever its code raises on stand-ins
        raise Untraceable(f"torch.fx cannot trace its forward: {_first_line(error)}") from error
    finally:
        for child, mode in modes:
            child.training = mode
    if seen:
        raise Untraceable(f"its forward {seen[0]}")
    if tracer.refused:
        raise Untraceable(f"torch.fx cannot trace its forward: {tracer.refused[0]}")
    if tracer.asked:
        raise Untraceable(f"its forward asks for the type of a value that it computed ({tracer.asked[0]})")
    if not same(before, after):
        raise Untraceable("its forward changes attributes")
    return Traced(graph, frozenset(names_read), globals_.names())


def required(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that a class's forward has to be given.

    Raises:
        Untraceable: it takes any number of them, some by keyword only, or none.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty]
    unnamed = [p.name for p in needed if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if unnamed:
        raise Untraceable(f"its forward takes *{unnamed[0]}")
    if not needed:
        raise Untraceable("its forward takes no tensor")
    return tuple(p.name for p in needed)


# What torch.fx and this module patch while they trace, they patch for all threads.
_LOCK = threading.RLock()


class _Value(fx.Proxy):
    """A stand-in whose in-place operators are in place in the graph; torch.fx.Proxy writes `x += y` down as `x = x + y`.

    Those of arguments have a Tensor's attributes; what a forward computes may be something else.
    """

    def __getattr__(self, name: str) -> Any:
        if self.node.op == "placeholder" and not hasattr(torch.Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return super().__getattr__(name)


@contextmanager
def _passing_for_tensors(asked: list[str]) -> Iterator[None]:
    """Have code outside of torch find arguments to be instances of Tensor, and note where it asks that of other values.

    By the name `isinstance` in Python alone: C++ would take what passes for a Tensor there for one.
    """

    def passing(value: Any, kinds: Any) -> bool:
        if type(value) is not _Value:
            return isinstance_(value, kinds)
        caller = sys._getframe(1)
        if _of_torch(caller) and caller.f_code is not torch.is_tensor.__code__:
            return isinstance_(value, kinds)
        if value.node.op != "placeholder":
            asked.append(f"line {caller.f_lineno} of {caller.f_code.co_name}")
        return issubclass(torch.Tensor, kinds)

    isinstance_ = builtins.isinstance
    builtins.isinstance = passing
    try:
        yield
    finally:
        builtins.isinstance = isinstance_


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"):
    setattr(_Value, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class Tracer(fx.Tracer):
    """Traces a forward with stand-ins for its required arguments alone: they would pass for True in tests of others."""

    proxy_buffer_attributes = True

    def __init__(self, inlined: Collection[int], names: tuple[str, ...]) -> None:
        super().__init__()
        self._inlined, self._names = inlined, names
        self._state: tuple[object, ...] = ()
        self.asked: list[str] = []
        self.refused: list[str] = []  # which code may catch
        self._thread = threading.get_ident()

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refused.append("control flow depends on a value")
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError as error:
            self.refused.append(_first_line(error))
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._inlined

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if not any(m is held for held in self.root.modules()):  # made by forward: it has no name, and goes with its call
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        self._state = _global_state()
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self._names)]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _global_state() != self._state:
            raise Untraceable("its forward runs a part under a context, such as torch.no_grad() or torch.autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


def _global_state() -> tuple[object, ...]:
    """What contexts change for the code in them."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *map(torch.is_autocast_enabled, kinds),
        *map(torch.get_autocast_dtype, kinds),
        torch.get_default_dtype(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
    )


_QUESTIONS: dict[Any, str] = {
    builtins.print: "prints",
    builtins.input: "reads input",
    torch.is_grad_enabled: "asks whether gradients are recorded",
    torch.is_inference_mode_enabled: "asks whether gradients are recorded",
    torch.is_autocast_enabled: "asks whether autocast is on",
    torch.get_autocast_dtype: "asks for autocast's dtype",
    torch.get_default_dtype: "asks for the default dtype",
    warnings.warn: "warns",
    **dict.fromkeys((time.time, time.perf_counter, time.monotonic, time.time_ns, time.perf_counter_ns), "reads the clock"),
}


_AUTOCAST = torch.amp.autocast_mode.__file__


@contextmanager
def _watching() -> Iterator[tuple[list[str], set[str], Globals]]:
    """What code does in the context that no graph shows, and the names that it reads."""
    seen: list[str] = []
    names: set[str] = set()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            if not _of_torch(frame) and isinstance(getattr(arg, "__self__", None), random.Random):
                seen.append("draws random numbers")
            try:
                question = _QUESTIONS.get(arg)
            except TypeError:  # a method of what has no hash
                return
            if question is not None and not _of_torch(frame) and frame.f_code.co_filename != __file__:
                seen.append(question)
        elif event == "call" and frame.f_globals is vars(logging):
            caller = frame.f_back
            if caller is not None and caller.f_globals is not frame.f_globals and not _of_torch(caller):
                seen.append("logs")
        elif event == "call" and not _of_torch(frame) and frame.f_code.co_filename != __file__:
            strings = {value for value in frame.f_code.co_consts if isinstance_(value, str)}  # of getattr and hasattr
            read = {*frame.f_code.co_names, *strings}
            globals_.add(frame.f_globals, read)
            names.update(read)
        elif event == "call" and frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            seen.append("checkpoints a part")
        elif event == "call" and frame.f_code.co_name == "__enter__" and _is_context(frame):
            seen.append("runs a part under a context, such as torch.no_grad() or torch.autocast")

    isinstance_ = builtins.isinstance
    globals_ = Globals()
    states = _random_states()
    previous = sys.getprofile()
    collects = gc.isenabled()
    with torch.random.fork_rng(), _Computed(seen):
        gc.disable()  # what finalizers and callbacks of the collector do is not the forward's
        sys.setprofile(watch)
        try:
            yield seen, names, globals_
        finally:
            if collects:
                gc.enable()
            sys.setprofile(previous if callable(previous) else None)
            if hasattr(previous, "enable"):  # cProfile's, which counts in C
                cast(Any, previous).enable()
            if globals_.changed():
                seen.append("changes what others see")
            if not _put_back(states):
                seen.append("draws random numbers")


def _is_context(entered: FrameType) -> bool:
    """Whether this `__enter__` of torch was called by the forward, or by torch's wrapper of a function."""
    caller = entered.f_back
    return _of_torch(entered) and (entered.f_code.co_filename == _AUTOCAST or (caller is not None and not _of_torch(caller)))


class _Computed(TorchDispatchMode):
    """Notes what is computed for real: stand-ins compute nothing, so that this did not come from an argument."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen.append(f"computes {func.overloadpacket} of no argument")
        raise Untraceable(f"its forward {self._seen[-1]}")  # before it changes one of the module's tensors


def _random_states() -> tuple[Any, ...]:
    """Of Python's generator and numpy's; torch's real draws are seen as operators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state(legacy=True)


def _put_back(states: tuple[Any, ...]) -> bool:
    """Undo what was drawn; whether nothing was."""
    now = _random_states()
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
    return now[0] == states[0] and _same_numpy(now[1], states[1])


def _same_numpy(now: Any, then: Any) -> bool:
    return then is None or (now[2:] == then[2:] and bool((now[1] == then[1]).all()))


def _of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
