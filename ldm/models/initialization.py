"""Networks that are built to be loaded: their first random weights are not drawn."""

from collections.abc import Callable, Mapping, Sequence

from torch.overrides import TorchFunctionMode


class SkippedInitialization(TorchFunctionMode):
    """While it is active, `torch.nn.init` does not write: new tensors have arbitrary values."""

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
