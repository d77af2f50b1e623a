"""The graph of a lowered model, from a captured graph and a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkernels.calibration import Int8Range
from qkernels.lowering.names import Names
from qkernels.lowering.nodes import (
    COPYING,
    arguments,
    epilogue_of,
    numbers,
    op_of,
    stored,
    value_of,
)
from qkernels.lowering.plan import Plan
from qkernels.lowering.units import Unit
from qkernels.nn.conv import weight_matrix
from qkernels.nn.int8 import (
    Codes,
    Dequantize,
    Int8AdaptiveAvgPool,
    Int8Add,
    Int8AvgPool,
    Int8Concat,
    Int8Conv,
    Int8Lookup,
    Int8MaxPool,
    Int8Module,
    Quantize,
)
from qkernels.nn.storage import quantize_weight
from qkernels.plan import tensor_key
from qkernels.schemes import Scheme

_ATEN = torch.ops.aten
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Emitter:
    """Builds the graph node by node; `graph`, `modules` and `tensors` are the result.

    Args:
        module: the captured model.
        plan: what becomes of each node.
        ranges: of the values that are quantized.
        scheme: static W8A8.
        names: gives each new module its name.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plan: Plan,
        ranges: Mapping[fx.Node, Int8Range],
        scheme: Scheme,
        names: Names,
    ) -> None:
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.name_of: dict[fx.Node, str] = {}  # new modules by the node whose value they give
        self._old = module
        self._plan = plan
        self._scheme = scheme
        self._names = names
        self._quantizers = {node: _codes(found, scheme) for node, found in ranges.items()}
        self._float: dict[fx.Node, fx.Node] = {}
        self._codes: dict[fx.Node, fx.Node] = {}
        self._last: dict[fx.Node, fx.Node] = {}  # float images with channels innermost
        self._packed: dict[object, nn.Parameter] = {}
        self._readers = plan.float_readers()

    def run(self) -> None:
        """Emit everything."""
        for node in self._old.graph.nodes:
            if node in self._plan.inside:
                continue
            if node in self._plan.units:
                self._unit(self._plan.units[node])
            elif node in self._plan.kinds:
                getattr(self, "_" + self._plan.kinds[node])(node)
            elif node.op != "get_attr":  # tensors come where they are read
                self._copy(node)
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        self.graph.lint()
        called = {node.target for node in self.graph.nodes}
        self.modules = {name: m for name, m in self.modules.items() if name in called}
        self.tensors = {name: t for name, t in self.tensors.items() if name in called}

    # ---- Values -----------------------------------------------------------------------------

    def _quantizer(self, node: fx.Node) -> Codes:
        return self._quantizers[self._plan.quantizer.get(node, node)]

    def _as_float(self, node: Any) -> Any:
        """The new node of an old one's float value, or whatever else it gives."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._float:
            if node.op == "get_attr":
                self._float[node] = self._tensor(node)
            else:
                value = value_of(node)
                assert value is not None
                settings = {"dtype": _text(value.dtype)}
                codes = {"x": self._quantizer(node)}
                made = self._call(node, Dequantize(settings, codes), [self._codes[node]], "float")
                self._float[node] = made
        return self._float[node]

    def _as_codes(self, node: fx.Node) -> fx.Node:
        if node not in self._codes:
            codes = {"y": self._quantizer(node)}
            made = self._call(node, Quantize({}, codes), [self._as_float(node)], "codes")
            self._codes[node] = made
        return self._codes[node]

    def _any(self, node: Any) -> Any:
        """A new node for an old one, for ops that read sizes only."""
        if not isinstance(node, fx.Node):
            return node
        return self._codes[node] if node in self._codes else self._as_float(node)

    def _tensor(self, node: fx.Node) -> fx.Node:
        value = stored(self._old, node)
        name = self._names.of_tensor(str(node.target))
        if name not in self.tensors:
            copy = value.detach().clone()
            is_parameter = isinstance(value, nn.Parameter)
            # The lowered model is for inference, and what it holds is its own.
            kept = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
            self.tensors[name] = kept
        return self.graph.create_node("get_attr", name)

    # ---- Nodes ------------------------------------------------------------------------------

    def _call(
        self,
        node: fx.Node,
        module: nn.Module,
        args: list[fx.Node],
        suffix: str = "",
        named_after: fx.Node | None = None,
    ) -> fx.Node:
        name = self._names.of_module(named_after or node, suffix)
        self.modules[name] = module
        if not suffix:
            self.name_of[node] = name
        return self.graph.create_node("call_module", name, tuple(args), {})

    def _give(self, node: fx.Node, made: fx.Node) -> None:
        """Note what an integer op gave: codes if something reads them, or float."""
        (self._codes if node in self._plan.codes else self._float)[node] = made

    def _copy(self, node: fx.Node) -> None:
        value_only = op_of(node) != "aten::sym_size"
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), self._as_float if value_only else self._any
        )
        target = _order_free(node.target)
        self._float[node] = self.graph.create_node(node.op, target, args, kwargs, node.name)

    def _unit(self, unit: Unit) -> None:
        node, plan = unit.result, self._plan
        codes = {}
        if unit.x in plan.codes or self._readers.get(unit.x, 0) > 1:
            x = self._as_codes(unit.x)
        else:
            x = self._as_float(unit.x)  # the op quantizes it
            x = x if unit.linear else self._channels_last(unit.x, x)
        codes["x"] = self._quantizer(unit.x)
        args = [x]
        if unit.residual is not None:
            if unit.residual in plan.codes:
                args.append(self._as_codes(unit.residual))
                codes["residual"] = self._quantizer(unit.residual)
            else:
                args.append(self._as_float(unit.residual))
        if node in plan.codes:
            codes["y"] = self._quantizer(node)
        value = value_of(node)
        assert value is not None
        settings = {
            "in_channels": unit.in_channels,
            "out_channels": unit.out_channels,
            "kernel_size": list(unit.weight.shape[2:]),
            "stride": unit.stride,
            "padding": unit.padding,
            "dilation": unit.dilation,
            "groups": unit.groups,
            "transposed": unit.transposed,
            "linear": unit.linear,
            "epilogue": unit.epilogue,
            "bias": unit.bias is not None,
            "dtype": _text(value.dtype),
        }
        layer = Int8Conv(settings, codes, self._scheme, "meta")
        # Calls of one layer share its weight, unless a BatchNorm changed it.
        key = (tensor_key(unit.weight), unit.transposed, unit.groups)
        if key not in self._packed:
            matrix = weight_matrix(unit.weight.detach(), unit.transposed, unit.groups)
            weight = quantize_weight(matrix, self._scheme)
            self._packed[key] = layer.packing.parameter(weight)
        layer.packed = self._packed[key]
        if unit.bias is not None:
            bias = unit.bias.detach().float().clone()
            layer.bias = nn.Parameter(bias, requires_grad=False)
        self._give(node, self._call(node, layer, args, named_after=unit.head))

    def _channels_last(self, old: fx.Node, x: fx.Node) -> fx.Node:
        value = value_of(old)
        order = _CHANNELS_LAST.get(value.dim() if value is not None else 0)
        if order is None:
            return x
        if old not in self._last:
            self._last[old] = self.graph.call_function(
                _ATEN.contiguous.default, (x,), {"memory_format": order}
            )
        return self._last[old]

    def _move(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if op_of(node) in COPYING:  # nothing changes codes in place
            self._codes[node] = self._codes[source]
            return
        rest, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), self._as_float)
        args = (self._codes[source], *rest)
        target = _order_free(node.target)
        self._codes[node] = self.graph.create_node(node.op, target, args, kwargs, node.name)

    def _zeros(self, node: fx.Node) -> None:
        given = arguments(node)
        zero = self._quantizer(node).zero_point
        value = 0 if zero is None else int(zero)
        args = (self._codes[given["self"]], given["pad"], value)
        self._codes[node] = self.graph.call_function(_ATEN.constant_pad_nd.default, args)

    def _nearest(self, node: fx.Node) -> None:
        # torch repeats bytes, though not signed ones.
        unsigned = self.graph.call_function(
            _ATEN.view.dtype,
            (self._codes[node.args[0]], torch.uint8),  # type: ignore[index]
        )
        rest, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), self._as_float)
        larger = self.graph.create_node(node.op, node.target, (unsigned, *rest), kwargs)
        self._codes[node] = self.graph.call_function(_ATEN.view.dtype, (larger, torch.int8))

    def _max_pool(self, node: fx.Node) -> None:
        x, settings = self._pool(node)
        self._codes[node] = self._call(node, Int8MaxPool(settings, {}), [self._codes[x]])

    def _pool(self, node: fx.Node) -> tuple[fx.Node, dict[str, Any]]:
        """What a pooling reads, and its sizes, one for each dimension."""
        given = arguments(node)
        x = given.pop("self")
        value = value_of(x)
        assert value is not None
        dims = value.dim() - 2
        for key in ("kernel_size", "stride", "padding", "dilation", "output_size"):
            if key in given:
                given[key] = numbers(given[key] or given["kernel_size"], dims)
        return x, given

    def _avg_pool(self, node: fx.Node) -> None:
        x, settings = self._pool(node)
        settings.setdefault("divisor_override", None)
        self._reduce(node, x, Int8AvgPool, settings)

    def _adaptive_avg_pool(self, node: fx.Node) -> None:
        x, settings = self._pool(node)
        self._reduce(node, x, Int8AdaptiveAvgPool, settings)

    def _mean(self, node: fx.Node) -> None:
        given = arguments(node)
        x = given["self"]
        value = value_of(x)
        assert value is not None
        ones = [1] * (value.dim() - 2)
        self._reduce(node, x, Int8AdaptiveAvgPool, {"output_size": ones})
        if not given["keepdim"]:
            spatial = list(range(2, value.dim()))
            there = self._codes if node in self._plan.codes else self._float
            there[node] = self.graph.call_function(_ATEN.squeeze.dims, (there[node], spatial))

    def _reduce(
        self, node: fx.Node, x: fx.Node, kind: type[Int8Module], settings: dict[str, Any]
    ) -> None:
        codes = {"x": self._quantizer(x), **self._result_codes(node)}
        settings["dtype"] = self._result_dtype(node)
        self._give(node, self._call(node, kind(settings, codes), [self._codes[x]]))

    def _result_codes(self, node: fx.Node) -> dict[str, Codes]:
        return {"y": self._quantizer(node)} if node in self._plan.codes else {}

    def _result_dtype(self, node: fx.Node) -> str:
        value = value_of(node)
        assert value is not None
        return _text(value.dtype)

    def _add(self, node: fx.Node) -> None:
        add = next((n for n, by in self._plan.inside.items() if by is node), node)
        epilogue = "none" if add is node else epilogue_of(node)
        given = arguments(add)
        a, b = given["self"], given["other"]
        codes = {"a": self._quantizer(a), "b": self._quantizer(b), **self._result_codes(node)}
        settings = {"epilogue": epilogue, "dtype": self._result_dtype(node)}
        made = self._call(node, Int8Add(settings, codes), [self._codes[a], self._codes[b]])
        self._give(node, made)

    def _concat(self, node: fx.Node) -> None:
        given = arguments(node)
        xs = list(given["tensors"])
        found = [self._quantizer(x) for x in xs]
        zeros = [codes.zero_point for codes in found if codes.zero_point is not None]
        x_codes = Codes(
            torch.stack([codes.scale for codes in found]), torch.stack(zeros) if zeros else None
        )
        codes = {"x": x_codes, "y": self._quantizer(node)}
        settings = {"dim": given["dim"], "count": len(xs)}
        args = [self._codes[x] for x in xs]
        self._codes[node] = self._call(node, Int8Concat(settings, codes), args)

    @torch.no_grad()
    def _unary(self, node: fx.Node) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        layer = Int8Lookup({"function": op_of(node).removeprefix("aten::")}, {})
        codes, result = self._quantizer(x), self._quantizer(node)
        every = torch.arange(-128, 128, dtype=torch.int8)
        values = torch.ops.qkernels.dequantize(
            every, codes.scale, codes.zero_point, 0, None, 256, torch.float32
        )
        wanted = node.target(values, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        layer.table = torch.ops.qkernels.quantize_with(
            wanted.float(), result.scale, result.zero_point, 0, None
        )
        self._codes[node] = self._call(node, layer, [self._codes[x]])


def _order_free(target: Any) -> Any:
    """`reshape` for `view`: in channels_last order there may be no view."""
    return (
        _ATEN.reshape.default
        if target in (_ATEN.view.default, _ATEN._unsafe_view.default)
        else target
    )


def _codes(found: Int8Range, scheme: Scheme) -> Codes:
    scale = torch.tensor(found.scale, dtype=torch.float32)
    if scheme.activation == "symmetric":
        return Codes(scale, None)
    return Codes(scale, torch.tensor(found.zero_point, dtype=torch.int8))


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
