# Every target that needs the environment makes it first; a finished one is left alone until a pin changes.
#   make PYTHON=/path/to/python3.11   the interpreter the environment is made with
#   make VENV=/path/to/venv           where it is made

VENV ?= .venv
export PYTHON
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full lint clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## make the virtual environment of the CPU profile
	@python3 tools/install.py $(VENV)

demo: install  ## train the demo: SFT, then GRPO on two ranks; minutes on a CPU
	@$(RUN) bash examples/demo/run.sh

test: install  ## run the tests but for the slow ones
	@$(RUN) python -m pytest -q

test-full: install  ## run all tests
	@$(RUN) python -m pytest -q -m ""

lint: install  ## check the style
	@$(RUN) ruff check .

clean:  ## remove caches and build output; runs/ and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path '*/.venv/*' -prune -exec rm -rf {} +
