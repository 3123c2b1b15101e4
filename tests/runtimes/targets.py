# SPDX-License-Identifier: Apache-2.0
"""The targets that the tests run on. One that is expected and not here fails; PERCEIVER_TEST_TARGETS expects others."""

from __future__ import annotations

import os

EXPECTED = tuple(os.environ.get("PERCEIVER_TEST_TARGETS", "ort-cpu,openvino-cpu").split(","))
