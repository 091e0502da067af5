"""A server with a page, whose models are no models: ``python -m tests.serve.page_server [KEY]...``

It is a process of its own, since NiceGUI has one state for a whole process. It
tells its address on stdout, and ends when its input does.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Sequence

from ggufkit.llamacpp.batching import Decoded
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.serve.api.answering import Service
from ggufkit.serve.api.app import create_app
from ggufkit.serve.api.models import Models, Offer
from ggufkit.serve.api.options import Limits
from ggufkit.serve.api.server import Server, listen
from tests.serve.backends import END, FakeBackend, Scripted
from tests.serve.serving import hosted

CONTEXT = 4096
PICTURE = "http://pictures.invalid/stolen.png"
ANSWERS = {
    1: f"""# A heading

Some *text* with `code`, <b>HTML</b> and <img src={PICTURE}?html onerror=alert(1)>.

![a picture]({PICTURE}?markdown) and [a link](http://links.invalid/)

<script src=http://scripts.invalid/x.js></script> [worse](javascript:alert(2))

```python
def greet(name: str) -> str:
    return f"<i>{{name}}</i>"  # {" and on" * 30}
```

| model | tokens/s |
|---|---|
| one | 12 |
""",
    2: "short",
}
"""What is said if such a seed is asked for; other answers are letters without end."""
PACE_SECONDS = 0.004


class Paced(FakeBackend):
    """Writes letters, not all at once; or what is written above."""

    pace_seconds = 0.0

    def decode(self) -> Decoded:
        time.sleep(self.pace_seconds)
        return super().decode()

    def sampler(self, params: SamplingParams) -> Scripted:
        text = ANSWERS.get(params.seed or 0, "")
        self.pace_seconds = 0.0 if text else PACE_SECONDS
        made = Scripted(self, [*text.encode(), END] if text else ())
        self.samplers.append(made)
        return made


def main(keys: Sequence[str]) -> None:
    def model(name: str) -> Offer:
        backend = Paced(context=CONTEXT, cells=32768, batch=2048)
        return Offer(name, 1, lambda: hosted(backend, name))

    service = Service(Models([model("first"), model("second")]), Limits(shutdown_seconds=0.2))
    sock = listen("127.0.0.1", 0)
    server = Server(create_app(service, keys=keys, ui=True), service)

    def wait_for_the_end() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    print("http://{}:{}".format(*sock.getsockname()), flush=True)
    asyncio.run(server.serve([sock]))


if __name__ == "__main__":
    main(sys.argv[1:])
