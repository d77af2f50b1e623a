"""fold_batchnorm_: BatchNorm layers into the layers before them, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from qkernels.nn.carry import FLOAT_DTYPES, has_hooks, why_not_replaceable
from qkernels.plan import check_model, matches, own_bytes, tensor_key
from qkernels.summary import ModuleRow, Summary
from qkernels.trace import Connections

# Which layers may feed which normalization, so that both mean the same dimension by channels.
_FEEDERS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d, nn.ConvTranspose1d),
    nn.BatchNorm2d: (nn.Conv2d, nn.ConvTranspose2d),
    nn.BatchNorm3d: (nn.Conv3d, nn.ConvTranspose3d),
}


@dataclass(frozen=True)
class Fold:
    """The decision about one BatchNorm.

    Args:
        name: qualified name of the BatchNorm, the first one.
        layer: name of the layer that it goes into, or None if it stays.
        note: why it stays, or what else there is to know.
    """

    name: str
    layer: str | None
    note: str

    @property
    def became(self) -> str | None:
        """What a summary says the BatchNorm is now, or None if it stays."""
        return None if self.layer is None else f"Identity, folded into {self.layer}"


def fold_batchnorm_(model: nn.Module, pairs: Iterable[tuple[str, str]] | None = None) -> Summary:
    """Fold BatchNorm layers into the Linear or convolution before them, in place.

    In eval mode a BatchNorm multiplies each channel by a number and adds another. Both go into the
    weight and bias of the layer that feeds it, computed in float64 and rounded once; a bias is made
    if there was none. An `nn.Identity` takes the BatchNorm's place. Outputs stay the same but for
    rounding.

    Pairs are found by tracing the model (torch.fx): the BatchNorm has to be all that reads the
    layer's output, and both have to run once. Where the whole model cannot be traced, the largest
    parts that can are (an `nn.Sequential`, a block); code outside of such a part must not use the
    layer then. A Linear before a BatchNorm1d has to work on inputs [rows, features].

    Args:
        model: float model with its BatchNorms in eval mode. It is changed.
        pairs: (layer, BatchNorm) by qualified name, to be folded instead of what tracing finds.
            That the one feeds the other, and nothing else, is then taken on trust.

    Returns:
        A summary with a row for each BatchNorm: what it was folded into, or why it was left.

    Raises:
        TypeError: not a module, or pairs of another type.
        ValueError: a pair that cannot be folded. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> [(row.name, row.became) for row in qk.fold_batchnorm_(model)]
        [('1', 'Identity, folded into 0')]
    """
    check_model(model, "fold_batchnorm_")
    folds = plan_folds(model) if pairs is None else _plan_given(model, pairs)
    seen: set[object] = set()
    old = [model.get_submodule(fold.name) for fold in folds]
    bytes_before = [own_bytes(norm, seen) for norm in old]
    apply_folds(model, folds)
    rows = tuple(
        ModuleRow(
            name=fold.name,
            kind=type(norm).__name__,
            became=fold.became,
            note=fold.note,
            bytes_before=nbytes,
            bytes_after=nbytes if fold.layer is None else 0,
        )
        for fold, norm, nbytes in zip(folds, old, bytes_before, strict=True)
    )
    return Summary(f"BatchNorms of {type(model).__name__}", rows)


def plan_folds(model: nn.Module, ignore: Sequence[str] = ()) -> list[Fold]:
    """Decide about every BatchNorm of a model, by tracing it.

    Args:
        model: the model. It is not changed.
        ignore: patterns of layers and BatchNorms to leave as they are.
    """
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return []
    connections = Connections(model)
    folds = []
    for name in norms:
        layer, reason = connections.feeder(name)
        if layer is not None:
            ignored = [p for p in ignore if matches(p, name) or matches(p, layer)]
            reason = (
                f"ignored by {ignored[-1]!r}" if ignored else why_not_foldable(model, layer, name)
            )
        folds.append(_decided(model, name, layer, reason))
    return folds


def _plan_given(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> list[Fold]:
    pairs = list(pairs)
    modules = dict(model.named_modules(remove_duplicate=False))
    norm_of: dict[str, str] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and [type(name) for name in pair] == [str, str]):
            raise TypeError(
                f"fold_batchnorm_: pairs holds {pair!r}; expected (layer, BatchNorm), two names"
            )
        layer, norm = pair
        for name in pair:
            if name not in modules:
                raise ValueError(f"fold_batchnorm_: pairs names {name!r}, which the model has not")
        if layer in norm_of.values() or norm in norm_of:
            raise ValueError(f"fold_batchnorm_: {pair!r} names what another of the pairs names too")
        reason = why_not_foldable(model, layer, norm)
        if reason is not None:
            raise ValueError(
                f"fold_batchnorm_: {norm!r} cannot be folded into {layer!r}, and nothing has "
                f"changed: {reason}"
            )
        norm_of[norm] = layer
    return [
        _decided(model, name, norm_of.get(name), None if name in norm_of else "not among the pairs")
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]


def _decided(model: nn.Module, name: str, layer: str | None, reason: str | None) -> Fold:
    if reason is not None or layer is None:
        return Fold(name, None, reason or "")
    is_linear = isinstance(model.get_submodule(layer), nn.Linear)
    return Fold(name, layer, "for inputs [rows, features]" if is_linear else "")


def why_not_foldable(model: nn.Module, layer_name: str, norm_name: str) -> str | None:
    """Why a BatchNorm cannot be folded into the layer that feeds it, or None.

    Args:
        model: holds both.
        layer_name: qualified name of the layer.
        norm_name: qualified name of the BatchNorm.
    """
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    kinds = _FEEDERS.get(type(norm))
    if kinds is None:
        return f"a {type(norm).__name__} is not folded, only BatchNorm1d, 2d and 3d themselves are"
    assert isinstance(norm, _BatchNorm)
    if type(layer) not in kinds:
        return f"what feeds it is {layer_name}, a {type(layer).__name__}"
    if norm.training:
        return "it is in training mode; call model.eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return (
            "it keeps no running statistics (track_running_stats=False), so what it does depends "
            "on the batch"
        )
    for name, module in ((layer_name, layer), (norm_name, norm)):
        if has_hooks(module):
            return f"{name} has hooks, which would see other values"
        if _is_shared(model, module):
            return f"{name} has several names, or shares a parameter with another module"
    own_code = why_not_replaceable(layer) or _why_not_plain(norm)
    if own_code is not None:
        return own_code
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta or norm.running_mean.is_meta:
        return "it is on the meta device and has no values; load them first"
    if weight.dtype not in FLOAT_DTYPES:
        return f"the weight of {layer_name} is {weight.dtype}"
    if _channels(layer) != norm.num_features:
        return f"it has {norm.num_features} channels but {layer_name} has {_channels(layer)}"
    if not all(part.isfinite().all() for part in _folded(layer, norm)):
        return (
            f"the weight or bias of {layer_name} would hold NaN or Inf: the statistics do, or "
            f"{weight.dtype} is too narrow"
        )
    return None


def _why_not_plain(norm: nn.Module) -> str | None:
    if norm._modules or "forward" in norm.__dict__ or norm._compiled_call_impl is not None:
        return "it is parametrized, compiled, or has a forward of its own"
    return None


def _is_shared(model: nn.Module, module: nn.Module) -> bool:
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
    own = {tensor_key(p) for p in module.parameters() if not nn.parameter.is_lazy(p)}
    others = (m for m in model.modules() if m is not module)
    shared = (
        p is not None and not nn.parameter.is_lazy(p) and tensor_key(p) in own
        for other in others
        for p in other._parameters.values()
    )
    return len(names) != 1 or any(shared)


def _channels(layer: nn.Module) -> int:
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(channels, int)
    return channels


@torch.no_grad()
def _folded(layer: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that does what both did, in the type of the weight."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert norm.running_mean is not None and norm.running_var is not None
    factor, shift = affine_of(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) else None
    wide, moved = fold_tensors(
        weight, bias if isinstance(bias, Tensor) else None, factor, shift, transposed_groups=groups
    )
    return wide.to(weight.dtype), moved.to(weight.dtype)


def affine_of(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a normalization in eval mode multiplies each channel by and adds to it, in float64.

    Args:
        mean: running mean of each channel.
        var: running variance of each channel.
        eps: added to the variance.
        weight: factor of each channel, or None.
        bias: summand of each channel, or None.
    """
    factor = (var.double() + eps).sqrt().reciprocal()
    if weight is not None:
        factor = factor * weight.double()
    shift = -mean.double() * factor
    return factor, shift if bias is None else shift + bias.double()


def fold_tensors(
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    shift: Tensor,
    *,
    transposed_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a layer whose outputs are multiplied and shifted.

    Args:
        weight: [out, ...]; of a transposed convolution [in, out / groups, ...].
        bias: [out], or None.
        factor: float64 [out].
        shift: float64 [out], added after the multiplication.
        transposed_groups: groups of a transposed convolution, None for other layers.
    """
    if bias is not None:
        shift = shift + bias.double() * factor
    wide = weight.double()
    if transposed_groups is None:
        return wide * factor.reshape(-1, *(1 for _ in weight.shape[1:])), shift
    # Each group of inputs has outputs of its own.
    grouped = wide.unflatten(0, (transposed_groups, -1))
    by_group = factor.reshape(transposed_groups, 1, -1, *(1 for _ in weight.shape[2:]))
    return (grouped * by_group).reshape(wide.shape), shift


@torch.inference_mode(False)  # what is made must be usable outside of it
@torch.no_grad()
def apply_folds(model: nn.Module, folds: Iterable[Fold]) -> None:
    """Do what was decided.

    Args:
        model: the model that the decisions are about. It is changed.
        folds: what `plan_folds` returned.
    """
    for fold in folds:
        if fold.layer is None:
            continue
        layer, norm = model.get_submodule(fold.layer), model.get_submodule(fold.name)
        assert isinstance(norm, _BatchNorm)
        weight, bias = _folded(layer, norm)
        old = layer.weight
        assert isinstance(old, nn.Parameter)
        old.copy_(weight)
        if isinstance(layer.bias, nn.Parameter):
            layer.bias.copy_(bias)
        else:
            layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
        model.set_submodule(fold.name, nn.Identity().train(norm.training))
