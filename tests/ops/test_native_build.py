"""CPU kernels are compiled once, kept safely, and missed without harm; they run in torch's own threads."""

from __future__ import annotations

import os
import platform
import re
import stat
import sys
from pathlib import Path

import pytest

from moestro.ops.native import build, cache, compiler, cpu
from moestro.ops.native.signatures import ABI
from ops.build_cases import again, kept, said, script
from ops.native_cases import compiles

pytestmark = pytest.mark.usefixtures("fresh")


@compiles
def test_compiled_once_then_from_the_cache(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    first = build.load()
    assert first is not None
    assert (first.moestro_abi(), first.moestro_threads(1)) == (ABI, 1)
    level = first.instructions
    assert build.load() is first
    assert re.fullmatch(rf"{level}, compiled in \d+\.\d s", build.reason())
    assert len(lines := said(capfd)) == 1
    assert re.fullmatch(rf"moestro: compiled the CPU kernels \({level}\) in \d+\.\d s", lines[0])

    monkeypatch.delattr(compiler, "compile_library")
    second = again()
    assert second is not None
    assert second.moestro_abi() == ABI
    assert build.reason() == f"{level}, from the cache"
    assert said(capfd) == []


@compiles
def test_only_the_user_can_write_to_what_is_kept(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        build.load()
    finally:
        os.umask(before)
    (file,) = kept()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.name.startswith("kernels-")


@compiles
@pytest.mark.parametrize("harm", ["half", "empty", "bit", "shared", "link", "seal", "no library", "other ABI"])
def test_a_bad_file_in_the_cache_is_made_anew(harm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = cache.folder() / cache.key(cpu.instruction_set(), compiler.find(), [build.SOURCE / "probe.c"])
    cache.put(
        compiled((build.SOURCE / "probe.c").read_text(), tmp_path), file
    )  # not loaded: files in use are left alone
    assert cache.intact(file)
    content = bytearray(file.read_bytes())
    if harm == "half":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "bit":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif harm == "shared":
        file.chmod(0o622)
    elif harm == "link":
        file.rename(tmp_path / "elsewhere.so")
        file.symlink_to(tmp_path / "elsewhere.so")
    elif harm == "seal":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "no library":
        (tmp_path / "text").write_text("no library")
        cache.put(tmp_path / "text", file)
    else:
        cache.put(
            compiled("int moestro_abi(void) { return -1; } int moestro_threads(int n) { return n; }", tmp_path), file
        )
    said(capfd)
    assert again() is not None
    assert "compiled in" in build.reason()
    assert len(said(capfd)) == 1
    assert kept() == [file]
    assert cache.intact(file)
    assert again() is not None
    assert "from the cache" in build.reason()


def compiled(code: str, folder: Path) -> Path:
    (folder / "other.c").write_text(code)
    return compiler.compile_library(compiler.find(), [folder / "other.c"], cpu.instruction_set(), folder)


@compiles
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("int moestro_abi(void) { return 99; } int moestro_threads(int n) { return n; }", "interface 99"),
        (f"int moestro_abi(void) {{ return {ABI}; }}", "no function moestro_threads"),
        ("int GOMP_none(void); int moestro_abi(void) { return GOMP_none(); }", "no OpenMP runtime.*GOMP_none"),
        ("int __kmpc_none(void); int moestro_abi(void) { return __kmpc_none(); }", "install gcc.*__kmpc_none"),
        ("int other(void); int moestro_abi(void) { return other(); }", "cannot be loaded.*other"),
        ("int moestro_abi(void) { return x; }", r"gcc could not compile them .*error.*x"),
    ],
)
def test_a_library_that_does_not_fit_is_refused(code: str, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    (build.SOURCE / "probe.c").write_text(code)
    assert build.load() is None
    assert re.search(why, build.reason())
    assert said(capfd) == [f"moestro: no CPU kernels: {build.reason()}; using torch"]
    assert kept() == []


@pytest.mark.parametrize("missing", ["none on the path", "CC"])
@compiles
def test_no_compiler(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if missing == "CC":
        monkeypatch.setenv("CC", "nowhere-cc -pipe")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(3):
        assert build.load() is None
    assert build.reason() == (
        "there is no compiler 'nowhere-cc -pipe', which CC names" if missing == "CC" else "there is no C compiler (gcc)"
    )
    assert said(capfd) == [f"moestro: no CPU kernels: {build.reason()}; using torch"]


@compiles
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("exit 3", r"--version failed \(exit status 3\)"),
        (
            'case "$1" in --version) echo fake 1;; *) echo "note" >&2; echo "a.c:1: error: b" >&2; exit 1;; esac',
            r"error: b",
        ),
        ('case "$1" in --version) echo fake 1;; *) kill -9 $$;; esac', r"exit status -9"),
        ("echo fake 1", "wrote no library"),
    ],
)
def test_a_failing_compiler(
    body: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "cc", body))
    assert build.load() is None
    assert re.search(why, build.reason())
    assert "\n" not in build.reason()
    assert said(capfd) == [f"moestro: no CPU kernels: {build.reason()}; using torch"]
    assert kept() == []


@compiles
def test_a_compiler_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "_SECONDS", 0.3)
    monkeypatch.setenv("CC", script(tmp_path / "cc", 'case "$1" in --version) echo fake 1;; *) exec sleep 60;; esac'))
    assert build.load() is None
    assert "took more than" in build.reason()


@compiles
def test_a_compiler_that_does_not_know_the_levels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = 'case "$*" in *x86-64-v*|*mtune*) echo "bad value" >&2; exit 1;; esac; exec gcc "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "cc", body))
    assert build.load() is not None


def spoil(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the cache folder one that cannot be used. Permissions alone do not stop the superuser."""
    folder = tmp_path / "cache" / "moestro" / "native"
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    if how == "no folder":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    elif how == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def unknown() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", unknown)
    elif how == "group":
        folder.chmod(0o770)
    elif how == "others":
        folder.chmod(0o702)
    elif how == "link":
        folder.rename(tmp_path / "real")
        folder.symlink_to(tmp_path / "real")
    elif how == "foreign":
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    else:

        def refuse(prefix: str, dir: Path) -> None:
            raise OSError(30, "Read-only file system", str(dir))

        monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)


SPOILT = {
    "no folder": "there is no cache folder /dev/null/cache.* (Not a directory)",
    "no home": "there is no cache folder (Could not determine home directory.)",
    "group": "others can write to the cache folder .* (chmod 700 it)",
    "others": "others can write to the cache folder .* (chmod 700 it)",
    "link": "the cache folder .* is a link",
    "foreign": "the cache folder .* belongs to another user",
    "read-only": "the cache folder .* cannot be written to (Read-only file system)",
}


@compiles
@pytest.mark.parametrize("how", list(SPOILT))
def test_without_a_cache_folder_a_process_compiles_for_itself(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(cache.tempfile, "tempdir", str(temporary))
    spoil(how, monkeypatch, tmp_path)
    got = build.load()
    assert got is not None
    assert got.moestro_threads(1) == 1
    why = SPOILT[how].replace("(", r"\(").replace(")", r"\)")
    assert re.search(rf"compiled in \d+\.\d s, for this process only: {why}$", build.reason())
    assert len(said(capfd)) == 1
    assert list(temporary.iterdir()) == []
    if how not in ("no folder", "no home"):
        assert kept() == []


@compiles
def test_nowhere_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.tempfile, "tempdir", "/dev/null/temporary")
    assert build.load() is None
    assert build.reason() == "there is no folder for temporary files (Not a directory)"


@compiles
def test_a_cache_that_can_only_be_read_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build.load()
    spoil("read-only", monkeypatch, tmp_path)
    assert again() is not None
    assert "from the cache" in build.reason()


def test_the_name_of_a_library_follows_all_it_was_made_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, header = tmp_path / "a.c", tmp_path / "a.h"
    source.write_text("1")
    header.write_text("2")
    one = compiler.Compiler(("/usr/bin/gcc",), "gcc 12")

    def key(level: str = "avx2", by: compiler.Compiler = one) -> str:
        return cache.key(level, by, [source, header])

    names = [key(), key("avx512"), key(by=one._replace(version="gcc 13")), key(by=one._replace(command=("/bin/cc",)))]
    header.write_text("3")
    names.append(key())
    source.write_text("12")
    names.append(key())
    monkeypatch.setattr(cache, "__version__", "9")
    names.append(key())
    monkeypatch.setattr(compiler, "_COMPILE", ("-O2",))
    names.append(key())
    assert len(set(names)) == len(names)
    assert key() == names[-1]


@compiles
def test_old_libraries_leave(tmp_path: Path) -> None:
    build.load()
    (file,) = kept()
    for age in range(1, 30):
        old = file.with_name(f"kernels-avx2-{age}.so")
        old.write_bytes(b"")
        os.utime(old, (1e9 - age, 1e9 - age))
    stale, recent = file.with_name(".new-stale"), file.with_name(".new-recent")
    stale.touch()
    os.utime(stale, (1e9, 1e9))
    recent.touch()
    file.unlink()
    assert again() is not None
    assert kept() == sorted([file, recent, *(file.with_name(f"kernels-avx2-{age}.so") for age in range(1, 16))])


@pytest.mark.parametrize("other", ["cpu", "system", "torch", "source"])
def test_where_there_are_no_kernels(
    other: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin" if other == "system" else "linux")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64" if other == "cpu" else "x86_64")
    if other in ("torch", "source"):
        monkeypatch.setattr(cpu, "instruction_set", lambda: "avx2")
        monkeypatch.setattr(compiler, "find", lambda: compiler.Compiler(("gcc",), "gcc 12"))
    monkeypatch.setattr(build.torch.backends.openmp, "is_available", lambda: other != "torch")
    monkeypatch.setattr(build, "SOURCE", Path("/nowhere"))
    assert build.load() is None
    assert build.reason().startswith(
        {
            "cpu": "they are for x86-64, and this CPU is aarch64",
            "system": "they are for Linux, and this is Darwin",
            "torch": "this torch was built without OpenMP",
            "source": "the package was installed without its C source",
        }[other]
    )
    build.load()
    assert said(capfd) == [f"moestro: no CPU kernels: {build.reason()}; using torch"]
