"""Do something right after a module's own hook, where callbacks have none: models that are built in ``setup``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["AfterHook"]


class AfterHook:
    """Stands in for a hook of a module until that was called.

    Args:
        pl_module: The module.
        hook: Name of the hook.
        action: What to do after it.
    """

    def __init__(self, pl_module: LightningModule, hook: str, action: Callable[[], object]) -> None:
        self._module, self._hook, self._action = pl_module, hook, action
        self._own = vars(pl_module).get(hook)
        functools.update_wrapper(self, getattr(pl_module, hook))  # Lightning looks at its code and its arguments
        setattr(pl_module, hook, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the hook, then act, once."""
        self.remove()
        result = getattr(self._module, self._hook)(*args, **kwargs)
        self._action()
        return result

    def remove(self) -> None:
        """Leave the module as it was."""
        if vars(self._module).get(self._hook) is not self:
            return
        if self._own is None:
            delattr(self._module, self._hook)
        else:
            setattr(self._module, self._hook, self._own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the hook of the copy of the module that is being made, which is that of its class."""
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        twin = memo.get(id(self._module))
        return None if twin is None else getattr(type(twin), self._hook).__get__(twin)
