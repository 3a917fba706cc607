"""Files are complete or absent, durable and readable by others; paths expand or say which variable is missing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gan_dist.utils.errors import UserError, first_line
from gan_dist.utils.files import expand_directory, expand_source, read_record, write_atomically, write_record


def test_a_written_file_is_complete_has_umask_permissions_and_leaves_no_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with pytest.raises(FileNotFoundError):  # it may be a shared folder that this machine cannot see
            write_atomically(tmp_path / "new/folder/file", b"one")
        write_atomically(tmp_path / "new/folder/file", b"one", make_folder=True)
        write_atomically(tmp_path / "new/folder/file", b"two")
    finally:
        os.umask(before)
    assert [path.read_bytes() for path in (tmp_path / "new/folder").iterdir()] == [b"two"]
    assert (tmp_path / "new/folder/file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failure", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_raises_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(failure)):
        write_atomically(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(("failure", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_only_a_file_system_that_cannot_sync_folders_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int, raised: bool
) -> None:
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(failure, os.strerror(failure))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    try:
        write_atomically(tmp_path / "file", b"content")
    except OSError:
        assert raised
    else:
        assert not raised and (tmp_path / "file").read_bytes() == b"content"


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    write_record(tmp_path / "record", {"a": 1})
    assert read_record(tmp_path / "record") == {"a": 1} and read_record(tmp_path / "nothing") is None
    content = (tmp_path / "record").read_bytes()
    (tmp_path / "record").write_bytes(content.replace(b"1", b"2", 1))
    assert read_record(tmp_path / "record") is None


def test_paths_expand_and_addresses_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert expand_source("$SCRATCH/set") == str(tmp_path / "set") and expand_source("s3://a/$b") == "s3://a/$b"
    (tmp_path / "$HOMELESS").mkdir()
    assert expand_source(tmp_path / "$HOMELESS") == str(tmp_path / "$HOMELESS"), "it exists under that name"
    with pytest.raises(UserError, match="variable UNSET_HERE is not set"):
        expand_directory("$UNSET_HERE/set")
    with pytest.raises(UserError, match="found an address"):
        expand_directory("s3://bucket/set")


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\none\ntwo")) == "one" and first_line(ValueError()) == "ValueError"
