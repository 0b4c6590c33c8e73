"""Makes a folder that segments photos in the browser: this page, a model as ONNX files, and onnxruntime-web.

python examples/onnxruntime_web/fill.py site --model demo --labels "red, green, blue" --background-labels "grass, sand"
python -m http.server --directory site
"""

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from conversion.exports.export import export
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.tokenizer import CLIPTokenizerFast

VERSION = "1.30.0"
PAGE = ("index.html", "style.css", "app.js", "worker.js", "tokenizer.js")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def fill(
    folder: Path, model: str, labels: str = "", background_labels: str = "", *, inside: bool = False,
    runtime: Path | None = None,
) -> None:  # fmt: skip
    """Makes the folder, which appears when it is whole.

    Args:
        labels, background_labels: what the page begins with, or, `inside`, all that it knows: the model then needs no
            text encoder.
        runtime: a folder with onnxruntime-web's files; None: npm fetches them.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already: name a new folder")
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        site = Path(scratch) / "site"
        site.mkdir()
        for name in PAGE:
            shutil.copy(Path(__file__).parent / name, site)
        copy_runtime(site / "onnxruntime", runtime)
        write_model(site / "model", model, labels, background_labels, inside=inside)
        site.chmod(0o755)
        site.rename(folder)


def copy_runtime(folder: Path, runtime: Path | None) -> None:
    """Puts onnxruntime-web's files into a new folder."""
    folder.mkdir()
    if runtime is not None:
        for name in RUNTIME:
            if not (runtime / name).is_file():
                raise InputError(f"{runtime} has no {name}: name the folder dist of the package onnxruntime-web")
            shutil.copy(runtime / name, folder)
        return
    try:
        command = ["npm", "pack", "--silent", f"onnxruntime-web@{VERSION}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"npm did not fetch onnxruntime-web ({error}): fetch it yourself, and pass --runtime"
        ) from error
    (package,) = folder.glob("*.tgz")
    with tarfile.open(package) as archive:
        for name in RUNTIME:
            content = archive.extractfile(f"package/dist/{name}")
            assert content is not None
            (folder / name).write_bytes(content.read())
    package.unlink()


def write_model(folder: Path, model: str, labels: str, background_labels: str, *, inside: bool) -> None:
    """Exports the model, with the preprocessing inside, and what the page needs to know of its labels."""
    texts = {"labels": labels, "background_labels": background_labels}
    if inside:
        export(model, folder, "onnx", parts="segment", preprocess=True, **texts)
    else:
        export(model, folder, "onnx", parts="text,segment", preprocess=True)
        CLIPTokenizerFast.from_pretrained(model).save_pretrained(folder, legacy_format=False)
    (folder / "labels.json").write_text(json.dumps(texts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--model", default="demo", help="a folder, a name on the hub, or demo")
    parser.add_argument("--labels", default="", help="what the page begins with")
    parser.add_argument("--background-labels", default="")
    parser.add_argument("--inside", action="store_true", help="put the labels into the file: they cannot be changed")
    parser.add_argument("--runtime", type=Path, help="a folder with onnxruntime-web (default: npm fetches it)")
    options = parser.parse_args()
    try:
        print(f"exporting {options.model}, some minutes ...")
        fill(**vars(options))
    except (OSError, ValueError) as error:
        parser.exit(2, f"fill.py: {error}\n")
    print(f"done: python -m http.server --directory {options.folder}")


if __name__ == "__main__":
    main()
