"""Bytes of a model: every storage once, however many names and views lead to it."""

from __future__ import annotations

from torch import Tensor, nn


def module_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by module name, each storage counted where it comes first.

    Weights that torch.ao's modules keep in script objects are counted too. A module that only
    shares storage with earlier ones (tied weights) has 0.

    Args:
        model: any module.

    Returns:
        Bytes for every name of `model.named_modules()`; their sum is the model's size.

    Example:
        >>> module_bytes(nn.Linear(4, 2, bias=False))
        {'': 32}
    """
    seen: set[tuple[str, int]] = set()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        sizes[name] = _script_object_bytes(module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            storage = tensor.untyped_storage()
            # A meta tensor has no address, so its storage object stands for itself.
            key = (str(tensor.device), storage.data_ptr() or storage._cdata)
            if key not in seen:
                seen.add(key)
                sizes[name] += storage.nbytes()
    return sizes


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, each storage counted once.

    Args:
        model: any module.

    Example:
        >>> model_bytes(nn.Linear(4, 2, bias=False))
        32
    """
    return sum(module_bytes(model).values())


def bytes_under(sizes: dict[str, int], name: str) -> int:
    """Bytes of a module and everything below it, from the result of `module_bytes`."""
    return sum(size for key, size in sizes.items() if key == name or key.startswith(f"{name}."))


def _script_object_bytes(module: nn.Module) -> int:
    """Bytes of a torch.ao `*PackedParams`, whose tensors are copies made on request."""
    packed, unpack = getattr(module, "_packed_params", None), getattr(module, "_weight_bias", None)
    if packed is None or isinstance(packed, nn.Module) or not callable(unpack):
        return 0
    return sum(t.numel() * t.element_size() for t in unpack() if isinstance(t, Tensor))
