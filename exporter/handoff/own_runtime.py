"""Engines that our own runtime runs: the command line, Python, and what else loads their files."""

from exporter.core.task import Task
from exporter.handoff.facts import ServingFacts
from exporter.handoff.route import ENGINE_DIR, Route

# Extras are named like their target, but for the second of TensorRT's two toolkits.
EXTRAS = {"tensorrt_rtx": "tensorrt-rtx"}
GENERATE_CODE = f"""import enginesmith

with enginesmith.load("{ENGINE_DIR}") as engine:
    print(engine.generate("Once upon a time", max_new_tokens=64).text)
"""
CLASSIFY_CODE = f"""import enginesmith

with enginesmith.load("{ENGINE_DIR}") as engine:
    print(engine.classify(["Is this text harmless?"]))
"""


def runtime_routes(facts: ServingFacts) -> tuple[Route, ...]:
    """The command line, Python, Triton, and onnxruntime-genai where the target is its own format."""
    routes = [_command_line(facts), _python(facts.task), _triton(facts)]
    if facts.target == "onnxruntime":
        routes.append(_genai(facts.task))
    return tuple(routes)


def _command_line(facts: ServingFacts) -> Route:
    run = ["enginesmith", "run", ENGINE_DIR, "--prompt", "Once upon a time"]
    bench = ("enginesmith", "bench", ENGINE_DIR)
    extra = EXTRAS.get(str(facts.gpu.get("toolkit", "")), facts.target)
    install = f'`pip install "enginesmith[{extra}]"`; neither torch nor transformers is needed.'
    inspect = ("enginesmith", "inspect", ENGINE_DIR, "--for-host")
    notes = (install, "`inspect --for-host` tells whether this engine fits the machine, without loading it.")
    return Route("enginesmith", "The command line", (inspect, tuple(run), bench), notes=notes)


def _python(task: Task) -> Route:
    return Route("python", "Python", python=CLASSIFY_CODE if task.classifies else GENERATE_CODE)


def _triton(facts: ServingFacts) -> Route:
    command = ("tritonserver", f"--model-repository={ENGINE_DIR}/triton")
    commands = (command,) if facts.task.classifies else (command, (*command, "--model-config-name=streaming"))
    notes = TRITON_NOTES[:1] if facts.task.classifies else TRITON_NOTES
    return Route("triton", "Triton Inference Server", commands, notes=notes, checked=TRITON_READ)


TRITON_NOTES = (
    "Triton's python backend over this package: install it, with the same extra, into the container's Python "
    "(examples/triton has a Dockerfile). The model finds the engine by its own place, two directories above it; the "
    "parameter `engine` of config.pbtxt names another. Mount the directory read-only, or set "
    "PYTHONDONTWRITEBYTECODE=1.",
    "The second command sends text as it is generated (a decoupled model, for gRPC and /generate_stream); with the "
    "first, requests are answered whole, and together.",
)
TRITON_READ = "Triton 26.07 (model_config.proto; python_backend README)"


def _genai(task: Task) -> Route:
    name, title = "onnxruntime-genai", "onnxruntime-genai"
    if task.classifies:
        return Route(name, title, why="it generates text; this engine tells labels apart")
    code = f"""import onnxruntime_genai

model = onnxruntime_genai.Model("{ENGINE_DIR}")
"""
    return Route(name, title, python=code)
