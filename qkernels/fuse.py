"""fuse_ and unfuse_: activation functions into layers, and layers of one input together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.nn.carry import has_hooks
from qkernels.nn.conv import QConvNd
from qkernels.nn.fused import FusedActivation, epilogue_of, is_activation
from qkernels.nn.linear import QLinear
from qkernels.nn.module import QModule
from qkernels.nn.shared import SharedInput, writes_to
from qkernels.plan import check_model, check_patterns, matches
from qkernels.summary import ModuleRow, Summary
from qkernels.trace import Connections


@dataclass(frozen=True)
class Fusion:
    """The decision about one activation function.

    Args:
        name: qualified name of the activation module, the first one.
        layer: name of the layer that computes it, or None if it stays.
        note: why it stays.
    """

    name: str
    layer: str | None
    note: str = ""


def fuse_(
    model: nn.Module,
    ignore: str | Sequence[str] = (),
    *,
    run: Callable[[Any], object] | None = None,
) -> Summary:
    """Let quantized layers compute the activation functions that follow them, in place.

    A kernel applies ReLU, ReLU6, GELU (both forms), SiLU and Hardswish to its sums before it stores
    them, which saves a pass over the result. Modules of torch and of transformers are found where
    they follow a QLinear or a quantized convolution; an `nn.Identity` takes their place. Outputs
    stay the same but for rounding. Names in state_dicts stay, gradients flow as before, and
    `save_model` writes what is fused.

    Pairs are found by tracing the model (torch.fx), in eval and in training mode: the activation
    has to be all that reads the layer's output, and both have to run once. Where the whole model
    cannot be traced, the largest parts that can are (an `nn.Sequential`, the MLP of a transformer);
    code outside of such a part must not use the layer then. A function that code calls
    (`F.gelu(linear(x))`) is no module, and stays.

    Given a way to run the model, layers that are called with one and the same tensor (query, key
    and value of an attention) are found too. The first of them then computes the results of all,
    which quantizes x once and starts threads once. Each layer gives what it gave before, to the
    bit, and state_dicts stay. When a layer meets another tensor, in grad mode, or in a compiled
    model, it computes its own result as always. `save_model` does not write this. Between two
    calls in inference mode nothing may write to the tensor, since torch does not count that.

    Args:
        model: holds quantized layers. It is changed.
        ignore: patterns of layers and activations to leave as they are, as for `quantize_`.
        run: calls the model on an example, as `lambda model: model(**batch)`; it is called once, in
            eval mode and without gradients.

    Returns:
        A summary with a row for each activation module and for each layer that is computed together
        with others: what became of it, or why it was left.

    Raises:
        TypeError: not a module.
        ValueError: a pattern that matches nothing, or a model without quantized layers.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8), nn.Tanh())
        >>> _ = qk.quantize_(model, qk.W8A8())
        >>> [(row.name, row.became) for row in qk.fuse_(model)]
        [('1', 'Identity, fused into 0'), ('3', None)]
        >>> class Pair(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.gate = nn.Linear(8, 16), nn.Linear(8, 16)
        ...     def forward(self, x):
        ...         return self.up(x) * self.gate(x).sigmoid()
        >>> pair = Pair()
        >>> _ = qk.quantize_(pair, qk.W8A8(), ignore=())
        >>> [row.became for row in qk.fuse_(pair, run=lambda pair: pair(torch.randn(1, 8)))]
        ['QLinear, computed together with gate', 'QLinear, computed together with up']
    """
    check_model(model, "fuse_")
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    check_patterns(model, patterns, "ignore", op="fuse_")
    if not any(isinstance(m, QLinear | QConvNd) for m in model.modules()):
        raise ValueError(
            f"fuse_: {type(model).__name__} has no quantized layer; call quantize_ first"
        )
    decisions = plan_fusions(model, patterns)
    rows = []
    for fusion in decisions:
        activation = model.get_submodule(fusion.name)
        became = None
        if fusion.layer is not None:
            apply_fusion(model, fusion.name, fusion.layer)
            became = f"Identity, fused into {fusion.layer}"
        kind = type(activation).__name__
        rows.append(ModuleRow(fusion.name, kind, became, fusion.note, 0, 0))
    groups = [] if run is None else find_shared_inputs(model, run, patterns)
    for group in groups:
        shared = SharedInput(list(group.values()))
        for name, layer in group.items():
            layer.shared = shared
            others = ", ".join(other for other in group if other != name)
            became = f"QLinear, computed together with {others}"
            rows.append(ModuleRow(name, "QLinear", became, "", 0, 0))
    return Summary(f"Fused parts of {type(model).__name__}", tuple(rows))


def unfuse_(model: nn.Module) -> Summary:
    """Put the activation functions back that `fuse_` took out, in place.

    Adapters and `dequantize_` need that: they work on what a layer gives before its activation.

    Args:
        model: that `fuse_` changed, or a file of such a model was loaded into. It is changed.

    Returns:
        A summary with a row for each activation module and for each layer that was computed
        together with others.

    Raises:
        TypeError: not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
        >>> _ = qk.quantize_(model, qk.W8A8())
        >>> _ = qk.fuse_(model)
        >>> [(row.name, row.became) for row in qk.unfuse_(model)]
        [('1', 'GELU')]
    """
    check_model(model, "unfuse_")
    rows = []
    for name, fused in list(model.named_modules()):
        if isinstance(fused, FusedActivation):
            fused.layer.epilogue = "none"
            model.set_submodule(name, fused.original.train(fused.training))
            kind = type(fused.original).__name__
            rows.append(ModuleRow(name, "Identity", kind, "", 0, 0))
        elif isinstance(fused, QLinear) and fused.shared is not None:
            fused.shared = None
            rows.append(ModuleRow(name, "QLinear", "QLinear, computed alone", "", 0, 0))
    return Summary(f"Fused parts of {type(model).__name__}", tuple(rows))


def find_shared_inputs(
    model: nn.Module, run: Callable[[Any], object], ignore: Sequence[str] = ()
) -> list[dict[str, QLinear]]:
    """Layers that are called with the same tensors, found by running the model.

    Args:
        model: the model. It is not changed.
        run: calls it once.
        ignore: patterns of layers to leave alone.

    Returns:
        Groups of two or more layers by name, in the order of their calls. Those of a group store
        their weights in the same way and take the same number of features.
    """
    inputs: dict[str, list[Tensor]] = {}  # kept alive, so that no id is used twice
    versions: dict[str, list[int]] = {}
    handles = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(name, []).append(args[0])
                versions.setdefault(name, []).append(writes_to(args[0]))

        return record

    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QLinear)
        and layer.shareable
        and not ("forward" in layer.__dict__ or layer._compiled_call_impl is not None)
        and not any(matches(pattern, name) for pattern in ignore)
    }
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(recorder(name)))
        with _mode(model, False), torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[Any, dict[str, QLinear]] = {}
    for name, seen in inputs.items():
        layer = layers[name]
        calls = tuple(zip(map(id, seen), versions[name], strict=True))
        groups.setdefault((calls, layer.scheme, layer.in_features), {})[name] = layer
    return [group for group in groups.values() if len(group) > 1]


def plan_fusions(model: nn.Module, ignore: Sequence[str] = ()) -> list[Fusion]:
    """Decide about every activation module of a model, by tracing it.

    Args:
        model: the model. It is not changed.
        ignore: patterns of layers and activations to leave as they are.
    """
    names = [name for name, m in model.named_modules() if name and is_activation(m)]
    traced = []
    if any(epilogue_of(model.get_submodule(name)) for name in names):
        for training in (False, True):  # what a model does may depend on it
            with _mode(model, training):
                traced.append(Connections(model))
    return [_decided(model, name, traced, ignore) for name in names]


def _decided(
    model: nn.Module, name: str, traced: list[Connections], ignore: Sequence[str]
) -> Fusion:
    activation = model.get_submodule(name)
    if epilogue_of(activation) is None:
        return Fusion(name, None, f"no kernel computes {type(activation).__name__}")
    feeders = [connections.feeder(name) for connections in traced]
    for layer, reason in feeders:
        if layer is None:
            return Fusion(name, None, reason or "")
    layer = feeders[0][0]
    assert layer is not None
    if feeders[1][0] != layer:
        return Fusion(name, None, "what feeds it depends on the mode, eval or training")
    ignored = [p for p in ignore if matches(p, name) or matches(p, layer)]
    reason = f"ignored by {ignored[-1]!r}" if ignored else why_not_fusible(model, layer, name)
    return Fusion(name, None, reason) if reason is not None else Fusion(name, layer)


def why_not_fusible(model: nn.Module, layer_name: str, name: str) -> str | None:
    """Why a layer cannot compute the activation that it feeds, or None.

    Args:
        model: holds both.
        layer_name: qualified name of the layer.
        name: qualified name of the activation.
    """
    layer, activation = model.get_submodule(layer_name), model.get_submodule(name)
    if not isinstance(layer, QLinear | QConvNd):
        return f"what feeds it is {layer_name}, a {type(layer).__name__}, which is not quantized"
    if layer.epilogue != "none":
        return f"{layer_name}, which feeds it, computes {layer.epilogue} already"
    for each, module in ((layer_name, layer), (name, activation)):
        if has_hooks(module):
            return f"{each} has hooks, which would see other values"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return f"{each} is compiled, or has a forward of its own"
        others = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
        if len(others) > 1:
            return f"{each} has several names: {', '.join(others)}"
    return None


def apply_fusion(model: nn.Module, name: str, layer_name: str) -> None:
    """Do what was decided.

    Args:
        model: is changed.
        name: qualified name of the activation.
        layer_name: qualified name of the layer that is to compute it.
    """
    layer, activation = model.get_submodule(layer_name), model.get_submodule(name)
    epilogue = epilogue_of(activation)
    assert isinstance(layer, QModule)
    assert epilogue is not None
    layer.epilogue = epilogue
    model.set_submodule(name, FusedActivation(activation, layer))


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = training
    try:
        yield
    finally:
        for module, before in flags:
            module.training = before
