"""What thinsight knows by name: rankers, metrics, searches, baselines, and whatever else a user may add to.

An item enters by one call from a file of this package, or by an entry point of another distribution. Knows nothing
about what the items are.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from .errors import BadInput

T = TypeVar("T")


class Registry(Generic[T]):
    """Items of one kind by name, in the order in which they entered.

    Args:
        kind: what an item is called in messages, such as "ranker".
        group: the entry-point group by which other distributions add items, such as "thinsight.rankers"; None: there is
            none. An entry point has the item's name, and names the item or a module that enters it. It is loaded when a
            name is asked for that is not known, or all names are. One that fails, or whose name is taken, is a warning
            that names it, and leaves the others as they are.
        builtin: modules that enter items when they are imported, which happens when the first name is asked for.
        code: the class or function that an item stands for, or its name, by which a reloaded module's is known again.
        key: the attribute that holds an item's name.
    """

    def __init__(
        self,
        kind: str,
        group: str | None = None,
        builtin: Sequence[str] = (),
        code: Callable[[T], Any] = lambda item: item,
        key: str = "name",
    ) -> None:
        self.kind, self._group, self._key = kind, group, key
        self._builtin, self._code = [*builtin], code
        self._items: dict[str, T] = {}

    def register(self, item: T, name: str | None = None) -> T:
        """Enter an item by its own name or the given one; also a class decorator.

        Raises:
            BadInput: the name is not a text that can be written on a command line, or is taken. The same item, as a
                reloaded module makes it again, takes its old place.
        """
        known_as: Any = getattr(item, self._key, None) if name is None else name
        if not isinstance(known_as, str) or not known_as.isprintable() or not known_as or set(known_as) & set(" ,:="):
            raise BadInput(
                f"{self.kind} name is {known_as!r}; make it a text without spaces, commas, colons and equal signs"
            )
        if known_as in self._items and self._place(self._items[known_as]) != self._place(item):
            place = self._place(self._items[known_as])
            raise BadInput(f"{self.kind} name {known_as!r} is taken by {place}; choose another name")
        self._items[known_as] = item
        return item

    def __getitem__(self, name: Any) -> T:
        """The item of that name.

        Raises:
            BadInput: there is none; the message lists the names, the nearest one first.
        """
        if name not in self:
            close = difflib.get_close_matches(str(name), self._items, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise BadInput(f"{self.kind} is {name!r}; {hint}choose one of {', '.join(self)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        self._load_builtin()
        if name not in self._items:
            self._load_plugins()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load_builtin()
        self._load_plugins()
        return iter(list(self._items))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def values(self) -> list[T]:
        """All items."""
        return [self._items[name] for name in self]

    def _place(self, item: T) -> str:
        if isinstance(named := self._code(item), str):
            return named
        made = self._class_of(item)
        return f"{made.__qualname__} of {made.__module__}"

    def _class_of(self, item: T) -> Any:
        """The class or function that an item stands for."""
        named = self._code(item)
        return named if hasattr(named, "__qualname__") else type(named)

    def _load_builtin(self) -> None:
        while self._builtin:
            module = self._builtin.pop(0)  # taken off first: it may ask for a name while it is imported
            import_module(module)
            for name in [name for name, item in self._items.items() if self._class_of(item).__module__ == module]:
                self._items[name] = self._items.pop(name)  # who imported it before its turn does not decide the order

    def _load_plugins(self) -> None:
        group, self._group = self._group, None
        for point in sorted(entry_points(group=group), key=str) if group else ():
            self._load_plugin(point)

    def _load_plugin(self, point: EntryPoint) -> None:
        whose = f"the {self.kind} {point.name!r} of {point.dist.name if point.dist else 'a package'}"
        try:
            found = point.load()
            if not isinstance(found, ModuleType) and getattr(found, self._key, None) == point.name:
                self.register(found)
        except Exception as error:  # another package's code may raise anything, and must not take ours down
            warnings.warn(f"{whose} cannot be loaded: {type(error).__name__}: {error}", stacklevel=2)
            return
        if point.name not in self._items:
            warnings.warn(f"{whose}: {point.value} enters no {self.kind} of that name", stacklevel=2)
