"""What is done to a graph of ATen ops: quantized layers and the ops between them put together."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qkernels.compiler.sequence import join_calls
from qkernels.functional import EPILOGUES
from qkernels.lowering.nodes import arguments, is_getitem, op_of, value_of

_LINEAR = "qkernels::linear"
_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Ops whose results are memory of their own, unlike those of views.
_READERS = (_LINEAR, "aten::add", "aten::native_layer_norm")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.qkernels


def rewrite(module: fx.GraphModule) -> dict[str, int]:
    """Put the ops of quantized layers together, in place.

    - An activation function that alone reads a quantized linear layer becomes part of it.
    - Quantized linear layers of one input become one call.
    - Attention reads queries, keys and values where the layers wrote them.
    - An addition and the layer norm that follows become one pass.
    - All of these that follow each other become one call, `op_sequence`.

    The results are those of the ops put together, but for rounding; those of linear layers are the
    same to the bit.

    Args:
        module: a graph of ATen ops without changes in place, for inference, whose nodes know their
            results' shapes (`meta["val"]`), as AOTAutograd makes it. It is changed.

    Returns:
        How many times each was done: "activation", "shared", "attention", "norm", "sequence".
    """
    graph = module.graph
    _drop_copies(graph)
    done = {
        "activation": sum(map(_fuse_activation, _nodes(graph, _LINEAR))),
        "norm": sum(map(_fuse_norm, _nodes(graph, "aten::native_layer_norm"))),
        "attention": sum(map(_fuse_attention, _nodes(graph, _FLASH))),
        "shared": _share_inputs(graph),
    }
    _drop_views(graph)
    graph.eliminate_dead_code()
    done["sequence"] = join_calls(graph)
    graph.lint()
    module.recompile()
    return done


def _nodes(graph: fx.Graph, op: str) -> Iterator[fx.Node]:
    return (node for node in list(graph.nodes) if op_of(node) == op)


def _on_cpu(node: Any) -> bool:
    value = value_of(node)
    return value is not None and value.device.type == "cpu"


def _is_given(weight: Any) -> bool:
    """Whether a weight is an input of the graph, so that it is there before every layer."""
    return weight is None or weight.op in ("placeholder", "get_attr")


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)


def _drop_copies(graph: fx.Graph) -> None:
    """Dropout leaves copies behind, which are for nothing where all that follows reads them."""
    for node in _nodes(graph, "aten::clone"):
        source, value = node.args[0], value_of(node)
        before = value_of(source)
        alike = value is not None and before is not None and value.stride() == before.stride()
        if alike and all(op_of(user) in _READERS for user in node.users):
            node.replace_all_uses_with(source)  # type: ignore[arg-type]


def _drop_views(graph: fx.Graph) -> None:
    """Views of views that are what they began with, as heads that are split and put together."""
    for node in list(graph.nodes):
        source = node
        while (source := _viewed(source)) is not None:
            if _same(source.meta["val"], node.meta["val"]):
                node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")
                break


def _viewed(node: fx.Node) -> fx.Node | None:
    """The node whose result a node's result is a view of, or None."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    value, before = value_of(node), value_of(source)
    if value is None or before is None:
        return None
    alike = value.untyped_storage()._cdata == before.untyped_storage()._cdata
    return source if alike else None  # type: ignore[return-value]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two views of the same memory are one tensor, whatever sizes may vary."""
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    sizes = ((*t.shape, *t.stride(), t.storage_offset()) for t in (a, b))
    return all(statically_known_true(x == y) for x, y in zip(*sizes, strict=True))


# ---- Activation functions ------------------------------------------------------------------------


def _fuse_activation(node: fx.Node) -> bool:
    users = list(node.users)
    if len(users) != 1 or node.args[-1] != EPILOGUES["none"]:
        return False
    name = _epilogue_of(users[0])
    if name is None:
        return False
    node.args = (*node.args[:-1], EPILOGUES[name])
    users[0].replace_all_uses_with(node)
    return True


def _epilogue_of(node: fx.Node) -> str | None:
    name = op_of(node).removeprefix("aten::")
    if name == "gelu":
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu"
    if name == "hardtanh":
        given = arguments(node)
        return "relu6" if (given["min_val"], given["max_val"]) == (0, 6) else None
    return name if name in EPILOGUES else None


# ---- Layers of one input -------------------------------------------------------------------------


def _share_inputs(graph: fx.Graph) -> int:
    groups: dict[Any, list[fx.Node]] = {}
    for node in _nodes(graph, _LINEAR):
        given = arguments(node)
        transforms = ("x_scale", "x_zero_point", "x_premul", "k_perm")
        weights = (given["packed"], given["bias"])
        if any(given[name] is not None for name in transforms) or not all(map(_is_given, weights)):
            continue
        same = ("x", "layout", "in_features", "group_size", "activation")
        groups.setdefault(tuple(given[name] for name in same), []).append(node)
    shared = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in shared:
        each = [arguments(node) for node in nodes]
        first = each[0]
        with graph.inserting_before(nodes[0]):
            together = graph.call_function(
                _ops.linear_shared.default,
                (
                    first["x"],
                    [given["packed"] for given in each],
                    [given["bias"] for given in each],
                    first["layout"],
                    first["in_features"],
                    [given["out_features"] for given in each],
                    first["group_size"],
                    first["activation"],
                    [given["epilogue"] for given in each],
                ),
            )
            together.meta["val"] = [node.meta["val"] for node in nodes]
            for i, node in enumerate(nodes):
                _replace(node, graph.call_function(operator.getitem, (together, i)))
    return len(shared)


# ---- Attention -----------------------------------------------------------------------------------


def _fuse_attention(node: fx.Node) -> bool:
    given = arguments(node)
    q, k, v = (value_of(given[name]) for name in ("query", "key", "value"))
    if q is None or k is None or v is None or given["dropout_p"] != 0 or not _on_cpu(node.args[0]):
        return False
    if not all(map(_heads_side_by_side, (q, k, v))):
        return False
    results = {user.args[1]: user for user in node.users if is_getitem(user)}
    if 0 not in results or any(user.users for i, user in results.items() if i != 0):
        return False
    graph = node.graph
    heads, size = q.shape[1], q.shape[3]
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(size)
    with graph.inserting_before(node):

        def merged(x: fx.Node) -> fx.Node:
            by_token = graph.call_function(torch.ops.aten.transpose.int, (x, 1, 2))
            together = graph.call_function(torch.flatten, (by_token, 2, 3))
            by_token.meta["val"] = x.meta["val"].transpose(1, 2)
            together.meta["val"] = by_token.meta["val"].flatten(2, 3)
            return together

        y = graph.call_function(
            _ops.attention.default,
            (
                *(merged(given[name]) for name in ("query", "key", "value")),
                _condition_of(given["attn_mask"]),
                heads,
                scale,
                given["is_causal"],
            ),
        )
        split = graph.call_function(torch.unflatten, (y, 2, (heads, v.shape[3])))
        split.meta["val"] = results[0].meta["val"].transpose(1, 2)
        y.meta["val"] = split.meta["val"].flatten(2, 3)
        by_head = graph.call_function(torch.ops.aten.transpose.int, (split, 1, 2))
    _replace(results[0], by_head)
    return True


def _heads_side_by_side(x: Tensor) -> bool:
    """[B, H, L, D] whose heads lie in memory as a linear layer wrote them, [..., H * D]."""
    fixed = isinstance(x.shape[1], int) and isinstance(x.shape[3], int)
    return fixed and x.stride(1) == x.shape[3] and x.stride(3) == 1 and x.dtype in _FLOATS


def _condition_of(mask: Any) -> Any:
    """The bools that a mask of 0 and -inf was made of, or the mask itself."""
    if op_of(mask) != "aten::where":
        return mask
    condition, yes, no = mask.args

    def constant(node: Any) -> Any:
        if op_of(node) in ("aten::scalar_tensor", "aten::full"):
            return arguments(node).get("s", arguments(node).get("fill_value"))
        return node

    return condition if (constant(yes), constant(no)) == (0.0, -math.inf) else mask


# ---- Norms ---------------------------------------------------------------------------------------


def _fuse_norm(node: fx.Node) -> bool:
    given = arguments(node)
    added = given["input"]
    if op_of(added) != "aten::add" or not _on_cpu(added) or len(given["normalized_shape"]) != 1:
        return False
    a, b = added.args[:2]
    terms = [value_of(x) for x in (a, b)]
    if arguments(added)["alpha"] != 1 or any(x is None or not _alike(x, added) for x in terms):
        return False
    parameters = [given[name] for name in ("weight", "bias") if given[name] is not None]
    types = {added.meta["val"].dtype, torch.float32}
    if not all(_is_given(p) and p.meta["val"].dtype in types for p in parameters):
        return False
    results = {user.args[1]: user for user in node.users if is_getitem(user)}
    if any(user.users for i, user in results.items() if i != 0) or 0 not in results:
        return False
    keep = len(added.users) > 1
    graph = node.graph
    with graph.inserting_before(added.next):  # in front of all that reads the sum
        both = graph.call_function(
            _ops.add_norm.default,
            (a, b, given["weight"], given["bias"], given["eps"], False, keep),
        )
        both.meta["val"] = (results[0].meta["val"], added.meta["val"])
        y = graph.call_function(operator.getitem, (both, 0))
        total = graph.call_function(operator.getitem, (both, 1)) if keep else None
    _replace(results[0], y)
    if total is not None:
        total.meta["val"] = added.meta["val"]
        added.replace_all_uses_with(total, delete_user_cb=lambda user: user is not node)
    return True


def _alike(x: Tensor, node: fx.Node) -> bool:
    y = node.meta["val"]
    return x.dtype in _FLOATS and (x.shape, x.dtype) == (y.shape, y.dtype)
