# Each target does all the set-up it needs.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# By file: each that needs Ray has one of its own.
TWO_LANES := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
# Where the time went, at the end of each part.
SLOWEST := --durations 12

.PHONY: setup demo test test-slow chaos image lint
setup: $(INSTALLED)

$(INSTALLED): pyproject.toml launch/install.sh launch/constraints.txt
	launch/install.sh $(VENV)
	touch $@

# Raw interactions in, a trained and evaluated FELRec out: at most five minutes on two cores.
demo: $(INSTALLED)
	rm -rf data/demo runs/demo
	$(BIN)/felrec synthesize data/demo/raw.parquet --num-events 60000 --num-users 800 --num-items 600 \
		--num-tastes 6 --taste-strength 0.99 --closedness 0.92
	$(BIN)/felrec prepare parquet data/demo/raw.parquet --out data/demo/prepared --name demo \
		--user user --item item --timestamp timestamp --timestamp-unit ms
	$(BIN)/felrec train configs/demo.yaml

test: $(INSTALLED)
	$(TWO_LANES) -m "not slow" $(SLOWEST)

test-slow: $(INSTALLED)
	$(TWO_LANES) -m slow $(SLOWEST)

# Kills processes of trainings, over and over: about half an hour; CHAOS="--minutes 600 --runs 40".
chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos $(CHAOS)

# The Dockerfile's image, CPU, built without a Docker engine; as root, with Debian's buildah and debootstrap.
image:
	tests/launch/image.sh

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
