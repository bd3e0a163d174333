"""Files of hidden states."""

import pytest
import torch
from safetensors.torch import load_file

from puzzlemoe_offline.run import states
from puzzlemoe_offline.run.states import StateRecord, load_state, save_state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 7, 5), (64, 16, 32), (1, 1, 1), (0, 4, 8)])
def test_safetensors_reads_what_was_written(dtype, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "BLOCK", 1000)
    torch.manual_seed(1)
    state = torch.randn(shape).to(dtype)
    save_state(state, tmp_path / "state")
    for found in (load_state(tmp_path / "state"), load_file(tmp_path / "state")["state"]):
        assert found.dtype == dtype and torch.equal(found, state)


def test_an_older_file_is_not_written_over(tmp_path):
    (tmp_path / "state").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        save_state(torch.ones(2, 2), tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == b"kept"


def test_its_record_tells_any_change(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "BLOCK", 100)
    path = tmp_path / "state"
    save_state(torch.arange(400.0).view(4, 10, 10), path)
    record, data = StateRecord.of(path), path.read_bytes()
    assert record == StateRecord.of(path)
    for place in (0, 99, 100, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert StateRecord.of(path) != record
    path.write_bytes(data[:-1])
    assert StateRecord.of(path) != record
