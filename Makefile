# make run    a fresh machine to submission.csv and pictures, for the miniature or for DATA=folder
# make app    a page on this computer: drop a clip, see its report
# make test   every unit test and every notebook, on the miniature; on real clips too where DEEPFAKE_DATA names them;
#             in WORKERS=2 processes
# make test-fast  lint and the unit tests that take seconds
# make docs       the site: README, docs, cards and every notebook, executed on the miniature; about five minutes
# make test-mounts  every notebook as Kaggle runs it: from each of its mount layouts, without the internet
# make test-kaggle  make test on the oldest packages allowed, those of Kaggle's image, in an environment of its own
# make test-cluster the long tests of extraction over processes and a dask cluster, and of training over two devices
# make benchmark  seconds and faces: the study's procedure, ours and peers, each in an environment of its own; a chart in docs/;
#             clips an hour from a cache, in two processes and on a cluster of two workers
# make test-kills a hundred runs over folders killed at random times
# make fuzz       10,000 mutated clips through the reading of pictures and of sound
# make checksums  write models/SHA256SUMS anew, after weights or detector.json were replaced
# make clean  remove what these made

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
DATA   ?=
RESOLUTION ?= highest
WORKERS ?= 2
PYTEST := $(PY) -m pytest -q --durations=15

export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: run app test test-fast docs test-mounts test-kaggle test-cluster benchmark lint test-kills fuzz checksums clean

run: $(VENV)/.ready
	$(PY) -m kaggle_utils predict $(DATA)

app: $(VENV)/.ready
	$(PY) -m kaggle_utils app

test: $(VENV)/.ready lint
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile tests notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout=300

FAST := test_rooms test_results test_metrics test_dataset test_submission test_video test_networks test_framing test_rules test_paths
test-fast: $(VENV)/.ready lint
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile $(wildcard $(FAST:%=tests/%.py))

docs: $(VENV)/.ready
	$(PY) docs/build.py

test-mounts: $(VENV)/.ready
	DEEPFAKE_MOUNTS=all $(PYTEST) tests/test_mounts.py tests/test_paths.py

test-kaggle:
	$(MAKE) test VENV=.venv-kaggle RESOLUTION=lowest-direct

test-cluster: $(VENV)/.ready
	DEEPFAKE_LONG=1 $(PYTEST) tests/test_extraction.py tests/test_chain.py tests/test_data_parallel.py

PEERS := $(patsubst benchmarks/requirements-%.txt,work/benchmark/%/.ready,$(wildcard benchmarks/requirements-*.txt))

benchmark: $(VENV)/.ready $(PEERS)
	$(PY) benchmarks/run.py --environments work/benchmark
	$(PY) benchmarks/chain.py
	$(PY) benchmarks/growth.py

work/benchmark/%/.ready: benchmarks/requirements-%.txt | $(VENV)/.ready
	$(PY) -m venv $(@D)
	$(PY) -m uv pip install --python $(@D)/bin/python -r $< || $(@D)/bin/python -m pip install --no-compile -r $<
	@touch $@

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check benchmarks conftest.py docs kaggle_utils recipes tests notebooks
	$(VENV)/bin/mypy --no-error-summary

test-kills: $(VENV)/.ready
	DEEPFAKE_KILLS=100 $(PYTEST) tests/test_long_runs.py -k killed

fuzz: $(VENV)/.ready
	$(PY) tests/fuzz_reading.py 10000

checksums:
	for folder in models models/reference; do (cd $$folder && sha256sum *.keras detector.json > SHA256SUMS); done

# uv installs the same packages as pip, several times faster; where it cannot be had, pip does it.
# opencv-python needs the system's libGL: without it, the same version without windows takes its place.
$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --only-binary :all: uv && $(PY) -m uv pip install --compile-bytecode --resolution $(RESOLUTION) \
	  --python $(PY) -r requirements.txt || $(PY) -m pip install -r requirements.txt
	@$(PY) -c 'import cv2' 2>/dev/null || { \
	  version=$$($(PY) -c 'from importlib.metadata import version; print(version("opencv-python"))'); \
	  echo "libGL is missing: opencv-python-headless $$version takes the place of opencv-python"; \
	  $(PY) -m pip uninstall -q -y opencv-python; \
	  $(PY) -m pip install -q --force-reinstall --no-deps opencv-python-headless==$$version; }
	@touch $@

clean:
	rm -rf $(VENV) .venv-kaggle build site work .pytest_cache .ruff_cache
