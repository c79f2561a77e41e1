"""What is kept on disk: where, for whom, and what is not believed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from posattn.backends.common import disk_cache
from posattn.backends.cuda import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    disk_cache._warn.cache_clear()
    monkeypatch.setenv("POSATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_written_is_read(folder: Path) -> None:
    assert disk_cache.read("cuda/key") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk_cache.write("cuda/key", b"content")
        assert disk_cache.read("cuda/key") == b"content"
    assert [path.name for path in (folder / "cuda").iterdir()] == ["key"]


def test_it_is_for_the_user_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        disk_cache.write("cuda/key", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "cuda").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "cuda" / "key").stat().st_mode) == 0o600


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSATTN_CACHE_DIR", "/given")
    assert disk_cache.base() == Path("/given")
    monkeypatch.delenv("POSATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user")
    assert disk_cache.base() == Path("/user/posattn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert disk_cache.base() == Path("/home/someone/.cache/posattn")


def test_a_user_without_a_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("POSATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="Could not determine home directory"):
        disk_cache.write("key", b"content")
    assert disk_cache.read("key") is None


@pytest.mark.parametrize("writable", [0o770, 0o777])
def test_a_folder_that_others_may_write_to(folder: Path, writable: int) -> None:
    disk_cache.write("cuda/key", b"content")
    (folder / "cuda").chmod(writable)
    with pytest.warns(RuntimeWarning, match="others may write"):
        assert disk_cache.read("cuda/key") is None


def test_a_folder_or_a_file_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_cache.write("key", b"content")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="is not yours"):
        assert disk_cache.read("key") is None
    disk_cache._warn.cache_clear()
    monkeypatch.setattr(disk_cache, "_folder", lambda below, make: folder)
    with pytest.warns(RuntimeWarning, match="no regular file of yours"):
        assert disk_cache.read("key") is None


def test_links_and_pipes_are_no_entries(folder: Path, tmp_path: Path) -> None:
    disk_cache.write("other", b"")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (folder / "link").symlink_to(secret)
    with pytest.warns(RuntimeWarning, match="link"):
        assert disk_cache.read("link") is None
    os.mkfifo(folder / "pipe")
    with pytest.warns(RuntimeWarning, match="no regular file"):
        assert disk_cache.read("pipe") is None
    disk_cache.write("link", b"content")  # replaces the link, and not what it points to
    assert secret.read_bytes() == b"secret"
    assert disk_cache.read("link") == b"content"


@pytest.mark.parametrize("location", ["/proc/nowhere", "/dev/null"])
def test_a_place_for_no_folder_costs_a_warning(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_cache._warn.cache_clear()
    monkeypatch.setenv("POSATTN_CACHE_DIR", location)
    with pytest.warns(RuntimeWarning, match="POSATTN_CACHE_DIR names another folder"):
        disk_cache.write("cuda/key", b"content")
    assert disk_cache.read("cuda/key") is None


def test_an_entry_in_the_place_of_another(folder: Path) -> None:
    cache.store("one", [b"cubin", b"ptx"])
    assert cache.load("one") == [b"cubin", b"ptx"]
    (folder / "cuda" / "one").rename(folder / "cuda" / "two")
    assert cache.load("two") is None


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become nobody")
def test_a_process_without_home_or_passwd_entry(tmp_path: Path) -> None:
    program = (
        "import os, warnings\n"
        "from posattn.backends.common import disk_cache\n"
        "os.setuid(54321)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    disk_cache.write('key', b'content')\n"
        "print(len(seen), disk_cache.read('key'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment.pop("POSATTN_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "1 None\n", done.stderr
