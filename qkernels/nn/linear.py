"""QLinear: `nn.Linear` on a packed quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels import _C, functional
from qkernels.formats import kernel_dtype_code
from qkernels.nn.carry import carry_over, why_not_quantizable, why_not_replaceable
from qkernels.nn.module import QModule
from qkernels.nn.ranges import add_range_buffers, set_range
from qkernels.nn.shared import SharedInput
from qkernels.nn.storage import quantize_weight
from qkernels.schemes import ACTIVATIONS, W8A8, Scheme

_DEFAULT_SCHEME = W8A8()


class QLinear(QModule):
    """`nn.Linear` with a quantized weight: y = x @ weight.T + bias.

    The weight is frozen; the bias is an ordinary parameter, and gradients flow to it and to x. Two
    buffers, None unless `set_input_transform` or `quantize_calibrated_` made them, change x before
    it meets the weight: x is multiplied by `x_premul`, and column i of the weight belongs to
    feature `k_perm[i]`. `epilogue` names the function of the result that the kernel computes too,
    "none" unless `fuse_` set it; `shared` says which layers compute together with this one.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a float bias.
        scheme: how the weight is stored and what the arithmetic is.
        device: "cpu", "cuda", or "meta" for a module that is filled by loading.
        dtype: of the bias, and of the float layer that `dequantize` gives; y has the dtype of x.

    Raises:
        TypeError: scheme is not a Scheme, or dtype is not floating.
        ValueError: integer sums over in_features could overflow.

    Example:
        >>> layer = qk.nn.QLinear(64, 32, scheme=qk.W4A16(group_size=32))
        >>> layer(torch.randn(8, 64)).shape
        torch.Size([8, 32])
    """

    ops = ("pack", "unpack", "linear")
    own_attributes = (*QModule.own_attributes, "shared")
    bias: nn.Parameter | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None
    x_premul: Tensor | None
    k_perm: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: Scheme = _DEFAULT_SCHEME,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, scheme, device, dtype)
        reason = why_too_long(in_features, scheme)
        if reason is not None:
            raise ValueError(f"QLinear: {reason}")
        self.in_features = in_features
        self.out_features = out_features
        self.epilogue = "none"
        self.shared: SharedInput | None = None
        device = self.packed.device
        made = nn.Parameter(torch.empty(out_features, device=device, dtype=self.dtype))
        self.register_parameter("bias", made if bias else None)
        add_range_buffers(self, scheme, device)
        self.register_buffer("x_premul", None)
        self.register_buffer("k_perm", None)
        self.reset_parameters()

    @classmethod
    @torch.inference_mode(False)  # what is made must be usable outside of it
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: Scheme = _DEFAULT_SCHEME,
        *,
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
    ) -> QLinear:
        """A quantized layer with the weight of a float one.

        It keeps the bias (the same parameter), the mode, the dtype and the hooks.

        Args:
            linear: an `nn.Linear` on the CPU or a GPU, where the new layer will be too.
            scheme: how to quantize it.
            x_scale: for a static scheme, the scale of x.
            x_zero_point: for a static asymmetric scheme, the int8 code of zero.

        Raises:
            TypeError: not an `nn.Linear`, or a subclass with a forward of its own.
            ValueError: the layer cannot be replaced or quantized, or the scheme needs x_scale.

        Example:
            >>> qk.nn.QLinear.from_float(nn.Linear(64, 32), qk.W8A8()).in_features
            64
        """
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"QLinear.from_float: got {type(linear).__name__}; expected an nn.Linear, with "
                "the forward of nn.Linear"
            )
        reason = (
            why_not_replaceable(linear)
            or why_not_quantizable(linear.weight)
            or why_too_long(linear.in_features, scheme)
        )
        if reason is not None:
            raise ValueError(f"QLinear.from_float: the layer cannot be quantized: {reason}")
        new = cls.shell(linear, scheme)
        set_range(new, x_scale, x_zero_point)
        new.packed = new.packing.parameter(quantize_weight(linear.weight, scheme))
        return new

    @classmethod
    def shell(cls, linear: nn.Linear, scheme: Scheme) -> QLinear:
        """Everything of `from_float` but the weight: `packed` is on the meta device.

        Args:
            linear: an `nn.Linear` on any device.
            scheme: how its weight is going to be quantized.
        """
        has_bias = linear.bias is not None
        sizes = (linear.in_features, linear.out_features, has_bias)
        new = cls(*sizes, scheme, device="meta", dtype=linear.weight.dtype)
        new.bias = linear.bias
        for name, buffer in new._buffers.items():
            if buffer is not None:
                new._buffers[name] = torch.empty_like(buffer, device=linear.weight.device)
        carry_over(linear, new)
        return new

    def set_input_transform(self, x_premul: Tensor | None, k_perm: Tensor | None) -> None:
        """Have x multiplied, then its features reordered, before they meet the weight.

        The weight stays as it is, so it must have been made for it: column i stands for the float
        weight's column `k_perm[i]` divided by `x_premul[k_perm[i]]`.

        Args:
            x_premul: float [in_features], or None to leave x as it is.
            k_perm: integers [in_features], each of 0 … in_features - 1 once, or None for their own
                order.

        Raises:
            ValueError: a wrong shape, or k_perm is no permutation. Nothing is changed then.

        Example:
            >>> layer = qk.nn.QLinear(4, 2, scheme=qk.W8A16())
            >>> expected = layer.dequantize().weight * 2
            >>> layer.set_input_transform(torch.full((4,), 2.0), None)
            >>> torch.equal(layer.dequantize().weight, expected)
            True
        """
        for name, given in (("x_premul", x_premul), ("k_perm", k_perm)):
            if given is not None and given.shape != (self.in_features,):
                raise ValueError(
                    f"{self._label()}: {name} has shape {tuple(given.shape)}; expected "
                    f"({self.in_features},), one value for each feature of x"
                )
        if k_perm is not None:
            every = torch.arange(self.in_features, device=k_perm.device)
            if not torch.equal(k_perm.sort().values, every):
                raise ValueError(
                    f"{self._label()}: k_perm is no permutation; expected each feature from 0 to "
                    f"{self.in_features - 1} once"
                )
        self.shared = None
        for name, given, dtype in (
            ("x_premul", x_premul, torch.float32),
            ("k_perm", k_perm, torch.int64),
        ):
            value = None if given is None else given.to(self.packed.device, dtype)
            self._buffers[name] = value

    def float_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float matrix that the layer computes with, what is done to x included.

        Args:
            dtype: of the result, by default the module's.
        """
        if not self.input_transforms:
            return super().float_weight(dtype)
        weight = super().float_weight(torch.float32)
        if self.k_perm is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.k_perm, weight)
        if self.x_premul is not None:
            weight *= self.x_premul
        return weight.to(self.dtype if dtype is None else dtype)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantize a matrix as this module's weight, in place.

        Args:
            weight: float [out_features, in_features], the weight that the layer is to compute with.
        """
        super().set_weight(self.as_stored(weight))

    def as_stored(self, weight: Tensor) -> Tensor:
        """The matrix that is quantized, for a weight that the layer is to compute with.

        Args:
            weight: float [out_features, in_features].
        """
        if self.x_premul is not None:
            weight = weight / self.x_premul
        return weight if self.k_perm is None else weight[:, self.k_perm]

    def optional_targets(self) -> dict[str, Tensor]:
        size, device = self.in_features, self.packed.device
        return {
            "x_premul": torch.empty(size, dtype=torch.float32, device=device),
            "k_perm": torch.empty(size, dtype=torch.int64, device=device),
        }

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does, and quantize the weight."""
        like = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.packed.device,
            dtype=self.dtype,
        )
        self.set_weight(like.weight)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(like.bias)

    def dequantize(self) -> nn.Linear:
        """The float layer that this one computes with: it keeps bias, mode, dtype and hooks.

        Raises:
            ValueError: an activation function is fused into this one, which no float layer has.

        Example:
            >>> qk.nn.QLinear(8, 4).dequantize()
            Linear(in_features=8, out_features=4, bias=True)
        """
        self.check_not_fused("dequantize")
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(self.float_weight())
        new.bias = self.bias  # type: ignore[assignment]
        carry_over(self, new, self.own_attributes)
        return new

    def forward(self, x: Tensor) -> Tensor:
        # Attributes of a module cost 50 ns each to look up, parameters microseconds. Replicas of
        # nn.DataParallel have their parameters among the plain attributes.
        own = self.__dict__
        scheme, buffers = own["scheme"], own["_buffers"]
        parameters = own["_parameters"] if "packed" in own["_parameters"] else own
        shared = own.get("shared")
        if shared is not None and not functional.is_traced():
            y: Tensor | None = shared.result(self, x)
            if y is not None:
                return y
        try:
            return functional.linear_by_codes(
                x,
                parameters["packed"],
                parameters["bias"],
                buffers["x_scale"],
                buffers["x_zero_point"],
                buffers["x_premul"],
                buffers["k_perm"],
                own["layout"],
                own["in_features"],
                own["out_features"],
                scheme.group_size,
                ACTIVATIONS[scheme.activation],
                functional.EPILOGUES[own.get("epilogue", "none")],
            )
        except RuntimeError as error:
            raise self._named(error) from None

    def _keeps_dtype(self, tensor: Tensor) -> bool:
        return super()._keeps_dtype(tensor) or any(tensor is b for b in self._buffers.values())

    @property
    def kernel(self) -> str:
        """The kernel that one row of input runs, or why none can."""
        if self.packed.device.type not in ("cpu", "cuda"):
            return f"none on {self.packed.device.type}"
        try:
            return self.kernel_for(1, self.dtype)
        except RuntimeError as error:
            return f"none ({error})"

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel that so many rows of inputs of a dtype run.

        Args:
            rows: of the input, all dimensions but the last taken together.
            dtype: of the input.

        Raises:
            RuntimeError: QKERNELS_ISA names an instruction set that the machine lacks.

        Example:
            >>> qk.nn.QLinear(64, 32).kernel_for(8, torch.float32).startswith("matmul_w8a8_")
            True
        """
        if self.packed.is_cuda:
            gpu = torch.cuda.get_device_properties(self.packed.device)
            hopper = gpu.major == 9 and _C.build_info()["hopper"]
            return self.cuda_kernel_for(rows, dtype, gpu.multi_processor_count, hopper)
        # Factors for x are applied in float32.
        code = 0 if self.x_premul is not None else kernel_dtype_code(dtype)
        return _C.kernel_name(self.layout, self.scheme.activation_code, rows, code)

    def cuda_kernel_for(
        self, rows: int, dtype: torch.dtype, multiprocessors: int, hopper: bool = False
    ) -> str:
        """The same on a GPU, which need not be there.

        Args:
            rows: of the input, all dimensions but the last taken together.
            dtype: of the input.
            multiprocessors: of the GPU.
            hopper: whether it runs code of sm_90a, and the build has it.

        Example:
            >>> layer = qk.nn.QLinear(4096, 4096, scheme=qk.W4A16(group_size=128))
            >>> layer.cuda_kernel_for(1, torch.bfloat16, 132)
            'cuda gemv'
            >>> layer.cuda_kernel_for(512, torch.bfloat16, 132)
            'dequantize + matmul'
        """
        return _C.cuda_kernel_name(
            self.scheme.layout_on("cuda"),
            self.scheme.activation_code,
            rows,
            self.in_features,
            self.out_features,
            self.scheme.group_size,
            kernel_dtype_code(dtype),
            multiprocessors,
            hopper,
        )

    @property
    def shareable(self) -> bool:
        """Whether all that is done to x follows from x, so that layers can share it."""
        return not self.scheme.static and not self.input_transforms

    @property
    def input_transforms(self) -> tuple[str, ...]:
        """Names of the buffers that change x before it meets the weight."""
        return tuple(n for n in ("x_premul", "k_perm") if self._buffers[n] is not None)

    def extra_repr(self) -> str:
        transforms = "".join(f", {name}" for name in self.input_transforms)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, kernel={self.kernel}{transforms}"
            f"{self.epilogue_text}"
        )


def why_too_long(in_features: int, scheme: Scheme) -> str | None:
    """Why integer sums over a row could overflow, or None.

    Args:
        in_features: length of a row.
        scheme: says whether sums are integers and how long a group is.
    """
    length = in_features if scheme.group_size == -1 else min(in_features, scheme.group_size)
    limit = _C.longest_sum(scheme.layout)
    if scheme.activation == "float" or length <= limit:
        return None
    return (
        f"{scheme} sums {length} integer products in int32, which could overflow (the limit is "
        f"{limit}); use a group_size up to the limit, or a scheme with float activations"
    )
