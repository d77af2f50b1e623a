"""op_sequence: the bits of its ops called one by one."""

import pytest
import torch

from qkernels.ops_sequence import run_one_by_one

from .samples import encoder_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_its_steps(dtype):
    call = encoder_layer(dtype)
    for got, wanted in zip(
        torch.ops.qkernels.op_sequence(*call), run_one_by_one(*call), strict=True
    ):
        assert torch.equal(got, wanted)
