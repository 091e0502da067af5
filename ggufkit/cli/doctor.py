"""``ggufkit doctor``: what is here, and what is wrong with it."""

import click

from ggufkit.cli.session import Session, json_option, pass_session

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@click.command("doctor")
@json_option
@pass_session
def command(session: Session, as_json: bool) -> int:
    """Show what ggufkit runs on, and a remedy for each thing that is wrong.

    Looks at Python, packages, compilers, the native build, the Python binding,
    GPUs, disk and memory. The exit code is 1 if there is a problem.
    """
    from ggufkit import pipeline

    findings = pipeline.doctor(models_dir=session.models_dir)
    problems = sum(f.state == "problem" for f in findings)

    def human() -> None:
        from rich.text import Text

        width = max(len(f.subject) for f in findings)
        for finding in findings:
            mark, colour = _MARKS[finding.state]
            line = Text(f"{mark} ", style=colour)
            line.append(f"{finding.subject:<{width}}  ", style="default")
            line.append(finding.detail, style="default")
            session.console.print(line, soft_wrap=True)
            if finding.remedy:
                remedy = Text(f"  {'':<{width}}  → {finding.remedy}", style=colour)
                session.console.print(remedy, soft_wrap=True)
        summary = f"problems: {problems}" if problems else "all that is needed is here"
        session.console.print(summary)

    session.emit(as_json, findings, human)
    return 1 if problems else 0
