"""Which kernels run: the best that the machine has, those that QKERNELS_ISA names, or an error."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.process import run_python
from qkernels import _C

ROOT = Path(__file__).resolve().parents[2]


def test_isas_are_listed_from_the_slowest() -> None:
    assert _C.isas() == ["scalar", "avx2", "avxvnni", "avx512", "avx512bf16"]
    assert _C.available_isas() == _C.isas()[: len(_C.available_isas())]


def test_available_isas_are_what_the_cpu_says() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    expected = ["scalar"]
    if {"avx2", "fma", "f16c"} <= set(flags):
        expected.append("avx2")
        wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
        if "avx_vnni" in flags or wide <= set(flags):
            expected.append("avxvnni")
        if wide <= set(flags):
            expected += ["avx512", *(["avx512bf16"] if "avx512_bf16" in flags else [])]
    assert _C.available_isas() == expected
    features = _C.cpu_features()
    for name in ("avx2", "fma", "avx512f", "avx512bw"):
        assert features[name] == (name in flags)
    assert features["avxvnni"] == ("avx_vnni" in flags)


def test_the_best_runs_by_default() -> None:
    printed = run_python("-c", "from qkernels import _C; print(_C.isa())", isa="").stdout
    assert printed.strip() == _C.available_isas()[-1]


def test_this_session_runs_what_was_asked_for() -> None:
    assert _C.isa() == (os.environ.get("QKERNELS_ISA") or _C.available_isas()[-1])


WRONG = ["nonsense", "AVX2", "avx51", "avx512 ", "scalar,avx2"]
ASK = f"""
import os, torch, qkernels
assert "avx2" in qkernels._C.isas()
for wanted in {WRONG}:
    os.environ["QKERNELS_ISA"] = wanted
    for ask in (qkernels._C.isa, lambda: torch.ops.qkernels.quantize(torch.ones(3), 0)):
        try:
            ask()
        except RuntimeError as error:
            print(error)
os.environ["QKERNELS_ISA"] = "scalar"
print(qkernels._C.isa())
"""


def test_an_unknown_isa_is_an_error_at_first_use_and_not_at_import() -> None:
    *sentences, last = run_python("-c", ASK, isa="nonsense").stdout.splitlines()
    known = ", ".join(_C.available_isas())
    assert sentences == [
        f"qkernels: QKERNELS_ISA={wanted} is not an instruction set that qkernels knows; unset it "
        f"or choose one of: {known}"
        for wanted in WRONG
        for _ in range(2)
    ]
    # The mistake is not remembered.
    assert last == "scalar"


# ---- Machines that are not this one --------------------------------------------------------------
# csrc/cpu/dispatch.cpp is compiled alone, against a cpuid.h that reads the CPU from a variable.

CPUID = """
#pragma once
#include <cstdlib>
#include <sstream>
#include <string>
enum { bit_OSXSAVE = 1, bit_FMA = 2, bit_F16C = 4, bit_AVX = 8 };
enum { bit_AVX2 = 1, bit_AVX512F = 2, bit_AVX512BW = 4, bit_AVX512DQ = 8, bit_AVX512VL = 16 };
enum { bit_AVX512VNNI = 1, bit_AVX512BF16 = 2, bit_AVXVNNI = 4 };
inline bool has(const char* name) {
  std::istringstream words(std::getenv("FAKE_CPU"));
  for (std::string word; words >> word;)
    if (word == name) return true;
  return false;
}
#define QK_BIT(name) (has(#name) ? bit_##name : 0)
inline int __get_cpuid(unsigned, unsigned*, unsigned*, unsigned* c, unsigned*) {
  *c = QK_BIT(OSXSAVE) | QK_BIT(FMA) | QK_BIT(F16C) | QK_BIT(AVX);
  return 1;
}
inline int __get_cpuid_count(unsigned, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c,
                             unsigned*) {
  *a = subleaf == 1 ? QK_BIT(AVX512BF16) | QK_BIT(AVXVNNI) : 0;
  *b = QK_BIT(AVX2) | QK_BIT(AVX512F) | QK_BIT(AVX512BW) | QK_BIT(AVX512DQ) | QK_BIT(AVX512VL);
  *c = QK_BIT(AVX512VNNI);
  return has("LEAF7") ? 1 : 0;
}
"""
MAIN = """
#include <cstdio>
#include <stdexcept>
#include "cpu/kernels.h"
namespace qkernels {
#define QK_TABLE(name) \\
  const Kernels* name##_kernels() { static Kernels table{}; table.isa = #name; return &table; }
QK_TABLE(scalar) QK_TABLE(avx2) QK_TABLE(avxvnni) QK_TABLE(avxvnni_evex) QK_TABLE(avx512)
QK_TABLE(avx512bf16)
}
int main() {
  try {
    std::puts(qkernels::kernels().isa);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
"""
OLD = "LEAF7 OSXSAVE AVX"
HASWELL = f"{OLD} FMA F16C AVX2"
SKYLAKE = f"{HASWELL} AVX512F AVX512BW AVX512DQ AVX512VL"
CASCADE_LAKE = f"{SKYLAKE} AVX512VNNI"
ALDER_LAKE = f"{HASWELL} AVXVNNI"
SAPPHIRE_RAPIDS = f"{CASCADE_LAKE} AVX512BF16 AVXVNNI"
COOPER_LAKE = f"{CASCADE_LAKE} AVX512BF16"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory):
    """What dispatch.cpp says on a given CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to build dispatch.cpp for other machines")
    folder = tmp_path_factory.mktemp("dispatch")
    (folder / "cpuid.h").write_text(CPUID)
    (folder / "main.cpp").write_text(MAIN)
    sources = [ROOT / "csrc/cpu/dispatch.cpp", folder / "main.cpp"]
    command = [
        "g++",
        "-std=c++20",
        "-I",
        folder,
        "-I",
        ROOT / "csrc",
        *sources,
        "-o",
        folder / "ask",
    ]
    subprocess.run(command, check=True)

    @functools.cache
    def ask(cpu: str, wanted: str = "") -> str:
        env = {"FAKE_CPU": cpu, "QKERNELS_ISA": wanted}
        done = subprocess.run([folder / "ask"], env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return ask


needs_avx512 = pytest.mark.skipif(
    "avx512" not in _C.available_isas(),
    reason="the operating system's part (XCR0) is read from this machine, which lacks AVX-512",
)


@pytest.mark.parametrize(
    ("cpu", "isa"),
    [
        ("", "scalar"),
        (OLD, "scalar"),
        (f"{OLD} AVX2", "scalar"),  # no FMA
        (f"{OLD} FMA AVX2", "scalar"),  # no F16C
        (HASWELL.replace("OSXSAVE", ""), "scalar"),  # the operating system saves no ymm
        (HASWELL.replace("LEAF7", ""), "scalar"),
        pytest.param(HASWELL, "avx2", marks=needs_avx512),
        pytest.param(SKYLAKE, "avx2", marks=needs_avx512),  # no VNNI
        pytest.param(CASCADE_LAKE, "avx512", marks=needs_avx512),
        pytest.param(COOPER_LAKE, "avx512bf16", marks=needs_avx512),
        pytest.param(ALDER_LAKE, "avxvnni", marks=needs_avx512),
        pytest.param(f"{OLD} FMA F16C AVXVNNI", "scalar", marks=needs_avx512),  # no AVX2
        pytest.param(SAPPHIRE_RAPIDS, "avx512bf16", marks=needs_avx512),
        pytest.param(f"{HASWELL} AVX512BF16", "avx2", marks=needs_avx512),
        *(
            pytest.param(CASCADE_LAKE.replace(f"AVX512{part}", ""), "avx2", marks=needs_avx512)
            for part in ("BW", "DQ", "VL")
        ),
    ],
)
def test_the_best_of_another_machine(chosen, cpu: str, isa: str) -> None:
    assert chosen(cpu) == isa
    assert chosen(cpu, isa) == isa
    assert chosen(cpu, "scalar") == "scalar"


@needs_avx512
@pytest.mark.parametrize(
    ("cpu", "table"),
    [
        (ALDER_LAKE, "avxvnni"),
        (SAPPHIRE_RAPIDS, "avxvnni"),
        (CASCADE_LAKE, "avxvnni_evex"),
        (COOPER_LAKE, "avxvnni_evex"),
    ],
)
def test_avxvnni_is_encoded_as_the_cpu_wants(chosen, cpu: str, table: str) -> None:
    assert chosen(cpu, "avxvnni") == table


@pytest.mark.parametrize(("cpu", "wanted"), [("", "avx2"), (OLD, "avx512"), (OLD, "avx2")])
def test_an_isa_that_the_machine_lacks_is_an_error(chosen, cpu: str, wanted: str) -> None:
    """Never a silent fallback."""
    sentence = f"qkernels: QKERNELS_ISA={wanted} but this machine cannot run it; unset it or choose"
    assert chosen(cpu, wanted) == f"{sentence} one of: scalar"


@needs_avx512
@pytest.mark.parametrize("cpu", [HASWELL, SKYLAKE])
def test_without_vnni_there_is_no_avxvnni(chosen, cpu: str) -> None:
    assert chosen(cpu, "avxvnni").endswith("choose one of: scalar, avx2")


@needs_avx512
def test_the_choice_that_is_left_is_named(chosen) -> None:
    assert chosen(SKYLAKE, "avx512").endswith("unset it or choose one of: scalar, avx2")
    assert chosen(SKYLAKE, "nonsense").endswith("choose one of: scalar, avx2")
