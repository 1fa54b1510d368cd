# Two commands: `make demo` and `make test`. Both set up .venv by themselves, once.
# `make harden` runs what takes longer: campaigns, long tests, other processors.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m gradeclip_ft

.PHONY: demo test harden results methods segmentation tables detector speed clean

demo: $(VENV)/installed
	rm -rf runs/demo_ordinary runs/demo_gradeclip runs/demo_best
	$(RUN) train +exp=shapes_ordinary name=demo_ordinary trainer.log_every=5 evaluation.every=50
	$(RUN) train +exp=shapes name=demo_gradeclip trainer.log_every=5 evaluation.every=50
	$(RUN) train +exp=shapes_best name=demo_best trainer.log_every=5 evaluation.every=50
	$(RUN) report runs/demo_ordinary runs/demo_gradeclip runs/demo_best explainer=maskclip

# The tables of results/: twelve rows and three seeds, two runs at a time; about 40 minutes on two cores.
results: $(VENV)/installed-dev
	rm -rf runs/maps_*
	$(RUN) data make shapes
	OMP_NUM_THREADS=1 $(RUN) train -m '+exp/maps=glob(*)' seed=0,1,2 trainer.threads=1 hydra/launcher=joblib hydra.launcher.n_jobs=2
	$(RUN) compare 'runs/maps_*' by=[map,heads,stop_gradient,loss] out=results/shapes_maps
	$(RUN) compare 'runs/maps_ordinary_*' 'runs/maps_grad_eclip_one_stopped_*' by=[map,heads,stop_gradient,loss] out=results/shapes_demo

# results/shapes_methods: where the maps of every method point, before and after; about 15 minutes.
methods: runs/demo_gradeclip/weights.safetensors
	$(RUN) evaluate model=shapes_tiny evaluator=shapes_pointing out=runs/demo_gradeclip/evaluations
	$(RUN) evaluate run=demo_gradeclip evaluator=shapes_pointing
	$(RUN) compare runs/demo_gradeclip rows=methods 'metrics=[*/pointing,*/energy,*/any_object]' out=results/shapes_methods

# results/tables_*: the papers' tables of methods in the shapes world, before and after fine-tuning; about 20 minutes of one core.
SWEEP := evaluator=shapes_faithfulness methods@evaluator.shapes_faithfulness.explainers
tables: runs/demo_gradeclip/weights.safetensors
	for table in faithfulness words class_maps attributes 'pointing evaluator.shapes_pointing.data.limit=100'; do \
	    where=runs/tables/$${table%% *}; \
	    $(RUN) evaluate model=shapes_tiny evaluator=shapes_$$table out=$$where && \
	    $(RUN) evaluate run=demo_gradeclip evaluator=shapes_$$table out=$$where page=true || exit 1; done
	for sweep in lambda heads 'depth evaluator.shapes_faithfulness.methods=[depth_1,depth_2,depth_3]'; do \
	    $(RUN) evaluate run=demo_gradeclip $(SWEEP)=$$sweep out=runs/tables/$${sweep%% *} page=true || exit 1; done
	for table in faithfulness words lambda heads depth; do \
	    $(RUN) compare runs/tables/$$table rows=methods significance=true 'metrics=[*@1]' out=results/tables_$$table || exit 1; done
	$(RUN) compare runs/tables/pointing rows=methods significance=true 'metrics=[*/pointing,*/energy,*/pixel_precision,*/ap,*/iou]' out=results/tables_localisation
	$(RUN) compare runs/tables/class_maps rows=methods 'metrics=[*/m*]' out=results/tables_class_maps
	$(RUN) compare runs/tables/attributes rows=methods 'metrics=[*_cosine]' out=results/tables_attributes

# mIoU of four models by every dense path, with a page of pictures for each; about 10 minutes.
segmentation: $(VENV)/installed
	rm -rf runs/segmentation_*
	$(RUN) train +exp=shapes_ordinary name=segmentation_ordinary evaluator=[shapes_segmentation]
	$(RUN) train +exp=shapes name=segmentation_gradeclip evaluator=[shapes_segmentation]
	$(RUN) train +exp=shapes_best name=segmentation_best evaluator=[shapes_segmentation]
	$(RUN) compare 'runs/segmentation_*' rows=methods 'metrics=[*/mIoU]'

runs/demo_gradeclip/weights.safetensors: | $(VENV)/installed
	$(RUN) train +exp=shapes name=demo_gradeclip trainer.log_every=5 evaluation.every=50

# results/detector: one detector on the frozen CLIP before and after fine-tuning.
detector: $(VENV)/installed-dev
	rm -rf runs/start_* runs/detector_*
	$(RUN) train +exp=shapes_ordinary name=start_ordinary evaluator=[]
	$(RUN) train +exp=shapes name=start_gradeclip evaluator=[]
	$(RUN) train +exp=detector_shapes name=detector_untouched
	$(RUN) train +exp=detector_shapes name=detector_ordinary init_from=start_ordinary
	$(RUN) train +exp=detector_shapes name=detector_gradeclip init_from=start_gradeclip
	$(RUN) compare 'runs/detector_*' steps=last out=results/detector

# results/recipes: every recipe of conf/exp/lab, three seeds, in both shapes worlds and on photos
# (PHOTOS=FOLDER). With JOBS=N, N runs at a time; with TRAINER=gpu on a GPU. A row of 200 steps takes two
# to four minutes of one core in the first world, hours in all. Stopped, it goes on where it was.
JOBS ?= 1
TRAINER ?= cpu
lab: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.lab jobs=$(JOBS) trainer=$(TRAINER)

# The tables of results/speed.md; about 40 minutes of one core that has nothing else to do.
speed: $(VENV)/installed-dev
	for what in 'step model=ViT-B-16' 'step model=EVA02-B-16' 'memory model=ViT-B-16' 'memory model=EVA02-B-16' \
	    scaling explain phrases loader evaluate startup; do \
	    OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench $$what out=results/speed || exit 1; done

# One thread adds in one order: exact comparisons stay exact. Two workers share the files of tests.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile

test: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not slow'

# Instruction sets that this processor has, by the names that torch gives them.
CAPABILITIES := default $(shell grep -qsw avx2 /proc/cpuinfo && echo avx2) $(shell grep -qs avx512f /proc/cpuinfo && echo avx512)

# About an hour and a half on two cores; any of the lines can be typed alone.
harden: $(VENV)/installed-dev
	$(BIN)/python -m tools.kill_test
	$(BIN)/python -m tools.kill_test ranks=true
	$(BIN)/python -m tools.faults out=results/faults.md
	$(BIN)/python -m tools.fuzz cases=10000
	$(BIN)/python -m tools.soak samples=100000
	$(BIN)/python -m tools.check_towers
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow
	for capability in $(CAPABILITIES); do for threads in 1 2; do \
	    echo "ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=$$threads"; \
	    ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=$$threads $(PYTEST) -m 'not slow' || exit 1; \
	done; done

$(VENV)/installed: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) runs data exports
