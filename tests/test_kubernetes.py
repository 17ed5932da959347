"""The manifests against the published schemas, strictly: no field that is not there, no value of another type."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

MANIFESTS = sorted((Path(__file__).parents[1] / "launch" / "kubernetes").glob("*.yaml"))
DOCUMENTS = [
    pytest.param(tree, id=f"{path.name}-{tree['kind']}")
    for path in MANIFESTS
    for tree in yaml.safe_load_all(path.read_text())
]
SIMPLE = {"str": str, "int": int, "bool": bool, "float": (int, float)}
CRD = "operator/deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml"


def model(name):
    """A class that kubernetes or Kubeflow's training operator generate from their published OpenAPI."""
    if name.startswith("Kubeflow"):
        return getattr(pytest.importorskip("kubeflow.training.models", reason="needs kubeflow-training"), name)
    return getattr(pytest.importorskip("kubernetes.client.models", reason="needs kubernetes"), name)


def typed(kind, value, where):
    """``value`` as the type that OpenAPI's generator calls ``kind``; raises ValueError where it is not one."""
    if kind == "object":  # int or string
        return value
    if kind in SIMPLE:
        if not isinstance(value, SIMPLE[kind]) or (kind == "int" and isinstance(value, bool)):
            raise ValueError(f"{where}: {value!r} is no {kind}")
        return value
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            raise ValueError(f"{where}: {value!r} is no list")
        return [typed(inner[1], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r} is no mapping")
    if inner := re.fullmatch(r"dict[([]str, (.*)[)\]]", kind):
        return {key: typed(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    cls = model(kind)
    fields = {name: field for field, name in cls.attribute_map.items()}
    if unknown := value.keys() - fields.keys():
        raise ValueError(f"{where}: no field {sorted(unknown)} in {kind}, which has {sorted(fields)}")
    given = {
        fields[name]: typed(cls.openapi_types[fields[name]], item, f"{where}.{name}") for name, item in value.items()
    }
    try:
        return cls(**given)  # refuses what lacks a required field
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def closed(schema):
    """A schema that refuses what it does not name, as the API server does with ``--validate=strict``."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    shut = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        shut["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return shut


def check(tree):
    """Raises ValueError where a document is not what the schema of its kind says."""
    version, kind = tree["apiVersion"], tree["kind"]
    if (version, kind) == ("kubernetes.dask.org/v1", "DaskCluster"):
        check_dask(tree)
    elif version == "kubeflow.org/v1":
        typed(f"KubeflowOrgV1{kind}", tree, kind)
    else:
        assert version in ("v1", "batch/v1")
        typed(f"V1{kind}", tree, kind)


@functools.cache
def of_dask():
    """The operator's own definition of a DaskCluster, which its package carries."""
    if (found := importlib.util.find_spec("dask_kubernetes")) is None:
        pytest.skip("needs the files of dask-kubernetes: pip install --no-deps dask-kubernetes")
    definition = yaml.load((Path(found.submodule_search_locations[0]) / CRD).read_text(), yaml.CSafeLoader)["spec"]
    assert definition["names"]["kind"] == "DaskCluster"
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["versions"] if v["name"] == "v1")
    schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    return closed(schema)


def check_dask(tree):
    validation = pytest.importorskip("jsonschema", reason="needs jsonschema")
    errors = list(validation.Draft4Validator(of_dask()).iter_errors(tree))
    if errors:
        raise ValueError("; ".join(f"{e.json_path}: {e.message[:300]}" for e in errors))


@pytest.mark.parametrize("tree", DOCUMENTS)
def test_manifests_are_what_the_published_schemas_say(tree):
    check(tree)


def first(tree, key):
    """The first mapping of a tree that has a key."""
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    if isinstance(tree, dict) and key in tree:
        return tree
    return next((found for part in parts if (found := first(part, key))), None)


@pytest.mark.parametrize("tree", [d for d in DOCUMENTS if "containers" in str(d.values[0])])
@pytest.mark.parametrize(
    "breaks",
    [
        lambda pod: pod.update(volumess=[]),
        lambda pod: pod["containers"][0].update(comand=["x"]),
        lambda pod: pod.update(containers={"name": "x"}),
        lambda pod: pod["containers"][0]["args"].append(8),
        lambda pod: pod["containers"][0].pop("name"),
        lambda pod: pod.update(hostNetwork="yes"),
    ],
)
def test_what_is_not_in_the_schemas_is_refused(tree, breaks):
    broken = copy.deepcopy(tree)
    breaks(first(broken, "containers"))
    with pytest.raises(ValueError, match=r"containers|volumess|hostNetwork|name"):
        check(broken)
