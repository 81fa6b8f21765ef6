"""What a request may hold; of MONAI Label, which need not be installed, nothing is used."""

import importlib
import importlib.util
import math
import sys
import types
from unittest import mock

import pytest


class HTTPException(Exception):
    """As FastAPI's."""

    def __init__(self, status_code, detail):
        self.status_code, self.detail = status_code, detail


@pytest.fixture
def check_request(monkeypatch):
    if importlib.util.find_spec("monailabel.main"):
        yield importlib.import_module("cardiac_qc_plugin.monailabel.main").check_request
        return
    interfaces = ["app", "exception", "datastore", "tasks", "tasks.infer_v2", "tasks.scoring", "tasks.strategy"]
    tasks = ["activelearning", "activelearning.first", "activelearning.random", "infer", "infer.bundle"]
    names = [f"interfaces.{name}" for name in interfaces] + [f"tasks.{name}" for name in tasks]
    names += ["interfaces", "tasks", "tasks.train", "tasks.train.bundle", "utils", "utils.others"]
    for name in ("monailabel", *(f"monailabel.{name}" for name in (*names, "utils.others.generic"))):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    monkeypatch.setitem(sys.modules, "fastapi", types.SimpleNamespace(HTTPException=HTTPException))
    main = importlib.import_module("cardiac_qc_plugin.monailabel.main")
    yield main.check_request
    for name in ("main", "tasks"):
        sys.modules.pop(f"cardiac_qc_plugin.monailabel.{name}", None)


@pytest.mark.parametrize("samples", [2.5, "abc", "2.5", "", None, math.inf, math.nan])
@pytest.mark.parametrize("name", ["samples", "turns"])
def test_samples_and_turns_are_whole_numbers(check_request, name, samples):
    for request in ({name: samples}, {"params": {name: [10, samples]}}):
        with pytest.raises(Exception) as refused:
            check_request(request)
        assert refused.value.status_code == 422
        assert refused.value.detail == f"{name} is a whole number, got {samples!r}."


@pytest.mark.parametrize("samples", [0, 2, 10.0, "10", [10]])
def test_whole_numbers_of_samples_pass(check_request, samples):
    check_request({"model": "cardiac_qc", "samples": samples, "turns": samples})


def test_expressions_of_a_configuration_are_refused(check_request):
    with pytest.raises(Exception) as refused:
        check_request({"threshold": "$print()"})
    assert "must not begin with '$'" in refused.value.detail


@pytest.mark.parametrize("name", ["threshold", "catch"])
def test_shares_are_numbers(check_request, name):
    with pytest.raises(Exception) as refused:
        check_request({name: "much"})
    assert refused.value.detail == f"{name} is a number between 0 and 1, got 'much'."
    check_request({name: ["0.9", 0.9, None]})


def test_the_operating_point_is_a_choice_of_what_to_catch(check_request):
    check_request({"catch": "operating point"})
    with pytest.raises(Exception) as refused:
        check_request({"threshold": "operating point"})
    assert refused.value.status_code == 422
