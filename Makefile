# Everything sets itself up: the first target creates .venv and installs the package, with pinned dependencies from Python 3.11 on.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: help demo test lint bench kernels sanitize clean

help:  ## what can be done here
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(INSTALLED)  ## the whole method in about four minutes on two cores; writes runs/demo/report.html
	$(BIN)/tisdpo run examples/demo.yaml

test: $(INSTALLED)  ## all tests
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)  ## style
	$(BIN)/python -m pip install --quiet "ruff>=0.14"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)  ## everybody's loss step and training step; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.end_to_end
	$(BIN)/python -m benchmarks.plot

kernels: $(INSTALLED)  ## what the compiler makes of the Triton kernels, for GPUs that need not be there
	$(BIN)/python -m benchmarks.kernel_report

# The C++ backend with the address and undefined-behaviour sanitizers in a folder of its own; leaks would be Python's.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH="$(CURDIR)/build/sanitize/lib"
sanitize: $(INSTALLED)  ## the tests of the C++ backend under the compiler's sanitizers
	rm -rf build/sanitize
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	cd build && $(SANITIZED) ../$(BIN)/python -c 'from tisdpo.ops import extension as e; assert not e.problem(), e.problem(); \
		assert e.PACKAGE.parts[-4:-1] == ("build", "sanitize", "lib"), e.PACKAGE'
	$(SANITIZED) $(BIN)/pytest -p no:cacheprovider tests/test_cpp.py

clean:  ## remove the environment and all runs
	rm -rf .venv runs build dist *.egg-info

# No build isolation: an isolated build would fetch a second torch. No pins for Python 3.10, which half of the pinned releases left behind.
PINS = $(shell $(PYTHON) -c 'import sys; print("--constraint constraints.txt" if sys.version_info >= (3, 11) else "")')
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "tisdpo needs Python 3.10 or newer; set PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install $(PINS) torch==2.13.0
	$(BIN)/python -m pip install $(PINS) --no-build-isolation --editable ".[report,test]"
	touch $(INSTALLED)
