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

# Where Python is told not to keep compiled modules, every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo docs reference screenshots test suite test-report test-web test-install check check-fast pure test-gpu test-py310 benchmarks fuzz clean FORCE

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(LISTING)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=strict -e '.[dev]'
	@touch $@

$(LISTING): FORCE
	@mkdir -p $(VENV)
	@find exporter runtimes calibration package \( -name '*.py' -o -name '*.j2' -o -name '*.json' \) | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@

demo: install
	$(BIN)/perceiver-export demo

# Each worker has a core of its own; they share the bundles that tests need, and take tests from one another. Lint and
# types, which use one core, stand beside them.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
PYTEST_ALL := -m pytest -n $(WORKERS) --dist worksteal
test: install
	$(MAKE) -j2 check suite
	$(MAKE) test-py310
suite: install
	$(BIN)/python $(PYTEST_ALL)

# Lint, types, and the tests that need neither an export nor an engine, side by side: below 90 seconds on two cores.
PURE := $(addprefix tests/,runtimes/test_byte_tokenizer.py runtimes/test_audio_files.py runtimes/test_npz.py \
	runtimes/test_image_files.py runtimes/test_flow.py runtimes/test_tensorrt_builds.py runtimes/test_compare.py \
	runtimes/test_text_tasks.py runtimes/test_video_task.py runtimes/test_points_task.py runtimes/test_audio_task.py \
	runtimes/test_flow_task.py calibration/test_statistics.py calibration/test_labels.py calibration/test_integers.py \
	exporter/test_config_checks.py exporter/test_haiku_pickle.py exporter/test_hostile_pickles.py \
	exporter/test_bad_haiku.py exporter/test_attention_pieces.py exporter/test_preprocessor.py cli/test_run_text.py)
check-fast: install
	$(MAKE) -j2 check pure
pure: install
	$(BIN)/python -m pytest -q $(PURE)

# The report, opened in headless Chromium (Debian's `chromium`): part of `make test` where that is installed.
test-report: install
	$(BIN)/python -m pytest tests/calibration/test_report_in_browser.py

# The page of examples/web in headless Chromium, with onnxruntime-web from npm (150 MB); later part of `make test`.
test-web: install
	npm ci --prefix examples/web --no-audit --no-fund
	$(BIN)/python -m pytest tests/calibration/test_web_in_browser.py

# The wheel and the sdist with each extra, in fresh environments: minutes, and a package index.
test-install: install
	$(BIN)/python tests/install.py $(if $(EXTRAS),--extras $(EXTRAS))

# The pictures of the report in docs/images/, made anew by the README's commands; on a machine that does nothing else.
screenshots: install
	$(BIN)/python -m tests.screenshots

# The generated parts of docs/reference, from the commands' help and from docstrings.
reference: install
	$(BIN)/python docs/generate.py

# The documentation as a site, in site/; `make docs SERVE=1` shows it in a browser and follows changes.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(SERVE),serve,build --strict)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict runtimes calibration exporter package tests examples

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
	$(VENV)/py310/bin/python -m pip install -q -c constraints-py310.txt '.[ort,images]' pytest-xdist
	rm -rf $(VENV)/py310/bundle
	$(BIN)/perceiver-export export examples/fashion_mnist/checkpoint -o $(VENV)/py310/bundle --json > /dev/null
	PERCEIVER_TEST_TARGETS=ort-cpu PERCEIVER_TEST_BUNDLE=$(CURDIR)/$(VENV)/py310/bundle $(VENV)/py310/bin/python $(PYTEST_ALL) tests/runtimes
endif

BENCHMARKS := overhead serving loading imports preset_counts parity deepmind_parity system_parity flow_patches speed zoo \
	examples video_folds fold_scaling export_full_size int8_drop int8_accuracy int8_full_size calibration_memory fp16_overflow \
	tensorrt_api \
	tensorrt_presets tensorrt_shared_weights bound_coverage sequential validation_throughput search_seeds
benchmarks: install
	for name in $(BENCHMARKS); do echo "# $$name"; $(BIN)/python -m tests.benchmarks.$$name || exit 1; done

# Damaged files to every reader, for MINUTES; then commands that are killed, programs that end in the middle, and loads.
MINUTES ?= 10
fuzz: install
	$(BIN)/python tests/fuzz/readers.py --minutes $(MINUTES) --seed $$$$
	$(BIN)/python tests/fuzz/kills.py --minutes $(MINUTES) --kills 100000 --seed $$$$
	$(BIN)/python tests/fuzz/exits.py --times 2
	$(BIN)/python tests/fuzz/loads.py --minutes $(MINUTES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
