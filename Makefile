# Each target works as the first command on a fresh machine: the environment is made when missing.
PYTHON ?= python3
BIN := .venv/bin
# Most tests wait for a process of one thread; those of a file share what they have prepared.
BOTH := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.DELETE_ON_ERROR:
.PHONY: demo assets test test-all soak test-isa lint format

.venv: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch .venv

test: .venv          ## the test suite, without its slow part
	$(BIN)/pytest $(BOTH) -m "not slow and not gpu"

test-all: .venv      ## with the slow part
	$(BIN)/pytest $(BOTH) -m "not soak"

soak: .venv          ## what repeats a test for many minutes: a hundred kills
	$(BIN)/pytest $(BOTH) -m soak

# Kernels of other instruction sets sum in another order: every tolerance must leave room for that.
# Torch's own, oneDNN's (convolutions) and MKL's (matrix products) each have a variable.
NUMBERS := $(addprefix tests/unit/,diffusion evaluation inference models training) \
  $(patsubst %,tests/integration/test_%.py,augment evaluate explain package phema)
test-isa: .venv      ## the tests of numbers as processors without vectors, and with AVX2, compute them
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 \
	  $(BIN)/pytest $(BOTH) -m "not slow and not gpu" $(NUMBERS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 \
	  $(BIN)/pytest $(BOTH) -m "not slow and not gpu" $(NUMBERS)

lint: .venv          ## form, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: .venv        ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv          ## a model trained on a drawn world in minutes, its accuracy, and a picture of it
	$(BIN)/python train.py name=demo
	$(BIN)/python -m ldm.evaluate ckpt=runs/demo features=none
	$(BIN)/python sample.py ckpt=runs/demo prompts=docs/demo.txt n=1 out=runs/demo/samples/demo.png

SHARED ?= ../shared/data
assets: .venv        ## the packaged autoencoder and CLIP again from nothing, in an hour on two cores
	$(BIN)/python -m ldm.prepare scenes out=data/scenes/64px/train-20000 part=train limit=20000 size=64
	$(BIN)/python -m ldm.prepare scenes out=data/scenes/64px/val-500 part=val limit=500 size=64
	for part in train val; do \
	  $(BIN)/python -m ldm.prepare folder images=$(SHARED)/emoji64 out=data/emoji/$$part \
	    part=$$part size=64 format=png || exit; \
	done
	$(BIN)/python -m ldm.prepare coco images=$(SHARED)/coco_mini/train2017 \
	  annotations=$(SHARED)/coco_mini/annotations/captions_train2017.json out=data/coco/train size=64
	$(BIN)/python train.py experiment=autoencoder_tiny
	$(BIN)/python train.py experiment=clip_tiny
	$(BIN)/python -m ldm.package autoencoder=runs/autoencoder_tiny clip=runs/clip_tiny
