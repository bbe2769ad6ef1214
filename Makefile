# All that a fresh machine with Python and make needs: `make race`, `make test`.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: race test lint bench bench-steps bench-diagonal bench-isaac bench-pruning peers rules clean

race: .venv/installed
	$(BIN)/quadric race $(ARGS)

test: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pytest $(ARGS)

lint: .venv/installed  # pyright brings its own Node.js program, from the npm registry
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: bench-steps bench-diagonal bench-isaac

bench-steps: .venv/installed
	$(BIN)/python benchmarks/step_cost.py $(ARGS)

bench-diagonal: .venv/installed
	$(BIN)/python benchmarks/hessian_diagonal.py $(ARGS)

bench-isaac: .venv/installed
	$(BIN)/python benchmarks/isaac_overhead.py $(ARGS)

bench-pruning: .venv/installed  # needs ARGS="--data-dir FOLDER --weights FILE --json FILE"
	$(BIN)/python benchmarks/pruning.py $(ARGS)

peers: .venv/installed  # other people's libraries, for the rows of bench-diagonal and bench-isaac that need them
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt -r benchmarks/requirements.txt

rules: .venv/installed  # docs/rules.md from the registry
	$(BIN)/python docs/make_rules.py

# torch first and alone: with its pinned release installed, nothing else pulls another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
