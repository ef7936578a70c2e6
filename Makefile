# Two commands on a fresh machine: `make train` and `make test`. Each target installs what it needs by itself.
#
#   make train [ARGS="--seeds 5"]   train the recipe net on fastconv's and on torch's layers; results under runs/
#   make test                       lint, and the tests that take minutes
#   make verify                     the README as a newcomer types it, and the slow tests
#   make lint                       ruff; mypy on the package
#   make bench-cpu [ARGS="--suite layers"] times layers, pools, nets and training steps against stock torch on this CPU, some
#                                   25 minutes; records and pictures under benchmarks/results/
#   make report                     the README's figures, docs/results.md and docs/numerics.md's table, from those records
#   make sanitize                   the tests of the C++ kernels on a build of them with address and undefined-behaviour
#                                   sanitizers; a finding fails. Needs g++; the usual build stays as it is
#   make docs                       docs/kernels.md, docs/traffic.md, docs/cuda.md: machine code of the kernels and the bytes that they move, no
#                                   GPU needed
#   make gpu [PART=layers,models]   all that needs an NVIDIA GPU, part after part: tests, tune, layers, models, training, inspect,
#                                   train; results under benchmarks/results/<chip>/, and copies in the folder that the variable OUT
#                                   names. A part ends within LIMIT seconds (480): run it again and it goes on where it
#                                   stopped. "Error 1" behind the last line: something failed; 3: something is left.
#                                   `make gpu DEVICE=cpu QUICK=1` rehearses it without a GPU; results under runs/gpu/
#   make clean                      remove what was built; .venv and runs/ stay
#
# PYTHON  the interpreter that .venv is made with (default python3).
# VENV    where to install (default .venv). `make train PYTHON=python3 VENV=` uses PYTHON's own environment as it is:
#         only fastconv is built and installed there, without its dependencies and without the network.
# TORCH   what to ask pip for instead of the versions below.

PYTHON ?= python3
VENV ?= .venv
PART ?=
DEVICE ?= cuda
QUICK ?=
LIMIT ?= 480
ARGS ?=

export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.SHELLFLAGS := -ec
.DELETE_ON_ERROR:

sources := setup.py pyproject.toml $(wildcard MANIFEST.in) $(shell find csrc -type f 2>/dev/null)

ifneq ($(strip $(VENV)),)
python := $(VENV)/bin/python
stamp := $(VENV)/.fastconv-installed
nvidia := $(shell { nvidia-smi -L || cat /proc/driver/nvidia/version; } >/dev/null 2>&1 && echo yes)
ifeq ($(nvidia),yes)
TORCH ?= torch>=2.11
else
TORCH ?= torch==2.13.0 triton==3.7.1
endif
else
python := $(PYTHON)
environment := $(shell $(PYTHON) -c "import sys, zlib; print(zlib.crc32((sys.prefix + sys.version).encode()))")
stamp := build/.fastconv-installed-$(environment)
export PIP_NO_INDEX := 1
export PIP_BREAK_SYSTEM_PACKAGES := 1
endif

.PHONY: train test verify lint bench-cpu report sanitize docs gpu clean install

train: $(stamp)
	$(python) -m fastconv train --compare fastconv,torch $(ARGS)

test: lint
	$(python) -m pytest -q -m "not slow and not gpu"

verify: $(stamp)
	$(python) -m pytest -q -m "slow and not gpu"

# Only in an environment that is not ours may a tool be missing; that is said, never passed over.
lint: $(stamp)
ifneq ($(strip $(VENV)),)
	$(python) -m ruff check .
	$(python) -m ruff format --check -q .
	$(python) -m mypy
else
	@for tool in "ruff check ." "ruff format --check -q ." "mypy"; do \
	  name=$${tool%% *}; \
	  if ! $(python) -m $$name --version >/dev/null 2>&1; then \
	    echo "lint: SKIPPED $$name, which this environment does not have"; \
	  else \
	    echo "$(python) -m $$tool"; $(python) -m $$tool; \
	  fi; \
	done
endif

bench-cpu: $(stamp)
	$(python) -m fastconv bench --device cpu --out benchmarks/results $(ARGS)

report: $(stamp)
	$(python) -m benchmarks.report

# The sanitized package lies in a folder of its own, in which the tests run: what is imported there is that one, in the
# processes that tests start too. Neither CPython nor torch is built for leak detection. libstdc++ is preloaded so that the
# address sanitizer finds __cxa_throw; pytest leaves standard error alone, that a report is seen of a process that it ends.
sanitizers := address,undefined
sanitized := build/sanitize
CXX_FOR_SANITIZE = $(if $(filter-out default,$(origin CXX)),$(CXX),g++)

sanitize: $(stamp)
	@command -v $(firstword $(CXX_FOR_SANITIZE)) >/dev/null || { echo "make sanitize: needs g++, which is not on PATH" >&2; exit 2; }
	@echo "make sanitize: building the CPU library with -fsanitize=$(sanitizers) into $(sanitized)"
	@rm -rf $(sanitized)/lib
	@mkdir -p $(sanitized)
	@PATH="$$($(python) -c 'import os, sys; print(os.path.dirname(sys.executable))'):$$PATH" CXX="$(CXX_FOR_SANITIZE)" FASTCONV_BUILD=cpu FASTCONV_SANITIZE=$(sanitizers) \
	  $(python) setup.py -q build --build-base $(sanitized) --build-temp $(sanitized)/temp --build-lib $(sanitized)/lib \
	  >$(sanitized)/build.log 2>&1 || { cat $(sanitized)/build.log >&2; exit 1; }
	@preload=; \
	for name in libasan.so libubsan.so libstdc++.so; do \
	  file=$$($(CXX_FOR_SANITIZE) -print-file-name=$$name); \
	  case $$file in /*) preload="$$preload $$file";; *) echo "make sanitize: $(CXX_FOR_SANITIZE) has no $$name" >&2; exit 2;; esac; \
	done; \
	echo "make sanitize: running the tests of the native backend, leak detection off"; \
	python=$$($(python) -c 'import sys; print(sys.executable)'); \
	cd $(sanitized)/lib; \
	LD_PRELOAD="$${preload# }" PYTHONPATH="$$PWD" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	"$$python" -m pytest -q -p no:cacheprovider --capture=sys -c "$(CURDIR)/pyproject.toml" --rootdir "$(CURDIR)" \
	  -m "not slow and not gpu" -k "native and not emulated" "$(CURDIR)/tests"
	@echo "make sanitize: no findings"

docs: $(stamp)
	$(python) -m fastconv explain --traffic --model vgg16,recipe --markdown docs/traffic.md
	$(python) -m fastconv inspect --arch sm_80,sm_90,sm_100 --markdown docs/kernels.md
	$(python) tests/emu/device_code.py docs/cuda.md

# Arguments are looked at before anything is built, which takes minutes and is no part's time.
gpu_arguments = --device "$(DEVICE)" --limit "$(LIMIT)" $(if $(PART),--part "$(PART)") $(if $(QUICK),--quick)
gpu:
	@$(PYTHON) -m benchmarks.gpu $(gpu_arguments) --check
	@$(MAKE) --no-print-directory install
	@$(python) -m benchmarks.gpu $(gpu_arguments)

install: $(stamp)

# torch comes first and fastconv is built against it: build isolation would fetch a second one.
$(stamp): $(sources) Makefile
ifneq ($(strip $(VENV)),)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'fastconv needs Python 3.10 or later: make PYTHON=...')"
	$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv "$(VENV)"
	@echo "installing torch and tools into $(VENV): several minutes the first time"
	$(python) -m pip install -q setuptools wheel ninja $(foreach requirement,$(TORCH),'$(requirement)')
	$(python) -m pip install -q --no-build-isolation -e '.[train,test,dev]'
else
	@mkdir -p $(@D)
	$(python) -m pip install -q --no-build-isolation --no-deps -e .
endif
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find fastconv -name '*.so' -delete
	find fastconv tests csrc -name __pycache__ -type d -prune -exec rm -rf {} +
	$(if $(strip $(VENV)),rm -f $(stamp))
