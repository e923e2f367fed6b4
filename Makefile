# make target=NAME [recipe=PATH] [out=DIR] [baseline=BUNDLE]    build a recipe for a target
# make bench [against=COMMIT]                                     how fast this program is
# make test | lint | kit | race | clean
#
# Python packages go into .venv, installed once per change of pyproject.toml or constraints.txt.

target   ?= cpu
recipe   ?= examples/digits/recipe.toml
out      ?=
baseline ?=
kit      ?= ../shared/kit
against  ?=
PYTHON   ?= python3
export target recipe out baseline kit against

bin    := .venv/bin
# A moved checkout needs a new editable install, so the place is part of the stamps' names.
place  := $(shell printf %s "$(CURDIR)" | cksum | cut -d ' ' -f 1)
base   := .venv/.base-$(place)
torch  := .venv/.torch-$(place)
sample := .venv/.examples-$(place)
dev    := .venv/.dev-$(place)
pip    := $(bin)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# Only a model made by Python code needs torch; the example needs its data set, too.
ifeq ($(recipe),examples/digits/recipe.toml)
needs := $(sample)
else ifneq ($(shell grep -Es '^[[:space:]]*source[[:space:]]*=.*\.py:' '$(subst ','\'',$(recipe))'),)
needs := $(torch)
else
needs := $(base)
endif

# Two processes, a file of tests to each at a time: its fixtures are made once. In the order of the
# files, since the long ones come first; by their number of tests one of minutes would be the last.
beside := -n 2 --dist loadfile --no-loadscope-reorder

meaning = case $$code in \
	1) why="gate FAIL";; 2) why="usage";; 3) why="bad input";; 4) why="gate INCONCLUSIVE";; \
	5) why="integrity";; 6) why="environment";; 130|143) why="interrupted";; \
	*) why="unexpected";; esac; \
	[ $$code = 0 ] || echo "edgewright: exit $$code ($$why)" >&2; exit $$code

.PHONY: build test lint kit bench race clean distclean
.DELETE_ON_ERROR:
.NOTPARALLEL:

build: $(needs)
	@code=0; { $(bin)/edgewright setup --target "$$target" && $(bin)/edgewright build "$$recipe" \
		--target "$$target" $${out:+--out "$$out"} $${baseline:+--baseline "$$baseline"}; } \
		|| code=$$?; $(meaning)

test: $(dev)
	@$(bin)/edgewright setup --target arm --target cpu-avx2
	@[ "$$(uname -m)" != x86_64 ] || $(bin)/edgewright setup --target openvino \
		|| echo "edgewright: the tests with OpenVINO will be skipped" >&2
	$(bin)/python -m pytest $(beside) --durations=25

lint: $(dev)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

# Every case of the measuring kit, scored by the kit itself, beside the peers' figures.
kit: $(base)
	@$(bin)/edgewright setup --target "$$target"
	@$(bin)/python bench/kit.py --kit "$$kit" --target "$$target"

# How long pieces of this program take; with against=COMMIT, which of them became slower since.
bench: $(dev)
	@mkdir -p build/bench
	@if [ -n "$$against" ]; then \
		$(bin)/python bench/compare.py "$$against" --json build/bench/against.json; \
	else \
		$(bin)/python -m pytest bench/test_speed.py -q -o addopts= -p no:cacheprovider \
			--benchmark-json=build/bench/speed.json \
			--benchmark-columns=min,median,iqr,rounds --benchmark-sort=fullname; \
	fi

# The built model against its original once more, on this machine.
race: build
	@name=$$(sed -n 's/^name *= *"\([^"]*\)".*/\1/p' "$$recipe" | head -n 1); \
	folder="$${out:-build/$$name}/$$target"; \
	code=0; $(bin)/edgewright bench "$$folder/model.onnx" \
		"$$folder/stages/01-export/model.onnx" --recipe "$$recipe" --target "$$target" \
		|| code=$$?; $(meaning)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

distclean: clean
	rm -rf .venv

$(base): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "edgewright: Python 3.11 or later is needed; name one with PYTHON=..." >&2; exit 6; }
	@echo "edgewright: setting up .venv" >&2
	@$(PYTHON) -m venv .venv || { echo "edgewright: no virtual environment could be made;" \
		"on Debian: apt-get install python3-venv" >&2; exit 6; }
	@$(pip) -e .
	@touch $@

$(torch): $(base)
	@echo "edgewright: installing torch into .venv" >&2
	@$(pip) -e '.[torch]'
	@touch $@

$(sample): $(base)
	@echo "edgewright: installing torch and scikit-learn into .venv" >&2
	@$(pip) -e '.[examples]'
	@touch $@

$(dev): $(sample)
	@echo "edgewright: installing the tools for tests into .venv" >&2
	@$(pip) -e '.[dev,examples]'
	@touch $@
