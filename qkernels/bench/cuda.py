"""Times of the CUDA kernels beside those of their peers: `python -m qkernels.bench.cuda OUTDIR`.

Calls are captured in a CUDA graph, each with another copy of the weight so that none comes from
the L2 cache, and the graph is timed by CUDA events: that is the GPU's time and not Python's. Rates
are compared with that of a copy on the device, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels import _C, functional
from qkernels.bench import cuda_crossover as crossover
from qkernels.bench.cuda_clocks import Gpu, Rehearsal
from qkernels.bench.cuda_peers import Call, linear_peers
from qkernels.bench.plan import Conv
from qkernels.formats import format_of
from qkernels.nn import QConv2d
from qkernels.schemes import NF4, W4A8, W4A16, W8A8, W8A16, Scheme

SCHEMES: dict[str, Scheme] = {
    "W4A16 g128": W4A16(group_size=128, symmetric=True),
    "NF4 g64": NF4(group_size=64),
    "W8A16": W8A16(),
    "W4A8 g128": W4A8(group_size=128, symmetric=True),
    "W8A8": W8A8(),
    "W4A16 g128 zero points": W4A16(group_size=128),
    "W4A8 g128 zero points": W4A8(group_size=128),
}
# Of them on Hopper, from so many rows on, by the kernel that QKERNELS_GROUPED_WGMMA=1 asks for.
ASKED_FOR = ("W4A8 g128", "W4A8 g128 zero points")
ASKED_ROWS = 17
# ResNet-50, batch 64.
CONVS = (
    Conv(64, 64, 56, 3, batch=64),
    Conv(128, 128, 28, 3, batch=64),
    Conv(256, 256, 14, 3, batch=64),
    Conv(512, 512, 7, 3, batch=64),
    Conv(256, 64, 56, 1, batch=64),
    Conv(1024, 256, 14, 1, batch=64),
)


@dataclass(frozen=True)
class Sizes:
    """How large the cases are; tiny ones show on a CPU that everything runs.

    Args:
        copy: bytes of the tensor whose copy gives the rate that others are compared with.
        codec: side of the square matrix that is quantized.
        shapes: (in_features, out_features).
        rows: numbers of rows of x.
        convs: the convolutions.
        crossover: shapes, and numbers of rows, for which both ways to multiply are timed.
    """

    copy: int = 1 << 30
    codec: int = 8192
    shapes: tuple[tuple[int, int], ...] = ((8192, 8192), (8192, 28672), (4096, 4096))
    rows: tuple[int, ...] = (1, 4, 8, 16, 64, 512, 2048)
    convs: tuple[Conv, ...] = CONVS
    crossover: tuple[tuple[tuple[int, int], ...], tuple[int, ...]] = (
        ((8192, 8192), (4096, 4096)),
        (16, 32, 64, 128, 256),
    )


TINY = Sizes(
    1 << 12, 128, ((128, 64),), (1, 16, 64), (Conv(16, 16, 6, 3, batch=2),), (((128, 64),), (16,))
)


@dataclass
class Row:
    """What one contender needed in one case.

    Args:
        group: "copy", "codec", "linear", "conv" or "crossover".
        case: what is computed.
        name: of the contender.
        own: whether it is qkernels.
        seconds: median time of a call.
        bytes: that it has to read and write at least.
        operations: multiplications and additions.
        versus: times of a peer over this one, by the peer's name.
    """

    group: str
    case: str
    name: str
    own: bool
    seconds: float
    bytes: float = 0.0
    operations: float = 0.0
    versus: dict[str, float] = field(default_factory=dict)


class Run:
    """One run: rows, and what was left out and why.

    Args:
        clock: times calls on its device.
        sizes: of the cases.
        say: prints a line for the user.
        until: `time.monotonic()` after which no case is begun.
    """

    def __init__(
        self,
        clock: Gpu | Rehearsal,
        sizes: Sizes,
        say: Callable[[str], None] = print,
        until: float = float("inf"),
    ) -> None:
        self.clock, self.sizes, self.say, self.until = clock, sizes, say, until
        self.rows: list[Row] = []
        # Contender and reason → in how many cases.
        self.left_out: dict[str, int] = {}

    def all(self) -> None:
        """Measure everything; a contender that fails is left out and the rest goes on."""
        self._copy()
        self._codecs()
        for k, n in self.sizes.shapes:
            for m in self.sizes.rows:
                self._linear(m, k, n)
        for conv in self.sizes.convs:
            self._conv(conv)
        self._crossover()
        self._copy()

    def copies(self, nbytes: int) -> int:
        """How many copies of some data do not fit into the L2 cache together, twice over."""
        return max(2, min(64, -(-2 * self.clock.cache_bytes() // max(nbytes, 1))))

    def time(self, row: Row, calls: Callable[[], Sequence[Callable[[], object]]]) -> Row | None:
        """Fill a row in, or say why it is left out.

        Args:
            row: without its time.
            calls: makes what is timed.
        """
        label = f"{row.group} {row.case}: {row.name}"
        if time.monotonic() > self.until:
            self._leave_out(row.group, row.name, "the time was up")
            return None
        try:
            row.seconds = self.clock.seconds(calls())
        except (RuntimeError, ImportError, NotImplementedError, AttributeError) as error:
            self._leave_out(row.group, row.name, str(error))
            return None
        self.rows.append(row)
        rate = f", {row.bytes / row.seconds / 1e9:.0f} GB/s" if row.bytes else ""
        speed = f", {row.operations / row.seconds / 1e12:.1f} Top/s" if row.operations else ""
        self.say(f"{label}: {row.seconds * 1e6:.1f} µs{rate}{speed}")
        return row

    def _leave_out(self, group: str, name: str, why: str) -> None:
        key = f"{group}, {name}: {why.splitlines()[0].split('. ')[0][:200]}"
        if key not in self.left_out:
            self.say(f"{key}; left out")
        self.left_out[key] = self.left_out.get(key, 0) + 1

    def _copy(self) -> None:
        def calls() -> list[Callable[[], object]]:
            source = torch.ones(self.sizes.copy, dtype=torch.uint8, device=self.clock.device)
            target = torch.empty_like(source)
            return [lambda: target.copy_(source)]

        size = 2.0 * self.sizes.copy
        self.time(Row("copy", f"{self.sizes.copy} bytes", "torch copy_", False, 0, size), calls)

    def _codecs(self) -> None:
        side, device = self.sizes.codec, self.clock.device
        for name, group_size in (("int8", -1), ("int4", 128), ("nf4", 64)):
            form = format_of(name)
            x = [torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2)]
            try:
                coded = [functional.quantize(t, name, group_size) for t in x]
            except (RuntimeError, NotImplementedError) as error:
                self._leave_out("codec", name, str(error))
                continue
            nbytes = float(x[0].nbytes + coded[0].nbytes)
            case = f"{name} {side}x{side} group {group_size}, bfloat16"

            def encode(
                x: list[Tensor] = x, code: int = form.code, group: int = group_size
            ) -> list[Callable[[], object]]:
                op = torch.ops.qkernels.quantize
                return [lambda t=t: op(t, code, group, True, None) for t in x]  # type: ignore[misc]

            def decode(
                coded: list[functional.Quantized] = coded,
            ) -> list[Callable[[], object]]:
                return [lambda q=q: q.dequantize(torch.bfloat16) for q in coded]  # type: ignore[misc]

            self.time(Row("codec", f"quantize {case}", "qkernels", True, 0, nbytes), encode)
            self.time(Row("codec", f"dequantize {case}", "qkernels", True, 0, nbytes), decode)

    def _linear(self, m: int, k: int, n: int) -> None:
        device, dtype = self.clock.device, torch.bfloat16
        x = torch.randn(m, k, device=device, dtype=dtype)
        weight = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
        case, operations = f"{m} rows {k}x{n}", 2.0 * m * k * n
        peers: dict[str, float] = {}
        for peer in linear_peers(x, weight):
            row = Row("linear", case, peer.name, False, 0, peer.nbytes, operations)
            if self.time(row, self._rotated(peer)):
                peers[peer.name] = row.seconds
        for name, scheme in SCHEMES.items():
            own = _own(x, weight, scheme)
            self._beside(Row("linear", case, name, True, 0, own.nbytes, operations), own, peers)
            if name in ASKED_FOR and m >= ASKED_ROWS and self.clock.is_hopper():
                row = Row("linear", case, f"{name}, asked for", True, 0, own.nbytes, operations)
                with crossover.environment("QKERNELS_GROUPED_WGMMA", "1"):
                    self._beside(row, own, peers)

    def _beside(self, row: Row, call: Call, peers: Mapping[str, float]) -> None:
        """Time a row and compare it with what its peers took."""
        if self.time(row, self._rotated(call)):
            row.versus = {peer: s / row.seconds for peer, s in peers.items()}

    def _crossover(self) -> None:
        for case, operations, call in crossover.calls(*self.sizes.crossover, self.clock.device):
            for way in (crossover.KERNEL, crossover.MATMUL):
                with crossover.forced(way):
                    row = Row(crossover.GROUP, case, way, True, 0, 0.0, operations)
                    self.time(row, self._rotated(call))

    def _rotated(self, call: Call) -> Callable[[], Sequence[Callable[[], object]]]:
        def calls() -> list[Callable[[], object]]:
            first = call.prepare()
            count = self.copies(int(call.nbytes))
            data = [first, *(tuple(t.clone() for t in first) for _ in range(count - 1))]
            return [lambda d=d: call.run(*d) for d in data]  # type: ignore[misc]

        return calls

    def _conv(self, conv: Conv) -> None:
        device = self.clock.device
        shape = (conv.batch, conv.channels, conv.size, conv.size)
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        weight_shape = (conv.out, conv.channels // conv.groups, conv.kernel, conv.kernel)
        weight = torch.randn(weight_shape, device=device, dtype=torch.bfloat16)
        weight = weight.to(memory_format=torch.channels_last)
        rest: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "groups": conv.groups,
        }
        peer = self.time(
            Row("conv", str(conv), "torch bf16 channels-last", False, 0, 0.0, conv.operations),
            lambda: [lambda: torch.nn.functional.conv2d(x, weight, **rest)] * 2,
        )

        def own() -> list[Callable[[], object]]:
            layer = torch.nn.Conv2d(
                conv.channels, conv.out, conv.kernel, bias=False, device=device, **rest
            )
            quantized = QConv2d.from_float(layer, W8A8(static=True), x_scale=0.03)
            codes = torch.randint(-127, 128, shape, device=device, dtype=torch.int8)
            codes = codes.to(memory_format=torch.channels_last)
            scale = torch.tensor(0.03, device=device)

            def run() -> Tensor:
                return functional.conv(
                    codes, quantized.packed, layout=quantized.layout, out_channels=conv.out,
                    kernel_size=(conv.kernel,) * 2, stride=(conv.stride,) * 2,
                    padding=(conv.padding,) * 2, dilation=(1, 1), groups=conv.groups,
                    activation="symmetric", x_scale=scale, y_scale=scale,
                )  # fmt: skip

            return [run, run]

        found = self.time(Row("conv", str(conv), "W8A8", True, 0, 0.0, conv.operations), own)
        if found and peer:
            found.versus[peer.name] = peer.seconds / found.seconds


def _own(x: Tensor, weight: Tensor, scheme: Scheme) -> Call:
    n, k = weight.shape
    layout = scheme.layout_on(x.device.type)

    def prepare() -> tuple[Tensor, ...]:
        coded = functional.quantize(
            weight, scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype
        )
        return (functional.pack(coded, layout),)

    sizes = (layout, k, n, scheme.group_size, scheme.activation_code, 0)
    op = torch.ops.qkernels.linear
    nbytes = float(_packed_bytes(scheme, k, n, x.device.type))
    return Call("", prepare, lambda packed: op(x, packed, *[None] * 5, *sizes), nbytes)


def _packed_bytes(scheme: Scheme, k: int, n: int, device: str) -> int:
    return -(-n // 16) * _C.block_bytes(scheme.layout_on(device), k, scheme.group_size)


def facts() -> dict[str, str]:
    """What the numbers were measured on and with."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
        capture_output=True, text=True, check=False,
    ) if torch.cuda.is_available() else None  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: rehearsal",
        "driver": driver.stdout.strip() if driver else "",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit.stdout.strip() or "unknown",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def copy_rate(rows: Sequence[Row]) -> float:
    """Bytes per second, read and written, of the copies on the device."""
    rates = [row.bytes / row.seconds for row in rows if row.group == "copy"]
    return statistics.median(rates) if rates else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    from qkernels.bench.cuda_report import report

    parser = argparse.ArgumentParser(prog="python -m qkernels.bench.cuda", description=__doc__)
    parser.add_argument("outdir", type=Path, help="where gpu.json and gpu.md go")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after them")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny cases on the CPU, whose times mean nothing"
    )
    chosen = parser.parse_args(arguments)
    if not chosen.rehearse and not torch.cuda.is_available():
        print("bench.cuda: there is no GPU here; --rehearse runs the cases on the CPU")
        return 1
    clock, sizes = (Rehearsal(), TINY) if chosen.rehearse else (Gpu(), Sizes())
    run = Run(clock, sizes, until=time.monotonic() + chosen.seconds)
    with torch.no_grad():
        run.all()
    chosen.outdir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"facts": facts(), "rows": [asdict(row) for row in run.rows]}
    found["copy_rate"] = copy_rate(run.rows)
    found["left_out"] = run.left_out
    (chosen.outdir / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.outdir / "gpu.md").write_text(report(run.rows, found["facts"], run.left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
