"""``ggufkit build``: the native tools, once."""

from pathlib import Path

import click

from ggufkit.cli.session import Session, json_option, pass_session


@click.command("build")
@click.option(
    "--backend",
    default="cpu",
    show_default=True,
    help="What to compute on: cpu, cuda, vulkan, metal or hip.",
)
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Build this llama.cpp checkout and not the pinned source.",
)
@click.option("--force", is_flag=True, help="Build again even if there is a build.")
@click.option("--no-binding", is_flag=True, help="Do not install llama-cpp-python.")
@click.option("--cmake-arg", "cmake_args", multiple=True, help="Pass this argument to CMake.")
@json_option
@pass_session
def command(
    session: Session,
    backend: str,
    source: Path | None,
    force: bool,
    no_binding: bool,
    cmake_args: tuple[str, ...],
    as_json: bool,
) -> None:
    """Build llama.cpp's tools and libraries, and install the Python binding on them.

    The source is fetched by the pin of this release and checked by its hash.
    What was built before for the same pin, backend, flags, compiler and CPU is
    reused.
    """
    from ggufkit import pipeline

    report = pipeline.build(
        backend,
        source=source,
        force=force,
        install_binding=not no_binding,
        cmake_args=cmake_args,
        progress=session.progress,
    )

    def human() -> None:
        made = report.build
        how = "reused" if report.reused else f"built in {report.seconds:.0f} s"
        session.console.print(f"llama.cpp {made.commit} ({made.backend}): {how}", soft_wrap=True)
        session.console.print(f"  {made.root}", soft_wrap=True)
        session.console.print(f"  tools: {', '.join(made.tools)}", soft_wrap=True)
        if report.binding:
            how = "reused" if report.binding_reused else "installed, running on these libraries"
            session.console.print(f"llama-cpp-python {report.binding}: {how}", soft_wrap=True)
        if made.source_kind != "pin":
            session.console.print(
                f"To use it, set: GGUFKIT_NATIVE={made.root.absolute()}", soft_wrap=True
            )

    session.emit(as_json, report, human)
