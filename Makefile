# make ablate   layer-skip study of the default checkpoint on the built-in recordings
# make test     the whole test suite
# make base     fetch the base language model only
# Each first makes .venv and installs, once; the pins are in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: ablate test base

ablate: base
	$(BIN)/python -m melprobe.ablate --skip-layers

test: base
	$(BIN)/python -m pytest

base: $(INSTALLED)
	$(BIN)/python -m melprobe.model.base

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "melprobe needs Python 3.11 or newer: try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
