"""Code that needs more than the oldest x86-64 stays inside its ISA's namespace.

A wheel is built once and runs on every x86-64 machine, so outside of those namespaces there may be
no instruction that came after SSE2. One inline function that the
compiler emits for the wrong target is enough to crash a user's process at import, and no other test
would notice on a machine that has the instruction. So this one reads the machine code.
"""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from qkernels import _C

# What may precede the opcode: operand and address size, repeat, lock, segments.
LEGACY_PREFIXES = {"66", "67", "f2", "f3", "f0", "2e", "36", "3e", "26", "64", "65"}
# They are printed before the mnemonic, as "{vex}" is.
PREFIX_WORDS = re.compile(r"^((\{vex\}|rep\w*|lock|bnd|notrack|data16|cs|ds) )+")

# Later than SSE2 without a VEX prefix: SSE3, SSSE3, SSE4, POPCNT, LZCNT, MOVBE, ADX. TZCNT is not
# here: older machines run its bytes as BSF, which compilers count on.
AFTER_SSE2 = re.compile(
    r"(addsubp[sd]|hadd\w+|hsub\w+|lddqu|mov(ddup|shdup|sldup)"
    r"|pshufb|ph(add|sub)s?[wd]|pmaddubsw|pmulhrsw|psign[bwd]|pabs[bwd]|palignr"
    r"|p?blend\w+|dpp[sd]|extractps|insertps|mpsadbw|packusdw|pcmp(eq|gt)q|pcmp[ei]str[im]"
    r"|pextr[bdq]|pinsr[bdq]|pm(ax|in)(s[bd]|u[wd])|pmov[sz]x\w+|pmul(dq|ld)|ptest|round[ps][sd]"
    r"|movntdqa|crc32\w*|popcnt|lzcnt|movbe|ad[co]x|phminposuw)"
)
# Each ISA's namespace may use what dispatch.cpp asks the CPU for, and no more.
FORBIDDEN_IN_AVX2 = re.compile(r"vpdp|vpmadd52|vsha|vsm[34]|vaes|vgf2p8|vpclmul|.*bf16")
# On 256 bits vpdpbusd and nothing else, in the encoding of AVX-VNNI or in that of AVX-512.
FORBIDDEN_IN_AVXVNNI = re.compile(rf"(?!vpdpbusd$)({FORBIDDEN_IN_AVX2.pattern})")
# AVX-512 F, BW, DQ, VL and VNNI are asked for, and BF16 in a namespace of its own, where vpermi2b
# of VBMI stands behind a question of its own; the rest of VBMI, FP16 and the others are not.
FORBIDDEN_IN_AVX512 = re.compile(
    r".*bf16|vperm([it]2)?b|vpmultishiftqb|vp(compress|expand)[bw]|vpsh[lr]dv?[wdq]|vpopcnt"
    r"|vpshufbitqmb|vgf2p8|vaes|vpclmul|vpmadd52|vp2intersect|v\w+(ph|sh)$|t(dp|ile)"
)

NAMESPACES = ("avx2", "avxvnni", "avxvnni_evex", "avx512", "avx512bf16")
ISAS = "|".join(f"{len(name)}({name})" for name in NAMESPACES)


class Instruction(NamedTuple):
    function: str
    bytes: list[str]
    mnemonic: str
    text: str

    @property
    def encoding(self) -> str:
        """In 64-bit code these three bytes can begin nothing but a VEX or an EVEX instruction."""
        first = next((byte for byte in self.bytes if byte not in LEGACY_PREFIXES), "")
        return {"c4": "VEX", "c5": "VEX", "62": "EVEX"}.get(first, "legacy")


@cache
def instructions() -> list[Instruction]:
    listing = subprocess.run(
        ["objdump", "--disassemble", "--wide", _C.__file__],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    return list(parse(listing))


def parse(listing: str) -> Iterator[Instruction]:
    function = ""
    for line in listing.splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = start[1]
        elif (parts := line.split("\t"))[2:]:
            words = PREFIX_WORDS.sub("", parts[2]).split()
            yield Instruction(function, parts[1].split(), words[0] if words else "", parts[2])


def isa_of(function: str) -> str:
    """The ISA whose namespace a function is in, read from its mangled name ("" for none).

    Only the name's own scope counts: a standard library template that takes a type of
    `qkernels::avx2` as its argument is emitted outside the namespace, for the target that happened
    to be set, and is just the kind of leak to look for.
    """
    scope = re.match(rf"_Z+N[KVrRO]*8qkernels(?:{ISAS})", function)
    return next(filter(None, scope.groups())) if scope else ""


def fault(instruction: Instruction) -> str:
    """Why an instruction must not stand where it stands ("" if it may)."""
    isa, mnemonic = isa_of(instruction.function), instruction.mnemonic
    if isa == "":
        if instruction.encoding != "legacy":
            return f"{instruction.encoding} outside the ISA namespaces"
        return "later than SSE2" if AFTER_SSE2.fullmatch(mnemonic) else ""
    if isa == "avx2":
        if instruction.encoding == "EVEX":
            return "EVEX in avx2"
        return "not in AVX2, FMA or F16C" if FORBIDDEN_IN_AVX2.match(mnemonic) else ""
    if isa in ("avxvnni", "avxvnni_evex"):
        vnni_encoding = "VEX" if isa == "avxvnni" else "EVEX"
        expected = vnni_encoding if mnemonic == "vpdpbusd" else "VEX"
        if instruction.encoding not in (expected, "legacy"):
            return f"{instruction.encoding} for {mnemonic} in {isa}"
        return "not in AVX2, FMA or F16C" if FORBIDDEN_IN_AVXVNNI.match(mnemonic) else ""
    allowed = {"vcvtps2ph"}
    if isa == "avx512bf16":
        allowed |= {"vdpbf16ps", "vcvtne2ps2bf16"}
        # Only in what is made for int8 by table: A16<Format::int8, true>.
        allowed |= {"vpermi2b"} if "A16ILNS_6FormatE0ELb1EE" in instruction.function else set()
    forbidden = FORBIDDEN_IN_AVX512.match(mnemonic) and mnemonic not in allowed
    return "more than AVX-512 F, BW, DQ, VL and VNNI" if forbidden else ""


def test_no_instruction_leaves_its_isa() -> None:
    leaks: dict[str, str] = {}
    for instruction in instructions():
        if why := fault(instruction):
            leaks.setdefault(instruction.function, f"{why}: {instruction.text.strip()}")
    assert not leaks, "\n".join(f"{name}: {what}" for name, what in leaks.items())


@pytest.mark.parametrize(
    ("isa", "register"),
    [("avx2", "ymm"), ("avxvnni", "vpdpbusd"), ("avx512", "zmm"), ("avx512bf16", "vdpbf16ps")],
)
def test_the_namespaces_hold_their_isa(isa: str, register: str) -> None:
    """Or else the test above would look at nothing."""
    assert isa in _C.isas()
    code = [instruction for instruction in instructions() if isa_of(instruction.function) == isa]
    assert sum(register in instruction.text for instruction in code) > 100
    assert any(isa_of(instruction.function) == "" for instruction in instructions())


def code_of(namespace: str) -> dict[str, list[str]]:
    """Its functions, without what depends on where code lies and how long it is."""
    code: dict[str, list[str]] = {}
    for instruction in instructions():
        if isa_of(instruction.function) != namespace:
            continue
        if re.search(r"\bnop|\bxchg +%ax,%ax|\bdata16\b", instruction.text):  # for alignment
            continue
        text = re.sub(r" +#.*", "", instruction.text.replace("{vex} ", ""))
        text = re.sub(r"\b[0-9a-f]+ <.*>|-?0x[0-9a-f]+\(%rip\)", "PLACE", text)
        name = instruction.function.replace(f"{len(namespace)}{namespace}", "NAMESPACE")
        code.setdefault(name, []).append(" ".join(text.split()))
    return code


def test_both_encodings_of_avxvnni_are_the_same_code() -> None:
    """So what machines without AVX-VNNI test is what those with it run."""
    vex, evex = code_of("avxvnni"), code_of("avxvnni_evex")
    assert sum(line.startswith("vpdpbusd") for lines in vex.values() for line in lines) > 100
    assert vex.keys() == evex.keys()
    assert [name for name in vex if vex[name] != evex[name]] == []


@pytest.mark.parametrize(
    ("function", "isa"),
    [
        ("_ZN8qkernels4avx26linearERKNS_10LinearArgsE", "avx2"),
        ("_ZN8qkernels6avx512L4tileERKNS_10LinearArgsE.constprop.0", "avx512"),
        ("_ZZN8qkernels4avx24rowsEvENKUliE_clEi", "avx2"),
        ("_ZN8qkernels7avxvnni6linearERKNS_10LinearArgsE", "avxvnni"),
        ("_ZN8qkernels12avxvnni_evex6linearERKNS_10LinearArgsE", "avxvnni_evex"),
        ("_ZN8qkernels10avx512bf166linearERKNS_10LinearArgsE", "avx512bf16"),
        ("_ZN8qkernels6scalar6linearERKNS_10LinearArgsE", ""),
        ("_ZSt3minIN8qkernels4avx24VecFEERKT_S5_S5_", ""),
        ("_GLOBAL__sub_I_avx2.cpp", ""),
    ],
)
def test_namespace_of_a_mangled_name(function: str, isa: str) -> None:
    assert isa_of(function) == isa


VEX_VNNI = "c4 e2 75 50 c2\t{vex} vpdpbusd %ymm2,%ymm1,%ymm0"
EVEX_VNNI = "62 f2 75 28 50 c2\tvpdpbusd %ymm2,%ymm1,%ymm0"


@pytest.mark.parametrize(
    ("function", "line", "found"),
    [
        ("main", "c5 fc 58 c1\tvaddps %ymm1,%ymm0,%ymm0", "VEX outside the ISA namespaces"),
        ("main", "62 f1 7c 48 58 c1\tvaddps %zmm1,%zmm0,%zmm0", "EVEX outside the ISA namespaces"),
        ("main", "f3 0f b8 c7\tpopcnt %edi,%eax", "later than SSE2"),
        ("main", "66 0f 38 00 c1\tpshufb %xmm1,%xmm0", "later than SSE2"),
        ("main", "f3 a4\trep movsb %ds:(%rsi),%es:(%rdi)", ""),
        ("main", "0f 58 c1\taddps %xmm1,%xmm0", ""),
        ("_ZN8qkernels4avx21fEv", "c5 fc 58 c1\tvaddps %ymm1,%ymm0,%ymm0", ""),
        ("_ZN8qkernels4avx21fEv", "62 f1 7c 28 58 c1\tvaddps %ymm17,%ymm0,%ymm0", "EVEX in avx2"),
        ("_ZN8qkernels4avx21fEv", VEX_VNNI, "not in AVX2, FMA or F16C"),
        ("_ZN8qkernels7avxvnni1fEv", VEX_VNNI, ""),
        ("_ZN8qkernels7avxvnni1fEv", EVEX_VNNI, "EVEX for vpdpbusd in avxvnni"),
        ("_ZN8qkernels12avxvnni_evex1fEv", EVEX_VNNI, ""),
        ("_ZN8qkernels12avxvnni_evex1fEv", VEX_VNNI, "VEX for vpdpbusd in avxvnni_evex"),
        (
            "_ZN8qkernels7avxvnni1fEv",
            "c4 e2 75 52 c2\t{vex} vpdpwssd %ymm2,%ymm1,%ymm0",
            "not in AVX2, FMA or F16C",
        ),
        (
            "_ZN8qkernels6avx5121fEv",
            "62 f2 76 48 52 c2\tvdpbf16ps %zmm2,%zmm1,%zmm0",
            "more than AVX-512 F, BW, DQ, VL and VNNI",
        ),
        ("_ZN8qkernels10avx512bf161fEv", "62 f2 76 48 52 c2\tvdpbf16ps %zmm2,%zmm1,%zmm0", ""),
        (
            "_ZN8qkernels10avx512bf161fEv",
            "62 f2 75 48 75 c2\tvpermi2b %zmm2,%zmm1,%zmm0",
            "more than AVX-512 F, BW, DQ, VL and VNNI",
        ),
        (
            "_ZN8qkernels10avx512bf164tileINS0_3A16ILNS_6FormatE0ELb1EEELi1ELi6EEEvv",
            "62 f2 75 48 75 c2\tvpermi2b %zmm2,%zmm1,%zmm0",
            "",
        ),
        ("_ZN8qkernels6avx5121fEv", "c4 e3 7d 1d c1 00\tvcvtps2ph $0x0,%ymm0,%xmm1", ""),
    ],
)
def test_a_leak_is_found(function: str, line: str, found: str) -> None:
    (instruction,) = parse(f"0000000000001000 <{function}>:\n    1000:\t{line}")
    assert fault(instruction) == found
