# Each target works as the first command on a fresh machine: the environment is made when missing.
PYTHON ?= python3
BIN := .venv/bin
COCO ?= ../shared/data/coco_mini

.DELETE_ON_ERROR:
.PHONY: demo test test-all lint format

.venv: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch .venv

test: .venv          ## the test suite, without its slow part
	$(BIN)/pytest -m "not slow and not gpu"

test-all: .venv      ## all of it
	$(BIN)/pytest

lint: .venv          ## what CI checks of form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv        ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv          ## COCO files to a sampled picture in ten minutes; COCO=DIR has COCO's layout
	@test -d $(COCO)/train2017 || { echo "make demo COCO=DIR: DIR holds train2017/, val2017/ and annotations/ as COCO has them"; exit 2; }
	for part in train val; do \
	  $(BIN)/python -m ldm.prepare coco images=$(COCO)/$${part}2017 \
	    annotations=$(COCO)/annotations/captions_$${part}2017.json out=data/coco/$$part size=64 || exit; \
	done
	$(BIN)/python train.py experiment=autoencoder_coco
	$(BIN)/python train.py experiment=clip_coco
	$(BIN)/python train.py data=coco model=nano name=coco-first \
	  autoencoder.path=runs/autoencoder_coco text_encoder.path=runs/clip_coco \
	  trainer.max_steps=200 trainer.val_check_interval=100 optimizer.lr=1e-3
	$(BIN)/python sample.py ckpt=runs/coco-first prompt="a man riding a wave" n=4
