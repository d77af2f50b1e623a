"""What this build of qkernels contains and what this machine runs."""

from typing import TypedDict

class FormatRow(TypedDict):
    name: str
    code: int
    bits: int
    symmetric_min: int
    symmetric_max: int
    asymmetric_min: int
    asymmetric_max: int
    symmetric_range: float
    has_zero_point: bool
    zero_steps: int
    packs: bool
    storage: str

class LayoutInfo(TypedDict):
    format: str
    scale_dtype: str
    symmetric: bool
    device: str
    version: int

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch_abi: str
    hopper: bool

BLOCK_ROWS: int
LONGEST_CONV_SUM: int

def formats() -> list[FormatRow]: ...
def isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def layout(format: int, scale_dtype: int, symmetric: bool, device: str = "cpu") -> int: ...
def describe_layout(layout: int) -> LayoutInfo: ...
def block_bytes(layout: int, in_features: int, group_size: int) -> int: ...
def conv_packed_shape(
    layout: int, taps: int, group_channels: int, groups: int, out_channels: int, group_size: int
) -> tuple[int, int]: ...
def conv_kernel_name(
    layout: int,
    taps: int,
    group_channels: int,
    groups: int,
    out_channels: int,
    group_size: int,
    activation: int,
    x_type: int = 0,
    hopper: bool = False,
) -> str: ...
def longest_sum(layout: int) -> int: ...
def kernel_name(layout: int, activation: int, rows: int, x_type: int = 0) -> str: ...
def cuda_kernel_name(
    layout: int,
    activation: int,
    rows: int,
    in_features: int,
    out_features: int,
    group_size: int,
    x_type: int,
    multiprocessors: int,
    hopper: bool = False,
) -> str: ...
def build_info() -> BuildInfo: ...
