"""The cache of compiled kernels and programs: the user's alone, checked before it is loaded, built again where it is damaged."""

import ctypes
import os
import random
import shutil

import pytest

from kernels.common import ffi_build
from kernels.common import private_cache

SOURCE = 'extern "C" int answer() { return 42; }\n'
"""A library that compiles in a moment."""


@pytest.fixture(autouse=True)
def forget():
    """What was found out about folders belongs to one test."""
    _forget()


def _forget():
    for function in (private_cache._why_not, private_cache.private, private_cache.warn_once):
        function.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "radgs_jax"


def _answer(folder):
    """Builds or finds the library of `folder`/tiny.cc as kernels do, and calls it: (answer, where it lay)."""
    loaded, library = [], ctypes.CDLL

    def load(path):
        loaded.append(path)
        return library(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(ffi_build.ctypes, "CDLL", load)
        reason = ffi_build._why_not.__wrapped__(folder / "tiny.cc", ())
    if reason and "no C++ compiler" in reason:
        pytest.skip(reason)
    assert reason is None and len(loaded) == 1, reason
    return ctypes.CDLL(loaded[0]).answer(), loaded[0]


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A folder with a source, and a cache with its library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tiny.cc").write_text(SOURCE)
    assert _answer(tmp_path)[0] == 42
    return tmp_path


def test_the_cache_is_made_for_its_user_alone(cache):
    before = os.umask(0)
    try:
        found = private_cache.folder("xla")
    finally:
        os.umask(before)
    assert found == cache / "xla"
    assert [p.stat().st_mode & 0o777 for p in (cache, found)] == [0o700, 0o700]


def test_a_cache_that_others_could_only_read_is_closed(cache):
    cache.mkdir(mode=0o755)
    (cache / "xla").mkdir(mode=0o755)
    assert private_cache.folder("xla") == cache / "xla"
    assert [p.stat().st_mode & 0o777 for p in (cache, cache / "xla")] == [0o700, 0o700]


def _writable(path):
    path.chmod(0o777)


def _foreign(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(path, 12345, 12345)


def _linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("which", ["", "ffi"])
@pytest.mark.parametrize(
    "spoil, reason", [(_writable, "others may write there"), (_foreign, "another user"), (_linked, "a link")]
)
def test_a_cache_of_others_is_not_used(built, caplog, spoil, reason, which):
    """Nothing is loaded from it, and nothing written; the kernel is built for the one process, which is said."""
    library = next((built / "radgs_jax" / "ffi").glob("*.so"))
    _replace(library, b"planted")
    _forget()
    spoil(built / "radgs_jax" / which)
    assert private_cache.folder("ffi") is None
    assert reason in caplog.text and "set XDG_CACHE_HOME" in caplog.text and caplog.text.count("\n") == 1
    found, path = _answer(built)
    assert found == 42 and not path.startswith(str(built)) and library.read_bytes() == b"planted"
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    assert "built for this process only" in caplog.text and caplog.text.count("\n") == 2


def test_a_cache_below_a_folder_where_everyone_writes_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert private_cache.folder("xla") is None
    private_cache._why_not.cache_clear()
    (tmp_path / "open").chmod(0o1777)  # as /tmp: nobody can rename what belongs to others
    assert private_cache.folder("xla") is not None


def _replace(path, content):
    """Not in place: this process has loaded the library that lies there."""
    path.unlink()
    path.write_bytes(content)


def damaged(content, seed):
    """Bytes with a flipped bit, cut, or with a block of zeros; never equal to `content`."""
    rng = random.Random(seed)
    while True:
        found, place = bytearray(content), rng.randrange(len(content))
        kind = rng.choice(("flip", "cut", "zero"))
        if kind == "flip":
            found[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del found[place:]
        else:
            found[place : place + 512] = bytes(len(found[place : place + 512]))
        if found != content:
            return bytes(found)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_library_is_built_again_with_one_line(built, caplog, seed):
    path = random.Random(seed).choice(sorted((built / "radgs_jax" / "ffi").iterdir()))
    _replace(path, damaged(path.read_bytes(), seed))
    assert _answer(built)[0] == 42
    assert "not as it was built, so it is built again" in caplog.text and caplog.text.count("\n") == 1
    assert _answer(built)[0] == 42 and caplog.text.count("\n") == 1


def test_a_library_that_is_gone_is_built_again(built):
    shutil.rmtree(built / "radgs_jax" / "ffi")
    _forget()
    assert _answer(built)[0] == 42
