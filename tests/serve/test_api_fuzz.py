"""Requests made up from the server's own description: none may end in a bug."""

import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tests.serve.backends import FakeBackend
from tests.serve.serving import Running, hosted, serving


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    backend = FakeBackend(context=256, cells=4096, batch=512)
    with serving(hosted(backend)) as running:
        yield running


@pytest.fixture
def described(api: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{api.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_ends_in_a_bug(case: schemathesis.Case) -> None:
    response = case.call()
    assert response.status_code < 500, f"{case.as_curl_command()}: {response.text}"
    if response.status_code >= 400:
        assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}
