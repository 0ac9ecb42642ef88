"""The files of deploy/ name options, paths and metrics of this program: each name is looked up where it is defined."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.handler.web import serving
from tpserve.cli import main as cli
from tpserve.cli import node
from tpserve.handler import front
from tpserve.handler.front_config import FrontConfig

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
YAML = sorted(path.relative_to(DEPLOY) for path in DEPLOY.rglob("*.y*ml"))
# After the drain: last words to those who are cut off, and spans for a collector that does not answer.
LAST_S = 12
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def documents(name: str | Path) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def instructions(name: str) -> list[str]:
    """Of the Dockerfile: what follows this word, with its continuations."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(name + " ")]


def pod() -> dict[str, Any]:
    (deployment,) = (each for each in documents("kubernetes.yaml") if each["kind"] == "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (one,) = pod()["containers"]
    assert isinstance(one, dict)
    return one


def pods() -> dict[str, dict[str, Any]]:
    """Of the LeaderWorkerSet: the leader's and the workers'."""
    (group,) = (each for each in documents("leaderworkerset.yaml") if each["kind"] == "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    return {role: template[f"{role}Template"]["spec"] for role in ("leader", "worker")} | {"both": template}


def service(name: str) -> dict[str, Any]:
    one: dict[str, Any] = documents(name)[0]["services"]["tpserve"]
    return one


def commands() -> dict[str, list[str]]:
    """Every command line of `tpserve serve` that stands in these files."""
    return {
        "Dockerfile": json.loads(instructions("CMD")[0]),
        "docker-compose.yaml": service("docker-compose.yaml")["command"],
        "docker-compose.gpu.yaml": service("docker-compose.gpu.yaml")["command"],
        "kubernetes.yaml": container()["args"],
        "leaderworkerset.yaml": pods()["leader"]["containers"][0]["args"],
    }


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> FrontConfig:
    """What the real command line makes of them, up to where a server would start."""
    seen: list[FrontConfig] = []

    def serve(checkpoint: str, tp: int | None, _announce: Any, **options: Any) -> None:
        seen.append(FrontConfig.from_options(checkpoint, tp, options))

    monkeypatch.setattr(front, "serve", serve)
    fire.Fire(cli.serve, arguments)
    (config,) = seen
    return config


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_every_file_can_be_read() -> None:
    assert len(YAML) >= 5
    for name in YAML:
        assert all(isinstance(document, dict) for document in documents(name)), name
    dashboard()


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_command_line_knows_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(commands()[name], monkeypatch)
    assert (config.host, config.port) == ("0.0.0.0", 8080)  # in a container, loopback is nobody's
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["tpserve", "serve"]


def test_whoever_can_be_reached_asks_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("docker-compose.yaml", "docker-compose.gpu.yaml"):
        path = parsed(commands()[name], monkeypatch).api_key_file
        assert path in [f"/run/secrets/{secret}" for secret in service("docker-compose.yaml")["secrets"]]
    path = parsed(commands()["kubernetes.yaml"], monkeypatch).api_key_file
    (mount,) = (each["mountPath"] for each in container()["volumeMounts"] if each["name"] == "api-keys")
    assert path is not None
    assert path.startswith(mount + "/")


def test_running_answers_have_the_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drain_s = parsed(commands()["kubernetes.yaml"], monkeypatch).drain_timeout_s
    before_s = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] > before_s + drain_s + LAST_S
    grace_s = seconds(service("docker-compose.yaml")["stop_grace_period"])
    for name in ("docker-compose.yaml", "docker-compose.gpu.yaml"):
        assert grace_s > parsed(commands()[name], monkeypatch).drain_timeout_s + LAST_S


def test_the_engine_has_the_time_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = container()["startupProbe"]
    start_s = parsed(commands()["kubernetes.yaml"], monkeypatch).handler.engine.start_timeout_s
    assert probe["periodSeconds"] * probe["failureThreshold"] > start_s


def test_ranks_have_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = parsed(commands()["kubernetes.yaml"], monkeypatch).handler.engine.tensor_parallel_size
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == ranks
    ranks = parsed(commands()["docker-compose.gpu.yaml"], monkeypatch).handler.engine.tensor_parallel_size
    (device,) = service("docker-compose.gpu.yaml")["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == ranks


def test_machines_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, worker = (pods()[role]["containers"][0] for role in ("leader", "worker"))
    engine = parsed(leader["args"], monkeypatch).handler.engine
    agents: list[dict[str, Any]] = []
    monkeypatch.setattr(
        node, "run", lambda *given: agents.append(dict(zip(inspect.signature(cli.node).parameters, given, strict=True)))
    )
    assert (leader["command"], worker["command"]) == (["tpserve", "serve"], ["tpserve", "node"])
    fire.Fire(cli.node, worker["args"])
    (agent,) = agents
    assert engine.num_nodes == pods()["both"]["size"]
    assert engine.node_address == f"$({leader['env'][0]['name']})"
    assert agent["head"] == f"$(LWS_LEADER_ADDRESS):{engine.node_port}"
    assert engine.node_port in [port["containerPort"] for port in leader["ports"]]
    gpus = [one["resources"]["limits"]["nvidia.com/gpu"] for one in (leader, worker)]
    assert gpus == [engine.tensor_parallel_size // engine.num_nodes] * 2
    assert leader["image"] == worker["image"]
    for one, path in ((leader, engine.node_key_file), (worker, agent["key_file"])):
        (mount,) = (each["mountPath"] for each in one["volumeMounts"] if each["name"] == "node-key")
        assert path == f"{mount}/node_key"
        assert Path(engine.checkpoint_dir).parent == Path(
            next(each["mountPath"] for each in one["volumeMounts"] if each["name"] == "models")
        )
    for probe in ("livenessProbe", "readinessProbe"):
        assert agent["alive_file"] in " ".join(worker[probe]["exec"]["command"])
    # The leader needs its workers until its last answer.
    drain_s = parsed(leader["args"], monkeypatch).drain_timeout_s
    assert pods()["leader"]["terminationGracePeriodSeconds"] > drain_s + 5 + LAST_S
    assert pods()["worker"]["terminationGracePeriodSeconds"] > agent["drain_timeout_s"] > drain_s
    probe = leader["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > engine.start_timeout_s


def test_probes_are_answered_as_they_are_meant() -> None:
    startup, alive, ready = (container()[probe]["httpGet"]["path"] for probe in PROBES)
    (healthcheck,) = instructions("HEALTHCHECK")
    (in_docker,) = re.findall(r"http://127\.0\.0\.1:8080(/[a-z/]+)", healthcheck)
    with serving(keys=("k",)) as web:
        for path in (startup, alive, ready, in_docker):
            assert web.ask("GET", path).status == 200
    with serving(keys=("k",), ready=False) as web:
        assert [web.ask("GET", path).status for path in (startup, alive, ready, in_docker)] == [503, 200, 503, 200]


def test_prometheus_asks_where_metrics_are() -> None:
    (scrape,) = documents("prometheus.yml")[0]["scrape_configs"]
    paths = [scrape["metrics_path"]]
    (deployment,) = (each for each in documents("kubernetes.yaml") if each["kind"] == "Deployment")
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    paths.append(annotations["prometheus.io/path"])
    assert int(annotations["prometheus.io/port"]) == container()["ports"][0]["containerPort"]
    with serving(keys=("k",)) as web:
        for path in paths:
            scheme = scrape["authorization"]["type"]
            assert web.ask("GET", path, headers={"Authorization": f"{scheme} k"}).status == 200
    assert scrape["authorization"]["credentials_file"] in [
        f"/run/secrets/{secret}" for secret in documents("docker-compose.yaml")[0]["services"]["prometheus"]["secrets"]
    ]


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    return read


def expressions() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def test_the_dashboard_shows_what_there_is() -> None:
    with serving() as web:
        web.ask("GET", "/health")  # there is nothing to count before the first request has ended
        text = web.ask("GET", "/metrics").body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    names = {sample.name for sample in samples}
    labels = {label for sample in samples for label in sample.labels} | {"instance", "job"}  # Prometheus adds two
    used: set[str] = set()
    for expression in expressions():
        found = re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*:[a-zA-Z0-9_:]+", expression)
        assert found, expression
        assert set(found) <= names, expression
        grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")}
        assert grouped <= labels, expression
        used |= set(found)
    # What is worth counting is worth a look: a new metric gets a panel. Histograms are shown by their buckets.
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert {re.sub(r"_bucket$", "", name) for name in used} == families


def test_histograms_are_read_from_their_buckets() -> None:
    for expression in expressions():
        for name in re.findall(r"histogram_quantile\(.*?(tpserve:\w+)", expression):
            assert name.endswith("_bucket"), expression
            assert "by (le)" in expression
        for name in re.findall(r"(?:rate|increase)\((tpserve:\w+)", expression):
            assert name.endswith(("_total", "_bucket")), expression


def test_grafana_finds_its_files() -> None:
    volumes = dict(
        volume.split(":")[:2] for volume in documents("docker-compose.yaml")[0]["services"]["grafana"]["volumes"]
    )
    for source in (path for path in volumes if path.startswith("./")):
        assert (DEPLOY / source).exists(), source
    (provider,) = documents("grafana/provisioning/dashboards/tpserve.yaml")[0]["providers"]
    assert Path(volumes["./grafana/dashboard.json"]).parent == Path(provider["options"]["path"])
    (source,) = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    (variable,) = (each for each in dashboard()["templating"]["list"] if each["type"] == "datasource")
    assert (variable["query"], variable["current"]["value"]) == (source["type"], source["uid"])


def test_the_image_holds_every_room() -> None:
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert {folder.split("/")[0] for folder in tools["package-dir"].values()} <= copied
