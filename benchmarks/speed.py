"""Speed beside other programs: the same weights and inputs, one process each, calls in turn in one run.

    python -m benchmarks.speed                    every workload, one thread (make bench)
    python -m benchmarks.speed --quick            without the long ones, a few rounds each
    python -m benchmarks.speed --only image1 step16_f32 --threads 2

Before anything is timed the peers' numbers are compared; a row says where they differ, and where a peer failed. Ratios
are medians over rounds of a peer's time divided by ours: above 1, ours is faster. Results are written after every
workload, below runs/bench; the tables go to docs/benchmarks.md, those of another kind of CPU stay beside them.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import processes
from benchmarks.flops import image_flops, text_flops
from benchmarks.workloads import END as END_OF_TEXT
from benchmarks.workloads import START, WORKLOADS, Workload
from groupvit_common.cli import terminal
from groupvit_common.cli.parser import Parser
from groupvit_common.model.config import GroupViTConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
ENVIRONMENTS = {"transformers 5": "5", "transformers 4": "4", "transformers tf": "4", "openvino": "exports",
                "onnxruntime": "exports"}  # fmt: skip
BEGIN, END = "<!-- speed {} -->", "<!-- end of speed {} -->"


class Peer:
    """A process that keeps its model, and answers one line to each of ours, within `limit` seconds."""

    def __init__(self, name: str, python: str, folder: Path, threads: int, limit: float = 600.0) -> None:
        self.name, self.limit = name, limit
        settings = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")}
        settings |= {"TF_NUM_INTEROP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
        settings |= {"TF_USE_LEGACY_KERAS": "1"} if name == "transformers tf" else {}
        settings |= {} if name.endswith("tf") else {"USE_TF": "0"}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", name, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def ask(self, action: str, name: str = "-") -> Any:
        """Returns the answer; RuntimeError if the peer failed, is gone, or took too long and was ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(self.limit, self.process.kill)
        timer.start()
        begun = time.monotonic()
        try:
            self.process.stdin.write(f"{action} {name}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            status = self.process.wait()
            if time.monotonic() - begun >= self.limit:
                raise RuntimeError(f"no answer within {self.limit:g} s")
            raise RuntimeError(f"the process ended (exit status {status})")
        reply = json.loads(line)
        if "failed" in reply:
            raise RuntimeError(reply["failed"])
        return reply["found"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def ratios(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    """Returns the quartiles and, between them, the median of a peer's times divided by ours of the same round."""
    each = [b / a for a, b in zip(ours, other, strict=True)]
    if len(each) == 1:
        return each * 3
    return statistics.quantiles(each, n=4, method="inclusive")


def disagreement(answer: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the largest difference relative to the largest number, or the share of unequal pixels of label maps;
    infinity for another shape or what is not finite."""
    if answer.shape != wanted.shape or not np.isfinite(answer).all():
        return math.inf
    if answer.dtype.kind in "iu":
        return float((answer != wanted).mean())
    return float(np.abs(answer.astype(np.float64) - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))


def flops(config: GroupViTConfig, workload: Workload) -> int:
    texts = workload.texts * text_flops(config, workload.tokens) if workload.texts else 0
    images = workload.images * image_flops(config) if workload.images else 0
    return (images + texts) * (3 if workload.backward else 1)


def measure(name: str, peers: Mapping[str, Peer], seconds: float, most: int) -> dict[str, Any]:
    """Returns the times of each peer by round, its disagreement with our answer, and what failed."""
    workload = WORKLOADS[name]
    found: dict[str, Any] = {"title": workload.title, "peers": {}}
    rows = found["peers"]
    ours: np.ndarray | None = None
    able = []
    for peer in workload.peers:
        try:
            answer = np.load(peers[peer].ask("answer", name))
            peers[peer].ask("time", name)
            if peer == workload.peers[0]:
                ours = answer
            rows[peer] = {"wall": [], "cpu": []}
            if ours is not None and peer != workload.peers[0]:
                rows[peer]["disagreement"] = disagreement(answer, ours)
                rows[peer]["agrees"] = rows[peer]["disagreement"] <= workload.tolerance
            able.append(peer)
        except RuntimeError as error:
            rows[peer] = {"failed": str(error)}
    begun, rounds = time.monotonic(), 0
    while able and rounds < most and (rounds < 3 or time.monotonic() - begun < seconds):
        for peer in list(able):
            try:
                wall, cpu = peers[peer].ask("time", name)
                rows[peer]["wall"].append(wall)
                rows[peer]["cpu"].append(cpu)
            except RuntimeError as error:
                rows[peer] = {"failed": str(error)}
                able.remove(peer)
        rounds += 1
    add_ratios(rows)
    return found


def add_ratios(rows: Mapping[str, dict[str, Any]]) -> None:
    """Adds what follows from the times of each program; the first is ours."""
    first = next(iter(rows.values()))
    for row in rows.values():
        if "wall" in row:
            row["ms"] = 1e3 * statistics.median(row["wall"])
            if "wall" in first:
                row["ratio"], row["ratio_cpu"] = ratios(first["wall"], row["wall"]), ratios(first["cpu"], row["cpu"])


def gemm_peaks(threads: int) -> dict[str, float]:
    """Measures the GFLOP/s of a large product by library and type, as far as this CPU is known to have the type."""
    import torch

    torch.set_num_threads(threads)
    peaks: dict[str, float] = {}
    flags = cpu()["flags"]
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and not {"amx_bf16", "avx512_bf16"} & set(flags):
            continue
        a, b = (torch.randn(1536, 1536).to(dtype) for _ in range(2))
        calls = {"MKL" if dtype == torch.float32 else "oneDNN": lambda a=a, b=b: torch.mm(a, b)}
        if dtype == torch.float32 and torch.backends.mkldnn.is_available():
            weight = torch.ops.mkldnn._reorder_linear_weight(b, 1536)
            calls["oneDNN"] = lambda a=a, w=weight: torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")
        for library, call in calls.items():
            best = math.inf
            try:
                with torch.no_grad():
                    for _ in range(6):
                        begun = time.perf_counter()
                        call()
                        best = min(best, time.perf_counter() - begun)
            except RuntimeError:  # a PyTorch without this operation
                continue
            peaks[f"{str(dtype).removeprefix('torch.')} {library}"] = 2 * 1536**3 / best / 1e9
    return peaks


def cpu() -> dict[str, Any]:
    """Returns the model and vector instructions of this CPU, and the kind that results are kept by."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    read = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines()[:40])}
    flags = [f for f in read.get("flags", "").split() if re.match(r"avx|amx|fma", f)]
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), platform.machine())
    model = read.get("model name", platform.processor())
    return {"model": model, "flags": flags, "kind": f"{model}, family {read.get('cpu family', '?')}, {best}"}


def make_folder(folder: Path) -> GroupViTConfig:
    """Writes a full-size model of random weights with its processor, and photos; returns the configuration."""
    import torch
    from PIL import Image

    from groupvit_common.preprocessing.image_processor import GroupViTImageProcessor
    from groupvit_common.preprocessing.processor import GroupViTProcessor
    from groupvit_torch import GroupViTModel

    torch.manual_seed(0)
    config = GroupViTConfig(text_config={"bos_token_id": START, "eos_token_id": END_OF_TEXT})
    GroupViTModel(config).save_pretrained(str(folder))
    tokenizer = GroupViTProcessor.from_pretrained(ROOT / "groupvit_common" / "demo_model").tokenizer
    GroupViTProcessor(GroupViTImageProcessor(), tokenizer).save_pretrained(folder)
    (folder / "photos").mkdir()
    for index in range(8):
        rng = np.random.default_rng(index)
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "photos" / f"{index}.jpg", quality=90)
    return config


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Returns the table of a run in Markdown."""
    machine = result["machine"]
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in result["peaks"].items())
    lines = [
        f"`{result['command']}`, {result['date']}, {machine['model']} ({', '.join(machine['flags'])}), "
        f"threads: {result['threads']}, commit {result['commit']}. GEMM peaks, GFLOP/s: {peaks}.",
        "",
        "| workload | program | ms | time / ours (quartiles) | CPU time / ours | GFLOP | of GEMM peak | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in result["workloads"].values():
        for index, (peer, row) in enumerate(found["peers"].items()):
            title = found["title"] if not index else ""
            if "failed" in row:
                lines.append(f"| {title} | {peer} | failed: {row['failed'].replace('|', ' ')} | | | | | |")
                continue
            low, middle, high = row.get("ratio", [math.nan] * 3)
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})" if index and "ratio" in row else ""
            used = f"{row['ratio_cpu'][1]:.2f}" if index and "ratio_cpu" in row else ""
            differ = "" if row.get("agrees", True) else f" (numbers differ: {row['disagreement']:.1e})"
            work = f"{found['flops'] / 1e9:.1f}" if found.get("flops") and not index else ""
            share = f"{row['share']:.2f}" if "share" in row else ""
            memory = f"{row['memory']:.0f}" if "memory" in row else ""
            ms = f"{row['ms']:.1f}" if row["ms"] < 100 else f"{row['ms']:.0f}"
            lines.append(f"| {title} | {peer}{differ} | {ms} | {ratio} | {used} | {work} | {share} | {memory} |")
    if result["left_out"]:
        lines += ["", *(f"- Not measured: {name}: {why}" for name, why in result["left_out"].items())]
    return lines


def with_table(page: str, kind: str, lines: Sequence[str]) -> str:
    """Returns the page with the table of this kind of CPU replaced, or added after those of others."""
    begin, end = BEGIN.format(kind), END.format(kind)
    block = "\n".join([begin, f"### {kind}", "", *lines, end])
    if begin in page:
        before, rest = page.split(begin, 1)
        return before + block + rest.split(end, 1)[1]
    if BEGIN.split("{")[0] in page:
        last = list(re.finditer(r"<!-- end of speed .*? -->", page))[-1]
        return f"{page[: last.end()]}\n\n{block}{page[last.end() :]}"
    return f"{page.rstrip()}\n\n## Beside other programs\n\n{block}\n"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws how many times longer the others take than ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        (f"{found['title']}: {peer}", row["ratio"][1])
        for found in result["workloads"].values()
        for index, (peer, row) in enumerate(found["peers"].items())
        if index and "ratio" in row
    ]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.25 * len(rows)), layout="constrained")
    names, values = zip(*rows[::-1], strict=True)
    axes.barh(range(len(rows)), values, color=["tab:blue" if value >= 1 else "tab:orange" for value in values])
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time of the other program / ours (above 1: ours is faster)")
    axes.set_title(result["machine"]["kind"], fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the long workloads, three rounds each")
    parser.add_argument("--only", nargs="+", choices=[*WORKLOADS, "processes"], metavar="WORKLOAD", help="these alone")
    parser.add_argument("--threads", type=int, default=1, help="of every program (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="for the rounds of a workload (default: 15)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder of the results")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write puts a whole run into the page: not with --only")
    with tempfile.TemporaryDirectory() as place:
        run(options, Path(place))


def python_of(program: str) -> str:
    from tests.support.peers import environment

    return str(environment(ENVIRONMENTS[program])) if program in ENVIRONMENTS else sys.executable


def run(options: Any, folder: Path) -> None:
    machine = cpu()
    config = make_folder(folder)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.speed {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "machine": machine, "threads": options.threads, "commit": commit.stdout.strip(), "left_out": {},
        "peaks": gemm_peaks(options.threads), "versions": {}, "workloads": {},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    name_of_file = re.sub(r"[^A-Za-z0-9]+", "-", f"speed {machine['kind']} {result['date'][:16]}")
    path = options.out / f"{name_of_file}.json"
    peers: dict[str, Peer] = {}

    def start(name: str) -> Peer:
        return Peer(name, python_of(name), folder, options.threads)

    def save() -> None:
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")

    half = any("bfloat16" in name for name in result["peaks"])
    try:
        for name, workload in WORKLOADS.items():
            if (options.only and name not in options.only) or (options.quick and workload.slow and not options.only):
                continue
            if workload.dtype == "bfloat16" and not half:
                result["left_out"][workload.title] = "this CPU has no bfloat16 instructions"
                continue
            for peer in workload.peers:
                if peer not in peers or peers[peer].process.poll() is not None:
                    peers[peer] = start(peer)
                    try:
                        result["versions"][peer] = peers[peer].ask("versions")
                    except RuntimeError as error:
                        result["versions"][peer] = {"failed": str(error)}
            print(workload.title, flush=True)
            found = measure(name, peers, 1.0 if options.quick else options.seconds, 3 if options.quick else 15)
            found["flops"] = flops(config, workload)
            best = max((v for k, v in result["peaks"].items() if k.startswith(workload.dtype)), default=0.0)
            for peer, row in found["peers"].items():
                if found["flops"] and best and "ms" in row:
                    row["share"] = found["flops"] / row["ms"] / 1e6 / best
                if workload.memory and "ms" in row:
                    fresh = start(peer)
                    try:
                        row["memory"] = fresh.ask("memory", name)
                    except RuntimeError as error:
                        row["memory_failed"] = str(error)
                    finally:
                        fresh.close()
            result["workloads"][name] = found
            save()
    finally:
        for peer in peers.values():
            peer.close()
    if not options.only or "processes" in options.only:
        for title, programs, rounds in processes.cases(
            folder, folder / "photos" / "0.jpg", rounds=2 if options.quick else 5
        ):
            pythons = {name: python_of(name) for name in programs}
            result["workloads"][title] = {"title": title, "peers": processes.times(programs, pythons, rounds)}
            add_ratios(result["workloads"][title]["peers"])
            save()
    lines = lines_of(result)
    print("\n".join(lines))
    plot(result, path.with_suffix(".png"))
    print(f"\n{path}")
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), machine["kind"], lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(terminal.run(main))
