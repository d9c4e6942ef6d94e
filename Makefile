# make run [ARGS="optimizer=galore beta=0.2"]   the main job, on the embedded default
# make test                                     the quick tests
# make check                                    what CI runs, less the slow tests
# make test-slow                                the slow tests that CI runs
# make test-long                                the slow tests that CI does not run: before a release
# make dist                                     wheel and source distribution, in dist/
# make lower-bounds                             the default run with the lowest declared versions
# make faults [FAULTS="--family kills"]         make every fault happen and judge what comes of it
# make ckpt-chaos                               have an outside judge kill runs while they save
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
FAULTS ?=
# A slow test that hangs names itself, and the others go on
NO_HANG := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

.PHONY: install run test test-slow test-long check lint dist lower-bounds tiny audit faults ckpt-chaos
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
	$(BIN)/python -m pytest -m "slow and not long" -n 2 --dist worksteal $(NO_HANG)

test-long: install
	$(BIN)/python -m pytest -m long -n 2 --dist worksteal $(NO_HANG)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

dist: install
	$(BIN)/python -m build

# An environment of its own, made anew where a range has changed. For Python 3.11: the lowest versions
# have no wheels for later ones
lower-bounds: .venv/lower-bounds/.installed
	cd .venv/lower-bounds && bin/orpo-lab train tracker=none
	cd .venv/lower-bounds && bin/orpo-lab sweep optimizer=lora,galore train.max_steps=5 tracker.mode=offline

.venv/lower-bounds/.installed: .venv/.installed .ci/lower_bounds.py
	$(PYTHON) -m venv --clear .venv/lower-bounds
	$(BIN)/python .ci/lower_bounds.py > .venv/lower-bounds/lowest.txt
	.venv/lower-bounds/bin/python -m pip install -q --disable-pip-version-check -c .venv/lower-bounds/lowest.txt .
	@touch $@

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
