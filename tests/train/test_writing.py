"""What rank 0 writes: in order, nothing after a failure, and failures that surface where all processes ask for them."""

import threading

import pytest

from gowide_dist.train.writing import Writer


def test_the_background_writes_in_order_while_training_goes_on():
    written, gate = [], threading.Event()
    with Writer(is_main=True) as writer:
        writer.write_later(lambda: (gate.wait(60), written.append(1)))
        writer.write_later(lambda: written.append(2))
        assert not writer.failed
        assert written == []
        gate.set()
        writer.check()
        assert written == [1, 2]
        writer.write_later(lambda: written.append(3))
    assert written == [1, 2, 3]


@pytest.mark.parametrize("method", ["write", "write_later"])
def test_nothing_is_written_after_a_failure(method):
    written = []

    def fail(error):
        raise error

    with Writer(is_main=True) as writer:
        getattr(writer, method)(lambda: fail(OSError("first")))
        writer.write_later(lambda: fail(OSError("second")))
        writer.write_later(lambda: written.append(1))
        writer.wait()
        assert writer.failed
        writer.write(lambda: written.append(2))
        with pytest.raises(OSError, match="first"):
            writer.check()
    assert written == []


def test_a_failure_never_takes_the_place_of_the_error_that_ends_training():
    with pytest.raises(KeyError), Writer(is_main=True) as writer:
        writer.write(lambda: 1 / 0)
        raise KeyError


def test_other_ranks_write_nothing():
    written = []
    with Writer(is_main=False) as writer:
        writer.write(lambda: written.append(1))
        writer.write_later(lambda: written.append(2))
        writer.check()
    assert written == []
