"""How a hook is put on a module, called, left out of copies, and seen by torch.compile.

Knows nothing about what hooks do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_compiling = torch.compiler.is_compiling  # a hook asks for every layer and token


class Hook:
    """A hook that a copy of the model, pickled or deep, does not inherit.

    Where torch.compile traces a pass, a hook runs outside the graph (with `fullgraph=True` the compiler says
    so), but for passes of one new token per row, which is how tokens are decoded: those stay one graph.
    """

    def __init__(
        self, function: Callable[..., Any], leading: tuple[Any, ...], decode: Callable[..., Any] | None = None
    ) -> None:
        self.function = function
        self.leading = leading
        self.decode = decode  # what `function` comes to for one new token per row; None if to nothing
        self.outside = torch.compiler.disable(function)

    def __call__(self, *args: Any) -> Any:
        if not _compiling():
            return self.function(*self.leading, *args)
        if _new_tokens(*args) > 1:
            return self.outside(*self.leading, *args)
        return None if self.decode is None else self.decode(*self.leading, *args)

    def __reduce__(self) -> Any:
        return _nothing, ()

    def __deepcopy__(self, memo: Any) -> Any:
        return _ignore


def _nothing() -> Any:
    return _ignore


def _ignore(*args: Any) -> None:
    """What a hook is in a copy."""


def _new_tokens(module: nn.Module, args: tuple[Any, ...], last: Any) -> int:
    """How many tokens per row pass a module: of its arguments, or of its output where `last` is that."""
    if type(last) is dict:
        named = (last.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        given = next((value for value in (*args[:1], *named) if value is not None), None)
    else:
        given = last if isinstance(last, Tensor) else last[0]
    return 1 if given is None else given.shape[1]


class Hooks:
    """Hooks on the modules of a model, which come off together."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def before(self, module: nn.Module, function: Callable[..., Any], *leading: Any, decode: Any = None) -> None:
        """Call ``function(*leading, module, args, kwargs)`` before the module."""
        hook = Hook(function, leading, decode)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, function: Callable[..., Any], *, always: bool = False) -> None:
        """Call ``function(module, args, output)`` after the module; `always`: after an exception, too."""
        self._handles.append(module.register_forward_hook(Hook(function, ()), always_call=always))

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            forget_compiled()
        self._handles.clear()


def forget_compiled() -> None:
    """Have torch.compile look at the hooks again: what it compiled before does not ask whether they changed,
    unless it was told to, and would leave the reduction out."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and getattr(dynamo.config, "skip_nnmodule_hook_guards", True):
        torch.compiler.reset()
