# The two commands of the README. Each does all the set-up that it needs.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# DVC asks for a name, which a user who is only a number, as in some containers, does not have.
export LOGNAME ?= user

.PHONY: demo test lint format mutants bench params repository
.DELETE_ON_ERROR:

# The whole pipeline through DVC, on the embedded data set.
demo: repository .venv/.installed
	@git config user.email > /dev/null || { \
	  export GIT_AUTHOR_NAME=demo GIT_AUTHOR_EMAIL=demo@localhost; \
	  export GIT_COMMITTER_NAME=demo GIT_COMMITTER_EMAIL=demo@localhost; }; \
	  echo "(at first DVC warns of outputs that are not there yet)"; dvc exp run -S experiment=demo
	@echo
	@echo "report:   reports/report.html, open it in a browser"
	@echo "samples:  reports/samples.png"
	@echo "metrics:  reports/train.json, reports/evaluate.json (dvc metrics show)"
	@echo "model:    models/model.safetensors (python main.py stage=sample)"
	@echo "to keep this run in Git: git add params.yaml dvc.lock reports && git commit; or: git checkout params.yaml"

# DVC versions experiments in Git, so a folder from a zip file is not enough.
repository:
	@git rev-parse --is-inside-work-tree > /dev/null || { echo "DVC needs a Git repository; if there is none here: git init && git add -A && git commit -m start, then make demo again"; exit 1; }

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses=3 --maxschedchunk=1 --cov --cov-report=term-missing --cov-fail-under=99
	@! $(BIN)/python -c "import torch; exit(not torch.cuda.is_available())" || TEST_CUDA=1 $(BIN)/python -m pytest -m cuda

# Speed against the peers, on this machine, with nothing else running: BENCH=--quick for a few minutes on two cores.
bench: .venv/.installed
	$(BIN)/python -m benchmarks.bench $(BENCH)

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Formats, and mends what ruff can mend.
format: .venv/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# Which single changes of the mathematics no test notices, by name, and the score: half an hour on one core. In a
# copy, and there without the decorator, since mutmut leaves a decorated function as it is.
mutants: .venv/.installed
	rm -rf .mutants && mkdir .mutants && git ls-files -z | xargs -0 cp --parents -t .mutants
	grep -rl '@torch.no_grad()' .mutants/modeling | xargs sed -i '/^ *@torch.no_grad()$$/d'
	cd .mutants && OMP_NUM_THREADS=1 ../$(BIN)/python -m mutmut run --max-children 1 && ../$(BIN)/python -m mutmut results

# params.yaml as conf/ composes it, with no override: after an edit in conf/, before a commit.
params: .venv/.installed
	$(BIN)/python -c "from dvc.utils.hydra import compose_and_dump; compose_and_dump('params.yaml', __import__('os').path.abspath('conf'), None, 'config', '.', [])"

.venv/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@
