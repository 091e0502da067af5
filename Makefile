# Everything that is done to this work tree, by people and by CI alike.
#
#   make demo    set up all that is needed, then make and measure a model
#   make test    set up all that is needed, then run the tests
#
# Either may be first, and both may be run again: what is there is reused.
# Needs Python 3.11 or newer (another one: make PYTHON=python3.12), a C++
# compiler and CMake 3.21 or newer.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin
stamp := $(VENV)/.installed
fresh := $(VENV)/.fresh
benches := bench-awq bench-compare bench-evaluation bench-gptq bench-qwen-coder bench-serve bench-serve-load bench-verify

.PHONY: help demo test test-architectures venv native check format bench $(benches) clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile
	@echo "further: make venv, native, test-architectures, check, format, bench, $(benches), clean"

demo: native
	$(bin)/ggufkit demo $(ARGS)

test: native
	@$(bin)/python -m tests.browser
	$(bin)/python -m pytest $(ARGS)

# Of some 120 architectures; the tests try a dozen.
test-architectures: native
	$(bin)/python -m tests.architectures $(ARGS)

venv: $(stamp)
	@if [ -e $(fresh) ]; then rm -f $(fresh); else echo "reused $(VENV)"; fi

$(stamp): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: there is no $(PYTHON)" >&2; \
		echo "hint: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V)" >&2; \
		echo "hint: name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "hint: Debian and Ubuntu need: apt install python3-venv" >&2; exit 1; }
	@echo "installing packages into $(VENV); torch is large, so this may take minutes"
	@$(bin)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $(fresh) $(stamp)
	@echo "installed $$($(bin)/python -m pip list 2>/dev/null | tail -n +3 | wc -l | tr -d ' ') packages"

native: venv
	$(bin)/ggufkit build

check: venv
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

format: venv
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

bench: native
	$(bin)/python -m bench $(ARGS)

$(benches): bench-%: native
	$(bin)/python -m bench.$(subst -,_,$*) $(ARGS)

# Models and native builds stay: they cost more than a minute to make again.
clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
