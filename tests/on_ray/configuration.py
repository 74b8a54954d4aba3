"""The application's arguments, the shipped files, and what the command makes of its options."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from vlmserve.server.cli.on_ray import READ_HERE, _given, _http
from vlmserve.server.cli.start_options import StartOptions
from vlmserve.server.ray.application import (
    ARGS_VARIABLE,
    NOT_HERE,
    START_OPTIONS,
    app,
    variables_of,
)

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "ray"


def engine_of(application):
    """The deployment of the engines."""
    return application._bound_deployment.init_args[0]._bound_deployment


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.yaml")), ids=lambda file: file.name)
def test_a_shipped_file_is_one_of_ray_serve_with_arguments_that_are_taken(file):
    content = yaml.safe_load(file.read_text())
    if "applications" not in content:
        content = yaml.safe_load(content["spec"]["serveConfigV2"])  # KubeRay's
    (application,) = ServeDeploySchema.model_validate(content).applications
    assert application.import_path == "vlmserve.server.ray.application:app"
    engine = engine_of(app(application.args))
    assert engine.ray_actor_options["num_gpus"] == application.args["gpus"]


def test_serve_build_writes_a_file_of_the_application(tmp_path, monkeypatch):
    monkeypatch.setenv(ARGS_VARIABLE, '{"replicas": 3, "ingresses": 2}')
    out = tmp_path / "app.yaml"
    serve = Path(sys.executable).with_name("serve")
    command = [serve, "build", "vlmserve.server.ray.built:application", "-o", out]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(out.read_text())).applications
    replicas = {one.name: one.num_replicas for one in application.deployments}
    assert replicas == {"engine": 3, "ingress": 2}


def test_a_nodes_variables_do_not_reach_into_rays_part():
    """VLMSERVE_RAY in the environment of a node would let each replica start another cluster."""
    variables = engine_of(app({"options": {"max_num_seqs": 8}})).init_args[0]
    assert variables["VLMSERVE_RAY"] == variables["VLMSERVE_METRICS_PORT"] == ""
    assert variables["VLMSERVE_MAX_NUM_SEQS"] == "8"


def test_a_replica_takes_the_gpus_of_its_tensor_parallel_engine():
    options = {"tensor_parallel_size": 2, "max_num_seqs": 32}
    engine = engine_of(app({"options": options, "max_replicas": 3}))
    assert engine.ray_actor_options["num_gpus"] == 2
    config = engine._deployment_config
    assert config.autoscaling_config.target_ongoing_requests == 24
    assert config.max_ongoing_requests > 32 + 256
    assert engine_of(app({"options": {"device": "cpu"}})).ray_actor_options["num_gpus"] == 0
    assert engine_of(app({"gpus": 0.5})).ray_actor_options["num_gpus"] == 0.5


def test_options_become_the_variables_of_the_server():
    options = {"api_key": ["one", "two"], "prefix_cache": False, "max_num_seqs": 8}
    assert variables_of(options) == {
        "VLMSERVE_API_KEY": "one two",
        "VLMSERVE_PREFIX_CACHE": "false",
        "VLMSERVE_MAX_NUM_SEQS": "8",
    }


def test_adapters_reach_every_replica_and_their_names_the_ingress(tmp_path):
    """Otherwise requests of one adapter would not prefer one replica."""
    options = {"lora": ["a=/x/a", '{"name":"b","path":"org/b"}'], "lora_source": str(tmp_path)}
    application = app({"options": options | {"lora_refresh": 1, "max_loras": 2}})
    variables = engine_of(application).init_args[0]
    assert variables["VLMSERVE_LORA"] == 'a=/x/a {"name":"b","path":"org/b"}'
    assert variables["VLMSERVE_LORA_SOURCE"] == str(tmp_path)
    assert variables["VLMSERVE_LORA_REFRESH"] == "1"
    assert application._bound_deployment.init_args[2] == {"a", "b"}
    # and a node's own variable cannot switch on the routes that would reach one replica only
    assert variables["VLMSERVE_ALLOW_LORA_UPDATES"] == variables["VLMSERVE_LORA_ROOT"] == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"options": {"lora": ["a=/x y"]}}, "lora: a value on Ray .* contains no blank"),
        ({"options": {"lora": ["a"]}}, "--lora 'a': give NAME=FOLDER"),
        (
            {"options": {"allow_lora_updates": True}},
            "allow_lora_updates does not apply on Ray: a request would reach one replica only",
        ),
        ({"options": {"port": 1}}, "port does not apply on Ray: the port is Serve's"),
        ({"options": {"max_seqs": 1}}, "max_seqs is not an option of vlmserve serve"),
        ({"replicas": 0}, "replicas"),
        ({"max_replica": 3}, "max_replica"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas"),
    ],
)
def test_a_wrong_argument_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        app(args)


def test_every_option_of_the_start_is_passed_on_or_has_a_reason_not_to_be():
    names = {one.name for one in fields(StartOptions)}
    assert names >= START_OPTIONS
    assert names - START_OPTIONS <= set(NOT_HERE)


def test_the_command_passes_on_what_was_given():
    values = {"max_num_seqs": 8, "port": 9000, "replicas": 2, "model": "m", "metrics_port": None}
    assert _given(values) == {"max_num_seqs": 8}


def test_the_command_refuses_what_has_no_part_on_ray():
    """--replica-name and --log-format were dropped silently."""
    own = {"metrics_port": 9001, "replica_name": "one", "log_format": "json"}
    own |= {"allow_lora_updates": True, "lora_root": "adapters"}
    assert READ_HERE | set(own) == {"model", *NOT_HERE}
    for name, value in own.items():
        option = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=f"{option} does not apply on Ray: "):
            _given({"port": 9000, name: value})


def test_the_command_passes_its_address_and_certificate_on_to_rays_proxies():
    values = {"host": "127.0.0.1", "port": 9000}
    values |= {"tls_certfile": "cert.pem", "tls_keyfile": "key.pem"}
    options = _http(values)
    assert (options.host, options.port) == ("127.0.0.1", 9000)
    assert (options.ssl_certfile, options.ssl_keyfile) == ("cert.pem", "key.pem")


def test_an_update_of_a_single_replica_starts_the_new_one_first():
    """Ray stops old ones first: the requests of minutes had nowhere to go."""
    surges = {}
    for args in ({}, {"replicas": 2}, {"max_replicas": 3}, {"surge_percent": 0}):
        surges[str(args)] = engine_of(app(args))._deployment_config.max_surge_percent
    assert list(surges.values()) == [1, 0, 1, 0]
    assert app({})._bound_deployment._deployment_config.max_surge_percent == 100
