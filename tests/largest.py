"""The largest tensor that some work makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LargestTensor(torch.overrides.TorchFunctionMode):
    """While it is entered, keeps the element count of the largest tensor that any torch function returns."""

    elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out
