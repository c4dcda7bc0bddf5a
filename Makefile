# `make demo` and `make test` are all that a newcomer needs; both set up .venv on their first run.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# `make test` runs the node tests and the workflows in the ComfyUI of COMFYUI_PATH, around this
# pack, or in ~/ComfyUI (with its environment in .venv or venv), and says in one line which it was.
PROMPT ?= a girl with red hair, pale skin and a green shirt on a blue background says ba mi tu \
	in a high voice
LENGTH ?= 10
OUT ?= output
# What `make evaluate` compares: name=file for each model, name:mode:steps for each row of a table.
MODELS ?= shipped=models/mutual_forcing_small.safetensors
ROWS ?= shipped:few:4 shipped:few:8 shipped:multi:50
LONG_ROWS ?= shipped:few:4
PROMPTS ?= 64
SEEDS ?= 3
JOBS ?= 2
TESTS ?= tests
# Processes that tests run in, a file by one of them; 0: all in one.
WORKERS ?= 2
# The networks here are small: a second thread brings nothing, and costs much on a busy machine.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test page lint golden mutants parity ltx2 evaluate clean

$(VENV)/.run: requirements-standalone.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-standalone.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	# torchaudio's wheel is linked to CUDA; only its pure Python part (resampling) is used here.
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps torchaudio==2.11.0
	$(PY) -c "import torch, sys; sys.exit(torch.version.cuda is None)" \
		|| rm -f $(VENV)/lib/python*/site-packages/torchaudio/lib/*.so
	touch $@

demo: $(VENV)/.run
	mkdir -p $(OUT)
	$(PY) generate.py "$(PROMPT)" --seconds $(LENGTH) --seed 7 \
		-o $(OUT)/demo.mp4 --contact-sheet $(OUT)/demo.png

lint: $(VENV)/.dev
	$(PY) -m ruff check .

test: lint
	$(PY) -m pytest -c tests/pytest.ini $(TESTS) -q --durations=10 \
		-n $(WORKERS) --dist loadfile

# The workflows by ComfyUI's Run button, in Chromium (playwright in ComfyUI's environment).
page: $(VENV)/.dev
	$(PY) -m pytest -c tests/pytest.ini tests/nodes -q -m page

# What the shipped model makes of one prompt, in numbers that a test holds it to; again with each
# new model.
golden: $(VENV)/.run
	@$(PY) launch.py tests.golden

# Are formulas guarded by tests? Each of a list of wrong ones must turn a test red: `killed K of N`.
mutants: $(VENV)/.dev
	@$(PY) launch.py tests.mutants $(MUTANTS)

parity: $(VENV)/.run
	@$(PY) launch.py model_loaders.parity $(GOLDEN)

# LTX-2 inside ComfyUI (COMFYUI_PATH) against this pack's own network, and what every 8-bit and
# 4-bit format changes, on files with random weights: one number a line.
COMFYUI_PATH ?= $(HOME)/ComfyUI
COMFYUI_PYTHON ?= $(firstword $(wildcard $(addsuffix /bin/python, $(COMFYUI_PATH)/venv \
	$(COMFYUI_PATH)/.venv $(COMFYUI_PATH)/../venv $(COMFYUI_PATH)/../.venv)) $(PYTHON))

ltx2:
	@$(COMFYUI_PYTHON) tests/shrunken_ltx2.py $(COMFYUI_PATH) $(OUT)/ltx2
	@$(COMFYUI_PYTHON) tests/inside_comfyui_ltx2.py $(COMFYUI_PATH) $(OUT)/ltx2

evaluate: $(VENV)/.dev
	mkdir -p $(OUT)/measured
	$(PY) launch.py lab.metrics.evaluate --mode multi --prompts 64 --seconds 5 \
		--out $(OUT)/measured/multi
	$(PY) launch.py lab.metrics.longrun --seconds 60 --out $(OUT)/measured/longrun
	$(PY) launch.py lab.metrics.compare --models $(MODELS) --rows $(ROWS) \
		--prompts $(PROMPTS) --seeds $(SEEDS) --seconds 5 --jobs $(JOBS) --out $(OUT)/measured/compare
	$(PY) launch.py lab.metrics.horizon --models $(MODELS) --rows $(LONG_ROWS) \
		--prompts $(PROMPTS) --seeds $(SEEDS) --seconds 60 --jobs $(JOBS) --out $(OUT)/measured/horizon

clean:
	rm -rf $(VENV) output
