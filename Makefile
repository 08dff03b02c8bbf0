# Everything here also works by hand: each target is one command. `make check` is what CI runs, less its installs.
SAMPLE ?= 20

.PHONY: help setup test slow mutate snapshots format lint lock upgrade lock-check wheel-check hosts-check check

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make the environment
	uv sync

test: ## the fast tests
	uv run pytest

slow: ## crash, load and conformance runs
	uv run pytest -m slow

mutate: ## MODULE=src/app/core/runs.py [SAMPLE=0] [TESTS="tests/ops tests/core"]: changes that no fast test notices
	uv run python tools/mutate.py $(MODULE) --sample $(SAMPLE) $(if $(TESTS),--tests $(TESTS))

snapshots: ## accept a change of the public interface: write tests/snapshots anew
	ACCEPT_SNAPSHOTS=1 uv run pytest -n 0 tests/test_snapshots.py

format: ## put the code into its form
	uv run ruff format .
	uv run ruff check --fix .

lint: ## form, style, types, architecture, generated tables
	uv run ruff format --check .
	uv run ruff check .
	uv run mypy
	uv run lint-imports
	uv run python -m app.config.reference --check

lock: ## after a change of dependencies: pin what they bring, write requirements.txt
	uv run --no-project python tools/lock.py

upgrade: ## as lock, with the newest of what is not a direct dependency
	uv run --no-project python tools/lock.py --upgrade

lock-check: ## fail when the pins or requirements.txt are out of date
	uv run --no-project python tools/lock.py --check

wheel-check: ## build the wheel, install it as the container does, look inside
	uv run --no-project python tools/check_wheel.py

hosts-check: ## fail when a file names a package registry's host
	sh tools/check_hosts.sh

check: lint test slow lock-check wheel-check hosts-check ## all of the above
