"""Programs written for transformers, run with transformers itself and with this project: `make test-peers`.

`tests/compat/programs` holds them. A program names transformers and nothing else; to run it with this project its
import lines are changed, and only those. `main(checkpoint, data)` of each returns numbers, texts and lists of them.

    python -m tests.support.peers [--record] [NAME ...]     # compares; --record writes tests/reference/compat

The peers are environments below `.venv/peers`. They see the packages of `.venv`, so that PyTorch, TensorFlow, NumPy and
Pillow are the same on both sides, and have transformers and what else must differ in a folder of their own.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.paths import REFERENCE, ROOT

PROGRAMS = ROOT / "tests" / "compat" / "programs"
RECORDED = REFERENCE / "compat"
# Beside the programs: the single calls of tests/compat/calls.py.
CALLS = "calls"
ENVIRONMENTS = ROOT / ".venv" / "peers"

PACKAGES = {
    "4": [
        *("transformers==4.49.0", "tokenizers==0.21.4", "huggingface_hub==0.36.0", "peft==0.15.2"),
        *("tf_keras==2.21.0", "tensorflow_probability==0.25.0"),
    ],
    "5": ["transformers==5.24.0", "peft==0.21.2"],
    # Other programs that run an exported model, for the benchmarks.
    "exports": [
        *("transformers==5.24.0", "openvino==2026.4.1", "onnxruntime==1.32.0"),
        *("onnx==1.23.2", "onnxscript==0.7.2", "onnx_ir==1.1.0"),
    ],
}
# What those need besides and .venv may not have; whatever version.
NEEDED = {
    "4": ["accelerate", "psutil", "regex", "cloudpickle", "decorator", "dm-tree"],
    "5": ["accelerate", "psutil", "regex", "typer"],
    "exports": ["psutil", "regex", "typer", "flatbuffers", "ml_dtypes"],
}
# Programs that need a package which imports transformers itself: ours runs them in the environment of transformers 5.
WITH_TRANSFORMERS = ("peft_lora",)
# Programs that transformers 5 cannot run, and what it lacks.
NOT_IN_5 = {
    "calls": "many of them",
    "retrieval": "get_image_features returned a tensor",
    "caption_dataset": "encode_plus",
    "config_surgery": "from_text_vision_configs",
    "hooks_and_gradients": "output_hidden_states of the whole model",
    "tracing": "torchscript=True",
}

# Two float32 programs that add in another order; the models have three stages and two layers of text.
ROUNDING = 2e-5
# Gradients are longer sums, and each step of AdamW divides by the root of their squares, whose rounding it so enlarges.
OF_GRADIENTS = 2e-4
WITH_GRADIENTS = (
    *("accelerate_training", "custom_head", "hooks_and_gradients", "lora_by_hand"),
    *("peft_lora", "trainer_like", "training_loop"),
)

MODELS: dict[str, dict[str, Any]] = {
    "groupvit_torch": {"text_layers": 2, "depths": (1, 1, 1), "groups": (6, 5)},
    # A graph of it is traced in seconds.
    "groupvit_tf": {"text_layers": 1, "depths": (1, 0), "groups": (4,)},
}
CAPTIONS = {
    "a.png": "a photo of a red bus on a street",
    "b.png": "two green trees and a house",
    "c.png": "a cat on a couch",
    "d.png": "blue water under a bright sky",
    "e.png": "a small dog with a ball",
    "f.png": "people at a table with food and drinks",
}


def names() -> list[str]:
    return sorted(path.stem for path in PROGRAMS.glob("[!_]*.py"))


def package_of(name: str) -> str:
    return "groupvit_tf" if name.startswith("tf_") else "groupvit_torch"


def with_new_imports(code: str, package: str) -> str:
    """Returns a program with the import lines changed as docs/migrating.md says, and nothing else."""
    lines = []
    for line in code.splitlines():
        if re.match(r"\s*(from|import) transformers\b", line):
            line = re.sub(r"transformers\.models\.groupvit\.(\w+)", rf"{package}.\1", line)
            line = re.sub(r"from transformers\.[\w.]+ import", f"from {package} import", line)
            line = re.sub(r"import transformers$", f"import {package} as transformers", line)
            line = re.sub(r"\btransformers import", f"{package} import", line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def run_program(name: str, package: str, folder: Path) -> dict[str, Any]:
    """Runs a program in this process; its answer as JSON gives it back."""
    path = PROGRAMS / f"{name}.py"
    code = path.read_text(encoding="utf-8")
    if package != "transformers":
        code = with_new_imports(code, package)
    # A module that can be found by its name, for AutoGraph and pickle.
    module = types.ModuleType(f"tests.compat.programs.{name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)
        return json.loads(json.dumps(module.main(str(folder / package_of(name)), str(folder / "data"))))
    finally:
        del sys.modules[module.__name__]


def make_inputs(folder: Path) -> None:
    """Writes small random models with processors, for programs of each framework, and `data/`, captioned images."""
    for package, sizes in MODELS.items():
        make_checkpoint(folder / package, **sizes)
    data = folder / "data"
    data.mkdir()
    for index, name in enumerate(CAPTIONS):
        height, width = 40 + 4 * index, 64 - 5 * index
        rows, columns, channels = np.ogrid[:height, :width, :3]
        pixels = (rows * (3 + index) + columns * (7 - index) + channels * 60 * index) % 256
        pixels[height // 4 : height // 2, width // 3 : -8] = [(40 * index + 90 * c) % 256 for c in range(3)]
        Image.fromarray(pixels.astype(np.uint8)).save(data / name)
    (data / "captions.json").write_text(json.dumps(CAPTIONS), encoding="utf-8")


def make_checkpoint(folder: Path, text_layers: int, depths: tuple[int, ...], groups: tuple[int, ...]) -> None:
    """Writes a model whose weights are large enough, and its batch norms odd enough, that a mistake anywhere shows."""
    from groupvit_common.checkpoints.safetensors_file import array_info, write_arrays
    from groupvit_common.model.config import GroupViTConfig
    from groupvit_common.model.parameters import manifest
    from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
    from groupvit_common.preprocessing.processor import GroupViTProcessor
    from groupvit_common.preprocessing.tokenizer import CLIPTokenizer

    size = {"height": 32, "width": 32}
    image_processor = GroupViTImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    tokenizer = CLIPTokenizer.from_pretrained(REFERENCE / "tokenizer" / "small", model_max_length=48)
    GroupViTProcessor(image_processor, tokenizer).save_pretrained(folder)
    config = GroupViTConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 3,
            "max_position_embeddings": 48,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "depths": depths,
            "num_group_tokens": (*groups, 0),
            "num_output_groups": (*groups, groups[-1]),
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=20,
        projection_intermediate_dim=28,
    )
    random = np.random.default_rng(11)
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in manifest(config).items():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if len(parameter.shape) > 1 else 0.2
        value = scale * random.standard_normal(parameter.shape)
        if parameter.kind == "counter":
            value = np.asarray(3)
        elif parameter.kind == "running_var" or ("norm" in name and name.endswith("weight")):
            value = 1 + np.abs(value)
        elif name == "logit_scale":
            value = np.asarray(2.3)
        arrays[name] = np.asarray(value, np.int64 if parameter.kind == "counter" else np.float32)
    infos = {name: array_info(value.shape, value.dtype.name) for name, value in arrays.items()}
    write_arrays(folder / "model.safetensors", infos, arrays.__getitem__)
    config.save_pretrained(folder)


def relative_tolerance(name: str) -> float:
    return OF_GRADIENTS if name in WITH_GRADIENTS else ROUNDING


def differences(actual: Any, wanted: Any, tolerance: float = ROUNDING, where: str = "") -> Iterator[str]:
    """Yields a line for each value that is not the same: whole numbers and texts exactly, others within rounding.

    Numbers below one are compared as if they were one: they are sums of numbers about that large.
    """
    if isinstance(wanted, dict) and isinstance(actual, dict):
        for key in sorted({*wanted, *actual}):
            if key not in wanted or key not in actual:
                yield f"{where}.{key}: {'unexpected' if key in actual else 'missing'}"
            else:
                yield from differences(actual[key], wanted[key], tolerance, f"{where}.{key}")
    elif isinstance(wanted, list) and isinstance(actual, list) and len(wanted) == len(actual):
        for index, (one, other) in enumerate(zip(actual, wanted, strict=True)):
            yield from differences(one, other, tolerance, f"{where}[{index}]")
    elif isinstance(wanted, float) and isinstance(actual, float):
        if not abs(actual - wanted) <= tolerance * max(1.0, abs(wanted)):
            yield f"{where}: {actual!r}, expected {wanted!r}"
    elif type(actual) is not type(wanted) or actual != wanted:
        yield f"{where}: {actual!r}, expected {wanted!r}"


def recorded(name: str) -> dict[str, Any]:
    """Returns what transformers 4.49 answered."""
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


def record(name: str, answer: dict[str, Any]) -> None:
    """Writes an answer with a line for each of its values, and more digits than are compared."""
    RECORDED.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(_shorter(value))}" for key, value in answer.items()]
    (RECORDED / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _shorter(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shorter(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shorter(one) for one in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def environment(peer: str) -> Path:
    """Returns the Python of a peer; makes its environment where there is none of these versions."""
    folder = ENVIRONMENTS / peer
    stamp = folder / "packages.txt"
    wanted = "\n".join([*PACKAGES[peer], *NEEDED[peer]])
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"Setting up {folder} (once) ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        numpy = importlib.util.find_spec("numpy")
        assert numpy is not None
        assert numpy.origin is not None
        (site / "shared.pth").write_text(str(Path(numpy.origin).parents[1]))
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, *PACKAGES[peer], *NEEDED[peer]], check=True)
        stamp.write_text(wanted)
    return python


def answers(python: Path | str, package: str, folder: Path, programs: list[str]) -> dict[str, Any]:
    """Runs programs in one process of another environment: the answer of each, or the end of its traceback."""
    if not programs:
        return {}
    tensorflow = programs[0].startswith("tf_")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "answers.json"
        settings = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
        if not tensorflow:
            settings["USE_TF"] = "0"
        elif package == "transformers":
            settings["TF_USE_LEGACY_KERAS"] = "1"
        command = [str(python), "-W", "ignore", "-m", "tests.support.peers", "--answer", package, str(folder), str(out)]
        subprocess.run([*command, *programs], check=True, cwd=ROOT, env={**os.environ, **settings})
        return json.loads(out.read_text())


def _answer(package: str, folder: str, out: str, programs: list[str]) -> None:
    found: dict[str, Any] = {}
    for name in programs:
        try:
            if name == CALLS:
                from tests.compat import calls

                found[name] = calls.answers(package, str(Path(folder, "groupvit_torch")))
            else:
                found[name] = run_program(name, package, Path(folder))
        except Exception:
            found[name] = {"error": traceback.format_exc()[-1500:]}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="NAME")
    parser.add_argument("--record", action="store_true", help="write what transformers 4.49 answers")
    parser.add_argument("--answer", nargs=3, metavar=("PACKAGE", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        _answer(*arguments.answer, arguments.programs)
        return 0
    chosen = arguments.programs or [*names(), CALLS]
    with tempfile.TemporaryDirectory() as place:
        make_inputs(Path(place))
        four, five, ours = everybodys(Path(place), chosen)
    failed = 0
    for name in chosen:
        if arguments.record and "error" not in four[name]:
            record(name, four[name])
        lines = [f"transformers 4.49: {four[name]['error']}"] if "error" in four[name] else []
        for peer, answer in (("5.24", five.get(name)), ("groupvit", ours[name])):
            if answer is not None:
                lines += [f"{peer} {line}" for line in unexpected(name, answer, four[name], peer == "groupvit")]
        failed += bool(lines)
        print(
            f"{name}{' (and 5.24)' if name in five else ''}: {'DIFFERENT' if lines else 'equal'}", *lines, sep="\n    "
        )
    return 1 if failed else 0


def everybodys(folder: Path, chosen: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns what transformers 4.49, transformers 5.24 and groupvit answer, by program."""
    torch_programs = [name for name in chosen if not name.startswith("tf_")]
    tensorflow_programs = [name for name in chosen if name.startswith("tf_")]
    peft = [name for name in torch_programs if name in WITH_TRANSFORMERS]
    four = answers(environment("4"), "transformers", folder, torch_programs)
    four |= answers(environment("4"), "transformers", folder, tensorflow_programs)
    five = answers(environment("5"), "transformers", folder, [n for n in torch_programs if n not in NOT_IN_5])
    ours = answers(sys.executable, "groupvit_torch", folder, [n for n in torch_programs if n not in peft])
    ours |= answers(environment("5"), "groupvit_torch", folder, peft)
    ours |= answers(sys.executable, "groupvit_tf", folder, tensorflow_programs)
    return four, five, ours


def unexpected(name: str, answer: dict[str, Any], wanted: dict[str, Any], is_ours: bool) -> Iterator[str]:
    """Yields the differences that docs/differences.md does not have."""
    from tests.compat.calls import DIFFERENT

    if name == CALLS and is_ours:
        wanted = {**wanted, **{call: ours for call, (_, ours) in DIFFERENT.items()}}
    yield from differences(answer, wanted, relative_tolerance(name))


if __name__ == "__main__":
    sys.exit(main())
