"""TVM engines beside llama.cpp, OpenVINO GenAI and onnxruntime-genai, on one checkpoint, in one run.

    python -m tests.benchmarks.peers CHECKPOINT --work DIR [--repeat 3] [--threads 2]
                                     [--cases decode,prefill-512,...]

Builds every model into DIR where it is not there yet (`peer_setup` prepares the peers' programs in DIR/programs).
Every round starts each program once, in alternating order; ratios are those of the medians, the spread that of
ratios within one round. A C program reads memory in the same rounds: `of stream` is the weights' bytes per token
times tokens per second over its median.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import peer_setup
from tests.benchmarks.commands import build_genai, build_ours, built, run_json
from tests.benchmarks.report import show, spread

HERE = Path(__file__).parent
OURS, STREAM = "enginesmith", "stream"
MAX_SEQ_LEN = "8192"


@dataclass(frozen=True)
class Case:
    """One row of the table: a prompt, an answer, which weights, and what counts."""

    figure: str
    prompt: int
    new: int
    bits: int = 4
    batch: int = 1


CASES = {
    "decode": Case("decode", 128, 64),
    "prefill-128": Case("prefill", 128, 2),
    "prefill-512": Case("prefill", 512, 2),
    "prefill-4096": Case("prefill", 4096, 2),
    "decode-4096": Case("decode", 4096, 32),
    "int8": Case("decode", 128, 48, bits=8),
    "int8-512": Case("prefill", 512, 2, bits=8),
    "batch": Case("decode", 32, 32, batch=8),
}


@dataclass(frozen=True)
class Models:
    """Everything that runs: programs of the peers and a model of each for 4 and 8 bits."""

    work: Path
    checkpoint: Path
    threads: int
    llama: Path
    openvino: Path

    def engine(self, bits: int) -> Path:
        recipe = "int4-rtn" if bits == 4 else "int8-weight"
        out = self.work / f"enginesmith-tvm-{recipe}"
        command = build_ours(self.checkpoint, out, recipe=recipe, target="tvm")
        command += ["--max-seq-len", MAX_SEQ_LEN, "--max-batch", "8"]
        return built(command, out)

    def gguf(self, bits: int) -> Path:
        kind = "Q4_0" if bits == 4 else "Q8_0"
        out = self.work / f"llama-{kind}.gguf"
        if not out.exists():
            whole = self.work / "llama-f16.gguf"
            built([str(self.openvino), str(HERE / "gguf_checkpoint.py"), str(self.checkpoint), str(whole)], whole)
            built([str(self.llama / "llama-quantize"), str(whole), str(out), kind], out)
        return out

    def openvino_model(self, bits: int) -> Path:
        out = self.work / f"openvino-int{bits}"
        export = [str(self.openvino.with_name("optimum-cli")), "export", "openvino", "-m", str(self.checkpoint)]
        export += ["--task", "text-generation-with-past", "--weight-format", f"int{bits}"]
        return built([*export, *(["--group-size", "32", "--sym"] if bits == 4 else []), str(out)], out)

    def genai(self) -> Path:
        out = self.work / "genai-int4"
        return built(build_genai(self.checkpoint, out), out)

    def commands(self, case: Case) -> dict[str, list[str]]:
        """The programs of one case by name; each prints one JSON object."""
        sizes = [str(case.prompt), str(case.new), str(self.threads)]
        ours = [sys.executable, "-m", "tests.benchmarks.engine_speed", str(self.engine(case.bits)), *sizes]
        found = {OURS: [*ours, str(case.batch)]}
        if case.batch > 1:
            return found
        found["llama.cpp"] = self._llama_bench(case)
        model = str(self.openvino_model(case.bits))
        found["openvino"] = [str(self.openvino), str(HERE / "openvino_speed.py"), model, *sizes]
        if case.bits == 4:
            found["onnxruntime-genai"] = [
                sys.executable,
                "-m",
                "tests.benchmarks.genai_speed",
                str(self.genai()),
                *sizes,
            ]
        return found

    def _llama_bench(self, case: Case) -> list[str]:
        """Either the prompt, or `case.new` tokens behind one: llama-bench counts them apart."""
        command = [str(self.llama / "llama-bench"), "-m", str(self.gguf(case.bits)), "-t", str(self.threads)]
        command += ["-o", "json", "-r", "1"]
        if case.figure == "decode":
            return [*command, "-p", "0", "-n", str(case.new), "-d", str(case.prompt)]
        return [*command, "-p", str(case.prompt), "-n", "0"]


def stream_program(work: Path) -> Path:
    out = work / "stream_read"
    command = ["cc", "-O3", "-march=native", "-o", str(out), str(HERE / "stream_read.c"), "-lpthread"]
    return built(command, out)


def measure(name: str, command: list[str], case: Case) -> dict[str, Any]:
    if name != "llama.cpp":
        return run_json(command)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return {f"{case.figure}_tokens_per_s": json.loads(done.stdout)[0]["avg_ts"]}


def alternate(case: Case, models: Models, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every program once a round, in turning order, the memory stream in the middle."""
    programs = models.commands(case)
    stream = [str(stream_program(models.work)), str(models.threads), "2"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*programs, STREAM]}
    for number in range(rounds):
        order = list(programs)[:: 1 if number % 2 == 0 else -1]
        for name in [*order[:1], STREAM, *order[1:]]:
            command = stream if name == STREAM else programs[name]
            found[name].append(run_json(command) if name == STREAM else measure(name, command, case))
            print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    return found


def rows(label: str, case: Case, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    key = f"{case.figure}_tokens_per_s"
    stream = spread([run["median"] for run in found[STREAM]])["median"]
    table = []
    for name, runs in found.items():
        if name == STREAM:
            continue
        speeds = [run[key] for run in runs]
        ratios = spread([ours[key] / run[key] for ours, run in zip(found[OURS], runs, strict=True)])
        median = spread(speeds)["median"]
        weights = runs[0].get("weights_bytes", 0)
        of_stream = f"{weights * median / case.batch / stream:.3f}" if weights and case.figure == "decode" else ""
        table.append(
            {
                "case": f"{label}: {case.figure}, {case.prompt} tokens, int{case.bits}, batch {case.batch}",
                "program": name,
                "tok/s": median,
                "ours / this": spread([run[key] for run in found[OURS]])["median"] / median,
                "lowest": ratios["lowest"],
                "highest": ratios["highest"],
                "of stream": of_stream,
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    programs = arguments.work / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    models = Models(
        arguments.work,
        arguments.checkpoint,
        arguments.threads,
        peer_setup.llama_cpp(programs).resolve(),
        peer_setup.openvino(programs).absolute(),
    )
    table, runs = [], {}
    for label in arguments.cases.split(","):
        runs[label] = alternate(CASES[label], models, arguments.repeat)
        table += rows(label, CASES[label], runs[label])
    show(f"TVM engines and their peers, {arguments.threads} threads: {arguments.checkpoint.name}", table, runs=runs)


if __name__ == "__main__":
    main()
