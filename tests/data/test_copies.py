"""The order of copies to a GPU, on a stand-in for torch.cuda: what waits for what."""

import pytest
import torch

from gowide_dist import world
from gowide_dist.data.encode import encode
from gowide_dist.data.loader import Loader
from gowide_dist.timeline import Batching
from tests.fashion import write_part

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def events(monkeypatch):
    """What happens on the streams, in order."""
    happened = []

    class Event:
        def __init__(self, blocking=False):
            assert blocking, "a thread would spin"

        def record(self, stream):
            happened.append(("record", stream))

        def synchronize(self):
            happened.append(("wait",))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    world.copy_stream.cache_clear()
    yield happened
    world.copy_stream.cache_clear()


def test_a_buffer_waits_for_its_copy_and_for_no_training_step(events, tmp_path):
    write_part(tmp_path / "idx", 240, 20)
    encode("fashion-mnist", tmp_path / "data", tmp_path / "idx")
    loader = Loader(tmp_path / "data" / "train.beton", Batching(24), train=True, resolution=28)
    assert world.copy_stream(DEVICE) == "copies"
    batches = list(loader.batches())
    loader.close()
    assert len(batches) == 10
    assert {event for event in events if event[0] == "record"} == {("record", "copies")}
    assert events.count(("wait",)) == 10
