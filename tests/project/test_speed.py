"""What `benchmarks.speed` and `benchmarks.gpu` say is computed correctly; no test measures speed."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, growth, processes, speed
from benchmarks.flops import image_flops, text_flops
from benchmarks.workloads import END, WORKLOADS, texts_of
from groupvit_common.model.config import GroupViTConfig
from groupvit_torch import GroupViTModel
from tests.support.models import smallest_config


class FakePeer:
    """A peer whose times are given, and whose answer is a file."""

    def __init__(self, answer: Any, times: list[float], folder: Any) -> None:
        self.times, self.path = iter(times), folder / f"{id(self)}.npy"
        np.save(self.path, answer)

    def ask(self, action: str, name: str = "-") -> Any:
        if action == "answer":
            return str(self.path)
        time = next(self.times, None)
        if time is None:
            raise RuntimeError("out of memory")
        return [time, 2 * time]


def three_stages() -> GroupViTConfig:
    config = smallest_config().to_dict()
    stages = {"depths": [1, 2, 1], "num_group_tokens": [4, 3, 0], "num_output_groups": [4, 3, 3]}
    return GroupViTConfig.from_dict({**config, "vision_config": {**config["vision_config"], **stages}})


@pytest.mark.parametrize("config", [smallest_config(), three_stages()], ids=["two stages", "three stages"])
def test_operations_from_the_configuration_are_those_pytorch_counts(config):
    model = GroupViTModel(config).to("meta").eval()
    side, tokens = config.vision_config.image_size, 7
    with FlopCounterMode(display=False) as counter:
        model.get_image_features(pixel_values=torch.empty(2, 3, side, side, device="meta"))
    assert counter.get_total_flops() == 2 * image_flops(config)
    with FlopCounterMode(display=False) as counter:
        model.get_text_features(input_ids=torch.ones(3, tokens, dtype=torch.long, device="meta"))
    assert counter.get_total_flops() == 3 * text_flops(config, tokens)


def test_ratios_are_taken_round_by_round():
    # A machine that is twice as slow in one round is so for both.
    assert speed.ratios([1.0, 2.0, 1.0], [3.0, 6.0, 3.0]) == [3, 3, 3]
    assert speed.ratios([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]) == [2, 3, 4]
    assert speed.ratios([2.0], [1.0]) == [0.5, 0.5, 0.5]


def test_disagreement_is_relative_to_the_largest_number():
    wanted = np.asarray([1.0, -4.0])
    assert speed.disagreement(wanted, wanted) == 0
    assert speed.disagreement(np.asarray([1.0, -3.0]), wanted) == 0.25
    assert speed.disagreement(np.asarray([1.0]), wanted) == math.inf
    assert speed.disagreement(np.asarray([1.0, math.nan]), wanted) == math.inf
    assert speed.disagreement(np.asarray([1, 2, 9, 4]), np.asarray([1, 2, 3, 4])) == 0.25


def result_of(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.speed", "date": "2026-11-29", "threads": 1, "commit": "abc",
        "machine": {"model": "A CPU", "flags": ["avx2"], "kind": "A CPU, avx2"}, "left_out": {"b": "no bfloat16"},
        "peaks": {"float32 MKL": 61.4}, "workloads": {"image1": found},
    }  # fmt: skip


def test_a_row_says_what_differs_and_what_failed(tmp_path):
    answer = np.asarray([1.0, 2.0])
    peers: dict[str, Any] = {
        "groupvit": FakePeer(answer, [9.0, 0.1, 0.2, 0.1], tmp_path),
        "transformers 5": FakePeer(answer + 1e-5, [9.0, 0.2, 0.4, 0.2], tmp_path),
        "openvino": FakePeer(answer * 2, [9.0, 0.1, 0.2, 0.1], tmp_path),
        "onnxruntime": FakePeer(answer, [9.0, 0.1], tmp_path),
    }
    found = speed.measure("image1", peers, seconds=0.0, most=3)
    rows = found["peers"]
    assert rows["transformers 5"]["ratio"] == [2, 2, 2]
    assert rows["transformers 5"]["agrees"]
    assert not rows["openvino"]["agrees"]
    assert rows["onnxruntime"] == {"failed": "out of memory"}
    table = speed.lines_of(result_of(found))
    assert "|  | transformers 5 | 200 | 2.00 (2.00 to 2.00) | 2.00 |  |  |  |" in table
    assert any("openvino (numbers differ: 1.0e+00)" in line for line in table)
    assert any("onnxruntime | failed: out of memory" in line for line in table)
    assert table[-1] == "- Not measured: b: no bfloat16"


def test_a_peer_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    worker = tmp_path / "benchmarks" / "worker.py"
    worker.parent.mkdir()
    worker.write_text(
        "import sys, time\nfor line in sys.stdin:\n    time.sleep(60 if 'hang' in line else 0)\n"
        "    print('{\"found\": 7}', flush=True)\n"
    )
    peer = speed.Peer("groupvit", sys.executable, tmp_path, threads=1, limit=5.0)
    try:
        assert peer.ask("time") == 7
        peer.limit = 0.1
        with pytest.raises(RuntimeError, match=r"no answer within 0\.1 s"):
            peer.ask("hang")
        with pytest.raises(RuntimeError, match="the process ended"):
            peer.ask("time")
    finally:
        peer.close()


def test_whole_processes_are_timed_or_say_why_not():
    programs = {"groupvit": "pass", "other": "raise ValueError('no such file')"}
    rows = processes.times(programs, dict.fromkeys(programs, sys.executable), rounds=2)
    assert [len(rows["groupvit"][kind]) for kind in ("wall", "cpu")] == [2, 2]
    assert rows["other"] == {"failed": "ValueError: no such file"}
    with pytest.raises(RuntimeError, match=r"not done within 0\.1 s"):
        processes.run_once(sys.executable, "import time; time.sleep(60)", limit=0.1)


def test_a_table_replaces_its_own_kind_and_stands_beside_others():
    page = speed.with_table("# Benchmarks\n", "AMD", ["old"])
    page = speed.with_table(page, "Intel", ["theirs"])
    page = speed.with_table(page + "\nMore.\n", "AMD", ["new"])
    assert "old" not in page
    assert page.index("new") < page.index("theirs") < page.index("More.")
    assert page.count("## Beside other programs") == 1


def test_texts_of_a_workload_are_as_long_as_it_says():
    for workload in WORKLOADS.values():
        if workload.texts:
            ids, mask = texts_of(workload.kind.removeprefix("graph_").removeprefix("eager_"), workload.texts)
            assert mask.sum(1).tolist() == [workload.tokens] * workload.texts
            assert (ids[:, workload.tokens - 1] == END).all()


def test_without_a_gpu_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 1
    assert capsys.readouterr().out == "PyTorch finds no GPU here: nothing was measured.\n"


def test_inference_on_a_device_is_measured():
    model = GroupViTModel(smallest_config()).eval()
    found = gpu.inference(
        model, image_flops(smallest_config()), batch=2, side=16, precision="bfloat16", rounds=2, peak=1.0
    )
    assert found["images/s"] > 0
    assert found["utilisation"] == pytest.approx(found["images/s"] * image_flops(smallest_config()) / 1e12)


def test_growth_counts_every_image_and_the_operations_of_a_larger_one():
    class Counter:
        def iter(self, images: Any) -> Any:
            return iter(images)

    assert [row[0] for row in growth.image_rows(Counter(), [3, 5])] == ["3", "5"]
    config = smallest_config()
    side = config.vision_config.image_size
    assert growth.flops_at(config, side) == image_flops(config)
    assert growth.flops_at(config, 2 * side) > image_flops(config)


def test_the_peaks_of_this_machine_are_measured():
    peaks = speed.gemm_peaks(torch.get_num_threads())
    assert peaks["float32 MKL"] > 0
    assert not torch.backends.mkldnn.is_available() or peaks["float32 oneDNN"] > 0
