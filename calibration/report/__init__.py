# SPDX-License-Identifier: Apache-2.0
"""The result of a validation as HTML, Markdown, JUnit and rows for the terminal."""
