"""What torch must know of the ops beside their kernels: fakes, gradients, autocast.

The schemas are in csrc/ops/schema.cpp. A fake says the shape and dtype of a result without
computing it, which is what ``torch.compile`` and ``torch.export`` trace with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkernels import _C

_FORMATS = _C.formats()
_SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("qkernels", "IMPL")


def _storage(format: int) -> torch.dtype:
    dtype = getattr(torch, _FORMATS[format]["storage"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _stored_size(format: int, features: int) -> int:
    return (features + 1) // 2 if _FORMATS[format]["bits"] == 4 else features


def _scale_shape(shape: torch.Size, group_size: int | None) -> list[int]:
    if group_size is None:
        return []
    groups = 1 if group_size == -1 else (shape[-1] + group_size - 1) // group_size
    return [*shape[:-1], groups]


def check_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """A fake also runs for a mix of CPU and meta tensors, which no kernel can compute."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"qkernels::{op}: {name} is on {tensor.device} but the first argument is on "
                f"{first.device}; move them to one device"
            )


def refuse_forward_mode(op: str) -> None:
    """Torch gives an op without a forward-mode formula the derivative 0, without a word.

    Args:
        op: for the message.

    Raises:
        RuntimeError: torch.func.jvp, or what is built on it, is at work.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"qkernels::{op} has no forward-mode derivative (torch.func.jvp, jacfwd, dual "
            "numbers); use backward(), or the float model"
        )


# ---- quantize, dequantize ------------------------------------------------------------------------


@torch.library.register_fake("qkernels::quantize")
def _quantize(
    x: Tensor,
    format: int,
    group_size: int | None = -1,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale_shape = _scale_shape(x.shape, group_size)
    data = [*x.shape[:-1], _stored_size(format, x.shape[-1])]
    return (
        x.new_empty(data, dtype=_storage(format)),
        x.new_empty(scale_shape, dtype=scale_dtype or torch.float32),
        x.new_empty([0] if symmetric else scale_shape, dtype=_storage(format)),
    )


@torch.library.register_fake("qkernels::quantize.out")
def _quantize_out(x: Tensor, *args: Any, **outs: Tensor) -> None:
    check_device("quantize", x, **outs)


@torch.library.register_fake("qkernels::quantize_with")
def _quantize_with(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: int, group_size: int | None = -1
) -> Tensor:
    check_device("quantize_with", x, scale=scale, zero_point=zero_point)
    data = [*x.shape[:-1], _stored_size(format, x.shape[-1])]
    return x.new_empty(data, dtype=_storage(format))


@torch.library.register_fake("qkernels::quantize_with.out")
def _quantize_with_out(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *args: Any, **outs: Tensor
) -> None:
    check_device("quantize_with", x, scale=scale, zero_point=zero_point, **outs)


@torch.library.register_fake("qkernels::dequantize")
def _dequantize(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: int,
    group_size: int | None,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_device("dequantize", data, scale=scale, zero_point=zero_point)
    return data.new_empty([*data.shape[:-1], features], dtype=dtype)


@torch.library.register_fake("qkernels::dequantize.out")
def _dequantize_out(
    data: Tensor, scale: Tensor, zero_point: Tensor | None, *args: Any, **outs: Tensor
) -> None:
    check_device("dequantize", data, scale=scale, zero_point=zero_point, **outs)


def _count_writes(name: str) -> None:
    """Let autograd know that an ``out=`` op writes, as it does of torch's own."""
    op = getattr(torch.ops.qkernels, name).out
    below = torch._C._after_ADInplaceOrView_keyset

    def write(keys: torch._C.DispatchKeySet, *args: Any, **outs: Tensor) -> None:
        for out, tensor in outs.items():
            if tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"qkernels::{name}: {out} requires grad, which nothing could give it; pass "
                    f"{out}.detach(), or call within torch.no_grad()"
                )
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & below, *args, **outs)
        torch.autograd.graph.increment_version(tuple(outs.values()))

    _library.impl(f"{name}.out", write, "ADInplaceOrView", with_keyset=True)


for _name in ("quantize", "quantize_with", "dequantize"):
    _count_writes(_name)


# ---- fake_quantize -------------------------------------------------------------------------------


@torch.library.register_fake("qkernels::fake_quantize")
def _fake_quantize(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("qkernels::fake_quantize_with")
def _fake_quantize_with(x: Tensor, scale: Tensor, zero_point: Tensor | None, *args: Any) -> Tensor:
    check_device("fake_quantize_with", x, scale=scale, zero_point=zero_point)
    return x.new_empty(x.shape)


@torch.library.register_fake("qkernels::fake_quantize_backward")
def _fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_device("fake_quantize_backward", grad, x=x, scale=scale, zero_point=zero_point)
    zero_shape = [0] if zero_point is None or zero_point.numel() == 0 else zero_point.shape
    wide = torch.float32
    return (
        x.new_empty(x.shape),
        scale.new_empty(scale.shape, dtype=wide),
        scale.new_empty(zero_shape, dtype=wide),
    )


def _fake_straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A scale that follows the data leaves nothing outside of its range, so all passes."""
    return grad, None, None, None, None


def _save_fake_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.format, ctx.group_size = inputs
    ctx.save_for_backward(*tensors)


def _fake_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    wants_x, wants_scale, wants_zero_point, *_ = ctx.needs_input_grad
    grad_x, grad_scale, grad_zero_point = torch.ops.qkernels.fake_quantize_backward(
        grad, x, scale, zero_point, ctx.format, ctx.group_size
    )
    return (
        grad_x if wants_x else None,
        grad_scale.to(scale.dtype) if wants_scale else None,
        # Without rows there is no telling a zero point from none, so the shape may be another.
        grad_zero_point.view_as(zero_point) if wants_zero_point else None,
        None,
        None,
    )


torch.library.register_autograd("qkernels::fake_quantize", _fake_straight_through)
torch.library.register_autograd(
    "qkernels::fake_quantize_with", _fake_gradients, setup_context=_save_fake_inputs
)


# ---- Packed weights ------------------------------------------------------------------------------


@torch.library.register_fake("qkernels::pack")
def _pack(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    layout: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    check_device("pack", data, scale=scale, zero_point=zero_point)
    blocks = (data.shape[0] + _C.BLOCK_ROWS - 1) // _C.BLOCK_ROWS
    row = _C.block_bytes(layout, in_features, group_size)
    return data.new_empty([blocks, row], dtype=torch.uint8)


@torch.library.register_fake("qkernels::unpack")
def unpack(
    packed: Tensor, layout: int, in_features: int, out_features: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fake of `unpack`, and what that of `unpack_conv` is made of."""
    what = _C.describe_layout(layout)
    row = next(row for row in _FORMATS if row["name"] == what["format"])
    storage = _storage(row["code"])
    groups = 1 if group_size == -1 else (in_features + group_size - 1) // group_size
    return (
        packed.new_empty([out_features, _stored_size(row["code"], in_features)], dtype=storage),
        packed.new_empty([out_features, groups], dtype=_SCALE_DTYPES[what["scale_dtype"]]),
        packed.new_empty([0] if what["symmetric"] else [out_features, groups], dtype=storage),
    )


@torch.library.register_fake("qkernels::embedding")
def _embedding(
    indices: Tensor,
    packed: Tensor,
    layout: int,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    check_device("embedding", indices, packed=packed)
    return packed.new_empty([*indices.shape, embedding_dim], dtype=dtype)


# ---- Matmul --------------------------------------------------------------------------------------


@torch.library.register_fake("qkernels::int_mm")
def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    check_device("int_mm", a, b=b)
    return a.new_empty([a.shape[0], b.shape[1]], dtype=torch.int32)


@torch.library.register_fake("qkernels::linear")
@torch.library.register_fake("qkernels::linear_differentiable")
def _linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    x_premul: Tensor | None,
    k_perm: Tensor | None,
    layout: int,
    in_features: int,
    out_features: int,
    group_size: int,
    activation: int,
    epilogue: int,
) -> Tensor:
    check_device(
        "linear",
        x,
        packed=packed,
        bias=bias,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        x_premul=x_premul,
        k_perm=k_perm,
    )
    torch._check(
        x.shape[-1] == in_features,
        lambda: (
            f"qkernels::linear: x has {x.shape[-1]} features but the weight has "
            f"in_features={in_features}; pass x of shape (..., {in_features})"
        ),
    )
    return x.new_empty([*x.shape[:-1], out_features])


@torch.library.register_fake("qkernels::linear_shared")
def _linear_shared(
    x: Tensor,
    packed: list[Tensor],
    bias: list[Tensor | None],
    layout: int,
    in_features: int,
    out_features: list[int],
    *args: Any,
) -> list[Tensor]:
    for i, (weight, its_bias) in enumerate(zip(packed, bias, strict=True)):
        others = {f"packed[{i}]": weight, f"bias[{i}]": its_bias}
        check_device("linear_shared", x, **others)
    torch._check(
        x.shape[-1] == in_features,
        lambda: (
            f"qkernels::linear_shared: x has {x.shape[-1]} features but the weights have "
            f"in_features={in_features}; pass x of shape (..., {in_features})"
        ),
    )
    return [x.new_empty([*x.shape[:-1], n]) for n in out_features]


@torch.library.register_fake("qkernels::linear_backward_input")
def _linear_backward_input(
    grad: Tensor,
    packed: Tensor,
    layout: int,
    in_features: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    check_device("linear_backward_input", grad, packed=packed)
    return grad.new_empty([*grad.shape[:-1], in_features])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, _, _, premul, perm, *sizes, _activation, epilogue = inputs
    if epilogue != 0:
        raise RuntimeError(
            f"qkernels::linear_differentiable: epilogue must be 0 (none), got {epilogue}; apply "
            "the activation function to the result, so that torch differentiates it"
        )
    ctx.save_for_backward(packed, premul, perm)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; quantizing x counts as the identity (straight-through)."""
    packed, premul, perm = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qkernels.linear_backward_input(grad, packed, *ctx.sizes)
        if perm is not None:
            grad_x = torch.zeros_like(grad_x).index_add(-1, perm, grad_x)
        if premul is not None:
            grad_x = (grad_x * premul).to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *[None] * 10


torch.library.register_autograd(
    "qkernels::linear_differentiable", _linear_backward, setup_context=_save_for_backward
)

# ---- Autocast ------------------------------------------------------------------------------------
# Only x is cast. torch.library.register_autocast casts every float argument, and a scale in
# bfloat16 is another scale.


def register_autocast(name: str, casts: int = 1) -> None:
    """Let autocast cast the first arguments of an op.

    Args:
        name: of the op.
        casts: how many of its arguments are cast.
    """
    op = getattr(torch.ops.qkernels, name).default

    def casting(device: str, keys: torch._C.DispatchKeySet) -> Callable[..., Any]:
        def cast_first(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [x.to(dtype) if x.dtype in _AUTOCAST_DTYPES else x for x in args[:casts]]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*cast, *args[casts:])

        return cast_first

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        register_kernel(name, casting(device, keys), key)


def register_kernel(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Give an op a kernel in Python.

    Args:
        name: of the op.
        kernel: takes the op's arguments.
        key: torch's dispatch key, such as "CUDA".
    """
    _library.impl(name, kernel, key)


for _name in ("linear", "linear_shared", "linear_differentiable"):
    register_autocast(_name)
