# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export package`."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from perceiver_export.exporter.cli.output import BundleArgument, JsonFlag, mebibytes, print_json

_NEXT = {
    "triton": "tritonserver --model-repository {path}",
    "ovms": "docker run -p 9000:9000 -v {path}:/models openvino/model_server "
    "--port 9000 --config_path /models/config.json",
    "kserve": "kubectl apply -f {path}/servingruntime.yaml -f {path}/inferenceservice.yaml",
}


def package(
    bundle: BundleArgument,
    server: Annotated[str, typer.Option("--for", metavar="triton|ovms|kserve", help="The server to write it for.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where the model repository goes; by default BUNDLE-SERVER.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What the server runs it on: ort-cpu, ort-cuda, openvino-cpu, -gpu or -npu.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write a model repository for an inference server, set up by what `bench --save` measured."""
    from perceiver_export.exporter.packaging import package as package_

    path = package_(bundle, server, output, target=target)
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    if json:
        print_json({"path": str(path), "files": list(map(str, files))})
        return
    typer.echo(f"{path} is a model repository for {server}:")
    for file in files:
        typer.echo(f"  {file} ({mebibytes((path / file).stat().st_size)})")
    if server == "kserve":
        typer.echo(f"upload {path.absolute()}/repository to the storageUri of inferenceservice.yaml first")
    typer.echo(f"next: {_NEXT[server].format(path=shlex.quote(str(path.absolute())))}")
