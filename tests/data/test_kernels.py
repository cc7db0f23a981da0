"""Compiled code without a place on disk: it is compiled in the process, and gives the same."""

import errno

import pytest
from numba.core.caching import CacheImpl, IndexDataCacheFile

from gowide_dist.data.kernels import cache_folder, kernel


def double(x):
    return 2 * x


def test_code_is_cached_in_the_folder_that_numba_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert cache_folder().startswith(str(tmp_path))
    assert kernel(double)(4) == 8
    assert list(tmp_path.rglob("*double*.nbc"))


def test_no_folder_can_be_written(monkeypatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert cache_folder() is None
    assert kernel(double)(4) == 8


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["load", "save"])
def test_the_cache_fails_later(tmp_path, monkeypatch, call, number):
    """The folder could be written when the function was defined, and cannot when it is compiled."""

    def fail(*_):
        raise OSError(number, "as on a full disk")

    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(IndexDataCacheFile, call, fail)
    assert kernel(double)(4) == 8


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("content", [b"", b"cut off", 100])
def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch, pattern, content):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert kernel(double)(4) == 8
    (path,) = tmp_path.rglob(pattern)
    whole = path.read_bytes()
    path.write_bytes(whole[:content] if isinstance(content, int) else content)
    assert kernel(double)(4) == 8
    again = kernel(double)
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1
