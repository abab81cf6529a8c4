# The map of the stages. `make small` runs both tracks from nothing, `make small-a` and `make small-b` one of them; `make
# test` runs the tests. Each makes its own virtual environment unless one is active. A finished stage is skipped, an
# interrupted one goes on where it was, and the first gate that fails ends it. `make -j2 small` gives each track a core.
# `make -j2 small SEED=2` makes and trains everything from another seed: in a clone of its own, the folders are the same.

ifdef VIRTUAL_ENV
venv   :=
python := python
else
venv   := .venv/ready
python := .venv/bin/python
endif

SEED ?= 1

# matrices as small as these gain nothing from a second thread
export OMP_NUM_THREADS ?= 1

.PHONY: small small-a small-b test quick proofs rehearsal browser clean

small: small-a small-b
	$(python) gates.py out

small-a: out/a1_small/done out/a11_small/done out/a2_small/done
small-b: out/b1_small/done out/b2_small/done out/b3_small/done out/b4_small/done

data/small/seed.json: $(venv)             # stage 0: the seed; its parts are made by the configs that need them
	$(python) -m small.make --seed=$(SEED) --parts="()"

out/a1_small/done: data/small/seed.json   # A1: connector alignment
	$(python) train_a1.py configs/a1_small.py --seed=$(SEED) --resume=True
	$(python) -m small.score out/a1_small
	touch $@

out/a11_small/done: out/a1_small/done     # A1.1: stability sweep
	$(python) sweep_a11.py configs/a11_small.py --seed=$(SEED)
	touch $@

out/a2_small/done: out/a1_small/done      # A2: visual instruction tuning
	$(python) train_a2.py configs/a2_small.py --seed=$(SEED) --resume=True
	$(python) -m small.score out/a2_small
	touch $@

out/a2_pairs_small/done: out/a2_small/done   # A2 goes on with two pictures: not a part of `make small`
	$(python) train_a2.py configs/a2_pairs_small.py --seed=$(SEED) --resume=True
	$(python) -m small.score out/a2_pairs_small
	touch $@

out/b1_small/done: data/small/seed.json   # B1: token space and codecs, audited
	$(python) uti.py configs/b1_small.py
	$(python) -m small.score out/b1_small
	touch $@

out/b2_small/done: out/b1_small/done      # B2: tokenized shards
	$(python) build_b2.py configs/b2_small.py
	touch $@

out/b3_small/done: out/b2_small/done      # B3: rows for the new tokens
	$(python) train_b3.py configs/b3_small.py --seed=$(SEED) --resume=True
	touch $@

out/b4_small/done: out/b3_small/done      # B4: multimodal token pretraining
	$(python) train_b4.py configs/b4_small.py --seed=$(SEED) --resume=True
	$(python) -m small.score out/b4_small
	touch $@

test: $(venv)                             # what CI runs: minutes
	$(python) -m ruff check .
	$(python) -m pytest -q -n 2 --dist loadscope -m 'not slow'

quick: $(venv)                            # before each commit: no stage is run, a minute
	$(python) -m ruff check .
	$(python) -m pytest -q -n 2 --dist loadscope -m 'not slow and not stage and not browser'

proofs: $(venv)                           # the slow proofs: trains the small world for real
	$(python) -m pytest -q -m slow

rehearsal: $(venv)                        # the chain of the real configs: real widths, few layers, random weights
	$(python) -m tools.rehearsal

browser: $(venv)                          # report.html in Chromium (Debian: apt install chromium)
	$(python) -m pytest -q -m browser -rs

.venv/ready: pyproject.toml
	python3 -c 'import sys; sys.exit(f"Python {sys.version.split()[0]} is too old, wanted 3.11 or newer") if sys.version_info < (3, 11) else 0'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet '.[test]'
	touch $@

clean:                                    # everything that was made, but not the environment
	rm -rf data/small out
