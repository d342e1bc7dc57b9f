from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_diffusion.files import sha256_of, write_bytes_atomically, write_json_atomically, write_text_atomically

posix = pytest.mark.skipif(os.name == "nt", reason="permissions, links and limits are POSIX")


def test_a_file_is_created_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    write_bytes_atomically(path, b"one")
    write_bytes_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["state.bin"]


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.txt", "grün\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"gr\xc3\xbcn\r\n"


def test_json_is_readable_and_reads_back(tmp_path: Path) -> None:
    value = {"name": "grün", "steps": [1, 2]}
    write_json_atomically(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "grün" in text and text.endswith("}\n")


def test_json_without_a_value_for_nan_leaves_the_old_file(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="nan"):
        write_json_atomically(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.0}


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_permissions_any_program_would_give_it(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes_atomically(tmp_path / "a", b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@posix
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"")
    path.chmod(0o640)
    write_bytes_atomically(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o640


@posix
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_bytes_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@posix
def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from lora_diffusion.files import write_bytes_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes_atomically(Path(sys.argv[1]), bytes(5000))\n"
        "except OSError: sys.exit(7)\n"
    )
    result = subprocess.run([sys.executable, "-B", "-c", code, str(path)], check=False)
    assert result.returncode == 7
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@posix
def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from lora_diffusion.files import write_bytes_atomically\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"  # the content is written, the rename is not
        "write_bytes_atomically(Path(sys.argv[1]), b'new')\n"
    )
    result = subprocess.run([sys.executable, "-B", "-c", code, str(path)], check=False)
    assert result.returncode == -9
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("has_links", [True, False], ids=["hard links", "none"])
def test_a_new_file_takes_no_name_that_is_taken(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a"
    write_bytes_atomically(path, b"first", is_new=True)
    with pytest.raises(FileExistsError):
        write_bytes_atomically(path, b"second", is_new=True)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes_atomically(tmp_path / "no" / "a", b"")


@pytest.mark.parametrize("name", ["n" * 250, "猫" * 81 + ".txt"], ids=["letters", "three bytes each"])
def test_a_long_file_name_can_be_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_bytes_atomically(path, b"x")
    assert path.read_bytes() == b"x"


def test_sha256_is_that_of_the_whole_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than one piece
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, lora_diffusion.files, lora_diffusion.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
