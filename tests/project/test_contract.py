"""Promises about the packages themselves, each checked in a fresh interpreter."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from groupvit_common.model.config import ACTIVATIONS
from tests.support.paths import ROOT

TWINS = ("groupvit_torch", "groupvit_tf")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import groupvit_common",
        "import pkgutil, importlib, groupvit_common\n"
        "for m in pkgutil.walk_packages(groupvit_common.__path__, 'groupvit_common.'): importlib.import_module(m.name)",
        "from groupvit_common.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["package", "every-module", "help"],
)
def test_common_imports_no_framework(code: str) -> None:
    loaded = run(code + "\nimport sys; print([m for m in ('torch', 'tensorflow', 'keras', 'jax') if m in sys.modules])")
    assert loaded.splitlines()[-1] == "[]"


def test_help_imports_nothing_heavy() -> None:
    # Help must answer at once: what it imports is the cause that can be tested without a clock.
    heavy = ("numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", "tqdm")
    code = f"""
from groupvit_common.cli import main
try: main(['--help'])
except SystemExit: pass
import sys; print([m for m in {heavy} if m in sys.modules])"""
    assert run(code).splitlines()[-1] == "[]"


def test_the_torch_package_imports_what_is_asked_of_it() -> None:
    """The processor without PyTorch, the model without the segmenter, nothing with another framework."""
    loaded = run("""
import sys
from groupvit_torch import GroupViTProcessor, logging
print([m for m in ('torch', 'tensorflow', 'keras', 'jax') if m in sys.modules])
from groupvit_torch import GroupViTModel
print([m for m in ('groupvit_torch.predictor', 'torch._dynamo', 'tensorflow', 'keras', 'jax') if m in sys.modules])""")
    assert loaded.split() == ["[]", "[]"]


def test_an_import_that_fails_says_why_all_the_same() -> None:
    """What TensorFlow prints while it starts is shown, except the noise."""
    code = """
import os
from groupvit_common.tensorflow_logging import tensorflow_start_up
with tensorflow_start_up():
    os.write(2, b"I0000 00:00:1.1 1 port.cc:153] oneDNN custom operations are on.\\n")
    os.write(2, b"the disk is on fire\\n")
    raise ImportError("no such library")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "oneDNN" not in result.stderr
    assert "the disk is on fire" in result.stderr
    assert "no such library" in result.stderr


# `fit` owns Keras's loop: what the PyTorch loop does itself are callbacks there. And a module's name in transformers,
# and Keras's `quantize`.
KERAS_ALONE = {"callbacks.py", "modeling_tf_groupvit.py", "programs.py", "quantization.py", "variables.py"}
# Keras leaves the choice of kernels to its backend. And TensorFlow multiplies by oneDNN already, its graphs fuse what
# layers do, and its gradients say what they keep.
TORCH_ALONE = {"attention.py", "inference.py", "linear.py", "recompute.py"}

# Public classes and functions of one backend alone: by reason, backend and file.
EXCEPTIONS: dict[str, dict[str, dict[str, set[str]]]] = {
    "Keras has neither PyTorch's layout nor its names for variables": {
        "tf": {
            "checkpoint.py": {"canonical_variables", "is_parameter", "kind"},
            "init.py": {"without_initial_values"},
            "objective.py": {"model_of", "variables_of"},
            "optimizer.py": {"to_arrays"},
        },
    },
    "PyTorch reads a checkpoint's weights as tensors, Keras as arrays, which need no function": {
        "torch": {"train_state.py": {"load_weights"}},
    },
    "PyTorch names a device for each tensor; TensorFlow chooses it, and only a segmenter takes one by name": {
        "torch": {"checkpoint.py": {"usable_device"}},
    },
    "PyTorch's layers and optimizer are used as they are; Keras's differ from them and are written anew": {
        "torch": {
            "layers.py": {"drop_path", "normed"},
            "optimizer.py": {"set_learning_rate"},
        },
        "tf": {
            "layers.py": {
                "wide_dtype", "mean", "softmax", "Tracked", "Dense", "LayerNorm", "batch_statistics", "Block",
                "FixedSeed", "DropPath",
            },
            "optimizer.py": {"AdamW", "LossScale", "Schedule", "sum_replicas", "adamw_of", "has_overflowed"},
            "text.py": {"Embedding"},
            "vision.py": {"check_pixels", "GroupProjector"},
        },
    },
    "processes of torchrun; replicas of a strategy": {
        "torch": {"distributed.py": {"batch_norm", "project", "process_group", "rank_device"}},
        "tf": {
            "distributed.py": {
                "replica_number", "Seeds", "Model", "as_logs", "here", "process_of", "refuse_strategy",
            },
        },
    },
    "PyTorch takes a batch as a record of tensors; `fit` takes dictionaries from a data set": {
        "torch": {"data.py": {"Inputs"}},
        "tf": {
            "data.py": {"inputs", "parts", "dataset", "known", "is_nested_numbers"},
            "objective.py": {"shares_prompts"},
        },
    },
    "PyTorch's loop takes steps; in Keras they are a method of what `fit` trains": {
        "torch": {
            "train.py": {"StepResult", "train_step", "step_flops", "peak_flops"},
            "objective.py": {"Replay"},
            "chunks.py": {"split_rows", "Encoded"},
        },
        "tf": {"train.py": {"Trainer", "new_trainer"}, "chunks.py": {"chunk_sizes"}},
    },
    "Keras also runs on JAX, which has no cached features": {"tf": {"chunks.py": {"check_chunks"}}},
    "PyTorch labels pixels with tensors on its device; Keras leaves them to NumPy": {
        "torch": {
            "label_maps.py": {
                "interpolated_strips", "pixel_labels", "view_scores", "mean_scores", "refine", "pixel_affinity",
            },
        },
        "tf": {"label_maps.py": {"unit", "resize_bilinear"}},
    },
    "Keras quantizes layers itself": {"torch": {"optimize.py": {"Int8Linear"}}},
    "formats of one framework": {
        "torch": {
            "export.py": {
                "ImageEncoder", "TextEncoder", "SegmenterProgram", "Preprocessed", "PatchProduct", "program",
                "write_torch_export", "write_aoti", "hide_folders", "write_onnx", "write_openvino",
            },
            "vision.py": {"bicubic"},
        },
        "tf": {
            "export.py": {"export_saved_model", "image_encoder", "text_encoder", "segmenter_program", "preprocessed"},
            "vision.py": {"cubic_matrix"},
            "grouping.py": {"largest"},
        },
    },
}  # fmt: skip


def public_names(path: Path) -> list[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    definitions = (node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [node.name for node in definitions if not node.name.startswith("_")]


def test_the_two_backends_have_the_same_files_and_public_names() -> None:
    torch_files, tf_files = ({path.name for path in (ROOT / name).iterdir() if path.is_file()} for name in TWINS)
    assert tf_files - torch_files == KERAS_ALONE
    assert torch_files - tf_files == TORCH_ALONE
    torch_names, tf_names = (set(importlib.import_module(name).__all__) for name in TWINS)
    assert all(name.startswith("TF") for name in torch_names ^ tf_names)


def test_the_two_backends_have_the_same_classes_and_functions_in_the_same_order() -> None:
    """But for those with a reason, each of which is needed."""
    for file in sorted({path.name for path in (ROOT / TWINS[0]).glob("*.py")} - TORCH_ALONE):
        torch_names, tf_names = (public_names(ROOT / name / file) for name in TWINS)
        for backend, own, other in (("torch", torch_names, tf_names), ("tf", tf_names, torch_names)):
            excepted = [files.get(backend, {}).get(file, set()) for files in EXCEPTIONS.values()]
            assert set(own) - set(other) == set().union(*excepted), (backend, file)
        common = [name for name in torch_names if name in tf_names]
        assert common == [name for name in tf_names if name in torch_names], file


def test_both_backends_have_the_activations_of_the_configuration() -> None:
    for name in TWINS:
        assert set(importlib.import_module(f"{name}.layers").ACTIVATIONS) == set(ACTIVATIONS), name


def test_a_constant_stands_once() -> None:
    """The backends may repeat each other; what both share, and the conversion, takes it from one module."""
    modules: dict[tuple[str, str], list[str]] = {}
    for path in (path for name in ("groupvit_common", "conversion") for path in (ROOT / name).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id.lstrip("_")
                if name.isupper() and isinstance(node.value, ast.Constant):
                    modules.setdefault((name, ast.unparse(node.value)), []).append(str(path.relative_to(ROOT)))
    assert [found for found in modules.items() if len(found[1]) > 1] == []
