"""``ggufkit rpc``: lend this machine to models that run elsewhere."""

import signal
from types import FrameType

import click

from ggufkit.cli.session import Session, nbytes_text, pass_session


@click.command("rpc")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on (IPv4).")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=50052,
    show_default=True,
    help="Port to listen on.",
)
@click.option(
    *("-t", "--threads"),
    type=click.IntRange(min=1),
    help="Threads, where the CPU computes.  [default: all cores]",
)
@click.option("--cache", is_flag=True, help="Keep large tensors on disk, to be sent only once.")
@pass_session
def command(session: Session, host: str, port: int, threads: int | None, cache: bool) -> None:
    """Lend this machine's memory and cores, or its GPUs, to models that run elsewhere.

    There, name it: --rpc HOST:PORT for chat, run and serve. It is llama.cpp's
    own RPC server, for one client at a time. Ctrl-C ends it.
    """
    from ggufkit import pipeline
    from ggufkit.llamacpp.rpc import Offer

    say = session.progress.say

    def started(offer: Offer) -> None:
        say(f"listening on {host}:{port}, protocol {offer.version}")
        for free, total in zip(offer.free_nbytes, offer.total_nbytes, strict=True):
            say(f"offered: {nbytes_text(free)} of {nbytes_text(total)} of memory")
        say(f"to use it: ggufkit chat MODEL --rpc {offer.endpoint}")
        say("stop: Ctrl-C")

    def client(came: bool) -> None:
        say("a client has come" if came else "the client has gone")

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        pipeline.rpc(
            host,
            port,
            threads=threads,
            cache=cache,
            on_start=started,
            on_client=client,
            progress=session.progress,
        )
    except KeyboardInterrupt:
        say("ended")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
