# make demo and make test each work as the first command in a fresh clone; they need Python 3.11 or newer and an index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# A strict editable install links file by file, so it is repeated when the list of files changes.
LISTING := $(VENV)/files
# The product supports 3.10; the runtime's tests run there too where that interpreter is.
PYTHON310 ?= $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null && echo $$p && break; done)

.PHONY: install demo test test-report check test-gpu test-py310 benchmarks clean FORCE

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(LISTING)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=strict -e '.[dev]'
	@touch $@

$(LISTING): FORCE
	@mkdir -p $(VENV)
	@find exporter runtimes calibration \( -name '*.py' -o -name '*.j2' \) | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@

demo: install
	$(BIN)/perceiver-export demo

test: check
	$(BIN)/python -m pytest
	$(MAKE) test-py310

# The report, opened in headless Chromium (Debian's `chromium`): part of `make test` where that is installed.
test-report: install
	$(BIN)/python -m pytest tests/calibration/test_report_in_browser.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict runtimes calibration exporter tests examples

# On a machine with an NVIDIA GPU and TensorRT; where there is none each test says why it is skipped. On a Jetson, with the
# environment that sees JetPack's TensorRT and has pytest, and the demo's bundle with its graphs rewritten for fp16:
# make test-gpu GPU_PYTHON=app/bin/python PERCEIVER_TEST_BUNDLE=BUNDLE
GPU_PYTHON ?= $(BIN)/python
test-gpu: $(if $(PERCEIVER_TEST_BUNDLE),,install)
	$(GPU_PYTHON) -m pytest tests/runtimes/test_tensorrt_gpu.py

test-py310: install
ifeq ($(PYTHON310),)
	@echo "no Python 3.10 here: the runtime was not tested on it"
else
	test -x $(VENV)/py310/bin/python || $(PYTHON310) -m venv $(VENV)/py310
	$(VENV)/py310/bin/python -m pip install -q -c constraints-py310.txt '.[ort,images]' pytest
	rm -rf $(VENV)/py310/bundle
	$(BIN)/perceiver-export export examples/fashion_mnist/checkpoint -o $(VENV)/py310/bundle --json > /dev/null
	PERCEIVER_TEST_TARGETS=ort-cpu PERCEIVER_TEST_BUNDLE=$(CURDIR)/$(VENV)/py310/bundle $(VENV)/py310/bin/python -m pytest tests/runtimes
endif

benchmarks: install
	$(BIN)/python tests/benchmarks/overhead.py
	$(BIN)/python tests/benchmarks/serving.py
	$(BIN)/python tests/benchmarks/loading.py
	$(BIN)/python tests/benchmarks/imports.py
	$(BIN)/python tests/benchmarks/parity.py
	$(BIN)/python tests/benchmarks/deepmind_parity.py
	$(BIN)/python tests/benchmarks/system_parity.py
	$(BIN)/python tests/benchmarks/flow_patches.py
	$(BIN)/python tests/benchmarks/folds.py
	$(BIN)/python tests/benchmarks/video_folds.py
	$(BIN)/python tests/benchmarks/fold_scaling.py
	$(BIN)/python tests/benchmarks/export_full_size.py imagenet-fourier language-bytes optical-flow
	$(BIN)/python tests/benchmarks/int8_drop.py
	$(BIN)/python tests/benchmarks/int8_accuracy.py
	$(BIN)/python tests/benchmarks/int8_full_size.py --plain
	$(BIN)/python tests/benchmarks/calibration_memory.py
	$(BIN)/python tests/benchmarks/fp16_overflow.py
	$(BIN)/python tests/benchmarks/tensorrt_api.py
	$(BIN)/python tests/benchmarks/tensorrt_presets.py
	$(BIN)/python tests/benchmarks/tensorrt_shared_weights.py
	$(BIN)/python tests/benchmarks/bound_coverage.py
	$(BIN)/python tests/benchmarks/validation_throughput.py
	$(BIN)/python tests/benchmarks/search_seeds.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
