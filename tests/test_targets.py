"""targets.yaml as shipped, files of a user's own, and what `native` becomes on hosts of every kind."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from horq_tvm import targets
from horq_tvm.errors import HorqError, UsageError

PRESETS = targets.presets()
CUDA = [name for name, target in PRESETS.items() if target.family == "cuda"]
LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-vpopcntdq")

OWN = """
version: 1
targets:
  board:
    description: A board of my own
    extends: x86-64-v3
    l2_kib: 512
    compiler: [clang-17, --target=x86_64-linux-gnu]
"""


def host(preset: str, cpu: str | None = None, without: tuple[str, ...] = ()) -> targets.Host:
    """A machine with exactly a preset's features, or some fewer."""
    return targets.Host("x86_64", frozenset(PRESETS[preset].features) - set(without), cpu)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


def test_levels_add_up() -> None:
    for lower, higher in pairwise(LEVELS):
        assert set(PRESETS[lower].features) < set(PRESETS[higher].features)
        assert PRESETS[lower].vector_bits <= PRESETS[higher].vector_bits
    assert [PRESETS[name].popcount for name in LEVELS] == ["scalar", "ssse3", "avx2", "avx512bw", "vpopcntdq"]
    assert "popcnt" not in PRESETS["x86-64"].features
    assert (PRESETS["zen5"].l1_bytes, PRESETS["zen5"].l2_bytes) == (48 * 1024, 1024 * 1024)


@pytest.mark.parametrize("name", PRESETS)
def test_llvm_uses_nothing_that_the_preset_does_not_name(name: str) -> None:
    """`tvm_target` raises where LLVM might use an extension that the library would not check for."""
    pytest.importorskip("tvm")
    target = PRESETS[name].host_target()
    assert target.attrs["mcpu"] == PRESETS[name].mcpu
    assert target.kind.name == "llvm"


def test_features_that_llvm_may_use_must_be_named(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    path = written(tmp_path, OWN.replace("l2_kib: 512", "mcpu: znver4"))
    with pytest.raises(HorqError, match="'znver4' may use .*avx512_vpopcntdq.* which `features`"):
        targets.resolve(f"{path}:board").tvm_target()


def test_an_unknown_cpu_is_an_error_and_not_a_generic_one(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    path = written(tmp_path, OWN.replace("l2_kib: 512", "mcpu: znver55"))
    with pytest.raises(HorqError, match="no mcpu 'znver55'; accepted: .*znver5"):
        targets.resolve(f"{path}:board").tvm_target()


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(
        UsageError, match=r"unknown target 'zen6' \(did you mean zen5\?\); accepted: native, x86-64, .*"
    ):
        targets.resolve("zen6")
    assert targets.names() == ("native", *PRESETS)


def test_own_file_extends_a_shipped_target(tmp_path: Path) -> None:
    path = written(tmp_path, OWN)
    board = targets.resolve(f"{path}:board")
    assert board.name == "board"
    assert board.features == PRESETS["x86-64-v3"].features
    assert board.l2_bytes == 512 * 1024
    assert board.compiler == ("clang-17", "--target=x86_64-linux-gnu")
    assert board.level is None
    with pytest.raises(UsageError, match=r"unknown target 'bored' in .*own.yaml \(did you mean board\?\)"):
        targets.resolve(f"{path}:bored")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("l2_kb: 512", "targets.board: l2_kb: unknown key; accepted: .*l2_kib"),
        ("popcount: avx3", "targets.board: popcount: .*'vpopcntdq', .*'cnt' or 'popc'; found 'avx3'"),
        ("l2_kib: '512'", "targets.board: l2_kib: .*valid integer; found '512'"),
        ("l2_kib: 0", "targets.board: l2_kib: .*greater than 0; found 0"),
        ("vector_bits: 300", "targets.board: vector_bits: .*128, 256 or 512; found 300"),
        ("family: sparc", "targets.board: family: .*'x86', 'arm' or 'cuda'; found 'sparc'"),
        ("features: [avx512_vpopcnt]", "unknown CPU feature 'avx512_vpopcnt'; accepted: avx512_vpopcntdq"),
        ("features: avx2", "targets.board: features: .*found 'avx2'"),
        (
            "mattr: [avx512vnni]",
            r"targets.board: mattr.0: found 'avx512vnni'; accepted: \+ or - and one of .*avx512vnni",
        ),
        (
            "mtriple: aarch64-linux-gnu",
            "targets.board: mtriple: found 'aarch64-linux-gnu'; .*family x86: one of x86_64",
        ),
        ("features: [asimd]", "unknown CPU feature 'asimd'; accepted: "),
        ("mattr: [+dotprod]", r"mattr.0: found '\+dotprod'; accepted: "),
        ("extends: x86-64-v9", "targets.board.extends: unknown target 'x86-64-v9'; accepted: x86-64, .*board"),
        ("extends: board", "targets.board.extends: board -> board goes round in a circle"),
        ("family: x86", "targets.board: mtriple: missing"),
    ],
)
def test_a_mistake_names_file_key_and_what_is_accepted(tmp_path: Path, line: str, complaint: str) -> None:
    text = OWN.replace("l2_kib: 512", line)
    if line.startswith("extends"):
        text = text.replace("    extends: x86-64-v3\n", "")
    if line == "family: x86":
        text = text.replace("    extends: x86-64-v3\n", "")
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=complaint) as caught:
        targets.resolve(f"{path}:board")
    assert str(caught.value).startswith(f"{path}: targets.board")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("version: 2\ntargets: {}\n", "version: .*found 2"),
        ("verson: 1\ntargets: {}\n", "verson: unknown key; accepted: version, targets"),
        ("version: 1\ntargets: {a: {}, a: {}}\n", "the key 'a' stands twice"),
        ("version: 1\ntargets: [\n", "not valid YAML"),
        ("- x86-64\n", "holds list; accepted: a mapping"),
    ],
)
def test_a_broken_file(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        targets.load_presets(written(tmp_path, text))


@pytest.mark.parametrize("name", LEVELS)
def test_native_is_the_highest_level_that_fits(name: str) -> None:
    assert targets.native(PRESETS, host(name)) == PRESETS[name]


def test_native_is_the_listed_cpu() -> None:
    assert targets.native(PRESETS, host("zen5", "znver5")) == PRESETS["zen5"]
    # Everything a Zen 4 needs is there as well; LLVM's name decides.
    assert targets.native(PRESETS, host("zen5", "znver4")) == PRESETS["zen4"]


def test_native_on_an_unlisted_cpu_takes_its_name_and_features() -> None:
    pytest.importorskip("tvm")
    tiger = host("icelake-server", "tigerlake")
    target = targets.native(PRESETS, tiger)
    assert (target.name, target.mcpu, target.mattr) == ("native:tigerlake", "tigerlake", ())
    assert target.popcount == "vpopcntdq"
    assert set(target.features) <= tiger.flags
    assert "avx512_bitalg" in target.features
    target.tvm_target()


def test_native_leaves_out_what_a_virtual_machine_masks() -> None:
    pytest.importorskip("tvm")
    masked = host("zen5", "znver5", without=("avx_vnni", "gfni"))
    target = targets.native(PRESETS, masked)
    assert (target.name, target.popcount) == ("native:znver5", "vpopcntdq")
    assert set(target.mattr) == {"-avxvnni", "-gfni"}
    assert not target.missing_on(masked.flags)
    target.tvm_target()


def test_native_without_avx512_on_a_cpu_that_has_it() -> None:
    pytest.importorskip("tvm")
    flags = frozenset(flag for flag in PRESETS["zen4"].features if not flag.startswith("avx512"))
    target = targets.native(PRESETS, targets.Host("x86_64", flags, "znver4"))
    assert (target.popcount, target.vector_bits) == ("avx2", 256)
    assert "-avx512f" in target.mattr
    assert not [flag for flag in target.features if flag.startswith("avx512")]
    target.tvm_target()


def test_native_trusts_flags_over_a_lesser_name() -> None:
    pytest.importorskip("tvm")
    assert targets.native(PRESETS, host("x86-64-v4", "haswell")) == PRESETS["x86-64-v4"]


def test_native_where_there_is_no_preset() -> None:
    with pytest.raises(HorqError, match="native: no preset for this machine .riscv64"):
        targets.native(PRESETS, targets.Host("riscv64", frozenset({"asimd", "fp"}), None))
    with pytest.raises(HorqError, match="native: no preset for this machine .armv6l"):
        targets.native(PRESETS, targets.Host("armv6l", frozenset({"half", "thumb", "vfp"}), None))


BOARDS = {  # machine, and `Features` of /proc/cpuinfo as their systems print them
    "rpi2": ("armv7l", "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm"),
    "rpi3": ("aarch64", "fp asimd evtstrm crc32 cpuid"),
    "rpi4-32": ("armv7l", "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm crc32"),
    "rpi5": (
        "aarch64",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
}


@pytest.mark.parametrize("name", BOARDS)
def test_native_on_a_board_is_its_own_target_and_compiler(name: str) -> None:
    machine, flags = BOARDS[name]
    target = targets.native(PRESETS, targets.Host(machine, frozenset(flags.split()), PRESETS[name].mcpu))
    assert (target.name, target.compiler) == (name, ("cc",))


def test_native_on_an_unknown_board_is_the_best_of_its_architecture() -> None:
    machine, flags = BOARDS["rpi5"]
    assert targets.native(PRESETS, targets.Host(machine, frozenset(flags.split()), None)).name == "aarch64-dotprod"
    machine, flags = BOARDS["rpi3"]
    assert targets.native(PRESETS, targets.Host(machine, frozenset(flags.split()), None)).name == "aarch64"
    machine, flags = BOARDS["rpi2"]
    assert targets.native(PRESETS, targets.Host(machine, frozenset(flags.split()), None)).name == "armv7-neon"


def test_features_of_an_arm_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nBogoMIPS\t: 38.40\nFeatures\t: fp asimd crc32\n")
    assert targets._cpu_flags(path) == {"fp", "asimd", "crc32"}


def test_architectures() -> None:
    assert [targets.architecture_of(name) for name in ("AMD64", "x86_64-linux-gnu", "arm64", "armv8l", "riscv64")] == [
        "x86_64",
        "x86_64",
        "aarch64",
        "arm",
        "riscv64",
    ]
    assert targets.architecture_of("armv8-linux-gnueabihf") == "arm"


def test_what_cannot_run_here_is_tried_out_as_native(tmp_path: Path) -> None:
    chimera = targets.resolve(f"{written(tmp_path, OWN.replace('l2_kib: 512', 'features: [avx512_fp16, xop]'))}:board")
    assert targets.runnable(chimera) == targets.resolve("native")
    if targets.this_host().machine == "x86_64":
        assert targets.runnable(PRESETS["x86-64"]) == PRESETS["x86-64"]
        assert targets.runnable(PRESETS["rpi4"]) == targets.resolve("native")


def test_native_on_this_machine_can_run_here() -> None:
    here = targets.this_host()
    if targets.architecture_of(here.machine) not in targets.TO_CPUINFO:
        pytest.skip(f"there are no presets for {here.machine}")
    assert not targets.resolve("native").missing_on(here.flags)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in CUDA])
def test_a_library_can_check_every_feature(name: str) -> None:
    pytest.importorskip("tvm")
    from horq_tvm.emit.cpu_features import questions

    asked = questions(PRESETS[name].family, PRESETS[name].features)
    assert tuple(feature for feature, _ in asked) == PRESETS[name].features


def test_every_architecture_has_a_card_of_its_own_and_is_in_the_library_of_all() -> None:
    alone = [PRESETS[name].archs for name in CUDA if len(PRESETS[name].archs) == 1]
    assert sorted(arch for (arch,) in alone) == list(PRESETS["cuda"].archs) == [75, 80, 86, 87, 89, 90]
    assert PRESETS["cuda-aarch64"].archs == PRESETS["cuda"].archs
    assert PRESETS["cuda-sm87"].architecture == PRESETS["cuda-aarch64"].architecture == "aarch64"


@pytest.mark.parametrize("name", CUDA)
def test_tvm_compiles_for_the_lowest_architecture_and_the_host(name: str) -> None:
    pytest.importorskip("tvm")
    target = PRESETS[name].tvm_target()
    assert target.kind.name == "cuda"
    assert target.attrs["arch"] == f"sm_{min(PRESETS[name].archs)}"
    assert target.attrs["max_shared_memory_per_block"] == PRESETS[name].shared_bytes == 48 * 1024
    assert target.host.attrs["mtriple"] == PRESETS[name].mtriple


def test_a_card_is_never_native_and_is_tried_out_on_this_cpu() -> None:
    assert targets.resolve("native").family != "cuda"
    assert targets.runnable(PRESETS["cuda"]) == targets.resolve("native")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("archs: [74]", "archs.0: unknown architecture sm_74; accepted: 75, 80, 86, 87, 89, 90"),
        ("archs: []", r"archs: found \(\); accepted: a value for the family cuda"),
        ("shared_kib: 0", "shared_kib: found 0; accepted: a value for the family cuda"),
        ("shared_kib: 49", "shared_kib: .*48.*found 49"),
        ("mtriple: armv7-linux-gnueabihf", "family cuda: one of x86_64, aarch64"),
    ],
)
def test_mistakes_about_a_card(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, OWN.replace("x86-64-v3", "cuda").replace("l2_kib: 512", line))
    with pytest.raises(UsageError, match=message):
        targets.resolve(f"{path}:board")


def test_only_a_card_has_architectures(tmp_path: Path) -> None:
    path = written(tmp_path, OWN.replace("l2_kib: 512", "archs: [86]"))
    with pytest.raises(UsageError, match="archs: found \\(86,\\); accepted: the family cuda alone has it"):
        targets.resolve(f"{path}:board")
