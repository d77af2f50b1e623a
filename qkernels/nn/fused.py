"""Activation functions that layers compute with their result, and what stands in their place."""

from __future__ import annotations

from torch import nn

from qkernels.nn.module import QModule

# By class: another class may compute something else.
_OF_TORCH: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}
# Those of transformers by name, which is not imported for it. All of the tanh forms compute one
# function, in other orders of rounding.
_TRANSFORMERS = "transformers.activations"
_OF_TRANSFORMERS = {
    "AccurateGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
}


class FusedActivation(nn.Identity):
    """Stands where an activation function was that the layer before it computes now.

    Args:
        original: the module that was here; `unfuse_` puts it back.
        layer: the layer that computes it.
    """

    def __init__(self, original: nn.Module, layer: QModule) -> None:
        super().__init__()
        # Not as children: what is below this module in the model's eyes is nothing.
        self.__dict__["original"] = original
        self.__dict__["layer"] = layer
        self.train(original.training)

    original: nn.Module
    layer: QModule

    def extra_repr(self) -> str:
        return type(self.original).__name__


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch's or transformers' activation functions, without tensors."""
    inside = type(module).__module__ in ("torch.nn.modules.activation", _TRANSFORMERS)
    return inside and not (module._parameters or module._buffers or module._modules)


def epilogue_of(module: nn.Module) -> str | None:
    """The name that kernels know a module's function by, or None.

    Args:
        module: any module.

    Example:
        >>> epilogue_of(nn.GELU("tanh")), epilogue_of(nn.Tanh())
        ('gelu_tanh', None)
    """
    kind = type(module)
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if kind.__module__ == _TRANSFORMERS:
        return _OF_TRANSFORMERS.get(kind.__name__)
    return _OF_TORCH.get(kind)
