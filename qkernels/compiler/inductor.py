"""What torch.compile(model, backend="qkernels") calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from qkernels.compiler.rewrite import rewrite


def backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph as torch's Inductor does, with quantized layers put together before.

    It is called by `torch.compile(model, backend="qkernels")`. Where no gradient is needed the
    graph first goes through `qkernels.compiler.rewrite`; what is left is compiled by Inductor, as
    is the whole graph where gradients are needed.

    Args:
        module: the graph that torch.compile captured.
        inputs: its example inputs.
        mode: of Inductor, as for `torch.compile`.
        options: of Inductor, as for `torch.compile`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
        >>> _ = qk.quantize_(model, qk.W8A8())
        >>> compiled = torch.compile(model, backend="qkernels")
        >>> with torch.no_grad():
        ...     compiled(torch.randn(2, 64)).shape
        torch.Size([2, 8])
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        compiled: Any = compile_fx(module, list(inputs), config_patches=patches)
        return cast(Callable[..., Any], compiled)

    def put_together(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        rewrite(graph)
        _let_views_copy(graph)
        # Fakes of the ops are tested, so there is no need to check each result in every call.
        inner: Any = compile_fx(graph, examples, config_patches={"size_asserts": False, **patches})

        def boxed(args: list[Any]) -> Any:
            given = tuple(args)
            args.clear()  # so that what is used up is freed
            return inner(*given)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    return aot_autograd(fw_compiler=put_together, inference_compiler=put_together)(
        module, list(inputs)
    )


def _let_views_copy(module: fx.GraphModule) -> None:
    """Replace views by reshapes: Inductor may give what they look at other strides than ATen does.

    It makes torch.cat of an empty tensor and another, as caches of keys begin, a copy of the other.

    Args:
        module: is changed.
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    module.recompile()
