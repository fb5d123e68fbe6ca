# make run      set up .venv and start the demo fleet in the foreground; Ctrl-C stops all of it
# make test     set up .venv and run every test that needs no GPU
# make lint     ruff          make types    mypy --strict
# make sanitize the CPU kernels' tests with the kernels under the address sanitizer
#
# PORT=9000               another port for `make run`
# CONFIG=configs/x.yaml   another fleet
# LOGS=1                  show the logs of all processes under `make run`
# PYTHON=/path/python     another interpreter, 3.11 or 3.12
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
#     an index beside pip's own that is asked for packages too. On Linux the torch of PyPI brings CUDA along (some GB);
#     this one has the build without. Needed for the first installation only.

PORT ?= 8000
CONFIG ?= configs/demo.yaml
VENV := .venv
KERNELS := $(wildcard engines/native/src/*)
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DELETE_ON_ERROR:
.PHONY: run test lint types sanitize clean

run: $(VENV)/runtime.stamp
	@exec $(BIN)/outrider serve $(CONFIG) --port $(PORT) $(if $(LOGS),--logs)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -m "not gpu and not bench" $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

sanitize: $(VENV)/dev.stamp
	OUTRIDER_SANITIZE=address $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize
	OUTRIDER_KERNELS="$$(ls build/sanitize/engines/native/_kernels*.so)" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -q -m "not gpu and not bench" tests/engines/native \
		tests/engines/optimized/test_decoder_layer.py tests/engines/attention/test_native.py

clean:
	rm -rf $(VENV) build engines/native/*.so

$(VENV)/pip.stamp:
	@echo "== Making a virtual environment in $(VENV)"
	@python=""; for candidate in $(PYTHON) python3.12 python3.11 python3; do \
		if "$$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
		then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or 3.12 with its venv module is needed (Debian: apt install python3-venv)." >&2; exit 1; fi; \
	"$$python" -m venv $(VENV)
	@touch $@

# A stamp is newer than what decides the installation, so nothing is installed twice.
$(VENV)/runtime.stamp: $(VENV)/pip.stamp pyproject.toml constraints.txt setup.py $(KERNELS)
	@echo "== Installing Outrider and its pinned dependencies; the first time takes some minutes"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/pip.stamp pyproject.toml constraints.txt setup.py $(KERNELS)
	@echo "== Installing Outrider, its pinned dependencies and the tools of its tests; the first time takes some minutes"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/runtime.stamp
