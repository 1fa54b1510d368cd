"""Heat maps: what an explainer is (`base`), one method per file, and the driver of several.

This package has the name of the public function `gradeclip_ft.explain`. Python puts an imported
package in the place of a function of its name, so the package can be called, and is that function.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `gradeclip_ft.api.explain`."""
        return import_module("gradeclip_ft.api").explain(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
