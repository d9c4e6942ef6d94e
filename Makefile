# make run [ARGS="optimizer=galore beta=0.2"]   the main job, on the embedded default
# make test                                     the quick tests
# make check                                    what CI runs, less the slow tests
# make faults [FAULTS="--family kills"]         make every fault happen and judge what comes of it
# make ckpt-chaos                               have an outside judge kill runs while they save
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
FAULTS ?=

.PHONY: install run test test-slow check lint tiny audit faults ckpt-chaos
install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

run: install
	@$(BIN)/python launch.py $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# Known vulnerabilities of the pinned versions; asks PyPI, so it needs a network and is in no check.
# Without --strict pip-audit calls packages it could learn nothing of "no known vulnerabilities".
audit: install
	@test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && \
		.venv/audit/bin/python -m pip install -q --disable-pip-version-check pip-audit==2.10.1; }
	@.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip \
		--progress-spinner off || { echo "audit: NOT PASSED. A table above lists vulnerabilities;" \
		"without one, PyPI could not be asked and nothing was audited."; exit 1; }

# Make the embedded model again (about eight minutes on two cores)
tiny: install
	$(BIN)/python -m orpo_lab.tiny.make

# Needs root for its disks (an hour and more on two cores)
faults: install
	@$(BIN)/python -m faults $(FAULTS)

ckpt-chaos: install
	@benchmarks/ckpt_chaos.sh
