# `make demo` runs the whole pipeline, `make test` the tests, `make docs` makes the documentation's site
# in build/site, `make doors` runs the tests inside other tools (some 200 MB) and in an environment
# without grasp (with a torch of its own); each sets up this machine by itself. `make wheels` builds
# what a release holds, `make check-wheels` checks it (CHECKS="names again" for some of it), `make hub`
# lays the kernels out for the Kernel Hub.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
DOORS := $(abspath $(VENV))/doors
# TORCH=2.11.0 installs that torch, with the triton that it asks for, in place of the one in constraints.txt.
TORCH ?=
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
TOOLS := axolotl llama_factory unsloth

# DeepSpeed is installed without compiling, and tested on the CPU, whatever the machine has.
export DS_BUILD_OPS := 0
export DS_ACCELERATOR := cpu

.PHONY: demo test docs doors lint wheels check-wheels hub clean

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed -E '/^(torch|triton)==/d; $$ a torch==$(TORCH)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/grasp demo --out $(OUT)

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Each tool in a folder of its own, since their pins exclude each other's. PyPI has torchaudio for
# CUDA alone; without its library it is Python, which is enough where no sound is read.
$(DOORS)/%/.ready: tests/doors/%.txt $(VENV)/.ready
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	rm -f $(@D)/torchaudio/lib/*.so
	touch $@

$(DOORS)/stock/.ready: constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c $< torch transformers peft
	touch $@

doors: $(TOOLS:%=$(DOORS)/%/.ready) $(DOORS)/stock/.ready
	STOCK_PYTHON=$(DOORS)/stock/bin/python $(BIN)/python -m pytest tests/test_stock_peft.py
	for tool in $(TOOLS); do \
	  PYTHONPATH=$(DOORS)/$$tool:$(CURDIR) $(BIN)/python -m pytest tests/test_$$tool.py || exit 1; \
	done

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python docs/tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir build/site

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without what tests need, so that a container that builds wheels installs little.
$(VENV)/.release: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	touch $@

wheels: $(VENV)/.release
	$(BIN)/python -m release.wheels

check-wheels: $(VENV)/.release
	$(BIN)/python -m release.check $(CHECKS)

hub: $(VENV)/.release
	$(BIN)/python -m release.hub

clean:
	rm -rf $(VENV) build dist *.egg-info runs
