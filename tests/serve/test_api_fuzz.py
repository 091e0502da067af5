"""Requests made up from the server's own description: none may end in a bug."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from ggufkit.serve.api.answering import Service
from ggufkit.serve.api.app import create_app
from ggufkit.serve.api.models import Models
from tests.serve.backends import FakeBackend
from tests.serve.serving import Running, hosted, serving

DESCRIBED = schemathesis.openapi.from_dict(create_app(Service(Models(()))).openapi())
OPERATIONS = {
    f"{op.method} {op.path}": op for op in (r.ok() for r in DESCRIBED.get_all_operations())
}


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    backend = FakeBackend(context=256, cells=4096, batch=512)
    with serving(hosted(backend)) as running:
        yield running


def test_everything_is_described() -> None:
    paths = {op.path for op in OPERATIONS.values()}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models"} <= paths
    assert {"/tokenize", "/detokenize", "/health", "/metrics"} <= paths


MODES = schemathesis.GenerationMode
ASKED = [(op, MODES.POSITIVE) for op in OPERATIONS.values()] + [
    # What has no body can hardly be asked for wrongly.
    (op, MODES.NEGATIVE)
    for op in OPERATIONS.values()
    if op.method == "post"
]


@pytest.mark.parametrize(
    ("operation", "mode"), ASKED, ids=[f"{op.method} {op.path}, {mode.value}" for op, mode in ASKED]
)
def test_no_request_ends_in_a_bug(
    api: Running, operation: Any, mode: schemathesis.GenerationMode
) -> None:
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        response = case.call(base_url=api.url)
        assert response.status_code < 500, f"{case.as_curl_command()}: {response.text}"
        if response.status_code >= 400:
            error = json.loads(response.content)["error"]
            assert set(error) == {"message", "type", "param", "code"}

    ask()
