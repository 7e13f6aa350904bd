"""Samples that are kept: drawn once, and again if damaged."""

import torch

from modeling.inference.kept import kept_samples


def test_kept_samples_are_drawn_once(tmp_path, caplog):
    caplog.set_level("INFO")
    drawn = []

    def draw(indices):
        drawn.append(indices)
        return torch.tensor(list(indices), dtype=torch.uint8).reshape(-1, 1, 1, 1)

    expected = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    assert torch.equal(torch.cat(list(kept_samples(tmp_path, 5, 2, draw))), expected)
    assert drawn == [range(0, 2), range(2, 4), range(4, 5)] and "kept" not in caplog.text
    (tmp_path / "0000002-0000004.npy").write_bytes(b"half")
    assert torch.equal(torch.cat(list(kept_samples(tmp_path, 5, 2, draw))), expected)
    assert drawn[3:] == [range(2, 4)]
    assert f"5 of 5 samples are kept in {tmp_path}" in caplog.text and "damaged" in caplog.text
