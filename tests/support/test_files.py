"""Files are written whole, wherever they are."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from support.errors import InputError
from support.files import cached_name, file_digest, short_names, write_file, write_json, write_text

ROOT = Path(__file__).parents[2]


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("one", "zwei ü"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    umask = os.umask(0o027)
    try:
        write_text(path, "private")
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640 and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("a defect")])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    told = (InputError, "file: could not be written .no space left.; the file that was there is untouched")
    kind, message = told if isinstance(error, OSError) else (RuntimeError, "a defect")
    with pytest.raises(kind, match=message):
        write_file(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_place_where_no_file_can_be_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "below", tmp_path):
        with pytest.raises(InputError, match="could not be written"):
            write_text(path, "new")
    assert (tmp_path / "file").read_text() == "old"


def test_output_goes_through_links_and_into_pipes(tmp_path):
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        write_json(tmp_path / name, {"score": 1})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()
    texts = (tmp_path / "file").read_text(), os.read(reader, 2**16).decode()
    os.close(reader)
    assert all(json.loads(text) == {"score": 1} for text in texts) and len(list(tmp_path.iterdir())) == 3


def test_the_file_that_output_goes_to_is_not_replaced(tmp_path):
    log = tmp_path / "log"
    for name in ("/dev/stdout", log):
        log.write_text("old\n")
        code = f"import pathlib, support.files as f; f.write_text(pathlib.Path({str(name)!r}), 'new')"
        with open(log, "a") as output:
            result = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
            )
        assert result.returncode and f"{name}: is the file that this program's output goes to" in result.stderr
        assert log.read_text() == "old\n"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_other_files_below_dev_are_files():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for text in ("one", "two"):
            write_text(Path(folder, "file"), text)
        assert Path(folder, "file").read_text() == "two"


def test_digests_and_cached_names(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea"  # SHA-256 of "abc" in FIPS 180-2
    assert cached_name(tmp_path / "models--owner--name" / "snapshots" / "abc") == "owner/name"
    assert cached_name(tmp_path) is None


def test_short_names_keep_what_differs():
    assert short_names([Path("a/m.onnx")]) == ["m.onnx"] and short_names([]) == []
    assert short_names([Path("x/a/m"), Path("x/b/m"), Path("x/b/n")]) == ["a/m", "b/m", "b/n"]
    assert short_names([Path("x/m"), Path("x/m")]) == ["m", "m"]
