"""What torch knows of every op: schema, fake, autograd, mutation. A new op cannot be forgotten."""

import itertools

import pytest
import torch

from helpers.check import same_tensor

from .samples import Sample, samples

SAMPLES = samples()
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def registered() -> set[tuple[str, str]]:
    """Name and overload of every op, as torch has them."""
    return {
        (schema.name, schema.overload_name)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("qkernels::")
    }


def test_every_op_has_a_sample() -> None:
    sampled = {(s.op._schema.name, s.op._schema.overload_name) for s in SAMPLES}
    assert registered() == sampled


def test_the_ops_that_are_promised_exist() -> None:
    names = {name.removeprefix("qkernels::") for name, _ in registered()}
    promised = "quantize quantize_with dequantize pack unpack int_mm linear linear_differentiable"
    promised += " linear_backward_input embedding fake_quantize fake_quantize_with"
    assert set(promised.split()) <= names


@pytest.mark.parametrize("op", sorted({".".join(filter(None, name)) for name in registered()}))
def test_every_op_has_a_kernel_and_a_fake(op: str) -> None:
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key), f"{op} has none for {key}"


@each_sample
def test_fakes_know_shapes_and_types(sample: Sample) -> None:
    real = sample()
    fake = sample.mapped(lambda t: t.detach().to("meta"))()
    real, fake = ((r if isinstance(r, tuple | list) else (r,)) for r in (real, fake))
    for a, b in zip(real, fake, strict=True):
        if a is None:
            assert b is None
            continue
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert b.is_meta


@pytest.mark.parametrize("sample", [s for s in SAMPLES if len(s.tensors) > 1], ids=str)
def test_every_tensor_must_be_on_one_device(sample: Sample) -> None:
    """Torch runs the fake then, whose result nobody computes."""
    for i in range(len(sample.tensors)):
        numbers = itertools.count()
        mixed = sample.mapped(lambda t, i=i, n=numbers: t.to("meta") if next(n) == i else t)
        with pytest.raises(RuntimeError, match="but the first argument is on"):
            mixed()


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.kwargs], ids=str)
def test_what_is_written_to_counts_as_changed(sample: Sample) -> None:
    before = {name: t._version for name, t in sample.kwargs.items()}
    sample()
    assert all(sample.kwargs[name]._version > before[name] for name in before)


@each_sample
def test_inputs_are_left_alone(sample: Sample) -> None:
    """But for what the schema says an op writes."""
    written = {
        a.name for a in sample.op._schema.arguments if a.alias_info and a.alias_info.is_write
    }
    kept = [t for t in sample.tensors if all(t is not sample.kwargs.get(w) for w in written)]
    before = [t.detach().clone() for t in kept]
    first, second = sample(), sample()
    for a, b in zip(kept, before, strict=True):
        same_tensor(a.detach(), b)
    first, second = ((r if isinstance(r, tuple | list) else (r,)) for r in (first, second))
    for a, b in zip(first, second, strict=True):
        if a is not None:
            same_tensor(a.detach(), b.detach())
            assert all(a.data_ptr() != t.data_ptr() or a.numel() == 0 for t in sample.tensors)


@each_sample
def test_opcheck(sample: Sample) -> None:
    torch.library.opcheck(sample.op, sample.args, sample.kwargs)
