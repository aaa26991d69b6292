# Each chore is one command; continuous integration runs the same ones.
#
#   make demo         train the example GPT and watch it (two minutes on two cores)
#   make test         the tests, in two processes; TEST_ARGS="-n 0" for one
#   make test-zoo          the slow tests that run over the zoo of models, on those that make test leaves out; ZOO=half for half of them
#   make test-examples     what a reader runs: the examples, the experiments, every block of the documentation, loops without Lightning
#   make test-distributed  several processes: every strategy, precision and mode, as a table; MATRIX=32-true for one precision
#   make docs         the documentation as pages, in docs/_build; a warning is an error
#   make tables       the tables of the documentation that are made from code and tests
#   make lint         style, docstrings and types
#   make format       apply what can be applied automatically
#   make test-oldest  the tests with the oldest supported releases
#   make test-newest  the tests with the newest releases of everything; torch may come with gigabytes for accelerators
#   make bench        the benchmark tables
#   make clean        remove the environments and everything that was generated

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
# Neighbouring tests stay together, as they share what their modules prepare, until a process has nothing left to do.
# Without the experiments, which train for long: evidence, evidence_steering, post_norm, wrong_starts, alarms.
BENCHMARKS = imports solver overhead memory discovery penalty rescale jacobian sharded scaling audit report audit_large busy norms_behind one_product
PYTEST = -m pytest -n 2 --dist worksteal
READERS = tests/examples tests/docs tests/shells
MATRIX = full
ZOO = rest
PROCESSES = tests/distributed

.PHONY: demo test test-zoo test-examples test-distributed docs tables lint format test-oldest test-newest bench clean

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/train_gpt.py $(DEMO_ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python $(PYTEST) $(addprefix --ignore=,$(READERS) $(PROCESSES)) $(TEST_ARGS)

test-zoo: $(VENV)/.installed-test
	SPECTRAL_ZOO=$(ZOO) $(BIN)/python $(PYTEST) -m zoo $(addprefix --ignore=,$(READERS) $(PROCESSES)) $(TEST_ARGS)

test-examples: $(VENV)/.installed-test
	$(BIN)/python $(PYTEST) $(READERS) $(TEST_ARGS)

test-distributed: $(VENV)/.installed-test
	SPECTRAL_MATRIX=$(MATRIX) $(BIN)/python -m pytest $(PROCESSES) $(TEST_ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky docs docs/_build

tables: $(VENV)/.installed-test
	PYTHONPATH=tests/support $(BIN)/python docs/tables.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-oldest: $(VENV)-oldest/.installed-test
	$(VENV)-oldest/bin/python $(PYTEST) $(TEST_ARGS)

test-newest: $(VENV)-newest/.installed-test
	$(VENV)-newest/bin/python $(PYTEST) $(TEST_ARGS)

bench: $(VENV)/.installed-test
	set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest docs/_build runs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

# What is installed is remembered by an empty file, so that a change of versions reinstalls and nothing else does.
$(VENV)/.installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e '.[all]' -c constraints.txt
	touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e '.[docs]' -c constraints.txt
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e '.[test,lint]' -c constraints.txt
	touch $@

$(VENV)-oldest/.installed-test: pyproject.toml constraints-oldest.txt
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python $(PIP_INSTALL) -e '.[test]' -c constraints-oldest.txt
	touch $@

# Nothing is remembered: newer releases may have come.
.PHONY: $(VENV)-newest/.installed-test
$(VENV)-newest/.installed-test:
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[test]'
