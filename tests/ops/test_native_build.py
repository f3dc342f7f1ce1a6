"""CPU kernels are compiled once, kept safely, and missed without harm; they run in torch's own threads."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.ops.native import build, cache, compiler, cpu, library
from moestro.ops.native.signatures import ABI, SIGNATURES
from ops.native_cases import compiles

PROBE = ("moestro_abi", "moestro_threads")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a new process of a user with an empty cache; of the sources, only the small one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(build.SOURCE / "probe.c", source)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(library, "SIGNATURES", {name: SIGNATURES[name] for name in PROBE})
    build._first.cache_clear()
    yield
    build._first.cache_clear()


def again() -> library.Library | None:
    """What the next process would get."""
    build._first.cache_clear()
    return build.load()


def kept() -> list[Path]:
    """All that lies in the cache folder."""
    return sorted((Path(os.environ["XDG_CACHE_HOME"]) / "moestro" / "native").glob("*"))


def script(path: Path, body: str) -> str:
    """A compiler of ours."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()


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


ALONE = """
import json, os, sys
from pathlib import Path
import torch
from moestro.ops.native import build, library
source, threads = Path(sys.argv[1]), int(sys.argv[2])
build.SOURCE = source
library.SIGNATURES = {name: library.SIGNATURES[name] for name in ("moestro_abi", "moestro_threads")}
torch.set_num_threads(threads)
x = torch.ones(1 << 20)
(x * 2).sum()  # torch's own pool exists now

def runtimes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "libgomp" in line or "omp5" in line or "libomp" in line})

def pool():
    return len(os.listdir("/proc/self/task"))

before = pool(), runtimes()
got = build.load()
ran = {n: got and got.moestro_threads(n) for n in (1, threads, torch.get_num_threads())}
torch.set_num_threads(1)
one = got and got.moestro_threads(torch.get_num_threads())
print(json.dumps({"reason": build.reason(), "before": before, "ran": ran, "one": one, "after": (pool(), runtimes())}))
"""


def start(threads: int, **environment: str) -> subprocess.Popen[str]:
    kept_out = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    line = [sys.executable, "-c", ALONE, str(build.SOURCE), str(threads)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env={**kept_out, **environment})


def answer(process: subprocess.Popen[str]) -> tuple[dict, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), err


@compiles
def test_threads_are_torch_s_own() -> None:
    got, _ = answer(start(2))
    assert got["ran"] == {"1": 1, "2": 2}
    assert got["one"] == 1
    assert len(got["before"][1]) >= 1
    assert got["after"] == got["before"]


@compiles
def test_two_processes_at_once(tmp_path: Path) -> None:
    """The compiler of either waits until the other's has begun, so that neither finds the other's library."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    body = f"""
case "$*" in *" -c "*)
  touch {meeting}/$$
  n=0
  while [ "$(ls {meeting} | wc -l)" -lt 2 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done;;
esac
exec gcc "$@"
"""
    both = [start(1, CC=script(tmp_path / "cc", body)) for _ in range(2)]
    answers = [answer(process) for process in both]
    for got, err in answers:
        assert re.fullmatch(r"avx\w+, compiled in \d+\.\d s", got["reason"])
        assert got["one"] == 1
        assert len(err.splitlines()) == 1
    assert len(list(meeting.iterdir())) == 2
    (file,) = kept()
    assert cache.intact(file)
