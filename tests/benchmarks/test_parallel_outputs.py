"""benchmarks/parallel.py compares each layout with one GPU and the same weights, and refuses what it cannot compare."""

from __future__ import annotations

import json
import sys

import pytest
from support.scripts import load_script


@pytest.fixture(scope="module")
def parallel():
    return load_script("benchmarks/parallel.py")


def outputs(logprobs, tokens):
    return {"prompt_logprobs": logprobs, "tokens": tokens, "vllm": "0", "torch": "0"}


ONE = outputs([[-1.0, -2.0], [-3.0, -4.0]], [[5, 6], [7, 8]])


def test_differences_are_those_of_the_same_place(parallel):
    other = outputs([[-1.0, -2.5], [-2.75, -4.0]], [[5, 9], [7, 8]])
    assert parallel.difference(ONE, other) == {
        "mean_difference": 0.1875,
        "largest_difference": 0.5,
        "prompt_tokens": 4,
        "alike": 3,
        "generated": 4,
    }


def test_each_run_is_compared_with_one_gpu_of_its_weights(parallel):
    off = {number: outputs([[-1.0 - number, -2.0], [-3.0, -4.0]], [[5, 6], [7, 8]]) for number in (0.25, 0.5, 1.0)}
    runs = {("packed", "tp1"): ONE, ("unpacked", "tp1"): off[1.0], ("packed", "tp2"): off[0.25]}
    runs |= {("unpacked", "tp2"): off[0.5], ("packed", "ep2"): {"failed": "no room"}}
    rows = parallel.comparisons(runs)
    assert [(row["weights"], row["layout"]) for row in rows] == [(w, "tp2") for w in ("packed", "unpacked")] + [
        ("packed", "ep2")
    ]
    assert [row.get("largest_difference") for row in rows] == [0.25, 0.5, None]
    assert rows[2]["failed"] == "no room"


def test_nothing_is_compared_with_a_run_that_is_not_there(parallel):
    assert parallel.comparisons({("packed", "tp2"): ONE, ("unpacked", "tp1"): ONE}) == []
    runs = {("packed", "tp1"): {"failed": "no room"}, ("packed", "tp2"): ONE}
    assert parallel.comparisons(runs) == [{"weights": "packed", "layout": "tp1", "failed": "no room"}]


def test_runs_of_unlike_lengths_are_not_compared(parallel):
    with pytest.raises(ValueError, match="shorter"):
        parallel.difference(ONE, outputs([[-1.0, -2.0], [-3.0]], ONE["tokens"]))


def test_layouts(parallel):
    assert parallel.chosen(None, 1 + 2) == ["tp1", "tp2", "ep2"]
    assert parallel.chosen(["ep4", "tp1"], 4) == ["tp1", "ep4"]
    with pytest.raises(SystemExit, match="tp4: more GPUs are needed than the 2"):
        parallel.chosen(["tp2", "tp4"], 2)
    with pytest.raises(SystemExit, match="nothing to compare"):
        parallel.chosen(None, 1)


@pytest.fixture
def folders(tmp_path):
    """A packed and an unpacked model, of their config.json alone."""
    config = {"model_type": "mixtral", "num_hidden_layers": 4}
    quantization = {"quantization_config": {"quant_method": "puzzlemoe", "code": "angle8"}}
    made = {"packed": config | quantization, "unpacked": config}
    for name, its in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(its))
    return {name: tmp_path / name for name in made}


def test_folders_of_the_wrong_kind_are_refused(parallel, folders, tmp_path):
    assert parallel.packed_config(**folders)["model_type"] == "mixtral"
    with pytest.raises(SystemExit, match="unpacked is no packed model"):
        parallel.packed_config(folders["unpacked"], folders["packed"])
    with pytest.raises(SystemExit, match="packed is no packed model"):
        parallel.packed_config(folders["unpacked"], folders["unpacked"])
    with pytest.raises(SystemExit, match="packed is a packed model"):
        parallel.packed_config(folders["packed"], folders["packed"])
    with pytest.raises(SystemExit, match=r"there is no config\.json"):
        parallel.packed_config(folders["packed"], tmp_path / "neither")


@pytest.fixture
def generate(parallel, tmp_path, monkeypatch):
    """Puts a script in the place of generate.py."""

    def make(text: str) -> None:
        script = tmp_path / "generate.py"
        script.write_text(f"import json, os, sys\nwords = sys.argv\n{text}\n")
        monkeypatch.setattr(parallel, "GENERATE", script)

    return make


def test_a_process_that_fails_is_a_run_with_its_last_words(parallel, generate, folders):
    generate("print('starting', flush=True)\nsys.exit('no room')")
    run = parallel.generated(folders["packed"], parallel.LAYOUTS["tp1"], 0.9, ["0"])
    assert run == {"failed": "generate.py ended with status 1: starting | no room"}


def test_every_run_has_its_layout_and_gpus(parallel, generate, folders, monkeypatch, tmp_path, capsys):
    generate(
        "rank = words.index('--tensor-parallel')\n"
        "gpus, shift = os.environ['CUDA_VISIBLE_DEVICES'].split(','), -int(words[rank + 1])\n"
        "assert len(gpus) == -shift\n"
        "shift = 8 * shift if '--expert-parallel' in words else shift\n"
        "said = {'prompt_logprobs': [[shift, 0]], 'tokens': [[shift, 1]], 'vllm': '1', 'torch': '2'}\n"
        "open(words[words.index('--output') + 1], 'w').write(json.dumps(said))"
    )
    monkeypatch.setattr(parallel, "visible_gpus", lambda: ["2", "5", "6"])
    monkeypatch.setattr(parallel, "lacking_room", lambda folder, gpus: None)
    monkeypatch.setattr(parallel, "driver", lambda: "580")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    output = tmp_path / "parallel.json"
    monkeypatch.setattr(sys, "argv", ["parallel.py", *map(str, folders.values()), "--output", str(output)])
    parallel.main()
    result = json.loads(output.read_text())
    found = [(row["weights"], row["layout"], row["largest_difference"], row["alike"]) for row in result.pop("rows")]
    assert found == [(w, layout, d, 1) for layout, d in (("tp2", 1), ("ep2", 15)) for w in ("packed", "unpacked")]
    about = {"model": "mixtral", "layers": 4, "code": "angle8", "device": "a GPU", "devices": 3, "driver": "580"}
    assert result == about | {"vllm": "1", "torch": "2"}
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_weights_that_do_not_fit_one_gpu_are_refused_before_any_run(parallel, generate, folders, monkeypatch):
    monkeypatch.setattr(parallel, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(parallel, "lacking_room", lambda folder, gpus: "too large" if "un" in folder.name else None)
    monkeypatch.setattr(parallel, "driver", lambda: "580")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(parallel, "generated", None)
    monkeypatch.setattr(sys, "argv", ["parallel.py", *map(str, folders.values())])
    with pytest.raises(SystemExit, match="unpacked, on the one GPU that every layout is compared with: too large"):
        parallel.main()
