"""The example manifests: what the API requires, and what must fit together. No cluster is asked."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.handoff.dockerfiles import last, read_dockerfile, stages

ROOT = Path(__file__).parents[2]
FILES = ("cpu.yaml", "tensorrt-llm.yaml")
IMAGES = {"cpu.yaml": "docker/Dockerfile", "tensorrt-llm.yaml": "docker/tensorrt-llm.Dockerfile"}
KUBERNETES = "1.37"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "examples" / "kubernetes" / name).read_text()))


def deployment(name: str) -> dict[str, Any]:
    (found,) = [document for document in documents(name) if document["kind"] == "Deployment"]
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = deployment(name)["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_schemas_of_the_api(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate has the API's schemas")
    for document in documents(name):
        assert validate.validate(document, KUBERNETES, strict=True) == KUBERNETES


@pytest.mark.parametrize("name", FILES)
def test_required_fields(name: str) -> None:
    kinds = {document["kind"]: document for document in documents(name)}
    assert {kind: document["apiVersion"] for kind, document in kinds.items()} == {
        "Deployment": "apps/v1",
        "Service": "v1",
    }
    assert all(document["metadata"]["name"] for document in kinds.values())
    assert {"selector", "template"} <= kinds["Deployment"]["spec"].keys()
    assert {"name", "image", "ports", "resources"} <= container(name).keys()


@pytest.mark.parametrize("name", FILES)
def test_selectors_find_the_pods_and_ports_the_container(name: str) -> None:
    found = deployment(name)["spec"]
    labels = found["template"]["metadata"]["labels"]
    (service,) = [document for document in documents(name) if document["kind"] == "Service"]
    assert found["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    final = stages(read_dockerfile(ROOT / "examples" / IMAGES[name]))[-1]
    assert str(ports["http"]) == last(final, "EXPOSE")


@pytest.mark.parametrize("name", FILES)
def test_probes_ask_a_path_that_the_server_has(name: str) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container(name)[probe]["httpGet"] == {"path": "/health", "port": "http"}


@pytest.mark.parametrize("name", FILES)
def test_mounts_have_volumes_and_the_engine_is_read_only(name: str) -> None:
    volumes = {volume["name"] for volume in deployment(name)["spec"]["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container(name)["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes
    assert mounts["/engine"]["readOnly"]


def test_the_gpu_is_a_limit() -> None:
    """Extended resources cannot be overcommitted: request and limit are equal."""
    resources = container("tensorrt-llm.yaml")["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1


def test_nobody_is_root_on_cpus() -> None:
    pod = deployment("cpu.yaml")["spec"]["template"]["spec"]
    final = stages(read_dockerfile(ROOT / "examples" / "docker" / "Dockerfile"))[-1]
    assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == last(final, "USER")
    assert container("cpu.yaml")["securityContext"]["readOnlyRootFilesystem"]
