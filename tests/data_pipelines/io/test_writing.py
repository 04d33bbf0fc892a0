"""Writing: complete files or none, the user's umask, one line where a file cannot be written, folders that two runs want."""

import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.io import files
from data_pipelines.io import locks
from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def _python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, **options)


@pytest.fixture
def limited():
    """A function that lowers a limit of this process until the test ends."""
    before = {}

    def lower(kind, value):
        before[kind] = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, before[kind][1]))

    yield lower
    for kind, values in before.items():
        resource.setrlimit(kind, values)


@pytest.mark.parametrize("mask, mode", [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644), (0o002, 0o664)])
def test_files_and_folders_have_the_mode_of_the_users_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        files.write_json(tmp_path / "a" / "x.json", 1)
        files.write_npz(tmp_path / "a" / "x.npz", a=np.zeros(2))
        with files.new_folder(tmp_path / "out") as partial:
            files.write_json(partial / "y.json", 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "a" / "x.json", tmp_path / "a" / "x.npz", tmp_path / "out" / "y.json"):
        assert path.stat().st_mode & 0o777 == mode
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def _full(path, limited):
    limited(resource.RLIMIT_FSIZE, 1000)  # a disk with room for 1000 bytes
    files.write_npz(path, a=np.random.default_rng(0).random(5000))


def _too_many(path, limited):
    free = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limited(resource.RLIMIT_NOFILE, free)
    try:
        files.write_json(path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


FAILURES = {
    "full": (lambda p, limited: _full(p / "x.npz", limited), "x.npz: file: found File too large"),
    "handles": (lambda p, limited: _too_many(p / "x.json", limited), "x.json: file: found Too many open files"),
    "long": (lambda p, limited: files.write_json(p / ("x" * 300), 1), "file: found File name too long"),
    "a file as folder": (lambda p, limited: files.write_json(p / "file" / "x.json", 1), "x.json: file: found "),
    "a folder": (lambda p, limited: files.write_json(p / "folder", 1), "folder: file: found a folder, device or pipe"),
    "a device": (lambda p, limited: files.write_json("/dev/full", 1), "/dev/full: file: found a folder, device or"),
    "read-only": (lambda p, limited: files.write_json("/proc/x.json", 1), "/proc/x.json: file: found "),
    "folder below a file": (lambda p, limited: files.make_folder(p / "file" / "x"), "x: folder: found Not a directory"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits and devices as Linux has them")
@pytest.mark.parametrize("kind", FAILURES)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(kind, tmp_path, limited):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    act, line = FAILURES[kind]
    with pytest.raises(errors.InputError) as caught:
        act(tmp_path, limited)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"] and not any((tmp_path / "folder").iterdir())


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    for name in ("x" * 250 + ".json", "x." + "y" * 250):
        files.write_json(tmp_path / name, 1)
        with files.new_folder(tmp_path / f"o{name[1:]}") as partial:
            (partial / "a").touch()
    assert len(list(tmp_path.iterdir())) == 4


def test_an_error_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "x.json", 1)
    with pytest.raises(ZeroDivisionError):
        with files.replacing(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    assert files.read_json(tmp_path / "x.json") == 1 and len(list(tmp_path.iterdir())) == 1


def test_what_killed_runs_left_is_removed_and_what_others_write_is_not(tmp_path):
    """A temporary file whose writer was killed goes, one that is being written stays."""
    code = (
        "import sys, os, pathlib; from data_pipelines.io import files\n"
        "with files.replacing(pathlib.Path(sys.argv[1]) / 'killed.json'): os._exit(9)"
    )
    assert _python(code, tmp_path).returncode == 9 and len(list(tmp_path.iterdir())) == 1
    with files.replacing(tmp_path / "other.json") as temporary:
        files.clear_leftovers.cache_clear()
        files.write_json(tmp_path / "x.json", 1)
        assert {p.name for p in tmp_path.iterdir()} == {temporary.name, "x.json"}
        temporary.write_text("2")
    assert {p.name for p in tmp_path.iterdir()} == {"other.json", "x.json"}


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        with files.new_folder(out) as partial:
            files.write_json(partial / "x.json", 1)
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with files.new_folder(out) as partial:
        files.write_json(partial / "x.json", 1)
        assert not list(out.iterdir())
    assert [p.name for p in out.iterdir()] == ["x.json"] and [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").touch()
    for path, found in ((out, "one that is not empty"), (tmp_path / "file", "a file"), ("/proc", "a mount point")):
        with pytest.raises(errors.InputError, match=f"folder: found {found}.*, wanted a new folder"):
            with files.new_folder(path):
                raise AssertionError
    with pytest.raises(errors.InputError, match="file: folder: found File exists"):
        with files.new_folder(tmp_path / "file" / "x"):
            raise AssertionError


def test_the_second_run_into_one_folder_is_told_so_and_takes_nothing_from_the_first(tmp_path):
    out = tmp_path / "out"
    code = "import sys; from data_pipelines.io import files\nwith files.new_folder(sys.argv[1]): pass"
    with files.new_folder(out) as partial:
        files.write_json(partial / "x.json", 1)
        done = _python(code, out)
        line = f"{out}: folder: found one in use by process {os.getpid()} on "
        assert done.returncode == 1 and line in done.stderr.splitlines()[-1]
        with pytest.raises(errors.InputError, match="in use by process"):
            with files.new_folder(out):
                raise AssertionError
    assert files.read_json(out / "x.json") == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_killed_runs_folder_is_removed_or_gone_on_with(tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, os; from data_pipelines.io import files\n"
        "with files.new_folder(sys.argv[1]) as p: files.write_json(p / 'x.json', 1); os._exit(9)"
    )
    assert _python(code, out).returncode == 9 and len(files.unfinished(out)) == 1
    with pytest.raises(ZeroDivisionError):
        with files.new_folder(out, keep=True, resume=True) as partial:
            assert files.read_json(partial / "x.json") == 1
            raise ZeroDivisionError
    assert files.unfinished(out) == [partial]
    with files.new_folder(out, resume=True) as again:
        assert again == partial
        files.write_json(again / "y.json", 1)
    assert {p.name for p in out.iterdir()} == {"x.json", "y.json"} and [p.name for p in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "other"
    assert _python(code, other).returncode == 9
    with files.new_folder(other) as partial:
        assert not list(partial.iterdir()) and files.unfinished(other) == [partial]


def test_a_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, os, pathlib; from data_pipelines.io import locks\n"
        "with locks.hold(pathlib.Path(sys.argv[1]) / locks.LOCK, 'it'): os._exit(9)"
    )
    assert _python(code, tmp_path).returncode == 9 and (tmp_path / locks.LOCK).exists()
    with locks.hold(tmp_path / locks.LOCK, tmp_path) as held:
        assert held
        with pytest.raises(errors.InputError, match="wait for it to end"):
            with locks.hold(tmp_path / locks.LOCK, tmp_path):
                raise AssertionError
    assert not list(tmp_path.iterdir())


def test_a_lock_is_no_link_to_another_file(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / locks.LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(errors.InputError, match="lock: found"):
        with locks.hold(tmp_path / locks.LOCK, tmp_path):
            raise AssertionError
    assert (tmp_path / "precious").read_text() == "text"


def test_a_file_system_without_locks_is_mentioned(tmp_path, monkeypatch, caplog):
    def flock(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with files.new_folder(tmp_path / "out") as partial:
        files.write_json(partial / "x.json", 1)
    assert "no lock (No locks available)" in caplog.text and (tmp_path / "out" / "x.json").exists()


# Reading.


@pytest.mark.parametrize(
    "text, found",
    [
        ('{"T": 1, "T": 2}', "the key 'T' twice"),
        ('[{"a": [{"b": 1, "b": 1}]}]', "the key 'b' twice"),
        ("\ufeff[1]", "Unexpected UTF-8 BOM"),
        ("[NaN]", "values that are not finite"),
        ("[1e999]", "values that are not finite"),
        ("[" + "9" * 30 + "]", "a whole number beyond 64 bits"),
        ("[" + "9" * 6000 + "]", "valid JSON"),
        ("[" * 200000, "valid JSON"),
        ('{"' + "k" * 100000 + '": NaN}', "values that are not finite"),
    ],
    ids=["twice", "twice inside", "mark", "nan", "huge", "beyond", "digits", "deep", "long key"],
)
def test_json_that_means_nothing_is_one_short_line(tmp_path, text, found):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(errors.InputError) as caught:
        files.read_json(tmp_path / "x.json")
    assert found in str(caught.value) and len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_a_folder_is_hashed_within_limits(tmp_path, monkeypatch):
    """Links that lead in circles, pipes and devices are left out; a folder that was named by mistake is not read."""
    for name in ("b/x.dcm", "a.dcm"):
        (tmp_path / "series" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "series" / name).write_bytes(b"x" * 10)
    wanted = files.sha256(tmp_path / "series")
    (tmp_path / "series" / "circle").symlink_to(tmp_path / "series")
    (tmp_path / "series" / "zero").symlink_to("/dev/zero")
    (tmp_path / "series" / "self").symlink_to("self")
    os.mkfifo(tmp_path / "series" / "pipe")
    assert files.sha256(tmp_path / "series") == wanted
    assert not files.is_dicom(tmp_path / "series" / "pipe")
    monkeypatch.setattr(files, "MAX_FOLDER_FILES", 5)
    with pytest.raises(errors.InputError, match="series: folder: found more than 5 files"):
        files.sha256(tmp_path / "series")
    monkeypatch.undo()
    monkeypatch.setattr(files, "MAX_FOLDER_BYTES", 15)
    with pytest.raises(errors.InputError, match="series: folder: found more than 15 bytes"):
        files.sha256(tmp_path / "series")
