# SPDX-License-Identifier: Apache-2.0
"""`python -m perceiver_export`: the command line without its console script."""

from perceiver_export.exporter.cli.main import main

main()
